"""Resident: a model in memory, with its tokenizer and the engine that works with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from inferkit.catalog import Source
from inferkit.engine.detokenize import Detokenizer
from inferkit.engine.engine import Engine
from inferkit.engine.request import Request
from inferkit.engine.scheduler import Batching
from inferkit.engine.sequential import SequentialRunner
from inferkit.engine.serving import make_runner
from inferkit.generation import Settings
from inferkit.loading import FileStates, Loaded, failure, load_files, release
from inferkit.memory import MemoryPlan
from inferkit.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Identity:
    """What two loads must share for the second to need no new weights."""

    path: Path
    files: FileStates
    revision: str | None
    devices: tuple[str, ...]
    dtype: str
    quantize: str
    trust_remote_code: bool
    prefix_reuse: bool
    prefill_chunk: int


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory. Its methods may be called from any thread.

    Attributes:
        name: The name it is loaded under.
        identity: What it was loaded as.
        loaded: Weights and tokenizer.
        engine: The thread that works with them.
        pid: The process that loaded it; a fork of it has no such thread.
    """

    name: str
    identity: Identity
    loaded: Loaded
    engine: Engine
    pid: int

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
            _settings(self.name, self.identity, self.engine),
            Detokenizer(self.loaded.tokenizer, ids, params.stop),
            self.engine.wake,
            arrival=arrival,
        )

    def release(self) -> None:
        """Cancel all requests, and empty the weights as soon as no step works with them."""

        def empty() -> None:
            self.engine.runner.release()
            release(self.loaded)

        self.engine.close(empty)


def take_in(
    name: str,
    source: Source,
    plan: MemoryPlan,
    identity: Identity,
    *,
    batching: Batching,
    progress: bool,
) -> Resident:
    """Read a model's weights and start its engine; what stops it on the way is released.

    Raises:
        DamagedFileError, LoadError, UnsupportedModelError: As for `inferkit.load`.
    """
    loaded = load_files(
        source, plan, trust_remote_code=identity.trust_remote_code, progress=progress
    )
    try:
        engine = _engine(name, loaded, plan, identity, batching)
        return Resident(name, identity, loaded, engine, os.getpid())
    except BaseException as error:
        release(loaded)
        problem = failure(error, source, plan)
    raise problem


def _engine(
    name: str, loaded: Loaded, plan: MemoryPlan, identity: Identity, batching: Batching
) -> Engine:
    runner = make_runner(
        loaded.module,
        slots=plan.max_batch,
        context=plan.context,
        prefill_chunk=identity.prefill_chunk,
        dtype=plan.dtype,
        trust_remote_code=identity.trust_remote_code,
    )
    engine = Engine(
        runner,
        end_ids=loaded.end_ids,
        context=plan.context,
        batching=batching,
        max_batch=plan.max_batch,
        prefix_reuse=identity.prefix_reuse,
        settings=lambda: _settings(name, identity, engine),
        name=name,
    )
    return engine


def _settings(name: str, identity: Identity, engine: Engine) -> Settings:
    """What a request runs under now; what cannot share a batch is honest about it."""
    alone = isinstance(engine.runner, SequentialRunner)
    return Settings(
        model=name,
        device=", ".join(identity.devices),
        dtype=identity.dtype,
        quantization=identity.quantize,
        batching="off" if alone else engine.batching,
        max_batch=1 if alone else engine.max_batch,
    )
