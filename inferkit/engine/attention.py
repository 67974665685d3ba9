"""The attention function that the engine registers with transformers, under the name "inferkit".

The query heads that share a KV head are folded into the query length, so that keys and values are
read as they lie in the cache instead of being repeated for every head. On CPU this is several times
faster than repeating them or than ``enable_gqa`` (see benchmarks/README.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "inferkit"


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
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(rows, kv_heads, groups * tokens, dim)
    mask = attention_mask
    if mask is not None and groups > 1:
        mask = mask[:, :, None].expand(rows, 1, groups, tokens, mask.shape[-1])
        mask = mask.reshape(rows, 1, groups * tokens, mask.shape[-1])
    if softcap is None and s_aux is None:
        out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.reshape(1, kv_heads, groups, 1)
        out = _written_out(folded, key, value, mask, scaling, softcap, sinks, tokens)
    out = out.reshape(rows, heads, tokens, value.shape[-1])
    return out.transpose(1, 2).contiguous(), None


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor:
    """Attention with a bend in the scores or a sink, which the fused kernels lack."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    column = sinks.expand(len(scores), -1, -1, tokens).reshape(*scores.shape[:-1], 1)
    joined = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = joined.softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(value.dtype) @ value


AttentionInterface.register(NAME, attention)
