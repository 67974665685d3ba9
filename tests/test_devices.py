"""devices: what is attached, how much memory it has, and how names and dtypes are read."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from inferkit.cgroups import cgroup_limits
from inferkit.errors import DeviceError, OptionError

dev = import_module("inferkit.devices")  # `inferkit.devices`, as a name, is the function


def test_the_cpu_is_listed_last_with_memory_within_the_hosts():
    cpu = dev.devices()[-1]
    assert (cpu.name, cpu.kind) == ("cpu", "cpu")
    assert 0 < cpu.free <= cpu.total <= psutil.virtual_memory().total
    assert f"{psutil.cpu_count(logical=False)} cores" in cpu.description


def test_the_table_reads_as_text_as_html_and_as_a_frame():
    found = dev.devices()
    assert "GiB" in repr(found).splitlines()[-1]
    assert found._repr_html_().count("<tr>") == len(found) + 1
    frame = found.to_frame()
    assert frame.loc[len(found) - 1, "name"] == "cpu"
    assert frame["total"].tolist() == [d.total for d in found]


def test_importing_devices_does_not_import_torch():
    code = "import sys, inferkit.devices; sys.exit('torch' in sys.modules)"
    root = Path(dev.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_cgroup_v2_limit_of_a_parent_counts_and_file_cache_is_free(tmp_path):
    root, membership = tmp_path / "fs", tmp_path / "cgroup"
    membership.write_text("0::/pod/app\n")
    stat = "anon 100\nactive_file 300\ninactive_file 200\nshmem 50"
    _write(root / "pod", memory__max=2000, memory__current=900, memory__stat=stat)
    _write(root / "pod/app", memory__max="max", memory__current=900, memory__stat=stat)
    assert cgroup_limits(root, membership) == [(2000, 2000 - (900 - 500))]


def test_cgroup_v2_inside_a_container_is_read_at_the_root_of_the_mount(tmp_path):
    root, membership = tmp_path / "fs", tmp_path / "cgroup"
    membership.write_text("0::/system.slice/docker-abc.scope\n")
    _write(root, memory__max=1000, memory__current=1500, memory__stat="active_file 100")
    assert cgroup_limits(root, membership) == [(1000, 0)]


def test_cgroup_v1_limit_counts_and_its_unlimited_value_does_not(tmp_path):
    root, membership = tmp_path / "fs", tmp_path / "cgroup"
    membership.write_text("9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    unlimited = {"memory__limit_in_bytes": 9223372036854771712, "memory__usage_in_bytes": 7}
    _write(root / "memory", **unlimited, memory__stat="cache 1")
    _write(
        root / "memory/docker/abc",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=600,
        memory__stat="cache 250\ntotal_active_file 150\ntotal_inactive_file 50",
    )
    assert cgroup_limits(root, membership) == [(1000, 600)]


def test_a_limited_container_lowers_what_the_cpu_offers(monkeypatch):
    monkeypatch.setattr(dev, "cgroup_limits", lambda: [(2 << 30, 1 << 30), (3 << 30, 1 << 28)])
    cpu = dev.devices()[-1]
    assert (cpu.total, cpu.free) == (2 << 30, 1 << 28)
    assert dev.find_device("cpu").free == 1 << 28


def test_no_cgroup_files_mean_no_limit(tmp_path):
    assert cgroup_limits(tmp_path, tmp_path / "missing") == []


def test_cpu_model_and_flags_are_read_from_an_arm_cpuinfo_too(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n")
    assert dev._cpuinfo(path) == ("", frozenset({"fp", "asimd", "bf16", "i8mm"}))
    path.write_text("model name\t: Some CPU @ 2 GHz\nflags\t\t: avx2 fma\nmodel name\t: other\n")
    assert dev._cpuinfo(path) == ("Some CPU @ 2 GHz", frozenset({"avx2", "fma"}))


def _pretend(monkeypatch, cuda: list[tuple[int, int]], mps: bool = False) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cuda))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda name: cuda[int(str(name).split(":")[-1])]
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "asked", "expected"),
    [
        ([], False, "auto", ["cpu"]),
        ([], True, "auto", ["mps"]),
        ([(9, 0)], False, "auto", ["cuda:0"]),
        ([(9, 0)], False, "cuda", ["cuda:0"]),
        ([(9, 0)] * 2, False, "CUDA:1", ["cuda:1"]),
        ([(9, 0)] * 2, False, ["cuda:1", "cuda"], ["cuda:1", "cuda:0"]),
        ([(9, 0)], False, ["cuda:0", "cpu"], ["cuda:0", "cpu"]),
    ],
)
def test_device_names_become_canonical(monkeypatch, cuda, mps, asked, expected):
    _pretend(monkeypatch, cuda, mps)
    assert dev.resolve_device(asked) == expected


def test_a_torch_device_is_a_device_name():
    import torch

    assert dev.resolve_device(torch.device("cpu")) == ["cpu"]


@pytest.mark.parametrize("bad", ["gpu", "cuda:", "cuda:-1", 0, None, [], ["cpu", "cpu"], ["auto"]])
def test_a_malformed_device_is_refused_with_the_allowed_ones(bad):
    with pytest.raises(OptionError, match="'cuda:N'") as error:
        dev.resolve_device(bad)
    assert repr(bad) in str(error.value)


def test_a_device_that_is_not_attached_is_refused_with_those_that_are(monkeypatch):
    _pretend(monkeypatch, [])
    with pytest.raises(DeviceError, match=r"cuda:7 is not attached.*attached: cpu"):
        dev.resolve_device("cuda:7")
    with pytest.raises(DeviceError, match="mps is not attached"):
        dev.find_device("mps")


GPU_MEMORY = (6000, 10000)


def _pretend_memory(monkeypatch, *, refuses: int | None = None, kept=0, used=0) -> list[int]:
    """Two GPUs, of which one may refuse to answer; returns the list of those that were asked."""
    import torch

    _pretend(monkeypatch, [(9, 0)] * 2)
    asked: list[int] = []

    def mem_get_info(index: int) -> tuple[int, int]:
        asked.append(index)
        if index == refuses:
            raise torch.AcceleratorError("CUDA error: all devices are busy\nFor debugging ...")
        return GPU_MEMORY

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: kept)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: used)
    return asked


def test_only_the_device_in_question_is_asked_for_its_memory(monkeypatch):
    asked = _pretend_memory(monkeypatch, refuses=0)
    assert dev.find_device("cpu").name == "cpu"
    assert asked == []
    assert dev.find_device("cuda:1").total == GPU_MEMORY[1]
    assert asked == [1]


def test_what_torch_keeps_unused_on_a_gpu_counts_as_free(monkeypatch):
    _pretend_memory(monkeypatch, kept=900, used=200)
    found = dev.find_device("cuda:0")
    assert (found.free, found.total) == (GPU_MEMORY[0] + 700, GPU_MEMORY[1])


def test_a_gpu_that_does_not_answer_is_told_and_listed_without_memory(monkeypatch):
    _pretend_memory(monkeypatch, refuses=1)
    with pytest.raises(DeviceError, match=r"cuda:1 does not answer \(CUDA error: all .* busy\)\."):
        dev.find_device("cuda:1")
    first, second, cpu = dev.devices()
    assert (first.name, first.free, cpu.name) == ("cuda:0", GPU_MEMORY[0], "cpu")
    assert (second.name, second.kind, second.total, second.free) == ("cuda:1", "cuda", 0, 0)
    assert "all devices are busy" in second.description


@pytest.mark.parametrize(
    ("names", "stored", "expected"),
    [
        (["cuda:0"], None, "bfloat16"),
        (["cuda:0"], "float32", "bfloat16"),
        (["cuda:0"], "torch.float16", "float16"),
        (["cuda:1"], "bfloat16", "float16"),
        (["cuda:0", "cuda:1"], "bfloat16", "float16"),
        (["cuda:0", "cpu"], "bfloat16", "bfloat16"),
        (["mps"], "bfloat16", "float16"),
    ],
)
def test_auto_dtype_is_what_the_accelerator_is_good_at(monkeypatch, names, stored, expected):
    monkeypatch.delenv("INFERKIT_DTYPE", raising=False)
    _pretend(monkeypatch, [(9, 0), (7, 5)], mps=True)
    assert dev.resolve_dtype("auto", names, stored) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_auto_dtype_on_this_cpu_agrees_with_the_flags_of_the_kernel(monkeypatch):
    monkeypatch.delenv("INFERKIT_DTYPE", raising=False)
    _, flags = dev._cpuinfo()
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert dev.resolve_dtype("auto", ["cpu"]) == ("bfloat16" if native else "float32")


def test_the_environment_may_say_what_auto_is(monkeypatch):
    monkeypatch.setenv("INFERKIT_DTYPE", "bf16")
    assert dev.resolve_dtype("auto", ["cpu"]) == "bfloat16"
    assert dev.resolve_dtype("float32", ["cpu"]) == "float32"
    monkeypatch.setenv("INFERKIT_DTYPE", "int8")
    with pytest.raises(OptionError, match="INFERKIT_DTYPE='int8'"):
        dev.resolve_dtype("auto", ["cpu"])


def test_dtype_names_and_torch_dtypes_are_read():
    import torch

    names = ["bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float"]
    read = [dev.resolve_dtype(name, ["cpu"]) for name in names]
    assert read == ["bfloat16"] * 2 + ["float16"] * 3 + ["float32"] * 3
    assert dev.resolve_dtype(torch.bfloat16, ["cpu"]) == "bfloat16"


@pytest.mark.parametrize("bad", ["int8", "fp8", 16, None])
def test_an_unknown_dtype_is_refused_with_the_allowed_ones(bad):
    with pytest.raises(OptionError, match="'bfloat16'"):
        dev.resolve_dtype(bad, ["cpu"])


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_released_memory_returns_to_the_system():
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    size = 64 * 1024  # below glibc's mmap threshold, so that the pieces live on its heap
    pieces = [bytearray(os.urandom(64)) * (size // 64) for _ in range(2000)]
    pin = pieces[-1]
    del pieces[:]
    held = process.memory_info().rss
    dev.release_memory(["cpu"])
    after = process.memory_info().rss
    assert after - before < 40 * 2**20, (before, held, after)
    assert len(pin) == size
