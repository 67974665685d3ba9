"""Many threads, event loops and processes; failures of every kind; input that makes no sense."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from held import held, wait_until

import inferkit as ik
from inferkit.engine.request import Request

SIX = {"max_tokens": 6, "ignore_eos": True}
LONG = {"max_tokens": 200, "ignore_eos": True}
OPTIONS = {"dtype": "float32", "context": 256, "max_batch": 4}
POISON = 66  # a token that a test makes fail


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    with ik.load(tiny_model("llama"), **OPTIONS) as loaded:
        yield loaded
        assert (loaded.running, loaded.waiting) == (0, 0)


@pytest.fixture
def own(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    """A model for one test alone, which may break it."""
    with ik.load(tiny_model("llama"), **OPTIONS, name="own") as loaded:
        yield loaded


def end(requests: Sequence[Request]) -> list[ik.Generation]:
    return [r.result(60) for r in requests]


# -- threads --------------------------------------------------------------------------------------


def test_a_hundred_requests_from_ten_threads_get_their_own_tokens(model: ik.Model) -> None:
    prompts = [[5 + n, 6 + n % 7, 7] for n in range(100)]
    alone = [model.generate(p, **SIX).token_ids for p in prompts]
    assert len(set(alone)) > 50

    def tenth(start: int) -> list[ik.Generation]:
        mine = prompts[start : start + 10]
        return end([model.submit(p, **SIX) for p in mine])

    with ThreadPoolExecutor(10) as pool:
        found = [gen for gens in pool.map(tenth, range(0, 100, 10)) for gen in gens]
    assert [g.prompt_token_ids for g in found] == [tuple(p) for p in prompts]
    assert [g.token_ids for g in found] == alone


def test_a_model_loaded_in_one_thread_serves_others(tiny_model: Callable[[str], Path]) -> None:
    with ThreadPoolExecutor(1) as pool:
        model = pool.submit(ik.load, tiny_model("qwen3"), **OPTIONS).result(60)
    assert model.generate("Once", **SIX).finish_reason == "length"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(model.generate, "Once", **SIX).result(60).finish_reason == "length"
        pool.submit(model.unload).result(60)
    assert not model.loaded


def test_unloading_while_requests_run_ends_them_with_their_text(own: ik.Model) -> None:
    with held(own) as hold:
        requests = [own.submit("Once", **LONG) for _ in range(9)]
        readers = ThreadPoolExecutor(2)
        read = readers.submit(lambda: "".join(requests[0]))
        waited = readers.submit(requests[8].result)
        hold.wait()
        hold.step(3)
        unloading = threading.Thread(target=own.unload)
        unloading.start()
        wait_until(lambda: not own.loaded)
        with pytest.raises(ik.ModelUnloadedError):
            own.submit("Once")
        hold.release()
        unloading.join(60)
        assert not unloading.is_alive()
    gens = end(requests)
    assert [g.finish_reason for g in gens] == ["cancelled"] * 9
    assert len(gens[0].token_ids) >= 3
    assert gens[0].text == read.result(60)
    assert gens[8].token_ids == ()
    assert waited.result(60) is gens[8]
    readers.shutdown()


def test_a_wait_for_a_change_ends_when_the_model_is_unloaded(own: ik.Model) -> None:
    with held(own) as hold, ThreadPoolExecutor(2) as pool:
        own.submit("Once", **LONG)
        hold.wait()
        changing = pool.submit(own.configure, max_batch=2)
        wait_until(lambda: bool(own._engine._commands))
        unloading = pool.submit(own.unload)
        wait_until(lambda: not own.loaded)
        hold.release()
        unloading.result(60)
        with pytest.raises(ik.ModelUnloadedError):
            changing.result(60)


def test_policies_change_while_ten_threads_submit(model: ik.Model) -> None:
    alone = model.generate("Once", **SIX).token_ids
    over = threading.Event()

    def switch() -> None:
        for batching, rows in itertools.cycle(
            [("static", 4), ("off", 4), ("continuous", 2), ("static", 3), ("continuous", 4)]
        ):
            model.configure(batching=batching, max_batch=rows)
            if over.is_set():
                return

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        with ThreadPoolExecutor(10) as pool:
            work = [pool.submit(model.generate, ["Once"] * 5, **SIX) for _ in range(10)]
            gens = [g for w in work for g in w.result(60)]
    finally:
        over.set()
        switching.join(60)
        model.configure(batching="continuous", max_batch=4)
    assert {g.token_ids for g in gens} == {alone}


# -- event loops ----------------------------------------------------------------------------------


async def test_requests_are_awaited(model: ik.Model) -> None:
    alone = model.generate("Once", **SIX)
    gens = await asyncio.gather(*(model.submit("Once", **SIX) for _ in range(12)))
    assert {g.token_ids for g in gens} == {alone.token_ids}
    request = model.submit("Once", **SIX)
    assert await request is await request


async def test_pieces_come_in_a_coroutine(model: ik.Model) -> None:
    request = model.submit("Once", **SIX)
    pieces = [piece async for piece in request]
    assert len(pieces) > 1
    assert "".join(pieces) == (await request).text
    assert [piece async for piece in request] == pieces


async def test_the_loop_is_free_while_a_request_runs(model: ik.Model) -> None:
    with held(model) as hold:
        task = asyncio.ensure_future(model.submit("Once", **SIX))
        await asyncio.to_thread(hold.wait)
        turns = 0
        while turns < 20:
            await asyncio.sleep(0)
            turns += 1
        assert not task.done()
    assert (await task).finish_reason == "length"


@pytest.mark.parametrize("way", ["await", "async for"])
async def test_cancelling_a_task_cancels_its_request(model: ik.Model, way: str) -> None:
    request = model.submit("Once", **LONG)

    async def read() -> None:
        async for _ in request:
            pass

    with held(model) as hold:
        task = asyncio.ensure_future(request if way == "await" else read())
        await asyncio.to_thread(hold.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert request.cancelled
    assert (await asyncio.to_thread(request.result, 60)).finish_reason == "cancelled"


async def test_a_time_limit_cancels_the_request(model: ik.Model) -> None:
    with held(model):
        request = model.submit("Once", **LONG)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(request, 0.05)
    assert (await asyncio.to_thread(request.result, 60)).finish_reason == "cancelled"


async def test_an_error_is_raised_at_the_end_of_the_pieces(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_prefill(model, monkeypatch, ValueError("broken"))
    request = model.submit([POISON, 5], **SIX)
    with pytest.raises(ik.GenerationError, match="broken"):
        assert [piece async for piece in request] == []
    assert (await request).finish_reason == "error"


def test_two_event_loops_read_one_request(model: ik.Model) -> None:
    with held(model) as hold:
        request = model.submit("Once", **SIX)

        async def read() -> str:
            return "".join([piece async for piece in request])

        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(asyncio.run, read()) for _ in range(2)]
            wait_until(lambda: len(request._listeners) == 2)
            hold.release()
            assert [t.result(60) for t in texts] == [request.result(60).text] * 2


def test_a_closed_event_loop_does_not_stop_the_engine(model: ik.Model) -> None:
    with held(model) as hold:
        request = model.submit("Once", **SIX)
        loop = asyncio.new_event_loop()
        pieces = request.__aiter__()
        task = loop.create_task(anext(pieces))
        hold.wait()
        while not task.done():  # until there is a piece to stand at
            loop.run_until_complete(asyncio.sleep(0))
            hold.step()
        assert request._listeners
        loop.close()  # with the iteration open
        hold.release()
        assert request.result(60).finish_reason == "length"
        assert model.generate("Once", **SIX).finish_reason == "length"


# -- what changes while a request waits or runs ---------------------------------------------------


def test_a_prompt_that_waits_while_the_context_shrinks_ends_with_an_error(own: ik.Model) -> None:
    own.configure(max_batch=1)
    with held(own) as hold:
        running = own.submit("Once", **SIX)
        hold.wait()
        change = threading.Thread(target=own.configure, kwargs={"context": 64})
        change.start()
        wait_until(lambda: bool(own._engine._commands))
        waiting = own.submit(list(range(5, 205)), max_tokens=4)
    change.join()
    assert running.result(60).finish_reason == "length"
    error = waiting.result(60).error
    assert isinstance(error, ik.PromptError)
    assert "200 tokens" in str(error)
    assert "64" in str(error)
    assert own.generate("Once", **SIX).error is None


def test_a_cancelled_request_does_not_wait_for_the_one_that_runs_alone(
    tiny_model: Callable[[str], Path],
) -> None:
    with ik.load(tiny_model("mamba"), **OPTIONS, name="alone") as model:
        first = model.submit("Once", **LONG)
        wait_until(lambda: bool(first.token_ids))
        second = model.submit("Twice", **LONG)
        second.cancel()
        assert second.result(60).finish_reason == "cancelled"
        assert not first.done
        first.cancel()


def test_a_handle_tells_the_summary_how_it_ended(model: ik.Model) -> None:
    with held(model) as hold:
        cancelled, whole = model.submit("Once", **SIX), model.submit("Twice", **SIX)
        hold.wait()
        with pytest.raises(ik.OptionError, match="has not ended"):
            ik.summarize([whole])
        cancelled.cancel()
    end([cancelled, whole])
    summary = ik.summarize([cancelled, whole])
    assert (summary.completed, summary.failed) == (1, 1)
    assert cancelled.latency.trace.finish_reason == "cancelled"


# -- processes ------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, warnings
import inferkit as ik

warnings.simplefilter("ignore", DeprecationWarning)
model = ik.load(sys.argv[1], dtype="float32", context=64, progress=False)
request = model.submit("Once", max_tokens=2, ignore_eos=True)
request.result()
running = model.submit("Once", max_tokens=60, ignore_eos=True)
child = os.fork()
if child == 0:
    signal.alarm(60)  # a hang is a failure of the test
    uses = {
        "generate": lambda: model.generate("Once"),
        "submit": lambda: model.submit("Once"),
        "configure": lambda: model.configure(batching="off"),
        "result": running.result,
        "iterate": lambda: list(running),
        "load": lambda: ik.load(sys.argv[1]),
    }
    for name, use in uses.items():
        try:
            use()
        except ik.ForkedProcessError as error:
            assert "spawn" in str(error)
            print(name, "refused", flush=True)
    running.cancel()
    assert not ik.models()
    repr(model)
    model.unload()
    sys.exit(0)  # what runs at exit must not wait for the parent's thread either
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert running.result().finish_reason == "length"
assert model.generate("Once", max_tokens=2, ignore_eos=True).finish_reason == "length"
print("parent done")
"""

SPAWN = """
import multiprocessing, sys
import inferkit as ik


def work(path, queue):
    with ik.load(path, dtype="float32", context=64, progress=False) as model:
        queue.put(model.generate("Once", max_tokens=4, ignore_eos=True).token_ids)


if __name__ == "__main__":
    path = sys.argv[1]
    with ik.load(path, dtype="float32", context=64, progress=False) as model:
        wanted = model.generate("Once", max_tokens=4, ignore_eos=True).token_ids
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=work, args=(path, queue))
        process.start()
        assert queue.get(timeout=90) == wanted
        process.join(60)
        assert process.exitcode == 0
"""

EXIT = """
import sys
import inferkit as ik

model = ik.load(sys.argv[1], dtype="float32", context=4096, progress=False)
request = model.submit("Once", max_tokens=4000, ignore_eos=True)
next(iter(request))
print("leaving")
"""


def script(tmp_path: Path, code: str, *arguments: object) -> str:
    """Run a script of its own (spawn imports it anew) and return what it printed."""
    file = tmp_path / "script.py"
    file.write_text(code)
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_fork_refuses_instead_of_hanging(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = script(tmp_path, FORK, tiny_model("llama")).split("\n")
    for use in ("generate", "submit", "configure", "result", "iterate", "load"):
        assert f"{use} refused" in out
    assert "parent done" in out


def test_a_spawned_process_loads_its_own(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    script(tmp_path, SPAWN, tiny_model("llama"))


def test_a_kernel_ends_while_a_request_runs(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    began = time.monotonic()
    assert script(tmp_path, EXIT, tiny_model("llama")) == "leaving\n"
    assert time.monotonic() - began < 60


# -- failures while requests run ------------------------------------------------------------------


def poison_prefill(model: ik.Model, patch: pytest.MonkeyPatch, error: Exception) -> None:
    """A pass over a prompt that holds POISON fails, for all prompts in it."""
    real = model._engine.runner.prefill

    def prefill(chunks: Sequence[Any]) -> torch.Tensor:
        if any(POISON in c.tokens for c in chunks):
            raise error
        return real(chunks)

    patch.setattr(model._engine.runner, "prefill", prefill)


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 8 GiB"),
]


@pytest.mark.parametrize("error", MEMORY)
def test_a_prompt_that_takes_too_much_memory_fails_alone(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prompts = [[5, 6], [POISON, 6], [7, 8]]
    alone = [model.generate(p, **SIX).token_ids for p in (prompts[0], prompts[2])]
    poison_prefill(model, monkeypatch, error)
    with pytest.warns(UserWarning, match=r"ran out of memory.*model\.configure"):
        gens = model.generate(prompts, **SIX)
    assert [g.finish_reason for g in gens] == ["length", "error", "length"]
    assert isinstance(gens[1].error, ik.OutOfMemoryError)
    assert isinstance(gens[1].error, MemoryError)
    assert [gens[0].token_ids, gens[2].token_ids] == alone
    with pytest.raises(ik.OutOfMemoryError):
        gens[1].raise_for_error()


def test_any_error_of_a_prompt_fails_it_alone(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_prefill(model, monkeypatch, IndexError("index out of range in self"))
    gens = end([model.submit(p, **SIX) for p in ([5, 6], [POISON, 6], [7, 8])])
    assert [g.finish_reason for g in gens] == ["length", "error", "length"]
    assert type(gens[1].error) is ik.GenerationError
    assert "IndexError: index out of range in self" in str(gens[1].error)
    assert "prefill" in gens[1].error.__notes__[0]  # where it happened


@pytest.mark.parametrize("error", MEMORY)
def test_a_decode_that_runs_out_of_memory_gives_up_its_newest_request(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prompts = [[5, 6], [7, 8], [9, 10]]
    alone = [model.generate(p, **SIX).token_ids for p in prompts]
    real, calls = model._engine.runner.decode, itertools.count()

    def decode(*args: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(model._engine.runner, "decode", decode)
    gens = end(submit_together(model, prompts))
    assert [g.finish_reason for g in gens] == ["length", "length", "error"]
    assert isinstance(gens[2].error, ik.OutOfMemoryError)
    assert gens[2].token_ids == alone[2][:3]
    assert [g.token_ids for g in gens[:2]] == alone[:2]


def submit_together(model: ik.Model, prompts: Sequence[Sequence[int]]) -> list[Request]:
    requests = model._requests(list(prompts), None, SIX, time.perf_counter_ns())
    model._engine.submit(requests)
    return requests


def test_memory_that_runs_out_while_a_token_is_chosen_loses_no_position(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferkit.engine import stepper

    prompts = [[5, 6], [7, 8], [9, 10]]
    alone = [model.generate(p, **SIX).token_ids for p in prompts]
    real, calls = stepper.sample, itertools.count()

    def sample(*args: Any) -> Any:
        if next(calls) in (0, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    monkeypatch.setattr(stepper, "sample", sample)
    gens = end(submit_together(model, prompts))
    assert [g.finish_reason for g in gens].count("error") == 1
    for gen, wanted in zip(gens, alone, strict=True):
        assert gen.token_ids == wanted[: len(gen.token_ids)]


def test_an_error_of_a_decode_fails_what_took_part_and_the_engine_lives(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = model.generate([5, 6], **SIX).token_ids
    real, calls = model._engine.runner.decode, itertools.count()

    def decode(*args: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise RuntimeError("device-side assert")
        return real(*args)

    monkeypatch.setattr(model._engine.runner, "decode", decode)
    gens = end(submit_together(model, [[5, 6]] * 6))
    assert [g.finish_reason for g in gens] == ["error"] * 4 + ["length"] * 2
    assert {g.token_ids for g in gens[:4]} == {alone[:2]}
    assert {g.token_ids for g in gens[4:]} == {alone}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_fail_their_request_alone(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    prompts = [[5, 6], [7, 8], [9, 10]]
    alone = [model.generate(p, **SIX).token_ids for p in prompts]
    runner, calls = model._engine.runner, itertools.count()
    real = runner.decode

    def decode(tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        logits = real(tokens, positions).clone()
        if next(calls) == 2:
            logits[1] = value
        return logits

    monkeypatch.setattr(runner, "decode", decode)
    gens = end(submit_together(model, prompts))
    assert [g.finish_reason for g in gens] == ["length", "error", "length"]
    assert isinstance(gens[1].error, ik.NonFiniteLogitsError)
    assert "dtype=" in str(gens[1].error)
    assert gens[1].token_ids == alone[1][:3]
    assert [gens[0].token_ids, gens[2].token_ids] == [alone[0], alone[2]]


def test_damaged_weights_are_told_and_do_not_spread(own: ik.Model) -> None:
    wanted = own.generate([5, 6], **SIX).token_ids
    embedding = own._parts.loaded.module.get_input_embeddings().weight
    embedding.data[POISON] = float("nan")
    gens = end(submit_together(own, [[5, 6], [POISON, 6], [5, 6]]))
    assert [g.finish_reason for g in gens] == ["length", "error", "length"]
    assert isinstance(gens[1].error, ik.NonFiniteLogitsError)
    assert gens[0].token_ids == gens[2].token_ids == wanted
    for _ in range(6):  # every slot, the one that held NaN too
        assert own.generate([5, 6], **SIX).token_ids == wanted


def test_a_tokenizer_that_fails_fails_its_request_alone(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferkit.engine.detokenize import Detokenizer

    real = Detokenizer.add

    def add(self: Detokenizer, token_id: int) -> str:
        if POISON in self._ids:
            raise OverflowError("can't convert negative int to unsigned")
        return real(self, token_id)

    monkeypatch.setattr(Detokenizer, "add", add)
    gens = end(submit_together(model, [[5, 6], [POISON, 6], [7, 8]]))
    assert [g.finish_reason for g in gens] == ["length", "error", "length"]
    assert "OverflowError: can't convert" in str(gens[1].error)


def test_a_tokenizer_that_fails_at_the_end_gives_an_error_and_the_text(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferkit.engine.detokenize import Detokenizer

    def flush(self: Detokenizer) -> str:
        raise OverflowError("in flush")

    monkeypatch.setattr(Detokenizer, "flush", flush)
    gen = model.submit("Once", **SIX).result(60)
    assert (gen.finish_reason, len(gen.token_ids)) == ("error", 6)
    assert "in flush" in str(gen.error)
    assert gen.text


def test_a_listener_that_fails_harms_nobody(
    model: ik.Model, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Request] = []

    def failing(request: Request) -> None:
        raise ValueError("a listener's own fault")

    listeners = model._engine.on_finish
    listeners += [failing, heard.append]
    try:
        requests = submit_together(model, [[5, 6], [7, 8]])
        assert [g.finish_reason for g in end(requests)] == ["length", "length"]
        wait_until(lambda: len(heard) == 2)
    finally:
        listeners.clear()
    assert "a listener's own fault" in caplog.text


def test_a_listener_cannot_make_the_engine_wait_for_itself(own: ik.Model) -> None:
    told: list[Exception] = []

    def changing(request: Request) -> None:
        try:
            own.configure(max_batch=2)
        except ik.GenerationError as error:
            told.append(error)

    own._engine.on_finish.append(changing)
    assert own.generate("Once", **SIX).finish_reason == "length"
    wait_until(lambda: bool(told))
    assert "cannot wait for itself" in str(told[0])


@pytest.mark.parametrize("part", ["scheduler.admit", "_slots.take", "_slots.seed", "_settings"])
def test_an_engine_that_breaks_fails_its_requests_instead_of_hanging(
    own: ik.Model,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[[str], Path],
) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("a bug in the engine")

    owner, _, name = part.rpartition(".")
    target = own._engine._stepper
    target = getattr(target, owner) if owner else target
    with held(own) as hold:
        requests = [own.submit("Once", **LONG) for _ in range(6)]
        hold.wait()
        hold.step(4)
        monkeypatch.setattr(target, name, fail)
        requests[0].cancel()  # its slot goes to one that waits
        hold.release()
        gens = end(requests)
    assert [g.finish_reason for g in gens] == ["cancelled"] + ["error"] * 5
    assert all("a bug in the engine" in str(g.error) for g in gens[1:])
    assert gens[1].token_ids
    with pytest.raises(ik.GenerationError, match=r"a bug in the engine.*ik\.load"):
        own.submit("Once")
    with pytest.raises(ik.GenerationError, match="a bug in the engine"):
        own.configure(max_batch=2)
    monkeypatch.undo()
    with ik.load(tiny_model("llama"), **OPTIONS, name="own") as again:
        assert again is not own
        assert again.generate("Once", **SIX).finish_reason == "length"


def test_a_change_that_waits_hears_that_the_engine_broke(
    own: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise AssertionError("a bug in the engine")

    with held(own) as hold, ThreadPoolExecutor(1) as pool:
        request = own.submit("Once", **LONG)
        hold.wait()
        changing = pool.submit(own.configure, max_batch=2)
        wait_until(lambda: bool(own._engine._commands))
        monkeypatch.setattr(own._engine._stepper, "step", fail)
        hold.release()
        with pytest.raises(ik.GenerationError, match="a bug in the engine"):
            changing.result(60)
        assert request.result(60).finish_reason == "error"


def test_a_generate_that_makes_no_token_is_an_error(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ik.load(tiny_model("mamba"), dtype="float32", context=64) as model:
        monkeypatch.setattr(model._engine.runner, "run", lambda tokens, choose: None)
        gen = model.submit("Once", **SIX).result(60)
        assert "without a token" in str(gen.error)
        monkeypatch.undo()
        assert model.generate("Once", **SIX).finish_reason == "length"


def test_one_at_a_time_survives_errors_and_cancellation(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ik.load(tiny_model("mamba"), dtype="float32", context=128) as model:
        alone = model.generate([5, 6], **SIX).token_ids
        real = model._engine.runner.run

        def run(tokens: Sequence[int], choose: Callable[..., Any]) -> None:
            if POISON in tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            real(tokens, choose)

        monkeypatch.setattr(model._engine.runner, "run", run)
        gens = end(submit_together(model, [[5, 6], [POISON, 6], [5, 6]]))
        assert [g.finish_reason for g in gens] == ["length", "error", "length"]
        assert isinstance(gens[1].error, ik.OutOfMemoryError)
        assert gens[2].token_ids == alone
        endless = model.submit([5, 6], max_tokens=120, ignore_eos=True)
        next(iter(endless))
        endless.cancel()
        assert endless.result(60).finish_reason == "cancelled"
        assert model.generate([5, 6], **SIX).token_ids == alone


# -- input that makes no sense --------------------------------------------------------------------

BAD_PROMPTS = [
    ("", "empty"),
    ([], "empty"),
    ([[]], "no tokens"),
    (["a", ""], "empty"),
    ([5] * 256, r"256 tokens.*context of 256.*model\.configure\(context=512\)"),
    ([5] * 5000, r"5000 tokens.*shorten it"),
    (["a", [5] * 256], "256 tokens"),
    ([5, 384], "384 is no token id .* 0 to 383"),
    ([5, -1], "-1 is no token id"),
    ([5, 2.5], "2.5 is no token id"),
    ([5, "a"], "'a' is no token id"),
    ([True, 5], "True is no token id"),
    (["a", 5], "5, of type int"),
    (["a", None], "None, of type NoneType"),
    (None, "NoneType"),
    (b"bytes", "bytes"),
    (5, "type int"),
    ({"prompt": "a"}, "dict"),
    ("a lone \ud800 surrogate", "half of a character"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_prompt_that_is_none_is_refused(model: ik.Model, prompt: Any, message: str) -> None:
    with pytest.raises(ik.PromptError, match=message):
        model.generate(prompt)


def test_the_advice_on_a_long_prompt_works(own: ik.Model) -> None:
    own.configure(context=512)
    assert own.generate([5] * 256, **SIX).finish_reason == "length"


BAD_OPTIONS = [
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": -3}, "max_tokens=-3"),
    ({"max_tokens": 2.5}, "max_tokens=2.5"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temprature": 0.1}, "did you mean 'temperature'"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"stop": [""]}, "stop="),
    ({"seed": "x"}, "seed='x'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_an_option_that_makes_no_sense_is_refused(
    model: ik.Model, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ik.OptionError, match=message):
        model.generate(prompt, **options)


BAD_LOADS = [
    ({"quantise": "nf4"}, ik.OptionError, "did you mean 'quantize'"),
    ({"max_tokens": 4}, ik.OptionError, "Unknown option 'max_tokens'"),
    ({"quantize": "int4"}, ik.OptionError, "quantize='int4'.*'nf4'"),
    ({"quantize": None}, ik.OptionError, "quantize=None"),
    ({"batching": "dynamic"}, ik.OptionError, "batching='dynamic'.*continuous"),
    ({"max_batch": 0}, ik.OptionError, "max_batch=0"),
    ({"max_batch": True}, ik.OptionError, "max_batch=True"),
    ({"max_batch": 1.5}, ik.OptionError, "max_batch=1.5"),
    ({"context": 0}, ik.OptionError, "context=0"),
    ({"context": 10**6}, ik.OptionError, "context=1000000.*4096"),
    ({"dtype": "int4"}, ik.OptionError, "dtype='int4'.*bfloat16"),
    ({"device": "gpu"}, ik.OptionError, "device='gpu'"),
    ({"device": "cuda:99"}, ik.DeviceError, "cuda:99 is not attached"),
    ({"device": []}, ik.OptionError, r"device=\[\]"),
    ({"revision": "main"}, ik.OptionError, "revision='main'"),
    ({"name": ""}, ik.OptionError, "name=''"),
    ({"name": 5}, ik.OptionError, "name=5"),
    ({"prefill_chunk": 0}, ik.OptionError, "prefill_chunk=0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_LOADS)
def test_a_load_that_makes_no_sense_is_refused_before_a_weight_is_read(
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[ik.InferkitError],
    message: str,
) -> None:
    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("inferkit.resident.load_files", read)
    with pytest.raises(error, match=message):
        ik.load(tiny_model("qwen3"), **options)
    assert "qwen3" not in [m.name for m in ik.models()]


@pytest.mark.parametrize("ref", ["no/such/model", "nosuchmodel.gguf", "", "./nothing-here"])
def test_an_unknown_model_is_told(ref: str) -> None:
    with pytest.raises(ik.ModelNotFoundError, match=repr(ref)):
        ik.load(ref)


@pytest.mark.parametrize("ref", [None, 5, ["demo"]])
def test_what_is_no_reference_is_told(ref: Any) -> None:
    with pytest.raises(ik.OptionError, match="'demo'"):
        ik.load(ref)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    import architectures
    import transformers

    config = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    architectures.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ik.UnsupportedModelError, match="encoder-decoder"):
        ik.load(tmp_path)
