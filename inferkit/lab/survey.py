"""What all kernels and devices of this machine are doing: for the server and `inferkit ps`."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import PurePath

import msgspec

from inferkit import __version__
from inferkit.html import format_bytes, format_number, text_table
from inferkit.lab import folder, machine
from inferkit.lab.schema import VERSION, Attached, Kernel, State

__all__ = ["as_json", "as_text", "survey"]

_NONE = "No kernel of this user has loaded a model."
_OUT_OF_SIGHT = "Out of sight, on another machine or in another container: {} with inferkit."


def survey(
    here: frozenset[str] = frozenset(),
    out_of_sight: frozenset[str] = frozenset(),
    pause: float | None = None,
) -> State:
    """Read the kernels' files, and the devices.

    Args:
        here: Ids of the kernels of this machine that whoever reads can reach.
        out_of_sight: Ids of those that it has on another.
        pause: Seconds to watch the CPU; None for the time since it was last looked at.
    """
    kernels, elsewhere = folder.read(here)
    return State(
        version=VERSION,
        inferkit=__version__,
        time=time.time(),
        devices=machine.attached(kernels, pause),
        kernels=kernels,
        out_of_sight=sorted(out_of_sight.union(elsewhere)),
    )


def as_json(state: State) -> str:
    """The state as one JSON document, for people to read too."""
    return msgspec.json.format(msgspec.json.encode(state)).decode()


def as_text(state: State) -> str:
    """The state as tables: the devices, and a line for each model."""
    devices = text_table(
        ("device", "memory", "used", "by inferkit", "busy", "description"),
        map(_device_row, state.devices),
    )
    notebooks = {k.state.notebook for k in state.kernels if k.state}
    rows = [row for kernel in state.kernels for row in _model_rows(kernel, notebooks)]
    unseen = [_OUT_OF_SIGHT.format(len(state.out_of_sight))] if state.out_of_sight else []
    if not rows:
        return "\n".join([devices, "", *(unseen or [_NONE])])
    header = ("kernel", "pid", "model", "mode", "batching", "device", "memory")
    models = text_table((*header, "running", "waiting", "tokens/s", "ITL ms"), rows)
    problems = [f"pid {k.pid}: {_printable(k.problem)}" for k in state.kernels if k.problem]
    return "\n".join([devices, "", models, *problems, *unseen])


def _device_row(device: Attached) -> tuple[str, ...]:
    busy = "-" if device.utilization is None else f"{device.utilization:.0f} %"
    ours = format_bytes(sum(share.used for share in device.kernels))
    total, used = format_bytes(device.total), format_bytes(device.used)
    name, description = _printable(device.name), _printable(device.description)
    return (name, total, used, ours, busy, description)


def _title(path: str, paths: Collection[str]) -> str:
    """A notebook's name, with as many of its folders as tell it from the others, as the sidebar."""
    *folders, name = PurePath(path).parts or (path,)
    alike = [other for one in paths if (other := PurePath(one).parts)[-1:] == (name,)]
    for count in range(1, len(folders) + 2):
        if sum(other[-count:] == (*folders, name)[-count:] for other in alike) == 1:
            break
    among = folders[len(folders) + 1 - count :]
    return f"{name} in {PurePath(*among)}" if among else name


def _model_rows(kernel: Kernel, notebooks: Collection[str]) -> Iterator[tuple[object, ...]]:
    notebook = kernel.state.notebook if kernel.state else ""
    name = _title(notebook, notebooks) if notebook else kernel.kernel_id[:8]
    title = (_printable(name), kernel.pid)
    models = kernel.state.models if kernel.state else []
    if not models:
        yield (*title, "-", "-", "-", "-", format_bytes(kernel.memory), 0, 0, "-", "-")
    for model in models:
        yield (
            *title,
            _printable(model.name),
            _printable(model.quantization),
            f"{model.batching} ({model.max_batch})",
            _printable(", ".join(model.devices)),
            format_bytes(sum(model.memory.values())),
            model.running,
            model.waiting,
            format_number(model.rate),
            format_number(model.itl),
        )


def _printable(text: str) -> str:
    """Text from a file for a terminal, which would obey what is no character."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
