"""Holding an engine still, so that a test says when a step happens instead of sleeping."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import inferkit as ik

PATIENCE = 60.0  # seconds; a test that waits longer has found a hang


class Held:
    """Stands before each forward pass of a model until it is let through."""

    def __init__(self) -> None:
        self.passes = 0
        self._arrived = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._open = False

    def before_pass(self) -> None:
        """Called in the engine's thread."""
        self.passes += 1
        if not self._open:
            self._arrived.release()
            assert self._go.acquire(timeout=PATIENCE), "nobody lets the engine go on"

    def wait(self) -> None:
        """Until the engine stands before a pass."""
        assert self._arrived.acquire(timeout=PATIENCE), "the engine came to no pass"

    def step(self, count: int = 1) -> None:
        """Let so many passes through, and wait until it stands before the next one."""
        for _ in range(count):
            self._go.release()
            self.wait()

    def release(self) -> None:
        """Let it run from here on."""
        self._open = True
        self._go.release()


@contextmanager
def before_passes(model: ik.Model, work: Callable[[], None]) -> Iterator[None]:
    """Run ``work`` in the engine's thread before each forward pass of ``model``."""
    runner = model._engine.runner

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(runner, name)

        def run(*args: Any) -> Any:
            work()
            return real(*args)

        return run

    names = ("prefill", "decode")
    for name in names:
        setattr(runner, name, wrapped(name))
    try:
        yield
    finally:
        for name in names:
            delattr(runner, name)


@contextmanager
def held(model: ik.Model) -> Iterator[Held]:
    """The engine of ``model`` stands before each pass; see `Held`."""
    hold = Held()
    with before_passes(model, hold.before_pass):
        try:
            yield hold
        finally:
            hold.release()


@contextmanager
def interrupt_after(model: ik.Model, passes: int) -> Iterator[None]:
    """Ctrl-C reaches the main thread once the engine has made so many passes."""
    left = [passes]

    def work() -> None:
        left[0] -= 1
        if left[0] == -1:
            interrupt()
        if left[0] < 0:
            time.sleep(0.05)  # the wait notices within its tick; the tokens must not run out

    with before_passes(model, work):
        yield


def interrupt() -> None:
    """What the kernel's stop button and Ctrl-C do."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll; for states that nothing announces."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)
