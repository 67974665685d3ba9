"""Experiments out of the files of other benchmarks: vLLM's, AIPerf's and GuideLLM's.

What another tool measured is read as it stands in its file, and no time is made up. A benchmark's
client sees chunks, not tokens. Where there is one chunk for each token, its time is the token's.
Otherwise the tokens after the first stand at times of chunks that the file has, so that TTFT, TPOT,
E2E and the number of tokens are what the tool found, and the chunks' own times are kept beside
them: vLLM's ITL and AIPerf's inter-chunk latency are the gaps between these. Where a file has no
times between the first and the last token, ITL says "-". To spread the tokens evenly instead would
show an ITL that looks measured and is TPOT by another name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from inferkit.errors import ExperimentError, OptionError
from inferkit.experiments.experiment import Experiment, trace_of
from inferkit.experiments.file import (
    FORMAT,
    ExperimentFile,
    ModeEntry,
    RequestEntry,
)
from inferkit.experiments.importing import aiperf, common, guidellm, vllm
from inferkit.experiments.importing.common import UNKNOWN, inner, nanoseconds
from inferkit.experiments.store import local_path
from inferkit.html import listed

__all__ = ["import_experiment"]

_READS = (
    "inferkit reads what vllm bench serve --save-result --save-detailed writes, AIPerf's "
    "profile_export.jsonl and GuideLLM's benchmarks.json (version 2)."
)
_INK = re.compile(r"\S")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair, as JSON may escape it


def import_experiment(path: str | os.PathLike[str], *, benchmark: int | None = None) -> Experiment:
    """Read the result of another benchmark: vLLM's, AIPerf's or GuideLLM's.

    What the file is shows in its content. It can be looked at, summarized under any definitions,
    compared and saved; not run again, for its prompts are not in it. Its ``notes`` say what the
    file does not tell. Read are:

    - vLLM's result JSON of ``--save-result --save-detailed``, which has the time of every chunk;
    - AIPerf's ``profile_export.jsonl``, which has it too, without the records of the warm-up;
    - GuideLLM's ``benchmarks.json``, version 2, which has the times of the first and the last
      token only, so that there is no ITL in vLLM's sense; GuideLLM's own metrics need none.

    No time is made up. Where chunks are not tokens, ITL is between chunks, as the tools have it;
    TTFT, TPOT, E2E and the numbers of tokens are those of the file. Rates are divided by first
    arrival to last end, as for any experiment, which can be a little less than the time that the
    tool itself divided by.

    Args:
        path: Of the file.
        benchmark: Which result of a file that has several, from 0.

    Raises:
        OptionError: ``path`` is no path, or ``benchmark`` no whole number.
        ExperimentError: There is no such file, or it is damaged or something else; it has no times
            of single requests; it has several results and ``benchmark`` says none.
    """
    source = local_path(path)
    if benchmark is not None and (not isinstance(benchmark, int) or isinstance(benchmark, bool)):
        raise OptionError(f"benchmark={benchmark!r}: give the number of a result, from 0, or None.")
    try:
        documents = _documents(source.read_bytes())
        found = _reader(documents[0])(documents, benchmark)
        return Experiment(_completed(found, _with_text(source.stem)))
    except OSError as error:
        raise ExperimentError(f"{source} cannot be read: {error.strerror or error}.") from None
    except ExperimentError as error:
        raise ExperimentError(f"{source.name} {error}") from None
    except (msgspec.ValidationError, OverflowError, ValueError) as error:
        raise ExperimentError(
            f"{source.name} is damaged or was edited: {error}. {_READS}"
        ) from None


def _documents(data: bytes) -> list[Any]:
    """The JSON values of a file, one after the other."""
    found: list[Any] = []
    at = 0
    try:
        text = data.decode("utf-8-sig")
        while ink := _INK.search(text, at):
            value, at = json.JSONDecoder().raw_decode(text, ink.start())
            found.append(value)
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"is no JSON, or was cut off ({error}). {_READS}") from None
    if not found:
        raise ExperimentError(f"is empty. {_READS}")
    return _with_text(found) if _HALF.search(text) else found


def _with_text(value: Any) -> Any:
    """A JSON value whose strings can be written: "\ufffd" for halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_with_text(one) for one in value]
    if isinstance(value, dict):
        return {_with_text(key): _with_text(one) for key, one in value.items()}
    return value


def _reader(first: Any) -> Callable[[Sequence[Any], int | None], ExperimentFile]:
    """Who reads a file that begins with this value."""
    if not isinstance(first, dict):
        raise ExperimentError(f"holds JSON that no benchmark writes. {_READS}")
    if "request_start_ns" in inner(first, "metadata") and "metrics" in first:
        return aiperf.read
    if "benchmarks" in first:
        return guidellm.read
    if {"date", "duration", "completed"} <= first.keys():
        return vllm.read
    if first.get("format") == FORMAT:
        raise ExperimentError("is an experiment of inferkit's own: ik.open reads it.")
    if {"aiperf_version", "input_config", "start_perf_ns"} & first.keys():
        raise ExperimentError("is another file of AIPerf's: profile_export.jsonl is beside it.")
    keys = listed(list(first)[:8]) or "none"
    raise ExperimentError(f"is of no known benchmark: it begins with the keys {keys}. {_READS}")


def _completed(file: ExperimentFile, name: str) -> ExperimentFile:
    """What a reader found, checked, with what is the same whatever the tool."""
    done = [one for one in file.requests if one.finish_reason == "stop"]
    if done and not any(one.tokens for one in done):
        raise ExperimentError(
            "has no time of a first token: its responses were not streamed. Run the benchmark with "
            "streaming (AIPerf: --streaming)."
        )
    requests = sorted(file.requests, key=lambda one: one.arrival)
    end = nanoseconds(max((trace_of(one).end for one in requests), default=0), 1)
    unknown: dict[str, Any] = dict.fromkeys(("batching", "quantize", "format", "step"), UNKNOWN)
    settings = common.settings(file.models[0].name)
    return msgspec.structs.replace(
        file,
        name=name,
        duration=end if file.duration is None else file.duration,
        redacted=not any(one.text for one in requests),
        notes=[*_notes(done), *file.notes],
        modes=[ModeEntry(time=0, model=0, max_batch=0, context=0, **unknown)],
        requests=[msgspec.structs.replace(one, settings=settings) for one in requests],
    )


def _notes(done: Sequence[RequestEntry]) -> Iterator[str]:
    """What a reader should know of how it was read."""
    if done:
        yield 'The file does not say how outputs ended: "stop" stands for all that succeeded'
    timed = [one for one in done if one.tokens]
    cases = (
        (
            sum(one.chunks == [] for one in timed),
            "have no times between the first and the last token: ITL leaves them out, and their "
            "tokens after the first stand at the last time",
        ),
        (
            sum(bool(one.chunks) for one in timed),
            "have another number of chunks than of tokens: gaps are those between chunks, tokens "
            "stand at times of chunks",
        ),
        (len(done) - len(timed), "succeeded without the time of a token"),
    )
    for count, words in cases:
        if count:
            yield f"{count} of {len(done)} requests {words}"
