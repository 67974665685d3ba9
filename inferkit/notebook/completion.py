"""Completion on ``%infer`` lines: subcommands, options, their values and references of models."""

from __future__ import annotations

import glob
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from IPython.core.completer import (
    CompletionContext,
    SimpleCompletion,
    SimpleMatcherResult,
    context_matcher,
)

from inferkit.arguments import VALUES, flag
from inferkit.notebook.commands import CELL, COMMANDS, Command

if TYPE_CHECKING:
    from inferkit.model import Model

Matcher = Callable[[CompletionContext], SimpleMatcherResult]

_LINE = re.compile(r"^\s*(%%?)infer\s+(.*)$", re.DOTALL)
_IDENTIFIER = "inferkit.magics"
_LOOK_AGAIN = 5.0  # seconds; a look for models walks over the caches on disk


def matcher() -> Matcher:
    """A matcher for ``Completer.custom_matchers`` of IPython."""
    references = _References()

    @context_matcher(identifier=_IDENTIFIER, priority=100)
    def match(context: CompletionContext) -> SimpleMatcherResult:
        line = _LINE.match(context.text_until_cursor)
        if line is None or (line[1] == "%%" and context.cursor_line > 0):
            return {"completions": []}
        text, in_cell = line[2], line[1] == "%%"
        if text.count('"') % 2:  # within a prompt
            return {"completions": []}
        fragment = _fragment(text)
        before = text[: len(text) - len(fragment)].split()
        words = _words(before, fragment, in_cell, references)
        # Where there is nothing to offer, IPython would offer words of Python's.
        fit = [word for word in words if word.startswith(fragment)] or [fragment]
        return {
            "completions": [SimpleCompletion(word, type="magic") for word in fit],
            "matched_fragment": fragment,
            "suppress": True,
        }

    return match


def loaded_models() -> list[Model]:
    """The models of this process; imports nothing, for without the registry there is none."""
    registry = sys.modules.get("inferkit.registry")
    # Another thread may be in the middle of its import, as a panel's is that loads the first model.
    models = getattr(registry, "models", None)
    return [] if models is None else list(models())


def loaded_names() -> list[str]:
    """Their names."""
    return [model.name for model in loaded_models()]


def _fragment(text: str) -> str:
    """What is being typed: the last word, or the value in ``--option=value``."""
    word = re.split(r"\s", text)[-1]
    return word.partition("=")[2] if word.startswith("--") and "=" in word else word


def _words(
    before: list[str], fragment: str, in_cell: bool, references: _References
) -> Iterable[str]:
    """All that may stand here, most of it whatever it begins with."""
    dashed = fragment.startswith("-")
    if not before and not in_cell and not dashed:
        return COMMANDS
    command = CELL if in_cell or not before else COMMANDS.get(before[0], CELL)
    rest = before if command is CELL else before[1:]
    last = rest[-1].rstrip("=") if rest else ""
    valued = next((name for name in _valued(command) if flag(name) == last), None)
    if valued is not None:
        return _values(valued, command.options[valued], fragment, references)
    used = {word.partition("=")[0] for word in rest}
    again = {name for name, how in command.options.items() if how.get("action") == "append"}
    left = [flag(name) for name in command.options if name in again or flag(name) not in used]
    first = next(iter(command.arguments), None)
    if first is None or dashed or _positionals(rest, command):
        return [*left, "--help"]
    return list(_values(first, command.arguments[first], fragment, references)) or ["--help"]


def _valued(command: Command) -> list[str]:
    """Its options that have a value."""
    return [name for name, how in command.options.items() if how.get("action") != "store_true"]


def _positionals(words: list[str], command: Command) -> int:
    """How many of the words are neither options nor values of options."""
    takes = set(map(flag, _valued(command)))
    pairs = zip(["", *words], words)
    return sum(not word.startswith("-") and former not in takes for former, word in pairs)


def _values(
    name: str, how: Mapping[str, Any], fragment: str, references: _References
) -> Iterable[str]:
    """What an option or argument may be."""
    kind = how.get("metavar")
    if kind == "MODEL":
        found = [*references.get(), *_files(fragment)]
        whose, mark, ref = fragment.partition("=")
        if mark and how.get("action") == "append":  # of several it is said whose it is: NAME=MODEL
            found += [f"{whose}={each}" for each in (*references.get(), *_files(ref))]
        return found
    if kind in ("FILE", "PATH"):
        return _files(fragment)
    if name == "command":
        return COMMANDS
    if name == "model":
        return loaded_names()
    return _devices() if name == "device" else VALUES.get(name, ())


def _files(begun: str) -> list[str]:
    """Files and folders whose path begins like this; not those whose names need quotes."""
    if begun == "~":
        return ["~/"]
    whole = os.path.expanduser(begun)
    paths = sorted(glob.glob(f"{glob.escape(whole)}*"))
    ends = [path[len(whole) :] + (os.sep if os.path.isdir(path) else "") for path in paths]
    return [begun + end for end in ends if not re.search(r"[\s\"']", end)]


def _devices() -> list[str]:
    """Devices by name; which accelerators there are is known once torch is imported."""
    if "torch" not in sys.modules:
        return ["auto", "cpu"]
    from inferkit.devices import attached_names

    return ["auto", *attached_names()]


class _References:
    """What loads without network, looked up again after some seconds."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._until = 0.0

    def get(self) -> list[str]:
        if time.monotonic() >= self._until:
            self._found = ["demo", *(ref for ref in _cached() if ref != "demo")]
            self._until = time.monotonic() + _LOOK_AGAIN
        return self._found


def _cached() -> list[str]:
    from inferkit.catalog import cached_models

    try:
        return list(dict.fromkeys(model.ref for model in cached_models()))
    except OSError:  # a cache that cannot be read has nothing to offer
        return []


def install(shell: Any) -> None:
    """Add a matcher to a shell, in the place of one that is there already."""
    remove(shell)
    shell.Completer.custom_matchers.append(matcher())


def remove(shell: Any) -> None:
    """Take the matcher out of a shell."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _IDENTIFIER]
