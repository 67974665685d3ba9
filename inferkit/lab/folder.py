"""The folder with a file per kernel: kernels write, servers and `inferkit ps` read."""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import psutil
from jupyter_core.paths import jupyter_runtime_dir, secure_write

from inferkit.lab.schema import VERSION, Head, Kernel, KernelState

__all__ = ["REFRESH", "Found", "exists", "host", "read", "remove", "started", "write"]

REFRESH = 60.0
"""Seconds after which a kernel writes its file again although it has no news."""

_log = logging.getLogger("inferkit")
_SAME = 1.0  # seconds; psutil's clock and a file's JSON agree to far less
_ENDED = 5 * REFRESH  # seconds without a sign of life from another machine, whose clock may differ
_Kind = TypeVar("_Kind", Head, KernelState)
_damaged: set[Path] = set()  # those that a warning has named


class Found(NamedTuple):
    """What the folder tells of.

    Attributes:
        kernels: Those that run in sight of this process.
        elsewhere: Ids of those that run on another machine, or in another container.
    """

    kernels: list[Kernel]
    elsewhere: list[str]


def _folder() -> Path:
    return Path(jupyter_runtime_dir()) / "inferkit"


def _file(kernel_id: str) -> Path:
    return _folder() / f"{kernel_id}.json"


def _draft(path: Path, pid: int) -> Path:
    return path.with_suffix(f".{pid}.tmp")


@cache
def host() -> str:
    """Where process numbers mean what they mean here: a machine since it was started, a container.

    The folder may be on a disk that several of them share.
    """
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{machine} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()


def started(pid: int) -> float | None:
    """When a process began; None where there is none of this number, or it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):  # a file may say any number
        return None


def write(state: KernelState) -> None:
    """Put a kernel's file in the place of its former one, at once, readable by its owner only.

    Raises:
        OSError: It cannot be written.
    """
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink():  # whose folder that is, nobody knows
        raise NotADirectoryError(f"{folder} is a link; remove it.")
    folder.chmod(0o700)
    path = _file(state.kernel_id)
    draft = _draft(path, state.pid)
    data = _encoded(state)
    with secure_write(str(draft), binary=True) as out:
        out.write(data)
    os.replace(draft, path)


def _encoded(state: KernelState) -> bytes:
    try:
        return msgspec.json.encode(state)
    except UnicodeEncodeError:  # a path may have bytes that are no text
        said = json.dumps(msgspec.to_builtins(state), ensure_ascii=False)
        return said.encode("utf-8", "replace")


def exists(kernel_id: str) -> bool:
    """Whether a kernel's file is there."""
    return _file(kernel_id).exists()


def remove(kernel_id: str, pid: int) -> None:
    """Remove the file of a kernel that was that process."""
    path = _file(kernel_id)
    path.unlink(missing_ok=True)
    _draft(path, pid).unlink(missing_ok=True)


def read(here: frozenset[str] = frozenset()) -> Found:
    """The kernels that have a file and run; files of those that have ended here are removed.

    Args:
        here: Ids of the kernels that whoever reads can reach.
    """
    found = Found([], [])
    for path in sorted(_folder().glob("*.json")):
        try:
            _take_in(path, here, found)
        except FileNotFoundError:  # its kernel has ended in this moment
            continue
        except (OSError, _Unreadable) as error:
            if path not in _damaged:  # once, and not every second
                _damaged.add(path)
                _log.warning("%s is no kernel's file (%s).", path, error)
    return found


class _Unreadable(Exception):
    """What is written in a file, and should not be."""


def _decoded(data: bytes, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.json.decode(data, type=kind)
    # Text that is no UTF-8 is a ValueError, and what is nested deeply ends Python's stack.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _Unreadable(error) from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _take_in(path: Path, here: frozenset[str], found: Found) -> None:
    # Whatever lies there: a pipe must not keep its reader waiting.
    with open(path, "rb", opener=_without_waiting) as file:
        read = os.fstat(file.fileno())
        if not stat.S_ISREG(read.st_mode):
            raise _Unreadable("it is no plain file")
        data = file.read()
    head = _decoded(data, Head)
    if head.host != host():  # its process cannot be looked for
        if time.time() - read.st_mtime < _ENDED:
            found.elsewhere.append(head.kernel_id)
        return
    begun = started(head.pid)
    if begun is not None and abs(begun - head.started) <= _SAME:
        found.kernels.append(_kernel(head, data, head.kernel_id in here))
        return
    now = path.stat()
    if (now.st_ino, now.st_mtime_ns) == (read.st_ino, read.st_mtime_ns):
        remove(path.stem, head.pid)  # and not what a restarted kernel has just written


def _kernel(head: Head, data: bytes, here: bool) -> Kernel:
    state, problem = None, _problem(head)
    if not problem:
        try:
            state = _decoded(data, KernelState)
        except _Unreadable as error:
            problem = f"inferkit {head.inferkit} in this kernel has written what it should not: "
            problem += f"{error}. Restart the kernel, or upgrade inferkit in its environment."
    return Kernel(
        kernel_id=head.kernel_id,
        pid=head.pid,
        inferkit=head.inferkit,
        here=here,
        memory=_memory(head.pid),
        state=state,
        problem=problem,
    )


def _problem(head: Head) -> str:
    import inferkit

    if head.version == VERSION:
        return ""
    if head.version < VERSION:
        return (
            f"This kernel has inferkit {head.inferkit}; version {inferkit.__version__} or later is "
            "needed to show it. Upgrade jupyter-inferkit in its environment, and restart it."
        )
    return (
        f"This kernel has inferkit {head.inferkit}, which is newer than the server's "
        f"{inferkit.__version__}. Upgrade jupyter-inferkit where JupyterLab runs, and restart it."
    )


def _memory(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended in this moment
        return 0
