"""What a replay does when: a recording, cut where nothing was on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import ExperimentFile, ModeEntry, RequestEntry, unpack

_NOTICED = 2_000_000_000  # ns after which a change of mode is in the recording, at the latest


@dataclass
class Part:
    """What happens between two moments when nothing is on its way.

    Attributes:
        begin: Recorded ns of its first requests.
        before: What each model is to be by then.
        events: Requests that arrive together, and changes among them, in order of time.
        models: Numbers of those that its requests run on.
        idle: Recorded ns of nothing before it.
    """

    begin: int
    before: list[ModeEntry] = field(default_factory=list)
    events: list[tuple[int, list[int] | ModeEntry]] = field(default_factory=list)
    models: set[int] = field(default_factory=set)
    idle: int = 0

    @property
    def numbers(self) -> list[int]:
        """Of its requests."""
        return [i for _, event in self.events if isinstance(event, list) for i in event]


def parts_of(recorded: Experiment) -> list[Part]:
    """The recording, cut where it was idle."""
    file = recorded.file
    used = {one.model for one in file.requests if runs_again(one)}
    arrivals = groupby(range(len(file.requests)), key=lambda i: file.requests[i].arrival)
    events: list[tuple[int, int, Any]] = [(m.time, 0, m) for m in file.modes if m.model in used]
    events += [(moment, 1, list(numbers)) for moment, numbers in arrivals]
    parts: list[Part] = []
    modes: dict[int, ModeEntry] = {}
    busy_until = 0
    for moment, _, event in sorted(events, key=lambda e: e[:2]):
        idle = moment >= busy_until
        if isinstance(event, ModeEntry):
            modes[event.model] = event
            if not idle:
                parts[-1].events.append((moment, event))
            continue
        if idle:
            pause = moment - busy_until if parts else 0
            parts.append(Part(moment, before=list(modes.values()), idle=pause))
        requests = [file.requests[i] for i in event]
        parts[-1].events.append((moment, event))
        parts[-1].models.update(one.model for one in requests if runs_again(one))
        busy_until = max(busy_until, *map(_end, requests))
    return parts


def shapes_are_certain(part: Part, file: ExperimentFile) -> bool:
    """Whether its passes have the same shapes whenever it runs in the same modes.

    So they have if its requests came together and came to their ends, and no mode changed, nor was
    seen to have changed soon afterwards, for one is looked for now and then.
    """
    requests = [file.requests[i] for i in part.numbers]
    end = max(map(_end, requests)) + _NOTICED
    return (
        len(part.events) == 1
        and all(map(ended_itself, requests))
        and not any(part.begin < mode.time <= end for mode in file.modes)
    )


def spans_of(parts: Sequence[Part]) -> dict[int, range]:
    """For each model, the parts from the first to the last that has requests for it."""
    needed: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        for number in sorted(part.models):
            needed.setdefault(number, []).append(index)
    return {number: range(of_it[0], of_it[-1] + 1) for number, of_it in needed.items()}


def ended_itself(one: RequestEntry) -> bool:
    """Whether a recorded request came to an end of its own, which is one to be reproduced."""
    return one.finish_reason in ("stop", "length")


def runs_again(one: RequestEntry) -> bool:
    """Whether a recorded request is run again."""
    return ended_itself(one) or bool(unpack(one.tokens))


def what_cut(one: RequestEntry) -> str:
    """What kept a recorded request from an end of its own; "" where it has one."""
    if one.finish_reason == "error":
        return f"failed ({': '.join(one.error or ['without a message'])})"
    return {"cancelled": "was cancelled", None: "had not ended"}.get(one.finish_reason, "")


def _end(one: RequestEntry) -> int:
    tokens = unpack(one.tokens)
    return one.finished or (tokens[-1] if tokens else one.arrival)
