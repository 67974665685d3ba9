"""`replay`: an experiment run again on this machine, and held against what was recorded."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferkit import catalog, kernels, registry
from inferkit.devices import attached_names
from inferkit.engine.guesses import DRAFT
from inferkit.errors import ExperimentError, InferkitError, OptionError, first_line
from inferkit.experiments.difference import first_difference
from inferkit.experiments.experiment import Experiment, checked_pause, generation_of, opened
from inferkit.experiments.file import ModeEntry, ModelEntry, RequestEntry, unpack
from inferkit.experiments.outcome import Outcome, Replay
from inferkit.experiments.recording import Recording
from inferkit.experiments.rounding import ROUNDING, Judgement, judge
from inferkit.experiments.schedule import (
    Part,
    ended_itself,
    parts_of,
    runs_again,
    shapes_are_certain,
    spans_of,
    what_cut,
)
from inferkit.footprint import QUANTIZE_MODES
from inferkit.html import listed
from inferkit.kv import PREFILL_CHUNK
from inferkit.model import Model
from inferkit.model_files import kinds_of_files
from inferkit.progress import Progress, bar
from inferkit.resident import uninterrupted
from inferkit.sampling import SamplingParams
from inferkit.trace import NS

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.generation import Generation

__all__ = ["replay"]

_PATIENCE = 600.0  # seconds to wait for the compiled step
_TICK = 0.1


def replay(
    experiment: Experiment | str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    device: Any = None,
    dtype: str | None = None,
    pause: float = 1.0,
    check_files: bool = True,
    progress: Progress = True,
) -> Replay:
    """Run an experiment again on this machine, and compare tokens and latency.

    The same prompts arrive in the same order at the same distances, under the same modes. Where the
    recording was idle or the mode was changed, what comes next waits until that is reached here
    too, so that a slower machine does not turn requests that followed each other into requests that
    compete; longer waits of the recording, while a person thought, are cut to ``pause``. A request
    that was cancelled or failed is run up to the token where it was, and not at all where it had
    none. Where prompts were left out, random tokens take their place, as many, and only times are
    compared.

    A model that is loaded from the same files is used, and has its settings back afterwards; else
    it is loaded for the time. Of several that were loaded one after the other each is loaded when
    its first requests are next, and unloaded after its last ones, so that no more are in memory
    than were. That happens while no request is on its way and before the next ones' clock starts:
    however long it takes, requests have their recorded distances to those they ran beside, and
    begin ``pause`` seconds at most after it. As in the recording, loading lies between the requests
    before and after it, and in rates over all of them.

    An interrupt ends the run and keeps what has been measured; another one while models get their
    settings back takes effect after that, and keeps nothing.

    Args:
        experiment: An experiment, or the path of one.
        model: Where the model is, if not under the recorded reference; for several, by name. One
            path is enough where all have the same name or the same files.
        device: Where to load it, as for `inferkit.load`; None for the recorded devices where they
            are attached, else "auto".
        dtype: To run in; None for the recorded one.
        pause: Most seconds that nothing happens.
        check_files: Refuse a model whose files have other digests than those recorded; False notes
            it, and gives it as a reason where tokens differ.
        progress: Show bars, or call this with (what, done, total).

    Raises:
        ExperimentError: The file cannot be read, has no requests or was measured by another tool;
            the model is not there; or its files have other digests.
        InferkitError: As for `inferkit.load` and `Model.quantize`, where it does not fit or does
            not run here.
    """
    recorded, most = opened(experiment), checked_pause(pause)
    _check_can_run(recorded)
    run = _Run(recorded, device, dtype, most, progress)
    run.find(model, check_files)
    return run.replay()


def _check_can_run(recorded: Experiment) -> None:
    if recorded.file.source != "inferkit":
        raise ExperimentError(
            f"{recorded.name!r} was measured by {recorded.file.source}: it can be looked at and "
            "compared, and not run again, for its requests lack their sampling parameters."
        )
    if not recorded.file.requests:
        raise ExperimentError(f"The experiment {recorded.name!r} has no requests to run again.")


def _check_one(entries: Collection[ModelEntry]) -> None:
    """Raise OptionError unless one path can be that of all: of the same name, or the same files."""
    first, *rest = entries
    others = [e for e in rest if e.name != first.name and not (e.files and e.files == first.files)]
    if others:
        raise OptionError(
            f"The experiment has {1 + len(others)} models: give model={{{first.name!r}: ..., "
            f"{others[0].name!r}: ...}}."
        )


def _find(entry: ModelEntry, ref: Any, progress: Progress) -> catalog.Source:
    """The files of a recorded model."""
    local = entry.kind in ("folder", "gguf")
    if ref is None and local:
        # The file names no folders: a loaded model of that name may be it, as its digests tell.
        loaded = (m for m in registry.models() if m.source.kind == entry.kind)
        ref = next((m.ref for m in loaded if Path(m.ref).name == entry.ref), None)
    if ref is None and local and not Path(entry.ref).exists():
        kind = "file" if entry.kind == "gguf" else "folder"
        raise ExperimentError(
            f"The model {entry.ref!r} was loaded from a {kind} of the machine that recorded it: "
            "say where it is here, with model='path' (as an option: --model path)."
        )
    revision = entry.revision if ref is None else None
    return catalog.resolve(entry.ref if ref is None else ref, revision, progress=progress)


def _other_files(entry: ModelEntry, found: Mapping[str, str]) -> list[str]:
    """Names of recorded files that are not there or have another sha256."""
    # What was converted may be written otherwise by another version; what it came from may not.
    kept = {n: d for n, d in entry.files.items() if n.endswith(".gguf")} or entry.files
    return [name for name, digest in kept.items() if found.get(name) != digest]


def _how_they_differ(other: Sequence[str], found: Mapping[str, str]) -> str:
    """The first of these files, and what is the matter with them."""
    missing = [name for name in other if name not in found]
    what = "are not there" if len(missing) == len(other) else "have another sha256"
    return f"{', '.join(other[:4])} {what}"


class _Run:
    """One replay under way.

    Attributes:
        models: What was loaded for each model of the recording, by its number; some are gone.
        notes: What is done otherwise than in the recording.
    """

    def __init__(
        self, recorded: Experiment, device: Any, dtype: str | None, pause: float, progress: Progress
    ) -> None:
        self.recorded = recorded
        self.models: dict[int, Model] = {}
        self.notes: list[str] = []
        self._device, self._dtype = device, dtype
        self._pause, self._progress = pause, progress
        self._parts = parts_of(recorded)
        self._spans = spans_of(self._parts)
        self._sources: dict[int, catalog.Source] = {}
        self._other_files: dict[int, list[str]] = {}  # that are not as recorded
        self._converted: dict[int, list[str]] = {}  # that are not, though made of the same file
        self._eager = False  # though it was compiled
        self._there: dict[int, ExitStack] = {}  # by number, of the models that are: how they go
        self._requests: dict[int, Request] = {}
        self._judged: dict[int, Judgement | str] = {}  # or why not
        # Of modes while requests run: a model's own come one after the other, in their order.
        self._changes: list[tuple[int, Future[None]]] = []
        self._changing: dict[int, ThreadPoolExecutor] = {}
        # Of no other model: one that stands by is no part of this, nor what is asked of it.
        self._recording = Recording(
            f"replay of {recorded.name}", None, redact=recorded.redacted, models=()
        )

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    # -- models ---------------------------------------------------------------------------------

    def find(self, given: Any, check_files: bool) -> None:
        """Find the files of all models, before any is loaded.

        Args:
            given: Where they are: a path, or paths by name, or None.
            check_files: Refuse those that are not as recorded, and do not only note it.
        """
        entries = {number: self.recorded.file.models[number] for number in self._spans}
        by_name = isinstance(given, Mapping)
        if by_name:
            names = [entry.name for entry in self.recorded.file.models]
            for name in given:
                if name not in names:
                    raise OptionError(
                        f"model= names {name!r}, which the recording lacks: it has {listed(names)}."
                    )
        if given is not None and not by_name and entries:
            _check_one(entries.values())
        for number, entry in entries.items():
            ref = given.get(entry.name) if by_name else given
            source = self._sources[number] = _find(entry, ref, self._progress)
            if entry.files:
                self._check_files(number, source, check_files)
            elif check_files:
                self._note(
                    f"the recording has no sha256 of {entry.name}'s files: whether this is the "
                    "same model was not checked"
                )

    def _check_files(self, number: int, source: catalog.Source, refuse: bool) -> None:
        entry, found = self.recorded.file.models[number], source.sha256(progress=self._progress)
        other = self._other_files[number] = _other_files(entry, found)
        if not other:
            made = entry.files.items()
            self._converted[number] = [name for name, was in made if found.get(name) != was]
            return
        said = _how_they_differ(other, found)
        if refuse:
            raise ExperimentError(
                f"This is not the model that was recorded as {entry.name!r}: {said}. Name the "
                "right one with model= (--model), or run with check_files=False "
                "(--no-check-files) to compare with another."
            )
        self._note(f"{entry.name} ran with other files than were recorded: {said}")

    def _prepare(self, index: int) -> None:
        """Have the models there that a part needs, as they were at its beginning."""
        before = {mode.model: mode for mode in self._parts[index].before}
        for number, span in self._spans.items():
            if index == span.start:
                first = next(m for m in self.recorded.file.modes if m.model == number)
                with ExitStack() as stack:
                    self.models[number] = stack.enter_context(
                        self._loaded(number, before.get(number, first))
                    )
                    self._there[number] = stack.pop_all()
        for number, mode in before.items():
            if number in self._there:
                self._become(mode)

    def _follow(self, index: int) -> None:
        """Record those that have joined for a part."""
        for number, span in self._spans.items():
            if index == span.start:
                name = self.recorded.file.models[number].name
                self._recording.follow(self.models[number], name)

    def _let_go(self, numbers: Iterable[int]) -> None:
        """Part with models, which no later request needs."""
        with ExitStack() as stack:  # all of them, whatever goes wrong with one; the last one first
            for number in list(numbers):
                stack.callback(self._there.pop(number).close)
                stack.callback(self._recording.leave, self.models[number])

    @contextmanager
    def _loaded(self, number: int, mode: ModeEntry) -> Iterator[Model]:
        """The model: as it is loaded already, or for the time that it is needed."""
        entry, source = self.recorded.file.models[number], self._sources[number]
        taken = {id(self.models[other]) for other in self._there}
        fit = [
            m
            for m in registry.models()
            if id(m) not in taken and _is(m, source, entry, self._dtype)
        ]
        mine = max(fit, key=lambda m: m.name == entry.name, default=None)
        if mine is not None and self._device is None:
            self._note(f"{entry.name} ran on the model that was loaded already")
            with _as_it_was(mine, self._progress):
                mine._parts.forget_prefixes()
                yield mine
            return
        device = self._device or self._attached(entry)
        model = registry.load(
            source.gguf or (source.ref if source.kind in ("demo", "hub") else source.path),
            device=device,
            dtype=self._dtype or entry.dtype or "auto",
            quantize=mode.quantize if mode.quantize in QUANTIZE_MODES else "none",
            double_quant=mode.double_quant,
            compute_dtype=mode.compute_dtype,
            batching=mode.batching,  # type: ignore[arg-type]
            max_batch=mode.max_batch,
            context=mode.context,
            revision=source.revision,
            name=_own_name(entry),
            prefix_reuse=entry.prefix_reuse,
            prefill_chunk=entry.prefill_chunk or PREFILL_CHUNK,
            compile=False,
            speculative=self._guessing(mode),
            progress=self._progress,
        )
        try:
            yield model
        finally:
            model.unload()

    def _attached(self, entry: ModelEntry) -> Any:
        there = {*attached_names(), "disk"}
        if entry.devices and there.issuperset(entry.devices):
            return entry.devices
        self._note(
            f"{entry.name} was recorded on {', '.join(entry.devices)}, which is not attached here"
        )
        return "auto"

    # -- requests -------------------------------------------------------------------------------

    def replay(self) -> Replay:
        """Run all parts, one after the other."""
        measured, interrupted = self._recording.experiment, False
        if self.recorded.redacted:
            self._note("prompts are random tokens of the recorded lengths")
        try:
            with bar(self._progress, "Replaying", self._to_run, unit="requests") as shown:
                for index, part in enumerate(self._parts):
                    self._prepare(index)
                    if index == 0:
                        self._recording.start()
                    else:
                        _sleep(min(part.idle * NS, self._pause))
                    self._follow(index)
                    self._part(part, shown)
                    self._let_go([n for n, span in self._spans.items() if span[-1] == index])
        except KeyboardInterrupt:
            if not self._requests:
                raise
            interrupted = True
            self._note("it was interrupted: what follows was not run")
        finally:
            # Each of them, the last one first, whatever goes wrong with one.
            with ExitStack() as stack:
                stack.callback(self._recording.stop)
                stack.enter_context(uninterrupted())  # or models would not be as they were
                stack.callback(self._let_go, self._there)
                stack.callback(self._end_changes)
                stack.callback(self._end_requests)
        outcomes = [self._outcome(i) for i in range(len(self.recorded.file.requests))]
        if interrupted:
            outcomes = [self._unfinished(o) for o in outcomes]
        measured.file.notes += self.notes  # for whoever sees it without the recording
        return Replay(self.recorded, measured, outcomes, self.notes)

    @property
    def _to_run(self) -> int:
        return sum(map(runs_again, self.recorded.file.requests))

    def _part(self, part: Part, shown: Any) -> None:
        began = time.perf_counter_ns()
        mine: list[int] = []
        for moment, event in part.events:
            _sleep((moment - part.begin) * NS - (time.perf_counter_ns() - began) * NS)
            if not isinstance(event, ModeEntry):
                due = time.perf_counter_ns()
                entries = [self.recorded.file.requests[i] for i in event]
                self._await({one.model for one in entries if runs_again(one)})
                began += time.perf_counter_ns() - due  # those that follow keep their distances
                mine += self._submit(event)
            elif event.model in self._there:
                self._change_meanwhile(event)
        for number in mine:
            while not self._requests[number].done:
                self._check_changes()
                time.sleep(_TICK / 10)
            shown.update(1)
        self._await(self._there)
        self._look_at_differences(mine)

    def _await(self, models: Collection[int]) -> None:
        """Let changes of these models come to their end: what follows them ran under them."""
        while not all(change.done() for model, change in self._changes if model in models):
            self._check_changes()
            time.sleep(_TICK / 10)
        self._check_changes()

    def _check_changes(self) -> None:
        """Raise what a change raised: what was to follow it would run as it was not recorded."""
        for _, change in self._changes:
            if change.done():
                change.result()

    def _end_requests(self) -> None:
        for request in self._requests.values():
            request.cancel()
        for request in self._requests.values():
            request.result()

    def _end_changes(self) -> None:
        """Wait for those under way, which would go on when all is as it was; begin no other."""
        for pool in self._changing.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, numbers: Sequence[int]) -> list[int]:
        arrival = time.perf_counter_ns()
        runs = [i for i in numbers if runs_again(self.recorded.file.requests[i])]
        for model in dict.fromkeys(self.recorded.file.requests[i].model for i in runs):
            of_it = [i for i in runs if self.recorded.file.requests[i].model == model]
            handle = self.models[model]
            requests = [handle._request(*self._asked(i), arrival) for i in of_it]
            handle._engine.submit(requests)
            self._requests.update(zip(of_it, requests))
        return runs

    def _asked(self, number: int) -> tuple[list[int], SamplingParams]:
        one = self.recorded.file.requests[number]
        params = generation_of(one).params
        prompt, count = unpack(one.prompt_token_ids), len(unpack(one.tokens))
        params = replace(params, seed=one.seed)
        if not ended_itself(one) or self.recorded.redacted:
            params = replace(params, max_tokens=max(1, count))
        if self.recorded.redacted:
            params = replace(params, ignore_eos=True, stop_token_ids=())
            prompt = self._random_tokens(one, number)
        return prompt, params

    def _random_tokens(self, one: RequestEntry, seed: int) -> list[int]:
        import random

        size = self.models[one.model]._parts.loaded.vocab_size
        return [random.Random(f"{seed}.{i}").randrange(size) for i in range(one.prompt_tokens)]

    # -- modes ----------------------------------------------------------------------------------

    def _become(self, mode: ModeEntry) -> None:
        """Bring a model to a recorded mode, and wait for it."""
        self._change(mode)
        self._compile(self.models[mode.model], mode.step == "compiled")

    def _change(self, mode: ModeEntry) -> None:
        self._quantize(mode)
        self.models[mode.model].configure(
            batching=mode.batching,  # type: ignore[arg-type]
            max_batch=mode.max_batch,
            context=mode.context,
            speculative=self._guessing(mode),
        )

    def _quantize(self, mode: ModeEntry) -> None:
        model = self.models[mode.model]
        if not model.plan.format.stored:
            model.quantize(
                mode.quantize,
                double_quant=mode.double_quant,
                compute_dtype=mode.compute_dtype,
                progress=self._progress,
            )

    def _guessing(self, mode: ModeEntry) -> str:
        """How next tokens are guessed here: a draft model is not loaded, for no token needs it."""
        if not mode.speculative.startswith(DRAFT):
            return mode.speculative
        draft = mode.speculative.removeprefix(DRAFT)
        self._note(f"next tokens were guessed by {draft!r}, not so here")
        return "off"

    def _compile(self, model: Model, wanted: bool) -> None:
        """Have the decode step run as it did, and not change on the way."""
        model.configure(compile="auto" if wanted else False)
        if wanted and not model.compilation.wait(_PATIENCE):
            reason = model.compilation.reason or "it took too long"
            self._eager = True
            self._note(f"the decode step was compiled in the recording and is not here: {reason}")

    def _change_meanwhile(self, mode: ModeEntry) -> None:
        """Change the mode while requests run, as it was done: it may wait for them."""
        if mode.model not in self._changing:
            self._changing[mode.model] = ThreadPoolExecutor(1, "inferkit-replay")
        change = self._changing[mode.model].submit(self._change, mode)
        self._changes.append((mode.model, change))

    # -- comparing ------------------------------------------------------------------------------

    def _look_at_differences(self, numbers: Sequence[int]) -> None:
        """Whether rounding explains where outputs differ."""
        for number in numbers:
            one = self.recorded.file.requests[number]
            recorded, got = generation_of(one), self._requests[number].result()
            at, ids = _where_they_part(got, recorded), recorded.token_ids
            if at is None or at >= min(len(ids), len(got.token_ids)):
                continue
            try:
                with self._recording.overlooking(), self._as_it_came(one, got) as model:
                    self._judged[number] = judge(
                        model,
                        replace(got.params, seed=one.seed),
                        got.prompt_token_ids,
                        ids[:at],
                        got.token_ids[at],
                        ids[at],
                        self._limit(one, recorded, got),
                    )
            except InferkitError as error:  # there is no room for another mode, say
                ran = got.settings.quantization
                self._judged[number] = f"it was not judged in {ran} ({first_line(error)})"

    @contextmanager
    def _as_it_came(self, one: RequestEntry, got: Generation) -> Iterator[Model]:
        """The model in the mode in which a request ran, which another may have followed."""
        model, ran = self.models[one.model], got.settings.quantization
        modes = (m for m in self.recorded.file.modes if m.model == one.model and m.format == ran)
        mode = next(modes, None)
        if mode is None or str(model.plan.format) == ran:
            yield model
            return
        with _as_it_was(model, self._progress):
            self._quantize(mode)
            yield model

    def _limit(self, one: RequestEntry, recorded: Generation, got: Generation) -> float:
        """Nats that rounding may be wrong by."""
        dtypes = (recorded.settings.dtype, got.settings.dtype)
        limits = [ROUNDING.get(dtype, ROUNDING["bfloat16"]) for dtype in dtypes]
        mode = got.settings.quantization
        if mode != "none" and self._what_differs(one):
            # Kernels of several precisions unpack the weights.
            limits.append(ROUNDING["int8" if mode == "int8" else "bfloat16"])
        return max(limits)

    def _repeatable(self, number: int) -> bool:
        """Whether a request must give the same here to the last bit, if it is the recorded one.

        So it is on the same machine, in the same mode, in passes of the same shapes, where none of
        its batch found keys and values of earlier passes, which may have had others.
        """
        part = next(one for one in self._parts if number in one.numbers)
        file = self.recorded.file
        together = [(file.requests[i], self._requests.get(i)) for i in part.numbers]
        guessed = any(mode.speculative.startswith(DRAFT) for mode in part.before)
        return (
            shapes_are_certain(part, file)
            and not (guessed or self._eager)
            and not any(self._what_differs(one) for one, _ in together)
            and all(ran and ran.cached_tokens == one.cached_tokens == 0 for one, ran in together)
        )

    def _outcome(self, number: int) -> Outcome:
        one = self.recorded.file.requests[number]
        recorded = generation_of(one, self.recorded.origin)
        request = self._requests.get(number)
        if request is None:
            reason = f"it {what_cut(one)} before its first token"
            return Outcome(number, recorded, None, None, None, "not run", reason)
        got = request.result()
        if self.recorded.redacted:
            reason = "outputs were left out of the recording"
            return Outcome(number, recorded, got, None, None, "not compared", reason)
        at = _where_they_part(got, recorded)
        if got.finish_reason == "error" and at in (None, len(got.token_ids)):
            return Outcome(
                number, recorded, got, len(got.token_ids), None, "differs", str(got.error)
            )
        if at is None:
            other = _other_end(one, recorded, got)
            kind, reason = ("differs", other) if other else ("equal", _up_to(one))
            return Outcome(number, recorded, got, None, None, kind, reason)
        judged = self._judged.get(number, "one of the two ends here")
        kind, reason = self._why(number, judged)
        gap = None if isinstance(judged, str) else judged.gap
        return Outcome(number, recorded, got, at, gap, kind, reason)

    def _unfinished(self, outcome: Outcome) -> Outcome:
        """Of an interrupted replay: what was cut off, or not looked at, is no difference."""
        number, got, at = outcome.request, outcome.measured, outcome.difference
        if not runs_again(self.recorded.file.requests[number]):
            return outcome
        if got is not None and got.finish_reason != "cancelled":
            length = min(len(got.token_ids), len(outcome.recorded.token_ids))
            if number in self._judged or at is None or at >= length:
                return outcome
        return replace(
            outcome, kind="interrupted", reason="the replay was interrupted", difference=None
        )

    def _why(self, number: int, judged: Judgement | str) -> tuple[str, str]:
        """What kind of difference it is, and what is likely to be the reason."""
        others = self._what_differs(self.recorded.file.requests[number])
        because = f"; other {', '.join(others)}" if others else "; the same settings and versions"
        if isinstance(judged, str):
            return "differs", f"{judged}{because}"
        if not judged.near:
            return "differs", f"{judged.said}, more than rounding explains{because}"
        if self._repeatable(number):
            return "differs", f"{judged.said}, but nothing rounds otherwise here{because}"
        return "rounding", f"{judged.said}: rounding decides{because}"

    def _what_differs(self, one: RequestEntry) -> list[str]:
        """Of where and how it ran, what is not as in the recording."""
        model = self.models[one.model]
        then, now = self.recorded.environment, self._recording.experiment.environment
        entry = self.recorded.file.models[one.model]
        pairs = {
            "dtype": (entry.dtype, model.dtype),
            "device": (entry.devices, list(model.devices)),
            "kernels": (entry.kernels, kernels.used(model.devices, model.dtype)),
            "processor": (then.cpu, now.cpu),
            "accelerator": _accelerators(then, now),
            "number of threads": (then.threads, now.threads),
            **{
                name: (then.packages.get(name), now.packages.get(name))
                for name in ("torch", "transformers", "bitsandbytes", "jupyter-inferkit")
            },
        }
        return [
            *kinds_of_files(self._other_files.get(one.model, ())),
            *(
                f"conversion of the {kind}"
                for kind in kinds_of_files(self._converted.get(one.model, ()))
            ),
            *(name for name, (a, b) in pairs.items() if a != b),
        ]


def _accelerators(then: Any, now: Any) -> tuple[list[str], list[str]]:
    both = [[d.description for d in env.devices if d.kind != "cpu"] for env in (then, now)]
    return both[0], both[1]


def _is(model: Model, source: catalog.Source, entry: ModelEntry, dtype: str | None) -> bool:
    same = model.path == source.path and model.revision == source.revision
    return (
        same
        and model.dtype == (dtype or entry.dtype)
        and list(model.devices) == entry.devices
        and model._parts.identity.prefix_reuse == entry.prefix_reuse
    )


def _own_name(entry: ModelEntry) -> str:
    """What to load a model as for the time, beside whatever else is loaded."""
    taken = {model.name for model in registry.models()}
    name = f"replay of {entry.name}"
    tries = (name if number == 1 else f"{name} ({number})" for number in itertools.count(1))
    return next(one for one in tries if one not in taken)


@contextmanager
def _as_it_was(model: Model, progress: Progress) -> Iterator[None]:
    """Whatever is done to the model, it has its settings again afterwards."""
    # Not `settings_back`, which keeps other threads from changing the model: one of ours does.
    form, rows, context = model.plan.format, model.max_batch, model.context
    policy, compile, guesses = model.batching, model._parts.compile, model.speculative
    try:
        yield
    finally:
        if model.loaded:
            with uninterrupted():
                shown = progress is True
                model._become(
                    format=form, max_batch=rows, context=context, force=True, progress=shown
                )
                model.configure(batching=policy, compile=compile, speculative=guesses)


def _where_they_part(got: Generation, recorded: Generation) -> int | None:
    """Where the first output token differs, if one does."""
    a, b = got.token_ids, recorded.token_ids
    return None if a == b else first_difference(a, b)


def _other_end(one: RequestEntry, recorded: Generation, got: Generation) -> str:
    """How the same tokens end otherwise here; "" where they do not."""
    if not ended_itself(one):
        return ""
    if got.finish_reason != recorded.finish_reason:
        return f"the same tokens, ended by {got.finish_reason!r}, not {recorded.finish_reason!r}"
    return "" if got.text == recorded.text else "the same tokens, but another text"


def _up_to(one: RequestEntry) -> str:
    """Up to where the tokens were the same, where the recorded request has no end of its own."""
    cut = what_cut(one)
    return f"up to where it {cut}, after {len(unpack(one.tokens))} tokens" if cut else ""


def _sleep(seconds: float) -> None:
    """Wait, so that an interrupt ends it on every platform."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _TICK))
