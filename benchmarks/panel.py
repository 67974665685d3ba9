"""What watching costs: the panel and its live plot, on and off in turn, in a real JupyterLab.

Two runs, each with one kernel and one model, whose rounds turn the panel on and off in turn:

kernel alone
    A client takes the messages and draws nothing, as if the browser ran on another computer, which
    is how people use a machine with GPUs. This is what the panel costs the model.
with the browser
    Chromium draws the panel on the same processors as the model. On a machine with few cores, and
    without a GPU to draw with, that takes processor time away from the model.

A *period* is the time from the begin of one decode step to the begin of the next. Ratios are of its
mean over a round, not of its median: a panel that works ten times a second disturbs one step in
three, which a median would not see.

*Delay* is from the engine's time stamp of a token to the frame that shows it. *First paint* is from
pressing Run, and from when the widget's place appears in the page, to the frame that shows it.

    python benchmarks/panel.py --model FOLDER [--rounds 8] [--plotly plotly-basic.min.js]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_notebook
from spread import Spread

_SETUP = """
import json, threading, time
from statistics import mean, median
import inferkit as ik
model = ik.load({path!r}, dtype="bfloat16", device="cpu", max_batch=16, context=1024,
                prefix_reuse=False, compile=False, progress=False)
panel, ticks = None, []

def measure(batch, tokens):
    engine = model._engine
    engine.steps.clear()
    ticks.clear()
    prompts = [[2, *range(1000 + 20 * i, 1015 + 20 * i)] for i in range(batch)]
    model.generate(prompts, max_tokens=tokens, temperature=0.0, ignore_eos=True)
    time.sleep(0.3)
    steps = [s for s in engine.steps if s.decode_tokens == batch and not s.prefill_tokens]
    periods = [(b.began - a.began) / 1e6 for a, b in zip(steps, steps[1:])]
    print(json.dumps({{"mean": mean(periods), "median": median(periods), "ticks": ticks[:]}}))

def on():
    global panel
    panel = ik.Panel(model)
    tick = panel._tick
    def timed():
        began = time.thread_time()
        busy = tick()
        if busy:
            ticks.append(1e3 * (time.thread_time() - began))
        return busy
    panel._tick = timed
    return panel

def off():
    global panel
    if panel is not None:
        panel.close()
        panel = None

def told():
    feed = panel._feed
    epoch = time.time() - (time.perf_counter_ns() - feed.epoch) * 1e-9
    print(json.dumps({{"epoch": epoch, "tokens": feed.tables["tokens"].rows[:, 0].tolist()}}))

def fill(count):
    import numpy as np
    feed = panel._feed
    with feed._lock:
        times = np.linspace(-600, -1, count)
        rng = np.random.default_rng(0)
        gaps = 40 + 8 * rng.standard_normal(count)
        owner = np.arange(count) % 16
        feed.tables["tokens"].extend(np.stack([times, gaps, owner], axis=1))
        few = times[::3]
        feed.tables["levels"].extend(np.stack([few, 0 * few + 40, 0 * few + 60], axis=1))
        steps = times[::4]
        zero = 0 * steps
        columns = [steps, zero + 35, zero, zero + 16, zero + 16, zero + 3, zero + 2e7]
        feed.tables["steps"].extend(np.stack(columns, axis=1))
    panel._receive(None, {{"type": "hello"}}, [])
print("ready")
"""

_LISTEN = """() => {
  window.drawn = [];
  document.addEventListener("inferkit-drawn", ({ detail }) =>
    requestAnimationFrame(() => window.drawn.push({ ...detail, at: Date.now() / 1e3 })));
}"""

# Asks for every frame, which costs a page that shows nothing new a tenth of a processor: only where
# frames are what is measured.
_COUNT_FRAMES = """() => {
  window.frames = [];
  let last = performance.now();
  const frame = (now) => (window.frames.push(now - last), last = now, requestAnimationFrame(frame));
  requestAnimationFrame(frame);
}"""

_FIRST_PAINT = """cell => new Promise((done) => {
  const began = performance.now();
  const before = new Set(document.querySelectorAll(".inferkit-panel"));
  const places = new Set(document.querySelectorAll(".jp-OutputArea-child"));
  let place = 0;
  const watcher = new MutationObserver(() => {
    const fresh = (selector, known) =>
      [...document.querySelectorAll(selector)].some((each) => !known.has(each));
    if (!place && fresh(".jp-OutputArea-child", places)) place = performance.now();
    if (!fresh(".inferkit-panel", before)) return;
    watcher.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => {
      const now = performance.now();
      done({ from_run: now - began, from_place: now - place });
    }));
  });
  watcher.observe(document.body, { childList: true, subtree: true });
  jupyterapp.shell.currentWidget.content.activeCellIndex = cell;
  jupyterapp.commands.execute("notebook:run-cell");
})"""


def ratios(off: Sequence[float], on: Sequence[float]) -> dict[str, Any]:
    """On against off within rounds: the median, and its 95 % bootstrap interval."""
    each = np.array(on) / np.array(off)
    drawn = np.random.default_rng(0).choice(each, (10_000, len(each)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return {
        "ratio": float(np.median(each)),
        "low": float(low),
        "high": float(high),
        "off_ms": asdict(Spread.of(off)),
        "on_ms": asdict(Spread.of(on)),
        "rounds": len(each),
    }


# -- a kernel whose messages nobody draws ---------------------------------------------------------


class Client:
    """A kernel and a client that takes its messages."""

    def __init__(self, setup: str) -> None:
        from jupyter_client.manager import start_new_kernel

        self._manager, self._client = start_new_kernel(kernel_name="python3")
        self.run(setup)

    def run(self, code: str) -> str:
        """What a cell prints."""
        printed: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])
            if message["msg_type"] == "error":
                raise RuntimeError("\n".join(message["content"]["traceback"]))

        self._client.execute_interactive(code, output_hook=hook, timeout=600)
        return "".join(printed).strip()

    def tell(self, comm: str, kind: str) -> None:
        """What a view in a browser would say."""
        data = {"method": "custom", "content": {"type": kind}}
        message = self._client.session.msg("comm_msg", {"comm_id": comm, "data": data})
        self._client.shell_channel.send(message)

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def kernel_alone(setup: str, batches: Sequence[int], tokens: int, rounds: int) -> list[Any]:
    """Rows per batch: the panel on against off, drawn by nobody."""
    client = Client(setup)
    try:
        found: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
        for number in range(rounds + 1):
            for batch in batches:
                pair: dict[str, Any] = {}
                for mode in ("off", "on") if number % 2 else ("on", "off"):
                    if mode == "on":
                        comm = client.run("on(); panel._start(); print(panel.comm.comm_id)")
                        client.tell(comm, "hello")
                    pair[mode] = json.loads(client.run(f"measure({batch}, {tokens})"))
                    client.run("off()")
                if number:
                    found[batch].append(pair)
        return [_row(batch, pairs) for batch, pairs in found.items()]
    finally:
        client.close()


def _row(batch: int, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_mode = {m: [p[m]["mean"] for p in pairs] for m in ("off", "on")}
    medians = {m: [p[m]["median"] for p in pairs] for m in ("off", "on")}
    ticks = [tick for p in pairs for tick in p["on"]["ticks"]]
    return {
        "batch": batch,
        **ratios(by_mode["off"], by_mode["on"]),
        "ratio_of_medians": ratios(medians["off"], medians["on"])["ratio"],
        "tick_cpu_ms": asdict(Spread.of(ticks)) if ticks else None,
    }


# -- a JupyterLab and a browser -------------------------------------------------------------------


@contextmanager
def jupyterlab(cells: Sequence[str]) -> Iterator[Any]:
    """A page that shows a notebook of these cells, with its kernel ready."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        raise SystemExit("No Chromium on PATH: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        notebook = new_notebook(cells=list(map(new_code_cell, cells)), metadata=metadata)
        nbformat.write(notebook, Path(folder) / "bench.ipynb")
        options = {
            "ServerApp.root_dir": folder,
            "ServerApp.port": port,
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.password": "",
            "IdentityProvider.token": "",
            "LabApp.expose_app_in_browser": True,
        }
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=os.environ | {"JUPYTER_CONFIG_DIR": folder, "JUPYTER_DATA_DIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_until_up(f"http://127.0.0.1:{port}/api")
            with sync_playwright() as playwright:
                arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
                browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
                page = browser.new_page(viewport={"width": 1200, "height": 1400})
                page.set_default_timeout(120_000)
                page.goto(f"http://127.0.0.1:{port}/lab/tree/bench.ipynb?reset")
                page.wait_for_function("window.jupyterapp !== undefined")
                page.evaluate(
                    """async () => {
                      await jupyterapp.restored;
                      const pause = () => new Promise((done) => setTimeout(done, 50));
                      while (!jupyterapp.shell.currentWidget?.sessionContext) await pause();
                      const session = jupyterapp.shell.currentWidget.sessionContext;
                      await session.ready;
                      while (!session.session?.kernel) await pause();
                      await session.session.kernel.info;
                    }"""
                )
                page.evaluate(_LISTEN)
                yield page
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _wait_until_up(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def run_cell(page: Any, cell: int, source: str | None = None) -> str:
    """Run a cell, with another source if one is given; what it prints."""
    page.evaluate(
        """async ([cell, source]) => {
          const { content } = jupyterapp.shell.currentWidget;
          content.activeCellIndex = cell;
          if (source !== null) content.activeCell.model.sharedModel.setSource(source);
          await jupyterapp.commands.execute("notebook:run-cell");
        }""",
        [cell, source],
    )
    outputs = page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea-output")
    return "".join(outputs.all_inner_texts()).strip()


def with_browser(setup: str, batches: Sequence[int], tokens: int, rounds: int) -> dict[str, Any]:
    """The panel on against off where Chromium draws it; delays, first paint, many points."""
    cells = [setup, "on()", "", "on()"]
    with jupyterlab(cells) as page:
        run_cell(page, 0)
        paints = [page.evaluate(_FIRST_PAINT, 1)]
        found: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
        delays: dict[int, list[float]] = {batch: [] for batch in batches}
        for number in range(rounds + 1):
            for batch in batches:
                pair: dict[str, Any] = {}
                for mode in ("off", "on") if number % 2 else ("on", "off"):
                    run_cell(page, 2, "off()")
                    if mode == "on":
                        run_cell(page, 2, "off()")
                        paints.append(page.evaluate(_FIRST_PAINT, 1))
                        page.evaluate("drawn.length = 0")
                    pair[mode] = json.loads(run_cell(page, 2, f"measure({batch}, {tokens})"))
                    if mode == "on":
                        told = json.loads(run_cell(page, 2, "told()"))
                        delays[batch] += _delays(told, page.evaluate("drawn"))
                if number:
                    found[batch].append(pair)
        many = _many_points(page, tokens)
    return {
        "rows": [_row(batch, pairs) for batch, pairs in found.items()],
        "delay_ms": {batch: _quantiles(values) for batch, values in delays.items()},
        "first_paint_ms": {
            "first_in_page": paints[0],
            "later": {
                name: asdict(Spread.of(p[name] for p in paints[1:]))
                for name in ("from_run", "from_place")
            },
        },
        "many_points": many,
    }


def _delays(told: dict[str, Any], drawn: Sequence[dict[str, float]]) -> list[float]:
    """From each token's time stamp to the first frame that had it, in ms."""
    newest = np.array([each["newest"] for each in drawn])
    shown = np.array([each["at"] for each in drawn]) - told["epoch"]
    delays = []
    for moment in told["tokens"]:
        at = int(np.searchsorted(newest, moment - 1e-9))
        if at < len(shown):
            delays.append(1e3 * (shown[at] - moment))
    return delays


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "count": len(values)}


def _many_points(page: Any, tokens: int) -> dict[str, Any]:
    """Redraws while a full table grows and all of it is shown."""
    run_cell(page, 2, "off()")
    page.evaluate(_FIRST_PAINT, 1)
    run_cell(page, 2, "fill(19_000)")
    page.locator(".inferkit-panel button:text-is('All')").click()
    page.evaluate("drawn.length = 0")
    page.evaluate(_COUNT_FRAMES)
    run_cell(page, 2, f"measure(16, {tokens})")
    drawn, frames = page.evaluate("drawn"), page.evaluate("frames")
    return {
        "points": max(each["tokens"] for each in drawn),
        "redraw_ms": _quantiles([each["ms"] for each in drawn]),
        "redraws": len(drawn),
        "frame_gap_ms": _quantiles(frames),
    }


# -- uPlot beside plotly --------------------------------------------------------------------------

_LIBRARY = """async ([name, points]) => {
  const x = Float64Array.from({ length: points }, (_, i) => i / 30);
  const y = x.map((_, i) => 40 + 8 * Math.sin(i) + (i % 7));
  const element = document.createElement("div");
  document.body.append(element);
  const frame = () =>
    new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  let began = performance.now(), redraw;
  if (name === "uPlot") {
    const plot = new uPlot({ width: 900, height: 260, scales: { x: { time: false } },
      series: [{}, { stroke: "#0072B2", points: { show: true, size: 3 }, paths: () => null }] },
      [x, y], element);
    redraw = () => plot.setData([x, y]);
  } else {
    const trace = { x, y, mode: "markers", type: "scatter", marker: { size: 3 } };
    await Plotly.newPlot(element, [trace], { width: 900, height: 260 });
    redraw = () => Plotly.react(element, [{ ...trace, x: x.slice(), y: y.slice() }],
      { width: 900, height: 260, datarevision: Math.random() });
  }
  await frame();
  const first = performance.now() - began;
  const times = [];
  for (let i = 0; i < 20; i++) {
    began = performance.now();
    await redraw();
    await frame();
    times.push(performance.now() - began);
  }
  element.remove();
  return { first, times };
}"""


def libraries(files: dict[str, Path], points: int) -> dict[str, Any]:
    """Bytes, evaluation, first draw and redraws of as many dots, in a page of their own."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    found = {}
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for name, path in files.items():
            page = browser.new_page()
            source = path.read_text(encoding="utf-8")
            page.goto("about:blank")
            evaluated = page.evaluate(
                """source => { const began = performance.now();
                  const script = document.createElement("script");
                  script.textContent = source; document.head.append(script);
                  return performance.now() - began; }""",
                source,
            )
            drawn = page.evaluate(_LIBRARY, [name, points])
            found[name] = {
                "bytes": path.stat().st_size,
                "evaluate_ms": evaluated,
                "first_draw_ms": drawn["first"],
                "redraw_ms": asdict(Spread.of(drawn["times"])),
            }
            page.close()
        browser.close()
    return found


def measure(
    path: str,
    threads: int,
    tokens: int = 96,
    rounds: int = 8,
    batches: Sequence[int] = (1, 16),
    plotly: str | None = None,
) -> dict[str, Any]:
    """All of it, as plain data."""
    from inferkit.notebook import assets
    from inferkit.notebook.panel import Panel

    setup = f"import torch\ntorch.set_num_threads({threads})" + _SETUP.format(path=path)
    found: dict[str, Any] = {
        "kernel_alone": kernel_alone(setup, batches, tokens, rounds),
        "with_browser": with_browser(setup, batches, tokens, rounds),
    }
    static = Path(assets.__file__).parent / "static"
    files = {"uPlot": static / "uplot.iife.min.js"}
    if plotly:
        files["plotly"] = Path(plotly)
    found["libraries"] = libraries(files, 20_000)
    found["module_bytes"] = len(str(Panel._esm).encode())
    return found


def main() -> None:
    """Measure by the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; the demo model where none is given")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--plotly", help="a plotly.js bundle to compare uPlot with")
    asked = parser.parse_args()
    if asked.model is None:
        from inferkit import catalog

        asked.model = str(catalog.resolve("demo").path)
    found = measure(asked.model, asked.threads, asked.tokens, asked.rounds, plotly=asked.plotly)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(**json.loads(sys.argv[1]))))
    else:
        main()
