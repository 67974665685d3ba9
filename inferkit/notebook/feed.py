"""What live views show of a model, read from it several times a second.

The engine knows nothing of this: a `Feed` hears of new requests, and otherwise reads lists that
only grow (a request's timestamps, the engine's steps), so that no step ever waits for a view.
Numbers are kept in tables of limited length; see `tables.Table` for what is let go.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from inferkit.errors import InferkitError
from inferkit.notebook.tables import Table, Window
from inferkit.notebook.watched import Watched
from inferkit.trace import NS

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.engine.engine import Engine, StepRecord
    from inferkit.generation import Generation
    from inferkit.model import Model

WINDOW = 10.0
"""Seconds whose gaps the rolling quantiles are of."""

RATE_WINDOW = 2.0
"""Seconds that tokens per second are counted over."""

_REQUESTS = 200  # ended ones whose text a view can still show
_MARKS = 200
_STANDSTILL = int(0.05 / NS)  # ns without a step, from which on it is no step that begins late
_RUN = 10_000  # requests of a run whose results are kept

COLUMNS = {
    "tokens": ("time", "itl", "request"),
    "firsts": ("time", "ttft", "request"),
    "levels": ("time", "p50", "p99"),
    "steps": ("time", "duration", "prefill", "decode", "running", "waiting", "kv"),
}
"""The tables and their columns: times in s since `Feed.epoch`, durations in ms, kv in bytes.

A row of "steps" without tokens is no step: requests waited then, and none ran.
"""


@dataclass(slots=True)
class Update:
    """What has happened since the last one.

    Attributes:
        tables: New rows per table; all rows of those in ``reset``.
        reset: Tables whose rows replace the former ones, for they were thinned or moved.
        marks: New changes of mode, as (time, label).
        requests: What is new of each request, as plain data.
    """

    tables: dict[str, np.ndarray] = field(default_factory=dict)
    reset: list[str] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.marks or self.requests or any(map(len, self.tables.values())))

    def add(self, later: Update) -> None:
        """Become the update that tells what this one and a later one tell."""
        for name, rows in later.tables.items():
            former = self.tables.get(name)
            joined = former is not None and name not in later.reset
            self.tables[name] = np.concatenate([former, rows]) if joined else rows
        self.reset += [name for name in later.reset if name not in self.reset]
        self.marks += later.marks
        self.requests += later.requests


class Feed:
    """Reads the requests and steps of a model. Its methods may be called from any thread.

    What was read stays when another model is attached, or none.

    Args:
        wake: Set when a request comes.

    Attributes:
        epoch: The moment that times count from, in ns of ``time.perf_counter_ns``.
        tables: All rows so far, by the names in `COLUMNS`.
        marks: Changes of model and mode, as (time in s, label).
    """

    def __init__(self, wake: threading.Event) -> None:
        self.epoch = time.perf_counter_ns()
        self.tables = {name: Table(len(columns)) for name, columns in COLUMNS.items()}
        self.marks: deque[tuple[float, str]] = deque(maxlen=_MARKS)
        self._wake = wake
        self._looked = 0  # when it was read last
        self._model: Model | None = None
        self._engine: Engine | None = None
        self._lock = threading.RLock()
        self._new: deque[Watched] = deque()
        self._live: list[Watched] = []
        self._ended: deque[Watched] = deque(maxlen=_REQUESTS)
        self._ids: set[int] = set()  # of these
        self._run: deque[Request] = deque(maxlen=_RUN)
        self._count = 0
        self._window = Window(WINDOW)
        self._moments: list[float] = []  # of the tokens of late
        self._listens = True
        self._step_seen = self._stood_until = self.epoch
        self._peeked = Update()
        self._facts: dict[str, Any] = {}

    def attach(self, model: Model | None) -> None:
        """Hear of this model's requests, and of no more of another's.

        Those of either that run at this moment are followed to their end.

        Raises:
            ModelUnloadedError: It was unloaded.
        """
        with self._lock:
            engine = None if model is None else model._engine
            self._peeked.add(self._read_new())  # the last steps of the former one
            self._leave()
            self._model, self._engine = model, engine
            self._begin_requests()
            if not self._count:
                self._facts = self.facts()  # no change of anything that is shown
            self._window.clear()
            self._hear()

    def listen(self, wanted: bool) -> None:
        """Hear of requests, or for a while of none: those that come meanwhile are not shown."""
        with self._lock:
            if wanted != self._listens:
                self._listens = wanted
                self._hear() if wanted else self._leave()

    @property
    def model(self) -> Model | None:
        """The model that is attached."""
        return self._model

    # -- reading --------------------------------------------------------------------------------

    def poll(self) -> Update:
        """Read what is new since the last poll or snapshot."""
        with self._lock:
            update, self._peeked = self._peeked, Update()
            update.add(self._read_new())
            return update

    def snapshot(self) -> Update:
        """All that is kept, for a view that knows nothing yet; the next poll goes on from here."""
        with self._lock:
            self._read_new()
            self._peeked = Update()
            return self._whole()

    def peek(self) -> Update:
        """All that is kept, for others than who polls, from whom it takes nothing."""
        with self._lock:
            self._peeked.add(self._read_new())
            return self._whole()

    @property
    def count(self) -> int:
        """How many requests it has heard of."""
        with self._lock:
            self._begin_requests()
            return self._count

    @property
    def live(self) -> list[Request]:
        """The requests that have not ended."""
        with self._lock:
            self._begin_requests()
            return [w.request for w in self._live if not w.request.done]

    @property
    def run(self) -> list[Request]:
        """The requests of the present run, or of the last one where none is live.

        A run begins when a request comes to an idle model, and ends when all have ended.
        """
        with self._lock:
            self._begin_requests()
            return list(self._run)

    def find(self, number: int) -> Request | None:
        """The request that the view calls by this number, if it is still known."""
        with self._lock:
            self._begin_requests()
            known = (w.request for w in (*self._live, *self._ended) if w.number == number)
            return next(known, None)

    def generations(self) -> list[Generation]:
        """The results of the requests of the present or last run that have ended, in order."""
        return [request.result() for request in self.run if request.done]

    def facts(self) -> dict[str, Any]:
        """What the model runs as; empty where there is none, or it was unloaded."""
        model = self._model
        if model is None:
            return {}
        try:
            return {
                "model": model.name,
                "quantization": str(model.plan.format),
                "batching": model.batching,
                "max_batch": model.max_batch,
                "context": model.context,
                # While it is being compiled, what runs is the same as before.
                "step": f"{'compiled' if model.compilation else 'eager'} step",
                "speculative": f"speculation {model.speculative}",
            }
        except InferkitError:
            return {}

    def now(self) -> dict[str, Any]:
        """The present, in numbers: ms, tokens per second, bytes; None where there is nothing yet.

        The rate is that of the last `RATE_WINDOW` seconds, or since the run began; p50 and p99 are
        those of the gaps of the last `WINDOW` seconds.
        """
        with self._lock:
            now = self._since(time.perf_counter_ns())
            levels = self.tables["levels"].rows
            recent = self._window and levels[-1, 0] >= now - WINDOW
            p50, p99 = map(float, levels[-1, 1:]) if recent else (None, None)
            engine = self._engine
            return {
                "time": now,
                "rate": self._rate(now),
                "p50": p50,
                "p99": p99,
                "running": engine.running if engine else 0,
                "waiting": engine.waiting if engine else 0,
                "capacity": engine.kv_capacity if engine else 0,
            }

    # -- within ---------------------------------------------------------------------------------

    def _hear(self) -> None:
        if self._engine is not None and self._listens:
            self._engine.on_submit.append(self._submitted)
            self._submitted(self._engine.requests)

    def _leave(self) -> None:
        if self._engine is not None and self._submitted in self._engine.on_submit:
            self._engine.on_submit.remove(self._submitted)

    def _read_new(self) -> Update:
        update = Update()
        # What comes meanwhile waits for the next time, or requests that are read later in this
        # loop would be ahead of the others, and rows out of order.
        until = time.perf_counter_ns()
        begun = self._begin_requests()
        came = min([until, *(request.arrival for request in begun)])
        self._mark_changes(
            max(came, self._looked), update
        )  # some came to a model before it was ours
        self._looked = until
        rows: dict[str, list[tuple[float, ...]]] = {"tokens": [], "firsts": []}
        for watched in list(self._live):
            self._read(watched, until, rows, update)
        steps = [self._step_row(s) for s in self._new_steps()] or self._standstill(until)
        levels = self._levels(rows["tokens"])
        for name, new in (*rows.items(), ("steps", steps), ("levels", levels)):
            if new:
                self._add(name, sorted(new), update)
        return update

    def _whole(self) -> Update:
        return Update(
            tables={name: table.rows.copy() for name, table in self.tables.items()},
            reset=list(self.tables),
            marks=list(self.marks),
            requests=[watched.whole() for watched in (*self._ended, *self._live)],
        )

    def _submitted(self, requests: Sequence[Request]) -> None:
        """Called by whoever submits, so it only takes note."""
        origin = getattr(_submitting, "origin", "cell")
        self._new.extend(Watched(request, 0, origin) for request in requests)
        self._wake.set()

    def _begin_requests(self) -> list[Request]:
        begun = []
        while self._new:
            watched = self._new.popleft()
            request = watched.request
            if request.id in self._ids:
                continue  # it was submitted while a model was attached
            self._ids.add(request.id)
            if all(_ended_by(r, request.arrival) for r in reversed(self._run)):
                self._run.clear()
            self._count += 1
            watched.number = self._count
            self._live.append(watched)
            self._run.append(request)
            begun.append(request)
        return begun

    def _read(
        self,
        watched: Watched,
        until: int,
        rows: dict[str, list[tuple[float, ...]]],
        update: Update,
    ) -> None:
        seen = watched.tokens
        gaps, told = watched.read(until)
        for index, (moment, gap) in enumerate(gaps, start=seen):
            time = self._since(moment)
            self._moments.append(time)
            if not index or gap:  # the tokens of one pass come together, with one gap before them
                rows["tokens" if index else "firsts"].append((time, gap, watched.number))
        if told is not None:
            update.requests.append(told)
        if watched.over:
            self._live.remove(watched)
            if len(self._ended) == _REQUESTS:
                self._ids.discard(self._ended[0].request.id)
            self._ended.append(watched)

    def _new_steps(self) -> list[StepRecord]:
        steps = self._engine.steps_since(self._step_seen) if self._engine else []
        if steps:
            self._step_seen = steps[-1].ended
        return steps

    def _step_row(self, step: StepRecord) -> tuple[float, ...]:
        return (
            self._since(step.began),
            (step.ended - step.began) * 1e-6,
            step.prefill_tokens,
            step.decode_tokens,
            step.running,
            step.waiting,
            step.kv_bytes,
        )

    def _standstill(self, until: int) -> list[tuple[float, ...]]:
        """A row without tokens for the time in which requests wait and none runs.

        They wait so for a change of mode, which is why their tokens are late.
        """
        engine = self._engine
        if engine is None or engine.running or not engine.waiting:
            return []
        oldest = min((request.arrival for request in engine.requests), default=until)
        since = max(oldest, self._step_seen, self._stood_until)
        if until - since < _STANDSTILL:
            return []
        self._stood_until = until
        return [(self._since(since), (until - since) * 1e-6, 0, 0, 0, engine.waiting, 0)]

    def _levels(self, new: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        """A row of rolling quantiles at the newest gap, where there is one."""
        if not new:
            return []
        rows = np.array(sorted(new))
        return [(float(rows[-1, 0]), *self._window.quantiles(rows[:, :2]))]

    def _add(self, name: str, rows: list[tuple[float, ...]], update: Update) -> None:
        table, new = self.tables[name], np.array(rows)
        if table.extend(new):
            update.reset.append(name)
            new = table.rows.copy()
        update.tables[name] = new

    def _mark_changes(self, latest: int, update: Update) -> None:
        """Mark a change at the latest moment at which it can have been.

        What is submitted wakes who polls: a change first seen with a request came before that.
        """
        facts, former = self.facts(), self._facts
        self._facts = facts
        if facts == former:
            return
        if not facts:
            label = "unloaded"
        elif facts["model"] != former.get("model"):
            label = f"{facts['model']}, {facts['quantization']}"
        else:
            changed = ((k, v) for k, v in facts.items() if v != former[k])
            label = ", ".join(_label(name, value) for name, value in changed)
        self._window.clear()
        mark = (self._since(latest), label)
        self.marks.append(mark)
        update.marks.append(mark)

    def _rate(self, now: float) -> float:
        """Tokens per second of late."""
        begun = self._since(self._run[0].arrival) if self._run else now
        since = max(now - RATE_WINDOW, begun)
        self._moments = [moment for moment in self._moments if moment >= now - RATE_WINDOW]
        tokens = sum(moment >= since for moment in self._moments)
        return tokens / (now - since) if now > since else 0.0

    def _since(self, moment: int) -> float:
        return (moment - self.epoch) * NS


_submitting = threading.local()


@contextmanager
def origin(name: str) -> Iterator[None]:
    """What this thread submits meanwhile comes from here, and not from a cell."""
    _submitting.origin = name
    try:
        yield
    finally:
        del _submitting.origin


def _ended_by(request: Request, moment: int) -> bool:
    return request.done and request.result().latency.trace.end <= moment


def _label(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {value}" if isinstance(value, int) else str(value)
