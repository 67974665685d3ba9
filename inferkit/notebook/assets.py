"""What a widget brings to the browser, put together from the files in ``static/``.

anywidget takes one module of JavaScript and one style sheet per widget; ours are a few small files
without a build step. uPlot (MIT, see ``uplot.LICENSE``) comes with them, so that no page needs a
network, and is evaluated once per page however many widgets there are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

PLOT = ("look.js", "dom.js", "store.js", "series.js", "drawing.js", "plot.js")
"""What the live plot is made of."""

_STATIC = Path(__file__).parent / "static"
_ONCE = (
    "const uPlot = (globalThis.__inferkit_uPlot ??= (() => {{\n{library}\nreturn uPlot;\n}})());"
)


@cache
def script(*names: str) -> str:
    """A module of uPlot and these files, in their order."""
    library = _ONCE.format(library=_read("uplot.iife.min.js"))
    return "\n".join([library, *map(_read, names)])


@cache
def styles() -> str:
    """The style sheets of uPlot and of the panel."""
    return "\n".join(map(_read, ("uplot.min.css", "panel.css")))


def _read(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")
