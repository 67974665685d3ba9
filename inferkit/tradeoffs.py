"""The figure of a comparison: what each choice of settings buys, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inferkit.look import LINES, finish, say

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from inferkit.comparison import Cell, Comparison

_SYMBOLS = {"continuous": "circle", "static": "square", "off": "diamond"}


def tradeoff_figure(comparison: Comparison) -> go.Figure:
    """Latency against throughput on the left; memory against fidelity, or latency, on the right.

    Filled marks are on the Pareto front, hollow ones are beaten. A colour is a mode, a shape a
    batching policy, the number at a mark its batch size. Bars are 95 % intervals.
    """
    from plotly.subplots import make_subplots

    right = "kl" if comparison.fidelity else "tpot_p50"
    titles = ("Throughput against latency", f"{_NAMES[right]} against memory")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.14, subplot_titles=titles)
    front = comparison.front()
    modes = list(dict.fromkeys(cell.quantize for cell in comparison.cells))
    policies = dict.fromkeys(cell.batching for cell in comparison.cells)
    for index, mode in enumerate(modes):
        for policy in policies:
            cells = [c for c in comparison.cells if (c.quantize, c.batching) == (mode, policy)]
            if cells:
                name = mode if len(policies) == 1 else f"{mode}, {policy}"
                look: Any = {"name": name, "colour": LINES[index % len(LINES)], "front": front}
                _add(figure, comparison, cells, "tpot_p50", "tokens_per_second", 1, **look)
                _add(figure, comparison, cells, "memory", right, 2, **look)
    figure.update_xaxes(title_text="TPOT p50, ms (lower is better)", rangemode="tozero", col=1)
    figure.update_yaxes(title_text="tokens/s (higher is better)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="weights and KV cache, MiB", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title_text=_AXES[right], rangemode="tozero", row=1, col=2)
    if not comparison.cells:
        say(figure, "nothing was run", 1, 1)
    title = f"{comparison.model} on {comparison.device}: {comparison.prompts} prompts at once"
    subtitle = f"vLLM definitions · medians of up to {comparison.rounds} interleaved rounds"
    note = "filled: on the Pareto front · number: max_batch · bars: 95 % intervals"
    return finish(figure, title, subtitle, note, height=480)


_NAMES = {"kl": "Fidelity", "tpot_p50": "Latency"}
_AXES = {"kl": "KL from none, nats per token", "tpot_p50": "TPOT p50, ms"}


def _add(
    figure: go.Figure,
    comparison: Comparison,
    cells: Sequence[Cell],
    across: str,
    up: str,
    col: int,
    *,
    name: str,
    colour: str,
    front: Sequence[Cell],
) -> None:
    import plotly.graph_objects as go

    cells = sorted(cells, key=lambda c: c.max_batch)
    symbol = _SYMBOLS.get(cells[0].batching, "circle")
    trace = go.Scatter(
        **_values(comparison, cells, across, "x"),
        **_values(comparison, cells, up, "y"),
        mode="lines+markers+text",
        line={"color": colour, "width": 1, "dash": "dot"},
        marker={
            "color": colour,
            "size": 11,
            "symbol": [symbol if c in front else f"{symbol}-open" for c in cells],
            "line": {"color": colour, "width": 2},
        },
        text=[str(c.max_batch) for c in cells],
        textposition="top center",
        textfont={"size": 11, "color": colour},
        cliponaxis=False,
        name=name,
        legendgroup=name,
        showlegend=col == 1,
        customdata=[[str(c)] for c in cells],
        hovertemplate="%{customdata[0]}<br>%{x:,.4g}, %{y:,.4g}<extra></extra>",
    )
    figure.add_trace(trace, row=1, col=col)


def _values(comparison: Comparison, cells: Sequence[Cell], name: str, axis: str) -> dict[str, Any]:
    """One coordinate of the marks, and how far each may lie to either side."""
    found = [comparison.shown(cell, name) for cell in cells]
    known = [f if not math.isnan(f.low) else None for f in found]
    return {
        axis: [f.value for f in found],
        f"error_{axis}": {
            "type": "data",
            "symmetric": False,
            "array": [f.high - f.value if f else 0 for f in known],
            "arrayminus": [f.value - f.low if f else 0 for f in known],
            "thickness": 1,
            "width": 3,
        },
    }
