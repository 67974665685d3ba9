"""Panel: load a model, change its modes, prompt it and watch its latency, all by clicking.

The browser's side is ``static/panel.js``. It is told of state in parts, by name, each replaced as a
whole (`Panel._put`): ``choices``, ``devices``, ``model``, ``plan``, ``work``, ``errors``,
``failure``, ``summary`` and ``code``. What is typed is the trait ``form`` (see `form.EMPTY`). A
click comes as ``{type: "act", name, form, ...}`` and is one of the methods below `_act`.

Clicks are taken while cells run, so they only queue work: what changes a model is done by one
thread after the other, prompts are sent by another, and stopping is done at once.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import traitlets

from inferkit import progress
from inferkit.errors import InferkitError, ModelUnloadedError, PromptError
from inferkit.html import format_bytes, format_number
from inferkit.notebook import assets, form, recipe
from inferkit.notebook.form import FormError
from inferkit.notebook.live import LivePlot, check_model
from inferkit.notebook.worker import Worker

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.model import Model

_LOOK = 1.0  # seconds between two looks at what cells have loaded
_DEVICES = 2.0  # seconds between two looks at the memory
_MODES = ("quantize", "batching", "max_batch", "context")


class Panel(LivePlot):
    """Load a model, change its modes, prompt it, and watch every token's latency.

    Show it by ending a cell with it. It follows what cells do too: it shows the model that was
    loaded last, in the modes that it has, and requests that come from cells. Nothing that is
    clicked holds up the kernel. All views of one panel show the same.

    Args:
        model: The model to begin with; None for the one loaded last, if any.
    """

    _esm = assets.script("dom.js", "store.js", "plot.js", "panel.js", "entry.js")

    form = traitlets.Dict(form.EMPTY).tag(sync=True)

    def __init__(self, model: Model | None = None, **traits: Any) -> None:
        check_model(model)
        self._state: dict[str, Any] = {}
        self._sent: recipe.Sent | None = None
        self._cancel = threading.Event()
        self._changes = Worker("inferkit-panel", self._failed)
        self._sends = Worker("inferkit-send", self._failed)
        self._planned: tuple[Any, ...] = ()
        self._looked = self._looked_at_devices = 0.0
        super().__init__(None, **traits)
        self._attach(model or _loaded_last())
        self.observe(lambda _: self._form_changed(), "form")

    def close(self) -> None:
        """Take it out of the browser; models stay loaded."""
        self._changes.close()
        self._sends.close()
        super().close()

    # -- state ----------------------------------------------------------------------------------

    def _put(self, part: str, value: Any) -> None:
        """Tell the views of a part of the state, unless they know."""
        with self._sending:
            if part in self._state and self._state[part] == value:
                return
            self._state[part] = value
            self._say({"type": "state", "parts": {part: value}})

    def _send_state(self) -> None:
        self._say({"type": "state", "parts": dict(self._state)})
        self._changes.do(self._find_choices, "choices")
        self._form_changed()

    def _failed(self, error: BaseException) -> None:
        """Show an error where somebody sees it; one of ours is a sentence, others have details."""
        if progress.stopped(error):
            return  # somebody has pressed Cancel
        if isinstance(error, FormError):
            self._put("errors", error.fields)
            return
        if isinstance(error, InferkitError):
            self._put("failure", {"title": "", "text": str(error), "details": ""})
            return
        details = "".join(traceback.format_exception(error))
        text = f"{type(error).__name__}: {error}"
        self._put("failure", {"title": "Unexpected error.", "text": text, "details": details})

    def _show_model(self) -> None:
        """What the model is now, and what code gives it."""
        model = self._feed.model
        try:
            self._put("model", _facts(model))
            self._put("code", recipe.code(model, self._sent))
        except ModelUnloadedError:
            self._attach(_loaded_last())

    # -- following what cells do ----------------------------------------------------------------

    def _tick(self) -> bool:
        busy = super()._tick()
        now = time.monotonic()
        if now >= self._looked + _LOOK:
            self._looked = now
            self._follow()
        if now >= self._looked_at_devices + _DEVICES and now < self._watched_until:
            self._looked_at_devices = now
            if "torch" in sys.modules and "devices" in self._state:
                self._show_devices()
        return busy

    def _follow(self) -> None:
        """Take over a model that a cell has loaded, let go of one that it has unloaded."""
        model = self._feed.model
        if model is None or not model.loaded:
            last = _loaded_last()
            if last is not model:
                self._attach(last)
        self._show_model()
        names = [m.name for m in _loaded()]
        if "choices" in self._state and names != self._state["choices"]["loaded"]:
            self._put("choices", {**self._state["choices"], "loaded": names})

    def _attach(self, model: Model | None) -> None:
        try:
            self._feed.attach(model)
        except ModelUnloadedError:
            self._feed.attach(model := None)
        if model is not None:
            self._fill(model)
        self._show_model()

    def _fill(self, model: Model) -> None:
        """Put what the model runs as into the form."""
        now = {
            "ref": model.ref,
            "device": model.device if len(model.devices) == 1 else "auto",
            "quantize": model.quantization,
            "batching": model.batching,
            "max_batch": str(model.max_batch),
            "context": str(model.context),
        }
        self.form = {**self.form, **now}

    def _find_choices(self) -> None:
        """Models that load without network, and devices: the first look imports torch."""
        from inferkit.catalog import cached_models
        from inferkit.devices import attached_names

        refs = dict.fromkeys(["demo", *(model.ref for model in cached_models())])
        names = [m.name for m in _loaded()]
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
        self._put("summary", self._summary())

    def _summary(self) -> list[tuple[str, str]]:
        """The last run in a line, by vLLM's definitions; times in ms."""
        from inferkit.latency import summarize

        gens = self.generations
        if not gens:
            return []
        found = summarize(gens)

        def ms(name: str, percentile: str) -> str:
            value = getattr(found[name], percentile)
            return "–" if value is None else f"{format_number(1e3 * value)} ms"

        many = found.completed > 1
        percentiles = ("p50", "p99") if many else ("p50",)
        facts = [("last run", f"{len(gens)} request{'s' if len(gens) != 1 else ''}")]
        if found.failed:
            facts.append(("not finished", str(found.failed)))
        for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("queue", "queue")):
            wide = ("p50", "p99") if name == "tpot" else percentiles
            facts += [(f"{label} {p}" if many else label, ms(name, p)) for p in wide[: 1 + many]]
        facts.append(("output tokens/s", format_number(found.output_tokens_per_second)))
        model = self._feed.model
        if model is not None:
            facts.append(("weights", format_bytes(model.plan.weights)))
            facts.append(("KV cache", format_bytes(model.plan.kv_cache)))
        return facts

    # -- what was typed -------------------------------------------------------------------------

    def _form_changed(self) -> None:
        self._changes.do(self._plan, "plan")

    def _plan(self) -> None:
        """Check the form, and plan the load that it asks for, where that is not loaded already."""
        errors: dict[str, str] = {}
        try:
            form.sampling_options(self.form)
        except FormError as error:
            errors |= error.fields
        try:
            options = form.plan_options(self.form)
        except FormError as error:
            errors |= error.fields
            self._put("plan", None)
        else:
            self._show_plan(options)
        self._put("errors", errors)

    def _show_plan(self, options: dict[str, Any]) -> None:
        from inferkit.memory import plan

        if self._named_model(self.form) is not None:
            self._put("plan", None)
            return
        asked = (*sorted(options.items()), tuple(m.name for m in _loaded()))
        if asked == self._planned and self._state.get("plan"):
            return
        try:
            planned = plan(options.pop("ref"), **options)
            self._put("plan", {"text": f"Plan: {planned.explain()}", "fits": planned.fits})
        except InferkitError as error:
            self._put("plan", {"text": str(error), "fits": False})
        self._planned = asked

    def _named_model(self, typed: dict[str, Any]) -> Model | None:
        """The model that is shown, if the form names it and where it is."""
        model = self._feed.model
        if model is None or not model.loaded:
            return None
        named = str(typed.get("ref", "")).strip() in (model.ref, model.name)
        return model if named and typed.get("device") in ("auto", model.device) else None

    # -- what was clicked -----------------------------------------------------------------------

    def _act(self, message: dict[str, Any]) -> None:
        typed = {**form.EMPTY, **message.get("form", {})}
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
                self._cancel.set()
            case "send":
                self._sends.do(lambda: self._prompt(typed, message["how"]))
            case "stop":
                self._stop(message.get("number"))
            case "keep":
                self._sends.do(self._keep)
            case "dismiss":
                self._changes.do(lambda: self._put("failure", None))

    def _load(self, typed: dict[str, Any]) -> None:
        from inferkit.registry import load

        options = form.load_options(typed)
        ref = options.pop("ref")
        with self._working(f"Loading {ref}"):
            self._attach(load(ref, progress=self._told, **options))
        self._show_devices()

    def _unload(self) -> None:
        model = self._feed.model
        if model is not None:
            with self._working(f"Unloading {model.name}", cancel=False):
                model.unload()
                self._attach(_loaded_last())
            self._form_changed()
            self._show_devices()

    def _choose(self, name: str) -> None:
        for model in _loaded():
            if model.name == name:
                self._attach(model)

    def _apply(self, typed: dict[str, Any], name: str) -> None:
        """Change the loaded model at once; of one that is not loaded only the plan changes."""
        model = self._named_model(typed)
        if model is None or name not in _MODES:
            return
        options = form.load_options(typed)
        if name not in options or options[name] == getattr(model, _attribute(name)):
            return
        try:
            with self._working(f"{_spelled(name)} {options[name]}", cancel=name == "quantize"):
                if name == "quantize":
                    model.quantize(options[name], progress=self._told)
                else:
                    model.configure(**{name: options[name]})
        finally:
            if model.loaded:
                self._fill(model)  # where it was refused, the former mode
            self._show_model()
            self._show_devices()

    def _prompt(self, typed: dict[str, Any], how: str) -> None:
        model = self._feed.model
        if model is None:
            raise FormError({"prompt": "Load a model first."})
        options = form.sampling_options(typed)
        prompts = form.prompts(typed, how)
        self._put("errors", {})
        chat = bool(typed["chat"])
        try:
            with self._feed.origin("panel"):
                requests = _submit(model, prompts, options, chat)
        except PromptError as error:
            raise FormError({"prompt": str(error)}) from None
        self._put("failure", None)
        seeds = [request.sampler.seed for request in requests]
        self._sent = recipe.Sent(prompts, options, seeds, chat)
        self._show_model()

    def _stop(self, number: int | None) -> None:
        """Cancel a request, or all of the model, whoever has submitted them."""
        for request in self._feed.live if number is None else [self._feed.find(number)]:
            if request is not None:
                request.cancel()

    def _keep(self) -> None:
        """Show the figure under the cell that shows the panel."""
        from IPython.display import display

        figure = self.plot()
        self._in_its_cell(lambda: display(figure))  # type: ignore[no-untyped-call]

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


def _submit(model: Model, prompts: list[str], options: dict[str, Any], chat: bool) -> list[Request]:
    if not chat:
        return model.submit(prompts, **options)
    requests: list[Request] = []
    try:
        for prompt in prompts:
            requests.append(model.submit_chat([{"role": "user", "content": prompt}], **options))
    except InferkitError:
        for request in requests:
            request.cancel()
        raise
    return requests


def _loaded() -> list[Model]:
    """The models of this process, without an import of torch where there can be none."""
    if "inferkit.registry" not in sys.modules:
        return []
    from inferkit.registry import models

    return list(models())


def _loaded_last() -> Model | None:
    return next(reversed(_loaded()), None)


def _facts(model: Model | None) -> dict[str, Any] | None:
    """What the views show of a model."""
    if model is None:
        return None
    return {
        "name": model.name,
        "ref": model.ref,
        "device": ", ".join(model.devices),
        "dtype": model.dtype,
        "quantization": str(model.plan.format),
        "batching": model.batching,
        "max_batch": model.max_batch,
        "context": model.context,
        "fallback": model.fallback,
    }


def _attribute(name: str) -> str:
    return "quantization" if name == "quantize" else name


def _spelled(name: str) -> str:
    return {"quantize": "Changing to", "batching": "Batching"}.get(
        name, f"Changing {name.replace('_', ' ')} to"
    )
