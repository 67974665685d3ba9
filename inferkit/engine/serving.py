"""Which runner serves a model: slots where the architecture proves it, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from inferkit.devices import out_of_memory
from inferkit.engine.runner import (
    SlottedRunner,
    nearness,
    probe,
    probe_prompts,
    reference_logits,
    require_decoder,
    slotted_logits,
    supports_slots,
)
from inferkit.engine.sequential import SequentialRunner
from inferkit.errors import UnsupportedModelError
from inferkit.kv import LayerKV, kv_geometry
from inferkit.quantize import is_quantized

_TRIAL_CHUNK = 8

_log = logging.getLogger("inferkit")


def make_runner(
    module: Any,
    *,
    slots: int,
    context: int,
    prefill_chunk: int,
    dtype: str,
    trust_remote_code: bool = False,
) -> SlottedRunner | SequentialRunner:
    """A runner for a loaded model.

    An architecture that cannot share a batch over slots, or whose logits there differ from its own
    forward's, runs one request at a time; the reason is in the runner and in the log.

    Raises:
        UnsupportedModelError: The model is an encoder-decoder, or cannot run offloaded or
            quantized.
        Exception: Whatever says that memory ran out, which proves nothing of the architecture.
    """
    require_decoder(module.config)
    _check_runs(module)
    try:
        geometry = kv_geometry(module.config, dtype, trust_remote_code)
        reason = supports_slots(module, geometry, context)
    except UnsupportedModelError as error:
        geometry, reason = (), str(error)
    if reason is None:
        runner, reason = _proved(module, geometry, slots, context, prefill_chunk)
        if runner is not None:
            return runner
    _log.warning("%s: requests run one at a time.", reason)
    return SequentialRunner(module, context=context, prefill_chunk=prefill_chunk, reason=reason)


def _check_runs(module: Any) -> None:
    """Refuse a model whose code reads the weights of layers that keep theirs in another way."""
    hooks = (getattr(child, "_hf_hook", None) for child in module.modules())
    offloaded = any(getattr(hook, "offload", False) for hook in hooks)
    if not offloaded and not is_quantized(module):
        return
    try:
        reference_logits(module, [[0, 1, 2]])
    except Exception as error:  # code of any architecture
        if out_of_memory(error):
            raise
        kind = "offloaded" if offloaded else "quantized"
        way = "Name devices that hold all of it." if offloaded else "Use quantize='none'."
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot run with {kind} layers ({error}). {way}"
        ) from None


def reason_against(runner: SlottedRunner, context: int) -> str | None:
    """Why a model that runs over slots would be wrong there at another context, if it would."""
    reason = supports_slots(runner.module, runner.geometry, context)
    if reason is not None:
        return reason
    prompts = _prompts(runner.module, runner.geometry, context)
    trial = _trial(runner.module, runner.geometry, prompts)
    try:
        return _heeds_length(trial, prompts, context)
    finally:
        trial.release()


def compiled_reason(runner: SlottedRunner) -> str | None:
    """Why the compiled code of a model's layers is not to be used, or None where it is right.

    It runs over a cache of its own, so that the model may serve requests meanwhile.
    """

    def switch(trial: SlottedRunner, on: bool) -> None:
        trial.compiled = on

    return _differs(runner, switch)


def graphs_reason(runner: SlottedRunner) -> str | None:
    """Why a model's decode step is not to run as CUDA graphs, or None where that is right."""
    return _differs(runner, SlottedRunner.use_graphs)


def _differs(runner: SlottedRunner, switch: Callable[[SlottedRunner, bool], None]) -> str | None:
    prompts = _prompts(runner.module, runner.geometry, runner.cache.context)
    trial = _trial(runner.module, runner.geometry, prompts)
    try:
        for rows in (prompts, prompts[:1]):
            switch(trial, False)
            wanted = slotted_logits(trial, rows)
            switch(trial, True)
            result = nearness(trial, slotted_logits(trial, rows), wanted)
            if trial.graphs is not None and trial.graphs.reason is not None:
                return trial.graphs.reason
            if not result.ok:
                return (
                    f"compiled, {type(runner.module).__name__} gives other logits (cosine "
                    f"{result.cosine:.4f}, {result.threshold} is needed)"
                )
        return None
    finally:
        trial.release()


def _proved(
    module: Any, geometry: tuple[LayerKV, ...], slots: int, context: int, prefill_chunk: int
) -> tuple[SlottedRunner | None, str]:
    """The slotted runner if its logits agree with the architecture's own, else why not."""
    name = type(module).__name__
    own_attention = module.config._attn_implementation
    prompts = _prompts(module, geometry, context)
    wanted = reference_logits(module, prompts)
    trial = None
    try:
        trial = _trial(module, geometry, prompts)
        result = probe(trial, prompts, wanted)
        length = _heeds_length(trial, prompts, context)
    except Exception as error:  # code of any architecture, under a cache it does not know
        if out_of_memory(error):
            raise
        problem = f"{name} does not run over slots ({type(error).__name__}: {error})"
    else:
        if result.ok and length is None:
            trial.release()
            return (
                SlottedRunner(
                    module, geometry, slots=slots, context=context, prefill_chunk=prefill_chunk
                ),
                "",
            )
        problem = length or (
            f"{name} gives other logits over slots than alone (cosine {result.cosine:.4f}, "
            f"{result.threshold} is needed)"
        )
    if trial is not None:
        trial.release()
    module.set_attn_implementation(own_attention)
    return None, problem


def _trial(
    module: Any, geometry: tuple[LayerKV, ...], prompts: Sequence[Sequence[int]]
) -> SlottedRunner:
    """A runner with room for the trial's prompts alone: the model may just fit."""
    room = max(map(len, prompts)) + _TRIAL_CHUNK
    return SlottedRunner(module, geometry, slots=2, context=room, prefill_chunk=_TRIAL_CHUNK)


def _prompts(module: Any, geometry: tuple[LayerKV, ...], context: int) -> list[list[int]]:
    vocabulary = int(module.get_input_embeddings().weight.shape[0])
    window = min((g.window for g in geometry if g.window), default=None)
    return [p[: context - 1] for p in probe_prompts(vocabulary, window)]


def _heeds_length(
    trial: SlottedRunner, prompts: Sequence[Sequence[int]], context: int
) -> str | None:
    """Whether logits change with the one length that the cache tells, up to the context.

    Llama 4 asks for it: beyond some thousand tokens it sharpens its attention.
    """
    cache = trial.cache
    first = slotted_logits(trial, prompts)
    if not cache.asked_length:
        return None
    again = slotted_logits(trial, prompts)  # on some devices the same pass rounds otherwise
    cache.told_length = max(0, context - trial.prefill_chunk)
    told = slotted_logits(trial, prompts)
    cache.told_length = 0
    if (told - first).abs().max() <= 4 * (again - first).abs().max():
        return None
    return f"{type(trial.module).__name__} computes with one length for all rows of a batch"
