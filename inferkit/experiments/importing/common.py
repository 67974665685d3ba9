"""What the readers of other benchmarks' files share.

A reader raises what is wrong with the file: ExperimentError with words that follow its name, or
ValueError and msgspec's ValidationError for values that no benchmark writes. The experiment that it
gives lacks what is the same whatever the tool: name, modes, settings of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

from inferkit.errors import ExperimentError
from inferkit.experiments.environment import scrubbed
from inferkit.experiments.file import ModelEntry, RanUnder, RequestEntry, public_name
from inferkit.trace import NS

UNKNOWN: Literal["unknown"] = "unknown"
"""What stands for settings that the file does not have."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_SECONDS = 4e9  # the year 2096; what is beyond is no time, and soon no int64 of ns
_ROUNDING = 1_000  # ns by which sums may miss an end

T = TypeVar("T")


def unnamed(model: str = "") -> list[ModelEntry]:
    """What ran, of which no file says more than what the model was called, if that."""
    name = public_name(model) or UNKNOWN
    return [ModelEntry(name=name, ref=name, kind=UNKNOWN)]


def settings(model: str = UNKNOWN) -> RanUnder:
    """What requests ran under, of which no file says more than the model."""
    return RanUnder(
        model=model,
        device=UNKNOWN,
        dtype=UNKNOWN,
        quantization=UNKNOWN,
        batching=UNKNOWN,
        max_batch=0,
    )


def failure(message: str | None, kind: str | None = "GenerationError") -> list[str]:
    """How a request failed; without the folders, users and passwords that a message may tell of."""
    return [scrubbed(kind or ""), scrubbed(message or "")]


def inner(value: Any, key: str) -> dict[str, Any]:
    """What a value has under a key; empty where that is no object."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def chosen(results: Sequence[T], name: Callable[[T], str], number: int | None) -> T:
    """The result asked for; the only one where there is one."""
    if not results:
        raise ExperimentError("has no result: its benchmark was not brought to its end.")
    if number is None and len(results) == 1:
        return results[0]
    if number is None or not 0 <= number < len(results):
        each = "; ".join(f"{index}: {name(one)}" for index, one in enumerate(results[:20]))
        asked = "" if number is None else f", and none is number {number}"
        raise ExperimentError(
            f"has {len(results)} results{asked} ({each}). Each is an experiment: say benchmark=0 "
            f"to benchmark={len(results) - 1}."
        )
    return results[number]


def nanoseconds(value: float, unit: int = 10**9) -> int:
    """A length of time in a unit that has so many ns."""
    if not 0 <= value * unit * NS <= _MOST_SECONDS:  # false for NaN too
        raise ValueError(f"{value!r} is no time")
    return round(value * unit)


def moment(since_epoch: int) -> str:
    """The time so many ns after 1970, ISO 8601."""
    return (_EPOCH + timedelta(microseconds=since_epoch // 1000)).isoformat()


def request(
    *,
    arrival: int,
    chunks: Sequence[int],
    last: int | None,
    tokens: int,
    finished: int | None = None,
    **told: Any,
) -> RequestEntry:
    """A request; times in ns since the experiment's beginning.

    Args:
        arrival: When it was sent.
        chunks: When chunks arrived: the first one and those after it, as far as it is known.
        last: When the last one did; where that is later, those between are not known.
        tokens: How many output tokens there were.
        finished: When it ended, if that is later.
        told: What else the file says of it.
    """
    known = not chunks or last is None or _within(chunks, last)
    times = [*chunks] if known or last is None else [*chunks, last]
    one_each = known and tokens == len(times)
    return RequestEntry(
        model=0,
        mode=0,
        arrival=arrival,
        params={},
        seed=0,
        settings=settings(),
        tokens=_token_times(times, tokens),
        chunks=None if one_each else times if known else [],
        finished=max((time for time in (finished, *times[-1:]) if time is not None), default=None),
        **told,
    )


def _within(chunks: Sequence[int], time: int) -> bool:
    return chunks[0] - _ROUNDING <= time <= chunks[-1] + _ROUNDING


def _token_times(chunks: Sequence[int], tokens: int) -> list[int]:
    """A time for each token, all of them times of chunks; the first and the last are the ends'.

    More tokens than chunks: the first chunk has one, and the others share the rest evenly. Fewer:
    the first chunk and the last ones; clients of chat endpoints see a chunk without text first,
    which vLLM takes for the first token.
    """
    if not chunks or tokens < 1:
        return []
    if tokens <= len(chunks):
        return [chunks[0], *chunks[len(chunks) - tokens + 1 :]]
    after, rest = chunks[1:] or chunks, tokens - 1
    return [chunks[0], *(after[number * len(after) // rest] for number in range(rest))]
