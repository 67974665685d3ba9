"""Model: the handle a person holds on a loaded model.

The handle does not own the weights: `Resident` does, and `Model.unload` empties it in place, so
that the memory comes back whatever else in a notebook still refers to the handle.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, overload

from inferkit import kernels, memory
from inferkit.catalog import Source
from inferkit.engine.compiling import Compilation, Compile, check_compile
from inferkit.engine.engine import Engine
from inferkit.engine.guesses import DRAFT, Guesser, Lookups, check_speculative
from inferkit.engine.request import Request, forked
from inferkit.engine.scheduler import Batching, check_batching
from inferkit.errors import ModelUnloadedError, OptionError, PromptError
from inferkit.exclusive import holding
from inferkit.footprint import WeightFormat, asked_format
from inferkit.generation import Generation, Generations
from inferkit.html import format_bytes, table
from inferkit.memory import MemoryPlan
from inferkit.progress import Progress
from inferkit.prompts import Encoder, is_one, is_one_conversation, options_of_each
from inferkit.quantize import unquantized
from inferkit.resident import Identity, Resident
from inferkit.sampling import SamplingParams

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]
Sampling = SamplingParams | Literal["model"] | None


class Model:
    """A loaded model. Made by `inferkit.load`; every method may be called from any thread.

    Whatever needs the weights raises ModelUnloadedError once they are gone, and ForkedProcessError
    in a fork of the process that loaded them.

    Attributes:
        name: The name it is loaded under in this process.
        source: Where its files are.
        ref: The reference it was loaded by.
        path: The local folder from which transformers could load the same weights.
        revision: The commit of a hub model.
        device: Its device; the first of several.
        devices: All its devices.
        dtype: Name of the dtype that it runs in.
        plan: The memory plan that it runs by.
    """

    def __init__(
        self,
        source: Source,
        resident: Resident,
        promised: Callable[[Model], int],
        named: Callable[[str], Model],
    ) -> None:
        identity = resident.identity
        self.name = resident.name
        self.source = source
        self.ref = source.ref
        self.path = source.path
        self.revision = source.revision
        self.devices = identity.devices
        self.device = identity.devices[0]
        self.dtype = identity.dtype
        self.plan = resident.plan
        self._resident: Resident | None = resident
        self._promised = promised
        self._named = named
        self._gone = f"was unloaded; ik.load({self.ref!r}) loads it again."
        self._ends = threading.Lock()
        self._change = threading.RLock()
        self._last: Generation | Generations | Request | None = None

    # -- state ----------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._resident is not None

    @property
    def last(self) -> Generation | Generations | None:
        """What the last generate, chat or stream call gave; kept when it was interrupted."""
        if isinstance(self._last, Request):
            self._last = self._last.result()
        return self._last

    @property
    def quantization(self) -> str:
        """The mode: "none", "int8", "nf4", "fp4", "int8wo" or "int4wo".

        Of a checkpoint that is stored quantized: the bitsandbytes mode, or transformers' name of
        the method, such as "gptq", "awq" or "compressed-tensors".
        """
        return self.plan.quantize

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Names of the layers that the mode leaves in the model's dtype; all of them in "none"."""
        return unquantized(self._parts.loaded.module)

    @property
    def batching(self) -> Batching:
        """The batching policy: "continuous", "static" or "off"."""
        return self._engine.batching

    @property
    def speculative(self) -> str:
        """How next tokens are guessed: "ngram", "draft:NAME", or "off"."""
        return self._parts.speculative

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
        return self._parts.fallback

    @property
    def compilation(self) -> Compilation:
        """How far the compiled decode step is: its ``status``, ``reason`` and ``wait()``."""
        return self._parts.compilation

    @property
    def kernels(self) -> str:
        """Whose products and attention compute it: "inferkit", "torch", or "torch: why"."""
        if self.dtype != "bfloat16" or "cpu" not in self.devices:
            return "torch"
        why = kernels.reason()
        return "inferkit" if why is None else f"torch: {why}"

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
            options: Any field of `SamplingParams`; ``seed`` and ``max_tokens`` may be lists, one
                entry per prompt.

        Returns:
            A Generation, or a list of them in the order of the prompts.

        Raises:
            OptionError: An option is unknown or out of range.
            PromptError: A prompt is empty or longer than the context.
            ModelUnloadedError: The model was unloaded.
        """
        arrival = time.perf_counter_ns()
        if is_one(prompt):
            params = self._params(sampling, options)
            done = self._run([self._request(prompt, params, arrival)])
            self._last = done[0]
        else:
            done = self._run(self._requests(list(prompt), sampling, options, arrival))
            self._last = done
        self._tell(done)
        return self._last

    def stream(self, prompt: Prompt, *, sampling: Sampling = None, **options: Any) -> Iterator[str]:
        """Yield pieces of text as they come; leaving the loop early cancels the request.

        Arguments and errors as for `generate`; an error while it runs is raised after the last
        piece. The Generation is in ``model.last`` afterwards.
        """
        pieces = self._pieces(self.submit(prompt, sampling=sampling, **options))
        next(pieces)  # from here on, dropping the iterator cancels the request
        return pieces

    @overload
    def submit(self, prompt: str, *, sampling: Sampling = ..., **options: Any) -> Request: ...
    @overload
    def submit(
        self, prompt: Sequence[str], *, sampling: Sampling = ..., **options: Any
    ) -> list[Request]: ...
    @overload
    def submit(
        self, prompt: Sequence[int], *, sampling: Sampling = ..., **options: Any
    ) -> Request: ...
    def submit(
        self, prompt: Any, *, sampling: Sampling = None, **options: Any
    ) -> Request | list[Request]:
        """Queue a prompt and return at once; arguments and errors as for `generate`.

        The prompts of a list arrive at one moment, so that a static batch is formed of them.
        """
        arrival = time.perf_counter_ns()
        if not is_one(prompt):
            requests = self._requests(list(prompt), sampling, options, arrival)
            self._engine.submit(requests)
            return requests
        request = self._request(prompt, self._params(sampling, options), arrival)
        self._engine.submit([request])
        return request

    @overload
    def chat(
        self, messages: Conversation, *, sampling: Sampling = ..., **options: Any
    ) -> Generation: ...
    @overload
    def chat(
        self, messages: Sequence[Conversation], *, sampling: Sampling = ..., **options: Any
    ) -> Generations: ...
    def chat(
        self, messages: Any, *, sampling: Sampling = None, **options: Any
    ) -> Generation | Generations:
        """Answer a conversation, in the format of the model's chat template; or several.

        Args:
            messages: ``[{"role": "user", "content": "hi"}, ...]``, or a list of such lists, which
                are batched by the engine.
            sampling: As for `generate`.
            options: As for `generate`.

        Raises:
            PromptError: The model has no chat template, or the messages do not suit it.
        """
        arrival = time.perf_counter_ns()
        done = self._run(self._chat_requests(messages, sampling, options, arrival))
        self._last = done[0] if is_one_conversation(messages) else done
        self._tell(done)
        return self._last

    @overload
    def submit_chat(
        self, messages: Conversation, *, sampling: Sampling = ..., **options: Any
    ) -> Request: ...
    @overload
    def submit_chat(
        self, messages: Sequence[Conversation], *, sampling: Sampling = ..., **options: Any
    ) -> list[Request]: ...
    def submit_chat(
        self, messages: Any, *, sampling: Sampling = None, **options: Any
    ) -> Request | list[Request]:
        """Queue a conversation and return at once; arguments as for `chat`.

        Several arrive at one moment, so that a static batch is formed of them.
        """
        requests = self._chat_requests(messages, sampling, options, time.perf_counter_ns())
        self._engine.submit(requests)
        return requests[0] if is_one_conversation(messages) else requests

    # -- changing -------------------------------------------------------------------------------

    def configure(
        self,
        *,
        batching: Batching | None = None,
        max_batch: int | None = None,
        context: int | None = None,
        compile: Compile | None = None,
        speculative: str | None = None,
        **unknown: Any,
    ) -> Model:
        """Change how requests are batched; what is not given stays.

        The policy holds at once, for requests that wait too. A new ``max_batch`` or ``context``
        needs a new KV cache: requests that run finish first, then those that wait go on. Where a
        model is split over devices and the larger cache does not fit beside its layers, these are
        placed anew, and read again as `quantize` does. ``compile`` holds from the next step on, or
        as soon as the code is there: see ``compilation``.

        ``speculative="ngram"`` has the next tokens guessed by what followed the same tokens before,
        in prompt and output, and checks up to eight guesses in one pass (prompt lookup decoding).
        Every token is chosen as it would have been, drawn ones too, but that a wider pass may round
        otherwise. Texts that quote or repeat come sooner; ``gen.latency.acceptance_rate`` tells how
        often the guesses were right. It is off unless asked for: where the processor is busy with
        one token already, a pass over several takes longer than it saves. Requests with a
        repetition penalty, and models that run one request at a time, guess nothing.
        ``speculative="draft:NAME"`` has the loaded model NAME guess: a smaller one with the same
        vocabulary, over a KV cache of its own that is in no plan. While that one serves requests
        itself, and once it is unloaded, nothing is guessed.

        Raises:
            OptionError: An unknown option or policy, a batch below 1, or a context that the model
                does not have.
            DoesNotFitError: The larger KV cache does not fit; nothing has changed.
            OutOfMemoryError: It could not be allocated all the same; nothing has changed.
            GenerationError: The engine has stopped (for one, as even the old cache could not be had
                again), or this is its own thread.
            ModelUnloadedError: The model was unloaded, before or while this waited.
            ForkedProcessError: This process is a fork of the one that loaded the model.
        """
        memory.check_known(unknown, self.configure)
        check_batching(
            self.batching if batching is None else batching,
            self.max_batch if max_batch is None else max_batch,
        )
        if compile is not None:
            check_compile(compile)
        if speculative is not None:
            check_speculative(speculative)
        others = speculative if speculative != self.speculative else None
        guesser = self._guesser(others) if others else None  # may raise, while nothing has changed
        self._become(max_batch=max_batch, context=context)
        if compile is not None:
            with self._changing():
                self._parts.set_compile(compile)
        if batching is not None:
            self._engine.set_batching(batching)
        if others:
            self._engine.guesser = guesser
        self._engine.changed()
        return self

    def _guesser(self, speculative: str) -> Guesser | None:
        if speculative == "off":
            return None
        if speculative == "ngram":
            return Lookups()
        return self._parts.guess_with(self._named(speculative.removeprefix(DRAFT))._parts)

    def quantize(
        self,
        mode: str,
        *,
        double_quant: bool = False,
        compute_dtype: Any = "auto",
        progress: Progress = True,
    ) -> Model:
        """Change the precision of the weights in place: to "nf4", for one, and back to "none".

        The weights are read again from their files, in the place of those in memory, so that both
        are never there; "none" gives the first weights bit for bit. Requests that run finish
        first; those that wait go on in the new mode. An interrupt or a failure on the way brings
        back the mode before. What stays unquantized is in `unquantized`.

        Args:
            mode: "none"; what bitsandbytes does: "int8", 8-bit integers (LLM.int8(),
                arXiv:2208.07339), "nf4", 4-bit NormalFloat (QLoRA, arXiv:2305.14314), "fp4", 4-bit
                floating point; or, on a CPU, what torch's weight-only kernels do, the output
                embeddings included: "int8wo", symmetric 8-bit integers with a scale per output,
                "int4wo", asymmetric 4-bit integers with scale and zero per 32 weights.
            double_quant: Quantize the scales of a 4-bit mode again, which saves some 0.4 bits per
                weight (QLoRA, section 3); not on a CPU with AVX-512 BF16, whose kernels unpack the
                scales when they are first used.
            compute_dtype: The dtype that 4-bit weights are unpacked to for each matmul; "auto" is
                that of the model.
            progress: Show progress bars, or call this with (what, done, total). What it raises ends
                the work as an interrupt does.

        Raises:
            OptionError: An unknown mode, one that the devices have no kernels for, a detail that
                the mode does not have, or a checkpoint that is stored quantized.
            DoesNotFitError: The mode needs more memory than there is; nothing has changed.
            LoadError, DamagedFileError: The files cannot be read; the mode before is back.
            ModelUnloadedError: The model was unloaded, before or while this waited.
        """
        self._become(format=self._asked(mode, double_quant, compute_dtype), progress=progress)
        self._engine.changed()
        return self

    def unload(self) -> None:
        """Cancel all requests and give the memory back to the device. Safe to call twice."""
        self._retire(self._gone)

    # -- within ---------------------------------------------------------------------------------

    def _retire(self, why: str) -> None:
        """`unload`; ``why`` ends what the handle says of itself from now on."""
        with self._ends:
            resident, self._resident = self._resident, None
            if resident is not None:
                self._gone = why
        if resident is not None:
            resident.release()

    @property
    def _parts(self) -> Resident:
        resident = self._resident
        if resident is None:
            raise ModelUnloadedError(f"The model {self.name!r} {self._gone}")
        if os.getpid() != resident.pid:
            raise forked(f"The model {self.name!r} was loaded", resident.pid)
        return resident

    @property
    def _engine(self) -> Engine:
        return self._parts.engine

    def _params(self, sampling: Sampling, options: Mapping[str, Any]) -> SamplingParams:
        base = self.default_sampling if sampling == "model" else sampling
        if base is not None and not isinstance(base, SamplingParams):
            raise OptionError(
                f"sampling={sampling!r}: give a SamplingParams, 'model' for the model's own "
                "defaults, or nothing."
            )
        return SamplingParams.of(options, base)

    def _requests(
        self, prompts: list[Any], sampling: Sampling, options: Mapping[str, Any], arrival: int
    ) -> list[Request]:
        if not prompts:
            raise PromptError("The list of prompts is empty; give one prompt or more.")
        each = [self._params(sampling, o) for o in options_of_each(options, len(prompts))]
        return [self._request(p, o, arrival) for p, o in zip(prompts, each, strict=True)]

    def _request(self, prompt: Any, params: SamplingParams, arrival: int) -> Request:
        parts = self._parts
        text = prompt if isinstance(prompt, str) else None
        return parts.request(text, self._encoder(parts).prompt(prompt), params, arrival)

    def _chat_requests(
        self, messages: Any, sampling: Sampling, options: Mapping[str, Any], arrival: int
    ) -> list[Request]:
        several = [messages] if is_one_conversation(messages) else list(messages)
        parts = self._parts
        encoder = self._encoder(parts)
        each = [self._params(sampling, o) for o in options_of_each(options, len(several))]
        return [
            parts.request(*encoder.chat(conversation), params, arrival)
            for conversation, params in zip(several, each, strict=True)
        ]

    def _encoder(self, parts: Resident) -> Encoder:
        tokenizer = parts.loaded.tokenizer
        if tokenizer is None:  # unloaded by another thread since `parts` was read
            raise ModelUnloadedError(f"The model {self.name!r} {self._gone}")
        return Encoder(
            model=self.name,
            tokenizer=tokenizer,
            vocab_size=parts.loaded.vocab_size,
            context=parts.engine.context,
            max_context=self.plan.max_context,
        )

    def _run(self, requests: list[Request]) -> Generations:
        """Submit and wait for all; on an interrupt cancel them and keep what they have."""
        submitted = False
        try:
            self._engine.submit(requests)
            submitted = True
            return Generations(r.result() for r in requests)
        except KeyboardInterrupt:
            for r in requests:
                r.cancel()
            if not submitted:
                raise
        return Generations(r.result() for r in requests)

    def _tell(self, done: Generations) -> None:
        """Warn, in the name of who called us, of what did not run to its end."""
        cut = [gen for gen in done if gen.finish_reason == "cancelled"]
        if cut:
            tokens = sum(len(gen.token_ids) for gen in done)
            warnings.warn(
                f"{len(cut)} of {len(done)} requests were cancelled; the {tokens} tokens that were "
                "generated are kept.",
                stacklevel=3,
            )
        for gen in done:
            if gen.error is not None:
                warnings.warn(
                    f"A request failed: {gen.error} (see .error of the generation)", stacklevel=3
                )

    def _pieces(self, request: Request) -> Iterator[str]:
        try:
            yield ""  # see `stream`
            yield from request
        finally:
            # Without a wait: a generator that is dropped may be closed in any thread.
            if not request.done:
                request.cancel()
            self._last = request

    def _become(
        self,
        *,
        format: WeightFormat | None = None,
        max_batch: int | None = None,
        context: int | None = None,
        force: bool = False,
        progress: Progress = False,
    ) -> None:
        """Change weights, KV cache or both at once; what is not given stays.

        Args:
            format: Of the weights.
            max_batch: Rows of the KV cache.
            context: Tokens in a row.
            force: Although the plan says that it does not fit.
            progress: Show progress bars, or call this with (what, done, total).
        """
        with self._changing():
            parts = self._parts
            rows = self.max_batch if max_batch is None else max_batch
            length = self.context if context is None else context
            identity = parts.identity
            if format is not None:
                identity = replace(identity, format=format)
            reads = identity != parts.identity
            if not reads and (rows, length) == (self.max_batch, self.context):
                return
            kept = None if reads else self.plan.device_map
            plan = self._planned(identity, rows, length, kept)
            if not (reads or plan.fits or plan.within(self.plan)):
                moved = self._planned(identity, rows, length)
                if moved.fits and moved.device_map != kept:
                    plan, reads = moved, True
            if not (force or plan.within(self.plan)):
                plan.require()
            if reads:
                parts.exchange(plan, identity, progress=progress)
            else:
                parts.resize(plan)
            self.plan = plan

    def _changing(self) -> AbstractContextManager[None]:
        """One change at a time; the wait for another's can be interrupted."""
        return holding(self._change)

    def _asked(
        self, mode: str, double_quant: bool = False, compute_dtype: Any = "auto"
    ) -> WeightFormat:
        """The format that is asked for; of a checkpoint that is stored quantized only its own."""
        kept = self.plan.format
        if kept.stored and mode == kept.mode and not double_quant and compute_dtype == "auto":
            return kept
        asked = asked_format(mode, double_quant, compute_dtype)
        if not kept.stored:
            return asked
        if not kept.covers(asked):
            raise OptionError(
                f"{self.ref!r} is stored quantized, as {str(kept)!r}, and its original weights are "
                f"not there to be read: it stays as it is. To run it in {str(asked)!r}, load the "
                "unquantized checkpoint."
            )
        return kept

    def _planned(
        self,
        identity: Identity,
        max_batch: int,
        context: int,
        device_map: Mapping[str, str] | None = None,
    ) -> MemoryPlan:
        """The plan for this model as another identity and size, in place of the present one.

        Where no ``device_map`` says that its modules stay where they are, they are placed anew.
        """
        parts = self._parts
        return memory.plan_config(
            parts.config,
            form=identity.format,
            context=context,
            max_batch=max_batch,
            devices=identity.devices,
            dtype=identity.dtype,
            model=self.ref,
            adjust=self._gain(),
            max_memory=dict(identity.max_memory),
            device_map=device_map,
            prefill_chunk=identity.prefill_chunk,
            trust_remote_code=identity.trust_remote_code,
        )

    def _gain(self) -> dict[str, int]:
        """What could be allocated per device, beside what is free now, if this model were gone.

        Less what other models on the CPU were promised. Of the KV cache there, pages that no
        request has used are free already, and which ones were used nobody counts, so that none
        count here: a larger cache may be refused that would just fit, one no larger never is.
        """
        gain = {"cpu": -self._promised(self)}
        for device in self.plan.devices:
            if device.name == "disk":
                continue  # nothing of it is taken from what is free
            cache = 0 if device.name == "cpu" else device.kv_cache
            gain[device.name] = gain.get(device.name, 0) + device.weights + cache
        return gain

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("device", ", ".join(self.devices)),
            ("dtype", self.dtype),
            ("quantization", str(self.plan.format)),
        ]
        resident = self._resident
        if resident is None:
            return [*facts, ("state", "unloaded")]
        engine = resident.engine
        batching = f"{engine.batching}, at most {engine.max_batch}"
        if resident.fallback:
            batching = f"one at a time: {resident.fallback}"
        return [
            *facts,
            ("batching", batching),
            ("context", str(engine.context)),
            ("decode step", str(resident.compilation)),
            *([("speculation", resident.speculative)] if resident.speculative != "off" else []),
            ("weights", format_bytes(self.plan.weights)),
            ("KV cache", format_bytes(self.plan.kv_cache)),
            ("requests", f"{engine.running} running, {engine.waiting} waiting"),
        ]

    def __repr__(self) -> str:
        facts = ", ".join(f"{k}={v}" for k, v in self._facts())
        return f"<Model {self.name!r}: {facts}>"

    def _repr_html_(self) -> str:
        return table(("model", self.name), self._facts())
