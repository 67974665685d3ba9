"""Where the modules of a model go: spread over accelerators, or filled in and offloaded.

A device is where weights lie; they run there too, unless they are *offloaded*. With an accelerator
among the devices, what lies on "cpu" or "disk" travels to the first accelerator for each step, and
the KV cache of those layers is there. Without one, what lies on "disk" is read for each step into
the memory of the CPU. accelerate's hooks do it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from inferkit.devices import DISK
from inferkit.errors import OptionError
from inferkit.footprint import (
    WeightFormat,
    kept_in_fp32,
    quantized_linears,
    tensors,
    unquantized_modules,
    weight_bytes,
)

__all__ = ["device_of", "offloaded_leaf", "offloads", "place", "runs_on"]

_SLOW = ("cpu", DISK)


def runs_on(devices: Collection[str]) -> dict[str, str]:
    """For each device, where the modules that lie there run."""
    main = next((d for d in devices if d not in _SLOW), "cpu")
    return {d: main if d in _SLOW else d for d in devices}


def offloads(devices: Collection[str]) -> bool:
    """Whether one of the devices is only a place to keep weights."""
    return any(where != name for name, where in runs_on(devices).items())


def place(
    model: Any,
    form: WeightFormat,
    free: Mapping[str, int],
    reserve: int = 0,
) -> tuple[dict[str, str], WeightFormat]:
    """Decide where the modules go.

    Args:
        model: The meta model.
        form: The format of the weights.
        free: Free bytes by device name; its order is the order of the layers.
        reserve: Bytes that devices on which modules run must keep for KV cache and activations;
            only looked at where weights are offloaded.

    Returns:
        A device map that ``from_pretrained`` accepts, module name to device name, in which no layer
        is cut in two; and the format, which leaves what is offloaded unquantized, because
        bitsandbytes cannot move its layers. What earlier devices cannot take, the last one gets,
        and the plan then says that it does not fit.

    Raises:
        OptionError: Layers are offloaded from a CPU, where bitsandbytes then quantizes none.
    """
    sizes = weight_bytes(model, form)
    if not offloads(list(free)):
        return _spread(model, sizes, free, form), form
    device_map = _fill(model, sizes, free, form, reserve)
    if form.mode == "none":
        return device_map, form
    where = runs_on(list(free))
    away = [module for module, device in device_map.items() if where[device] != device]
    if away and where["cpu"] == "cpu":
        raise OptionError(
            f"quantize={form.mode!r} cannot be had where layers are offloaded from the CPU to "
            "disk: take quantize='none', or leave 'disk' out if the quantized model fits without."
        )
    return device_map, replace(form, skip=(*unquantized_modules(model, form), *away))


def offloaded_leaf(
    model: Any, sizes: Mapping[str, int], device_map: Mapping[str, str], devices: Sequence[str]
) -> int:
    """Bytes of the largest module that travels; accelerate moves one that has tensors at a time."""
    where = runs_on(devices)
    leaves: dict[str, int] = {}
    for name, size in sizes.items():
        owner = name.rpartition(".")[0]
        device = device_of(device_map, owner)
        if where[device] != device:
            leaves[owner] = leaves.get(owner, 0) + size
    return max(leaves.values(), default=0)


def device_of(device_map: Mapping[str, str], name: str) -> str:
    """The device of a module or tensor: that of the nearest module above it in the map.

    A module that the map cuts in parts is where its first part is.
    """
    parent = name
    while parent and parent not in device_map:
        parent = parent.rpartition(".")[0]
    if parent in device_map:
        return device_map[parent]
    return next(d for module, d in device_map.items() if module.startswith(f"{name}."))


def _fill(
    model: Any, sizes: Mapping[str, int], free: Mapping[str, int], form: WeightFormat, reserve: int
) -> dict[str, str]:
    """Fill one device after the other, in order; accelerate leaves room for what travels."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    names = list(free)
    where = runs_on(names)
    special = _special_dtypes(model, form)
    # accelerate counts quantized weights without their scales, and as quantized where they are not.
    counted = compute_module_sizes(model, special_dtypes=special)[""]
    plain = sum(weight_bytes(model, WeightFormat("none")).values())
    budget: dict[int | str, int] = {}
    for index, name in enumerate(names):
        stays = where[name] == name
        left = max(0, free[name] - (reserve if stays else 0))
        real = sum(sizes.values()) if stays else plain
        budget[name if name in _SLOW else index] = int(left * counted / real)
    budget[names[-1] if names[-1] in _SLOW else len(names) - 1] = 2 * sum(sizes.values())
    with _quiet("accelerate.utils.modeling"):
        placed = infer_auto_device_map(
            model,
            max_memory=budget,
            no_split_module_classes=sorted(model._no_split_modules or ()),
            special_dtypes=special,
        )
    return {m: d if isinstance(d, str) else names[d] for m, d in placed.items()}


def _spread(
    model: Any, sizes: Mapping[str, int], free: Mapping[str, int], form: WeightFormat
) -> dict[str, str]:
    """Spread the modules over devices, in order, in proportion of free memory.

    Args:
        model: The meta model.
        sizes: From :func:`weight_bytes`.
        free: Free bytes by device name; its order is the order of the layers.
        form: The format of the weights.

    Returns:
        A device map that ``from_pretrained`` accepts: module name to device name. No layer is cut
        in two. Nothing goes to disk: what the earlier devices cannot take, the last one gets, and
        the plan then says that it does not fit.
    """
    names = list(free)
    if len(names) == 1:
        return {"": names[0]}
    whole = sorted(model._no_split_modules or ())
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in whole]
    block = max((sum(_under(sizes, b).values()) for b in blocks), default=max(sizes.values()))
    largest = max(sizes.values())
    share = sum(sizes.values()) / max(1, sum(free.values()))
    special = _special_dtypes(model, form)

    def attempt(slack: float) -> dict[str, str]:
        # accelerate keeps room on its first device for layers that return from offload. Nothing
        # is offloaded here, so that first device is one that does not exist and has no room.
        budget = {0: 0} | {i: int(share * free[n] + slack) for i, n in enumerate(names, start=1)}
        if largest <= free[names[0]]:  # else a large embedding would move all to later devices
            budget[1] = max(budget[1], int(largest + slack))
        budget[len(names)] = 2 * sum(sizes.values()) + block
        placed = infer_auto_device_map(
            model, max_memory=budget, no_split_module_classes=whole, special_dtypes=special
        )
        return {module: names[int(position) - 1] for module, position in placed.items()}

    def fullest(device_map: Mapping[str, str]) -> float:
        load = dict.fromkeys(names, 0)
        for name, size in sizes.items():
            load[device_of(device_map, name)] += size
        return max(load[name] / max(1, free[name]) for name in names)

    from accelerate import infer_auto_device_map

    with _quiet("accelerate.utils.modeling"):  # it warns of devices that are not attached here
        # What whole layers leave over adds up on the last device; more slack shares it out.
        return min((attempt(part * block) for part in (0.25, 0.5, 1.0)), key=fullest)


def _under(sizes: Mapping[str, int], module: str) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name.startswith(module + ".")}


def _special_dtypes(model: Any, form: WeightFormat) -> dict[str, Any]:
    import torch
    from accelerate.utils import CustomDtype

    packed = torch.int8 if form.mode == "int8" else CustomDtype.INT4
    special: dict[str, Any] = {f"{n}.weight": packed for n in quantized_linears(model, form)}
    in_fp32 = kept_in_fp32(model)
    return special | {n: torch.float32 for n, _ in tensors(model) if in_fp32(n)}


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
