"""`Replay`: what an experiment that was run again gave, held against what was recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inferkit.errors import OptionError
from inferkit.experiments.difference import FEWEST, Contrast, Difference
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import RequestEntry
from inferkit.html import one_line, table, text_table

if TYPE_CHECKING:
    from inferkit.generation import Generation

__all__ = ["Outcome", "Replay"]

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one recorded request.

    Attributes:
        request: Its number in the recording.
        recorded: What was recorded.
        measured: What came here; None where it was not run again.
        difference: Position of the first output token that differs; None where none does.
        gap: By how many nats the token recorded there is less likely here than the one that came;
            None where it was drawn, or one of the two ended there.
        kind: "equal"; "rounding", where that explains the difference (see `rounding.judge`);
            "differs"; "not run", where no token was recorded to be run up to; "not compared", where
            outputs were left out; "interrupted".
        reason: In words.
    """

    request: int
    recorded: Generation
    measured: Generation | None
    difference: int | None
    gap: float | None
    kind: str
    reason: str


class Replay:
    """A recording beside what it gave here and now.

    Attributes:
        recorded: The experiment as it was recorded.
        measured: The experiment as it was measured here.
        outcomes: One per recorded request.
        notes: What was done otherwise than in the recording.
    """

    def __init__(
        self,
        recorded: Experiment,
        measured: Experiment,
        outcomes: Sequence[Outcome],
        notes: Sequence[str],
    ) -> None:
        self.recorded = recorded
        self.measured = measured
        self.outcomes = tuple(outcomes)
        self.notes = tuple(notes)

    @property
    def exact(self) -> bool:
        """Whether every request that was run again gave the recorded tokens."""
        return self._ran and all(o.kind in ("equal", "not run") for o in self.outcomes)

    @property
    def ok(self) -> bool:
        """Whether nothing differs that rounding does not explain."""
        fine = ("equal", "rounding", "not run", "not compared")
        return self._ran and all(o.kind in fine for o in self.outcomes)

    @property
    def verified(self) -> bool:
        """Whether any token was held against a recorded one: none is where they were left out."""
        return any(o.kind in ("equal", "rounding", "differs") for o in self.outcomes)

    @property
    def interrupted(self) -> bool:
        """Whether it was cut off, so that some requests did not run to their end."""
        return any(o.kind == "interrupted" for o in self.outcomes)

    @property
    def _ran(self) -> bool:
        return any(o.measured is not None for o in self.outcomes)

    @property
    def latency(self) -> Difference:
        """The latency measured here beside the recorded one, with ratios and intervals.

        Raises:
            OptionError: On one of the sides no request succeeded.
        """
        return self.recorded.diff(self.measured)

    @property
    def verdict(self) -> str:
        """What came of it, in words."""
        return " ".join(part for part in (self._said_of_tokens(), self._said_of_latency()) if part)

    def _said_of_tokens(self) -> str:
        count = {k: sum(o.kind == k for o in self.outcomes) for k in _KINDS}
        ran = len(self.outcomes) - count["not run"] - count["interrupted"]
        if not ran:
            return "Nothing was run again."
        if count["not compared"] == ran:
            return (
                f"No token was verified: {ran} requests ran again, but their outputs were left out "
                "of the recording, so that only times compare."
            )
        said = [f"{count['equal']} of {ran} requests gave the recorded tokens"]
        if count["rounding"]:
            said.append(f"{count['rounding']} differ where rounding decides")
        if count["differs"]:
            said.append(f"{count['differs']} differ otherwise")
        if count["not run"]:
            said.append(f"{count['not run']} were not run again")
        if count["interrupted"]:
            said.append(f"{count['interrupted']} were interrupted")
        head = "Reproduced" if self.exact else "Reproduced up to rounding" if self.ok else "Differs"
        if count["interrupted"] and not count["differs"]:
            head = "Interrupted"
        return f"{head}: {'; '.join(said)}."

    def _said_of_latency(self) -> str:
        try:
            found = self.latency.latency
        except OptionError:
            return ""
        names = [("ttft", "TTFT"), ("tpot", "TPOT")][self._lost_prefixes > 0 :]
        said = [part for name, label in names if (part := _ratio_in_words(label, found[name]))]
        return "; ".join(said) + "." if said else ""

    @property
    def _lost_prefixes(self) -> int:
        """Requests whose prompts shared a beginning, which random ones in their place do not."""
        return sum(self.recorded.redacted and one.cached_tokens > 0 for one in self._requests)

    @property
    def _requests(self) -> Sequence[RequestEntry]:
        return self.recorded.file.requests

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, ready for JSON; the two experiments by their names."""
        try:
            latency = self.latency.to_dict()
        except OptionError:
            latency = None
        return {
            "experiment": self.recorded.name,
            "ok": self.ok,
            "exact": self.exact,
            "verified": self.verified,
            "verdict": self.verdict,
            "recorded": self.recorded.origin,
            "measured": self.measured.as_recorded().origin,  # a file stays, and now passes
            "notes": list(self.notes),
            "outcomes": [
                {
                    "request": o.request,
                    "kind": o.kind,
                    "difference": o.difference,
                    "gap": o.gap,
                    "reason": o.reason,
                }
                for o in self.outcomes
            ],
            "latency": latency,
        }

    def plot(self) -> Any:
        """Both sides' latency as a plotly figure."""
        return self.latency.plot()

    _HEADER = ("request", "prompt", "outcome", "from token", "why")

    def _rows(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        # What differs first.
        for o in sorted(self.outcomes, key=lambda o: _KINDS.index(o.kind)):
            prompt = o.recorded.prompt or f"{o.recorded.latency.prompt_tokens} tokens"
            where = "-" if o.difference is None else o.difference
            rows.append((o.request, one_line(prompt, 32), o.kind, where, o.reason))
        return rows[:_SHOWN]

    def _caption(self) -> str:
        return f"Replay of {self.recorded.name!r}: {self.recorded.origin}; measured here and now"

    def _footer(self) -> str:
        more = len(self.outcomes) - _SHOWN
        rest = [f"and {more} more, in .outcomes"] if more > 0 else []
        if self._lost_prefixes:
            rest.append(
                f"{self._lost_prefixes} requests found part of their prompt in the cache when they "
                "were recorded; without the prompts none does here, so that TTFT does not compare"
            )
        return "; ".join([*rest, *self.notes])

    def __repr__(self) -> str:
        parts = [self._caption(), self.verdict, text_table(self._HEADER, self._rows())]
        with suppress(OptionError):
            parts.append(repr(self.latency))
        return "\n".join(part for part in (*parts, self._footer()) if part)

    def _repr_html_(self) -> str:
        caption = f"{self._caption()}. {self.verdict}"
        shown = table(self._HEADER, self._rows(), caption=caption, note=self._footer())
        try:
            return shown + self.latency._repr_html_()
        except OptionError:
            return shown


def _ratio_in_words(label: str, found: Contrast) -> str:
    """A ratio with what the contrast makes of it; "" where there is none."""
    ratio, groups = found.ratio, found.groups
    if math.isnan(ratio.value):
        return ""
    counted = f"{groups} group{'s' if groups != 1 else ''} of requests: {found.verdict}"
    span = f"95 % interval {ratio.low:.2f} to {ratio.high:.2f} over " if groups >= FEWEST else ""
    return f"{label} here is {ratio.value:.2f} times the recorded one ({span}{counted})"


_KINDS = ("differs", "rounding", "interrupted", "not run", "not compared", "equal")
