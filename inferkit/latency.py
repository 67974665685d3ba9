"""Latency of one request (`Latency`) and of many (`LatencySummary`), from raw token timestamps.

A `Trace` holds what happened, in nanoseconds; every number is derived from it on demand. The
definitions are those of ``vllm bench serve``, and the same traces can be read as AIPerf or GuideLLM
would read them: the three use the same names for different quantities and percentiles. Each set
of definitions is one `Definitions` value below, with the source that it was read from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from inferkit.errors import OptionError
from inferkit.html import table, text_table

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["DEFINITIONS", "Definitions", "Distribution", "Latency", "LatencySummary", "Metric"]
__all__ += ["Trace", "summarize"]

Unit = Literal["s", "ms"]
_PER_SECOND = {"s": 1.0, "ms": 1e3}
_NS = 1e-9


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened to one request; every time is an int of ``time.perf_counter_ns``.

    Attributes:
        arrival: When it was submitted.
        scheduled: When the first step that it took part in began; None where it never ran.
        tokens: When the engine emitted each output token, in order.
        finished: When the engine was done with it; None while it runs.
        prompt_tokens: Length of the prompt.
        cached_tokens: How many of these came from the prefix cache.
        ok: False where it ended in an error or was cancelled.
        finish_reason: "stop", "length", "cancelled" or "error".

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

    def __post_init__(self) -> None:
        known = (self.arrival, self.scheduled, *self.tokens, self.finished)
        times = [time for time in known if time is not None]
        for earlier, later in pairwise(times):
            if later < earlier:
                raise OptionError(
                    f"a trace's times run backwards ({later} ns comes after {earlier} ns); the "
                    "order is arrival, scheduled, tokens, finished, all of one perf_counter_ns"
                )

    @property
    def end(self) -> int:
        """When it finished; else its last sign of life."""
        known = (self.finished, *self.tokens[-1:], self.scheduled)
        return next((time for time in known if time is not None), self.arrival)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"tokens": list(self.tokens)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """Read what `to_dict` wrote.

        Raises:
            OptionError: A field is missing or unknown.
        """
        try:
            return cls(**{**data, "tokens": tuple(data["tokens"])})
        except (KeyError, TypeError) as error:
            names = ", ".join(f.name for f in fields(cls))
            raise OptionError(f"not a latency trace ({error}); its fields are: {names}") from error


@dataclass(frozen=True, slots=True, repr=False)
class Latency:
    """The timing of one request, in seconds, as ``vllm bench serve`` defines it.

    A value is None where it is not defined: without a token there is no TTFT and no E2E, and with
    a single one no TPOT. Source: vllm-project/vllm@009e6d4 vllm/benchmarks/serve.py
    (``calculate_metrics``); ``queue`` is inferkit's own.
    """

    trace: Trace

    @property
    def ttft(self) -> float | None:
        """Time to first token: first token minus arrival."""
        tokens = self.trace.tokens
        return (tokens[0] - self.trace.arrival) * _NS if tokens else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (e2e - TTFT) / (output tokens - 1)."""
        tokens = self.trace.tokens
        return (tokens[-1] - tokens[0]) / (len(tokens) - 1) * _NS if len(tokens) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latency: the gap between each token and the one before."""
        tokens = self.trace.tokens
        return [(after - before) * _NS for before, after in pairwise(tokens)]

    @property
    def e2e(self) -> float | None:
        """End to end: last token minus arrival."""
        tokens = self.trace.tokens
        return (tokens[-1] - self.trace.arrival) * _NS if tokens else None

    @property
    def queue(self) -> float | None:
        """Arrival to the start of the first step that it took part in."""
        scheduled = self.trace.scheduled
        return None if scheduled is None else (scheduled - self.trace.arrival) * _NS

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
        return {"definitions": "vllm", "unit": "s", **values, "trace": self.trace.to_dict()}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_frame(self) -> pd.DataFrame:
        """One row per token: index, time since arrival and itl, in seconds (first itl: NaN)."""
        import pandas as pd

        since = [(time - self.trace.arrival) * _NS for time in self.trace.tokens]
        gaps = [math.nan, *self.itl][: len(since)]
        return pd.DataFrame({"token": range(len(since)), "time": since, "itl": gaps})

    def plot(self) -> go.Figure:
        """A plotly figure: its tokens over time and the gap before each token."""
        from inferkit import plots

        return plots.request_figure(self)

    def __repr__(self) -> str:
        times = " ".join(f"{name}={_ms(getattr(self, name))}" for name in _SHOWN)
        return f"<Latency {times}, {self.output_tokens} tokens>"

    def _repr_html_(self) -> str:
        cells = [_ms(getattr(self, name), unit="") for name in _SHOWN]
        speed = _number(self.tokens_per_second)
        return table(
            ("queue ms", "TTFT ms", "TPOT ms", "E2E ms", "prompt", "output", "tokens/s"),
            [(*cells, self.prompt_tokens, self.output_tokens, speed)],
            note="vLLM definitions (vllm bench serve): TTFT = first token - arrival; TPOT = "
            "(E2E - TTFT) / (output tokens - 1); E2E = last token - arrival. "
            "Queue = arrival to first scheduled step.",
        )


_SHOWN = ("queue", "ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Statistics of one metric; None where no request has a value.

    Percentiles are attributes: ``.p50``, ``.p90``, ``.p95``, ``.p99`` in every set of
    definitions, and what else its tool reports (``.p999`` is GuideLLM's 99.9th percentile).

    Attributes:
        unit: "s" or "ms": the unit of the tool that the definition comes from.
        count: Number of values. GuideLLM weights per-token averages by tokens and counts these.
        std: Population standard deviation, which all three tools report.
    """

    unit: Unit
    count: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    percentiles: Mapping[str, float | None]

    def __getattr__(self, name: str) -> float | None:
        if name[:1] == "p" and name[1:].isdigit():
            if name in self.percentiles:
                return self.percentiles[name]
            raise AttributeError(f"no percentile {name!r}; there are {_listed(self.percentiles)}")
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*(f.name for f in fields(self)), "median", "to_dict", *self.percentiles]

    @property
    def median(self) -> float | None:
        """The 50th percentile."""
        return self.percentiles["p50"]

    def to_dict(self) -> dict[str, Any]:
        """All statistics in one flat dict, ready for JSON."""
        names = ("unit", "count", "mean", "std", "min", "max")
        return {name: getattr(self, name) for name in names} | dict(self.percentiles)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one tool: its name there, and the quantity that the name stands for.

    Attributes:
        name: As the tool spells it in its results.
        label: Short form for tables and axes.
        unit: Unit of the values under this name.
        meaning: The formula, in words.
        values: The values that one request contributes, in seconds.
        weight: How often a request's values count; None means once.
        shown: The unit that tables use.
    """

    name: str
    label: str
    unit: Unit
    meaning: str
    values: Callable[[Latency], Sequence[float]]
    weight: Callable[[Latency], int] | None = None
    shown: Unit = "ms"


@dataclass(frozen=True, slots=True)
class Definitions:
    """How one tool turns traces into numbers.

    Attributes:
        name: The key for ``summarize(definitions=...)``.
        title: The tool's name, for tables and plots.
        source: Where the definitions were read.
        metrics: Its latency metrics.
        percentiles: Name and per mille of each percentile that it reports.
        interpolated: True for numpy's linear interpolation; False for nearest rank.
        window: Traces (all, ok) -> (start, end) in ns, of the time that rates are divided by.
        tpot_missing: What a TPOT objective says of a request with fewer than two tokens.
        gap_metric: Its metric for the time between tokens.
        share: How requests that failed count in ``good_request_fraction``; None: not reported.
    """

    name: str
    title: str
    source: str
    metrics: tuple[Metric, ...]
    percentiles: tuple[tuple[str, int], ...]
    interpolated: bool
    window: Callable[[Sequence[Trace], Sequence[Trace]], tuple[int, int]]
    tpot_missing: Literal["met", "missed", "left out"]
    gap_metric: str
    share: Literal["failed", "errors"] | None

    def metric(self, name: str) -> Metric:
        """The metric of that name.

        Raises:
            OptionError: This tool has no such metric.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise OptionError(
            f"{self.title} definitions have no metric {name!r}; they have "
            f"{_listed(m.name for m in self.metrics)}"
        )

    def sample(self, metric: Metric, done: Sequence[Latency]) -> tuple[np.ndarray, np.ndarray]:
        """Values of a metric over requests, in its unit, and how often each of them counts."""
        import numpy as np

        values: list[float] = []
        weights: list[int] = []
        for latency in done:
            own = metric.values(latency)
            values.extend(own)
            weights.extend([metric.weight(latency) if metric.weight else 1] * len(own))
        return np.array(values) * _PER_SECOND[metric.unit], np.array(weights, dtype=np.int64)

    def distribution(self, metric: Metric, done: Sequence[Latency]) -> Distribution:
        """Statistics of a metric over the requests that succeeded."""
        import numpy as np

        values, weights = self.sample(metric, done)
        names = [name for name, _ in self.percentiles]
        if not len(values):
            return Distribution(metric.unit, 0, None, None, None, None, dict.fromkeys(names))
        mean = np.average(values, weights=weights)
        std = math.sqrt(np.average((values - mean) ** 2, weights=weights))
        points = [per_mille for _, per_mille in self.percentiles]
        cuts = (
            np.percentile(values, [point / 10 for point in points])
            if self.interpolated
            else _nearest_rank(values, weights, points)
        )
        low, high = float(values.min()), float(values.max())
        found = dict(zip(names, map(float, cuts)))
        return Distribution(metric.unit, int(weights.sum()), float(mean), std, low, high, found)

    def good(self, done: Sequence[Latency], slo: Mapping[str, float]) -> tuple[int, int]:
        """Of the requests that succeeded: how many meet every objective, and how many were judged.

        An objective is met at equality, in all three tools.
        """
        judged = done
        if self.tpot_missing == "left out":
            judged = [one for one in done if all(getattr(one, key) is not None for key in slo)]
        met = sum(all(self._meets(one, *item) for item in slo.items()) for one in judged)
        return met, len(judged)

    def _meets(self, latency: Latency, key: str, limit: float) -> bool:
        value = getattr(latency, key)
        if value is None:
            return key == "tpot" and self.tpot_missing == "met"
        return bool(value <= limit)


def _nearest_rank(values: np.ndarray, weights: np.ndarray, points: Iterable[int]) -> np.ndarray:
    """The smallest value at or below which ``points`` per mille of the weight lies.

    In whole numbers: a cumulative sum of fractions falls short of 0.9 after nine tenths, and would
    then answer with the next value.
    """
    import numpy as np

    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    ranks = [-(-point * int(reached[-1]) // 1000) for point in points]
    return values[order][np.searchsorted(reached, ranks)]


def _each(name: str) -> Callable[[Latency], Sequence[float]]:
    """Reads one attribute of a `Latency`: a value per request, and none where it is undefined."""

    def values(latency: Latency) -> Sequence[float]:
        value = getattr(latency, name)
        return () if value is None else (value,)

    return values


def _itl(latency: Latency) -> Sequence[float]:
    return latency.itl


def _until_end(latency: Latency) -> Sequence[float]:
    return ((latency.trace.end - latency.trace.arrival) * _NS,)


def _e2e_per_token(latency: Latency) -> Sequence[float]:
    return () if latency.e2e is None else (latency.e2e / latency.output_tokens,)


def _wall_time(traces: Sequence[Trace], ok: Sequence[Trace]) -> tuple[int, int]:
    return min(t.arrival for t in traces), max(t.end for t in traces)


def _valid_responses(traces: Sequence[Trace], ok: Sequence[Trace]) -> tuple[int, int]:
    valid = [trace for trace in ok if trace.tokens]
    start = min((t.arrival for t in valid), default=0)
    return start, max((t.tokens[-1] for t in valid), default=start)


_VLLM = Definitions(
    name="vllm",
    title="vLLM",
    source="vllm bench serve (vllm-project/vllm@009e6d4 vllm/benchmarks/serve.py)",
    metrics=(
        Metric("ttft", "TTFT", "s", "first token - arrival", _each("ttft")),
        Metric(
            "tpot", "TPOT", "s", "(E2E - TTFT) / (output tokens - 1), per request", _each("tpot")
        ),
        Metric("itl", "ITL", "s", "gap between successive tokens, all requests pooled", _itl),
        Metric("e2e", "E2E", "s", "last token - arrival (vLLM's e2el)", _each("e2e")),
        Metric(
            "queue", "queue", "s", "first scheduled step - arrival (inferkit's own)", _each("queue")
        ),
    ),
    percentiles=(("p50", 500), ("p90", 900), ("p95", 950), ("p99", 990)),
    interpolated=True,
    window=_wall_time,
    tpot_missing="met",
    gap_metric="itl",
    share=None,
)

# Its documentation says sample standard deviation; metric_dicts.py, which computes the exported
# one, passes ddof=0. The results file decides.
_AIPERF = Definitions(
    name="aiperf",
    title="AIPerf",
    source="AIPerf 0.13 (ai-dynamo/aiperf docs/metrics-reference.md@0176f59, "
    "src/aiperf/metrics/metric_dicts.py)",
    metrics=(
        Metric("time_to_first_token", "TTFT", "ms", "first token - start", _each("ttft")),
        Metric(
            "time_to_second_token",
            "TTST",
            "ms",
            "second token - first token",
            lambda latency: latency.itl[:1],
        ),
        Metric("request_latency", "Request Latency", "ms", "last token - start", _each("e2e")),
        Metric(
            "inter_token_latency",
            "Inter Token Latency",
            "ms",
            "(request latency - TTFT) / (output tokens - 1), per request: vLLM's TPOT",
            _each("tpot"),
        ),
        Metric(
            "inter_chunk_latency",
            "Inter Chunk Latency",
            "ms",
            "gap between successive tokens, all requests pooled: vLLM's ITL",
            _itl,
        ),
    ),
    percentiles=tuple((f"p{n}", 10 * n) for n in (1, 5, 10, 25, 50, 75, 90, 95, 99)),
    interpolated=True,
    window=_valid_responses,
    tpot_missing="missed",
    gap_metric="inter_chunk_latency",
    share="failed",
)

_GUIDELLM = Definitions(
    name="guidellm",
    title="GuideLLM",
    source="GuideLLM 0.8 (vllm-project/guidellm src/guidellm/schemas/base/"
    "{request_stats,statistics}.py, src/guidellm/benchmark/schemas/metrics.py)",
    metrics=(
        Metric(
            "request_latency", "request latency", "s", "request end - start", _until_end, shown="s"
        ),
        Metric("time_to_first_token_ms", "TTFT", "ms", "first token - start", _each("ttft")),
        Metric(
            "inter_token_latency_ms",
            "inter-token latency",
            "ms",
            "(last - first token) / (output tokens - 1), per request, weighted by output "
            "tokens - 1: vLLM's TPOT",
            _each("tpot"),
            weight=lambda latency: latency.output_tokens - 1,
        ),
        Metric(
            "time_per_output_token_ms",
            "time per output token",
            "ms",
            "(last token - start) / output tokens, the first included, weighted by output tokens",
            _e2e_per_token,
            weight=lambda latency: latency.output_tokens,
        ),
    ),
    percentiles=(
        *(("p001", 1), ("p01", 10), ("p05", 50), ("p10", 100), ("p25", 250), ("p50", 500)),
        *(("p75", 750), ("p90", 900), ("p95", 950), ("p99", 990), ("p999", 999)),
    ),
    interpolated=False,
    window=_wall_time,
    tpot_missing="left out",
    gap_metric="inter_token_latency_ms",
    share="errors",
)

DEFINITIONS: Mapping[str, Definitions] = {d.name: d for d in (_VLLM, _AIPERF, _GUIDELLM)}
"""The tools whose definitions `summarize` knows, by name."""


@dataclass(frozen=True, slots=True, repr=False)
class LatencySummary:
    """Latency and throughput of several requests, under one tool's definitions.

    Each metric is a `Distribution`, as an attribute or by its name: ``summary.ttft.p99`` and
    ``summary["ttft"].p99`` in seconds under "vllm", ``summary["inter_token_latency"].p99`` in
    AIPerf's milliseconds under "aiperf". ``summary.metrics`` holds them all. Only requests that
    succeeded count, in every tool; the others are counted in ``failed``.

    Attributes:
        definitions: "vllm", "aiperf" or "guidellm".
        latencies: The requests, failed ones included.
        slo: The objectives in seconds, or None.
        metrics: Name -> `Distribution`.
        duration: Seconds that rates are divided by: first arrival to the last request's end
            (AIPerf: to the last token of a request that succeeded).
        goodput: Requests per second that meet every objective; None without objectives.
        good_request_fraction: The share of requests that do, failed ones in the denominator
            (GuideLLM, whose name for it is slo_attainment, leaves out cancelled ones); None without
            objectives and under "vllm", which has no such number.
    """

    definitions: str
    latencies: tuple[Latency, ...]
    slo: Mapping[str, float] | None
    metrics: Mapping[str, Distribution]
    duration: float
    goodput: float | None
    good_request_fraction: float | None

    def __getattr__(self, name: str) -> Distribution:
        if name.startswith("_"):  # protocols that copy and display ask before there are fields
            raise AttributeError(name)
        if name in self.metrics:
            return self.metrics[name]
        raise AttributeError(
            f"no {name!r} here; the metrics under {self.definitions!r} definitions are "
            f"{_listed(self.metrics)}"
        )

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self.metrics]

    def __getitem__(self, name: str) -> Distribution:
        return self.metrics[self.spec.metric(name).name]

    @property
    def spec(self) -> Definitions:
        """What the definitions say: metrics, percentiles, source."""
        return DEFINITIONS[self.definitions]

    @property
    def done(self) -> list[Latency]:
        """The requests that succeeded, which are those that count."""
        return _done(self.latencies)

    @property
    def completed(self) -> int:
        """Requests that succeeded."""
        return len(self.done)

    @property
    def failed(self) -> int:
        """Requests that ended in an error or were cancelled."""
        return len(self.latencies) - self.completed

    @property
    def total_output_tokens(self) -> int:
        """Tokens generated by the requests that succeeded."""
        return sum(one.output_tokens for one in self.done)

    @property
    def total_prompt_tokens(self) -> int:
        """Prompt tokens of the requests that succeeded."""
        return sum(one.prompt_tokens for one in self.done)

    @property
    def output_tokens_per_second(self) -> float | None:
        """Output tokens per second of ``duration``; None where that is zero."""
        return _rate(self.total_output_tokens, self.duration)

    @property
    def total_tokens_per_second(self) -> float | None:
        """Prompt and output tokens per second of ``duration``."""
        return _rate(self.total_prompt_tokens + self.total_output_tokens, self.duration)

    @property
    def requests_per_second(self) -> float | None:
        """Requests that succeeded per second of ``duration``."""
        return _rate(self.completed, self.duration)

    def to_dict(self) -> dict[str, Any]:
        """Every number, with each metric's unit and meaning, ready for JSON."""
        return {
            "definitions": self.definitions,
            "source": self.spec.source,
            **{name: getattr(self, name) for name in _TOTALS},
            "slo": None if self.slo is None else dict(self.slo),
            "metrics": {
                metric.name: {"meaning": metric.meaning, **self.metrics[metric.name].to_dict()}
                for metric in self.spec.metrics
            },
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_frame(self) -> pd.DataFrame:
        """One row per metric, one column per statistic; the column ``unit`` says "ms" or "s"."""
        import pandas as pd

        rows = []
        for metric in self.spec.metrics:
            found = self.metrics[metric.name]
            numbers = {**found.to_dict(), "median": found.median}
            scale = _PER_SECOND[metric.shown] / _PER_SECOND[metric.unit]
            for name in numbers.keys() - {"unit", "count"}:
                value = numbers[name]
                numbers[name] = math.nan if value is None else value * scale
            rows.append({"metric": metric.name, **numbers, "unit": metric.shown})
        return pd.DataFrame(rows).set_index("metric")

    def requests(self) -> pd.DataFrame:
        """One row per request, failed ones included, in the units of `metrics`.

        ``arrival`` is in seconds since the first. A metric that pools several values of a request
        stands as their mean, under its name with "_mean". ``frame.attrs["units"]`` has the units.
        """
        import pandas as pd

        start = min(one.trace.arrival for one in self.latencies)
        metrics = self.spec.metrics
        columns = {m.name: f"{m.name}_mean" if m.values is _itl else m.name for m in metrics}
        rows = []
        for one in self.latencies:
            trace = one.trace
            row: dict[str, Any] = {
                "arrival": (trace.arrival - start) * _NS,
                "ok": trace.ok,
                "finish_reason": trace.finish_reason,
                "prompt_tokens": trace.prompt_tokens,
                "cached_tokens": trace.cached_tokens,
                "output_tokens": one.output_tokens,
            }
            for metric in metrics:
                values = metric.values(one)
                mean = sum(values) / len(values) if values else math.nan
                row[columns[metric.name]] = mean * _PER_SECOND[metric.unit]
            rows.append(row)
        frame = pd.DataFrame(rows).rename_axis("request")
        frame.attrs["units"] = {"arrival": "s"} | {columns[m.name]: m.unit for m in metrics}
        return frame

    def plot(self) -> go.Figure:
        """A plotly figure: tokens over time, the gaps between tokens, and percentiles."""
        from inferkit import plots

        return plots.summary_figure(self)

    def __repr__(self) -> str:
        title = self.spec.title
        head = f"{title} definitions, {self.completed} requests completed, {self.failed} failed"
        rates = ", ".join(f"{name} {value}" for name, value in self._rates())
        return f"{head}\n{text_table(_COLUMNS, self._rows())}\n{rates}"

    def _repr_html_(self) -> str:
        meanings = "; ".join(f"{m.label} = {m.meaning}" for m in self.spec.metrics)
        method = "linear interpolation" if self.spec.interpolated else "nearest rank"
        caption = f"Latency of {self.completed} requests, {self.failed} failed: {self.spec.title}"
        metrics = table(
            _COLUMNS,
            self._rows(),
            caption=f"{caption} definitions",
            note=f"{meanings}. Percentiles by {method}. Source: {self.spec.source}.",
        )
        names, values = zip(*self._rates())
        return metrics + table(names, [values])

    def _rows(self) -> list[list[object]]:
        frame = self.to_frame()
        labels = {m.name: m.label for m in self.spec.metrics}
        return [
            [labels[name], row["unit"], row["count"], *(_number(row[c]) for c in _COLUMNS[3:])]
            for name, row in frame.iterrows()
        ]

    def _rates(self) -> list[tuple[str, str]]:
        found = [
            ("output tokens/s", _number(self.output_tokens_per_second)),
            ("total tokens/s", _number(self.total_tokens_per_second)),
            ("requests/s", _number(self.requests_per_second)),
            ("duration s", _number(self.duration)),
        ]
        if self.slo is not None:
            limits = ", ".join(f"{key} ≤ {limit:g} s" for key, limit in self.slo.items())
            found.append((f"goodput requests/s ({limits})", _number(self.goodput)))
        if self.good_request_fraction is not None:
            found.append(("good requests", f"{self.good_request_fraction:.1%}"))
        return found


_COLUMNS = ("metric", "unit", "count", "mean", "std", "p50", "p90", "p95", "p99", "max")
_TOTALS = (
    *("duration", "completed", "failed", "total_prompt_tokens", "total_output_tokens"),
    *("output_tokens_per_second", "total_tokens_per_second", "requests_per_second"),
    *("goodput", "good_request_fraction"),
)
_OBJECTIVES = ("ttft", "tpot", "e2e")


def summarize(
    gens: Any, slo: Mapping[str, float] | None = None, definitions: str = "vllm"
) -> LatencySummary:
    """Latency, throughput and goodput of several requests.

    Args:
        gens: Generations or Latency objects, or a single one: anything with ``.latency``.
        slo: Objectives in seconds, by "ttft", "tpot" and "e2e"; they add ``goodput``.
        definitions: Whose definitions: "vllm" (inferkit's own), "aiperf" or "guidellm".

    Raises:
        OptionError: No request, something that has no latency, or an unknown or impossible option.
    """
    if definitions not in DEFINITIONS:
        raise OptionError(
            f"definitions={definitions!r} is not known; choose one of {_listed(DEFINITIONS)}"
        )
    spec = DEFINITIONS[definitions]
    limits = _checked_slo(slo)
    latencies = _latencies(gens)
    done = _done(latencies)
    start, end = spec.window([one.trace for one in latencies], [one.trace for one in done])
    duration = (end - start) * _NS
    goodput, fraction = _goodput(spec, latencies, limits, duration) if limits else (None, None)
    return LatencySummary(
        definitions=definitions,
        latencies=latencies,
        slo=limits,
        metrics={metric.name: spec.distribution(metric, done) for metric in spec.metrics},
        duration=duration,
        goodput=goodput,
        good_request_fraction=fraction,
    )


def _goodput(
    spec: Definitions, latencies: Sequence[Latency], slo: Mapping[str, float], duration: float
) -> tuple[float | None, float | None]:
    good, judged = spec.good(_done(latencies), slo)
    if spec.share is None:
        return _rate(good, duration), None
    failed = [one.trace for one in latencies if not one.trace.ok]
    if spec.share == "errors":
        failed = [trace for trace in failed if trace.finish_reason != "cancelled"]
    attempted = judged + len(failed)
    if not attempted:  # no request could be held against the objectives: not the same as none good
        return None, None
    return _rate(good, duration), good / attempted


def _latencies(gens: Any) -> tuple[Latency, ...]:
    hint = "pass generations (model.generate(...)), their latencies, or a list of these"
    one = isinstance(gens, Latency) or hasattr(gens, "latency")
    if not one and (isinstance(gens, str | Mapping) or not isinstance(gens, Iterable)):
        raise OptionError(f"{type(gens).__name__!r} has no latency to summarize; {hint}")
    found = []
    for index, item in enumerate([gens] if one else gens):
        latency = item if isinstance(item, Latency) else getattr(item, "latency", None)
        if not isinstance(latency, Latency):
            kind = type(item).__name__
            raise OptionError(f"item {index} ({kind!r}) has no latency to summarize; {hint}")
        found.append(latency)
    if not found:
        raise OptionError(f"nothing to summarize: no request was given; {hint}")
    return tuple(found)


def _checked_slo(slo: Mapping[str, float] | None) -> dict[str, float] | None:
    """The objectives as given, None where there are none."""
    if not slo:
        return None
    if not isinstance(slo, Mapping):
        raise OptionError(f'slo={slo!r} is no dict; write it as slo={{"ttft": 0.5}}, in seconds')
    for key, limit in slo.items():
        if key not in _OBJECTIVES:
            raise OptionError(f"slo has an unknown key {key!r}; allowed: {_listed(_OBJECTIVES)}")
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not number or math.isnan(limit) or limit < 0:
            raise OptionError(f"slo[{key!r}]={limit!r} is no time; give seconds, 0 or more")
    return dict(slo)


def _done(latencies: Iterable[Latency]) -> list[Latency]:
    return [one for one in latencies if one.trace.ok]


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _ms(seconds: float | None, unit: str = "ms") -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}{unit}"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
