"""One team of OpenMP threads at a time, which on a CPU is worth a tenth to a third of every step.

GNU's OpenMP, which torch's Linux builds use, gives each thread that computes a team of its own, as
large as the machine. Once two threads have one (the notebook's, say, which loaded the weights, and
an engine's), it counts more threads than processors, and from then on puts its workers to sleep
between any two operations of a pass instead of letting them spin: a model has hundreds, and each
waits for them to wake. So a thread that hands work to an engine, or runs out of work, gives its
team back. The next operation that it computes itself makes a new one, in a fraction of a
millisecond.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

_SOFT = 1  # omp_pause_soft: settings are kept


def release_team() -> None:
    """Give back the calling thread's OpenMP team. Does nothing where that is not how it works."""
    _pause()(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int]:
    """GNU's ``omp_pause_resource_all``; in its place nothing, if torch computes with another."""
    if sys.platform == "linux":
        loaded = ctypes.CDLL(None)
        llvm = hasattr(loaded, "__kmpc_fork_call")  # its pause is another thing
        if not llvm and hasattr(loaded, "omp_pause_resource_all"):
            return loaded.omp_pause_resource_all
    return lambda kind: 0
