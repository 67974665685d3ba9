"""Incremental detokenisation: pieces of text as tokens come, multi-byte characters never split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Enough of the prompt for a tokenizer to know whether the first new token begins with a space.
_CONTEXT = 6
_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns one request's token ids into text, piece by piece.

    The method is that of vLLM and TGI: decode a short window with and without the new tokens, and
    hand out the difference once it no longer ends in an unfinished character. Decoding in a window
    keeps the spaces that a tokenizer would strip from a token decoded alone.

    Args:
        tokenizer: A transformers tokenizer; None gives empty text.
        prompt_token_ids: The prompt, for context.
        stop: Strings that end the text.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        # The window: what the next piece is decoded with. Of it, the first `_read` ids are told.
        self._ids = list(prompt_token_ids[-_CONTEXT:])
        self._read = len(self._ids)
        self._stop = tuple(stop)
        # Text that could be the beginning of a stop string is held back until that is known.
        self._hold = max((len(s) for s in self._stop), default=1) - 1
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token_id: int) -> str:
        """Add a token; return the text that is certain by now (often a piece, sometimes none)."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token_id)
        text = self._untold()
        if not text or text.endswith(_UNFINISHED):
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return self._filter(text)

    def flush(self) -> str:
        """The rest: text held back, and an unfinished character as the tokenizer shows it."""
        if self.stopped_by is not None or self._tokenizer is None:
            return ""
        piece = self._filter(self._untold())
        self._read = len(self._ids)
        if self.stopped_by is None:
            piece, self._held = piece + self._held, ""
        return piece

    def _untold(self) -> str:
        """The text of the tokens that nothing was handed out for yet."""
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        if not after.startswith(before):
            # Token ids may end a prompt within a character; the new tokens have completed it.
            before = before.rstrip(_UNFINISHED)
        if not after.startswith(before):
            # A decoder with byte fallback shows a run of bytes, if it ends within a character, as
            # broken altogether: leave alone what was told and show what is new.
            return self._decode(self._ids[self._read :])
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _filter(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(text.find(s), s) for s in self._stop if s in text]
        if found:
            start, self.stopped_by = min(found)
            self._held = ""
            return text[:start]
        keep = _overlap(text, self._stop, self._hold)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: Sequence[str], longest: int) -> int:
    """Length of the longest end of ``text`` that begins one of the stop strings."""
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0
