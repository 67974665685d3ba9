"""The slotted KV cache: one row per running request, every row at its own position.

Slot tensors are [slots, KV heads, positions, head dim], one pair per layer, on the device of their
layer. A full-attention layer has a position for every token of the context. A sliding-window layer
is a ring that holds its window and one prefill chunk: position p lives at p modulo the ring's size.

One formula covers both. In a row whose last written position is P, entry j of a layer with R
entries holds position P - ((P - j) mod R); a negative result means that nothing is there yet.
Padding may therefore be written at positions after P: in a full layer it reads as negative, and in
a ring it replaces only positions that have left the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inferkit.kv import LayerKV

# Reads cover a multiple of this many positions, so that few shapes occur.
_BUCKET = 64


@dataclass(slots=True)
class _Layer:
    geometry: LayerKV
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclass(slots=True)
class View:
    """Which rows one forward pass works on, and where each of its tokens goes.

    Attributes:
        slots: Neighbouring slots, read in place, or any list of slots, gathered.
        positions: [rows, tokens], the position of each token.
        last: [rows], each row's last real position.
        longest: The largest position in use by any row, as a plain number.
    """

    slots: slice | list[int]
    positions: torch.Tensor
    last: torch.Tensor
    longest: int


class SlotCache:
    """Keys and values of all slots. Used by the engine's thread alone.

    It takes the place of a transformers cache in a model's forward: attention layers call
    `update`, once `begin` has said which rows and positions the pass works on.
    """

    # transformers asks these of a cache.
    is_compileable = False

    def __init__(
        self,
        geometry: Sequence[LayerKV],
        *,
        slots: int,
        context: int,
        prefill_chunk: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
    ) -> None:
        self.slots = slots
        self.context = context
        self.prefill_chunk = prefill_chunk
        # Whether the layers that read it may run their compiled code: see compiled.py.
        self.compiled = False
        self._layers = [
            _Layer(
                g,
                _zeros((slots, g.heads, g.capacity(context, prefill_chunk), g.key_dim), dtype, d),
                _zeros((slots, g.heads, g.capacity(context, prefill_chunk), g.value_dim), dtype, d),
            )
            for g, d in zip(geometry, devices, strict=True)
        ]
        self._bytes_per_token: dict[int, int] = {}  # by capacity, of which layers share a few
        for layer in self._layers:
            per_token = (layer.keys.nbytes + layer.values.nbytes) // (slots * layer.capacity or 1)
            self._bytes_per_token[layer.capacity] = (
                self._bytes_per_token.get(layer.capacity, 0) + per_token
            )
        longest = max(layer.capacity for layer in self._layers)
        self._numbers = {
            d: torch.arange(longest, device=d) for d in {x.keys.device for x in self._layers}
        }
        # What `swap` moves rows through: it must not need memory when there is none.
        self._spare = _spare_rows(self._layers) if slots > 1 else {}
        # No model may depend on the length it asks for, for every row has its own: see serving.py.
        self.told_length = 0
        self.asked_length = False
        self._view: View | None = None
        self._index: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.keys.nbytes + x.values.nbytes for x in self._layers)

    def bytes_of(self, lengths: Sequence[int]) -> int:
        """Bytes that rows of so many tokens have in use."""
        return sum(
            per_token * min(length, capacity)
            for capacity, per_token in self._bytes_per_token.items()
            for length in lengths
        )

    # -- what a forward pass uses ---------------------------------------------------------------

    def begin(self, view: View) -> None:
        """Say which rows and positions the next forward pass works on."""
        self._view = view
        self._index.clear()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values; return all that its queries may read.

        Shapes: [rows, KV heads, tokens, dim] in, [rows, KV heads, read positions, dim] out.
        """
        layer, view = self._layers[layer_idx], self._view
        assert view is not None, "begin() comes first"
        read = self._read(layer)
        rows, where = self._write_index(layer)
        found = []
        for store, new in zip(self._stores(layer), (keys, values), strict=True):
            write(store, new, rows, where)
            seen = store[:, :, :read]
            found.append(seen if isinstance(view.slots, slice) else seen[view.slots])
        return found[0], found[1]

    def operands(self, layer_idx: int) -> list[torch.Tensor] | None:
        """What compiled code of a layer takes of this cache in this pass, in this order.

        The keys and values of the layer in the slots of the pass; each row's slot among them
        [rows]; where in the layer each token goes [rows, tokens]; and something as long as what may
        be read [read positions]. None where the slots are no neighbours, which are read in place.
        """
        layer, view = self._layers[layer_idx], self._view
        assert view is not None, "begin() comes first"
        if not isinstance(view.slots, slice):
            return None
        rows, where = self._write_index(layer)
        return [*self._stores(layer), rows, where, self._entries(layer)]

    def masks(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """One additive mask [rows, 1, tokens, read positions] per kind of layer in the model."""
        found: dict[str, torch.Tensor] = {}
        for layer in self._layers:
            if layer.geometry.kind not in found:
                found[layer.geometry.kind] = self._mask(layer, dtype)
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What some models add to positions; ours come explicitly, so nothing is to be added."""
        self.asked_length = True
        return self.told_length

    def _read(self, layer: _Layer) -> int:
        """How many entries of a layer the rows of this pass can have in use."""
        assert self._view is not None
        used = -(-(self._view.longest + 1) // _BUCKET) * _BUCKET
        return min(used, layer.capacity)

    def _stores(self, layer: _Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots of this pass, or of all where these are no neighbours."""
        assert self._view is not None
        slots = self._view.slots
        if isinstance(slots, slice):
            return layer.keys[slots], layer.values[slots]
        return layer.keys, layer.values

    def _write_index(self, layer: _Layer) -> tuple[torch.Tensor, torch.Tensor]:
        view = self._view
        assert view is not None
        device = layer.keys.device
        key = (device, layer.capacity)
        if key not in self._index:
            index = (
                torch.arange(len(view.positions), device=device)
                if isinstance(view.slots, slice)
                else torch.tensor(view.slots, device=device)
            )
            self._index[key] = (index, (view.positions % layer.capacity).to(device))
        return self._index[key]

    def _entries(self, layer: _Layer) -> torch.Tensor:
        return self._numbers[layer.keys.device][: self._read(layer)]

    def _mask(self, layer: _Layer, dtype: torch.dtype) -> torch.Tensor:
        view = self._view
        assert view is not None
        entries = self._entries(layer).to(view.positions.device)
        last = view.last[:, None]
        held = last - torch.remainder(last - entries, layer.capacity)  # [rows, read]
        asked = view.positions[:, :, None]  # [rows, tokens, 1]
        held = held[:, None]
        seen = (held >= 0) & (held <= asked)
        window = layer.geometry.window
        if layer.geometry.kind == "sliding" and window is not None:
            seen &= asked - held < window
        elif layer.geometry.kind == "chunked" and window is not None:
            seen &= asked // window == held // window
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    # -- moving rows ----------------------------------------------------------------------------

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange two slots, of which at most ``length`` positions are in use."""
        for layer in self._layers:
            n = min(length, layer.capacity)
            for store in (layer.keys, layer.values):
                one, other = store[a, :, :n], store[b, :, :n]
                spare = self._spare[store.device][: one.numel()].view(one.shape)
                spare.copy_(one)
                one.copy_(other)
                other.copy_(spare)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another (see `reusable`)."""
        for layer in self._layers:
            n = min(length, layer.capacity)
            for store in (layer.keys, layer.values):
                store[target, :, :n] = store[source, :, :n]

    def wipe(self, slot: int) -> None:
        """Forget all that a slot holds."""
        for layer in self._layers:
            layer.keys[slot].zero_()
            layer.values[slot].zero_()

    def reusable(self, length: int, written: int) -> bool:
        """Whether the first ``length`` positions can be continued in a row that wrote ``written``.

        In a ring, later tokens replace earlier ones: the window before ``length`` must still be
        there.
        """
        for layer in self._layers:
            window = layer.geometry.window
            if layer.geometry.kind == "full" or window is None or written <= layer.capacity:
                continue
            if max(0, length - window + 1) < written - layer.capacity:
                return False
        return True

    def release(self) -> None:
        """Give the memory back, although somebody may still hold this object."""
        self._layers.clear()
        self._spare.clear()
        self._numbers.clear()
        self._view = None
        self._index.clear()


def write(store: torch.Tensor, new: torch.Tensor, rows: torch.Tensor, where: torch.Tensor) -> None:
    """Put new keys or values into a layer's slots.

    Args:
        store: [slots, KV heads, capacity, dim].
        new: [rows, KV heads, tokens, dim].
        rows: [rows], the slot of each.
        where: [rows, tokens], the entry that each token goes to.
    """
    store[rows[:, None], :, where] = new.transpose(1, 2)


def _spare_rows(layers: Sequence[_Layer]) -> dict[torch.device, torch.Tensor]:
    """For each device, room for the largest row of keys or values of a layer there."""
    room: dict[torch.device, int] = {}
    for store in (store for layer in layers for store in (layer.keys, layer.values)):
        room[store.device] = max(room.get(store.device, 0), store[0].numel())
    dtype = layers[0].keys.dtype
    return {device: _zeros((count,), dtype, device) for device, count in room.items()}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU, pages that cost nothing until a request writes to them.

    ``torch.zeros`` writes every page, NumPy's asks the system for zero pages. They must be zeros:
    a masked entry counts 0 x its value, and that is NaN where the value is.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(shape)
