"""A mixed load: requests of many lengths that arrive at random, the same for each engine.

Unlike `speed.py`'s calls, whose prompts are equally long and come at one moment, requests come one
by one here, wait for a place, join and leave: what an engine's scheduler makes of it is in the
numbers. A round draws a load and gives it to one engine after another.

tokens per second
    all tokens over the time from the first arrival to the last token;
time to first token
    from a request's arrival, so that the wait for a place is in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from speed import Text, quietly
from spread import Spread
from workers import Worker

_QUANTITIES = ("tokens_per_s", "ttft_p50", "ttft_p99", "gap_p50", "gap_p99")


@dataclass(frozen=True)
class Load:
    """What is asked: ``requests`` prompts, their lengths and outputs drawn evenly from ranges.

    Attributes:
        requests: How many.
        prompt: Least and most tokens of a prompt.
        tokens: Least and most tokens of an output.
        gap: Mean seconds between two arrivals, whose gaps are exponential.
    """

    requests: int = 64
    prompt: tuple[int, int] = (10, 500)
    tokens: tuple[int, int] = (16, 256)
    gap: float = 0.1

    @property
    def longest(self) -> int:
        """Most tokens of prompt and output."""
        return self.prompt[1] + self.tokens[1]

    def draw(self, text: Text, seed: int) -> list[dict[str, Any]]:
        """When each request comes, its prompt, and how many tokens it wants."""
        random_ = random.Random(seed)
        at, found = 0.0, []
        for _ in range(self.requests):
            prompt = text.prompt(random_.randint(*self.prompt))
            found.append({"at": at, "prompt": prompt, "tokens": random_.randint(*self.tokens)})
            at += random_.expovariate(1 / self.gap)
        return found


@dataclass(frozen=True)
class Sample:
    """One engine's answer to the load of one round; times in seconds."""

    engine: str
    round: int
    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    busy: float


def measure(
    workers: Sequence[Worker],
    load: Load,
    text: Text,
    *,
    rounds: int,
    pause: float,
    patience: float,
) -> Iterator[Sample]:
    """Round 0 warms up; for what else is done against disturbance see `speed.measure`."""
    for number in range(rounds + 1):
        requests = load.draw(text, number)
        for worker in workers:
            call = partial(worker.under, requests)
            answer, busy = quietly(worker, call, pause, patience if number else None)
            _check(worker, requests, answer)
            yield _sample(worker.name, number, requests, answer, busy)


def _check(worker: Worker, requests: Sequence[dict[str, Any]], answer: dict[str, Any]) -> None:
    wanted = [r["tokens"] for r in requests]
    lengths = [len(output["token_ids"]) for output in answer["outputs"]]
    if lengths != wanted:
        raise RuntimeError(f"{worker.name} gave {lengths} tokens where {wanted} were asked")


def _sample(
    engine: str,
    number: int,
    requests: Sequence[dict[str, Any]],
    answer: dict[str, Any],
    busy: float,
) -> Sample:
    times = [output["times"] for output in answer["outputs"]]
    first = [row[0] - r["at"] for row, r in zip(times, requests, strict=True)]
    gaps = [b - a for row in times for a, b in pairwise(row)]
    ttft, gap = np.percentile(first, (50, 99)), np.percentile(gaps, (50, 99))
    return Sample(
        engine,
        number,
        sum(r["tokens"] for r in requests) / max(row[-1] for row in times),
        *map(float, (*ttft, *gap)),
        busy,
    )


def summarize(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Per engine the spread over rounds, without the warm-up; and inferkit against it."""
    rows = []
    for engine in dict.fromkeys(s.engine for s in samples):
        kept = {s.round: s for s in samples if s.engine == engine and s.round}
        mine = {s.round: s for s in samples if s.engine == "inferkit" and s.round in kept}
        if not kept:
            continue
        row: dict[str, Any] = {
            name: asdict(Spread.of(getattr(s, name) for s in kept.values()))
            for name in (*_QUANTITIES, "busy")
        }
        if mine:
            each = [mine[n].tokens_per_s / kept[n].tokens_per_s for n in mine]
            row["inferkit_against"] = asdict(Spread.of(each))
        rows.append({"engine": engine, **row})
    return rows
