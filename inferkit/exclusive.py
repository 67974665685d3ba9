"""One thread at a time: locks whose wait can be interrupted, and one for the whole process.

That one is for switches that libraries flip while they work. transformers makes a model's dtype
torch's default while it builds the model, and puts back what it found: two threads that do so at
once can leave the one's dtype behind for the whole process, and every tensor that a notebook makes
afterwards would be of it. The bars that it draws are such a switch too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["alone", "holding"]

_lock = threading.RLock()


@contextmanager
def holding(lock: threading.RLock) -> Iterator[None]:
    """Hold a lock; the wait for it can be interrupted, as that of a plain ``with`` cannot."""
    while not lock.acquire(timeout=0.25):
        pass  # Windows delivers an interrupt only between waits
    try:
        yield
    finally:
        lock.release()


def alone() -> AbstractContextManager[None]:
    """Within, no other thread of inferkit's is."""
    return holding(_lock)


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
