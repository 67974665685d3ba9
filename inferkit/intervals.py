"""Figures with their confidence intervals, by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Interval", "bootstrap", "bootstrap_ratio"]

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
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), len(found))


def bootstrap_ratio(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]], seed: int = 0
) -> Interval:
    """The ratio of two medians, over / under, of measurements that share nothing but their unit.

    Each side is drawn anew on its own, by whole groups: the gaps between the tokens of one request
    come from one stretch of time and are alike, so that a thousand of them are not a thousand
    independent measurements. A median is that of the values of all groups drawn, pooled. Bootstrap
    of clusters: A. C. Davison and D. V. Hinkley, Bootstrap Methods and Their Application (1997),
    section 3.8.

    Args:
        over: For each independent group, its values: at least one, all positive.
        under: The same of what it is compared with.
        seed: Of the resampling, so that the same measurements give the same interval.

    Returns:
        The ratio; its ``n`` is the number of groups on the smaller side.
    """
    import numpy as np

    above, below = (
        float(np.median(np.concatenate([np.asarray(g, dtype=float) for g in side])))
        for side in (over, under)
    )
    count = min(len(over), len(under))
    if count < 2:
        return Interval(above / below, math.nan, math.nan, count)
    generator = np.random.default_rng(seed)
    drawn = _drawn_medians(over, generator) / _drawn_medians(under, generator)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(above / below, float(low), float(high), count)


def _drawn_medians(groups: Sequence[Sequence[float]], generator: Any) -> Any:
    """The median of all values of as many groups, drawn with replacement; again and again.

    Sorted once, for a value drawn twice is a value that counts twice.
    """
    import numpy as np

    values = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    share = np.full(len(groups), 1 / len(groups))
    rows = max(1, _AT_ONCE // len(values))
    medians: list[Any] = []
    for begin in range(0, _RESAMPLES, rows):
        times = generator.multinomial(len(groups), share, min(rows, _RESAMPLES - begin))
        reached = np.cumsum(times[:, owners], axis=1)
        total = reached[:, -1:]
        lower = values[(2 * reached >= total).argmax(axis=1)]
        upper = values[(2 * reached > total).argmax(axis=1)]
        medians.append((lower + upper) / 2)
    return np.concatenate(medians)
