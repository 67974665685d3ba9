"""The models that are loaded in this process: `load` makes them, `models` lists them.

Running the same `load` again gives the same model; see there for what changes it or replaces it.
"""

from __future__ import annotations

import atexit
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inferkit import catalog, memory
from inferkit.devices import resolve_device, resolve_dtype
from inferkit.engine.request import forked
from inferkit.engine.scheduler import Batching, check_batching
from inferkit.errors import OptionError
from inferkit.footprint import check_mode
from inferkit.html import format_bytes, table, text_table
from inferkit.memory import MemoryPlan
from inferkit.model import Model
from inferkit.resident import Identity, take_in
from inferkit.sampling import unknown_option

# A wait that is cut into pieces can be interrupted on every platform.
_TICK = 0.25

_table: dict[str, Model] = {}
_loads = threading.RLock()
_forked_from: int | None = None


class ModelTable(list[Model]):
    """The loaded models, shown as a table."""

    _HEADER = ("name", "device", "dtype", "quantization", "batching", "weights", "running")

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
    prefill_chunk: int = 512,
    progress: bool = True,
    **unknown: Any,
) -> Model:
    """Load a model, or return it where it is loaded already.

    Running the same call again gives the model that is loaded. The same name with another
    ``batching``, ``max_batch`` or ``context`` changes it in place; with anything else other, the
    new model takes the old one's place (the old one goes first only where both do not fit).

    Args:
        ref: "demo", a Hugging Face hub id, a local folder, or a ``.gguf`` file.
        device: "auto", "cpu", "cuda:N", "mps", or a list of devices to split the layers over.
        dtype: "auto" (bf16 where the device is good at it), "bfloat16", "float16" or "float32".
        quantize: "none", "int8", "nf4" or "fp4" (bitsandbytes).
        batching: "continuous", "static" or "off".
        max_batch: Most requests that run at once.
        context: Most tokens of prompt and output together; None for 4096, or the model's maximum
            where that is less.
        revision: Branch, tag or commit of a hub model.
        name: What to call it; the end of the reference where None.
        trust_remote_code: Run the model code that the repository brings. Off unless asked for.
        force: Load although the memory plan says that it does not fit.
        prefix_reuse: Reuse the KV cache of a prompt prefix that an earlier request had.
        prefill_chunk: Most prompt tokens per step, so that a long prompt does not stall the others.
        progress: Show progress bars.
        unknown: None; a misspelt option is an OptionError that names the nearest one.

    Raises:
        OptionError, DeviceError, ModelNotFoundError, DamagedFileError, UnsupportedModelError:
            Before anything is read.
        DoesNotFitError: The plan says no, before a weight is read.
        LoadError: Loading failed half way; what was read is released.
    """
    if unknown:
        raise OptionError(unknown_option(next(iter(unknown)), _options()))
    check_batching(batching, max_batch)
    check_mode(quantize)
    _check_chunk(prefill_chunk)
    _refuse_fork()
    devices = tuple(resolve_device(device))
    config = catalog.config(ref, revision, trust_remote_code=trust_remote_code)
    name = _checked_name(name, ref)
    resolved = resolve_dtype(dtype, list(devices), memory.stored_dtype(config))
    with _one_load_at_a_time():
        source = catalog.resolve(ref, revision, progress=progress)
        identity = Identity(
            path=source.path,
            revision=source.revision,
            devices=devices,
            dtype=resolved,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            prefix_reuse=prefix_reuse,
            prefill_chunk=prefill_chunk,
        )
        old = _table.get(name)
        if old is not None and old.loaded and not old._engine.closed and old._identity == identity:
            wanted = _default_context(config) if context is None else context
            return old._configure(batching, max_batch, wanted, force=force)

        def plan(free: Mapping[str, int] | None = None) -> MemoryPlan:
            return memory.plan_config(
                config,
                quantize=quantize,
                context=context,
                max_batch=max_batch,
                devices=devices,
                dtype=resolved,
                model=str(ref),
                free=free,
                prefill_chunk=prefill_chunk,
                trust_remote_code=trust_remote_code,
            )

        planned = _make_room(plan, old, force)
        resident = take_in(name, source, planned, identity, batching=batching, progress=progress)
        model = Model(source, planned, resident)
        _table.pop(name, None)  # so that the table is in the order of loading
        _table[name] = model
        if old is not None:
            old._retire(_REPLACED)
        return model


_REPLACED = (
    "was replaced by another load under its name: use the model that this load returned "
    "(ik.models() lists it), or give one of the two a name of its own with ik.load(..., name=...)."
)


def _options() -> list[str]:
    parameters = inspect.signature(load).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


@contextmanager
def _one_load_at_a_time() -> Iterator[None]:
    while not _loads.acquire(timeout=_TICK):
        pass
    try:
        yield
    finally:
        _loads.release()


def _make_room(
    plan: Callable[[Mapping[str, int] | None], MemoryPlan], old: Model | None, force: bool
) -> MemoryPlan:
    """The plan to load by; unloads the model to be replaced where both do not fit together."""
    planned = plan(None)
    if planned.fits or force:
        return planned
    if old is None or not old.loaded:
        return planned.require()
    planned = plan(old._free_without()).require()
    old._retire(_REPLACED)
    return planned


def _default_context(config: Any) -> int:
    return min(4096, memory.context_limit(config) or 4096)


def _checked_name(name: str | None, ref: catalog.Ref) -> str:
    if name is None:
        # "." and the like have no last part of their own.
        return Path(ref).name.strip(".") or Path(ref).absolute().resolve().name
    if not isinstance(name, str) or not name.strip():
        raise OptionError(f"name={name!r}: give a word to call the model by.")
    return name


def _check_chunk(prefill_chunk: Any) -> None:
    whole = isinstance(prefill_chunk, int) and not isinstance(prefill_chunk, bool)
    if not whole or prefill_chunk < 1:
        raise OptionError(f"prefill_chunk={prefill_chunk!r}: give a number of tokens, 1 or more.")


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
            model._resident.engine.close(timeout=5.0)
