"""Playback: a recorded experiment in the live plot, at the speed at which it happened.

No model is loaded and nothing is computed, so that it runs wherever the file is, in a small Binder
pod too. A stage stands where an engine would: it makes requests and gives them the recorded tokens
at the recorded moments, so that the live plot cannot tell the difference; who looks at it is told.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, cast

from inferkit.engine import Request
from inferkit.engine.engine import StepRecord
from inferkit.errors import ExperimentError, OptionError
from inferkit.experiments.experiment import (
    Experiment,
    checked_pause,
    generation_of,
    opened,
    trace_of,
)
from inferkit.experiments.file import ExperimentFile, ModeEntry, RequestEntry, unpack
from inferkit.generation import Generation, Generations
from inferkit.html import format_number
from inferkit.model import Model
from inferkit.notebook.display import show
from inferkit.notebook.live import LivePlot
from inferkit.sampling import Sampled
from inferkit.trace import NS

__all__ = ["Playback", "play"]

_STEPS = 4096
_NO_END = "It had not ended when the recording was cut off."
_LONGEST = 1e9  # seconds of a pause; as good as none that is cut


def play(experiment: Experiment | str | os.PathLike[str], *, pause: float = 1.0) -> Playback:
    """Show an experiment as it happened, in a live plot; end a cell with it.

    Args:
        experiment: An experiment, or the path of one.
        pause: Most seconds that nothing happens; longer waits of the recording are cut.

    Raises:
        ExperimentError: It cannot be read.
        OptionError: It has no requests, or ``pause`` is no time.
    """
    return Playback(opened(experiment), pause=pause)


class Playback(LivePlot):
    """A live plot of what was recorded: it begins when it is shown, and can be shown again.

    Args:
        experiment: What to play.
        pause: Most seconds that nothing happens.
    """

    def __init__(self, experiment: Experiment, *, pause: float = 1.0, **traits: Any) -> None:
        if not experiment.file.requests:
            raise OptionError(f"The experiment {experiment.name!r} has no requests to play.")
        most = checked_pause(pause)
        super().__init__(**traits)
        self.experiment = experiment
        self._origin = experiment.origin
        self._stage = _Stage(experiment, most, self._failed)
        self._feed.attach(cast(Model, self._stage))

    def _ipython_display_(self, **options: Any) -> None:
        where = f"Playback of {self.experiment.name!r}: {self.experiment.origin}. "
        text = f"{where}Nothing runs: these are the recorded times."
        if cut := self._stage.cut:
            text += f" {format_number(cut)} s in which nothing happened are left out."
        if any(trace_of(one).chunks is not None for one in self.experiment.file.requests):
            text += " Tokens that arrived in one chunk are shown at once."
        html = f'<div class="inferkit" style="opacity:.8">{escape(text)}</div>'
        if not self._closed:
            show({"text/html": html, "text/plain": text})
        super()._ipython_display_(**options)
        self._stage.start()

    @property
    def generations(self) -> Generations:
        """The results of the run that was played last, with the origin of what was recorded."""
        return Generations(
            replace(gen, latency=replace(gen.latency, origin=self._origin))
            for gen in super().generations
        )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; return whether it has come. An interrupt ends the wait, no more.

        Raises:
            ExperimentError: It came to no end: what was recorded cannot be played.
        """
        return self._stage.wait(timeout)

    def stop(self) -> None:
        """End it; what has been played stays."""
        self._stage.stop()

    def close(self) -> None:
        """Take it out of the browser, and end its threads. Safe to call twice."""
        if "_stage" in vars(self):
            self._stage.stop()
        super().close()


class _Told:
    """Gives a request its recorded text: what the detokenizer does for one that runs."""

    def __init__(self, gen: Generation, ends: Sequence[int]) -> None:
        self._text, self._ends = gen.text, deque(ends)
        self._told = 0
        self.stopped_by: str | None = None
        self._stop = gen.stop_reason if isinstance(gen.stop_reason, str) else None

    def add(self, _: int) -> str:
        end = self._ends.popleft() if self._ends else self._told
        piece, self._told = self._text[self._told : end], max(end, self._told)
        return piece

    def flush(self) -> str:
        self.stopped_by = self._stop
        piece, self._told = self._text[self._told :], len(self._text)
        return piece


class _Stage:
    """Stands where a model and its engine do, as far as a `Feed` looks at them."""

    def __init__(
        self, experiment: Experiment, pause: float, failed: Callable[[BaseException], None]
    ) -> None:
        self.on_submit: list[Callable[[Sequence[Request]], None]] = []
        self.kv_capacity = 0
        self.requests: list[Request] = []
        self.running = self.waiting = 0
        self._name, self._file = experiment.name, experiment.file
        self._shorter = _Shortened(experiment, pause)
        self._steps: deque[StepRecord] = deque(maxlen=_STEPS)
        self._live: dict[int, Request] = {}
        self._failed = failed
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._base = 0
        self._show_of(self._file.requests[0])

    # -- what a model says of itself ------------------------------------------------------------

    @property
    def _engine(self) -> _Stage:
        return self

    def _show_of(self, one: RequestEntry) -> None:
        """Be the model of a request: of several, one is shown, that to which the last one came."""
        self._model = one.model
        self._show(self._file.modes[one.mode])

    def _show(self, mode: ModeEntry) -> None:
        self.name = self._file.models[mode.model].name
        self.plan = SimpleNamespace(format=mode.format)
        self.batching, self.max_batch, self.context = mode.batching, mode.max_batch, mode.context
        self.compilation, self.speculative = mode.step == "compiled", mode.speculative

    @property
    def cut(self) -> float:
        """Seconds of waiting that are not played."""
        return self._shorter.cut

    def steps_since(self, moment: int) -> list[StepRecord]:
        """As `Engine.steps_since`; the steps follow from the requests' times."""
        late = takewhile(lambda step: step.ended > moment, reversed(self._steps.copy()))
        return list(late)[::-1]

    # -- playing --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin from the start, unless it plays."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._ended.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._play, name="inferkit-playback", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; return whether it has come."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._thread is not None and self._thread.is_alive():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._thread.join(0.1)
        if self._failure is not None:
            raise ExperimentError(
                f"The experiment {self._name!r} cannot be played: {type(self._failure).__name__}: "
                f"{self._failure}"
            ) from self._failure
        return self._thread is not None

    def stop(self) -> None:
        """End it."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _play(self) -> None:
        self._base = time.perf_counter_ns()
        self._show_of(self._file.requests[0])  # it may be played again
        try:
            for moment, _, event in self._events():
                if self._ended.wait(max(0.0, (moment - time.perf_counter_ns()) * NS)):
                    break
                event(moment)
        except Exception as error:  # told, for nobody reads the log of a thread
            self._failure = error
            self._failed(error)
        finally:
            for number, request in list(self._live.items()):
                lacks_end = self._file.requests[number].finish_reason is None
                request.finish("cancelled", error=ExperimentError(_NO_END) if lacks_end else None)
            self._live.clear()
            self.requests, self.running, self.waiting = [], 0, 0

    def _events(self) -> list[tuple[int, int, Callable[[int], None]]]:
        """All that happens, in order of time, which is that of ``perf_counter_ns``."""
        events: list[tuple[int, int, Callable[[int], None]]] = []

        def add(time: int | None, order: int, event: Callable[[int], None]) -> None:
            if time is not None:
                events.append((self._base + self._shorter(time), order, event))

        for mode in self._file.modes:
            add(mode.time, 0, partial(self._change, mode))
        steps: dict[int, list[int]] = {}
        for number, one in enumerate(self._file.requests):
            add(one.arrival, 1, partial(self._submit, number))
            add(one.scheduled, 2, partial(self._schedule, number))
            for moment in unpack(one.tokens):
                steps.setdefault(moment, []).append(number)
            add(one.finished, 4, partial(self._finish, number))
        for moment, numbers in steps.items():
            add(moment, 3, partial(self._step, numbers))
        return sorted(events, key=lambda event: event[:2])

    def _change(self, mode: ModeEntry, _: int) -> None:
        if mode.model == self._model:
            self._show(mode)

    def _submit(self, number: int, moment: int) -> None:
        one = self._file.requests[number]
        self._show_of(one)
        gen = generation_of(one)
        request = Request(
            gen.prompt,
            gen.prompt_token_ids or (0,) * one.prompt_tokens,
            gen.params,
            gen.settings,
            cast(Any, _Told(gen, unpack(one.text_ends))),
            lambda: None,
            arrival=moment,
        )
        self._live[number] = request
        self._count()
        for listener in self.on_submit.copy():
            listener([request])

    def _schedule(self, number: int, moment: int) -> None:
        self._live[number].schedule(moment, self._file.requests[number].cached_tokens)
        self._count()

    def _step(self, numbers: Sequence[int], moment: int) -> None:
        prefill = decode = 0
        for number in numbers:
            request, one = self._live[number], self._file.requests[number]
            if request.generated:
                decode += 1
            else:
                prefill += one.prompt_tokens - one.cached_tokens
            ids = unpack(one.token_ids)
            token = ids[request.generated] if ids else 0
            request.emit(Sampled(token), moment, end=False)
        before = self._steps[-1].ended if self._steps else moment
        began = max(before, *(self._live[n].scheduled or moment for n in numbers))
        self._steps.append(
            StepRecord(
                began=min(began, moment),
                ended=moment,
                forward=0,
                prefill_tokens=prefill,
                decode_tokens=decode,
                running=self.running,
                waiting=self.waiting,
                kv_bytes=0,
            )
        )

    def _finish(self, number: int, _: int) -> None:
        gen = generation_of(self._file.requests[number])
        self._live.pop(number).finish(
            gen.finish_reason, stop_reason=gen.stop_reason, error=gen.error
        )
        self._count()

    def _count(self) -> None:
        self.requests = list(self._live.values())
        self.running = sum(request.scheduled is not None for request in self.requests)
        self.waiting = len(self.requests) - self.running


def _spans(file: ExperimentFile) -> Iterator[tuple[int, int]]:
    """When something happens, from and to: a request, or a change of mode."""
    for mode in file.modes:
        yield mode.time, mode.time
    for one in file.requests:
        yield one.arrival, max([one.finished or one.arrival, *unpack(one.tokens)[-1:]])


class _Shortened:
    """Recorded moments, with the long waits cut."""

    def __init__(self, experiment: Experiment, pause: float) -> None:
        self._cuts: list[tuple[int, int]] = []
        gone, busy_until, most = 0, 0, round(min(pause, _LONGEST) / NS)
        for begins, ends in sorted(_spans(experiment.file)):
            if begins - busy_until > most:
                gone += begins - busy_until - most
                self._cuts.append((begins, gone))
            busy_until = max(busy_until, ends)

    @property
    def cut(self) -> float:
        """How much is cut in all, in seconds."""
        return self._cuts[-1][1] * NS if self._cuts else 0.0

    def __call__(self, moment: int) -> int:
        gone, kept_until = 0, moment
        for begins, total in self._cuts:
            if moment < begins:
                # Within a wait that is cut: no later than what follows it.
                kept_until = min(moment, begins - (total - gone))
                break
            gone = total
        return max(0, kept_until - gone)
