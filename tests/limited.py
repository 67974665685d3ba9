"""Commands under a limit on memory, as a container sets it, and what they took of it.

Where the test may make a control group (as root, mostly), the kernel holds the limit: it drops file
cache first, and then kills. Elsewhere nothing is held, and the memory is only measured.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_INTERVAL = 0.05  # seconds between two looks


@dataclass(frozen=True)
class Limited:
    """How a command ended.

    Attributes:
        status: Exit status.
        stdout: What it printed.
        stderr: What it printed there.
        peak: Most bytes that it and its children held at once, without what the kernel could drop.
        held: Whether the kernel held the limit; otherwise compare ``peak`` with it.
        killed: Whether the kernel killed something for it.
    """

    status: int
    stdout: str
    stderr: str
    peak: int
    held: bool
    killed: bool


def run_limited(
    command: Sequence[str],
    limit: int | None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Limited:
    """Run a command to its end with so many bytes of memory for it and all its children.

    Without a limit, its memory is only measured.
    """
    with _group(limit) as group, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if group is not None:  # joined by a shell, which then becomes the command
            join = 'echo $$ > "$0" && exec "$@"'
            command = ["sh", "-c", join, str(group.folder / "cgroup.procs"), *command]
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _of_tree(process.pid) if group is None else group.used())
            time.sleep(_INTERVAL)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        killed = group is not None and group.killed()
    return Limited(process.returncode, *texts, peak, group is not None, killed)


@dataclass(frozen=True)
class _Group:
    """A control group of version 1 or 2."""

    folder: Path
    version: int

    def used(self) -> int:
        """Bytes charged to it, without file cache; see `inferkit.cgroups`."""
        name, prefix = (("usage_in_bytes", "total_"), ("current", ""))[self.version - 1]
        used = int((self.folder / f"memory.{name}").read_text())
        stat = _numbers(self.folder / "memory.stat")
        return used - sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))

    def killed(self) -> bool:
        events = self.folder / ("memory.oom_control", "memory.events")[self.version - 1]
        return _numbers(events).get("oom_kill", 0) > 0


def _numbers(path: Path) -> dict[str, int]:
    return {name: int(n) for name, n in map(str.split, path.read_text().splitlines())}


@contextlib.contextmanager
def _group(limit: int | None) -> Iterator[_Group | None]:
    """A new control group with a limit; None where there can be none, or needs to be none."""
    group = None if limit is None else next(_made(limit), None)
    try:
        yield group
    finally:
        for _ in range(100):  # it goes when the last process in it has
            if group is None:
                break
            with contextlib.suppress(OSError):
                group.folder.rmdir()
                break
            time.sleep(0.1)


def _made(limit: int) -> Iterator[_Group]:
    for version, parent in _parents():
        limit_file, swap_file = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
            ("memory.max", "memory.swap.max"),
        )[version - 1]
        with contextlib.suppress(OSError), contextlib.ExitStack() as unless_used:
            folder = Path(tempfile.mkdtemp(prefix="inferkit-test-", dir=parent))
            unless_used.callback(folder.rmdir)
            # Of version 2, a group has the file where those above it hand the controller on.
            if (folder / limit_file).exists():
                (folder / limit_file).write_text(str(limit))
                with contextlib.suppress(OSError):  # not every kernel counts swap
                    (folder / swap_file).write_text("0" if version == 2 else str(limit))
                unless_used.pop_all()
                yield _Group(folder, version)
                return


def _parents() -> Iterator[tuple[int, Path]]:
    """Groups in which there may be a new one: the own one first, then those above it."""
    membership = Path("/proc/self/cgroup")
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, base = 2, _CGROUPS
        elif "memory" in controllers.split(","):
            version, base = 1, _CGROUPS / "memory"
        else:
            continue
        own = base / path.lstrip("/")
        for parent in (own, *own.parents):
            yield version, parent
            if parent == base:
                break


def _of_tree(pid: int) -> int:
    """Bytes of a process and its children that are in no file, so that no kernel drops them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return sum(map(_anonymous, [root, *root.children(recursive=True)]))
    return 0


def _anonymous(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    with contextlib.suppress(OSError, psutil.Error):
        if not status.exists():
            return int(process.memory_full_info().uss)
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return sum(1024 * int(lines.get(n, "0").split()[0]) for n in ("RssAnon", "RssShmem"))
    return 0
