"""Execute a notebook in a fresh kernel; write it and an HTML page of it to ``out/``.

Prints what the cells tagged "summary" show, and the path of the page. The notebook itself stays as
it is, unless ``--in-place`` asks for its outputs to be replaced; each figure then gets a picture of
itself, for places that draw no plotly (GitHub). Only that needs a Chromium.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from pathlib import Path

import nbformat
import plotly.io
import plotly.offline
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURE_WIDTH = 800  # JupyterLab shows a saved picture in its own size until the mouse is on it
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path, timeout: int) -> tuple[nbformat.NotebookNode, str | None]:
    """Run all cells; return the notebook and, if one failed, why: its traceback, say."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # no word on how the kernel is reached
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    started = time.monotonic()

    def announce(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            title = next((line for line in cell.source.splitlines() if line.strip()), "")
            seconds = time.monotonic() - started
            print(f"{seconds:6.1f} s  cell {cell_index}: {title[:70]}", file=sys.stderr, flush=True)

    client.on_cell_start = announce
    failure = None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = str(error)
    drop_what_shows_nothing(notebook)
    return notebook, failure


def drop_what_shows_nothing(notebook: nbformat.NotebookNode) -> None:
    """Remove widgets, which without their kernel are an error message, and emptied displays."""

    def shows(output: nbformat.NotebookNode) -> bool:
        data = output.get("data")
        return data is None or (WIDGET not in data and any(data.values()))

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if shows(output)]


def figures(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The MIME bundles that hold a plotly figure, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data for output in outputs if PLOTLY in output.get("data", {})]


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """Put a PNG beside each plotly figure, drawn by plotly's own script in a browser."""
    from playwright.sync_api import sync_playwright

    draw = (
        "figure => Plotly.toImage(figure, "
        f"{{format: 'png', width: {PICTURE_WIDTH}, height: figure.layout.height}})"
    )
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.add_script_tag(content=plotly.offline.get_plotlyjs())
        for data in figures(notebook):
            data["image/png"] = tab.evaluate(draw, data[PLOTLY]).partition(",")[2]
        browser.close()


def summary(notebook: nbformat.NotebookNode) -> str:
    """The plain text that the cells tagged "summary" show."""
    cells = [c for c in notebook.cells if "summary" in c.metadata.get("tags", ())]
    shown = (
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for cell in cells
        for output in cell.get("outputs", ())
        if output.output_type != "error" and output.get("name") != "stderr"
    )
    return "\n".join(text.rstrip("\n") for text in shown)


def page(notebook: nbformat.NotebookNode, title: str) -> str:
    """The notebook as one HTML page that works offline, plotly's figures included."""
    shown = copy.deepcopy(notebook)
    for number, data in enumerate(figures(shown)):
        # nbconvert cannot draw plotly's MIME type; plotly's script (5 MB) is needed only once.
        figure = plotly.io.from_json(json.dumps(data.pop(PLOTLY)), skip_invalid=True)
        data["text/html"] = figure.to_html(full_html=False, include_plotlyjs=number == 0)
    exporter = HTMLExporter(require_js_url="", mathjax_url="", jquery_url="", mermaid_js_url="")
    body, _ = exporter.from_notebook_node(shown, {"metadata": {"name": title}})
    return str(body)


def main() -> int:
    """Execute the notebook named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one cell")
    parser.add_argument("--in-place", action="store_true", help="also replace the outputs")
    arguments = parser.parse_args()

    source: Path = arguments.notebook.resolve()
    notebook, failure = execute(source, arguments.timeout)
    arguments.out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, arguments.out / source.name)
    html = (arguments.out / source.name).with_suffix(".html")
    html.write_text(page(notebook, source.stem), encoding="utf-8")
    if failure:
        print(f"{failure}\n\nA cell failed; the page up to there: {html}", file=sys.stderr)
        return 1
    if arguments.in_place:
        add_pictures(notebook)
        nbformat.write(notebook, source)
    text = summary(notebook)
    print(f"\n{text}\n\nPage: {html}" if text else f"\nPage: {html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
