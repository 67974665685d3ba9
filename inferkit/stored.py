"""Checkpoints that are stored quantized: GPTQ, AWQ, compressed-tensors and what else there is.

Which packages and devices a method needs, and which layers it puts in the place of which, is asked
of transformers' own quantizer of that method. No list of methods is kept here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from inferkit.devices import dtype_name
from inferkit.errors import UnsupportedModelError, first_line
from inferkit.footprint import (
    QUANTIZE_MODES,
    kept_in_fp32,
    meta_model,
    quantization_config,
    stored_format,
)

__all__ = ["check_stored", "finish", "laid_out"]


def check_stored(config: Any, devices: Sequence[str], dtype: str) -> str:
    """Check that a checkpoint that is stored quantized can be loaded; the dtype that it runs in.

    That is the one given, but where the method's kernels know another one only.

    Raises:
        UnsupportedModelError: transformers does not know the method, lacks a package for it, or
            cannot run it on these devices; the message has transformers' own words.
    """
    import torch

    chosen = _quantizer(config, devices).update_dtype(getattr(torch, dtype))
    return dtype_name(chosen, "dtype")


def laid_out(meta: Any, config: Any, devices: Sequence[str]) -> tuple[Any, str]:
    """A meta model with the layers that the checkpoint has once it is loaded, and a note or "".

    Where they cannot be known it is the model itself, unpacked; the note says so.
    """
    form = stored_format(config)
    if form is None or form.mode in QUANTIZE_MODES:  # bitsandbytes: see WeightFormat.linear_bytes
        return meta, ""
    begins = f"The checkpoint is stored as {form.mode}"
    bound = "its weights are counted unpacked, an upper bound"
    try:
        quantizer = _quantizer(config, devices)
        if _unpacks(quantizer):
            where = ", ".join(devices)
            return meta, f"{begins}, which is unpacked on {where}: it saves no memory there."
        return _converted(meta, quantizer, devices), ""
    except UnsupportedModelError as error:
        return meta, f"{begins}; {bound}. It cannot be loaded here: {_words(error.__cause__)}"
    except Exception as error:  # a package that the method brings may fail in any way
        return meta, f"{begins}; {bound}. ({_words(error)})"


def finish(module: Any, dtype: str, trust_remote_code: bool = False) -> None:
    """Bring a stored checkpoint that transformers has read to the state that it runs in.

    What compressed-tensors would unpack when a layer first runs is unpacked now, so that the
    weights take from the start what they take in the end, and no first token waits for them. And
    the weights that are not quantized, or are unpacked, get the ``dtype``: of some methods (fp8 on
    a CPU, bitsandbytes) transformers leaves them in that of the file.
    """
    import torch

    if hasattr(module, "ct_decompress_hook"):
        _decompress(module)
    plain = dict(meta_model(module.config, dtype, trust_remote_code).named_parameters())
    in_fp32, wanted = kept_in_fp32(module), getattr(torch, dtype)
    for name, weight in module.named_parameters():
        whole = weight.is_floating_point() and weight.itemsize > 1  # else it is fp8
        if whole and name in plain and not in_fp32(name):
            weight.data = weight.data.to(wanted)


def _decompress(module: Any) -> None:
    from compressed_tensors.compressors import decompress_module

    compressor = module.hf_quantizer.compressor
    for layer in module.modules():
        scheme = getattr(layer, "quantization_scheme", None)
        rounds = scheme is not None and (scheme.input_activations or scheme.output_activations)
        # Else it is a plain layer again; where accelerate has wrapped it, that would undo too much.
        stays = bool(rounds) or hasattr(layer, "_hf_hook")
        decompress_module(layer, compressor.force_compression_format, leave_decompressed=stays)
    compressor.remove_decompression_hook(module)


def _quantizer(config: Any, devices: Sequence[str]) -> Any:
    """A stored checkpoint's quantizer of transformers, which agreed to run on these devices."""
    from transformers.quantizers import AutoHfQuantizer

    settings = copy.deepcopy(quantization_config(config))
    try:
        made = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        made.validate_environment(device_map=_device_map(devices), weights_only=True)
    except Exception as error:  # it raises what it likes: ImportError, RuntimeError, ValueError
        form = stored_format(config)
        raise UnsupportedModelError(
            f"The checkpoint is stored as {form}, and transformers cannot load that on "
            f"{', '.join(devices)} here: {_words(error)} Or load the unquantized checkpoint."
        ) from error
    return made


def _device_map(devices: Sequence[str]) -> dict[str, str]:
    """A map that names just these devices, which is all that a quantizer looks at."""
    if len(devices) == 1:
        return {"": devices[0]}
    return {str(index): name for index, name in enumerate(devices)}


def _unpacks(quantizer: Any) -> bool:
    """Whether the weights end up in the model's dtype: no kernel runs them as they are stored."""
    method = str(getattr(quantizer.quantization_config.quant_method, "value", ""))
    dequantized = getattr(quantizer.quantization_config, "dequantize", False)
    return bool(dequantized) or method == "compressed-tensors"


def _converted(meta: Any, quantizer: Any, devices: Sequence[str]) -> Any:
    import torch

    made = copy.deepcopy(meta)
    made.config.quantization_config = quantizer.quantization_config
    with torch.device("meta"):
        quantizer.preprocess_model(
            model=made,
            dtype=meta.dtype,
            device_map=_device_map(devices),
            checkpoint_files=None,
            use_kernels=False,
        )
    return made


def _words(error: BaseException | None) -> str:
    line = first_line(error)
    return line if line.endswith((".", "!", "?")) else f"{line}."
