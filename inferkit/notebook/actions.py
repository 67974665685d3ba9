"""What the sidebar of JupyterLab asks of a kernel: `do`, called when a person clicks.

JupyterLab evaluates ``inferkit.notebook.actions.do(action, **arguments)`` as a user expression of a
silent request, on a subshell where the kernel has them, so that it is done while a cell runs. The
answer (`inferkit.lab.schema.Answer`) comes back as JSON; what goes wrong is in it, and raised
nowhere. Numbers and progress do not travel here: they are in the kernel's file (`inferkit.lab`).
"""

from __future__ import annotations

import itertools
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

import inferkit as ik
from inferkit.errors import InferkitError, ModelUnloadedError, OptionError
from inferkit.experiments import player
from inferkit.experiments.recording import latest
from inferkit.html import counted, listed
from inferkit.lab import status
from inferkit.lab.schema import Answer
from inferkit.notebook import recipe
from inferkit.notebook.completion import loaded_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from inferkit.model import Model
    from inferkit.notebook.panel import Panel

__all__ = ["do", "panel", "put_away"]

_numbers = itertools.count(1)
_cancelled: dict[int, threading.Event] = {}  # by the number of what is being done
_panels: dict[str, Panel] = {}  # of tabs, by the name of the model
_put_away: set[str] = set()  # those whose tab was closed
_panels_lock = threading.Lock()


class Told:
    """An answer, as a frontend is sent it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def _repr_json_(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self.answer)
        return found

    def __repr__(self) -> str:
        return self.answer.text


def do(action: str, /, **arguments: Any) -> Told:
    """Do what was clicked, and tell how it went.

    Args:
        action: One of `inferkit.lab.status.ACTIONS`, but for "panel".
        arguments: ``model``, the name of a loaded one, for those that concern one, and for
            ``stop``, which without it concerns all; ``load``: any keyword of `inferkit.load`;
            ``quantize``: ``mode``; ``batching``: any keyword of `inferkit.Model.configure`;
            ``cancel``: ``work``, the id of a `Work`; ``share``: ``end``, whether to end a
            recording that runs.
    """
    answer = _answer(action, arguments)
    _close_what_is_over()
    found = status.here()
    if found is not None:
        found.write()  # for it is looked at as soon as the answer is there
    return Told(answer)


def _answer(action: str, arguments: dict[str, Any]) -> Answer:
    work = _ACTIONS.get(action)
    try:
        if work is None:
            raise OptionError(f"inferkit {ik.__version__} cannot {action!r}: {listed(_ACTIONS)}.")
        return work(**arguments)
    except KeyboardInterrupt:
        return Answer(ok=False, text="Cancelled.", kind="KeyboardInterrupt")
    except Exception as error:  # a person clicked, and must hear of it
        text, details = _why(error)
        return Answer(ok=False, text=text, kind=type(error).__name__, details=details)


def _why(error: Exception) -> tuple[str, str]:
    """What an error says; and where it was raised, unless it was written for whoever reads it."""
    if isinstance(error, InferkitError):
        return str(error), ""
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))


def panel(model: str) -> Panel:
    """The panel that JupyterLab shows in a tab: the same each time it is asked for.

    Args:
        model: The name of a loaded one; "" for whatever is loaded, now or later.

    Raises:
        ModelUnloadedError: There is none of this name.
    """
    named = _model(model) if model else None
    with _panels_lock:
        _put_away.discard(model)
        shown = _panels.get(model)
        if shown is None or shown._closed:
            shown = _panels[model] = ik.Panel(named)
    if named is not None and shown.model is not named:
        shown._attach(named)  # it had been unloaded, and the panel has gone on to another
    return shown


def put_away(model: str) -> None:
    """Have a panel, whose tab was closed, rest until it is shown again, with all it has shown."""
    with _panels_lock:
        shown = _panels.get(model)
        if shown is not None:
            _put_away.add(model)
            shown._rest()
    _close_what_is_over()


def _close_what_is_over() -> None:
    """Close the panels that no tab shows or could show again, for their model is gone.

    Not one that is at work: another page's tab shows it.
    """
    there = {"", *(model.name for model in ik.models())} if _put_away else set()
    with _panels_lock:
        over = [n for n in _put_away - there if _panels[n]._ticker is None]
        _put_away.difference_update(over)
        closed = [_panels.pop(name) for name in over]
    for shown in closed:
        shown.close()


def _load(ref: str, **options: Any) -> Answer:
    with _working(f"Loading {ref}") as tell:
        model = ik.load(ref, progress=tell, **options)
    return Answer(
        ok=True, text=f"Loaded {model.name!r} on {', '.join(model.devices)}.", code=_code(model)
    )


def _unload(model: str) -> Answer:
    _model(model).unload()
    return Answer(ok=True, text=f"Unloaded {model!r}.")


def _quantize(model: str, mode: str) -> Answer:
    found = _model(model)
    with _working(f"Changing {model} to {mode}") as tell:
        found.quantize(mode, progress=tell)
    return Answer(ok=True, text=f"{model!r} is now in {found.plan.format}.")


def _batching(model: str, **options: Any) -> Answer:
    found = _model(model)
    what = f"Changing the batching of {model}"
    running = found._engine.running
    if running:  # a new number of rows waits for them, and cannot be called back
        what += f", which may wait for {counted(running, 'request')}"
    with _status().working(what):
        found.configure(**options)
    return Answer(
        ok=True, text=f"{model!r}: {found.batching} batching of at most {found.max_batch}."
    )


def _stop(model: str | None = None) -> Answer:
    stopped = loaded_models() if model is None else [_model(model)]
    requests = [request for each in stopped for request in each._engine.requests]
    for request in requests:
        request.cancel()
    if not requests:
        return Answer(ok=True, text="Nothing is running.")
    count = counted(len(requests), "request")
    whose = "" if model is None else f" of {model!r}"
    return Answer(ok=True, text=f"Stopped {count}{whose}; what they have is kept.")


def _cancel(work: int) -> Answer:
    cancelled = _cancelled.get(work)
    if cancelled is None:
        raise OptionError("It has ended already.")
    cancelled.set()
    return Answer(ok=True, text="Cancelling.")


def _give_code(model: str) -> Answer:
    return Answer(ok=True, text=f"A cell that loads {model!r} as it is.", code=_code(_model(model)))


def _share(end: bool = False) -> Answer:
    recording = latest()
    if recording is None:
        raise OptionError(
            "Nothing was recorded in this kernel. Run what is to be shared within "
            "`with ik.record('name'):`, or after %infer record 'name'."
        )
    running = recording.running
    if running and not end:
        asked = f"{recording.experiment.name!r} is still being recorded. End it?"
        return Answer(ok=False, text=asked, kind="StillRecording")
    experiment = recording.stop()  # the file is whole only then
    done = "Ended the recording and saved" if running else "Saved"
    text = f"{done} {experiment.name!r} to {experiment.path}."
    if not recording.written:
        raise OptionError(
            f"{experiment.name!r} is not in {experiment.path}, which could not be written or was "
            "removed: exp.save(path) writes it, exp being what ik.record gave."
        )
    try:
        plays = player.beside(experiment)
        if plays is not None:
            text += f" {plays.name} plays it where it cannot be run again."
        link = ik.binder_link(experiment=experiment)
    except Exception as error:  # it is saved all the same
        why, details = _why(error)
        notes = [f"There is no link to it: {why}"]
        return Answer(ok=True, text=text, notes=notes, details=details)
    return Answer(ok=True, text=text, link=link.url, notes=list(link.warnings))


_ACTIONS: dict[str, Callable[..., Answer]] = {
    "batching": _batching,
    "cancel": _cancel,
    "code": _give_code,
    "load": _load,
    "quantize": _quantize,
    "share": _share,
    "stop": _stop,
    "unload": _unload,
}


@contextmanager
def _working(what: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show that it is being done, and how far it is; `_cancel` ends it."""
    number, cancelled = next(_numbers), threading.Event()
    _cancelled[number] = cancelled
    try:
        with _status().working(what, number) as show:

            def tell(step: str, done: int, total: int | None) -> None:
                if cancelled.is_set():
                    raise KeyboardInterrupt
                show(step, done, total)

            yield tell
    finally:
        del _cancelled[number]


def _status() -> status.Status:
    found = status.here()
    if found is None:
        raise OptionError("This process is no Jupyter kernel.")
    found.start()
    return found


def _model(name: str) -> Model:
    loaded = {model.name: model for model in loaded_models()}
    if name not in loaded:
        there = f"these are: {listed(loaded)}" if loaded else "none is"
        raise ModelUnloadedError(f"No model {name!r} is loaded in this kernel; {there}.")
    return loaded[name]


def _code(model: Model) -> str:
    return recipe.code(model, None)
