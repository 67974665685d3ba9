"""Experiments on disk: written as they happen, whole at the end, and read.

While an experiment is recorded, a journal beside the file (``.partial``) gets a line for whatever
happens, so that a crash loses the last moment at most; at the end the file itself is written beside
it and put in its place at once, and the journal removed. `read` takes either.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import msgspec

from inferkit.errors import ExperimentError, OptionError
from inferkit.experiments.file import (
    Began,
    ExperimentFile,
    Line,
    decode,
    decode_journal,
    encode,
    plain,
)

PARTIAL = ".partial"
"""What the name of an unfinished experiment's journal has at its end."""

_NAME_MAX = 255  # of a file, where the system does not say


def read(path: str | os.PathLike[str]) -> ExperimentFile:
    """Read an experiment, or the journal of one that was not brought to its end.

    A journal goes before an older file in its place: it is of a later recording, that was to
    replace the file and has not.

    Raises:
        OptionError: It is no path.
        ExperimentError: There is none, or it cannot be read.
    """
    path = local_path(path)
    try:
        if path.name.endswith(PARTIAL) and path.exists():
            return decode_journal(path.read_bytes(), path.name)
        journal = unfinished(path)
        if journal is not None:
            return _instead(path, decode_journal(journal.read_bytes(), journal.name))
        if path.exists():
            return decode(path.read_bytes(), path.name)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror or error}.") from None
    raise ExperimentError(f"There is no file {path}. ik.record(...) makes one.")


def unfinished(path: Path) -> Path | None:
    """The journal beside a file, if it is of a later recording, or the file is not there.

    Raises:
        OSError: The system does not say.
    """
    journal = path.parent / (path.name + PARTIAL)
    if not journal.exists() or not path.exists():
        return journal if journal.exists() else None
    # A file is written after the last line of its own journal.
    return journal if journal.stat().st_mtime_ns > path.stat().st_mtime_ns else None


def _instead(path: Path, file: ExperimentFile) -> ExperimentFile:
    """What a journal has, with a note of the file in whose place it is read."""
    if path.exists():
        file.notes.append(
            f"{path.name} itself is of an earlier recording, which this one was to replace: it can "
            f"be opened once {path.name}{PARTIAL} is moved away."
        )
    return file


def set_aside(path: Path) -> Path | None:
    """Give an unfinished recording's journal another name, so that a new one can begin.

    Returns:
        Its new path; None where there was none that would be lost.

    Raises:
        OptionError: It is being written.
        OSError: It cannot be renamed.
    """
    check_not_under_way(path)
    journal = unfinished(path)
    if journal is None:
        return None
    kept = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PARTIAL}")
    return journal.rename(kept)


def check_not_under_way(path: Path) -> None:
    """Raise OptionError where a recording, of whatever process, writes the journal beside a file.

    Raises:
        OSError: The system does not say.
    """
    journal = path.with_name(path.name + PARTIAL)
    if not journal.exists():
        return
    with journal.open("rb") as there:
        free = _locked(there)
    if not free:
        raise OptionError(
            f"{path} is being recorded to: stop that recording first, or choose another path."
        )


def _locked(journal: io.BufferedIOBase) -> bool:
    """Take the lock that the writer of a journal has until it closes it; False where it is taken.

    Where there are no such locks nobody has one: Windows renames no file that is open anyhow.
    """
    try:
        import fcntl

        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


class Journal:
    """Lines on their way to the disk.

    Args:
        path: Of the experiment; the journal is beside it.
        file: As it is before anything happened.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, file: ExperimentFile) -> None:
        self.path = path.with_name(path.name + PARTIAL)
        self._out: io.BufferedWriter | None = self.path.open("wb")
        self._stat = os.fstat(self._out.fileno())
        _locked(self._out)
        try:
            self.add([Began(plain(file))])
        except OSError:
            self.remove()  # without a beginning it would only stand before the file
            raise

    def add(self, lines: Sequence[Line]) -> None:
        """Write lines, so that they outlive this process.

        Raises:
            OSError: The disk is full, or the like; nothing is written from now on.
        """
        if self._out is None:
            return
        try:
            for line in lines:
                self._out.write(msgspec.json.encode(line) + b"\n")
            self._out.flush()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Write no more; what is written stays."""
        out, self._out = self._out, None
        if out is not None:
            with contextlib.suppress(OSError):
                out.close()

    def remove(self) -> None:
        """Take it away, for the file itself is there; unless another has taken its place."""
        with contextlib.suppress(OSError):
            mine = os.path.samestat(self._stat, self.path.stat())
            self.close()  # before it is taken away, which Windows asks for
            if mine:
                self.path.unlink()
        self.close()


# -- whole files ----------------------------------------------------------------------------------


def write(file: ExperimentFile, path: Path, *, overwrite: bool = False) -> None:
    """Write the whole file beside its place, and put it there at once.

    Raises:
        OptionError: There is a file already.
        OSError: It cannot be written; what was there before is as it was.
    """
    data = encode(file)
    check_free(path, overwrite)
    write_bytes(data, path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all: beside its place, and put there at once.

    Raises:
        OSError: It cannot be written; what was there before is as it was.
    """
    # Opened as any new file is, for its permissions; tempfile's are its owner's alone.
    beside = _beside(path)
    try:
        with beside.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Make what the system says while a file is written an ExperimentError with advice."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror or error}){advice}"
        ) from None


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path as it was given, with ~ spelled out.

    Raises:
        OptionError: It is none.
    """
    try:
        found = Path(path).expanduser()
        os.fsencode(found)
    except (TypeError, RuntimeError, UnicodeEncodeError) as error:
        raise OptionError(
            f"{path!r} is no path ({error}): give where the file is, as a string or a Path."
        ) from None
    if "\0" in str(found):
        raise OptionError(f"{path!r} is no path: a name has no null character.")
    return found


def check_free(path: Path, overwrite: bool) -> None:
    """Raise OptionError where a file is there already, no folder for it, or its name too long.

    What is no plain file (a device, a pipe) is not replaced either.
    """
    if not path.name:
        raise OptionError(f"{path} is a folder: name the file to write in it.")
    try:
        if not path.parent.is_dir():
            raise OptionError(f"There is no folder {path.parent} to write {path.name} to: make it.")
        _check_length(path)
        taken, replaceable = path.exists(), path.is_file()
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}): give another.") from None
    if taken and not replaceable:
        raise OptionError(f"{path} exists already, and is no file to replace: choose another name.")
    if taken and not overwrite:
        raise OptionError(
            f"{path} exists already: choose another name, or say overwrite=True (as an option: "
            "--overwrite)."
        )


def _check_length(path: Path) -> None:
    """Raise OptionError where a name, or that of a file beside it, is longer than a folder takes.

    What is beside it while it is written has the longer name: better to know before the work.
    """
    limit = os.pathconf(path.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else _NAME_MAX
    room = (limit if limit > 0 else _NAME_MAX) - max(
        len(PARTIAL), len(_beside(path).name) - len(path.name)
    )
    length = len(os.fsencode(path.name))
    if length > room:
        raise OptionError(
            f"{path.name[:40]}... is {length} bytes long, and a file's name may have {room} here: "
            "give a shorter name, or another path."
        )


def _beside(path: Path) -> Path:
    """A new name in the same folder, for what is not whole yet."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")
