"""Does it fit? Weights, KV cache and activations per device, from the config alone."""

from __future__ import annotations

import inspect
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from inferkit.demand import Demand, DevicePlan
from inferkit.devices import (
    attached_names,
    find_device,
    resolve_device,
    resolve_dtype,
    runners,
)
from inferkit.errors import DeviceError, OptionError, UnsupportedModelError
from inferkit.footprint import (
    WeightFormat,
    asked_format,
    check_mode_runs,
    meta_model,
    modes_on,
    weight_format,
)
from inferkit.html import format_bytes
from inferkit.kv import PREFILL_CHUNK, LayerKV, kv_geometry, read_geometry
from inferkit.memory_plan import MemoryPlan
from inferkit.placement import check_offload, read_in_place, resolve_max_memory
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
    max_memory: Mapping[str, int | str] | None = None,
    **unknown: Any,
) -> MemoryPlan:
    """Plan the memory of a model from its config alone, before any weight is read.

    What is free is what the devices say. On the CPU that counts the part of a loaded model's KV
    cache that no request has used yet; :func:`inferkit.load` does not give that away twice.

    Args:
        ref_or_config: A hub id, local folder, ``.gguf`` file or ``"demo"``; or a transformers
            config.
        quantize: ``"none"``; ``"int8"``, ``"nf4"`` or ``"fp4"`` (bitsandbytes); on a CPU also
            ``"int8wo"`` or ``"int4wo"`` (weight-only, torch's kernels). A checkpoint that is stored
            quantized stays as it is under "none"; see the plan's ``note``.
        context: Tokens per row, prompt and completion; None is 4096 or the model's maximum if
            that is less.
        max_batch: Rows that run at once.
        device: As in :func:`inferkit.devices.resolve_device`. Where a list goes on to "cpu" or
            "disk", earlier devices are filled first, and what lies on the later ones travels at
            every step, which is slow.
        dtype: As in :func:`inferkit.devices.resolve_dtype`.
        double_quant: Quantize the scales of a 4-bit mode again (bitsandbytes' nested quantization).
        compute_dtype: The dtype that 4-bit weights are unpacked to for each matmul; "auto" is that
            of the model.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Let the repository bring its own model code.
        prefill_chunk: Tokens that one prefill step takes.
        free: Free bytes by device name, in place of what the devices say; those named here need
            not be attached.
        max_memory: The most to take of a device, by name: bytes, or a size such as "6GiB".
        unknown: None; a misspelt option is an OptionError that names the nearest one.

    Raises:
        OptionError: An option is unknown or out of range, the checkpoint is stored quantized in
            another format, or the devices have no kernels for the mode.
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
    names = resolve_device(device, imagined=free or ())
    return plan_config(
        config,
        form=asked,
        context=context,
        max_batch=max_batch,
        devices=names,
        dtype=resolve_dtype(dtype, names, stored_dtype(config)),
        model=name,
        free=free,
        max_memory=resolve_max_memory(max_memory, names),
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
    max_memory: Mapping[str, int] | None = None,
    device_map: Mapping[str, str] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """:func:`plan` for a config, with device names and dtype already resolved.

    Devices named in ``free`` need not be attached; their memory is taken to be what is free. To
    what the others say is free, ``adjust`` adds what will be free by then, less what is promised;
    of that, no more than ``max_memory`` is taken. A ``device_map`` says where the modules are,
    of a model that is loaded.
    """
    kept = weight_format(config, form)
    check_offload(config, devices)
    check_mode_runs(kept, devices)
    context = checked_context(config, context)
    check_whole("max_batch", max_batch)
    check_whole("prefill_chunk", prefill_chunk)
    meta = meta_model(config, dtype, trust_remote_code)
    geometry = read_geometry(meta)
    held, note = laid_out(meta, config, devices)

    def memory(names: Sequence[str]) -> dict[str, tuple[int, int]]:
        in_place = read_in_place(meta) if "disk" in names else 0
        kept_back = {"disk": in_place, **(adjust or {})}
        return _memory(names, free or {}, kept_back, max_memory or {})

    def demand(mode: str) -> Demand:
        room = memory(devices)
        if mode == kept.mode:
            return Demand.of(meta, geometry, kept, room, prefill_chunk, device_map, held)
        return Demand.of(meta, geometry, WeightFormat(mode), room, prefill_chunk)

    def fits_on(names: Sequence[str]) -> bool:
        try:
            wider = Demand.of(meta, geometry, kept, memory(names), prefill_chunk, stored=held)
        except (DeviceError, UnsupportedModelError):  # busy; or layers that cannot be told apart
            return False
        return wider.fits(context, max_batch)

    demands = {m: demand(m) for m in ((kept.mode,) if kept.stored else modes_on(devices))}
    chosen = demands[kept.mode]
    plans = {mode: needed.at(context, max_batch) for mode, needed in demands.items()}
    totals = {mode: sum(d.needed for d in held) for mode, held in plans.items()}
    fits = all(d.fits for d in plans[kept.mode])
    wider = () if fits or kept.stored else _wider_lists(devices, free)
    return MemoryPlan(
        model=model or getattr(config, "name_or_path", "") or type(meta).__name__,
        architecture=type(meta).__name__,
        format=kept,
        dtype=dtype,
        context=context,
        max_batch=max_batch,
        devices=plans[kept.mode],
        device_map=chosen.device_map(context, max_batch),
        max_context=_longest(chosen, max_batch, context_limit(config) or _MOST_CONTEXT),
        batch_by_mode={mode: _most_rows(needed, context) for mode, needed in demands.items()},
        totals=totals,
        alternatives={
            mode: totals[mode]
            for mode, held in plans.items()
            if mode != kept.mode and all(d.fits for d in held)
        },
        note=" ".join(
            filter(None, (note, _offload_note(plans[kept.mode], kept), _kernel_note(devices, kept)))
        ),
        max_memory=max_memory or {},
        spread=next((names for names in wider if fits_on(names)), ()),
    )


def context_limit(config: Any) -> int | None:
    """The most tokens the model was made for, or None where its positions have no end."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _memory(
    names: Sequence[str],
    free: Mapping[str, int],
    adjust: Mapping[str, int],
    limits: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
    """Total and free bytes of each device; those named in ``free`` need not be attached."""
    memory = {}
    for name in names:
        if name in free:
            total = left = free[name]
        else:
            device = find_device(name)
            total, left = device.total, max(0, device.free + adjust.get(name, 0))
        memory[name] = (total, min(left, limits.get(name, left)))
    return memory


def _wider_lists(names: Sequence[str], free: Mapping[str, int] | None) -> Iterator[tuple[str, ...]]:
    """Longer lists of devices: all accelerators, then the CPU too, then the disk too."""
    own = all_of_them = runners(names)
    hosts: tuple[tuple[str, ...], ...] = ((), ("cpu",), ("cpu", "disk"))
    if own != ("cpu",):
        there = attached_names() if free is None else free
        all_of_them += tuple(n for n in there if n not in (*own, "cpu", "disk"))
    if {"cpu", "mps"} & set(all_of_them):
        hosts = ((), ("disk",))
    for host in hosts:
        # One that is small or busy, and the last, could not run what is offloaded.
        for run in dict.fromkeys((all_of_them, own)):
            if len(run + host) > len(names):
                yield run + host


def _offload_note(devices: Sequence[DevicePlan], form: WeightFormat) -> str:
    names = [d.name for d in devices]
    run = runners(names)
    away = [d for d in devices if d.name not in run and d.weights]
    if not away:
        return ""
    sizes = " and ".join(f"{format_bytes(d.weights)} on {d.name}" for d in away)
    plain = "" if form.mode == "none" else ", and stay unquantized"
    return f"The weights that lie offloaded, {sizes}, travel to {run[-1]} at every step{plain}."


def _kernel_note(devices: Sequence[str], form: WeightFormat) -> str:
    if form.mode != "int8" or "cpu" not in runners(devices):
        return ""
    # LLM.int8() multiplies the outlier columns of each input apart, however many there are.
    return (
        "int8 on a CPU also compiles kernels for many shapes, up to 0.2 GB that stay in the "
        "process and are not counted here."
    )


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
    """Raise OptionError unless an option is a whole number that is large enough and not absurd."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and abs(value) > sys.maxsize:  # not shown: Python may refuse to write its digits
        raise OptionError(f"{name} is out of range: it must be from {least} to {sys.maxsize}.")
    if not whole or value < least:
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
