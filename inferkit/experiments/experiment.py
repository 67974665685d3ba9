"""Experiment: what was recorded, as objects: generations, latency, tables, figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferkit import errors
from inferkit.errors import ExperimentError, GenerationError, InferkitError, OptionError
from inferkit.experiments import store
from inferkit.experiments.environment import describe
from inferkit.experiments.file import (
    Environment,
    ExperimentFile,
    ModelEntry,
    RequestEntry,
    unpack,
)
from inferkit.generation import Generation, Generations, Settings
from inferkit.html import counted, one_line, table, text_table
from inferkit.latency import LatencySummary, summarize
from inferkit.sampling import SamplingParams
from inferkit.trace import NS, Latency, Trace

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from inferkit.experiments.difference import Difference

__all__ = ["Experiment", "checked_pause", "generation_of", "open", "open_experiment", "opened"]

_SHOWN = 20  # requests that a table of an experiment has


class Experiment:
    """Requests with their tokens and times, what they ran on, and what changed meanwhile.

    Made by `inferkit.record` and `inferkit.open`. What is recorded grows until the end of the
    ``with`` block.

    Args:
        file: What the file says.
        path: Where it is.
        fresh: Whether it was measured by this process.
        lock: Held by whoever still adds to the file.
    """

    def __init__(
        self,
        file: ExperimentFile,
        path: Path | None = None,
        *,
        fresh: bool = False,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.file = file
        self.path = path
        self._fresh = fresh
        self._lock = lock or nullcontext()

    def as_recorded(self) -> Experiment:
        """The same for whoever sees it later or elsewhere: its origin is a day and a machine.

        "Measured here and now" is true only while the process that measured shows it; files get
        this one.
        """
        return Experiment(self.file, self.path, lock=self._lock)

    # -- facts ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it is called."""
        return self.file.name

    @property
    def created(self) -> datetime:
        """When it began, in UTC."""
        return datetime.fromisoformat(self.file.created)

    @property
    def complete(self) -> bool:
        """Whether it was brought to its end; otherwise its last moments may be missing."""
        return self.file.duration is not None

    @property
    def duration(self) -> float | None:
        """Seconds from beginning to end; None without an end."""
        return None if self.file.duration is None else self.file.duration * NS

    @property
    def redacted(self) -> bool:
        """Whether prompts and outputs were left out."""
        return self.file.redacted

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know."""
        return tuple(self.file.notes)

    @property
    def environment(self) -> Environment:
        """Versions, processor, devices, git commit, notebook."""
        return self.file.environment

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The models that requests ran on, in order; not those that only stood by."""
        ran = dict.fromkeys(one.model for one in self.file.requests)
        return tuple(self.file.models[number] for number in ran)

    @property
    def origin(self) -> str:
        """When and on what it was measured, as tables and figures of it say."""
        verb = "recorded" if self.file.source == "inferkit" else f"by {self.file.source}"
        if self._fresh:
            verb = "measured here and now,"
        where = describe(self.environment)
        return f"{verb} {self.created:%Y-%m-%d}{' on ' if where else ''}{where}"

    @property
    def generations(self) -> Generations:
        """The requests that have ended, in order of arrival."""
        origin = self.origin
        return Generations(generation_of(one, origin) for one in self._ended)

    # -- figures --------------------------------------------------------------------------------

    def summary(self, **options: Any) -> LatencySummary:
        """The latency of all requests together; options as for `inferkit.summarize`.

        Raises:
            OptionError: There are none, or an option is wrong.
        """
        done = self.generations
        if not done:
            raise OptionError(f"The experiment {self.name!r} has no request that ended.")
        return summarize(done, **{"origin": self.origin} | options)

    def plot(self) -> go.Figure:
        """Its tokens over time, the gaps between them and the percentiles, as a plotly figure."""
        return self.summary().plot()

    def to_frame(self) -> pd.DataFrame:
        """One row per request; times in seconds, arrival since the beginning.

        The finish reason of one that had not ended is missing.
        """
        import pandas as pd

        return pd.DataFrame(map(self._row, self.file.requests)).rename_axis("request")

    def diff(self, other: Experiment) -> Difference:
        """This experiment beside another: latency, ratios, intervals, outputs.

        Raises:
            OptionError: ``other`` is none, or one of the two has no request that succeeded.
        """
        from inferkit.experiments.difference import Difference

        return Difference(self, other)

    # -- writing --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write it to a file, whole or not at all.

        Args:
            path: Of the file; ``.json`` is usual.
            overwrite: Replace a file that is there.

        Raises:
            OptionError: There is a file already, or no folder for it; the path is none.
            ExperimentError: It cannot be written.
        """
        target = store.local_path(path)
        advice = "; nothing is lost: save it elsewhere with .save(path)."
        with store.writing(target, advice), self._lock:
            store.write(self.file, target, overwrite=overwrite)
        self.path = self.path or target
        return target

    def export(
        self,
        path: str | os.PathLike[str],
        kind: str | None = None,
        *,
        overwrite: bool = False,
        other: Experiment | None = None,
    ) -> Path:
        """Write it in another form.

        Args:
            path: Of the file.
            kind: "html", a report in one page that works offline; "csv" or "parquet", a row for
                each request; "vllm", the JSON of ``vllm bench serve --save-result
                --save-detailed``; "aiperf", AIPerf's JSONL; "playback", a notebook that plays its
                file. None goes by the end of the name: .html, .csv, .parquet, .jsonl (AIPerf's),
                .ipynb.
            overwrite: Replace a file that is there.
            other: An experiment to compare it with, in a report.

        Raises:
            OptionError: There is a file already, or it does not say which form; the path is none.
            ExperimentError: It cannot be written.
        """
        from inferkit.experiments import exports, player, report

        target = store.local_path(path)
        if kind == "playback" or (kind is None and target.suffix.lower() == ".ipynb"):
            return player.to_notebook(self, target, overwrite=overwrite)
        if kind == "html" or (kind is None and target.suffix.lower() in (".html", ".htm")):
            return report.to_html(self, target, overwrite=overwrite, other=other)
        return exports.write(self, target, kind, overwrite=overwrite)

    # -- shown ----------------------------------------------------------------------------------

    @property
    def _ended(self) -> list[RequestEntry]:
        return [one for one in self.file.requests if one.finish_reason is not None]

    def _row(self, one: RequestEntry) -> dict[str, Any]:
        gen = generation_of(one)
        names = ("queue", "ttft", "tpot", "e2e")
        return {
            "model": self.file.models[one.model].name,
            "quantization": gen.settings.quantization,
            "batching": gen.settings.batching,
            "max_batch": gen.settings.max_batch,
            "prompt": gen.prompt,
            "text": gen.text,
            "finish_reason": one.finish_reason,
            "prompt_tokens": one.prompt_tokens,
            "output_tokens": gen.latency.output_tokens,
            "arrival": one.arrival * NS,
            **{name: getattr(gen.latency, name) for name in names},
        }

    _HEADER = ("model", "mode", "prompt", "text", "finish", "tokens", "TTFT ms", "TPOT ms")

    def _rows(self) -> Sequence[Sequence[object]]:
        rows = []
        for one in self.file.requests[:_SHOWN]:
            row = self._row(one)
            left_out = f"{one.prompt_tokens} tokens"
            rows.append(
                (
                    row["model"],
                    row["quantization"],
                    one_line(row["prompt"] or left_out, 32),
                    one_line(row["text"], 48) or "-",
                    row["finish_reason"] or "not ended",
                    row["output_tokens"],
                    *("-" if row[n] is None else f"{1e3 * row[n]:.1f}" for n in ("ttft", "tpot")),
                )
            )
        return rows

    def _caption(self) -> str:
        ended, all_of_them = len(self._ended), len(self.file.requests)
        count = counted(all_of_them, "request")
        if ended < all_of_them:
            count = f"{count}, {all_of_them - ended} of them not ended"
        return f"Experiment {self.name!r}: {count}, {self.origin}"

    def _footer(self) -> str:
        more = len(self.file.requests) - _SHOWN
        rest = [f"and {more} more: .to_frame() has all"] if more > 0 else []
        return "; ".join([*rest, *self.notes])

    def __repr__(self) -> str:
        parts = [self._caption()]
        if self.file.requests:
            parts.append(text_table(self._HEADER, self._rows()))
        return "\n".join(part for part in (*parts, self._footer()) if part)

    def _repr_html_(self) -> str:
        return table(self._HEADER, self._rows(), caption=self._caption(), note=self._footer())


def open_experiment(path: str | os.PathLike[str]) -> Experiment:
    """Read an experiment; also one that was not brought to its end, as far as its journal goes.

    Neither the model nor the hardware is needed to look at it. Everything it shows says where and
    when it was recorded; `inferkit.replay` measures it here and now.

    Raises:
        OptionError: ``path`` is no path.
        ExperimentError: There is no such file; it is damaged, of a later version, or something
            else.
    """
    source = store.local_path(path)
    file = store.read(source)
    for number, one in enumerate(file.requests):
        try:
            generation_of(one)
        except (OptionError, TypeError) as error:
            raise ExperimentError(
                f"{source.name} is damaged or was edited: request {number}: {error}"
            ) from None
    return Experiment(file, source)


def opened(experiment: Experiment | str | os.PathLike[str]) -> Experiment:
    """An experiment as it is, or the one at a path; errors as for `open_experiment`."""
    return experiment if isinstance(experiment, Experiment) else open_experiment(experiment)


def checked_pause(pause: Any) -> float:
    """Seconds that nothing may happen, or an OptionError."""
    if not isinstance(pause, int | float) or isinstance(pause, bool) or not pause >= 0:
        raise OptionError(f"pause={pause!r}: give seconds, 0 or more.")
    return float(pause)


def generation_of(one: RequestEntry, origin: str = "") -> Generation:
    """A recorded request as the Generation that it gave, with what is to be said of its origin."""
    return Generation(
        prompt=one.prompt,
        text=one.text,
        token_ids=tuple(unpack(one.token_ids)),
        prompt_token_ids=tuple(unpack(one.prompt_token_ids)),
        finish_reason=one.finish_reason,  # type: ignore[arg-type]
        stop_reason=one.stop_reason,
        latency=Latency(trace_of(one), origin),
        params=SamplingParams.of(_known(SamplingParams, one.params)),
        seed=one.seed,
        settings=Settings(**_known(Settings, one.settings)),
        error=_error(one),
    )


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that this version has a field for; a later one may have added others."""
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def trace_of(one: RequestEntry) -> Trace:
    """When everything happened to a recorded request, in ns since the beginning."""
    return Trace(
        arrival=one.arrival,
        scheduled=one.scheduled,
        tokens=tuple(unpack(one.tokens)),
        finished=one.finished,
        prompt_tokens=one.prompt_tokens,
        cached_tokens=one.cached_tokens,
        ok=one.finish_reason in (None, "stop", "length"),
        finish_reason=one.finish_reason,
        chunks=None if one.chunks is None else tuple(unpack(one.chunks)),
        draft_tokens=one.draft_tokens,
        accepted_tokens=one.accepted_tokens,
    )


def _error(one: RequestEntry) -> InferkitError | None:
    if one.error is None:
        return None
    name, message = [*one.error, "", ""][:2]
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, GenerationError):
        return kind(message)
    return GenerationError(message)


open = open_experiment  # what it is called in the package
