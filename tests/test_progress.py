"""Progress as numbers: what a callable is told, and that what it raises stops the work cleanly."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import transformers
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from test_catalog import fake_hub, run_python  # noqa: F401
from transformers.utils import logging

import inferkit as ik
from inferkit import progress
from inferkit.packing import packable

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 128, "max_batch": 2}
PACKED = {**OPTIONS, "dtype": "bfloat16"}
SIX = {"max_tokens": 6, "ignore_eos": True, "temperature": 0}
PACKING = ["Packing weights"] if packable("cpu", "bfloat16") else []
STAGES = ["Checking tiny.gguf", "Converting tiny.gguf, once", "Loading weights", *PACKING]

Call = tuple[str, int, int | None]


class Told:
    """Notes what it is told, and raises at one of the calls of a stage.

    Args:
        stage: Where to raise; None for nowhere.
        call: At which of the stage's calls, from 0; "last" for the one that says all are done.
        error: What to raise.
    """

    def __init__(
        self,
        stage: str | None = None,
        call: int | str = 0,
        error: type[BaseException] | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.threads: set[int] = set()
        self.raised = 0
        self._stage, self._call, self._error = stage, call, error or KeyboardInterrupt

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.calls.append((what, done, total))
        self.threads.add(threading.get_ident())
        if what != self._stage:
            return
        last = self._call == "last" and done == total
        if last or len(self.steps(what)) - 1 == self._call:
            self.raised += 1
            raise self._error("stop")

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(what for what, _, _ in self.calls))

    def steps(self, stage: str) -> list[tuple[int, int | None]]:
        return [(done, total) for what, done, total in self.calls if what == stage]


@pytest.fixture
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for conversions."""
    monkeypatch.setenv("INFERKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return gguf_files.write(tmp_path / "tiny.gguf")


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A callable is told of every step, as if each took long."""
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)


@pytest.fixture
def model(folder: Path) -> Iterator[ik.Model]:
    with ik.load(folder, **OPTIONS, progress=False) as loaded:
        yield loaded


def tokens(model: ik.Model) -> list[tuple[int, ...]]:
    return [g.token_ids for g in model.generate([[5, 6, 7], [9]], **SIX)]


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What it gives or raises, done by another thread than the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=120)


def living_models() -> int:
    gc.collect()
    return sum(issubclass(type(o), transformers.PreTrainedModel) for o in gc.get_objects())


def check_steps(steps: list[tuple[int, int | None]]) -> None:
    """From 0 to the total, never back."""
    done = [d for d, _ in steps]
    assert done[0] == 0
    assert done == sorted(done)
    assert steps[-1][1] == done[-1] > 0
    totals = [total for _, total in steps if total is not None]
    assert set(totals) == {totals[-1]}


@pytest.mark.usefixtures("cache", "every_step")
def test_a_load_tells_its_stages_and_counts_each_to_its_end(gguf: Path) -> None:
    told = Told()
    with ik.load(gguf, **PACKED, progress=told):
        pass
    assert told.stages == STAGES
    for stage in STAGES:
        check_steps(told.steps(stage))
    assert len(told.steps("Loading weights")) > 10
    assert told.threads == {threading.get_ident()}
    assert told.steps(STAGES[0])[-1][1] == gguf.stat().st_size


@pytest.mark.usefixtures("cache")
def test_what_transformers_converts_as_a_whole_is_told_too(tmp_path: Path) -> None:
    told = Told()
    with ik.load(gguf_files.write(tmp_path / "tiny.gguf", "lfm2"), **OPTIONS, progress=told):
        check_steps(told.steps("Converting tiny.gguf, once"))


def test_start_and_end_are_told_and_little_between() -> None:
    told, begun = Told(), time.monotonic()
    assert sum(progress.bar(told, "Counting", steps=range(300_000))) == sum(range(300_000))
    with progress.bar(told, "Adding", 300_000) as bar:
        for _ in range(300_000):
            bar.update()
    passed = time.monotonic() - begun
    for stage in ("Counting", "Adding"):
        check_steps(told.steps(stage))
        assert told.steps(stage)[-1] == (300_000, 300_000)
    assert len(told.calls) <= 6 + 20 * passed


@pytest.mark.parametrize("call", [0, 1, "last"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("every_step")
def test_a_load_is_cancelled_at_any_stage_and_leaves_nothing(
    gguf: Path, cache: Path, stage: str, call: int | str
) -> None:
    before, models, told = living_models(), list(ik.models()), Told(stage, call)
    with pytest.raises(KeyboardInterrupt):
        in_a_thread(lambda: ik.load(gguf, **PACKED, progress=told))
    assert told.raised == 1
    assert list(ik.models()) == models
    assert living_models() == before
    left = [p for p in (cache / "converted").glob("*") if not p.name.endswith(".lock")]
    assert len(left) == (stage not in STAGES[:2])
    assert not list((cache / "converted").glob(".*.tmp-*"))
    with in_a_thread(lambda: ik.load(gguf, **PACKED, progress=False)) as model:
        assert tokens(model)


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("cache", "every_step")
def test_any_error_of_the_callable_comes_out_as_it_is(
    gguf: Path, stage: str, error: type[Exception]
) -> None:
    before = living_models()
    with pytest.raises(error) as raised:
        ik.load(gguf, **PACKED, progress=Told(stage, 1, error))
    assert type(raised.value) is error
    assert "progress=" in raised.value.__notes__[0]
    assert living_models() == before


@pytest.mark.usefixtures("every_step")
def test_a_load_that_is_cancelled_replaces_nothing(model: ik.Model, folder: Path) -> None:
    before = tokens(model)
    with pytest.raises(KeyboardInterrupt):
        ik.load(
            folder,
            **{**OPTIONS, "dtype": "bfloat16"},
            name=model.name,
            progress=Told("Loading weights", 3),
        )
    assert ik.models() == [model]
    assert tokens(model) == before


@pytest.mark.parametrize(("mode", "call"), [("nf4", 0), ("int8", 5), ("nf4", "last")])
@pytest.mark.usefixtures("every_step")
def test_a_toggle_that_is_cancelled_brings_the_former_mode_back(
    model: ik.Model, folder: Path, mode: str, call: int | str
) -> None:
    before = tokens(model)
    for toggle in (
        lambda told: model.quantize(mode, progress=told),
        lambda told: ik.load(folder, **OPTIONS, quantize=mode, progress=told),
    ):
        told = Told("Loading weights", call)
        with pytest.raises(KeyboardInterrupt):
            in_a_thread(lambda toggle=toggle, told=told: toggle(told))
        assert told.raised == 1
        assert model.quantization == "none"
        assert tokens(model) == before
    told = Told()
    in_a_thread(lambda: model.quantize(mode, progress=told))
    assert model.quantization == mode
    check_steps(told.steps("Loading weights"))
    assert in_a_thread(lambda: model.quantize("none", progress=False)) is model
    assert tokens(model) == before


def test_fidelity_that_is_cancelled_brings_the_mode_back(model: ik.Model) -> None:
    model.quantize("nf4", progress=False)
    before = tokens(model)
    for stage in ("Loading weights", "Reference", "Comparing"):

        def cancelled(what: str, done: int, total: int | None, stage: str = stage) -> None:
            nonlocal reached
            reached = reached or what == stage
            if reached:  # as long as it is asked, as a button that was pressed does
                raise KeyboardInterrupt

        reached = False
        with pytest.raises(KeyboardInterrupt):
            ik.fidelity(model, [[5, 6, 7]], text="Some words.", max_tokens=2, progress=cancelled)
        assert reached
        assert model.quantization == "nf4"
        assert tokens(model) == before


def test_what_a_cancelled_load_put_on_disk_is_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plan = ik.plan(folder, **PACKED)
    split = {
        **PACKED,
        "device": ["cpu", "disk"],
        "max_memory": {"cpu": plan.total - plan.weights // 2},
    }
    with ik.load(folder, **split, progress=False):
        assert list(tmp_path.iterdir())
    told = Told("Loading weights", "last")
    with pytest.raises(KeyboardInterrupt):
        ik.load(folder, **split, progress=told)
    assert told.raised == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("cache")
def test_without_progress_nothing_is_printed(
    gguf: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = gguf_files.write(tmp_path / "whole.gguf", "lfm2")
    for path in (gguf, whole):
        with ik.load(path, **PACKED, progress=False) as model:
            model.quantize("nf4", progress=False)
        with ik.load(path, **PACKED, progress=lambda *_: None):
            pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("cache")
def test_bars_are_drawn_where_they_are_asked_for(
    gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ik.load(gguf, **OPTIONS) as model:
        drawn = capfd.readouterr().err
        assert "Converting tiny.gguf, once: 100%" in drawn
        assert "Loading weights: 100%" in drawn
        model.quantize("nf4")
    assert "Loading weights: 100%" in capfd.readouterr().err


def test_a_hook_of_the_users_sees_the_bars_that_are_drawn_and_stays(folder: Path) -> None:
    seen = []

    def hook(factory: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        seen.append(options["desc"])
        return factory(*args, **{**options, "disable": True})

    former = logging.set_tqdm_hook(hook)
    try:
        with ik.load(folder, **OPTIONS, progress=False) as model:
            model.quantize("nf4", progress=Told())
            with pytest.raises(KeyboardInterrupt):
                model.quantize("none", progress=Told("Loading weights"))
            assert seen == []
            model.quantize("none", progress=True)
    finally:
        assert logging.set_tqdm_hook(former) is hook
    assert seen == ["Loading weights"]


def test_two_models_toggled_at_once_each_tell_their_own_and_leave_no_hook(
    tiny_model: Callable[[str], Path],
) -> None:
    former = logging.set_tqdm_hook(None)
    told = Told(), Told()
    models = [
        ik.load(tiny_model(arch), **OPTIONS, name=arch, progress=False)
        for arch in ("llama", "gemma3")
    ]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda m, t: m.quantize("nf4", progress=t), models, told))
        for each in told:
            check_steps(each.steps("Loading weights"))
            assert len(each.threads) == 1
        assert logging.set_tqdm_hook(former) is None
    finally:
        for model in models:
            model.unload()


# -- under a notebook's cell -----------------------------------------------------------------------

CELLS = (
    "import threading\nimport inferkit as ik\nfrom inferkit.progress import bar\n"
    "from IPython.utils.capture import capture_output",
    "model = ik.load({folder!r}, name='one', device='cpu', dtype='float32', context=128)",
    "with capture_output() as captured:\n    model.quantize('nf4')\n"
    "print([shown.data['text/plain'] for shown in captured.outputs])",
    "thread = threading.Thread(target=lambda: ik.load({folder!r}, name='two', device='cpu'))\n"
    "thread.start()\nthread.join()",
    "for _ in bar(True, 'Outer', steps=range(2)):\n"
    "    for _ in bar(True, 'Inner', steps=range(3), leave=True):\n        pass",
    "try:\n    with bar(True, 'Interrupted', 3) as shown:\n"
    "        shown.update()\n        raise KeyboardInterrupt\nexcept KeyboardInterrupt:\n    pass",
    "with capture_output() as captured, bar(True, 'Of <unknown> length') as shown:\n"
    "    shown.update()\n    shown.refresh()\nprint(captured.outputs[-2].data['text/html'])",
)


@pytest.fixture(scope="module")
def shown_under_cells(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[list[Any]]:
    """The outputs of each of these cells in a notebook that was run and saved."""
    source = str(tiny_model("llama"))
    cells = [new_code_cell(cell.replace("{folder!r}", repr(source))) for cell in CELLS]
    notebook = new_notebook(cells=cells)
    where = tmp_path_factory.mktemp("notebook")
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(where)}}
    ).execute()
    return [cell.outputs for cell in notebook.cells]


def texts_of(outputs: list[Any]) -> list[str]:
    """What outputs say, but those that say nothing."""
    assert all(output.output_type == "display_data" for output in outputs)
    assert all({*output.data} == {"text/html", "text/plain"} for output in outputs)
    assert all(bool(o.data["text/html"]) == bool(o.data["text/plain"]) for o in outputs)
    return [output.data["text/plain"] for output in outputs if output.data["text/plain"]]


@pytest.mark.parametrize("cell", [1, 3], ids=["cell", "thread"])
def test_a_saved_notebook_keeps_no_progress_of_a_load(
    shown_under_cells: list[list[Any]], cell: int
) -> None:
    assert shown_under_cells[cell]
    assert texts_of(shown_under_cells[cell]) == []


def test_bars_are_shown_where_the_outputs_of_a_cell_go(shown_under_cells: list[list[Any]]) -> None:
    [printed] = shown_under_cells[2]
    shown = eval(printed.text)
    assert shown[0].startswith("Loading weights: ")
    assert "0/" in shown[0]
    assert shown[-1] == ""


def test_a_bar_that_is_to_stay_stays_with_its_last_numbers(
    shown_under_cells: list[list[Any]],
) -> None:
    first, second = texts_of(shown_under_cells[4])
    assert first.startswith("Inner: 100% 3/3 [")
    assert second.startswith("Inner: 100% 3/3 [")
    kept = [o.data["text/html"] for o in shown_under_cells[4] if o.data["text/html"]]
    assert all('<progress value="3" max="3"' in html for html in kept)


def test_a_bar_goes_when_it_is_interrupted(shown_under_cells: list[list[Any]]) -> None:
    assert texts_of(shown_under_cells[5]) == []


def test_a_bar_of_unknown_length_has_no_share(shown_under_cells: list[list[Any]]) -> None:
    [printed] = shown_under_cells[6]
    assert "Of &lt;unknown&gt; length" in printed.text
    assert "<progress aria-label" in printed.text
    assert "1/?" in printed.text


DOWNLOAD = """
import threading
from inferkit import catalog, progress
progress._INTERVAL = 0
said = []
def tell(what, done, total):
    said.append((what, done, total))
    if len(said) == {stop}:
        raise {error}("stop")
found = []
def work():
    try:
        found.append(catalog.resolve("org/tiny", progress={progress}).path)
    except BaseException as error:
        found.append(repr(error))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print((said, str(found[0])))
"""


def test_a_download_is_told_in_bytes(
    fake_hub: dict[str, str],  # noqa: F811
    folder: Path,
) -> None:
    code = DOWNLOAD.format(stop=0, error="KeyboardInterrupt", progress="tell")
    done = run_python(code, **fake_hub)
    said, path = eval(done.stdout)
    assert done.stderr == ""
    assert {what for what, _, _ in said} == {"Downloading"}
    counts = [n for _, n, _ in said]
    assert counts == sorted(counts)
    size = sum(p.stat().st_size for p in Path(path).iterdir())
    assert said[-1] == ("Downloading", size, size)
    assert Path(path, "model.safetensors").stat().st_size > 0
    assert said[0] == ("Downloading", 0, None)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ConnectionError", "OSError"])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_download_is_cancelled_by_what_the_callable_raises(
    fake_hub: dict[str, str],  # noqa: F811
    stop: int,
    error: str,
) -> None:
    code = DOWNLOAD.format(stop=stop, error=error, progress="tell")
    done = run_python(code, **fake_hub)
    said, raised = eval(done.stdout)
    assert raised == f"{error}('stop')"
    assert len(said) == stop  # nothing is told after it
    assert done.stderr == ""


def test_a_download_without_progress_prints_nothing(fake_hub: dict[str, str]) -> None:  # noqa: F811
    code = DOWNLOAD.format(stop=0, error="OSError", progress="False")
    config = "from inferkit import catalog\ncatalog.config('org/tiny')\n"
    for run in (config, code):
        assert run_python(run, **fake_hub).stderr == ""
    drawn = run_python(DOWNLOAD.format(stop=0, error="OSError", progress="True"), **fake_hub)
    assert Path(eval(drawn.stdout)[1]).is_dir()


@pytest.mark.usefixtures("every_step")
def test_a_transfer_in_xets_own_threads_is_aborted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """hf_xet's real client, with its storage in a local folder."""
    from huggingface_hub.utils._xet import get_xet_session

    hf_xet = pytest.importorskip("hf_xet")
    (tmp_path / "storage").mkdir()
    storage = f"local://{tmp_path / 'storage'}"
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(64 << 20))
    with get_xet_session().new_upload_commit(endpoint=storage) as commit:
        handle = commit.start_upload_file(str(source), sha256=hf_xet.SKIP_SHA256)
    info = hf_xet.XetFileInfo(handle.result().xet_info.hash, source.stat().st_size)
    source.unlink()
    told = Told("Downloading", 1)

    def transfer() -> None:
        with progress.downloads(told) as bars:
            assert bars is not None
            bar = bars(name="huggingface_hub.snapshot_download", total=64 << 20, desc="Bytes")
            with get_xet_session().new_file_download_group(
                endpoint=storage,
                progress_callback=lambda *_: bar.update(1),
                progress_interval_ms=1,
            ) as group:
                group.start_download_file(info, str(target))

    with pytest.raises(KeyboardInterrupt) as raised:
        in_a_thread(transfer)
    assert told.raised == 1
    assert raised.value.__context__ is not None  # the transfer itself did not come to its end
    assert capfd.readouterr() == ("", "")


def test_torch_is_not_imported_for_a_bar() -> None:
    code = "import sys, inferkit.progress; print({'torch', 'transformers'} & set(sys.modules))"
    assert run_python(code).stdout.split() == ["set()"]
