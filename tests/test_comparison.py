"""A comparison's figures, from runs whose numbers are known."""

from __future__ import annotations

import json
import math
import pickle
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from inferkit.comparison import Cell, Comparison, Run
from inferkit.errors import OptionError
from inferkit.intervals import Interval
from inferkit.trace import Latency, Trace

MS = 1_000_000
NONE, NF4, FP4 = (Cell(mode, "continuous", 8) for mode in ("none", "nf4", "fp4"))


def run(cell: Cell, number: int, tpot: float, ttft: float = 100, memory: int = 1000) -> Run:
    """Two requests of five tokens, ``tpot`` ms apart."""
    tokens = tuple(int((ttft + i * tpot) * MS) for i in range(5))
    one = Latency(Trace(0, 0, tokens, tokens[-1], prompt_tokens=3, finish_reason="length"))
    return Run(cell, number, (one, one), memory)


def fidelity(kl: float, top1: float = 0.9) -> Any:
    return SimpleNamespace(
        kl=Interval(kl, 0.9 * kl, 1.1 * kl, 100),
        top1_agreement=Interval(top1, top1, top1, 100),
        perplexity=20 + kl,
        to_dict=lambda: {"kl": kl},
    )


def comparison(runs: list[Run], rounds: int = 5, **options: Any) -> Comparison:
    given = {"fidelity": {}, "failed": {}} | options
    return Comparison(
        model="demo",
        device="cpu",
        dtype="bfloat16",
        runs=tuple(runs),
        rounds=rounds,
        max_tokens=(5, 5),
        **given,
    )


def rounds_of(cell: Cell, tpots: list[float], **options: Any) -> list[Run]:
    return [run(cell, i, tpot, **options) for i, tpot in enumerate(tpots)]


STEADY = [20.0, 22.0, 21.0, 30.0, 20.5]


def test_a_figure_is_the_median_of_the_rounds_with_its_interval() -> None:
    made = comparison(rounds_of(NONE, STEADY))
    found = made.figure(NONE, "tpot_p50")
    assert found.value == pytest.approx(statistics.median(STEADY) / 1e3)
    assert found.low == pytest.approx(min(STEADY) / 1e3)
    assert found.high == pytest.approx(max(STEADY) / 1e3)
    assert found.n == 5
    assert made.shown(NONE, "tpot_p50").value == pytest.approx(21.0)
    assert made.figure(NONE, "ttft_p50").value == pytest.approx(0.1)
    rate = [10 / (0.1 + 4 * tpot / 1e3) for tpot in STEADY]
    assert made.figure(NONE, "tokens_per_second").value == pytest.approx(statistics.median(rate))


def test_one_round_has_no_interval() -> None:
    made = comparison([run(NONE, 0, 20)], rounds=1)
    assert math.isnan(made.figure(NONE, "tpot_p50").low)
    assert "20.0" in repr(made)
    assert "[" not in repr(made).splitlines()[2]
    assert json.loads(json.dumps(made.to_dict()))["cells"][0]["tpot_p50"]["low"] is None


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is slow for one round is slow for both: the ratio does not see it."""
    slow = [20.0, 200.0, 22.0, 95.0, 21.0]
    made = comparison([*rounds_of(NONE, slow), *rounds_of(NF4, [1.1 * t for t in slow])])
    assert made.figure(NF4, "tpot_p50").low < made.figure(NONE, "tpot_p50").high
    ratio = made.ratio(NF4, NONE, "tpot_p50")
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert made.base(NF4) == NONE
    assert made.to_frame().loc["nf4", "tpot_vs_none"].item() == pytest.approx(1.1)


def test_a_ratio_uses_the_rounds_that_both_have() -> None:
    made = comparison([*rounds_of(NONE, STEADY), run(NF4, 1, 44)])
    ratio = made.ratio(NF4, NONE, "tpot_p50")
    assert (ratio.value, ratio.n) == (pytest.approx(2.0), 1)
    assert math.isnan(made.ratio(NF4, NONE, "memory").value)
    assert math.isnan(made.ratio(NF4, FP4, "tpot_p50").value)


def test_the_front_keeps_what_nothing_beats_by_more_than_noise() -> None:
    quality = {"none": fidelity(0), "nf4": fidelity(0.2), "fp4": fidelity(0.5)}
    noisy = [t * f for t, f in zip(STEADY, (1.02, 0.97, 1.01, 0.99, 1.0))]
    runs = [
        *rounds_of(NONE, STEADY, memory=3000),
        *rounds_of(NF4, noisy, memory=1000),
        *rounds_of(FP4, STEADY, memory=1000),
    ]
    made = comparison(runs, fidelity=quality)
    # As fast as the others within noise; fp4 has nothing over nf4 and is further from "none".
    assert made.front() == (NONE, NF4)
    assert made.front(["tpot_p50"]) == (NONE, NF4, FP4)
    assert made.front(["memory"]) == (NF4, FP4)
    assert made.front(["kl"]) == (NONE,)
    slower = comparison([*rounds_of(NONE, STEADY), *rounds_of(NF4, [2 * t for t in STEADY])])
    assert slower.front() == (NONE,)
    assert slower.front(["tokens_per_second"]) == (NONE,)
    with pytest.raises(OptionError, match=r"'speed' is no figure.*'tpot_p50'"):
        made.front(["speed"])


def test_a_cell_that_failed_and_rounds_that_are_missing_are_told() -> None:
    big = Cell("none", "continuous", 4096)
    made = comparison(
        [*rounds_of(NONE, STEADY), run(NF4, 0, 20)], failed={big: "needs 90 GiB"}, note="Mind this."
    )
    assert not made.complete
    for text in (repr(made), made._repr_html_()):
        assert "none, continuous, max_batch=4096: not run to the end: needs 90 GiB" in text
        assert "Stopped before 5 rounds were done." in text
        assert "Mind this." in text
    frame = made.to_frame()
    assert frame.loc[("none", "continuous", 4096), "failed"] == "needs 90 GiB"
    assert list(frame["n"]) == [5, 1, 0]
    assert comparison(rounds_of(NONE, STEADY)).complete


def test_nothing_but_failures_still_shows() -> None:
    made = comparison([], failed={NONE: "needs 90 GiB"})
    assert made.cells == made.front() == ()
    assert "needs 90 GiB" in repr(made)
    assert "needs 90 GiB" in made._repr_html_()
    assert made.plot().layout.annotations[-1].text == "nothing was run"
    assert len(made.to_frame()) == 1


def test_json_has_every_run_with_its_times() -> None:
    made = comparison(rounds_of(NONE, STEADY), fidelity={"none": fidelity(0)})
    plain = json.loads(json.dumps(made.to_dict()))
    assert [r["round"] for r in plain["runs"]] == [0, 1, 2, 3, 4]
    again = Latency(Trace.from_dict(plain["runs"][0]["latencies"][0]["trace"]))
    assert again == made.runs[0].latencies[0]
    assert plain["cells"][0]["front"] is True
    assert pickle.loads(pickle.dumps(made.runs)) == made.runs


def test_the_policy_is_a_column_only_where_there_are_several() -> None:
    static = Cell("none", "static", 8)
    both = comparison([*rounds_of(NONE, STEADY), *rounds_of(static, STEADY)])
    assert "batching" in repr(both).splitlines()[1]
    alone = repr(comparison(rounds_of(NONE, STEADY))).splitlines()
    assert "batching continuous: 2 prompts at once, 5 tokens each" in alone[0]
    assert "batching" not in alone[1]


def test_the_plot_marks_the_front_and_the_intervals() -> None:
    runs = [*rounds_of(NONE, STEADY), *rounds_of(NF4, [2 * t for t in STEADY], memory=500)]
    beaten = [*rounds_of(FP4, [3 * t for t in STEADY], memory=500)]
    made = comparison(runs + beaten)
    figure = made.plot()
    left = {t.name: t for t in figure.data if t.xaxis == "x"}
    assert list(left) == ["none", "nf4", "fp4"]
    assert left["none"].x == pytest.approx((21.0,))
    assert left["none"].error_x.array[0] == pytest.approx(
        made.shown(NONE, "tpot_p50").high - made.shown(NONE, "tpot_p50").value
    )
    assert [t.marker.symbol for t in left.values()] == [("circle",), ("circle",), ("circle-open",)]
    right = [t for t in figure.data if t.xaxis == "x2"]
    assert figure.layout.yaxis2.title.text == "TPOT p50, ms"
    assert right[0].x == pytest.approx((1000 / 2**20,))
    told = comparison(runs, fidelity={"none": fidelity(0), "nf4": fidelity(0.2)}).plot()
    assert told.layout.yaxis2.title.text == "KL from none, nats per token"
