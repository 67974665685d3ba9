"""LivePlot: a model's tokens, drawn in the browser as they come.

The kernel's side of the widget. A thread reads a `Feed` ten times a second and sends what is new,
one message for all: JSON, and a buffer of float64 rows for each table (`feed.COLUMNS`). To the
browser go::

    {type: "update", whole, now, tables: [{name, reset}], marks, requests}    buffers: the rows
    {type: "state", parts}     of the panel, see panel.py
    {type: "beat"}             every other second where nothing else is sent

and from it come ``{type: "hello"}``, which is answered by an update with all that there is;
``{type: "watch"}``, without which nothing is sent after a while; and the panel's ``act``.
"""

from __future__ import annotations

import contextvars
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from inferkit.errors import OptionError
from inferkit.notebook import assets, picture
from inferkit.notebook.feed import COLUMNS, Feed, Update

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from inferkit.generation import Generations
    from inferkit.model import Model

INTERVAL = 0.1
"""Seconds between two messages, at least."""

_BEAT = 2.0  # seconds; the browser misses it after some more
_WATCHED = 30.0  # seconds that somebody who said so is taken to look on
_IDLE = 0.5  # seconds between two looks at a model that does nothing

Bundle = dict[str, Any]


class LivePlot(anywidget.AnyWidget):
    """The gap before each token of a model's requests, TTFT, and how many run, as it happens.

    Show it by ending a cell with it. It costs the model nothing: the engine never waits for it.
    In a saved notebook stays a picture of the last state.

    Args:
        model: What to watch.
    """

    _esm = assets.script("dom.js", "store.js", "plot.js", "entry.js")
    _css = assets.styles()
    _slot = traitlets.Unicode().tag(sync=True)  # where the picture for the saved notebook is

    def __init__(self, model: Model | None = None, **traits: Any) -> None:
        check_model(model)
        super().__init__(_slot=uuid.uuid4().hex[:12], **traits)
        self._wake = threading.Event()
        self._feed = Feed(self._wake)
        self._sending = threading.RLock()
        self._ticker: threading.Thread | None = None
        self._context: contextvars.Context | None = None
        self._ended = threading.Event()
        self._watched_until = 0.0
        self._beat_at = 0.0
        self._greeted = True  # whether the last hello has been answered
        self._was_busy = False
        self._still_of = (0, 0, 0)
        if model is not None:
            self._feed.attach(model)
        self.on_msg(self._receive)
        _answer_on_the_way_it_came(self.comm)

    @property
    def model(self) -> Model | None:
        """The model that is shown."""
        return self._feed.model

    @property
    def generations(self) -> Generations:
        """The results of the run that is shown last, as far as its requests have ended.

        A run begins when a request comes to an idle model, and ends when all have ended.
        """
        from inferkit.generation import Generations

        return Generations(self._feed.generations())

    def plot(self) -> go.Figure:
        """All that the live plot has, as a plotly figure to zoom, style and export."""
        return picture.figure(self._feed)

    def close(self) -> None:
        """Take it out of the browser, and end its thread."""
        self._ended.set()
        self._wake.set()
        self._feed.close()
        _at_cell_ends(self._update_still, False)
        super().close()

    # -- showing --------------------------------------------------------------------------------

    def _ipython_display_(self, **_: Any) -> None:
        """Show the live view, and beneath it, hidden while that lives, what a saved file keeps."""
        self._context = contextvars.copy_context()
        data, metadata = self._repr_mimebundle_() or ({}, {})
        _display(data | self._fallback(), metadata=metadata)
        for slot, bundle in self._still().items():
            _display(bundle, display_id=slot)
        _at_cell_ends(self._update_still)
        self._start()

    def _fallback(self) -> Bundle:
        """What is shown where no widget can be."""
        name = type(self).__name__
        html = f'<div class="inferkit" style="opacity:.75">inferkit {name}: run this cell for a '
        return {"text/html": html + "live view.</div>", "text/plain": f"inferkit {name}"}

    def _still(self) -> dict[str, Bundle]:
        """The pictures of the present state, by their display ids."""
        svg, table, text = picture.still(self._feed, self._slot)
        return {
            f"{self._slot}-picture": {"image/svg+xml": svg, "text/plain": "Latency of each token"},
            f"{self._slot}-requests": {"text/html": table, "text/plain": text},
        }

    def _in_its_cell(self, work: Callable[[], None]) -> None:
        """Do what makes outputs, so that they appear under the cell that shows this."""
        if self._context is None:
            work()
        else:
            self._context.copy().run(work)

    # -- the thread -----------------------------------------------------------------------------

    def _start(self) -> None:
        if self._ticker is None:
            run = (self._context or contextvars.copy_context()).copy().run
            self._ticker = threading.Thread(
                target=run, args=(self._loop,), name="inferkit-live", daemon=True
            )
            self._ticker.start()

    def _loop(self) -> None:
        busy = False
        while not self._ended.is_set():
            self._wake.wait(INTERVAL if busy else _IDLE)
            self._wake.clear()
            began = time.monotonic()
            try:
                busy = self._tick()
            except Exception as error:  # shown, for a log of a thread is read by nobody
                self._failed(error)
            self._ended.wait(max(0.0, began + INTERVAL - time.monotonic()))

    def _tick(self) -> bool:
        """Send what is new; return whether a request is on its way."""
        with self._sending:
            whole = not self._greeted
            self._greeted = True
            if whole:
                self._send_state()
            update = self._feed.snapshot() if whole else self._feed.poll()
            busy = bool(self._feed.live)
            if time.monotonic() < self._watched_until:
                if update or whole or busy or self._was_busy:
                    self._send_update(update, whole)
                elif time.monotonic() >= self._beat_at:
                    self._say({"type": "beat"})
        if self._was_busy and not busy:
            self._run_ended()
        self._was_busy = busy
        return busy

    def _send_update(self, update: Update, whole: bool) -> None:
        names = [name for name in COLUMNS if whole or name in update.tables]
        message = {
            "type": "update",
            "whole": whole,
            "now": self._feed.now(),
            "tables": [{"name": name, "reset": name in update.reset} for name in names],
            "marks": update.marks,
            "requests": update.requests,
        }
        self._say(message, [update.tables[name].tobytes() for name in names])

    def _send_state(self) -> None:
        """Answer a view that knows nothing; a panel has more to tell than the feed."""

    def _say(self, message: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        self._beat_at = time.monotonic() + _BEAT
        self.send(message, buffers)

    def _run_ended(self) -> None:
        """Bring the picture in the saved notebook up to date."""
        if self._context is not None:
            self._in_its_cell(self._update_still)

    def _update_still(self, *_: Any) -> None:
        """Update it where something has happened since the last time.

        Called at the end of a run; and of a cell too, for who executes a notebook without a
        browser (nbclient) takes no outputs between cells.
        """
        happened = (self._feed.count, len(self._feed.live), len(self._feed.marks))
        if happened != self._still_of:
            self._still_of = happened
            for slot, bundle in self._still().items():
                _display(bundle, display_id=slot, update=True)

    def _failed(self, error: BaseException) -> None:
        raise error

    # -- from the browser -----------------------------------------------------------------------

    def _receive(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """Called while cells run, by a thread that other widgets share: takes note, and no more."""
        self._watched_until = time.monotonic() + _WATCHED
        if message.get("type") == "hello":
            self._greeted = False
            self._start()
            self._wake.set()
        elif message.get("type") == "act":
            self._act(message)

    def _act(self, message: dict[str, Any]) -> None:
        """Something was clicked."""


def check_model(model: Any) -> None:
    """Raise OptionError unless it is a model, or None."""
    if model is None:
        return
    from inferkit.model import Model  # not earlier: it imports torch

    if not isinstance(model, Model):
        raise OptionError(
            f"{model!r} is no model: give what ik.load returned, or nothing for the one that was "
            "loaded last."
        )


def _answer_on_the_way_it_came(comm: Any) -> None:
    """Let clicks be handled while a cell runs.

    ipykernel 7.4 sends what a widget is told to the shell that the widget spoke from last, which is
    the main one for a widget that a cell has made: a click would wait for the end of the cell.
    Without that, a message is handled where JupyterLab sent it, to a subshell. The method is
    ipykernel's own affair; where it is not there, nothing needs to be done.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


def _at_cell_ends(work: Callable[..., None], wanted: bool = True) -> None:
    """Call it after each cell that is run, once; or no more."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        return
    with suppress(ValueError):  # it was not registered
        shell.events.unregister("post_run_cell", work)
    if wanted:
        shell.events.register("post_run_cell", work)


def _display(bundle: Bundle, **options: Any) -> None:
    from IPython.display import display

    display(bundle, raw=True, **options)  # type: ignore[no-untyped-call]
