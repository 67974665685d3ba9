"""The memory limits that control groups (containers) set on this process."""

from __future__ import annotations

from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes "unlimited" as a page-rounded 2^63


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, bytes left under it) of every cgroup above this process that sets a memory limit.

    Reads version 2 (``memory.max``) and version 1 (``memory.limit_in_bytes``). File cache that the
    kernel can drop counts as left, as in the working set of Kubernetes, but for both LRU lists.
    A container often sees its own group as the root although its path says otherwise, so paths
    that are missing are passed over on the way up to the root.
    """
    found: list[tuple[int, int]] = []
    if not membership.exists():
        return found
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        leaf = base / path.lstrip("/")
        for group in (leaf, *leaf.parents):
            found += _read_cgroup(group, *files)
            if group == base:
                break
    return found


def _read_cgroup(
    group: Path, limit_file: str, usage_file: str, prefix: str
) -> list[tuple[int, int]]:
    limit_path, usage_path = group / limit_file, group / usage_file
    if not (limit_path.exists() and usage_path.exists()):
        return []
    text = limit_path.read_text().strip()
    if text == "max" or int(text) >= _NO_LIMIT:
        return []
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    used = max(0, int(usage_path.read_text()) - cache)
    return [(int(text), max(0, int(text) - used))]
