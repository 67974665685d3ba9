"""The library's keywords as written options: one table for the command line and the magics.

Each entry is what ``argparse`` takes for ``--the-name``. Defaults are left to the library: an
option that was not written is not passed on (see `given`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from typing import Any

from inferkit.errors import OptionError
from inferkit.footprint import QUANTIZE_MODES

Options = Mapping[str, Mapping[str, Any]]


def _device(text: str) -> str | list[str]:
    names = text.split(",")
    return names if len(names) > 1 else text


def _max_memory(text: str) -> dict[str, str]:
    limits = (limit.partition("=") for limit in text.split(","))
    return {device.strip(): size for device, _, size in limits}


def _switch(text: str) -> str | bool:
    return {"true": True, "false": False}.get(text.lower(), text)


MODEL_OPTIONS: Options = {
    "device": {
        "type": _device,
        "help": "auto, cpu, mps, cuda:N, or several: cuda:0,cuda:1 or cuda:0,cpu,disk",
    },
    "max_memory": {
        "type": _max_memory,
        "metavar": "LIMITS",
        "help": "the most to take of each device: cuda:0=6GiB,cpu=300MB",
    },
    "dtype": {"help": "auto, bfloat16, float16 or float32"},
    "quantize": {"metavar": "MODE", "help": "none, int8, nf4, fp4, int8wo or int4wo"},
    "double_quant": {
        "action": "store_true",
        "help": "quantize the scales of a 4-bit mode again",
    },
    "compute_dtype": {"metavar": "DTYPE", "help": "what 4-bit weights are unpacked to"},
    "context": {"type": int, "metavar": "N", "help": "tokens per request"},
    "max_batch": {"type": int, "metavar": "N", "help": "requests that run together"},
    "revision": {"help": "a branch, tag or commit of the hub"},
    "trust_remote_code": {"action": "store_true", "help": "run the code that the model ships"},
}
"""What a plan depends on: keywords of `inferkit.plan`, and of `inferkit.load` too."""

RUN_OPTIONS: Options = {
    "batching": {"help": "continuous, static or off"},
    "compile": {
        "type": _switch,
        "metavar": "WHEN",
        "help": "the decode step: auto, true or false",
    },
    "speculative": {"metavar": "WAY", "help": "guess next tokens: off, ngram or draft:NAME"},
    "force": {"action": "store_true", "help": "load although the plan says no"},
}
"""What only `inferkit.load` takes."""

LOAD_OPTIONS: Options = {**MODEL_OPTIONS, **RUN_OPTIONS}

SAMPLING_OPTIONS: Options = {
    "sampling": {
        "choices": ["model"],
        "help": "start from what the model's authors recommend",
    },
    "max_tokens": {"type": int, "metavar": "N", "help": "most tokens to generate"},
    "temperature": {"type": float, "metavar": "T", "help": "0 is greedy"},
    "top_p": {"type": float, "metavar": "P"},
    "top_k": {"type": int, "metavar": "K", "help": "0 keeps all"},
    "min_p": {"type": float, "metavar": "P"},
    "repetition_penalty": {"type": float, "metavar": "R", "help": "1 does nothing"},
    "seed": {"type": int, "metavar": "N"},
    "stop": {"action": "append", "metavar": "TEXT", "help": "may be repeated"},
    "logprobs": {"type": int, "metavar": "N", "help": "shown with --json"},
}
"""Keywords of `inferkit.Model.generate`."""

REPLAY_OPTIONS: Options = {
    "model": {
        "action": "append",
        "metavar": "MODEL",
        "help": "where the model is, if not where it was; of several: NAME=MODEL, for each",
    },
    "device": MODEL_OPTIONS["device"],
    "dtype": MODEL_OPTIONS["dtype"],
    "pause": {"type": float, "metavar": "S", "help": "most seconds that nothing happens (1)"},
    "check_files": {
        "action": argparse.BooleanOptionalAction,
        "help": "refuse a model whose files are not those that were recorded (the default)",
    },
}
"""Keywords of `inferkit.replay`."""

VALUES: Mapping[str, tuple[str, ...]] = {
    "batching": ("continuous", "static", "off"),
    "compile": ("auto", "true", "false"),
    "compute_dtype": ("auto", "bfloat16", "float16", "float32"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "quantize": QUANTIZE_MODES,
    "sampling": ("model",),
    "speculative": ("off", "ngram"),
}
"""The words that an option knows, for completion; the library checks what is written."""


def replay_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a replay that were written, as keywords of `inferkit.replay`.

    Raises:
        OptionError: Of several models one has no name.
    """
    options = given(arguments, REPLAY_OPTIONS)
    models = options.get("model", [])
    if len(models) > 1 and not all("=" in model for model in models):
        raise OptionError("Of several models, say which is which: --model NAME=MODEL for each.")
    if len(models) == 1 and ("=" not in models[0] or os.path.exists(models[0])):
        options["model"] = models[0]
    elif models:
        options["model"] = dict(model.split("=", 1) for model in models)
    return options


def flag(name: str) -> str:
    """How a keyword is written as an option: ``max_tokens`` -> ``--max-tokens``."""
    return "--" + name.replace("_", "-")


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were written, so that the library's defaults hold for the others.

    The parser must have ``argument_default=argparse.SUPPRESS``.
    """
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
