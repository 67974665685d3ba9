"""A JupyterLab and a browser that shows its notebooks: what the browser tests stand on.

The fixtures ``lab`` and ``browser`` are in conftest.py.
"""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, sync_playwright

LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"

# Contrast as WCAG 2 defines it, of the text that each element has of its own with the nearest
# background behind it. What is hidden or disabled has no text that must be read.
_CONTRASTS = """selector => {
  const channels = css => css.match(/[\\d.]+/g).map((value, i) =>
    css.startsWith('color(srgb') && i < 3 ? 255 * value : +value);
  const light = rgb => {
    const [r, g, b] = rgb.map(c => c / 255)
      .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const own = e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
  const read = e => own(e) && !e.closest(':disabled, [aria-disabled=true]') && e.checkVisibility();
  return [...document.querySelectorAll(selector)].filter(read).map(e => {
    const style = getComputedStyle(e), back = behind(e);
    const ink = channels(e instanceof SVGElement ? style.fill : style.color);
    const cover = (ink[3] ?? 1) * opacity(e);
    const a = light(back.map((c, i) => cover * ink[i] + (1 - cover) * c)), b = light(back);
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 120)];
  });
}"""

# How far elements reach beyond the right edge of what holds them.
_OVERHANG = """([selector, holder]) => {
  const edge = document.querySelector(holder).getBoundingClientRect().right;
  const shown = [...document.querySelectorAll(selector)].filter(e => e.checkVisibility());
  if (!shown.length) throw new Error(`nothing is shown as ${selector}`);
  return Math.max(...shown.map(e => e.getBoundingClientRect().right - edge));
}"""

_READY = """async () => {
  await jupyterapp.restored;
  const pause = () => new Promise(done => setTimeout(done, 50));
  while (!jupyterapp.shell.currentWidget?.sessionContext) await pause();
  const session = jupyterapp.shell.currentWidget.sessionContext;
  await session.ready;
  while (!session.session?.kernel) await pause();
  await session.session.kernel.info;
}"""

# Notes what is drawn on each canvas since it was cleared last: the dots and the texts.
NOTE_WHAT_IS_PAINTED = """
  for (const name of ["clearRect", "fillRect", "fillText"]) {
    const draw = CanvasRenderingContext2D.prototype[name];
    CanvasRenderingContext2D.prototype[name] = function (...given) {
      if (name === "clearRect") this.canvas.painted = { dots: 0, texts: [] };
      else if (name === "fillRect") this.canvas.painted.dots++;
      else this.canvas.painted.texts.push(given[0]);
      return draw.apply(this, given);
    };
  }
"""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, the folder that it shows and its process."""

    url: str
    folder: Path
    pid: int

    def copy(self, source: Path, parts: Mapping[str, str] | None = None) -> str:
        """Put a notebook into the folder, without its outputs, and return its name.

        Args:
            source: The notebook.
            parts: Texts of its cells, which must be there, and what to put for them.
        """
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        for whole, part in (parts or {}).items():
            assert any(whole in cell.source for cell in notebook.cells), whole
            for cell in notebook.cells:
                cell.source = cell.source.replace(whole, part)
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
    """A notebook that is open in the browser.

    Attributes:
        page: The window.
        errors: What the browser's console has said of errors.
        hosts: Whom the page has asked for anything.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def command(self, name: str, arguments: dict[str, str] | None = None) -> None:
        """Run one of JupyterLab's commands; return when it is done."""
        self.page.evaluate(
            "async ([name, given]) => { await jupyterapp.commands.execute(name, given) }",
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

    def wait_until_ready(self) -> None:
        """Return when JupyterLab shows the notebook and its kernel answers."""
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.page.evaluate(_READY)

    def save(self) -> None:
        """Write the notebook to its file."""
        self.command("docmanager:save")

    def least_contrast(self, selector: str) -> tuple[float, str]:
        """The least contrast of text with what is behind it, and the element that has it."""
        # A figure is drawn anew in another theme.
        self.page.wait_for_function(f"({_CONTRASTS})({json.dumps(selector)}).length > 0")
        contrast, html = min(self.page.evaluate(_CONTRASTS, selector))
        return contrast, html

    def change_theme(self, theme: str) -> None:
        """Change to a theme of JupyterLab's; return when it is shown."""
        self.command("apputils:change-theme", {"theme": theme})
        self.page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
        # JupyterLab removes its splash a while after each change: twice, where another comes first.
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def wait_until_nothing_hangs_over(self, selector: str, holder: str = ".jp-Notebook") -> None:
        """Return when elements end where what holds them does."""
        self.page.wait_for_function(f"({_OVERHANG})({json.dumps([selector, holder])}) <= 0")

    def close(self) -> None:
        """Close the window and end the kernel, whose models would stay in memory."""
        self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()


@contextmanager
def serve(
    home: Path,
    folder: Path,
    python: str | Path = sys.executable,
    variables: Mapping[str, str] | None = None,
    port: int = 0,
) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, with settings of its own and no token.

    Args:
        home: For its settings.
        folder: The notebooks that it shows.
        python: Whose JupyterLab.
        variables: The environment to run it in; None for this process's.
        port: That of a server that was there before; 0 for any.
    """
    quiet = home / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True, exist_ok=True)
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    options = {
        "ServerApp.root_dir": str(folder),
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port or _free_port(),
        "ServerApp.port_retries": 0,
        "ServerApp.password": "",
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
    }
    command = [str(python), "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = dict(os.environ if variables is None else variables)
    environment |= {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home)}
    # As on Binder; and a few rows at a time are quicker so on every processor.
    environment["INFERKIT_DTYPE"] = "bfloat16"
    log = home / "server.log"
    with log.open("w") as lines:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=lines, stderr=lines)
    try:
        url = f"http://127.0.0.1:{options['ServerApp.port']}"
        _wait_until_up(f"{url}/api", server, log)
        yield Lab(url, folder, server.pid)
    finally:
        server.terminate()
        server.wait(30)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}") from None
            time.sleep(0.2)


@contextmanager
def browse(chromium: str) -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        found = playwright.chromium.launch(executable_path=chromium, args=options)
        yield found
        found.close()


def open_notebook(browser: Browser, lab: Lab, name: str, *, script: str = "") -> Tab:
    """Open a notebook in a workspace of its own; return when its kernel is ready.

    Args:
        browser: Where.
        lab: Whose notebook.
        name: Of its file.
        script: What the page runs before anything else.
    """
    tab = Tab(browser.new_page(viewport={"width": 1200, "height": 1000}))
    tab.page.set_default_timeout(60_000)
    if script:
        tab.page.add_init_script(script)
    tab.page.on("pageerror", lambda error: tab.errors.append(f"{error}\n{error.stack}"))
    tab.page.on(
        "console", lambda said: tab.errors.append(said.text) if said.type == "error" else None
    )
    # Other addresses, as of "data:", have no host.
    tab.page.on("request", lambda sent: tab.hosts.add(urlsplit(sent.url).hostname or ""))
    tab.page.on("websocket", lambda made: tab.hosts.add(urlsplit(made.url).hostname or ""))
    tab.page.goto(f"{lab.url}/lab/workspaces/{Path(name).stem}/tree/{name}?reset")
    tab.wait_until_ready()
    return tab
