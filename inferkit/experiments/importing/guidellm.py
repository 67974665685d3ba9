"""GuideLLM's ``benchmarks.json``, version 2 of its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from inferkit.errors import ExperimentError
from inferkit.experiments.file import Count, Environment, ExperimentFile, RequestEntry
from inferkit.experiments.importing import common
from inferkit.experiments.importing.common import nanoseconds

_ENDS = {"successful": "stop", "errored": "error", "incomplete": "cancelled"}


class _Timings(msgspec.Struct):
    """Of ``RequestTimings`` what is read: seconds since the epoch."""

    request_start: float | None = None
    resolve_start: float | None = None
    first_token_iteration: float | None = None
    last_token_iteration: float | None = None
    request_end: float | None = None
    resolve_end: float | None = None
    token_iterations: Count = 0

    @property
    def start(self) -> float | None:
        return self.resolve_start if self.request_start is None else self.request_start


class _Info(msgspec.Struct):
    timings: _Timings
    error: str | None = None


class _Usage(msgspec.Struct):
    total_tokens: Count | None = None
    cached_tokens: Count | None = None


class _Stats(msgspec.Struct):
    """Of ``GenerativeRequestStats`` what is read."""

    info: _Info
    input_metrics: _Usage
    output_metrics: _Usage
    output: str | None = None


class _Benchmark(msgspec.Struct):
    requests: dict[str, list[_Stats] | None]
    config: dict[str, Any] = {}
    start_time: float | None = None


class _Metadata(msgspec.Struct):
    guidellm_version: str = ""
    python_version: str = ""
    platform: str = ""


def read(documents: Sequence[Any], benchmark: int | None) -> ExperimentFile:
    """The one of the benchmarks that is asked for."""
    report = documents[0]
    version = common.inner(report, "metadata").get("version")
    if version != 2:
        raise ExperimentError(
            f"is of GuideLLM with version {version} of its layout, and this inferkit reads version "
            "2, which GuideLLM writes since 0.7."
        )
    about = msgspec.convert(report["metadata"], _Metadata)
    results = msgspec.convert(report["benchmarks"], list[dict[str, Any]])
    result = msgspec.convert(common.chosen(results, _strategy, benchmark), _Benchmark)
    found = [(one, why) for group, why in _ENDS.items() for one in result.requests.get(group) or ()]
    sent = [(one, why, at) for one, why in found if (at := one.info.timings.start) is not None]
    began = min((at for _, _, at in sent), default=result.start_time or 0.0)
    unsent = len(found) - len(sent)
    return ExperimentFile(
        name="",
        source=f"GuideLLM {about.guidellm_version}",
        created=common.moment(nanoseconds(began)),
        models=common.unnamed(str(common.inner(result.config, "backend").get("model") or "")),
        requests=[_request(one, why, at, began) for one, why, at in sent],
        notes=[f"{unsent} requests that were never sent are left out"] if unsent else [],
        environment=Environment(
            packages={"guidellm": about.guidellm_version},
            python=about.python_version,
            system=about.platform,
        ),
    )


def _strategy(benchmark: dict[str, Any]) -> str:
    """What a benchmark of a sweep was, for messages."""
    strategy = common.inner(benchmark.get("config"), "strategy")
    kind = strategy.get("type_", strategy.get("kind"))
    return f"{kind} {strategy.get('rate', strategy.get('streams', ''))}"[:80]


def _request(one: _Stats, reason: str, start: float, began: float) -> RequestEntry:
    timings, tokens = one.info.timings, one.output_metrics.total_tokens
    arrival = nanoseconds(start - began)

    def at(time: float | None) -> int | None:
        return None if time is None else arrival + nanoseconds(time - start)

    cached, total = one.input_metrics.cached_tokens or 0, one.input_metrics.total_tokens
    prompt = cached if total is None else total
    first, last = at(timings.first_token_iteration), at(timings.last_token_iteration)
    known = (first, last) if timings.token_iterations == 2 else (first,)
    ended = timings.resolve_end if timings.request_end is None else timings.request_end
    return common.request(
        arrival=arrival,
        chunks=[time for time in known if time is not None],
        last=last,
        tokens=timings.token_iterations if tokens is None else tokens,
        finished=at(ended),
        prompt_tokens=prompt,
        finish_reason=reason,
        text=one.output or "",
        error=common.failure(one.info.error) if reason == "error" else None,
        cached_tokens=min(cached, prompt),
    )
