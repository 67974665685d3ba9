"""The engine: one thread that owns a model and works on all its requests, step by step.

Other threads send it messages (a request, a command, a policy) and read what it publishes in
`Request`. All else here belongs to its thread, so nothing needs a lock while a step runs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from inferkit.devices import trim_heap
from inferkit.engine.guesses import Guesser
from inferkit.engine.openmp import release_team
from inferkit.engine.request import Request, forked
from inferkit.engine.runner import SlottedRunner
from inferkit.engine.scheduler import Batching, Entry, Scheduler
from inferkit.engine.sequential import SequentialRunner
from inferkit.engine.stepper import Stepper, StepRecord
from inferkit.errors import GenerationError, InferkitError, ModelUnloadedError
from inferkit.generation import Settings

__all__ = ["Engine", "StepRecord"]

_log = logging.getLogger("inferkit")

# A wait that is cut into pieces can be interrupted on every platform.
_TICK = 0.25
_STEPS_KEPT = 4096
# After so many seconds without work, free heap pages go back: later requests must fault them in
# again, so not between two cells that follow each other.
_REST = 1.0


@dataclass(slots=True)
class _Command:
    """Work for the engine's thread; ``done`` tells the thread that asked how it went."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        """Do it, unless it was withdrawn."""
        if self.done.set_running_or_notify_cancel():
            try:
                self.done.set_result(self.work())
            except BaseException as error:  # handed to the thread that asked
                self.done.set_exception(error)

    def refuse(self, error: InferkitError) -> None:
        """Do not do it."""
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)

    def wait(self, timeout: float | None = None) -> Any:
        """Its result; TimeoutError if it is not done in ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done.done():
            left = _TICK if deadline is None else min(_TICK, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError
            try:
                return self.done.result(left)
            except TimeoutError:
                continue
        return self.done.result()


class Engine:
    """Serves requests on one model.

    `submit`, `wake`, `set_batching`, `call`, `resize`, `close` and the properties may be called
    from any thread.

    Args:
        runner: Slotted, for batches, or sequential, for architectures that cannot share a batch.
        end_ids: The model's end tokens.
        context: Most tokens of prompt and output together.
        batching: The policy (see `Scheduler`).
        max_batch: Most requests that run at once.
        prefix_reuse: Keep the prompt's prefix where an earlier or running request has it.
        settings: Tells what requests run under at this moment.
        name: What messages call the model.

    Attributes:
        settings: Tells what requests run under at this moment.
        steps: The last steps, for timelines.
        at_rest: Held by the engine's thread while it works with the weights. Who else would use
            them takes it for that time, and must not wait for it.
        on_submit: Called with requests as they are queued, in the thread that submits them; they
            must neither wait nor fail.
        on_change: Called when what requests run under was changed, in the thread that changed it;
            they must neither wait nor fail.
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
        self.settings = settings
        self.steps: deque[StepRecord] = deque(maxlen=_STEPS_KEPT)
        self.on_submit: list[Callable[[Sequence[Request]], None]] = []
        self.on_change: list[Callable[[], None]] = []
        self.at_rest = threading.Lock()
        self._name = name
        self._scheduler = Scheduler(batching, max_batch, runner.prefill_chunk)
        self._stepper = Stepper(
            runner,
            self._scheduler,
            end_ids=end_ids,
            context=context,
            prefix_reuse=prefix_reuse,
            settings=settings,
            look=self._take_in,
        )
        self._pid = os.getpid()
        self._news = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._commands: deque[_Command] = deque()
        self._closing = False
        self._ended = False
        self._problem: InferkitError | None = None
        self._farewell: list[_Command] = []
        self._heap_used = False
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
    def requests(self) -> list[Request]:
        """Those that wait or run, in the order of arrival."""
        # Read while the engine's thread works, the way that requests go: none is missed, for it
        # comes to the next place before it leaves the last, and one may be seen twice.
        inbox = self._inbox.copy()
        waiting = self._scheduler.waiting.copy()
        running = self._scheduler.running.copy()
        return list(dict.fromkeys([*(entry.request for entry in (*running, *waiting)), *inbox]))

    @property
    def batching(self) -> Batching:
        """The batching policy in force."""
        return self._scheduler.batching

    @property
    def max_batch(self) -> int:
        """Most requests that run at once."""
        return self._scheduler.max_batch

    @property
    def context(self) -> int:
        """Most tokens of prompt and output together."""
        return self._stepper.context

    @property
    def guesser(self) -> Guesser | None:
        """Who guesses next tokens; what is set holds from the next step on."""
        found = self._stepper.guesser
        return found if found is not None and found.alive else None

    @guesser.setter
    def guesser(self, guesser: Guesser | None) -> None:
        self._check_process()
        self._stepper.guesser = guesser

    @property
    def on_finish(self) -> list[Callable[[Request], None]]:
        """Called in the engine's thread with each request that has ended; they must not wait."""
        return self._stepper.on_finish

    @property
    def kv_capacity(self) -> int:
        """Bytes of the KV cache of all slots; 0 where transformers' ``generate`` keeps its own."""
        return self.runner.cache.nbytes if isinstance(self.runner, SlottedRunner) else 0

    def steps_since(self, moment: int) -> list[StepRecord]:
        """The steps kept that ended after ``moment`` (ns of ``perf_counter_ns``), in order."""
        kept = self.steps.copy()  # one operation, so that the engine's thread cannot come between
        late = takewhile(lambda step: step.ended > moment, reversed(kept))
        return list(late)[::-1]

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all at one moment (a static batch is formed of them); returns at once.

        Raises:
            ModelUnloadedError: The engine was closed.
            GenerationError: The engine's thread has died of an error.
            ForkedProcessError: This process is a fork of the one that loaded the model.
        """
        self._check_process()
        release_team()
        with self._news:
            if self._closing:
                raise self._refusal()
            self._inbox.extend(requests)
            self._news.notify()
        for listener in self.on_submit.copy():  # another thread may add one, or take one away
            listener(requests)

    def changed(self) -> None:
        """Tell who wants to know that requests run under something else now."""
        for listener in self.on_change.copy():
            listener()

    def wake(self) -> None:
        """Look at the requests again, for one was cancelled."""
        if os.getpid() == self._pid:
            with self._news:
                self._news.notify()

    def set_batching(self, batching: Batching) -> None:
        """Change the policy; it holds from the next step on, for requests that wait too."""
        self._check_process()
        with self._news:
            self._scheduler.batching = batching
            self._news.notify()

    def call(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the engine's thread when nothing runs, and return its result.

        Requests that run finish first; those that wait go on afterwards. An interrupt while this
        waits withdraws the work if it has not begun.

        Raises:
            ModelUnloadedError: The engine was closed, before or while this waited.
            GenerationError: The engine's thread has died, or this is the engine's thread.
        """
        command = self._send(work)
        try:
            return command.wait()
        except BaseException:
            command.done.cancel()
            self.wake()
            raise

    @contextmanager
    def held(self, tell: Callable[[int], None] | None = None) -> Iterator[None]:
        """Hold the engine still while the body runs, in the caller's own thread.

        Requests that run finish first; those that wait go on afterwards. The wait can be
        interrupted, and so can the body, which must leave a runner that works (see `adopt`).

        Args:
            tell: Called from time to time with the number of requests that this waits for; what it
                raises ends the wait.

        Raises:
            ModelUnloadedError, GenerationError: As for `call`.
        """
        still, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            still.set()
            while not go_on.wait(_TICK):
                pass

        command = self._send(hold)
        try:
            while not still.wait(_TICK):
                if command.done.done():
                    command.done.result()  # why it was refused
                if tell is not None:
                    tell(self.running)
            yield
        finally:
            release_team()
            go_on.set()
            command.done.cancel()
            self.wake()

    def adopt(self, runner: SlottedRunner | SequentialRunner, max_batch: int, context: int) -> None:
        """Go on with another runner, of that many slots; only while the engine is `held`."""
        self.runner = runner
        self._stepper.adopt(runner, max_batch, context)

    def forget(self) -> None:
        """Keep no prefix of earlier requests; only while the engine is `held`."""
        self._stepper.adopt(self.runner, self.max_batch, self.context)

    def give_up(self, problem: InferkitError) -> None:
        """End all requests with an error, and take no more; only while the engine is `held`."""
        self._stepper.broken = problem

    def _send(self, work: Callable[[], Any]) -> _Command:
        self._check_process()
        if threading.current_thread() is self._thread:
            raise GenerationError(
                f"The engine of {self._name!r} cannot wait for itself: change the model from a "
                "thread of your own, not from a listener that the engine calls."
            )
        command = _Command(work)
        with self._news:
            if self._closing:
                raise self._refusal()
            self._commands.append(command)
            self._news.notify()
        return command

    def resize(self, max_batch: int, context: int) -> None:
        """Change the number of slots and their length, once what runs has finished.

        Raises:
            OutOfMemoryError: The new cache could not be allocated; nothing has changed.
        """
        self.call(lambda: self._stepper.resize(max_batch, context))

    def close(self, then: Callable[[], None] | None = None, timeout: float | None = None) -> None:
        """Cancel all requests and end the thread. Safe to call twice.

        Args:
            then: Runs in the engine's thread when its last step is over, also if the wait for it
                is interrupted: what releases the weights, which no running step may lose.
            timeout: Most seconds to wait; None waits for as long as the last step takes.
        """
        if os.getpid() != self._pid:
            return  # the thread and all it owns are the parent's
        last = _Command(then or (lambda: None))
        with self._news:
            self._closing = True
            ended = self._ended
            if not ended:
                self._farewell.append(last)
            self._news.notify()
        if ended:
            last.run()
        if threading.current_thread() is self._thread:
            return
        try:
            last.wait(timeout)
        except TimeoutError:
            _log.warning("The engine of %r has not ended after %s s.", self._name, timeout)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise forked(f"The model {self._name!r} was loaded", self._pid)

    def _refusal(self) -> InferkitError:
        if self._problem is not None:
            return self._problem
        return ModelUnloadedError(
            f"The model {self._name!r} was unloaded; ik.load it again to use it."
        )

    # -- the engine's thread --------------------------------------------------------------------

    def _loop(self) -> None:
        problem = None
        try:
            while self._wait_for_work():
                with self.at_rest:
                    self._turn()
        except BaseException as error:  # whoever waits for this thread must hear of it
            problem = GenerationError(
                f"The engine of {self._name!r} has stopped ({type(error).__name__}: {error}). "
                "Nothing can run on it: load the model again with ik.load."
            )
            problem.add_note(traceback.format_exc())
            _log.exception("The engine of %r has stopped.", self._name)
        with self.at_rest:
            self._end(problem)

    def _turn(self) -> None:
        self._stepper.drop_cancelled()
        self._run_commands()
        if self._stepper.broken is not None:
            raise self._stepper.broken
        if not self._commands:
            self._stepper.admit()
        if self._scheduler.running:
            self._heap_used = True
            self.steps.append(self._stepper.step())

    def _wait_for_work(self) -> bool:
        if not self._has_work():
            release_team()
            self._await_news(_REST)
            if not self._has_work() and self._heap_used:
                trim_heap()
                self._heap_used = False
        self._await_news()
        return not self._take_in()

    def _await_news(self, timeout: float | None = None) -> None:
        with self._news:
            self._news.wait_for(self._has_work, timeout)

    def _take_in(self) -> bool:
        """Queue what was submitted; return whether this is to end."""
        with self._news:
            while self._inbox:
                self._scheduler.add(Entry(self._inbox[0]))
                self._inbox.popleft()  # not before: see `requests`
            return self._closing

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        return bool(
            self._closing or self._inbox or self._commands or scheduler.running or scheduler.waiting
        )

    def _run_commands(self) -> None:
        """Those that were withdrawn hold nothing up; the others need an idle engine."""
        while self._commands:
            withdrawn = self._commands[0].done.cancelled()
            if self._scheduler.running and not withdrawn:
                return
            self._commands[0].run()
            self._commands.popleft()

    def _end(self, problem: InferkitError | None) -> None:
        with self._news:
            self._closing, self._problem = True, problem
        self._take_in()
        self._stepper.abandon(problem)
        for command in self._commands:
            command.refuse(self._refusal())
        self._commands.clear()
        with self._news:
            self._ended = True
        for command in self._farewell:
            command.run()
