"""Experiments in the files of other benchmarks, vLLM's and AIPerf's, and as tables."""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from inferkit.definitions import DEFINITIONS, PER_SECOND
from inferkit.errors import OptionError
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.store import check_free, local_path, write_bytes, writing
from inferkit.generation import Generation, Generations
from inferkit.html import counted, listed
from inferkit.latency import LatencySummary
from inferkit.trace import NS, Latency

__all__ = ["VLLM_DATE", "WRITER", "to_aiperf", "to_vllm", "write"]

_log = logging.getLogger("inferkit")

WRITER = "inferkit"
"""What stands for the backend or the worker, by which a file is known as one of inferkit's."""

VLLM_DATE = "%Y%m%d-%H%M%S"


# -- vLLM -----------------------------------------------------------------------------------------


def to_vllm(exp: Experiment, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What ``vllm bench serve --save-result --save-detailed`` would have written.

    The keys and their order are those of vllm-project/vllm@009e6d4 vllm/benchmarks/serve.py
    (``benchmark`` and ``main_async``), with ``--percentile-metrics ttft,tpot,itl,e2el`` and
    ``--metric-percentiles 50,90,95,99``. Aggregates are in milliseconds, lists in seconds;
    ``start_times`` count from the beginning of the experiment. Requests that failed or were
    cancelled have zeros, and their ``errors`` say why; those that have not ended are left out.

    Where times between the first and the last token are not known, there are no ``itl`` aggregates
    and no ``max_output_tokens_per_s``.

    Args:
        exp: The experiment.
        slo: Objectives in seconds, by "ttft", "tpot" and "e2e", for ``request_goodput``.

    Raises:
        OptionError: An objective is unknown or makes no sense.
    """
    gens = _ended(exp)
    summary = exp.summary(slo=slo, definitions="vllm") if gens else None
    model = ", ".join(dict.fromkeys(one.ref or one.name for one in exp.models))
    duration = (summary.duration if summary else exp.duration) or 0.0
    first = min((gen.latency.trace.arrival for gen in gens), default=0)
    ended = exp.created + timedelta(seconds=first * NS + duration)
    return {
        "date": ended.strftime(VLLM_DATE),
        "endpoint_type": WRITER,
        "backend": WRITER,
        "label": exp.name,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(gens),
        # What vLLM has where requests come at their own times (--self-timed): no rate is imposed.
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": None,
        "duration": duration,
        **_vllm_totals(summary),
        **_vllm_details(gens),
        **_vllm_peaks(summary),
        "rtfx": 0.0,
        **_vllm_statistics(summary),
    }


def _vllm_totals(summary: LatencySummary | None) -> dict[str, Any]:
    names = {
        "completed": "completed",
        "failed": "failed",
        "total_input_tokens": "total_prompt_tokens",
        "total_output_tokens": "total_output_tokens",
        "request_throughput": "requests_per_second",
        "request_goodput": "goodput",
        "output_throughput": "output_tokens_per_second",
        "total_token_throughput": "total_tokens_per_second",
    }
    found = {key: getattr(summary, name, None) or 0 for key, name in names.items()}
    if summary is None or summary.slo is None:
        found["request_goodput"] = None
    return found


def _vllm_details(gens: Sequence[Generation]) -> dict[str, list[Any]]:
    found = [(gen.latency, gen.latency.trace.ok) for gen in gens]
    return {
        "input_lens": [one.prompt_tokens for one, _ in found],
        "output_lens": [one.output_tokens if ok else 0 for one, ok in found],
        "ttfts": [(ok and one.ttft) or 0.0 for one, ok in found],
        "itls": [one.itl if ok else [] for one, ok in found],
        "latencies": [(ok and one.e2e) or 0.0 for one, ok in found],
        "start_times": [one.trace.arrival * NS for one, _ in found],
        "queue_times": [0.0 for _ in found],  # in the benchmark's client, of which there is none
        "generated_texts": [gen.text if ok else "" for gen, (_, ok) in zip(gens, found)],
        "errors": [
            "" if ok else str(gen.error or gen.finish_reason) for gen, (_, ok) in zip(gens, found)
        ],
    }


def _vllm_peaks(summary: LatencySummary | None) -> dict[str, Any]:
    """The busiest second, in chunks, and the most requests at once, as vLLM counts them."""
    traces = [one.trace for one in summary.done if one.trace.tokens] if summary else []
    start = min((trace.arrival for trace in traces), default=0)
    seconds = Counter((time - start) // 10**9 for trace in traces for time in trace.output)
    changes = [(trace.arrival, 1) for trace in traces]
    changes += [(trace.tokens[-1], -1) for trace in traces]
    # Sorted, an end comes before a beginning at the same time: [start, end) do not overlap then.
    most = max(accumulate(step for _, step in sorted(changes)), default=0)
    busiest = {"max_output_tokens_per_s": float(max(seconds.values(), default=0))}
    return {**({} if _gaps_unknown(summary) else busiest), "max_concurrent_requests": most}


def _vllm_statistics(summary: LatencySummary | None) -> dict[str, float]:
    found = {}
    for name, key in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
        if name == "itl" and _gaps_unknown(summary):
            continue
        metric = summary[name] if summary else None
        for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99"):
            # numpy's mean of nothing is vLLM's zero.
            value = getattr(metric, statistic, None) or 0.0
            found[f"{statistic}_{key}_ms"] = value * PER_SECOND["ms"]
    return found


def _gaps_unknown(summary: LatencySummary | None) -> bool:
    """Whether some request's are: figures of the others alone would pass for all."""
    traces = [one.trace for one in summary.done] if summary else []
    return any(trace.chunks == () and len(trace.tokens) > 1 for trace in traces)


# -- AIPerf ---------------------------------------------------------------------------------------


def to_aiperf(exp: Experiment) -> Iterator[dict[str, Any]]:
    """The records of AIPerf's ``profile_export.jsonl``, one for each request that ended.

    The layout is ``MetricRecordInfo`` of ai-dynamo/aiperf@745695d
    src/aiperf/common/models/record_export_models.py, with the metadata of
    src/aiperf/common/metric_records_wire.py@017c63d; optional fields of which nothing is known are
    left out. Times are wall clock in nanoseconds: the experiment's beginning, to the microsecond,
    and the request's offset. A request that failed or was cancelled has ``error`` and no latency.
    """
    began = round(exp.created.timestamp() * 1e6) * 1000
    for number, gen in enumerate(_ended(exp)):
        yield _aiperf_record(number, gen, began)


def _ended(exp: Experiment) -> Generations:
    """The requests that have ended, for formats that know no others."""
    found = exp.generations
    if lacking := len(exp.file.requests) - len(found):
        _log.warning(
            "%s of %r had not ended, and this format has no place for such: left out.",
            counted(lacking, "request"),
            exp.name,
        )
    return found


def _aiperf_record(number: int, gen: Generation, began: int) -> dict[str, Any]:
    trace = gen.latency.trace
    cancelled = gen.finish_reason == "cancelled"
    metadata = {
        "request_num": number,
        "session_num": number,
        "turn_index": 0,
        "request_start_ns": began + trace.arrival,
        "request_end_ns": began + trace.end,
        "worker_id": WRITER,
        "record_processor_id": WRITER,
        "benchmark_phase": "profiling",
        "was_cancelled": cancelled,
    }
    if cancelled:
        metadata["cancellation_time_ns"] = began + trace.end
    if trace.ok:
        return {"metadata": metadata, "metrics": _aiperf_metrics(gen.latency), "error": None}
    return {
        "metadata": metadata,
        "metrics": {"error_isl": {"value": trace.prompt_tokens, "unit": "tokens"}},
        "error": _aiperf_error(gen),
    }


def _aiperf_metrics(latency: Latency) -> dict[str, Any]:
    found: dict[str, Any] = {
        "input_sequence_length": {"value": latency.prompt_tokens, "unit": "tokens"},
        "output_token_count": {"value": latency.output_tokens, "unit": "tokens"},
        "output_sequence_length": {"value": latency.output_tokens, "unit": "tokens"},
    }
    for metric in DEFINITIONS["aiperf"].metrics:
        values = [value * PER_SECOND[metric.unit] for value in metric.values(latency)]
        if values:
            value = values if metric.pooled else values[0]
            found[metric.name] = {"value": value, "unit": metric.unit}
    if latency.tpot:
        speed = {"value": 1 / latency.tpot, "unit": "tokens/sec/user"}
        found["output_token_throughput_per_user"] = speed
    return found


def _aiperf_error(gen: Generation) -> dict[str, Any]:
    if gen.finish_reason == "cancelled":
        seconds = (gen.latency.trace.end - gen.latency.trace.arrival) * NS
        message = f"Request was cancelled after {seconds:.3f} seconds"
        return {"code": 499, "type": "RequestCancellationError", "message": message}
    return {"type": type(gen.error).__name__, "message": str(gen.error)}


# -- files ----------------------------------------------------------------------------------------


def write(
    exp: Experiment,
    path: str | os.PathLike[str],
    kind: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an experiment as another tool's file or as a table, whole or not at all.

    Args:
        exp: The experiment.
        path: Of the file.
        kind: "vllm" (`to_vllm`), "aiperf" (`to_aiperf`, a record a line), "csv" or "parquet"
            (`Experiment.to_frame`). None: what the name's end says: ``.csv``, ``.parquet``, or
            ``.jsonl`` for AIPerf's.
        overwrite: Replace a file that is there.

    Raises:
        OptionError: The kind is unknown or not told; there is a file already, or no folder;
            parquet without pyarrow.
        ExperimentError: It cannot be written.
    """
    target = local_path(path)
    encode = _encoder(target, kind)
    check_free(target, overwrite)
    data = encode(exp)
    with writing(target, ": choose another path."):
        write_bytes(data, target)
    return target


def _encoder(target: Path, kind: str | None) -> Callable[[Experiment], bytes]:
    kind = kind or _SUFFIXES.get(target.suffix.lower())
    if kind is None:
        raise OptionError(
            f"What {target.name} is to be does not show in its name: say kind, one of "
            f"{listed(_ENCODERS)}, or end the name in one of {listed(_SUFFIXES)}. inferkit's own "
            "file is written by exp.save(path)."
        )
    if kind not in _ENCODERS:
        raise OptionError(f"kind={kind!r} is not known; choose one of {listed(_ENCODERS)}.")
    return _ENCODERS[kind]


def _parquet_bytes(exp: Experiment) -> bytes:
    buffer = io.BytesIO()
    try:
        exp.to_frame().to_parquet(buffer, engine="pyarrow")
    except ImportError:
        raise OptionError(
            'kind="parquet" needs pyarrow: pip install pyarrow, or write kind="csv".'
        ) from None
    return buffer.getvalue()


_ENCODERS: Mapping[str, Callable[[Experiment], bytes]] = {
    "vllm": lambda exp: json.dumps(to_vllm(exp)).encode(),
    "aiperf": lambda exp: b"".join(msgspec.json.encode(one) + b"\n" for one in to_aiperf(exp)),
    "csv": lambda exp: exp.to_frame().to_csv().encode(),
    "parquet": _parquet_bytes,
}
_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".jsonl": "aiperf"}
