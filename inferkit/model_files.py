"""The files of a model folder: which hold the weights, whether they are whole, their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferkit.errors import DamagedFileError
from inferkit.progress import Progress, bar

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = [
    "check_whole",
    "describe",
    "kinds_of_files",
    "known_sha256",
    "model_files",
    "progress_bar",
    "remembered_sha256",
    "sha256",
    "weight_files",
    "write_atomically",
]

_BLOCK = 1 << 20
_INDEXES = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
SIDE_FILES = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
"""Endings of the small files of a model: configs, tokenizer, chat template, code."""


def kinds_of_files(names: Iterable[str]) -> list[str]:
    """What files of a model are, in words: "weights", "files beside the weights", or both."""
    weights = [name.endswith((".safetensors", ".bin", ".gguf")) for name in names]
    return [
        *(["weights"] if any(weights) else []),
        *(["files beside the weights"] if not all(weights) else []),
    ]


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that transformers would read the weights from; empty if there are none.

    Safetensors come before ``.bin`` files, and a single file before shards, as in transformers.

    Raises:
        DamagedFileError: An index is unreadable, or names a shard that is missing.
    """
    for single, index in _INDEXES.items():
        if (folder / single).is_file():
            return (single,)
        if (folder / index).is_file():
            return _shards(folder, folder / index)
    return ()


def _shards(folder: Path, index: Path) -> tuple[str, ...]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{index} is no index of weight shards ({type(error).__name__}: {error}); "
            "delete it and download the model again."
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DamagedFileError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {index.name} "
            f"names: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; "
            "download the model again."
        )
    return tuple(names)


def model_files(folder: Path) -> tuple[str, ...]:
    """Names of all files of the model in ``folder``, weights included, sorted."""
    side = {p.name for p in folder.iterdir() if p.suffix in SIDE_FILES and p.is_file()}
    return tuple(sorted(side.union(weight_files(folder))))


def describe(folder: Path) -> str:
    """What a folder holds, for a message: the first names, or ``nothing``."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "nothing"


def check_whole(folder: Path, names: Iterable[str]) -> None:
    """Check the lengths of weight files against their headers; reads no weight.

    Raises:
        DamagedFileError: A file is truncated, too long, or no weight file at all.
    """
    for name in names:
        path = folder / name
        if name.endswith(".safetensors"):
            _check_safetensors(path)
        elif name.endswith(".bin"):
            _check_pickle(path)


def _check_safetensors(path: Path) -> None:
    """8 bytes header length, JSON header, data: https://github.com/huggingface/safetensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_lfs_pointer(path, start)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise _damaged(
                path,
                f"it has {size:,} bytes, and its first 8 bytes announce a header of {length:,}",
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, f"its header is broken ({type(error).__name__}: {error})") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _damaged(path, f"its header describes {expected:,} bytes, the file has {size:,}")


def _check_pickle(path: Path) -> None:
    """``torch.save`` writes a zip archive, whose directory is at its end (older: a bare pickle)."""
    with path.open("rb") as file:
        start = file.read(8)
    _refuse_lfs_pointer(path, start)
    if (start[:2] == b"PK" and not zipfile.is_zipfile(path)) or not start:
        raise _damaged(path, f"its end is missing; the file has {path.stat().st_size:,} bytes")


def _refuse_lfs_pointer(path: Path, start: bytes) -> None:
    if start == b"version ":
        raise DamagedFileError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in {path.parent}."
        )


def _damaged(path: Path, fault: str) -> DamagedFileError:
    target = path.resolve()  # in the hub cache, the blob behind the link
    return DamagedFileError(f"{path} is damaged: {fault}. Delete {target} and download it again.")


def sha256(path: Path, shown: tqdm[Any] | None = None) -> str:
    """The hex digest of a file's content; the bar ``shown`` advances by the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if shown is not None:
                shown.update(len(block))
    return digest.hexdigest()


def remembered_sha256(path: Path, memory: Path, *, progress: Progress) -> str:
    """``sha256``, read again only after the file's size or modification time changed.

    Args:
        path: The file.
        memory: A folder that keeps one small JSON file for each file asked for.
        progress: Show a bar while reading, or call this with (what, done, total).
    """
    known = known_sha256(path, memory)
    if known is not None:
        return known
    target = path.resolve()
    state = _state(target)
    with progress_bar(f"Checking {path.name}", state["size"], shown=progress) as shown:
        digest = sha256(target, shown)
    write_atomically(_note(target, memory), json.dumps({**state, "sha256": digest}))
    return digest


def known_sha256(path: Path, memory: Path) -> str | None:
    """What `remembered_sha256` gives without reading the file; None where it would read it."""
    target = path.resolve()
    state, known = _state(target), read_json(_note(target, memory))
    return str(known["sha256"]) if {key: known.get(key) for key in state} == state else None


def _state(target: Path) -> dict[str, Any]:
    """What changes where a file does."""
    stat = target.stat()
    return {"path": str(target), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _note(target: Path, memory: Path) -> Path:
    return memory / f"{hashlib.sha256(str(target).encode()).hexdigest()[:32]}.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours; empty if the file is missing or was cut off."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that another process sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def progress_bar(what: str, total: int | None, *, shown: Progress) -> Iterator[tqdm[Any]]:
    """A bar over bytes, in a notebook or a terminal; silent and free unless ``shown``."""
    with bar(shown, what, total, unit="B", unit_scale=True, unit_divisor=1024) as made:
        yield made
