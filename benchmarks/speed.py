"""Decode step, tokens per second and time to first token of several engines, interleaved.

Every engine is a process of its own with the same weights, threads and prompts. A round goes
through all cases, and in each case through all engines one after another (A B C, A B C, ...), so
that a machine that slows down slows all of them. One call gives, for its batch:

decode step
    the median gap between a sequence's successive tokens, pooled over the sequences;
tokens per second
    all tokens over the time from the call to the last one: prefill is part of it;
time to first token
    from the call to the first token of the sequence that waits longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from peers.worker import Options
from spread import Spread
from workers import Worker, wait_for_quiet

HERE = Path(__file__).resolve().parent
_DISTURBED = 0.2  # processors used by others, from which on a call is made again


@dataclass(frozen=True)
class Case:
    """What is asked of an engine: ``batch`` prompts of ``prompt`` tokens, ``tokens`` more each."""

    batch: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One call of one engine.

    ``busy`` is what other processes used meanwhile, in processors: a number well above 0 says that
    the machine was not free.
    """

    engine: str
    round: int
    case: Case
    step: float | None
    tokens_per_s: float
    ttft: float
    busy: float
    agree: float


def decode_cases(batches: Sequence[int], tokens: int) -> list[Case]:
    """Short prompts, many tokens."""
    return [Case(batch, 16, tokens) for batch in batches]


def prefill_cases(lengths: Sequence[int]) -> list[Case]:
    """One prompt of each length, for the time to its first token."""
    return [Case(1, length, 2) for length in lengths]


class Text:
    """Prompts cut from one text, each call from another place, so that no two share a prefix."""

    def __init__(self, tokenizer: Path) -> None:
        from tokenizers import Tokenizer

        read = Tokenizer.from_file(str(tokenizer))
        text = (HERE / "prompt.txt").read_text()
        self._begin, *self._ids = read.encode(text).ids
        self._at = 0

    def prompts(self, case: Case) -> list[list[int]]:
        """``case.batch`` prompts; each begins with the model's first token."""
        return [self.prompt(case.prompt) for _ in range(case.batch)]

    def prompt(self, length: int) -> list[int]:
        """One of so many tokens."""
        return [self._begin, *self._cut(length - 1)]

    def _cut(self, length: int) -> list[int]:
        self._at = (self._at + 7) % len(self._ids)
        again = self._ids * (2 + length // len(self._ids))
        return again[self._at : self._at + length]


def measure(
    workers: Sequence[Worker],
    cases: Sequence[Case],
    text: Text,
    *,
    rounds: int,
    pause: float,
    patience: float,
) -> Iterator[Sample]:
    """Round 0 warms up; the others are measured. The first worker's tokens are the reference.

    Measured calls are made `quietly`.
    """
    for number in range(rounds + 1):
        for case in cases:
            prompts = text.prompts(case)
            reference: list[list[int]] | None = None
            for worker in workers:
                answer, busy = quietly(
                    worker,
                    partial(worker.generate, prompts, case.tokens),
                    pause,
                    patience if number else None,
                )
                ids = [output["token_ids"] for output in answer["outputs"]]
                _check(worker, case, ids)
                reference = reference or ids
                yield _sample(worker.name, number, case, answer, busy, _agreement(reference, ids))


def quietly(
    worker: Worker, call: Callable[[], dict[str, Any]], pause: float, patience: float | None
) -> tuple[dict[str, Any], float]:
    """A worker's answer, and the processors that other processes used meanwhile.

    It waits until these are quiet, at most ``patience`` seconds; None: not at all. If they were at
    work during the call all the same, it is made once more, and the less disturbed one counts.
    """
    if patience is None:
        return _call(worker, call, pause)
    wait_for_quiet(_DISTURBED, patience, interval=pause)
    first = _call(worker, call, pause)
    if first[1] <= _DISTURBED:
        return first
    wait_for_quiet(_DISTURBED, patience, interval=pause)
    return min(first, _call(worker, call, pause), key=lambda made: made[1])


def _call(
    worker: Worker, call: Callable[[], dict[str, Any]], pause: float
) -> tuple[dict[str, Any], float]:
    time.sleep(pause)  # whatever the last engine's threads still spin on
    used, mine, began = _used(), worker.cpu_seconds(), time.perf_counter()
    answer = call()
    wall, mine = time.perf_counter() - began, worker.cpu_seconds() - mine
    return answer, max(0.0, (_used() - used - mine) / wall)


def summarize(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Per case and engine: the spread over rounds of every quantity, without the warm-up."""
    rows = []
    for key in dict.fromkeys((s.case, s.engine) for s in samples):
        case, engine = key
        kept = [s for s in samples if (s.case, s.engine) == key and s.round > 0]
        first = next((s for s in samples if (s.case, s.engine) == key and s.round == 0), None)
        if not kept:
            continue
        steps = [1e3 * s.step for s in kept if s.step is not None]
        rows.append(
            {
                "case": asdict(case),
                "engine": engine,
                "step_ms": asdict(Spread.of(steps)) if steps else None,
                "tokens_per_s": asdict(Spread.of([s.tokens_per_s for s in kept])),
                "ttft_ms": asdict(Spread.of([1e3 * s.ttft for s in kept])),
                "warmup_tokens_per_s": first.tokens_per_s if first else None,
                "busy": asdict(Spread.of([s.busy for s in kept])),
                "agree": median(s.agree for s in kept),
            }
        )
    return rows


def ratios(samples: Sequence[Sample], case: Case, one: str, other: str, what: str) -> Spread | None:
    """``what`` of one engine over that of the other, round by round."""
    found: dict[tuple[str, int], float] = {
        (s.engine, s.round): getattr(s, what)
        for s in samples
        if s.case == case and s.round > 0 and getattr(s, what) is not None
    }
    numbers = sorted({n for _, n in found})
    pairs = [(found.get((one, n)), found.get((other, n))) for n in numbers]
    each = [a / b for a, b in pairs if a is not None and b]
    return Spread.of(each) if each else None


def options(model: Path, gguf: Path, threads: int, cases: Sequence[Case]) -> Options:
    """Room for the largest case, and no more."""
    longest = max(c.prompt + c.tokens for c in cases)
    return room(model, gguf, threads, max(c.batch for c in cases), longest)


def room(model: Path, gguf: Path, threads: int, slots: int, longest: int) -> Options:
    """Room for so many sequences at once, the longest of so many tokens."""
    context = -(-(longest + 1) // 256) * 256
    return Options(str(model), str(gguf), threads, slots, context)


def _used() -> float:
    """CPU seconds that all processes of the machine have used."""
    t = psutil.cpu_times()
    return float(sum(t) - t.idle - getattr(t, "iowait", 0.0) - getattr(t, "guest", 0.0))


def _check(worker: Worker, case: Case, ids: list[list[int]]) -> None:
    lengths = [len(row) for row in ids]
    if lengths != [case.tokens] * case.batch:
        raise RuntimeError(f"{worker.name} gave {lengths} tokens where {case} was asked")


def _agreement(reference: list[list[int]], ids: list[list[int]]) -> float:
    """Which share of a sequence's tokens is the reference's before the first that is not."""
    shares = []
    for mine, theirs in zip(ids, reference, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
        shares.append(same / len(mine))
    return median(shares)


def _sample(
    engine: str, number: int, case: Case, answer: dict[str, Any], busy: float, agree: float
) -> Sample:
    times = [output["times"] for output in answer["outputs"]]
    gaps = [b - a for row in times for a, b in pairwise(row)]
    return Sample(
        engine=engine,
        round=number,
        case=case,
        step=median(gaps) if case.tokens > 2 else None,
        tokens_per_s=case.batch * case.tokens / max(row[-1] for row in times),
        ttft=max(row[0] for row in times),
        busy=busy,
        agree=agree,
    )
