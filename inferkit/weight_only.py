"""Weight-only quantization on a CPU: int8wo and int4wo, with the kernels that torch brings.

Linear layers keep their weight in 8 or 4 bits, the output embeddings' too, and what flows between
the layers stays in the model's dtype. The kernels are torch's ``_weight_int8pack_mm`` and
``_weight_int4pack_mm_for_cpu``, which torchao uses as well.

The kernels compute in bf16. There is an fp32 variant of each, but it is a scalar loop, ten times
slower than a plain fp32 product; so the input of a layer is rounded to bf16, sums are taken in
fp32, and the output is rounded to bf16, whatever the model's dtype and however many rows there
are. That costs little beside the rounding of the weights: of Gemma 3 270M in fp32 it moves the KL
divergence of int8wo from 0.0047 to 0.0052 nats per token, and that of int4wo by less than 0.001.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from inferkit.packing import plain_linear
from inferkit.tiled import ALIGN, by_tiles, tiles

__all__ = ["MODES", "WeightOnlyLinear", "fits", "linear_shape", "packed_bytes", "quantize_linear"]
__all__ += ["empty_linear"]

MODES = ("int8wo", "int4wo")
GROUP = 32  # weights of a row that share scale and zero in int4: the finest that the kernel takes
_STEP = 16  # weights that the int8 kernel reads at once under AVX-512; AVX2 reads 8
_INT4_ROWS = 16  # rows that the int4 kernel packs together at least


class WeightOnlyLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` on a CPU, with its weight in fewer bits.

    It has no ``weight``: a model whose code reads that cannot run on it.

    For many rows, as in prefill, the kernels lose against tiles in fp32 (:mod:`inferkit.tiled`).
    Measured for [2048, 640] on an AMD EPYC under AVX2, one thread, torch 2.13, in ms by rows of the
    input (the plain product in fp32 and bf16 beside it; with [262144, 640] it is the same
    picture)::

                   1     8    16    32    64   512
        fp32     0.2   0.7   1.8   2.2   4.1    23
        bf16     0.4   2.8   5.5   9.3    21   149
        int8     0.2   0.7   1.1   2.6   6.0    35   kernel
                 0.6   1.0   1.2   2.4   3.6    19   tiles
        int4     0.2   0.8   2.1   3.4   6.7    42   kernel
                 3.0   3.9   3.1   3.5   6.4    22   tiles

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        packed: The weight in fewer bits.
        scales: What brings them back, in bf16.
        bias: [out_features], or None.
    """

    mode: str
    """What the library's users call it."""

    many: int
    """Rows of the input from which on the weight is unpacked."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        packed, scales = self._quantized(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in_features] times the weight's transpose, plus the bias."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        if self._unpacks(rows.shape[0]):
            product = by_tiles(rows, self.out_features, self._unpacked)
        else:
            product = self._by_kernel(rows)
        product = product.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """As ``nn.Linear`` tells it."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _unpacks(self, rows: int) -> bool:
        return rows >= self.many

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """The product of bf16 rows [n, in_features], in bf16."""
        raise NotImplementedError

    def _unpacked(self, tile: slice) -> torch.Tensor:
        """Some rows of the weight [rows, in_features], in fp32."""
        raise NotImplementedError

    @staticmethod
    def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``packed`` and ``scales`` of a weight [out_features, in_features]."""
        raise NotImplementedError


class Int8Linear(WeightOnlyLinear):
    """Symmetric int8 [out_features, in_features], with a scale for each row [out_features]."""

    mode = "int8wo"
    many = 32

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)

    def _unpacked(self, tile: slice) -> torch.Tensor:
        return self.packed[tile].float().mul_(self.scales[tile].float()[:, None])

    @staticmethod
    def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = weight.shape
        packed = torch.empty(rows, columns, dtype=torch.int8)
        scales = torch.empty(rows, dtype=torch.bfloat16)
        for tile in tiles(rows, columns):
            part = weight[tile].float()
            scales[tile] = _scale(part.abs().amax(1) / 127)
            packed[tile] = (part / scales[tile].float()[:, None]).round_().clamp_(-127, 127)
        return packed, scales


class Int4Linear(WeightOnlyLinear):
    """Asymmetric int4, in groups of ``GROUP`` weights of a row.

    ``packed`` is [out_features, in_features / 2] bytes in the kernel's own order, ``scales``
    [in_features / GROUP, out_features, 2]: a number q of 0 to 15 stands for
    ``(q - 8) * scale + zero``.
    """

    mode = "int4wo"
    many = 128

    def _unpacks(self, rows: int) -> bool:
        half = _half_block()
        return super()._unpacks(rows) and bool(half) and self.out_features % (2 * half) == 0

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        return kernel(rows, self.packed, GROUP, self.scales)

    def _unpacked(self, tile: slice) -> torch.Tensor:
        numbers = _int4_numbers(self.packed[tile], _half_block())  # [in_features, rows]
        scale, zero = self.scales[:, tile].float().unbind(-1)
        grouped = numbers.unflatten(0, (-1, GROUP)).float()
        weight = grouped.sub_(8).mul_(scale[:, None]).add_(zero[:, None])
        return weight.flatten(0, 1).T

    @staticmethod
    def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = weight.shape
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scales = torch.empty(columns // GROUP, rows, 2, dtype=torch.bfloat16)
        for tile in tiles(rows, columns):
            groups = weight[tile].float().unflatten(1, (-1, GROUP))
            low, high = groups.aminmax(dim=2)
            # Rounded before the weights are: these make good for it.
            scale = _scale((high - low) / 15)
            zero = (low + 8 * scale.float()).bfloat16()
            numbers = (groups - zero.float()[..., None]).div_(scale.float()[..., None])
            numbers = numbers.round_().add_(8).clamp_(0, 15).flatten(1).int()
            packed[tile] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
            scales[:, tile] = torch.stack([scale.T, zero.T], dim=2)
        return packed, scales


_KINDS: dict[str, type[WeightOnlyLinear]] = {k.mode: k for k in (Int8Linear, Int4Linear)}


def quantize_linear(mode: str, child: nn.Module) -> WeightOnlyLinear:
    """A quantized layer that computes what a layer with a `linear_shape` does."""
    return _KINDS[mode](_matrix(child).detach(), child.bias)  # type: ignore[arg-type]


def empty_linear(mode: str, child: nn.Module) -> WeightOnlyLinear:
    """What `quantize_linear` gives, without a weight, to trace a step of few rows with.

    ``packed`` and ``scales`` are empty buffers, to be replaced.
    """
    shape = linear_shape(child)
    assert shape is not None, "no linear layer"
    made = _KINDS[mode].__new__(_KINDS[mode])
    nn.Module.__init__(made)
    made.out_features, made.in_features = shape
    made.bias = child.bias  # type: ignore[assignment]
    made.register_buffer("packed", torch.empty(0))
    made.register_buffer("scales", torch.empty(0))
    made._unpacks = lambda rows: False  # type: ignore[method-assign]
    return made


def linear_shape(child: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a plain ``nn.Linear`` or GPT-2's ``Conv1D``; else None."""
    from transformers.pytorch_utils import Conv1D

    if not (plain_linear(child) or type(child) is Conv1D):
        return None
    rows, columns = _matrix(child).shape
    return rows, columns


def fits(mode: str, rows: int, columns: int) -> bool:
    """Whether the mode's kernel takes a weight [rows, columns].

    The int4 kernel says what it wants. The one of int8 reads past the end of rows that do not
    divide by the width of a vector, gives wrong products, and crashes at times.
    """
    if mode == "int8wo":
        return columns % _STEP == 0
    return rows % _INT4_ROWS == 0 and columns % GROUP == 0


def packed_bytes(mode: str, rows: int, columns: int) -> int:
    """Bytes of a quantized weight [rows, columns] with its scales."""
    if mode == "int8wo":
        return rows * columns + 2 * rows
    return rows * columns // 2 + 2 * 2 * rows * columns // GROUP


def _matrix(child: nn.Module) -> torch.Tensor:
    """The weight [out_features, in_features]; a ``Conv1D`` has it the other way round."""
    weight: torch.Tensor = child.weight  # type: ignore[assignment]
    return weight if isinstance(child, nn.Linear) else weight.T


def _scale(scale: torch.Tensor) -> torch.Tensor:
    """The scale that is kept: in bf16, and not 0 where all weights are equal."""
    return scale.clamp_min(1e-12).bfloat16()


def _int4_numbers(packed: torch.Tensor, half: int) -> torch.Tensor:
    """The numbers [columns, rows] that int4 bytes [rows, columns / 2] stand for.

    A block of ``2 * half`` rows is packed column by column: the low bits have its first rows, the
    high bits the others.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    blocks = packed.view(-1, columns, half)
    both = torch.stack([blocks & 15, blocks >> 4], dim=2)  # [blocks, columns, 2, half]
    return both.transpose(0, 1).reshape(columns, rows)


@functools.cache
def _half_block() -> int:
    """Half the rows of a block in torch's int4 layout on this CPU; 0 where it is another layout.

    It depends on the CPU and is documented nowhere, so that it is tried out.
    """
    numbers = (torch.arange(4 * ALIGN * GROUP).reshape(-1, GROUP) * 7 % 16).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    for half in (32, 16):
        if torch.equal(_int4_numbers(packed, half).T.int(), numbers):
            return half
    return 0
