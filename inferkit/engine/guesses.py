"""Speculative decoding: who guesses the next tokens of requests, so that one pass checks several.

Prompt lookup ("ngram") guesses by what followed the same tokens before: a text that quotes,
rewrites or repeats itself has its next tokens in it already, and needs no second model. Sources:
Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding); vLLM's
"ngram" method. A second model that guesses is in `drafts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inferkit.engine.scheduler import Entry
from inferkit.errors import OptionError

SPECULATIVE = ("off", "ngram")
DRAFT = "draft:"
"""What stands before the name of a loaded model that guesses."""

MOST = 8
"""The most tokens that are guessed at once."""

_LONGEST = 4  # tokens that must be the same before a guess; longer matches are tried first
_SHORTEST = 2
_MOST_PATIENT = 32  # steps without a guess after guesses that were all wrong


def check_speculative(speculative: str) -> None:
    """Raise OptionError unless there may be such a way to guess."""
    named = isinstance(speculative, str) and speculative.startswith(DRAFT)
    if not named and speculative not in SPECULATIVE:
        raise OptionError(
            f"speculative={speculative!r} is unknown: choose one of {', '.join(SPECULATIVE)}, or "
            f'"{DRAFT}NAME" for a loaded model that guesses.'
        )


class Guesser(Protocol):
    """Guesses for the requests of an engine. Used by the engine's thread alone.

    Attributes:
        name: As ``speculative=`` has it.
    """

    name: str

    @property
    def alive(self) -> bool:
        """Whether it still can."""

    def guess(self, entries: Sequence[Entry], rooms: Sequence[int]) -> list[list[int]]:
        """What may come next of each request, as many tokens as there is room for at most.

        Args:
            entries: All requests that are past their prompts.
            rooms: For each, how many tokens there is room for; may be below 1.
        """

    def learn(self, entry: Entry, guessed: int, right: int) -> None:
        """Of so many tokens that were guessed the first so many were right."""


class Pace:
    """How many tokens to guess for a request: as many as have been worth it of late.

    A guess that is right makes the next one longer, a wrong one shorter; after guesses of which
    nothing was right it waits, twice as long each time, so that a text that cannot be guessed costs
    next to nothing.
    """

    def __init__(self) -> None:
        self._length = 2
        self._misses = 0
        self._wait = 0

    def next(self) -> int:
        """How many to guess now."""
        if self._wait:
            self._wait -= 1
            return 0
        return self._length

    def learn(self, guessed: int, right: int) -> None:
        """Of so many guessed tokens the first so many were right."""
        if right == guessed:
            self._length = min(MOST, self._length * 2)
        else:
            self._length = max(1, right)
        self._misses = 0 if right else self._misses + 1
        if self._misses:
            self._wait = min(_MOST_PATIENT, 2 ** (self._misses - 1))


class Lookups:
    """Prompt lookup for all requests of an engine; see `Guesser`."""

    name = "ngram"
    alive = True

    def __init__(self) -> None:
        self._kept: dict[Entry, tuple[Lookup, Pace]] = {}

    def guess(self, entries: Sequence[Entry], rooms: Sequence[int]) -> list[list[int]]:
        """See `Guesser.guess`."""
        self._kept = {e: self._kept.get(e) or (Lookup(), Pace()) for e in entries}
        found = []
        for entry, room in zip(entries, rooms, strict=True):
            lookup, pace = self._kept[entry]
            found.append(lookup.guess(entry.tokens, min(room, pace.next()) if room > 0 else 0))
        return found

    def learn(self, entry: Entry, guessed: int, right: int) -> None:
        """See `Guesser.learn`."""
        self._kept[entry][1].learn(guessed, right)


class Lookup:
    """What followed which tokens in one text that grows."""

    def __init__(self) -> None:
        # What tokens were followed by, the last time: the tokens -> position after them.
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # tokens whose followers are known

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """The tokens that may come next, so many; none where nothing suggests any.

        Args:
            tokens: All tokens of prompt and output so far; they only grow.
            count: How many.
        """
        self._index(tokens)
        start = self._match(tokens) if count > 0 else None
        if start is None:
            return []
        found: list[int] = []
        for position in range(start, start + count):
            # Beyond the end of the text its continuation goes on: a repetition may be short.
            inside = position < len(tokens)
            found.append(tokens[position] if inside else found[position - len(tokens)])
        return found

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in the followers of all but the last tokens, which nothing has followed yet."""
        for end in range(max(self._indexed, _SHORTEST), len(tokens)):
            for n in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._indexed = max(self._indexed, len(tokens))

    def _match(self, tokens: Sequence[int]) -> int | None:
        for n in range(min(_LONGEST, len(tokens)), _SHORTEST - 1, -1):
            found = self._after.get(tuple(tokens[-n:]))
            if found is not None:
                return found
        return None
