"""Request: the live handle on a prompt that the engine works on, safe to use from any thread."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from inferkit.engine.detokenize import Detokenizer
from inferkit.errors import ForkedProcessError, GenerationError, InferkitError
from inferkit.generation import FinishReason, Generation, Settings
from inferkit.sampling import RowSampler, Sampled, SamplingParams, TokenLogprobs
from inferkit.trace import Latency, Trace

_log = logging.getLogger("inferkit")
_ids = itertools.count(1)
# A wait that is cut into pieces can be interrupted on every platform.
_TICK = 0.25


class Request:
    """A prompt on its way: iterate it for text, ``await`` it or call `result` for the Generation.

    Every method may be called from any thread. Each iteration starts at the first piece of text,
    so that two readers see the same.

    Attributes:
        id: A number unique in this process.
        prompt: The prompt as given; None where token ids were given.
        prompt_token_ids: The prompt's tokens.
        params: The sampling parameters.
        settings: What it runs under; until it starts, what it was submitted under.
        arrival: When it was submitted, in ns of ``time.perf_counter_ns``.
    """

    def __init__(
        self,
        prompt: str | None,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        settings: Settings,
        detokenizer: Detokenizer,
        on_cancel: Callable[[], None],
        *,
        arrival: int | None = None,
    ) -> None:
        self.id = next(_ids)
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.sampler = RowSampler(params, prompt_token_ids)
        self.settings = settings
        self.arrival = time.perf_counter_ns() if arrival is None else arrival
        self._detokenizer: Detokenizer | None = detokenizer
        self._on_cancel: Callable[[], None] | None = on_cancel
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._times: list[int] = []
        self._text_ends: list[int] = []
        self._length = 0  # of the text so far
        self._logprobs: list[TokenLogprobs] = []
        self._scheduled: int | None = None
        self._cached = 0
        self._guessed = 0
        self._right = 0
        self._cancelled = False
        self._generation: Generation | None = None
        self._listeners: list[Callable[[], None]] = []

    # -- for whoever holds the handle -----------------------------------------------------------

    @property
    def status(self) -> str:
        """One of "waiting", "running", or the finish reason."""
        with self._changed:
            if self._generation is not None:
                return self._generation.finish_reason
            return "waiting" if self._scheduled is None else "running"

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._generation is not None

    @property
    def text(self) -> str:
        """The text so far."""
        with self._changed:
            return "".join(self._pieces)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far."""
        with self._changed:
            return tuple(self._token_ids)

    def times_since(self, index: int) -> list[int]:
        """When its tokens from number ``index`` on came, in ns of ``time.perf_counter_ns``.

        For views that look often: it never makes the engine wait, for a slice of a list that only
        grows needs no lock.
        """
        return self._times[index:]

    def pieces_since(self, index: int) -> list[str]:
        """Its pieces of text from number ``index`` on; see `times_since`."""
        return self._pieces[index:]

    def tokens_since(self, index: int) -> list[tuple[int, int, int]]:
        """Its tokens from number ``index`` on; see `times_since`.

        Each is its id, when it came, and how many characters of text there were then.
        """
        # The last list first: the others are never shorter.
        ends = self._text_ends[index:]
        return list(zip(self._token_ids[index:], self._times[index:], ends))

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that needed no prefill; 0 while it waits."""
        return self._cached

    @property
    def scheduled(self) -> int | None:
        """When the first step that it took part in began (ns); None while it waits."""
        return self._scheduled

    @property
    def latency(self) -> Latency:
        """Its timing; while it runs, the timing so far."""
        with self._changed:
            if self._generation is not None:
                return self._generation.latency
            return Latency(self._trace(None))

    def cancel(self) -> None:
        """Stop it: the slot is free by the engine's next step, and the text so far is kept."""
        self._cancelled = True
        wake = self._on_cancel
        if wake is not None:
            wake()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end and return the Generation; an error is in its ``error``.

        Raises:
            TimeoutError: ``timeout`` seconds went by first; the request goes on.
            ForkedProcessError: It runs in the process that this one is a fork of.
        """
        self._check_process()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._generation is None:
                left = _TICK if deadline is None else min(_TICK, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError(
                        f"Request {self.id} is not done after {timeout} s; it goes on. "
                        "Call result() again, or cancel()."
                    )
                self._changed.wait(left)
            return self._generation

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they come; raises the request's error at its end, if it has one."""
        self._check_process()
        for index in itertools.count():
            with self._changed:
                while index >= len(self._pieces) and self._generation is None:
                    self._changed.wait(_TICK)
                if index >= len(self._pieces):
                    break
                piece = self._pieces[index]
            yield piece
        self.result().raise_for_error()

    async def __aiter__(self) -> AsyncIterator[str]:
        """The same in a coroutine: ``async for piece in request``."""
        async with self._news() as news:
            for index in itertools.count():
                while index >= len(self._pieces) and self._generation is None:
                    await self._next(news)
                if index >= len(self._pieces):
                    break
                yield self._pieces[index]
        self.result().raise_for_error()

    def __await__(self) -> Generator[Any, None, Generation]:
        """The Generation; an error is in its ``error``. Cancelling the task cancels the request."""
        return self._wait().__await__()

    async def _wait(self) -> Generation:
        async with self._news() as news:
            while self._generation is None:
                await self._next(news)
        return self._generation

    async def _next(self, news: asyncio.Event) -> None:
        try:
            await news.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        news.clear()

    @asynccontextmanager
    async def _news(self) -> AsyncIterator[asyncio.Event]:
        """An event of the running loop that is set whenever something is published."""
        self._check_process()
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.set)

        with self._changed:
            self._listeners.append(wake)
        try:
            yield news
        finally:
            with self._changed:
                self._listeners.remove(wake)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise forked(f"Request {self.id} was submitted", self._pid)

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.status}: {self.text!r}>"

    # -- for the engine's thread ----------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop it."""
        return self._cancelled

    def schedule(self, now: int, cached: int) -> None:
        """It takes part in a step for the first time; ``cached`` prompt tokens need no prefill."""
        with self._changed:
            if self._scheduled is None:
                self._scheduled, self._cached = now, cached

    def speculated(self, guessed: int, right: int) -> None:
        """A pass checked so many guessed tokens, of which the first so many were right."""
        with self._changed:
            self._guessed += guessed
            self._right += right

    def emit(self, sampled: Sampled, now: int, *, end: bool) -> bool:
        """Take a token at ``now`` (ns); return whether a stop string ended the text.

        An ``end`` token is kept in the ids, and its text is not shown.
        """
        detokenizer = self._detokenizer
        assert detokenizer is not None, "the request has ended"
        with self._changed:
            self._token_ids.append(sampled.token_id)
            self._times.append(now)
            if sampled.logprobs is not None:
                self._logprobs.append(sampled.logprobs)
            piece = "" if end else detokenizer.add(sampled.token_id)
            self._length += len(piece)
            # Others read without the lock, tokens before text: a token's text is there before it.
            if piece:
                self._pieces.append(piece)
            self._text_ends.append(self._length)
            self._publish()
        return detokenizer.stopped_by is not None

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: InferkitError | None = None,
    ) -> Generation:
        """End it, and let go of the tokenizer and the engine, whoever keeps this handle."""
        with self._changed:
            if self._generation is not None:
                return self._generation
            rest, stopped_by, problem = self._flush()
            if problem is not None and error is None:
                reason, error = "error", problem
            if rest:
                self._pieces.append(rest)
            self._generation = Generation(
                prompt=self.prompt,
                text="".join(self._pieces),
                token_ids=tuple(self._token_ids),
                prompt_token_ids=self.prompt_token_ids,
                finish_reason=reason,
                stop_reason=stopped_by or stop_reason,
                latency=Latency(self._trace(reason)),
                params=self.params,
                seed=self.sampler.seed,
                settings=self.settings,
                logprobs=tuple(self._logprobs) if self.params.logprobs else None,
                error=error,
            )
            # The handle must not keep the tokenizer (hundreds of MB) once the model is unloaded.
            self._detokenizer = self._on_cancel = None
            self._publish()
            return self._generation

    def _flush(self) -> tuple[str, str | None, GenerationError | None]:
        """The text held back, the stop string that ended it, and what the tokenizer failed with."""
        detokenizer = self._detokenizer
        assert detokenizer is not None, "the request has ended"
        try:
            return detokenizer.flush(), detokenizer.stopped_by, None
        except Exception as error:  # a tokenizer may bring any code
            problem = GenerationError(
                f"The end of the text could not be decoded: {type(error).__name__}: {error}"
            )
            return "", detokenizer.stopped_by, problem

    @property
    def generated(self) -> int:
        """Number of tokens so far."""
        return len(self._token_ids)

    def _publish(self) -> None:
        self._changed.notify_all()
        for wake in self._listeners:
            try:
                wake()
            except RuntimeError:  # its event loop was closed in this very moment
                _log.debug("A reader of request %s is gone.", self.id)

    def _trace(self, reason: FinishReason | None) -> Trace:
        times = tuple(self._times)
        chunks = tuple(dict.fromkeys(times))  # the tokens of one pass have one time
        return Trace(
            arrival=self.arrival,
            scheduled=self._scheduled,
            tokens=times,
            chunks=None if len(chunks) == len(times) else chunks,
            draft_tokens=self._guessed,
            accepted_tokens=self._right,
            finished=None if reason is None else time.perf_counter_ns(),
            prompt_tokens=len(self.prompt_token_ids),
            cached_tokens=self._cached,
            ok=reason in (None, "stop", "length"),
            finish_reason=reason,
        )


def forked(what: str, pid: int) -> ForkedProcessError:
    """The error for ``what``, which happened in process ``pid``, of which this one is a fork."""
    return ForkedProcessError(
        f"{what} in process {pid}, and this is its fork {os.getpid()}, which has no engine thread "
        "and in which torch's threads do not work. Start the process with multiprocessing's "
        "'spawn' method and load the model there."
    )
