"""The JupyterLab extension, installed from its wheel, in a real JupyterLab and a real browser.

Most tests share one window with two notebooks, each with a model; those that end a kernel come last
in the file, or have a notebook of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from installed import Installed, build_wheel, install
from lab import DARK, LIGHT, Lab, Tab, open_notebook, serve
from playwright.sync_api import Browser, Locator, Route, expect

import inferkit as ik
from inferkit.lab import schema

pytestmark = [pytest.mark.browser, pytest.mark.demo, pytest.mark.slow]

SECONDS = 60  # for anything to happen, on a machine that does something else as well
STATE = "inferkit/api/state"
BUNDLE_LIMIT = 300_000  # bytes
PLOTLY = "application/vnd.plotly.v1+json"
TinyModel = Callable[[str], Path]

LONG = "gen = model.generate('Once upon a time', max_tokens=2000, ignore_eos=True)"
CELLS = (
    "import inferkit as ik\n%load_ext inferkit\nmodel = ik.load('demo', progress=False)",
    f"{LONG}\nprint(gen.finish_reason, len(gen.token_ids))",
    "print('now', model.quantization, model.batching, model.max_batch)",
    "%%infer --max-tokens 8\nSome *Markdown* text",
    "%infer lo",
)
LOAD, GENERATE, MODES, PROMPT, COMPLETE = range(len(CELLS))

# Begins to load when a test has had the time to do something else.
SLOW_LOAD = """
import time
import inferkit
def slow(*args, load=inferkit.load, **options):
    time.sleep(60)
    return load(*args, **options)
inferkit.load = slow
"""

NOTEBOOK = "jupyterapp.shell.currentWidget"
KERNEL = f"{NOTEBOOK}.sessionContext.session.kernel"


# -- the wheel, without node -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(
        build_wheel(tmp_path_factory.mktemp("wheel")), tmp_path_factory.mktemp("installed")
    )


def test_the_installed_wheel_is_enabled_and_ok_without_node(installed: Installed) -> None:
    told = re.sub(r"\x1b\[\d*m", "", installed.run("-m", "jupyterlab.labextensions", "list"))
    version = re.escape(ik.__version__)
    assert re.search(rf"inferkit-lab v{version} enabled OK \(python, jupyter-inferkit\)", told)
    told = installed.run("-m", "jupyter_server.extension.serverextension", "list")
    assert re.search(r"inferkit\.lab\S* \S*enabled", told)
    where = installed.run("-c", "import inferkit; print(inferkit.__file__)").strip()
    assert Path(where).is_relative_to(installed.python.parent.parent)


def test_the_bundle_is_small(installed: Installed) -> None:
    folder = installed.python.parent.parent / "share" / "jupyter" / "labextensions"
    sizes = [path.stat().st_size for path in (folder / "inferkit-lab").glob("static/*.js")]
    assert sum(sizes) < BUNDLE_LIMIT


def test_sources_are_linted_typed_and_unit_tested(root: Path) -> None:
    command = [sys.executable, str(root / "extensions" / "labextension.py"), "check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_built_is_built_again_where_it_was_removed(root: Path, tmp_path: Path) -> None:
    extension, built = root / "extensions" / "inferkit-lab", tmp_path / "lib"
    told = "import labextension; print(labextension._environment()['PATH'])"
    path = subprocess.check_output([sys.executable, "-c", told], cwd=extension.parent, text=True)
    tsc = ["node", "node_modules/typescript/bin/tsc", "--outDir", str(built)]
    for _ in range(2):
        shutil.rmtree(built, ignore_errors=True)
        subprocess.run(tsc, cwd=extension, env=os.environ | {"PATH": path.strip()}, check=True)
        assert (built / "index.js").exists()


# -- the window that the tests share ---------------------------------------------------------------


@dataclass
class Sidebar:
    """The sidebar in a window."""

    tab: Tab
    lab: Lab

    @property
    def root(self) -> Locator:
        return self.tab.page.locator("#inferkit-lab")

    @property
    def kernels(self) -> Locator:
        return self.root.locator("article")

    def kernel(self, title: str) -> Locator:
        return self.root.locator(f"article[aria-label='{title}']")

    def model(self, title: str, name: str) -> Locator:
        return self.kernel(title).locator(f"[data-model='{name}']")

    def button(self, text: str, within: Locator | None = None) -> Locator:
        return (within or self.root).locator(f"button:text-is('{text}')")

    @property
    def told(self) -> Locator:
        """What is said of the last load."""
        return self.root.locator(".jp-Inferkit-loader .jp-Inferkit-told")

    def state(self) -> schema.State:
        """What the server tells."""
        with urllib.request.urlopen(f"{self.lab.url}/{STATE}", timeout=SECONDS) as told:
            return msgspec.json.decode(told.read(), type=schema.State)


@pytest.fixture(scope="module")
def served(
    installed: Installed, demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    home, folder = (tmp_path_factory.mktemp(name) for name in ("home", "notebooks"))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://github.com/some/where"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    with serve(home, folder, installed.python, installed.variables) as lab:
        yield lab


@pytest.fixture(scope="module")
def window(browser: Browser, served: Lab, tiny_model: TinyModel) -> Iterator[Sidebar]:
    """Two notebooks, each with a model, and the sidebar."""
    tab = open_notebook(browser, served, served.write("first.ipynb", *CELLS))
    expect.set_options(timeout=1000 * SECONDS)
    tab.page.set_default_timeout(1000 * SECONDS)
    sidebar = Sidebar(tab, served)
    sidebar.tab.command("inferkit:show")
    expect(sidebar.root).to_contain_text("No kernel has a model.")
    tab.run(LOAD)
    load = f"import inferkit as ik\nmodel = ik.load({str(tiny_model('llama'))!r}, name='tiny')"
    second = served.write("second.ipynb", load, "print('now', model.loaded)")
    tab.command("docmanager:open", {"path": second})
    tab.wait_until_ready()
    tab.page.evaluate(f"{NOTEBOOK}.content.activeCellIndex = 0")
    tab.start("notebook:run-cell")
    sidebar.model("second.ipynb", "tiny").wait_for()
    sidebar.model("first.ipynb", "demo").wait_for()
    yield sidebar
    tab.page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    tab.page.close()


@pytest.fixture
def sidebar(window: Sidebar) -> Sidebar:
    """The window with the first notebook in front, and nothing running in it."""
    front(window, "first.ipynb")
    window.tab.page.evaluate("jupyterapp.shell.activateById('inferkit-lab')")
    window.root.wait_for()
    return window


def front(sidebar: Sidebar, name: str) -> None:
    reveal(sidebar, name)
    sidebar.tab.wait_until_ready()


def reveal(sidebar: Sidebar, name: str) -> None:
    """Show a notebook, which may have no kernel."""
    sidebar.tab.command("docmanager:open", {"path": name})
    sidebar.tab.page.wait_for_function(f"{NOTEBOOK}?.context?.path === '{name}'")


def reload(sidebar: Sidebar) -> None:
    """Load the page anew, as it is."""
    page = sidebar.tab.page
    sidebar.tab.save()
    page.wait_for_timeout(1500)  # JupyterLab saves the layout a second after it changed
    page.goto(page.url.partition("?")[0])
    page.wait_for_function("window.jupyterapp !== undefined")
    page.evaluate("jupyterapp.restored")


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return value


def run(sidebar: Sidebar, cell: int, pattern: str) -> str:
    """Run a cell of the notebook in front, and wait for what it prints."""
    shown = sidebar.tab.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell").nth(cell)
    sidebar.tab.run(cell)
    output = shown.locator(".jp-OutputArea-output")
    expect(output.last).to_have_text(re.compile(pattern))
    return output.last.inner_text()


def execute(sidebar: Sidebar, code: str) -> None:
    """Run code in the kernel of the notebook in front, beside its cells; it must go well."""
    status = f"{KERNEL}.requestExecute({{code}}).done.then(reply => reply.content.status)"
    assert sidebar.tab.page.evaluate(f"code => {status}", code) == "ok"


# -- looking ---------------------------------------------------------------------------------------


def test_two_notebooks_with_a_model_each_both_appear(sidebar: Sidebar) -> None:
    titles = [sidebar.kernels.nth(i).get_attribute("aria-label") for i in range(2)]
    assert titles == ["first.ipynb", "second.ipynb"]  # the current one first
    assert sidebar.kernels.count() == 2
    expect(sidebar.kernel("first.ipynb").locator(".jp-Inferkit-badge")).to_have_text("current")
    expect(sidebar.model("first.ipynb", "demo").locator("[data-state]")).to_have_text("ready")
    expect(sidebar.root.locator(".jp-Inferkit-device")).to_have_count(len(sidebar.state().devices))
    shares = sidebar.root.locator(".jp-Inferkit-share:not(.jp-mod-other)")
    assert shares.count() == 2
    front(sidebar, "second.ipynb")
    expect(sidebar.kernels.first).to_have_attribute("aria-label", "second.ipynb")


def test_the_sparkline_moves_while_a_cell_blocks_and_stop_ends_it(sidebar: Sidebar) -> None:
    model = sidebar.model("first.ipynb", "demo")
    line = model.locator("path.jp-Inferkit-itl")
    sidebar.tab.run(GENERATE)
    line.first.wait_for(state="attached")
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("1 running, 0 waiting")

    def shown() -> tuple[str, int]:
        """What is drawn, and the tokens that it is drawn from."""
        paths = line.evaluate_all("all => all.map(path => path.getAttribute('d')).join(' ')")
        [demo] = [
            m
            for k in sidebar.state().kernels
            if k.state
            for m in k.state.models
            if m.name == "demo"
        ]
        assert demo.history is not None
        return paths, sum(demo.history.tokens)

    paths, tokens = shown()
    wait_for(lambda: (now := shown())[0] != paths and now[1] > tokens)
    figures = dict(
        zip(model.locator("dt").all_inner_texts(), model.locator("dd").all_inner_texts())
    )
    assert float(figures["ITL ms"]) > 0
    assert float(figures["TTFT ms"]) > 0
    assert float(figures["tok/s"]) > 0
    assert sidebar.tab.page.evaluate(f"{KERNEL}.status") == "busy"
    sidebar.button("Stop", model).click()
    sidebar.tab.wait_for_output(GENERATE, r"cancelled \d+")
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("0 running, 0 waiting")
    expect(sidebar.button("Stop", model)).to_be_disabled()


def test_the_status_bar_says_memory_and_speed_and_opens_the_sidebar(sidebar: Sidebar) -> None:
    item = sidebar.tab.page.locator(".jp-Inferkit-status")
    expect(item).to_have_text(re.compile(r"^\S+ [\d.]+/[\d.]+ GiB · \S+ tok/s$"))
    sidebar.tab.command("inferkit:show")  # which hides it where it is shown
    expect(sidebar.root).to_be_hidden()
    item.click()
    expect(sidebar.root).to_be_visible()


def test_nothing_is_asked_while_nobody_looks(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url) if STATE in sent.url else None)
    wait_for(lambda: (page.wait_for_timeout(50), len(asked) >= 2)[1])
    sidebar.tab.command("inferkit:show")
    sidebar.tab.command("statusbar:toggle")
    expect(page.locator(".jp-Inferkit-status")).to_be_hidden()
    page.wait_for_timeout(500)
    asked.clear()
    page.wait_for_timeout(6500)  # the status bar alone would have asked
    assert asked == []
    sidebar.tab.command("statusbar:toggle")
    wait_for(lambda: (page.wait_for_timeout(50), len(asked) >= 1)[1])


def test_it_is_shown_and_hidden_by_its_shortcut_and_from_the_palette(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    page.locator("body").press("Alt+Shift+I")
    expect(sidebar.root).to_be_hidden()
    page.locator("body").press("Alt+Shift+I")
    expect(sidebar.root).to_be_visible()
    sidebar.tab.command("apputils:activate-command-palette")
    page.locator(".lm-CommandPalette-input").fill("Show Inference")
    page.keyboard.press("Enter")
    expect(sidebar.root).to_be_hidden()


def test_a_setting_holds_at_once(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    item = page.locator(".jp-Inferkit-status")
    expect(item).to_be_visible()
    sidebar.tab.command("settingeditor:open", {"query": "Inference"})
    box = page.get_by_label("Show memory and tokens/s in the status bar")
    box.uncheck()
    expect(item).to_have_count(0)
    box.check()
    expect(item).to_be_visible()
    sidebar.tab.command("application:close")


def test_on_the_right_it_is_shown_and_hidden_and_asks_only_while_it_is_seen(
    sidebar: Sidebar,
) -> None:
    page = sidebar.tab.page
    move = """side => {
      const shell = jupyterapp.shell;
      const all = ['left', 'right'].flatMap(side => [...shell.widgets(side)]);
      shell.add(all.find(widget => widget.id === 'inferkit-lab'), side);
    }"""
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url) if STATE in sent.url else None)
    sidebar.tab.command("statusbar:toggle")
    try:
        page.evaluate(move, "right")
        expect(sidebar.root).to_be_hidden()
        page.wait_for_timeout(500)
        asked.clear()
        page.wait_for_timeout(2500)
        assert asked == []
        sidebar.tab.command("inferkit:show")
        expect(sidebar.root).to_be_visible()
        assert page.evaluate("jupyterapp.shell.rightCollapsed") is False
        asked.clear()
        wait_for(lambda: (page.wait_for_timeout(50), len(asked) >= 2)[1])
        sidebar.tab.command("inferkit:show")
        expect(sidebar.root).to_be_hidden()
        page.wait_for_timeout(500)
        asked.clear()
        page.wait_for_timeout(2500)
        assert asked == []
    finally:
        page.evaluate(move, "left")
        sidebar.tab.command("statusbar:toggle")


# -- changing --------------------------------------------------------------------------------------


def test_choices_in_the_sidebar_change_the_kernels_model(sidebar: Sidebar) -> None:
    model = sidebar.model("first.ipynb", "demo")
    model.get_by_label("Precision of demo").select_option("int8wo")
    expect(model.get_by_label("Precision of demo")).to_have_value("int8wo")
    expect(model.get_by_label("Precision of demo")).to_be_enabled()
    model.get_by_label("Batching of demo").select_option("static")
    expect(model.get_by_label("Batching of demo")).to_have_value("static")
    most = model.get_by_label("Most requests of demo at once")
    expect(most).to_be_enabled()
    most.fill("2")
    most.press("Enter")
    expect(most).to_have_value("2")
    expect(most).to_be_enabled()
    assert run(sidebar, MODES, r"^now").split() == ["now", "int8wo", "static", "2"]


def test_a_change_during_a_request_waits_and_can_be_cancelled(sidebar: Sidebar) -> None:
    model = sidebar.model("first.ipynb", "demo")
    choice = model.get_by_label("Precision of demo")
    before = choice.input_value()
    sidebar.tab.run(GENERATE)
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("1 running, 0 waiting")
    choice.select_option("nf4")
    row = sidebar.kernel("first.ipynb")
    expect(row.locator(".jp-Inferkit-work")).to_contain_text("nf4: Waiting for 1 request")
    sidebar.button("Cancel", row).click()
    told = row.locator(".jp-Inferkit-told")
    expect(told).to_contain_text("Cancelled.")
    expect(choice).to_be_enabled()
    expect(choice).to_have_value(before)
    told.get_by_label("Dismiss").click()
    sidebar.button("Stop", model).click()
    sidebar.tab.wait_for_output(GENERATE, r"cancelled \d+")


def test_a_change_that_waits_is_read_whole_and_stopping_requests_lets_it_go_on(
    sidebar: Sidebar,
) -> None:
    model = sidebar.model("first.ipynb", "demo")
    choice = model.get_by_label("Precision of demo")
    before = choice.input_value()
    other = "none" if before == "int8wo" else "int8wo"
    sidebar.tab.run(GENERATE)
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("1 running, 0 waiting")
    choice.select_option(other)
    text = sidebar.kernel("first.ipynb").locator(".jp-Inferkit-work .jp-Inferkit-grow")
    expect(text).to_contain_text("Waiting for 1 request")
    assert text.evaluate("text => text.scrollWidth <= text.clientWidth")
    choice.evaluate("""choice => {
      window.freed = [];
      new MutationObserver(() => choice.disabled || window.freed.push(choice.value))
        .observe(choice, {attributeFilter: ['disabled']});
    }""")
    sidebar.button("Stop", model).click()
    expect(choice).to_be_enabled()
    expect(choice).to_have_value(other)
    assert sidebar.tab.page.evaluate("window.freed") == [other]
    choice.select_option(before)
    expect(choice).to_have_value(before)
    expect(choice).to_be_enabled()


def test_what_a_kernel_refuses_is_said_and_can_be_dismissed(sidebar: Sidebar) -> None:
    sidebar.tab.command("inferkit:load")
    field = sidebar.root.get_by_label("Model: demo")
    field.fill("nobody/nothing")
    sidebar.button("Load").click()
    told = sidebar.root.locator(".jp-Inferkit-told[role=alert]")
    expect(told).to_contain_text("nobody/nothing")
    told.get_by_label("Dismiss").click()
    expect(told).to_have_count(0)


def test_a_model_is_loaded_from_the_sidebar_and_its_cell_inserted(
    sidebar: Sidebar, tiny_model: TinyModel
) -> None:
    page = sidebar.tab.page
    sidebar.tab.command("inferkit:load")
    field = sidebar.root.get_by_label("Model: demo")
    expect(field).to_be_focused()
    field.fill(str(tiny_model("gemma3")))
    sidebar.button("Load").click()
    sidebar.model("first.ipynb", "gemma3").wait_for()
    sidebar.button("Insert cell").click()
    page.wait_for_function(
        f"{NOTEBOOK}.content.activeCell.model.sharedModel.getSource().includes('ik.load(')"
    )
    sidebar.tab.command("notebook:delete-cell")
    sidebar.button("Unload", sidebar.model("first.ipynb", "gemma3")).click()
    expect(sidebar.model("first.ipynb", "gemma3")).to_have_count(0)


@pytest.mark.parametrize("busy", [False, True])
def test_a_restart_ends_a_load_and_leaves_the_box_free(
    sidebar: Sidebar, demo_model_path: Path, busy: bool
) -> None:
    page, name = sidebar.tab.page, f"ended-{busy}.ipynb"
    front(sidebar, sidebar.lab.write(name, "import time\ntime.sleep(600)"))
    execute(sidebar, SLOW_LOAD)
    if busy:
        sidebar.tab.run(0)
    opened: list[Any] = []
    page.on("websocket", lambda made: opened.append(made))
    sidebar.tab.command("inferkit:load")
    sidebar.root.get_by_label("Model: demo").fill("demo")  # not what was loaded last
    sidebar.button("Load").click()
    expect(sidebar.kernel(name).locator(".jp-Inferkit-work")).to_contain_text("Loading demo")
    [click] = opened
    front(sidebar, "first.ipynb")
    expect(sidebar.button("Load")).to_be_enabled()  # this kernel loads nothing
    front(sidebar, name)
    expect(sidebar.button("Loading…")).to_be_disabled()
    page.evaluate(f"{KERNEL}.restart()")
    expect(sidebar.told).to_contain_text("The kernel has ended or was restarted meanwhile.")
    wait_for(lambda: (page.wait_for_timeout(50), click.is_closed())[1])
    sidebar.told.get_by_label("Dismiss").click()
    sidebar.button("Load").click()
    expect(sidebar.told).to_contain_text("Loaded 'demo'")
    page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    page.evaluate(f"{NOTEBOOK}.dispose()")
    expect(sidebar.kernels).to_have_count(2)


def test_the_cell_of_a_load_goes_where_its_model_is(
    sidebar: Sidebar, tiny_model: TinyModel
) -> None:
    page = sidebar.tab.page
    sidebar.tab.command("inferkit:load")
    sidebar.root.get_by_label("Model: demo").fill(str(tiny_model("gemma3")))
    sidebar.button("Load").click()
    sidebar.button("Insert cell").wait_for()
    front(sidebar, "second.ipynb")
    expect(sidebar.button("Insert cell")).to_have_count(0)
    front(sidebar, "first.ipynb")
    sidebar.button("Insert cell").click()
    page.wait_for_function(
        f"{NOTEBOOK}.content.activeCell.model.sharedModel.getSource().includes('ik.load(')"
    )
    sidebar.tab.command("notebook:delete-cell")
    sidebar.told.get_by_label("Dismiss").click()
    sidebar.button("Unload", sidebar.model("first.ipynb", "gemma3")).click()
    expect(sidebar.model("first.ipynb", "gemma3")).to_have_count(0)


def test_clicks_leave_no_connection_and_no_subshell_behind(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    opened: list[Any] = []
    page.on("websocket", lambda made: opened.append(made))
    model = sidebar.model("first.ipynb", "demo")
    for batching in ("continuous", "off", "continuous"):
        model.get_by_label("Batching of demo").select_option(batching)
        expect(model.get_by_label("Batching of demo")).to_have_value(batching)
        expect(model.get_by_label("Batching of demo")).to_be_enabled()
    assert len(opened) == 3
    wait_for(lambda: (page.wait_for_timeout(50), all(ws.is_closed() for ws in opened))[1])
    shells = f"{KERNEL}.requestListSubshell({{}}).done.then(reply => reply.content.subshell_id)"
    assert page.evaluate(shells) == []


def test_a_kernel_with_an_older_inferkit_says_which_is_needed(sidebar: Sidebar) -> None:
    execute(sidebar, "import sys, inferkit.notebook.actions as kept")
    execute(sidebar, "sys.modules['inferkit.notebook.actions'] = None")
    sidebar.model("first.ipynb", "demo").get_by_label("Batching of demo").select_option("off")
    told = sidebar.kernel("first.ipynb").locator(".jp-Inferkit-told")
    expect(told).to_contain_text(f"This kernel has inferkit {ik.__version__}, and 0.1.0 or later")
    execute(sidebar, "sys.modules['inferkit.notebook.actions'] = kept")
    told.get_by_label("Dismiss").click()


def test_the_panel_in_a_tab_says_which_inferkit_its_kernel_needs(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    execute(sidebar, "import sys, inferkit.notebook.actions as kept")
    execute(sidebar, "sys.modules['inferkit.notebook.actions'] = None")
    sidebar.tab.command("inferkit:panel-tab")
    tab = page.locator(".jp-Inferkit-tab")
    needed = f"This kernel has inferkit {ik.__version__}, and 0.1.0 or later"
    expect(tab).to_contain_text(needed)
    front(sidebar, "first.ipynb")
    execute(sidebar, "sys.modules['inferkit.notebook.actions'] = kept")
    sidebar.button("Show the panel again", tab).click()
    expect(tab.locator(".inferkit-panel .ik-about")).to_contain_text("demo is loaded")
    front(sidebar, "first.ipynb")
    execute(sidebar, "sys.modules['inferkit.notebook.actions'] = None")
    sidebar.tab.command("inferkit:panel-tab")  # with its tab open
    expect(tab).to_contain_text(needed)
    front(sidebar, "first.ipynb")
    execute(sidebar, "sys.modules['inferkit.notebook.actions'] = kept")
    page.locator(".lm-TabBar-tab:has-text('demo') .lm-TabBar-tabCloseIcon").click()
    expect(tab).to_have_count(0)


# -- the panel, cells, commands --------------------------------------------------------------------


def test_the_panel_opens_in_a_tab_and_is_there_after_a_reload(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    sidebar.button("Panel", sidebar.model("second.ipynb", "tiny")).click()
    about = page.locator(".jp-Inferkit-tab .inferkit-panel .ik-about")
    expect(about).to_contain_text("tiny is loaded")
    reload(sidebar)
    expect(sidebar.root).to_be_visible()
    expect(about).to_contain_text("tiny is loaded")
    sidebar.model("first.ipynb", "demo").wait_for()
    page.locator(".lm-TabBar-tab:has-text('tiny') .lm-TabBar-tabCloseIcon").click()
    expect(page.locator(".jp-Inferkit-tab")).to_have_count(0)


def test_the_panel_in_a_tab_is_of_the_model_that_it_is_called_by(
    sidebar: Sidebar, tiny_model: TinyModel
) -> None:
    page = sidebar.tab.page
    front(sidebar, "second.ipynb")
    load = f"import inferkit as ik\nik.load({str(tiny_model('gemma3'))!r}, name='other')"
    execute(sidebar, load)
    model, tab = sidebar.model("second.ipynb", "other"), page.locator(".jp-Inferkit-tab")
    close = page.locator(".lm-TabBar-tab:has-text('other') .lm-TabBar-tabCloseIcon")
    panel, about = tab.locator(".inferkit-panel"), tab.locator(".inferkit-panel .ik-about")
    drawn_anew = tab.locator(".inferkit-panel:not(.kept)")
    sidebar.button("Panel", model).click()
    expect(about).to_contain_text("other is loaded")
    sidebar.button("Unload", model).click()
    expect(about).to_contain_text("tiny is loaded")
    panel.evaluate("panel => panel.classList.add('kept')")
    execute(sidebar, load)
    sidebar.button("Panel", model).click()  # with its tab open
    expect(about).to_contain_text("other is loaded")
    expect(drawn_anew).to_have_count(0)
    front(sidebar, "second.ipynb")
    execute(sidebar, "import inferkit.notebook.actions as a; a._panels['other'].close()")
    sidebar.button("Panel", model).click()
    expect(drawn_anew.locator(".ik-about")).to_contain_text("other is loaded")
    sidebar.button("Unload", model).click()
    expect(about).to_contain_text("tiny is loaded")
    path = {"path": "second.ipynb", "model": "other"}
    sidebar.tab.command("inferkit:panel-tab", path)
    expect(tab).to_contain_text("No model 'other' is loaded in this kernel; these are: 'tiny'.")
    expect(tab).not_to_contain_text("Traceback")
    front(sidebar, "second.ipynb")
    execute(sidebar, load)
    sidebar.button("Show the panel again", tab).click()
    expect(about).to_contain_text("other is loaded")
    front(sidebar, "second.ipynb")
    execute(sidebar, "rests = lambda: a._panels['other']._ticker is None\nassert not rests()")
    close.click()
    expect(tab).to_have_count(0)
    front(sidebar, "second.ipynb")
    execute(sidebar, "import time\nwhile not rests(): time.sleep(0.1)")  # and sends nothing
    execute(sidebar, "[m.unload() for m in ik.models() if m.name == 'other']")
    expect(model).to_have_count(0)


@pytest.fixture
def panel_tab(sidebar: Sidebar, tiny_model: TinyModel) -> Iterator[Locator]:
    """The panel in a tab, of a notebook of its own, which is in front."""
    page = sidebar.tab.page
    front(sidebar, sidebar.lab.write("own.ipynb", ""))
    execute(sidebar, f"import inferkit as ik\nik.load({str(tiny_model('llama'))!r}, name='shown')")
    sidebar.button("Panel", sidebar.model("own.ipynb", "shown")).click()
    tab = page.locator(".jp-Inferkit-tab")
    expect(tab.locator(".inferkit-panel .ik-about")).to_contain_text("shown is loaded")
    front(sidebar, "own.ipynb")
    yield tab
    page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    page.evaluate(f"{NOTEBOOK}.dispose()")
    expect(tab).to_have_count(0)
    expect(sidebar.kernels).to_have_count(2)


ENDS = {
    "shut down": f"{NOTEBOOK}.sessionContext.shutdown()",
    "changed": f"{NOTEBOOK}.sessionContext.changeKernel({{name: 'python3'}})",
    "shut down elsewhere": (
        f"jupyterapp.serviceManager.sessions.shutdown({NOTEBOOK}.sessionContext.session.id)"
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_panel_in_a_tab_says_that_its_kernel_has_ended(
    sidebar: Sidebar, panel_tab: Locator, end: str
) -> None:
    sidebar.tab.page.evaluate(ENDS[end])
    expect(panel_tab).to_contain_text("The kernel was shut down: its models are gone.")
    expect(panel_tab.locator(".inferkit-panel")).to_have_count(0)
    sidebar.button("Show the panel again", panel_tab).click()
    said = "No model 'shown' is loaded" if end == "changed" else "The notebook has no kernel."
    expect(panel_tab).to_contain_text(said)
    reveal(sidebar, "own.ipynb")


def test_the_panel_in_a_tab_is_there_after_a_reload_while_a_cell_runs(
    sidebar: Sidebar, panel_tab: Locator
) -> None:
    """JupyterLab asks each widget for its state where the kernel was too busy to tell of all."""
    cell = "import time\nfor _ in range(150): time.sleep(0.1)"
    sidebar.tab.page.evaluate(
        f"code => {{ {NOTEBOOK}.sessionContext.session.kernel.requestExecute({{code}}) }}", cell
    )
    reload(sidebar)
    expect(panel_tab).to_contain_text("Loading widget")
    expect(panel_tab.locator(".inferkit-panel .ik-about")).to_contain_text("shown is loaded")
    front(sidebar, "own.ipynb")


def test_the_panel_in_a_tab_follows_its_notebook_to_another_name(
    sidebar: Sidebar, panel_tab: Locator
) -> None:
    page = sidebar.tab.page
    label = page.locator(".lm-TabBar-tab:has-text('shown')")
    expect(label).to_have_attribute("title", "Inference panel of shown in own.ipynb")
    page.evaluate(f"{NOTEBOOK}.context.rename('renamed.ipynb')")
    expect(label).to_have_attribute("title", "Inference panel of shown in renamed.ipynb")
    sidebar.button("Panel", sidebar.model("renamed.ipynb", "shown")).click()
    expect(panel_tab).to_have_count(1)
    reload(sidebar)
    expect(panel_tab.locator(".inferkit-panel .ik-about")).to_contain_text("shown is loaded")
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    front(sidebar, "renamed.ipynb")


def test_the_panel_that_a_models_row_inserts_is_of_that_model(
    sidebar: Sidebar, tiny_model: TinyModel
) -> None:
    page = sidebar.tab.page
    front(sidebar, "second.ipynb")
    load = f"other = ik.load({str(tiny_model('gemma3'))!r}, name='other')"
    execute(sidebar, f"import inferkit as ik\n{load}")
    sidebar.button("Insert", sidebar.model("second.ipynb", "tiny")).click()
    panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .inferkit-panel .ik-about")
    expect(panel).to_contain_text("tiny is loaded")
    page.evaluate(f"{NOTEBOOK}.content.activeCellIndex = 1")
    sidebar.tab.command("notebook:delete-cell")
    execute(sidebar, "other.unload()")
    expect(sidebar.model("second.ipynb", "other")).to_have_count(0)


def test_the_panel_opens_in_a_tab_while_a_cell_runs(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    model = sidebar.model("first.ipynb", "demo")
    sidebar.tab.run(GENERATE)
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("1 running, 0 waiting")
    sidebar.button("Panel", model).click()
    tab = page.locator(".jp-Inferkit-tab")
    expect(tab.locator(".inferkit-panel .ik-about")).to_contain_text("demo is loaded")
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("1 running, 0 waiting")
    sidebar.button("Stop", model).click()
    expect(model.locator(".jp-Inferkit-requests")).to_have_text("0 running, 0 waiting")
    tab.locator("textarea").first.wait_for()
    page.locator(".lm-TabBar-tab:has-text('demo') .lm-TabBar-tabCloseIcon").click()
    expect(tab).to_have_count(0)
    front(sidebar, "first.ipynb")


def test_cells_of_the_magic_are_highlighted_as_markdown(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    cell = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell").nth(PROMPT)
    expect(cell.locator(".jp-Inferkit-magic")).to_have_text("%%infer --max-tokens 8")
    source = f"{NOTEBOOK}.content.widgets[{PROMPT}].model"
    page.wait_for_function(f"{source}.mimeType === 'text/x-ipythongfm'")
    word = cell.get_by_text("Markdown", exact=True)
    assert word.evaluate("word => getComputedStyle(word).fontStyle") == "italic"
    page.evaluate(f"{source}.sharedModel.setSource('def code(): pass')")
    page.wait_for_function(f"{source}.mimeType.includes('python')")
    expect(cell.locator(".jp-Inferkit-magic")).to_have_count(0)
    page.evaluate(f"{source}.sharedModel.setSource({json.dumps(CELLS[PROMPT])})")
    expect(cell.locator(".jp-Inferkit-magic")).to_have_count(1)


def test_the_magic_is_highlighted_in_each_view_of_a_notebook(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    magic = page.locator(".jp-NotebookPanel:visible .jp-Inferkit-magic")
    first = page.evaluate(f"{NOTEBOOK}.id")
    sidebar.tab.command("docmanager:clone")
    page.wait_for_function(f"{NOTEBOOK}.id !== {first!r}")
    try:
        expect(magic).to_have_count(2)
        source = f"{NOTEBOOK}.content.widgets[{PROMPT}].model"
        page.evaluate(f"{source}.sharedModel.setSource('def code(): pass')")
        page.wait_for_function(f"{source}.mimeType.includes('python')")
        expect(magic).to_have_count(0)
        page.evaluate(f"{source}.sharedModel.setSource({json.dumps(CELLS[PROMPT])})")
        expect(magic).to_have_count(2)
    finally:
        page.evaluate(f"{NOTEBOOK}.dispose()")
    page.wait_for_function(f"{NOTEBOOK}.id === {first!r}")
    expect(magic).to_have_count(1)
    page.wait_for_function(f"{source}.mimeType === 'text/x-ipythongfm'")


def test_stopping_with_nothing_running_says_so(sidebar: Sidebar) -> None:
    said = sidebar.tab.page.locator(".Toastify__toast")
    sidebar.tab.command("inferkit:stop")
    expect(said).to_have_text("Nothing is running.")
    expect(said).to_have_count(0)


def test_completion_of_the_magic_comes_from_the_kernel(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    page.evaluate(f"{NOTEBOOK}.content.activeCellIndex = {COMPLETE}")
    sidebar.tab.command("notebook:enter-edit-mode")
    page.keyboard.press("Control+End")
    page.keyboard.press("Tab")
    expect(page.locator(".jp-Completer:visible .jp-Completer-match")).to_have_text("load")
    page.keyboard.press("Enter")
    source = f"{NOTEBOOK}.content.activeCell.model.sharedModel"
    page.wait_for_function(f"{source}.getSource() === '%infer load'")
    page.evaluate(f"{source}.setSource('%infer lo')")
    sidebar.tab.command("notebook:enter-command-mode")


def test_the_toolbar_button_inserts_the_panel(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    front(sidebar, "second.ipynb")
    panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    panel.locator("jp-button[data-command='inferkit:panel']").click()
    expect(panel.locator(".inferkit-panel .ik-about")).to_contain_text("tiny is loaded")
    page.evaluate(f"{NOTEBOOK}.content.activeCellIndex = 1")
    sidebar.tab.command("notebook:delete-cell")


def test_the_experiment_is_shared_from_the_menu(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    front(sidebar, "second.ipynb")
    execute(
        sidebar, "with ik.record('mine', progress=False):\n    model.generate('Once', max_tokens=4)"
    )
    page.get_by_role("menuitem", name="Kernel").click()
    page.locator(".lm-Menu-item:has-text('Inference')").hover()
    page.locator(".lm-Menu-item:has-text('Share Experiment')").click()
    dialog = page.locator(".jp-Dialog:has-text('Share experiment')")
    expect(dialog).to_contain_text("Saved 'mine' to mine.inferkit.json")
    expect(dialog.locator("a")).to_have_attribute(
        "href", re.compile(r"^https://mybinder\.org/v2/gh/some/where/.*second\.ipynb$")
    )
    dialog.get_by_role("button", name="Close").click()
    assert ik.open(sidebar.lab.folder / "mine.inferkit.json").complete


def test_a_recording_that_runs_is_ended_by_sharing_only_when_that_is_confirmed(
    sidebar: Sidebar,
) -> None:
    page = sidebar.tab.page
    front(sidebar, "second.ipynb")
    execute(sidebar, "going = ik.record('going', progress=False)\ngoing.start()")
    row = sidebar.kernel("second.ipynb")
    sidebar.button("Share experiment “going”", row).click()
    dialog = page.locator(".jp-Dialog:has-text('Share experiment')")
    expect(dialog).to_contain_text("'going' is still being recorded. End it?")
    dialog.get_by_role("button", name="Cancel").click()
    execute(sidebar, "assert going.running")
    sidebar.button("Share experiment “going”", row).click()
    dialog.get_by_role("button", name="End and share").click()
    expect(dialog).to_contain_text("Ended the recording and saved 'going' to going.inferkit.json")
    dialog.get_by_role("button", name="Close").click()
    assert ik.open(sidebar.lab.folder / "going.inferkit.json").complete


def test_the_launcher_makes_a_notebook_with_the_panel(sidebar: Sidebar) -> None:
    page = sidebar.tab.page
    sidebar.tab.command("launcher:create")
    card = page.locator(".jp-LauncherCard:has-text('New inference notebook')")
    drawn = "icon => icon.decode().then(() => icon.naturalWidth)"
    assert card.locator("img").evaluate(drawn) > 0  # and no letter
    card.click()
    panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .inferkit-panel")
    expect(panel.locator(".ik-about")).to_be_visible()
    magic = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Inferkit-magic")
    expect(magic).to_contain_text("%%infer")
    page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    page.evaluate(f"{NOTEBOOK}.dispose()")


# -- how it looks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_reads_on_both_themes(sidebar: Sidebar, theme: str) -> None:
    sidebar.tab.change_theme(theme)
    try:
        assert sidebar.tab.least_contrast("#inferkit-lab *") >= (4.5, "")
        assert sidebar.tab.least_contrast(".jp-Inferkit-status *") >= (4.5, "")
    finally:
        sidebar.tab.change_theme(LIGHT)


def test_nothing_hangs_over_the_edge_of_a_narrow_sidebar(sidebar: Sidebar) -> None:
    width = sidebar.root.evaluate("root => root.getBoundingClientRect().width")
    assert width < 260  # JupyterLab's own
    sidebar.tab.wait_until_nothing_hangs_over("#inferkit-lab *", "#inferkit-lab")


@pytest.fixture
def answered(sidebar: Sidebar) -> Iterator[Callable[[Callable[[Route], None]], None]]:
    """Have the page's questions answered in another way."""
    yield lambda answer: sidebar.tab.page.route(f"**/{STATE}*", answer)
    sidebar.tab.page.unroute(f"**/{STATE}*")
    sidebar.tab.page.evaluate("jupyterapp.shell.activateById('inferkit-lab')")
    expect(sidebar.root.locator(".jp-Inferkit-problem")).to_have_count(0)


def test_what_the_server_lacks_is_said_and_forgotten_when_it_is_back(
    sidebar: Sidebar, answered: Callable[[Callable[[Route], None]], None]
) -> None:
    answered(lambda route: route.fulfill(status=404))
    problem = sidebar.root.locator(".jp-Inferkit-problem")
    expect(problem).to_contain_text("This Jupyter server has no inferkit")
    expect(problem).to_contain_text("What is shown is from before.")
    answered(lambda route: route.fulfill(body="<html>", content_type="text/html"))
    expect(problem).to_contain_text("perhaps a page to log in: reload the page.")
    whole = msgspec.to_builtins(sidebar.state())
    lacking = json.dumps(whole | {"kernels": [{"kernel_id": "a"}]})
    answered(lambda route: route.fulfill(body=lacking, content_type="application/json"))
    expect(problem).to_contain_text("restart the server.")
    answered(lambda route: route.abort())
    expect(problem).to_contain_text("The Jupyter server does not answer.")
    assert sidebar.kernels.count() == 2


def test_kernels_on_another_machine_are_said_to_be_out_of_sight(
    sidebar: Sidebar, answered: Callable[[Callable[[Route], None]], None]
) -> None:
    state = msgspec.structs.replace(sidebar.state(), kernels=[], out_of_sight=["a", "b"])
    body = msgspec.json.encode(state)
    answered(lambda route: route.fulfill(body=body, content_type="application/json"))
    expect(sidebar.root).to_contain_text("2 kernels run on another machine")
    expect(sidebar.root).not_to_contain_text("No kernel has a model.")


def test_fifty_kernels_are_shown_and_can_be_filtered(
    sidebar: Sidebar, installed: Installed
) -> None:
    [one] = [k for k in sidebar.state().kernels if (k.state and k.state.models[0].name == "tiny")]
    assert one.state is not None
    folder = Path(installed.variables["JUPYTER_RUNTIME_DIR"]) / "inferkit"
    made = []
    for number in range(50):
        state = msgspec.structs.replace(
            one.state, kernel_id=f"many{number}", notebook=f"many/n{number:02}.ipynb"
        )
        made.append(folder / f"many{number}.json")
        made[-1].write_bytes(msgspec.json.encode(state))
    try:
        expect(sidebar.kernels).to_have_count(52)
        sidebar.root.get_by_label("Models of n07.ipynb").click()
        expect(sidebar.button("Unload", sidebar.kernel("n07.ipynb"))).to_be_disabled()
        expect(sidebar.kernel("n07.ipynb")).to_contain_text("elsewhere")
        field = sidebar.root.get_by_label("Filter by notebook or model")
        field.fill("n07")
        expect(sidebar.kernels).to_have_count(1)
        field.fill("")
    finally:
        for path in made:
            path.unlink()
    expect(sidebar.kernels).to_have_count(2)


def test_outputs_of_a_panel_get_into_a_page_that_was_loaded_after_its_cell_ran(
    browser: Browser, served: Lab, tiny_model: TinyModel
) -> None:
    load = f"import inferkit as ik\nmodel = ik.load({str(tiny_model('llama'))!r}, name='tiny')"
    name = served.write("kept.ipynb", f"{load}\npanel = ik.Panel()\npanel")
    tab = open_notebook(browser, served, name)
    panel = tab.page.locator(".inferkit-panel")
    prompt = panel.locator("textarea.ik-prompt")

    def send(text: str) -> None:
        prompt.fill(text)
        prompt.press("Control+Enter")
        last = panel.locator(".ik-card").filter(has_text=text)
        expect(last.locator(".ik-state")).to_have_text(re.compile("length|stop"))

    def kept(kind: str) -> list[str]:
        """What the saved notebook has of a kind."""
        tab.save()
        [cell] = json.loads((served.folder / name).read_text())["cells"]
        outputs = [output.get("data", {}) for output in cell["outputs"]]
        return ["".join(data[kind]) for data in outputs if kind in data]

    def wait_until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, "the notebook does not have it"
            time.sleep(0.5)

    tab.run(0)
    send("before")
    expect.set_options(timeout=1000 * SECONDS)
    tab.save()
    prompt.fill("meanwhile")
    prompt.press("Control+Enter")
    tab.page.goto("about:blank")
    time.sleep(3)
    tab.page.go_back()
    tab.wait_until_ready()
    panel.locator(".ik-plot canvas").first.wait_for()
    wait_until(lambda: any(">meanwhile<" in html for html in kept("text/html")))
    send("after")
    wait_until(lambda: any(">after<" in html for html in kept("text/html")))
    assert len([html for html in kept("text/html") if "data-inferkit" in html]) == 1
    assert len(kept("image/svg+xml")) == 1
    for _ in range(2):
        panel.locator("button:text-is('Keep figure')").click()
    wait_until(lambda: len(kept(PLOTLY)) == 2)
    assert len(kept("image/svg+xml")) == 1
    tab.page.evaluate(f"{KERNEL}.shutdown()")
    tab.close()


def test_the_browsers_console_has_no_error(sidebar: Sidebar) -> None:
    # But for the answers that a test has kept from the page, and what JupyterLab says of a kernel
    # that it was asked to shut down.
    known = ("Failed to load resource", "Could not restore the debugger state")
    assert [error for error in sidebar.tab.errors if not error.startswith(known)] == []


# -- ends ------------------------------------------------------------------------------------------


def test_a_kernel_that_dies_ends_a_load_without_an_error_of_the_page(sidebar: Sidebar) -> None:
    page, name = sidebar.tab.page, "dies.ipynb"
    front(sidebar, sidebar.lab.write(name, ""))
    execute(sidebar, SLOW_LOAD)
    sidebar.tab.command("inferkit:load")
    sidebar.root.get_by_label("Model: demo").fill("demo")  # not what was loaded last
    sidebar.button("Load").click()
    expect(sidebar.kernel(name).locator(".jp-Inferkit-work")).to_contain_text("Loading demo")
    [pid] = [k.pid for k in sidebar.state().kernels if k.state and name in k.state.notebook]
    os.kill(pid, signal.SIGKILL)
    page.locator(".jp-Dialog:has-text('Kernel Restarting') button").click()
    expect(sidebar.told).to_contain_text("The kernel has ended or was restarted meanwhile.")
    sidebar.tab.wait_until_idle()
    sidebar.tab.wait_until_ready()
    # JupyterLab says more of it: what it had asked of the kernel for itself.
    assert not [error for error in sidebar.tab.errors if "connection disconnected" in error]
    page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    page.evaluate(f"{NOTEBOOK}.dispose()")
    expect(sidebar.kernels).to_have_count(2)


def test_unloading_gives_the_memory_back(sidebar: Sidebar) -> None:
    [kernel] = [k for k in sidebar.state().kernels if k.state and "first" in k.state.notebook]
    before = psutil.Process(kernel.pid).memory_info().rss
    sidebar.button("Unload", sidebar.model("first.ipynb", "demo")).click()
    expect(sidebar.kernel("first.ipynb")).to_contain_text("No model is loaded.")
    after = psutil.Process(kernel.pid).memory_info().rss
    assert before - after > 300e6
    wait_for(lambda: kernel.kernel_id in [k.kernel_id for k in sidebar.state().kernels])


def test_restarting_a_kernel_removes_its_row(sidebar: Sidebar) -> None:
    sidebar.tab.page.evaluate(f"{KERNEL}.restart()")
    expect(sidebar.kernel("first.ipynb")).to_have_count(0)
    expect(sidebar.kernels).to_have_count(1)


def test_a_closed_notebook_is_opened_from_its_kernel(sidebar: Sidebar) -> None:
    front(sidebar, "second.ipynb")
    sidebar.tab.save()
    sidebar.tab.command("application:close")
    sidebar.kernel("second.ipynb").locator("header button").click()
    sidebar.tab.page.wait_for_function(f"{NOTEBOOK}?.context?.path === 'second.ipynb'")
    sidebar.tab.wait_until_ready()


def test_a_killed_kernel_is_shown_no_longer(sidebar: Sidebar) -> None:
    [kernel] = sidebar.state().kernels
    os.kill(kernel.pid, 9)
    expect(sidebar.kernels).to_have_count(0)
    expect(sidebar.root).to_contain_text("No kernel has a model.")


def test_a_server_that_hangs_or_is_started_again_is_told_apart_from_one_that_answers(
    browser: Browser, installed: Installed, tmp_path: Path
) -> None:
    home, folder = tmp_path / "home", tmp_path / "notebooks"
    folder.mkdir()
    variables = installed.variables | {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    page = browser.new_page()
    root = page.locator("#inferkit-lab")
    gone = root.get_by_text("The Jupyter server does not answer.")
    with serve(home, folder, installed.python, variables) as lab:
        page.goto(f"{lab.url}/lab/workspaces/again?reset")
        page.wait_for_function("window.jupyterapp !== undefined")
        page.evaluate("jupyterapp.restored")
        page.evaluate("jupyterapp.shell.activateById('inferkit-lab')")
        expect(root).to_contain_text("No kernel has a model.")
        os.kill(lab.pid, signal.SIGSTOP)
        try:
            expect(gone).to_be_visible()
        finally:
            os.kill(lab.pid, signal.SIGCONT)
        expect(gone).to_have_count(0)
    expect(gone).to_be_visible()
    port = int(lab.url.rpartition(":")[2])
    with serve(home, folder, installed.python, variables, port):
        expect(gone).to_have_count(0, timeout=20_000)
        expect(root).to_contain_text("No kernel has a model.")
    page.close()
