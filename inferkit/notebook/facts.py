"""What a panel says of a model and of a run: plain data, and numbers as people read them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from inferkit.errors import ModelUnloadedError
from inferkit.html import counted, format_bytes, format_number
from inferkit.notebook.display import output_rate
from inferkit.trace import acceptance

if TYPE_CHECKING:
    from inferkit.generation import Generations, Settings
    from inferkit.model import Model


def model_facts(model: Model | None) -> dict[str, Any] | None:
    """What the views show of a model."""
    if model is None:
        return None
    return {
        "name": model.name,
        "ref": model.ref,
        "device": ", ".join(model.devices),
        "dtype": model.dtype,
        "quantization": str(model.plan.format),
        "batching": model.batching,
        "max_batch": model.max_batch,
        "context": model.context,
        "step": str(model.compilation),
        "speculative": model.speculative,
        "fallback": model.fallback,
    }


def modes(model: Model) -> dict[str, Any]:
    """What the form says of a loaded model."""
    return {
        "ref": model.ref,
        "device": model.device if len(model.devices) == 1 else "auto",
        "quantize": "none" if model.plan.format.stored else model.quantization,
        "batching": model.batching,
        "speculative": model.speculative,
        "max_batch": str(model.max_batch),
        "context": str(model.context),
    }


def run_summary(gens: Generations, model: Model | None) -> list[tuple[str, str]]:
    """A run in a line: latency of the requests that completed, by vLLM's definitions.

    Args:
        gens: Its results.
        model: What is shown, whose memory is told where it ran all of them.
    """
    from inferkit.latency import summarize

    if not gens:
        return []
    found = summarize(gens)
    facts = [("last run", counted(len(gens), "request"))]
    if found.failed:
        facts.append(("of these stopped or failed", str(found.failed)))
    many = found.completed > 1
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("queue", "queue")):
        for percentile in ("p50", "p99") if many else ("p50",):
            value = getattr(found[name], percentile)
            if value is not None:
                shown = f"{label} {percentile}" if many else label
                facts.append((shown, f"{format_number(1e3 * value)} ms"))
    facts.append(("output tokens/s", format_number(output_rate(gens))))
    accepted = acceptance(gen.latency for gen in gens)
    if accepted is not None:
        facts.append(("guesses accepted", accepted))
    if model is not None:
        with suppress(ModelUnloadedError):  # in this moment
            facts += _memory(gens, model)
    return facts


def _memory(gens: Generations, model: Model) -> list[tuple[str, str]]:
    if not all(_ran_on(model, gen.settings) for gen in gens):
        return []
    of = model.plan
    return [("weights", format_bytes(of.weights)), ("KV cache", format_bytes(of.kv_cache))]


def _ran_on(model: Model, settings: Settings) -> bool:
    """Whether a request ran on a model as it is now, so that its memory is that of the run."""
    now = (model.name, str(model.plan.format), model.max_batch)
    return (settings.model, settings.quantization, settings.max_batch) == now
