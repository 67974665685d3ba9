"""Execute a notebook in a fresh kernel; write it and an HTML page of it to ``out/``.

Prints what the cells tagged "summary" show, and the path of the page. The notebook itself stays as
it is, unless ``--in-place`` asks for its outputs to be replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import nbformat
import plotly.io
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

PLOTLY = "application/vnd.plotly.v1+json"
ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path, timeout: int) -> tuple[nbformat.NotebookNode, str | None]:
    """Run all cells; return the notebook and the traceback of the cell that failed, if one did."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
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
    try:
        client.execute()
    except CellExecutionError as error:
        return notebook, str(error)
    return notebook, None


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
    outputs = [output for cell in shown.cells for output in cell.get("outputs", ())]
    figures = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    for number, data in enumerate(figures):
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
        nbformat.write(notebook, source)
    text = summary(notebook)
    print(f"\n{text}\n\nPage: {html}" if text else f"\nPage: {html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
