"""Whose latency: the metrics of vLLM, AIPerf and GuideLLM, which share names and mean other things.

Each tool's set is one `Definitions` value, with the source that it was read from. All read the same
`inferkit.trace.Trace`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from inferkit.errors import OptionError
from inferkit.html import listed
from inferkit.trace import NS, Latency, Trace

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DEFINITIONS", "PER_SECOND", "Definitions", "Distribution", "Metric"]

Unit = Literal["s", "ms"]
PER_SECOND = {"s": 1.0, "ms": 1e3}
"""How many of each unit a second has."""


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
            raise AttributeError(f"no percentile {name!r}; there are {listed(self.percentiles)}")
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

    @property
    def pooled(self) -> bool:
        """Whether a request contributes several values."""
        return self.values is _itl


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
            f"{listed(m.name for m in self.metrics)}"
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
        return np.array(values) * PER_SECOND[metric.unit], np.array(weights, dtype=np.int64)

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
    return ((latency.trace.end - latency.trace.arrival) * NS,)


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
