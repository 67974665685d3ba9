"""Bars as they are drawn: tqdm's text in a terminal, and HTML under a notebook's cell.

tqdm's own bars for notebooks are widgets, and a saved notebook would keep them without what they
need to be shown.
"""

from __future__ import annotations

import sys
from html import escape
from typing import Any

from tqdm.std import tqdm

from inferkit.look import BLUE

__all__ = ["CellBar", "drawn", "in_notebook"]

_BAR = "<bar>"  # where the bar is among tqdm's words
_ROW = (
    "display:flex;gap:10px;align-items:center;white-space:nowrap;font-variant-numeric:tabular-nums"
)
_NOTHING = {"text/html": "", "text/plain": ""}


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel; imports nothing, for a kernel has IPython."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


def drawn() -> type[tqdm[Any]]:
    """The class of the bars that people see here."""
    return CellBar if in_notebook() else tqdm


class CellBar(tqdm):
    """A bar under the cell that makes it, in a display of its own.

    Takes what tqdm takes. At its end the display is emptied, unless ``leave=True`` is given: then
    the last numbers stay.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._shown: Any = None
        # To tqdm "gui" is what does not write to a file.
        super().__init__(*args, **{"leave": False, **options, "gui": True})
        if not self.disable and not self.delay:
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the present numbers."""
        from IPython.display import display

        if self._shown is None:
            self._shown = display(self._bundle(), raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(self._bundle(), raw=True)

    def clear(self, nolock: bool = False) -> None:
        """Nothing: what is printed meanwhile stands beneath it."""

    def close(self) -> None:
        """Show the end. Safe to call twice."""
        if getattr(self, "disable", True):
            return
        super().close()
        if self._shown is not None:
            self._shown.update(self._bundle() if self.leave else _NOTHING, raw=True)

    def _bundle(self) -> dict[str, str]:
        facts = self.format_dict
        wanted = (facts["bar_format"] or "{l_bar}{bar}{r_bar}").replace("{bar}", _BAR)
        text = self.format_meter(**{**facts, "bar_format": wanted})
        before, _, after = (part.strip("| ") for part in text.partition(_BAR))
        known = f' value="{self.n}" max="{self.total}"' if self.total else ""
        look = f"flex:0 1 300px;min-width:60px;accent-color:{BLUE}"
        html = (
            f'<div class="inferkit" style="{_ROW}"><span>{escape(before)}</span>'
            f'<progress{known} aria-label="{escape(before)}" style="{look}"></progress>'
            f"<span>{escape(after)}</span></div>"
        )
        return {"text/html": html, "text/plain": f"{before} {after}"}
