"""Scheduler: which requests take part in the next step, under which batching policy.

A step prefills parts of some prompts and decodes one token of every request that has its prompt
behind it. Admission gives a request a slot. A slot holds a whole context, so a free slot is also
the KV memory for any request that fits the context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, get_args

from inferkit.engine.request import Request
from inferkit.errors import OptionError

Batching = Literal["continuous", "static", "off"]
POLICIES: tuple[str, ...] = get_args(Batching)


def check_batching(batching: str, max_batch: int) -> None:
    """Raise OptionError unless the policy exists and the batch is a positive integer."""
    if batching not in POLICIES:
        raise OptionError(f"batching={batching!r} is unknown: choose one of {', '.join(POLICIES)}.")
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise OptionError(f"max_batch={max_batch!r}: give a number of requests, 1 or more.")


@dataclass(slots=True, eq=False)
class Entry:
    """A request in the engine's books.

    Attributes:
        slot: Its row in the cache; -1 where it has none.
        computed: How many of its tokens have their keys and values in the cache.
        written: Up to which position its row was ever written, padding included.
        tokens: Prompt and output.
    """

    request: Request
    slot: int = -1
    computed: int = 0
    written: int = 0
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens of its prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def prefilling(self) -> bool:
        """Whether part of its prompt is not yet in the cache."""
        return self.computed < self.prompt_length

    @property
    def remaining(self) -> int:
        """Prompt tokens that are still to be prefilled."""
        return self.prompt_length - self.computed


@dataclass(frozen=True, slots=True)
class Step:
    """What the next step does: prompt parts as (entry, number of tokens), and rows to decode."""

    prefill: tuple[tuple[Entry, int], ...]
    decode: tuple[Entry, ...]


class Scheduler:
    """Requests that wait and run. Used by the engine's thread alone.

    Policies:
        continuous: A request is admitted as soon as a slot is free.
        static: A batch is formed of what waits, and the next one when all of it has ended; its rows
            decode together once all are prefilled. Rows that end early leave their slot empty.
        off: One request at a time.
    """

    def __init__(self, batching: Batching, max_batch: int, prefill_chunk: int) -> None:
        self.batching: Batching = batching
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Entry] = deque()
        self.running: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """Queue a request, first come, first served."""
        self.waiting.append(entry)

    def admit(self) -> list[Entry]:
        """Move requests that may start now from waiting to running; they need slots."""
        if self.batching == "off":
            room = 1 - len(self.running)
        elif self.batching == "static" and self.running:
            room = 0
        else:
            room = self.max_batch - len(self.running)
        admitted = list(islice(self.waiting, max(0, room)))
        self.running += admitted
        for _ in admitted:  # not before: other threads look (see `Engine.requests`)
            self.waiting.popleft()
        return admitted

    def remove(self, entry: Entry) -> None:
        """Forget a request that has ended or was cancelled."""
        if entry in self.running:
            self.running.remove(entry)
        elif entry in self.waiting:
            self.waiting.remove(entry)

    def prefill_candidates(self) -> list[Entry]:
        """Running requests whose prompt is not yet in the cache, in order of arrival."""
        return [s for s in self.running if s.prefilling]

    def step(self, ready: Sequence[Entry]) -> Step:
        """Plan a step.

        Args:
            ready: The prefill candidates that may go on now (one may wait for another's prefix).
        """
        prefill = self._fill(ready)
        decode = [s for s in self.running if not s.prefilling]
        if self.batching == "static" and len(decode) < len(self.running):
            decode = []
        return Step(tuple(prefill), tuple(decode))

    def _fill(self, ready: Sequence[Entry]) -> list[tuple[Entry, int]]:
        """Parts of prompts whose padded size stays within one prefill chunk."""
        parts: list[tuple[Entry, int]] = []
        width = 0
        for entry in ready:
            length = min(entry.remaining, self.prefill_chunk)
            wider = max(width, length)
            if parts and wider * (len(parts) + 1) > self.prefill_chunk:
                continue
            parts.append((entry, length))
            width = wider
        return parts
