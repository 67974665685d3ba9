"""The KV cache of an architecture: what each layer keeps per token and per row.

The source is transformers itself: the model runs on two tokens on the meta device with its own
``DynamicCache``, and the cache says what it holds. The usual formula,
``2 * kv_heads * hidden / heads * layers * context * bytes``, is wrong for models with an explicit
head_dim, sliding windows, latent attention (MLA), shared or linear-attention layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from inferkit.errors import UnsupportedModelError
from inferkit.footprint import meta_model

__all__ = ["PREFILL_CHUNK", "LayerKV", "cache_argument", "kv_geometry", "read_geometry"]

Kind = Literal["full", "sliding", "chunked", "linear", "none"]
PREFILL_CHUNK = 512
"""Prompt tokens that one prefill step takes, where nobody says otherwise."""
_STEP = 64  # capacities are multiples of this, so that few shapes exist


@dataclass(frozen=True)
class LayerKV:
    """What one layer caches.

    Attributes:
        kind: ``"full"`` keeps every token; ``"sliding"`` and ``"chunked"`` the last ``window``;
            ``"linear"`` only a state of fixed size; ``"none"`` nothing (shared or no attention).
        heads: KV heads, 1 where latent attention caches its compressed form.
        key_dim: Elements of one key.
        value_dim: Elements of one value.
        window: Tokens of the sliding window or attention chunk; None for the other kinds.
        state_bytes: Bytes per row of convolution and recurrent states; a hybrid layer has both
            these and keys and values.
        indexer_dim: Elements per token of a sparse-attention indexer's key, beside the heads.
    """

    kind: Kind
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    state_bytes: int = 0
    indexer_dim: int = 0

    def capacity(self, context: int, prefill_chunk: int = PREFILL_CHUNK) -> int:
        """Token positions that the engine allocates per row.

        A full layer holds the context and one position to write to; a sliding or chunked one is a
        ring in which a prefill chunk finds the whole window that precedes its first token.
        """
        if self.kind in ("linear", "none"):
            return 0
        full = _round_up(context + 1)
        if self.window is None:
            return full
        return min(_round_up(self.window - 1 + prefill_chunk), full)

    def bytes(
        self, context: int, rows: int, itemsize: int, prefill_chunk: int = PREFILL_CHUNK
    ) -> int:
        """Bytes that the engine allocates for ``rows`` rows of ``context`` tokens."""
        per_token = self.heads * (self.key_dim + self.value_dim) + self.indexer_dim
        tokens = self.capacity(context, prefill_chunk)
        return rows * (tokens * per_token * itemsize + self.state_bytes)


def kv_geometry(config: Any, dtype: str, trust_remote_code: bool = False) -> tuple[LayerKV, ...]:
    """What each layer of this architecture caches, in layer order.

    Args:
        config: A transformers config.
        dtype: torch's name of the dtype the model runs in (recurrent states depend on it).
        trust_remote_code: Let the config's repository bring its own model code.

    Raises:
        UnsupportedModelError: The architecture keeps its state elsewhere than in transformers'
            cache, or does not run on the meta device and is not plain attention either.
    """
    return read_geometry(meta_model(config, dtype, trust_remote_code))


def read_geometry(model: Any) -> tuple[LayerKV, ...]:
    """:func:`kv_geometry` of a model that is already on the meta device."""
    try:
        layers = _run_two_tokens(model)
    except Exception as error:  # code of any architecture, run where it was not meant to
        return _plain_attention(model, error)
    kinds = _layer_types(model)
    return tuple(_read_layer(model, layer, kind) for layer, kind in zip(layers, kinds, strict=True))


def cache_argument(model: Any) -> str:
    """The name by which a model's ``forward`` takes the cache, which changed over the versions."""
    accepted = inspect.signature(model.forward).parameters
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in accepted), names[0])


def _run_two_tokens(model: Any) -> list[Any]:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    name = cache_argument(model)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=tokens, use_cache=True, **{name: cache})
    return list(cache.layers)


def _layer_types(model: Any) -> list[str]:
    from transformers.cache_utils import get_layer_types_and_kwargs

    return list(get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0])


def _read_layer(model: Any, layer: Any, layer_type: str) -> LayerKV:
    if layer_type == "dummy":
        return LayerKV("none")
    state = _state_bytes(layer)
    keys: Any = getattr(layer, "keys", None)
    if keys is None and not state:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps its state outside transformers' cache (its "
            f"{layer_type!r} layers left it empty), so its memory cannot be planned and it cannot "
            "be served; choose a model with standard attention."
        )
    if keys is None:
        return LayerKV("linear", state_bytes=state)
    if keys.shape[1] != layer.values.shape[1]:
        raise UnsupportedModelError(
            f"{type(model).__name__} caches {keys.shape[1]} key heads and "
            f"{layer.values.shape[1]} value heads; inferkit serves models with as many of the one "
            "as of the other."
        )
    window = getattr(layer, "sliding_window", None)
    kind: Kind = "full" if window is None else "sliding"
    if "chunked" in layer_type:
        kind = "chunked"
    indexer: Any = getattr(layer, "indexer_keys", None)
    return LayerKV(
        kind=kind,
        heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_dim=layer.values.shape[3],
        window=window,
        state_bytes=state,
        indexer_dim=0 if indexer is None else indexer.shape[-1],
    )


def _state_bytes(layer: Any) -> int:
    tensors: list[Any] = []
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None) or ()
        held: Iterable[Any] = states.values() if hasattr(states, "values") else states
        tensors += [t for t in held if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _plain_attention(model: Any, error: Exception) -> tuple[LayerKV, ...]:
    """Geometry from the config, where its numbers and the key and value projections agree."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    text = model.config.get_text_config(decoder=True)
    types, windows = get_layer_types_and_kwargs(text)
    queries = getattr(text, "num_attention_heads", 0) or 1
    heads = getattr(text, "num_key_value_heads", None) or queries
    dim = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // queries
    linears = {n: m for n, m in model.named_modules() if n.endswith((".k_proj", ".v_proj"))}
    agree = len(linears) == 2 * len(types) > 0 and all(
        getattr(m, "out_features", None) == heads * dim for m in linears.values()
    )
    kinds: dict[str, Kind] = {
        "full_attention": "full",
        "sliding_attention": "sliding",
        "chunked_attention": "chunked",
    }
    if not agree or not set(types) <= set(kinds):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on the meta device "
            f"({type(error).__name__}: {error}) and is not plain attention, so its KV cache cannot "
            "be planned; choose a model with standard attention."
        ) from error
    return tuple(
        LayerKV(kinds[t], heads, dim, dim, w.get("sliding_window")) for t, w in zip(types, windows)
    )


def _round_up(count: int) -> int:
    return _STEP * math.ceil(count / _STEP)
