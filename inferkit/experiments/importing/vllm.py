"""vLLM's result JSON of ``vllm bench serve --save-result --save-detailed``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any

import msgspec

from inferkit.errors import ExperimentError
from inferkit.experiments.exports import VLLM_DATE, WRITER
from inferkit.experiments.file import Count, Environment, ExperimentFile, RequestEntry
from inferkit.experiments.importing.common import chosen, failure, nanoseconds, request, unnamed


class _Result(msgspec.Struct):
    """The part that is read; lists have a value for each request."""

    date: str
    duration: float
    input_lens: list[Count]
    output_lens: list[Count]
    start_times: list[float]
    ttfts: list[float]
    itls: list[list[float]]
    errors: list[str | None]
    generated_texts: list[str | None]
    latencies: list[float | None] = []  # not in the files of earlier versions
    backend: str = ""
    model_id: str | None = None


def read(documents: Sequence[Any], benchmark: int | None) -> ExperimentFile:
    """The one of the results that is asked for."""
    document = chosen(msgspec.convert(documents, list[dict[str, Any]]), _name, benchmark)
    if "start_times" not in document:
        raise ExperimentError(
            "lacks the times of single requests: run vllm bench serve with --save-result "
            "--save-detailed, in a vLLM of January 2026 or later."
        )
    result = msgspec.convert(document, _Result)
    ended = datetime.strptime(result.date, VLLM_DATE).replace(tzinfo=UTC)
    return ExperimentFile(
        name="",
        source="inferkit, in vLLM's format" if result.backend == WRITER else "vllm bench serve",
        created=(ended - timedelta(seconds=result.duration)).isoformat(),
        models=unnamed(result.model_id or ""),
        requests=_requests(result),
        duration=nanoseconds(result.duration),
        notes=[
            "vLLM writes the date at the end and without a time zone: it is taken for UTC",
            f"vLLM's own rates are over all of its {result.duration:.2f} s, and those here from "
            "the first arrival to the last token",
        ],
        environment=Environment(),
    )


def _name(document: dict[str, Any]) -> str:
    return f"{document.get('label')}, request rate {document.get('request_rate')}"[:80]


def _requests(result: _Result) -> list[RequestEntry]:
    columns = (
        *(result.start_times, result.ttfts, result.itls, result.errors, result.generated_texts),
        *(result.input_lens, result.output_lens, result.latencies or [None] * len(result.ttfts)),
    )
    if len({len(column) for column in columns}) > 1:
        raise ValueError("its lists are not equally long")
    start = min(result.start_times, default=0.0)
    return [_request(nanoseconds(sent - start), *rest) for sent, *rest in zip(*columns)]


def _request(
    arrival: int,
    ttft: float,
    gaps: list[float],
    error: str | None,
    text: str | None,
    prompt_tokens: int,
    tokens: int,
    latency: float | None,
) -> RequestEntry:
    # A failed request may have no message (HTTP without a reason), and never has a TTFT then.
    failed = bool(error) or not ttft
    since = [] if failed else accumulate([ttft, *gaps])
    return request(
        arrival=arrival,
        chunks=[arrival + nanoseconds(time) for time in since],
        last=None if latency is None else arrival + nanoseconds(latency),
        tokens=0 if failed else tokens,
        prompt_tokens=prompt_tokens,
        finish_reason="error" if failed else "stop",
        text=text or "",
        error=failure(error or "It failed without a message.") if failed else None,
    )
