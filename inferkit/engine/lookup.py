"""Prompt lookup: guesses the next tokens of a text by what followed the same tokens before.

Speculative decoding without a second model: a text that quotes, rewrites or repeats itself has the
next tokens in it already, and one pass can check several of them for little more than the price of
one. Sources: Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding);
vLLM's "ngram" method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from inferkit.errors import OptionError

Speculative = Literal["off", "ngram"]
SPECULATIVE: tuple[str, ...] = get_args(Speculative)

MOST = 8
"""The most tokens that are guessed at once."""

_LONGEST = 4  # tokens that must be the same before a guess; longer matches are tried first
_SHORTEST = 2
_MOST_PATIENT = 32  # steps without a guess after guesses that were all wrong


def check_speculative(speculative: str) -> None:
    """Raise OptionError unless there is such a way to guess."""
    if speculative not in SPECULATIVE:
        known = ", ".join(SPECULATIVE)
        raise OptionError(f"speculative={speculative!r} is unknown: choose one of {known}.")


class Lookup:
    """Guesses for one request, as many as have been worth it of late.

    A guess that is right makes the next one longer, a wrong one shorter; after guesses of which
    nothing was right it waits, twice as long each time, so that a text that does not repeat itself
    costs next to nothing.
    """

    def __init__(self) -> None:
        # What tokens were followed by, the last time: (length, the tokens) -> position after them.
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # tokens whose followers are known
        self._length = 2
        self._misses = 0
        self._wait = 0

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        """The tokens that may come next, ``room`` at most; none where nothing suggests any.

        Args:
            tokens: All tokens of prompt and output so far; they only grow.
            room: How many there is room for.
        """
        self._index(tokens)
        if self._wait:
            self._wait -= 1
            return []
        count = min(room, self._length)
        start = self._match(tokens) if count > 0 else None
        if start is None:
            return []
        found: list[int] = []
        for position in range(start, start + count):
            # Beyond the end of the text its continuation goes on: a repetition may be short.
            inside = position < len(tokens)
            found.append(tokens[position] if inside else found[position - len(tokens)])
        return found

    def learn(self, guessed: int, right: int) -> None:
        """Of so many guessed tokens the first so many were right."""
        if right == guessed:
            self._length = min(MOST, self._length * 2)
        else:
            self._length = max(1, right)
        self._misses = 0 if right else self._misses + 1
        if self._misses:
            self._wait = min(_MOST_PATIENT, 2 ** (self._misses - 1))

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
