"""The devices of this machine and who uses their memory, asked of the system and not of torch.

A GPU of NVIDIA's is asked by NVML, which tells its memory, its utilization and the memory of each
process; of any other accelerator what its kernels wrote last is all there is.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from inferkit.devices import cpu_description, cpu_memory
from inferkit.lab.schema import Attached, Kernel, OnDevice, Share

__all__ = ["attached"]

_APART, _FORGOTTEN = 0.5, 60.0  # seconds between two looks at the CPU: at least, at most


def attached(kernels: Sequence[Kernel], pause: float | None = None) -> list[Attached]:
    """The devices, accelerators first, and what of their memory is whose.

    Args:
        kernels: Those that run.
        pause: Seconds to watch the CPU; None for the time since it was last looked at, of which the
            first call knows nothing.
    """
    gpus = {gpu.uuid: gpu for gpu in _nvidia()}
    seen = _seen(kernels)
    for uuid, gpu in gpus.items():
        gpu.on = seen.pop(uuid, [])
    others = [_Accelerator(uuid, on=on) for uuid, on in seen.items()]
    return [*(gpu.shown() for gpu in (*gpus.values(), *others)), _cpu(kernels, pause)]


@dataclass
class _Accelerator:
    """A GPU.

    Attributes:
        uuid: The driver's name for it.
        device: What NVML tells of it, where that knows it.
        processes: Memory by process, as far as NVML tells.
        on: The kernels that have models on it, and how they see it; in the order of writing.
    """

    uuid: str
    device: Attached | None = None
    processes: dict[int, int] = field(default_factory=dict)
    on: list[tuple[Kernel, OnDevice]] = field(default_factory=list)

    def shown(self) -> Attached:
        """The device with the shares of the kernels on it."""
        shares = [
            # In a container processes have other numbers than NVML knows them by.
            Share(kernel_id=k.kernel_id, used=self.processes.get(k.pid, 0) or device.own)
            for k, device in self.on
        ]
        known = self.device
        if known is None:
            newest = self.on[-1][1]
            used = newest.total - newest.free
            return _device(newest.name, newest.description, newest.total, used, None, shares)
        name = self.on[0][1].name if self.on else known.name
        return _device(name, known.description, known.total, known.used, known.utilization, shares)


def _device(
    name: str,
    description: str,
    total: int,
    used: int,
    utilization: float | None,
    shares: list[Share],
) -> Attached:
    return Attached(
        name=name,
        description=description,
        total=total,
        used=max(used, sum(share.used for share in shares)),
        utilization=utilization,
        kernels=shares,
    )


def _seen(kernels: Sequence[Kernel]) -> dict[str, list[tuple[Kernel, OnDevice]]]:
    """The accelerators that kernels have models on, and how each of them sees it."""
    found: dict[str, list[tuple[Kernel, OnDevice]]] = {}
    written = (k for k in kernels if k.state is not None)
    for kernel in sorted(written, key=lambda k: k.state.written if k.state else 0.0):
        for device in kernel.state.devices if kernel.state else []:
            found.setdefault(_bare(device.uuid) or device.name, []).append((kernel, device))
    return found


def _cpu(kernels: Sequence[Kernel], pause: float | None) -> Attached:
    total, free = cpu_memory()
    used, counted = total - free, sum(k.memory for k in kernels)
    # Pages that processes share are counted in each of them: all together have what is in use.
    scale = min(1.0, used / counted) if counted else 1.0
    shares = [Share(kernel_id=k.kernel_id, used=int(scale * k.memory)) for k in kernels if k.memory]
    utilization = _load.seen() if pause is None else psutil.cpu_percent(pause)
    return _device("cpu", cpu_description(), total, used, utilization, shares)


class _Load:
    """How busy the CPU is between two looks, whoever looks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = -_FORGOTTEN
        self._times = (0.0, 0.0)
        self._percent: float | None = None

    def seen(self) -> float | None:
        """Percent since the look before; of one that comes too soon the same again."""
        with self._lock:
            now = time.monotonic()
            passed = now - self._moment
            if passed < _APART:
                return self._percent
            former, self._times = self._times, _cpu_times()
            self._moment = now
            busy, whole = (new - old for new, old in zip(self._times, former))
            known = passed < _FORGOTTEN and whole > 0
            self._percent = min(100.0, max(0.0, 100 * busy / whole)) if known else None
            return self._percent


_load = _Load()


def _cpu_times() -> tuple[float, float]:
    """Seconds that the processors were busy, and all that passed, since the machine began."""
    times = psutil.cpu_times()
    # Guests' time is in that of users, too.
    whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return whole - times.idle - getattr(times, "iowait", 0.0), whole


def _nvidia() -> Iterator[_Accelerator]:
    """What NVML tells; nothing where it, or its driver, is not there."""
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for number in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):  # one that does not answer is not shown
                yield _gpu(pynvml, number)
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, number: int) -> _Accelerator:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilization = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except nvml.NVMLError:  # parts of a GPU (MIG) have none
        utilization = None
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        processes = []
    device = _device(
        f"cuda:{number}",
        _text(nvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.used),
        utilization,
        [],
    )
    return _Accelerator(
        _bare(_text(nvml.nvmlDeviceGetUUID(handle))),
        device,
        {p.pid: p.usedGpuMemory or 0 for p in processes},
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _bare(uuid: str) -> str:
    """Torch leaves out what NVML begins it with."""
    return uuid.removeprefix("GPU-").lower()
