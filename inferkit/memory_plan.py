"""MemoryPlan: what a model takes on each device, whether that fits, and what to do if not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from inferkit.demand import DevicePlan
from inferkit.devices import runners
from inferkit.errors import DoesNotFitError
from inferkit.footprint import WeightFormat
from inferkit.html import format_bytes, table, text_table

__all__ = ["MemoryPlan"]


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """The memory a model would take, and whether the devices have it. Sizes are in bytes.

    Attributes:
        model: The reference as given.
        architecture: transformers' class name.
        format: How weights are kept: the quantize mode and its details.
        dtype: torch's name of the dtype of KV cache and unquantized weights.
        context: Tokens per row.
        max_batch: Rows.
        devices: One entry per device, in the order of the layers.
        device_map: Module name to device name, as ``from_pretrained`` takes it.
        max_context: The largest context that fits at this ``max_batch``, at most the model's
            maximum; 0 if none does.
        batch_by_mode: The largest batch that fits at this ``context`` under each quantize mode that
            this checkpoint could be loaded in; 0 if none does.
        totals: Bytes needed under each of those modes.
        alternatives: Those of the other modes that would fit.
        note: What else there is to know of this checkpoint on these devices, or "".
        max_memory: The most that the model may take of a device, by name, where that was limited.
        spread: More devices, over which it would fit where it does not on these; else empty.
    """

    model: str
    architecture: str
    format: WeightFormat
    dtype: str
    context: int
    max_batch: int
    devices: tuple[DevicePlan, ...]
    device_map: Mapping[str, str] = field(hash=False)
    max_context: int
    batch_by_mode: Mapping[str, int] = field(hash=False)
    totals: Mapping[str, int] = field(hash=False)
    alternatives: Mapping[str, int] = field(hash=False)
    note: str = ""
    max_memory: Mapping[str, int] = field(default_factory=dict, hash=False)
    spread: tuple[str, ...] = ()

    @property
    def quantize(self) -> str:
        """The quantize mode, such as ``"nf4"``; or the method of a stored checkpoint."""
        return self.format.mode

    @property
    def max_batch_fit(self) -> int:
        """The largest batch that fits at this ``context``; 0 if none does."""
        return self.batch_by_mode[self.quantize]

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers as they are kept; tied ones once, unless packed."""
        return sum(d.weights for d in self.devices)

    @property
    def kv_cache(self) -> int:
        """Bytes of the KV cache for ``max_batch`` rows of ``context`` tokens."""
        return sum(d.kv_cache for d in self.devices)

    @property
    def activations(self) -> int:
        """Bytes of one forward step at its peak, a conservative estimate."""
        return sum(d.activations for d in self.devices)

    @property
    def total(self) -> int:
        """Bytes needed over all devices."""
        return sum(d.needed for d in self.devices)

    @property
    def fits(self) -> bool:
        """Whether every device has what it needs free."""
        return all(d.fits for d in self.devices)

    def explain(self) -> str:
        """Say in a sentence or two what is needed, what is free, and what to do about it."""
        text = f"{self.model} needs {self._needs()}; {self._advice()}."
        return " ".join(filter(None, (text, self._wider(), self.note)))

    def require(self) -> MemoryPlan:
        """Return the plan itself if it fits.

        Raises:
            DoesNotFitError: It does not; the message is :meth:`explain`'s, ``error.plan`` the plan.
        """
        if not self.fits:
            raise DoesNotFitError(self.explain(), self)
        return self

    def within(self, other: MemoryPlan) -> bool:
        """Whether no device has to hold more than by another plan."""
        before = {d.name: d.needed for d in other.devices}
        return all(d.needed <= before.get(d.name, 0) for d in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, sizes in bytes."""
        whole = ("quantize", "max_batch_fit", "weights", "kv_cache", "activations", "total", "fits")
        made = asdict(self)
        made["devices"] = [asdict(d) | {"needed": d.needed, "fits": d.fits} for d in self.devices]
        return made | {name: getattr(self, name) for name in whole}

    def __repr__(self) -> str:
        return f"{self._title()}\n{text_table(*self._table())}\n{self.explain()}"

    def _repr_html_(self) -> str:
        return table(*self._table(), caption=self._title(), note=self.explain())

    def _title(self) -> str:
        kind = "stored as " if self.format.stored else "quantize="
        return (
            f"{self.model} ({self.architecture}, {self.dtype}, {kind}{str(self.format)!r}, "
            f"context={self.context}, max_batch={self.max_batch})"
        )

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        columns: dict[str, Callable[[DevicePlan], int]] = {
            "weights": lambda d: d.weights,
            "KV cache": lambda d: d.kv_cache,
            "activations": lambda d: d.activations,
            "needed": lambda d: d.needed,
            "free": lambda d: d.free,
            "memory": lambda d: d.total,
        }
        if any(d.streamed for d in self.devices):
            columns["streams in"] = lambda d: d.streamed
        rows = [
            (
                d.name,
                *(format_bytes(size(d)) for size in columns.values()),
                "yes" if d.fits else "no",
            )
            for d in self.devices
        ]
        return ("device", *columns, "fits"), rows

    def _needs(self) -> str:
        if self.fits:
            names = ", ".join(d.name for d in self.devices)
            return _against(self.total, names, sum(d.free for d in self.devices), "are free")
        worst = max(self.devices, key=lambda d: d.needed - d.free)
        limited = self.max_memory.get(worst.name) == worst.free
        have = "are what max_memory allows" if limited else "are free"
        return _against(worst.needed, worst.name, worst.free, have)

    def _wider(self) -> str:
        """Devices over which it would fit, as a sentence of its own."""
        if not self.spread:
            return ""
        text = f"Over device={list(self.spread)!r} it fits"
        lies = " and ".join(n for n in self.spread if n not in runners(self.spread))
        return (
            f"{text}: weights on {lies} travel at every step, so it is slow."
            if lies
            else f"{text}."
        )

    def _advice(self) -> str:
        if self.fits:
            return (
                f"at max_batch={self.max_batch} up to context={self.max_context} fits, "
                f"at context={self.context} up to max_batch={self.max_batch_fit}"
            )
        ways = [
            f"quantize={m!r} needs {format_bytes(self.alternatives[m])}" for m in self._better()
        ]
        if self.max_context:
            ways.append(f"context={self.max_context} fits at max_batch={self.max_batch}")
        if self.max_batch_fit:
            ways.append(f"max_batch={self.max_batch_fit} fits at context={self.context}")
        if ways:
            return " or ".join(ways)
        smaller = "use a smaller model, a smaller context with a smaller max_batch, or more devices"
        if self.format.stored:
            return smaller
        smallest = min(self.totals, key=lambda mode: self.totals[mode])
        if rows := self.batch_by_mode[smallest]:
            return f"quantize={smallest!r} with max_batch={rows} fits at context={self.context}"
        return (
            f"the smallest mode, quantize={smallest!r}, needs "
            f"{format_bytes(self.totals[smallest])}; {smaller}"
        )

    def _better(self) -> list[str]:
        """Alternatives worth naming: fp4 takes as much as nf4 and rounds worse."""
        return [m for m in self.alternatives if m != "fp4" or "nf4" not in self.alternatives]


def _against(needed: int, where: str, free: int, have: str) -> str:
    digits = 1
    while digits < 4 and format_bytes(needed, digits) == format_bytes(free, digits):
        digits += 1  # "needs 11.2 GiB and 11.2 GiB are free" explains nothing
    return f"{format_bytes(needed, digits)} on {where} and {format_bytes(free, digits)} {have}"
