import json

import numpy as np
import pytest

from inferkit import plots
from inferkit.latency import summarize
from inferkit.trace import Latency, Trace

MS = 1_000_000


def request(arrival, *tokens, ok=True):
    """A request that arrived at ``arrival`` ms and emitted ``tokens`` ms later."""
    times = tuple((arrival + token) * MS for token in tokens)
    end = times[-1] if times else arrival * MS
    return Latency(Trace(arrival * MS, arrival * MS, times, end, prompt_tokens=4, ok=ok))


def long_request(count, seed=0, stall_at=None):
    gaps = np.random.default_rng(seed).integers(20 * MS, 30 * MS, count)
    if stall_at is not None:
        gaps[stall_at] = 900 * MS
    tokens = np.cumsum(gaps)
    return Latency(Trace(0, 0, tuple(map(int, tokens)), int(tokens[-1]), prompt_tokens=4))


def title(figure):
    return figure.layout.title.text


def trace_named(figure, name):
    [found] = [trace for trace in figure.data if trace.name == name]
    return found


def axis_titles(figure):
    found = figure.to_plotly_json()["layout"]
    return {
        axis["title"]["text"]
        for name, axis in found.items()
        if name[1:5] == "axis" and "title" in axis
    }


REQUESTS = [request(0, 100, 130, 150), request(50, 90, 140), request(70, 60, 500, ok=False)]


def test_tokens_over_time_has_a_line_per_request_from_its_arrival():
    figure = plots.tokens_over_time(REQUESTS)
    line = trace_named(figure, "request 1")
    assert list(line.x) == pytest.approx([0.050, 0.140, 0.190])
    assert list(line.y) == [0, 1, 2]
    firsts = trace_named(figure, "first token (TTFT)")
    assert list(firsts.x) == pytest.approx([0.100, 0.140, 0.130])
    assert [ttft for _, ttft in firsts.customdata] == pytest.approx([100, 90, 60])
    assert "vLLM definitions" in title(figure)
    assert axis_titles(figure) == {"time since first arrival (s)", "output tokens"}


def test_requests_without_a_token_are_left_out_of_tokens_over_time():
    figure = plots.tokens_over_time([request(0), request(10, 20)])
    assert [trace.name for trace in figure.data] == ["request 1", "first token (TTFT)"]
    assert list(figure.data[0].x) == pytest.approx([0.010, 0.030])


def test_itl_distribution_pools_the_gaps_of_requests_that_succeeded():
    figure = plots.itl_distribution(REQUESTS)
    bars = trace_named(figure, "ITL (ms)")
    assert sum(bars.y) == 3
    assert "3 gaps" in title(figure)
    assert "vLLM definitions" in title(figure)
    curve = trace_named(figure, "share no longer than")
    assert list(curve.x) == pytest.approx([20, 30, 50])
    assert list(curve.y) == pytest.approx([100 / 3, 200 / 3, 100])
    lines = sorted(shape.x0 for shape in figure.layout.shapes)
    assert lines == pytest.approx(np.percentile([20, 30, 50], [50, 90, 99]))


def test_gaps_that_are_all_alike_still_make_a_histogram():
    figure = plots.itl_distribution([request(0, 10, 20, 30, 40)])
    assert sum(trace_named(figure, "ITL (ms)").y) == 3


def test_percentiles_shows_each_metric_of_the_summary_in_milliseconds():
    summary = summarize(REQUESTS)
    figure = plots.percentiles(summary)
    for quantile in ("p50", "p90", "p95", "p99"):
        dots = trace_named(figure, quantile)
        shown = dict(zip(dots.y, dots.x))
        assert list(shown) == ["TTFT", "TPOT", "ITL", "E2E"]
        for name, value in shown.items():
            assert value == pytest.approx(1e3 * getattr(summary[name.lower()], quantile))
    assert "vLLM definitions" in title(figure)
    assert "ms (log scale)" in axis_titles(figure)


def test_percentiles_of_guidellm_brings_seconds_to_the_common_axis():
    summary = summarize(REQUESTS, definitions="guidellm")
    dots = trace_named(plots.percentiles(summary), "p99")
    shown = dict(zip(dots.y, dots.x))
    assert shown["request_latency"] == pytest.approx(150)
    assert shown["time_to_first_token_ms"] == pytest.approx(100)


def test_all_percentile_dots_lie_inside_the_axis():
    for scale in (1, 37, 1000):
        requests = [request(0, *(scale * t for t in (3, 5, 6, 900)))]
        figure = plots.percentiles(summarize(requests))
        low, high = figure.layout.xaxis.range
        for quantile in ("p50", "p99"):
            dots = np.log10(trace_named(figure, quantile).x)
            assert (dots > low).all()
            assert (dots < high).all()


def test_request_figure_shows_queue_prefill_ttft_tpot_and_each_gap():
    latency = Latency(Trace(0, 30 * MS, (100 * MS, 130 * MS, 150 * MS), 150 * MS, 4))
    figure = latency.plot()
    names = {trace.name for trace in figure.data}
    assert {"queue 30.0 ms", "prefill 70.0 ms", "first token: TTFT 100.0 ms"} <= names
    assert list(trace_named(figure, "TPOT 25.0 ms").y) == pytest.approx([25, 25])
    [gaps] = [t for t in figure.data if t.xaxis == "x2" and t.name is None]
    assert list(zip(gaps.x, gaps.y)) == [(2, pytest.approx(30)), (3, pytest.approx(20))]
    assert "vLLM definitions" in title(figure)
    assert {"time since arrival (ms)", "ITL (ms)"} <= axis_titles(figure)


@pytest.mark.parametrize("tokens", [(), (50,)])
def test_request_with_too_few_tokens_says_why_a_panel_is_empty(tokens):
    texts = [note.text for note in request(0, *tokens).plot().layout.annotations]
    assert "no gap: fewer than two tokens" in texts
    assert ("no token was generated" in texts) == (not tokens)


@pytest.mark.parametrize(
    ("definitions", "named", "gap"),
    [
        ("vllm", "vLLM", "ITL"),
        ("aiperf", "AIPerf", "inter_chunk_latency"),
        ("guidellm", "GuideLLM", "inter_token_latency_ms"),
    ],
)
def test_summary_figure_names_its_definitions_and_that_tools_metric(definitions, named, gap):
    figure = summarize(REQUESTS, definitions=definitions).plot()
    assert f"{named} definitions" in title(figure)
    assert f"{gap} (ms)" in axis_titles(figure)
    assert f"{gap} distribution" in [note.text for note in figure.layout.annotations]
    assert "1 failed" in title(figure)
    bars = trace_named(figure, f"{gap} (ms)")
    assert sum(bars.y) == 3  # as many gaps, or as much token weight


def test_summary_figure_of_failures_only_says_that_it_has_nothing():
    figure = summarize(request(0, ok=False)).plot()
    texts = [note.text for note in figure.layout.annotations]
    assert "no request has a latency" in texts
    assert "no gap: no request has two tokens" in texts


def test_long_request_is_thinned_and_the_figure_says_so():
    latency = long_request(20_000)
    for figure in (latency.plot(), plots.tokens_over_time([latency]), summarize(latency).plot()):
        assert "thinned to 5,000" in title(figure)
        points = [len(trace.x) for trace in figure.data]
        assert max(points) <= 5_001  # and the point of its arrival
        assert len(figure.to_json()) < 500_000
    line = trace_named(plots.tokens_over_time([latency]), "request 0")
    assert line.y[-1] == 20_000


def test_short_request_is_not_thinned():
    assert "thinned" not in title(long_request(5_000).plot())


@pytest.mark.parametrize("stall_at", [1, 7_777, 19_999])
def test_thinning_never_hides_a_stall(stall_at):
    figure = long_request(20_000, stall_at=stall_at).plot()
    assert max(max(trace.y) for trace in figure.data if trace.xaxis == "x2") == pytest.approx(900)


def test_many_requests_share_the_points_of_a_figure():
    figure = plots.tokens_over_time([long_request(1_000, seed) for seed in range(100)])
    assert sum(len(trace.x) for trace in figure.data) < 21_000
    assert "thinned to 200" in title(figure)


def test_backgrounds_are_transparent_for_light_and_dark_themes():
    summary = summarize(REQUESTS)
    figures = [
        plots.tokens_over_time(REQUESTS),
        plots.itl_distribution(REQUESTS),
        plots.percentiles(summary),
        plots.request_figure(REQUESTS[0]),
        plots.summary_figure(summary),
    ]
    for figure in figures:
        layout = json.loads(figure.to_json())["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
