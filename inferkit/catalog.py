"""A model reference -> a local folder that transformers can load.

A reference is one of these, tried in this order:

1. the word ``"demo"``: the small real model of the ``[demo]`` extra (a folder of that name is
   ``"./demo"``, or ``Path("demo")``);
2. a path that exists: a folder with config.json, weights and tokenizer, or a ``.gguf`` file;
3. a Hugging Face Hub id, ``"org/name"`` or ``"name"``.

GGUF files (and the demo, which is one) are converted once to bfloat16 safetensors, in the folder
named by the environment variable ``INFERKIT_CACHE`` or else the user's cache folder. What is in
the local hub cache is used as it is, without asking the hub: ``revision=`` names another state,
and ``hf download org/name`` brings the newest.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inferkit import conversions, gguf_convert, hub, model_files
from inferkit.errors import (
    DamagedFileError,
    ModelNotFoundError,
    OptionError,
    UnsupportedModelError,
    first_line,
)
from inferkit.html import one_line
from inferkit.progress import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["CachedModel", "Kind", "Source", "cached_models", "config", "resolve"]

Kind = Literal["hub", "folder", "gguf", "demo"]
Ref = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        ref: The reference as given.
        kind: What the reference is.
        path: Local folder with config.json, weights and tokenizer.
        files: Names of the model's files in ``path``.
        revision: Commit hash of a hub model, else None.
        gguf: The GGUF file that ``path`` was converted from, else None (also for the demo, whose
            GGUF is not kept).
    """

    ref: str
    kind: Kind
    path: Path
    files: tuple[str, ...]
    revision: str | None = None
    gguf: Path | None = None

    def sha256(self, *, progress: Progress = True) -> dict[str, str]:
        """Hex digests by file name, the original GGUF's included; read once per file and change."""
        notes = conversions.sha256_notes()
        return self._original_sha256() | {
            name: model_files.remembered_sha256(self.path / name, notes, progress=progress)
            for name in self.files
        }

    def known_sha256(self) -> dict[str, str] | None:
        """The same where no file has to be read for it, else None."""
        notes = conversions.sha256_notes()
        found = {name: model_files.known_sha256(self.path / name, notes) for name in self.files}
        known = {name: digest for name, digest in found.items() if digest is not None}
        return self._original_sha256() | known if len(known) == len(found) else None

    def _original_sha256(self) -> dict[str, str]:
        """Of the GGUF that the files were converted from; empty where there is none."""
        if self.kind not in ("gguf", "demo"):
            return {}
        source = model_files.read_json(self.path / conversions.MANIFEST)["source"]
        return {source["name"]: source["sha256"]}

    def verify(self, *, progress: Progress = True) -> tuple[str, ...]:
        """Read the files again, and compare with the digests known from where they came.

        Those are the names of the blobs in the hub cache (sha256 for large files, git's sha1 for
        small ones), and the manifest of a converted GGUF. A plain folder has none.

        Returns:
            Names of the files that were compared.

        Raises:
            DamagedFileError: A file differs.
        """
        known = {name: digest for name in self.files if (digest := self._known_digest(name))}
        total = sum((self.path / name).stat().st_size for name in known)
        with model_files.progress_bar(f"Verifying {self.ref}", total, shown=progress) as bar:
            for name, expected in known.items():
                path = self.path / name
                if len(expected) == 40:
                    found = _git_blob_sha1(path)
                    bar.update(path.stat().st_size)
                else:
                    found = model_files.sha256(path, bar)
                if found != expected:
                    raise DamagedFileError(
                        f"{path} has digest {found}, expected {expected}: its content changed. "
                        f"Delete {path.resolve()} and load {self.ref!r} again."
                    )
        return tuple(known)

    def _known_digest(self, name: str) -> str | None:
        if self.kind == "hub":
            blob = (self.path / name).resolve().name
            return blob if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob) else None
        manifest = model_files.read_json(self.path / conversions.MANIFEST)
        return manifest.get("files", {}).get(name)


def resolve(ref: Ref, revision: str | None = None, *, progress: Progress = True) -> Source:
    """Find a model's files; download or convert them if need be. Reads no weight into memory.

    Args:
        ref: ``"demo"``, a folder, a ``.gguf`` file, or a hub id.
        revision: Branch, tag or commit of a hub model.
        progress: Show bars while downloading, converting or hashing, or call this with (what,
            done, total).

    Raises:
        ModelNotFoundError: The reference leads to no model; the message says what was tried.
        DamagedFileError: A weight file is truncated or missing, or the demo's sha256 is wrong.
        UnsupportedModelError: A GGUF of an architecture that transformers cannot read.
        LoadError: The cache folder cannot be written.
        OptionError: ``ref`` or ``revision`` is of the wrong type or kind.
    """
    kind, name = _classify(ref, revision)
    if kind == "demo":
        return _source(name, kind, conversions.convert_demo(progress=progress))
    if kind == "gguf":
        path = Path(name).expanduser().absolute()
        folder = conversions.convert_file(path, progress=progress)
        return _source(name, kind, folder, gguf=path)
    if kind == "folder":
        return _source(name, kind, Path(name).expanduser().absolute())
    folder = hub.snapshot(name, revision, progress=progress)
    return _source(name, kind, folder, revision=folder.name)


def config(
    ref: Ref, revision: str | None = None, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A model's transformers config alone: no weight is downloaded, converted or read.

    Raises:
        ModelNotFoundError, DamagedFileError, OptionError: As ``resolve``.
        UnsupportedModelError: transformers does not know the model's type, or the repository
            brings code of its own and ``trust_remote_code`` is False.
    """
    kind, name = _classify(ref, revision, weights=False)
    if kind == "demo":
        folder = conversions.finished_demo()
        if folder is None:
            return gguf_convert.read_config(conversions.demo_parts()[0])
        return _read_config(folder)
    if kind == "gguf":
        return gguf_convert.read_config(Path(name).expanduser().absolute())
    if kind == "folder":
        return _read_config(Path(name).expanduser().absolute(), trust_remote_code)
    folder = hub.config_folder(name, revision)
    return _read_config(folder, trust_remote_code, repo=name)


@dataclass(frozen=True)
class CachedModel:
    """A model that can be loaded without network.

    Attributes:
        ref: What to pass to ``load``.
        kind: What ``ref`` is.
        size_bytes: Size on disk, in bytes.
        revision: Commit hash to pass along, for a hub model; None elsewhere.
    """

    ref: str
    kind: Kind
    size_bytes: int
    revision: str | None = None


def cached_models() -> list[CachedModel]:
    """Everything that loads without network: the demo, the hub cache, converted GGUF files."""
    found: list[CachedModel] = []
    if folder := conversions.finished_demo():
        found.append(CachedModel("demo", "demo", _size(folder)))
    elif conversions.demo_is_installed():
        size = sum(part.stat().st_size for part in conversions.demo_parts())
        found.append(CachedModel("demo", "demo", size))
    for repo, revision in hub.cached_models():
        found.append(
            CachedModel(repo.repo_id, "hub", revision.size_on_disk, revision=revision.commit_hash)
        )
    for folder, manifest in conversions.conversions():
        if manifest["source"]["ref"] != "demo":
            original = Path(manifest["source"]["ref"])
            if _unchanged(original, manifest["source"]):
                found.append(CachedModel(str(original), "gguf", _size(folder)))
            else:
                found.append(CachedModel(str(folder), "folder", _size(folder)))
    return found


def _classify(ref: Ref, revision: str | None, *, weights: bool = True) -> tuple[Kind, str]:
    """The kind of a reference, which is checked to lead somewhere unless it is a hub id."""
    if not isinstance(ref, (str, os.PathLike)):
        raise OptionError(
            f"a model reference is a string or a path, not {ref!r}; for example 'demo', "
            "'org/name', './folder' or 'model.gguf'."
        )
    if revision is not None and not isinstance(revision, str):
        raise OptionError(f"revision={revision!r} must be the name of a branch, tag or commit.")
    name = os.fspath(ref)
    kind: Kind
    if not name.strip() or "\0" in name:
        raise ModelNotFoundError(
            f"{name!r} names no model; pass 'demo', a hub id, a folder or a .gguf file."
        )
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for a file; ~ of nobody
        # Without the name, which an OSError says again, as long as it is.
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ModelNotFoundError(
            f"{one_line(name, 80)!r} names no model ({why}); pass 'demo', a hub id, "
            "a folder or a .gguf file."
        ) from None
    if isinstance(ref, str) and name == "demo":
        kind = "demo"
    elif is_folder:
        _check_folder(path, weights=weights)
        kind = "folder"
    elif is_file:
        _check_is_gguf(path)
        kind = "gguf"
    elif isinstance(ref, str) and hub.is_id(name) and not name.endswith(".gguf"):
        return "hub", name
    else:
        raise _no_such_path(name, path)
    if revision is not None:
        raise OptionError(
            f"revision={revision!r} is for models of the hub; {name!r} is {_WORDS[kind]}. Leave "
            "it out."
        )
    return kind, name


_WORDS = {"demo": "the demo model", "folder": "a local folder", "gguf": "a GGUF file"}


def _check_folder(path: Path, *, weights: bool) -> None:
    holds = f"it holds {model_files.describe(path)}"
    ggufs = sorted(path.glob("*.gguf"))
    advice = (
        f"for the GGUF file, pass {str(ggufs[0])!r}."
        if ggufs
        else "pass the folder that save_pretrained wrote, or rename it to load a hub model."
    )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        advice = "this is an adapter (PEFT): merge it into its base model and save that."
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"the folder {path} has no config.json ({holds}); {advice}")
    if weights and not model_files.weight_files(path):
        raise ModelNotFoundError(
            f"the folder {path} has a config.json, but no weights: neither model.safetensors nor "
            f"pytorch_model.bin, nor an index of shards ({holds}); {advice}"
        )


def _check_is_gguf(path: Path) -> None:
    if path.suffix.lower() == ".gguf":
        return
    near = path.parent
    if (near / "config.json").is_file():
        raise ModelNotFoundError(f"{path} is one file of a model; pass its folder, {str(near)!r}.")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return
    raise ModelNotFoundError(
        f"{path} is a file, but no GGUF; pass a .gguf file, or a folder with config.json and "
        "weights."
    )


def _no_such_path(name: str, path: Path) -> ModelNotFoundError:
    parent = path.absolute().parent
    similar: list[str] = []
    if parent.is_dir():
        similar = difflib.get_close_matches(path.name, os.listdir(parent), n=2)
    hint = (
        f" Did you mean {' or '.join(repr(str(parent / s)) for s in similar)}?" if similar else ""
    )
    return ModelNotFoundError(
        f"{name!r} is no model: there is no {path.absolute()}, and it is no hub id such as "
        f"'org/name'.{hint or hub.close_matches(name)}"
    )


def _source(
    ref: str, kind: Kind, path: Path, revision: str | None = None, gguf: Path | None = None
) -> Source:
    model_files.check_whole(path, model_files.weight_files(path))
    names = (name for name in model_files.model_files(path) if name != conversions.MANIFEST)
    return Source(ref, kind, path, tuple(names), revision, gguf)


def _read_config(
    folder: Path, trust_remote_code: bool = False, repo: str | None = None
) -> PretrainedConfig:
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__} in place of an object")
    except ValueError as error:
        raise DamagedFileError(
            f"{path} is no config ({error}); delete it and get the model's config.json again."
        ) from error
    own_code = "AutoConfig" in content.get("auto_map", {})
    at: dict[str, str] = {}
    where: str | Path = folder
    if own_code and trust_remote_code and repo is not None:
        where, at = repo, {"revision": folder.name}  # transformers fetches the code beside it
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **at)
    except (ValueError, KeyError, ImportError, TypeError) as error:
        model_type = content.get("model_type")
        if own_code and not trust_remote_code:
            advice = "it brings Python code of its own: trust_remote_code=True runs that code"
        else:
            advice = "a newer transformers may: `pip install -U transformers`"
        raise UnsupportedModelError(
            f"transformers cannot read {path} (model_type {model_type!r}); {advice}. "
            f"[{str(error).splitlines()[0]}]"
        ) from error


def _git_blob_sha1(path: Path) -> str:
    """The object id that git gives a file, which names small files in the hub cache."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _unchanged(path: Path, noted: dict[str, object]) -> bool:
    if not path.is_file():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (noted["size"], noted["mtime_ns"])
