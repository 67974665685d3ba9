"""Progress: drawn as bars, told to a callable as numbers, or neither.

A callable is told what happens, the steps that are done and how many there are, by the thread that
does the work and never by two at once. What it raises stops the work, as an interrupt would:
``KeyboardInterrupt`` from it is the way to cancel a load that another thread does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from tqdm.std import tqdm

from inferkit.bars import CellBar, drawn, in_notebook
from inferkit.exclusive import alone
from inferkit.html import counted

__all__ = [
    "Progress",
    "bar",
    "downloads",
    "library_bars",
    "quiet_bars",
    "stopped",
    "tell_of_waiting",
]

Progress = bool | Callable[[str, int, int | None], None]
"""True draws bars, False is silent; a callable is told (what, done, total or None)."""

_INTERVAL = 0.08  # seconds between two steps that are told
_NOTE = "The callable that was given as progress= raised this."
_DOWNLOADING = "huggingface_hub.snapshot_download"  # its name for the bytes that were written


def bar(
    progress: Progress,
    what: str,
    total: int | None = None,
    steps: Iterable[Any] | None = None,
    **look: Any,
) -> tqdm[Any]:
    """A bar, to be iterated, or entered and updated.

    Args:
        progress: Who is shown it.
        what: What happens, for a person.
        total: Steps; None for the length of ``steps``, or where nobody knows yet.
        steps: What to iterate over.
        look: What else tqdm takes, for the bars that are drawn.
    """
    if callable(progress):
        return _Told(steps, desc=what, total=total, teller=_Teller(progress))
    return drawn()(steps, desc=what, total=total, disable=not progress, **look)


def tell_of_waiting(progress: Progress, requests: int) -> None:
    """Tell a callable that work waits for that many requests."""
    if callable(progress) and requests:
        bar(progress, f"Waiting for {counted(requests, 'request')}")


def stopped(error: BaseException) -> bool:
    """Whether a callable that was told of progress raised it, so that nothing went wrong."""
    return _NOTE in getattr(error, "__notes__", ())


@contextmanager
def downloads(progress: Progress) -> Iterator[type[tqdm[Any]] | None]:
    """The ``tqdm_class`` of one ``snapshot_download``; None for the hub's own.

    Of its bars a callable is told the bytes that were written. How many there are is known when
    all files have begun, and grows until then.
    """
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
    from huggingface_hub.utils import tqdm as hub_bar  # type: ignore[attr-defined]

    if progress is True:
        yield CellBar if in_notebook() and not are_progress_bars_disabled() else None
        return
    teller = _Teller(progress, _abort_xet) if callable(progress) else None
    written: list[_Told] = []

    class Download(_Told, hub_bar):  # the hub's own class is given the names of the bars
        def __init__(self, *args: Any, name: str | None = None, **options: Any) -> None:
            listens = name == _DOWNLOADING
            super().__init__(
                *args,
                **{**options, "desc": "Downloading", "teller": teller if listens else None},
            )
            if listens:
                written.append(self)

        def update(self, n: float | None = 1) -> None:
            try:
                super().update(n)
            except BaseException:
                # A thread of xet's, which is none of Python's, would print it and go on: what it
                # works at is aborted, and fails in the thread that waits for it.
                if not isinstance(threading.current_thread(), threading._DummyThread):
                    raise

        def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
            """Nothing: the hub's words are for its own bars."""

    try:
        yield Download
    except BaseException:
        # What was aborted fails with an error of its own.
        if teller is not None:
            teller.check()
        raise
    for each in written:
        each.close()


def quiet_bars() -> type[tqdm[Any]]:
    """A ``tqdm_class`` for what is too small to be told of."""
    return _Told


@contextmanager
def library_bars(progress: Progress) -> Iterator[None]:
    """Within, transformers' own bars go to ``progress``, and other packages' only where it is True.

    Both are a switch of the process: one thread at a time is let in, so that none puts back what
    another has set. A user's own hook for transformers' bars stays in force where they are drawn.
    """
    from transformers.utils import logging

    def told(_: Any, args: Any, options: dict[str, Any]) -> tqdm[Any]:
        teller = _Teller(progress) if callable(progress) else None
        return _Told(*args, **options, teller=teller)

    with alone():
        former = logging.set_tqdm_hook(None)
        logging.set_tqdm_hook((former or _draw) if progress is True else told)
        try:
            with nullcontext() if progress is True else _nothing_drawn():
                yield
        finally:
            logging.set_tqdm_hook(former)


def _draw(factory: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
    """A bar in the place of transformers' own, unless that is one that nobody sees."""
    seen = isinstance(factory, type) and issubclass(factory, tqdm)
    return (drawn() if seen else factory)(*args, **options)


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """All bars of the process are silent."""
    plain = tqdm.__init__

    def disabled(self: Any, *args: Any, **options: Any) -> None:
        plain(self, *args, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = plain


class _Teller:
    """Tells a callable of a bar, or of one among several; what it raised once, it raises again.

    Args:
        tell: The callable.
        stop: Called where it is raised.
    """

    def __init__(
        self, tell: Callable[[str, int, int | None], None], stop: Callable[[], None] | None = None
    ) -> None:
        self._tell = tell
        self._stop = stop
        self._lock = threading.RLock()  # files of one download come in several threads
        self._raised: BaseException | None = None
        self._next = 0.0

    def check(self) -> None:
        """Raise what the callable raised."""
        if self._raised is not None:
            if self._stop is not None:
                self._stop()
            raise self._raised

    def say(self, count: _Told, add: int = 0, always: bool = False) -> None:
        """Count some steps; tell of them if it is time to, or ``always``."""
        with self._lock:
            self.check()
            count.n += add
            if not always and time.monotonic() < self._next:
                return
            try:
                self._tell(count.what, int(count.n), int(count.total) if count.total else None)
            except BaseException as error:
                if not stopped(error):
                    error.add_note(_NOTE)
                self._raised = error
                self.check()
            # From its end on: a slow callable must not take all the time.
            self._next = time.monotonic() + _INTERVAL


class _Told(tqdm):
    """A bar that nobody sees; its teller, if it has one, is told the numbers.

    To tqdm it is disabled: no thread of tqdm's looks after it, and nothing is written.
    """

    def __init__(self, *args: Any, teller: _Teller | None = None, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})
        self.what = str(options.get("desc") or (args[1] if len(args) > 1 else "")).rstrip(". ")
        self._teller = teller
        self._closed = False
        self._say(always=True)

    def _say(self, add: int = 0, always: bool = False) -> None:
        if self._teller is not None:
            self._teller.say(self, add, always)

    def __iter__(self) -> Iterator[Any]:
        for step in self.iterable:
            yield step
            self._say(1)
        self.close()

    def update(self, n: float | None = 1) -> None:
        self._say(int(n or 0))

    def reset(self, total: float | None = None) -> None:
        super().reset(total)
        self._say(always=True)

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description(desc, refresh)
        self.what = desc or self.what
        self._say(always=True)

    def close(self) -> None:
        if not getattr(self, "_closed", True):
            self._closed = True
            self._say(always=True)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:  # what was stopped has not come to its end
            self.close()

    def __del__(self) -> None:
        """Nothing: the garbage collector must not tell of an end."""


def _abort_xet() -> None:
    """Stop downloads from xet storage, as huggingface_hub does itself at an interrupt.

    They run in threads of their own, which drop what the callable raised and go on.
    """
    with suppress(ImportError):  # an older huggingface_hub
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()
