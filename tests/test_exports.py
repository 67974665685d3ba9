import csv
import io
import json
import sys

import msgspec
import pandas as pd
import pytest
from measured import MS, experiment, random_experiment, request, saved, small

from inferkit.errors import ExperimentError, OptionError
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.exports import to_aiperf, to_vllm, write

# To vLLM


def test_vllm_json_of_a_small_experiment_by_hand():
    found = to_vllm(small(), slo={"ttft": 0.1, "tpot": 0.025})
    assert found["num_prompts"] == 4  # the one on its way is left out
    assert (found["completed"], found["failed"]) == (2, 2)
    assert found["input_lens"] == [7, 7, 7, 7]
    assert found["output_lens"] == [3, 1, 0, 0]
    assert found["ttfts"] == pytest.approx([0.1, 0.2, 0, 0])
    assert found["itls"] == [pytest.approx([0.02, 0.03]), [], [], []]
    assert found["latencies"] == pytest.approx([0.15, 0.2, 0, 0])
    assert found["start_times"] == pytest.approx([0, 0.05, 0.06, 0.07])
    assert found["generated_texts"] == ["one two three", "x", "", ""]
    assert found["errors"] == ["", "", "cancelled", "no room"]
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (14, 4)
    assert found["duration"] == pytest.approx(0.25)  # first arrival to the end of the last
    assert found["request_throughput"] == pytest.approx(2 / 0.25)
    assert found["output_throughput"] == pytest.approx(4 / 0.25)
    assert found["total_token_throughput"] == pytest.approx(18 / 0.25)
    assert found["request_goodput"] == pytest.approx(1 / 0.25)
    assert found["mean_ttft_ms"] == pytest.approx(150)
    assert found["std_ttft_ms"] == pytest.approx(50)
    assert found["p99_ttft_ms"] == pytest.approx(199)
    assert found["mean_tpot_ms"] == found["median_tpot_ms"] == pytest.approx(25)
    assert found["mean_itl_ms"] == pytest.approx(25)
    assert found["p50_e2el_ms"] == pytest.approx(175)
    assert found["max_output_tokens_per_s"] == 4.0
    assert found["max_concurrent_requests"] == 2
    assert found["date"] == "20261124-093000"
    assert found["model_id"] == "owner/tiny"


def test_vllm_json_names_the_models_that_ran():
    exp = small()
    (entry,), (mode,) = exp.file.models, exp.file.modes
    exp.file.models = [msgspec.structs.replace(entry, ref="owner/idle"), entry]
    exp.file.modes = [mode, msgspec.structs.replace(mode, model=1)]
    for one in exp.file.requests:
        one.model = one.mode = 1
    found = to_vllm(exp)
    assert found["model_id"] == found["tokenizer_id"] == "owner/tiny"
    exp.file.requests[1].model = exp.file.requests[1].mode = 0
    assert to_vllm(exp)["model_id"] == "owner/tiny, owner/idle"


# The keys of a GenerativeBenchmark result of `benchmark` and `main_async` in
# vllm-project/vllm@009e6d4 vllm/benchmarks/serve.py, defaults and e2el.
VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
    *("output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls"),
    *("latencies", "start_times", "queue_times", "generated_texts", "errors"),
    *("max_output_tokens_per_s", "max_concurrent_requests", "rtfx"),
} | {
    f"{statistic}_{name}_ms"
    for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    for name in ("ttft", "tpot", "itl", "e2el")
}


def test_vllm_json_has_the_keys_of_vllm():
    assert set(to_vllm(small())) == VLLM_KEYS
    assert to_vllm(small())["request_goodput"] is None
    json.dumps(to_vllm(small()), allow_nan=False)


def test_peaks_count_chunks_by_second_and_requests_that_touch_do_not_overlap():
    found = to_vllm(
        experiment(
            request(0, 100 * MS, 900 * MS, 1000 * MS),
            request(1000 * MS, 100 * MS, 200 * MS, 900 * MS),
        )
    )
    assert found["max_output_tokens_per_s"] == 4.0  # the one at 1.0 s is of the second second
    assert found["max_concurrent_requests"] == 1


def test_aiperf_records_of_a_small_experiment_by_hand():
    first, second, cancelled, failed = to_aiperf(small())
    start = 1795512600_250_000_000
    assert first["metadata"]["request_start_ns"] == start
    assert first["metadata"]["request_end_ns"] == start + 150 * MS
    assert first["error"] is None
    metrics = first["metrics"]
    assert metrics["time_to_first_token"] == {"value": pytest.approx(100), "unit": "ms"}
    assert metrics["inter_chunk_latency"] == {"value": pytest.approx([20, 30]), "unit": "ms"}
    assert metrics["inter_token_latency"]["value"] == pytest.approx(25)
    assert metrics["time_to_second_token"]["value"] == pytest.approx(20)
    assert metrics["request_latency"]["value"] == pytest.approx(150)
    assert metrics["output_sequence_length"] == {"value": 3, "unit": "tokens"}
    assert metrics["output_token_throughput_per_user"]["value"] == pytest.approx(40)
    assert not {"inter_token_latency", "inter_chunk_latency"} & second["metrics"].keys()
    assert cancelled["metadata"]["was_cancelled"]
    assert cancelled["metadata"]["cancellation_time_ns"] == start + 170 * MS
    assert cancelled["error"]["type"] == "RequestCancellationError"
    assert cancelled["error"]["message"] == "Request was cancelled after 0.110 seconds"
    assert failed["error"] == {"type": "OutOfMemoryError", "message": "no room"}
    assert failed["metrics"] == {"error_isl": {"value": 7, "unit": "tokens"}}


# Files


def test_csv_is_the_frame(tmp_path):
    path = write(small(), tmp_path / "out.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["finish_reason"] for row in rows][2:] == ["cancelled", "error", ""]
    assert float(rows[0]["ttft"]) == pytest.approx(0.1)
    assert rows[3]["ttft"] == ""


def test_parquet_is_the_frame(tmp_path):
    path = write(small(), tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(path), small().to_frame())


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionError, match="pip install pyarrow"):
        write(small(), tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_does_not_say_the_kind_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"say kind, one of 'vllm'.*exp.save"):
        write(small(), tmp_path / "out.json")
    with pytest.raises(OptionError, match=r"'vllm', 'aiperf', 'csv', 'parquet'"):
        write(small(), tmp_path / "out")
    with pytest.raises(OptionError, match="kind='yaml'"):
        write(small(), tmp_path / "out.csv", kind="yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_unless_told_otherwise(tmp_path):
    path = saved(tmp_path / "out.csv", "mine")
    with pytest.raises(OptionError, match="overwrite=True"):
        write(small(), path)
    assert path.read_text() == "mine"
    write(small(), path, overwrite=True)
    assert path.read_text().startswith("request,")
    assert [one.name for one in tmp_path.iterdir()] == ["out.csv"]
    with pytest.raises(OptionError, match="no folder"):
        write(small(), tmp_path / "missing" / "out.csv")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = saved(tmp_path / "out.csv", "mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ExperimentError, match="No space left"):
        write(small(), path, overwrite=True)
    assert path.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_requests_are_an_empty_table_and_an_empty_list_of_records(tmp_path):
    none = experiment()
    assert list(to_aiperf(none)) == []
    assert write(none, tmp_path / "out.csv").exists()
    empty = write(none, tmp_path / "out.jsonl")
    assert empty.read_bytes() == b""


@pytest.mark.parametrize("name", ["one.html", "one.csv", "one.jsonl", "one.vllm"])
def test_a_file_never_says_that_it_was_measured_here_and_now(tmp_path, name):
    """Whoever opens it does so later and elsewhere, whichever process wrote it."""
    exp = Experiment(random_experiment().file, fresh=True)
    assert "measured here and now" in repr(exp)
    options = {"other": exp} if name.endswith(".html") else {}
    kind = "vllm" if name.endswith(".vllm") else None
    text = exp.export(tmp_path / name, kind, **options).read_text(encoding="utf-8")
    assert "here and now" not in text
    assert ("recorded 2026-11-24" in text) is name.endswith(".html")
    assert "measured here and now" in repr(exp)
