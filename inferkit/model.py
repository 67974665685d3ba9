"""Model: the handle a person holds; `load` makes one, and loading twice gives the same one.

The handle does not own the weights: this module's table of loaded models does. Unloading therefore
frees the memory whatever else in a notebook still refers to the handle.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from inferkit import catalog, memory
from inferkit.devices import free_memory, resolve_device, resolve_dtype
from inferkit.engine.detokenize import Detokenizer
from inferkit.engine.engine import Engine
from inferkit.engine.request import Request
from inferkit.engine.scheduler import Batching, check_batching
from inferkit.engine.serving import make_runner
from inferkit.errors import ModelUnloadedError, OptionError, PromptError
from inferkit.generation import Generation, Generations, Settings
from inferkit.html import format_bytes, table, text_table
from inferkit.loading import Loaded, load_files, release
from inferkit.memory import MemoryPlan
from inferkit.quantize import check_mode
from inferkit.sampling import SamplingParams, unknown_option

Prompt = str | Sequence[int]
Sampling = SamplingParams | Literal["model"] | None


@dataclass(slots=True)
class _Serving:
    """What a loaded model is made of; dropped as a whole when it is unloaded."""

    loaded: Loaded
    engine: Engine


@dataclass(frozen=True, slots=True)
class _Identity:
    """What two loads must share for the second to need no new weights."""

    path: Path
    revision: str | None
    devices: tuple[str, ...]
    dtype: str
    quantize: str
    trust_remote_code: bool
    prefix_reuse: bool
    prefill_chunk: int


_table: dict[str, Model] = {}
_serving: dict[int, _Serving] = {}
_lock = threading.RLock()


class Model:
    """A loaded model. Made by `inferkit.load`; every method may be called from any thread.

    Attributes:
        name: The name it is loaded under in this process.
        ref: The reference it was loaded by.
        path: The local folder from which transformers could load the same weights.
        revision: The commit of a hub model.
        device: Its device; the first of several.
        devices: All its devices.
        dtype: Name of the dtype that it runs in.
        quantization: "none", "int8", "nf4" or "fp4".
        plan: The memory plan that it was loaded by.
        last: What the last generate, chat or stream call gave; kept when it was interrupted.
    """

    def __init__(self, name: str, source: catalog.Source, plan: MemoryPlan, identity: _Identity):
        self.name = name
        self.ref = source.ref
        self.path = source.path
        self.revision = source.revision
        self.devices = identity.devices
        self.device = identity.devices[0]
        self.dtype = identity.dtype
        self.quantization = identity.quantize
        self.plan = plan
        self.last: Generation | Generations | None = None
        self._identity = identity

    # -- state ----------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return id(self) in _serving

    @property
    def batching(self) -> Batching:
        """The batching policy: "continuous", "static" or "off"."""
        return self._engine.batching

    @property
    def max_batch(self) -> int:
        """Most requests that run at once."""
        return self._engine.max_batch

    @property
    def context(self) -> int:
        """Most tokens of prompt and output together."""
        return self._engine.context

    @property
    def running(self) -> int:
        """Requests that run now."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._engine.waiting

    @property
    def fallback(self) -> str | None:
        """Why requests run one at a time whatever the policy, or None where they share batches."""
        return getattr(self._engine.runner, "reason", None)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._parts.loaded.tokenizer

    @property
    def default_sampling(self) -> SamplingParams:
        """The sampling that the model's authors recommend (generation_config.json)."""
        return SamplingParams.of(self._parts.loaded.defaults)

    # -- generating -----------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, *, sampling: Sampling = ..., **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, sampling: Sampling = ..., **options: Any
    ) -> Generations: ...
    @overload
    def generate(
        self, prompt: Sequence[int], *, sampling: Sampling = ..., **options: Any
    ) -> Generation: ...
    def generate(
        self, prompt: Any, *, sampling: Sampling = None, **options: Any
    ) -> Generation | Generations:
        """Generate and wait for the end. A list of prompts is batched by the engine.

        An interrupt (Ctrl-C, the kernel's stop button) cancels the requests and returns what they
        have so far, with ``finish_reason="cancelled"``. A request that fails while it runs returns
        with ``finish_reason="error"`` and its ``error``, so that its text and the others are kept.

        Args:
            prompt: Text or token ids; or a list of either.
            sampling: Parameters to start from; "model" for the model's own defaults.
            options: Any field of `SamplingParams`; ``seed`` may be a list, one per prompt.

        Returns:
            A Generation, or a list of them in the order of the prompts.

        Raises:
            OptionError: An option is unknown or out of range.
            PromptError: A prompt is empty or longer than the context.
            ModelUnloadedError: The model was unloaded.
        """
        if _is_one(prompt):
            return self._finish([self.submit(prompt, sampling=sampling, **options)])[0]
        prompts = list(prompt)
        if not prompts:
            raise PromptError("The list of prompts is empty; give one prompt or more.")
        each = _per_prompt(options, len(prompts))
        requests = self._submit_all(
            [
                self._request(p, self._params(sampling, o))
                for p, o in zip(prompts, each, strict=True)
            ]
        )
        return self._finish(requests, several=True)

    def stream(self, prompt: Prompt, *, sampling: Sampling = None, **options: Any) -> Iterator[str]:
        """Yield pieces of text as they come; leaving the loop early cancels the request.

        Arguments and errors as for `generate`; an error while it runs is raised after the last
        piece. The Generation is in ``model.last`` afterwards.
        """
        return self._pieces(self.submit(prompt, sampling=sampling, **options))

    def submit(self, prompt: Prompt, *, sampling: Sampling = None, **options: Any) -> Request:
        """Queue a prompt and return at once; arguments and errors as for `generate`."""
        return self._submit_all([self._request(prompt, self._params(sampling, options))])[0]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, sampling: Sampling = None, **options: Any
    ) -> Generation:
        """Answer a conversation, in the format of the model's chat template.

        Args:
            messages: ``[{"role": "user", "content": "hi"}, ...]``.
            sampling: As for `generate`.
            options: As for `generate`.

        Raises:
            PromptError: The model has no chat template, or the messages do not suit it.
        """
        return self._finish([self.submit_chat(messages, sampling=sampling, **options)])[0]

    def submit_chat(
        self, messages: Sequence[Mapping[str, Any]], *, sampling: Sampling = None, **options: Any
    ) -> Request:
        """Queue a conversation and return at once; arguments as for `chat`."""
        text = self._render(messages)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        request = self._request(ids, self._params(sampling, options))
        request.prompt = text
        return self._submit_all([request])[0]

    # -- changing -------------------------------------------------------------------------------

    def configure(
        self,
        *,
        batching: Batching | None = None,
        max_batch: int | None = None,
        context: int | None = None,
    ) -> Model:
        """Change how requests are batched; what is not given stays.

        The policy holds at once, for requests that wait too. A new ``max_batch`` or ``context``
        needs a new KV cache: requests that run finish first, then those that wait go on.

        Raises:
            OptionError: An unknown policy, a batch below 1, or a context the model does not have.
            DoesNotFitError: The larger KV cache does not fit; nothing has changed.
        """
        engine = self._engine
        policy = batching or engine.batching
        rows, length = max_batch or engine.max_batch, context or engine.context
        if max_batch is not None or context is not None:
            rows = engine.max_batch if max_batch is None else max_batch
            length = engine.context if context is None else context
        check_batching(policy, rows)
        if (rows, length) != (engine.max_batch, engine.context):
            self.plan = self._plan_again(rows, length)
            engine.resize(rows, length)
        if policy != engine.batching:
            engine.set_batching(policy)
        return self

    def unload(self) -> None:
        """Cancel all requests and give the memory back to the device. Safe to call twice."""
        with _lock:
            parts = _serving.pop(id(self), None)
            if _table.get(self.name) is self:
                del _table[self.name]
        if parts is not None:
            _dismantle(parts)

    # -- within ---------------------------------------------------------------------------------

    @property
    def _parts(self) -> _Serving:
        parts = _serving.get(id(self))
        if parts is None:
            raise ModelUnloadedError(
                f"The model {self.name!r} was unloaded; ik.load({self.ref!r}) loads it again."
            )
        return parts

    @property
    def _engine(self) -> Engine:
        return self._parts.engine

    def _settings(self) -> Settings:
        engine = self._engine
        return Settings(
            model=self.name,
            device=", ".join(self.devices),
            dtype=self.dtype,
            quantization=self.quantization,
            batching=engine.batching,
            max_batch=engine.max_batch,
        )

    def _params(self, sampling: Sampling, options: Mapping[str, Any]) -> SamplingParams:
        base = self.default_sampling if sampling == "model" else sampling
        if base is not None and not isinstance(base, SamplingParams):
            raise OptionError(
                f"sampling={sampling!r}: give a SamplingParams, 'model' for the model's own "
                "defaults, or nothing."
            )
        return SamplingParams.of(options, base)

    def _request(self, prompt: Any, params: SamplingParams) -> Request:
        engine = self._engine
        ids = self._encode(prompt)
        return Request(
            prompt if isinstance(prompt, str) else None,
            ids,
            params,
            self._settings(),
            Detokenizer(self.tokenizer, ids, params.stop),
            engine.wake,
        )

    def _submit_all(self, requests: list[Request]) -> list[Request]:
        self._engine.submit(requests)
        return requests

    def _encode(self, prompt: Any) -> tuple[int, ...]:
        """The prompt's token ids, checked against vocabulary and context."""
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("The prompt is empty; give at least one character.")
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = list(prompt)
            vocab = self._parts.loaded.vocab_size
            wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]
            wrong += [] if wrong else [i for i in ids if not 0 <= i < vocab]
            if wrong:
                raise PromptError(
                    f"{wrong[0]!r} is no token id of {self.name!r}: give text, or integers from 0 "
                    f"to {vocab - 1}."
                )
        if not ids:
            raise PromptError("The prompt has no tokens; give at least one.")
        if len(ids) >= self.context:
            raise PromptError(
                f"The prompt has {len(ids)} tokens, and the context of {self.context} must hold it "
                f"and at least one more. Shorten it, or model.configure(context={len(ids) + 256})."
            )
        return tuple(ids)

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise PromptError(
                f"{self.name!r} has no chat template: it is a base model that continues text. "
                "Use model.generate(text), or set model.tokenizer.chat_template."
            )
        if not messages:
            raise PromptError("The conversation is empty; give at least one message.")
        try:
            return tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the model's authors
            raise PromptError(
                f"The chat template of {self.name!r} refuses these messages: {error}. Each is a "
                'dict as {"role": "user", "content": "hi"}.'
            ) from None

    def _finish(self, requests: list[Request], *, several: bool = False) -> Any:
        """Wait for all; on an interrupt cancel them and keep what they have."""
        try:
            done = Generations(r.result() for r in requests)
        except KeyboardInterrupt:
            for r in requests:
                r.cancel()
            done = Generations(r.result() for r in requests)
            tokens = sum(len(g.token_ids) for g in done)
            _tell(f"Interrupted: {tokens} tokens that were generated are kept.")
        for gen in done:
            if gen.error is not None:
                _tell(f"A request failed: {gen.error} (see .error of the generation)")
        self.last = done if several else done[0]
        return done

    def _pieces(self, request: Request) -> Iterator[str]:
        try:
            yield from request
        finally:
            if not request.done:
                request.cancel()
            self.last = request.result()

    def _plan_again(self, max_batch: int, context: int) -> MemoryPlan:
        """The plan at another batch and context; the memory of the present one counts as free."""
        identity = self._identity
        plan = memory.plan_config(
            self._parts.loaded.module.config,
            quantize=self.plan.quantize,
            context=context,
            max_batch=max_batch,
            devices=identity.devices,
            dtype=identity.dtype,
            model=self.ref,
            free=_free_without(self),
            prefill_chunk=identity.prefill_chunk,
            trust_remote_code=identity.trust_remote_code,
        )
        return plan.require()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("device", ", ".join(self.devices)),
            ("dtype", self.dtype),
            ("quantization", self.quantization),
        ]
        if not self.loaded:
            return [*facts, ("state", "unloaded")]
        batching = f"{self.batching}, at most {self.max_batch}"
        if self.fallback:
            batching = f"one at a time: {self.fallback}"
        return [
            *facts,
            ("batching", batching),
            ("context", str(self.context)),
            ("weights", format_bytes(self.plan.weights)),
            ("KV cache", format_bytes(self.plan.kv_cache)),
            ("requests", f"{self.running} running, {self.waiting} waiting"),
        ]

    def __repr__(self) -> str:
        facts = ", ".join(f"{k}={v}" for k, v in self._facts())
        return f"<Model {self.name!r}: {facts}>"

    def _repr_html_(self) -> str:
        return table(("model", self.name), self._facts())


class ModelTable(list[Model]):
    """The loaded models, shown as a table."""

    _HEADER = ("name", "device", "dtype", "quantization", "batching", "weights", "running")

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for m in self:
            if m.loaded:
                yield (
                    m.name,
                    ", ".join(m.devices),
                    m.dtype,
                    m.quantization,
                    f"{m.batching} ({m.max_batch})",
                    format_bytes(m.plan.weights),
                    m.running,
                )

    def __repr__(self) -> str:
        return text_table(self._HEADER, self._rows()) if self else "No model is loaded."

    def _repr_html_(self) -> str:
        if not self:
            return "<i>No model is loaded: <code>ik.load('demo')</code> loads one.</i>"
        return table(self._HEADER, self._rows())


def models() -> ModelTable:
    """The models that are loaded in this process, in the order of loading."""
    return ModelTable(_table.values())


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

    Raises:
        OptionError, DeviceError, ModelNotFoundError, DamagedFileError, UnsupportedModelError:
            Before anything is read.
        DoesNotFitError: The plan says no, before a weight is read.
        LoadError: Loading failed half way; what was read is released.
    """
    if unknown:
        raise OptionError(unknown_option(next(iter(unknown)), _LOAD_OPTIONS))
    check_batching(batching, max_batch)
    check_mode(quantize)
    _check_chunk(prefill_chunk)
    devices = tuple(resolve_device(device))
    config = catalog.config(ref, revision, trust_remote_code=trust_remote_code)
    resolved = resolve_dtype(dtype, list(devices), memory.stored_dtype(config))
    name = _checked_name(name, ref)
    with _lock:
        source = catalog.resolve(ref, revision, progress=progress)
        identity = _Identity(
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
        if old is not None and old.loaded and old._identity == identity:
            return _changed(old, config, batching, max_batch, context)

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
        model = Model(name, source, planned, identity)
        _serving[id(model)] = _serve(model, source, planned, batching)
        if old is not None:
            old.unload()
        _table[name] = model
        return model


_LOAD_OPTIONS = ["device", "dtype", "quantize", "batching", "max_batch", "context", "revision", "name", "trust_remote_code", "force", "prefix_reuse", "prefill_chunk", "progress"]


def _changed(
    model: Model, config: Any, batching: Batching, max_batch: int, context: int | None
) -> Model:
    limit = memory.context_limit(config)
    wanted = context if context is not None else min(4096, limit or 4096)
    return model.configure(batching=batching, max_batch=max_batch, context=wanted)


def _make_room(
    plan: Callable[[Mapping[str, int] | None], MemoryPlan], old: Model | None, force: bool
) -> MemoryPlan:
    """The plan to load by; unloads the model to be replaced where both do not fit together."""
    planned = plan(None)
    if planned.fits or force:
        return planned
    if old is None or not old.loaded:
        return planned.require()
    planned = plan(_free_without(old)).require()
    old.unload()
    return planned


def _free_without(model: Model) -> dict[str, int]:
    """Free memory per device if the model were gone."""
    held = {d.name: d.weights + d.kv_cache for d in model.plan.devices}
    return {name: free_memory(name) + held.get(name, 0) for name in model.devices}


def _serve(model: Model, source: catalog.Source, plan: MemoryPlan, batching: Batching) -> _Serving:
    loaded = load_files(source, plan, trust_remote_code=model._identity.trust_remote_code)
    try:
        runner = make_runner(
            loaded.module,
            slots=plan.max_batch,
            context=plan.context,
            prefill_chunk=model._identity.prefill_chunk,
            dtype=plan.dtype,
            trust_remote_code=model._identity.trust_remote_code,
        )
    except BaseException:
        release(loaded)
        raise
    engine = Engine(
        runner,
        end_ids=loaded.end_ids,
        context=plan.context,
        batching=batching,
        max_batch=plan.max_batch,
        prefix_reuse=model._identity.prefix_reuse,
        settings=model._settings,
        name=model.name,
    )
    return _Serving(loaded, engine)


def _dismantle(parts: _Serving) -> None:
    parts.engine.close()
    parts.engine.runner.release()
    release(parts.loaded)


def _checked_name(name: str | None, ref: catalog.Ref) -> str:
    if name is None:
        return Path(str(ref)).name
    if not isinstance(name, str) or not name.strip():
        raise OptionError(f"name={name!r}: give a word to call the model by.")
    return name


def _check_chunk(prefill_chunk: Any) -> None:
    if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        raise OptionError(f"prefill_chunk={prefill_chunk!r}: give a number of tokens, 1 or more.")


def _is_one(prompt: Any) -> bool:
    """Whether this is one prompt: text, or a sequence of token ids."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence):
        raise PromptError(
            f"A prompt is text or a list of token ids, or a list of those; this is a "
            f"{type(prompt).__name__}."
        )
    return bool(prompt) and isinstance(prompt[0], int)


def _per_prompt(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each prompt: ``seed`` may be given one by one."""
    seeds = options.get("seed")
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        return [dict(options)] * count
    if len(seeds) != count:
        raise OptionError(f"seed has {len(seeds)} entries for {count} prompts; give one for each.")
    return [{**options, "seed": s} for s in seeds]


def _tell(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@atexit.register
def _stop_engines() -> None:
    """End the threads before the interpreter tears torch down under them."""
    for parts in list(_serving.values()):
        parts.engine.close(timeout=5.0)
