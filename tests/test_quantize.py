"""Precision toggled on a loaded model: in place, in any order, and back bit for bit."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from held import held, interrupt, wait_until

import inferkit as ik
from inferkit import loading, resident
from inferkit.engine import runner

SIX = {"max_tokens": 6, "ignore_eos": True}
PROMPTS = [[5, 6, 7], list(range(10, 40)), [9]]
MODES = ("none", "int8", "nf4", "fp4", "int8wo", "int4wo")


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


@pytest.fixture
def model(folder: Path) -> Iterator[ik.Model]:
    with ik.load(folder, dtype="float32", context=128, max_batch=4) as loaded:
        yield loaded


def tokens(model: ik.Model) -> list[tuple[int, ...]]:
    return [g.token_ids for g in model.generate(PROMPTS, logprobs=1, **SIX)]


def logprobs(model: ik.Model) -> list[float]:
    done = model.generate(PROMPTS, logprobs=3, **SIX)
    return [p for g in done for entry in g.logprobs for _, p in entry.top]


def weights(model: ik.Model) -> dict[str, torch.Tensor]:
    module = model._parts.loaded.module
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def kinds(model: ik.Model) -> set[str]:
    return {type(m).__name__ for m in model._parts.loaded.module.modules()}


def every_change(modes: tuple[str, ...]) -> list[str]:
    """A walk from the first mode and back that makes each change from one to another once."""
    there_and_back = [m for pair in itertools.combinations(modes, 2) for m in pair]
    return [*there_and_back, modes[0]]


def test_every_mode_follows_every_other_and_gives_what_a_load_gives(folder: Path) -> None:
    fresh = {}
    for mode in MODES:
        with ik.load(folder, dtype="float32", context=128, max_batch=4, quantize=mode) as loaded:
            fresh[mode] = logprobs(loaded)
    assert all(one != other for one, other in itertools.combinations(fresh.values(), 2))
    walk = every_change(MODES)
    assert set(itertools.pairwise(walk)) == set(itertools.permutations(MODES, 2))
    with ik.load(folder, dtype="float32", context=128, max_batch=4) as model:
        for former, mode in itertools.pairwise(walk):
            assert model.quantize(mode) is model
            assert model.quantization == mode == model.plan.quantize
            assert model.fallback is None
            assert logprobs(model) == fresh[mode], (former, mode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_back_to_none_every_weight_and_output_is_the_first_one(folder: Path, dtype: str) -> None:
    with ik.load(folder, dtype=dtype, context=128, max_batch=4) as model:
        before, said = weights(model), logprobs(model)
        model.quantize("int8wo").quantize("int4wo").quantize("nf4").quantize("none")
        after = weights(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert logprobs(model) == said


def test_what_a_request_ran_under_is_told_with_it(model: ik.Model) -> None:
    assert model.generate("Once", **SIX).settings.quantization == "none"
    model.quantize("int8")
    assert model.generate("Once", **SIX).settings.quantization == "int8"
    assert "int8" in repr(model)
    assert "Linear8bitLt" in kinds(model)


def test_the_same_mode_again_reads_nothing(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "load_files", pytest.fail)
    model.quantize("none")


def test_scales_are_quantized_again_where_that_is_asked(model: ik.Model) -> None:
    plain = model.quantize("nf4").plan.weights
    said = logprobs(model)
    model.quantize("nf4", double_quant=True)
    assert len(quantized(model)) == 14
    assert all(map(nested, quantized(model)))
    assert model.quantization == "nf4"
    assert "double_quant=True" in repr(model)
    assert model.generate("Once", **SIX).settings.quantization == "nf4, double_quant=True"
    assert logprobs(model) != said
    assert model.plan.weights != plain
    assert model.quantize("nf4").plan.weights == plain
    assert not any(map(nested, quantized(model)))
    assert logprobs(model) == said


def test_weights_are_unpacked_to_the_dtype_asked_for(model: ik.Model) -> None:
    assert {m.compute_dtype for m in quantized(model.quantize("fp4"))} == {torch.float32}
    model.quantize("fp4", compute_dtype="bf16")
    assert {m.compute_dtype for m in quantized(model)} == {torch.bfloat16}
    assert "compute_dtype=bfloat16" in repr(model)


def nested(layer: Any) -> bool:
    """Whether its scales were quantized, also where a CPU's kernels have unpacked them since."""
    state = layer.weight.quant_state
    return bool(getattr(state, "original_nested", state.nested))


def quantized(model: ik.Model) -> list[Any]:
    modules = model._parts.loaded.module.modules()
    return [m for m in modules if type(m).__name__ == "Linear4bit"]


@pytest.mark.parametrize(
    ("mode", "options", "said"),
    [
        ("int8", {"double_quant": True}, "double_quant is a detail of the 4-bit modes"),
        ("none", {"compute_dtype": "bf16"}, "compute_dtype is a detail of the 4-bit modes"),
        ("int8wo", {"compute_dtype": "bf16"}, "compute_dtype is a detail of the 4-bit modes"),
        ("int4wo", {"double_quant": True}, "double_quant is a detail of the 4-bit modes"),
        ("nf4", {"double_quant": "yes"}, "must be True or False"),
        ("nf4", {"compute_dtype": "int8"}, "compute_dtype='int8' is not supported"),
    ],
)
def test_details_that_a_mode_does_not_have_are_refused(
    folder: Path, model: ik.Model, mode: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ik.OptionError, match=said):
        model.quantize(mode, **options)
    with pytest.raises(ik.OptionError, match=said):
        ik.plan(folder, quantize=mode, **options)
    with pytest.raises(ik.OptionError, match=said):
        ik.load(folder, quantize=mode, name="other", **options)
    assert model.quantization == "none"


def test_what_stays_unquantized_is_told(model: ik.Model) -> None:
    layers = {n for n, m in model._parts.loaded.module.named_modules() if hasattr(m, "weight")}
    matrices = {n for n in layers if not n.endswith("norm") and "layernorm" not in n}
    assert set(model.unquantized) == matrices
    assert model.quantize("nf4").unquantized == ("model.embed_tokens", "lm_head")
    assert model.quantize("int4wo").unquantized == ("model.embed_tokens",)


def test_a_load_of_another_mode_toggles_the_model_that_is_loaded(folder: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "context": 128, "max_batch": 4}
    with ik.load(folder, **options) as model:
        engine = model._engine
        again = ik.load(folder, **options | {"quantize": "nf4", "max_batch": 2, "context": 96})
        assert again is model
        assert model._engine is engine
        assert (model.quantization, model.max_batch, model.context) == ("nf4", 2, 96)
        assert (model.plan.quantize, model.plan.max_batch, model.plan.context) == ("nf4", 2, 96)
        said = tokens(model)
        assert ik.load(folder, **options, quantize="nf4", double_quant=True) is model
        assert "double_quant" in repr(model)
        assert ik.load(folder, **options, quantize="nf4") is model
        assert tokens(model) == said


def test_requests_that_run_finish_before_and_those_that_wait_go_on_after(model: ik.Model) -> None:
    model.configure(max_batch=1)
    alone = model.generate("Once", max_tokens=20, ignore_eos=True)
    with held(model) as hold:
        running = model.submit("Once", max_tokens=20, ignore_eos=True)
        hold.wait()
        change = threading.Thread(target=model.quantize, args=("nf4",))
        change.start()
        wait_until(lambda: bool(model._engine._commands))
        waiting = model.submit("Once", max_tokens=20, ignore_eos=True)
        hold.step(3)
        assert model.quantization == "none"
    change.join()
    assert running.result(60).token_ids == alone.token_ids
    assert running.result().settings.quantization == "none"
    assert waiting.result(60).settings.quantization == "nf4"
    assert waiting.result().finish_reason == "length"


def test_a_kept_prefix_of_another_mode_is_not_used(model: ik.Model) -> None:
    prompt = list(range(5, 60))
    model.generate(prompt, **SIX)
    assert model.generate(prompt, **SIX).latency.trace.cached_tokens > 0
    model.quantize("nf4")
    assert model.generate(prompt, **SIX).latency.trace.cached_tokens == 0


def parameters_in_memory() -> int:
    """Bytes of every parameter on the CPU in this process, those of other tests too."""
    gc.collect()
    live = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter)]
    return sum(t.untyped_storage().nbytes() for t in live if t.device.type == "cpu")


def test_never_are_both_weights_in_memory(model: ik.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = resident.load_files, []

    def load_files(*args: Any, **options: Any) -> Any:
        seen.append(parameters_in_memory())
        return real(*args, **options)

    whole = sum(p.nbytes for p in model._parts.loaded.module.parameters())
    others = parameters_in_memory() - whole
    monkeypatch.setattr(resident, "load_files", load_files)
    for mode in ("nf4", "int8", "int8wo", "none"):
        model.quantize(mode)
    assert len(seen) == 4
    assert max(seen) - others < whole / 20


PLACES = ["_read_weights", "read_tokenizer", "make_runner"]


def spoil(
    monkeypatch: pytest.MonkeyPatch, place: str, fail: Callable[[], None], after: bool
) -> None:
    """Have one call of ``place`` fail, before or after it has done its work."""
    owner = resident if place == "make_runner" else loading
    real, left = getattr(owner, place), [1]

    def call(*args: Any, **options: Any) -> Any:
        made = real(*args, **options) if after or not left else None
        if left:
            left.pop()
            fail()
        return made

    monkeypatch.setattr(owner, place, call)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("how", "after"), [("error", False), ("memory", True), ("interrupt", True)]
)
def test_whatever_stops_it_the_mode_before_is_back(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch, place: str, after: bool, how: str
) -> None:
    model.quantize("int8")
    said = logprobs(model)
    plan = model.plan

    def fail() -> None:
        if how == "interrupt":
            interrupt()
            return
        raise MemoryError("no memory") if how == "memory" else ValueError("broken")

    spoil(monkeypatch, place, fail, after)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else ik.LoadError):
        model.quantize("nf4")
    assert (model.quantization, model.plan) == ("int8", plan)
    assert model.generate("Once", **SIX).settings.quantization == "int8"
    assert logprobs(model) == said
    assert model.quantize("nf4").quantization == "nf4"


def test_an_interrupted_wait_changes_nothing(model: ik.Model) -> None:
    with held(model) as hold:
        running = model.submit("Once", **SIX)
        hold.wait()
        threading.Timer(0.3, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            model.quantize("nf4")
    assert running.result(60).finish_reason == "length"
    assert model.quantization == "none"
    assert model.generate("Once", **SIX).settings.quantization == "none"


def test_files_that_changed_are_not_read(model: ik.Model, folder: Path) -> None:
    said = tokens(model)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(ik.LoadError, match="have changed"):
        model.quantize("nf4")
    assert tokens(model) == said


def test_weights_that_cannot_be_read_back_end_the_model_with_a_clear_error(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("the disk is gone")

    monkeypatch.setattr(loading, "_read_weights", broken)
    with pytest.raises(ik.LoadError, match="the disk is gone"):
        model.quantize("nf4")
    wait_until(lambda: model._engine.closed)
    with pytest.raises(ik.GenerationError, match="could not be read back"):
        model.generate("Once", **SIX)
    model.unload()


def test_an_unload_meanwhile_waits_and_wins(model: ik.Model) -> None:
    with held(model) as hold:
        model.submit("Once", **SIX)
        hold.wait()
        errors: list[BaseException] = []

        def change() -> None:
            try:
                model.quantize("nf4")
            except ik.InferkitError as error:
                errors.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        wait_until(lambda: bool(model._engine._commands))
        unload = threading.Thread(target=model.unload)
        unload.start()
        wait_until(lambda: not model.loaded)
    thread.join(60)
    unload.join(60)
    assert isinstance(errors[0], ik.ModelUnloadedError)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["int4", "", None, "NF4"])
def test_an_unknown_mode_is_refused(model: ik.Model, mode: Any) -> None:
    with pytest.raises(ik.OptionError, match="choose one of"):
        model.quantize(mode)


def test_what_is_stored_quantized_says_that_it_stays_so(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import transformers

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=config, device_map={"": "cpu"}
    )
    module.save_pretrained(tmp_path / "stored")
    transformers.AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(
        tmp_path / "stored"
    )
    with ik.load(tmp_path / "stored", context=128, max_batch=2) as model:
        said = model.generate("Once", **SIX).token_ids
        assert model.quantization == model.generate("Once", **SIX).settings.quantization == "nf4"
        assert ik.load(tmp_path / "stored", context=128, max_batch=2) is model
        assert model.quantize("nf4") is model
        for mode in ("int8", "int4wo", "none"):
            with pytest.raises(ik.OptionError, match="stored quantized"):
                model.quantize(mode)
        assert model.generate("Once", **SIX).token_ids == said


@pytest.mark.parametrize("mode", ["nf4", "int8wo", "int4wo"])
def test_a_model_that_cannot_run_quantized_is_refused_and_goes_on_as_it_was(
    tiny_model: Callable[[str], Path], mode: str
) -> None:
    """Mamba's code multiplies by the weights of its layers, whatever their layout."""
    with ik.load(tiny_model("mamba"), dtype="float32", context=64, max_batch=2) as model:
        said = model.generate("Once", **SIX).token_ids
        with pytest.raises(ik.UnsupportedModelError, match=r"quantized layers.*quantize='none'"):
            model.quantize(mode)
        assert model.quantization == "none"
        assert model.generate("Once", **SIX).token_ids == said


def test_rounding_of_inputs_is_told_from_a_wrong_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = runner.slotted_logits

    def turned(trial: Any, prompts: list[list[int]]) -> torch.Tensor:
        return own(trial, [[*p[1:], p[0]] for p in prompts])

    with ik.load(folder, quantize="int8", dtype="float32") as model:
        assert model.fallback is None
    monkeypatch.setattr(runner, "slotted_logits", turned)
    with ik.load(folder, quantize="int8", dtype="float32") as model:
        assert "other logits" in model.fallback
