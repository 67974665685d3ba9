"""The quickstart in a real JupyterLab and a real browser, started as `make lab` starts it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, sync_playwright

pytestmark = [pytest.mark.browser, pytest.mark.demo, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "01-quickstart.ipynb"
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
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

# Contrast as WCAG 2 defines it, of each element's text with the nearest background behind it.
CONTRASTS = """selector => {
  const channels = css => css.match(/[\\d.]+/g).map(Number);
  const light = css => {
    const [r, g, b] = channels(css).slice(0, 3).map(c => c / 255)
      .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const css = getComputedStyle(e).backgroundColor, c = channels(css);
      if (c.length === 3 || c[3] === 1) return css;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll(selector)].map(e => {
    const style = getComputedStyle(e);
    const a = light(e instanceof SVGElement ? style.fill : style.color), b = light(behind(e));
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  });
}"""

# How far outputs reach beyond the right edge of the notebook.
OVERHANG = """selector => {
  const edge = document.querySelector('.jp-Notebook').getBoundingClientRect().right;
  const shown = [...document.querySelectorAll(selector)];
  if (!shown.length) throw new Error(`nothing is shown as ${selector}`);
  return Math.max(...shown.map(e => e.getBoundingClientRect().right - edge));
}"""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address and the folder that it shows."""

    url: str
    folder: Path

    def copy(self, source: Path) -> str:
        """Put a notebook into the folder, without its outputs, and return its name."""
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, self.folder / source.name)
        return source.name

    def write(self, name: str, *sources: str) -> str:
        cells = [new_code_cell(source) for source in sources]
        # Without a kernel's name JupyterLab would ask for one.
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), self.folder / name)
        return name


@dataclass
class Tab:
    """A notebook that is open in the browser."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def command(self, name: str, arguments: dict[str, str] | None = None) -> None:
        """Run one of JupyterLab's commands; return when it is done."""
        self.page.evaluate(
            "([name, arguments]) => jupyterapp.commands.execute(name, arguments)",
            [name, arguments or {}],
        )

    def start(self, name: str) -> None:
        """Begin a command that lasts, and return at once."""
        self.page.evaluate("name => { jupyterapp.commands.execute(name) }", name)

    def output(self, cell: int) -> str:
        """The text that a code cell shows so far."""
        return "".join(self.cell(cell).locator(".jp-OutputArea-output").all_inner_texts())

    def cell(self, cell: int) -> Locator:
        return self.page.locator(".jp-CodeCell").nth(cell)

    def wait_for_output(self, cell: int, pattern: str, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, text := self.output(cell)):
            assert time.monotonic() < deadline, f"cell {cell} shows {text!r}, not {pattern!r}"
            time.sleep(0.1)
        return text

    def run(self, cell: int) -> None:
        """Begin to run a cell, in a notebook that has no cells but those of code."""
        self.page.evaluate(
            "cell => {jupyterapp.shell.currentWidget.content.activeCellIndex = cell}", cell
        )
        self.start("notebook:run-cell")

    def wait_until_idle(self) -> None:
        kernel = "jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        self.page.wait_for_function(f"{kernel}.status === 'idle'")

    def stop(self) -> None:
        """Press the notebook's stop button."""
        self.page.locator('jp-button[data-command="notebook:interrupt-kernel"]').click()


# -- a JupyterLab, a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, with settings of its own and no token."""
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    quiet = home / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = {
        "ServerApp.root_dir": str(folder),
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.password": "",
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home)}
    log = home / "server.log"
    with log.open("w") as lines:
        server = subprocess.Popen(command, env=environment, stdout=lines, stderr=lines)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(f"{url}/api", server, log)
        yield Lab(url, folder)
    finally:
        server.terminate()
        server.wait(30)


def _wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        found = playwright.chromium.launch(executable_path=chromium, args=options)
        yield found
        found.close()


def open_notebook(browser: Browser, lab: Lab, name: str) -> Tab:
    """Open a notebook in a workspace of its own; return when its kernel is ready."""
    tab = Tab(browser.new_page(viewport={"width": 1200, "height": 1000}))
    tab.page.set_default_timeout(60_000)
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.page.on(
        "console", lambda said: tab.errors.append(said.text) if said.type == "error" else None
    )
    tab.page.goto(f"{lab.url}/lab/workspaces/{Path(name).stem}/tree/{name}?reset")
    tab.page.wait_for_function("window.jupyterapp !== undefined")
    tab.page.evaluate(
        """async () => {
          await jupyterapp.restored;
          const pause = () => new Promise(done => setTimeout(done, 50));
          while (!jupyterapp.shell.currentWidget?.sessionContext) await pause();
          const session = jupyterapp.shell.currentWidget.sessionContext;
          await session.ready;
          while (!session.session?.kernel) await pause();
          await session.session.kernel.info;
        }"""
    )
    return tab


@pytest.fixture(scope="module")
def quickstart(browser: Browser, lab: Lab) -> Iterator[Tab]:
    """The quickstart, all cells run in JupyterLab, in a window that shows them all."""
    tab = open_notebook(browser, lab, lab.copy(QUICKSTART))
    tab.page.set_viewport_size({"width": 1200, "height": 8000})
    tab.start("notebook:run-all-cells")
    last = tab.page.locator(".jp-CodeCell").count() - 1
    tab.wait_for_output(last, r"E2E +ms", RUN_LIMIT)
    yield tab
    tab.page.close()


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
    quickstart.command("apputils:change-theme", {"theme": theme})
    quickstart.page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
    assert min(quickstart.page.evaluate(CONTRASTS, ".inferkit th, .inferkit td")) >= 4.5
    assert min(quickstart.page.evaluate(CONTRASTS, ".js-plotly-plot .xtick text")) >= 4


def test_nothing_hangs_over_the_edge_of_a_narrow_window(quickstart: Tab) -> None:
    quickstart.page.set_viewport_size({"width": 600, "height": 8000})
    outputs = ".inferkit, .js-plotly-plot svg.main-svg"
    quickstart.page.wait_for_function(f"({OVERHANG})({json.dumps(outputs)}) <= 0")


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
    tab.page.close()
