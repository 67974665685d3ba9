"""A thread that hands work to an engine keeps no OpenMP team; two teams would slow every step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from held import wait_until

import inferkit as ik
from inferkit.engine.openmp import _pause, release_team

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or _pause().__name__ != "omp_pause_resource_all",
    reason="torch does not compute with GNU's OpenMP here",
)

_THREADS = 3


def threads() -> int:
    """How many threads this process has, OpenMP's and Python's."""
    return len(list(Path("/proc/self/task").iterdir()))


def at_rest() -> int:
    """How many threads there are once none has ended for half a second: earlier tests had some."""
    since, count = time.monotonic(), threads()
    while time.monotonic() < since + 0.5:
        time.sleep(0.01)
        if count != (now := threads()):
            since, count = time.monotonic(), now
    return count


def compute() -> None:
    """Something that torch shares out over its threads."""
    torch.ones(1 << 20).exp()


@pytest.fixture(autouse=True)
def a_team_of_three() -> Iterator[None]:
    before = torch.get_num_threads()
    release_team()
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(before)
    release_team()


def settled(count: int) -> bool:
    """Whether the process comes to have so many threads; one that has ended may be seen yet."""
    deadline = time.monotonic() + 5
    while threads() != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads() == count


def alone_again(model: ik.Model, count: int) -> bool:
    """Whether nobody has a team, some time after a generation."""
    model.generate("Once", max_tokens=2)
    return settled(count)


def test_the_team_ends_and_comes_back() -> None:
    alone = at_rest()
    compute()
    assert settled(alone + _THREADS - 1)
    release_team()
    assert settled(alone)
    compute()
    assert settled(alone + _THREADS - 1)
    assert torch.get_num_threads() == _THREADS


def test_who_submits_gives_the_team_back_and_so_does_an_idle_engine(
    tiny_model: Callable[[str], Path],
) -> None:
    with ik.load(tiny_model("llama"), dtype="float32", context=64, max_batch=2) as model:
        release_team()
        model.generate("Once", max_tokens=2)  # what torch starts once and keeps is there
        wait_until(lambda: not model.running)
        alone = at_rest()
        compute()
        assert settled(alone + _THREADS - 1)
        assert alone_again(model, alone)
