"""The quickstart in a real JupyterLab and a real browser, started as `make lab` starts it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from lab import DARK, LIGHT, Lab, Tab, open_notebook
from playwright.sync_api import Browser

pytestmark = [pytest.mark.browser, pytest.mark.demo, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "01-quickstart.ipynb"
RUN_LIMIT = 240  # seconds

INTERRUPTED = (
    "import inferkit as ik\nmodel = ik.load('demo', context=2048, max_batch=2)",
    "print('running', flush=True)\n"
    "gen = model.generate('Once upon a time', max_tokens=2000, ignore_eos=True)",
    "print(gen.finish_reason, len(gen.token_ids) > 0, gen.text == model.last.text)",
    "for piece in model.stream('One, two, three,', max_tokens=2000, ignore_eos=True):\n"
    "    print(piece, end='', flush=True)",
    "print(model.last.finish_reason, len(model.last.text) > 0, model.running)",
    "print(model.generate('The capital of France is', max_tokens=3).finish_reason)\nmodel.unload()",
)


@pytest.fixture(scope="module")
def quickstart(browser: Browser, lab: Lab) -> Iterator[Tab]:
    """The quickstart, all cells run in JupyterLab, in a window that shows them all."""
    # With fewer tokens than for a person.
    name = lab.copy(QUICKSTART, {"max_tokens=48": "max_tokens=12"})
    tab = open_notebook(browser, lab, name)
    tab.page.set_viewport_size({"width": 1200, "height": 8000})
    tab.start("notebook:run-all-cells")
    notebook = nbformat.read(lab.folder / name, as_version=4)
    last = sum(cell.cell_type == "code" for cell in notebook.cells) - 1
    # JupyterLab puts a notebook's cells on the page one after the other.
    tab.cell(last).wait_for()
    tab.wait_for_output(last, r"E2E +ms", RUN_LIMIT)
    yield tab
    tab.close()


# -- what a person sees ---------------------------------------------------------------------------


def cell_of(tab: Tab, source: str) -> int:
    """The number of the code cell that has this in its source."""
    sources = tab.page.locator(".jp-CodeCell .jp-InputArea-editor").all_inner_texts()
    return next(i for i, text in enumerate(sources) if source in text)


def test_running_all_cells_ends_without_an_error(quickstart: Tab) -> None:
    assert quickstart.page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count() == 0
    assert quickstart.page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0
    assert quickstart.errors == []


def test_streamed_text_is_shown(quickstart: Tab) -> None:
    assert "Paris" in quickstart.output(cell_of(quickstart, "model.stream"))


def test_latency_is_shown_as_a_table(quickstart: Tab) -> None:
    table = quickstart.cell(cell_of(quickstart, "ik.summarize(gens, slo=")).locator("table").first
    rows = table.locator("tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["TTFT", "TPOT", "ITL", "E2E", "queue"]


@pytest.mark.parametrize("source", ["summary.plot()", "gens[3].plot()"])
def test_figures_are_drawn_by_plotly(quickstart: Tab, source: str) -> None:
    plot = quickstart.cell(cell_of(quickstart, source)).locator(".js-plotly-plot")
    plot.locator(".scatterlayer path.js-line").first.wait_for(state="attached")
    box = plot.bounding_box()
    assert box is not None
    assert box["width"] > 400
    assert box["height"] > 300


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_tables_and_figures_read_on_both_themes(quickstart: Tab, theme: str) -> None:
    quickstart.change_theme(theme)
    assert quickstart.least_contrast(".inferkit th, .inferkit td") >= (4.5, "")
    assert quickstart.least_contrast(".js-plotly-plot .xtick text") >= (4, "")


def test_nothing_hangs_over_the_edge_of_a_narrow_window(quickstart: Tab) -> None:
    quickstart.page.set_viewport_size({"width": 600, "height": 8000})
    quickstart.wait_until_nothing_hangs_over(".inferkit, .js-plotly-plot svg.main-svg")


def test_stop_button_ends_a_generation_and_keeps_its_text(browser: Browser, lab: Lab) -> None:
    tab = open_notebook(browser, lab, lab.write("interrupt.ipynb", *INTERRUPTED))
    tab.run(0)
    tab.run(1)
    tab.wait_for_output(1, "running")
    time.sleep(3)  # some tokens
    tab.stop()
    tab.wait_for_output(1, r"cancelled; the [1-9]\d* tokens that were generated are kept")
    tab.run(2)
    assert tab.wait_for_output(2, r"\n").strip() == "cancelled True True"

    tab.run(3)
    lengths = set()
    while len(lengths) < 4:  # the text grows while the cell runs
        lengths.add(len(tab.wait_for_output(3, r"\S")))
        time.sleep(0.2)
    tab.stop()
    tab.wait_for_output(3, "KeyboardInterrupt")
    tab.wait_until_idle()  # a kernel drops what it is sent while it reports an error
    tab.run(4)
    assert tab.wait_for_output(4, r"\n").strip() == "cancelled True 0"

    tab.run(5)
    assert tab.wait_for_output(5, r"\n").strip() == "length"
    assert tab.errors == []
    tab.close()
