"""What a prompt's cell shows: settings, prompt and answer, and its latency while it runs and after.

In a notebook every part is an output of its own that is updated in place, so that a saved notebook
has the last state of each and reads without a kernel. In a terminal the text streams to stdout.
"""

from __future__ import annotations

import re
import sys
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from inferkit.generation import Generation, Generations
from inferkit.html import counted, format_number, one_line, table, text_table
from inferkit.sampling import SamplingParams
from inferkit.trace import NS, acceptance

if TYPE_CHECKING:
    from inferkit.engine import Request

INTERVAL = 0.1
"""Seconds between two looks at the requests."""

INTERRUPTED = "Interrupted; what was generated is in _infer."

_SHORT = 400  # characters of a prompt that is shown whole
_SHORT_LINES = 8
_TITLE = 72  # characters of a prompt in its title
_PRE = "white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0"
_SMALL = "opacity:.75;font-size:90%;margin:2px 0"
_HEADER = ("prompt", "finish", "tokens", "queue ms", "TTFT ms", "TPOT ms", "E2E ms")
_DEFINITIONS = "TTFT, TPOT and E2E as vllm bench serve defines them; queue: arrival to first step."

Bundle = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The prompts of one cell and the requests that answer them, in the same order.

    Attributes:
        prompts: As they were written.
        requests: One for each.
        chat: Whether the chat template was put around them.
        raw: Whether answers are shown as they are, and not as Markdown.
        variables: Names of those whose values stand in the prompts.
    """

    prompts: Sequence[str]
    requests: Sequence[Request]
    chat: bool = False
    raw: bool = False
    variables: Sequence[str] = ()

    def settings(self) -> list[str]:
        """What the answers and their latency depend on, in a few words each."""
        request = self.requests[0]
        ran = request.settings
        return [
            f"model {ran.model}",
            f"quantization {ran.quantization}",
            ran.device,
            ran.dtype,
            f"{ran.batching} batching, at most {ran.max_batch}",
            *([f"speculation {ran.speculative}"] if ran.speculative != "off" else []),
            *(["chat template"] if self.chat else []),
            *([f"with the variables {', '.join(self.variables)}"] if self.variables else []),
            *_sampling(request.params, request.sampler.seed),
        ]


class View(Protocol):
    """Where a run is shown."""

    def draw(self) -> None:
        """Show what is new; called every `INTERVAL` or so."""

    def finish(self, generations: Generations, interrupted: bool) -> None:
        """Show the end."""


def view(shell: Any, run: Run) -> View:
    """The view that suits an IPython shell: a notebook's where it has a kernel."""
    return NotebookView(run) if in_notebook(shell) else TerminalView(run)


def in_notebook(shell: Any) -> bool:
    """Whether an IPython shell is a kernel's; else it is a terminal's, or there is none."""
    return hasattr(shell, "kernel")


def follow(run: Run, view: View) -> tuple[Generations, bool]:
    """Draw until all requests have ended; return the results, and whether it was interrupted.

    An interrupt cancels the requests and keeps their text. The waits are short, so that it is
    noticed on every platform.
    """
    interrupted = False
    try:
        while pending := [request for request in run.requests if not request.done]:
            view.draw()
            try:
                pending[0].result(timeout=INTERVAL)
            except TimeoutError:
                continue
    except BaseException as error:
        for request in run.requests:
            request.cancel()
        if not isinstance(error, KeyboardInterrupt):
            raise
        interrupted = True
    return Generations(request.result() for request in run.requests), interrupted


class NotebookView:
    """Outputs that are updated in place: settings, each prompt with its answer, the latency."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._meter = Meter(run.requests)
        self._texts = [Text(request) for request in run.requests]
        self._header_bundle = _header(run)
        self._header = show(self._header_bundle, display_id=True)
        self._answers = []
        for number, prompt in enumerate(run.prompts, start=1):
            show(_prompt(prompt, number if len(run.prompts) > 1 else None), display_id=True)
            self._answers.append(show(_verbatim(""), display_id=True))
        self._latency = show(_line(str(self._meter)), display_id=True)
        self._drawn = time.monotonic()

    def draw(self) -> None:
        """Update the answers that have grown, and the line of latency."""
        now = time.monotonic()
        if now - self._drawn < INTERVAL:
            return
        self._drawn = now
        for text, answer in zip(self._texts, self._answers):
            if text.read():
                answer.update(_verbatim(text.so_far), raw=True)
        self._meter.read()
        self._latency.update(_line(str(self._meter)), raw=True)

    def finish(self, generations: Generations, interrupted: bool) -> None:
        """Put the final texts and the table of latency in the place of the live ones."""
        header = _header(self._run)  # a mode that changed while it waited is known now
        if header != self._header_bundle:
            self._header.update(header, raw=True)
        for gen, answer in zip(generations, self._answers):
            answer.update(_answer(gen.text, self._run.raw), raw=True)
        self._latency.update(_latency_bundle(generations, interrupted), raw=True)


class TerminalView:
    """Text on stdout as it comes, one prompt after the other, and a table at the end."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._texts = [Text(request) for request in run.requests]
        self._shown = 0  # prompts whose heading is written
        print(" · ".join(run.settings()))

    def draw(self) -> None:
        """Write what is new of the first request that has not ended, and of those before it."""
        for index, text in enumerate(self._texts):
            done = text.request.done  # before its text is read, so that nothing comes after it
            self._write_new(index, text)
            if not done:
                return

    def finish(self, generations: Generations, interrupted: bool) -> None:
        """Write what is left of every text, and the table of latency."""
        for index, text in enumerate(self._texts):
            self._write_new(index, text)
        print()
        print(_latency_text(generations, interrupted))

    def _write_new(self, index: int, text: Text) -> None:
        if len(self._texts) > 1 and index >= self._shown:
            title = one_line(self._run.prompts[index], _TITLE)
            print(f"{chr(10) if index else ''}=== {index + 1}: {title}")
            self._shown = index + 1
        sys.stdout.write(text.read())
        sys.stdout.flush()


class Text:
    """The text of a request as far as it has been read."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.so_far = ""
        self._pieces = 0

    def read(self) -> str:
        """What has come since the last call; never makes the engine wait."""
        pieces = self.request.pieces_since(self._pieces)
        self._pieces += len(pieces)
        new = "".join(pieces)
        self.so_far += new
        return new


class Meter:
    """The latency so far of requests that run, as a line of text."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._counts = [0] * len(requests)
        self._latest = [request.arrival for request in requests]
        self._ttfts: list[float] = []
        self._gaps: list[float] = []  # sorted, in seconds
        self._newest = (0, 0.0)  # when the last gap ended, and the gap

    def read(self) -> None:
        """Take in the tokens that have come since the last call."""
        for index, request in enumerate(self._requests):
            for moment in request.times_since(self._counts[index]):
                gap = (moment - self._latest[index]) * NS
                if not self._counts[index]:
                    self._ttfts.append(gap)
                elif gap:  # the tokens of one pass come together, with one gap before them
                    insort(self._gaps, gap)
                    self._newest = max(self._newest, (moment, gap))
                self._counts[index] += 1
                self._latest[index] = moment

    def __str__(self) -> str:
        start = min(request.arrival for request in self._requests)
        elapsed = (time.perf_counter_ns() - start) * NS
        tokens = sum(self._counts)
        many = len(self._requests) > 1
        parts = [f"{elapsed:.1f} s", counted(tokens, "token")]
        if self._ttfts:
            parts.append(f"TTFT{' p50' if many else ''} {_ms(median(self._ttfts))} ms")
            parts.append(f"{tokens / elapsed:.1f} tokens/s")
        if self._gaps:
            middle = self._gaps[len(self._gaps) // 2]
            parts.insert(3, f"ITL p50 {_ms(middle)} ms, last {_ms(self._newest[1])} ms")
        if many:
            done = sum(request.done for request in self._requests)
            parts.append(f"{done} of {len(self._requests)} done")
        return " · ".join(parts)


def output_rate(generations: Sequence[Generation]) -> float | None:
    """Output tokens per second from the first arrival to the last token; all requests count."""
    traces = [gen.latency.trace for gen in generations]
    last = max((trace.tokens[-1] for trace in traces if trace.tokens), default=None)
    if last is None:
        return None
    seconds = (last - min(trace.arrival for trace in traces)) * NS
    return sum(len(trace.tokens) for trace in traces) / seconds if seconds > 0 else None


def show(bundle: Bundle, **options: Any) -> Any:
    """Display a bundle of MIME types as it is; options as of ``IPython.display.display``."""
    from IPython.display import display

    return display(bundle, raw=True, **options)  # type: ignore[no-untyped-call]


# -- parts ----------------------------------------------------------------------------------------


def _header(run: Run) -> Bundle:
    facts = " · ".join(run.settings())
    return {"text/html": f'<div class="inferkit" style="{_SMALL}">{escape(facts)}</div>'} | {
        "text/plain": facts
    }


def _prompt(prompt: str, number: int | None) -> Bundle:
    """A prompt, numbered where there are several; a long one is folded up."""
    title = "Prompt" if number is None else f"Prompt {number}"
    whole = f'<div style="{_PRE};opacity:.75">{escape(prompt)}</div>'
    if len(prompt) <= _SHORT and prompt.count("\n") < _SHORT_LINES:
        html = f'<div style="font-weight:600">{title}</div>{whole}'
    else:
        summary = f"<b>{title}</b> {escape(one_line(prompt, _TITLE))} ({len(prompt):,} characters)"
        html = f"<details><summary>{summary}</summary>{whole}</details>"
    return {"text/html": f'<div class="inferkit">{html}</div>', "text/plain": f"{title}: {prompt}"}


def _verbatim(text: str) -> Bundle:
    html = f'<div class="inferkit" style="{_PRE}">{escape(text) or "…"}</div>'
    return {"text/html": html, "text/plain": text}


def _answer(text: str, raw: bool) -> Bundle:
    if not text.strip():
        html = f'<div class="inferkit" style="{_SMALL}"><i>no text</i></div>'
        return {"text/html": html, "text/plain": text}
    return _verbatim(text) if raw else {"text/markdown": _no_html(text), "text/plain": text}


# What shows "<" as it is: fenced and indented code, code in a line, and formulas.
_CODE = re.compile(
    r"(^(```+|~~~+).*?(?:^\2|\Z) | ^(?:\ {4}|\t).*?$ | (`+)(?!`).*?(?<!`)\3(?!`) | \$[^$\n]+\$)",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def _no_html(text: str) -> str:
    """Markdown whose tags are shown: JupyterLab would take them as HTML, and most of them out."""
    shown, end = [], 0
    for code in _CODE.finditer(text):
        shown += [_TAG.sub("&lt;", text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*shown, _TAG.sub("&lt;", text[end:])])


def _line(text: str) -> Bundle:
    html = f'<div class="inferkit" style="{_SMALL};font-variant-numeric:tabular-nums">'
    return {"text/html": f"{html}{escape(text)}</div>", "text/plain": text}


def _latency_bundle(generations: Generations, interrupted: bool) -> Bundle:
    note = f"{_total(generations)} {_DEFINITIONS}"
    html = table(_HEADER, _rows(generations), note=note)
    if interrupted:
        html = f'<div class="inferkit"><b>{escape(INTERRUPTED)}</b></div>{html}'
    return {"text/html": html, "text/plain": _latency_text(generations, interrupted)}


def _latency_text(generations: Generations, interrupted: bool) -> str:
    lines = [text_table(_HEADER, _rows(generations)), _total(generations), _DEFINITIONS]
    return "\n".join(([INTERRUPTED] if interrupted else []) + lines)


def _total(generations: Generations) -> str:
    tokens = sum(len(gen.token_ids) for gen in generations)
    rate = format_number(output_rate(generations))
    total = f"{counted(tokens, 'token')}, {rate} output tokens/s."
    accepted = acceptance(gen.latency for gen in generations)
    return total if accepted is None else f"{total} Guessed tokens accepted: {accepted}."


def _rows(generations: Generations) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for number, gen in enumerate(generations, start=1):
        latency = gen.latency
        times = (latency.queue, latency.ttft, latency.tpot, latency.e2e)
        shown = ("–" if seconds is None else _ms(seconds) for seconds in times)
        rows.append((number, gen.finish_reason, len(gen.token_ids), *shown))
    return rows


def _sampling(params: SamplingParams, seed: int) -> list[str]:
    """Length, temperature and seed, and of the rest what is not as usual."""
    others = (f for f in fields(params) if f.name not in ("max_tokens", "temperature", "seed"))
    changed = [
        f"{f.name}={getattr(params, f.name)!r}"
        for f in others
        if getattr(params, f.name) != f.default
    ]
    greedy = "greedy" if params.temperature == 0 else f"temperature={params.temperature:g}"
    return [f"max_tokens={params.max_tokens}", greedy, *changed, f"seed={seed}"]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
