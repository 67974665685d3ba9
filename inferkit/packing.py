"""Weights laid out for the CPU's matrix kernels, once, while a model loads.

bf16 matrices are multiplied in blocks of 64 rows of interleaved pairs, by :mod:`inferkit.kernels`
or else by oneDNN. Given a plain matrix, oneDNN lays the blocks out anew at every call, which takes
longer than the multiplication where few rows are multiplied: a decode step of a small batch is
twice as fast over packed weights. The packed weights take the plain ones' place, so memory is the
same; but output embeddings that share their matrix with the input embeddings need a packed copy
beside it. Only bf16 gains by this.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import nn

from inferkit import kernels
from inferkit.progress import Progress, bar

__all__ = ["PackedLinear", "limit_kernels", "pack_linears", "packable", "packed_bytes"]
__all__ += ["plain_linear", "product", "release_packed"]


class PackedLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` in bf16 on a CPU, with the same results but for rounding.

    A model whose code reads ``weight`` (a state-space layer, say) gets it: from then on the layer
    is a plain one.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: [out_features], or None.
        own: Whether :mod:`inferkit.kernels` multiplies it; else oneDNN does.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.plain: nn.Parameter | None
        self.register_parameter("plain", None)
        # No parameter: most of what torch does with one (its storage, its address) has no meaning
        # for packed weights.
        weight = linear.weight.detach()
        operands = [weight] if self.bias is None else [weight, self.bias]
        self.own = self.in_features % 2 == 0 and kernels.serves(*operands)
        self._packed: Any = (
            kernels.pack(weight) if self.own else torch.ops.mkldnn._reorder_linear_weight(weight)
        )

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight [out_features, in_features], unpacked; None once it was released."""
        if self._packed is not None:
            plain = (
                kernels.unpack(self._packed, self.out_features)
                if self.own
                else self._packed.to_dense()
            )
            self.plain = nn.Parameter(plain, requires_grad=False)
            self._packed = None
        return self.plain

    @property
    def packed(self) -> Any:
        """The packed weight, for `product`; None once unpacked or released."""
        return self._packed

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight."""
        if self._packed is None:
            return 0
        return self._packed.nbytes if self.own else int(torch.ops.mkldnn._nbytes(self._packed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in_features] times the weight's transpose, plus the bias."""
        if self._packed is None:
            assert self.plain is not None, "the weight was released"
            return nn.functional.linear(x, self.plain, self.bias)
        return product(x, self._packed, self.bias, self.out_features, self.own)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` tells it."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def release(self) -> None:
        """Give the packed weight's memory back."""
        self._packed = None


def product(
    x: torch.Tensor, packed: Any, bias: torch.Tensor | None, out_features: int, own: bool
) -> torch.Tensor:
    """``x`` times a packed weight's transpose: see `PackedLinear`."""
    made: torch.Tensor
    if own:
        made = torch.ops.inferkit.packed_linear(x.contiguous(), packed, bias, out_features)
    else:
        made = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return made


def packable(device: str, dtype: str) -> bool:
    """Whether linear layers on this device and in this dtype are packed."""
    if device != "cpu" or dtype != "bfloat16" or not torch.backends.mkldnn.is_available():
        return False
    with contextlib.suppress(AttributeError, RuntimeError):  # a torch built without them
        return bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and torch.ops.mkldnn._linear_pointwise
            and torch.ops.mkldnn._reorder_linear_weight
        )
    return False


def packed_bytes(rows: int, columns: int) -> int:
    """Bytes of a packed bf16 weight [rows, columns] at most: whole blocks of 64 by 32."""
    return 2 * (-(-rows // 64) * 64) * (-(-columns // 32) * 32)


def limit_kernels() -> None:
    """Have oneDNN keep 512 compiled kernels instead of 1024, unless it has begun or was told.

    It compiles one for each number of rows that a layer ever multiplies and keeps some 0.4 MB for
    each. With the widths that the engine gives its passes, 512 are enough.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


def pack_linears(module: nn.Module, *, progress: Progress = False) -> None:
    """Replace a model's plain linear layers, where that pays; quantized ones are of other types."""
    chosen = [(name, child) for name, child in module.named_modules() if _pays(child)]
    if not chosen:
        return
    for name, child in bar(progress, "Packing weights", steps=chosen, delay=1, leave=False):
        module.set_submodule(name, PackedLinear(child))
        child.weight = None


def plain_linear(child: nn.Module) -> bool:
    """Whether a module computes what an ``nn.Linear`` does and no more.

    A hook that moves a layer's weights about, or compressed-tensors where a layer's input is to be
    rounded, has put another ``forward`` in the place of the class's.
    """
    if type(child) is not nn.Linear:
        return False
    return getattr(child.forward, "__func__", None) is nn.Linear.forward


def _pays(child: nn.Module) -> bool:
    if not plain_linear(child):
        return False
    weight: torch.Tensor = child.weight  # type: ignore[assignment]
    return packable(weight.device.type, str(weight.dtype).removeprefix("torch."))


def release_packed(module: nn.Module) -> None:
    """Give back the memory of all packed layers in a model."""
    for child in module.modules():
        if isinstance(child, PackedLinear):
            child.release()
