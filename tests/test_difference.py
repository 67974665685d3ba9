"""Two experiments side by side, from times whose ratio is known; no model is loaded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from inferkit.errors import OptionError
from inferkit.experiments.difference import FEWEST, Difference
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import (
    DeviceEntry,
    Environment,
    ExperimentFile,
    ModeEntry,
    ModelEntry,
    RequestEntry,
)
from inferkit.intervals import _drawn_medians, bootstrap, bootstrap_grouped, bootstrap_ratio

MS = 1_000_000
GPU = "NVIDIA H100 80GB HBM3"


def request(
    number: int, ttft: float = 100, gaps: Any = (20.0,) * 9, queue: float = 1, **given: Any
) -> RequestEntry:
    """A request with its own prompt, long after the one before was over; times in ms.

    With ``arrival`` in ms, it came at that time.
    """
    arrival = given.pop("arrival", 60_000 * number) * MS
    tokens = [arrival + round(t * MS) for t in np.cumsum([ttft, *gaps])]
    settings = {"model": "m", "device": "cpu", "dtype": "bfloat16", "quantization": "none"}
    entry = RequestEntry(
        model=0,
        mode=0,
        prompt=f"prompt {number}",
        prompt_token_ids=[1, 2, number],
        prompt_tokens=3,
        params={"max_tokens": 10},
        seed=0,
        settings=settings | {"batching": "continuous", "max_batch": 4},
        token_ids=list(range(10, 10 + len(tokens))),
        text="some text",
        finish_reason="length",
        arrival=arrival,
        scheduled=arrival + round(queue * MS),
        tokens=tokens,
        finished=tokens[-1],
    )
    for name, value in given.items():
        setattr(entry, name, value)
    return entry


def experiment(
    requests: list[RequestEntry],
    name: str = "one",
    mode: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    **file: Any,
) -> Experiment:
    ran = {"quantize": "none", "format": "none", "batching": "continuous", "max_batch": 4}
    ran |= {"context": 2048, "step": "compiled"} | (mode or {})
    loaded = {"name": "m", "ref": "org/m", "kind": "hub", "devices": ["cuda:0"]}
    loaded |= {"dtype": "bfloat16", "files": {"model.safetensors": "aa" * 32}} | (model or {})
    where = {
        "packages": {"torch": "2.9.1", "jupyter-inferkit": "0.1.0"},
        "cpu": "EPYC 9354",
        "processors": 16,
        "threads": 8,
        "devices": [DeviceEntry(name="cuda:0", kind="cuda", description=GPU, total=80, bf16=True)],
    }
    return Experiment(
        ExperimentFile(
            name=name,
            created="2026-11-27T10:00:00+00:00",
            environment=Environment(**where | (environment or {})),
            duration=10**13,
            models=[ModelEntry(**loaded)],
            modes=[ModeEntry(time=0, model=0, **ran)],
            requests=requests,
            **file,
        )
    )


def noisy(count: int, seed: int, factor: float = 1.0, tokens: int = 10) -> list[RequestEntry]:
    """Requests whose gaps have in common what their request has, as in a real run."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        own = draw.lognormal(0, 0.2)
        gaps = factor * 20 * own * draw.lognormal(0, 0.1, tokens - 1)
        made.append(request(number, factor * 100 * draw.lognormal(0, 0.3), gaps, queue=own))
    return made


def unlike_prompts(requests: list[RequestEntry]) -> list[RequestEntry]:
    for one in requests:
        one.prompt_token_ids = [9, *one.prompt_token_ids]
    return requests


A = experiment(noisy(20, seed=1))


# -- latency --------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_covers_the_ratio_that_was_put_in(paired: bool) -> None:
    slower = noisy(40, seed=2, factor=1.2)
    b = experiment(slower if paired else unlike_prompts(slower), name="two")
    difference = Difference(experiment(noisy(40, seed=1)), b)
    assert difference.paired is paired
    for name in ("ttft", "tpot", "itl", "e2e"):
        found = difference.latency[name]
        assert found.ratio.low < 1.2 < found.ratio.high
        assert (found.n_a, found.n_b) == (40, 40)
    assert difference.latency["tpot"].verdict == "slower"
    assert difference.latency["tokens_per_second"].ratio.value < 1
    assert difference.latency["tokens_per_second"].verdict == "slower"
    backwards = Difference(b, difference.a)
    assert backwards.latency["tpot"].verdict == "faster"
    assert backwards.latency["tokens_per_second"].verdict == "faster"


def test_pairs_cancel_what_their_requests_have_in_common() -> None:
    """Requests that differ tenfold among themselves, and each by a tenth from its partner."""
    own = [10.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    a, b = (
        experiment([request(i, f * t, [f * t] * 9) for i, t in enumerate(own)]) for f in (1, 1.1)
    )
    found = Difference(a, b).latency["itl"]
    assert (found.ratio.low, found.ratio.value, found.ratio.high) == pytest.approx((1.1,) * 3)
    assert (found.a, found.b) == pytest.approx((0.05, 0.055))
    assert found.verdict == "slower"


@pytest.mark.parametrize("paired", [True, False])
def test_an_experiment_is_no_different_from_itself(paired: bool) -> None:
    again = noisy(20, seed=1)
    difference = Difference(A, experiment(again if paired else unlike_prompts(again)))
    assert {one.verdict for one in difference.latency.values()} == {"no difference shown"}
    assert {one.ratio.value for one in difference.latency.values()} == {1.0}
    assert difference.settings == ()
    if paired:
        assert difference.outputs is not None
        assert difference.outputs.equal == difference.outputs.compared == 20


def test_fewer_than_five_pairs_are_too_few_to_tell() -> None:
    assert FEWEST == 5
    a, b = (experiment([request(i, gaps=[t] * 9) for i in range(4)]) for t in (20, 60))
    found = Difference(a, b).latency["tpot"]
    assert found.ratio.value == pytest.approx(3)
    assert found.verdict == "too few to tell"
    one = Difference(experiment([request(0)]), experiment([request(0)])).latency["tpot"]
    assert (one.ratio.value, one.verdict) == (1.0, "too few to tell")
    assert math.isnan(one.ratio.low)


def test_a_quantity_that_is_zero_has_no_ratio() -> None:
    a = experiment([request(i, queue=0) for i in range(6)])
    difference = Difference(a, A)
    assert difference.latency["queue"].verdict == "no ratio: some are 0"
    assert "no ratio" in repr(difference)
    json.dumps(difference.to_dict(), allow_nan=False)


def test_a_quantity_that_no_request_has_is_a_dash() -> None:
    single = experiment([request(i, gaps=()) for i in range(6)])
    found = Difference(single, single).latency["tpot"]
    assert (found.n_a, found.n_b, found.verdict) == (0, 0, "too few to tell")
    assert math.isnan(found.a)


def test_the_unpaired_interval_covers_the_true_ratio_in_95_of_100_cases() -> None:
    draw = np.random.default_rng(0)

    def side(count: int, factor: float) -> list[list[float]]:
        """Groups of values that are alike, as the gaps of a request are."""
        own = factor * draw.lognormal(0, 0.3, count)
        return [list(middle * draw.lognormal(0, 0.1, 8)) for middle in own]

    found = [bootstrap_ratio(side(25, 1.2), side(20, 1), seed=i) for i in range(200)]
    covered = sum(not one.excludes(1.2) for one in found) / len(found)
    assert 0.90 <= covered <= 0.99
    assert {one.n for one in found} == {20}


def test_a_ratio_of_medians_is_that_of_numpy() -> None:
    over, under = [[1.0, 5.0], [2.0]], [[4.0], [1.0, 3.0, 9.0]]
    assert bootstrap_ratio(over, under).value == np.median([1, 2, 5]) / np.median([1, 3, 4, 9])
    assert math.isnan(bootstrap_ratio([[1.0]], under).low)


def test_groups_are_drawn_whole() -> None:
    """Draw for draw what comes of putting the drawn groups together and taking their median."""
    draw = np.random.default_rng(3)
    for seed in range(5):
        groups = [list(draw.integers(1, 20, draw.integers(1, 12)) / 4) for _ in range(9 + seed)]
        found = _drawn_medians(groups, np.random.default_rng(seed))
        chosen = np.random.default_rng(seed).integers(0, len(groups), (len(found), len(groups)))
        expected = [np.median(np.concatenate([groups[i] for i in one])) for one in chosen[:200]]
        assert list(found[:200]) == expected


def test_gaps_of_one_request_are_not_counted_as_independent() -> None:
    """Two hundred gaps of each of six requests tell no more than six requests."""
    many = [noisy(6, seed=seed, tokens=200) for seed in (1, 2)]
    found = Difference(experiment(many[0]), experiment(unlike_prompts(many[1]))).latency["itl"]
    assert (found.n_a, found.n_b) == (6, 6)
    assert found.ratio.high / found.ratio.low > 1.1


def with_models(requests: list[RequestEntry], *names: str) -> Experiment:
    """An experiment for which these models were loaded."""
    made = experiment(requests)
    (mode,), (entry,) = made.file.modes, made.file.models
    fields = {name: getattr(entry, name) for name in entry.__struct_fields__}
    made.file.models = [ModelEntry(**fields | {"name": name}) for name in names]
    fields = {name: getattr(mode, name) for name in mode.__struct_fields__}
    made.file.modes = [ModeEntry(**fields | {"model": i}) for i in range(len(names))]
    return made


def on(model: int, requests: list[RequestEntry]) -> list[RequestEntry]:
    """The requests as if they had run on another model."""
    for one in requests:
        one.model = one.mode = model
    return requests


def test_a_model_that_only_stood_by_is_in_nobodys_way() -> None:
    """The bf16 model is loaded still while its nf4 sibling is recorded."""
    b = with_models(on(1, noisy(20, seed=2)), "bf16", "nf4")
    difference = Difference(with_models(noisy(20, seed=1), "bf16"), b)
    assert difference.paired
    assert difference.pairs == tuple((i, i) for i in range(20))


def test_requests_of_several_models_pair_up_within_the_same_model() -> None:
    first, then = noisy(3, seed=1), noisy(3, seed=2)
    a = with_models([*first, *on(1, then)], "x", "y")
    other_order = with_models([*on(1, noisy(3, seed=3)), *noisy(3, seed=4)], "y", "x")
    assert Difference(a, other_order).pairs == tuple((i, i) for i in range(6))
    other_names = with_models([*on(1, noisy(3, seed=3)), *on(2, noisy(3, seed=4))], "q", "p", "r")
    assert Difference(a, other_names).pairs == tuple((i, i) for i in range(6))


# -- requests that ran beside each other ----------------------------------------------------------


def batches(count: int, size: int, seed: int, spread: float = 0.2) -> list[RequestEntry]:
    """Batches one after the other, whose requests share their steps and so what slows them."""
    draw = np.random.default_rng(seed)
    made = []
    for batch in range(count):
        common = draw.lognormal(0, spread)
        for one in range(size):
            gaps = common * 20 * draw.lognormal(0, 0.01, 9)
            ttft = common * 100 * draw.lognormal(0, 0.01)
            arrival = 60_000 * batch + one
            made.append(request(len(made), ttft, gaps, queue=common, arrival=arrival))
    return made


@pytest.mark.parametrize("paired", [True, False])
def test_one_batch_has_neither_an_interval_nor_a_verdict(paired: bool) -> None:
    for seed in range(6):
        other = batches(1, 8, seed=100 + seed)
        b = experiment(other if paired else unlike_prompts(other))
        difference = Difference(experiment(batches(1, 8, seed=seed)), b)
        assert difference.paired is paired
        for found in difference.latency.values():
            assert (found.n_a, found.n_b, found.groups) == (8, 8, 1)
            assert math.isnan(found.ratio.low)
            assert found.ratio.value > 0
            assert found.verdict == "too few to tell"
        assert "in 1 independent group, and a verdict takes 5" in repr(difference)


@pytest.mark.parametrize("paired", [True, False])
def test_batches_of_the_same_are_seldom_told_apart(paired: bool) -> None:
    """Eight batches of eight are no more than eight measurements: with 64 nearly all differ."""
    told = 0
    for seed in range(60):
        other = batches(8, 8, seed=1000 + seed)
        b = experiment(other if paired else unlike_prompts(other))
        found = Difference(experiment(batches(8, 8, seed=seed)), b).latency["tpot"]
        assert (found.n_a, found.groups) == (64, 8)
        told += found.verdict != "no difference shown"
    assert told / 60 <= 0.15


def test_batches_that_differ_are_told_apart() -> None:
    slower = batches(8, 4, seed=2, spread=0.05)
    for one in slower:
        one.tokens = [one.arrival + 2 * (t - one.arrival) for t in one.tokens]
        one.finished = one.tokens[-1]
    found = Difference(experiment(batches(8, 4, seed=1, spread=0.05)), experiment(slower)).latency
    assert (found["tpot"].groups, found["tpot"].verdict) == (8, "slower")


def test_requests_hang_together_through_others_also_through_one_that_failed() -> None:
    """Each takes 280 ms; the third bridges the second and the fourth, and was cancelled."""
    arrivals = [0, 1000, 1200, 1400, 5000, 5280]
    requests = [request(i, arrival=at) for i, at in enumerate(arrivals)]
    requests[2].finish_reason = "cancelled"
    found = Difference(experiment(requests), experiment([request(i) for i in range(6)])).latency
    # 1 and 3 are one; the last begins when the one before ends, and shares no step with it.
    assert (found["tpot"].n_a, found["tpot"].groups) == (5, 4)


def test_pairs_join_the_groups_of_both_sides() -> None:
    """Of a 0 and 1 overlap, of b 1 and 2: the three are one group, with neither side alone."""
    a = [request(i, arrival=at) for i, at in enumerate([0, 10, 9000, 20_000])]
    b = [request(i, arrival=at) for i, at in enumerate([0, 9000, 9010, 20_000])]
    difference = Difference(experiment(a), experiment(b))
    assert difference.paired
    assert difference.latency["tpot"].groups == 2
    unpaired = Difference(experiment(a), experiment(unlike_prompts(b)))
    assert unpaired.latency["tpot"].groups == 3


def test_groups_are_shown_and_explained() -> None:
    difference = Difference(experiment(batches(6, 2, seed=1)), experiment(batches(6, 2, seed=2)))
    data = difference.to_dict()
    assert data["latency"]["tpot"]["groups"] == 6
    assert set(difference.to_frame()["groups"]) == {6}
    latency = difference.tables[1]
    assert latency.header[-3:] == ("n a", "n b", "groups")
    assert latency.rows[0][-3:] == ("12", "12", "6")
    assert "requests that overlap in time" in data["method"]
    assert "a verdict takes" not in latency.note


def test_a_median_over_groups_of_one_is_that_over_values() -> None:
    values = list(np.random.default_rng(5).normal(0, 1, 11))
    found = bootstrap_grouped([[value] for value in values])
    assert found == bootstrap(values)
    assert math.isnan(bootstrap_grouped([values]).low)


# -- pairs ----------------------------------------------------------------------------------------


def test_requests_pair_up_by_prompt_and_parameters_in_their_order() -> None:
    same = {"prompt_token_ids": [7]}
    a = [request(0, **same), request(1), request(2, **same), request(3)]
    b = [request(0), request(1, **same), request(2, **same), request(3, params={"top_k": 5})]
    b[0].prompt_token_ids = [1, 2, 1]
    difference = Difference(experiment(a), experiment(b))
    assert difference.pairs == ((0, 1), (1, 0), (2, 2))
    assert difference.paired


def test_a_seed_and_a_default_that_is_spelled_out_do_not_part_a_pair() -> None:
    a = [request(0, params={"max_tokens": 10, "temperature": 1.0, "seed": None}, seed=3)]
    b = [request(0, params={"max_tokens": 10, "temperature": 1.0, "seed": 4, "top_k": 0}, seed=4)]
    difference = Difference(experiment(a), experiment(b))
    assert difference.pairs == ((0, 0),)
    assert any("different seeds" in one for one in difference.cautions)


def test_a_replay_that_was_interrupted_is_compared_over_what_it_ran() -> None:
    difference = Difference(A, experiment(noisy(20, seed=1)[:8]))
    assert difference.paired
    assert {one.n_a for one in difference.latency.values()} == {8}
    assert "do not count: 12 of a and 0 of b" in " ".join(difference.cautions)


def test_a_request_that_failed_counts_on_neither_side() -> None:
    requests = noisy(8, seed=1)
    requests[2].finish_reason, requests[2].error = "error", ["GenerationError", "no"]
    difference = Difference(experiment(noisy(8, seed=1)), experiment(requests))
    assert (2, 2) not in difference.pairs
    assert difference.latency["ttft"].n_a == 7


def test_a_few_prompts_in_common_do_not_stand_for_the_rest() -> None:
    other = unlike_prompts(noisy(20, seed=2))
    other[0].prompt_token_ids = [1, 2, 0]
    difference = Difference(A, experiment(other))
    assert not difference.paired
    assert "1 of 20 and 20 requests have the same prompt" in " ".join(difference.cautions)


def test_without_prompts_nothing_pairs_up() -> None:
    redacted = [
        request(i, prompt=None, prompt_token_ids=[], token_ids=[], text="") for i in range(6)
    ]
    difference = Difference(experiment(redacted), experiment(redacted))
    assert difference.pairs == ()
    assert difference.outputs is None
    assert "Prompts were left out" in repr(difference)


def test_pairs_of_unlike_length_or_cache_are_told() -> None:
    a = experiment([request(i) for i in range(6)])
    b = experiment([request(i, gaps=[20] * (9 - i % 2), cached_tokens=2) for i in range(6)])
    told = " ".join(Difference(a, b).cautions)
    assert "3 of 6 pairs differ in their number of output tokens" in told
    assert "6 of 6 pairs differ in how much of the prompt was cached" in told


# -- outputs --------------------------------------------------------------------------------------


def test_outputs_are_compared_to_the_first_token_that_differs() -> None:
    other = [request(i) for i in range(4)]
    other[1].token_ids = [*other[1].token_ids[:3], 99, *other[1].token_ids[4:]]
    other[2] = request(2, gaps=[20] * 5)
    found = Difference(experiment([request(i) for i in range(4)]), experiment(other)).outputs
    assert found is not None
    assert (found.compared, found.equal) == (4, 2)
    assert found.differing == ((1, 1, 3), (2, 2, 6))


# -- settings -------------------------------------------------------------------------------------


def test_only_the_settings_that_differ_are_listed() -> None:
    b = experiment(
        noisy(6, seed=1),
        mode={"quantize": "nf4", "format": "nf4", "max_batch": 8},
        model={"files": {"model.safetensors": "bb" * 32}},
        environment={"packages": {"torch": "2.10.0", "jupyter-inferkit": "0.1.0"}, "threads": 4},
    )
    found = {one.field: (one.a, one.b) for one in Difference(A, b).settings}
    assert found == {
        "quantization": ("none", "nf4"),
        "max_batch": ("4", "8"),
        "threads": ("8", "4"),
        "torch": ("2.9.1", "2.10.0"),
        "other weights (sha256)": (
            "model.safetensors aaaaaaaaaaaa",
            "model.safetensors bbbbbbbbbbbb",
        ),
    }


def test_another_tokenizer_is_not_called_other_weights() -> None:
    same = {"model.safetensors": "aa" * 32}
    sides = [
        experiment(noisy(6, seed=1), model={"files": {**same, "tokenizer.json": sha * 32}})
        for sha in ("cc", "dd")
    ]
    assert [(one.field, one.a) for one in Difference(*sides).settings] == [
        ("other files beside the weights (sha256)", "tokenizer.json cccccccccccc")
    ]


def test_the_same_name_of_another_device_is_a_difference() -> None:
    h200 = DeviceEntry(name="cuda:0", kind="cuda", description="NVIDIA H200", total=1, bf16=True)
    found = Difference(A, experiment(noisy(6, seed=1), environment={"devices": [h200]})).settings
    assert [(one.field, one.b) for one in found] == [("device", "cuda:0 (NVIDIA H200)")]


def test_weights_that_were_not_hashed_are_not_called_other() -> None:
    assert Difference(A, experiment(noisy(6, seed=1), model={"files": {}})).settings == ()


def test_settings_that_changed_are_listed_in_their_order_and_told() -> None:
    b = experiment(noisy(6, seed=1))
    later = {"quantize": "nf4", "format": "nf4", "batching": "continuous", "max_batch": 4}
    b.file.modes.append(ModeEntry(time=5, model=0, context=2048, step="compiled", **later))
    b.file.requests[5].mode = 1
    difference = Difference(A, b)
    assert [(one.field, one.b) for one in difference.settings] == [("quantization", "none, nf4")]
    assert "b ran in 2 modes, whose requests are pooled." in difference.cautions


# -- showing --------------------------------------------------------------------------------------


def test_every_table_and_figure_names_both_origins() -> None:
    b = experiment(noisy(20, seed=2), name="<b>two</b>", environment={"cpu": "Xeon"})
    difference = A.diff(b)
    for text in (repr(difference), difference._repr_html_()):
        assert A.origin in text
        assert b.origin in text
    assert all(A.origin in one.origins and b.origin in one.origins for one in difference.tables)
    assert "<b>two" not in difference._repr_html_()
    legend = [trace.name for trace in difference.plot().data if trace.showlegend]
    assert len(legend) == 2
    assert "Xeon" in legend[1].replace("<br>", " ")
    assert "&lt;b&gt;two" in legend[1].replace("<br>", " ")


def test_a_frame_and_json_have_every_number() -> None:
    difference = A.diff(experiment(noisy(20, seed=2, factor=1.2)))
    frame = difference.to_frame()
    assert list(frame.index) == ["ttft", "tpot", "itl", "e2e", "queue", "tokens_per_second"]
    found = difference.latency["tpot"]
    assert frame.loc["tpot", "ratio"] == found.ratio.value
    assert frame.loc["tpot", "verdict"] == "slower"
    data = json.loads(json.dumps(difference.to_dict(), allow_nan=False))
    assert data["latency"]["tpot"]["ratio"]["high"] == found.ratio.high
    assert data["a"]["origin"] == A.origin
    assert data["outputs"] == {"compared": 20, "equal": 20, "differing": []}


def test_plain_data_tell_the_day_and_not_that_it_is_today() -> None:
    fresh = Experiment(A.file, fresh=True)
    assert "here and now" in repr(fresh.diff(A))
    difference = fresh.diff(A)
    assert difference.to_dict()["a"]["origin"] == A.origin
    assert difference.to_frame().attrs["a"] == f"'one', {A.origin}"


def test_the_plot_has_both_sides_in_each_panel() -> None:
    figure = A.diff(experiment(noisy(20, seed=2))).plot()
    assert len(figure.data) == 6
    assert list(figure.data[0].y)[-1] == pytest.approx(100)
    assert {figure.layout[f"xaxis{i}"].type for i in ("", 2, 3)} == {"log"}
    [alone] = {
        trace.legendgroup for trace in A.diff(A).plot(["queue"]).data if trace.name[0] == "a"
    }
    assert alone == "a"
    with pytest.raises(OptionError, match=r"'speed' is none of 'ttft'"):
        A.diff(A).plot(["speed"])
    zeros = experiment([request(i, queue=0) for i in range(6)])
    assert zeros.diff(zeros).plot(["queue"]).layout.xaxis.type != "log"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'str' is no experiment; ik.open\(path\) reads one"):
        A.diff("run.json")  # type: ignore[arg-type]
    cancelled = experiment([request(0, finish_reason="cancelled")], name="nothing")
    with pytest.raises(OptionError, match="'nothing' has no request that succeeded"):
        A.diff(cancelled)
