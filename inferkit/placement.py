"""Which device each module of a model lies on.

Over accelerators alone, layers are spread in proportion to free memory. Where the list of devices
goes on to "cpu" or "disk", earlier devices are filled first: what lies on the later ones is
*offloaded*, and travels to the last device that runs layers (see `inferkit.devices.runners`)
whenever it is needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from inferkit.devices import runners
from inferkit.errors import OptionError
from inferkit.footprint import (
    WeightFormat,
    kept_in_fp32,
    packed_growth,
    quantized_linears,
    tensors,
    weight_bytes,
)

__all__ = [
    "Part",
    "check_offload",
    "device_of",
    "fill",
    "offloads",
    "parts_of",
    "quiet",
    "read_in_place",
    "resolve_max_memory",
    "split",
    "within",
]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Part:
    """Modules that lie on one device, because they are one layer or share weights.

    Attributes:
        names: The modules, as a device map names them.
        weights: Bytes on a device that runs them.
        packed: Bytes more where that is a CPU (see :mod:`inferkit.packing`).
        parameters: Bytes where they lie offloaded, unquantized; 0 if nothing of them can travel.
        buffers: Bytes that stay on the device that runs them although they are offloaded.
        layers: The decoder layers among them.
    """

    names: tuple[str, ...]
    weights: int
    packed: int
    parameters: int
    buffers: int
    layers: tuple[int, ...]

    def joined(self, other: Part) -> Part:
        """Both as one."""
        return Part(
            self.names + other.names,
            self.weights + other.weights,
            self.packed + other.packed,
            self.parameters + other.parameters,
            self.buffers + other.buffers,
            self.layers + other.layers,
        )


def offloads(names: Sequence[str]) -> bool:
    """Whether some of the devices run no layers."""
    return len(runners(names)) < len(names)


def check_offload(config: Any, names: Sequence[str]) -> None:
    """Refuse to offload the layers of a checkpoint that is stored quantized.

    bitsandbytes cannot bring a quantized layer from elsewhere: what is offloaded stays unquantized,
    and the files of such a checkpoint have no unquantized weights.

    Raises:
        OptionError: They are to be offloaded.
    """
    if offloads(names) and getattr(config, "quantization_config", None) is not None:
        raise OptionError(
            f"device={list(names)!r}, but the checkpoint is stored quantized, and quantized layers "
            f"cannot travel between devices: write device={_alone(runners(names))!r}, or take the "
            "unquantized checkpoint, whose offloaded layers stay unquantized."
        )


def resolve_max_memory(max_memory: Any, names: Sequence[str]) -> dict[str, int]:
    """Turn what a person wrote into bytes by device name.

    Args:
        max_memory: ``{"cuda:0": "6GiB", "cpu": 300_000_000}``, or None for no limit.
        names: The devices of the model.

    Raises:
        OptionError: It is no such dictionary, or names a device that is not among them.
    """
    if max_memory is None:
        return {}
    if not isinstance(max_memory, Mapping):
        raise OptionError(
            f"max_memory={max_memory!r}: give a dictionary of limits by device, such as "
            f"{{{names[0]!r}: '6GiB'}}."
        )
    limits = {}
    for device, limit in max_memory.items():
        name = "cuda:0" if device == "cuda" else str(device)
        if name not in names:
            raise OptionError(
                f"max_memory names {device!r}, which is not among the devices of this model: "
                f"write {', '.join(map(repr, names))}, or add it to device=[...]."
            )
        limits[name] = _bytes(device, limit)
    return limits


def parts_of(
    model: Any, form: WeightFormat, layers: Sequence[str], cuts: Collection[str] = ()
) -> tuple[Part, ...]:
    """The parts of a meta model, in the order in which they run.

    Args:
        model: From :func:`inferkit.footprint.meta_model`.
        form: The format of the weights that are not offloaded.
        layers: Names of the decoder layers; "" for all makes one part of the model.
        cuts: Names that must not be inside of a part.
    """
    sizes, plain = weight_bytes(model, form), weight_bytes(model, WeightFormat("none"))
    held = {id(t): (sizes[n], plain[n]) for n, t in tensors(model)}
    growth = packed_growth(model, form)
    parts: list[Part] = []
    owner: dict[int, int] = {}
    for name, thing in _modules(model, layers, cuts):
        bare = not hasattr(thing, "named_parameters")
        found = [thing] if bare else list(thing.parameters())
        buffers = 0 if bare else sum(held[id(b)][0] for b in thing.buffers())
        new = [p for p in found if id(p) not in owner]
        part = Part(
            names=(name,),
            weights=sum(held[id(p)][0] for p in new) + buffers,
            packed=sum(size for n, size in growth.items() if within(n, name)),
            parameters=0 if bare else sum(held[id(p)][1] for p in new),
            buffers=buffers,
            layers=tuple(i for i, layer in enumerate(layers) if within(layer, name)),
        )
        first = min((owner[id(p)] for p in found if id(p) in owner), default=len(parts))
        if first < len(parts):
            parts[first] = parts[first].joined(part)
        else:
            parts.append(part)
        owner |= {id(p): first for p in new}
    return _with_cut_layers(parts, layers)


def fill(parts: Sequence[Part], room: Mapping[str, int], caches: Sequence[int]) -> dict[str, str]:
    """A device map that fills earlier devices first, and offloads the rest.

    Args:
        parts: From :func:`parts_of`.
        room: Bytes for weights and KV cache by device, in order. The last device that runs layers
            also has the cache of what is offloaded, and room for the largest part of that.
        caches: Bytes of the KV cache of each part.
    """
    run = runners(list(room))
    kept_free = 0
    while True:
        places = _filled(parts, room, caches, kept_free)
        away = [p for p, d in zip(parts, places) if d not in run]
        needed = max((p.parameters for p in away), default=0) + sum(p.buffers for p in away)
        if needed <= kept_free:
            return {name: d for p, d in zip(parts, places) for name in p.names}
        kept_free = needed


def split(model: Any, free: Mapping[str, int], form: WeightFormat) -> dict[str, str]:
    """Spread the modules over devices, in order, in proportion of free memory.

    Args:
        model: The meta model.
        free: Free bytes by device name; its order is the order of the layers.
        form: The format of the weights.

    Returns:
        A device map that ``from_pretrained`` accepts: module name to device name. No layer is cut
        in two. Nothing is offloaded: what the earlier devices cannot take, the last one gets, and
        the plan then says that it does not fit.
    """
    names, sizes = list(free), weight_bytes(model, form)
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

    with quiet("accelerate.utils.modeling"):  # it warns of devices that are not attached here
        # What whole layers leave over adds up on the last device; more slack shares it out.
        return min((attempt(part * block) for part in (0.25, 0.5, 1.0)), key=fullest)


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


def read_in_place(model: Any) -> int:
    """Bytes of the weights that can be read for every pass from where safetensors have them.

    The others, which transformers puts together from several (the experts of a layer), it writes
    anew when they are offloaded to disk.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, build_glob_alternation

    made = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    patterns = [pattern for converter in made for pattern in converter.target_patterns]
    sizes = weight_bytes(model, WeightFormat("none"))
    if not patterns:
        return sum(sizes.values())
    alternation, *_ = build_glob_alternation(patterns)
    return sum(size for name, size in sizes.items() if not alternation.search(name))


@contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Let a logger say errors alone."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _alone(names: Sequence[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _bytes(device: Any, limit: Any) -> int:
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", limit)
        if isinstance(limit, str)
        else None
    )
    if found is None or found[2].lower() not in _UNITS:
        raise OptionError(
            f"max_memory={{{device!r}: {limit!r}}}: write a number of bytes, or a size such as "
            "'6GiB', '300MB' or '1.5GB'."
        )
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _modules(model: Any, layers: Sequence[str], cuts: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Names and modules that together are the whole model, none of them inside of another.

    A tensor that hangs on a module which is divided stands for itself.
    """
    whole = set(model._no_split_modules or ())
    named = {n: m for n, m in model.named_modules()}
    atoms = {n for n, m in named.items() if n in layers or type(m).__name__ in whole}

    def walk(name: str) -> Iterator[tuple[str, Any]]:
        cut = any(within(other, name) and other != name for other in cuts)
        if not cut and (name in atoms or not any(within(atom, name) for atom in atoms)):
            yield name, named[name]
            return
        module, prefix = named[name], f"{name}." if name else ""
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield prefix + leaf, tensor
        for child in module._modules:
            if prefix + child in named:  # else one that stands elsewhere too
                yield from walk(prefix + child)

    return walk("")


def within(name: str, module: str) -> bool:
    """Whether a name is that of a module or of something in it."""
    return not module or name == module or name.startswith(f"{module}.")


def _with_cut_layers(parts: list[Part], layers: Sequence[str]) -> tuple[Part, ...]:
    """Give a layer that is divided to its first part."""
    known = {layer for part in parts for layer in part.layers}
    for index in set(range(len(layers))) - known:
        first = next(
            i for i, p in enumerate(parts) if any(within(n, layers[index]) for n in p.names)
        )
        parts[first] = replace(parts[first], layers=(*parts[first].layers, index))
    return tuple(parts)


def _filled(
    parts: Sequence[Part], room: Mapping[str, int], caches: Sequence[int], kept_free: int
) -> list[str]:
    """For each part the first device that has room for it, else the last one.

    What is quantized where it stays chooses first: offloaded, it would be several times as large.
    """
    names, run = list(room), runners(list(room))
    last = run[-1]

    def cost(part: Part, cache: int, name: str) -> int:
        if name not in run:
            return part.parameters
        weights = part.weights + (part.packed if name == "cpu" else 0)
        return weights if name == last else weights + cache

    left = dict(room)
    left[last] -= kept_free + sum(caches)  # what no other device runs, this one does
    left[names[0]] -= sum(p.weights for p in parts if not p.parameters)
    places = [names[0]] * len(parts)  # but for tables of a few bytes, which do not travel
    travel = [i for i, part in enumerate(parts) if part.parameters]
    for i in sorted(travel, key=lambda i: parts[i].weights / parts[i].parameters):
        part, cache = parts[i], caches[i]
        name = next((n for n in names if cost(part, cache, n) <= left[n]), names[-1])
        left[name] -= cost(part, cache, name)
        if name in run and name != last:
            left[last] += cache
        places[i] = name
    return places


def _under(sizes: Mapping[str, int], module: str) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name.startswith(module + ".")}


def _special_dtypes(model: Any, form: WeightFormat) -> dict[str, Any]:
    import torch
    from accelerate.utils import CustomDtype

    packed = torch.int8 if form.mode == "int8" else CustomDtype.INT4
    special: dict[str, Any] = {f"{n}.weight": packed for n in quantized_linears(model, form)}
    in_fp32 = kept_in_fp32(model)
    return special | {n: torch.float32 for n, _ in tensors(model) if in_fp32(n)}
