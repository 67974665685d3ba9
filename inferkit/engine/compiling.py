"""Compiling a model's decode step in the background, while its engine serves without.

    <cache>/compiled/<key>/          the code of all decoder layers: see tracing.py
    <cache>/compiled/.<key>.why      why there is none, instead: it would be the same again
    <cache>/compiled/.<key>.lock     held while it is made
    <cache>/compiled/.<key>.tmp-*/   where it is made

The key stands for all that the code depends on: the architecture, dtypes and shapes, the processor,
the number of threads, the versions of what made it, and what decides whether it can be loaded: the
environment and the libraries that are named to come first. Weights and the size of the KV cache are
not in it, so that a load of the same architecture finds it, in any kernel of the same environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from inferkit import kernels
from inferkit.devices import find_device, processor
from inferkit.engine.compiled import CONTENTS, CompiledLayers
from inferkit.engine.openmp import release_team
from inferkit.engine.runner import SlottedRunner
from inferkit.engine.sequential import SequentialRunner
from inferkit.engine.serving import compiled_reason, graphs_reason
from inferkit.errors import OptionError, first_line
from inferkit.folders import cache_dir, writable_by_others
from inferkit.html import format_bytes
from inferkit.model_files import write_atomically
from inferkit.packing import PackedLinear
from inferkit.tiled import TiledLinear
from inferkit.weight_only import WeightOnlyLinear

Compile = bool | Literal["auto"]
Status = Literal["eager", "compiling", "compiled"]

FORMAT = 4  # goes up when the code is made or called in another way
SMALL = 64 << 20
"""Bytes of weights below which "auto" compiles nothing: it would take longer than it saves."""
ROOM = 2 << 30
"""Bytes of free memory below which "auto" compiles nothing: torch and the compiler need them."""
NICE = 19
"""How much the compiling process gives way to requests that run meanwhile."""

_TICK = 0.2
_log = logging.getLogger("inferkit")


def check_compile(compile: Any) -> None:
    """Raise OptionError unless it is True, False or "auto"."""
    if not isinstance(compile, bool) and compile != "auto":
        raise OptionError(f"compile={compile!r}: give True, False or 'auto'.")


class _Stopped(Exception):
    """The work is no longer wanted."""


class _Lasting(RuntimeError):
    """Why there is no code, and never will be for the same key."""


class Compilation:
    """The compiled step of one runner: on its way, in use, or why not.

    Begins at once, in a thread of its own; failure leaves the step as it is, with a reason. Its
    attributes may be read from any thread.

    Args:
        runner: What serves the model.
        compile: Whether to: "auto" compiles where that pays, unless the environment variable
            INFERKIT_COMPILE is 0.

    Attributes:
        status: "eager" (the architecture's own code runs), "compiling" (it still does) or
            "compiled".
        reason: Why it is eager.
        done: Pieces of code that are compiled.
        total: How many there will be; 0 until that is known.
    """

    def __init__(self, runner: SlottedRunner | SequentialRunner, compile: Compile) -> None:
        self.status: Status = "eager"
        self.done = self.total = 0
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._working = threading.Lock()
        self._graphs = lambda: getattr(runner, "graphs", None)
        try:
            self.reason = _against(runner, compile) or ""
        except Exception as error:  # a cache folder that is another's, say
            self.reason = first_line(error)
        if isinstance(runner, SequentialRunner):
            self._ended.set()
        elif self.reason:
            runner.use_compiled(None)
            runner.use_graphs(False)
            self._ended.set()
        elif runner.device.type == "cuda":
            self._capture(runner)
        elif runner.layers is not None:  # compiled before, and switched off
            runner.use_compiled(runner.layers)
            self._end("compiled", "")
        else:
            self.status = "compiling"
            work = threading.Thread(
                target=self._work, args=(runner,), name="inferkit-compile", daemon=True
            )
            work.start()

    def __str__(self) -> str:
        if self.status == "compiling" and self.total:
            return f"compiling ({self.done} of {self.total})"
        graphs = self._graphs()
        if self.status == "compiled" and graphs is not None and graphs.reason:
            return f"compiled, but not every step: {graphs.reason}"
        return f"{self.status}: {self.reason}" if self.reason else self.status

    def __repr__(self) -> str:
        return f"<{self}>"

    def __bool__(self) -> bool:
        """Whether the compiled step runs."""
        return self.status == "compiled"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is compiled, or will not be; whether it is. Can be interrupted.

        Args:
            timeout: Most seconds to wait.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ended.wait(_TICK):
            if deadline is not None and time.monotonic() > deadline:
                break
        return self.status == "compiled"

    def stop(self) -> None:
        """End the work, if it goes on; returns when nothing of it touches the model any more."""
        self._stop.set()
        with self._working:
            pass

    def _capture(self, runner: SlottedRunner) -> None:
        """On CUDA there is nothing to compile ahead: see cudagraphs.py."""
        try:
            reason = graphs_reason(runner)
        except Exception as error:  # code of any architecture, where it must not wait
            reason = first_line(error)
        runner.use_graphs(reason is None)
        self._end("eager" if reason else "compiled", reason or "")

    def _work(self, runner: SlottedRunner) -> None:
        try:
            folder = self._code(_job(runner.module, runner.geometry))
            with self._working:
                self._check()
                self._put_in_place(runner, _layers(runner.module, folder))
        except _Stopped:
            self._end("eager", "it was stopped")
        except Exception as error:  # whatever torch, a compiler or the system may raise
            _log.debug("Compiling failed.", exc_info=True)
            self._end("eager", first_line(error))
        finally:
            if not self._ended.is_set():
                self._end("eager", "it was stopped")
            release_team()

    def _put_in_place(self, runner: SlottedRunner, layers: CompiledLayers) -> None:
        try:
            reason = compiled_reason(runner)
        except BaseException:
            layers.release()
            raise
        if reason is None:
            runner.use_compiled(layers)
            self._end("compiled", "")
        else:
            layers.release()
            self._end("eager", reason)

    def _end(self, status: Status, reason: str) -> None:
        self.status, self.reason = status, reason
        self._ended.set()

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    # -- the code -------------------------------------------------------------------------------

    def _code(self, job: dict[str, Any]) -> Path:
        """The folder with the code, made now if need be."""
        target = _home(job)
        home = target.parent
        why = home / f".{target.name}.why"
        if _made(target, why):
            return target
        home.mkdir(parents=True, exist_ok=True)
        with self._only_one(home / f".{target.name}.lock"):
            if _made(target, why):
                return target
            for stale in (target, *home.glob(f".{target.name}.tmp-*")):
                shutil.rmtree(stale, ignore_errors=not stale.exists())
            work = Path(tempfile.mkdtemp(dir=home, prefix=f".{target.name}.tmp-"))
            try:
                made = work / "code"
                made.mkdir(mode=0o700)
                self._run({**job, "folder": str(made)}, work)
                made.rename(target)
            except _Lasting as error:
                write_atomically(why, str(error))
                raise
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return target

    @contextlib.contextmanager
    def _only_one(self, path: Path) -> Iterator[None]:
        """Hold a lock between processes; `stop` ends the wait."""
        from filelock import FileLock, Timeout

        lock = FileLock(path)
        while True:
            self._check()
            try:
                lock.acquire(timeout=_TICK)
                break
            except Timeout:
                continue
        try:
            yield
        finally:
            lock.release()

    def _run(self, job: dict[str, Any], work: Path) -> None:
        """Do a job in a process of its own; it ends with this one, and with `stop`.

        All that it writes goes into the folder ``work``.
        """
        with tempfile.TemporaryFile() as log, _worker(log, work) as worker:
            ended = threading.Thread(target=self._watch, args=(worker,), daemon=True)
            ended.start()
            with contextlib.suppress(BrokenPipeError):  # its end is seen below
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()  # and left open: its end tells the worker that we are gone
            failure, lasting = None, False
            for line in worker.stdout:
                said = json.loads(line)
                failure, lasting = said.get("error", failure), said.get("lasting", lasting)
                self.done, self.total = said.get("done", self.done), said.get("total", self.total)
            worker.wait()
            ended.join()
            self._check()
            if worker.returncode:
                log.seek(0)
                _log.debug("%s", log.read().decode(errors="replace"))
                problem = failure or f"the compiler's process ended ({worker.returncode})"
                raise _Lasting(problem) if lasting else RuntimeError(problem)

    def _watch(self, worker: subprocess.Popen[str]) -> None:
        while worker.poll() is None:
            if self._stop.wait(_TICK):
                _kill(worker)
                return


def _made(target: Path, why: Path) -> bool:
    """Whether the code is there.

    Raises:
        RuntimeError: It was tried before, and why it would fail again.
    """
    if why.is_file():
        raise RuntimeError(why.read_text(encoding="utf-8"))
    return (target / CONTENTS).is_file()


def _layers(module: Any, folder: Path) -> CompiledLayers:
    if writable_by_others(folder):
        raise RuntimeError(f"others may write to {folder}, whose code would be run: remove it")
    if not all(map(zipfile.is_zipfile, folder.glob("*.pt2"))):
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError("the code that was kept is damaged; the next load makes it again")
    return CompiledLayers(module, folder)


@contextlib.contextmanager
def _worker(log: Any, work: Path) -> Iterator[Any]:
    # A session of its own: an interrupt of the notebook is not for it. Its compiler ends with it.
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "inferkit.engine.tracing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TMPDIR": str(work),
        },
    )
    _give_way(worker.pid)
    try:
        yield worker
    finally:
        _kill(worker)
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):  # what was not yet written to a process that ended
                pipe.close()  # type: ignore[union-attr]


def _give_way(pid: int) -> None:
    """Have a process, the first of its session, and its children leave the processors to others.

    Linux shares processors out between sessions first, by a number that each has of its own: else
    this one would have half of them, and a step that waits for its other thread take five times as
    long.
    """
    with contextlib.suppress(OSError):  # it has ended already, or there is no such number
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE), encoding="ascii")


def _kill(worker: subprocess.Popen[str]) -> None:
    if worker.poll() is not None:  # its number may be another's by now
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def _against(runner: SlottedRunner | SequentialRunner, compile: Compile) -> str | None:
    """Why not to compile, if there is a reason."""
    if compile is False:
        return "compile=False"
    if isinstance(runner, SequentialRunner):
        return "requests run one at a time"
    checks: list[Callable[[SlottedRunner], str | None]] = [_unsupported, _no_compiler]
    if compile == "auto":
        checks = [_not_asked, *checks, _not_worth]
    return next((reason for check in checks if (reason := check(runner))), None)


def _not_asked(runner: SlottedRunner) -> str | None:
    return "INFERKIT_COMPILE=0" if os.environ.get("INFERKIT_COMPILE") == "0" else None


def _unsupported(runner: SlottedRunner) -> str | None:
    module = runner.module
    tensors = [*module.parameters(), *module.buffers()]
    where = {str(t.device) for t in tensors}
    if len(where) > 1:
        return f"the layers are on several devices ({', '.join(sorted(where))})"
    if runner.device.type not in ("cpu", "cuda"):
        return f"nothing is compiled for {runner.device.type}"
    if runner.device.type == "cuda":
        return None
    if getattr(module.config, "quantization_config", None) is not None:
        return "quantized layers run code of their own"
    if type(module).__module__.startswith("transformers_modules"):
        return "the architecture's code came with the model"
    return None


def _no_compiler(runner: SlottedRunner) -> str | None:
    if runner.device.type != "cpu":
        return None
    named = os.environ.get("CXX")
    if sys.platform == "win32" or not hasattr(os, "killpg"):
        return "compiling is not supported on this system"
    here = any(shutil.which(c) for c in ([named] if named else ["g++", "clang++"]))
    if not here and not _kept(runner):
        return "no C++ compiler was found (Debian and Ubuntu: apt-get install g++)"
    return None


def _not_worth(runner: SlottedRunner) -> str | None:
    if runner.device.type != "cpu":
        return None
    weights = sum(t.nbytes for t in (*runner.module.parameters(), *runner.module.buffers()))
    weights += sum(m.packed_bytes for m in runner.module.modules() if isinstance(m, PackedLinear))
    if weights < SMALL:
        return f"a model of {format_bytes(weights)} gains little"
    free = find_device("cpu").free
    if free < ROOM and not _kept(runner):
        return f"compiling takes up to {format_bytes(ROOM)}, and {format_bytes(free)} are free"
    return None


def _kept(runner: SlottedRunner) -> bool:
    """Whether the code is there already."""
    return (_home(_job(runner.module, runner.geometry)) / CONTENTS).is_file()


def _job(module: Any, geometry: Any) -> dict[str, Any]:
    """What `tracing` needs to know of a model."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    config = module.config.to_dict()
    config.pop("_name_or_path", None)  # where it was loaded from makes no other code
    named = [*module.named_modules()]
    dtype = str(module.dtype).removeprefix("torch.")
    return {
        "class": type(module).__name__,
        "config": json.loads(json.dumps(config, default=str)),
        "dtype": dtype,
        "tensors": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors},
        "packed": {name: m.own for name, m in named if isinstance(m, PackedLinear)},
        "kernels": kernels.used(["cpu"], dtype),
        "tiled": any(isinstance(m, TiledLinear) for _, m in named),
        "weight_only": {name: m.mode for name, m in named if isinstance(m, WeightOnlyLinear)},
        "geometry": [asdict(g) for g in geometry],
        "threads": torch.get_num_threads(),
    }


def _home(job: dict[str, Any]) -> Path:
    """Where the code of a job is, once it is made."""
    import transformers

    from inferkit import __version__

    made_by = (
        FORMAT,
        __version__,
        torch.__version__,
        transformers.__version__,
        sys.version_info[:2],
        platform.libc_ver(),
        sys.prefix,
        *(os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH")),
    )
    said = json.dumps([job, made_by, sorted(processor())], sort_keys=True, default=str)
    return cache_dir() / "compiled" / hashlib.sha256(said.encode()).hexdigest()[:16]
