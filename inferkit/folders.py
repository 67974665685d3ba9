"""Where inferkit keeps what it made, and whether that may be trusted."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "writable_by_others"]


def cache_dir() -> Path:
    """The folder for everything inferkit keeps: ``INFERKIT_CACHE``, or the user's cache folder."""
    if named := os.environ.get("INFERKIT_CACHE"):
        return Path(named).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("inferkit")


def writable_by_others(path: Path) -> bool:
    """Whether somebody else could have put there what is found there: code, say."""
    stat = path.stat()
    return stat.st_uid != os.geteuid() or bool(stat.st_mode & 0o022)
