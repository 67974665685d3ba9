"""An experiment as one HTML page that needs no network: figures, tables, every request.

The page carries plotly's script and forbids itself, by a Content-Security-Policy, to load anything.
What people wrote (names, prompts, outputs) is text in it and nothing else.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferkit.experiments.difference import QUANTITIES, Difference, Table
from inferkit.experiments.experiment import Experiment, generation_of
from inferkit.experiments.file import ModeEntry, RequestEntry
from inferkit.experiments.store import check_free, local_path, write_bytes, writing
from inferkit.html import format_bytes, format_number, one_line
from inferkit.latency import LatencySummary
from inferkit.look import LINE, wrapped
from inferkit.trace import NS

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["itl_over_time", "to_html"]

_POINTS = 20_000  # of the figure of gaps
_REQUESTS = 1_000  # that the table has
_NAMED_CHANGES = 6  # more than these get a number only
_HEAD = 80  # characters of a prompt before it is opened
_NAME = 36  # characters of an experiment's name in a legend
_TITLE = 80  # pixels that a figure's title takes


def to_html(
    exp: Experiment,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    other: Experiment | None = None,
) -> Path:
    """Write an experiment as one HTML page that can be opened anywhere, without a network.

    Args:
        exp: What to show.
        path: Of the page; ``.html`` is usual.
        overwrite: Replace a file that is there.
        other: An experiment to show beside it: `Difference` of ``exp`` and this one.

    Raises:
        OptionError: There is a file already, or no folder for it; ``other`` is no experiment, or
            one of the two has no request that succeeded.
        ExperimentError: It cannot be written.
    """
    target = local_path(path)
    check_free(target, overwrite)
    text = page(exp, other)
    with writing(target, ": give another path."):
        write_bytes(text.encode(errors="replace"), target)  # half a surrogate pair is no text
    return target


def page(exp: Experiment, other: Experiment | None = None) -> str:
    """The text of the page, which outlives the process that measured."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from inferkit import __version__

    exp = exp.as_recorded()
    templates = Environment(
        loader=PackageLoader("inferkit.experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"bytes": format_bytes, "number": format_number, "seconds": _seconds}
    templates.filters["numeric"] = _numeric
    difference = None if other is None else Difference(exp, _recorded(other))
    summary = exp.summary() if exp.generations else None
    return templates.get_template("report.html").render(
        exp=exp,
        file=exp.file,
        summary=summary,
        cards=_cards(exp, summary),
        latency=_latency_rows(summary),
        drawings=_drawings(exp, summary),
        difference=difference,
        contrasts=_contrasts(difference),
        requests=[_shown(exp, i, one) for i, one in enumerate(exp.file.requests[:_REQUESTS])],
        version=__version__,
        # Both come from us: they hold no one's text, and their "<" must stay what it is.
        plotly=Markup(get_plotlyjs()),
        safe_json=_safe_json,
    )


def _recorded(other: Any) -> Any:
    """An experiment as files show it; of anything else `Difference` says that it is none."""
    return other.as_recorded() if isinstance(other, Experiment) else other


# -- numbers and requests -------------------------------------------------------------------------


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds * NS:,.3f}"


def _cards(exp: Experiment, summary: LatencySummary | None) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: what, value, unit."""
    if summary is None:
        return []
    failed = f"{summary.failed} failed" if summary.failed else "all succeeded"
    cards = [("requests", str(summary.completed), failed)]
    for name, quantile in (("ttft", "p50"), ("tpot", "p50"), ("itl", "p99")):
        value = summary[name].percentiles[quantile]
        shown = "-" if value is None else format_number(1e3 * value)
        cards.append((f"{name.upper()} {quantile}", shown, "ms"))
    rate = format_number(summary.output_tokens_per_second)
    return [*cards, ("output", rate, "tokens/s")]


_STATISTICS = ("mean", "std", "p50", "p90", "p95", "p99", "max")


def _latency_rows(summary: LatencySummary | None) -> list[tuple[str, str, list[str]]]:
    """For each metric its name with the unit, its meaning and its statistics."""
    if summary is None:
        return []
    frame = summary.to_frame()
    return [
        (
            f"{metric.label} {metric.shown}",
            metric.meaning,
            [f"{row['count']:,}", *(format_number(row[s]) for s in _STATISTICS)],
        )
        for metric in summary.spec.metrics
        for row in [frame.loc[metric.name]]
    ]


def _numeric(table: Table) -> list[bool]:
    """Which columns of a table hold numbers."""
    return [all(c == "-" or c[:1].isdigit() for c in column) for column in zip(*table.rows)]


@dataclass(frozen=True, slots=True)
class _Request:
    """A row of the table of requests, spelled out; ``head`` is what is seen before it is opened."""

    number: int
    head: str
    prompt: str
    text: str
    error: str
    finish: str
    cells: tuple[str, ...]


def _shown(exp: Experiment, number: int, one: RequestEntry) -> _Request:
    gen = generation_of(one)
    prompt = _prompt(exp, one)
    left_out = exp.redacted and not gen.text and gen.latency.output_tokens > 0
    times = (gen.latency.ttft, gen.latency.tpot, gen.latency.e2e)
    return _Request(
        number=number,
        head=one_line(prompt, _HEAD) or "(blank)",
        prompt=prompt,
        text=f"{gen.latency.output_tokens} tokens, left out" if left_out else gen.text,
        error="" if gen.error is None else f"{type(gen.error).__name__}: {gen.error}",
        finish=gen.finish_reason or "not ended",
        cells=(
            str(gen.latency.output_tokens),
            *(format_number(None if t is None else 1e3 * t) for t in times),
        ),
    )


def _prompt(exp: Experiment, one: RequestEntry) -> str:
    if one.prompt is not None:
        return one.prompt
    why = "left out" if exp.redacted else "given as token ids"
    return f"{one.prompt_tokens} tokens, {why}"


# -- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A plotly figure whose title stands beside it, as text that wraps; plotly's own does not."""

    title: str
    caption: str
    figure: go.Figure
    wide: bool = False

    @property
    def height(self) -> int:
        """Pixels, kept free until it is drawn."""
        return int(self.figure.layout.height)


def _safe_json(figure: go.Figure) -> Any:
    """A figure as JSON within <script>: "</script>" in a prompt must not end it."""
    from markupsafe import Markup

    text = figure.to_json()
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _drawing(figure: go.Figure, origin: str, *, wide: bool = False) -> _Drawing:
    """Take the title that `inferkit.look.finish` gave a figure off it."""
    title, _, small = figure.layout.title.text.partition("</b><br>")
    caption = small.partition(">")[2].removesuffix("</span>")
    taken = _TITLE + LINE * caption.count("<br>")
    caption = f"{caption.removeprefix(f'{wrapped(origin)}<br>')} · {origin}"
    margin, height = figure.layout.margin.t - taken, figure.layout.height - taken
    figure.update_layout(title=None, margin={"t": margin, "l": 58, "r": 14}, height=height)
    return _Drawing(title.removeprefix("<b>"), caption, figure, wide)


def _drawings(exp: Experiment, summary: LatencySummary | None) -> list[_Drawing]:
    """What the summary's figure has, in parts that a narrow page puts below each other."""
    from inferkit import plots

    if summary is None:
        return []
    figures = [
        (plots.tokens_over_time(summary.latencies), True),
        (itl_over_time(exp), True),
        (plots.itl_distribution(summary.latencies), False),
        (plots.percentiles(summary), False),
    ]
    return [_drawing(figure, exp.origin, wide=wide) for figure, wide in figures]


def _contrasts(difference: Difference | None) -> list[_Drawing]:
    """The panels of a difference, each with the caption that the page has once for all of them."""
    if difference is None:
        return []
    origins = f"a = {difference.a.origin} · b = {difference.b.origin}"
    drawings = []
    for name in ("ttft", "tpot", "itl"):
        figure = difference.plot([name])
        for trace, side in zip(figure.data, "ab"):
            short = one_line(f"{side}: {getattr(difference, side).name}", _NAME)
            trace.name = escape(short, quote=False)  # the caption has the origin, which may wrap
        figure.update_layout(height=400, margin={"b": 112})
        drawings.append(replace(_drawing(figure, origins), title=QUANTITIES[name].plain_label))
    return drawings


def itl_over_time(exp: Experiment) -> go.Figure:
    """The gap before each token, when it came, and the moments at which a model changed its mode.

    One colour per model; at most 20,000 points, of which the longest and the shortest gap of each
    stretch of time are kept.
    """
    import plotly.graph_objects as go

    from inferkit.look import LINES, finish, say

    models: dict[int, list[tuple[float, float, int]]] = {}
    for number, one in enumerate(exp.file.requests):
        models.setdefault(one.model, []).extend(_gaps(number, one))
    found = {model: sorted(gaps) for model, gaps in sorted(models.items()) if gaps}
    total = sum(map(len, found.values()))
    figure = go.Figure().set_subplots(1, 1)
    shown = 0
    for (model, gaps), colour in zip(found.items(), LINES * (1 + len(found) // len(LINES))):
        gaps = _thinned(gaps, max(2, _POINTS * len(gaps) // total))
        shown += len(gaps)
        dots = _dots(
            gaps, escape(exp.file.models[model].name, quote=False), colour, legend=len(found) > 1
        )
        figure.add_trace(dots)
    if not found:
        say(figure, "no gap: no request has two tokens whose times are known", 1, 1)
    figure.update_xaxes(title_text="time since the beginning (s)", rangemode="tozero")
    figure.update_yaxes(title_text="ITL (ms)", rangemode="tozero")
    note = f"thinned to {shown:,} of {total:,} gaps" if shown < total else f"{total:,} gaps"
    if any(not generation_of(one).latency.trace.ok for one in exp.file.requests):
        note += ", those of requests that failed among them"
    finish(figure, "Gaps between tokens over time", "vLLM definitions", note, height=440)
    _add_changes(figure, exp, max((gaps[-1][0] for gaps in found.values()), default=0.0))
    return figure


def _gaps(number: int, one: RequestEntry) -> Iterator[tuple[float, float, int]]:
    """For each output of a request but its first: seconds, ms since the one before, the request."""
    latency = generation_of(one).latency
    for time, gap in zip(latency.trace.output[1:], latency.itl):
        yield time * NS, 1e3 * gap, number


def _thinned(gaps: list[tuple[float, float, int]], limit: int) -> list[tuple[float, float, int]]:
    from inferkit.plots import thin_to_extremes

    return [gaps[i] for i in thin_to_extremes([gap for _, gap, _ in gaps], limit)]


def _dots(
    gaps: list[tuple[float, float, int]], name: str, colour: str, *, legend: bool
) -> go.Scattergl:
    import numpy as np
    import plotly.graph_objects as go

    times, sizes, numbers = zip(*gaps)
    return go.Scattergl(
        x=np.round(times, 6),
        y=np.round(sizes, 4),
        customdata=np.asarray(numbers, dtype=np.int32),
        mode="markers",
        marker={"color": colour, "size": 4 if len(gaps) > 500 else 6, "opacity": 0.6},
        name=name,
        showlegend=legend,
        hovertemplate="request %{customdata}<br>%{x:.3f} s: %{y:.2f} ms<extra></extra>",
    )


def _add_changes(figure: go.Figure, exp: Experiment, end: float) -> None:
    """A line where a model began to run as something, with what is new above the panel."""
    changes = list(_changes(exp))
    rows = 3 if len(changes) > 2 else max(1, len(changes))
    for index, (mode, number, words) in enumerate(changes):
        at = mode.time * NS
        figure.add_vline(x=at, line={"color": "rgba(128,128,128,.8)", "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=at,
            yref="paper",
            y=1,
            yshift=2 + 16 * (index % rows),
            yanchor="bottom",
            xanchor="left" if at < 0.6 * end else "right",
            text=f"#{number} {escape(words, quote=False)}"
            if len(changes) <= _NAMED_CHANGES
            else f"#{number}",
            showarrow=False,
            font={"size": 11},
        )
    if changes:
        figure.update_layout(margin={"t": figure.layout.margin.t + 16 * rows})


def _changes(exp: Experiment) -> Iterator[tuple[ModeEntry, int, str]]:
    """The modes of models that change theirs: the mode, its number, and what is new in it."""
    often = Counter(mode.model for mode in exp.file.modes)
    last: dict[int, ModeEntry] = {}
    for number, mode in enumerate(exp.file.modes):
        before = last.get(mode.model)
        last[mode.model] = mode
        new = [
            f"{label}{getattr(mode, name)}"
            for name, label in _TOLD
            if before is not None and getattr(mode, name) != getattr(before, name)
        ]
        if often[mode.model] > 1:
            yield mode, number, ", ".join(new) or mode.format


_TOLD = (
    *(("format", ""), ("batching", ""), ("max_batch", "max_batch ")),
    *(("context", "context "), ("step", ""), ("speculative", "speculation ")),
)
