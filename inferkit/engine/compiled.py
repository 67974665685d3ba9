"""Compiled code in the place of a model's decoder layers, for the passes that it was compiled for.

A layer in a pass of another kind (see `tracing`), or whose cache says that it is not to be
compiled, runs as its architecture's own code does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from inferkit import kernels
from inferkit.packing import PackedLinear

CONTENTS = "layers.json"


@dataclass(frozen=True, slots=True)
class _Graph:
    """What layers share: the code for each kind of pass (see `tracing`), and how it is called."""

    programs: dict[str, Any]
    tensors: tuple[Callable[[tuple[Any, Any]], Any], ...]
    cache: Callable[[tuple[Any, Any]], Any]
    weights: tuple[str, ...]
    wrapped: bool


class CompiledLayers:
    """The decoder layers of a module, each with its compiled code.

    Args:
        module: The model whose layers they are; their ``forward`` is replaced.
        folder: What `tracing` made for the same architecture, dtypes and shapes.

    Raises:
        RuntimeError: A file cannot be loaded.
    """

    def __init__(self, module: Any, folder: Path) -> None:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        found, kinds = contents["graphs"], contents["kinds"]
        graphs = [_graph(folder, i, g, kinds) for i, g in enumerate(found)]
        self._layers = [
            _Layer(module.get_submodule(name), index, graphs[graph])
            for index, (name, graph) in enumerate(contents["layers"])
        ]
        for layer in self._layers:  # only when nothing can go wrong any more
            layer.install()

    def release(self) -> None:
        """Let go of the weights, and have the layers run their own code again."""
        for layer in self._layers:
            layer.release()
        self._layers.clear()


class _Layer:
    """Stands in for one layer's ``forward``."""

    def __init__(self, module: Any, index: int, graph: _Graph) -> None:
        self._module, self._index, self._graph = module, index, graph
        self._weights = [_weight(module, name) for name in graph.weights]
        self._forward = module.forward

    def install(self) -> None:
        """Take the place of the layer's ``forward``."""
        self._module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph, given = self._graph, (args, kwargs)
        cache = graph.cache(given)
        operands = cache.operands(self._index) if getattr(cache, "compiled", False) else None
        if operands is None:
            return self._forward(*args, **kwargs)
        rows, tokens = operands[3].shape
        kind = "read" if tokens > 1 else "one" if rows == 1 else "many"
        program = graph.programs.get(kind)
        if program is None:
            return self._forward(*args, **kwargs)
        # The code counts on dense tensors, and on all else that the shapes of a step decide.
        inputs = [find(given).contiguous() for find in graph.tensors]
        out = program.boxed_run([*inputs, *operands, *self._weights])[0]
        return (out,) if graph.wrapped else out

    def release(self) -> None:
        """See `CompiledLayers.release`."""
        self._weights.clear()
        if self._module.forward is self:
            del self._module.forward


def _graph(folder: Path, number: int, found: dict[str, Any], kinds: Sequence[str]) -> _Graph:
    return _Graph(
        programs={kind: program(folder / f"{number}-{kind}.pt2") for kind in kinds},
        tensors=tuple(_finder(where) for where in found["tensors"]),
        cache=_finder(found["cache"]),
        weights=tuple(found["weights"]),
        wrapped=found["wrapped"],
    )


def program(path: Path | str) -> Any:
    """The code of a file.

    Raises:
        RuntimeError: It cannot be loaded. Where the system is at fault, loading it may end the
            process: `tracing` tries it in one of its own.
    """
    kernels.reason()  # it may call them by name
    # What torch._inductor.aoti_load_package does, without the seconds of its import.
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)


def _finder(where: Sequence[str | int]) -> Callable[[tuple[Any, Any]], Any]:
    """What takes a value out of (args, kwargs), the way to which is ("kwargs", "mask")."""
    part = 0 if where[0] == "args" else 1
    keys = [itemgetter(key) for key in where[1:]]

    def find(given: tuple[Any, Any]) -> Any:
        value = given[part]
        for key in keys:
            value = key(value)
        return value

    return find


def _weight(module: Any, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    holder = module.get_submodule(owner)
    tensor: torch.Tensor
    if isinstance(holder, PackedLinear) and last == "weight":
        tensor = holder.packed
        if tensor is None:
            raise RuntimeError(f"{name} is no longer packed")
        return tensor
    tensor = getattr(holder, last)
    if not tensor.is_contiguous():
        raise RuntimeError(f"{name} does not lie densely in memory")
    return tensor
