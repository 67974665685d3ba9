"""The devices of this machine: what is attached, how much memory is left, which dtype suits."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferkit.cgroups import cgroup_limits
from inferkit.errors import DeviceError, OptionError
from inferkit.html import format_bytes, table, text_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Device",
    "DeviceTable",
    "attached_names",
    "cpu_description",
    "cpu_memory",
    "device_uuid",
    "devices",
    "dtype_name",
    "find_device",
    "held_memory",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "runners",
]

_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
}
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "sve", "bf16", "i8mm")


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: Canonical name: ``"cuda:0"``, ``"mps"``, ``"cpu"``; ``"disk"`` where weights may lie.
        kind: ``"cuda"``, ``"mps"``, ``"cpu"`` or ``"disk"``.
        description: What the maker calls it, with what matters for speed.
        total: Memory in bytes; for the CPU no more than the cgroup (container) allows.
        free: Bytes that can be allocated now.
        bf16: Whether it multiplies bfloat16 natively, not only by emulation.
    """

    name: str
    kind: str
    description: str
    total: int
    free: int
    bf16: bool


class DeviceTable(tuple[Device, ...]):
    """The attached devices, the one that ``device="auto"`` picks first."""

    __slots__ = ()
    _HEADER = ("device", "description", "memory", "free", "bf16")

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                d.name,
                d.description,
                format_bytes(d.total),
                format_bytes(d.free),
                "native" if d.bf16 else "no",
            )
            for d in self
        ]

    def __repr__(self) -> str:
        return text_table(self._HEADER, self._rows())

    def _repr_html_(self) -> str:
        return table(self._HEADER, self._rows(), caption="Devices")

    def to_frame(self) -> pd.DataFrame:
        """The table as a pandas DataFrame, one row per device, memory in bytes."""
        import pandas as pd

        return pd.DataFrame([asdict(d) for d in self])


def devices() -> DeviceTable:
    """List the attached devices with their memory: accelerators first, the CPU last.

    One that does not answer is listed without memory, and its description says why.
    """
    return DeviceTable(map(_listed, attached_names()))


def find_device(name: str) -> Device:
    """The device with this canonical name, as it is now; no other one is asked.

    Raises:
        DeviceError: The device is not attached, or does not answer.
    """
    if name == "disk":
        return _disk()
    attached = attached_names()
    if name not in attached:
        raise _not_attached(name, attached)
    if name == "cpu":
        return _cpu_device()
    return _mps_device() if name == "mps" else _cuda_device(int(name.removeprefix("cuda:")))


def resolve_device(device: Any, imagined: Iterable[str] = ()) -> list[str]:
    """Turn what a person wrote into canonical device names.

    Args:
        device: ``"auto"`` (the first CUDA device, else MPS, else the CPU), ``"cpu"``, ``"cuda"``,
            ``"cuda:N"``, ``"mps"``, a ``torch.device``, or a list of those; after accelerators the
            list may have ``"cpu"``, and ``"disk"`` at its end, where weights lie that travel to
            the device before them when they are needed.
        imagined: Names that need not be attached.

    Raises:
        OptionError: The value is not a device name, or names a device twice or out of order.
        DeviceError: The device is not attached to this machine.
    """
    many = isinstance(device, (list, tuple))
    asked = [_canonical(d, device) for d in (device if many else [device])]
    attached = attached_names()
    if asked == ["auto"] and not many:
        return attached[:1]
    if not asked or "auto" in asked or len(set(asked)) < len(asked):
        raise _bad_device(device)
    for name in asked:
        if name not in (*attached, *imagined, "disk"):
            raise _not_attached(name, attached)
    _check_order(asked)
    return asked


def runners(names: Sequence[str]) -> tuple[str, ...]:
    """Those of several devices that run layers: the accelerators, or the CPU where there is none.

    On the others, weights lie that travel to the last of these when they are needed.
    """
    return tuple(n for n in names if n not in ("cpu", "disk")) or ("cpu",)


def resolve_dtype(
    dtype: Any, device_names: Sequence[str], checkpoint_dtype: str | None = None
) -> str:
    """Choose the dtype of weights and KV cache; returns torch's name for it.

    ``"auto"`` takes bfloat16 where the device multiplies it natively (CUDA capability 8.0 and up,
    CPUs with AVX-512 BF16, AMX or Arm BF16), except that a float16 checkpoint stays float16 on
    CUDA, because bfloat16 would round its weights; float16 on older CUDA devices and MPS; float32
    on other CPUs. With several devices the accelerators decide, and float16, which all of them
    have, settles a difference. The environment variable ``INFERKIT_DTYPE`` is what "auto" means
    where it is set: half of the memory may count for more than the speed, as it does on Binder.

    Args:
        dtype: ``"auto"``, ``"bfloat16"``/``"bf16"``, ``"float16"``/``"fp16"``/``"half"``,
            ``"float32"``/``"fp32"``/``"float"``, or the ``torch.dtype``.
        device_names: Canonical names, from :func:`resolve_device`.
        checkpoint_dtype: The dtype the weights are stored in, if known.

    Raises:
        OptionError: The value is none of those.
    """
    if dtype != "auto":
        return dtype_name(dtype)
    if wanted := os.environ.get("INFERKIT_DTYPE"):
        return dtype_name(wanted, "INFERKIT_DTYPE")
    deciding = runners(device_names)
    stored = str(checkpoint_dtype).removeprefix("torch.")
    liked = {_preferred_dtype(d, stored) for d in deciding}
    return liked.pop() if len(liked) == 1 else "float16"


def dtype_name(dtype: Any, option: str = "dtype") -> str:
    """Give torch's name of a dtype that a person wrote; "auto" is none.

    Raises:
        OptionError: It is none that models run in; the message names the ``option``.
    """
    name = str(dtype).removeprefix("torch.").lower()
    if name in _DTYPES:
        return _DTYPES[name]
    raise OptionError(
        f"{option}={dtype!r} is not supported; use 'auto', 'bfloat16' ('bf16'), "
        "'float16' ('fp16', 'half') or 'float32' ('fp32', 'float')."
    )


def release_memory(device_names: Iterable[str]) -> None:
    """Give memory that nothing refers to any more back to the devices and the system.

    Collects garbage, empties torch's caching allocators, and asks glibc to return free heap pages,
    which it otherwise keeps, so that the process's resident memory falls too.
    """
    gc.collect()
    torch = sys.modules.get("torch")  # never imported: nothing of its to release
    if torch is not None:
        kinds = {name.partition(":")[0] for name in device_names}
        if "cuda" in kinds and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if "mps" in kinds and torch.backends.mps.is_available():
            torch.mps.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Ask glibc to return free heap pages to the system; takes some milliseconds."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch tells it of a CPU by a RuntimeError."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(t in text for t in ("out of memory", "allocate memory", "DefaultCPUAllocator"))


def _canonical(device: Any, given: Any) -> str:
    text = str(device).strip().lower()
    if not re.fullmatch(r"auto|cpu|disk|mps|cuda(:\d+)?", text):
        raise _bad_device(given)
    kind, _, index = text.partition(":")
    return f"cuda:{int(index or 0)}" if kind == "cuda" else kind


def _bad_device(device: Any) -> OptionError:
    return OptionError(
        f"device={device!r} is not a device; use 'auto', 'cpu', 'cuda', 'cuda:N', 'mps', "
        "or a list of different ones such as ['cuda:0', 'cuda:1']."
    )


def _check_order(names: Sequence[str]) -> None:
    """Accelerators, then "cpu", then "disk", and something that runs layers."""
    if list(names) == ["disk"]:
        raise OptionError(
            "device='disk' runs nothing: name what runs the layers before it, such as "
            "['cpu', 'disk'] or ['cuda:0', 'disk']."
        )
    right = sorted(names, key=lambda name: (name == "cpu") + 2 * (name == "disk"))
    if list(names) != right:
        raise OptionError(
            f"device={list(names)!r}: 'cpu' comes after accelerators and 'disk' last, because "
            f"earlier devices are filled first; write {right!r}."
        )
    if "mps" in names and "cpu" in names:
        raise OptionError(
            f"device={list(names)!r}: the GPU of a Mac has its memory from the CPU, so that "
            "nothing is gained there; write 'mps', or ['mps', 'disk']."
        )


def _not_attached(name: str, attached: Sequence[str]) -> DeviceError:
    return DeviceError(
        f"{name} is not attached to this machine; attached: {', '.join(attached)}. "
        "Use one of those, or device='auto'."
    )


def attached_names() -> list[str]:
    """Canonical names of what is attached, the one that ``device="auto"`` picks first."""
    import torch

    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def _preferred_dtype(name: str, stored: str) -> str:
    import torch

    if name == "cpu":
        return "bfloat16" if cpu_has_bf16() else "float32"
    if name == "mps" or stored == "float16":
        return "float16"
    if name not in attached_names():  # imagined: one of today's
        return "bfloat16"
    return "bfloat16" if torch.cuda.get_device_capability(name) >= (8, 0) else "float16"


def _listed(name: str) -> Device:
    try:
        return find_device(name)
    except DeviceError as error:
        return Device(name, name.partition(":")[0], str(error), 0, 0, False)


def _cuda_device(index: int) -> Device:
    """Asking for its memory makes a context on the device, which takes some hundred MB there."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(index)
        # What torch keeps of freed tensors is taken from the device, and free to this process.
        free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
    except RuntimeError as error:  # a full device, or one that another process has for itself
        line = str(error).strip().split("\n", 1)[0]
        raise DeviceError(
            f"cuda:{index} does not answer ({line}). `nvidia-smi` shows who uses it: end that "
            "program, or name another device, such as device='cpu'."
        ) from error
    description = f"{name}, compute capability {major}.{minor}"
    return Device(f"cuda:{index}", "cuda", description, total, free, major >= 8)


def _mps_device() -> Device:
    import psutil
    import torch

    # Apple's GPU shares the host's memory; Metal recommends a share of it as the ceiling.
    total = torch.mps.recommended_max_memory()
    left = total - torch.mps.driver_allocated_memory()
    free = max(0, min(left, psutil.virtual_memory().available))
    return Device("mps", "mps", f"{platform.machine()} GPU (Metal)", total, free, False)


def _cpu_device() -> Device:
    return Device("cpu", "cpu", cpu_description(), *cpu_memory(), cpu_has_bf16())


def cpu_memory() -> tuple[int, int]:
    """Memory of the machine and what of it is free, no more than the container allows; no torch."""
    import psutil

    host = psutil.virtual_memory()
    total, free = int(host.total), int(host.available)
    for limit, left in cgroup_limits():
        total, free = min(total, limit), min(free, left)
    return total, max(0, free)


def device_uuid(name: str) -> str:
    """The driver's name for a GPU, the same in all processes; "" where there is none."""
    if not name.startswith("cuda:"):
        return ""
    import torch

    properties = torch.cuda.get_device_properties(int(name.removeprefix("cuda:")))
    return str(getattr(properties, "uuid", ""))


def held_memory(name: str) -> int:
    """Bytes of an accelerator that torch holds for this process; 0 of the CPU."""
    import torch

    if name.startswith("cuda:"):
        return int(torch.cuda.memory_reserved(int(name.removeprefix("cuda:"))))
    return int(torch.mps.driver_allocated_memory()) if name == "mps" else 0


def _disk() -> Device:
    """The disk with the folder for temporary files, where offloaded weights are written."""
    folder = tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    return Device("disk", "disk", folder, usage.total, usage.free, False)


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 itself."""
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        if not torch.backends.mkldnn.is_available():
            return False
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # oneDNN's own answer is also yes where it emulates bf16 with plain AVX-512, which is slow.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@lru_cache(maxsize=1)
def cpu_description() -> str:
    """The processor, as its maker calls it, with what matters for speed; no torch."""
    import psutil

    model, flags = _cpuinfo()
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    parts = [model or platform.processor() or platform.machine(), f"{physical} cores"]
    if logical != physical:
        parts[1] += f" ({logical} threads)"
    known = [flag for flag in _CPU_FLAGS if flag in flags]
    return ", ".join(parts + ([" ".join(known)] if known else []))


def processor() -> frozenset[str]:
    """All of the CPU that code compiled on it depends on: its name, and its instruction sets."""
    model, flags = _cpuinfo()
    return flags | {model or platform.processor() or platform.machine()}


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Model name and instruction-set flags of the first core; both empty where unknown."""
    if not path.exists():
        return "", frozenset()
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features", "")
    return fields.get("model name", ""), frozenset(flags.split())
