"""`ik.compare` on a loaded model: what is run, in which order, and what is left afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from held import interrupt

import inferkit as ik
from inferkit import grid
from inferkit.comparison import Cell

PROMPTS = [[5, 6, 7], list(range(10, 30)), [9, 8]]
QUICK: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": 3, "repeat": 2, "progress": False}


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    with ik.load(tiny_model("llama"), dtype="float32", context=600, max_batch=4) as loaded:
        yield loaded


def test_every_cell_runs_once_a_round_on_all_prompts(model: ik.Model) -> None:
    made = ik.compare(
        model, ["none", "nf4"], [1, 4], ["continuous", "static"], fidelity=False, **QUICK
    )
    assert made.cells == tuple(
        Cell(mode, policy, size)
        for mode in ("none", "nf4")
        for policy in ("continuous", "static")
        for size in (1, 4)
    )
    assert made.complete
    assert [r.round for r in made.runs] == [0] * 8 + [1] * 8
    assert made.failed == {}
    for run in made.runs:
        assert [one.output_tokens for one in run.latencies] == [3, 3, 3]
        assert [one.prompt_tokens for one in run.latencies] == [3, 20, 2]
        # What an earlier run left in the cache would make the first token come early.
        assert [one.trace.cached_tokens for one in run.latencies] == [0, 0, 0]


def test_the_order_turns_from_round_to_round_and_toggles_each_mode_once(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    toggled: list[str] = []
    real = ik.Model._become

    def become(self: ik.Model, **options: Any) -> None:
        if options.get("format") and options["format"].mode != self.quantization:
            toggled.append(options["format"].mode)
        real(self, **options)

    monkeypatch.setattr(ik.Model, "_become", become)
    made = ik.compare(model, ["none", "nf4", "int8"], [1, 2], fidelity=False, **QUICK)
    first, second = made.runs[:6], made.runs[6:]
    assert [r.cell.quantize for r in first] == ["none"] * 2 + ["nf4"] * 2 + ["int8"] * 2
    assert [r.cell.quantize for r in second] == ["nf4"] * 2 + ["int8"] * 2 + ["none"] * 2
    assert [r.cell.max_batch for r in first[:2]] == [1, 2]
    assert [r.cell.max_batch for r in second[:2]] == [2, 1]
    assert toggled == ["nf4", "int8", "nf4", "int8", "none"]


def test_settings_hold_in_a_cell_and_are_the_old_ones_afterwards(model: ik.Model) -> None:
    model.configure(batching="static", max_batch=3)
    model.quantize("fp4", double_quant=True)
    plan = model.plan
    said = model.generate(PROMPTS, max_tokens=4).summary()
    seen: list[tuple[str, str, int]] = []
    model._engine.on_finish.append(
        lambda r: seen.append((r.settings.quantization, r.settings.batching, r.settings.max_batch))
    )
    ik.compare(model, "int8", 2, "continuous", fidelity=False, **QUICK)
    assert set(seen) == {("int8", "continuous", 2)}
    assert (model.batching, model.max_batch, model.context) == ("static", 3, 600)
    assert (model.plan.format, model.plan.weights) == (plan.format, plan.weights)
    assert said.completed == 3


def test_without_lists_it_compares_all_modes_of_the_device_as_the_model_is(model: ik.Model) -> None:
    made = ik.compare(model, max_tokens=2, repeat=1, fidelity=False, progress=False)
    assert [c.quantize for c in made.cells] == ["none", "int8", "nf4", "fp4", "int8wo", "int4wo"]
    assert {(c.batching, c.max_batch) for c in made.cells} == {("continuous", 4)}
    assert made.prompts == 8


def test_requests_of_unequal_length_tell_the_policies_apart(model: ik.Model) -> None:
    unequal = {**QUICK, "max_tokens": [2, 40, 2]}
    made = ik.compare(model, "none", 2, ["continuous", "static"], fidelity=False, **unequal)
    for run in made.runs:
        assert [one.output_tokens for one in run.latencies] == [2, 40, 2]
        *_, long, last = (one.trace for one in run.latencies)
        waited = last.scheduled is not None and last.scheduled >= long.finished
        assert waited == (run.cell.batching == "static")
    assert "2 to 40 tokens each" in repr(made)


def test_off_is_one_cell_whatever_the_batch_sizes(model: ik.Model) -> None:
    made = ik.compare(model, "none", [2, 4], ["continuous", "off"], fidelity=False, **QUICK)
    assert [(c.batching, c.max_batch) for c in made.cells] == [
        ("continuous", 2),
        ("continuous", 4),
        ("off", 1),
    ]


def test_fidelity_is_that_of_each_mode_once(model: ik.Model) -> None:
    made = ik.compare(model, ["none", "nf4"], [1, 2], **QUICK)
    assert made.fidelity.keys() == {"none", "nf4"}
    assert made.fidelity["none"].kl.value == 0
    alone = ik.fidelity(model.quantize("nf4"), PROMPTS, max_tokens=3)
    assert made.fidelity["nf4"] == alone
    assert made.objectives[-1] == "kl"
    assert "KL nats" in repr(made)


def test_memory_is_what_the_tensors_take(model: ik.Model) -> None:
    made = ik.compare(model, ["none", "nf4"], [1, 4], fidelity=False, **QUICK)
    memory = {c: made.figure(c, "memory").value for c in made.cells}
    for cell, found in memory.items():
        model.quantize(cell.quantize).configure(max_batch=cell.max_batch)
        assert found == pytest.approx(model.plan.weights + model.plan.kv_cache, rel=0.03)


def test_an_interrupt_keeps_the_runs_that_are_done(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = grid._Grid._generate, [5]

    def generate(self: Any, max_tokens: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            interrupt()
        return real(self, max_tokens)

    monkeypatch.setattr(grid._Grid, "_generate", generate)
    with pytest.warns(UserWarning, match="interrupted after 2 of 8 runs, which are kept"):
        made = ik.compare(model, ["none", "nf4"], [1, 2], fidelity=False, **QUICK)
    assert [r.cell for r in made.runs] == [
        Cell("none", "continuous", 1),
        Cell("none", "continuous", 2),
    ]
    assert not made.complete
    assert (model.quantization, model.max_batch) == ("none", 4)
    assert (model.running, model.waiting) == (0, 0)


def test_an_interrupt_before_the_first_run_is_one(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid._Grid, "_generate", lambda *_: interrupt())
    model.quantize("int8")
    with pytest.raises(KeyboardInterrupt):
        ik.compare(model, "nf4", fidelity=False, **QUICK)
    assert model.quantization == "int8"


def test_a_cell_that_cannot_be_run_is_noted_and_the_others_go_on(model: ik.Model) -> None:
    made = ik.compare(model, "none", [1, 10**7], fidelity=False, **QUICK)
    assert made.cells == (Cell("none", "continuous", 1),)
    assert "GiB" in made.failed[Cell("none", "continuous", 10**7)]
    assert len(made.runs) == 2
    assert model.max_batch == 4


def test_a_request_that_fails_fails_its_cell(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = type(model._engine.runner)
    real = runner.decode

    def decode(self: Any, tokens: Any, positions: Any) -> torch.Tensor:
        if len(tokens) == 2:
            raise ValueError("broken kernel")
        return real(self, tokens, positions)

    monkeypatch.setattr(runner, "decode", decode)
    made = ik.compare(model, "none", [2, 1], fidelity=False, **QUICK)
    assert made.cells == (Cell("none", "continuous", 1),)
    assert "broken kernel" in made.failed[Cell("none", "continuous", 2)]


def test_a_batch_that_the_prompts_never_fill_is_told(model: ik.Model) -> None:
    assert "3 prompts never fill a batch of 4" in repr(
        ik.compare(model, "none", 4, fidelity=False, **QUICK)
    )


def test_without_room_for_none_fidelity_is_left_out(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ik.LoadError("the files have changed")

    monkeypatch.setattr(grid, "kept_reference", refuse)
    made = ik.compare(model, "nf4", 1, **QUICK)
    assert "Fidelity could not be measured: the files have changed" in repr(made)
    assert made.fidelity == {}
    assert len(made.runs) == 2


def test_what_is_stored_quantized_is_compared_in_its_own_mode(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import transformers

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=config, device_map={"": "cpu"}
    )
    module.save_pretrained(tmp_path / "stored")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model("llama") / name, tmp_path / "stored")
    with ik.load(tmp_path / "stored", context=600, max_batch=2) as stored:
        made = ik.compare(stored, max_batch=[1, 2], **QUICK)
    assert {c.quantize for c in made.cells} == {"nf4"}
    assert "stored quantized" in made.note
    assert len(made.runs) == 4


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"quantize": ["none", "int3"]}, ik.OptionError, "int3"),
        ({"quantize": []}, ik.OptionError, "one value or several"),
        ({"max_batch": [1, 1]}, ik.OptionError, "several different ones"),
        ({"max_batch": 0}, ik.OptionError, "max_batch=0"),
        ({"batching": "dynamic"}, ik.OptionError, "dynamic"),
        ({"repeat": 0}, ik.OptionError, "repeat=0"),
        ({"max_tokens": 1}, ik.OptionError, "max_tokens=1"),
        ({"max_tokens": [2, 2]}, ik.OptionError, "2 entries for 3 prompts"),
        ({"max_tokens": [2, "8", 2]}, ik.OptionError, "max_tokens='8'"),
        ({"repeats": 3}, ik.OptionError, "repeat"),
        ({"prompts": []}, ik.PromptError, "empty"),
        ({"prompts": ["a", ""]}, ik.PromptError, "empty"),
    ],
)
def test_what_makes_no_grid_is_refused_before_anything_runs(
    model: ik.Model, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ik.compare(model, **{"fidelity": False} | QUICK | options)
    assert len(model._engine.steps) == 0


def test_an_unloaded_model_says_so(model: ik.Model) -> None:
    model.unload()
    with pytest.raises(ik.ModelUnloadedError):
        ik.compare(model)
