"""What was typed into the panel, as the options that the library takes.

Everything is text as it was typed; empty is the default. The library judges the values, so that a
message at a field says what a cell would have said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inferkit.errors import OptionError
from inferkit.notebook import words
from inferkit.sampling import SamplingParams

Form = Mapping[str, Any]

EMPTY: dict[str, Any] = {
    "ref": "demo",
    "device": "auto",
    "quantize": "none",
    "batching": "continuous",
    "speculative": "off",
    "max_batch": "16",
    "context": "",
    "prompt": "",
    "copies": "8",
    "max_tokens": "64",
    "temperature": "0",
    "top_p": "",
    "top_k": "",
    "min_p": "",
    "repetition_penalty": "",
    "seed": "",
    "stop": "",
    "ignore_eos": False,
    "chat": False,
}
"""The form of a new panel, and with it the names of its fields."""

_NUMBERS: dict[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}
_NOT_PLANNED = ("batching", "speculative")  # no memory depends on them
_MOST_PROMPTS = 1000
_LONGEST = 18  # characters of a whole number
_LONGEST_SEED = 300  # of one that may be large, but not so large that no float is near


class FormError(OptionError):
    """Something typed makes no sense.

    Attributes:
        fields: The message for each field.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(" ".join(fields.values()))
        self.fields = dict(fields)


class _Reading:
    """Reads fields and gathers what is wrong, so that all of it is said at once."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self.wrong: dict[str, str] = {}

    def text(self, name: str) -> str:
        return str(self._form.get(name, "") or "").strip()

    def read(self, name: str, parse: Callable[[str], Any]) -> Any:
        """What a field says; None where it is empty or makes no sense."""
        text = self.text(name)
        if not text:
            return None
        try:
            return parse(text)
        except ValueError as error:
            self.wrong[name] = str(error)
            return None

    def check(self) -> None:
        if self.wrong:
            raise FormError(self.wrong)


def load_options(form: Form) -> dict[str, Any]:
    """The model and the options of `inferkit.load`, ``ref`` among them.

    Raises:
        FormError: A field is empty that must not be, or no number.
    """
    reading = _Reading(form)
    names = ("ref", "device", "quantize", "batching", "speculative")
    options: dict[str, Any] = {name: reading.text(name) for name in names}
    if not options["ref"]:
        reading.wrong["ref"] = "Name a model: demo, a hub id, a folder or a .gguf file."
    for name, least, example in (("max_batch", 1, 16), ("context", 2, 4096)):
        value = reading.read(name, _whole(least, example))
        if value is not None:
            options[name] = value
    reading.check()
    return {name: value for name, value in options.items() if value != ""}


def load_option(form: Form, name: str) -> Any:
    """One of `load_options`; None where its field is empty. What is wrong elsewhere is no matter.

    Raises:
        FormError: Of this field.
    """
    try:
        return load_options(form).get(name)
    except FormError as error:
        if name in error.fields:
            raise FormError({name: error.fields[name]}) from None
    return load_options({**EMPTY, name: form[name]}).get(name)


def plan_options(form: Form) -> dict[str, Any]:
    """The options of `inferkit.plan`, ``ref`` among them; errors as for `load_options`."""
    options = load_options(form)
    return {name: value for name, value in options.items() if name not in _NOT_PLANNED}


def sampling_options(form: Form) -> dict[str, Any]:
    """The options of `inferkit.Model.generate` that were typed.

    Raises:
        FormError: A field is no number, or out of range.
    """
    reading = _Reading(form)
    options: dict[str, Any] = {}
    for name, kind in _NUMBERS.items():
        value = reading.read(name, _number(kind))
        if value is not None:
            options[name] = value
    seed = reading.text("seed")
    if seed.lower() in ("random", "none"):
        options["seed"] = None
    elif seed:
        options["seed"] = reading.read("seed", _seed)
    if reading.text("stop"):
        options["stop"] = reading.read("stop", _strings)
    if form.get("ignore_eos"):
        options["ignore_eos"] = True
    for name, value in options.items():  # one at a time, so that a message has its field
        try:
            SamplingParams.of({name: value})
        except OptionError as error:
            reading.wrong.setdefault(name, str(error))
    reading.check()
    try:
        SamplingParams.of(options)
    except OptionError as error:  # of two options together: no token is left to draw from
        raise FormError({"top_p": str(error)}) from None
    return options


def errors(form: Form) -> dict[str, str]:
    """What is wrong with each field as it is typed; asks nobody, and so is known at once."""
    found: dict[str, str] = {}
    for read in (sampling_options, plan_options):
        try:
            read(form)
        except FormError as error:
            found |= error.fields
    return found


def prompts(form: Form, how: str) -> list[str]:
    """The prompts to send: "one", "copies" of it, or "lines", one for each.

    Raises:
        FormError: There is no prompt, or no sensible number of copies.
    """
    reading = _Reading(form)
    text = str(form.get("prompt", "") or "")
    if not text.strip():
        reading.wrong["prompt"] = "Write a prompt first."
    copies = 1
    if how == "copies":
        copies = reading.read("copies", _copies) or 0
        if not copies and "copies" not in reading.wrong:
            reading.wrong["copies"] = f"Copies: write a number from 1 to {_MOST_PROMPTS}."
    reading.check()
    if how == "lines":
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > _MOST_PROMPTS:
            many = f"These are {len(lines):,} lines; send {_MOST_PROMPTS:,} or fewer at once."
            raise FormError({"prompt": many})
        return lines
    return [text] * copies


def _whole(least: int, example: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = _integer(text, f"; write one, as {example}.")
        if number < least:
            raise ValueError(f"{number} is too small; write {least} or more, as {example}.")
        return number

    return parse


def _number(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if kind is int:
            return _integer(text)
        try:
            return float(text.replace("_", ""))
        except ValueError:
            raise ValueError(f"{_shown(text)} is no number.") from None

    return parse


def _seed(text: str) -> int:
    hint = "; write one, or “random”."
    if len(text) > _LONGEST_SEED:
        raise ValueError(f"{_shown(text)} has more than {_LONGEST_SEED:,} characters{hint}")
    return _whole_number(text, hint)


def _integer(text: str, hint: str = ".") -> int:
    if len(text) > _LONGEST:  # a larger number would overflow wherever it becomes a float
        raise ValueError(f"{_shown(text)} is too long for a number{hint}")
    return _whole_number(text, hint)


def _whole_number(text: str, hint: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ValueError(f"{_shown(text)} is no whole number{hint}") from None


def _copies(text: str) -> int:
    if not text.isdecimal() or len(text) > _LONGEST or not 1 <= int(text) <= _MOST_PROMPTS:
        raise ValueError(f"Copies: {_shown(text)} is no number from 1 to {_MOST_PROMPTS}.")
    return int(text)


def _shown(text: str) -> str:
    """What was typed, for a message: somebody may have pasted a page."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


def _strings(text: str) -> list[str]:
    try:
        return [words.unescaped(word) for word in words.split(text)]
    except ValueError as error:
        raise ValueError(f"{error}.") from None
