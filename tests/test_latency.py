import copy
import json
import math
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from inferkit.definitions import DEFINITIONS
from inferkit.errors import OptionError
from inferkit.latency import summarize
from inferkit.trace import Latency, Trace

MS = 1_000_000


def request(*tokens, arrival=0, queue=1, prompt=10, ok=True, reason="length", finished=None):
    """A request whose tokens come ``tokens`` ms after its arrival; times in ms."""
    at = [(arrival + token) * MS for token in tokens]
    if finished is None:
        finished = arrival + (tokens[-1] if tokens else queue)
    return Latency(
        Trace(
            arrival=arrival * MS,
            scheduled=(arrival + queue) * MS,
            tokens=tuple(at),
            finished=finished * MS,
            prompt_tokens=prompt,
            ok=ok,
            finish_reason=reason,
        )
    )


def random_requests(seed, count=40):
    """Ragged requests with jittered times, at the nanosecond; some have one token, some none."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        arrival = int(rng.integers(0, 10**10))
        scheduled = arrival + int(rng.integers(0, 10**8))
        gaps = rng.lognormal(17, 0.6, size=rng.integers(0, 60)).astype(np.int64)
        tokens = scheduled + np.cumsum(gaps)
        end = int(tokens[-1]) if len(tokens) else scheduled
        found.append(
            Latency(
                Trace(
                    arrival,
                    scheduled,
                    tuple(map(int, tokens)),
                    end + int(rng.integers(0, 10**6)),
                    prompt_tokens=int(rng.integers(1, 100)),
                    ok=bool(rng.random() > 0.1),
                )
            )
        )
    return found


def stream(latency):
    """What a benchmark client would note of a request: start and token times in seconds."""
    return latency.trace.arrival / 1e9, np.array(latency.trace.tokens) / 1e9


# One request


def test_latency_follows_the_definitions_of_vllm_bench_serve():
    latency = request(100, 120, 150, 160, arrival=1000, queue=30)
    assert latency.ttft == pytest.approx(0.100)
    assert latency.e2e == pytest.approx(0.160)
    assert latency.queue == pytest.approx(0.030)
    assert latency.itl == pytest.approx([0.020, 0.030, 0.010])
    assert latency.tpot == pytest.approx((0.160 - 0.100) / 3)
    assert latency.output_tokens == 4
    assert latency.prompt_tokens == 10
    assert latency.tokens_per_second == pytest.approx(4 / 0.160)


def test_end_to_end_ends_at_the_last_token_not_when_the_engine_cleaned_up():
    assert request(10, 20, finished=500).e2e == pytest.approx(0.020)


def test_values_without_enough_tokens_are_undefined():
    single, none = request(50), request()
    assert (single.ttft, single.tpot, single.itl) == (pytest.approx(0.050), None, [])
    assert (none.ttft, none.tpot, none.e2e, none.itl, none.tokens_per_second) == (
        *(None, None, None),
        *([], None),
    )


def test_request_that_was_never_scheduled_has_no_queue_time():
    latency = Latency(Trace(5, None, (), 9, 3, ok=False, finish_reason="cancelled"))
    assert latency.queue is None
    assert "queue=-" in repr(latency)


def test_mean_gap_is_tpot_on_any_stream():
    for latency in random_requests(1):
        if latency.output_tokens > 1:
            assert np.mean(latency.itl) == pytest.approx(latency.tpot)
            assert latency.ttft + sum(latency.itl) == pytest.approx(latency.e2e)


def test_nanoseconds_survive_a_clock_that_started_long_ago():
    up_a_year = 365 * 24 * 3600 * 10**9
    latency = Latency(Trace(up_a_year, up_a_year, (up_a_year + 1, up_a_year + 3), None, 1))
    assert latency.ttft == pytest.approx(1e-9, rel=1e-9)
    assert latency.itl == pytest.approx([2e-9], rel=1e-9)


@pytest.mark.parametrize(
    "times",
    [
        {"arrival": 5, "scheduled": 4, "tokens": (), "finished": None},
        {"arrival": 5, "scheduled": 6, "tokens": (8, 7), "finished": None},
        {"arrival": 5, "scheduled": None, "tokens": (4,), "finished": None},
        {"arrival": 5, "scheduled": 6, "tokens": (8,), "finished": 7},
    ],
)
def test_trace_whose_times_run_backwards_is_refused(times):
    with pytest.raises(OptionError, match="run backwards"):
        Trace(prompt_tokens=1, **times)


def test_trace_survives_json():
    trace = request(3, 4, 9).trace
    assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


@pytest.mark.parametrize("change", [{"colour": 1}, {"tokens": 7}])
def test_foreign_trace_is_refused_with_the_fields_that_it_should_have(change):
    with pytest.raises(OptionError, match="prompt_tokens"):
        Trace.from_dict(request(3).trace.to_dict() | change)
    with pytest.raises(OptionError, match="cached_tokens"):
        Trace.from_dict({})


def test_latency_exports_seconds_and_the_raw_trace():
    latency = request(100, 120, 150)
    data = json.loads(latency.to_json())
    assert data["ttft"] == latency.ttft
    assert data["itl"] == latency.itl
    assert data["definitions"] == "vllm"
    assert Trace.from_dict(data["trace"]) == latency.trace


def test_latency_frame_has_a_row_per_token():
    frame = request(100, 120, 150).to_frame()
    assert frame["time"].tolist() == pytest.approx([0.100, 0.120, 0.150])
    assert math.isnan(frame["itl"][0])
    assert frame["itl"][1:].tolist() == pytest.approx([0.020, 0.030])
    assert len(request().to_frame()) == 0


def chunked(chunks, *tokens):
    return Latency(Trace(0, 0, tuple(ms * MS for ms in tokens), None, 1, chunks=chunks))


def test_gaps_are_between_chunks_and_stand_at_their_first_tokens():
    # Two tokens at 100 ms, three at 130 ms, a chunk without one, one at 190 ms.
    chunks = tuple(ms * MS for ms in (100, 130, 150, 190))
    latency = chunked(chunks, 100, 100, 130, 130, 130, 190)
    assert latency.itl == pytest.approx([0.030, 0.020, 0.040])
    assert latency.tpot == pytest.approx(0.090 / 5)
    assert (latency.ttft, latency.e2e) == pytest.approx((0.100, 0.190))
    gaps = latency.to_frame()["itl"]
    assert gaps.fillna(-1).tolist() == pytest.approx([-1, -1, 0.030, -1, -1, 0.040])
    second = summarize([latency], definitions="aiperf").time_to_second_token
    assert second.max == pytest.approx(30)


def test_chunks_of_unknown_times_give_no_gap():
    latency = chunked((), 100, 190, 190)
    assert latency.itl == []
    assert latency.tpot == pytest.approx(0.045)
    assert latency.to_frame()["itl"].isna().all()
    assert summarize([latency]).itl.count == 0
    assert summarize([latency], definitions="aiperf").time_to_second_token.mean is None


def test_chunks_survive_json_and_are_left_out_where_each_is_a_token():
    assert "chunks" not in request(3, 4, 9).trace.to_dict()
    for chunks in ((), (3 * MS, 9 * MS)):
        trace = chunked(chunks, 3, 9, 9).trace
        assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


def test_chunks_that_run_backwards_are_refused():
    with pytest.raises(OptionError, match="backwards"):
        chunked((9 * MS, 3 * MS), 3, 9)


def test_latency_reads_well_in_terminal_and_notebook():
    latency = request(100, 120, 150)
    assert repr(latency) == "<Latency queue=1.0ms ttft=100.0ms tpot=25.0ms e2e=150.0ms, 3 tokens>"
    page = latency._repr_html_()
    assert "vLLM definitions" in page
    assert ">100.0<" in page


# Many requests, as vllm bench serve would report them


@pytest.mark.parametrize("seed", range(5))
def test_summary_equals_numpy_over_the_same_stream(seed):
    requests = random_requests(seed)
    summary = summarize(requests)
    ok = [stream(one) for one in requests if one.trace.ok]
    expected = {
        "ttft": [times[0] - start for start, times in ok if len(times)],
        "e2e": [times[-1] - start for start, times in ok if len(times)],
        "tpot": [(t[-1] - t[0]) / (len(t) - 1) for _, t in ok if len(t) > 1],
        "itl": np.concatenate([np.diff(times) for _, times in ok]),
        "queue": [(r.trace.scheduled - r.trace.arrival) / 1e9 for r in requests if r.trace.ok],
    }
    assert list(summary.metrics) == ["ttft", "tpot", "itl", "e2e", "queue"]
    for name, values in expected.items():
        metric = getattr(summary, name)
        assert metric == summary[name] == summary.metrics[name]
        assert metric.unit == "s"
        assert metric.count == len(values)
        assert metric.mean == pytest.approx(np.mean(values))
        assert metric.std == pytest.approx(np.std(values))
        assert metric.min == pytest.approx(np.min(values))
        assert metric.max == pytest.approx(np.max(values))
        assert metric.median == metric.p50
        for q in (50, 90, 95, 99):
            assert getattr(metric, f"p{q}") == pytest.approx(np.percentile(values, q))


def test_throughput_counts_what_succeeded_over_the_whole_wall_time():
    summary = summarize(
        [
            request(100, 200, arrival=0, prompt=5),
            request(100, 300, 400, arrival=500, prompt=7),
            request(50, arrival=900, finished=2000, ok=False, reason="error", prompt=100),
        ]
    )
    assert (summary.completed, summary.failed) == (2, 1)
    assert summary.duration == pytest.approx(2.0)
    assert (summary.total_output_tokens, summary.total_prompt_tokens) == (5, 12)
    assert summary.output_tokens_per_second == pytest.approx(2.5)
    assert summary.total_tokens_per_second == pytest.approx(8.5)
    assert summary.requests_per_second == pytest.approx(1.0)
    assert summary.goodput is None
    assert summary.slo is None


def test_failed_requests_do_not_touch_the_latency_metrics():
    good = [request(100, 120), request(110, 140)]
    bad = request(9000, 99000, ok=False, reason="cancelled")
    assert summarize([*good, bad]).metrics == summarize(good).metrics


def test_summary_of_failures_only_has_no_values_and_says_so():
    summary = summarize([request(ok=False, reason="error")], slo={"ttft": 1})
    assert (summary.ttft.count, summary.ttft.mean, summary.ttft.p99) == (0, None, None)
    assert summary.goodput == 0
    assert summary.completed == 0
    assert "-" in str(summary)
    assert json.loads(summary.to_json())["metrics"]["ttft"]["mean"] is None


def test_rates_over_no_time_are_undefined():
    instant = Latency(Trace(7, 7, (7,), 7, 1))
    summary = summarize(instant, slo={"ttft": 1})
    assert summary.requests_per_second is None
    assert summary.goodput is None


def test_goodput_meets_an_objective_at_equality_and_needs_every_one():
    requests = [request(100, 150), request(100, 151), request(101, 140)]
    limit = {"ttft": requests[0].ttft, "tpot": requests[0].tpot}
    summary = summarize(requests, slo=limit)
    assert summary.goodput * summary.duration == pytest.approx(1)
    only_first = summarize(requests, slo={"ttft": requests[0].ttft})
    assert only_first.goodput * only_first.duration == pytest.approx(2)
    all_of_them = summarize(requests, slo={"e2e": 0.2})
    assert all_of_them.goodput == pytest.approx(all_of_them.requests_per_second)


@pytest.mark.parametrize("seed", range(3))
def test_goodput_equals_the_published_formula_of_vllm(seed):
    requests = random_requests(seed)
    slo = {"ttft": 0.09, "tpot": 0.03, "e2e": 1.5}
    good = 0
    for start, times in (stream(one) for one in requests if one.trace.ok and one.trace.tokens):
        ttft, e2el = times[0] - start, times[-1] - start
        tpot = (e2el - ttft) / (len(times) - 1) if len(times) > 1 else 0.0
        good += ttft <= slo["ttft"] and tpot <= slo["tpot"] and e2el <= slo["e2e"]
    summary = summarize(requests, slo=slo)
    assert good > 0
    assert summary.goodput * summary.duration == pytest.approx(good)


# The same traces under the definitions of other tools


def test_tpot_of_vllm_is_itl_of_aiperf_and_of_guidellm():
    for latency in random_requests(7):
        if latency.output_tokens < 2 or not latency.trace.ok:
            continue
        start, times = stream(latency)
        vllm = (times[-1] - start - (times[0] - start)) / (len(times) - 1)
        assert summarize(latency).tpot.mean == pytest.approx(vllm)
        aiperf = summarize(latency, definitions="aiperf")["inter_token_latency"]
        guidellm = summarize(latency, definitions="guidellm")["inter_token_latency_ms"]
        assert aiperf.unit == guidellm.unit == "ms"
        assert aiperf.mean == pytest.approx(1e3 * vllm)
        assert guidellm.mean == pytest.approx(1e3 * vllm)


def test_tpot_of_vllm_is_itl_of_the_others_request_by_request():
    requests = random_requests(8)
    vllm = summarize(requests).requests()["tpot"]
    aiperf = summarize(requests, definitions="aiperf").requests()["inter_token_latency"]
    guidellm = summarize(requests, definitions="guidellm").requests()["inter_token_latency_ms"]
    np.testing.assert_allclose(aiperf, 1e3 * vllm, rtol=1e-12)
    np.testing.assert_allclose(guidellm, 1e3 * vllm, rtol=1e-12)


def test_itl_of_vllm_is_inter_chunk_latency_of_aiperf():
    requests = random_requests(9)
    itl = summarize(requests).itl
    icl = summarize(requests, definitions="aiperf")["inter_chunk_latency"]
    assert icl.count == itl.count
    for name in ("mean", "std", "min", "max", "p50", "p90", "p95", "p99"):
        assert getattr(icl, name) == pytest.approx(1e3 * getattr(itl, name))


def test_aiperf_reports_its_metrics_in_milliseconds_with_nine_percentiles():
    requests = random_requests(10)
    summary = summarize(requests, definitions="aiperf")
    ok = [stream(one) for one in requests if one.trace.ok and one.trace.tokens]
    expected = {
        "time_to_first_token": [1e3 * (t[0] - start) for start, t in ok],
        "time_to_second_token": [1e3 * (t[1] - t[0]) for _, t in ok if len(t) > 1],
        "request_latency": [1e3 * (t[-1] - start) for start, t in ok],
    }
    for name, values in expected.items():
        metric = summary[name]
        assert list(metric.percentiles) == [f"p{q}" for q in (1, 5, 10, 25, 50, 75, 90, 95, 99)]
        assert metric.p1 == pytest.approx(np.percentile(values, 1))
        assert metric.p75 == pytest.approx(np.percentile(values, 75))
        assert metric.std == pytest.approx(np.std(values))
    last = max(t[-1] for _, t in ok)
    assert summary.duration == pytest.approx(last - min(start for start, _ in ok))


def guidellm_reference(pairs):
    """GuideLLM's step CDF over (value, whole weight), by laying out every value weight times."""
    laid_out = np.sort(np.concatenate([np.repeat(value, weight) for value, weight in pairs]))

    def nearest_rank(per_mille):
        return laid_out[(per_mille * len(laid_out) + 999) // 1000 - 1]

    return laid_out, nearest_rank


def test_guidellm_weights_per_token_averages_by_tokens_and_takes_the_nearest_rank():
    requests = random_requests(11)
    summary = summarize(requests, definitions="guidellm")
    ok = [stream(one) for one in requests if one.trace.ok and one.trace.tokens]
    expected = {
        "time_per_output_token_ms": [(1e3 * (t[-1] - s) / len(t), len(t)) for s, t in ok],
        "inter_token_latency_ms": [
            (1e3 * (t[-1] - t[0]) / (len(t) - 1), len(t) - 1) for _, t in ok if len(t) > 1
        ],
        "time_to_first_token_ms": [(1e3 * (t[0] - s), 1) for s, t in ok],
    }
    ranks = dict(p001=1, p01=10, p05=50, p10=100, p25=250, p50=500)
    ranks |= dict(p75=750, p90=900, p95=950, p99=990, p999=999)
    for name, pairs in expected.items():
        values, nearest_rank = guidellm_reference(pairs)
        metric = summary[name]
        assert metric.count == len(values)
        assert metric.mean == pytest.approx(values.mean())
        assert metric.std == pytest.approx(values.std())
        assert list(metric.percentiles) == list(ranks)
        for percentile, per_mille in ranks.items():
            assert getattr(metric, percentile) == pytest.approx(nearest_rank(per_mille))


def test_guidellm_counts_the_first_token_in_time_per_output_token():
    latency = request(100, 120, 150, 160)
    guidellm = summarize(latency, definitions="guidellm")
    assert guidellm["time_per_output_token_ms"].mean == pytest.approx(160 / 4)
    assert guidellm["inter_token_latency_ms"].mean == pytest.approx(60 / 3)


def test_guidellm_request_latency_is_in_seconds_until_the_request_ended():
    metric = summarize(request(100, 200, finished=250), definitions="guidellm")["request_latency"]
    assert metric.unit == "s"
    assert metric.mean == pytest.approx(0.250)


def test_nearest_rank_answers_with_a_value_that_occurred_where_interpolation_does_not():
    requests = [request(10 * n) for n in range(1, 11)]  # TTFT of 10, 20, ... 100 ms
    vllm, guidellm = summarize(requests).ttft, summarize(requests, definitions="guidellm")
    assert vllm.p50 == pytest.approx(0.055)
    assert vllm.p90 == pytest.approx(0.091)
    ttft = guidellm["time_to_first_token_ms"]
    assert ttft.p50 == pytest.approx(50)
    assert ttft.p90 == pytest.approx(90)  # a cumulative sum of tenths would answer 100
    assert ttft.p95 == pytest.approx(100)


def test_request_with_one_token_is_judged_differently_by_each_tool_on_tpot():
    requests = [request(100, 120), request(100)]
    slo = {"tpot": 0.05}
    good = {}
    for name in DEFINITIONS:
        summary = summarize(requests, slo=slo, definitions=name)
        share = summary.good_request_fraction
        good[name] = (round(summary.goodput * summary.duration), share)
    assert good == {
        "vllm": (2, None),  # its TPOT counts as 0
        "aiperf": (1, 0.5),  # a value that is missing meets no objective
        "guidellm": (1, 1.0),  # undetermined: left out of the count
    }


def test_failed_requests_lower_the_share_of_good_ones():
    requests = [
        request(100, 120),
        request(900, 950),
        request(ok=False, reason="error"),
        request(100, ok=False, reason="cancelled"),
    ]
    slo = {"ttft": 0.5}
    aiperf = summarize(requests, slo=slo, definitions="aiperf")
    guidellm = summarize(requests, slo=slo, definitions="guidellm")
    assert aiperf.good_request_fraction == 1 / 4
    assert guidellm.good_request_fraction == 1 / 3  # what was cancelled is nobody's failure
    assert summarize(requests, slo=slo).good_request_fraction is None


def test_guidellm_goodput_is_undefined_where_no_request_can_be_judged():
    summary = summarize([request(5), request(7)], slo={"tpot": 1}, definitions="guidellm")
    assert summary.goodput is None
    assert summary.good_request_fraction is None


# What goes in, and what comes out


def test_summarize_takes_generations_latencies_or_a_single_one():
    latency = request(100, 120)
    generation = SimpleNamespace(latency=latency)
    alone = summarize(latency)
    assert summarize(generation) == summarize([generation]) == summarize(iter([latency])) == alone
    assert alone.latencies == (latency,)


@pytest.mark.parametrize("gens", [[], (), iter([])])
def test_nothing_to_summarize_is_an_error_that_says_what_to_pass(gens):
    with pytest.raises(OptionError, match=r"no request.*model\.generate"):
        summarize(gens)


@pytest.mark.parametrize("gens", [3, None, "a prompt", {"a": 1}, [request(1), "text"]])
def test_things_without_latency_are_refused(gens):
    with pytest.raises(OptionError, match="has no latency"):
        summarize(gens)


def test_unknown_definitions_are_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=r"'llmeter'.*'vllm', 'aiperf', 'guidellm'"):
        summarize(request(1), definitions="llmeter")


@pytest.mark.parametrize(
    ("slo", "match"),
    [
        ({"itl": 0.1}, r"'itl'.*'ttft', 'tpot', 'e2e'"),
        ({"ttft": -1}, r"\['ttft'\]=-1"),
        ({"ttft": math.nan}, "nan"),
        ({"e2e": "fast"}, "'fast'"),
        ({"tpot": True}, "True"),
        ({"tpot": None}, "None"),
        (0.5, "no dict"),
    ],
)
def test_impossible_objectives_are_refused(slo, match):
    with pytest.raises(OptionError, match=match):
        summarize(request(1), slo=slo)


def test_no_objectives_is_no_goodput():
    assert summarize(request(1), slo={}).goodput is None


def test_unknown_metric_is_refused_with_the_metrics_of_those_definitions():
    summary = summarize(request(1), definitions="aiperf")
    with pytest.raises(OptionError, match=r"'ttft'.*'time_to_first_token'"):
        summary["ttft"]
    with pytest.raises(AttributeError, match="'time_to_first_token'"):
        summary.ttft  # noqa: B018
    with pytest.raises(AttributeError, match="'p50'"):
        summary.request_latency.p42  # noqa: B018
    assert not hasattr(summary, "_repr_svg_")


def test_completion_offers_metrics_and_percentiles():
    summary = summarize(request(1, 2))
    assert {"ttft", "itl", "goodput", "plot"} <= set(dir(summary))
    assert {"mean", "p50", "p99"} <= set(dir(summary.ttft))


@pytest.mark.parametrize("definitions", DEFINITIONS)
def test_summary_copies_and_pickles(definitions):
    summary = summarize(random_requests(2)[:4], slo={"ttft": 1})
    assert copy.deepcopy(summary) == summary
    assert pickle.loads(pickle.dumps(summary)) == summary


@pytest.mark.parametrize("definitions", DEFINITIONS)
def test_every_form_of_a_summary_names_its_definitions(definitions):
    summary = summarize(random_requests(3), slo={"ttft": 0.5}, definitions=definitions)
    spec = DEFINITIONS[definitions]
    data = json.loads(summary.to_json())
    assert data["definitions"] == definitions
    assert data["source"] == spec.source
    assert set(data["metrics"]) == set(summary.metrics)
    assert data["output_tokens_per_second"] == summary.output_tokens_per_second
    assert str(summary).startswith(f"{spec.title} definitions")
    page = summary._repr_html_()
    assert f"{spec.title} definitions" in page
    assert spec.source.split(" (")[0] in page
    assert ("nearest rank" in page) == (definitions == "guidellm")


def test_frame_is_in_milliseconds_where_its_unit_says_so():
    requests = random_requests(4)
    frame = summarize(requests).to_frame()
    assert set(frame["unit"]) == {"ms"}
    assert frame.loc["ttft", "p90"] == pytest.approx(1e3 * summarize(requests).ttft.p90)
    assert frame["mean"].dtype == float
    guidellm = summarize(requests, definitions="guidellm")
    frame = guidellm.to_frame()
    assert frame.loc["request_latency", "unit"] == "s"
    assert frame.loc["request_latency", "mean"] == pytest.approx(guidellm["request_latency"].mean)
    assert frame.loc["time_to_first_token_ms", "unit"] == "ms"


def test_requests_frame_shows_failed_requests_too():
    frame = summarize([request(10, 30, arrival=5), request(ok=False, reason="error")]).requests()
    assert frame["ok"].tolist() == [True, False]
    assert frame["arrival"].tolist() == pytest.approx([0.005, 0.0])
    assert frame["ttft"][0] == pytest.approx(0.010)
    assert math.isnan(frame["ttft"][1])
    assert frame["itl_mean"][0] == pytest.approx(0.020)
    assert frame.attrs["units"]["ttft"] == "s"


def test_module_loads_no_heavy_library():
    heavy = "torch", "transformers", "pandas", "plotly", "numpy"
    code = f"import sys, inferkit.latency, inferkit.plots; print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
