"""What is left of a live plot: a plotly figure, and a picture for a notebook without a kernel.

The picture is an SVG that needs no script, which JupyterLab, GitHub, nbviewer and nbconvert show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from inferkit.html import counted, one_line, table, text_table
from inferkit.look import BLUE, LINES, ORANGE, VERMILION, finish

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from inferkit.notebook.feed import Feed

_PAUSE = 0.05  # s without a step, from which on nothing was running
_SPAN = 300.0  # s before the last token that a picture shows, and a figure at first
_BREAK = 1.0  # s without a token, over which no line is drawn...
_GAPS = 4  # ...unless that is less than so many of the median gaps
_PRECISION = 4  # digits after the point of the times that a figure keeps

_DOTS = 2_000  # in the picture
_CORNERS = 1_000  # of each line of it that has steps
_ROWS = 20  # of the table beneath it
_LABELS = 8  # TTFTs that are written out
_WIDTH, _HEIGHT = 860, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 26, 24
_GAP = 30  # between the two panels
_LOWER = 70  # height of the lower one
_INK, _GRID = "#7a7a7a", "rgba(128,128,128,.28)"
_HEADER = ("#", "prompt", "status", "precision", "tokens", "queue ms", "TTFT ms", "TPOT ms")
_NOTE = "TTFT and TPOT as vllm bench serve defines them; queue: arrival to first step"


def figure(feed: Feed, origin: str = "") -> go.Figure:
    """All that the feed has: ITL, TTFT, rolling quantiles and changes of mode; occupancy beneath.

    Times are in s since the view was made. Gaps are in ms, each at the time of its later token.

    Args:
        feed: What to show.
        origin: Where and when it was measured, if not here and now.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    update = feed.peek()
    tokens, firsts = update.tables["tokens"], update.tables["firsts"]
    levels, steps = _broken(update.tables["levels"]), update.tables["steps"]
    made = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28], vertical_spacing=0.06
    )
    dots = {
        "x": _moments(tokens[:, 0]),
        "y": _short(tokens[:, 1]),
        "name": "ITL",
        "customdata": tokens[:, 2].astype(int),
        "marker": {"size": 4, "color": [_colour(number) for number in tokens[:, 2]]},
        "hovertemplate": "request %{customdata}<br>ITL %{y} ms at %{x} s<extra></extra>",
    }
    made.add_trace(go.Scatter(mode="markers", **dots), row=1, col=1)
    marks = {
        "x": _moments(firsts[:, 0]),
        "y": _short(firsts[:, 1]),
        "name": "TTFT",
        "customdata": firsts[:, 2].astype(int),
        "visible": "legendonly" if _dwarfs(firsts, tokens) else True,
        "marker": {"size": 9, "symbol": "diamond", "color": [_colour(n) for n in firsts[:, 2]]},
        "hovertemplate": "request %{customdata}<br>TTFT %{y} ms<extra></extra>",
    }
    made.add_trace(go.Scatter(mode="markers", **marks), row=1, col=1)
    for column, name, colour, dash in ((1, "p50", _INK, "solid"), (2, "p99", VERMILION, "dash")):
        line = {"color": colour, "width": 2, "dash": dash}
        rolling = {"x": _moments(levels[:, 0]), "y": _short(levels[:, column]), "line": line}
        name = f"{name} of the last 10 s"
        made.add_trace(go.Scatter(mode="lines", name=name, **rolling), row=1, col=1)
    times, running, waiting = occupancy(steps)
    for name, values, colour in (("running", running, BLUE), ("waiting", waiting, ORANGE)):
        line = {"color": colour, "width": 2, "shape": "hv"}
        made.add_trace(
            go.Scatter(x=_moments(times), y=values, mode="lines", name=name, line=line),
            row=2,
            col=1,
        )
    for moment, label in update.marks:
        made.add_vline(x=moment, line={"color": _INK, "width": 1, "dash": "dot"}, row="all")
        made.add_annotation(
            x=moment, y=1, yref="y domain", xref="x", text=escape(label), showarrow=False,
            xanchor="left", yanchor="top", row=1, col=1,
        )  # fmt: skip
    made.update_yaxes(title_text="ITL (ms)", rangemode="tozero", row=1, col=1)
    made.update_yaxes(title_text="requests", rangemode="tozero", row=2, col=1)
    made.update_xaxes(title_text="time (s)", row=2, col=1)
    if len(times) and times[-1] - times[0] > _SPAN:
        made.update_xaxes(range=[times[-1] - _SPAN, times[-1]])
    thinned = feed.tables["tokens"].thinned
    note = "older points thinned to the extremes" if thinned else ""
    subtitle = f"{counted(len(update.requests), 'request')} · gap before each token"
    return finish(made, "Latency of each token", subtitle, note, height=520, origin=origin)


def still(feed: Feed, name: str) -> tuple[str, str, str]:
    """The picture as SVG, and the requests as a table in HTML and in text.

    Args:
        feed: What to show.
        name: In the picture's id, by which the live view finds and hides it.
    """
    update = feed.peek()
    rows = [_row(told) for told in update.requests[-_ROWS:]]
    more = len(update.requests) - len(rows)
    note = _NOTE + (f"; {more} earlier requests are not listed" if more else "")
    html, text = f'<div data-inferkit="{name}"></div>', "No request yet."
    if rows:
        html = f'<div data-inferkit="{name}">{table(_HEADER, rows, note=note)}</div>'
        text = f"{text_table(_HEADER, rows)}\n{note}"
    return _svg(update.tables, update.marks, f"inferkit-{name}"), html, text


def occupancy(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times in s, and how many requests ran and waited from each on: zero where there is no step.

    Args:
        steps: Rows of the feed's table.
    """
    if not len(steps):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    begins, ends = steps[:, 0], steps[:, 0] + steps[:, 1] / 1e3
    pauses = np.flatnonzero(begins[1:] - ends[:-1] > _PAUSE) + 1
    zeros = np.zeros(len(pauses) + 1)
    times = np.concatenate([begins, ends[pauses - 1], ends[-1:]])
    order = np.argsort(times, kind="stable")
    running = np.concatenate([steps[:, 4], zeros])[order]
    waiting = np.concatenate([steps[:, 5], zeros])[order]
    return times[order], running, waiting


# -- the picture ----------------------------------------------------------------------------------


class _Panel:
    """One plot of the picture: data to pixels.

    Args:
        x: From where to where, in s.
        top: The most on the y axis, which begins at 0.
        begins: Pixels from the picture's upper edge.
        height: In pixels.
    """

    def __init__(self, x: tuple[float, float], top: float, begins: float, height: float) -> None:
        self.x, self.top, self.begins, self.height = x, top, begins, height

    def across(self, time: float) -> float:
        share = (time - self.x[0]) / (self.x[1] - self.x[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        return self.begins + self.height * (1 - min(value, self.top) / self.top)

    def line(self, times: Iterable[float], values: Iterable[float], stroke: str) -> str:
        points = " ".join(f"{self.across(t):.1f},{self.up(v):.1f}" for t, v in zip(times, values))
        return f'<polyline points="{points}" fill="none" {stroke}/>' if points else ""

    def grid(self, label: str, least: float = 0.0) -> str:
        parts = []
        for value in _ticks(self.top, least=least):
            y = self.up(value)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_GRID}"/>')
            parts.append(_text(_LEFT - 6, y + 4, f"{value:g}", "end"))
        parts.append(_text(_LEFT, self.begins - 5, label))
        return "".join(parts)


def _svg(tables: dict[str, np.ndarray], marks: Sequence[tuple[float, str]], name: str) -> str:
    tokens, firsts, steps = tables["tokens"], tables["firsts"], tables["steps"]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="{name}" width="{_WIDTH}" height="{{height}}" '
        f'viewBox="0 0 {_WIDTH} {{height}}" font-family="sans-serif" font-size="11" fill="{_INK}" '
        'role="img" aria-label="Latency of each token over time">'
    )
    if not len(firsts):
        return head.format(height=30) + _text(8, 20, "inferkit: no token yet") + "</svg>"
    high = max(float(table[-1, 0]) for table in (tokens, firsts, steps) if len(table))
    tables = {name: rows[rows[:, 0] >= high - _SPAN] for name, rows in tables.items()}
    tokens, firsts, steps = tables["tokens"], tables["firsts"], tables["steps"]
    begins = [*steps[:1, 0], *tokens[:1, 0], *(firsts[:1, 0] - firsts[:1, 1] / 1e3)]
    span = (float(min(begins)), max(high, float(min(begins)) + 1e-3))
    upper_height = _HEIGHT - _TOP - _BOTTOM - _GAP - _LOWER
    gaps = _Panel(span, _highest(tokens), _TOP, upper_height)
    times, running, waiting = occupancy(steps)
    most = max(1.0, *running, *waiting) if len(times) else 1.0
    load = _Panel(span, 1.1 * most, _HEIGHT - _BOTTOM - _LOWER, _LOWER)
    parts = [head.format(height=_HEIGHT), gaps.grid("ITL, ms"), load.grid("requests", least=1)]
    parts.append(_time_axis(gaps))
    parts += _dots(gaps, tokens)
    levels = _broken(tables["levels"][_spread(len(tables["levels"]), _DOTS)])
    for part in np.split(levels, np.flatnonzero(np.isnan(levels[:, 1]))):
        drawn = part[~np.isnan(part[:, 1])]
        for column, look in ((1, _INK), (2, f'{VERMILION}" stroke-dasharray="6 3')):
            stroke = f'stroke="{look}" stroke-width="2"'
            parts.append(gaps.line(drawn[:, 0], drawn[:, column], stroke))
    parts += _firsts(gaps, firsts)
    for values, colour in ((running, BLUE), (waiting, ORANGE)):
        parts.append(load.line(*_steps(times, values), f'stroke="{colour}" stroke-width="2"'))
    parts += [
        _mark(gaps, load, moment, label) for moment, label in marks if span[0] <= moment <= span[1]
    ]
    parts += [_legend(), "</svg>"]
    return "".join(parts)


def _broken(levels: np.ndarray) -> np.ndarray:
    """With a row of nothing where no token came for a while, over which no line is drawn."""
    usual = np.maximum(_BREAK, _GAPS * levels[1:, 1] / 1e3)
    pauses = np.flatnonzero(np.diff(levels[:, 0]) > usual) + 1
    nothing = levels[pauses].copy()
    nothing[:, 1:] = np.nan
    return np.insert(levels, pauses, nothing, axis=0)


def _dots(panel: _Panel, tokens: np.ndarray) -> list[str]:
    """One path for each colour, which is a fifth of the size of one element for each dot."""
    shown = tokens[_spread(len(tokens), _DOTS)]
    colours: dict[str, list[str]] = {}
    for moment, gap, number in shown:
        dot = f"M{panel.across(moment):.1f} {panel.up(gap):.1f}h0"
        colours.setdefault(_colour(number), []).append(dot)
    look = 'stroke-width="3.5" stroke-linecap="round" stroke-opacity=".8" fill="none"'
    return [f'<path d="{"".join(d)}" stroke="{colour}" {look}/>' for colour, d in colours.items()]


def _firsts(panel: _Panel, firsts: np.ndarray) -> list[str]:
    parts, free = [], -1.0
    y = panel.begins + panel.height - 7
    for moment, ttft, number in firsts[_spread(len(firsts), 200)]:
        x = panel.across(moment)
        parts.append(f'<path d="M{x:.1f} {y - 5}l5 5l-5 5l-5 -5z" fill="{_colour(number)}"/>')
        if x > free and len(firsts) <= _LABELS * 4:
            text = f"TTFT {ttft:.0f} ms"
            end = "end" if x > _WIDTH - 90 else "start"
            parts.append(_text(x + (-8 if end == "end" else 8), y + 4, text, end))
            free = x + 90
    return parts


def _mark(gaps: _Panel, load: _Panel, moment: float, label: str) -> str:
    x, bottom = gaps.across(moment), load.begins + load.height
    line = f'<path d="M{x:.1f} {gaps.begins}V{bottom}" stroke="{_INK}" stroke-dasharray="4 3"/>'
    return line + _text(x + 4, gaps.begins + 12, label)


def _legend() -> str:
    items = (
        ("ITL of each request", BLUE),
        ("p50", _INK),
        ("p99", VERMILION),
        ("◆ TTFT", BLUE),
        ("running", BLUE),
        ("waiting", ORANGE),
    )
    parts, x = [], float(_WIDTH - _RIGHT)
    for label, colour in reversed(items):
        x -= 6.2 * len(label)
        parts.append(_text(x, 12, label))
        if not label.startswith("◆"):
            parts.append(f'<path d="M{x - 12} 8h9" stroke="{colour}" stroke-width="3"/>')
        x -= 26
    return "".join(parts)


def _time_axis(panel: _Panel) -> str:
    low, high = panel.x
    parts = []
    for tick in _ticks(high - low, 8):
        parts.append(_text(panel.across(low + tick), _HEIGHT - 6, f"{tick:g} s", "middle"))
    return "".join(parts[:-1]) if len(parts) > 1 else "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    shown = escape("".join(filter(str.isprintable, text)))  # XML has no control characters
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'


def _steps(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a line that keeps a value until the next one; those that change nothing go."""
    if not len(times):
        return times, values
    kept = np.flatnonzero(np.diff(values, prepend=np.nan, append=np.nan)[:-1] != 0)
    kept = np.union1d(kept[_spread(len(kept), _CORNERS)], [len(times) - 1])
    x, y = np.repeat(times[kept], 2)[1:], np.repeat(values[kept], 2)[:-1]
    return x, y


def _ticks(top: float, count: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers from 0 to ``top``: steps of 1, 2 or 5 and zeros, and of ``least`` or more."""
    rough = top / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = max(least, next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough))
    return [round(i * step, 10) for i in range(int(top / step) + 1)]


def _highest(tokens: np.ndarray) -> float:
    """Most of the gaps set the scale: one stall must not flatten all else."""
    if not len(tokens):
        return 50.0
    usual = float(np.percentile(tokens[:, 1], 98))
    return max(1.0, 1.15 * min(float(tokens[:, 1].max()), 2 * usual))


def _spread(count: int, limit: int) -> np.ndarray:
    """At most so many indices, evenly over all."""
    return np.arange(count) if count <= limit else np.linspace(0, count - 1, limit).astype(int)


def _dwarfs(firsts: np.ndarray, tokens: np.ndarray) -> bool:
    """Whether a scale that shows TTFT would flatten the gaps."""
    return bool(len(tokens) and len(firsts) and firsts[:, 1].max() > 4 * tokens[:, 1].max())


def _colour(number: float) -> str:
    return LINES[int(number) % len(LINES)]


def _short(values: np.ndarray) -> list[float]:
    """Numbers as a notebook's file should have them: without digits that nobody measured."""
    return [float(f"{value:.6g}") for value in values]


def _moments(times: np.ndarray) -> list[float]:
    """Times in s, to a tenth of a ms however long the view has been there."""
    return [round(float(time), _PRECISION) for time in times]


def _row(told: dict[str, object]) -> tuple[object, ...]:
    times = told.get("ms") or {}
    assert isinstance(times, dict)
    shown = (times.get(name) for name in ("queue", "ttft", "tpot"))
    return (
        told["number"],
        one_line(str(told["prompt"]), 48),
        told["status"],
        told.get("mode", "–"),
        told["tokens"],
        *("–" if value is None else f"{value:.1f}" for value in shown),
    )
