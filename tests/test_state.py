"""What kernels tell of themselves: their files, the server's answer, `inferkit ps`, and actions."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastjsonschema
import msgspec
import psutil
import pytest
from jupyter_client import BlockingKernelClient, KernelManager

import inferkit as ik
from inferkit.cli import main
from inferkit.engine.guesses import Lookups
from inferkit.lab import folder, machine, schema, survey
from inferkit.lab import status as statuses
from inferkit.lab.status import Status, _Meter

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "inferkit" / "lab" / "schemas" / "state-1.json"
SECONDS = 60  # for anything to happen, on a machine that does something else as well

TinyModel = Callable[[str], Path]


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jupyter's runtime folder, of this test only."""
    path = tmp_path_factory.mktemp("runtime")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(path))
    return path


def kernels(here: frozenset[str] = frozenset()) -> list[schema.Kernel]:
    return folder.read(here).kernels


def entry(**changes: Any) -> schema.KernelState:
    """The file of a kernel that this process is."""
    pid = changes.get("pid", os.getpid())
    values: dict[str, Any] = {
        "version": schema.VERSION,
        "inferkit": ik.__version__,
        "kernel_id": "one",
        "pid": pid,
        "started": psutil.Process(pid).create_time(),
        "host": folder.host(),
        "written": 1.0,
        "notebook": "folder/a.ipynb",
        "models": [],
        "devices": [],
        "work": [],
        "actions": [],
        "experiment": None,
    }
    return schema.KernelState(**values | changes)


# -- the format ------------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema.schema()


# -- the files -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_only_the_owner_can_read_a_file_and_its_folder(runtime: Path) -> None:
    (runtime / "inferkit").mkdir(mode=0o755)
    folder.write(entry())
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (runtime / "inferkit").glob("**/*")}
    assert modes == {"one.json": 0o600}
    assert stat.S_IMODE((runtime / "inferkit").stat().st_mode) == 0o700


def test_a_file_is_read_as_it_was_written() -> None:
    written = entry()
    folder.write(written)
    [kernel] = kernels(frozenset({"one"}))
    assert kernel.state == written
    assert kernel.here
    assert kernel.memory > 10_000_000
    assert not kernels()[0].here


def test_the_file_of_an_ended_process_is_dropped(runtime: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder.write(entry(kernel_id="two", pid=ended.pid))
    assert len(kernels()) == 1
    ended.kill()
    ended.wait()
    assert kernels() == []
    assert list((runtime / "inferkit").iterdir()) == []


def test_the_file_of_a_process_whose_number_was_given_again_is_dropped() -> None:
    folder.write(entry(started=psutil.Process().create_time() - 100))
    assert kernels() == []


def test_the_file_of_another_machine_is_kept_and_out_of_sight(runtime: Path) -> None:
    far = {"host": "another", "started": 0.0}  # this process's number is no longer its own there
    folder.write(entry(kernel_id="far", **far))
    folder.write(entry(kernel_id="ended", **far))
    long_ago = time.time() - 3600
    os.utime(runtime / "inferkit" / "ended.json", (long_ago, long_ago))
    assert folder.read() == ([], ["far"])
    assert survey.survey(out_of_sight=frozenset({"own"})).out_of_sight == ["far", "own"]
    files = sorted(path.name for path in (runtime / "inferkit").iterdir())
    assert files == ["ended.json", "far.json"]


def test_what_a_restarted_kernel_writes_is_not_dropped_with_its_former_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(_: int) -> None:
        folder.write(entry())  # in this moment

    folder.write(entry())
    with monkeypatch.context() as patch:
        patch.setattr(folder, "started", ended)
        assert kernels() == []
    assert [kernel.kernel_id for kernel in kernels()] == ["one"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_nothing_is_written_to_where_a_link_leads(runtime: Path, tmp_path: Path) -> None:
    (runtime / "inferkit").symlink_to(tmp_path, target_is_directory=True)
    before = tmp_path.stat().st_mode
    with pytest.raises(OSError, match="is a link"):
        folder.write(entry())
    assert (list(tmp_path.iterdir()), tmp_path.stat().st_mode) == ([], before)


@pytest.mark.parametrize(
    ("version", "needed"), [(0, f"version {ik.__version__} or later"), (99, "newer than")]
)
def test_a_file_of_another_version_says_what_is_needed(version: int, needed: str) -> None:
    folder.write(entry(version=version, inferkit="7.0"))
    [kernel] = kernels()
    assert kernel.state is None
    assert "inferkit 7.0" in kernel.problem
    assert needed in kernel.problem


def test_what_a_later_version_adds_is_passed_over(runtime: Path) -> None:
    folder.write(entry())
    path = runtime / "inferkit" / "one.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "fine"}))
    [kernel] = kernels()
    assert kernel.state == entry()


def test_what_is_no_kernels_file_is_logged_and_passed_over(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write(entry())
    (runtime / "inferkit" / "two.json").write_text("{")
    for _ in range(3):
        assert [kernel.kernel_id for kernel in kernels()] == ["one"]
    assert caplog.text.count("two.json is no kernel's file") == 1


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_pipe_keeps_nobody_waiting(runtime: Path) -> None:
    folder.write(entry())
    os.mkfifo(runtime / "inferkit" / "two.json")
    assert [kernel.kernel_id for kernel in kernels()] == ["one"]


def test_a_folder_among_the_files_is_left_alone(runtime: Path) -> None:
    folder.write(entry())
    (runtime / "inferkit" / "two.json").mkdir()
    process = psutil.Process()
    kernels()
    before = process.num_fds()
    for _ in range(3):
        assert [kernel.kernel_id for kernel in kernels()] == ["one"]
    assert process.num_fds() <= before


def test_a_history_without_end_is_not_taken() -> None:
    endless = schema.History(end=0, seconds=1, itl=[1.0] * 100_000, ttft=[], tokens=[])
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(endless), type=schema.History)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b'"notebook":"', b'"notebook":"\xe9'),
        lambda data: data.replace(b"{", b'{"deep":' + 100_000 * b"[" + 100_000 * b"]" + b",", 1),
        lambda data: data.replace(b'"started":', b'"started":1e999,"was":'),
        lambda data: data.replace(b'"own":0', b'"own":' + 400 * b"9"),
        lambda data: data.replace(b'"own":0', b'"own":-' + 400 * b"9"),
    ],
    ids=["no UTF-8", "deep", "infinite", "no such memory", "less than none"],
)
def test_a_damaged_file_leaves_the_others_to_be_seen(
    damage: Callable[[bytes], bytes], runtime: Path
) -> None:
    folder.write(entry())
    path = runtime / "inferkit" / "two.json"
    gpu = schema.OnDevice(name="mps", uuid="", description="", total=9, free=5, own=0)
    whole = msgspec.json.encode(entry(kernel_id="two", devices=[gpu]))
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    found = survey.survey()
    assert "one" in [kernel.kernel_id for kernel in found.kernels]
    assert all(kernel.problem or kernel.state == entry() for kernel in found.kernels)
    survey.as_text(found)
    survey.as_json(found)


def test_a_path_that_is_no_text_is_written_as_far_as_it_is() -> None:
    folder.write(entry(notebook="donn\udce9es/one.ipynb"))
    [kernel] = kernels()
    assert kernel.state is not None
    assert kernel.state.notebook == "donn?es/one.ipynb"


def test_ps_gives_the_terminal_nothing_to_obey() -> None:
    for number, name in enumerate(("\x1b[2Jone\n.ipynb", ".", "./")):
        gpu = schema.OnDevice(name="mps", uuid="", description="\x9b2J", total=9, free=5, own=0)
        folder.write(entry(kernel_id=f"k{number}", notebook=name, devices=[gpu]))
    text = survey.as_text(survey.survey())
    assert not {"\x1b", "\x9b"} & set(text)
    assert "\ufffd[2Jone\ufffd.ipynb" in text


def test_memory_that_kernels_share_is_not_counted_twice() -> None:
    for number in range(200):
        folder.write(entry(kernel_id=f"k{number}"))
    [cpu] = survey.survey().devices
    assert 0 < sum(share.used for share in cpu.kernels) <= cpu.used < cpu.total


@pytest.mark.parametrize("pid", [-1, 0, 2**31, 2**70])
def test_a_number_that_no_process_has_is_that_of_an_ended_one(pid: int, runtime: Path) -> None:
    text = msgspec.json.encode(entry()).decode().replace(f'"pid":{os.getpid()}', f'"pid":{pid}')
    (runtime / "inferkit").mkdir()
    (runtime / "inferkit" / "one.json").write_text(text)
    assert kernels() == []


def test_fifty_kernels_are_read_in_less_than_half_a_second() -> None:
    for number in range(50):
        folder.write(entry(kernel_id=f"k{number}"))
    survey.survey()
    start = time.perf_counter()
    assert len(survey.survey().kernels) == 50
    assert time.perf_counter() - start < 0.5


# -- the devices -----------------------------------------------------------------------------------


class FakeNvml(types.ModuleType):
    """NVML with one GPU of 24 GB: 10 GB in use, 6 of them by one process."""

    class NVMLError(Exception):
        pass

    def __init__(self, pid: int) -> None:
        super().__init__("pynvml")
        self.pid = pid

    def __getattr__(self, name: str) -> Any:
        plain = types.SimpleNamespace
        answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetMemoryInfo": plain(total=24 * 10**9, used=10 * 10**9),
            "nvmlDeviceGetUtilizationRates": plain(gpu=37),
            "nvmlDeviceGetComputeRunningProcesses": [
                plain(pid=self.pid, usedGpuMemory=6 * 10**9),
                plain(pid=1, usedGpuMemory=None),
            ],
            "nvmlDeviceGetName": "Fake 24",
            "nvmlDeviceGetUUID": b"GPU-ABC",
        }
        if name not in answers:
            raise AttributeError(name)
        return lambda *_: answers[name]


def on_gpu(**changes: Any) -> schema.OnDevice:
    values = {"name": "cuda:0", "uuid": "abc", "description": "Fake", "total": 24 * 10**9}
    values |= {"free": 20 * 10**9, "own": 5 * 10**9}
    return schema.OnDevice(**values | changes)


def kernel(number: int, *devices: schema.OnDevice, pid: int = 0) -> schema.Kernel:
    state = entry(kernel_id=f"k{number}", devices=list(devices), written=float(number))
    return schema.Kernel(
        kernel_id=f"k{number}",
        pid=pid,
        inferkit="1",
        here=True,
        memory=10**6,
        state=state,
        problem="",
    )


def test_a_gpu_is_shared_between_kernels_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(pid=77))
    # The second is in a container, where it has another number than NVML knows it by.
    kernels = [kernel(1, on_gpu(), pid=77), kernel(2, on_gpu(own=2 * 10**9), pid=5)]
    gpu, cpu = machine.attached(kernels)
    assert (gpu.name, gpu.description, gpu.utilization) == ("cuda:0", "Fake 24", 37)
    assert (gpu.total, gpu.used) == (24 * 10**9, 10 * 10**9)
    assert {s.kernel_id: s.used for s in gpu.kernels} == {"k1": 6 * 10**9, "k2": 2 * 10**9}
    assert cpu.name == "cpu"
    assert [s.used for s in cpu.kernels] == [10**6, 10**6]


def test_an_accelerator_without_nvml_is_what_its_kernels_wrote_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    mps = {"name": "mps", "uuid": "", "total": 16 * 10**9}
    kernels = [kernel(2, on_gpu(**mps, free=10**9)), kernel(1, on_gpu(**mps, free=9 * 10**9))]
    gpu, _ = machine.attached(kernels)
    assert (gpu.name, gpu.used, gpu.utilization) == ("mps", 15 * 10**9, None)
    assert sorted(s.kernel_id for s in gpu.kernels) == ["k1", "k2"]


def test_the_cpu_is_busy_since_the_look_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = [1000.0], [(0.0, 0.0)]
    monkeypatch.setattr(machine, "_load", machine._Load())
    monkeypatch.setattr(machine, "_cpu_times", lambda: spent[0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])

    def utilization(seconds: float, busy: float) -> float | None:
        """After some seconds, of which two processors were busy for some."""
        before = spent[0]
        now[0] += seconds
        spent[0] = (before[0] + busy, before[1] + 2 * seconds)
        return machine.attached([])[-1].utilization

    assert utilization(0, 0) is None  # the first look knows nothing
    assert utilization(1, 0.5) == 25
    assert utilization(0.1, 0.2) == 25  # another window's, too soon to tell anything
    assert utilization(0.9, 1.8) == 100
    assert utilization(3600, 0) is None  # not the mean of an hour


# -- what a kernel writes --------------------------------------------------------------------------


@pytest.fixture
def status(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Status]:
    monkeypatch.setattr(statuses, "_IDLE", 0.3)
    found = Status("here")
    yield found
    found.stop()


@pytest.fixture
def model(tiny_model: TinyModel) -> Iterator[ik.Model]:
    found = ik.load(tiny_model("llama"), device="cpu", name="tiny", max_batch=4, progress=False)
    yield found
    found.unload()


def read() -> schema.KernelState:
    [found] = kernels()
    assert found.state is not None, found.problem
    return found.state


def test_a_model_is_shown_as_it_is_and_as_it_changes(status: Status, model: ik.Model) -> None:
    status.follow(model)
    [shown] = wait_for(lambda: kernels() and read().models)
    assert (shown.name, shown.state, shown.quantization) == ("tiny", "ready", "none")
    assert (shown.batching, shown.max_batch, shown.context) == ("continuous", 4, model.context)
    assert shown.memory == {"cpu": sum(d.weights + d.kv_cache for d in model.plan.devices)}
    assert "nf4" in shown.modes
    assert shown.history is None

    model.quantize("nf4", progress=False).configure(batching="static")
    wait_for(lambda: read().models[0].quantization == "nf4")
    assert read().models[0].batching == "static"
    model.unload()
    wait_for(lambda: read().models == [])


def test_latency_is_that_of_the_requests(status: Status, model: ik.Model) -> None:
    status.follow(model)
    gens = model.generate(["Once upon", "Paris is"] * 2, max_tokens=50, ignore_eos=True)
    wait_for(lambda: kernels() and sum((read().models[0].history or nothing).tokens) == 200)
    shown = read().models[0]
    gaps = sorted(1e3 * gap for gen in gens for gap in gen.latency.itl)
    assert shown.itl is not None
    assert shown.itl_p99 is not None
    assert shown.itl == pytest.approx((gaps[97] + gaps[98]) / 2, rel=0.02, abs=0.01)
    assert gaps[98] <= shown.itl_p99 <= gaps[-1] + 0.01
    assert shown.ttft in [pytest.approx(1e3 * gen.latency.ttft, abs=0.01) for gen in gens]
    wait_for(lambda: read().models[0].rate == 0)
    assert read().models[0].state == "ready"


def test_tokens_that_come_together_are_each_counted(
    status: Status, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = model.generate("Once upon a time", max_tokens=50, ignore_eos=True).token_ids

    def guess(_: Lookups, entries: Sequence[Any], rooms: Sequence[int]) -> list[list[int]]:
        begins = [len(entry.tokens) - entry.prompt_length for entry in entries]
        return [list(known[b : b + max(0, min(room, 4))]) for b, room in zip(begins, rooms)]

    monkeypatch.setattr(Lookups, "guess", guess)
    monkeypatch.setattr(Lookups, "learn", lambda *_: None)
    model.configure(speculative="ngram")
    status.follow(model)
    gen = model.generate("Once upon a time", max_tokens=50, ignore_eos=True)
    assert gen.latency.trace.accepted_tokens > 0
    wait_for(lambda: kernels() and sum((read().models[0].history or nothing).tokens) == 50)


nothing = schema.History(end=0, seconds=1, itl=[], ttft=[], tokens=[])


def test_writing_is_throttled_and_rests_without_news(
    status: Status, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[float] = []
    write = folder.write
    monkeypatch.setattr(
        folder, "write", lambda state: (moments.append(time.monotonic()), write(state))
    )
    status.follow(model)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        model.generate("Once", max_tokens=2)
    assert 2 <= len(moments) <= 5  # of some hundred requests
    wait_for(lambda: read().models[0].rate == 0)
    written = len(moments)
    time.sleep(1.5)
    assert len(moments) == written


def test_work_is_shown_while_it_is_done(status: Status) -> None:
    status.start()
    with status.working("Loading x") as tell:
        wait_for(lambda: kernels() and read().work == [schema.Work(what="Loading x")])
        tell("Reading", 3, 7)
        wait_for(lambda: read().work == [schema.Work(what="Loading x: Reading", done=3, total=7)])
    wait_for(lambda: read().work == [])


def test_a_folder_that_cannot_be_written_is_said_once(
    status: Status,
    model: ik.Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write", full)
    status.follow(model)
    model.generate("Once", max_tokens=100, ignore_eos=True)
    wait_for(lambda: "No space left" in caplog.text)
    time.sleep(1.5)
    assert caplog.text.count("The sidebar will not show this kernel") == 1
    assert model.generate("Once", max_tokens=2).finish_reason == "length"


def test_what_cannot_be_read_ends_no_thread_and_no_answer(
    status: Status, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a surprise")

    status.follow(model)
    with monkeypatch.context() as patch:
        patch.setattr(Status, "_read", broken)
        status.write()
        status.look()
        time.sleep(0.1)
    assert status._thread is not None
    assert status._thread.is_alive()
    status.write()
    assert not status._failed


@pytest.mark.parametrize(("batch", "period"), [(1, 0.02), (1, 0.6), (1, 3), (8, 0.4), (32, 2.5)])
def test_tokens_per_second_are_right_whatever_the_pace(
    model: ik.Model, batch: int, period: float
) -> None:
    meter = _Meter(model, threading.Event())
    meter._live[0] = model.submit("Once", max_tokens=1), 0
    meter.read()
    meter._passes.clear()
    for number in range(12):
        came = int((100 + number * period) * 1e9)
        meter._passes[came] = batch
        meter._forget_old(came)
        for later in (0, period / 2, period * 0.99):
            rate = meter._rate(came + int(later * 1e9))
            if number:
                assert rate == pytest.approx(batch / period, rel=0.01)


@pytest.mark.parametrize(
    "came",
    [
        [0, 9, 9.3, 9.6],
        [*(i / 100 for i in range(100)), 1.6, 2.2, 2.8, 3.4],
        [0, 1.5, *(1.6 + i / 50 for i in range(20))],
        [i * 0.02 for i in range(200)],
        [0, 0, 0, 0, 0, 0, 1.9],
        [5.0],
    ],
)
@pytest.mark.parametrize("runs", [True, False])
def test_without_a_token_the_rate_never_rises(
    model: ik.Model, came: list[float], runs: bool
) -> None:
    meter = _Meter(model, threading.Event())
    rates = []
    meter._live[0] = model.submit("Once", max_tokens=1), 0
    meter._passes.update(int(moment * 1e9) for moment in came)
    for late in range(150):
        if late == 5 and not runs:
            meter._live.clear()
        now = int((came[-1] + late / 10) * 1e9)
        meter._forget_old(now)
        rates.append(meter._rate(now))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0
    assert (rates[-1] > 0) == runs


def test_latency_is_of_the_mode_that_is_shown(status: Status, model: ik.Model) -> None:
    status.follow(model)
    model.generate("Once", max_tokens=100, ignore_eos=True)
    wait_for(lambda: kernels() and read().models[0].itl is not None)
    model.configure(max_batch=2)
    wait_for(lambda: read().models[0].max_batch == 2)
    assert (read().models[0].itl, read().models[0].itl_p99, read().models[0].ttft) == (None,) * 3
    gen = model.generate("Once", max_tokens=30, ignore_eos=True)
    wait_for(lambda: sum(read().models[0].history.tokens) == 130)
    shown = read().models[0]
    gaps = sorted(1e3 * gap for gap in gen.latency.itl)
    assert shown.itl == pytest.approx(gaps[14], rel=0.02, abs=0.01)
    assert shown.ttft == pytest.approx(1e3 * gen.latency.ttft, abs=0.01)


def test_latency_under_another_policy_is_not_shown(model: ik.Model) -> None:
    meter = _Meter(model, threading.Event())
    model.generate("Once", max_tokens=20, ignore_eos=True)
    model.configure(batching="off")
    meter.read()
    assert (meter.state().batching, meter.state().itl, meter.state().ttft) == ("off", None, None)
    gen = model.generate("Once", max_tokens=2, ignore_eos=True)
    meter.read()
    assert meter.state().itl == pytest.approx(1e3 * gen.latency.itl[0], abs=0.01)


def test_gaps_pass_away(status: Status, model: ik.Model) -> None:
    meter = _Meter(model, threading.Event())
    meter.read()
    meter._gaps.extend((int(at * 1e9), at) for at in (1, 2, 3, 12.5))
    meter.read()
    assert [gap for _, gap in meter._gaps] == [3, 12.5]


def test_a_file_that_was_lost_is_written_again(status: Status, runtime: Path) -> None:
    status.start()
    wait_for(kernels)
    (runtime / "inferkit" / "here.json").unlink()
    wait_for(kernels)


def test_a_file_is_written_again_from_time_to_time_without_news(
    status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "REFRESH", 0.5)
    status.start()
    wait_for(kernels)
    first = read().written
    wait_for(lambda: read().written > first)


def test_stopping_removes_the_file_and_ends_the_thread(status: Status, runtime: Path) -> None:
    status.start()
    wait_for(kernels)
    status.stop()
    status.stop()
    assert kernels() == []
    assert list((runtime / "inferkit").iterdir()) == []
    assert status._thread is not None
    assert not status._thread.is_alive()


def test_outside_of_a_kernel_nothing_is_written(model: ik.Model, runtime: Path) -> None:
    model.generate("Once", max_tokens=2)
    time.sleep(1)
    assert not (runtime / "inferkit").exists()
    assert statuses.here() is None


# -- the command line ------------------------------------------------------------------------------


def test_ps_shows_kernels_without_a_model_and_says_so_without_any(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["ps"]) == 0
    assert "No kernel of this user has loaded a model." in capsys.readouterr().out
    folder.write(entry())
    assert main(["ps"]) == 0
    assert f"a.ipynb  {os.getpid()}" in capsys.readouterr().out


def test_ps_tells_notebooks_of_one_name_apart_by_their_folders(
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = ("mine/new/a.ipynb", "yours/new/a.ipynb", "a.ipynb", "mine/b.ipynb")
    for number, path in enumerate(paths):
        folder.write(entry(kernel_id=str(number), notebook=path))
    assert main(["ps"]) == 0
    told = capsys.readouterr().out
    rows = [line.split("  ")[0] for line in told.splitlines() if ".ipynb" in line]
    assert sorted(rows) == ["a.ipynb", "a.ipynb in mine/new", "a.ipynb in yours/new", "b.ipynb"]


def test_ps_as_json_follows_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    folder.write(entry())
    assert main(["ps", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    whole = {**schema.schema(), "$schema": "http://json-schema.org/draft-07/schema#"}
    check = fastjsonschema.compile({**whole, "$ref": "#/$defs/State"})
    check(told)
    with pytest.raises(fastjsonschema.JsonSchemaException):
        check(told | {"kernels": [{}]})


def test_ps_imports_no_torch() -> None:
    code = (
        "import sys\nfrom inferkit.cli import main\nmain(['ps'])\n"
        "import inferkit.lab.server\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- in a kernel -----------------------------------------------------------------------------------


class Kernel:
    """A running kernel, asked as JupyterLab asks it."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self.client = manager, client

    def run(self, code: str) -> None:
        reply = self.client.execute(code, reply=True, timeout=SECONDS, store_history=False)
        assert reply["content"]["status"] == "ok", reply["content"]

    def another(self) -> Kernel:
        """The same kernel, over a connection of its own."""
        client = BlockingKernelClient(connection_file=self.manager.connection_file)
        client.load_connection_file()
        client.start_channels()
        return Kernel(self.manager, client)

    def start(self, code: str) -> None:
        """Begin to run code that lasts."""
        self.client.execute(code)

    def do(self, action: str, /, **arguments: Any) -> schema.Answer:
        """Have an action done on a subshell, as the sidebar has."""
        control = self.client.session.msg("create_subshell_request", {})
        self.client.control_channel.send(control)
        while True:
            made = self.client.control_channel.get_msg(timeout=SECONDS)
            if made["parent_header"].get("msg_id") == control["header"]["msg_id"]:
                break
        given = json.dumps(json.dumps(arguments))
        call = f'do({action!r}, **__import__("json").loads({given}))'
        expression = f'__import__("inferkit.notebook.actions", fromlist=["do"]).{call}'
        content = {"code": "", "silent": True, "user_expressions": {"answer": expression}}
        message = self.client.session.msg("execute_request", content)
        message["header"]["subshell_id"] = made["content"]["subshell_id"]
        self.client.shell_channel.send(message)
        while True:
            reply = self.client.shell_channel.get_msg(timeout=SECONDS)
            if reply["parent_header"]["msg_id"] == message["header"]["msg_id"]:
                break
        told = reply["content"]["user_expressions"]["answer"]
        assert told["status"] == "ok", told
        return msgspec.convert(told["data"]["application/json"], schema.Answer)


@pytest.fixture(scope="module")
def kernel_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def started(kernel_runtime: Path, tiny_model: TinyModel) -> Iterator[Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(kernel_runtime))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(kernel_runtime))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=SECONDS)
    found = Kernel(manager, client)
    found.run(
        "import inferkit as ik\n"
        f"model = ik.load({str(tiny_model('llama'))!r}, device='cpu', name='tiny', progress=False)"
    )
    yield found
    client.stop_channels()
    if manager.is_alive():
        manager.shutdown_kernel(now=True)


@pytest.fixture
def running(started: Kernel, kernel_runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel with a model called "tiny", which a test may change and not unload."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(kernel_runtime))
    wait_for(kernels)
    return started


def test_a_kernel_is_shown_by_its_id_from_the_first_model_on(running: Kernel) -> None:
    [found] = kernels()
    name = Path(running.manager.connection_file).stem
    assert found.kernel_id == name.removeprefix("kernel-")
    wait_for(lambda: [m.name for m in read().models] == ["tiny"])
    assert read().inferkit == ik.__version__


LONG = "model.generate('Once', max_tokens=3000, ignore_eos=True)"


def test_numbers_move_while_a_cell_blocks_and_a_click_stops_it(running: Kernel) -> None:
    running.start(LONG)
    wait_for(lambda: read().models[0].running == 1)

    def tokens() -> int:
        return sum((read().models[0].history or nothing).tokens)

    first = wait_for(tokens)
    wait_for(lambda: tokens() > first)
    assert read().models[0].state == "running"
    answer = running.do("stop", model="tiny")
    assert answer.ok
    assert answer.text.startswith("Stopped 1 request of 'tiny'")
    wait_for(lambda: read().models[0].running == 0)


def test_a_change_that_waits_says_so_and_can_be_cancelled_alone(running: Kernel) -> None:
    running.start(LONG)
    wait_for(lambda: read().models[0].running == 1)
    before = read().models[0].quantization
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(running.another().do, "quantize", model="tiny", mode="nf4")
        what = "Changing tiny to nf4: Waiting for 1 request"
        [work] = wait_for(lambda: [w for w in read().work if w.what == what])
        assert not running.do("cancel", work=work.id + 1).ok  # another's
        assert not answer.done()
        assert running.do("cancel", work=work.id).ok
        assert answer.result(SECONDS).text == "Cancelled."
    assert read().work == []
    assert (read().models[0].running, read().models[0].quantization) == (1, before)
    running.do("stop", model="tiny")
    assert running.do("cancel", work=work.id).text == "It has ended already."


def test_a_change_is_in_the_file_when_it_is_answered(running: Kernel) -> None:
    for batching in ("static", "continuous"):
        assert running.do("batching", model="tiny", batching=batching).ok
        assert (read().models[0].batching, read().work) == (batching, [])


def test_modes_are_changed_by_clicks(running: Kernel) -> None:
    assert running.do("quantize", model="tiny", mode="int8wo").ok
    assert running.do("batching", model="tiny", batching="static", max_batch=3).ok
    running.run("assert (model.quantization, model.batching) == ('int8wo', 'static')")
    running.run("assert model.max_batch == 3")
    wait_for(lambda: read().models[0].quantization == "int8wo")


def test_a_model_is_loaded_and_unloaded_by_clicks(running: Kernel, tiny_model: TinyModel) -> None:
    folder_of_it = str(tiny_model("gemma3"))
    answer = running.do("load", ref=folder_of_it, device="cpu", name="second")
    assert answer.ok, answer.text
    assert "model = ik.load(" in answer.code
    wait_for(lambda: [m.name for m in read().models] == ["tiny", "second"])
    assert running.do("code", model="second").code == answer.code
    assert running.do("unload", model="second").ok
    wait_for(lambda: [m.name for m in read().models] == ["tiny"])
    running.run("assert [m.name for m in ik.models()] == ['tiny']")


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "text"),
    [
        ("unload", {"model": "other"}, "ModelUnloadedError", "these are: 'tiny'"),
        ("quantize", {"model": "tiny", "mode": "int3"}, "OptionError", "int3"),
        ("load", {"ref": "nobody/nothing"}, "ModelNotFoundError", "nobody/nothing"),
        ("dance", {}, "OptionError", "cannot 'dance'"),
        ("share", {}, "OptionError", "Nothing was recorded"),
        ("load", {}, "TypeError", "ref"),
    ],
)
def test_what_goes_wrong_is_in_the_answer(
    running: Kernel, name: str, arguments: dict[str, Any], kind: str, text: str
) -> None:
    answer = running.do(name, **arguments)
    assert (answer.ok, answer.kind) == (False, kind)
    assert text in answer.text


def test_the_experiment_is_saved_and_says_why_there_is_no_link(
    running: Kernel, kernel_runtime: Path
) -> None:
    running.run("with ik.record('mine', progress=False):\n    model.generate('Once', max_tokens=4)")
    wait_for(lambda: read().experiment == "mine")
    answer = running.do("share")
    assert answer.ok
    assert ik.open(kernel_runtime / "mine.inferkit.json").complete
    assert answer.link == ""
    assert "There is no link to it" in answer.notes[0]


@pytest.mark.parametrize("kept", [True, False])
def test_sharing_from_a_folder_that_is_gone_says_what_is_left(
    running: Kernel, kernel_runtime: Path, tmp_path: Path, kept: bool
) -> None:
    gone, file = tmp_path / "gone", tmp_path / "kept.inferkit.json"
    gone.mkdir()
    path = repr(str(file)) if kept else None
    running.run(
        f"import os, shutil\nos.chdir({str(gone)!r})\n"
        f"with ik.record('kept', path={path}, progress=False):\n"
        "    model.generate('Once', max_tokens=4)\n"
        f"shutil.rmtree({str(gone)!r})"
    )
    try:
        answer = running.do("share")
    finally:
        running.run(f"os.chdir({str(kernel_runtime)!r})")
    assert (answer.ok, answer.details, answer.link) == (kept, "", "")
    if kept:
        assert answer.text == f"Saved 'kept' to {file}."
        assert "The working directory is no longer there" in answer.notes[0]
    else:
        assert "'kept' is not in kept.inferkit.json" in answer.text


def test_where_an_unexpected_error_was_raised_is_in_the_details(running: Kernel) -> None:
    answer = running.do("load")
    assert answer.text.startswith("TypeError: ")
    assert "\n" not in answer.text
    assert answer.notes == []
    assert "Traceback (most recent call last)" in answer.details
    refused = running.do("unload", model="other")
    assert refused.details == ""


def test_a_recording_that_runs_is_ended_only_if_that_was_said(running: Kernel) -> None:
    running.run("going = ik.record('going', overwrite=True, progress=False)\ngoing.start()")
    wait_for(lambda: (read().experiment, read().recording) == ("going", True))
    refused = running.do("share")
    assert (refused.ok, refused.kind) == (False, "StillRecording")
    assert refused.text == "'going' is still being recorded. End it?"
    running.run("assert going.running")
    answer = running.do("share", end=True)
    assert answer.ok
    assert answer.text.startswith("Ended the recording and saved 'going' to ")
    running.run("assert not going.running")
    wait_for(lambda: not read().recording)


def test_a_killed_kernel_is_shown_no_longer(running: Kernel, kernel_runtime: Path) -> None:
    [found] = kernels()
    os.kill(found.pid, signal.SIGKILL)
    wait_for(lambda: kernels() == [])
    assert list((kernel_runtime / "inferkit").iterdir()) == []


# -- the server ------------------------------------------------------------------------------------


@pytest.fixture
def server(runtime: Path, tmp_path: Path) -> Iterator[str]:
    """A Jupyter server as it is installed, with a token."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    options += ["--no-browser", "--allow-root", f"--ServerApp.root_dir={tmp_path}"]
    options += ["--IdentityProvider.token=secret"]
    command = [sys.executable, "-m", "jupyter_server", *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}/inferkit/api/state"
    process.terminate()
    process.wait(30)


def test_the_server_answers_who_may_read_its_kernels(server: str) -> None:
    folder.write(entry())

    def answer(token: str) -> tuple[int, bytes]:
        asked = urllib.request.Request(server, headers={"Authorization": f"token {token}"})
        try:
            with urllib.request.urlopen(asked, timeout=SECONDS) as told:
                return told.status, told.read()
        except urllib.error.HTTPError as error:
            return error.code, b""
        except urllib.error.URLError:
            return 0, b""

    status, told = wait_for(lambda: (found := answer("secret"))[0] and found)
    assert status == 200
    state = msgspec.json.decode(told, type=schema.State)
    assert [k.kernel_id for k in state.kernels] == ["one"]
    assert not state.kernels[0].here  # no kernel of its own
    assert state.out_of_sight == []
    assert answer("wrong")[0] == 403


def test_kernels_of_a_gateway_or_another_machine_are_out_of_sight() -> None:
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner
    from jupyter_server.gateway.gateway_client import GatewayClient

    from inferkit.lab.server import _elsewhere

    def manager(provisioner: object) -> Any:
        found = types.SimpleNamespace(provisioner=provisioner)
        return types.SimpleNamespace(get_kernel=lambda _: found)

    assert not _elsewhere(manager(LocalProvisioner()), "one")
    assert _elsewhere(manager(object()), "one")
    gateway = GatewayClient.instance()
    gateway.url = "http://gateway.invalid"
    try:
        assert _elsewhere(manager(LocalProvisioner()), "one")
    finally:
        GatewayClient.clear_instance()
