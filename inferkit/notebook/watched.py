"""A request as a view follows it: what of it has been read, and what is new."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.generation import Generation

_ALIVE = ("waiting", "running")
_PROMPT = 300  # characters of a prompt that a view shows


@dataclass(slots=True, eq=False)
class Watched:
    """A request, and how much of it has been read.

    Attributes:
        request: What is followed.
        number: What the view calls it: 1 for the first that the feed saw.
        origin: Where it was submitted, "cell" or "panel".
        tokens: How many timestamps have been read.
        status: As it was told last; "" before that.
    """

    request: Request
    number: int
    origin: str = "cell"
    tokens: int = 0
    status: str = ""
    _pieces: int = 0  # of text that have been read

    @property
    def over(self) -> bool:
        """Whether its end has been told."""
        return self.status not in ("", *_ALIVE)

    def read(self, until: int) -> tuple[list[tuple[int, float]], dict[str, Any] | None]:
        """What is new of it.

        Args:
            until: No token that came later is read, in ns of ``time.perf_counter_ns``.

        Returns:
            When each new token came, in ns, with the ms since the one before (since the arrival,
            for the first); and what to tell a view, or None.
        """
        status = _status(self.request)  # before the rest, so that nothing comes after its end
        times = self.request.times_since(self.tokens)
        due = bisect_right(times, until)
        if due < len(times):
            status = "running"
        before = self.request.times_since(self.tokens - 1)[:1] if self.tokens else []
        moments = [*(before or [self.request.arrival]), *times[:due]]
        gaps = [(late, (late - early) * 1e-6) for early, late in pairwise(moments)]
        self.tokens += due
        if not (due or self.request.pieces_since(self._pieces) or status != self.status):
            return gaps, None
        return gaps, self._news(status)

    def whole(self) -> dict[str, Any]:
        """All that has been told of it."""
        text = "".join(self.request.pieces_since(0)[: self._pieces])
        return {**self._title(), "text": text, **self._state()}

    def _news(self, status: str) -> dict[str, Any]:
        title = {"number": self.number} if self.status else self._title()
        new = self.request.pieces_since(self._pieces)
        self._pieces += len(new)
        self.status = status
        return {**title, "add": "".join(new), **self._state()}

    def _title(self) -> dict[str, Any]:
        prompt = _shortened(self.request)
        return {"number": self.number, "prompt": prompt, "origin": self.origin}

    def _state(self) -> dict[str, Any]:
        ended = _ended_facts(self.request.result()) if self.over else {}
        return {"status": self.status, "tokens": self.tokens, **ended}


def _status(request: Request) -> str:
    if request.done:
        return request.result().finish_reason
    return "waiting" if request.scheduled is None else "running"


def _shortened(request: Request) -> str:
    """A prompt as far as a view shows it."""
    text = request.prompt
    if text is None:
        return f"{len(request.prompt_token_ids)} token ids"
    return text if len(text) <= _PROMPT else text[: _PROMPT - 1] + "…"


def _ended_facts(gen: Generation) -> dict[str, Any]:
    latency = gen.latency
    names = ("queue", "ttft", "tpot", "e2e")
    times = {name: getattr(latency, name) for name in names}
    ms = {name: None if value is None else 1e3 * value for name, value in times.items()}
    return {
        "ms": ms,
        "error": str(gen.error) if gen.error else None,
        "mode": gen.settings.quantization,
    }
