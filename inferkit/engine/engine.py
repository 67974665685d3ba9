"""The engine: one thread that owns a model and works on all its requests, step by step.

Other threads send it messages (a request, a command) and read what it publishes in `Request`. All
else here belongs to its thread, so nothing needs a lock while a step runs.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from inferkit.engine.request import Request
from inferkit.engine.runner import Chunk, SlottedRunner
from inferkit.engine.scheduler import Batching, Entry, Scheduler
from inferkit.engine.sequential import SequentialRunner
from inferkit.engine.slots import Slots
from inferkit.errors import (
    ForkedProcessError,
    GenerationError,
    InferkitError,
    ModelUnloadedError,
    OutOfMemoryError,
)
from inferkit.generation import FinishReason, Settings
from inferkit.sampling import sample

_TICK = 0.25
_STEPS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for timelines: times in ns of ``time.perf_counter_ns``."""

    began: int
    ended: int
    forward: int
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int


@dataclass(slots=True)
class _Command:
    work: Callable[[], Any]
    done: Future[Any]


class Engine:
    """Serves requests on one model.

    `submit`, `call`, `close` and the read-only properties may be called from any thread.

    Args:
        runner: Slotted, for batches, or sequential, for architectures that cannot share a batch.
        end_ids: The model's end tokens.
        context: Most tokens of prompt and output together.
        batching: The policy (see `Scheduler`).
        max_batch: Most requests that run at once.
        prefix_reuse: Keep the prompt's prefix where an earlier or running request has it.
        settings: Tells what requests run under at this moment.
    """

    def __init__(
        self,
        runner: SlottedRunner | SequentialRunner,
        *,
        end_ids: frozenset[int],
        context: int,
        batching: Batching,
        max_batch: int,
        prefix_reuse: bool,
        settings: Callable[[], Settings],
        name: str,
    ) -> None:
        self.runner = runner
        self.context = context
        self.steps: deque[StepRecord] = deque(maxlen=_STEPS_KEPT)
        self.on_finish: list[Callable[[Request], None]] = []
        self._name = name
        self._end_ids = end_ids
        self._settings = settings
        self._slots: Slots | None = None
        if isinstance(runner, SlottedRunner):
            self._slots = Slots(runner.cache, prefix_reuse)
        self._scheduler = Scheduler(batching, max_batch, runner.prefill_chunk)
        self._forward_ns = 0
        self._pid = os.getpid()
        self._news = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._commands: deque[_Command] = deque()
        self._closing = False
        # Daemon: a kernel that exits must not wait for a generation to end.
        self._thread = threading.Thread(target=self._loop, name=f"inferkit-{name}", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._scheduler.waiting) + len(self._inbox)

    @property
    def batching(self) -> Batching:
        """The batching policy in force."""
        return self._scheduler.batching

    @property
    def max_batch(self) -> int:
        """Most requests that run at once."""
        return self._scheduler.max_batch

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all at one moment (a static batch is formed of them); returns at once.

        Raises:
            ModelUnloadedError: The engine was closed.
            ForkedProcessError: This process is a fork of the one that loaded the model.
        """
        self._check_process()
        with self._news:
            if self._closing:
                raise ModelUnloadedError(
                    f"The model {self._name!r} was unloaded; ik.load it again to use it."
                )
            self._inbox.extend(requests)
            self._news.notify()

    def wake(self) -> None:
        """Look at the requests again, for one was cancelled."""
        with self._news:
            self._news.notify()

    def set_batching(self, batching: Batching) -> None:
        """Change the policy; it holds from the next step on, for requests that wait too."""
        with self._news:
            self._scheduler.batching = batching
            self._news.notify()

    def call(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the engine's thread when nothing runs, and return its result.

        Requests that run finish first; those that wait go on afterwards. An interrupt while this
        waits withdraws the work if it has not begun.
        """
        self._check_process()
        command = _Command(work, Future())
        with self._news:
            if self._closing:
                raise ModelUnloadedError(f"The model {self._name!r} was unloaded.")
            self._commands.append(command)
            self._news.notify()
        try:
            while True:
                try:
                    return command.done.result(_TICK)
                except TimeoutError:
                    if command.done.done():
                        raise
        except KeyboardInterrupt:
            command.done.cancel()
            raise

    def resize(self, max_batch: int, context: int) -> None:
        """Change the number of slots and their length, once what runs has finished."""

        def work() -> None:
            if isinstance(self.runner, SlottedRunner) and self._slots is not None:
                self.runner.resize(max_batch, context)
                self._slots = Slots(self.runner.cache, self._slots.reuse)
            self._scheduler.max_batch = max_batch
            self.context = context

        self.call(work)

    def close(self, timeout: float = 30.0) -> None:
        """Cancel all requests and end the thread. Safe to call twice."""
        with self._news:
            self._closing = True
            self._news.notify()
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def closed(self) -> bool:
        """Whether it takes requests no more."""
        return self._closing

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"The model {self._name!r} was loaded in process {self._pid} and this is its fork "
                f"{os.getpid()}, which has no engine thread. Load the model in this process, or "
                "start it with multiprocessing's 'spawn' method."
            )

    # -- the engine's thread --------------------------------------------------------------------

    def _loop(self) -> None:
        while self._wait_for_work():
            self._drop_cancelled()
            self._run_commands()
            if not self._commands:
                for entry in self._scheduler.admit():
                    self._start(entry)
            if self._scheduler.running:
                self._step()
        for entry in [*self._scheduler.running, *self._scheduler.waiting]:
            self._finish(entry, "cancelled")
        for command in self._commands:
            command.done.cancel()

    def _wait_for_work(self) -> bool:
        scheduler = self._scheduler
        with self._news:
            while not (
                self._closing
                or self._inbox
                or self._commands
                or scheduler.running
                or scheduler.waiting
            ):
                self._news.wait()
            while self._inbox:
                scheduler.add(Entry(self._inbox.popleft()))
            return not self._closing

    def _drop_cancelled(self) -> None:
        for entry in [*self._scheduler.running, *self._scheduler.waiting]:
            if entry.request.cancelled:
                self._finish(entry, "cancelled")

    def _run_commands(self) -> None:
        while self._commands and not self._scheduler.running:
            command = self._commands[0]
            if command.done.set_running_or_notify_cancel():
                try:
                    command.done.set_result(command.work())
                except BaseException as error:  # handed to the thread that asked
                    command.done.set_exception(error)
            self._commands.popleft()

    def _start(self, entry: Entry) -> None:
        entry.request.settings = self._settings()
        if self._slots is not None:
            self._slots.take(entry)

    def _step(self) -> None:
        began = time.perf_counter_ns()
        self._forward_ns = 0
        if isinstance(self.runner, SequentialRunner):
            entry = self._scheduler.running[0]
            self._run_alone(entry, self.runner)
            prefilled, decoded = entry.prompt_length, entry.request.generated
        else:
            assert self._slots is not None
            ready = [e for e in self._scheduler.prefill_candidates() if self._slots.seed(e)]
            step = self._scheduler.step(ready)
            prefilled, decoded = sum(n for _, n in step.prefill), len(step.decode)
            for parts in self._batches(step.prefill):
                self._guarded(self._prefill, parts)
            if step.decode:
                self._guarded(self._decode, step.decode)
        self.steps.append(
            StepRecord(
                began,
                time.perf_counter_ns(),
                self._forward_ns,
                prefilled,
                decoded,
                self.running,
                self.waiting,
            )
        )

    def _batches(self, parts: Sequence[tuple[Entry, int]]) -> list[Sequence[tuple[Entry, int]]]:
        """All parts at once, or one by one where padding would leave the context."""
        if not parts:
            return []
        width = max(n for _, n in parts)
        if all(e.computed + width <= self.context for e, _ in parts):
            return [parts]
        return [[part] for part in parts]

    def _prefill(self, parts: Sequence[tuple[Entry, int]]) -> None:
        assert isinstance(self.runner, SlottedRunner)
        now = time.perf_counter_ns()
        for entry, _ in parts:
            entry.request.schedule(now, entry.computed)
        chunks = [
            Chunk(e.slot, e.tokens[e.computed : e.computed + n], e.computed) for e, n in parts
        ]
        logits = self._timed(self.runner.prefill, chunks)
        width = max(n for _, n in parts)
        for entry, n in parts:
            entry.written = max(entry.written, entry.computed + width)
            entry.computed += n
        rows = [i for i, (entry, _) in enumerate(parts) if not entry.prefilling]
        if rows:
            self._emit([parts[i][0] for i in rows], logits[rows])

    def _decode(self, entries: Sequence[Entry]) -> None:
        assert isinstance(self.runner, SlottedRunner) and self._slots is not None
        width = max(e.slot for e in entries) + 1
        # A slot that is still being prefilled takes part with a token that its next part replaces.
        by_slot = {e.slot: e for e in self._scheduler.running}
        rows = [by_slot[slot] for slot in range(width)]
        decoding = set(map(id, entries))
        tokens = [e.tokens[e.computed] if id(e) in decoding else 0 for e in rows]
        positions = [self._slots.next_position(e) for e in rows]
        logits = self._timed(self.runner.decode, tokens, positions)
        if len(rows) > len(entries):
            keep = [i for i, e in enumerate(rows) if id(e) in decoding]
            rows, logits = [rows[i] for i in keep], logits[keep]
        for entry in rows:
            entry.computed += 1
        self._emit(rows, logits)

    def _timed(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        began = time.perf_counter_ns()
        out = forward(*inputs)
        self._forward_ns += time.perf_counter_ns() - began
        return out

    def _emit(self, entries: Sequence[Entry], logits: Any) -> None:
        """Choose a token for each row, hand it out, and end the requests that are done."""
        began = time.perf_counter_ns()
        chosen = sample(logits, [e.request.sampler for e in entries])
        now = time.perf_counter_ns()
        # On a GPU the forward pass is over only when the chosen tokens have arrived.
        self._forward_ns += (now - began) if logits.device.type != "cpu" else 0
        for entry, sampled in zip(entries, chosen, strict=True):
            if sampled.error is not None:
                self._finish(entry, "error", error=sampled.error)
                continue
            self._take(entry, sampled, now)

    def _take(self, entry: Entry, sampled: Any, now: int) -> None:
        request, token_id = entry.request, sampled.token_id
        params = request.params
        entry.tokens.append(token_id)
        ends = token_id in params.stop_token_ids
        ends = ends or (token_id in self._end_ids and not params.ignore_eos)
        stopped = request.emit(sampled, now, end=ends)
        if ends:
            self._finish(entry, "stop", stop_reason=token_id)
        elif stopped:
            self._finish(entry, "stop")
        elif request.generated >= params.max_tokens or len(entry.tokens) >= self.context:
            self._finish(entry, "length")

    def _finish(
        self,
        entry: Entry,
        reason: FinishReason,
        *,
        stop_reason: int | None = None,
        error: InferkitError | None = None,
    ) -> None:
        self._scheduler.remove(entry)
        if self._slots is not None and entry.slot >= 0:
            self._slots.free(entry, keep=reason != "error")
        entry.request.finish(reason, stop_reason=stop_reason, error=error)
        for listener in self.on_finish:
            listener(entry.request)

    def _run_alone(self, entry: Entry, runner: SequentialRunner) -> None:
        def choose(logits: Any) -> int | None:
            """The next token, or None when the request is over."""
            if entry.request.cancelled or self._closing:
                self._finish(entry, "cancelled")
                return None
            self._emit([entry], logits)
            return None if entry.request.done else entry.tokens[-1]

        entry.request.schedule(time.perf_counter_ns(), 0)
        self._guarded(lambda entries: runner.run(entry.tokens, choose), [entry])

    # -- when a step fails ----------------------------------------------------------------------

    def _guarded(self, work: Callable[[Any], None], batch: Sequence[Any]) -> None:
        """Run a pass; if it fails, its requests fail as narrowly as can be, and the engine lives.

        A prefill that runs out of memory is tried again one prompt at a time. A decode that does
        gives up its newest request, and the others go on in the next step.
        """
        try:
            work(batch)
        except Exception as error:  # whatever a model's code may raise
            failed = [item[0] if isinstance(item, tuple) else item for item in batch]
            failed = [e for e in failed if not e.request.done]
            memory = _out_of_memory(error)
            problem = _explain(error, memory)
            del error
            if memory and len(batch) > 1 and isinstance(batch[0], tuple):
                for item in batch:
                    self._guarded(work, [item])
                return
            if memory:
                failed = failed[-1:]
            for entry in failed:
                self._finish(entry, "error", error=problem)


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "DefaultCPUAlloc" in text


def _explain(error: Exception, memory: bool) -> GenerationError:
    """An error of ours without the traceback's frames, which would keep tensors alive."""
    first = str(error).strip().split("\n", 1)[0]
    problem: GenerationError
    if memory:
        problem = OutOfMemoryError(
            f"The device ran out of memory while this request ran ({first}). The other requests "
            "go on. Lower max_batch or context with model.configure(), or load quantized."
        )
    else:
        problem = GenerationError(f"The model failed: {type(error).__name__}: {first}")
    problem.add_note(traceback.format_exc())
    return problem
