"""The median of some rounds with their least and most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = sorted(values)
        return cls(median(found), found[0], found[-1], len(found))


def steps_against(
    found: Sequence[dict[str, Any]], key: str, base: str, cases: Iterable[tuple[str, int]]
) -> list[dict[str, Any]]:
    """Steps in ms for each (what ``key`` says, batch), and against ``base`` round by round.

    Args:
        found: Steps in seconds, with their "round" and "batch".
        key: What is compared.
        base: What it is compared with.
        cases: What to tell of, in this order.
    """
    by = {(r["round"], r[key], r["batch"]): r["step"] for r in found}
    rounds = sorted({r["round"] for r in found})
    return [
        {
            key: name,
            "batch": batch,
            "step_ms": asdict(Spread.of(1e3 * by[n, name, batch] for n in rounds)),
            "ratio": asdict(Spread.of(by[n, name, batch] / by[n, base, batch] for n in rounds)),
        }
        for name, batch in cases
    ]
