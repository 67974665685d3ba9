import copy
import json
from datetime import timedelta

import pytest
from measured import MS, experiment, lines, random_experiment, request, saved, small

from inferkit.definitions import DEFINITIONS
from inferkit.errors import ExperimentError, OptionError
from inferkit.experiments.experiment import open_experiment
from inferkit.experiments.exports import to_aiperf, to_vllm, write
from inferkit.experiments.file import Environment
from inferkit.experiments.imports import import_experiment


def assert_same_times(found, expected, names=("ttft", "tpot", "e2e"), itl=True):
    assert len(found.generations) == len(expected.generations)
    for one, other in zip(found.generations, expected.generations):
        if not other.latency.trace.ok:
            assert not one.latency.trace.ok
            continue
        for name in names:
            value = getattr(other.latency, name)
            limits = {"rel": 0, "abs": 1e-6}
            assert getattr(one.latency, name) == (
                None if value is None else pytest.approx(value, **limits)
            )
        if itl:
            assert one.latency.itl == pytest.approx(other.latency.itl, rel=0, abs=1e-6)
        assert one.latency.output_tokens == other.latency.output_tokens
        assert one.latency.prompt_tokens == other.latency.prompt_tokens


def assert_same_summary(found, expected, definitions):
    one, other = (exp.summary(definitions=definitions) for exp in (found, expected))
    assert (one.completed, one.failed) == (other.completed, other.failed)
    assert one.duration == pytest.approx(other.duration, abs=1e-6)
    for metric in DEFINITIONS[definitions].metrics:
        if metric.name == "queue":  # no other tool sees the server's queue
            continue
        numbers, wanted = one[metric.name].to_dict(), other[metric.name].to_dict()
        assert numbers.pop("unit") == wanted.pop("unit") == metric.unit
        limit = 1e-6 if metric.unit == "s" else 1e-3
        assert numbers == pytest.approx(wanted, abs=limit, rel=0), metric.name


# vLLM

# As `benchmark` in vllm-project/vllm@009e6d4 vllm/benchmarks/serve.py makes it: perf_counter
# seconds; the third request failed in the middle of its stream (its TTFT stays, its latency is 0).
VLLM = {
    "date": "20261124-120010",
    "endpoint_type": "openai-chat",
    "backend": "openai-chat",
    "label": None,
    "model_id": "/home/someone/models/Qwen3-0.6B",
    "tokenizer_id": "Qwen/Qwen3-0.6B",
    "num_prompts": 3,
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 10.0,
    "completed": 2,
    "failed": 1,
    "total_input_tokens": 20,
    "total_output_tokens": 7,
    "request_throughput": 0.2,
    "request_goodput": None,
    "input_lens": [10, 10, 10],
    "output_lens": [3, 4, 0],
    "ttfts": [0.25, 0.5, 0.125],
    "itls": [[0.25, 0.5], [0.25], [0.25]],
    "latencies": [1.0, 0.75, 0.0],
    "start_times": [353399.5, 353400.0, 353400.5],
    "queue_times": [0.0, 0.0, 0.0],
    "generated_texts": ["a b c", "d e f g", ""],
    "errors": ["", "", "Traceback (most recent call last): ..."],
    "mean_ttft_ms": 375.0,
}


def test_vllm_times_are_rebuilt_from_starts_ttfts_and_gaps(tmp_path):
    found = import_experiment(saved(tmp_path / "bench.json", VLLM))
    first, second, third = found.file.requests
    assert first.tokens == [250 * MS, 500 * MS, 1000 * MS]
    assert (first.arrival, second.arrival, third.arrival) == (0, 500 * MS, 1000 * MS)
    assert (third.tokens, third.finish_reason, third.error[1][:9]) == ([], "error", "Traceback")
    assert found.file.source == "vllm bench serve"
    assert found.created.isoformat() == "2026-11-24T12:00:00+00:00"
    assert found.duration == 10.0
    assert found.file.models[0].name == "Qwen3-0.6B"  # no folder, which may tell who ran it
    assert "someone" not in json.dumps(to_vllm(found))
    assert [gen.text for gen in found.generations] == ["a b c", "d e f g", ""]
    assert found.environment == Environment()
    assert "by vllm bench serve 2026-11-24" in repr(found)


def test_four_tokens_in_two_chunks_keep_vllms_numbers(tmp_path):
    found = import_experiment(saved(tmp_path / "bench.json", VLLM))
    latency = found.generations[1].latency
    assert latency.output_tokens == 4
    assert (latency.ttft, latency.e2e) == (0.5, 0.75)
    assert latency.tpot == pytest.approx(0.25 / 3)
    assert latency.itl == [0.25]  # between chunks, as vLLM has it
    assert found.summary().itl.count == 3
    assert any("another number of chunks" in note for note in found.notes)
    frame = latency.to_frame()
    assert len(frame) == 4
    assert frame["itl"].fillna(-1).tolist() == [-1, 0.25, -1, -1]  # before the second chunk
    assert latency.plot() is not None


def test_more_chunks_than_tokens_keep_the_ends_and_vllms_gaps(tmp_path):
    # A chat endpoint's first chunk has the role and no text, and vLLM counts it.
    result = VLLM | {"output_lens": [2, 1, 0]}
    found = import_experiment(saved(tmp_path / "bench.json", result))
    first, second = (gen.latency for gen in found.generations[:2])
    assert (first.ttft, first.e2e, first.output_tokens) == (0.25, 1.0, 2)
    assert first.itl == [0.25, 0.5]
    assert second.output_tokens == 1
    assert second.tpot is None


def test_gaps_that_do_not_reach_the_end_are_not_taken_for_all(tmp_path):
    result = VLLM | {"itls": [[], [0.25], []]}
    found = import_experiment(saved(tmp_path / "bench.json", result))
    latency = found.generations[0].latency
    assert (latency.itl, latency.e2e) == ([], 1.0)
    assert any("1 of 2 requests have no times between" in note for note in found.notes)


def test_vllm_without_details_says_how_to_get_them(tmp_path):
    details = (
        *("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts"),
        "errors",
    )
    plain = {key: value for key, value in VLLM.items() if key not in details}
    with pytest.raises(ExperimentError, match="--save-detailed"):
        import_experiment(saved(tmp_path / "bench.json", plain))
    older = {key: value for key, value in VLLM.items() if key != "start_times"}
    with pytest.raises(ExperimentError, match="in a vLLM of January 2026 or later"):
        import_experiment(saved(tmp_path / "bench.json", older))


def test_several_results_in_a_file_are_chosen_by_number(tmp_path):
    # --append-result writes one after the other, a newline between them
    other = VLLM | {"model_id": "second", "request_rate": "inf"}
    path = saved(tmp_path / "bench.json", json.dumps(VLLM) + "\n" + json.dumps(other))
    with pytest.raises(ExperimentError, match=r"2 results.*request rate inf.*benchmark=0"):
        import_experiment(path)
    with pytest.raises(ExperimentError, match="none is number 2"):
        import_experiment(path, benchmark=2)
    assert import_experiment(path, benchmark=1).file.models[0].name == "second"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttfts": [0.25, "fast", 0.1]}, r"Expected `float`, got `str`.*ttfts\[1\]"),
        ({"ttfts": [0.25, 0.5]}, "not equally long"),
        ({"itls": [[0.25, -1.0], [], []]}, "no time|backwards"),
        ({"start_times": [0.0, 1e300, 1.0]}, "is no time"),
        ({"date": "yesterday"}, "'yesterday' does not match format"),
        ({"duration": None}, "duration"),
        ({"ttfts": 3}, "ttfts"),
        ({"output_lens": [3, -1, 0]}, "output_lens"),
    ],
)
def test_a_damaged_vllm_file_says_where(tmp_path, change, message):
    with pytest.raises(ExperimentError, match=message):
        import_experiment(saved(tmp_path / "bench.json", copy.deepcopy(VLLM) | change))


def test_nan_is_no_time(tmp_path):
    text = json.dumps(VLLM | {"ttfts": [float("nan"), 0.5, 0.1]})  # as Python's json writes it
    with pytest.raises(ExperimentError, match="nan is no time"):
        import_experiment(saved(tmp_path / "bench.json", text))


def test_an_experiment_without_requests_has_zeros_as_vllm(tmp_path):
    found = to_vllm(experiment(duration=2 * 10**9))
    assert (found["num_prompts"], found["completed"], found["mean_ttft_ms"]) == (0, 0, 0.0)
    assert (found["duration"], found["ttfts"], found["request_throughput"]) == (2.0, [], 0)
    read = import_experiment(saved(tmp_path / "none.json", found))
    assert len(read.generations) == 0
    with pytest.raises(OptionError, match="no request"):
        read.summary()


def test_all_requests_failed_is_zeros_too(tmp_path):
    only = experiment(request(0, reason="error", finished=MS, error=["GenerationError", "lost"]))
    found = to_vllm(only)
    assert (found["completed"], found["failed"], found["mean_itl_ms"]) == (0, 1, 0.0)
    read = import_experiment(saved(tmp_path / "failed.json", found))
    assert read.generations[0].finish_reason == "error"
    assert str(read.generations[0].error) == "lost"


def test_vllm_and_back_gives_the_same_times_and_the_same_summary(tmp_path):
    original = random_experiment()
    path = write(original, tmp_path / "vllm.json", kind="vllm")
    found = import_experiment(path)
    assert_same_times(found, original)
    assert_same_summary(found, original, "vllm")
    assert found.file.source == "inferkit, in vLLM's format"
    # A file of vLLM's begins with its first request, and its date has whole seconds.
    began = original.created + timedelta(seconds=original.file.requests[0].arrival * 1e-9)
    assert timedelta(0) <= began - found.created <= timedelta(seconds=1)
    assert found.generations[0].settings.model == "owner/tiny"


# AIPerf

# From ai-dynamo/aiperf@13992db docs/tutorials/working-with-profile-exports.md ("Successful Request
# Record", "Failed Request Record"), with the TTFT that its gaps and its latency give.
AIPERF_OK = {
    "metadata": {
        "session_num": 45,
        "x_request_id": "7609a2e7-aa53-4ab1-98f4-f35ecafefd25",
        "x_correlation_id": "32ee4f33-cfca-4cfc-988f-79b45408b909",
        "conversation_id": "77aa5b0e-b305-423f-88d5-c00da1892599",
        "turn_index": 0,
        "request_start_ns": 1759813207532900363,
        "request_ack_ns": 1759813207650730976,
        "request_end_ns": 1759813207838764604,
        "worker_id": "worker_359d423a",
        "record_processor_id": "record_processor_1fa47cd7",
        "benchmark_phase": "profiling",
        "was_cancelled": False,
        "cancellation_time_ns": None,
    },
    "metrics": {
        "input_sequence_length": {"value": 550, "unit": "tokens"},
        "time_to_first_token": {"value": 255.886568, "unit": "ms"},
        "request_latency": {"value": 297.525227, "unit": "ms"},
        "output_token_count": {"value": 9, "unit": "tokens"},
        "inter_chunk_latency": {
            "value": [
                *(4.898437, 5.316006, 4.801489, 5.674918),
                *(4.811467, 5.097998, 5.504797, 5.533547),
            ],
            "unit": "ms",
        },
        "output_sequence_length": {"value": 9, "unit": "tokens"},
        "inter_token_latency": {"value": 5.204832375, "unit": "ms"},
        "output_token_throughput_per_user": {"value": 192.1291415237666, "unit": "tokens/sec/user"},
    },
    "error": None,
}
AIPERF_CANCELLED = {
    "metadata": {
        "session_num": 80,
        "request_start_ns": 1759813207632900363,
        "request_end_ns": 1759813207633525291,
        "worker_id": "worker_6006099d",
        "record_processor_id": "record_processor_fdeeec8f",
        "benchmark_phase": "profiling",
        "was_cancelled": True,
        "cancellation_time_ns": 1759813207633525291,
    },
    "metrics": {"error_isl": {"value": 550, "unit": "tokens"}},
    "error": {
        "code": 499,
        "type": "RequestCancellationError",
        "message": "Request was cancelled after 0.000 seconds",
    },
}


def aiperf(**metrics):
    """The successful record with other metrics; None takes one away."""
    record = copy.deepcopy(AIPERF_OK)
    for name, value in metrics.items():
        record["metrics"].pop(name, None)
        if value is not None:
            unit = "tokens" if name.endswith("length") else "ms"
            record["metrics"][name] = {"value": value, "unit": unit}
    return record


def test_aiperf_records_with_gaps_have_every_time(tmp_path):
    path = saved(tmp_path / "profile_export.jsonl", lines([AIPERF_OK, AIPERF_CANCELLED]))
    found = import_experiment(path)
    latency = found.generations[0].latency
    assert found.file.source == "AIPerf"
    assert latency.ttft == pytest.approx(0.255886568)
    assert latency.e2e == pytest.approx(0.297525227)
    assert latency.tpot == pytest.approx(0.005204832375)
    assert latency.itl[:2] == pytest.approx([0.004898437, 0.005316006])
    assert latency.output_tokens == 9
    assert latency.prompt_tokens == 550
    assert found.generations[1].finish_reason == "cancelled"
    assert found.summary(definitions="aiperf").failed == 1
    assert found.created.isoformat() == "2025-10-07T05:00:07.532900+00:00"
    assert found.redacted
    assert not any("no times between" in note for note in found.notes)


def test_aiperf_without_gaps_shows_no_itl_and_keeps_all_the_rest(tmp_path):
    records = [aiperf(inter_chunk_latency=None), AIPERF_CANCELLED]
    found = import_experiment(saved(tmp_path / "p.jsonl", lines(records)))
    latency = found.generations[0].latency
    assert latency.ttft == pytest.approx(0.255886568)
    assert latency.e2e == pytest.approx(0.297525227)
    assert latency.tpot == pytest.approx(0.005204832375)
    assert latency.itl == []
    summary = found.summary()
    assert (summary.itl.count, summary.itl.p99) == (0, None)
    assert found.summary(definitions="aiperf").time_to_second_token.count == 0
    assert found.summary(definitions="aiperf").inter_token_latency.p50 == pytest.approx(
        5.2048, 1e-4
    )
    assert any("ITL leaves them out" in note for note in found.notes)
    # Every time in the trace is in the file: none was interpolated.
    start = found.file.requests[0].arrival
    since = {time - start for time in found.file.requests[0].tokens}
    assert since == {255_886_568, 297_525_227}
    assert found.summary().plot() is not None
    exported = to_vllm(found)
    assert exported["itls"] == [[], []]
    assert not [key for key in exported if "itl_ms" in key or key == "max_output_tokens_per_s"]


def test_gaps_that_were_not_known_are_not_known_after_vllms_json_either(tmp_path):
    first = import_experiment(
        saved(tmp_path / "p.jsonl", lines([aiperf(inter_chunk_latency=None)]))
    )
    again = import_experiment(write(first, tmp_path / "v.json", kind="vllm"))
    assert again.summary().itl.count == 0
    assert again.summary().tpot.p50 == pytest.approx(first.summary().tpot.p50, abs=1e-6)


def test_an_aiperf_response_of_one_chunk_has_no_gap_to_miss(tmp_path):
    record = aiperf(inter_chunk_latency=None, request_latency=255.886568)
    found = import_experiment(saved(tmp_path / "p.jsonl", lines([record, AIPERF_OK])))
    assert found.generations[0].latency.output_tokens == 9
    assert found.summary().itl.count == 8
    assert not any("no times between" in note for note in found.notes)


def test_aiperf_that_did_not_stream_is_refused(tmp_path):
    record = aiperf(inter_chunk_latency=None, time_to_first_token=None)
    with pytest.raises(ExperimentError, match="--streaming"):
        import_experiment(saved(tmp_path / "p.jsonl", lines([record])))


def test_aiperf_warm_up_is_left_out(tmp_path):
    warm = copy.deepcopy(AIPERF_OK)
    warm["metadata"]["benchmark_phase"] = "warmup"
    found = import_experiment(saved(tmp_path / "p.jsonl", lines([warm, AIPERF_OK])))
    assert len(found.generations) == 1
    assert any("1 requests of the warm-up" in note for note in found.notes)
    with pytest.raises(ExperimentError, match="warm-up only"):
        import_experiment(saved(tmp_path / "p.jsonl", lines([warm])))


def test_aiperf_and_back_gives_the_same_times_and_the_same_summaries(tmp_path):
    original = random_experiment(seed=1)
    found = import_experiment(write(original, tmp_path / "out.jsonl"))
    assert_same_times(found, original)
    assert_same_summary(found, original, "vllm")
    assert_same_summary(found, original, "aiperf")
    assert found.file.source == "inferkit, in AIPerf's format"
    again = list(to_aiperf(found))
    for one, other in zip(again, to_aiperf(original)):
        assert one["metadata"] == other["metadata"]  # wall clock to the nanosecond


def test_an_aiperf_error_comes_back_with_its_kind(tmp_path):
    found = import_experiment(write(small(), tmp_path / "out.jsonl"))
    reasons = [gen.finish_reason for gen in found.generations]
    assert reasons == ["stop", "stop", "cancelled", "error"]
    assert type(found.generations[3].error).__name__ == "OutOfMemoryError"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            aiperf(time_to_first_token="soon"),
            r"Expected `float`, got `str`.*\[0\].*time_to_first_token",
        ),
        (aiperf(output_sequence_length=1.5), "Expected `int`.*output_sequence_length"),
        (aiperf(output_sequence_length=10**12), "Expected `int` <=.*output_sequence_length"),
        (aiperf(request_latency=1e300, inter_chunk_latency=None), "1e\\+300 is no time"),
        (aiperf(time_to_first_token=-1), "-1.* is no time"),
        (
            AIPERF_OK | {"metrics": {"time_to_first_token": {"value": 1, "unit": "fortnight"}}},
            "fort",
        ),
        (AIPERF_OK | {"metrics": 3}, r"damaged.*\[0\].metrics"),
    ],
)
def test_a_damaged_aiperf_record_says_where(tmp_path, record, message):
    with pytest.raises(ExperimentError, match=message):
        import_experiment(saved(tmp_path / "p.jsonl", lines([record])))


def test_a_truncated_aiperf_file_says_in_which_line(tmp_path):
    text = lines([AIPERF_OK, AIPERF_OK])
    with pytest.raises(ExperimentError, match=r"cut off.*line 2"):
        import_experiment(saved(tmp_path / "p.jsonl", text[:-40]))


# GuideLLM


def guidellm_request(start, first=None, last=None, end=None, tokens=None, iterations=0, **extra):
    """``GenerativeRequestStats`` of vllm-project/guidellm@ee7a774
    src/guidellm/schemas/request_stats.py, with ``RequestInfo`` of schemas/info.py."""
    timings = {
        "targeted_start": start,
        "queued": start,
        "resolve_start": start,
        "request_start": start,
        "first_token_iteration": first,
        "last_token_iteration": last,
        "request_iterations": iterations + 2,
        "token_iterations": iterations,
        "request_end": end,
        "resolve_end": end,
    }
    info = {"request_id": "id", "status": "completed", "timings": timings, "error": None}
    return {
        "type_": "generative_request_stats",
        "request_id": "id",
        "request_args": "{}",
        "output": "some text",
        "info": info | extra,
        "input_metrics": {"text_tokens": 12, "cached_tokens": 4, "total_tokens": 12},
        "output_metrics": {"text_tokens": tokens, "total_tokens": tokens},
    }


def guidellm_report():
    """The layout of ``GenerativeBenchmarksReport``, version 2, of the same commit
    (src/guidellm/benchmark/schemas/report.py and benchmark.py)."""
    at = 1795512600.0
    requests = {
        "successful": [
            guidellm_request(at, at + 0.5, at + 1.5, at + 1.625, tokens=5, iterations=5),
            guidellm_request(at + 1, at + 1.25, at + 1.25, at + 1.5, tokens=1, iterations=1),
        ],
        "errored": [guidellm_request(at + 2, end=at + 2.25, error="HTTP 500")],
        "incomplete": [guidellm_request(at + 3, at + 3.5, at + 4, at + 4, iterations=3)],
        "total": None,
    }
    strategy = {"type_": "constant", "rate": 2.0}
    config = {"strategy": strategy, "backend": {"kind": "openai_http", "model": "Qwen/Qwen3-0.6B"}}
    return {
        "metadata": {
            "version": 2,
            "guidellm_version": "0.8.1",
            "python_version": "3.12.3",
            "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
        },
        "config": {"spec": {}},
        "benchmarks": [
            {
                "type_": "generative_benchmark",
                "config": config,
                "requests": requests,
                "start_time": at,
            }
        ],
    }


def test_guidellm_requests_keep_what_the_report_says(tmp_path):
    found = import_experiment(saved(tmp_path / "benchmarks.json", guidellm_report()))
    first, second, third, fourth = found.generations
    assert (first.latency.ttft, first.latency.e2e) == (0.5, 1.5)
    assert first.latency.tpot == pytest.approx(0.25)
    assert first.latency.output_tokens == 5
    assert first.latency.trace.cached_tokens == 4
    assert first.latency.itl == []  # GuideLLM keeps no time between the first token and the last
    assert second.latency.tpot is None
    assert (third.finish_reason, str(third.error)) == ("error", "HTTP 500")
    assert fourth.finish_reason == "cancelled"
    assert found.file.source == "GuideLLM 0.8.1"
    assert found.environment.packages == {"guidellm": "0.8.1"}
    assert found.environment.python == "3.12.3"
    assert found.file.models[0].name == "Qwen/Qwen3-0.6B"
    assert found.created.isoformat() == "2026-11-24T09:30:00+00:00"
    assert found.summary().itl.count == 0
    assert any("1 of 2 requests have no times between" in note for note in found.notes)


def test_a_prompt_whose_total_a_report_leaves_out_is_as_long_as_what_was_cached(tmp_path):
    report = guidellm_report()
    report["benchmarks"][0]["requests"]["successful"][0]["input_metrics"]["total_tokens"] = None
    found = import_experiment(saved(tmp_path / "benchmarks.json", report))
    found.save(tmp_path / "kept.json")
    assert open_experiment(tmp_path / "kept.json").generations[0].latency.prompt_tokens == 4


def test_guidellms_own_metrics_are_as_it_computes_them(tmp_path):
    found = import_experiment(saved(tmp_path / "benchmarks.json", guidellm_report()))
    summary = found.summary(definitions="guidellm")
    assert summary.request_latency.max == pytest.approx(1.625)  # to the request's end
    assert summary.time_to_first_token_ms.mean == pytest.approx((500 + 250) / 2)
    assert summary.inter_token_latency_ms.mean == pytest.approx(250)
    assert summary.time_per_output_token_ms.mean == pytest.approx((1500 + 250) / 6)


def test_a_guidellm_sweep_is_chosen_by_number(tmp_path):
    report = guidellm_report()
    report["benchmarks"] = [copy.deepcopy(report["benchmarks"][0]) for _ in range(3)]
    report["benchmarks"][2]["config"]["strategy"] = {"type_": "concurrent", "streams": 8}
    path = saved(tmp_path / "benchmarks.json", report)
    with pytest.raises(ExperimentError, match=r"3 results.*constant 2.*concurrent 8.*benchmark=2"):
        import_experiment(path)
    assert len(import_experiment(path, benchmark=2).generations) == 4
    report["benchmarks"] = []
    with pytest.raises(ExperimentError, match="no result"):
        import_experiment(saved(path, report))


def test_other_versions_and_damaged_reports_are_refused(tmp_path):
    report = guidellm_report()
    report["metadata"]["version"] = 1
    with pytest.raises(ExperimentError, match=r"version 1 .*reads version 2"):
        import_experiment(saved(tmp_path / "b.json", report))
    report = guidellm_report()
    report["benchmarks"][0]["requests"]["successful"][0]["info"] = "none"
    with pytest.raises(ExperimentError, match=r"damaged.*info"):
        import_experiment(saved(tmp_path / "b.json", report))
    report = guidellm_report()
    timings = report["benchmarks"][0]["requests"]["successful"][0]["info"]["timings"]
    timings["last_token_iteration"] = timings["first_token_iteration"] - 0.25
    with pytest.raises(ExperimentError, match="backwards"):
        import_experiment(saved(tmp_path / "b.json", report))


# Files of other kinds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("model,ttft\na,1\n", "is no JSON"),
        (json.dumps(VLLM)[:200], "cut off"),
        (json.dumps(VLLM, indent=1)[:200], "cut off"),
        ("[1, 2]", "JSON that no benchmark"),
        ('"text"', "JSON that no benchmark"),
        ("{}", "keys none"),
        ('{"loss": 3, "step": 4}', "keys 'loss', 'step'.*profile_export.jsonl"),
        ('{"format": "inferkit-experiment", "version": 1}', "ik.open reads it"),
        ('{"schema_version": "1.5", "aiperf_version": "0.13.0"}', "profile_export.jsonl is beside"),
        ('{"metadata": {}, "start_perf_ns": 3, "responses": []}', "profile_export.jsonl is beside"),
        ('{"benchmarks": []}', "version None"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_result_says_what_was_found(tmp_path, text, message):
    with pytest.raises(ExperimentError, match=f"(?s){message}") as caught:
        import_experiment(saved(tmp_path / "some.json", text))
    assert "some.json" in str(caught.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "bytes").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ExperimentError, match="no JSON"):
        import_experiment(tmp_path / "bytes")
    with pytest.raises(ExperimentError, match="cannot be read"):
        import_experiment(tmp_path / "none.json")
    with pytest.raises(ExperimentError, match="cannot be read"):
        import_experiment(tmp_path)


def test_the_kind_shows_in_the_content_and_not_in_the_name(tmp_path):
    assert import_experiment(saved(tmp_path / "a.jsonl", VLLM)).file.source == "vllm bench serve"
    one = import_experiment(saved(tmp_path / "a.json", AIPERF_OK))
    assert one.file.source == "AIPerf"


def test_an_import_can_be_saved_and_opened(tmp_path):
    found = import_experiment(saved(tmp_path / "bench.json", VLLM))
    again = open_experiment(found.save(tmp_path / "saved.json"))
    assert again.notes == found.notes
    assert again.file.source == "vllm bench serve"
    assert_same_times(again, found, itl=False)
    assert again.summary().tpot.p50 == found.summary().tpot.p50


# write


def test_chunks_are_part_of_the_file(tmp_path):
    found = import_experiment(saved(tmp_path / "bench.json", VLLM))
    again = open_experiment(found.save(tmp_path / "saved.json"))
    assert [one.chunks for one in again.file.requests] == [None, [1000 * MS, 1250 * MS], None]
    assert_same_times(again, found)
    assert again.summary().itl == found.summary().itl


def test_gaps_that_are_not_known_stay_so_in_files_and_differences(tmp_path):
    found = import_experiment(saved(tmp_path / "benchmarks.json", guidellm_report()))
    again = open_experiment(found.save(tmp_path / "saved.json"))
    assert again.file.requests[0].chunks == []
    assert [gen.latency.itl for gen in again.generations[:2]] == [[], []]
    shown = [line.split() for line in repr(again.summary()).splitlines()]
    assert next(line for line in shown if line[0] == "ITL") == ["ITL", "ms", "0", *"-------"]
    difference = again.diff(again)
    assert difference.latency["itl"].n_a == 0
    row = next(line for line in repr(difference).splitlines() if line.startswith("ITL ms"))
    assert row.split()[2:5] == ["-", "-", "-"]


def test_many_chunks_are_packed_and_come_back(tmp_path):
    chunks = [number * MS for number in range(100)]
    made = experiment(request(0, *(time for time in chunks for _ in range(2)), chunks=chunks))
    path = made.save(tmp_path / "saved.json")
    assert '"chunks":{"n":100,' in path.read_text()
    assert open_experiment(path).generations[0].latency.itl == pytest.approx([0.001] * 99)


# What other tools wrote of people, and what is no text


SECRET = "no luck in /home/alice/m/x.bin of https://bob:hf_secret@host/m"
SAID = "no luck in x.bin of https://host/m"


def failing_results():
    """A result of each tool with a request that failed, by the name of its file."""
    vllm = to_vllm(small())
    vllm["errors"] = ["", "", "cancelled", SECRET]
    record = aiperf(error_isl=5) | {"error": {"type": "OSError", "message": SECRET}}
    report = guidellm_report()
    errored = guidellm_request(1.0)
    errored["info"]["error"] = SECRET
    report["benchmarks"][0]["requests"]["errored"] = [errored]
    return {"vllm.json": vllm, "aiperf.jsonl": record, "guidellm.json": report}


@pytest.mark.parametrize("name", ["vllm.json", "aiperf.jsonl", "guidellm.json"])
def test_errors_come_without_folders_users_and_passwords(tmp_path, name):
    source = saved(tmp_path / name, failing_results()[name])
    number = 0 if name == "guidellm.json" else None
    found = import_experiment(source, benchmark=number)
    assert SAID in [one.error[1] for one in found.file.requests if one.error]
    text = found.save(tmp_path / "own.json").read_text(encoding="utf-8")
    assert not [word for word in ("alice", "bob", "hf_secret") if word in text]


def test_what_is_no_text_is_replaced_and_can_be_written(tmp_path):
    result = to_vllm(small())
    result["generated_texts"][0] = "half \ud83d, whole \U0001f600"
    result["model_id"] = "m\udc00"
    result["errors"][3] = "\ud800"
    found = import_experiment(saved(tmp_path / "vllm.json", result))
    assert found.generations[0].text == "half \ufffd, whole \U0001f600"
    assert found.models[0].name == "m\ufffd"
    opened = open_experiment(found.save(tmp_path / "own.json"))
    assert opened.file.requests[3].error[1] == "\ufffd"
    for kind in ("csv", "parquet", "html", "vllm", "aiperf"):
        found.export(tmp_path / kind, kind)
