"""The cell that repeats what was clicked in a panel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferkit.kv import PREFILL_CHUNK

if TYPE_CHECKING:
    from inferkit.model import Model

_WIDTH = 88


@dataclass(frozen=True)
class Sent:
    """What the panel sent last.

    Attributes:
        prompts: In the order of sending.
        options: As they were typed.
        seeds: The seeds in force, one for each prompt.
        chat: Whether the chat template was put around them.
    """

    prompts: Sequence[str]
    options: Mapping[str, Any]
    seeds: Sequence[int]
    chat: bool = False


def code(model: Model | None, sent: Sent | None) -> str:
    """A cell that loads the model as it is now, and sends what was sent last."""
    lines = ["import inferkit as ik", ""]
    if model is None:
        return "\n".join([*lines, "ik.Panel()"])
    lines.append(_call("model = ik.load", _written(model.ref), load_options(model)))
    if sent is not None:
        lines += _answers(sent)
    return "\n".join(lines)


def load_options(model: Model) -> dict[str, Any]:
    """The options of `inferkit.load` that give this model, as it is now.

    Device and dtype are written out, so that another machine gives the same or says why not.
    """
    identity = model._parts.identity
    form = model.plan.format
    options: dict[str, Any] = {
        "device": list(model.devices) if len(model.devices) > 1 else model.device,
        "dtype": model.dtype,
        "quantize": model.quantization if not form.stored else "none",
        "batching": model.batching,
        "max_batch": model.max_batch,
        "context": model.context,
    }
    if model.speculative != "off":
        options["speculative"] = model.speculative
    if form.double_quant and not form.stored:
        options["double_quant"] = True
    if form.compute_dtype and not form.stored:
        options["compute_dtype"] = form.compute_dtype
    usual: dict[str, Any] = {
        "max_memory": {},
        "revision": None,
        "trust_remote_code": False,
        "prefix_reuse": True,
        "prefill_chunk": PREFILL_CHUNK,
    }
    for name, default in usual.items():
        value = getattr(identity, name)
        value = dict(value) if name == "max_memory" else value
        if value != default:
            options[name] = value
    if model.name != Path(model.ref).name:
        options["name"] = model.name  # or another would be loaded beside it
    return options


def _answers(sent: Sent) -> list[str]:
    options = dict(sent.options)
    if "seed" in options and options["seed"] is None:
        options["seed"] = list(sent.seeds) if len(sent.seeds) > 1 else sent.seeds[0]
    if not sent.chat:
        return [_call("gens = model.generate", _prompts(sent.prompts), options), "gens"]
    if len(sent.prompts) == 1:
        messages = f'[{{"role": "user", "content": {_written(sent.prompts[0])}}}]'
        return [_call("gens = model.chat", messages, options), "gens"]
    messages = '[[{"role": "user", "content": prompt}] for prompt in prompts]'
    return [
        f"prompts = {_prompts(sent.prompts)}",
        _call("gens = model.chat", messages, options),
        "gens",
    ]


def _prompts(prompts: Sequence[str]) -> str:
    """One prompt, so many times one, or a list over several lines."""
    if len(prompts) == 1:
        return _written(prompts[0])
    if len(set(prompts)) == 1 and len(prompts) > 1:
        return f"[{_written(prompts[0])}] * {len(prompts)}"
    inside = ", ".join(map(_written, prompts))
    if len(inside) < _WIDTH // 2:
        return f"[{inside}]"
    return "[\n" + "".join(f"    {_written(prompt)},\n" for prompt in prompts) + "]"


def _call(name: str, first: str, options: Mapping[str, Any]) -> str:
    """A call, broken where a formatter would break it."""
    arguments = [first, *(f"{key}={_written(value)}" for key, value in options.items())]
    line = ", ".join(arguments)
    if len(name) + len(line) + 2 <= _WIDTH:
        return f"{name}({line})"
    if len(line) + 4 <= _WIDTH and "\n" not in line:
        return f"{name}(\n    {line}\n)"
    parts = (argument.replace("\n", "\n    ") for argument in arguments)
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def _written(value: Any) -> str:
    """A value as code; what JSON writes of a string is what Python reads, in double quotes."""
    if isinstance(value, str):
        # IPython splits a cell at more characters than Python does, and nobody sees them in it.
        shown = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isprintable() else _escaped(c) for c in shown)
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_written, value))
        return f"[{inside}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(k)}: {_written(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
