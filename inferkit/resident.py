"""Resident: a model in memory, with its tokenizer and the engine that works with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from inferkit.catalog import Source
from inferkit.engine.compiling import Compilation, Compile
from inferkit.engine.detokenize import Detokenizer
from inferkit.engine.drafts import Drafts
from inferkit.engine.engine import Engine
from inferkit.engine.request import Request
from inferkit.engine.runner import SlottedRunner
from inferkit.engine.scheduler import Batching
from inferkit.engine.sequential import SequentialRunner
from inferkit.engine.serving import make_runner
from inferkit.errors import GenerationError, LoadError, OptionError
from inferkit.footprint import WeightFormat
from inferkit.generation import Settings
from inferkit.loading import (
    FileStates,
    Loaded,
    failure,
    file_states,
    load_files,
    release,
    release_weights,
    weight_bytes,
)
from inferkit.memory import MemoryPlan
from inferkit.progress import Progress, tell_of_waiting
from inferkit.sampling import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Identity:
    """What two loads must share for the second to need no new weights."""

    path: Path
    files: FileStates
    revision: str | None
    devices: tuple[str, ...]
    max_memory: tuple[tuple[str, int], ...]
    dtype: str
    format: WeightFormat
    trust_remote_code: bool
    prefix_reuse: bool
    prefill_chunk: int


class Resident:
    """A model in memory. Its methods may be called from any thread.

    Args:
        name: The name it is loaded under.
        source: Where its files are.
        config: The transformers config, as the files have it.
        plan: What was planned for it.
        identity: What it was loaded as.
        loaded: Weights and tokenizer.
        batching: The policy to begin with.
        compile: Whether to compile the decode step: see `Compilation`.

    Attributes:
        engine: The thread that works with the weights.
        compilation: How far the compiled step is.
        pid: The process that loaded it; a fork of it has no such thread.
        reference: What it said in "none", where somebody compares its modes; see `reference.py`.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        config: Any,
        plan: MemoryPlan,
        identity: Identity,
        loaded: Loaded,
        batching: Batching,
        compile: Compile,
    ) -> None:
        self.name = name
        self.source = source
        self.config = config
        self.plan = plan
        self.identity = identity
        self.loaded = loaded
        self.pid = os.getpid()
        self.reference: Any = None
        self.engine = Engine(
            _runner(loaded, plan, identity),
            end_ids=loaded.end_ids,
            context=plan.context,
            batching=batching,
            max_batch=plan.max_batch,
            prefix_reuse=identity.prefix_reuse,
            settings=self._settings,
            name=name,
        )
        self.compile = compile
        try:
            self.compilation = Compilation(self.engine.runner, compile)
        except BaseException:  # an interrupt
            self.engine.close(self.engine.runner.release)
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of the KV cache, as measured on the tensors."""
        return weight_bytes(self.loaded) + self.engine.runner.nbytes

    @property
    def speculative(self) -> str:
        """How next tokens are guessed: "ngram", "draft:NAME", or "off"."""
        guesser = self.engine.guesser
        return "off" if guesser is None else guesser.name

    def guess_with(self, draft: Resident) -> Drafts:
        """A loaded model as the one that guesses next tokens of this one.

        Raises:
            OptionError: It is this one, has another vocabulary, or one of the two cannot batch.
        """
        if draft is self:
            raise OptionError(f"{self.name!r} cannot guess for itself: name another loaded model.")
        for resident in (self, draft):
            if resident.fallback is not None:
                raise OptionError(
                    f"{resident.name!r} runs one request at a time ({resident.fallback}), and "
                    "guesses are checked in batches."
                )
        own, its = self.loaded.tokenizer, draft.loaded.tokenizer
        if own.get_vocab() != its.get_vocab():
            raise OptionError(
                f"{draft.name!r} has another vocabulary than {self.name!r}, so that its tokens "
                "mean something else: choose a smaller model of the same family."
            )
        rows = self.loaded.module.get_input_embeddings().weight.shape[0]
        return Drafts(draft.name, draft.engine, self.engine, int(rows))

    @property
    def fallback(self) -> str | None:
        """Why requests run one at a time whatever the policy, or None where they share batches."""
        runner = self.engine.runner
        return runner.reason if isinstance(runner, SequentialRunner) else None

    def request(
        self, text: str | None, ids: tuple[int, ...], params: SamplingParams, arrival: int
    ) -> Request:
        """A request that came at ``arrival`` (ns), ready to be submitted to the engine."""
        return Request(
            text,
            ids,
            params,
            self._settings(),
            Detokenizer(self.loaded.tokenizer, ids, params.stop),
            self.engine.wake,
            arrival=arrival,
        )

    def resize(self, plan: MemoryPlan) -> None:
        """Give the engine a KV cache of the plan's batch and context: see `Engine.resize`."""
        self.engine.resize(plan.max_batch, plan.context)
        self.plan = plan

    def exchange(self, plan: MemoryPlan, identity: Identity, *, progress: Progress) -> None:
        """Read the weights again as ``identity`` says, in the place of those in memory.

        Requests that run finish first; those that wait go on afterwards. The weights in memory go
        first, so that there are never two. Whatever stops the reading (an interrupt, lack of
        memory), the former ones are read back.

        Raises:
            ModelError: The files are no longer those that were loaded; nothing has changed.
            DamagedFileError, LoadError: Reading failed; the former weights are back.
        """
        if file_states(self.source) != self.identity.files:
            raise LoadError(
                f"The files of {self.source.ref!r} have changed since they were loaded, so that "
                "their weights cannot be read again; ik.load them under another name."
            )
        with self.engine.held(partial(tell_of_waiting, progress)):
            former = self.plan, self.identity
            try:
                self._read(plan, identity, progress)
                return
            except BaseException as error:
                problem = failure(error, self.source, plan)
            with uninterrupted():
                self._put_back(*former)
        raise problem

    def _read(self, plan: MemoryPlan, identity: Identity, progress: Progress) -> None:
        self.compilation.stop()
        self.engine.runner.release()
        release_weights(self.loaded)
        loaded = load_files(
            self.source, plan, trust_remote_code=identity.trust_remote_code, progress=progress
        )
        self.loaded, self.plan, self.identity = loaded, plan, identity
        self.engine.adopt(_runner(loaded, plan, identity), plan.max_batch, plan.context)
        self._begin_compiling()

    def set_compile(self, compile: Compile) -> None:
        """Compile the decode step, unless that was done or is, or run the architecture's code."""
        going_on = self.compilation.status != "eager"
        if not (going_on if compile else self.compile is False):
            self.compilation.stop()
            self.compile = compile
            self._begin_compiling()
        self.compile = compile

    def _begin_compiling(self) -> None:
        self.compilation = Compilation(self.engine.runner, self.compile)
        if self.engine.closed:  # meanwhile: `release` may have stopped the one before
            self.compilation.stop()

    def _put_back(self, plan: MemoryPlan, identity: Identity) -> None:
        try:
            self._read(plan, identity, progress=False)
        except Exception as error:
            problem = GenerationError(
                f"The weights of {self.name!r} could not be read back ({error}). Nothing can run "
                "on it: unload it, and load the model again with ik.load."
            )
            self.engine.give_up(problem)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        take: Callable[[int, int, torch.Tensor], None],
    ) -> None:
        """Give ``take`` the logits after every token of some sequences, part by part.

        Requests that run finish first; those that wait go on afterwards. An interrupt ends it.

        Args:
            sequences: Token ids, each shorter than the context.
            take: Called in this thread with the number of the sequence, the position of the part's
                first token in it, and the logits [tokens of the part, vocab].
        """
        with self.engine.held():
            try:
                for index, tokens in enumerate(sequences):
                    start = 0
                    for logits in self.engine.runner.score(tokens):
                        take(index, start, logits)
                        start += len(logits)
            finally:
                self.engine.forget()  # the row of the cache that it took

    def forget_prefixes(self) -> None:
        """Have the next requests find an empty cache, once what runs has finished."""
        with self.engine.held():
            self.engine.forget()

    def release(self) -> None:
        """Cancel all requests, and empty the weights as soon as no step works with them."""

        def empty() -> None:
            self.compilation.stop()
            self.engine.runner.release()
            release(self.loaded)

        self.reference = None
        self.engine.close(empty)

    def _settings(self) -> Settings:
        """What a request runs under now; what cannot share a batch is honest about it."""
        alone = self.fallback is not None
        return Settings(
            model=self.name,
            device=", ".join(self.identity.devices),
            dtype=self.identity.dtype,
            quantization=str(self.plan.format),
            batching="off" if alone else self.engine.batching,
            max_batch=1 if alone else self.engine.max_batch,
            speculative="off" if alone else self.speculative,
        )


def take_in(
    name: str,
    source: Source,
    config: Any,
    plan: MemoryPlan,
    identity: Identity,
    *,
    batching: Batching,
    compile: Compile,
    progress: Progress,
) -> Resident:
    """Read a model's weights and start its engine; what stops it on the way is released.

    Raises:
        DamagedFileError, LoadError, UnsupportedModelError: As for `inferkit.load`.
    """
    loaded = load_files(
        source, plan, trust_remote_code=identity.trust_remote_code, progress=progress
    )
    try:
        return Resident(name, source, config, plan, identity, loaded, batching, compile)
    except BaseException as error:
        release(loaded)
        problem = failure(error, source, plan)
    raise problem


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt (Ctrl-C, the kernel's stop button) back until the body is done."""
    ours = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if not ours or not callable(handler):  # interrupts do not come here, or are ignored
        yield
        return
    pressed: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: pressed.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(signal.SIGINT, pressed[0])


def _runner(
    loaded: Loaded, plan: MemoryPlan, identity: Identity
) -> SlottedRunner | SequentialRunner:
    return make_runner(
        loaded.module,
        slots=plan.max_batch,
        context=plan.context,
        prefill_chunk=identity.prefill_chunk,
        dtype=plan.dtype,
        trust_remote_code=identity.trust_remote_code,
    )
