"""Loading, loading again, replacing, unloading; interrupts; and that the memory comes back."""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from held import held, interrupt, interrupt_after, wait_until

import inferkit as ik
from inferkit import resident
from inferkit.devices import Device

SIX = {"max_tokens": 6, "ignore_eos": True}
LONG = {"max_tokens": 200, "ignore_eos": True}
OPTIONS = {"dtype": "float32", "context": 256, "max_batch": 4}


@pytest.fixture
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def broken(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small model whose files a test may spoil."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


@pytest.fixture(autouse=True)
def _nothing_stays_loaded() -> Iterator[None]:
    yield
    left = ik.models()
    for model in left:
        model.unload()
    assert not left
    wait_until(lambda: not any(t.name.startswith("inferkit-") for t in threading.enumerate()))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose weights are read, in order; what is loaded then stands behind each."""
    seen: list[str] = []
    real = resident.load_files

    def load_files(source: Any, plan: Any, **options: Any) -> Any:
        loaded = ",".join(m.name for m in ik.models())
        seen.append(f"{plan.quantize} {plan.dtype} beside [{loaded}]")
        return real(source, plan, **options)

    monkeypatch.setattr(resident, "load_files", load_files)
    return seen


# -- the same cell again --------------------------------------------------------------------------


def test_the_same_load_gives_the_same_model_and_reads_nothing(
    folder: Path, reads: list[str]
) -> None:
    with ik.load(folder, **OPTIONS) as model:
        plan = model.plan
        assert ik.load(folder, **OPTIONS) is model
        assert ik.load(str(folder), **OPTIONS) is model
        assert ik.load(folder, **OPTIONS, device="cpu", quantize="none") is model
        assert model.plan is plan
    assert len(reads) == 1


def test_loading_with_defaults_twice_changes_nothing(folder: Path, reads: list[str]) -> None:
    with ik.load(folder) as model:
        assert ik.load(folder) is model
        assert (model.batching, model.max_batch, model.context) == ("continuous", 16, 4096)
    assert len(reads) == 1


def test_other_batching_batch_and_context_change_it_in_place(
    folder: Path, reads: list[str]
) -> None:
    with ik.load(folder, **OPTIONS) as model:
        before = model.generate("Once", **SIX).token_ids
        again = ik.load(folder, dtype="float32", batching="static", max_batch=2, context=128)
        assert again is model
        assert (model.batching, model.max_batch, model.context) == ("static", 2, 128)
        assert (model.plan.max_batch, model.plan.context) == (2, 128)
        assert model.generate("Once", **SIX).token_ids == before
    assert len(reads) == 1


def test_a_folder_that_was_saved_again_is_read_again(broken: Path, reads: list[str]) -> None:
    old = ik.load(broken, **OPTIONS)
    before = old.generate("Once", **SIX).token_ids
    assert ik.load(broken, **OPTIONS) is old
    architectures.save("llama", broken, seed=1)
    new = ik.load(broken, **OPTIONS)
    after = new.generate("Once", **SIX).token_ids
    assert after != before
    assert not old.loaded
    assert ik.load(broken, **OPTIONS) is new
    assert len(reads) == 2
    new.unload()
    with ik.load(broken, **OPTIONS) as model:
        assert model.generate("Once", **SIX).token_ids == after


def test_requests_that_run_finish_before_the_cache_changes(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        alone = model.generate("Once", max_tokens=30, ignore_eos=True)
        with held(model) as hold:
            running = model.submit("Once", max_tokens=30, ignore_eos=True)
            hold.wait()
            changed = threading.Thread(
                target=ik.load, args=(folder,), kwargs={**OPTIONS, "max_batch": 8}
            )
            changed.start()
            wait_until(lambda: bool(model._engine._commands))
            waiting = model.submit("Once", max_tokens=30, ignore_eos=True)
            hold.step(5)
            assert model.max_batch == 4
            assert not waiting.token_ids
        changed.join()
        assert running.result().token_ids == alone.token_ids
        assert running.result().settings.max_batch == 4
        assert waiting.result().token_ids == alone.token_ids
        assert waiting.result().settings.max_batch == model.max_batch == 8


def test_configure_says_what_it_cannot_do_and_changes_nothing(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        for wrong in (
            {"batching": "dynamic"},
            {"max_batch": 0},
            {"max_batch": 2.5},
            {"context": 0},
            {"context": 1},
            {"context": 10**6},
        ):
            with pytest.raises(ik.OptionError, match=str(next(iter(wrong.values())))):
                model.configure(**wrong)
        with pytest.raises(ik.DoesNotFitError, match="max_batch="):
            model.configure(max_batch=10**6, context=4096)
        assert (model.batching, model.max_batch, model.context) == ("continuous", 4, 256)
        assert (model.plan.max_batch, model.plan.context) == (4, 256)
        assert model.generate("Once", **SIX).finish_reason == "length"


def test_an_unknown_change_is_told_with_the_nearest_one(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        with pytest.raises(ik.OptionError, match=r"'max_bach'; did you mean 'max_batch'\?") as told:
            model.configure(max_bach=2)
        assert "The options are: batching, compile, context, max_batch, speculative." in str(
            told.value
        )
        assert model.max_batch == 4


def test_the_smallest_context_holds_a_token_of_prompt_and_one_of_output(folder: Path) -> None:
    with pytest.raises(ik.OptionError, match=r"context=1 .*at least 2"):
        ik.load(folder, **{**OPTIONS, "context": 1})
    with ik.load(folder, **{**OPTIONS, "context": 2}) as model:
        gen = model.generate([5], **LONG)
        assert (gen.finish_reason, len(gen.token_ids)) == ("length", 1)


def test_a_smaller_cache_is_never_refused(folder: Path, memory_for: Callable[[int], None]) -> None:
    with ik.load(folder, **OPTIONS) as model:
        memory_for(model.plan.weights + 1)  # another program took what the cache did not use yet
        model.configure(max_batch=3)
        model.configure(context=128)
        assert (model.max_batch, model.context) == (3, 128)
        assert not model.plan.fits
        with pytest.raises(ik.DoesNotFitError):
            model.configure(max_batch=4)
        assert ik.load(folder, **{**OPTIONS, "max_batch": 2, "context": 64}) is model
        smaller = ik.load(folder, **{**OPTIONS, "max_batch": 2, "context": 64}, prefill_chunk=64)
        assert ik.models() == [smaller]
        with pytest.raises(ik.DoesNotFitError):
            ik.load(folder, **OPTIONS)
        smaller.unload()


def test_a_cache_that_cannot_be_allocated_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ik.load(folder, **OPTIONS) as model:
        wanted = model.generate("Once", **SIX).token_ids
        runner = model._engine.runner
        real = runner._new_cache

        def new_cache(slots: int, context: int) -> Any:
            if slots > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
            return real(slots, context)

        monkeypatch.setattr(runner, "_new_cache", new_cache)
        with pytest.raises(ik.OutOfMemoryError, match=r"max_batch=8, context=256 .* 8\.00 GiB"):
            model.configure(max_batch=8)
        assert (model.max_batch, model.plan.max_batch) == (4, 4)
        assert model.generate("Once", **SIX).token_ids == wanted


# -- replacing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"prefill_chunk": 64}])
def test_other_weights_take_the_place_of_the_old_ones(folder: Path, other: dict[str, str]) -> None:
    old = ik.load(folder, **OPTIONS)
    new = ik.load(folder, **{**OPTIONS, **other})
    assert new is not old
    assert ik.models() == [new]
    assert not old.loaded
    with pytest.raises(ik.ModelUnloadedError, match=r"replaced.*ik\.models\(\).*name="):
        old.generate("Once")
    assert new.generate("Once", **SIX).finish_reason == "length"
    new.unload()


@pytest.mark.parametrize("mode", ["int8", "nf4", "fp4", "int8wo", "int4wo"])
def test_quantized_models_generate_and_unload(folder: Path, mode: str) -> None:
    with ik.load(folder, **OPTIONS, quantize=mode) as model:
        assert model.quantization == mode
        gen = model.generate("Once", **SIX)
        assert (gen.finish_reason, gen.settings.quantization) == ("length", mode)
        module = model._parts.loaded.module
    tensors = [*module.parameters(), *module.buffers()]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 0


def test_int8_in_bfloat16_is_quiet(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ik.load(folder, dtype="bfloat16", quantize="int8", context=64) as model:
        model.generate("Once", **SIX)
    assert "MatMul8bitLt" not in caplog.text


def test_requests_of_a_replaced_model_end_with_the_text_they_have(folder: Path) -> None:
    old = ik.load(folder, **OPTIONS)
    with held(old) as hold:
        request = old.submit("Once", **LONG)
        hold.wait()
        hold.step(4)
        replacing = threading.Thread(
            target=ik.load, args=(folder,), kwargs={**OPTIONS, "dtype": "bfloat16"}
        )
        replacing.start()
        wait_until(lambda: not old.loaded)
    replacing.join()
    gen = request.result()
    assert gen.finish_reason == "cancelled"
    assert len(gen.token_ids) >= 4
    ik.models()[0].unload()


def test_both_are_in_memory_while_the_new_one_loads_where_both_fit(
    folder: Path, reads: list[str]
) -> None:
    ik.load(folder, **OPTIONS)
    with ik.load(folder, **{**OPTIONS, "dtype": "bfloat16"}):
        assert reads[1] == "none bfloat16 beside [llama]"


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that the CPU has so many bytes, of which loaded models take their weights."""

    def pretend(total: int) -> None:
        def find_device(name: str) -> Device:
            free = total - sum(m.plan.weights for m in ik.models())
            return Device(name, name, "a CPU with little memory", total, free, False)

        monkeypatch.setattr("inferkit.memory.find_device", find_device)

    return pretend


def test_the_old_model_goes_first_where_both_do_not_fit(
    folder: Path, reads: list[str], memory_for: Callable[[int], None]
) -> None:
    need = ik.plan(folder, **OPTIONS)
    memory_for(need.total + need.weights // 2)
    ik.load(folder, **OPTIONS)
    with ik.load(folder, **OPTIONS, prefill_chunk=256) as new:
        assert ik.models() == [new]
    assert reads == ["none float32 beside []"] * 2


def test_force_replaces_the_old_model_before_it_loads_where_both_do_not_fit(
    folder: Path, reads: list[str], memory_for: Callable[[int], None]
) -> None:
    memory_for(ik.plan(folder, **OPTIONS).weights)
    ik.load(folder, **OPTIONS, force=True)
    with ik.load(folder, **OPTIONS, prefill_chunk=256, force=True) as new:
        assert ik.models() == [new]
    assert reads == ["none float32 beside []"] * 2


def test_memory_that_another_models_cache_has_not_used_yet_is_not_given_away(
    folder: Path, memory_for: Callable[[int], None]
) -> None:
    need = ik.plan(folder, **OPTIONS)
    memory_for(need.total + need.weights + need.kv_cache - 1)
    with ik.load(folder, **OPTIONS, name="one") as one:
        with pytest.raises(ik.DoesNotFitError):
            ik.load(folder, **OPTIONS, name="two")
        with ik.load(folder, **{**OPTIONS, "max_batch": 3}, name="two") as two:
            one.configure(max_batch=3)
            two.configure(max_batch=4)
            with pytest.raises(ik.DoesNotFitError):
                one.configure(max_batch=5)
            two.unload()
            one.configure(max_batch=5)


def test_what_cannot_fit_is_refused_before_a_weight_is_read(
    folder: Path, reads: list[str], memory_for: Callable[[int], None]
) -> None:
    need = ik.plan(folder, **OPTIONS)
    memory_for(need.weights + need.activations)
    with pytest.raises(ik.DoesNotFitError, match=r"needs .* free; .*max_batch=") as caught:
        ik.load(folder, **OPTIONS)
    assert caught.value.plan.total == need.total
    assert not reads
    with ik.load(folder, **OPTIONS, force=True) as model:
        assert model.generate("Once", **SIX).finish_reason == "length"
        assert ik.load(folder, **{**OPTIONS, "max_batch": 5}, force=True).max_batch == 5
        with pytest.raises(ik.DoesNotFitError):
            ik.load(folder, **{**OPTIONS, "max_batch": 6})
        assert model.max_batch == 5


# -- loads that fail ------------------------------------------------------------------------------


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "no tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    elif how == "broken tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    elif how in ("missing weights", "other shapes"):
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        name = "model.layers.1.mlp.up_proj.weight"
        tensor = tensors.pop(name)
        if how == "other shapes":
            tensors[name] = tensor[:, :-1].contiguous()
        save_file(tensors, weights, {"format": "pt"})


FAULTS = {
    "truncated": (ik.DamagedFileError, r"model\.safetensors is damaged"),
    "missing weights": (ik.DamagedFileError, r"lack 1 of the weights .*layers\.1\.mlp\.up_proj"),
    "other shapes": (ik.LoadError, "up_proj|size|shape"),
    "no config": (ik.ModelNotFoundError, r"no config\.json"),
    "no tokenizer": (ik.LoadError, r"tokenizer.*save_pretrained"),
    "broken tokenizer": (ik.LoadError, r"tokenizer.*save_pretrained"),
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_failed_load_leaves_the_old_model_as_it_was(folder: Path, broken: Path, how: str) -> None:
    error, message = FAULTS[how]
    spoil(broken, how)
    with ik.load(folder, **OPTIONS) as model:
        wanted = model.generate("Once", **SIX).token_ids
        with pytest.raises(error, match=message):
            ik.load(broken, **OPTIONS, name=model.name)
        assert ik.models() == [model]
        assert model.generate("Once", **SIX).token_ids == wanted


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
        ),
        MemoryError("Unable to allocate 8 GiB"),
    ],
)
def test_lack_of_memory_while_loading_is_told_with_the_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    from transformers import core_model_loading

    monkeypatch.setattr(core_model_loading, "set_param_for_module", after(5, failure))
    with pytest.raises(ik.LoadError, match=r"Memory ran out .* needs .* free"):
        ik.load(folder, **OPTIONS)
    assert not ik.models()
    monkeypatch.undo()
    with ik.load(folder, **OPTIONS) as model:
        assert model.generate("Once", **SIX).finish_reason == "length"


def after(calls: int, failure: BaseException) -> Callable[..., Any]:
    """transformers' function that puts a weight into the model, which fails after some."""
    from transformers import core_model_loading

    real, left = core_model_loading.set_param_for_module, [calls]

    def put(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise failure
        return real(*args, **options)

    return put


# -- several models, names ------------------------------------------------------------------------


def test_two_models_at_once_keep_to_themselves(tiny_model: Callable[[str], Path]) -> None:
    with (
        ik.load(tiny_model("llama"), **OPTIONS) as one,
        ik.load(tiny_model("qwen3"), **OPTIONS) as two,
    ):
        assert [m.name for m in ik.models()] == ["llama", "qwen3"]
        alone = [one.generate("Once", **SIX), two.generate("Once", **SIX)]
        assert alone[0].token_ids != alone[1].token_ids
        both = [m.submit("Once", **SIX) for m in (one, two, one, two)]
        assert [r.result().token_ids for r in both] == [g.token_ids for g in alone] * 2
        one.unload()
        assert two.generate("Once", **SIX).token_ids == alone[1].token_ids
        assert ik.models() == [two]


def test_names_keep_copies_of_one_model_apart(folder: Path) -> None:
    with (
        ik.load(folder, **OPTIONS, name="full") as full,
        ik.load(folder, **{**OPTIONS, "dtype": "bfloat16"}, name="half") as half,
    ):
        assert full is not half
        assert ik.load(folder, **OPTIONS, name="full") is full
        assert full.tokenizer is half.tokenizer
        assert [(m.name, m.dtype) for m in ik.models()] == [
            ("full", "float32"),
            ("half", "bfloat16"),
        ]


@pytest.fixture
def finals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds two models, a/final and b/final."""
    for parent in "ab":
        shutil.copytree(folder, tmp_path / parent / "final")
    monkeypatch.chdir(tmp_path)


def test_models_whose_references_end_alike_stand_side_by_side(finals: None) -> None:
    with ik.load("./a/final", **OPTIONS) as one, ik.load("./b/final", **OPTIONS) as two:
        assert [m.name for m in ik.models()] == ["final", "./b/final"]
        assert ik.load("./a/final", **OPTIONS) is one
        for same in ("./b/final", "b/final", Path("b", "final").absolute()):
            assert ik.load(same, **OPTIONS) is two
        one.unload()
        assert ik.load("./b/final", **OPTIONS) is two
        other = ik.load("./b/final", **{**OPTIONS, "dtype": "bfloat16"})
        assert ik.models() == [other]
        assert not two.loaded
        other.unload()


def test_a_name_that_is_given_replaces_whatever_has_it(finals: None) -> None:
    one = ik.load("./a/final", **OPTIONS)
    with ik.load("./b/final", **OPTIONS, name="final") as two:
        assert ik.models() == [two]
        assert not one.loaded


def test_a_reference_that_is_no_longer_than_its_end_replaces_no_other_model(
    finals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ik.load("./a/final", **OPTIONS) as one:
        monkeypatch.chdir("b")
        with ik.load("final", **OPTIONS) as two:
            assert ik.models() == [one, two]
            assert two.name == str(Path("final").absolute())
            assert ik.load("final", **OPTIONS) is two


def test_a_folder_given_as_a_dot_is_called_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with ik.load(".", **OPTIONS) as model:
        assert model.name == "llama"
        assert model.path == folder


def test_the_context_manager_unloads_also_after_an_error(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), ik.load(folder, **OPTIONS) as model:
        1 / 0  # noqa: B018
    assert not model.loaded
    assert not ik.models()


def test_an_unloaded_handle_says_how_to_go_on(folder: Path) -> None:
    model = ik.load(folder, **OPTIONS)
    model.unload()
    model.unload()
    uses: list[Callable[[], Any]] = [
        lambda: model.generate("a"),
        lambda: model.stream("a"),
        lambda: model.submit("a"),
        lambda: model.chat([{"role": "user", "content": "a"}]),
        lambda: model.configure(max_batch=2),
        lambda: model.tokenizer,
        lambda: model.batching,
        lambda: model.default_sampling,
    ]
    for use in uses:
        with pytest.raises(ik.ModelUnloadedError, match=r"unloaded; ik\.load\("):
            use()
    assert (model.name, model.path, model.quantization) == ("llama", folder, "none")


def test_unloading_from_many_threads_at_once_is_safe(folder: Path) -> None:
    model = ik.load(folder, **OPTIONS)
    threads = [threading.Thread(target=model.unload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not model.loaded


def test_the_same_load_in_several_threads_loads_once(folder: Path, reads: list[str]) -> None:
    found: list[ik.Model] = []
    threads = [
        threading.Thread(target=lambda: found.append(ik.load(folder, **OPTIONS))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(set(map(id, found))) == len(reads) == 1
    assert found[0].generate("Once", **SIX).finish_reason == "length"
    found[0].unload()


# -- interrupts -----------------------------------------------------------------------------------


def test_an_interrupted_generate_returns_what_there_is(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        whole = model.generate("Once", **LONG)
        with (
            interrupt_after(model, 7),
            pytest.warns(UserWarning, match="1 of 1 requests were cancelled"),
        ):
            gen = model.generate("Once", **LONG)
        assert gen.finish_reason == "cancelled"
        assert 6 <= len(gen.token_ids) < 50
        assert gen.token_ids == whole.token_ids[: len(gen.token_ids)]
        assert model.last is gen
        assert model.generate("Once", **LONG).token_ids == whole.token_ids


def test_an_interrupt_keeps_the_prompts_that_are_done(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        base = ik.SamplingParams(ignore_eos=True, max_tokens=200)
        short = model.generate("Once", **SIX)
        request = model.submit("Once", **SIX)
        with interrupt_after(model, 12), pytest.warns(UserWarning, match="9 of 9"):
            gens = model.generate([f"{n}" for n in range(9)], sampling=base)
        assert request.result().token_ids == short.token_ids
        assert [g.finish_reason for g in gens] == ["cancelled"] * 9
        assert [bool(g.token_ids) for g in gens].count(True) == 4  # the slots there are
        assert gens[-1].latency.queue is None
        assert model.waiting == model.running == 0


def test_an_interrupted_stream_keeps_its_text(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        pieces: list[str] = []
        with interrupt_after(model, 7), pytest.raises(KeyboardInterrupt):
            pieces.extend(model.stream("Once", **LONG))
        gc.collect()
        assert model.last.finish_reason == "cancelled"
        assert model.last.text.startswith("".join(pieces))
        assert pieces
        wait_until(lambda: model.running == 0)
        assert model.generate("Once", **SIX).finish_reason == "length"


def test_a_second_interrupt_does_not_wait_for_the_step(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model, held(model) as hold:
        presses = threading.Thread(target=press_twice, args=(hold.wait,))
        presses.start()
        with pytest.raises(KeyboardInterrupt):
            model.generate("Once", **LONG)
        presses.join()
        hold.release()
        wait_until(lambda: model.running == 0)


def press_twice(ready: Callable[[], None]) -> None:
    ready()
    interrupt()
    time.sleep(0.6)
    interrupt()


def test_an_interrupted_wait_for_a_change_changes_nothing(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model, held(model) as hold:
        running = model.submit("Once", **SIX)
        hold.wait()
        press = threading.Timer(0.3, interrupt)
        press.start()
        with pytest.raises(KeyboardInterrupt):
            model.configure(max_batch=8)
        press.join()
        assert (model.max_batch, model.plan.max_batch) == (4, 4)
        waiting = model.submit("Once", **SIX)
        hold.step()
        assert waiting.status == "running"  # the change that was given up holds nothing up
        hold.release()
        assert running.result().token_ids == waiting.result().token_ids
        assert model.max_batch == 4


def test_an_interrupted_unload_goes_on_to_the_end(folder: Path) -> None:
    model = ik.load(folder, **OPTIONS)
    module = model._parts.loaded.module
    with held(model) as hold:
        request = model.submit("Once", **LONG)
        hold.wait()
        press = threading.Timer(0.3, interrupt)
        press.start()
        with pytest.raises(KeyboardInterrupt):
            model.unload()
        press.join()
        assert not model.loaded
        # A step is at work: the weights must still be there.
        assert all(p.numel() for p in module.parameters())
    assert request.result().finish_reason == "cancelled"
    wait_until(lambda: not any(p.numel() for p in module.parameters()))


MOMENTS = {
    "config": ("inferkit.catalog.config", 0),
    "files": ("inferkit.catalog.resolve", 0),
    "plan": ("inferkit.memory.plan_config", 0),
    "first weight": ("transformers.core_model_loading.set_param_for_module", 0),
    "a weight in the middle": ("transformers.core_model_loading.set_param_for_module", 9),
    "tokenizer": ("inferkit.loading.read_tokenizer", 0),
    "runner": ("inferkit.resident.make_runner", 0),
    "own logits": ("inferkit.engine.serving.reference_logits", 0),
    "probe": ("inferkit.engine.runner.SlottedRunner.decode", 0),
    "engine": ("inferkit.resident.Engine", 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_load_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    modules: list[weakref.ref[Any]] = []
    init = transformers.LlamaForCausalLM.__init__

    def built(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        modules.append(weakref.ref(self))

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", built)
    target, calls = MOMENTS[moment]
    function, left = pkgutil.resolve_name(target), [calls]

    def interrupted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(target, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            ik.load(folder, **OPTIONS)
    assert not ik.models()
    # As a notebook does, `caught` holds the traceback and all its frames.
    assert caught.value.__traceback__ is not None
    gc.collect()
    alive = [m for m in (ref() for ref in modules) if m is not None]
    held_bytes = sum(
        p.untyped_storage().nbytes()
        for module in alive
        for p in module.parameters()
        if p.device.type != "meta"
    )
    assert held_bytes == 0
    with ik.load(folder, **OPTIONS) as model:
        assert model.generate("Once", **SIX).finish_reason == "length"


def test_an_interrupt_while_another_thread_loads_ends_the_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    real = resident.load_files

    def load_files(*args: Any, **options: Any) -> Any:
        assert go.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(resident, "load_files", load_files)
    other = threading.Thread(target=ik.load, args=(folder,), kwargs=OPTIONS)
    other.start()
    press = threading.Timer(0.4, interrupt)
    press.start()
    with pytest.raises(KeyboardInterrupt):
        ik.load(folder, **OPTIONS, name="second")
    press.join()
    go.set()
    other.join()
    assert [m.name for m in ik.models()] == ["llama"]
    ik.models()[0].unload()


# -- timeouts and cancellation --------------------------------------------------------------------


def test_a_result_that_takes_too_long_can_be_asked_for_again(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model, held(model) as hold:
        request = model.submit("Once", **SIX)
        hold.wait()
        for timeout in (0, 0.05, 0.3):
            with pytest.raises(TimeoutError, match=r"cancel\(\)"):
                request.result(timeout)
        hold.release()
        assert request.result(60).finish_reason == "length"


def test_a_cancelled_request_frees_its_slot_by_the_next_step(folder: Path) -> None:
    with ik.load(folder, **{**OPTIONS, "max_batch": 1}) as model, held(model) as hold:
        first = model.submit("Once", **LONG)
        hold.wait()
        hold.step(3)
        second = model.submit("Once", **SIX)
        first.cancel()
        hold.step()  # the pass that was on its way; the engine stands before the next one
        assert first.status == "cancelled"
        assert second.status == "running"
        hold.release()
        assert len(first.result().token_ids) == 4
        assert second.result().token_ids[:4] == first.result().token_ids


def test_a_waiting_request_can_be_cancelled(folder: Path) -> None:
    with ik.load(folder, **{**OPTIONS, "max_batch": 1}) as model, held(model) as hold:
        first = model.submit("Once", **SIX)
        hold.wait()
        waiting, third = model.submit("two", **SIX), model.submit("three", **SIX)
        waiting.cancel()
        hold.step()
        gen = waiting.result(60)
        assert (gen.finish_reason, gen.token_ids, gen.text) == ("cancelled", (), "")
        assert gen.latency.ttft is None
        hold.release()
        assert first.result().finish_reason == third.result().finish_reason == "length"


def test_cancelling_from_other_threads_ends_a_wait_for_the_result(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model, held(model) as hold:
        request = model.submit("Once", **LONG)
        hold.wait()
        threads = [threading.Thread(target=request.cancel) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        hold.release()
        assert request.result(60).finish_reason == "cancelled"
        request.cancel()  # once more, when all is over
        assert request.result().finish_reason == "cancelled"


# -- memory ---------------------------------------------------------------------------------------

# Rounds of loading, use and unloading, with every kind of reference that a notebook keeps.
ROUNDS = """
import json, sys, psutil, torch
import inferkit as ik

mode, rounds = sys.argv[1], int(sys.argv[2])
process, kept, Out, numbers = psutil.Process(), [], {}, []


def rss():
    return round(process.memory_info().rss / 2**20)


def failing(*args):
    raise RuntimeError("raised in the model")


for n in range(rounds):
    model = ik.load("demo", dtype="bfloat16", quantize=mode, context=512, max_batch=4,
                    progress=False)
    Out[n] = _ = model
    gen = model.generate("Once upon a time", max_tokens=4)
    request = model.submit("The moon", max_tokens=4)
    request.result()
    used = rss()
    module = model._parts.loaded.module
    hook = module.model.layers[3].register_forward_pre_hook(failing)
    try:
        module(input_ids=torch.tensor([[1, 2, 3]]))
    except RuntimeError as error:
        sys.last_exc = error
    try:
        model.generate([10**9])
    except ik.PromptError as error:
        kept.append(error)
    hook.remove()
    pieces = model.stream("Once", max_tokens=50)
    next(pieces)
    kept += [gen, request, model.tokenizer, module, sys.last_exc, pieces, ik.models()]
    model.unload()
    numbers.append((used, rss()))
print(json.dumps(numbers))
"""

INTERRUPTED = """
import json, signal, sys, psutil
import inferkit as ik
from transformers import core_model_loading

process, kept, numbers, real = psutil.Process(), [], [], core_model_loading.set_param_for_module


def rss():
    return round(process.memory_info().rss / 2**20)


with ik.load("demo", dtype="float32", context=512, progress=False) as model:
    used = rss()
    kept.append(model.tokenizer)
numbers.append((used, rss()))
for n in range(4):
    left = [50 * (n + 1)]

    def interrupted(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    core_model_loading.set_param_for_module = interrupted
    try:
        ik.load("demo", dtype="float32", context=512, progress=False)
    except KeyboardInterrupt as error:
        kept.append(error)
    numbers.append((0, rss()))
core_model_loading.set_param_for_module = real
with ik.load("demo", dtype="float32", context=512, progress=False) as model:
    assert model.generate("Once", max_tokens=2).token_ids
print(json.dumps(numbers))
"""


def measured(script: str, *arguments: str) -> list[tuple[int, int]]:
    """(MiB resident while in use, MiB resident after unloading) of each round."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning"},
    )
    assert done.returncode == 0, done.stderr
    numbers = [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]
    print("MiB resident (in use, after unloading):", numbers)
    return numbers


def test_a_forward_pass_of_ones_own_keeps_no_weights(folder: Path) -> None:
    with ik.load(folder, **OPTIONS) as model:
        module = model._parts.loaded.module
        out = module(input_ids=torch.tensor([[5, 6, 7]]))  # not under torch.no_grad()
    assert out.logits.grad_fn is None  # whose graph would hold every weight


@pytest.mark.demo
@pytest.mark.parametrize(
    ("mode", "rounds"), [("none", 3), pytest.param("nf4", 2, marks=pytest.mark.thorough)]
)
def test_unloading_gives_the_memory_back_whoever_holds_what(
    demo_model_path: Path, mode: str, rounds: int
) -> None:
    numbers = measured(ROUNDS, mode, str(rounds))
    weights = ik.plan("demo", quantize=mode, dtype="bfloat16").weights / 2**20
    first_used, first = numbers[0]
    assert first_used - first > 0.8 * weights
    for _, after in numbers[1:]:
        assert after - first < 48, "memory of earlier rounds is still there"


@pytest.mark.demo
def test_an_interrupted_load_gives_the_memory_back(demo_model_path: Path) -> None:
    (used, baseline), *interrupted = measured(INTERRUPTED)
    assert used - baseline > 900  # 1.07 GB of weights in fp32
    # Freed, but for what glibc keeps of the heaps of transformers' four reading threads: the top of
    # each, at most 64 MiB, which the next load uses again.
    assert all(after - baseline < 4 * 64 for _, after in interrupted)
    assert interrupted[-1][1] - interrupted[-2][1] < 96


REQUESTS = """
import json, sys, psutil
import inferkit as ik
from inferkit.devices import release_memory

ref, count, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
process, numbers = psutil.Process(), []
with ik.load(ref, context=256, max_batch=16, progress=False) as model:
    for _ in range(5):
        prompts = [f"request {n} of many" for n in range(count)]
        gens = model.generate(prompts, max_tokens=tokens, ignore_eos=True, temperature=0.8)
        assert all(len(g.token_ids) == tokens for g in gens)
        del gens
        release_memory(["cpu"])  # else what the allocator keeps for the next logits counts
        numbers.append((0, round(process.memory_info().rss / 2**20)))
print(json.dumps(numbers))
"""


def test_memory_is_flat_over_five_hundred_requests(folder: Path) -> None:
    numbers = [after for _, after in measured(REQUESTS, str(folder), "100", "8")]
    assert numbers[-1] - numbers[0] < 16


@pytest.mark.thorough
@pytest.mark.demo
def test_memory_is_flat_over_requests_to_the_demo_model(demo_model_path: Path) -> None:
    numbers = [after for _, after in measured(REQUESTS, "demo", "16", "4")]
    assert numbers[-1] - numbers[0] < 48
