"""Drafts: a second, smaller model that guesses the next tokens (speculative decoding).

Sources: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. Guesses are
the draft's likeliest tokens, and the sampler of the model that is served draws as it would have, so
that no rejection sampling is needed to keep its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inferkit.engine.engine import Engine
from inferkit.engine.guesses import DRAFT, Pace
from inferkit.engine.runner import Chunk, SlottedRunner
from inferkit.engine.scheduler import Entry
from inferkit.engine.slots import common_prefix


@dataclass(slots=True)
class _Row:
    """A request's row in the draft's cache.

    Attributes:
        held: The tokens whose keys and values are there, from the first on.
    """

    slot: int
    held: list[int] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)


class Drafts:
    """Guesses of a model that is loaded beside the one that is served; see `Guesser`.

    Its weights are those of its own engine, which may change or release them: they are used only
    while that engine rests, and a step in which it does not has no guesses. The KV cache is one of
    its own, of as many rows as the served model has.

    Args:
        name: The draft's.
        engine: The draft's.
        served: The engine of the model that is served.
        vocabulary: Token ids of the served model are below it.
    """

    def __init__(self, name: str, engine: Engine, served: Engine, vocabulary: int) -> None:
        self.name = f"{DRAFT}{name}"
        self._engine = engine
        self._served = served
        self._vocabulary = vocabulary
        self._runner: SlottedRunner | None = None
        self._rows: dict[Entry, _Row] = {}

    @property
    def alive(self) -> bool:
        """Whether the draft is still loaded."""
        return not self._engine.closed

    def guess(self, entries: Sequence[Entry], rooms: Sequence[int]) -> list[list[int]]:
        """See `Guesser.guess`."""
        nothing: list[list[int]] = [[] for _ in entries]
        if not self._engine.at_rest.acquire(blocking=False):
            return nothing
        try:
            if not self.alive:
                self._runner = None
                return nothing
            return self._guess(entries, rooms)
        finally:
            self._engine.at_rest.release()

    def learn(self, entry: Entry, guessed: int, right: int) -> None:
        """See `Guesser.learn`."""
        self._rows[entry].pace.learn(guessed, right)

    def _guess(self, entries: Sequence[Entry], rooms: Sequence[int]) -> list[list[int]]:
        runner = self._its_runner()
        self._seat(entries)
        counts = [
            min(room, self._rows[e].pace.next()) if room > 0 else 0
            for e, room in zip(entries, rooms, strict=True)
        ]
        found: list[list[int]] = [[] for _ in entries]
        for number in range(max(counts)):
            asked = [i for i, count in enumerate(counts) if count > number]
            texts = [[*entries[i].tokens, *found[i]] for i in asked]
            chosen = self._next(runner, [self._rows[entries[i]] for i in asked], texts)
            for i, token in zip(asked, chosen, strict=True):
                if token < self._vocabulary:
                    found[i].append(token)
                else:  # padding of its vocabulary
                    counts[i] = 0
        return found

    def _next(
        self, runner: SlottedRunner, rows: Sequence[_Row], texts: Sequence[list[int]]
    ) -> list[int]:
        """The likeliest token after each text, whose rows hold it then."""
        for row, text in zip(rows, texts, strict=True):
            # What it had guessed itself, and was accepted, is there already.
            del row.held[min(common_prefix(row.held, text), len(text) - 1) :]
            while (missing := len(text) - len(row.held)) > 2:  # a prompt, or after a rest
                start, most = len(row.held), min(missing - 1, runner.prefill_chunk)
                runner.prefill([Chunk(row.slot, text[start : start + most], start)])
                row.held += text[start : start + most]
        chunks = [
            Chunk(row.slot, text[len(row.held) :], len(row.held))
            for row, text in zip(rows, texts, strict=True)
        ]
        logits: list[Any] = runner.verify(chunks)
        for row, text in zip(rows, texts, strict=True):
            row.held = text
        return [int(of[-1].argmax()) for of in logits]

    def _its_runner(self) -> SlottedRunner:
        """A runner over the draft's weights as they are now, of the served model's size."""
        own, served = self._engine.runner, self._served.runner
        assert isinstance(own, SlottedRunner)
        assert isinstance(served, SlottedRunner)
        size = served.cache.slots, served.cache.context
        kept = self._runner
        if kept is not None and (kept.module, kept.cache.slots, kept.cache.context) == (
            own.module,
            *size,
        ):
            return kept
        if kept is not None:
            kept.cache.release()
        self._rows.clear()
        self._runner = SlottedRunner(
            own.module,
            own.geometry,
            slots=size[0],
            context=size[1],
            prefill_chunk=served.prefill_chunk,
        )
        return self._runner

    def _seat(self, entries: Sequence[Entry]) -> None:
        """A row for each of these, and for nobody else."""
        self._rows = {e: self._rows[e] for e in entries if e in self._rows}
        taken = {row.slot for row in self._rows.values()}
        free = iter(slot for slot in range(len(entries) + len(taken)) if slot not in taken)
        for entry in entries:
            if entry not in self._rows:
                self._rows[entry] = _Row(next(free))
