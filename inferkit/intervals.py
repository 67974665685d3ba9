"""Figures with their confidence intervals, by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Interval", "bootstrap"]

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
