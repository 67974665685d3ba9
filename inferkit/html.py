"""How results are shown: small tables, in theme-neutral HTML and in text; numbers and names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;margin:4px 0"
_CELL = "padding:2px 10px;text-align:{align};border-bottom:1px solid rgba(128,128,128,.35)"
_WRAPS_FROM = 40  # characters; a shorter cell stays on one line


def counted(number: int, noun: str) -> str:
    """A number of things that more than one of is called by an "s"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    note: str = "",
) -> str:
    """Return an HTML table; columns of numbers are right-aligned, those of words left-aligned.

    Where the page is too narrow for it, it scrolls sideways.

    Args:
        header: Column titles.
        rows: Cells, shown with ``str`` and escaped.
        caption: A line above the table.
        note: A smaller line below it, for definitions and units.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    right = _numbers(len(header), lines)

    def cell(tag: str, text: str, column: int) -> str:
        style = _CELL.format(align="right" if right[column] else "left")
        if tag == "th" or len(text) < _WRAPS_FROM:
            style += ";white-space:nowrap"
        return f'<{tag} style="{style}">{escape(text)}</{tag}>'

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(tag, c, i) for i, c in enumerate(cells)) + "</tr>"

    head = f'<div style="font-weight:600">{escape(caption)}</div>' if caption else ""
    foot = f'<div style="opacity:.7;font-size:90%">{escape(note)}</div>' if note else ""
    body = "".join(line("td", cells) for cells in lines)
    return (
        f'<div class="inferkit">{head}<div style="overflow-x:auto"><table style="{_TABLE}">'
        f"<thead>{line('th', header)}</thead><tbody>{body}</tbody></table></div>{foot}</div>"
    )


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same table as aligned plain text, for terminals and ``repr``."""
    lines = [[str(c) for c in row] for row in rows]
    right = _numbers(len(header), lines)
    lines.insert(0, list(header))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)).rstrip()
        for line in lines
    )


def _numbers(columns: int, lines: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers, units and dashes for missing ones included."""
    return [
        bool(lines)
        and all(line[i].lstrip("-–+")[:1].isdigit() or line[i] in ("-", "–") for line in lines)
        for i in range(columns)
    ]


def format_bytes(count: float, digits: int = 1) -> str:
    """Bytes as people read memory: ``"16.4 GiB"`` from one GiB up, ``"385.0 MiB"`` below it."""
    gib = count / 2**30
    return f"{gib:.{digits}f} GiB" if gib >= 1 else f"{count / 2**20:.{digits}f} MiB"


def format_number(value: float | None) -> str:
    """Three digits or so; "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def one_line(text: str, length: int) -> str:
    """Text on one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def listed(names: Iterable[str]) -> str:
    """Names as messages give them: ``'a', 'b'``."""
    return ", ".join(map(repr, names))
