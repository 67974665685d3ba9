"""Panel: load a model, change its modes, prompt it and watch its latency, all by clicking.

The browser's side is ``static/panel.js``. It is told of state in parts, by name, each replaced as a
whole (`LivePlot._put`): ``form``, ``choices``, ``devices``, ``model``, ``plan``, ``work``,
``errors``, ``failure``, ``summary`` and ``code``. A click comes as ``{type: "act", name, fields}``
and is one of the methods below `_act`; ``fields`` are those of the form that were typed since the
last one (see `form.EMPTY`). The form itself lives here, so that all views show the same.

Clicks are taken while cells run, so they only queue work: what changes a model is done by one
thread in turn, plans by another, prompts by a third, and stopping is done at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from inferkit import progress
from inferkit.errors import (
    DoesNotFitError,
    InferkitError,
    ModelUnloadedError,
    OptionError,
    PromptError,
)
from inferkit.html import counted
from inferkit.notebook import assets, form, recipe
from inferkit.notebook.completion import loaded_models, loaded_names
from inferkit.notebook.facts import model_facts, modes, run_summary
from inferkit.notebook.feed import origin
from inferkit.notebook.form import FormError
from inferkit.notebook.live import LivePlot, check_model
from inferkit.notebook.sending import submit
from inferkit.notebook.worker import Worker

if TYPE_CHECKING:
    from inferkit.model import Model

_LOOK = 1.0  # seconds between two looks at what cells have loaded
_DEVICES = 2.0  # seconds between two looks at the memory
_MODES = ("quantize", "batching", "speculative", "max_batch", "context")
_TYPED = ("max_batch", "context")  # of these
_LOADED_WITH = ("ref", "device", *_MODES)
_AT_ONCE = ("batching", "speculative")  # the others wait for requests that run


class Panel(LivePlot):
    """Load a model, change its modes, prompt it, and watch every token's latency.

    Show it by ending a cell with it. It follows what cells do too: it shows the modes that a cell
    changes and the requests that a cell sends, and where its model is unloaded, the one loaded
    last. Nothing that is clicked holds up the kernel. All views of one panel show the same.

    Args:
        model: The model to begin with; None for the one loaded last, if any.
    """

    _esm = assets.script(*assets.PLOT, "cards.js", "panel.js", "entry.js")

    def __init__(self, model: Model | None = None, **traits: Any) -> None:
        check_model(model)
        self._form = dict(form.EMPTY)
        self._filled: dict[str, Any] = {}  # what the model's modes were when last put into it
        self._errors: dict[str, dict[str, str]] = {"form": {}, "used": {}}
        self._sent: recipe.Sent | None = None
        self._coded: Any = None  # what the code was made of
        self._planned: Any = None
        self._cancel = threading.Event()
        self._stops = 0  # how often all requests were stopped
        self._changes = Worker("inferkit-panel", self._failed)
        self._plans = Worker("inferkit-plan", self._failed)
        self._sends = Worker("inferkit-send", self._failed)
        self._looked = self._looked_at_devices = 0.0
        super().__init__(None, **traits)
        self._put("form", dict(self._form))
        self._attach(model or _loaded_last())

    def close(self) -> None:
        """Take it out of the browser; models stay loaded. Safe to call twice."""
        if "_sends" in vars(self):
            for worker in (self._changes, self._plans, self._sends):
                worker.close()
        super().close()

    # -- state ----------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._ticker is None:
            self._plans.do(_import_all)
            self._plans.do(self._find_choices, "choices")
            self._plans.do(self._plan, "plan")
        super()._start()

    def _failed(self, error: BaseException) -> None:
        """Show an error where somebody sees it; one of ours is a sentence, others have details."""
        if progress.stopped(error):
            return  # somebody has pressed Cancel
        if isinstance(error, FormError):
            with self._sending:
                self._show_errors("used", self._errors["used"] | error.fields)
        elif isinstance(error, InferkitError):
            self._put("failure", {"title": "", "text": str(error), "details": ""})
        else:
            super()._failed(error)

    def _show_errors(self, kind: str, fields: dict[str, str]) -> None:
        """What is wrong with the form as it is typed, or what was when it was used last."""
        self._errors[kind] = dict(fields)
        self._put("errors", self._errors["used"] | self._errors["form"])

    def _forget_errors(self, *fields: str) -> None:
        """Take away what was wrong with these when they were used."""
        with self._sending:
            left = {k: v for k, v in self._errors["used"].items() if k not in fields}
            self._show_errors("used", left)

    def _show_model(self) -> None:
        """What the model is now, and what code gives it."""
        model = self._feed.model
        try:
            facts = model_facts(model)
            self._put("model", facts)
            if self._coded != (facts, self._sent):
                self._put("code", recipe.code(model, self._sent))
                self._coded = (facts, self._sent)
        except ModelUnloadedError:
            self._attach(_loaded_last())

    # -- following what cells do ----------------------------------------------------------------

    def _tick(self) -> bool:
        busy = super()._tick()
        now = time.monotonic()
        if now >= self._looked + _LOOK:
            self._looked = now
            self._follow()
        if now >= self._looked_at_devices + _DEVICES and self._looked_at(busy):
            self._looked_at_devices = now
            if "devices" in self._state:  # otherwise a look would import torch
                self._show_devices()
        return busy

    def _follow(self) -> None:
        """Let go of a model that was unloaded, and take over the one that was loaded last."""
        model = self._feed.model
        if model is None or not model.loaded:
            last = _loaded_last()
            if last is not model:
                self._attach(last)
        else:
            with suppress(ModelUnloadedError):  # in this moment; the next look will see it
                if modes(model) != self._filled:  # a cell has changed it
                    self._fill(model, self._form | self._filled)
        self._show_model()
        names = loaded_names()
        if "choices" in self._state and names != self._state["choices"]["loaded"]:
            self._put("choices", {**self._state["choices"], "loaded": names})

    def _attach(self, model: Model | None, typed: dict[str, Any] | None = None) -> None:
        if self._closed:
            return
        try:
            self._feed.attach(model)
        except ModelUnloadedError:
            self._feed.attach(model := None)
        if model is not None:
            self._fill(model, typed)
        self._show_model()
        if self._ticker is not None:
            self._plans.do(self._plan, "plan")

    def _fill(self, model: Model, typed: dict[str, Any] | None = None) -> None:
        """Put what the model runs as into the form.

        Args:
            model: The model.
            typed: The form when it was used; what was typed since then stays, and what it lacks.
        """
        with self._sending:
            kept = self._form if typed is None else typed
            self._filled = modes(model)
            same = {k for k in self._filled if self._form[k] == kept.get(k)}
            self._forget_errors(*same)
            self._change_form({k: self._filled[k] for k in same})

    def _find_choices(self) -> None:
        """Models that load without network, and devices: the first look imports torch."""
        from inferkit.catalog import cached_models
        from inferkit.devices import attached_names

        refs = dict.fromkeys(["demo", *(model.ref for model in cached_models())])
        names = loaded_names()
        self._put("choices", {"refs": list(refs), "devices": attached_names(), "loaded": names})
        self._show_devices()

    def _show_devices(self) -> None:
        from inferkit.devices import devices

        model = self._feed.model
        plan = model.plan if model is not None and model.loaded else None
        mine = {d.name: d.weights + d.kv_cache for d in plan.devices} if plan else {}
        told = [
            {
                "name": device.name,
                "description": device.description,
                "total": device.total,
                "free": device.free,
                "mine": mine.get(device.name, 0),
            }
            for device in devices()
        ]
        self._put("devices", told)

    def _run_ended(self) -> None:
        super()._run_ended()
        self._put("summary", run_summary(self.generations, self._feed.model))

    # -- what was typed -------------------------------------------------------------------------

    def _edit(self, fields: dict[str, Any]) -> None:
        with self._sending:
            self._change_form({name: fields[name] for name in fields if name in form.EMPTY})
            about = {*fields, "prompt"} if "chat" in fields else fields  # a template may be lacking
            self._forget_errors(*about)
            if "ref" in fields:
                self._put("failure", None)  # it was of another model
        self._plans.do(self._plan, "plan")

    def _change_form(self, fields: dict[str, Any]) -> None:
        """Put values into the form, and say what is wrong with it: a plan may wait for the hub."""
        self._form |= fields
        self._put("form", dict(self._form))
        self._show_errors("form", form.errors(self._form))

    def _plan(self) -> None:
        """Plan the load that the form asks for, where that is not loaded already."""
        typed = dict(self._form)
        try:
            options = form.plan_options(typed)
        except FormError:
            self._put("plan", None)
        else:
            self._show_plan(typed, options)

    def _show_plan(self, typed: dict[str, Any], options: dict[str, Any]) -> None:
        from inferkit.memory import plan

        if self._named_model(typed) is not None:
            self._put("plan", None)
            return
        asked = (dict(options), loaded_names())
        if asked == self._planned and self._state.get("plan"):
            return
        ref = options.pop("ref")
        if self._planned is None or self._planned[0]["ref"] != ref:
            self._put("plan", {"text": f"Looking at {ref} …", "fits": True})
        try:
            planned = plan(ref, **options)
            self._put("plan", {"text": f"Plan: {planned.explain()}", "fits": planned.fits})
        except InferkitError as error:
            self._put("plan", {"text": str(error), "fits": False})
        self._planned = asked

    def _named_model(self, typed: dict[str, Any]) -> Model | None:
        """The model that is shown, if the form names it and where it is."""
        model = self._feed.model
        if model is None or not model.loaded:
            return None
        named = str(typed["ref"]).strip() in (model.ref, model.name)
        return model if named and typed["device"] in ("auto", model.device) else None

    # -- what was clicked -----------------------------------------------------------------------

    def _act(self, message: dict[str, Any]) -> None:
        if message.get("fields"):
            self._edit(message["fields"])
        typed = dict(self._form)  # as it is now, and not when its turn comes
        match message.get("name"):
            case "load":
                self._changes.do(lambda: self._load(typed))
            case "unload":
                self._changes.do(self._unload)
            case "apply":
                self._changes.do(lambda: self._apply(typed, message["field"]))
            case "attach":
                self._changes.do(lambda: self._choose(message["model"]))
            case "cancel":
                self._sends.do(self._cancel_work)
            case "send":
                stops = self._stops
                self._sends.do(lambda: self._submit(typed, message["how"], stops))
            case "stop":
                self._stop(message.get("number"))
            case "keep":
                self._sends.do(self._keep)
            case "dismiss":
                self._sends.do(lambda: self._put("failure", None))

    def _load(self, typed: dict[str, Any]) -> None:
        from inferkit.registry import load

        self._forget_errors(*_LOADED_WITH, "prompt")
        options = form.load_options(typed)
        self._put("failure", None)
        if self._named_model(typed) is not None:
            return  # it is there, and what is set for it holds at once
        with self._working(f"Loading {options['ref']}"):
            self._attach(load(**options, progress=self._told), typed)
        self._plans.do(self._find_choices, "choices")  # it may be in the cache now

    def _unload(self) -> None:
        model = self._feed.model
        if model is not None:
            with self._working(f"Unloading {model.name}", cancel=False):
                model.unload()
                self._attach(_loaded_last())
            self._show_devices()

    def _choose(self, name: str) -> None:
        for model in loaded_models():
            if model.name == name:
                self._attach(model)

    def _apply(self, typed: dict[str, Any], name: str) -> None:
        """Change the loaded model at once; of one that is not loaded only the plan changes.

        What was typed and is refused stays, with the reason at its field; a toggle goes back. What
        is typed into other fields, and was refused or has not had its turn, is no matter here.
        """
        model = self._named_model(typed)
        if model is None or name not in _MODES:
            return
        kept = {**self._filled, name: typed[name]}
        try:
            value = form.load_option(typed, name)
            if value is not None and value != getattr(model, _attribute(name)):
                self._change(model, name, value)
        except (OptionError, DoesNotFitError) as error:
            if name not in _TYPED:
                raise
            kept.pop(name)
            raise error if isinstance(error, FormError) else FormError({name: str(error)}) from None
        finally:
            if model.loaded:
                self._fill(model, kept)
            self._show_model()
            self._show_devices()

    def _change(self, model: Model, name: str, value: Any) -> None:
        what = f"{_spelled(name)} {value}"
        if name not in _AT_ONCE and (running := model.running):
            what += f": waits for {counted(running, 'running request')} (Stop ends them)"
        with self._working(what, cancel=name == "quantize"):
            if name == "quantize":
                model.quantize(value, progress=self._told)
            else:
                model.configure(**{name: value})

    def _submit(self, typed: dict[str, Any], how: str, stops: int) -> None:
        """Send what is typed, and stop it where that was asked for since ``stops`` times."""
        model = self._feed.model
        self._forget_errors(*(field for field in form.EMPTY if field not in _LOADED_WITH))
        if model is None:
            raise FormError({"prompt": "Load a model first."})
        options = form.sampling_options(typed)
        prompts = form.prompts(typed, how)
        chat = bool(typed["chat"])
        try:
            with origin("panel"):
                requests = submit(model, prompts, chat, options)
        except PromptError as error:
            raise FormError({"prompt": str(error)}) from None
        if self._stops != stops:
            for request in requests:
                request.cancel()
        self._put("failure", None)
        seeds = [request.sampler.seed for request in requests]
        self._sent = recipe.Sent(prompts, options, seeds, chat)
        self._show_model()

    def _stop(self, number: int | None) -> None:
        """Cancel a request, or all of the model, whoever has submitted them."""
        if number is None:
            self._stops += 1
        for request in self._feed.live if number is None else [self._feed.find(number)]:
            if request is not None:
                request.cancel()

    def _keep(self) -> None:
        """Show the figure under the cell that shows the panel."""
        from IPython.display import display

        show = partial(display, self.plot())
        self._in_its_cell(lambda: self._publish(show))

    # -- work in the background -----------------------------------------------------------------

    @contextmanager
    def _working(self, what: str, cancel: bool = True) -> Iterator[None]:
        """Say what is being done, and no more when it is done."""
        self._cancel.clear()
        self._put("failure", None)
        self._put("work", {"what": what, "done": 0, "total": 0, "cancel": cancel})
        try:
            yield
        finally:
            self._put("work", None)

    def _told(self, what: str, done: int, total: int | None) -> None:
        """Progress of a load; raises where Cancel was pressed, which ends it."""
        if self._cancel.is_set():
            raise KeyboardInterrupt
        self._put("work", {"what": what, "done": done, "total": total or 0, "cancel": True})

    def _cancel_work(self) -> None:
        """Let the next word of progress end the work."""
        with self._sending:
            work = self._state.get("work")
            if work and work["cancel"]:
                self._cancel.set()
                self._put("work", {**work, "what": f"Cancelling: {work['what']}", "cancel": False})


def _loaded_last() -> Model | None:
    return next(reversed(loaded_models()), None)


def _attribute(name: str) -> str:
    return "quantization" if name == "quantize" else name


def _spelled(name: str) -> str:
    return {"quantize": "Changing to", "batching": "Batching", "speculative": "Speculation"}.get(
        name, f"Changing {name.replace('_', ' ')} to"
    )


def _import_all() -> None:
    """Import what loads models, ahead of all else that this thread does.

    A cell may do the same in this moment, and `inferkit` lets one at a time.
    """
    from inferkit import load  # noqa: F401
