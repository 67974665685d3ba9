"""Playback: a recording in the live plot, moment for moment, with nothing that runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab import DARK, LIGHT, NOTE_WHAT_IS_PAINTED, Lab, Tab, open_notebook
from measured import MS, experiment, request, small
from playwright.sync_api import Browser

import inferkit as ik
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import ModeEntry
from inferkit.notebook.feed import COLUMNS

RECORDED = Path(__file__).resolve().parent.parent / "notebooks" / "experiments"
MANY = experiment(
    request(0, 20 * MS, 40 * MS, 60 * MS, text="one two three"),
    request(10 * MS, 15 * MS, 45 * MS, text="x", reason="stop"),
)


@pytest.fixture
def played() -> Iterator[list[Any]]:
    """What a test plays, closed at its end."""
    made: list[Any] = []
    yield made
    for playback in made:
        playback.close()


def shown(played: list[Any], recorded: Experiment, pause: float = 1.0) -> Any:
    """Play it to its end, as a cell does that ends with it."""
    playback = ik.play(recorded, pause=pause)
    played.append(playback)
    playback._ipython_display_()
    assert playback.wait(20)
    playback._update_still()
    return playback


def test_tokens_come_at_the_recorded_moments(played: list[Any]) -> None:
    playback = shown(played, MANY)
    now, then = playback.generations, MANY.generations
    assert [gen.text for gen in now] == ["one two three", "x"]
    assert [gen.finish_reason for gen in now] == ["length", "stop"]
    for a, b in zip(now, then):
        assert a.latency.ttft == pytest.approx(b.latency.ttft)
        assert a.latency.itl == pytest.approx(b.latency.itl)
        assert a.latency.e2e == pytest.approx(b.latency.e2e)
    assert now[1].latency.trace.arrival - now[0].latency.trace.arrival == 10 * MS


def test_it_takes_as_long_as_it_took(played: list[Any]) -> None:
    began = time.perf_counter()
    shown(played, experiment(request(0, 300 * MS, 600 * MS)))
    assert time.perf_counter() - began >= 0.6


def test_the_live_plot_has_what_it_would_have_of_an_engine(played: list[Any]) -> None:
    tables = shown(played, MANY)._feed.snapshot().tables
    assert sorted(tables["tokens"][:, 1]) == pytest.approx([20, 20, 30])  # ITL, ms
    assert sorted(tables["firsts"][:, 1]) == pytest.approx([15, 20])  # TTFT, ms
    prefill, decode = COLUMNS["steps"].index("prefill"), COLUMNS["steps"].index("decode")
    assert tables["steps"][:, prefill].sum() == 14
    assert tables["steps"][:, decode].sum() == 3


def test_long_waits_are_cut_and_it_says_so(
    played: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    apart = experiment(request(0, 10 * MS), request(60_000 * MS, 10 * MS))
    began = time.perf_counter()
    shown(played, apart, pause=0.05)
    assert time.perf_counter() - began < 10
    assert "59.9 s in which nothing happened are left out." in capsys.readouterr().out
    shown(played, experiment(request(0, 10 * MS)))
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("after", [60_000 * MS, 10**18])
def test_a_wait_for_a_change_of_mode_is_cut(played: list[Any], after: int) -> None:
    changed = experiment(request(0, 10 * MS))
    changed.file.modes.append(msgspec.structs.replace(changed.file.modes[0], time=after))
    began = time.perf_counter()
    shown(played, changed, pause=0.05)
    assert time.perf_counter() - began < 10


def test_a_pause_without_a_limit_cuts_nothing(played: list[Any]) -> None:
    shown(played, experiment(request(0, 10 * MS), request(200 * MS, 10 * MS)), pause=float("inf"))


def test_what_goes_wrong_on_the_way_is_told(
    played: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    playback = ik.play(MANY)
    played.append(playback)
    told: list[BaseException] = []
    monkeypatch.setattr(playback._stage, "_failed", told.append)
    monkeypatch.setattr(playback._stage, "_step", lambda *_: 1 / 0)
    playback._ipython_display_()
    with pytest.raises(ik.ExperimentError, match="'tiny run' cannot be played: ZeroDivisionError"):
        playback.wait(20)
    assert [type(error) for error in told] == [ZeroDivisionError]
    monkeypatch.undo()
    playback._ipython_display_()
    assert playback.wait(20)


def test_requests_that_failed_or_were_cancelled_end_as_they_did(played: list[Any]) -> None:
    recorded = small()
    recorded.file.requests[-1].finished = None
    playback = shown(played, recorded)
    *gens, cut = playback.generations
    assert "had not ended when the recording was cut off" in str(cut.error)
    ended = {str(gen.finish_reason): gen for gen in gens}
    assert {"length", "stop", "cancelled", "error"} <= set(ended)
    assert "no room" in str(ended["error"].error)
    assert ended["cancelled"].latency.output_tokens == 1


def test_a_change_of_mode_is_marked_where_it_was(played: list[Any]) -> None:
    changed = experiment(request(0, 20 * MS, 40 * MS), request(50 * MS, 40 * MS, 70 * MS))
    mode = changed.file.modes[0]
    fields = {name: getattr(mode, name) for name in mode.__struct_fields__}
    changed.file.modes.append(ModeEntry(**fields | {"time": 45 * MS, "format": "nf4"}))
    changed.file.requests[1].mode = 1
    playback = shown(played, changed)
    assert any("nf4" in label for _, label in playback._feed.marks)


def test_of_several_models_the_one_is_shown_that_a_request_came_to(played: list[Any]) -> None:
    apart = [request(at * MS, 20 * MS, 60 * MS) for at in (0, 200, 400)]
    both = experiment(*apart)
    (mode,), (entry,) = both.file.modes, both.file.models
    replace = msgspec.structs.replace
    both.file.models.append(replace(entry, name="other"))
    both.file.modes += [
        replace(mode, model=1, format="nf4"),
        replace(mode, time=450 * MS, model=1, format="fp4"),  # while the first one runs
    ]
    apart[1].model = apart[1].mode = 1
    playback = ik.play(both)
    played.append(playback)
    stage, names = playback._stage, []
    stage.on_submit.append(lambda _: names.append((stage.name, stage.plan.format)))
    for _ in range(2):
        playback._ipython_display_()
        assert playback.wait(20)
    assert names == [("tiny", "none"), ("other", "nf4"), ("tiny", "none")] * 2
    assert stage.name == "tiny"
    playback._update_still()
    assert {"other, nf4", "tiny, none"} <= {label for _, label in playback._feed.marks}


def test_stop_ends_it_and_keeps_what_was_played(played: list[Any]) -> None:
    playback = ik.play(experiment(request(0, 10 * MS, 60_000 * MS)))
    played.append(playback)
    playback._ipython_display_()
    deadline = time.monotonic() + 10
    while not any(r.generated for r in playback._stage.requests):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    playback.stop()
    assert playback.wait(5)
    [gen] = playback.generations
    assert (gen.finish_reason, gen.latency.output_tokens) == ("cancelled", 1)


def test_it_can_be_shown_again(played: list[Any]) -> None:
    playback = shown(played, MANY)
    playback._ipython_display_()
    assert playback.wait(20)
    assert [gen.text for gen in playback.generations] == ["one two three", "x"]


def test_it_says_what_it_is(played: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown(played, MANY)
    told = capsys.readouterr().out
    assert "Playback of 'tiny run'" in told
    assert "recorded 2026-11-24" in told
    assert "chunk" not in told
    shown(played, experiment(request(0, 20 * MS, 20 * MS, 40 * MS, chunks=[20 * MS, 40 * MS])))
    assert "one chunk are shown at once" in capsys.readouterr().out


def test_whatever_is_shown_of_a_recording_says_so(played: list[Any]) -> None:
    said = "recorded 2026-11-24"
    playback = shown(played, MANY)
    for gens in (MANY.generations, playback.generations):
        for one in (gens, gens[0]):
            assert said in repr(one)
            assert said in one._repr_html_()
        summaries = (gens.summary(), ik.summarize(gens), ik.summarize(gens[0]))
        for figure in (gens[0].plot(), *(summary.plot() for summary in summaries)):
            assert said in figure.layout.title.text
        assert all(said in repr(summary) for summary in summaries)
    assert said in playback.plot().layout.title.text


def test_what_is_measured_here_beside_a_recording_is_told_from_it() -> None:
    one = MANY.generations[0]
    here = dataclasses.replace(one, latency=dataclasses.replace(one.latency, origin=""))
    assert ik.summarize([here]).origin == ""
    both = ik.summarize([here, *MANY.generations]).origin
    assert both.startswith("measured here and now and recorded 2026-11-24")


def test_what_cannot_be_played_says_why(tmp_path: Path) -> None:
    with pytest.raises(ik.OptionError, match="no requests to play"):
        ik.play(experiment())
    with pytest.raises(ik.ExperimentError, match="not there"):
        ik.play(tmp_path / "not there.json")
    with pytest.raises(ik.OptionError, match="pause"):
        ik.play(MANY, pause=-1)


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(browser: Browser, lab: Lab) -> Iterator[Tab]:
    """The recording of the demo model on a GPU, played in JupyterLab, where no model is."""
    source = (RECORDED / "demo-h200.inferkit.json").read_bytes()
    (lab.folder / "h200.inferkit.json").write_bytes(source)
    cells = ("import inferkit as ik\nplay = ik.play('h200.inferkit.json', pause=0.2)\nplay",)
    name = lab.write("play.ipynb", *cells, "print(play.wait())")
    tab = open_notebook(browser, lab, name, script=NOTE_WHAT_IS_PAINTED)
    tab.page.set_viewport_size({"width": 1100, "height": 1000})
    tab.run(0)
    yield tab
    tab.close()


@pytest.mark.browser
@pytest.mark.demo
class TestInJupyterLab:
    def test_the_plot_moves_and_ends(self, tab: Tab) -> None:
        canvas = tab.page.locator(".ik-plot canvas").first
        canvas.wait_for()
        seen = set()
        tab.run(1)
        while "True" not in tab.output(1):
            seen.add(canvas.evaluate("canvas => canvas.painted?.dots ?? 0"))
            time.sleep(0.05)
        assert len(seen) > 5
        assert "Playback of 'demo-h200'" in tab.output(0)
        assert "H200" in tab.output(0)
        assert tab.errors == []

    @pytest.mark.parametrize("theme", [LIGHT, DARK])
    def test_it_reads_on_both_themes(self, tab: Tab, theme: str) -> None:
        tab.change_theme(theme)
        assert tab.least_contrast(".inferkit") >= (4.5, "")

    def test_it_fits_a_narrow_window(self, tab: Tab) -> None:
        tab.page.set_viewport_size({"width": 600, "height": 1000})
        tab.wait_until_nothing_hangs_over(".inferkit, .ik-plot canvas")
