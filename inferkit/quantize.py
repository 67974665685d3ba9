"""Quantization modes, applied while a model loads: bitsandbytes' and the weight-only ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from inferkit.footprint import WeightFormat, quantized_linears
from inferkit.progress import Progress, bar


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(beginning)


# What bitsandbytes logs at every int8 matmul in bfloat16, and once about an optional package. A
# person can do nothing about the first, and needs not do anything about the second.
_NOISE = (
    ("bitsandbytes.autograd._functions", _without("MatMul8bitLt: inputs will be cast")),
    ("bitsandbytes.backends.cpu.ops", _without("Failed to load CPU gemm_4bit_forward")),
)


def loading_config(form: WeightFormat, dtype: str, offloads: bool = False) -> Any:
    """The transformers quantization config of a format, or None: it reads weights as they are.

    Args:
        form: The mode and its details.
        dtype: torch's name of the model's dtype.
        offloads: Whether modules lie on "cpu" or "disk" and run elsewhere; they stay unquantized.
    """
    for logger, message in _NOISE:
        logging.getLogger(logger).addFilter(message)
    if form.mode == "none" or form.stored or form.weight_only:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    # The name is older than what it does: for every mode, and in the model's dtype.
    offload = {"llm_int8_enable_fp32_cpu_offload": offloads}
    if form.mode == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **offload)
    return BitsAndBytesConfig(
        **offload,
        load_in_4bit=True,
        bnb_4bit_quant_type=form.mode,
        bnb_4bit_use_double_quant=form.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, form.compute_dtype or dtype),
    )


def quantize_weights(module: Any, form: WeightFormat, *, progress: Progress = False) -> None:
    """Replace a loaded model's linear layers, where the format is a weight-only one.

    Each original weight goes before the next layer's turn, so that the model is never there twice.
    Output embeddings that are tied to the input embeddings get a quantized copy beside these.
    Offloaded layers stay as they are.
    """
    if not form.weight_only:
        return
    from inferkit.weight_only import quantize_linear

    layers = {name: module.get_submodule(name) for name in quantized_linears(module, form)}
    here = [(name, child) for name, child in layers.items() if child.weight.device.type == "cpu"]
    for name, child in bar(progress, "Quantizing weights", steps=here, delay=1, leave=False):
        module.set_submodule(name, quantize_linear(form.mode, child))
        child.weight = None


def is_quantized(module: Any) -> bool:
    """Whether some layers of a loaded model keep their weights in another way than plain ones."""
    from inferkit.weight_only import WeightOnlyLinear

    if getattr(module.config, "quantization_config", None) is not None:
        return True
    return any(isinstance(child, WeightOnlyLinear) for child in module.modules())


def rounds_inputs(module: Any) -> bool:
    """Whether layers round their input too, in a way that depends on what else is in the batch.

    LLM.int8() does: columns with an outlier in any row are multiplied apart, for all rows.
    """
    config = getattr(module.config, "quantization_config", None)
    return bool(getattr(config, "load_in_8bit", False))


def unquantized(module: Any) -> tuple[str, ...]:
    """Names of the layers with a weight matrix that a quantized model keeps in its dtype.

    These are the embeddings, experts that an architecture fuses into one parameter, and what
    the mode leaves alone: bitsandbytes the output embeddings, the weight-only modes layers whose
    shape their kernels do not take.
    """
    from inferkit.packing import PackedLinear

    return tuple(
        name
        for name, layer in module.named_modules()
        if isinstance(layer, PackedLinear)
        or any(p.ndim > 1 and p.is_floating_point() for p in layer.parameters(recurse=False))
    )


def quantized_tensors(module: Any) -> Iterator[Any]:
    """The tensors that bitsandbytes hangs on a model's parameters and layers.

    They are no parameters themselves: scales and code tables (``quant_state``), and the 8-bit
    weights that a layer's matmul keeps to itself (``state``).
    """
    holders = [*module.parameters(), *(getattr(m, "state", None) for m in module.modules())]
    for holder in holders:
        quant_state = getattr(holder, "quant_state", None)
        nested = getattr(quant_state, "state2", None)
        for owner, names in (
            (holder, ("CB", "SCB")),
            (quant_state, ("absmax", "code", "offset")),
            (nested, ("absmax", "code")),
        ):
            found = (getattr(owner, name, None) for name in names)
            yield from (tensor for tensor in found if hasattr(tensor, "untyped_storage"))


def release_quantized(module: Any) -> None:
    """Drop what `quantized_tensors` gives."""
    for tensor in module.parameters():
        for name in ("quant_state", "CB", "SCB"):
            if getattr(tensor, name, None) is not None:
                setattr(tensor, name, None)
    for layer in module.modules():
        if getattr(layer, "quant_state", None) is not None:
            layer.quant_state = None
        if hasattr(getattr(layer, "state", None), "CB"):
            layer.state = type(layer.state)()
