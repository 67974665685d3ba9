"""Offloaded weights: they lie in memory or on disk, and travel to the device that runs them.

accelerate's hooks bring them, one layer at a time, before its forward pass, and drop them after it.
What lies on disk is read for every pass, from the checkpoint itself where its safetensors have the
weights as the model uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors import safe_open
from torch import nn

from inferkit.errors import GenerationError
from inferkit.footprint import kept_in_fp32

__all__ = ["Offloaded", "input_device", "offload", "running"]


class Offloaded:
    """The offloaded weights of a model, and their one owner.

    Args:
        layers: The weights of each layer that is brought as a whole.
        then: What else to do when they are released.
    """

    def __init__(self, layers: Sequence[_Weights], then: Callable[[], None]) -> None:
        self._layers = layers
        self._then = then

    @property
    def nbytes(self) -> int:
        """Bytes of those that lie in memory; shared ones once."""
        held = {t.data_ptr(): t.nbytes for layer in self._layers for t in layer.memory.values()}
        return sum(held.values())

    def release(self) -> None:
        """Give back the memory and the files, whoever still refers to the model's hooks."""
        for layer in self._layers:
            layer.memory.clear()
            layer.disk.clear()
        self._then()


@dataclass(frozen=True)
class _OnDisk:
    """A weight in a safetensors file, as it was when the model was loaded."""

    file: Path
    key: str
    dtype: torch.dtype
    state: tuple[int, int]

    def read(self) -> torch.Tensor:
        """Read it, by reading and not by mapping: whoever shortens a mapped file kills the kernel.

        Raises:
            GenerationError: The file is another one by now.
        """
        if not self.file.exists() or _state(self.file) != self.state:
            raise GenerationError(
                f"{self.file} is no longer the file that was loaded, and the weights that lie on "
                "disk are read from it at every step. Unload the model, and load it again."
            )
        with safe_open(self.file, framework="pt", backend="pread") as opened:
            weight: torch.Tensor = opened.get_tensor(self.key)
        return weight.to(self.dtype)


class _Weights(Mapping[str, torch.Tensor]):
    """What accelerate's hook of a layer asks for its weights, by their names in the layer."""

    def __init__(self, memory: dict[str, torch.Tensor], disk: dict[str, _OnDisk]) -> None:
        self.memory, self.disk = memory, disk

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.memory[name] if name in self.memory else self.disk[name].read()

    def __iter__(self) -> Iterator[str]:
        yield from (*self.memory, *self.disk)

    def __len__(self) -> int:
        return len(self.memory) + len(self.disk)


def offload(
    module: Any, device_map: Mapping[str, str], run: Sequence[str], then: Callable[[], None]
) -> Offloaded:
    """Have what lies elsewhere than on the devices that run layers travel to the last of these.

    transformers hooked the model up already, but otherwise: with a mapped file, which a changed
    checkpoint would break; on any one of several accelerators; and with a hook on every layer that
    stays where it is too.

    Args:
        module: From ``from_pretrained`` with this ``device_map``.
        device_map: Device by module; those not in ``run`` are offloaded.
        run: The devices that run layers.
        then: What else to do when the weights are released.
    """
    away = [name for name, device in device_map.items() if device not in run]
    index = _index(module)
    for hooked in [module] if len(run) == 1 else map(module.get_submodule, away):
        remove_hook_from_module(hooked, recurse=True)
    copies: dict[int, torch.Tensor] = {}
    in_fp32 = kept_in_fp32(module)
    layers = []
    for name in away:
        layer = module.get_submodule(name)
        weights = _Weights({}, {})
        for leaf, parameter in layer.named_parameters():
            full = f"{name}.{leaf}"
            if parameter.device.type == "meta":
                dtype = torch.float32 if in_fp32(full) else parameter.dtype
                parameter.data = parameter.data.to(dtype)
                file = Path(index[full]["safetensors_file"])
                weights.disk[leaf] = _OnDisk(file, index[full]["weight_name"], dtype, _state(file))
            else:  # pages of a file, as yet; a copy for all that share them
                key = parameter.data_ptr()
                weights.memory[leaf] = copies.setdefault(key, parameter.detach().clone())
        hook = AlignDevicesHook(
            execution_device=torch.device(run[-1]),
            offload=True,
            weights_map=weights,
            place_submodules=True,
            skip_keys=module._skip_keys_device_placement,
        )
        add_hook_to_module(layer, hook)
        layers.append(weights)
    return Offloaded(layers, then)


def running(
    module: nn.Module, above: torch.device | None = None
) -> Iterator[tuple[nn.Module, torch.device | None]]:
    """Every module of a model with the device that it runs on, where that can be told."""
    placed = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    own = next((p.device for p in module.parameters() if p.device.type != "meta"), above)
    device = own if placed is None else torch.device(placed)
    yield module, device
    for child in module.children():
        yield from running(child, above if device is None else device)


def input_device(module: Any) -> torch.device:
    """The device that a model takes its tokens on."""
    embeddings = module.get_input_embeddings()
    found = next((device for m, device in running(module) if m is embeddings), None)
    return torch.device("cpu") if found is None else found


def _index(module: Any) -> Mapping[str, Any]:
    """Where transformers found, or wrote, each weight on disk."""
    for child in module.modules():
        weights_map = getattr(getattr(child, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            index: Mapping[str, Any] = weights_map.dataset.index
            return index
    return {}


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
