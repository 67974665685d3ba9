"""One step of the engine: prefill, decode, choose tokens, hand them out; and what if that fails."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inferkit.devices import out_of_memory
from inferkit.engine.guesses import MOST, Guesser
from inferkit.engine.request import Request
from inferkit.engine.runner import Chunk, SlottedRunner
from inferkit.engine.scheduler import Entry, Scheduler
from inferkit.engine.sequential import SequentialRunner
from inferkit.engine.serving import reason_against
from inferkit.engine.slots import Slots
from inferkit.errors import (
    GenerationError,
    InferkitError,
    OptionError,
    OutOfMemoryError,
    PromptError,
)
from inferkit.generation import FinishReason, Settings
from inferkit.sampling import Sampled, sample

_log = logging.getLogger("inferkit")

Part = tuple[Entry, int]

# Positions of a pass whose logits are there at once, as for `SlottedRunner.score`.
_VERIFIED = 64


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for timelines.

    Attributes:
        began: When it began, in ns of ``time.perf_counter_ns``.
        ended: When its tokens had been handed out.
        forward: How long the model's forward passes took, in ns.
        prefill_tokens: Prompt tokens that it computed.
        decode_tokens: Tokens that it decoded; of a row whose guesses were right more than one.
        running: Requests that had a slot in it.
        waiting: Requests that had none.
        kv_bytes: Keys and values that the running requests had in the cache when it ended, also
            those that ended with it; 0 where transformers' ``generate`` keeps them.
    """

    began: int
    ended: int
    forward: int
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Why a request is over."""

    reason: FinishReason
    stop_reason: int | None = None
    error: InferkitError | None = None


class Stepper:
    """Works on an engine's requests, a step at a time. Used by the engine's thread alone.

    A pass that fails takes down as few requests as can be told apart, and the engine lives: a
    prefill is tried again prompt by prompt; a decode that runs out of memory gives up its newest
    request, and the others go on in the next step.

    Attributes:
        context: Most tokens of prompt and output together.
        guesser: Who guesses next tokens, which one pass checks; None where nobody does.
        on_finish: Called with each request that has ended.
        broken: Why nothing can run any more, if that is so.
    """

    def __init__(
        self,
        runner: SlottedRunner | SequentialRunner,
        scheduler: Scheduler,
        *,
        end_ids: frozenset[int],
        context: int,
        prefix_reuse: bool,
        settings: Callable[[], Settings],
        look: Callable[[], bool],
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.guesser: Guesser | None = None
        self.on_finish: list[Callable[[Request], None]] = []
        self.broken: InferkitError | None = None
        self._end_ids = end_ids
        self._settings = settings
        self._look = look
        self._prefix_reuse = prefix_reuse
        self._slots: Slots | None = None
        self._forward_ns = 0
        self.adopt(runner, scheduler.max_batch, context)

    # -- what the engine's loop does ------------------------------------------------------------

    def adopt(self, runner: SlottedRunner | SequentialRunner, max_batch: int, context: int) -> None:
        """Go on with this runner, while nothing runs; what its cache holds is not known."""
        self.runner = runner
        self.scheduler.max_batch = max_batch
        self.context = context
        self._slots = None
        if isinstance(runner, SlottedRunner):
            self._slots = Slots(runner.cache, self._prefix_reuse)

    def admit(self) -> None:
        """Start the requests that the policy lets in."""
        for entry in self.scheduler.admit():
            entry.request.settings = self._settings()
            if entry.prompt_length >= self.context:  # the context was made shorter meanwhile
                self._finish(entry, _Outcome("error", error=self._too_long(entry)))
            elif self._slots is not None:
                self._slots.take(entry)

    def step(self) -> StepRecord:
        """Prefill parts of prompts, and give a token to every request that is past its prompt."""
        began = time.perf_counter_ns()
        self._forward_ns = 0
        running, waiting = list(self.scheduler.running), len(self.scheduler.waiting)
        if isinstance(self.runner, SequentialRunner):
            prefilled, decoded = self._run_alone(running[0], self.runner)
        else:
            assert self._slots is not None
            ready = [e for e in self.scheduler.prefill_candidates() if self._slots.seed(e)]
            step = self.scheduler.step(ready)
            prefilled = sum(n for _, n in step.prefill)
            for parts in self._batches(step.prefill):
                self._prefill(parts)
            decoded = self._decode(step.decode) if step.decode else 0
        return StepRecord(
            began,
            time.perf_counter_ns(),
            self._forward_ns,
            prefilled,
            decoded,
            len(running),
            waiting,
            self._kv_bytes(running),
        )

    def _kv_bytes(self, entries: Sequence[Entry]) -> int:
        if isinstance(self.runner, SequentialRunner):
            return 0
        return self.runner.cache.bytes_of([entry.computed for entry in entries])

    def drop_cancelled(self) -> None:
        """End the requests that somebody cancelled; their slots are free for this step."""
        for entry in [*self.scheduler.running, *self.scheduler.waiting]:
            if entry.request.cancelled:
                self._finish(entry, _Outcome("cancelled"))

    def abandon(self, error: InferkitError | None) -> None:
        """End all requests for good: cancelled, or with ``error``."""
        outcome = _Outcome("error", error=error) if error else _Outcome("cancelled")
        for entry in [*self.scheduler.running, *self.scheduler.waiting]:
            self._publish(entry, outcome)
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()

    def resize(self, max_batch: int, context: int) -> None:
        """Change the number of slots and their length, while nothing runs.

        Raises:
            OptionError: At this context the model would be wrong over slots; nothing has changed.
            OutOfMemoryError: The cache could not be allocated; one of the old size is back.
        """
        if isinstance(self.runner, SequentialRunner):
            self.runner.context = context
        elif self._slots is not None:
            old = self.runner.cache.slots, self.runner.cache.context
            reason = reason_against(self.runner, context) if context > old[1] else None
            if reason is not None:
                raise OptionError(
                    f"context={context} is too long for batches: {reason}. Up to {old[1]} they "
                    f"share; for more, unload the model and load it with context={context}, where "
                    "its requests run one at a time."
                )
            _, problem = _attempt(self.runner.resize, max_batch, context)
            if problem is not None:
                self._put_back(*old)
                self.adopt(self.runner, *old)
                raise OutOfMemoryError(
                    f"The KV cache for max_batch={max_batch}, context={context} could not be "
                    f"allocated ({problem}); max_batch={old[0]}, context={old[1]} stay."
                )
        self.adopt(self.runner, max_batch, context)

    def _put_back(self, slots: int, context: int) -> None:
        """A cache of the old size, where one of another size could not be had."""
        assert isinstance(self.runner, SlottedRunner)
        _, problem = _attempt(self.runner.resize, slots, context)
        if problem is not None:
            self.broken = GenerationError(
                "The KV cache could not be changed, and memory for the old one is gone as well "
                f"({problem}). Free memory, and load the model again with ik.load."
            )
            raise self.broken

    # -- passes ---------------------------------------------------------------------------------

    def _batches(self, parts: Sequence[Part]) -> list[Sequence[Part]]:
        """All parts at once, or one by one where padding would leave the context."""
        if not parts:
            return []
        width = max(n for _, n in parts)
        if all(e.computed + width <= self.context for e, _ in parts):
            return [parts]
        return [[part] for part in parts]

    def _prefill(self, parts: Sequence[Part]) -> None:
        now = time.perf_counter_ns()
        for entry, _ in parts:
            entry.request.schedule(now, entry.computed)
        chosen, problem = _attempt(self._run_prefill, parts)
        if problem is None:
            for entry, n in parts:
                entry.computed += n
            now = time.perf_counter_ns()
            read = [e for e, _ in parts if not e.prefilling]
            for entry, sampled in zip(read, chosen, strict=True):
                self._hand_out(entry, sampled, now)
        elif len(parts) > 1:
            for part in parts:
                self._prefill([part])
        else:
            self._finish(parts[0][0], _Outcome("error", error=problem))

    def _run_prefill(self, parts: Sequence[Part]) -> list[Sampled]:
        """Run the pass; choose a first token for each prompt that it completes."""
        assert isinstance(self.runner, SlottedRunner)
        chunks = [
            Chunk(e.slot, e.tokens[e.computed : e.computed + n], e.computed) for e, n in parts
        ]
        width = self.runner.width(chunks)
        for entry, _ in parts:
            entry.written = max(entry.written, entry.computed + width)
        logits = self._timed(self.runner.prefill, chunks)
        rows = [i for i, (entry, n) in enumerate(parts) if n == entry.remaining]
        return self._choose([parts[i][0] for i in rows], logits[rows]) if rows else []

    def _decode(self, entries: Sequence[Entry]) -> int:
        """Give each entry a token, or several; return how many they were."""
        rows = sorted(entries, key=lambda e: e.slot)
        guesser = self.guesser  # another thread may replace it meanwhile
        guesses = self._guesses(guesser, rows)
        logits = None
        if any(guesses):
            logits, _ = _attempt(self._run_verify, rows, guesses)
        if logits is not None:
            chosen, problem = _attempt(self._accept, guesser, rows, guesses, logits)
        else:  # there is no guess, or checking failed, and the smaller pass may do
            chosen, problem = _attempt(self._run_decode, rows)
        if problem is not None:
            for entry in entries[-1:] if isinstance(problem, OutOfMemoryError) else entries:
                self._finish(entry, _Outcome("error", error=problem))
            return 0
        now = time.perf_counter_ns()
        before = sum(e.request.generated for e in rows)
        # Of all before one ends: another may move into its slot, with all that it has.
        for entry, tokens in zip(rows, chosen, strict=True):
            entry.computed += len(tokens)
        for entry, tokens in zip(rows, chosen, strict=True):
            for sampled in tokens:
                if not self._hand_out(entry, sampled, now):
                    break
        return sum(e.request.generated for e in rows) - before

    def _guesses(self, guesser: Guesser | None, entries: Sequence[Entry]) -> list[list[int]]:
        """What may come next of each entry, where that is to be guessed."""
        if guesser is None:
            return [[] for _ in entries]
        # All rows of a pass are as wide as the widest, which must end within the context; and in
        # the ring of a window what is written in vain must have left the window (see `cache`).
        room = min(self.context - max(e.computed for e in entries), self.runner.prefill_chunk)
        room = min(room, _VERIFIED // len(entries), MOST + 1) - 1
        rooms = []
        for request in (entry.request for entry in entries):
            # A penalty depends on the tokens before, which are not known when guesses are checked.
            guessable = request.params.repetition_penalty == 1.0
            left = request.params.max_tokens - request.generated - 1
            rooms.append(min(room, left) if guessable else 0)
        if max(rooms) < 1:
            return [[] for _ in entries]
        guesses, problem = _attempt(guesser.guess, entries, rooms)
        if problem is not None:  # a draft's: the text does not depend on it
            self.guesser = None
            _log.warning("Next tokens are no longer guessed: %s", problem)
            return [[] for _ in entries]
        return list(guesses)

    def _run_verify(
        self, entries: Sequence[Entry], guesses: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Run one pass over each entry's last token and its guesses; the logits after each."""
        assert isinstance(self.runner, SlottedRunner)
        chunks = [
            Chunk(e.slot, [e.tokens[e.computed], *guess], e.computed)
            for e, guess in zip(entries, guesses, strict=True)
        ]
        width = max(len(c.tokens) for c in chunks)
        for entry in entries:
            entry.written = max(entry.written, entry.computed + width)
        return torch.cat(self._timed(self.runner.verify, chunks))

    def _accept(
        self,
        guesser: Guesser | None,
        entries: Sequence[Entry],
        guesses: Sequence[Sequence[int]],
        logits: torch.Tensor,
    ) -> list[list[Sampled]]:
        """Choose the tokens of each entry, as far as they were guessed right, and one more.

        A token is chosen from the same distribution, by the same random number, as if there had
        been no guess, and counts if all guesses before it were right. So nothing but rounding can
        make it another one, drawn tokens included.
        """
        asked = [
            e for e, guess in zip(entries, guesses, strict=True) for _ in range(len(guess) + 1)
        ]
        chosen = iter(self._choose(asked, logits))
        found = []
        for entry, guess in zip(entries, guesses, strict=True):
            tokens = [next(chosen) for _ in range(len(guess) + 1)]
            right = _agreed(tokens, guess)
            entry.request.sampler.take_back(len(guess) - right)
            if guess:
                assert guesser is not None
                guesser.learn(entry, len(guess), right)
                entry.request.speculated(len(guess), right)
            found.append(tokens[: right + 1])
        return found

    def _run_decode(self, entries: Sequence[Entry]) -> list[list[Sampled]]:
        """Run the pass for entries in the order of their slots; choose one token for each."""
        assert isinstance(self.runner, SlottedRunner)
        assert self._slots is not None
        slots = [e.slot for e in entries]
        # A slot that is still being prefilled takes part with a token that its next part replaces,
        # a free one with one that nothing reads.
        decoding = {e.slot: e for e in entries}
        rows = range(self.runner.rows(max(slots) + 1))
        tokens = [decoding[s].tokens[decoding[s].computed] if s in decoding else 0 for s in rows]
        positions = [self._slots.next_position(s) for s in rows]
        logits = self._timed(self.runner.decode, tokens, positions)
        if len(rows) > len(entries):
            logits = logits[slots]
        return [[sampled] for sampled in self._choose(entries, logits)]

    def _run_alone(self, entry: Entry, runner: SequentialRunner) -> tuple[int, int]:
        before, choosing = entry.request.generated, 0

        def choose(logits: Any) -> int | None:
            """The next token, or None when the request is over."""
            nonlocal choosing
            since = time.perf_counter_ns()
            try:
                return chosen(logits)
            finally:
                choosing += time.perf_counter_ns() - since

        def chosen(logits: Any) -> int | None:
            closing = self._look()
            self.drop_cancelled()
            if not entry.request.done and closing:
                self._finish(entry, _Outcome("cancelled"))
            if entry.request.done:
                return None
            [sampled] = self._choose([entry], logits)
            self._hand_out(entry, sampled, time.perf_counter_ns())
            return None if entry.request.done else entry.tokens[-1]

        began = time.perf_counter_ns()
        entry.request.schedule(began, 0)
        _, problem = _attempt(runner.run, entry.tokens, choose)
        self._forward_ns = time.perf_counter_ns() - began - choosing
        made = entry.request.generated - before
        if problem is None and not made:
            problem = GenerationError("The model's generate ended without a token.")
        if problem is not None and not entry.request.done:
            self._finish(entry, _Outcome("error", error=problem))
        return entry.prompt_length, made

    def _timed(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        began = time.perf_counter_ns()
        out = forward(*inputs)
        self._forward_ns += time.perf_counter_ns() - began
        return out

    def _choose(self, entries: Sequence[Entry], logits: Any) -> list[Sampled]:
        began = time.perf_counter_ns()
        chosen = sample(logits, [e.request.sampler for e in entries])
        if logits.device.type != "cpu":
            # On a GPU the forward pass is over only when the chosen tokens have arrived.
            self._forward_ns += time.perf_counter_ns() - began
        return chosen

    # -- handing out ----------------------------------------------------------------------------

    def _hand_out(self, entry: Entry, sampled: Sampled, now: int) -> bool:
        """Give a request its token, and end it if it is done; return whether it goes on."""
        outcome, problem = _attempt(self._take, entry, sampled, now)
        if problem is not None:
            outcome = _Outcome("error", error=problem)
        if outcome is not None:
            self._finish(entry, outcome)
        return outcome is None

    def _take(self, entry: Entry, sampled: Sampled, now: int) -> _Outcome | None:
        if sampled.error is not None:
            return _Outcome("error", error=sampled.error)
        request, token_id = entry.request, sampled.token_id
        params = request.params
        entry.tokens.append(token_id)
        ends = token_id in params.stop_token_ids
        ends = ends or (token_id in self._end_ids and not params.ignore_eos)
        stopped = request.emit(sampled, now, end=ends)
        if ends:
            return _Outcome("stop", token_id)
        if stopped:
            return _Outcome("stop")
        if request.generated >= params.max_tokens or len(entry.tokens) >= self.context:
            return _Outcome("length")
        return None

    def _too_long(self, entry: Entry) -> PromptError:
        return PromptError(
            f"The prompt has {entry.prompt_length} tokens, and while it waited the context was "
            f"changed to {self.context}, which must hold one more: shorten the prompt, or enlarge "
            "the context with model.configure(context=...)."
        )

    def _finish(self, entry: Entry, outcome: _Outcome) -> None:
        self.scheduler.remove(entry)
        try:
            if self._slots is not None and entry.slot >= 0:
                self._slots.free(entry, keep=outcome.reason != "error")
        finally:
            self._publish(entry, outcome)

    def _publish(self, entry: Entry, outcome: _Outcome) -> None:
        entry.request.finish(outcome.reason, stop_reason=outcome.stop_reason, error=outcome.error)
        for listener in self.on_finish:
            try:
                listener(entry.request)
            except Exception:  # a listener's fault is not the request's
                _log.exception("A listener failed on %r.", entry.request)


def _agreed(tokens: Sequence[Sampled], guess: Sequence[int]) -> int:
    """How many first tokens were guessed right."""
    right = 0
    while right < len(guess) and tokens[right].token_id == guess[right]:
        right += 1
    return right


def _attempt(work: Callable[..., Any], *inputs: Any) -> tuple[Any, GenerationError | None]:
    """What ``work(*inputs)`` returns, or what went wrong in it.

    The error is ours, without the traceback's frames: they would keep tensors alive, which after
    running out of memory is the worst of times.
    """
    try:
        return work(*inputs), None
    except Exception as error:  # whatever a model's code may raise
        return None, _explain(error)


def _explain(error: Exception) -> GenerationError:
    first = str(error).strip().split("\n", 1)[0]
    problem: GenerationError
    if out_of_memory(error):
        problem = OutOfMemoryError(
            f"The device ran out of memory while this request ran ({first}). The other requests "
            "go on. Lower max_batch or context with model.configure(), or load quantized."
        )
    else:
        problem = GenerationError(f"The model failed: {type(error).__name__}: {first}")
    problem.add_note("".join(traceback.format_exception(error)))
    return problem
