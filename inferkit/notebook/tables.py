"""Numbers that grow for as long as a view is shown, kept to what a browser draws smoothly."""

from __future__ import annotations

from collections import deque

import numpy as np

POINTS = 20_000
"""Most rows of a table, which is what a browser draws smoothly."""


class Table:
    """Rows of numbers that grow at the end, at most `POINTS` of them.

    When it is full, the older half is thinned: of every four rows it keeps the two with the least
    and the greatest second column, so that late tokens stay to be seen however old they are.

    Args:
        columns: Numbers in a row; the first is a time, in whose order rows are kept.
        limit: Most rows, 8 or more.
    """

    def __init__(self, columns: int, limit: int = POINTS) -> None:
        self._rows = np.empty((limit, columns))
        self._length = 0
        self.thinned = False

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> np.ndarray:
        """All rows, [rows, columns]; a view that the next `extend` may change."""
        return self._rows[: self._length]

    def extend(self, rows: np.ndarray) -> bool:
        """Add rows, in order; return whether former ones were thinned or moved for them."""
        changed = False
        room = len(self._rows) // 2 // 4 * 2  # what thinning once makes
        for start in range(0, len(rows), room):
            part = rows[start : start + room]
            if self._length + len(part) > len(self._rows):
                self._thin()
                changed = True
            late = self._length > 0 and part[0, 0] < self._rows[self._length - 1, 0]
            self._rows[self._length : self._length + len(part)] = part
            self._length += len(part)
            if late:  # from a request that ran before the feed heard of it
                self._rows[: self._length] = self.rows[self.rows[:, 0].argsort(kind="stable")]
                changed = True
        return changed

    def _thin(self) -> None:
        half = len(self._rows) // 2 // 4 * 4
        old, new = self.rows[:half], self.rows[half:].copy()
        groups = old.reshape(-1, 4, old.shape[1])
        ends = np.sort([groups[:, :, 1].argmin(1), groups[:, :, 1].argmax(1)], axis=0)
        # Four equal rows have one extreme: it and its neighbour stay.
        ends[1] = np.where(ends[0] == ends[1], (ends[1] + 1) % 4, ends[1])
        ends.sort(axis=0)
        kept = groups[np.arange(len(groups)), ends].transpose(1, 0, 2).reshape(-1, old.shape[1])
        self._rows[: len(kept)] = kept
        self._rows[len(kept) : len(kept) + len(new)] = new
        self._length = len(kept) + len(new)
        self.thinned = True


class Window:
    """The values of the last seconds, for rolling quantiles.

    Args:
        seconds: How long a value counts.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._parts: deque[np.ndarray] = deque()  # rows of (time, value)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def clear(self) -> None:
        """Forget all: what comes is of another kind."""
        self._parts.clear()

    def quantiles(self, new: np.ndarray) -> tuple[float, float]:
        """p50 and p99 of the values of the window that ends with the newest of these rows.

        Args:
            new: Rows of (time, value), which are taken in.
        """
        since = new[:, 0].max() - self._seconds
        self._parts.append(new)
        while self._parts[0][-1, 0] < since:
            self._parts.popleft()
        rows = np.concatenate(self._parts)
        p50, p99 = np.percentile(rows[rows[:, 0] >= since, 1], (50, 99))
        return float(p50), float(p99)
