"""Figures with their confidence intervals, by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Interval", "bootstrap", "bootstrap_grouped", "bootstrap_ratio"]

LEVEL = 0.95
_RESAMPLES = 2000
_AT_ONCE = 1 << 22  # values drawn together


@dataclass(frozen=True, slots=True, repr=False)
class Interval:
    """A figure and where it may as well lie.

    Attributes:
        value: The figure.
        low: The lower end of its 95 % confidence interval; nan where n is 1, for then nothing
            tells how far it may vary.
        high: The upper end.
        n: How many independent measurements it stands on.
    """

    value: float
    low: float
    high: float
    n: int

    def __repr__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}, n={self.n})"

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside the interval; without one nothing does."""
        return value < self.low or value > self.high

    def scaled(self, factor: float) -> Interval:
        """The same in another unit."""
        return Interval(factor * self.value, factor * self.low, factor * self.high, self.n)


def bootstrap(
    values: Sequence[float], statistic: Callable[..., Any] | None = None, seed: int = 0
) -> Interval:
    """The median of measurements, or another statistic, with its 95 % confidence interval.

    The percentile bootstrap: B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals
    of Statistics 7 (1979). With few measurements it is too narrow (of three, it can at most reach
    from the least to the most), which is why n stands beside it.

    Args:
        values: Independent measurements, at least one.
        statistic: Takes an array and ``axis``, as NumPy's do; None is the median.
        seed: Of the resampling, so that the same measurements give the same interval.
    """
    import numpy as np

    statistic = statistic or np.median
    found = np.asarray(values, dtype=float)
    value = float(statistic(found, axis=0))
    if len(found) < 2:
        return Interval(value, math.nan, math.nan, len(found))
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(found))
    drawn: list[Any] = []
    for begin in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - begin), len(found))
        drawn.append(statistic(found[generator.integers(0, len(found), shape)], axis=1))
    return Interval(value, *_ends(np.concatenate(drawn)), len(found))


def bootstrap_grouped(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The median of measurements that are not independent within their groups.

    Whole groups are drawn anew, and the median is that of the values of all groups drawn, pooled,
    as in `bootstrap_ratio`; each with a single value, it is `bootstrap`.

    Args:
        groups: For each independent group, its values: at least one.
        seed: Of the resampling, so that the same measurements give the same interval.

    Returns:
        The median; its ``n`` is the number of groups.
    """
    import numpy as np

    value = _median(groups)
    if len(groups) < 2:
        return Interval(value, math.nan, math.nan, len(groups))
    drawn = _drawn_medians(groups, np.random.default_rng(seed))
    return Interval(value, *_ends(drawn), len(groups))


def bootstrap_ratio(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]], seed: int = 0
) -> Interval:
    """The ratio of two medians, over / under, of measurements that share nothing but their unit.

    Each side is drawn anew on its own, by whole groups: requests of one batch share their steps,
    and the gaps between the tokens of one request come from one stretch of time, so that a thousand
    of them are not a thousand independent measurements. A median is that of the values of all
    groups drawn, pooled. Bootstrap of clusters: A. C. Davison and D. V. Hinkley, Bootstrap Methods
    and Their Application (1997), section 3.8.

    Args:
        over: For each independent group, its values: at least one, all positive.
        under: The same of what it is compared with.
        seed: Of the resampling, so that the same measurements give the same interval.

    Returns:
        The ratio; its ``n`` is the number of groups on the smaller side.
    """
    import numpy as np

    value = _median(over) / _median(under)
    count = min(len(over), len(under))
    if count < 2:
        return Interval(value, math.nan, math.nan, count)
    generator = np.random.default_rng(seed)
    drawn = _drawn_medians(over, generator) / _drawn_medians(under, generator)
    return Interval(value, *_ends(drawn), count)


def _median(groups: Sequence[Sequence[float]]) -> float:
    """The median of all values of all groups."""
    import numpy as np

    return float(np.median(np.concatenate([np.asarray(group, dtype=float) for group in groups])))


def _ends(drawn: Any) -> tuple[float, float]:
    """Between which the middle `LEVEL` of the resampled figures lie."""
    import numpy as np

    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _drawn_medians(groups: Sequence[Sequence[float]], generator: Any) -> Any:
    """The median of all values of as many groups, drawn with replacement; again and again.

    Sorted once, for a value drawn twice is a value that counts twice. The sorted values stand in
    rows: how many of each row were drawn says in which one the median is, and only that row is
    looked at.
    """
    import numpy as np

    count = len(groups)
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    owners: Any = np.repeat(np.arange(count), [len(group) for group in groups])
    order = np.argsort(values, kind="stable")
    width = math.isqrt(len(values) - 1) + 1
    empty = -len(values) % width
    # What fills the last row belongs to one more group, which is never drawn.
    values = np.pad(values[order], (0, empty)).reshape(-1, width)
    owners = np.pad(owners[order], (0, empty), constant_values=count).reshape(-1, width)
    held = np.zeros((count + 1, len(values)))  # how many values of each group each row has
    np.add.at(held, (owners, np.arange(len(values))[:, None]), 1)

    def at(rank: Any, times: Any, reached: Any) -> Any:
        """The value of that rank, from 1, in each draw."""
        row = (reached >= rank).argmax(axis=1)
        within = np.cumsum(np.take_along_axis(times, owners[row], axis=1), axis=1)
        before = np.take_along_axis(reached, row[:, None], axis=1) - within[:, -1:]
        return values[row, (before + within >= rank).argmax(axis=1)]

    draws = max(1, _AT_ONCE // (count + width))
    medians: list[Any] = []
    for begin in range(0, _RESAMPLES, draws):
        shape = (min(draws, _RESAMPLES - begin), count)
        drawn = generator.integers(0, count, shape) + (count + 1) * np.arange(shape[0])[:, None]
        counted = np.bincount(drawn.ravel(), minlength=shape[0] * (count + 1))
        times = counted.reshape(-1, count + 1).astype(float)
        reached = np.cumsum(times @ held, axis=1)
        half = reached[:, -1:] / 2
        lower, upper = (at(rank, times, reached) for rank in (np.ceil(half), np.floor(half) + 1))
        medians.append((lower + upper) / 2)
    return np.concatenate(medians)
