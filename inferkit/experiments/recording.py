"""`record`: everything that happens to the models of this process, written down as it happens.

It costs the engine nothing: whoever submits a request leaves a note, and a thread reads, four times
a second, lists that only grow. Another hashes the models' files, while no request is on its way;
digests that are remembered are there from the beginning.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from inferkit import kernels, registry
from inferkit.engine.guesses import DRAFT
from inferkit.errors import InferkitError, OptionError, first_line
from inferkit.experiments import file as files
from inferkit.experiments import store
from inferkit.experiments.environment import environment, scrubbed
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import (
    ExperimentFile,
    Line,
    ModeEntry,
    ModelEntry,
    RanUnder,
    RequestEntry,
    Sampling,
)
from inferkit.lab import status
from inferkit.model import Model
from inferkit.progress import Progress

if TYPE_CHECKING:
    from inferkit.engine import Request

__all__ = ["Recording", "latest", "record"]

SUFFIX = ".inferkit.json"
_LOCAL = ("folder", "gguf")  # kinds of models whose references are paths
_TICK = 0.25  # seconds; a crash loses no more than that

_latest: Recording | None = None


def record(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    redact: bool = False,
    overwrite: bool = False,
    progress: Progress = True,
) -> Recording:
    """Record all requests to all models, and every change of mode, until the end of the block.

        with ik.record("nf4 against bf16") as exp:
            model.generate("Once upon a time")
        exp.summary()

    Requests submitted meanwhile count, whoever submits them: cells, magics, the panel. The file is
    written as it happens (its journal; see `inferkit.open`) and whole at the end. It has prompts
    and outputs with token ids, times, models with sha256 of their files, versions, hardware, git
    commit and the notebook's name; no environment variables, user names or folders.

    Args:
        name: What to call it.
        path: The file; None for one in the working directory that is called by the name.
        redact: Leave out prompts, outputs and what stops them; their lengths and times stay.
        overwrite: Replace a file that is there. Of a recording that was not brought to its end, the
            journal is kept under another name, which a warning says; one that is under way stays.
        progress: Show a bar while the model's files are hashed, or call this with (what, done,
            total).

    Raises:
        OptionError: There is a file already, or it is being recorded to; there is no folder for it,
            or no name; the name is too long.
        ExperimentError: The file cannot be written.
    """
    return Recording(name, _path(name, path), redact, overwrite, progress)


def latest() -> Recording | None:
    """The recording that began last in this process, under way or ended."""
    return _latest


def _path(name: str, path: str | os.PathLike[str] | None) -> Path:
    if not isinstance(name, str) or not name.strip():
        raise OptionError(f"name={name!r}: give a word to call the experiment by.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"name={name!r} is no text ({error.reason}): leave out the characters that stand as "
            "\\ud800 to \\udfff."
        ) from None
    if path is None:
        return Path(re.sub(r"[^\w.-]+", "-", name.strip()) + SUFFIX)
    return store.local_path(path)


@dataclass(slots=True, eq=False)
class _Followed:
    """A request, its number in the file, and how much of it is written."""

    request: Request
    number: int
    tokens: int = 0
    text: int = 0
    scheduled: bool = False


@dataclass(frozen=True, slots=True)
class _Hook:
    """What others call until it is taken out again."""

    listeners: list[Any]
    call: Callable[..., None]

    def put_in(self) -> None:
        self.listeners.append(self.call)

    def take_out(self) -> None:
        if self.call in self.listeners:
            self.listeners.remove(self.call)


@dataclass(frozen=True, slots=True)
class _Note:
    """What whoever submitted requests, or changed the mode, has left."""

    model: int
    requests: tuple[Request, ...]
    mode: dict[str, Any] | None
    time: int


class _Ended(Exception):
    """The recording has, and what was begun beside it stops."""


class Recording:
    """An experiment under way: a context manager, or `start` and `stop`.

    Args:
        name: Of the experiment.
        path: Of its file; None writes none.
        redact: Leave out prompts and outputs.
        overwrite: Replace a file that is there.
        progress: Show a bar while files are hashed.
        models: Whose requests to record, besides those that it is told to `follow`; None for those
            of all that are loaded, now or meanwhile.

    Attributes:
        experiment: What was recorded so far.
    """

    def __init__(
        self,
        name: str,
        path: Path | None,
        redact: bool = False,
        overwrite: bool = False,
        progress: Progress = True,
        *,
        models: Sequence[Model] | None = None,
    ) -> None:
        self._overwrite, self._progress, self._redact = overwrite, progress, redact
        self._only = models
        # Where it begins it ends, whatever the working directory is by then.
        self._path = None if path is None else path.absolute()
        if self._path is not None:
            self._check_free(self._path)
        file = ExperimentFile(name=name, created=_now(), environment=environment(), redacted=redact)
        self._lock = threading.RLock()
        self.experiment = Experiment(file, path, fresh=True, lock=self._lock)
        self._file = file
        self._journal: store.Journal | None = None
        self._notes: deque[_Note] = deque()
        self._overlook = False
        self._models: list[Model] = []
        self._names: dict[str, str] = {}  # in the file, by what models were loaded as
        self._on_load = _Hook(registry.on_load, self.follow)
        self._hooks: dict[int, list[_Hook]] = {}  # of the models that it follows
        self._modes: dict[int, tuple[int, dict[str, Any]]] = {}  # the last of each model
        self._live: list[_Followed] = []
        self._ended = threading.Event()  # nothing more is recorded
        self._over = False  # the file is written, as far as it can be
        self._thread: threading.Thread | None = None
        self._hasher: threading.Thread | None = None
        self._epoch = 0
        self._pid = os.getpid()

    @property
    def running(self) -> bool:
        """Whether it records."""
        return self._thread is not None and not self._ended.is_set()

    @property
    def written(self) -> bool:
        """Whether its file is there."""
        return self._path is not None and self._path.is_file()

    def __enter__(self) -> Experiment:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._file.notes.append(f"It ended with {type(error).__name__}.")
        self.stop()

    def start(self) -> Experiment:
        """Begin.

        Raises:
            OptionError: It has begun before.
            ExperimentError: The file cannot be written.
        """
        if self._thread is not None:
            raise OptionError("A recording begins once: ik.record(...) makes another.")
        self._file.created = _now()
        self._epoch = time.perf_counter_ns()
        if self._path is not None:
            with store.writing(self._path, ": give another path=."):
                self._keep_unfinished(self._path)
                self._journal = store.Journal(self._path, self._file)
        if self._only is None:
            self._on_load.put_in()
        for model in registry.models() if self._only is None else self._only:
            self.follow(model)
        self._thread = threading.Thread(target=self._loop, name="inferkit-record", daemon=True)
        self._thread.start()
        if self._path is not None:  # that of a replay is its own affair
            self._hasher = threading.Thread(
                target=self._hash_meanwhile, name="inferkit-hash", daemon=True
            )
            self._hasher.start()
            global _latest
            _latest = self
            status.recorded(self._file.name, running=True)
        return self.experiment

    def stop(self) -> Experiment:
        """End it, and write the file. Safe to call twice.

        Where the first call was interrupted, the second does what was left. What could not be
        written is in the experiment all the same, and a warning says so.
        """
        if self._thread is None or self._over or os.getpid() != self._pid:
            return self.experiment
        self._ended.set()
        if self is _latest:
            status.recorded(self._file.name, running=False)
        for hook in (self._on_load, *itertools.chain(*self._hooks.values())):
            hook.take_out()
        self._thread.join()
        if self._hasher is not None:
            self._hasher.join()
        with self._lock:
            if not self._over:  # by another thread, meanwhile
                self._finish()
        return self.experiment

    def _finish(self) -> None:
        """Write down the last of it, and the file; again where this was interrupted before."""
        if self._file.duration is None:
            self._collect()
            self._file.duration = self._since(time.perf_counter_ns())
            # Whoever submits from several threads may have been overtaken on the way.
            self._file.requests.sort(key=lambda one: one.arrival)
            if self._live:
                self._file.notes.append(f"{len(self._live)} requests had not ended when it did.")
        try:
            self._hash()
        finally:
            self._write()
            self._over = True

    # -- hearing --------------------------------------------------------------------------------

    def follow(self, model: Model, name: str | None = None) -> None:
        """Record a model's requests and changes from now on.

        Args:
            model: It may have been followed and left before: it is another model of the file then.
            name: What the file calls it; None for what it is loaded as, without folders.
        """
        with self._lock:
            try:
                engine = model._engine
            except InferkitError:  # it was unloaded in this moment
                return
            number = len(self._models)
            on_their_way = len(engine.requests)
            name = name or self._name_of(model.name, local=model.source.kind in _LOCAL)
            self._tell([files.NewModel(_model_entry(model, name))])
            self._models.append(model)
            if on_their_way:
                self._file.notes.append(
                    f"{on_their_way} requests to {self._file.models[number].name} were on their "
                    "way when it began; they took part of the machine and are not in here."
                )
            self._changed(number, _mode(model), time.perf_counter_ns())
            self._hooks[number] = [
                _Hook(engine.on_submit, partial(self._submitted, number, model)),
                _Hook(engine.on_change, partial(self._submitted, number, model, ())),
            ]
            for hook in self._hooks[number]:
                hook.put_in()

    def leave(self, model: Model) -> None:
        """Record no more of what a model is asked, and of what it becomes."""
        with self._lock:
            self._collect()
            for number in [n for n in self._hooks if self._models[n] is model]:
                for hook in self._hooks.pop(number):
                    hook.take_out()

    def _name_of(self, given: str, *, local: bool) -> str:
        """What the file calls a model: no folder, and not the name of another."""
        name = files.public_name(given, local=local)
        others = {known for other, known in self._names.items() if other != given}
        tries = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        return self._names.setdefault(given, next(one for one in tries if one not in others))

    def _guesser(self, speculative: str) -> str:
        """How next tokens are guessed, with the draft model called as the file calls it."""
        if not speculative.startswith(DRAFT):
            return speculative
        given = speculative.removeprefix(DRAFT)
        kinds = {model.name: model.source.kind for model in registry.models()}
        # Of one that is gone nobody knows whether it is called by its path.
        return DRAFT + self._name_of(given, local=kinds.get(given, "folder") in _LOCAL)

    def _submitted(self, number: int, model: Model, requests: Sequence[Request]) -> None:
        """Called by whoever submits, or changes the mode (no requests): it only takes note."""
        if self._overlook and not requests:
            return
        now = time.perf_counter_ns()
        self._notes.append(_Note(number, tuple(requests), _mode(model), now))

    @contextmanager
    def overlooking(self) -> Iterator[None]:
        """Record no change of mode in the body, whose end finds all modes as they were."""
        with self._lock:  # and not while one is looked for
            self._overlook = True
        try:
            yield
        finally:
            self._overlook = False

    # -- the thread -----------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._ended.wait(_TICK):
            with self._lock:
                self._collect()

    def _collect(self) -> None:
        """Write down what is new."""
        while self._notes:
            note = self._notes.popleft()
            since = [note.time, *(request.arrival for request in note.requests[:1])]
            self._changed(note.model, note.mode, min(since))
            mode = self._modes[note.model][0]
            for request in note.requests:
                followed = _Followed(request, len(self._file.requests))
                self._tell([files.NewRequest(self._entry(note.model, mode, request))])
                self._live.append(followed)
        for number in () if self._overlook else self._hooks:
            self._changed(number, _mode(self._models[number]), time.perf_counter_ns())
        self._tell([line for followed in self._live if (line := self._news(followed))])
        self._live = [f for f in self._live if self._file.requests[f.number].finish_reason is None]

    def _changed(self, number: int, mode: dict[str, Any] | None, now: int) -> None:
        known = self._modes.get(number)
        if mode is None or (known is not None and known[1] == mode):
            return
        self._modes[number] = (len(self._file.modes), mode)
        told = mode | {"speculative": self._guesser(mode["speculative"])}
        entry = ModeEntry(time=self._since(now), model=number, **told)
        self._tell([files.NewMode(entry)])

    def _news(self, followed: _Followed) -> files.Progress | None:
        request = followed.request
        over = request.result() if request.done else None  # before the rest: see `Watched.read`
        new = request.tokens_since(followed.tokens)
        followed.tokens += len(new)
        facts: dict[str, Any] = {}
        if request.scheduled is not None and not followed.scheduled:
            followed.scheduled = True
            facts |= {"scheduled": self._since(request.scheduled)}
            facts |= {"cached_tokens": request.cached_tokens}
            model = self._file.requests[followed.number].model
            facts |= {"settings": self._settings(model, request)}
        text = ""
        if over is not None:
            facts |= self._end(over)
        if not self._redact:
            whole = over.text if over is not None else "".join(request.pieces_since(0))
            end = len(whole) if over is not None else (new[-1][2] if new else followed.text)
            text = whole[followed.text : end]
            followed.text += len(text)
        if not (new or facts or text):
            return None
        ids, times, ends = (list(column) for column in zip(*new)) if new else ([], [], [])
        return files.Progress(
            followed.number,
            token_ids=[] if self._redact else ids,
            tokens=[self._since(moment) for moment in times],
            text_ends=[] if self._redact else ends,
            text=text,
            facts=facts,
        )

    def _end(self, gen: Any) -> dict[str, Any]:
        trace = gen.latency.trace
        facts = {"finish_reason": gen.finish_reason, "finished": self._since(trace.finished)}
        if trace.chunks is not None:
            facts["chunks"] = [self._since(moment) for moment in trace.chunks]
        if trace.draft_tokens:
            facts |= {n: getattr(trace, n) for n in ("draft_tokens", "accepted_tokens")}
        if not self._redact:
            facts["stop_reason"] = gen.stop_reason
        if gen.error is not None:
            facts["error"] = [type(gen.error).__name__, scrubbed(str(gen.error))]
        return facts

    def _entry(self, model: int, mode: int, request: Request) -> RequestEntry:
        params = msgspec.convert(asdict(request.params), Sampling)
        if self._redact:
            del params["stop"], params["stop_token_ids"]
        return RequestEntry(
            model=model,
            mode=mode,
            arrival=self._since(request.arrival),
            prompt_tokens=len(request.prompt_token_ids),
            params=params,
            seed=request.sampler.seed,
            settings=self._settings(model, request),
            prompt=None if self._redact else request.prompt,
            prompt_token_ids=[] if self._redact else list(request.prompt_token_ids),
            token_ids=[],
            text_ends=[],
            tokens=[],
        )

    def _settings(self, model: int, request: Request) -> RanUnder:
        settings = msgspec.convert(asdict(request.settings), RanUnder)
        settings["model"] = self._file.models[model].name
        settings["speculative"] = self._guesser(request.settings.speculative)
        return settings

    def _tell(self, lines: Sequence[Line]) -> None:
        """Put lines into the file in memory, and on the disk."""
        for line in lines:
            files.apply(self._file, line)
        if self._journal is None or not lines:
            return
        try:
            self._journal.add(lines)
        except OSError as error:  # it takes no more, and is not asked to
            self._cannot_write(error)

    # -- the end --------------------------------------------------------------------------------

    def _hash_meanwhile(self) -> None:
        """Hash the models' files, so that a crash leaves them known: nobody can do it later."""
        tried: set[int] = set()
        while not self._ended.wait(_TICK):
            for number, model in enumerate(self._models.copy()):
                if number in tried or self._file.models[number].files:
                    continue
                # What goes wrong is told at the end, where it is tried again.
                with suppress(_Ended, OSError, KeyError, InferkitError):
                    self._give_way()
                    found = model.source.sha256(progress=self._give_way)
                    with self._lock:
                        self._tell([files.Hashed(number, found)])
                tried.add(number)

    def _give_way(self, *_: Any) -> None:
        """Wait while requests are on their way: what is measured is not to be slowed down."""
        while self._notes or self._live:
            if self._ended.wait(_TICK):
                break
        if self._ended.is_set():
            raise _Ended

    def _hash(self) -> None:
        """The digests of the models' files; an interrupt leaves out what is not yet read."""
        for entry, model in zip(self._file.models, self._models):
            if entry.files:
                continue
            try:
                entry.files = model.source.sha256(progress=self._progress)
            except KeyboardInterrupt:
                self._file.notes.append("Files of models were not hashed: it was interrupted.")
                return
            except (OSError, KeyError, InferkitError) as error:
                self._file.notes.append(
                    f"The files of {entry.name} could not be hashed: {scrubbed(first_line(error))}"
                )

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            # Of the one that is there nobody else has written since the journal began.
            store.write(self._file, self._path, overwrite=self._overwrite)
        except (OSError, OptionError) as error:
            if self._journal is not None:
                self._tell(
                    [files.Ended(self._file.duration or 0, self._file.models, self._file.notes)]
                )
                self._journal_closed()
            self._cannot_write(error)
            return
        if self._journal is not None:
            self._journal.remove()

    def _keep_unfinished(self, path: Path) -> None:
        """Overwriting replaces what was finished; of what was cut off there is nothing else."""
        kept = store.set_aside(path)
        if kept is not None:
            warnings.warn(
                f"{path} was to be a recording that was not brought to its end: it is kept as "
                f"{kept.name}, which ik.open reads.",
                stacklevel=4,
            )

    def _journal_closed(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _cannot_write(self, error: OSError | OptionError) -> None:
        what = getattr(error, "strerror", None) or str(error)
        warnings.warn(
            f"The experiment {self._file.name!r} is no longer recorded to {self._path}: {what} "
            "Everything is kept in memory: exp.save(path) writes it elsewhere.",
            stacklevel=2,
        )

    def _since(self, moment: int) -> int:
        return max(0, moment - self._epoch)

    def _check_free(self, path: Path) -> None:
        store.check_free(path, self._overwrite)
        with store.writing(path, ": give another path=."):
            store.check_not_under_way(path)
        journal = path.with_name(path.name + store.PARTIAL)
        if journal.exists() and not self._overwrite:
            raise OptionError(
                f"{journal} is a recording that was not brought to its end. "
                f"ik.open({str(path)!r}) reads it; choose another name, or say overwrite=True "
                "(as an option: --overwrite)."
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _model_entry(model: Model, name: str) -> ModelEntry:
    source, identity = model.source, model._parts.identity
    return ModelEntry(
        name=name,
        ref=files.public_name(str(source.ref), local=source.kind in _LOCAL),
        kind=source.kind,
        revision=source.revision,
        files=_known_files(model),
        devices=list(model.devices),
        dtype=model.dtype,
        prefix_reuse=identity.prefix_reuse,
        prefill_chunk=identity.prefill_chunk,
        parameters_bytes=model.plan.weights,
        kernels=kernels.used(model.devices, model.dtype),
    )


def _known_files(model: Model) -> dict[str, str]:
    """The digests of a model's files, where none has to be read for them."""
    with suppress(OSError, KeyError, InferkitError):  # it is told where they have to be
        return model.source.known_sha256() or {}
    return {}


def _mode(model: Model) -> dict[str, Any] | None:
    """What a model runs as; None where it was unloaded."""
    try:
        form = model.plan.format
        return {
            "quantize": model.quantization,
            "format": str(form),
            "double_quant": form.double_quant,
            "compute_dtype": form.compute_dtype or "auto",
            "batching": model.batching,
            "max_batch": model.max_batch,
            "context": model.context,
            "step": "compiled" if model.compilation else "eager",
            "speculative": model.speculative,
        }
    except InferkitError:
        return None
