"""The attention function that the engine registers with transformers, under the name "inferkit".

The query heads that share a KV head are folded into the query length, so that keys and values are
read as they lie in the cache instead of being repeated for every head. On CPU this is several times
faster than repeating them or than ``enable_gqa`` (see benchmarks/README.md).

Where :mod:`inferkit.kernels` can be had, it does the work. Else a prompt's tokens are read some at
a time on a CPU, each lot against the span of positions that it may see, which for causal attention
is half of them; and where the processor multiplies bf16, scores and their sums are plain products,
for torch's fused kernel reaches a quarter of their speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface

from inferkit import kernels
from inferkit.demand import LOT
from inferkit.devices import cpu_has_bf16

NAME = "inferkit"

_FEW = 32  # tokens, up to which a prompt is not cut
# Tokens of a prompt that are read at a time: as many as have no more than LOT scores.
_LEAST, _MANY = 8, 128
_spans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of a mask, which many layers share


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Masked attention in the shapes of transformers' ``AttentionInterface``.

    Args:
        module: The attention layer.
        query: [rows, heads, tokens, dim].
        key: [rows, KV heads, read, dim].
        value: [rows, KV heads, read, value dim].
        attention_mask: Additive, [rows, 1, tokens, read].
        scaling: Factor on the scores; None means 1 / sqrt(dim).
        softcap: Scores are bent into (-softcap, softcap) by tanh (Gemma 2).
        s_aux: One more score per head that takes part in the softmax alone (GPT-OSS sinks).

    Returns:
        [rows, tokens, heads, value dim], and no attention weights.
    """
    rows, heads, tokens, dim = query.shape
    if attention_mask is not None and _in_one(query, key, value, attention_mask):
        scale = dim**-0.5 if scaling is None else scaling
        operands = (_dense(t) for t in (query, key, value, attention_mask))
        sinks = None if s_aux is None else s_aux.to(query.dtype).contiguous()
        out = torch.ops.inferkit.masked_attention(*operands, scale, softcap or 0.0, sinks)
        return out, None
    options = (scaling, softcap, s_aux)
    if query.device.type != "cpu" or tokens <= _FEW or attention_mask is None:
        out = _attend(query, key, value, attention_mask, *options)
        return out.transpose(1, 2).contiguous(), None
    made = query.new_empty(rows, tokens, heads, value.shape[-1])
    for lot, seen in _lots(attention_mask, rows * heads):
        mask = attention_mask[:, :, lot, seen]
        out = _attend(query[:, :, lot], key[:, :, seen], value[:, :, seen], mask, *options)
        made[:, lot] = out.transpose(1, 2)
    return made, None


def _in_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> bool:
    """Whether attention is one operation: over a mask that is the same for all heads, above all."""
    (rows, heads, tokens, dim), (_, kv_heads, read, _) = query.shape, key.shape
    return (
        kernels.serves(query, key, value, mask)
        and dim % 2 == 0
        and heads % kv_heads == 0
        and key.shape == (rows, kv_heads, read, dim)
        and value.shape[:3] == key.shape[:3]
        and mask.shape == (rows, 1, tokens, read)
    )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """With its last dimension in one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _lots(mask: torch.Tensor, rows: int) -> list[tuple[slice, slice]]:
    """Cut a prompt's tokens into lots, each with the span of positions that any of it may see.

    Args:
        mask: [rows, 1, tokens, read].
        rows: Rows times heads.
    """
    if mask not in _spans:
        most = LOT // (rows * mask.shape[-1])
        _spans[mask] = list(_spanned(mask, max(_LEAST, min(_MANY, most))))
    found: list[tuple[slice, slice]] = _spans[mask]
    return found


def _spanned(mask: torch.Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    least = torch.finfo(mask.dtype).min
    for begin in range(0, mask.shape[2], size):
        lot = slice(begin, min(begin + size, mask.shape[2]))
        seen = (mask[:, 0, lot].amax((0, 1)) > least).nonzero().flatten().tolist()
        first, last = (seen[0], seen[-1]) if seen else (0, 0)  # padding may see nothing
        yield lot, slice(first, last + 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """As `attention`, but [rows, heads, tokens, value dim]."""
    rows, heads, tokens, dim = query.shape
    kv_heads, read = key.shape[1:3]
    groups = heads // kv_heads
    folded = query.reshape(rows, kv_heads, groups * tokens, dim)
    if softcap is None and s_aux is None and not _by_products(query, tokens):
        if mask is not None and groups > 1:
            mask = mask[:, :, None].expand(rows, 1, groups, tokens, read)
            mask = mask.reshape(rows, 1, groups * tokens, read)
        out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.reshape(1, kv_heads, groups, 1, 1)
        out = _written_out(folded, key, value, mask, scaling, softcap, sinks, groups)
    return out.reshape(rows, heads, tokens, value.shape[-1])


def _by_products(query: torch.Tensor, tokens: int) -> bool:
    many = query.device.type == "cpu" and tokens > _FEW
    return many and query.dtype == torch.bfloat16 and cpu_has_bf16()


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    groups: int,
) -> torch.Tensor:
    """Attention whose scores are there as a whole.

    The fused kernels lack a bend in the scores and sinks. Softmax computes in fp32 in any dtype.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = ((query * scale) @ key.transpose(-1, -2)).unflatten(2, (groups, -1))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.add_(mask[:, :, None])
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.flatten(2, 3) @ value


AttentionInterface.register(NAME, attention)
