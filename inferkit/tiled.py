"""Products with a weight that becomes fp32 a tile at a time, on a CPU without better kernels.

A processor without instructions for a weight's numbers multiplies them one by one. Where there are
several rows to multiply, it is faster to turn a tile of the weight into fp32, which stays in the
cache, and to multiply that. Sums are taken in fp32, and the product is rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from inferkit.packing import packable, plain_linear

__all__ = ["ALIGN", "TILE", "TiledLinear", "by_tiles", "scratch_bytes", "tile_linears", "tileable"]
__all__ += ["tiles"]

TILE = 1 << 20  # weights that are unpacked at once: 4 MiB in fp32, which stay in the cache
ALIGN = 64  # the rows of a tile divide by this, so that it holds whole blocks of a packed layout


class TiledLinear(nn.Linear):
    """An ``nn.Linear`` in 16 bits on a CPU that multiplies no such numbers natively.

    The weight stays as it is. Measured for [2048, 640] and for [262144, 640] on an AMD EPYC under
    AVX2, one thread, torch 2.13, in ms by rows of the input (fp32 is that of a model in fp32)::

                            1     2     4     8    16    64   512
        fp32              0.2   0.4   0.6   0.8   1.2   3.1    20
        bf16, plain       0.3   0.7   1.1   2.8   5.5    18   146
        bf16, tiles       0.6   0.8   0.8   1.2   1.1   2.9    22

        fp32               68   160   255   293   366
        bf16, plain        44    77   146   304   643
        bf16, tiles        86   110   163   157   193
    """

    MANY = 8
    """Rows of the input from which on the weight is taken by tiles.

    Fewer gain little, and lose where others use the processors: at the end of each tile all threads
    wait for the last one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in_features] times the weight's transpose, plus the bias."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) < self.MANY:
            return super().forward(x)
        product = by_tiles(rows, self.out_features, lambda tile: self.weight[tile].float())
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def tileable(device: str, dtype: str) -> bool:
    """Whether linear layers on this device and in this dtype are multiplied by tiles."""
    if device != "cpu" or dtype not in ("bfloat16", "float16") or packable(device, dtype):
        return False
    with contextlib.suppress(AttributeError, RuntimeError):  # a torch built without oneDNN
        return not (dtype == "float16" and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def tile_linears(module: nn.Module) -> None:
    """Have a model's plain linear layers multiplied by tiles, where that pays."""
    for child in module.modules():
        if _pays(child):
            child.__class__ = TiledLinear  # tied weights and all else stay as they are


def _pays(child: nn.Module) -> bool:
    if not plain_linear(child):
        return False
    weight: torch.Tensor = child.weight  # type: ignore[assignment]
    return tileable(weight.device.type, str(weight.dtype).removeprefix("torch."))


def by_tiles(
    rows: torch.Tensor, out_features: int, unpacked: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """Rows [n, in_features] times a weight's transpose: [n, out_features], in the rows' dtype.

    ``unpacked`` gives some rows of the weight [rows, in_features] in fp32.
    """
    product = rows.new_empty(len(rows), out_features)
    wide = rows.float()
    for tile in tiles(out_features, rows.shape[1]):
        product[:, tile] = wide @ unpacked(tile).T
    return product


def tiles(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a weight [rows, columns], a tile at a time."""
    step = max(ALIGN, TILE // columns // ALIGN * ALIGN)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scratch_bytes(weights: int) -> int:
    """Bytes beside input and output while a layer of so many weights runs: a tile, unpacked."""
    return 8 * min(weights, TILE)  # in fp32, and int4's bytes on the way there
