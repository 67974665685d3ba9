"""Small HTML tables for notebook output: theme-neutral, no script, no external file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;margin:4px 0"
_CELL = "padding:2px 10px;text-align:{align};border-bottom:1px solid rgba(128,128,128,.35)"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    note: str = "",
) -> str:
    """Return an HTML table; the first column is left-aligned, the others right-aligned.

    Args:
        header: Column titles.
        rows: Cells, shown with ``str`` and escaped.
        caption: A line above the table.
        note: A smaller line below it, for definitions and units.
    """

    def cell(tag: str, value: object, column: int) -> str:
        style = _CELL.format(align="left" if column == 0 else "right")
        return f'<{tag} style="{style}">{escape(str(value))}</{tag}>'

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, c, i) for i, c in enumerate(cells)) + "</tr>"

    head = f'<div style="font-weight:600">{escape(caption)}</div>' if caption else ""
    foot = f'<div style="opacity:.7;font-size:90%">{escape(note)}</div>' if note else ""
    body = "".join(line("td", row) for row in rows)
    return (
        f'<div class="inferkit">{head}<table style="{_TABLE}"><thead>{line("th", header)}</thead>'
        f"<tbody>{body}</tbody></table>{foot}</div>"
    )


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same table as aligned plain text, for terminals and ``repr``."""
    lines = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def format_bytes(count: float, digits: int = 1) -> str:
    """Bytes as people read memory: ``"16.4 GiB"`` from one GiB up, ``"385.0 MiB"`` below it."""
    gib = count / 2**30
    return f"{gib:.{digits}f} GiB" if gib >= 1 else f"{count / 2**20:.{digits}f} MiB"
