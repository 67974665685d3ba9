"""The HTML page of an experiment: what it says, that it is safe, and that it needs no network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from msgspec import structs
from test_difference import experiment, noisy, request

from inferkit.errors import ExperimentError, OptionError
from inferkit.experiments import report
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import ModeEntry

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & </script>"
NF4 = {"quantize": "nf4", "format": "nf4", "batching": "continuous", "context": 2048}


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: list[Any] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        kind = dict(attrs).get("type") or ""
        self._inside = f"{tag} {kind}".strip() if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script application/json":
            self.data.append(json.loads(data))
        elif not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def evil() -> Experiment:
    """An experiment in which everything that can be text is hostile."""
    requests = noisy(8, seed=1)
    for one in requests:
        one.prompt = one.text = EVIL
    requests[3].finish_reason, requests[3].error = "error", ["GenerationError", EVIL]
    made = experiment(
        requests,
        name=EVIL,
        model={"name": EVIL, "ref": EVIL, "files": {EVIL: "ab" * 32}, "revision": EVIL},
        environment={"cpu": EVIL, "system": EVIL, "notebook": EVIL, "packages": {EVIL: EVIL}},
        source=EVIL,
        notes=[EVIL],
    )
    made.file.modes.append(ModeEntry(time=10**8, model=0, max_batch=4, step=EVIL, **NF4))
    requests[7].mode = 1
    return made


def redacted() -> Experiment:
    left_out = {"prompt": None, "prompt_token_ids": [], "token_ids": [], "text": ""}
    return experiment([request(i, **left_out) for i in range(6)], redacted=True)


def test_the_page_says_what_was_recorded(tmp_path: Path) -> None:
    made = experiment(noisy(8, seed=1), name="limericks", notes=["A warm processor."])
    made.file.requests[2].finish_reason = None
    made.file.modes.append(ModeEntry(time=10**8, model=0, max_batch=8, step="eager", **NF4))
    path = report.to_html(made, str(tmp_path / "page.html"))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for said in ("limericks", made.origin, "A warm processor.", "EPYC 9354", "torch 2.9.1"):
        assert said in page.text
    for said in ("prompt 3", "some text", "TTFT p50", "Modes over time", "eager", "not ended"):
        assert said in page.text
    assert ("code", {"title": "aa" * 32}) in page.found
    assert "aa" * 32 not in page.text
    assert [path] == list(tmp_path.iterdir())


def test_every_figure_and_table_of_latency_names_its_origin() -> None:
    made, other = experiment(noisy(8, seed=1)), experiment(noisy(8, seed=2), source="vllm")
    text = report.page(made, other)
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == 4
    assert all(made.origin in caption for caption in captions)
    difference = text.partition('<section id="difference">')[2].partition("</section>")[0]
    tables, figures = difference.count("<table"), difference.count("Distributions")
    assert difference.count(other.origin) >= tables + figures + 1


def test_what_people_wrote_is_text() -> None:
    made = evil()
    text = report.page(made, made)
    page = Page(text)
    assert {tag for tag, _ in page.found} & {"img", "iframe", "object", "link"} == set()
    # plotly's script and the one that draws; the others are data.
    scripts = [attrs for tag, attrs in page.found if tag == "script"]
    assert [attrs for attrs in scripts if attrs.get("type") != "application/json"] == [{}, {}]
    assert len(page.data) == 7
    assert not [name for _, attrs in page.found for name in attrs if name.startswith("on")]
    assert page.text.count("<script>alert('x')</script>") > 20
    for figure in page.data:  # plotly takes some tags for markup, such as links
        assert "<script" not in json.dumps(figure)
        assert "<img" not in json.dumps(figure)


def test_the_page_asks_for_nothing() -> None:
    page = Page(report.page(evil(), evil()))
    asking = ("src", "href", "srcset", "action", "poster", "data", "background")
    found = [(tag, attrs) for tag, attrs in page.found if attrs.keys() & set(asking)]
    assert found == []
    [policy] = [a["content"] for _, a in page.found if "http-equiv" in a]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_what_was_left_out_is_called_so() -> None:
    page = Page(report.page(redacted()))
    assert "prompts and outputs left out" in page.text
    assert "3 tokens, left out" in page.text
    assert "10 tokens, left out" in page.text
    assert "given as token ids" in Page(report.page(experiment([request(0, prompt=None)]))).text


def test_an_experiment_without_a_request_that_ended_still_has_a_page() -> None:
    for made in (experiment([]), experiment([request(0, finish_reason=None, tokens=[])])):
        assert "No request ended" in Page(report.page(made)).text


def test_an_experiment_whose_requests_all_failed_still_has_a_page() -> None:
    failed = request(0, finish_reason="error", tokens=[], token_ids=[], scheduled=None)
    failed.error, failed.finished = ["OutOfMemoryError", "no room"], failed.arrival
    assert "OutOfMemoryError: no room" in Page(report.page(experiment([failed]))).text


def test_gaps_are_thinned_but_for_the_longest_and_mode_changes_are_marked() -> None:
    requests = noisy(30, seed=1, tokens=1001)
    one = requests[11]
    stall = 900_000_000
    one.tokens = [t + stall * (i >= 500) for i, t in enumerate(one.tokens)]
    one.finished = one.tokens[-1]
    made = experiment(requests)
    made.file.modes.append(ModeEntry(time=5 * 10**9, model=0, max_batch=8, step="eager", **NF4))
    figure = report.itl_over_time(made)
    [dots] = figure.data
    assert dots.type == "scattergl"
    assert 15_000 < len(dots.x) <= 20_000
    assert max(dots.y) > 900
    assert f"thinned to {len(dots.x):,} of 30,000 gaps" in figure.layout.title.text
    lines = [(shape.x0, note.text) for shape, note in zip(figure.layout.shapes, _notes(figure))]
    assert lines == [(0, "#0 none"), (5, "#1 nf4, max_batch 8, eager")]


def test_a_change_of_speculation_is_told() -> None:
    made = experiment(noisy(8, seed=1))
    [first] = made.file.modes
    for at, guessed in ((1, "ngram"), (2, "off")):
        changed = {"time": at * 10**8, "speculative": guessed}
        made.file.modes.append(structs.replace(first, **changed))
    marks = [note.text for note in _notes(report.itl_over_time(made))]
    assert marks == ["#0 none", "#1 speculation ngram", "#2 speculation off"]
    assert "speculation" in Page(report.page(made)).text
    assert "ngram" in Page(report.page(made)).text


def _notes(figure: Any) -> list[Any]:
    return [note for note in figure.layout.annotations if note.text.startswith("#")]


def test_a_line_per_model_where_there_are_several() -> None:
    made = experiment(noisy(4, seed=1))
    made.file.models.append(made.file.models[0])
    made.file.requests[3].model = 1
    assert [len(dots.x) for dots in report.itl_over_time(made).data] == [27, 9]


def test_a_table_of_very_many_requests_is_cut_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "_REQUESTS", 5)
    page = Page(report.page(experiment(noisy(8, seed=1))))
    assert "And 3 more, which .to_frame() has." in page.text
    assert "prompt 4" in page.text
    assert "prompt 5" not in page.text


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    made, path = experiment(noisy(6, seed=1)), tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        report.to_html(made, path)
    with pytest.raises(OptionError, match="is no experiment"):
        report.to_html(made, path, overwrite=True, other="other.json")  # type: ignore[arg-type]
    assert path.read_text() == "mine"
    report.to_html(made, path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(OptionError, match="There is no folder"):
        report.to_html(made, tmp_path / "missing" / "page.html")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "page.html"
    path.write_text("mine")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ExperimentError, match="No space left on device"):
        report.to_html(experiment(noisy(6, seed=1)), path, overwrite=True)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page_without_asking_anybody(
    browser: Browser, tmp_path: Path, scheme: Any
) -> None:
    made = evil()
    path = report.to_html(made, tmp_path / "page.html", other=experiment(noisy(8, seed=2)))
    page = browser.new_page(viewport={"width": 600, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    schemes: set[str] = set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda sent: schemes.add(urlsplit(sent.url).scheme))
    page.goto(path.as_uri())
    drawn = (
        "[...document.querySelectorAll('.plot')].every(e => e.querySelector('.main-svg .xtick'))"
    )
    page.wait_for_function(drawn)
    assert page.locator(".plot").count() == 7
    for summary in page.locator(".requests summary").all()[:4]:
        summary.click()
    assert page.locator(".requests pre").first.inner_text() == EVIL
    assert page.evaluate("document.documentElement.scrollWidth") <= 600
    beyond = page.evaluate(_OVERHANG)
    assert beyond == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(255, 255, 255)",
        "dark": "rgb(20, 23, 26)",
    }.get(scheme)
    page.close()
    assert errors == []
    assert "file" in schemes
    assert schemes <= {"file", "data", "blob"}


# What reaches beyond the page, but in tables that scroll by themselves.
_OVERHANG = """() => [...document.querySelectorAll('main *')]
  .filter(e => !e.closest('table') && !e.closest('svg svg') && e.checkVisibility())
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 200))"""
