"""Generation: the finished result of one request, with its tokens, its text and its latency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from inferkit import latency as _latency
from inferkit.errors import InferkitError
from inferkit.html import one_line, table, text_table
from inferkit.sampling import SamplingParams, TokenLogprobs
from inferkit.trace import Latency

if TYPE_CHECKING:
    import plotly.graph_objects as go

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a request ran under: read with the latency, or the latency says nothing.

    Attributes:
        model: The name it was loaded under.
        device: Its devices, by canonical names.
        dtype: torch's name of the dtype.
        quantization: The mode ("none", "nf4", ...) with its details; or the method of a checkpoint
            that is stored quantized.
        batching: The policy: "continuous", "static" or "off".
        max_batch: Most requests that could run with it.
        speculative: How next tokens were guessed: "off", "ngram" or "draft:NAME".
    """

    model: str
    device: str
    dtype: str
    quantization: str
    batching: str
    max_batch: int
    speculative: str = "off"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Generation:
    """The finished result of one request.

    Attributes:
        prompt: The prompt as given; None where token ids were given.
        text: The text generated, without stop strings and special tokens.
        token_ids: Every token generated, the end token included.
        prompt_token_ids: The prompt's tokens as the model read them.
        finish_reason: "stop" (an end token or stop string), "length" (``max_tokens`` or the
            context), "cancelled", or "error".
        stop_reason: The stop string or token id that ended it, where there was one.
        latency: Its timing (see `Latency`).
        params: The sampling parameters in force.
        seed: The seed in force, also where ``params.seed`` was None.
        settings: The model, device and modes that it ran under.
        logprobs: One entry per token where ``logprobs`` was asked for, else None.
        error: What went wrong where ``finish_reason`` is "error"; the text so far is kept.
    """

    prompt: str | None
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    latency: Latency
    params: SamplingParams
    seed: int
    settings: Settings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: InferkitError | None = None

    @property
    def origin(self) -> str:
        """Where and when it was measured; empty for what was measured here and now."""
        return self.latency.origin

    def raise_for_error(self) -> Generation:
        """Return itself, or raise the error that ended it."""
        if self.error is not None:
            raise self.error
        return self

    def plot(self) -> go.Figure:
        """A plotly figure of this request's tokens over time."""
        from inferkit import plots

        return plots.request_figure(self.latency)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON; times as raw nanoseconds and as seconds."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_token_ids": list(self.prompt_token_ids),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "error": str(self.error) if self.error else None,
            "params": asdict(self.params),
            "seed": self.seed,
            "settings": asdict(self.settings),
            "latency": self.latency.to_dict(),
            "logprobs": [asdict(entry) for entry in self.logprobs] if self.logprobs else None,
            "origin": self.origin,
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Generation {self.finish_reason}: {self.text!r}, {self.latency!r}>"

    def _repr_html_(self) -> str:
        error = f'<div style="color:#c0392b">{escape(str(self.error))}</div>' if self.error else ""
        return (
            f'<div class="inferkit"><div style="white-space:pre-wrap">'
            f'<span style="opacity:.6">{escape(self.prompt or "")}</span>{escape(self.text)}</div>'
            f"{error}{self.latency._repr_html_()}</div>"
        )


class Generations(list[Generation]):
    """A list of generations that shows itself as a table."""

    _HEADER = (
        *("prompt", "text", "finish", "cached", "tokens"),
        *("queue ms", "TTFT ms", "TPOT ms", "E2E ms"),
    )
    _NOTE = (
        "TTFT, TPOT and E2E as vllm bench serve defines them; queue: arrival to first step; "
        "cached: prompt tokens that an earlier request had computed"
    )

    def summary(self, **options: Any) -> _latency.LatencySummary:
        """The latency of all of them together; options as for `inferkit.summarize`."""
        return _latency.summarize(self, **options)

    @property
    def origin(self) -> str:
        """Where and when they were measured; empty where all were here and now."""
        return _latency.origin_of(self)

    @property
    def _note(self) -> str:
        return "; ".join(part for part in (self._NOTE, self.origin) if part)

    def __repr__(self) -> str:
        return f"{text_table(self._HEADER, map(_row, self))}\n{self._note}" if self else "[]"

    def _repr_html_(self) -> str:
        return table(self._HEADER, map(_row, self), note=self._note)


def _row(gen: Generation) -> Sequence[object]:
    text = one_line(gen.text, 56)
    if gen.error is not None:
        text = one_line(f"{type(gen.error).__name__}: {gen.error}", 200)
    prompt = f"{len(gen.prompt_token_ids)} tokens" if gen.prompt is None else gen.prompt
    times = (gen.latency.queue, gen.latency.ttft, gen.latency.tpot, gen.latency.e2e)
    return (
        one_line(prompt, 32),
        text,
        gen.finish_reason,
        gen.latency.trace.cached_tokens,
        len(gen.token_ids),
        *("-" if t is None else f"{1000 * t:.1f}" for t in times),
    )
