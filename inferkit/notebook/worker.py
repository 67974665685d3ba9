"""A thread that does one job after another, for what must not hold up a kernel or a click."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from itertools import count

Job = Callable[[], None]

_PATIENCE = 10.0  # seconds without a job after which the thread ends


class Worker:
    """One daemon thread, there while there are jobs and for a while afterwards.

    Args:
        name: Of the thread.
        failed: Called, in the thread, with what a job raised; the thread goes on.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self._name = name
        self._failed = failed
        self._jobs: dict[object, Job] = {}  # in the order of coming
        self._keys = count()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def do(self, job: Job, key: str | None = None) -> None:
        """Queue a job and return at once.

        Args:
            job: What to do.
            key: One that waits under the same key is not done any more: only the newest matters.
        """
        with self._news:
            if self._closed:
                return
            if key is not None:
                self._jobs.pop(key, None)
            self._jobs[next(self._keys) if key is None else key] = job
            if self._thread is None:
                # Outputs of a thread go to the cell whose context it runs in.
                run = contextvars.copy_context().run
                self._thread = threading.Thread(
                    target=run, args=(self._loop,), name=self._name, daemon=True
                )
                self._thread.start()
            self._news.notify()

    def close(self) -> None:
        """Do nothing more; a job that has begun goes on."""
        with self._news:
            self._closed = True
            self._jobs.clear()
            self._news.notify()

    def _loop(self) -> None:
        while job := self._next():
            try:
                job()
            except BaseException as error:
                self._failed(error)

    def _next(self) -> Job | None:
        with self._news:
            self._news.wait_for(lambda: self._jobs or self._closed, _PATIENCE)
            if not self._jobs:
                self._thread = None
                return None
            return self._jobs.pop(next(iter(self._jobs)))
