"""What a model in one weight format asks of each device, for any context and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferkit.errors import UnsupportedModelError
from inferkit.footprint import (
    WeightFormat,
    device_of,
    packed_growth,
    quantized_linears,
    split_modules,
    weight_bytes,
)
from inferkit.kv import LayerKV

__all__ = ["Demand", "DevicePlan", "Transients"]


@dataclass(frozen=True)
class DevicePlan:
    """What one device would hold, in bytes.

    Attributes:
        name: Canonical device name.
        weights: Parameters and buffers placed there.
        kv_cache: KV cache of the layers placed there.
        activations: Estimate of the peak of one forward step.
        total: The device's memory.
        free: What of it can be allocated now.
    """

    name: str
    weights: int
    kv_cache: int
    activations: int
    total: int
    free: int

    @property
    def needed(self) -> int:
        """Weights, KV cache and activations together."""
        return self.weights + self.kv_cache + self.activations

    @property
    def fits(self) -> bool:
        """Whether that is no more than what is free."""
        return self.needed <= self.free


@dataclass(frozen=True)
class Transients:
    """Sizes that bound the memory of one forward step beside weights and KV cache.

    The estimate is conservative: it adds parts that do not all live at once, for one layer (layers
    run one after another). For ``t`` tokens per step (a prefill chunk, or one token per row)::

        residual, norms   t * hidden * (6 * itemsize + 2 * 4)          two copies in fp32
        projections, MLP  t * width * 4 * itemsize                     gate, up, their product, out
        attention         t * positions * (heads * (itemsize + written) + 1 + itemsize)
        dequantized       the largest quantized weight, or its unpacked form (see below)

        keys and values   one layer's share of the KV cache            when rows are gathered

    ``width`` is the widest projection of the architecture, or the widest expert times the experts
    per token. ``positions`` is the KV cache's capacity. Attention holds the scores (or the mask,
    repeated for the heads that share a KV head), and the mask itself beside the booleans that it is
    made of. Where no fused kernel computes it (:mod:`inferkit.engine.attention`), ``written`` is
    not 0: the scores live beside the repeated mask, their softmax is taken in fp32 from a copy in
    fp32 (``itemsize + 4 + 4``), and sinks are joined to another copy of them (``itemsize`` more).
    On the device of the output embeddings come logits, ``rows * vocab * (itemsize + 4 + 4 + 8)``:
    in dtype, in fp32, sorted, and the sort's int64 indices.
    """

    hidden: int
    width: int
    heads: int
    written: int
    vocab: int
    dequantized: int

    @classmethod
    def of(cls, model: Any, form: WeightFormat, itemsize: int) -> Transients:
        """Read the sizes off a meta model."""
        text = model.config.get_text_config(decoder=True)
        output = model.get_output_embeddings()
        linears = [m.weight for m in model.modules() if _is_projection(m) and m is not output]
        width = max((max(w.shape) for w in linears), default=0)
        per_token = int(getattr(text, "num_experts_per_tok", None) or 1)
        experts = [max(p.shape[1:]) for p in model.parameters() if p.ndim == 3]
        unpacked = [r * c for r, c in quantized_linears(model, form).values()]
        if form.stored and not unpacked:  # by another method, which may unpack any layer
            unpacked = [w.numel() for w in linears]
        # 4-bit weights are unpacked to int32 and repacked once for CPUs with AVX-512.
        per_weight = 8 if form.mode in ("nf4", "fp4") else max(itemsize, 4)
        vocab = getattr(text, "vocab_size", 0) if output is None else max(output.weight.shape)
        return cls(
            hidden=int(getattr(text, "hidden_size", 0) or width),
            width=max([width, *(per_token * e for e in experts)]),
            heads=_most_heads(text),
            written=_written_out(model, text, itemsize),
            vocab=int(vocab),
            dequantized=max(unpacked, default=0) * per_weight,
        )

    def layer_bytes(self, tokens: int, positions: int, itemsize: int) -> int:
        """Bytes while one layer runs on ``tokens`` tokens that attend to ``positions``."""
        residual = self.hidden * (6 * itemsize + 2 * 4)
        mlp = self.width * 4 * itemsize
        attention = positions * (self.heads * (itemsize + self.written) + 1 + itemsize)
        return tokens * (residual + mlp + attention) + self.dequantized

    def logits_bytes(self, rows: int, itemsize: int) -> int:
        """Bytes while the next tokens of ``rows`` rows are sampled."""
        return rows * self.vocab * (itemsize + 4 + 4 + 8)


@dataclass(frozen=True)
class Demand:
    """Weights, layers and forward-step sizes by device, from which any plan follows at once.

    Attributes:
        memory: Total and free bytes by device.
        device_map: Module name to device name.
        weights: Bytes of weights by device.
        layers: The KV geometry of the layers on each device.
        logits_on: The device of the output embeddings.
        transients: Sizes that bound a forward step.
        itemsize: Bytes of one element of the dtype.
        prefill_chunk: Tokens that one prefill step takes.
    """

    memory: Mapping[str, tuple[int, int]]
    device_map: Mapping[str, str]
    weights: Mapping[str, int]
    layers: Mapping[str, tuple[LayerKV, ...]]
    logits_on: str
    transients: Transients
    itemsize: int
    prefill_chunk: int

    @classmethod
    def of(
        cls,
        meta: Any,
        geometry: Sequence[LayerKV],
        form: WeightFormat,
        memory: Mapping[str, tuple[int, int]],
        prefill_chunk: int,
        device_map: Mapping[str, str] | None = None,
        stored: Any = None,
    ) -> Demand:
        """Add up what a meta model's modules hold on each of the devices in ``memory``.

        Where no ``device_map`` says which module is where, they are spread over the devices. Of a
        checkpoint that is stored quantized, ``stored`` is the meta model with its own layers.
        """
        held = meta if stored is None else stored
        sizes = weight_bytes(held, form)
        free = {name: left for name, (_, left) in memory.items()}
        device_map = device_map or split_modules(held, sizes, free, form)
        weights = dict.fromkeys(memory, 0)
        growth = packed_growth(held, form, device_map)
        for name, size in [*sizes.items(), *growth.items()]:
            weights[device_of(device_map, name)] += size
        layers: dict[str, tuple[LayerKV, ...]] = dict.fromkeys(memory, ())
        for name, layer in zip(_layer_names(meta, len(geometry), len(memory)), geometry):
            layers[device_of(device_map, name)] += (layer,)
        itemsize = meta.dtype.itemsize
        return cls(
            memory=memory,
            device_map=device_map,
            weights=weights,
            layers=layers,
            logits_on=device_of(device_map, _output_name(meta)),
            transients=Transients.of(meta, form, itemsize),
            itemsize=itemsize,
            prefill_chunk=prefill_chunk,
        )

    def at(self, context: int, rows: int) -> tuple[DevicePlan, ...]:
        """What each device would hold for ``rows`` rows of ``context`` tokens."""
        return tuple(self._on(name, context, rows) for name in self.memory)

    def fits(self, context: int, rows: int) -> bool:
        """Whether every device has that much free."""
        return all(d.fits for d in self.at(context, rows))

    def _on(self, name: str, context: int, rows: int) -> DevicePlan:
        chunk, layers = self.prefill_chunk, self.layers[name]
        positions = max((layer.capacity(context, chunk) for layer in layers), default=0)
        tokens = max(min(chunk, context), rows)
        caches = [layer.bytes(context, rows, self.itemsize, chunk) for layer in layers]
        activations = self.transients.layer_bytes(tokens, positions, self.itemsize)
        activations += max(caches, default=0)
        if name == self.logits_on:
            activations += self.transients.logits_bytes(rows, self.itemsize)
        total, free = self.memory[name]
        return DevicePlan(
            name=name,
            weights=self.weights[name],
            kv_cache=sum(caches),
            activations=activations,
            total=total,
            free=free,
        )


def _output_name(meta: Any) -> str:
    output = meta.get_output_embeddings()
    return next((name for name, m in meta.named_modules() if m is output), "")


def _layer_names(meta: Any, count: int, devices: int) -> list[str]:
    """Module names of the decoder layers; one device needs no names."""
    from torch import nn

    if devices == 1:
        return [""] * count
    stacks = {n: m for n, m in meta.named_modules() if isinstance(m, nn.ModuleList)}
    same = {n: sum(p.numel() for p in m.parameters()) for n, m in stacks.items() if len(m) == count}
    if not same:
        raise UnsupportedModelError(
            f"{type(meta).__name__} has no single list of {count} layers to spread over devices; "
            "name one device."
        )
    stack = max(same, key=lambda name: same[name])
    return [f"{stack}.{index}" for index in range(count)]


def _is_projection(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _most_heads(text_config: Any) -> int:
    layers: Sequence[Any] = getattr(text_config, "per_layer_config", None) or [text_config]
    return max(int(getattr(c, "num_attention_heads", 0) or 0) for c in layers)


def _written_out(model: Any, text_config: Any, itemsize: int) -> int:
    """Bytes per score that attention with bent scores or with sinks holds: see `Transients`."""
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if sinks:
        return 2 * itemsize + 4 + 4
    bent = getattr(text_config, "attn_logit_softcapping", None) is not None
    return itemsize + 4 + 4 if bent else 0
