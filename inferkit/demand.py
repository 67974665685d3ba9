"""What a model in one weight format asks of each device, for any context and batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferkit.devices import runners
from inferkit.errors import UnsupportedModelError
from inferkit.footprint import WeightFormat, quantized_linears
from inferkit.kv import LayerKV
from inferkit.placement import Part, device_of, fill, offloads, parts_of, split, within

__all__ = ["LOT", "Demand", "DevicePlan", "Transients"]

LOT = 1 << 22
"""Most scores that attention on a CPU has at once: see :mod:`inferkit.engine.attention`."""


@dataclass(frozen=True)
class DevicePlan:
    """What one device would hold, in bytes.

    Attributes:
        name: Canonical device name.
        weights: Parameters and buffers placed there.
        kv_cache: KV cache of the layers that run there.
        activations: Estimate of the peak of one forward step.
        total: The device's memory.
        free: What of it can be allocated now, and the model may take. Of a disk, the weights that
            are read from where they are count as free: they need no more room.
        streamed: The largest of the layers that lie elsewhere and travel here to run.
    """

    name: str
    weights: int
    kv_cache: int
    activations: int
    total: int
    free: int
    streamed: int = 0

    @property
    def needed(self) -> int:
        """Weights, KV cache, activations and what travels in, together."""
        return self.weights + self.kv_cache + self.activations + self.streamed

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
        attention         t * positions * (heads * (itemsize + written) + 1 + 2 * itemsize)
        a lot's softmax   min(t * positions * heads, LOT) * itemsize   where a CPU multiplies bf16
        dequantized       the largest quantized weight, or its unpacked form or a tile of it; a tile
                          of a weight in 16 bits on a CPU that multiplies none

        keys and values   one layer's share of the KV cache            when rows are gathered

    ``width`` is the widest projection of the architecture, or the widest expert times the experts
    per token. ``positions`` is the KV cache's capacity. Attention holds the scores (or the mask,
    repeated for the heads that share a KV head), and the masks themselves, of two kinds of layers,
    beside the booleans that one is made of. Where no fused kernel computes it
    (:mod:`inferkit.engine.attention`), ``written`` is not 0: scores and their softmax live side by
    side, and sinks are joined to a copy of them.
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
        vocab = getattr(text, "vocab_size", 0) if output is None else max(output.weight.shape)
        return cls(
            hidden=int(getattr(text, "hidden_size", 0) or width),
            width=max([width, *(per_token * e for e in experts)]),
            heads=_most_heads(text),
            written=_written_out(model, text, itemsize),
            vocab=int(vocab),
            dequantized=max(
                _unpacked_bytes(form, max(unpacked, default=0), itemsize),
                _tile_bytes(model, max((w.numel() for w in linears), default=0)),
            ),
        )

    def layer_bytes(self, tokens: int, positions: int, itemsize: int) -> int:
        """Bytes while one layer runs on ``tokens`` tokens that attend to ``positions``."""
        residual = self.hidden * (6 * itemsize + 2 * 4)
        mlp = self.width * 4 * itemsize
        attention = positions * (self.heads * (itemsize + self.written) + 1 + 2 * itemsize)
        lot = min(tokens * positions * self.heads, LOT) * itemsize
        return tokens * (residual + mlp + attention) + lot + self.dequantized

    def logits_bytes(self, rows: int, itemsize: int) -> int:
        """Bytes while the next tokens of ``rows`` rows are sampled."""
        return rows * self.vocab * (itemsize + 4 + 4 + 8)


@dataclass(frozen=True)
class Demand:
    """What the parts of a model take, from which the plan of any context and batch follows at once.

    Attributes:
        memory: Total and free bytes by device.
        parts: What is placed as a whole, in the order in which it runs.
        geometry: The KV cache of each layer.
        output: The name of the output embeddings.
        transients: Sizes that bound a forward step.
        itemsize: Bytes of one element of the dtype.
        prefill_chunk: Tokens that one prefill step takes.
        placed: Module name to device name, where that does not depend on context and batch.
    """

    memory: Mapping[str, tuple[int, int]]
    parts: tuple[Part, ...]
    geometry: tuple[LayerKV, ...]
    output: str
    transients: Transients
    itemsize: int
    prefill_chunk: int
    placed: Mapping[str, str] | None

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
        """Read off a meta model what its modules take on the devices in ``memory``.

        Where no ``device_map`` says which module is where, they are spread over the devices. Of a
        checkpoint that is stored quantized, ``stored`` is the meta model with its own layers.
        """
        held = meta if stored is None else stored
        names = list(memory)
        if device_map is None and not offloads(names):
            device_map = split(held, {name: left for name, (_, left) in memory.items()}, form)
        layers = _layer_names(meta, len(geometry), len(names))
        return cls(
            memory=memory,
            parts=parts_of(held, form, layers, device_map or ()),
            geometry=tuple(geometry),
            output=_output_name(meta),
            transients=Transients.of(meta, form, meta.dtype.itemsize),
            itemsize=meta.dtype.itemsize,
            prefill_chunk=prefill_chunk,
            placed=device_map,
        )

    def device_map(self, context: int, rows: int) -> Mapping[str, str]:
        """The device of each module, by name, for ``rows`` rows of ``context`` tokens."""
        if self.placed is not None:
            return self.placed
        caches = [sum(self._caches(part.layers, context, rows)) for part in self.parts]
        step = self._step(range(len(self.geometry)), context, rows, logits=True)
        run = runners(list(self.memory))
        room = {n: free - step * (n in run) for n, (_, free) in self.memory.items()}
        return fill(self.parts, room, caches)

    def at(self, context: int, rows: int) -> tuple[DevicePlan, ...]:
        """What each device would hold for ``rows`` rows of ``context`` tokens."""
        placed = self.device_map(context, rows)
        where = [device_of(placed, part.names[0]) for part in self.parts]
        return tuple(self._on(name, where, context, rows) for name in self.memory)

    def fits(self, context: int, rows: int) -> bool:
        """Whether every device has that much free."""
        return all(d.fits for d in self.at(context, rows))

    def _on(self, name: str, where: Sequence[str], context: int, rows: int) -> DevicePlan:
        run = runners(list(self.memory))
        total, free = self.memory[name]
        here = [p for p, device in zip(self.parts, where) if device == name]
        if name not in run:
            return DevicePlan(name, sum(p.parameters for p in here), 0, 0, total, free)
        guests = [p for p, device in zip(self.parts, where) if device not in run]
        guests = guests if name == run[-1] else []
        layers = [index for part in (*here, *guests) for index in part.layers]
        outputs = [n for part in (*here, *guests) for n in part.names]
        weights = sum(p.weights + (p.packed if name == "cpu" else 0) for p in here)
        return DevicePlan(
            name=name,
            weights=weights + sum(p.buffers for p in guests),
            kv_cache=sum(self._caches(layers, context, rows)),
            activations=self._step(
                layers, context, rows, any(within(self.output, n) for n in outputs)
            ),
            total=total,
            free=free,
            streamed=max((p.parameters for p in guests), default=0),
        )

    def _step(self, layers: Iterable[int], context: int, rows: int, logits: bool) -> int:
        """Bytes of a forward step through these layers, with or without the output embeddings."""
        chunk, layers = self.prefill_chunk, list(layers)
        positions = max((self.geometry[i].capacity(context, chunk) for i in layers), default=0)
        tokens = max(min(chunk, context), rows)
        step = self.transients.layer_bytes(tokens, positions, self.itemsize)
        step += max(self._caches(layers, context, rows), default=0)
        return step + (self.transients.logits_bytes(rows, self.itemsize) if logits else 0)

    def _caches(self, layers: Iterable[int], context: int, rows: int) -> list[int]:
        chunk = self.prefill_chunk
        return [self.geometry[i].bytes(context, rows, self.itemsize, chunk) for i in layers]


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


def _tile_bytes(model: Any, weights: int) -> int:
    """Bytes that a layer of so many weights in 16 bits takes on a CPU that multiplies none."""
    from inferkit.tiled import scratch_bytes, tileable

    dtype = str(model.dtype).removeprefix("torch.")
    return scratch_bytes(weights) if tileable("cpu", dtype) else 0


def _unpacked_bytes(form: WeightFormat, weights: int, itemsize: int) -> int:
    """Bytes that a layer of so many quantized weights takes to run, beside input and output."""
    if form.weight_only:
        from inferkit.tiled import scratch_bytes

        return scratch_bytes(weights)
    # 4-bit weights are unpacked to int32 and repacked once for CPUs with AVX-512.
    return weights * (8 if form.mode in ("nf4", "fp4") else max(itemsize, 4))


def _most_heads(text_config: Any) -> int:
    layers: Sequence[Any] = getattr(text_config, "per_layer_config", None) or [text_config]
    return max(int(getattr(c, "num_attention_heads", 0) or 0) for c in layers)


def _written_out(model: Any, text_config: Any, itemsize: int) -> int:
    """Bytes per score that attention with bent scores or with sinks holds: see `Transients`."""
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if sinks:
        return 2 * itemsize
    bent = getattr(text_config, "attn_logit_softcapping", None) is not None
    return itemsize if bent else 0
