"""Two experiments side by side: what differs, what is faster or slower, which outputs changed."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from inferkit.comparison import Figure
from inferkit.errors import OptionError
from inferkit.experiments.experiment import Experiment, generation_of, trace_of
from inferkit.experiments.file import ModeEntry, ModelEntry
from inferkit.generation import Generation
from inferkit.html import format_bytes, format_number, listed, one_line, table, text_table
from inferkit.intervals import Interval, bootstrap_grouped, bootstrap_ratio
from inferkit.model_files import kinds_of_files

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Contrast", "Difference", "Outputs", "Setting", "Table", "first_difference"]

QUANTITIES = {
    f.name: f
    for f in (
        Figure("ttft", "TTFT ms", 1e3),
        Figure("tpot", "TPOT ms", 1e3),
        Figure("itl", "ITL ms", 1e3),
        Figure("e2e", "E2E ms", 1e3),
        Figure("queue", "queue ms", 1e3),
        Figure("tokens_per_second", "output tokens/s", more_is_better=True),
    )
}
"""What is compared, as attributes of a `Latency`."""

FEWEST = 5
"""Independent groups of requests that a verdict needs: between the least and the greatest of four,
the median lies in only 88 % of cases; of five, in 94 %."""

_SHOWN = 10  # pairs with different tokens that a table has


@dataclass(frozen=True, slots=True)
class Setting:
    """A field in which two experiments differ, and what either says there."""

    field: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Contrast:
    """One quantity of two experiments.

    Attributes:
        quantity: What it is.
        a: Median of the one, in seconds or tokens per second; nan where no request has it.
        b: Median of the other.
        n_a: Requests of the one that have it; where requests pair up, pairs in which both do.
        n_b: Requests of the other.
        ratio: b / a; its ``n`` is the number of groups.
    """

    quantity: Figure
    a: float
    b: float
    n_a: int
    n_b: int
    ratio: Interval

    @property
    def groups(self) -> int:
        """How many independent groups these requests form, on the side that has fewer.

        Requests that overlap in time, directly or through others, are one group: they share steps.
        """
        return self.ratio.n

    @property
    def verdict(self) -> str:
        """What b is beside a: "faster", "slower", "no difference shown", or why nothing is said."""
        if self.groups < FEWEST:
            return "too few to tell"
        if math.isnan(self.ratio.value):
            return "no ratio: some are 0"
        if not self.ratio.excludes(1.0):
            return "no difference shown"
        return "faster" if (self.ratio.low > 1) == self.quantity.more_is_better else "slower"

    def to_dict(self) -> dict[str, Any]:
        """Plain data in seconds or tokens per second, ready for JSON."""
        ratio = {name: _plain(value) for name, value in asdict(self.ratio).items() if name != "n"}
        return {
            "a": _plain(self.a),
            "b": _plain(self.b),
            "unit": "tokens/s" if self.quantity.more_is_better else "s",
            "n_a": self.n_a,
            "n_b": self.n_b,
            "groups": self.groups,
            "ratio": ratio,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Outputs:
    """Whether requests that pair up gave the same tokens.

    Attributes:
        compared: Pairs that were looked at.
        equal: Those whose tokens are the same to the end.
        differing: Of each other pair: its number in a, its number in b, and the first position,
            from 0, at which the tokens differ (the length of the shorter output, where the longer
            one only goes on).
    """

    compared: int
    equal: int
    differing: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table before it is shown as text or HTML.

    Attributes:
        title: What it is of.
        header: Column titles.
        rows: Cells.
        origins: What a and b are.
        note: Definitions and cautions.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    origins: str
    note: str = ""


class Difference:
    """Experiment b beside experiment a: settings, latency and outputs.

    Requests pair up where both sides have the same prompt (its tokens, or its text where those were
    left out) and the same sampling parameters but for the seed, the k-th such request of one with
    the k-th of the other. Where they ran on several models, it must be the same one: by name, or by
    the order of loading where names differ; models without requests do not count. Where most
    requests of the smaller side do and succeeded on both, only these count, and a ratio is the
    median of the ratios within pairs, so that what all requests have in common cancels out.
    Otherwise a ratio is that of the two medians, each side resampled on its own.

    Requests that run at the same time share steps, and what slows one down slows all of them. So
    those that overlap in time, directly or through others, form a group, and the bootstrap draws
    whole groups. Where requests pair up, the groups of a and of b that share a pair are one. Of a
    single group there is no interval, and of fewer than `FEWEST` no verdict, however many requests
    they have: several batches, one after the other, tell more than a large one.

    The intervals say how the ratio varies over groups like these; how it would vary from one run
    to the next (another day, a warmer processor), two experiments cannot tell.

    Args:
        a: What is compared with.
        b: What is compared.

    Raises:
        OptionError: One of them is no experiment, or has no request that succeeded.
    """

    def __init__(self, a: Experiment, b: Experiment) -> None:
        for one in (a, b):
            if not isinstance(one, Experiment):
                raise OptionError(
                    f"{type(one).__name__!r} is no experiment; ik.open(path) reads one, and "
                    "ik.record(path) makes one."
                )
        self.a, self.b = a, b
        self._done_a, self._done_b = _done(a), _done(b)

    # -- facts ----------------------------------------------------------------------------------

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The requests that pair up and succeeded on both sides, by their numbers in a and b."""
        waiting: dict[Any, deque[int]] = defaultdict(deque)
        of_a, of_b = _partners(self.a, self.b)
        for number, key in _keys(self.b, of_b):
            waiting[key].append(number)
        found = [(i, waiting[key].popleft()) for i, key in _keys(self.a, of_a) if waiting[key]]
        return tuple((i, j) for i, j in found if i in self._done_a and j in self._done_b)

    @property
    def paired(self) -> bool:
        """Whether ratios are taken within pairs."""
        return 2 * len(self.pairs) > min(len(self._done_a), len(self._done_b))

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The fields of settings and environment in which they differ."""
        a, b = _facts(self.a), _facts(self.b)
        fields = [*a, *(name for name in b if name not in a)]
        named = [(name, a.get(name, "-"), b.get(name, "-")) for name in fields]
        found = [Setting(*one) for one in named if one[1] != one[2]]
        return (*found, *_other_files(self.a.models, self.b.models))

    @cached_property
    def latency(self) -> dict[str, Contrast]:
        """Each quantity by its name: "ttft", "tpot", "itl", "e2e", "queue", "tokens_per_second"."""
        contrast = self._within_pairs if self.paired else self._apart
        return {name: contrast(quantity) for name, quantity in QUANTITIES.items()}

    @cached_property
    def outputs(self) -> Outputs | None:
        """Whether paired requests gave the same tokens; None where there are none to compare."""
        tokens = [
            (i, j, self._done_a[i].token_ids, self._done_b[j].token_ids) for i, j in self.pairs
        ]
        known = [one for one in tokens if one[2] and one[3]]
        if not known:
            return None
        differing = tuple(
            (i, j, first_difference(one, other)) for i, j, one, other in known if one != other
        )
        return Outputs(len(known), len(known) - len(differing), differing)

    @cached_property
    def cautions(self) -> tuple[str, ...]:
        """What else differs between the requests, and may explain what the ratios show."""
        found = [*self._left_out(), *self._overlap(), *self._unlike_pairs()]
        for side, one in (("a", self.a), ("b", self.b)):
            modes = _modes(one)
            if len(modes) > 1:
                found.append(f"{side} ran in {len(modes)} modes, whose requests are pooled.")
        return tuple(found)

    # -- showing --------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per quantity, in seconds or tokens/s; ``frame.attrs`` has the origins."""
        import pandas as pd

        rows = []
        for name, one in self.latency.items():
            row = one.to_dict()
            ratio = {"ratio": one.ratio.value, "low": one.ratio.low, "high": one.ratio.high}
            rows.append({"metric": name, **row, **ratio, "a": one.a, "b": one.b})
        frame = pd.DataFrame(rows).set_index("metric")
        # A frame, as a dict, outlives this process.
        told = [_told(one.as_recorded()) for one in (self.a, self.b)]
        frame.attrs |= {**dict(zip("ab", told)), "paired": self.paired}
        figures = ["unit", "a", "b", "n_a", "n_b", "groups", "ratio", "low", "high", "verdict"]
        return frame[figures]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        outputs = self.outputs
        return {
            "a": {"name": self.a.name, "origin": self.a.as_recorded().origin},
            "b": {"name": self.b.name, "origin": self.b.as_recorded().origin},
            "paired": self.paired,
            "pairs": [list(pair) for pair in self.pairs],
            "method": self._method(),
            "cautions": list(self.cautions),
            "settings": [asdict(one) for one in self.settings],
            "latency": {name: one.to_dict() for name, one in self.latency.items()},
            "outputs": None
            if outputs is None
            else asdict(outputs) | {"differing": [list(one) for one in outputs.differing]},
        }

    def plot(self, quantities: Sequence[str] = ("ttft", "tpot", "itl")) -> go.Figure:
        """A plotly figure: for each quantity the share of requests (ITL: gaps) no longer than that.

        Axes are logarithmic, so that a ratio is the distance between two lines wherever they run.

        Args:
            quantities: Names of one or several, each of which gets a panel.

        Raises:
            OptionError: There is no such quantity.
        """
        from plotly.subplots import make_subplots

        from inferkit.look import finish

        names = list(quantities)
        for name in names:
            if name not in QUANTITIES:
                raise OptionError(f"{name!r} is none of {listed(QUANTITIES)}; choose of these.")
        titles = [QUANTITIES[name].plain_label for name in names] if len(names) > 1 else None
        figure = make_subplots(rows=1, cols=max(1, len(names)), subplot_titles=titles)
        for col, name in enumerate(names, 1):
            self._add_shares(figure, QUANTITIES[name], col)
        title = f"{_shortly('a', self.a)} · {_shortly('b', self.b)}"
        kind = f"{len(self.pairs)} pairs of requests" if self.paired else "requests not paired"
        finish(figure, title, f"vLLM definitions · {kind}", "logarithmic axes", height=440)
        legend = [trace.name for trace in figure.data if trace.showlegend is not False]
        lines = sum(name.count("<br>") + 1 for name in legend)
        figure.update_layout(
            legend={"orientation": "v"}, margin={"b": 76 + 18 * lines}, height=380 + 18 * lines
        )
        return figure

    @property
    def tables(self) -> tuple[Table, ...]:
        """Everything as tables, each with the origins."""
        return (self._settings_table(), self._latency_table(), *self._outputs_tables())

    def __repr__(self) -> str:
        parts = [self._origins()]
        for one in self.tables:
            rows = [text_table(one.header, one.rows)] if one.rows else []
            parts += ["", one.title, *rows, *([one.note] if one.note else [])]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return "".join(
            table(
                one.header,
                one.rows,
                caption=one.title,
                note=f"{one.note} {one.origins}".strip(),
            )
            for one in self.tables
        )

    # -- latency --------------------------------------------------------------------------------

    def _counted(self) -> tuple[list[Generation], list[Generation]]:
        """The requests of either side that count, pairs in the same order."""
        if not self.paired:
            return list(self._done_a.values()), list(self._done_b.values())
        return [self._done_a[i] for i, _ in self.pairs], [self._done_b[j] for _, j in self.pairs]

    @cached_property
    def _groups(self) -> tuple[list[int], list[int]]:
        """The groups of the requests that count, in the order of `_counted`."""
        of_a, of_b = _overlapping(self.a), _overlapping(self.b)
        if not self.paired:
            return [of_a[i] for i in self._done_a], [of_b[j] for j in self._done_b]
        joined = _joined_groups([(of_a[i], of_b[j]) for i, j in self.pairs])
        return joined, joined

    def _within_pairs(self, quantity: Figure) -> Contrast:
        """The median ratio within pairs; of ITL, of each request's median gap."""
        sides = (_values(side, quantity.name) for side in self._counted())
        both = [row for row in zip(*sides, self._groups[0]) if row[0] and row[1]]
        a, b = (_pooled(row[side] for row in both) for side in (0, 1))
        middles = [(statistics.median(one), statistics.median(other)) for one, other, _ in both]
        groups = [group for *_, group in both]
        ratio = _no_ratio(groups)
        if middles and all(one > 0 and other > 0 for one, other in middles):
            logarithms = [[math.log(other / one)] for one, other in middles]
            found = bootstrap_grouped(_gathered(logarithms, groups))
            low, value, high = (math.exp(v) for v in (found.low, found.value, found.high))
            ratio = Interval(value, low, high, found.n)
        return Contrast(quantity, a, b, len(both), len(both), ratio)

    def _apart(self, quantity: Figure) -> Contrast:
        """The ratio of the medians; of ITL, over all gaps."""
        sides = zip(self._counted(), self._groups)
        rows = [zip(_values(side, quantity.name), groups) for side, groups in sides]
        a, b = ([(one, group) for one, group in side if one] for side in rows)
        of_a, of_b = (_gathered(*zip(*side)) if side else [] for side in (a, b))
        ratio = _no_ratio(*([group for _, group in side] for side in (a, b)))
        if a and b and all(value > 0 for side in (of_a, of_b) for one in side for value in one):
            ratio = bootstrap_ratio(of_b, of_a)
        return Contrast(quantity, _pooled(of_a), _pooled(of_b), len(a), len(b), ratio)

    # -- what else differs ----------------------------------------------------------------------

    def _left_out(self) -> Iterator[str]:
        """Which requests have no partner, or why none has."""
        counts = len(self._done_a), len(self._done_b)
        if self.paired:
            rest = [f"{c - len(self.pairs)} of {side}" for side, c in zip("ab", counts)]
            if max(counts) > len(self.pairs):
                yield f"Requests without a partner do not count: {' and '.join(rest)}."
        elif not all(_prompt(one) for side in self._counted() for one in side):
            yield "Prompts were left out of the file, so that requests cannot be paired."
        else:
            yield (
                f"{len(self.pairs)} of {counts[0]} and {counts[1]} requests have the same prompt "
                "and parameters: too few to go by."
            )

    def _overlap(self) -> Iterator[str]:
        """That requests would be enough, and only share too many steps."""
        requests, groups = (min(map(len, of)) for of in (self._groups, map(set, self._groups)))
        if groups < FEWEST <= requests:
            yield (
                f"Requests ran beside each other, in {groups} independent "
                f"{'group' if groups == 1 else 'groups'}, and a verdict takes {FEWEST}: record "
                f"{FEWEST} batches or more, one after the other."
            )

    def _unlike_pairs(self) -> Iterator[str]:
        if not self.paired:
            return
        both = list(zip(*self._counted()))
        lengths = sum(a.latency.output_tokens != b.latency.output_tokens for a, b in both)
        if lengths:
            yield (
                f"{lengths} of {len(both)} pairs differ in their number of output tokens, on which "
                "E2E depends."
            )
        cached = sum(
            a.latency.trace.cached_tokens != b.latency.trace.cached_tokens for a, b in both
        )
        if cached:
            yield (
                f"{cached} of {len(both)} pairs differ in how much of the prompt was cached, on "
                "which TTFT depends."
            )
        seeds = sum(a.params.temperature > 0 and a.seed != b.seed for a, b in both)
        if seeds:
            yield f"{seeds} of {len(both)} pairs were sampled with different seeds."

    # -- tables ---------------------------------------------------------------------------------

    def _origins(self) -> str:
        return f"a = {_told(self.a)}; b = {_told(self.b)}."

    def _settings_table(self) -> Table:
        rows = tuple((one.field, one.a, one.b) for one in self.settings)
        note = "" if rows else "Nothing that was recorded of settings and environment differs."
        return Table("What differs", ("", "a", "b"), rows, self._origins(), note)

    def _latency_table(self) -> Table:
        header = ("median", "a", "b", "b / a", "95 % interval", "b is", "n a", "n b", "groups")
        rows = tuple(_row(one) for one in self.latency.values())
        note = " ".join([self._method(), *self.cautions])
        return Table("Latency", header, rows, self._origins(), note)

    def _method(self) -> str:
        how = (
            "b / a: median of the ratios within pairs of requests (ITL: of their median gaps)"
            if self.paired
            else "b / a: ratio of the medians, requests not paired (ITL: of all gaps)"
        )
        return (
            f"{how}; 95 % bootstrap interval over groups of requests of these two runs: how other "
            "runs would differ is not in it. A group is the requests that overlap in time, for "
            "they share steps and are not independent of each other"
            f"{'; pairs join the groups of a and b' if self.paired else ''}. n counts requests, "
            f"groups those of the side that has fewer: under {FEWEST}, nothing is said. TTFT, "
            "TPOT, ITL and E2E as vllm bench serve defines them; tokens/s of each request."
        )

    def _outputs_tables(self) -> Iterator[Table]:
        """What became of the outputs, where there are pairs."""
        outputs = self.outputs
        if outputs is None:
            return
        head = f"Outputs: {outputs.equal} of {outputs.compared} pairs have the same tokens"
        rows = tuple(tuple(map(str, one)) for one in outputs.differing[:_SHOWN])
        more = len(outputs.differing) - len(rows)
        note = f"And {more} more, which .outputs.differing has." if more else ""
        header = ("request of a", "request of b", "first token that differs, from 0")
        yield Table(head, header, rows, self._origins(), note)

    # -- figure ---------------------------------------------------------------------------------

    def _add_shares(self, figure: go.Figure, quantity: Figure, col: int) -> None:
        """A panel: both sides' shares over the values."""
        import numpy as np
        import plotly.graph_objects as go

        from inferkit.look import BLUE, ORANGE, say
        from inferkit.plots import thin

        sides = [
            np.sort([v * quantity.scale for one in _values(side, quantity.name) for v in one])
            for side in self._counted()
        ]
        looks = (("a", self.a, BLUE, "solid"), ("b", self.b, ORANGE, "5px,3px"))
        for values, (side, experiment, colour, dash) in zip(sides, looks):
            at = list(thin(len(values), _POINTS))
            line = go.Scatter(
                x=values[at],
                y=100 * (np.asarray(at, dtype=float) + 1) / max(1, len(values)),
                mode="lines+markers" if len(values) <= _MARKED else "lines",
                line={"color": colour, "width": 2.2, "dash": dash, "shape": "hv"},
                marker={"size": 5, "symbol": "circle" if side == "a" else "diamond"},
                name=_wrapped(f"{side}: {_told(experiment)}"),
                legendgroup=side,
                showlegend=col == 1,
                hovertemplate=f"{side}: %{{y:.1f}} % take at most %{{x:,.4g}}<extra></extra>",
            )
            figure.add_trace(line, row=1, col=col)
        figure.update_xaxes(title_text=quantity.label, row=1, col=col)
        figure.update_yaxes(range=[0, 104], tickvals=[0, 25, 50, 75, 100], row=1, col=col)
        if col == 1:
            figure.update_yaxes(title_text="share no longer (%)", row=1, col=col)
        found = np.concatenate(sides)
        if not len(found):
            say(figure, "no request has it", 1, col)
        elif found.min() > 0:
            ticks = _ticks(float(found.min()), float(found.max()))
            ends = [math.log10(found.min()) - 0.04, math.log10(found.max()) + 0.04]
            labels = [f"{tick:,g}" for tick in ticks]
            figure.update_xaxes(
                type="log", tickvals=ticks, ticktext=labels, range=ends, row=1, col=col
            )


_POINTS = 1_000  # of a line
_MARKED = 60  # values that each get a mark
_LEGEND_WIDTH = 76  # characters
_NAME = 40  # characters of a name in a title


def _told(one: Experiment) -> str:
    return f"{one.name!r}, {one.origin}"


def _shortly(side: str, one: Experiment) -> str:
    """Its name for a title, in which plotly would take < for a tag."""
    return escape(f"{side}: {one_line(one.name, _NAME)}", quote=False)


def _wrapped(text: str) -> str:
    """Text for a legend, which does not break lines by itself."""
    return "<br>".join(escape(line, quote=False) for line in wrap(text, _LEGEND_WIDTH))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, also where it spans far less than a decade."""
    from inferkit.plots import _log_ticks

    if high > 4 * low:
        return _log_ticks([low, high])
    rough = (high - low or low) / 4
    decade = 10.0 ** math.floor(math.log10(rough))
    step = next(s * decade for s in (1, 2, 5, 10) if s * decade >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _row(one: Contrast) -> tuple[str, ...]:
    scale, ratio = one.quantity.scale, one.ratio
    known = not math.isnan(ratio.low)
    return (
        one.quantity.label,
        format_number(scale * one.a),
        format_number(scale * one.b),
        "-" if math.isnan(ratio.value) else f"{ratio.value:.3f}",
        f"{ratio.low:.3f} – {ratio.high:.3f}" if known else "-",
        one.verdict,
        str(one.n_a),
        str(one.n_b),
        str(one.groups),
    )


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


# -- requests -------------------------------------------------------------------------------------


def _done(one: Experiment) -> dict[int, Generation]:
    """The requests that succeeded, by their numbers in the file."""
    found = {
        number: generation_of(entry)
        for number, entry in enumerate(one.file.requests)
        if entry.finish_reason in ("stop", "length")
    }
    if not found:
        raise OptionError(
            f"The experiment {one.name!r} has no request that succeeded, so that there is nothing "
            "to compare; its .to_frame() says how each of them ended."
        )
    return found


def _partners(a: Experiment, b: Experiment) -> list[Mapping[int, object]]:
    """For each side, what the models that requests ran on share with their partners, by number.

    Its name where both sides have the same ones, or else its rank in order of first requests. Not
    its number: that is another where a model was loaded that no request ran on, or at once with the
    others in the one and when it was needed in the other.
    """
    used = [list(dict.fromkeys(entry.model for entry in one.file.requests)) for one in (a, b)]
    names = [[one.file.models[i].name for i in numbers] for one, numbers in zip((a, b), used)]
    same = set(names[0]) == set(names[1]) and all(len(set(one)) == len(one) for one in names)
    shared = names if same else [range(len(numbers)) for numbers in used]
    return [dict(zip(numbers, of_side)) for numbers, of_side in zip(used, shared)]


def _keys(one: Experiment, partners: Mapping[int, object]) -> Iterator[tuple[int, Any]]:
    """What a request must share with another to pair up; none where its prompt is unknown."""
    for number, entry in enumerate(one.file.requests):
        if entry.finish_reason is None:
            continue
        gen = generation_of(entry)
        if _prompt(gen):
            yield number, (partners[entry.model], _prompt(gen), replace(gen.params, seed=None))


def _prompt(gen: Generation) -> tuple[int, ...] | str | None:
    return gen.prompt_token_ids or gen.prompt or None


def _values(gens: Iterable[Generation], name: str) -> list[tuple[float, ...]]:
    """What each request has of a quantity: several of ITL, none of what is not defined for it."""
    found = (getattr(gen.latency, name) for gen in gens)
    return [tuple(v) if isinstance(v, list) else () if v is None else (v,) for v in found]


def _pooled(side: Iterable[Sequence[float]]) -> float:
    values = [value for one in side for value in one]
    return statistics.median(values) if values else math.nan


def _no_ratio(*sides: Sequence[int]) -> Interval:
    """What stands where there is no ratio, with the number of groups on the smaller side."""
    return Interval(math.nan, math.nan, math.nan, min(len(set(side)) for side in sides))


def _overlapping(one: Experiment) -> list[int]:
    """The group of each request in the file: requests that overlap in time, also through others.

    Those that failed or did not end join groups, too: they took part in steps of the rest.
    """
    traces = [trace_of(entry) for entry in one.file.requests]
    groups, group, reached = [0] * len(traces), -1, -math.inf
    for number in sorted(range(len(traces)), key=lambda i: (traces[i].arrival, traces[i].end)):
        group += traces[number].arrival >= reached
        groups[number] = group
        reached = max(reached, traces[number].end)
    return groups


def _joined_groups(links: Sequence[tuple[int, int]]) -> list[int]:
    """Of groups of one side and groups of another that are linked: which of these hang together.

    Returns:
        For each link a number, the same for all that hang together.
    """
    above: dict[tuple[str, int], tuple[str, int]] = {}

    def top(node: tuple[str, int]) -> tuple[str, int]:
        while (parent := above.setdefault(node, node)) != node:
            above[node] = above[parent]  # half the way for whoever comes next
            node = parent
        return node

    for one, other in links:
        above[top(("a", one))] = top(("b", other))
    numbers: dict[tuple[str, int], int] = {}
    return [numbers.setdefault(top(("a", one)), len(numbers)) for one, _ in links]


def _gathered(values: Iterable[Sequence[float]], groups: Iterable[int]) -> list[list[float]]:
    """The values of each group."""
    found: dict[int, list[float]] = defaultdict(list)
    for some, group in zip(values, groups):
        found[group].extend(some)
    return list(found.values())


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Position from which two unlike outputs differ: the shorter's end, where one goes on."""
    unlike = (i for i, (x, y) in enumerate(zip(one, other)) if x != y)
    return next(unlike, min(len(one), len(other)))


# -- settings -------------------------------------------------------------------------------------


def _modes(one: Experiment) -> list[ModeEntry]:
    """The modes that requests began under, in order."""
    return [one.file.modes[i] for i in dict.fromkeys(r.mode for r in one.file.requests)]


def _facts(one: Experiment) -> dict[str, str]:
    """Settings and environment by the names that tables have for them."""
    models, modes, env = one.models, _modes(one), one.environment
    about = {device.name: device.description for device in env.devices}

    def of_models(get: Callable[[ModelEntry], Any]) -> str:
        return _joined(map(get, models))

    def of_modes(get: Callable[[ModeEntry], Any]) -> str:
        return _joined(map(get, modes))

    return {
        "measured by": one.file.source,
        "model": of_models(lambda m: m.name),
        "revision": of_models(lambda m: m.revision),
        "device": of_models(lambda m: _joined(_described(d, about) for d in m.devices)),
        "dtype": of_models(lambda m: m.dtype),
        "quantization": of_modes(lambda m: m.format),
        "batching": of_modes(lambda m: m.batching),
        "max_batch": of_modes(lambda m: m.max_batch),
        "context": of_modes(lambda m: m.context),
        "step": of_modes(lambda m: m.step),
        "speculation": of_modes(lambda m: m.speculative),
        "prefix reuse": of_models(lambda m: "on" if m.prefix_reuse else "off"),
        "prefill chunk": of_models(lambda m: m.prefill_chunk),
        "driver": _joined(d.driver for d in env.devices),
        "CPU": env.cpu or "-",
        "CPUs in use": _joined([env.processors]),
        "threads": _joined([env.threads]),
        "memory": "-" if env.memory is None else format_bytes(env.memory),
        "system": env.system or "-",
        "Python": env.python or "-",
        **{_PACKAGES.get(name, name): version for name, version in env.packages.items()},
        "git commit": (env.commit or "-")[:12] + (" with changes" if env.uncommitted else ""),
    }


_PACKAGES = {"jupyter-inferkit": "inferkit"}


def _joined(values: Iterable[Any]) -> str:
    """Values that are known, each once."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v not in (None, ""))) or "-"


def _described(device: str, about: dict[str, str]) -> str:
    return f"{device} ({about[device]})" if about.get(device) else device


def _other_files(a: Iterable[ModelEntry], b: Iterable[ModelEntry]) -> Iterator[Setting]:
    """Which files differ, weights and others apart, where those of both sides were hashed."""
    mine, other = ({(f, sha) for m in side for f, sha in m.files.items()} for side in (a, b))
    shas = [{sha for _, sha in side} for side in (mine, other)]
    if not mine or not other:
        return
    of_a = sorted(one for one in mine if one[1] not in shas[1])
    of_b = sorted(one for one in other if one[1] not in shas[0])
    for kind in kinds_of_files([name for name, _ in (*of_a, *of_b)]):
        names = [
            [f"{name} {sha[:12]}" for name, sha in side if kind in kinds_of_files([name])]
            for side in (of_a, of_b)
        ]
        yield Setting(f"other {kind} (sha256)", *map(_few, names))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else "-"
