"""The look that all figures share: colours, layout, and what an empty panel says.

Backgrounds are transparent and text is mid-grey, so that a figure reads on JupyterLab's light and
dark theme; the colours are those of Okabe and Ito that stand out on both, told apart by
colour-blind readers too.
"""

from __future__ import annotations

from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito, https://jfly.uni-koeln.de/color/, without its black and yellow: either vanishes on
# one of the two themes.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
SKY, VERMILION, PURPLE = "#56B4E9", "#D55E00", "#CC79A7"
LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
LINE = 21
"""Pixels that a line under the title takes."""
_LONGEST = 88  # characters of such a line, of which 360 pixels have room for 54
INSIDE = {"xref": "x domain", "yref": "y domain", "showarrow": False}


def say(figure: go.Figure, text: str, row: int, col: int) -> None:
    """An empty panel says why it is empty; plotly draws none without a trace."""
    import plotly.graph_objects as go

    figure.add_trace(go.Scatter(x=[None], y=[None], showlegend=False), row=row, col=col)
    figure.add_annotation(text=text, **INSIDE, x=0.5, y=0.5, row=row, col=col)
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, row=row, col=col)
    figure.update_yaxes(showticklabels=False, showgrid=False, zeroline=False, row=row, col=col)


def wrapped(origin: str) -> str:
    """Where and when something was measured, in lines of which a narrow figure cuts the ends."""
    return "<br>".join(escape(line, quote=False) for line in wrap(origin, _LONGEST))


def finish(
    figure: go.Figure, title: str, subtitle: str, note: str, height: int, origin: str = ""
) -> go.Figure:
    """The look that all figures share.

    Args:
        figure: What to give it to.
        title: Its first line, in bold.
        subtitle: What it shows, in a line that a narrow figure cuts.
        note: The end of that line.
        height: In pixels, with that one line.
        origin: Where and when it was measured, if not here and now: first, so that it is not cut.
    """
    ink, grid = "#7a7a7a", "rgba(128,128,128,.22)"
    small = " · ".join(part for part in (subtitle, note) if part)
    if origin:
        small = f"{wrapped(origin)}<br>{small}"
    more = LINE * small.count("<br>")
    height += more
    has_legend = any(trace.showlegend is not False for trace in figure.data)
    figure.update_layout(
        title={
            "text": f"<b>{title}</b><br><span style='font-size:12px'>{small}</span>",
            "x": 0.01,
            "xanchor": "left",
            "y": 1 - 24 / height,
            "yanchor": "top",
            "font": {"size": 16},
        },
        height=height,
        margin={"l": 64, "r": 24, "t": 96 + more, "b": 104 if has_legend else 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": ink, "size": 12},
        legend={
            "bgcolor": "rgba(0,0,0,0)",
            "orientation": "h",
            "yref": "container",
            "y": 8 / height,
            "yanchor": "bottom",
            "x": 0,
        },
        bargap=0,
        hoverlabel={"font": {"size": 12}},
    )
    figure.update_xaxes(gridcolor=grid, zerolinecolor=grid, linecolor=grid, showline=True)
    figure.update_yaxes(gridcolor=grid, zerolinecolor=grid)
    return figure
