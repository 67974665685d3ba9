"""What can be written after ``%infer``: one table of subcommands, for parsing, help and completion.

Options are the library's keywords with dashes (see `inferkit.arguments`).
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

from inferkit.arguments import (
    LOAD_OPTIONS,
    MODEL_OPTIONS,
    REPLAY_OPTIONS,
    SAMPLING_OPTIONS,
    Options,
    flag,
)
from inferkit.notebook import words


@dataclass(frozen=True)
class Command:
    """A subcommand, or a prompt.

    Attributes:
        summary: What it does, in a line.
        example: How it is written.
        arguments: Words without dashes, as argparse takes them.
        options: Words with dashes, likewise.
    """

    summary: str
    example: str
    arguments: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)

    def parser(self, name: str) -> _Parser:
        """Its parser; options that are not written are left out of what it gives."""
        parser = _Parser(
            prog=f"%infer {name}".rstrip(),
            description=self.summary,
            epilog=f"example: {self.example}",
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.HelpFormatter,
        )
        for argument, keywords in self.arguments.items():
            parser.add_argument(argument, **keywords)
        for option, keywords in self.options.items():
            parser.add_argument(flag(option), **keywords)
        return parser

    def parse(self, name: str, words: Sequence[str]) -> argparse.Namespace:
        """What the words say.

        Raises:
            UsageError: A word is unknown or missing, or a value is not of its type.
        """
        arguments, unknown = self.parser(name).parse_known_args(words)
        if unknown:
            near = difflib.get_close_matches(unknown[0], map(flag, self.options), n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UsageError(f"{unknown[0]!r} is not known here{hint} {_help_line(name)}")
        return arguments


class _Parser(MagicArgumentParser):
    def error(self, message: str) -> Any:
        name = self.prog.removeprefix("%infer").strip()
        raise UsageError(f"{message}. {_help_line(name)}")


def _help_line(name: str) -> str:
    return f"%infer help{' ' + name if name else ''} lists the options."


def split(line: str) -> list[str]:
    """A line's words; quotes are taken off, and a backslash is one, as in a Windows path.

    Raises:
        UsageError: A quote is not closed, or is within a word.
    """
    try:
        return words.split(line)
    except ValueError as error:
        raise UsageError(
            f"{error}, in: {line.strip()} (a prompt with quotes of its own goes into a cell under "
            "%%infer)"
        ) from None


HELP_FLAGS = {"-h", "--help"}
_CELL_HELP = """\
A cell that begins with %%infer takes the same options, and the rest of it is the prompt; a line
of --- stands between several, which run as one batch. {name}, {name.attr}, {name[0]} and
{name["key"]} are replaced by variables, if there are such, and --no-variables leaves them alone.
Results are in _infer."""

_MODEL: Options = {"model": {"metavar": "NAME", "help": "a loaded model; needed with several"}}
_TO = {"metavar": "VARIABLE", "help": "a variable to keep it in"}
_REF = {"metavar": "MODEL", "help": "demo, a hub id, a folder or a .gguf file"}
_PROMPT_OPTIONS: Options = {
    **_MODEL,
    "chat": {"action": "store_true", "help": "use the model's chat template"},
    "to": {"metavar": "VARIABLE", "help": "a variable to keep results in, besides _infer"},
    "raw": {"action": "store_true", "help": "show text as it is, not as Markdown"},
    "no_variables": {"action": "store_true", "help": "leave {name} in prompts as it is"},
    **SAMPLING_OPTIONS,
    "stop": {**SAMPLING_OPTIONS["stop"], "type": words.unescaped},
    "logprobs": {**SAMPLING_OPTIONS["logprobs"], "help": "kept in _infer.logprobs"},
}

PROMPT = Command(
    "Run one prompt, or several as one batch.",
    '%infer "Once upon a time" --max-tokens 32',
    {"prompt": {"nargs": "+", "metavar": '"PROMPT"', "help": "in quotes"}},
    _PROMPT_OPTIONS,
)
CELL = Command(
    "Run the cell's prompts.",
    "%%infer --max-tokens 32 --temperature 0.7 --seed 1",
    options=_PROMPT_OPTIONS,
)
COMMANDS: Mapping[str, Command] = {
    "load": Command(
        "Load a model.",
        "%infer load demo --quantize nf4 --to model",
        {"ref": _REF},
        {**LOAD_OPTIONS, "name": {"help": "what to call it"}, "to": _TO},
    ),
    "unload": Command(
        "Give a model's memory back.",
        "%infer unload demo",
        {"model": {"nargs": "?", "metavar": "NAME", "help": "needed with several"}},
    ),
    "models": Command("Show what is loaded.", "%infer models"),
    "devices": Command("Show the devices and their memory.", "%infer devices"),
    "plan": Command(
        "Show the memory that a model needs, from its config alone.",
        "%infer plan demo --max-batch 32",
        {"ref": _REF},
        MODEL_OPTIONS,
    ),
    "quantize": Command(
        "Change the precision of a loaded model in place.",
        "%infer quantize nf4",
        {"quantize": {"metavar": "MODE", "help": "none, int8, nf4, fp4, int8wo or int4wo"}},
        {**{n: LOAD_OPTIONS[n] for n in ("double_quant", "compute_dtype")}, **_MODEL},
    ),
    "batching": Command(
        "Change how requests are batched, or show it.",
        "%infer batching static --max-batch 8",
        {"batching": {"nargs": "?", "metavar": "POLICY", "help": "continuous, static or off"}},
        {**{n: LOAD_OPTIONS[n] for n in ("max_batch", "context", "speculative")}, **_MODEL},
    ),
    "record": Command(
        "Record all requests to a file until it is stopped.",
        '%infer record "nf4 against bf16"',
        {"name": {"nargs": "?", "metavar": "NAME", "help": "what to call it"}},
        {
            "path": {"metavar": "FILE", "help": "the file; else it is called by the name"},
            "redact": {"action": "store_true", "help": "leave out prompts and outputs"},
            "overwrite": {"action": "store_true", "help": "replace a file that is there"},
            "stop": {"action": "store_true", "help": "end it; what was recorded is in _infer"},
            "to": _TO,
        },
    ),
    "replay": Command(
        "Run a recorded experiment again, and compare tokens and latency.",
        "%infer replay nf4-against-bf16.inferkit.json",
        {"experiment": {"metavar": "FILE", "help": "what %%infer record made"}},
        {**REPLAY_OPTIONS, "to": _TO},
    ),
    "share": Command(
        "Give the Binder link that opens this notebook.",
        "%infer share",
        {},
        {
            "repo": {"metavar": "OWNER/NAME", "help": "else the git remote of this folder"},
            "ref": {"metavar": "REF", "help": "a tag or commit; else the present commit"},
            "notebook": {"metavar": "PATH", "help": "else this notebook"},
            "experiment": {
                "metavar": "FILE",
                "help": "what it shows, else what was recorded here: whether Binder can run it",
            },
        },
    ),
    "panel": Command("Show the panel.", "%infer panel", options=_MODEL),
    "help": Command(
        "Show what there is, or the options of a subcommand.",
        "%infer help load",
        {"command": {"nargs": "?", "metavar": "SUBCOMMAND"}},
    ),
}


def no_command(word: str, line: str) -> str:
    """The message for a line that begins with a bare word which is no subcommand."""
    prompt = " ".join(line.split())
    if '"' in prompt and "'" in prompt:
        return f"{_unknown(word)} A prompt is quoted; one with quotes stands in a cell: %%infer"
    quote = "'" if '"' in prompt else '"'
    return f"{_unknown(word)} A prompt is quoted: %infer {quote}{prompt}{quote}"


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.7)
    hint = f"did you mean %infer {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
    return f"{word!r} is no subcommand; {hint}"


def help_of(name: str) -> str:
    """The options of a subcommand; of an empty name, all that there is, with examples.

    Raises:
        UsageError: There is no such subcommand.
    """
    if not name:
        return _overview()
    if name not in COMMANDS:
        raise UsageError(_unknown(name))
    return COMMANDS[name].parser(name).format_help()


def _overview() -> str:
    commands = [f"{f'%infer {name}':<16} {command.summary}" for name, command in COMMANDS.items()]
    examples = [f"  {command.example}" for command in (*COMMANDS.values(), PROMPT, CELL)]
    options = PROMPT.parser("").format_help()
    return "\n".join([*commands, "", "Examples:", *examples, "", options, _CELL_HELP])
