"""The notebooks, executed as `make demo` does it, and the copies of them that are committed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from limited import run_limited
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "01-quickstart.ipynb"
QUANTIZATION = ROOT / "notebooks" / "02-quantization.ipynb"
PANEL = ROOT / "notebooks" / "03-panel.ipynb"
EXPERIMENTS = ROOT / "notebooks" / "04-experiments.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
SVG = "image/svg+xml"
MEMORY = 2 << 30  # bytes that mybinder.org gives a session
FEW_WORDS = "It was the White Rabbit, trotting slowly back again, and looking anxiously about."
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|mnt|opt|private|root|tmp|usr|Users|var|work)/\S+")


@dataclass(frozen=True)
class Run:
    """What `execute.py` gave: exit status, what it printed, and the folder it wrote to.

    ``peak`` is the most memory that it took at once, in bytes.
    """

    status: int
    stdout: str
    stderr: str
    peak: int
    out: Path
    source: Path

    @property
    def notebook(self) -> NotebookNode:
        return nbformat.read(self.out / self.source.name, as_version=4)

    @property
    def page(self) -> str:
        return (self.out / self.source.name).with_suffix(".html").read_text(encoding="utf-8")


def run(source: Path, out: Path, *options: str) -> Run:
    """Execute a notebook with the script that `make demo` uses, as on Binder: in 2 GB."""
    start, script = ROOT / "binder" / "start", ROOT / "notebooks" / "execute.py"
    command = [start, sys.executable, script, source, "--out", out, *options]
    done = run_limited([str(word) for word in command], MEMORY)
    assert not done.killed, f"more memory than Binder has\n{done.stderr}"
    return Run(done.status, done.stdout, done.stderr, done.peak, out, source)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in code_cells(notebook):
        yield from cell.outputs


def printed(cell: NotebookNode) -> str:
    """What a cell shows as plain text."""
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)


def cell_with(notebook: NotebookNode, source: str) -> NotebookNode:
    return next(cell for cell in code_cells(notebook) if source in cell.source)


def smaller(source: str, parts: dict[str, str]) -> str:
    """A source with less to do: each text in ``parts``, which must be there, put as another."""
    for whole, part in parts.items():
        assert whole in source, whole
        source = source.replace(whole, part)
    return source


def run_smaller(source: Path, folder: Path, parts: dict[str, str]) -> Run:
    """Execute a copy of a notebook that has less to do: see `smaller`."""
    copy = folder / source.name
    as_json = {json.dumps(whole)[1:-1]: json.dumps(part)[1:-1] for whole, part in parts.items()}
    copy.write_text(smaller(source.read_text(encoding="utf-8"), as_json), encoding="utf-8")
    return run(copy, folder / "out")


def shape(notebook: NotebookNode) -> list[tuple[str, list[set[str]]]]:
    """Each code cell's source, and the kinds of what it shows; pictures of figures left out."""
    return [
        (cell.source, [{o.output_type, *o.get("data", {})} - {PNG} for o in cell.outputs])
        for cell in code_cells(notebook)
    ]


# -- the committed copy ---------------------------------------------------------------------------


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def committed(request: pytest.FixtureRequest) -> NotebookNode:
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_committed_copy_was_run_from_top_to_bottom(committed: NotebookNode) -> None:
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)


def test_committed_copy_has_no_errors_or_warnings(committed: NotebookNode) -> None:
    assert [o for o in outputs(committed) if o.output_type == "error"] == []
    assert [o for o in outputs(committed) if o.get("name") == "stderr"] == []


def test_committed_copy_names_no_path_of_a_machine(committed: NotebookNode) -> None:
    for data in outputs(committed):
        data.get("data", {}).pop(PNG, None)  # base64, where anything may occur
    assert MACHINE_PATH.findall(nbformat.writes(committed)) == []


def test_committed_figures_have_pictures_for_places_without_plotly(committed: NotebookNode) -> None:
    figures = [o.data for o in outputs(committed) if PLOTLY in o.get("data", {})]
    assert figures
    for data in figures:
        assert base64.b64decode(data[PNG]).startswith(b"\x89PNG")


def test_committed_copy_needs_no_widget_state(committed: NotebookNode) -> None:
    kinds = {kind for o in outputs(committed) for kind in o.get("data", {})}
    assert not any("widget" in kind for kind in kinds)


# -- a fresh run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The quickstart in a new kernel, on the demo model (converted before, if it was not yet)."""
    parts = {"max_tokens=48": "max_tokens=8"}  # a sixth of what a person waits for
    return run_smaller(QUICKSTART, tmp_path_factory.mktemp("out"), parts)


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)
class TestQuickstart:
    def test_demo_prints_a_latency_table_and_the_path_of_the_page(self, fresh: Run) -> None:
        assert fresh.status == 0, fresh.stderr
        for metric in ("TTFT", "TPOT", "ITL", "E2E"):
            assert re.search(rf"^{metric} +ms +\d+ ", fresh.stdout, re.MULTILINE)
        path = re.search(r"^Page: (.+)$", fresh.stdout, re.MULTILINE)
        assert path is not None
        assert Path(path[1]).read_text(encoding="utf-8") == fresh.page

    def test_every_cell_shows_what_its_committed_copy_shows(self, fresh: Run) -> None:
        assert_like_its_committed_copy(fresh)

    def test_the_model_answers_and_what_is_stopped_keeps_its_text(self, fresh: Run) -> None:
        assert "Paris" in printed(cell_with(fresh.notebook, "model.stream"))
        stopped = printed(cell_with(fresh.notebook, "request.cancel()"))
        text, _, reasons = stopped.rpartition("\n")
        assert reasons == "('cancelled', 'length')"
        assert len(text.split()) > 5

    def test_the_page_reads_offline_and_draws_every_figure(self, fresh: Run) -> None:
        outside = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"https?:", fresh.page
        )
        assert outside == []
        drawn = fresh.page.count("Plotly.newPlot(")
        assert drawn >= sum(PLOTLY in o.get("data", {}) for o in outputs(fresh.notebook)) >= 2


@pytest.mark.thorough
@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quantization_notebook_compares_the_modes_on_the_demo_model(
    demo_model_path: Path, tmp_path: Path
) -> None:
    # Two modes, of which one is quick to make, one batch, few prompts and tokens, a short text, and
    # one reference for both measurements of fidelity: the whole of it takes minutes.
    asked = '["The capital of France is"]'
    short = (
        "from inferkit import reference\n"
        f"reference.PROMPTS, reference.default_text = {asked}, lambda: {FEW_WORDS!r}\n"
    )
    parts = {
        "ik.devices()": f"{short}ik.devices()",
        '"none", "int8", "nf4", "fp4"': '"none", "int8wo"',
        'quantize("nf4", double_quant=True': 'quantize("int8wo"',
        'quantize("nf4"': 'quantize("int8wo"',
        "[1, 4]": "4",
        "prompts=prompts,": "prompts=prompts[:2],",
        "repeat=3": "repeat=1",
        "max_tokens=8,": "max_tokens=4, repeat=1,",
        "max_tokens=32": "max_tokens=8",
        '("always", "never")': '("always",)',
        "for prompt in prompts": "for prompt in prompts[:2]",
        "[4, 16] * 4": "[2, 4]",
        '["The capital of France is", "Once upon a time"], p': f"{asked}, max_tokens=4, p",
        "progress=False), progress": "progress=False), max_tokens=4, progress",
    }
    fresh = run_smaller(QUANTIZATION, tmp_path, parts)
    assert fresh.status == 0, fresh.stderr
    assert_like_its_committed_copy(fresh)
    notebook = fresh.notebook
    assert printed(cell_with(notebook, 'quantize("none"')) == "True"
    assert printed(cell_with(notebook, "model.unquantized")) == "('model.embed_tokens',)"
    table = fresh.stdout
    for mode in ("none", "int8wo"):
        assert len(re.findall(rf"^●? +{mode} +4 ", table, re.MULTILINE)) == 1
    # Whatever the speed, none is the most faithful of all.
    assert len(re.findall(r"^● +none ", table, re.MULTILINE)) == 1


@pytest.mark.thorough
@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_panel_notebook_keeps_what_the_panel_showed_last(
    demo_model_path: Path, tmp_path: Path
) -> None:
    fresh = run_smaller(
        PANEL, tmp_path, {"max_tokens=48": "max_tokens=4", "-tokens 40": "-tokens 9"}
    )
    assert fresh.status == 0, fresh.stderr
    assert_like_its_committed_copy(fresh)
    picture, table = cell_with(fresh.notebook, "ik.Panel()").outputs
    for seen in ("ITL, ms", "max batch 4", "nf4"):
        assert seen in picture.data[SVG]
    assert len(re.findall(r"^ ?\d+ .* length ", table.data["text/plain"], re.MULTILINE)) == 20
    figure = next(o.data[PLOTLY] for o in outputs(fresh.notebook) if PLOTLY in o.get("data", {}))
    itl = next(trace for trace in figure["data"] if trace["name"] == "ITL")
    assert len(itl["y"]) == 36 * 3  # three runs of twelve requests with 4 tokens each


@pytest.mark.thorough
@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experiments_notebook_replays_what_it_recorded(
    demo_model_path: Path, tmp_path: Path
) -> None:
    # The committed recording is replayed in test_experiments.py.
    shutil.copytree(EXPERIMENTS.parent / "experiments", tmp_path / "experiments")
    parts = {
        "max_tokens=24": "max_tokens=4",
        'ik.replay("experiments/demo-cpu.inferkit.json"': "ik.replay(mine",
    }
    fresh = run_smaller(EXPERIMENTS, tmp_path, parts)
    assert fresh.status == 0, fresh.stderr
    assert_like_its_committed_copy(fresh)
    assert "Reproduced: 8 of 8 requests gave the recorded tokens" in fresh.stdout
    played = cell_with(fresh.notebook, "ik.play(theirs").outputs
    assert any("H200" in o.data.get("text/plain", "") for o in played if "data" in o)
    assert any("nf4" in o.data[SVG] for o in played if SVG in o.get("data", {}))
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "what-a-batch-gives.inferkit.json").is_file()


def assert_like_its_committed_copy(fresh: Run) -> None:
    assert fresh.peak <= MEMORY
    assert [o for o in outputs(fresh.notebook) if o.output_type == "error"] == []
    assert shape(fresh.notebook) == shape(nbformat.read(fresh.source, as_version=4))


@pytest.mark.demo
def test_the_example_in_the_readme_runs(demo_model_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    few = f"ik.fidelity(model, text={FEW_WORDS!r}, max_tokens=4)"
    parts = {"max_tokens=64": "max_tokens=8", "ik.fidelity(model)": few, '"nf4"': '"int4wo"'}
    example = smaller(example, parts)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", example],
        env=os.environ | {"INFERKIT_DTYPE": "bfloat16", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5


# -- the script on notebooks of its own -----------------------------------------------------------


def write(path: Path, *sources: str) -> Path:
    """A notebook of these cells, the last one tagged "summary"."""
    cells = [new_code_cell(source) for source in sources]
    cells[-1].metadata["tags"] = ["summary"]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_a_failing_cell_ends_the_run_and_leaves_the_notebook_as_it_was(tmp_path: Path) -> None:
    source = write(tmp_path / "broken.ipynb", "print('before')", "1 / 0", "print('after')")
    before = source.read_bytes()
    done = run(source, tmp_path / "out", "--in-place")
    assert done.status == 1
    assert "ZeroDivisionError" in done.stderr
    assert source.read_bytes() == before
    assert "before" in done.page


@pytest.mark.parametrize(
    ("source", "why"),
    [("import time; time.sleep(60)", "timed out"), ("import os; os._exit(1)", "Kernel died")],
)
def test_a_cell_without_an_end_leaves_a_page_of_what_ran(
    tmp_path: Path, source: str, why: str
) -> None:
    done = run(
        write(tmp_path / "endless.ipynb", "print('before')", source),
        tmp_path / "out",
        "--timeout",
        "5",
    )
    assert done.status == 1
    assert why in done.stderr
    assert "A cell failed; the page up to there" in done.stderr
    assert "before" in done.page


@pytest.mark.browser
def test_in_place_keeps_figures_as_pictures_and_drops_what_shows_nothing(tmp_path: Path) -> None:
    source = write(
        tmp_path / "figure.ipynb",
        "from tqdm.notebook import tqdm\nfrom inferkit.progress import bar\n"
        "for _ in bar(True, 'Steps', steps=tqdm(range(2))):\n    print('step', flush=True)",
        "import plotly.graph_objects as go\ngo.Figure(go.Bar(y=[1, 2]), {'height': 300}).show()",
        "print('done')",
    )
    done = run(source, tmp_path / "out", "--in-place")
    assert done.status == 0, done.stderr
    assert done.stdout.strip().startswith("done")
    steps, figure, _ = code_cells(nbformat.read(source, as_version=4))
    assert [(o.output_type, o.text) for o in steps.outputs] == [("stream", "step\nstep\n")]
    png = base64.b64decode(figure.outputs[0].data[PNG])
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (800, 300)
