"""Precisions, batch sizes and policies side by side: every figure with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from inferkit.errors import OptionError
from inferkit.html import format_number, listed, table, text_table
from inferkit.intervals import Interval, bootstrap
from inferkit.latency import LatencySummary, summarize
from inferkit.quality import Fidelity
from inferkit.trace import Latency

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["FIGURES", "Cell", "Comparison", "Figure", "Run"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that is measured in every cell.

    Attributes:
        name: Its name in code.
        label: Its name in tables, with the unit.
        scale: From the unit in code (seconds, bytes) to that of the label.
        more_is_better: Whether a larger value is the better one.
    """

    name: str
    label: str
    scale: float = 1.0
    more_is_better: bool = False

    @property
    def plain_label(self) -> str:
        """The label without its unit."""
        return self.label if self.more_is_better else self.label.rpartition(" ")[0]


FIGURES = {
    f.name: f
    for f in (
        Figure("ttft_p50", "TTFT p50 ms", 1e3),
        Figure("ttft_p99", "TTFT p99 ms", 1e3),
        Figure("tpot_p50", "TPOT p50 ms", 1e3),
        Figure("tpot_p99", "TPOT p99 ms", 1e3),
        Figure("tokens_per_second", "tokens/s", more_is_better=True),
        Figure("memory", "memory MiB", 1 / 2**20),
        Figure("kl", "KL nats"),
    )
}
_TIMED = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "tokens_per_second")


@dataclass(frozen=True, slots=True)
class Cell:
    """One choice of settings.

    Attributes:
        quantize: The mode of the weights.
        batching: The batching policy.
        max_batch: Most requests that run at once.
    """

    quantize: str
    batching: str
    max_batch: int

    def __str__(self) -> str:
        return f"{self.quantize}, {self.batching}, max_batch={self.max_batch}"


@dataclass(frozen=True)
class Run:
    """One pass over the prompts under the settings of a cell.

    Attributes:
        cell: The settings.
        round: In which round of the grid, from 0.
        latencies: The requests.
        memory: Bytes of weights and KV cache that were held, as measured on the tensors.
    """

    cell: Cell
    round: int
    latencies: tuple[Latency, ...]
    memory: int

    @cached_property
    def summary(self) -> LatencySummary:
        """Latency and throughput, by the definitions of ``vllm bench serve``."""
        return summarize(self.latencies)

    @cached_property
    def timed(self) -> Mapping[str, float]:
        """The figures that vary from run to run, in seconds or per second."""
        summary = self.summary
        rate = summary.output_tokens_per_second
        values = {"tokens_per_second": math.nan if rate is None else rate}
        for metric in ("ttft", "tpot"):
            for percentile in ("p50", "p99"):
                found = summary[metric].percentiles[percentile]
                values[f"{metric}_{percentile}"] = math.nan if found is None else found
        return values


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a grid of settings gave: latency, throughput, memory and fidelity of each cell.

    Each round visits every cell once, so that a machine that grows slower grows slower for all; a
    figure is the median over the rounds, with its 95 % bootstrap interval. Ratios are taken within
    a round.

    Attributes:
        model: Name of the model.
        device: Its devices.
        dtype: Its dtype.
        runs: Every run, in the order in which they were made.
        fidelity: Mode -> `Fidelity`; empty where it was not asked for.
        failed: Cell -> why it could not be run.
        rounds: Rounds that were asked for.
        max_tokens: Tokens generated for each prompt.
        note: What else the reader must know, or "".
    """

    model: str
    device: str
    dtype: str
    runs: tuple[Run, ...]
    fidelity: Mapping[str, Fidelity]
    failed: Mapping[Cell, str]
    rounds: int
    max_tokens: tuple[int, ...]
    note: str = ""

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells that were run at least once, in the order of the grid."""
        return tuple(dict.fromkeys(run.cell for run in sorted(self.runs, key=lambda r: r.round)))

    @property
    def prompts(self) -> int:
        """Requests per run."""
        return len(self.max_tokens)

    @property
    def complete(self) -> bool:
        """Whether every cell that could be run was run in every round."""
        return all(len(self.runs_of(cell)) == self.rounds for cell in self.cells)

    def runs_of(self, cell: Cell) -> tuple[Run, ...]:
        """The runs of a cell, one per round."""
        return tuple(run for run in self.runs if run.cell == cell)

    def figure(self, cell: Cell, name: str) -> Interval:
        """A figure of a cell: in seconds, tokens per second, bytes or nats.

        ``memory`` and ``kl`` do not vary from round to round. The interval of ``kl`` is that over
        the positions of the text.

        Raises:
            OptionError: There is no such figure.
        """
        _check_figure(name)
        if name == "kl":
            found = self.fidelity.get(cell.quantize)
            return _unknown if found is None else found.kl
        runs = self.runs_of(cell)
        if name == "memory":
            memory = max(run.memory for run in runs)
            return Interval(memory, memory, memory, len(runs))
        return bootstrap([run.timed[name] for run in runs])

    def shown(self, cell: Cell, name: str) -> Interval:
        """`figure` in the unit of its label: milliseconds, MiB."""
        return self.figure(cell, name).scaled(FIGURES[name].scale)

    def ratio(self, cell: Cell, base: Cell, name: str) -> Interval:
        """A timed figure of one cell over that of another, round by round."""
        mine, other = ({run.round: run for run in self.runs_of(c)} for c in (cell, base))
        shared = sorted(mine.keys() & other.keys())
        if not shared or name not in _TIMED:
            return _unknown
        return bootstrap([mine[r].timed[name] / other[r].timed[name] for r in shared])

    def base(self, cell: Cell) -> Cell:
        """The cell with the same batching in "none"; the cell itself where there is none."""
        plain = Cell("none", cell.batching, cell.max_batch)
        return plain if plain in self.cells else cell

    @property
    def objectives(self) -> tuple[str, ...]:
        """What `front` looks at unless told otherwise."""
        return ("tpot_p50", "tokens_per_second", "memory", *(["kl"] if self.fidelity else []))

    def front(self, objectives: Sequence[str] | None = None) -> tuple[Cell, ...]:
        """The Pareto front: the cells that no other beats.

        One cell beats another if it is better in one of the objectives by more than noise, and
        worse by more than noise in none. Noise: the interval of the ratio within rounds holds 1.

        Args:
            objectives: Names of figures; None for `objectives`.

        Raises:
            OptionError: There is no such figure.
        """
        names = tuple(objectives or self.objectives)
        for name in names:
            _check_figure(name)
        return tuple(
            cell
            for cell in self.cells
            if not any(self._beats(other, cell, names) for other in self.cells)
        )

    def _beats(self, one: Cell, other: Cell, names: Sequence[str]) -> bool:
        better = any(self._better(one, other, name) for name in names)
        return better and not any(self._better(other, one, name) for name in names)

    def _better(self, one: Cell, other: Cell, name: str) -> bool:
        """Whether a cell is better than another in one figure, by more than noise."""
        if one == other:
            return False
        if name in _TIMED:
            ratio = self.ratio(one, other, name)
            value, certain = ratio.value, ratio.n < 2 or ratio.excludes(1.0)
        else:
            a, b = self.figure(one, name).value, self.figure(other, name).value
            value, certain = (a / b if b else math.inf if a > 0 else 1.0), True
        return certain and (value > 1 if FIGURES[name].more_is_better else value < 1)

    # -- showing --------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: each figure with ``_low`` and ``_high``; seconds, bytes, nats.

        ``tpot_vs_none`` is the ratio of TPOT p50 to the same cell in "none". ``front`` says whether
        the cell is on the Pareto front, ``n`` how many rounds it ran, ``failed`` why it did not.
        """
        import pandas as pd

        front = self.front()
        rows: list[dict[str, Any]] = []
        for cell in self.cells:
            row: dict[str, Any] = asdict(cell)
            figures = {name: self.figure(cell, name) for name in FIGURES}
            figures["tpot_vs_none"] = self._against_none(cell)
            for name, found in figures.items():
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            row |= self._quality(cell)
            row |= {"front": cell in front, "n": len(self.runs_of(cell)), "failed": None}
            rows.append(row)
        rows += [asdict(c) | {"front": False, "n": 0, "failed": why} for c, why in self._never()]
        return pd.DataFrame(rows).set_index(["quantize", "batching", "max_batch"])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON: figures of the cells, and each run's times."""
        front = self.front()
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "rounds": self.rounds,
            "prompts": self.prompts,
            "max_tokens": list(self.max_tokens),
            "complete": self.complete,
            "note": self.note,
            "objectives": list(self.objectives),
            "cells": [
                asdict(cell)
                | {"front": cell in front, "n": len(self.runs_of(cell))}
                | {name: _plain(self.figure(cell, name)) for name in FIGURES}
                | {"tpot_vs_none": _plain(self._against_none(cell))}
                for cell in self.cells
            ],
            "failed": [asdict(cell) | {"why": why} for cell, why in self.failed.items()],
            "fidelity": {mode: found.to_dict() for mode, found in self.fidelity.items()},
            "runs": [
                asdict(run.cell)
                | {"round": run.round, "memory": run.memory}
                | {"latencies": [one.to_dict() for one in run.latencies]}
                for run in self.runs
            ],
        }

    def plot(self) -> go.Figure:
        """A plotly figure: latency against throughput, and memory against fidelity."""
        from inferkit import tradeoffs

        return tradeoffs.tradeoff_figure(self)

    def __repr__(self) -> str:
        rows = text_table(self._header(), self._rows())
        return "\n".join([self._title(), rows, *self._failures(), self._explained()])

    def _repr_html_(self) -> str:
        note = " ".join([*self._failures(), self._explained()])
        return table(self._header(), self._rows(), caption=self._title(), note=note)

    def _title(self) -> str:
        least, most = min(self.max_tokens), max(self.max_tokens)
        length = f"{most}" if least == most else f"{least} to {most}"
        policies = {cell.batching for cell in self.cells}
        policy = f", batching {policies.pop()}" if len(policies) == 1 else ""
        return (
            f"{self.model} on {self.device}, {self.dtype}{policy}: {self.prompts} prompts at once, "
            f"{length} tokens each"
        )

    def _header(self) -> tuple[str, ...]:
        return ("front", *self._columns().keys(), "n")

    def _rows(self) -> Iterator[tuple[str, ...]]:
        front = self.front()
        columns = self._columns().values()
        for cell in self.cells:
            mark = "●" if cell in front else ""
            yield (mark, *(show(cell) for show in columns), str(len(self.runs_of(cell))))

    def _columns(self) -> dict[str, Callable[[Cell], str]]:
        """Title -> what a cell shows there; what decides comes first, for narrow pages."""

        def figure(name: str) -> dict[str, Callable[[Cell], str]]:
            return {FIGURES[name].label: lambda cell: _spelled(self.shown(cell, name))}

        def quality(name: str, spelled: str) -> Callable[[Cell], str]:
            return lambda cell: _spelled_as(spelled, self._quality(cell)[name])

        policies = {cell.batching for cell in self.cells}
        columns: dict[str, Callable[[Cell], str]] = {"mode": lambda cell: cell.quantize}
        if len(policies) > 1:
            columns["batching"] = lambda cell: cell.batching
        columns["batch"] = lambda cell: str(cell.max_batch)
        columns |= figure("tpot_p50")
        columns["TPOT / none"] = lambda cell: _spelled(self._against_none(cell))
        columns |= figure("tokens_per_second") | figure("memory")
        if self.fidelity:
            columns |= figure("kl")
        columns |= figure("ttft_p50") | figure("tpot_p99")
        if self.fidelity:
            columns["top-1"] = quality("top1_agreement", ".1%")
            columns["perplexity"] = quality("perplexity", ",.2f")
        return columns

    def _failures(self) -> Iterator[str]:
        for cell, why in self.failed.items():
            yield f"{cell}: not run to the end: {why}"
        if not self.complete:
            yield f"Stopped before {self.rounds} rounds were done."
        if self.note:
            yield self.note

    def _explained(self) -> str:
        objectives = ", ".join(FIGURES[name].plain_label for name in self.objectives)
        return (
            "Median over n interleaved rounds [95 % bootstrap interval]. TTFT, TPOT as vllm bench "
            "serve defines them, over the requests of a run. TPOT / none: within rounds. Memory: "
            "tensors of weights and KV cache. Front: no other row is better by more than noise in "
            f"one of {objectives}, and worse in none."
        )

    def _against_none(self, cell: Cell) -> Interval:
        base = self.base(cell)
        return self.ratio(cell, base, "tpot_p50") if base.quantize == "none" else _unknown

    def _quality(self, cell: Cell) -> dict[str, float]:
        found = self.fidelity.get(cell.quantize)
        if found is None:
            return {"top1_agreement": math.nan, "perplexity": math.nan}
        return {"top1_agreement": found.top1_agreement.value, "perplexity": found.perplexity}

    def _never(self) -> list[tuple[Cell, str]]:
        return [(cell, why) for cell, why in self.failed.items() if cell not in self.cells]


_unknown = Interval(math.nan, math.nan, math.nan, 0)


def _check_figure(name: str) -> None:
    if name not in FIGURES:
        raise OptionError(f"{name!r} is no figure of a comparison; choose from {listed(FIGURES)}.")


def _spelled(found: Interval) -> str:
    if math.isnan(found.value) or math.isnan(found.low) or found.low == found.high:
        return _digits(found.value)
    return f"{_digits(found.value)} [{_digits(found.low)}–{_digits(found.high)}]"


def _spelled_as(form: str, value: float) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _digits(value: float) -> str:
    """Three digits are more than such measurements have."""
    return f"{value:,.0f}" if value >= 100 else format_number(value)


def _plain(found: Interval) -> dict[str, Any]:
    return {name: None if math.isnan(value) else value for name, value in asdict(found).items()}
