"""AIPerf's ``profile_export.jsonl``: a record a line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Generic, Literal, TypeVar

import msgspec

from inferkit.errors import ExperimentError
from inferkit.experiments.exports import WRITER
from inferkit.experiments.file import Count, Environment, ExperimentFile, RequestEntry
from inferkit.experiments.importing import common
from inferkit.experiments.importing.common import nanoseconds

T = TypeVar("T")


class _Tokens(msgspec.Struct):
    value: Count


class _Time(msgspec.Struct, Generic[T]):
    value: T
    unit: Literal["ms"]  # in which AIPerf exports all of them


class _Metrics(msgspec.Struct):
    time_to_first_token: _Time[float] | None = None
    request_latency: _Time[float] | None = None
    inter_chunk_latency: _Time[list[float]] | None = None
    input_sequence_length: _Tokens | None = None
    error_isl: _Tokens | None = None  # the input's length, of a request that failed
    output_sequence_length: _Tokens | None = None


class _Metadata(msgspec.Struct):
    request_start_ns: int
    request_end_ns: int
    was_cancelled: bool = False
    benchmark_phase: str = "profiling"
    worker_id: str = ""


class _Failure(msgspec.Struct):
    message: str = ""
    type: str | None = None


class _Record(msgspec.Struct):
    metadata: _Metadata
    metrics: _Metrics
    error: _Failure | None = None


def read(documents: Sequence[Any], benchmark: int | None) -> ExperimentFile:
    """All records but those of the warm-up; the model is not in the file."""
    common.chosen([documents], lambda _: "all records", benchmark)
    records = msgspec.convert(documents, list[_Record])
    kept = [one for one in records if one.metadata.benchmark_phase != "warmup"]
    if not kept:
        raise ExperimentError("has records of the warm-up only: there is nothing to read.")
    # To the microsecond, which is what a date can say.
    start = min(one.metadata.request_start_ns for one in kept) // 1000 * 1000
    warm = len(records) - len(kept)
    mine = all(one.metadata.worker_id == WRITER for one in kept)
    return ExperimentFile(
        name="",
        source="inferkit, in AIPerf's format" if mine else "AIPerf",
        created=common.moment(nanoseconds(start, 1)),
        models=common.unnamed(),
        requests=[_request(one, start) for one in kept],
        notes=[f"{warm} requests of the warm-up are left out"] if warm else [],
        environment=Environment(),
    )


def _request(record: _Record, start: int) -> RequestEntry:
    metadata, metrics, error = record.metadata, record.metrics, record.error
    arrival = metadata.request_start_ns - start
    reason = "cancelled" if metadata.was_cancelled else "error" if error else "stop"
    first, latency = metrics.time_to_first_token, metrics.request_latency
    gaps = metrics.inter_chunk_latency
    since = accumulate([first.value, *(gaps.value if gaps else ())]) if first else ()
    return common.request(
        arrival=arrival,
        chunks=[arrival + nanoseconds(time, 10**6) for time in since],
        last=arrival + nanoseconds(latency.value, 10**6) if latency else None,
        tokens=_count(metrics.output_sequence_length),
        finished=metadata.request_end_ns - start,
        prompt_tokens=_count(metrics.input_sequence_length, metrics.error_isl),
        finish_reason=reason,
        error=common.failure(error.message, error.type) if error and reason == "error" else None,
    )


def _count(*found: _Tokens | None) -> int:
    """The first of these that is there, 0 without any."""
    return next((one.value for one in found if one), 0)
