"""Products and attention in bfloat16 for a CPU, by code that is compiled where it runs.

What torch brings (oneDNN) is made for many rows. A decode step multiplies one to some dozen rows,
where it leaves a third of the memory's bandwidth unused, and its attention reads every row as far
as the longest one goes. ``kernels.cpp`` has the two operations that a decoder's time is spent on,
for x86-64 processors with AVX512_BF16 and without AMX (with it, oneDNN is ahead in prefill). The
first use compiles it, in two seconds, and keeps the library::

    <cache>/kernels/<key>-<digest>.so    the key stands for the source, the options and torch

The operations are ``packed_linear`` and ``masked_attention`` of ``torch.ops.inferkit``. Inductor's
code calls them without going through torch (`SHIMS`). Where they cannot be had, `reason` says why,
and torch's own do the same work. The environment variable INFERKIT_KERNELS=0 asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from inferkit.errors import first_line
from inferkit.exclusive import holding
from inferkit.folders import cache_dir, writable_by_others

__all__ = ["SHIMS", "pack", "packed_shape", "reason", "serves", "unpack", "used"]

_PANEL = 64  # rows of a weight that lie together, as in kernels.cpp
_OPTIONS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
)
_SOURCE = Path(__file__).with_name("kernels.cpp")
_PATIENCE = 120  # seconds for the compiler
_log = logging.getLogger("inferkit")

_torch = torch.library.Library("inferkit", "DEF")
_torch.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor")
_torch.define(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale, "
    "float softcap, Tensor? sinks) -> Tensor"
)

SHIMS: Mapping[Any, list[str]] = {
    torch.ops.inferkit.packed_linear.default: [
        "AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle weight,"
        " AtenTensorHandle* bias, int64_t out_features, AtenTensorHandle* made)"
    ],
    torch.ops.inferkit.masked_attention.default: [
        "AOTITorchError aoti_torch_cpu_masked_attention(AtenTensorHandle query, AtenTensorHandle "
        "key, AtenTensorHandle value, AtenTensorHandle mask, double scale, double softcap, "
        "AtenTensorHandle* sinks, AtenTensorHandle* made)"
    ],
}
"""For inductor's ``aot_inductor.custom_ops_to_c_shims``; the library must be loaded first."""


# -- whether they can be had ---------------------------------------------------------------------

_building = threading.RLock()
_outcome: list[str | None] = []  # of the first call; empty until then


def reason() -> str | None:
    """Why the operations cannot be had in this process, or None once they are there.

    The first call may compile them. It can be interrupted, and is then made again.
    """
    if not _outcome:
        with holding(_building):
            if not _outcome:
                _outcome.append(_obstacle())
    return _outcome[0]


def _obstacle() -> str | None:
    """Why not, or None where they were made and loaded."""
    if problem := _unfit():
        return problem
    try:
        _load(_library())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.debug("The kernels cannot be had.", exc_info=True)
        return first_line(error)
    return None


def _unfit() -> str | None:
    if os.environ.get("INFERKIT_KERNELS") == "0":
        return "INFERKIT_KERNELS=0"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are for Linux on x86-64"
    if not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX512_BF16"
    if torch.cpu._is_amx_tile_supported():
        return "the processor has AMX, for which torch's are better"
    return None


def used(devices: Collection[str], dtype: str) -> str | None:
    """What stands for the code that a model on these devices is computed with, if any is."""
    computed = dtype == "bfloat16" and "cpu" in devices and not reason()
    return _key() if computed else None


def serves(*tensors: torch.Tensor) -> bool:
    """Whether these tensors are the operations' to work on, as far as device and dtype go."""
    on_cpu = all(t.device.type in ("cpu", "meta") and t.dtype == torch.bfloat16 for t in tensors)
    return on_cpu and reason() is None


# -- the library ---------------------------------------------------------------------------------


@functools.cache
def _key() -> str:
    """What stands for the source, and for all else that the library depends on."""
    made_of = (*_OPTIONS, torch.__version__, *platform.libc_ver())
    parts = (_SOURCE.read_bytes(), *(one.encode() for one in made_of))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _library() -> Path:
    """The compiled library, made now if need be."""
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if writable_by_others(folder):
        raise RuntimeError(f"others may write to {folder}, whose code would be run: remove it")
    for found in folder.glob(f"{_key()}-*.so"):
        if not writable_by_others(found) and found == _named(found, folder):
            return found
        found.unlink()  # cut short, or by another's hand
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
        made = Path(scratch) / "made.so"
        _compile(made)
        made.chmod(0o700)
        return made.rename(_named(made, folder))


def _named(library: Path, folder: Path) -> Path:
    """Where a library belongs: its name tells what is in it."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    return folder / f"{_key()}-{digest}.so"


def _compile(target: Path) -> None:
    home = Path(torch.__file__).parent
    command = [*_compiler(), *_OPTIONS, "-I", str(home / "include"), str(_SOURCE)]
    command += ["-o", str(target), "-L", str(home / "lib"), "-ltorch_cpu"]
    tried = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_PATIENCE,
        start_new_session=True,  # an interrupt of the kernel is not the compiler's
    )
    if tried.returncode:
        said = tried.stderr.decode(errors="replace")
        _log.debug("%s", said)
        why = next((line for line in said.splitlines() if "error" in line), said[:200])
        raise RuntimeError(f"{command[0]} does not compile them ({why.strip()})")


def _compiler() -> list[str]:
    """gcc's, for clang's threads are of another OpenMP library than torch's."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["g++"]):
        if command and "clang" not in Path(command[0]).name and shutil.which(command[0]):
            return command
    raise RuntimeError("g++ was not found (Debian and Ubuntu: apt-get install g++)")


def _load(path: Path) -> None:
    """Make the library's operations torch's, once they are seen to compute what they should."""
    # Global, for the code that inductor made looks for its functions by name.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.inferkit_linear.argtypes = [*[address] * 4, *[number] * 3]
    library.inferkit_attend.argtypes = [*[address] * 8, ctypes.c_float, ctypes.c_float]
    library.inferkit_linear.restype, library.inferkit_attend.restype = None, ctypes.c_bool

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
    ) -> torch.Tensor:
        if x.shape[-1] != 2 * weight.shape[1] or not all(map(_bf16, (x, weight, bias))):
            raise RuntimeError(f"no product of {x.shape}, {x.dtype} and weights {weight.shape}")
        x = x.contiguous()
        made = x.new_empty(*x.shape[:-1], out_features)
        rows, columns = made.numel() // out_features, x.shape[-1]
        at = (x.data_ptr(), weight.data_ptr(), _address(bias), made.data_ptr())
        library.inferkit_linear(*at, rows, columns, out_features)
        return made

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        rows, heads, tokens, dim = query.shape
        made = query.new_empty(rows, tokens, heads, value.shape[-1])
        sizes = (rows, heads, key.shape[1], tokens, key.shape[2], dim, value.shape[-1])
        strides = [x for t in (query, key, value) for x in t.stride()[:3]]
        strides += [mask.stride(0), mask.stride(2)]
        at = (query.data_ptr(), key.data_ptr(), value.data_ptr(), mask.data_ptr())
        to = (_address(sinks), made.data_ptr(), (number * 7)(*sizes), (number * 11)(*strides))
        if not library.inferkit_attend(*at, *to, scale, softcap):
            raise MemoryError("no memory for attention's sums")
        return made

    _try(linear, attend)
    _torch.impl("packed_linear", linear, "CPU")
    _torch.impl("masked_attention", attend, "CPU")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _bf16(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.dtype == torch.bfloat16


def _try(linear: Any, attend: Any) -> None:
    """Raise RuntimeError unless the operations agree with torch's on a small example."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).bfloat16()

    x, w, bias = some(8, 96), some(70, 96), some(70)
    pairs = [(linear(x, pack(w), bias, 70), x.float() @ w.float().T + bias.float())]
    for tokens in (1, 20):
        q, k, v = some(2, 4, tokens, 64), some(2, 2, 130, 64), some(2, 2, 130, 32)
        mask = torch.zeros(2, 1, tokens, 130, dtype=q.dtype)
        mask[1, :, :, 70:] = torch.finfo(q.dtype).min
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), mask.float(), enable_gqa=True
        )
        pairs.append((attend(q, k, v, mask, 64**-0.5, 0.0, None), wanted.transpose(1, 2)))
    for got, wanted in pairs:
        if not torch.allclose(got.float(), wanted, rtol=0.02, atol=0.02):
            raise RuntimeError("they do not compute here what they should")


# -- what the operations take and give -----------------------------------------------------------


def packed_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """The shape of a weight [rows, columns] in panels; columns must be even."""
    return -(-rows // _PANEL), columns // 2, _PANEL, 2


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A bf16 weight [rows, columns] in panels, as ``linear`` reads it; columns must be even."""
    rows, columns = weight.shape
    made = weight.new_zeros(packed_shape(rows, columns))
    whole, pairs = rows // _PANEL, columns // 2
    made[:whole] = weight[: whole * _PANEL].view(whole, _PANEL, pairs, 2).transpose(1, 2)
    if rest := rows % _PANEL:
        made[whole, :, :rest] = weight[whole * _PANEL :].view(rest, pairs, 2).transpose(0, 1)
    return made


def unpack(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """The weight [rows, columns] that was packed."""
    panels, pairs = packed.shape[:2]
    return packed.transpose(1, 2).reshape(panels * _PANEL, 2 * pairs)[:rows].contiguous()


@torch.library.register_fake("inferkit::packed_linear", lib=_torch)
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("inferkit::masked_attention", lib=_torch)
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[-1])
