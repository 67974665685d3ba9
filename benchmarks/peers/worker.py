"""The far end of a worker process: JSON lines in, JSON lines out. Needs only Python itself.

The first line in is an `Options`; the answer tells what was loaded. Every later line asks for one
generation: ``{"prompts": [[id, ...], ...], "tokens": n}``, or ``{"requests": [...]}``, each with
the second ``at`` which it comes, a ``prompt`` and ``tokens``. The answer has, for each prompt, the
token ids and the second after the call began at which each of them was there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Options:
    """What every engine is told: the same for all of them.

    Attributes:
        model: Folder of the bf16 safetensors.
        gguf: The GGUF file, for engines that read those.
        threads: CPU threads.
        slots: Most sequences at once.
        context: Most tokens of prompt and output of one sequence.
    """

    model: str
    gguf: str
    threads: int
    slots: int
    context: int


@dataclass(frozen=True)
class Output:
    """One prompt's tokens, and when each was there (``time.perf_counter`` seconds)."""

    token_ids: list[int]
    times: list[float]


@dataclass(frozen=True)
class Request:
    """One of a load: when it comes, in seconds after the load began, and what it asks."""

    at: float
    prompt: list[int]
    tokens: int


def wait_until(moment: float) -> None:
    """Sleep until ``time.perf_counter()`` is there."""
    time.sleep(max(0.0, moment - time.perf_counter()))


class Engine(Protocol):
    """What a peer's script brings."""

    def about(self) -> dict[str, str]:
        """Versions and settings, for the record."""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        """Greedy, exactly ``tokens`` tokens for each prompt, end tokens ignored."""


class Serving(Engine, Protocol):
    """An engine that takes requests while others run."""

    def under(self, requests: Sequence[Request], began: float) -> list[Output]:
        """As `generate`; each request is sent when its time after ``began`` has come."""


def serve(load: Callable[[Options], Any]) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")

    options = Options(**json.loads(sys.stdin.readline()))
    began = time.perf_counter()
    engine = load(options)
    answer(load_s=time.perf_counter() - began, about=engine.about(), options=asdict(options))
    for line in sys.stdin:
        order = json.loads(line)
        began, used = time.perf_counter(), time.process_time()
        if "requests" in order:
            outputs = engine.under([Request(**each) for each in order["requests"]], began)
        else:
            outputs = engine.generate(order["prompts"], order["tokens"])
        wall, used = time.perf_counter() - began, time.process_time() - used
        answer(
            wall=wall,
            cpu=used,
            outputs=[
                {"token_ids": o.token_ids, "times": [t - began for t in o.times]} for o in outputs
            ],
        )
