"""LivePlot: a model's tokens, drawn in the browser as they come.

The kernel's side of the widget. A thread reads a `Feed` ten times a second and sends what is new,
one message for all: JSON, and a buffer of float64 rows for each table (`feed.COLUMNS`). To the
browser go::

    {type: "update", whole, now, tables: [{name, reset}], marks, requests}    buffers: the rows
    {type: "state", parts}     of the panel, see panel.py
    {type: "beat", now}        every other second where no update is sent
    {type: "output", place, mark}    of what was put under the cell, see `_publish`

and from it come ``{type: "hello"}``, which is answered by an update with all that there is;
``{type: "watch"}``, without which nothing is sent after a while; ``{type: "output", mark}``, which
is answered by that output; and the panel's ``act``.
"""

from __future__ import annotations

import contextvars
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from IPython.core.getipython import get_ipython

from inferkit.errors import OptionError
from inferkit.notebook import assets, picture
from inferkit.notebook.display import Bundle, in_notebook, show
from inferkit.notebook.feed import COLUMNS, Feed, Update

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from inferkit.generation import Generations
    from inferkit.model import Model

INTERVAL = 0.1
"""Seconds between two messages, at least."""

_OUTPUTS = 16  # that a page may still ask for
_BEAT = 2.0  # seconds; the browser misses it after some more
_WATCHED = 30.0  # seconds that somebody who said so is taken to look on
_IDLE = 0.5  # seconds between two looks at a model that does nothing


class LivePlot(anywidget.AnyWidget):
    """The gap before each token of a model's requests, TTFT, and how many run, as it happens.

    Show it by ending a cell with it. It costs the model nothing: the engine never waits for it. It
    hears of requests from when it is first shown, and rests when the cell that shows it is run
    anew. In a saved notebook stays a picture of the last state.

    Args:
        model: What to watch.
    """

    _esm = assets.script(*assets.PLOT, "entry.js")
    _css = assets.styles()
    _slot = traitlets.Unicode().tag(sync=True)  # where the picture for the saved notebook is

    _closed = False
    _origin = ""  # of what is shown, if it is not measured here and now

    def __init__(self, model: Model | None = None, **traits: Any) -> None:
        check_model(model)
        self._wake = threading.Event()
        self._feed = Feed(self._wake)
        self._feed.listen(False)
        self._sending = threading.RLock()
        self._starting = threading.Lock()
        self._ticker: threading.Thread | None = None
        self._context: contextvars.Context | None = None
        self._state: dict[str, Any] = {}
        self._watched_until = 0.0
        self._followed = False  # whether the run was looked at, or one before it in the same cell
        self._cell_runs = False
        self._beat_at = 0.0
        self._behind = True  # whether the views lack something that was read
        self._was_busy = False
        self._counted = 0  # requests of the runs that have been summed up
        self._still_of: tuple[int, ...] = ()
        self._outputs: dict[str, dict[str, Any]] = {}  # what was put under the cell, by its mark
        self._shell: Any = None  # that tells of the ends of cells
        super().__init__(_slot=uuid.uuid4().hex[:12], **traits)
        if model is not None:
            self._feed.attach(model)
        self.on_msg(self._receive)
        for widget in (self, self.layout):  # a page loaded anew asks each for its state
            _answer_on_the_way_it_came(widget.comm)

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
        return picture.figure(self._feed, self._origin)

    def close(self) -> None:
        """Take it out of the browser, and end its thread. Safe to call twice."""
        if not self._closed and "_wake" in vars(self):
            self._closed = True
            self._rest()
            self.layout.close()  # a widget of its own
            super().close()

    # -- showing --------------------------------------------------------------------------------

    def _ipython_display_(self, **_: Any) -> None:
        """Show the live view, and beneath it, hidden while that lives, what a saved file keeps."""
        name = type(self).__name__
        if self._closed:
            print(f"This {name} was closed; ik.{name}() makes another.")
            return
        shell = get_ipython()
        if shell is not None and not in_notebook(shell):
            print(_fallback(name)["text/plain"])
            return
        self._context = contextvars.copy_context()
        _take_the_cell(self)
        data, metadata = self._repr_mimebundle_() or ({}, {})
        show(data | _fallback(name), metadata=metadata)
        self._publish_still(update=False)
        self._start()

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

    def _cell_begins(self, *_: Any) -> None:
        self._cell_runs = True

    def _cell_ended(self, *_: Any) -> None:
        self._cell_runs = False
        self._update_still()

    def _update_still(self) -> None:
        """Bring the picture in the saved notebook up to date, where something has happened.

        Called at the end of a run; and of a cell too, for who executes a notebook without a
        browser (nbclient) takes no outputs between cells.
        """
        happened = (self._feed.count, len(self._feed.live), len(self._feed.marks))
        if happened != self._still_of:
            self._still_of = happened
            self._publish_still(update=True)

    def _publish_still(self, update: bool) -> None:
        for slot, bundle in self._still().items():
            self._publish(partial(show, bundle, display_id=slot, update=update), slot)

    def _publish(self, work: Callable[[], Any], place: str = "") -> None:
        """Do what makes an output, so that it also gets into a page that was loaded again since.

        Jupyter hands an output to the page that ran the cell, and drops what comes for a cell that
        ran before the page was loaded. So the output gets a mark, of which the views are told; the
        JupyterLab extension looks for it, and if it is missing asks for the output and puts it into
        the notebook itself, instead of an earlier one of the same place. What names no place has
        one of its own.
        """
        mark = uuid.uuid4().hex
        place = place or mark

        def note(message: dict[str, Any]) -> dict[str, Any]:
            content = message["content"]
            content["metadata"] = {
                **content["metadata"],
                "inferkit": {"place": place, "mark": mark},
            }
            self._outputs[mark] = {key: content[key] for key in ("data", "metadata")}
            for old in list(self._outputs)[:-_OUTPUTS]:
                del self._outputs[old]
            return message

        publisher: Any = getattr(get_ipython(), "display_pub", None)
        if not hasattr(publisher, "register_hook"):  # no kernel
            work()
            return
        publisher.register_hook(note)  # for this thread alone
        try:
            work()
        finally:
            publisher.unregister_hook(note)
        if self._watched_until:
            self._tell_of_output(mark)

    def _tell_of_output(self, mark: str, whole: bool = False) -> None:
        output = self._outputs[mark]
        told = {"type": "output", **output["metadata"]["inferkit"]}
        self.send(told | {"output": output} if whole else told)

    # -- the thread -----------------------------------------------------------------------------

    def _start(self) -> None:
        """Hear of requests and follow them, if it does not."""
        with self._starting:
            if self._ticker is not None or self._closed:
                return
            self._feed.listen(True)
            self._shell = get_ipython()
            if self._shell is not None:
                self._cell_runs = True  # it may, until one is seen to end
                self._shell.events.register("pre_run_cell", self._cell_begins)
                self._shell.events.register("post_run_cell", self._cell_ended)
            run = (self._context or contextvars.copy_context()).copy().run
            self._ticker = threading.Thread(
                target=run, args=(self._loop,), name="inferkit-live", daemon=True
            )
            self._ticker.start()

    def _rest(self) -> None:
        """Do nothing until it is shown again."""
        with self._starting:
            self._ticker = None
            self._feed.listen(False)
            if self._shell is not None:
                self._shell.events.unregister("pre_run_cell", self._cell_begins)
                self._shell.events.unregister("post_run_cell", self._cell_ended)
                self._shell = None
            self._wake.set()

    def _loop(self) -> None:
        busy = False
        mine = threading.current_thread()
        while self._ticker is mine:
            self._wake.wait(INTERVAL if busy else _IDLE)
            self._wake.clear()
            began = time.monotonic()
            try:
                busy = self._tick()
            except Exception as error:  # shown, for a log of a thread is read by nobody
                self._failed(error)
            time.sleep(max(0.0, began + INTERVAL - time.monotonic()))

    def _tick(self) -> bool:
        """Send what is new; return whether a request is on its way."""
        count = self._feed.count  # before the next line, so that none of them is still on its way
        busy = bool(self._feed.live)
        with self._sending:
            if self._looked_at(busy):
                self._tell(busy)
            elif self._feed.poll():
                self._behind = True
        if not busy and count != self._counted:
            self._counted = count
            self._run_ended()
        self._was_busy = busy
        return busy

    def _looked_at(self, busy: bool) -> bool:
        """Whether to send: not to nobody, but a run that somebody saw begin is told to its end.

        While a cell runs, a frontend without subshells cannot say that it still looks.
        """
        watched = time.monotonic() < self._watched_until
        runs = busy or self._was_busy  # its end has to be told too
        self._followed = watched or (self._followed and (runs or self._cell_runs))
        return watched or (runs and self._followed)

    def _tell(self, busy: bool) -> None:
        if self._behind:
            self.send({"type": "state", "parts": dict(self._state)})
            self._send_update(self._feed.snapshot(), whole=True)
            self._behind = False
            return
        update = self._feed.poll()
        if update or busy or self._was_busy:
            self._behind = True  # until it is sent
            self._send_update(update, whole=False)
            self._behind = False
        elif time.monotonic() >= self._beat_at:
            self._say_now({"type": "beat", "now": self._feed.now()})

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
        self._say_now(message, [update.tables[name].tobytes() for name in names])

    def _put(self, part: str, value: Any) -> None:
        """Tell the views of a part of the state, unless they know."""
        with self._sending:
            if part in self._state and self._state[part] == value:
                return
            self._state[part] = value
            if self._watched_until:
                self.send({"type": "state", "parts": {part: value}})

    def _say_now(self, message: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        """Tell of the present, after which there is no need of a beat for a while."""
        self._beat_at = time.monotonic() + _BEAT
        self.send(message, buffers)

    def _run_ended(self) -> None:
        if self._context is not None:
            self._in_its_cell(self._update_still)

    def _failed(self, error: BaseException) -> None:
        """Show an error where somebody sees it."""
        details = "".join(traceback.format_exception(error))
        text = f"{type(error).__name__}: {error}"
        self._put("failure", {"title": "Unexpected error.", "text": text, "details": details})

    # -- from the browser -----------------------------------------------------------------------

    def _receive(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """Called while cells run, by a thread that other widgets share: takes note, and no more."""
        now = time.monotonic()
        if message.get("type") == "hello" or now >= self._watched_until:
            self._behind = True
        self._watched_until = now + _WATCHED
        if message.get("type") == "act":
            self._act(message)
        elif message.get("type") == "output" and message.get("mark") in self._outputs:
            self._tell_of_output(message["mark"], whole=True)
        elif message.get("type") == "hello":  # what came while no page was there
            outputs = dict(self._outputs)  # which another thread adds to
            latest = {o["metadata"]["inferkit"]["place"]: mark for mark, o in outputs.items()}
            for place, mark in latest.items():
                if place != mark:  # a figure that was removed must not come again
                    self._tell_of_output(mark)
        self._start()
        if self._behind:
            self._wake.set()

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
    the main one for a widget that a cell has made: a click would wait for the end of the cell. And
    one that was made on a tab's subshell would hear nothing once that has ended. Without that, a
    message is handled where JupyterLab sent it, to a subshell. The method is ipykernel's own
    affair; where it is not there, nothing needs to be done.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


_cells: dict[str, weakref.ref[LivePlot]] = {}  # who was shown last by a cell


def _take_the_cell(view: LivePlot) -> None:
    """Let a view rest that this cell showed when it was run before, and no other cell shows."""
    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent() if kernel is not None else {}
    cell = parent.get("metadata", {}).get("cellId")  # JupyterLab's; others send none
    if cell is None:
        return
    former, _cells[cell] = _cells.get(cell), weakref.ref(view)
    other = None if former is None else former()
    if other is not None and other is not view and all(r() is not other for r in _cells.values()):
        other._rest()


def _fallback(name: str) -> Bundle:
    """What is shown where no widget can be."""
    html = f'<div class="inferkit" style="opacity:.75">inferkit {name}: run this cell for a live '
    text = f"inferkit {name}: show it in a notebook, as JupyterLab is one; a terminal can't."
    return {"text/html": html + "view.</div>", "text/plain": text}
