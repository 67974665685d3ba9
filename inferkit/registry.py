"""The models that are loaded in this process: `load` makes them, `models` lists them.

Running the same `load` again gives the same model; see there for what changes it or replaces it.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferkit import catalog, memory
from inferkit.devices import resolve_device, resolve_dtype
from inferkit.engine.compiling import Compile, check_compile
from inferkit.engine.guesses import DRAFT, check_speculative
from inferkit.engine.request import forked
from inferkit.engine.scheduler import Batching, check_batching
from inferkit.errors import OptionError
from inferkit.exclusive import holding
from inferkit.footprint import asked_format, check_mode_runs, weight_format
from inferkit.html import format_bytes, table, text_table
from inferkit.kv import PREFILL_CHUNK
from inferkit.lab import status
from inferkit.loading import file_states
from inferkit.memory import MemoryPlan
from inferkit.model import Model
from inferkit.placement import check_offload, resolve_max_memory
from inferkit.progress import Progress
from inferkit.resident import Identity, take_in
from inferkit.stored import check_stored

on_load: list[Callable[[Model], None]] = []
"""Called with each model that was loaded, by the thread that did; they must not fail."""

_table: dict[str, Model] = {}
_loads = threading.RLock()
_forked_from: int | None = None


class ModelTable(list[Model]):
    """The loaded models, shown as a table."""

    _HEADER = ("name", "device", "dtype", "quantization", "batching", "step", "weights", "running")

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for m in self:
            resident = m._resident
            if resident is not None:
                engine = resident.engine
                yield (
                    m.name,
                    ", ".join(m.devices),
                    m.dtype,
                    m.quantization,
                    f"{engine.batching} ({engine.max_batch})",
                    str(resident.compilation),
                    format_bytes(m.plan.weights),
                    engine.running,
                )

    def __repr__(self) -> str:
        rows = list(self._rows())
        return text_table(self._HEADER, rows) if rows else "No model is loaded."

    def _repr_html_(self) -> str:
        rows = list(self._rows())
        if not rows:
            return "<i>No model is loaded: <code>ik.load('demo')</code> loads one.</i>"
        return table(self._HEADER, rows)


def models() -> ModelTable:
    """The models that are loaded in this process, in the order of loading."""
    return ModelTable(model for model in list(_table.values()) if model.loaded)


def load(
    ref: catalog.Ref,
    *,
    device: Any = "auto",
    max_memory: Mapping[str, int | str] | None = None,
    dtype: Any = "auto",
    quantize: str = "none",
    batching: Batching = "continuous",
    max_batch: int = 16,
    context: int | None = None,
    revision: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    prefix_reuse: bool = True,
    prefill_chunk: int = PREFILL_CHUNK,
    compile: Compile = "auto",
    speculative: str = "off",
    double_quant: bool = False,
    compute_dtype: Any = "auto",
    progress: Progress = True,
    **unknown: Any,
) -> Model:
    """Load a model, or return it where it is loaded already.

    Running the same call again gives the model that is loaded. The same name with another
    ``quantize``, ``batching``, ``max_batch``, ``context``, ``compile`` or ``speculative`` changes
    it in place; with anything else other, or with files that were written again, the new model
    takes the old one's place (the old one goes first only where both do not fit).

    Args:
        ref: "demo", a Hugging Face hub id, a local folder, or a ``.gguf`` file.
        device: "auto", "cpu", "cuda:N", "mps", or a list of devices to split the layers over. After
            accelerators the list may have "cpu", and "disk" at its end: ["cuda:0", "cpu", "disk"].
            Then earlier devices are filled first; what lies on "cpu" or "disk" travels to the
            accelerator at every step, which is slow, and stays unquantized. With ["cpu", "disk"]
            the CPU runs all layers, and those on disk are read at every step.
        max_memory: The most to take of a device, by name: {"cuda:0": "6GiB", "cpu": 300_000_000}.
        dtype: "auto" (bf16 where the device is good at it), "bfloat16", "float16" or "float32".
        quantize: "none"; "int8", "nf4" or "fp4" (bitsandbytes); on a CPU also "int8wo" or "int4wo"
            (weight-only, torch's kernels). What is stored quantized (by bitsandbytes, GPTQ, AWQ,
            compressed-tensors, ...) is loaded as it is under "none", and in no other mode.
        batching: "continuous", "static" or "off".
        max_batch: Most requests that run at once.
        context: Most tokens of prompt and output together; None for 4096, or the model's maximum
            where that is less.
        revision: Branch, tag or commit of a hub model.
        name: What to call it. None is the end of the reference; or all of the reference, where
            another model is loaded under that end.
        trust_remote_code: Run the model code that the repository brings. Off unless asked for.
        force: Load although the memory plan says that it does not fit.
        prefix_reuse: Reuse the KV cache of a prompt prefix that an earlier request had.
        prefill_chunk: Most prompt tokens per step, so that a long prompt does not stall the others.
        compile: Compile the decode step in the background and swap it in when it is ready; the code
            is kept for later loads. "auto" does so where it pays; see ``model.compilation``.
        speculative: "ngram" guesses the next tokens by what followed the same ones before in prompt
            and output, and checks the guesses in one pass: the same text, sooner where it quotes
            or repeats itself. "draft:NAME" has a loaded model guess, a smaller one of the same
            vocabulary. "off" guesses nothing. See `Model.configure`.
        double_quant: Quantize the scales of a 4-bit mode again: see `Model.quantize`.
        compute_dtype: The dtype that 4-bit weights are unpacked to for each matmul; "auto" is that
            of the model.
        progress: Show progress bars, or call this with (what, done, total). What it raises ends the
            load as an interrupt does: KeyboardInterrupt cancels one that another thread does.
        unknown: None; a misspelt option is an OptionError that names the nearest one.

    Raises:
        OptionError, DeviceError, ModelNotFoundError, DamagedFileError, UnsupportedModelError:
            Before a weight is read, as far as it can be known then.
        DoesNotFitError: The plan says no, before a weight is read.
        LoadError: Loading failed half way; what was read is released.
        ForkedProcessError: This process is a fork of one that had loaded a model.
        OutOfMemoryError, GenerationError, ModelUnloadedError: A model that is loaded could not be
            changed in place: see `Model.configure` and `Model.quantize`.
    """
    memory.check_known(unknown, load)
    check_batching(batching, max_batch)
    check_compile(compile)
    check_speculative(speculative)
    if speculative.startswith(DRAFT):
        _named(speculative.removeprefix(DRAFT))  # before a weight is read
    asked = asked_format(quantize, double_quant, compute_dtype)
    memory.check_whole("prefill_chunk", prefill_chunk)
    _check_name(name)
    _refuse_fork()
    devices = tuple(resolve_device(device))
    limits = resolve_max_memory(max_memory, devices)
    config = catalog.config(ref, revision, trust_remote_code=trust_remote_code)
    form = weight_format(config, asked)
    check_offload(config, devices)
    check_mode_runs(form, devices)
    resolved = resolve_dtype(dtype, list(devices), memory.stored_dtype(config))
    if form.stored:
        resolved = check_stored(config, devices, resolved)
    with holding(_loads):
        source = catalog.resolve(ref, revision, progress=progress)
        name = name or _default_name(source)
        identity = Identity(
            path=source.path,
            files=file_states(source),
            revision=source.revision,
            devices=devices,
            max_memory=tuple(sorted(limits.items())),
            dtype=resolved,
            format=form,
            trust_remote_code=trust_remote_code,
            prefix_reuse=prefix_reuse,
            prefill_chunk=prefill_chunk,
        )
        old = _table.get(name)
        if old is not None and _can_become(old, identity):
            old._become(
                format=form,
                max_batch=max_batch,
                context=memory.checked_context(config, context),
                force=force,
                progress=progress,
            )
            old._engine.set_batching(batching)
            old.configure(speculative=speculative)
            if compile != old._parts.compile:
                old.configure(compile=compile)
            return old

        def plan(adjust: Mapping[str, int]) -> MemoryPlan:
            return memory.plan_config(
                config,
                form=form,
                context=context,
                max_batch=max_batch,
                devices=devices,
                dtype=resolved,
                model=source.ref,
                adjust=adjust,
                max_memory=limits,
                prefill_chunk=prefill_chunk,
                trust_remote_code=trust_remote_code,
            )

        planned = _make_room(plan, old, force)
        resident = take_in(
            name,
            source,
            config,
            planned,
            identity,
            batching=batching,
            compile=compile,
            progress=progress,
        )
        model = Model(source, resident, _promised, _named)
        try:
            model.configure(speculative=speculative)
        except BaseException:
            resident.release()
            raise
        _table.pop(name, None)  # so that the table is in the order of loading
        _table[name] = model
        if old is not None:
            old._retire(_REPLACED)
        for listener in on_load.copy():
            listener(model)
        status.follow(model)
        return model


def _named(name: str) -> Model:
    """A loaded model by its name.

    Raises:
        OptionError: There is none of that name.
    """
    model = _table.get(name)
    if model is None or not model.loaded:
        loaded = ", ".join(repr(m.name) for m in _table.values() if m.loaded) or "none"
        raise OptionError(f"No model {name!r} is loaded to guess next tokens; loaded: {loaded}.")
    return model


_REPLACED = (
    "was replaced by another load under its name: use the model that this load returned "
    "(ik.models() lists it), or give one of the two a name of its own with ik.load(..., name=...)."
)


def _can_become(old: Model, identity: Identity) -> bool:
    """Whether a loaded model is the one asked for, or of the same files in another precision."""
    parts = old._resident
    if parts is None or parts.engine.closed:
        return False
    return replace(parts.identity, format=identity.format) == identity


def _make_room(
    plan: Callable[[Mapping[str, int]], MemoryPlan], old: Model | None, force: bool
) -> MemoryPlan:
    """The plan to load by; unloads the model to be replaced where both do not fit together."""
    planned = plan({"cpu": -_promised()})
    if planned.fits:
        return planned
    if old is None or not old.loaded:
        return planned if force else planned.require()
    planned = plan(old._gain())
    if not (force or planned.within(old.plan)):
        planned.require()
    old._retire(_REPLACED)
    return planned


def _promised(but: Model | None = None) -> int:
    """Bytes of the KV caches of the models on the CPU, of all ``but`` one.

    The system counts their pages as free until a request first writes to them. Which ones that
    happened to is not known, so that all count: an upper bound.
    """
    plans = [m.plan for m in models() if m is not but]
    return sum(d.kv_cache for p in plans for d in p.devices if d.name == "cpu")


def _check_name(name: Any) -> None:
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise OptionError(f"name={name!r}: give a word to call the model by.")


def _default_name(source: catalog.Source) -> str:
    """The name it is loaded under already, or the shortest that no other model has."""
    names = _default_names(source.ref, source.path)
    loaded = models()
    for model in loaded:
        if _same_model(model, source) and model.name in _default_names(model.ref, model.path):
            return model.name
    taken = {model.name for model in loaded}
    return next((name for name in names if name not in taken), names[-1])


def _default_names(ref: str, path: Path) -> tuple[str, ...]:
    # "." and the like have no last part of their own.
    return Path(ref).name.strip(".") or Path(ref).absolute().resolve().name, ref, str(path)


def _same_model(model: Model, source: catalog.Source) -> bool:
    """Whether a model is of this reference, if perhaps of another revision."""
    # A relative path may lead elsewhere since the working directory changed.
    return model.path == source.path or (model.ref == source.ref and source.kind != "folder")


def _refuse_fork() -> None:
    """In a fork of a process that had models, torch's thread pool is gone and its work hangs."""
    if _forked_from is not None:
        raise forked("A model was loaded", _forked_from)


def _after_fork() -> None:
    global _forked_from, _loads
    if _table:
        _forked_from = os.getppid()
    _table.clear()
    _loads = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _stop_engines() -> None:
    """End the threads before the interpreter tears torch down under them."""
    for model in models():
        if model._resident is not None:
            model._resident.compilation.stop()
            model._resident.engine.close(timeout=5.0)
