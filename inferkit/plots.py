"""Figures of latency, with plotly: how tokens arrived, how the gaps spread, what the tail is.

Every figure says whose definitions it shows. A line of many points is thinned, and the figure says
so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import cycle, pairwise
from typing import TYPE_CHECKING

from inferkit.look import BLUE, GREEN, INSIDE, LINES, ORANGE, PURPLE, SKY, VERMILION, finish, say

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

    from inferkit.definitions import Metric
    from inferkit.latency import LatencySummary
    from inferkit.trace import Latency

__all__ = ["itl_distribution", "percentiles", "request_figure", "summary_figure"]
__all__ += ["thin", "thin_to_extremes", "tokens_over_time"]

_QUANTILES = {"p50": GREEN, "p90": ORANGE, "p95": PURPLE, "p99": VERMILION}
_SYMBOLS = {"p50": "circle", "p90": "diamond", "p95": "square", "p99": "triangle-right"}

_POINTS_A_LINE = 5_000
_POINTS_A_FIGURE = 20_000
_NAMED_REQUESTS = 6


def tokens_over_time(latencies: Iterable[Latency]) -> go.Figure:
    """Cumulative output tokens of each request, in seconds since the first arrival.

    One line per request that produced a token; a dot marks its first token, so that the distance
    to where the line leaves zero (its arrival) is the TTFT.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots()
    note = _add_tokens_over_time(figure, list(latencies))
    return finish(figure, "Tokens over time", "vLLM definitions", note, height=420)


def itl_distribution(latencies: Iterable[Latency]) -> go.Figure:
    """Histogram of the gaps between tokens of all requests, in ms, with p50, p90 and p99.

    The line is the share of gaps that are no longer than that. Failed requests do not count.
    """
    import numpy as np
    from plotly.subplots import make_subplots

    gaps = np.array([gap for one in latencies if one.trace.ok for gap in one.itl]) * 1e3
    marks = dict(zip(("p50", "p90", "p99"), np.percentile(gaps, (50, 90, 99)))) if len(gaps) else {}
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    _add_distribution(figure, gaps, np.ones(len(gaps)), marks, "ITL (ms)", "gaps")
    subtitle = f"vLLM definitions: {len(gaps):,} gaps between successive tokens, requests pooled"
    return finish(figure, "Inter-token latency", subtitle, "", height=420)


def percentiles(summary: LatencySummary) -> go.Figure:
    """p50, p90, p95 and p99 of each latency metric, in ms on a logarithmic axis."""
    from plotly.subplots import make_subplots

    figure = make_subplots()
    _add_percentiles(figure, summary)
    title, origin = "Latency percentiles", summary.origin
    return finish(figure, title, _named(summary), "", height=390, origin=origin)


def request_figure(latency: Latency) -> go.Figure:
    """One request: its tokens over time with queue and prefill, and the gap before each token."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.14,
        subplot_titles=("Tokens over time", "Gap before each token"),
    )
    note = _add_timeline(figure, latency)
    note = _add_gaps(figure, latency) or note
    parts = [
        f"{name} {1e3 * value:,.1f} ms"
        for name, value in (("TTFT", latency.ttft), ("TPOT", latency.tpot), ("E2E", latency.e2e))
        if value is not None
    ]
    title = f"Latency of one request, {latency.output_tokens:,} tokens"
    subtitle = " · ".join(["vLLM definitions", *parts])
    return finish(figure, title, subtitle, note, height=440, origin=latency.origin)


def summary_figure(summary: LatencySummary) -> go.Figure:
    """Tokens over time above; the gaps between tokens and the percentiles below."""
    import numpy as np
    from plotly.subplots import make_subplots

    spec = summary.spec
    metric = spec.metric(spec.gap_metric)
    name = _spelled(summary, metric)
    values, weights = spec.sample(metric, summary.done)
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{"secondary_y": True}, {}]],
        vertical_spacing=0.2,
        horizontal_spacing=0.24,
        subplot_titles=("Tokens over time", f"{name} distribution", "Percentiles"),
    )
    note = _add_tokens_over_time(figure, summary.latencies)
    found, scale = summary[metric.name].percentiles, _to_ms(metric)
    marks = {p: cut * scale for p in ("p50", "p90", "p99") if (cut := found[p]) is not None}
    counted = "tokens" if np.any(weights != 1) else "gaps"
    _add_distribution(figure, values * scale, weights, marks, f"{name} (ms)", counted, row=2)
    _add_percentiles(figure, summary, row=2, col=2)
    title = f"{summary.completed:,} request{'s' if summary.completed != 1 else ''}"
    if summary.failed:
        title += f", {summary.failed:,} failed"
    return finish(figure, title, _named(summary), note, height=780, origin=summary.origin)


def _named(summary: LatencySummary) -> str:
    """Whose definitions, how percentiles are taken, and the throughput under them."""
    spec = summary.spec
    parts = [
        f"{spec.title} definitions",
        f"percentiles by {'linear interpolation' if spec.interpolated else 'nearest rank'}",
    ]
    if summary.output_tokens_per_second is not None:
        parts.append(f"{summary.output_tokens_per_second:,.1f} output tokens/s")
    return " · ".join(parts)


def _spelled(summary: LatencySummary, metric: Metric) -> str:
    """The metric as people of that tool know it: vLLM's by their short form, others as in files."""
    return metric.label if summary.definitions == "vllm" else metric.name


def _to_ms(metric: Metric) -> float:
    return 1e3 if metric.unit == "s" else 1.0


def thin(count: int, limit: int) -> Sequence[int]:
    """At most ``limit`` evenly spaced indices, the first and the last among them."""
    if count <= limit:
        return range(count)
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def thin_to_extremes(values: Sequence[float], limit: int) -> Sequence[int]:
    """Indices of the smallest and largest value of each stretch: a stall is never thinned away."""
    if len(values) <= limit:
        return range(len(values))
    stretches = limit // 2
    edges = [i * len(values) // stretches for i in range(stretches + 1)]
    kept: set[int] = set()
    for start, end in pairwise(edges):
        stretch = range(start, end)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def _add_tokens_over_time(figure: go.Figure, latencies: Sequence[Latency]) -> str:
    import plotly.graph_objects as go

    ran = [(index, one) for index, one in enumerate(latencies) if one.trace.tokens]
    start = min((one.trace.arrival for one in latencies), default=0)
    limit = max(2, min(_POINTS_A_LINE, _POINTS_A_FIGURE // max(1, len(ran))))
    named = len(ran) <= _NAMED_REQUESTS
    firsts = []
    for (index, one), colour in zip(ran, cycle(LINES)):
        tokens = one.trace.tokens
        at = thin(len(tokens), limit)
        seconds = [(one.trace.arrival - start) * 1e-9, *((tokens[i] - start) * 1e-9 for i in at)]
        line = go.Scatter(
            x=seconds,
            y=[0, *(i + 1 for i in at)],
            name=f"request {index}",
            mode="lines",
            line={"color": colour, "width": 2 if named else 1.3, "shape": "hv"},
            opacity=1 if named else 0.75,
            showlegend=named,
            hovertemplate=f"request {index}<br>%{{x:.3f}} s, %{{y}} tokens<extra></extra>",
        )
        figure.add_trace(line, row=1, col=1)
        firsts.append(((tokens[0] - start) * 1e-9, index, 1e3 * (one.ttft or 0.0), colour))
    if firsts:
        x, indices, ttft, colours = zip(*firsts)
        first = go.Scatter(
            x=x,
            y=[1] * len(x),
            name="first token (TTFT)",
            mode="markers",
            marker={
                "color": colours if named else BLUE,
                "size": 9,
                "line": {"color": "white", "width": 1},
            },
            customdata=list(zip(indices, ttft)),
            hovertemplate="request %{customdata[0]}<br>TTFT %{customdata[1]:.1f} ms<extra></extra>",
        )
        figure.add_trace(first, row=1, col=1)
    figure.update_xaxes(title_text="time since first arrival (s)", row=1, col=1)
    figure.update_yaxes(title_text="output tokens", rangemode="tozero", row=1, col=1)
    longest = max((len(one.trace.tokens) for _, one in ran), default=0)
    return f"lines thinned to {limit:,} points each" if longest > limit else ""


def _add_distribution(
    figure: go.Figure,
    values: np.ndarray,
    weights: np.ndarray,
    marks: dict[str, float],
    label: str,
    counted: str,
    row: int = 1,
) -> None:
    """Bars counted here, not in the browser: twenty thousand values travel as sixty numbers."""
    import numpy as np
    import plotly.graph_objects as go

    figure.update_xaxes(title_text=label, row=row, col=1)
    figure.update_yaxes(title_text=counted, row=row, col=1, secondary_y=False)
    if not len(values):
        say(figure, "no gap: no request has two tokens", row, 1)
        return
    counts, edges = np.histogram(values, bins=_bins(values), weights=weights)
    bars = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges),
        customdata=np.stack([edges[:-1], edges[1:]], axis=1),
        marker={"color": SKY, "line": {"width": 0}},
        opacity=0.75,
        name=label,
        showlegend=False,
        hovertemplate="%{customdata[0]:.2f} to %{customdata[1]:.2f} ms: %{y}<extra></extra>",
    )
    figure.add_trace(bars, row=row, col=1, secondary_y=False)
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    at = list(thin(len(values), 500))
    curve = go.Scatter(
        x=values[order][at],
        y=100 * share[at],
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        name="share no longer than",
        showlegend=False,
        hovertemplate="%{y:.1f} % take at most %{x:.2f} ms<extra></extra>",
    )
    figure.add_trace(curve, row=row, col=1, secondary_y=True)
    figure.update_yaxes(
        title_text="share no longer (%)",
        range=[0, 104],
        tickvals=[0, 25, 50, 75, 100],
        title_standoff=4,
        showgrid=False,
        row=row,
        col=1,
        secondary_y=True,
    )
    for name, value in marks.items():
        line = {"color": _QUANTILES[name], "width": 1.6, "dash": "dash"}
        figure.add_vline(x=value, line=line, row=row, col=1)
    lines = (
        f"<span style='color:{_QUANTILES[name]}'>{name}  {value:,.2f} ms</span>"
        for name, value in marks.items()
    )
    figure.add_annotation(
        text="<br>".join(lines),
        **INSIDE,
        x=_widest_space(edges, marks.values()),
        y=0.8,
        xanchor="center",
        yanchor="top",
        align="right",
        bgcolor="rgba(128,128,128,.12)",
        borderpad=4,
        row=row,
        col=1,
    )


def _widest_space(edges: np.ndarray, lines: Iterable[float]) -> float:
    """Where between the lines a label fits best, as a fraction of the axis."""
    low, high = edges[0], edges[-1]
    left, right = max(pairwise([low, *sorted(lines), high]), key=lambda pair: pair[1] - pair[0])
    return float(((left + right) / 2 - low) / (high - low))


def _bins(values: np.ndarray) -> np.ndarray:
    """Sixty bins up to the longest value; at least a microsecond wide where all are alike."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    margin = max(0.0, 0.06 - (high - low)) / 2
    return np.linspace(low - margin, high + margin, 61)


def _add_percentiles(
    figure: go.Figure, summary: LatencySummary, row: int = 1, col: int = 1
) -> None:
    import plotly.graph_objects as go

    # A logarithmic axis has no place for 0, which only a queue that nobody waited in reaches.
    points: dict[str, dict[str, float]] = {}
    for metric in summary.spec.metrics:
        if metric.name == "queue":
            continue
        found = summary[metric.name].percentiles
        scale = _to_ms(metric)
        ms = {p: cut * scale for p in _QUANTILES if (cut := found[p])}
        if ms:
            points[_spelled(summary, metric)] = ms
    for name, ms in points.items():
        bar = go.Scatter(
            x=[min(ms.values()), max(ms.values())],
            y=[name, name],
            mode="lines",
            line={"color": "rgba(128,128,128,.45)", "width": 5},
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_trace(bar, row=row, col=col)
    for quantile, colour in _QUANTILES.items():
        names = [name for name, ms in points.items() if quantile in ms]
        values = [points[name][quantile] for name in names]
        dots = go.Scatter(
            x=values,
            y=names,
            mode="markers+text" if quantile in ("p50", "p99") else "markers",
            text=[f"{value:,.1f}" for value in values],
            textposition="bottom center" if quantile == "p50" else "top center",
            textfont={"size": 11, "color": colour},
            marker={"color": colour, "size": 11, "symbol": _SYMBOLS[quantile]},
            cliponaxis=False,
            name=quantile,
            hovertemplate=f"%{{y}} {quantile}: %{{x:,.2f}} ms<extra></extra>",
        )
        figure.add_trace(dots, row=row, col=col)
    figure.update_xaxes(title_text="ms (log scale)", type="log", row=row, col=col)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=list(reversed(points)),
        range=[-0.6, max(1, len(points)) - 0.4],
        row=row,
        col=col,
    )
    if not points:
        say(figure, "no request has a latency", row, col)
        return
    ticks = _log_ticks([value for ms in points.values() for value in ms.values()])
    ends = [math.log10(0.7 * ticks[0]), math.log10(1.6 * ticks[-1])]
    text = [f"{tick:g}" for tick in ticks]
    figure.update_xaxes(tickvals=ticks, ticktext=text, range=ends, row=row, col=col)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values: 1, 2, 5 of each decade; fewer where there are many."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    decades = high - low
    steps = (1, 2, 5) if decades <= 2 else (1, 3) if decades == 3 else (1,)
    ticks = [step * 10.0**decade for decade in range(low, high + 1) for step in steps]
    first = max((i for i, tick in enumerate(ticks) if tick <= min(values)), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= max(values)), default=len(ticks) - 1)
    return ticks[first : last + 1]


def _add_timeline(figure: go.Figure, latency: Latency) -> str:
    import plotly.graph_objects as go

    trace = latency.trace
    figure.update_yaxes(title_text="output tokens", rangemode="tozero", row=1, col=1)
    if not trace.tokens:
        say(figure, "no token was generated", 1, 1)
        return ""
    unit, per_ns = ("ms", 1e-6) if trace.tokens[-1] - trace.arrival < 10**10 else ("s", 1e-9)
    figure.update_xaxes(title_text=f"time since arrival ({unit})", row=1, col=1)
    at = thin(len(trace.tokens), _POINTS_A_LINE)
    line = go.Scatter(
        x=[0.0, *((trace.tokens[i] - trace.arrival) * per_ns for i in at)],
        y=[0, *(i + 1 for i in at)],
        mode="lines",
        line={"color": BLUE, "width": 2.5, "shape": "hv"},
        showlegend=False,
        hovertemplate=f"%{{x:,.4g}} {unit}, %{{y}} tokens<extra></extra>",
    )
    figure.add_trace(line, row=1, col=1)
    scheduled = trace.arrival if trace.scheduled is None else trace.scheduled
    spans = (
        ("queue", trace.arrival, scheduled, ORANGE),
        ("prefill", scheduled, trace.tokens[0], GREEN),
    )
    for name, start, end, colour in spans:
        x0, x1 = (start - trace.arrival) * per_ns, (end - trace.arrival) * per_ns
        span = {"fillcolor": colour, "opacity": 0.2, "line_width": 0}
        figure.add_vrect(x0=x0, x1=x1, **span, row=1, col=1)
        swatch = go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"color": colour, "symbol": "square", "size": 11, "opacity": 0.5},
            name=f"{name} {(end - start) * 1e-6:,.1f} ms",
        )
        figure.add_trace(swatch, row=1, col=1)
    ttft = f"TTFT {(trace.tokens[0] - trace.arrival) * 1e-6:,.1f} ms"
    first = go.Scatter(
        x=[(trace.tokens[0] - trace.arrival) * per_ns],
        y=[1],
        mode="markers",
        marker={"color": VERMILION, "size": 10},
        name=f"first token: {ttft}",
        hovertemplate=f"{ttft}<extra></extra>",
    )
    figure.add_trace(first, row=1, col=1)
    return _thinned(len(trace.tokens))


def _add_gaps(figure: go.Figure, latency: Latency) -> str:
    import plotly.graph_objects as go

    gaps = [1e3 * gap for gap in latency.itl]
    unit = "token" if latency.trace.chunks is None else "chunk"
    figure.update_xaxes(title_text=unit, row=1, col=2)
    figure.update_yaxes(title_text="ITL (ms)", rangemode="tozero", row=1, col=2)
    if not gaps or latency.tpot is None:
        unknown = latency.trace.tokens and not latency.trace.output
        few = f"no gap: fewer than two {unit}s"
        say(figure, "no gap: times are not known" if unknown else few, 1, 2)
        return ""
    at = thin_to_extremes(gaps, _POINTS_A_LINE)
    line = go.Scatter(
        x=[i + 2 for i in at],  # the first gap is the one before the second
        y=[gaps[i] for i in at],
        mode="lines+markers" if len(gaps) <= 200 else "lines",
        line={"color": BLUE, "width": 1.2},
        marker={"size": 5},
        showlegend=False,
        hovertemplate=f"{unit} %{{x}}: %{{y:.2f}} ms<extra></extra>",
    )
    figure.add_trace(line, row=1, col=2)
    tpot = 1e3 * latency.tpot
    mean = go.Scatter(
        x=[2, len(gaps) + 1],
        y=[tpot, tpot],
        mode="lines",
        line={"color": PURPLE, "width": 2, "dash": "dash"},
        name=f"TPOT {tpot:,.1f} ms",
        hovertemplate="TPOT %{y:.2f} ms<extra></extra>",
    )
    figure.add_trace(mean, row=1, col=2)
    return _thinned(len(gaps))


def _thinned(count: int) -> str:
    return (
        f"lines thinned to {_POINTS_A_LINE:,} of {count:,} points" if count > _POINTS_A_LINE else ""
    )
