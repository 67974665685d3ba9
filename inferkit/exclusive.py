"""Switches of the whole process that libraries flip while they work: one thread at a time.

transformers makes a model's dtype torch's default while it builds the model, and puts back what it
found. Two threads that do so at once can leave the one's dtype behind for the whole process, and
every tensor that a notebook makes afterwards would be of it. The bars that it draws are such a
switch too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["alone"]

_lock = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Within, no other thread of inferkit's is; the wait for it can be interrupted."""
    lock = _lock
    while not lock.acquire(timeout=0.25):
        pass  # Windows delivers an interrupt only between waits
    try:
        yield
    finally:
        lock.release()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
