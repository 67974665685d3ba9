"""Which runner serves a model: slots where the architecture proves it, else one by one."""

from __future__ import annotations

import logging
from typing import Any

from inferkit.engine.runner import (
    SlottedRunner,
    probe,
    probe_prompts,
    reference_logits,
    require_decoder,
    supports_slots,
)
from inferkit.engine.sequential import SequentialRunner
from inferkit.errors import UnsupportedModelError
from inferkit.kv import LayerKV, kv_geometry

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
        UnsupportedModelError: The model is an encoder-decoder.
    """
    require_decoder(module.config)
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


def _proved(
    module: Any, geometry: tuple[LayerKV, ...], slots: int, context: int, prefill_chunk: int
) -> tuple[SlottedRunner | None, str]:
    """The slotted runner if its logits agree with the architecture's own, else why not."""
    name = type(module).__name__
    own_attention = module.config._attn_implementation
    window = min((g.window for g in geometry if g.window), default=None)
    prompts = [p[: context - 1] for p in probe_prompts(_vocabulary(module), window)]
    wanted = reference_logits(module, prompts)
    trial = None
    try:
        trial = SlottedRunner(
            module, geometry, slots=2, context=context, prefill_chunk=min(prefill_chunk, 8)
        )
        # Llama 4 sharpens its attention beyond a length that it asks of the cache.
        trial.cache.told_length = max(0, context - trial.prefill_chunk)
        result = probe(trial, prompts, wanted)
    except Exception as error:  # code of any architecture, under a cache it does not know
        problem = f"{name} does not run over slots ({type(error).__name__}: {error})"
    else:
        if result.ok:
            trial.release()
            return (
                SlottedRunner(
                    module, geometry, slots=slots, context=context, prefill_chunk=prefill_chunk
                ),
                "",
            )
        problem = (
            f"{name} gives other logits over slots than alone (cosine {result.cosine:.4f}, "
            f"{result.threshold} is needed)"
        )
    if trial is not None:
        trial.release()
    module.set_attn_implementation(own_attention)
    return None, problem


def _vocabulary(module: Any) -> int:
    return int(module.get_input_embeddings().weight.shape[0])
