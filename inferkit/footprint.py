"""What an architecture takes in memory, read off its modules on the meta device.

The meta device has shapes and dtypes but no storage, so a model of any size is built in a second
and nothing is allocated or downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from inferkit.devices import dtype_name, runners
from inferkit.errors import OptionError, UnsupportedModelError
from inferkit.exclusive import alone
from inferkit.html import listed

__all__ = [
    "QUANTIZE_MODES",
    "WeightFormat",
    "asked_format",
    "check_mode_runs",
    "kept_in_fp32",
    "meta_model",
    "modes_on",
    "packed_growth",
    "quantization_config",
    "quantized_linears",
    "stored_format",
    "tensors",
    "weight_bytes",
    "weight_format",
]

QUANTIZE_MODES = ("none", "int8", "nf4", "fp4", "int8wo", "int4wo")
_BITSANDBYTES = ("int8", "nf4", "fp4")
_FOUR_BIT = ("nf4", "fp4")
_WEIGHT_ONLY = ("int8wo", "int4wo")
_BLOCK = 64  # weights that share one scale in bitsandbytes' 4-bit formats
_NESTED_BLOCK = 256  # scales that share one scale of their own under double quantization
_CODE_BYTES = 16 * 4  # each 4-bit layer holds its own table of the 16 values, in fp32


@dataclass(frozen=True)
class WeightFormat:
    """How weights are kept: a quantize mode and its details.

    Attributes:
        mode: One of ``QUANTIZE_MODES``; or transformers' name of the method ("gptq", for one) that
            a checkpoint is stored in.
        double_quant: Whether the scales of a 4-bit format are quantized again.
        compute_dtype: torch's name of the dtype that 4-bit weights are unpacked to for each matmul;
            None for the dtype of the model.
        skip: Modules that stay as they are; None for transformers' own choice.
        stored: Whether the checkpoint is stored so, and has no other weights to be read.
    """

    mode: str
    double_quant: bool = False
    compute_dtype: str | None = None
    skip: tuple[str, ...] | None = None
    stored: bool = False

    def __str__(self) -> str:
        details = ["double_quant=True"] if self.double_quant else []
        details += [f"compute_dtype={self.compute_dtype}"] if self.compute_dtype else []
        return ", ".join([self.mode, *details])

    @property
    def weight_only(self) -> bool:
        """Whether torch's own kernels run it, on a CPU: see :mod:`inferkit.weight_only`."""
        return self.mode in _WEIGHT_ONLY

    def covers(self, asked: WeightFormat) -> bool:
        """Whether this, which is stored, is what is asked for."""
        return asked in (self, WeightFormat(self.mode), WeightFormat(self.mode, self.double_quant))

    def linear_bytes(self, rows: int, columns: int) -> int:
        """Bytes that are kept for one quantized ``[rows, columns]`` weight, its scales included."""
        if self.weight_only:
            from inferkit.weight_only import packed_bytes

            return packed_bytes(self.mode, rows, columns)
        count = rows * columns
        if self.mode == "int8":
            return count + 4 * rows  # one fp32 scale per output row
        blocks = -(-count // _BLOCK)
        scales = 4 * blocks
        if self.double_quant:  # scales in 8 bits, their fp32 scales, an offset, a table of 256
            scales = blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 + 256 * 4
        return -(-count // 2) + scales + _CODE_BYTES


def asked_format(
    quantize: Any, double_quant: Any = False, compute_dtype: Any = "auto"
) -> WeightFormat:
    """The format that a person asks for.

    Raises:
        OptionError: The mode is unknown, or has no such detail.
    """
    if quantize not in QUANTIZE_MODES:
        raise OptionError(
            f"quantize={quantize!r} is unknown: choose one of {listed(QUANTIZE_MODES)}."
        )
    if not isinstance(double_quant, bool):
        raise OptionError(f"double_quant={double_quant!r} must be True or False.")
    dtype = None if compute_dtype in ("auto", None) else dtype_name(compute_dtype, "compute_dtype")
    given = [n for n, v in (("double_quant", double_quant), ("compute_dtype", dtype)) if v]
    if given and quantize not in _FOUR_BIT:
        raise OptionError(
            f"{given[0]} is a detail of the 4-bit modes of bitsandbytes, and "
            f"quantize={quantize!r} has none: leave it out, or choose one of {listed(_FOUR_BIT)}."
        )
    return WeightFormat(quantize, double_quant, dtype)


def modes_on(devices: Sequence[str]) -> tuple[str, ...]:
    """The quantize modes that run on these devices."""
    if runners(devices) == ("cpu",):
        return QUANTIZE_MODES
    return tuple(mode for mode in QUANTIZE_MODES if mode not in _WEIGHT_ONLY)


def check_mode_runs(form: WeightFormat, devices: Sequence[str]) -> None:
    """Refuse a mode whose kernels these devices do not have.

    Raises:
        OptionError: It is for CPUs alone, and other devices run layers.
    """
    if form.weight_only and form.mode not in modes_on(devices):
        instead = {"int8wo": "int8", "int4wo": "nf4"}[form.mode]
        raise OptionError(
            f"quantize={form.mode!r} has kernels for a CPU alone, and the layers are to run on "
            f"{', '.join(runners(devices))}: use quantize={instead!r} there, or device='cpu'."
        )


def quantization_config(config: Any) -> Any:
    """What a config says of how the weights are stored: a dict or an object; None where plain."""
    text = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None)
    return getattr(text, "quantization_config", None) if found is None else found


def stored_format(config: Any) -> WeightFormat | None:
    """The format that a checkpoint is stored in; None where it is not quantized."""
    stored = quantization_config(config)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = settings.get("quant_method", "unknown")
    method = str(getattr(method, "value", method))  # an enum where a library made the config
    four_bit = bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
    eight_bit = bool(settings.get("load_in_8bit") or settings.get("_load_in_8bit"))
    if not (four_bit or eight_bit or "bitsandbytes" in method):
        return WeightFormat(method, stored=True)
    mode = str(settings.get("bnb_4bit_quant_type", "fp4")) if four_bit else "int8"
    skip = settings.get("llm_int8_skip_modules")
    double = four_bit and bool(settings.get("bnb_4bit_use_double_quant"))
    return WeightFormat(mode, double, skip=None if skip is None else tuple(skip), stored=True)


def weight_format(config: Any, asked: WeightFormat) -> WeightFormat:
    """The format that loading ``config`` gives where ``asked`` is asked for.

    A checkpoint that is stored quantized keeps its own.

    Raises:
        OptionError: The checkpoint is stored quantized, in another format.
    """
    stored = stored_format(config)
    if stored is None:
        return asked
    if asked.mode != "none" and not stored.covers(asked):
        raise OptionError(
            f"quantize={str(asked)!r}, but the checkpoint is stored quantized, as "
            f"{str(stored)!r}, and its original weights are not there to be read. Use "
            "quantize='none' to load it as it is, or load the unquantized checkpoint."
        )
    return stored


def meta_model(config: Any, dtype: str, trust_remote_code: bool = False) -> Any:
    """Build the architecture on the meta device: a ``PreTrainedModel`` without storage.

    Args:
        config: A transformers config; it is copied, not changed.
        dtype: torch's name of the dtype to load in, ``"bfloat16"`` for example.
        trust_remote_code: Let the config's repository bring its own model code.

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(config, "model_type", "") or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind!r} is an encoder-decoder model; inferkit serves decoder-only causal language "
            "models (Llama, Qwen, Gemma, Mistral, Phi, GPT and the like)."
        )
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # stored.laid_out() accounts for it
    try:
        with alone(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",  # plain operations: runs on meta for every model
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a config of any origin may fail in any way
        hint = "" if trust_remote_code else " If the model brings its own code, and you trust it, "
        hint += "" if trust_remote_code else "pass trust_remote_code=True."
        raise UnsupportedModelError(
            f"transformers cannot build a causal language model from this {kind!r} config: "
            f"{type(error).__name__}: {error}.{hint}"
        ) from error
    # The default kernels of mixture-of-experts layers group tokens by value, which meta has not.
    model.set_experts_implementation("batched_mm")
    model.config.pad_token_id = None  # some models look for padding by value to warn of it
    return model.eval()


def quantized_linears(model: Any, form: WeightFormat) -> dict[str, tuple[int, int]]:
    """The modules that are replaced by quantized ones, with ``(out_features, in_features)``.

    These are plain ``nn.Linear`` and GPT-2's ``Conv1D``. bitsandbytes' modes leave out what
    transformers leaves alone (output embeddings, tied weights, the last module), the weight-only
    modes what their kernels do not take. Experts that an architecture fuses into one 3-D parameter
    are no linear layers and stay in the dtype.
    """
    if form.weight_only:
        return _weight_only_linears(model, form.mode)
    if form.mode not in _BITSANDBYTES:
        return {}
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = HfQuantizer.get_modules_to_not_convert(
        model, None if form.skip is None else list(form.skip), model._keep_in_fp32_modules
    )
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if not should_convert_module(name, skip):
            continue
        if type(module) is nn.Linear:
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    return found


def _weight_only_linears(model: Any, mode: str) -> dict[str, tuple[int, int]]:
    from inferkit.weight_only import fits, linear_shape

    in_fp32 = kept_in_fp32(model)
    shapes = {name: linear_shape(module) for name, module in model.named_modules()}
    return {
        name: shape
        for name, shape in shapes.items()
        if shape is not None and fits(mode, *shape) and not in_fp32(f"{name}.weight")
    }


def weight_bytes(model: Any, form: WeightFormat) -> dict[str, int]:
    """Bytes of each parameter and buffer once loaded; tied weights appear once, unquantized."""
    embeddings = model.get_input_embeddings().weight
    quantized = quantized_linears(model, form)
    in_fp32 = kept_in_fp32(model)
    sizes: dict[str, int] = {}
    for name, tensor in tensors(model):
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in quantized and tensor is not embeddings:
            sizes[name] = form.linear_bytes(*quantized[owner])
        elif in_fp32(name):
            sizes[name] = tensor.numel() * 4
        else:
            sizes[name] = tensor.numel() * tensor.element_size()
    return sizes


def packed_growth(model: Any, form: WeightFormat) -> dict[str, int]:
    """Bytes that packing adds on a CPU, by module name (see :mod:`inferkit.packing`).

    Whole blocks take a little more than a matrix that does not divide by them. A matrix that is
    the input embeddings' too has a packed copy beside it, or a quantized one.
    """
    from inferkit.packing import packable, packed_bytes, plain_linear

    quantized, in_fp32 = quantized_linears(model, form), kept_in_fp32(model)
    embeddings = model.get_input_embeddings().weight
    growth = {
        name: form.linear_bytes(*shape)
        for name, shape in quantized.items()
        if model.get_submodule(name).weight is embeddings
    }
    if not packable("cpu", str(model.dtype).removeprefix("torch.")):
        return growth
    for name, module in model.named_modules():
        if not plain_linear(module) or name in quantized or in_fp32(f"{name}.weight"):
            continue
        plain = 0 if module.weight is embeddings else module.weight.nbytes
        growth[name] = packed_bytes(*module.weight.shape) - plain
    return growth


def tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers with their names; tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def kept_in_fp32(model: Any) -> Callable[[str], bool]:
    """A predicate: whether from_pretrained loads this tensor in fp32 whatever the dtype."""
    from transformers.core_model_loading import build_glob_alternation

    patterns = list(model._get_dtype_plan(model.dtype))
    if not patterns:
        return lambda name: False
    alternation, *_ = build_glob_alternation(patterns)
    return lambda name: alternation.search(name) is not None
