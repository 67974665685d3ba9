"""What happened to one request (`Trace`), and its timing (`Latency`).

A `Trace` holds raw timestamps in nanoseconds; every number is derived from it on demand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from inferkit.errors import OptionError
from inferkit.html import format_number, table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["NS", "Latency", "Trace", "acceptance"]

NS = 1e-9
"""Seconds in the unit of a `Trace`."""

_SHOWN = ("queue", "ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened to one request; every time is an int of ``time.perf_counter_ns``.

    Attributes:
        arrival: When it was submitted.
        scheduled: When the first step that it took part in began; None where it never ran.
        tokens: When the engine emitted each output token, in order; tokens of a chunk stand at its
            time.
        finished: When the engine was done with it; None while it runs.
        prompt_tokens: Length of the prompt.
        cached_tokens: How many of these came from the prefix cache.
        ok: False where it ended in an error or was cancelled.
        finish_reason: "stop", "length", "cancelled" or "error".
        chunks: When each chunk of output arrived, where a chunk may hold several tokens or none;
            None: one per token; empty: not known.
        draft_tokens: How many next tokens were guessed and checked (speculative decoding).
        accepted_tokens: How many of these were right.

    Raises:
        OptionError: The times run backwards, so that no latency would mean anything.
    """

    arrival: int
    scheduled: int | None
    tokens: tuple[int, ...]
    finished: int | None
    prompt_tokens: int
    cached_tokens: int = 0
    ok: bool = True
    finish_reason: str | None = None
    chunks: tuple[int, ...] | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def __post_init__(self) -> None:
        self._check_order(self.tokens)
        if self.chunks is not None:
            self._check_order(self.chunks)

    def _check_order(self, output: tuple[int, ...]) -> None:
        known = (self.arrival, self.scheduled, *output, self.finished)
        times = [time for time in known if time is not None]
        for earlier, later in pairwise(times):
            if later < earlier:
                raise OptionError(
                    f"a trace's times run backwards ({later} ns comes after {earlier} ns); the "
                    "order is arrival, scheduled, tokens, finished, all of one perf_counter_ns"
                )

    @property
    def output(self) -> tuple[int, ...]:
        """When output arrived: the times of its chunks, of its tokens where each is a chunk."""
        return self.tokens if self.chunks is None else self.chunks

    @property
    def end(self) -> int:
        """When it finished; else its last sign of life."""
        known = (self.finished, *self.tokens[-1:], self.scheduled)
        return next((time for time in known if time is not None), self.arrival)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON.

        Without ``chunks`` where each token is one, and without counts of guesses where there were
        none.
        """
        data = asdict(self) | {"tokens": list(self.tokens)}
        if self.chunks is None:
            del data["chunks"]
        else:
            data["chunks"] = list(self.chunks)
        if not self.draft_tokens:
            del data["draft_tokens"], data["accepted_tokens"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """Read what `to_dict` wrote.

        Raises:
            OptionError: A field is missing or unknown.
        """
        try:
            times = {n: tuple(data[n]) for n in ("tokens", "chunks") if data.get(n) is not None}
            return cls(**{**data, **times})
        except (KeyError, TypeError) as error:
            names = ", ".join(f.name for f in fields(cls))
            raise OptionError(f"not a latency trace ({error}); its fields are: {names}") from error


def acceptance(latencies: Iterable[Latency]) -> str | None:
    """How many guessed tokens were right, in words; None where none was guessed."""
    traces = [latency.trace for latency in latencies]
    guessed = sum(trace.draft_tokens for trace in traces)
    if not guessed:
        return None
    right = sum(trace.accepted_tokens for trace in traces)
    return f"{right} of {guessed} ({right / guessed:.0%})"


@dataclass(frozen=True, slots=True, repr=False)
class Latency:
    """The timing of one request, in seconds, as ``vllm bench serve`` defines it.

    A value is None where it is not defined: without a token there is no TTFT and no E2E, and with
    a single one no TPOT. Source: vllm-project/vllm@009e6d4 vllm/benchmarks/serve.py
    (``calculate_metrics``); ``queue`` is inferkit's own.

    Attributes:
        trace: What happened, and when.
        origin: Where and when it was measured, for what was not measured here and now.
    """

    trace: Trace
    origin: str = field(default="", compare=False)

    @property
    def ttft(self) -> float | None:
        """Time to first token: first token minus arrival."""
        tokens = self.trace.tokens
        return (tokens[0] - self.trace.arrival) * NS if tokens else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (e2e - TTFT) / (output tokens - 1)."""
        tokens = self.trace.tokens
        return (tokens[-1] - tokens[0]) / (len(tokens) - 1) * NS if len(tokens) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latency: the gap between each token and the one before.

        Where tokens came in chunks, it is between chunks, as vLLM's ITL and AIPerf's inter-chunk
        latency are; empty where their times are not known.
        """
        return [(after - before) * NS for before, after in pairwise(self.trace.output)]

    @property
    def e2e(self) -> float | None:
        """End to end: last token minus arrival."""
        tokens = self.trace.tokens
        return (tokens[-1] - self.trace.arrival) * NS if tokens else None

    @property
    def queue(self) -> float | None:
        """Arrival to the start of the first step that it took part in."""
        scheduled = self.trace.scheduled
        return None if scheduled is None else (scheduled - self.trace.arrival) * NS

    @property
    def acceptance_rate(self) -> float | None:
        """Of speculative decoding: the share of guessed tokens that were right.

        None where none was guessed. As vLLM's "Acceptance rate": accepted / draft tokens.
        """
        guessed = self.trace.draft_tokens
        return self.trace.accepted_tokens / guessed if guessed else None

    @property
    def output_tokens(self) -> int:
        """Number of tokens generated."""
        return len(self.trace.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt."""
        return self.trace.prompt_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens divided by e2e: the speed that this request's reader saw."""
        return self.output_tokens / self.e2e if self.e2e else None

    def to_dict(self) -> dict[str, Any]:
        """The values in seconds and the raw ``trace`` in nanoseconds, ready for JSON."""
        names = ("ttft", "tpot", "itl", "e2e", "queue", "output_tokens", "prompt_tokens")
        values = {name: getattr(self, name) for name in (*names, "tokens_per_second")}
        plain = {"definitions": "vllm", "unit": "s", **values, "trace": self.trace.to_dict()}
        return plain | ({"origin": self.origin} if self.origin else {})

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_frame(self) -> pd.DataFrame:
        """One row per token: index, time since arrival and itl, in seconds.

        The gap before a chunk stands at its first token; itl is NaN at its others, and at the first
        token of all.
        """
        import pandas as pd

        since = [(time - self.trace.arrival) * NS for time in self.trace.tokens]
        return pd.DataFrame({"token": range(len(since)), "time": since, "itl": self._gaps()})

    def _gaps(self) -> list[float]:
        """The gap before each token: see `to_frame`."""
        trace = self.trace
        if trace.chunks is None:
            return [math.nan, *self.itl][: len(trace.tokens)]
        before = dict(reversed(list(zip(trace.chunks[1:], self.itl))))
        gaps = [before.pop(time, math.nan) for time in trace.tokens[1:]]
        return [math.nan, *gaps][: len(trace.tokens)]

    def plot(self) -> go.Figure:
        """A plotly figure: its tokens over time and the gap before each token."""
        from inferkit import plots

        return plots.request_figure(self)

    def __repr__(self) -> str:
        times = " ".join(f"{name}={_ms(getattr(self, name))}" for name in _SHOWN)
        accepted = acceptance([self])
        guesses = "" if accepted is None else f", {accepted} guesses accepted"
        origin = f"; {self.origin}" if self.origin else ""
        return f"<Latency {times}, {self.output_tokens} tokens{guesses}{origin}>"

    def _repr_html_(self) -> str:
        cells = [_ms(getattr(self, name), unit="") for name in _SHOWN]
        speed = format_number(self.tokens_per_second)
        counts = (self.prompt_tokens, self.trace.cached_tokens, self.output_tokens)
        return table(
            ("queue ms", "TTFT ms", "TPOT ms", "E2E ms", "prompt", "cached", "output", "tokens/s"),
            [(*cells, *counts, speed)],
            note="vLLM definitions (vllm bench serve): TTFT = first token - arrival; TPOT = "
            "(E2E - TTFT) / (output tokens - 1); E2E = last token - arrival. "
            "Queue = arrival to first scheduled step. Cached: prompt tokens that an earlier "
            f"request had computed.{_accepted_note(self)}"
            f"{f' {self.origin}.' if self.origin else ''}",
        )


def _accepted_note(latency: Latency) -> str:
    accepted = acceptance([latency])
    return "" if accepted is None else f" Guessed tokens accepted: {accepted}."


def _ms(seconds: float | None, unit: str = "ms") -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}{unit}"
