"""Small checkpoints that are stored quantized, as the tools that make such ones leave them.

compressed-tensors writes its own. GPTQ, AWQ and fp8 are written here tensor by tensor, rounded to
the nearest, for the libraries that make them need a GPU or torch versions of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import torch
from safetensors.torch import save_file

GROUP = 32
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def compressed(folder: Path, bits: int, *, activations: bool = False) -> Path:
    """A llama of compressed-tensors: int8 per channel or int4 per group of 32."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model, tokenizer = architectures.build("llama")
    group = GROUP if bits == 4 else None
    name = "pack-quantized" if bits == 4 else "int-quantized"
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=bits, strategy="group" if group else "channel", group_size=group
        ),
        input_activations=QuantizationArgs(strategy="token", dynamic=True) if activations else None,
        format=name,
    )
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=name)
    apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            rows = layer.weight.shape[0]
            largest = layer.weight.reshape(rows, -1, group or layer.in_features).abs().amax(-1)
            layer.weight_scale.data = largest / (2 ** (bits - 1) - 1)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gptq(folder: Path) -> Path:
    """A llama of 4-bit GPTQ, in its first format (a zero point is one more than it says)."""

    def layer(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        whole, scales = _rounded(weight)
        zeros = torch.full(scales.shape, 7)
        return {
            f"{name}.qweight": _packed(whole),
            f"{name}.qzeros": _packed(zeros.T).T.contiguous(),
            f"{name}.scales": scales,
            f"{name}.g_idx": (torch.arange(len(whole)) // GROUP).int(),
        }

    said = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    return _written(folder, layer, {"quant_method": "gptq", "checkpoint_format": "gptq", **said})


def awq(folder: Path) -> Path:
    """A llama of 4-bit AWQ, in the layout of its GEMM kernel."""

    def packed(whole: torch.Tensor) -> torch.Tensor:
        mixed = whole.reshape(len(whole), -1, 8)[:, :, _AWQ_ORDER].flatten(1)
        return _packed(mixed.T).T.contiguous()

    def layer(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        whole, scales = _rounded(weight)
        zeros = torch.full(scales.shape, 8)
        return {
            f"{name}.qweight": packed(whole),
            f"{name}.qzeros": packed(zeros),
            f"{name}.scales": scales,
        }

    said = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _written(folder, layer, {"quant_method": "awq", **said})


def fp8(folder: Path) -> Path:
    """A llama of fp8 in blocks, as DeepSeek-V3 and Qwen3 are published."""

    def layer(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        blocks = weight.reshape(rows // GROUP, GROUP, columns // GROUP, GROUP)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        small = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        return {
            f"{name}.weight": small.to(torch.float8_e4m3fn),
            f"{name}.weight_scale_inv": scales,
        }

    said = {"activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]}
    return _written(folder, layer, {"quant_method": "fp8", **said})


def bitsandbytes(folder: Path, **said: Any) -> Path:
    """A llama as bitsandbytes quantizes and transformers saves it."""
    import transformers

    plain = architectures.save("llama", folder.with_name(f"{folder.name}-plain"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=transformers.BitsAndBytesConfig(**said),
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder)
    architectures.tokenizer().save_pretrained(folder)
    return folder


def described(folder: Path, quantization_config: dict[str, Any]) -> Path:
    """A llama whose config says how it is stored, and that has no weights at all."""
    architectures.save("llama", folder)
    (folder / "model.safetensors").unlink()
    _say(folder, quantization_config)
    return folder


def _written(
    folder: Path,
    layer: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    quantization_config: dict[str, Any],
) -> Path:
    architectures.save("llama", folder)
    model, _ = architectures.build("llama")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            tensors |= layer(name.removesuffix(".weight"), tensor)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _say(folder, quantization_config)
    return folder


def _say(folder: Path, quantization_config: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantization_config}))


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as numbers of 0 to 15 [in, out], and scales [groups, out] around 8."""
    grouped = weight.T.reshape(-1, GROUP, len(weight))
    scales = grouped.abs().amax(1) / 7
    whole = (grouped / scales[:, None]).round().add(8).clamp(0, 15)
    return whole.flatten(0, 1).long(), scales.half()


def _packed(whole: torch.Tensor) -> torch.Tensor:
    """Eight rows of 4-bit numbers in one row of int32, the first one lowest."""
    eights = whole.reshape(-1, 8, whole.shape[1])
    made = sum(eights[:, i] << (4 * i) for i in range(8))
    return torch.where(made >= 2**31, made - 2**32, made).int().contiguous()
