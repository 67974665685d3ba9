"""What this kernel does, kept in its file: what the sidebar of JupyterLab shows of it.

It costs the engine nothing: whoever submits a request leaves a note, and a thread reads, once a
second while requests run, lists that only grow. Without requests it only looks for changes.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from inferkit.devices import device_uuid, find_device, held_memory
from inferkit.errors import DeviceError, InferkitError
from inferkit.footprint import modes_on
from inferkit.lab import folder
from inferkit.lab.schema import VERSION, History, KernelState, ModelState, OnDevice, Work

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.generation import Settings
    from inferkit.model import Model

__all__ = ["ACTIONS", "Status", "follow", "here", "kernel_id", "recorded"]

ACTIONS = ("batching", "cancel", "code", "load", "panel", "quantize", "share", "stop", "unload")
"""Names of what `inferkit.notebook.actions` can do."""

_log = logging.getLogger("inferkit")
_BUSY, _IDLE = 1.0, 3.0  # seconds between two looks
_STEP, _STEPS = 1.0, 60  # of the history
_RATE = 2.0  # seconds that tokens per second are counted over...
_FEW = 5  # ...or where these have fewer passes, the last so many
_LATE = 10.0  # seconds up to the latest token, whose gaps the quantiles are of


@dataclass(slots=True)
class _Bucket:
    tokens: int = 0  # more than gaps and firsts, where passes give several
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


class _Meter:
    """Reads the requests of one model.

    Args:
        model: The model.
        wake: Set when a request comes.
    """

    def __init__(self, model: Model, wake: threading.Event) -> None:
        self.model = model
        self._wake = wake
        self._new: deque[Request] = deque()
        self._live: dict[int, tuple[Request, int]] = {}  # and how many of its tokens were read
        self._buckets: dict[int, _Bucket] = {}
        self._mode: Settings | None = None  # that gaps and TTFT are of
        self._gaps: deque[tuple[int, float]] = deque()
        self._ttft: float | None = None
        self._passes: Counter[int] = Counter()  # tokens of the passes of late, by their moments
        self._epoch = time.time_ns() - time.perf_counter_ns()
        engine = model._engine
        engine.on_submit.append(self._submitted)
        self._submitted(engine.requests)

    @property
    def busy(self) -> bool:
        """Whether numbers change by themselves."""
        return bool(self._new or self._live or self._passes)

    def _submitted(self, requests: Sequence[Request]) -> None:
        """Called by whoever submits, so it only takes note."""
        self._new.extend(requests)
        self._wake.set()

    def read(self) -> None:
        """Take in the tokens that came since the last time."""
        while self._new:
            request = self._new.popleft()
            self._live.setdefault(request.id, (request, 0))
        mode = self.model._engine.settings()
        if mode != self._mode:
            self._gaps.clear()
            self._mode, self._ttft = mode, None
        for key, (request, seen) in list(self._live.items()):
            over = request.done  # before its tokens, so that none comes afterwards
            times = request.times_since(max(0, seen - 1))
            counts = request.settings == mode
            if seen == 0 and times:
                ttft = (times[0] - request.arrival) * 1e-6
                self._ttft = ttft if counts else self._ttft
                self._bucket(times[0]).firsts.append(ttft)
                self._count(times[0])
            for early, late in pairwise(times):
                self._count(late)
                if late > early:  # the tokens of one pass come together, with one gap before them
                    gap = (late - early) * 1e-6
                    if counts:
                        self._gaps.append((late, gap))
                    self._bucket(late).gaps.append(gap)
            if over:
                del self._live[key]
            else:
                self._live[key] = (request, seen + len(times) - (seen > 0))
        self._forget_old(time.perf_counter_ns())

    def _forget_old(self, now: int) -> None:
        moments = sorted(self._passes)
        if moments and not self._live and now - moments[-1] > _RATE * 1e9:
            self._passes.clear()
        # Up to the latest one, not to now: in a stall what is counted stays the same.
        for moment in moments[:-_FEW]:
            if moment < moments[-1] - _RATE * 1e9:
                del self._passes[moment]
        latest = max((moment for moment, _ in self._gaps), default=0)
        while self._gaps and self._gaps[0][0] < latest - _LATE * 1e9:
            self._gaps.popleft()

    def state(self) -> ModelState:
        """What there is to say of the model.

        Raises:
            ModelUnloadedError: It was unloaded.
        """
        model = self.model
        engine, form = model._engine, model.plan.format
        running, waiting = engine.running, engine.waiting
        own, busy = model.quantization, running or waiting
        same = self._mode == engine.settings()
        gaps = [gap for _, gap in self._gaps] if same else []
        p50, p99 = np.percentile(gaps, (50, 99)).tolist() if gaps else (None, None)
        return ModelState(
            name=model.name,
            ref=str(model.ref),
            state="stopped" if engine.closed else "running" if busy else "ready",
            devices=list(model.devices),
            dtype=model.dtype,
            quantization=own,
            modes=[own] if form.stored else list(modes_on(model.devices)),
            batching=model.batching,
            max_batch=model.max_batch,
            context=model.context,
            fallback=model.fallback,
            step=str(model.compilation),
            memory={d.name: d.weights + d.kv_cache for d in model.plan.devices},
            running=running,
            waiting=waiting,
            rate=self._rate(time.perf_counter_ns()),
            itl=_rounded(p50),
            itl_p99=_rounded(p99),
            ttft=_rounded(self._ttft) if same else None,
            history=self._history(),
        )

    def _rate(self, now: int) -> float:
        if not self._passes:
            return 0.0
        first, *others = sorted(self._passes)
        if not others:
            return self._passes[first] / max(_RATE, (now - first) * 1e-9)
        tokens = sum(self._passes[moment] for moment in others)
        # The pass that goes on takes as long as it does by now, at least, and is like the others.
        return tokens / max(others[-1] - first, len(others) * (now - others[-1])) * 1e9

    def _history(self) -> History | None:
        last = int((time.perf_counter_ns() + self._epoch) * 1e-9 / _STEP)
        for number in [n for n in self._buckets if n <= last - _STEPS]:
            del self._buckets[number]
        if not self._buckets:
            return None
        last = max(self._buckets)
        buckets = [self._buckets.get(n, _Bucket()) for n in range(min(self._buckets), last + 1)]
        return History(
            end=(last + 1) * _STEP,
            seconds=_STEP,
            itl=[_median(bucket.gaps) for bucket in buckets],
            ttft=[_median(bucket.firsts) for bucket in buckets],
            tokens=[bucket.tokens for bucket in buckets],
        )

    def _count(self, moment: int) -> None:
        """A token came."""
        self._passes[moment] += 1
        self._bucket(moment).tokens += 1

    def _bucket(self, moment: int) -> _Bucket:
        number = int((moment + self._epoch) * 1e-9 / _STEP)
        return self._buckets.setdefault(number, _Bucket())


class Status:
    """Keeps the file of this kernel. Its methods may be called from any thread.

    Args:
        kernel_id: Jupyter's id of the kernel.
    """

    def __init__(self, kernel_id: str) -> None:
        from inferkit import __version__

        self._id = kernel_id
        self._pid = os.getpid()
        self._version = __version__
        self._started = folder.started(self._pid) or 0.0
        self._meters: list[_Meter] = []
        self._work: list[Work] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._written: KernelState | None = None
        self._failed = False
        self._thread: threading.Thread | None = None

    def follow(self, model: Model) -> None:
        """Show a model too."""
        with self._lock:
            try:
                self._meters.append(_Meter(model, self._wake))
            except InferkitError:  # it was unloaded in this moment
                return
        self.start()

    def start(self) -> None:
        """Begin to write, if that has not begun."""
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(
                    target=self._loop, name="inferkit-status", daemon=True
                )
                self._thread.start()
        self.look()

    def look(self) -> None:
        """Look for what has changed, now."""
        self._wake.set()

    @contextmanager
    def working(
        self, what: str, number: int = 0
    ) -> Iterator[Callable[[str, int, int | None], None]]:
        """Show meanwhile that something is being done; gives what may be told of its progress.

        Args:
            what: In words.
            number: By which it can be cancelled; 0 where it cannot.
        """
        mine = [Work(what=what, id=number)]
        self._replace(None, mine[0])

        def tell(step: str, done: int, total: int | None) -> None:
            told = Work(what=f"{what}: {step}" if step else what, done=done, total=total, id=number)
            self._replace(mine[0], told)
            mine[0] = told

        try:
            yield tell
        finally:
            self._replace(mine[0], None)

    def _replace(self, former: Work | None, new: Work | None) -> None:
        with self._lock:
            kept = [work for work in self._work if work is not former]
            self._work = kept if new is None else [*kept, new]
        self.look()

    def stop(self) -> None:
        """Write no more, and remove the file. Safe to call twice; nothing in a fork."""
        self._ended.set()
        self._wake.set()
        if os.getpid() != self._pid:
            return
        if self._thread is not None:
            self._thread.join(timeout=5)
        with self._writing:
            folder.remove(self._id, self._pid)

    def write(self) -> None:
        """Write the file now, if there is something new: whoever reads next must see it.

        Otherwise the thread does, once a second while something goes on.
        """
        with self._writing:
            if self._thread is not None and not self._ended.is_set():
                self._write()

    # -- the thread -----------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._ended.is_set():
            self._wake.clear()
            self.write()
            busy = self._work or any(meter.busy for meter in self._meters)
            if busy:
                self._ended.wait(_BUSY)
            else:
                self._wake.wait(_IDLE)

    def _write(self) -> None:
        """Write the file, if there is something new, or the last one is old or was removed.

        Nothing that goes wrong here ends the thread, or takes the place of an action's answer.
        """
        try:
            self._write_news()
            self._failed = False
        except Exception as error:
            if not self._failed:  # once, and not every second
                _log.warning("The sidebar will not show this kernel: %s", error)
                _log.debug("", exc_info=True)
            self._failed = True

    def _write_news(self) -> None:
        state = self._read()
        former = self._written
        if (
            former is not None
            and former == msgspec.structs.replace(state, written=former.written)
            and state.written - former.written < folder.REFRESH
            and folder.exists(self._id)
        ):
            return
        folder.write(state)
        self._written = state

    def _read(self) -> KernelState:
        models: list[ModelState] = []
        for meter in list(self._meters):
            try:
                meter.read()
                models.append(meter.state())
            except InferkitError:  # it was unloaded
                with self._lock:
                    self._meters.remove(meter)
        names = dict.fromkeys(name for model in models for name in model.memory)
        return KernelState(
            version=VERSION,
            inferkit=self._version,
            kernel_id=self._id,
            pid=self._pid,
            started=self._started,
            host=folder.host(),
            written=time.time(),
            notebook=os.environ.get("JPY_SESSION_NAME", ""),
            models=models,
            devices=[d for name in names if (d := _on_device(name)) is not None],
            work=list(self._work),
            actions=list(ACTIONS),
            experiment=_recorded,
            recording=_recording,
        )


_status: Status | None = None
_recorded: str | None = None
_recording = False
_making = threading.Lock()


def here() -> Status | None:
    """The status of this kernel; None where this is no kernel's process."""
    global _status
    with _making:
        if _status is None or _status._pid != os.getpid():
            found = kernel_id()
            if found is None:
                return None
            _status = Status(found)
            atexit.register(_status.stop)
        return _status


def follow(model: Model) -> None:
    """Show a model in the file of this kernel, if it is one."""
    status = here()
    if status is not None:
        status.follow(model)


def recorded(name: str, running: bool) -> None:
    """Show that an experiment of this name is there to be shared, or is still being recorded."""
    global _recorded, _recording
    _recorded, _recording = name, running
    if _status is not None:
        _status.look()


def kernel_id() -> str | None:
    """Jupyter's id of the kernel that this process is; None if it is none."""
    app = sys.modules.get("ipykernel.kernelapp")
    if app is None or not app.IPKernelApp.initialized():
        return None
    return Path(app.IPKernelApp.instance().connection_file).stem.removeprefix("kernel-") or None


def _on_device(name: str) -> OnDevice | None:
    """An accelerator that a model of this process is on; None if it is none, or does not answer."""
    if name in ("cpu", "disk"):
        return None
    try:
        device = find_device(name)
    except DeviceError:
        return None
    return OnDevice(
        name=name,
        uuid=device_uuid(name),
        description=device.description,
        total=device.total,
        free=device.free,
        own=held_memory(name),
    )


def _median(values: Sequence[float]) -> float | None:
    return _rounded(float(np.median(values))) if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
