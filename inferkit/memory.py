"""Does it fit? Weights, KV cache and activations per device, from the config alone."""

from __future__ import annotations

import inspect
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inferkit.demand import Demand, DevicePlan
from inferkit.devices import find_device, resolve_device, resolve_dtype
from inferkit.errors import DoesNotFitError, OptionError
from inferkit.footprint import (
    QUANTIZE_MODES,
    WeightFormat,
    asked_format,
    meta_model,
    weight_format,
)
from inferkit.html import format_bytes, table, text_table
from inferkit.kv import PREFILL_CHUNK, LayerKV, kv_geometry, read_geometry
from inferkit.sampling import unknown_option
from inferkit.stored import laid_out

__all__ = [
    "DevicePlan",
    "LayerKV",
    "MemoryPlan",
    "check_known",
    "check_whole",
    "checked_context",
    "context_limit",
    "kv_geometry",
    "plan",
    "plan_config",
]

_DEFAULT_CONTEXT = 4096
_LEAST_CONTEXT = 2
_MOST_CONTEXT = 1 << 20  # where the search stops for models without a maximum of their own
_MOST_ROWS = 1 << 12  # where the search for a larger batch stops


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
        note: How a checkpoint that is stored quantized is counted, where that needs saying, or "".
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

    @property
    def quantize(self) -> str:
        """``"none"``, ``"int8"``, ``"nf4"`` or ``"fp4"``; or the method of a stored checkpoint."""
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
        return f"{text} {self.note}" if self.note else text

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
        return f"{self._title()}\n{text_table(_HEADER, self._rows())}\n{self.explain()}"

    def _repr_html_(self) -> str:
        return table(_HEADER, self._rows(), caption=self._title(), note=self.explain())

    def _title(self) -> str:
        kind = "stored as " if self.format.stored else "quantize="
        return (
            f"{self.model} ({self.architecture}, {self.dtype}, {kind}{str(self.format)!r}, "
            f"context={self.context}, max_batch={self.max_batch})"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for d in self.devices:
            sizes = (d.weights, d.kv_cache, d.activations, d.needed, d.free, d.total)
            rows.append((d.name, *map(format_bytes, sizes), "yes" if d.fits else "no"))
        return rows

    def _needs(self) -> str:
        if self.fits:
            names = ", ".join(d.name for d in self.devices)
            return _against(self.total, names, sum(d.free for d in self.devices))
        worst = max(self.devices, key=lambda d: d.needed - d.free)
        return _against(worst.needed, worst.name, worst.free)

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


_HEADER = ("device", "weights", "KV cache", "activations", "needed", "free", "memory", "fits")


def plan(
    ref_or_config: Any,
    quantize: str = "none",
    context: int | None = None,
    max_batch: int = 16,
    device: Any = "auto",
    dtype: Any = "auto",
    double_quant: bool = False,
    compute_dtype: Any = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    free: Mapping[str, int] | None = None,
    **unknown: Any,
) -> MemoryPlan:
    """Plan the memory of a model from its config alone, before any weight is read.

    What is free is what the devices say. On the CPU that counts the part of a loaded model's KV
    cache that no request has used yet; :func:`inferkit.load` does not give that away twice.

    Args:
        ref_or_config: A hub id, local folder, ``.gguf`` file or ``"demo"``; or a transformers
            config.
        quantize: ``"none"``, ``"int8"``, ``"nf4"`` or ``"fp4"`` (bitsandbytes). A checkpoint that
            is stored quantized stays as it is under "none"; see the plan's ``note``.
        context: Tokens per row, prompt and completion; None is 4096 or the model's maximum if
            that is less.
        max_batch: Rows that run at once.
        device: As in :func:`inferkit.devices.resolve_device`.
        dtype: As in :func:`inferkit.devices.resolve_dtype`.
        double_quant: Quantize the scales of a 4-bit mode again (bitsandbytes' nested quantization).
        compute_dtype: The dtype that 4-bit weights are unpacked to for each matmul; "auto" is that
            of the model.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Let the repository bring its own model code.
        prefill_chunk: Tokens that one prefill step takes.
        free: Free bytes by device name, in place of what the devices say.
        unknown: None; a misspelt option is an OptionError that names the nearest one.

    Raises:
        OptionError: An option is unknown or out of range, or the checkpoint is stored quantized in
            another format.
        DeviceError: A device is not attached, or does not answer.
        ModelNotFoundError: The reference leads to no model.
        DamagedFileError: The config or the header of the GGUF file is broken.
        LoadError: The config of a hub model could not be written to the hub's cache.
        UnsupportedModelError: The architecture cannot be served.
    """
    check_known(unknown, plan)
    asked = asked_format(quantize, double_quant, compute_dtype)
    config: Any = ref_or_config
    name = None
    if isinstance(ref_or_config, str | os.PathLike):
        from inferkit import catalog

        name = os.fspath(ref_or_config)
        config = catalog.config(
            ref_or_config, revision=revision, trust_remote_code=trust_remote_code
        )
    names = resolve_device(device)
    return plan_config(
        config,
        form=asked,
        context=context,
        max_batch=max_batch,
        devices=names,
        dtype=resolve_dtype(dtype, names, stored_dtype(config)),
        model=name,
        free=free,
        prefill_chunk=prefill_chunk,
        trust_remote_code=trust_remote_code,
    )


def plan_config(
    config: Any,
    *,
    form: WeightFormat,
    context: int | None,
    max_batch: int,
    devices: Sequence[str],
    dtype: str,
    model: str | None = None,
    free: Mapping[str, int] | None = None,
    adjust: Mapping[str, int] | None = None,
    device_map: Mapping[str, str] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """:func:`plan` for a config, with device names and dtype already resolved.

    Devices named in ``free`` need not be attached; their memory is taken to be what is free. To
    what the others say is free, ``adjust`` adds what will be free by then, less what is promised.
    A ``device_map`` says where the modules are, of a model that is loaded.
    """
    kept = weight_format(config, form)
    context = checked_context(config, context)
    check_whole("max_batch", max_batch)
    check_whole("prefill_chunk", prefill_chunk)
    meta = meta_model(config, dtype, trust_remote_code)
    geometry = read_geometry(meta)
    memory = _memory(devices, free or {}, adjust or {})
    held, note = laid_out(meta, config, devices)

    def demand(mode: str) -> Demand:
        if mode == kept.mode:
            return Demand.of(meta, geometry, kept, memory, prefill_chunk, device_map, held)
        return Demand.of(meta, geometry, WeightFormat(mode), memory, prefill_chunk)

    demands = {m: demand(m) for m in ((kept.mode,) if kept.stored else QUANTIZE_MODES)}
    chosen = demands[kept.mode]
    plans = {mode: needed.at(context, max_batch) for mode, needed in demands.items()}
    totals = {mode: sum(d.needed for d in held) for mode, held in plans.items()}
    return MemoryPlan(
        model=model or getattr(config, "name_or_path", "") or type(meta).__name__,
        architecture=type(meta).__name__,
        format=kept,
        dtype=dtype,
        context=context,
        max_batch=max_batch,
        devices=plans[kept.mode],
        device_map=chosen.device_map,
        max_context=_longest(chosen, max_batch, context_limit(config) or _MOST_CONTEXT),
        batch_by_mode={mode: _most_rows(needed, context) for mode, needed in demands.items()},
        totals=totals,
        alternatives={
            mode: totals[mode]
            for mode, held in plans.items()
            if mode != kept.mode and all(d.fits for d in held)
        },
        note=note,
    )


def context_limit(config: Any) -> int | None:
    """The most tokens the model was made for, or None where its positions have no end."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _against(needed: int, where: str, free: int) -> str:
    digits = 1
    while digits < 4 and format_bytes(needed, digits) == format_bytes(free, digits):
        digits += 1  # "needs 11.2 GiB and 11.2 GiB are free" explains nothing
    return f"{format_bytes(needed, digits)} on {where} and {format_bytes(free, digits)} are free"


def _memory(
    names: Sequence[str], free: Mapping[str, int], adjust: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Total and free bytes of each device; those named in ``free`` need not be attached."""
    memory = {}
    for name in names:
        if name in free:
            memory[name] = (free[name], free[name])
        else:
            device = find_device(name)
            memory[name] = (device.total, max(0, device.free + adjust.get(name, 0)))
    return memory


def stored_dtype(config: Any) -> str | None:
    stored = config.get_text_config(decoder=True).dtype or config.dtype
    return None if stored is None else str(stored).removeprefix("torch.")


def checked_context(config: Any, context: int | None) -> int:
    """The context to run at: the one asked for, which must make sense, or the default."""
    limit = context_limit(config)
    if context is None:
        return min(_DEFAULT_CONTEXT, limit or _DEFAULT_CONTEXT)
    check_whole("context", context, _LEAST_CONTEXT, "a prompt token and a token that follows")
    if limit is not None and context > limit:
        raise OptionError(
            f"context={context} is more than the {limit} tokens that the model was made for; "
            f"use context={limit} or less."
        )
    return context


def check_whole(name: str, value: Any, least: int = 1, why: str = "") -> None:
    """Raise OptionError unless an option is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        reason = f": {why}" if why else ""
        raise OptionError(f"{name}={value!r} must be a whole number of at least {least}{reason}.")


def check_known(unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise OptionError if there is an unknown option, naming the nearest one of ``function``."""
    for name in unknown:
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
        raise OptionError(unknown_option(name, known))


def _longest(needed: Demand, rows: int, limit: int) -> int:
    longest = _largest(limit, lambda context: needed.fits(context, rows))
    return longest if longest >= _LEAST_CONTEXT else 0


def _most_rows(needed: Demand, context: int) -> int:
    return _largest(_MOST_ROWS, lambda rows: needed.fits(context, rows))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..most for which ``fits(n)``, which is monotone; 0 if none."""
    return bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))
