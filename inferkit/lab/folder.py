"""The folder with a file per kernel: kernels write, servers and `inferkit ps` read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
from jupyter_core.paths import jupyter_runtime_dir, secure_write

from inferkit.lab.schema import VERSION, Head, Kernel, KernelState

__all__ = ["kernels", "remove", "started", "write"]

_log = logging.getLogger("inferkit")
_SAME = 1.0  # seconds; psutil's clock and a file's JSON agree to far less


def _folder() -> Path:
    return Path(jupyter_runtime_dir()) / "inferkit"


def _file(kernel_id: str) -> Path:
    return _folder() / f"{kernel_id}.json"


def started(pid: int) -> float | None:
    """When a process began; None where there is none of this number, or it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None


def write(state: KernelState) -> None:
    """Put a kernel's file in the place of its former one, at once, readable by its owner only.

    Raises:
        OSError: It cannot be written.
    """
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    path = _file(state.kernel_id)
    draft = path.with_suffix(".tmp")
    with secure_write(str(draft), binary=True) as out:
        out.write(msgspec.json.encode(state))
    os.replace(draft, path)


def remove(kernel_id: str) -> None:
    """Remove a kernel's file."""
    for path in (_file(kernel_id), _file(kernel_id).with_suffix(".tmp")):
        path.unlink(missing_ok=True)


def kernels(here: frozenset[str] = frozenset()) -> list[Kernel]:
    """The kernels that have a file and run; files of those that have ended are removed.

    Args:
        here: Ids of the kernels that whoever reads can reach.
    """
    folder = _folder()
    if not folder.is_dir():
        return []
    return list(_read(sorted(folder.glob("*.json")), here))


def _read(paths: list[Path], here: frozenset[str]) -> Iterator[Kernel]:
    for path in paths:
        try:
            data = path.read_bytes()
            head = msgspec.json.decode(data, type=Head)
        except FileNotFoundError:  # its kernel has ended in this moment
            continue
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("%s is no kernel's file (%s).", path, error)
            continue
        begun = started(head.pid)
        if begun is None or abs(begun - head.started) > _SAME:
            remove(path.stem)
            continue
        yield _kernel(head, data, head.kernel_id in here)


def _kernel(head: Head, data: bytes, here: bool) -> Kernel:
    state, problem = None, _problem(head)
    if not problem:
        try:
            state = msgspec.json.decode(data, type=KernelState)
        except msgspec.MsgspecError as error:
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
