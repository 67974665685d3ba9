"""The panel in a real JupyterLab: what is clicked and typed, and what a person sees of it.

Most tests share one notebook and its kernel; the fixture ``panel`` puts the panel back in order
before each. Those that restart a kernel or show two views have a notebook of their own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import nbformat
import pytest
from lab import DARK, LIGHT, NOTE_WHAT_IS_PAINTED, Lab, Tab, open_notebook
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.demo, pytest.mark.slow]

T = TypeVar("T")

PLAN = re.compile(r"^Plan: demo needs ([\d.]+) ([GM])iB on cpu and [\d.]+ GiB are free")
LOADED = re.compile(r"^\S+ is loaded: ")

SECONDS = 120  # for anything to happen, on a machine that does something else as well
WIDTH, HEIGHT = 1200, 6000  # all cells in sight: JupyterLab does not render what is far away
ONCE = "Once upon a time"
LONG = {"Max tokens": "1500", "Ignore end token": True}

CELLS = (
    "import time\nfrom pathlib import Path\nimport inferkit as ik\n%load_ext inferkit\nik.Panel()",
    "print('busy', flush=True)\n"
    "while not Path('go-on').exists():\n    time.sleep(0.05)\nprint('over')",
    f"gen = ik.models()[-1].generate({ONCE!r}, max_tokens=1500, ignore_eos=True)\n"
    "print(gen.finish_reason, gen.text == ik.models()[-1].last.text, len(gen.token_ids) > 0)",
    "%%infer --max-tokens 1500\nOne, two, three,",
    "gens = ik.models()[-1].generate(['One, two, three,', 'My name is'], max_tokens=8)\n"
    "print([gen.text for gen in gens])",
    "print(len(ik.models()), 'loaded')",
    # A kernel that takes long to answer.
    "from ipywidgets import Widget\n"
    "shown = [w for w in Widget.widgets.values() if isinstance(w, ik.Panel)][-1]\n"
    "shown.on_msg(shown._receive, remove=True)\n"
    "def slowly(*message):\n    time.sleep(1.5)\n    shown._receive(*message)\n"
    "shown.on_msg(slowly)",
    "shown.on_msg(slowly, remove=True)\nshown.on_msg(shown._receive)\n"
    "print(ik.models()[-1].speculative, shown._form['prompt'])",
)
PANEL, BUSY, GENERATE, MAGIC, PROMPTS, COUNT, SLOW, FAST = range(len(CELLS))

NOTEBOOK = "jupyterapp.shell.currentWidget.content"
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session.kernel"
FAILED = "[data-mime-type$='.error'], .jp-CodeCell:has(.inferkit-panel) [data-mime-type$='stderr']"

# The length of a request's text and the dots of the plot, as they are until the request ends.
WATCH = """async number => {
  const card = document.querySelector(`.ik-card[aria-label="Request ${number}"]`);
  const seen = [];
  const look = () => seen.push([
    card.querySelector('.ik-text').textContent.length,
    document.querySelector('.ik-plot canvas')?.painted?.dots ?? 0,
  ]);
  while (['waiting', 'running'].includes(card.querySelector('.ik-state').textContent)) {
    look();
    await new Promise(done => setTimeout(done, 30));
  }
  await new Promise(done => setTimeout(done, 300));  // the last redraw
  look();
  return seen;
}"""

COUNT_REDRAWS = """() => {
  window.redraws = 0;
  window.since = performance.now();
  document.addEventListener('inferkit-drawn', () => window.redraws++);
}"""
REDRAWS = "() => [window.redraws, (performance.now() - window.since) / 1000]"

# Presses Cancel as soon as there is one.
PRESS_CANCEL = """() => {
  const look = new MutationObserver(() => {
    const found = document.querySelector('.ik-work:not([hidden]) .ik-button');
    if (!found) return;
    look.disconnect();
    found.click();
    window.cancelled = true;
  });
  look.observe(document.querySelector('.ik-work'), { attributes: true, childList: true });
}"""


# -- the panel, by what is on it -------------------------------------------------------------------


@dataclass
class PanelView:
    """One view of a panel, and what a person does with it."""

    tab: Tab
    root: Locator

    def button(self, text: str) -> Locator:
        """A button of the panel's own, and of no card."""
        return self.root.locator(f".ik-button:not(.ik-small):text-is('{text}')")

    def field(self, label: str) -> Locator:
        return self.root.locator(f".ik-field:has(> label:text-is('{label}'))")

    def input(self, label: str) -> Locator:
        if label == "Copies":
            return self.root.get_by_label("Number of copies")
        return self.field(label).locator("input, textarea, select")

    def wrong(self, label: str) -> Locator:
        """The message at a field."""
        return self.field(label).locator(".ik-wrong")

    def mode(self, name: str, of: str | None = None) -> Locator:
        """A button of the toggles, or of the one of that label."""
        toggle = ".ik-segments" + (f"[aria-label='{of}']" if of else "")
        return self.root.locator(f"{toggle} button:text-is('{name}')")

    def fill(self, values: dict[str, str | bool]) -> None:
        for label, value in values.items():
            if isinstance(value, bool):
                box = self.root.locator(f".ik-check:has-text('{label}') input")
                box.evaluate("(box, on) => { if (box.checked !== on) box.click() }", value)
            elif self.input(label).input_value() != value:
                # One may be folded up, where a person would open it first.
                self.input(label).evaluate("e => e.closest('details')?.setAttribute('open', '')")
                self.input(label).fill(value)

    @property
    def about(self) -> Locator:
        return self.root.locator(".ik-about")

    @property
    def now(self) -> Locator:
        return self.root.locator(".ik-now")

    @property
    def failure(self) -> Locator:
        return self.root.locator(".ik-failure")

    @property
    def cards(self) -> Locator:
        return self.root.locator(".ik-card")

    def card(self, number: int) -> Card:
        return Card(self.root.locator(f".ik-card[aria-label='Request {number}']"))

    def newest(self) -> int:
        """The number of the newest request; 0 where there is none."""
        titles = self.cards.locator(".ik-title").all_inner_texts()
        return max((int(title.removeprefix("#")) for title in titles), default=0)

    def sent(self, send: Callable[[], object], count: int = 1) -> list[Card]:
        """The cards that appear when something is sent, in the order of sending."""
        before = self.newest()
        send()
        cards = [self.card(before + i) for i in range(1, count + 1)]
        expect(cards[-1].root).to_be_visible()
        return cards

    def press_send(self) -> None:
        """As it is sent from the keyboard."""
        self.input("Prompt").press("Control+Enter")

    def load(self) -> None:
        self.button("Load").click()
        expect(self.about).to_have_text(LOADED)
        expect(self.root.locator(".ik-work")).to_be_hidden()

    def unload(self) -> None:
        self.button("Unload").click()
        expect(self.about).to_contain_text("No model is loaded")

    def quantize(self, mode: str) -> None:
        self.mode(mode).click()
        expect(self.about).to_contain_text(f" · precision {mode} · ")
        expect(self.root.locator(".ik-work")).to_be_hidden()

    def figure(self) -> dict[str, Any]:
        """What "Keep figure" puts into the cell's output, as plotly has it."""
        figures = self.tab.page.locator(".js-plotly-plot")
        before = figures.count()
        self.button("Keep figure").click()
        expect(figures).to_have_count(before + 1)
        figures.last.locator(".main-svg").first.wait_for(state="attached")
        found: dict[str, Any] = figures.last.evaluate(
            "({data, layout}) => ({"
            "  traces: Object.fromEntries(data.map(({name, x}) => [name, x.length])),"
            "  marks: (layout.annotations ?? []).map(({text}) => text) })"
        )
        return found

    def painted_texts(self) -> list[str]:
        """What stands in the live plot."""
        canvas = self.root.locator(".ik-plot canvas").first
        texts: list[str] = canvas.evaluate("canvas => canvas.painted.texts")
        return texts


@dataclass
class Card:
    """A request as the panel shows it."""

    root: Locator

    @property
    def state(self) -> Locator:
        return self.root.locator(".ik-state")

    @property
    def facts(self) -> Locator:
        return self.root.locator("header .ik-faint")

    @property
    def text(self) -> str:
        return self.root.locator(".ik-text").inner_text()

    @property
    def tokens(self) -> int:
        found = re.search(r"(\d+) tokens", self.facts.inner_text())
        assert found is not None
        return int(found[1])

    def wait_for_text(self) -> None:
        expect(self.root.locator(".ik-text")).to_have_text(re.compile(r"(\S+\s+){3}"))

    def wait_for_end(self, status: str = "length") -> None:
        expect(self.state).to_have_text(status)


def view(tab: Tab, number: int = 0) -> PanelView:
    return PanelView(tab, tab.page.locator(".inferkit-panel").nth(number))


def wait_for(look: Callable[[], T | None]) -> T:
    """What a look gives as soon as it gives something."""
    deadline = time.monotonic() + SECONDS
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    expect.set_options(timeout=SECONDS * 1000)
    yield
    expect.set_options(timeout=None)


@pytest.fixture(scope="module")
def opened(browser: Browser, lab: Lab) -> Iterator[PanelView]:
    """The panel that most tests use, before any model is loaded."""
    name = lab.write("panel.ipynb", *CELLS)
    tab = open_notebook(browser, lab, name, script=NOTE_WHAT_IS_PAINTED)
    tab.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    tab.run(PANEL)
    shown = view(tab)
    expect(shown.about).to_be_visible()
    assert tab.errors == []
    yield shown
    tab.close()


@pytest.fixture
def tidy(opened: PanelView) -> Iterator[PanelView]:
    """The panel with nothing going on and its form as it is at first."""
    tab = opened.tab
    if opened.button("Stop").is_enabled():
        opened.button("Stop").click()
    if tab.page.evaluate(f"{KERNEL}.status === 'busy'"):  # a test has failed
        tab.stop()
    tab.wait_until_idle()
    tab.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    expect(opened.root.locator(".ik-work")).to_be_hidden()
    if opened.failure.is_visible():
        opened.button("Dismiss").click()
    opened.fill({"Model": "demo", "Max batch": "16", "Prompt": "", "Copies": "8"})
    opened.fill({"Max tokens": "64", "Temperature": "0", "Seed": "", "Ignore end token": False})
    said, failed = len(tab.errors), tab.page.locator(FAILED).count()
    yield opened
    assert tab.errors[said:] == []
    assert tab.page.locator(FAILED).count() == failed


@pytest.fixture
def empty(tidy: PanelView) -> PanelView:
    """The panel with no model."""
    if tidy.button("Unload").is_enabled():
        tidy.unload()
    tidy.mode("none").click()
    return tidy


@pytest.fixture
def panel(tidy: PanelView) -> PanelView:
    """The panel with the demo model, loaded by clicking."""
    if tidy.mode("none").get_attribute("aria-pressed") != "true":
        if tidy.button("Unload").is_enabled():
            tidy.unload()  # to load it again is faster than to change it
        tidy.mode("none").click()
    if not tidy.button("Unload").is_enabled():
        tidy.load()
    return tidy


# What has stood in a box at any frame, from now on.
NOTE_VALUES = """box => {
  window.values = new Set();
  const look = () => (window.values.add(box.value), requestAnimationFrame(look));
  look();
}"""


# -- loading and changing --------------------------------------------------------------------------


def test_a_plan_is_shown_before_the_model_is_loaded_by_a_click(empty: PanelView) -> None:
    plan = empty.root.locator(".ik-plan")

    def needed() -> float:
        expect(plan).to_have_text(PLAN)
        found = PLAN.search(plan.inner_text())
        assert found is not None
        return float(found[1]) * {"G": 1024, "M": 1}[found[2]]

    whole = needed()
    expect(empty.about).to_have_text("No model is loaded: choose one and press Load.")
    expect(empty.button("Send")).to_be_disabled()
    empty.mode("nf4").click()
    wait_for(lambda: needed() < whole or None)
    empty.mode("none").click()
    wait_for(lambda: needed() == whole or None)

    empty.button("Load").click()
    expect(empty.about).to_contain_text(  # the dtype depends on the processor
        re.compile(r"is loaded: cpu · (bfloat16|float32) · precision none · continuous batching")
    )
    expect(plan).to_be_hidden()
    expect(empty.root.locator(".ik-devices")).to_contain_text("this model")
    expect(empty.button("Send")).to_be_enabled()


def test_a_changed_precision_is_marked_and_holds_for_what_is_sent_next(panel: PanelView) -> None:
    panel.fill({"Prompt": ONCE, "Max tokens": "12"})
    [before] = panel.sent(panel.press_send)
    before.wait_for_end()
    expect(before.facts).to_contain_text(re.compile(r"TTFT [\d.]+ ms · TPOT [\d.]+ ms .*none$"))
    panel.quantize("nf4")
    [after] = panel.sent(panel.press_send)
    after.wait_for_end()
    expect(after.facts).to_contain_text(re.compile(r"nf4$"))
    assert "nf4" in panel.painted_texts()
    assert panel.figure()["marks"][-1] == "nf4"


def test_an_unknown_model_is_said_before_and_after_load_is_pressed(empty: PanelView) -> None:
    empty.fill({"Model": "nobody/nothing"})
    plan = empty.root.locator(".ik-plan.ik-no")
    expect(plan).to_contain_text("nobody/nothing")
    empty.button("Load").click()
    expect(empty.failure).to_contain_text("nobody/nothing")
    assert empty.root.locator(".ik-failure details").count() == 0  # no traceback
    expect(empty.about).to_contain_text("No model is loaded")
    empty.button("Dismiss").click()
    expect(empty.failure).to_be_hidden()
    empty.fill({"Model": ""})
    expect(empty.wrong("Model")).to_contain_text("Name a model")


def test_a_load_that_fails_as_planned_says_so_once(empty: PanelView) -> None:
    empty.fill({"Model": "/no/such/model"})
    plan = empty.root.locator(".ik-plan")
    expect(plan).to_contain_text("there is no /no/such/model")  # it looks for it first
    said = plan.inner_text()
    empty.button("Load").click()
    expect(empty.failure).to_contain_text(said)
    expect(plan).to_be_hidden()
    empty.button("Dismiss").click()
    expect(plan).to_be_visible()
    expect(plan).to_have_text(said)


def test_control_enter_at_the_model_sends_and_loads_nothing(empty: PanelView) -> None:
    empty.input("Model").press("Control+Enter")
    expect(empty.wrong("Prompt")).to_have_text("Load a model first.")
    expect(empty.root.locator(".ik-work")).to_be_hidden()
    expect(empty.about).to_contain_text("No model is loaded")


def test_what_a_prompt_lacked_is_forgotten_with_the_next_load(empty: PanelView) -> None:
    empty.input("Prompt").press("Control+Enter")
    expect(empty.wrong("Prompt")).to_have_text("Load a model first.")
    empty.fill({"Model": "/no/such/model"})
    empty.button("Load").click()
    expect(empty.failure).to_be_visible()
    expect(empty.wrong("Prompt")).to_be_hidden()
    empty.button("Dismiss").click()


def test_what_is_typed_and_chosen_stays_while_the_kernel_is_slow(panel: PanelView) -> None:
    tab, box = panel.tab, panel.input("Prompt")
    box.fill("Hello")
    tab.page.wait_for_timeout(1_000)
    tab.run(SLOW)
    tab.wait_until_idle()
    box.evaluate(NOTE_VALUES)
    box.press_sequentially(" wide")
    tab.page.wait_for_timeout(500)  # it is told of, and answered later
    panel.input("Temperature").click()
    box.press_sequentially(" world")
    panel.input("Temperature").click()
    panel.mode("ngram").click()
    panel.mode("off", "Speculation").click()
    expect(panel.mode("off", "Speculation")).to_have_attribute("aria-pressed", "true")
    tab.page.wait_for_timeout(6_000)  # the last answer
    assert box.input_value() == "Hello wide world"
    seen = tab.page.evaluate("[...values]")
    assert seen == sorted(seen, key=len)
    expect(panel.mode("off", "Speculation")).to_have_attribute("aria-pressed", "true")
    tab.run(FAST)
    tab.wait_for_output(FAST, "off Hello wide world")


def test_what_an_empty_field_means_stands_in_it(empty: PanelView) -> None:
    empty.fill({"Context": "", "Max batch": ""})
    for label, usual in (("Context", "4096"), ("Max batch", "16"), ("Max tokens", "64")):
        expect(empty.input(label)).to_have_attribute("placeholder", usual)


def test_cancel_ends_a_load_and_leaves_no_model(empty: PanelView) -> None:
    empty.tab.page.evaluate(PRESS_CANCEL)
    empty.button("Load").click()
    empty.tab.page.wait_for_function("window.cancelled")
    expect(empty.root.locator(".ik-work")).to_be_hidden()
    expect(empty.about).to_contain_text("No model is loaded")
    expect(empty.failure).to_be_hidden()
    expect(empty.root.locator(".ik-plan")).to_contain_text("Plan: ")
    empty.tab.run(COUNT)
    empty.tab.wait_for_output(COUNT, "0 loaded")
    empty.load()


# -- sending ---------------------------------------------------------------------------------------


def test_text_and_plot_grow_while_tokens_come(panel: PanelView) -> None:
    panel.mode("All").click()
    panel.fill({"Prompt": ONCE, "Max tokens": "80", "Ignore end token": True})
    panel.tab.page.evaluate(COUNT_REDRAWS)
    [card] = panel.sent(panel.press_send)
    seen = panel.tab.page.evaluate(WATCH, panel.newest())
    redraws, seconds = panel.tab.page.evaluate(REDRAWS)
    assert 5 < redraws <= 10 * seconds + 3
    lengths, dots = ([*column] for column in zip(*seen))
    assert lengths == sorted(lengths)
    assert dots == sorted(dots)
    assert len(set(lengths)) > 5
    assert len(set(dots)) > 5
    card.wait_for_end()
    assert card.tokens == 80
    # Of 79 gaps a few are beyond the scale, and are drawn as triangles.
    assert 70 <= dots[-1] - dots[0] <= 79
    assert any(re.fullmatch(r"TTFT [\d.]+ ms", text) for text in panel.painted_texts())
    expect(panel.root.locator(".ik-summary")).to_contain_text("TPOT")


def test_eight_copies_run_at_once(panel: PanelView) -> None:
    panel.fill({"Prompt": ONCE, "Max tokens": "24", "Ignore end token": True})
    cards = panel.sent(panel.button("Send copies").click, 8)
    expect(panel.now).to_contain_text("8 running, 0 waiting")
    for card in cards:
        card.wait_for_end()
    assert len({card.text for card in cards}) == 1
    expect(panel.now).to_contain_text("0 running, 0 waiting")
    expect(panel.root.locator(".ik-summary")).to_contain_text("8 requests")


def test_those_that_run_stand_above_those_that_wait(panel: PanelView) -> None:
    panel.fill({"Max batch": "2"})
    panel.input("Max batch").press("Tab")
    expect(panel.about).to_contain_text("at most 2")
    panel.fill({"Prompt": ONCE, "Copies": "6", **LONG})
    cards = panel.sent(panel.button("Send copies").click, 6)
    cards[0].wait_for_text()
    states = panel.cards.locator(".ik-state").all_inner_texts()
    assert states[:2] == ["running", "running"]
    assert states[-4:] == ["waiting"] * 4
    panel.button("Stop").click()
    for card in cards:
        card.wait_for_end("cancelled")
    newest = panel.cards.locator(".ik-title").all_inner_texts()[:6]
    assert newest == [f"#{panel.newest() - i}" for i in range(6)]
    panel.fill({"Max batch": "16"})
    panel.input("Max batch").press("Tab")
    expect(panel.about).to_contain_text("at most 16")


def test_each_line_is_sent_as_a_prompt(panel: PanelView) -> None:
    panel.fill({"Prompt": "One, two, three,\n\nMy name is", "Max tokens": "4"})
    cards = panel.sent(panel.button("Send each line").click, 2)
    asked = [card.root.locator(".ik-asked").inner_text() for card in cards]
    assert asked == ["One, two, three,", "My name is"]
    for card in cards:
        card.wait_for_end()


# -- stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_keeps_the_text(panel: PanelView, way: str) -> None:
    panel.fill({"Prompt": ONCE, **LONG})
    [card] = panel.sent(panel.press_send)
    card.wait_for_text()
    text = card.text
    if way == "button":
        panel.button("Stop").click()
    else:
        panel.input("Prompt").press(way)
    card.wait_for_end("cancelled")
    assert card.text.startswith(text)
    assert 3 < card.tokens < 1500
    expect(panel.now).to_contain_text("0 running, 0 waiting")
    expect(panel.button("Stop")).to_be_disabled()


def test_a_card_stops_its_request_alone(panel: PanelView) -> None:
    panel.fill({"Prompt": ONCE, "Copies": "2", **LONG})
    first, second = panel.sent(panel.button("Send copies").click, 2)
    second.wait_for_text()
    first.root.get_by_role("button", name="Stop").click()
    first.wait_for_end("cancelled")
    expect(second.state).to_have_text("running")
    expect(panel.now).to_contain_text("1 running")


def test_prompts_are_sent_and_stopped_while_a_cell_runs(panel: PanelView, lab: Lab) -> None:
    (lab.folder / "go-on").unlink(missing_ok=True)
    panel.tab.run(BUSY)
    panel.tab.wait_for_output(BUSY, "busy")
    panel.fill({"Prompt": ONCE, **LONG})
    [card] = panel.sent(panel.press_send)
    card.wait_for_text()
    panel.button("Stop").click()
    card.wait_for_end("cancelled")
    assert panel.tab.output(BUSY).strip() == "busy"
    (lab.folder / "go-on").touch()
    panel.tab.wait_for_output(BUSY, "over")


def test_a_model_is_loaded_by_a_click_while_a_cell_runs(empty: PanelView, lab: Lab) -> None:
    (lab.folder / "go-on").unlink(missing_ok=True)
    empty.tab.run(BUSY)
    empty.tab.wait_for_output(BUSY, "busy")
    expect(empty.root.locator(".ik-plan")).to_have_text(PLAN)
    empty.press_send()
    expect(empty.wrong("Prompt")).to_have_text("Load a model first.")
    empty.load()
    assert empty.tab.output(BUSY).strip() == "busy"
    (lab.folder / "go-on").touch()
    empty.tab.wait_for_output(BUSY, "over")


def test_an_interrupt_of_the_kernel_ends_a_prompt_of_the_magic(panel: PanelView) -> None:
    [card] = panel.sent(lambda: panel.tab.run(MAGIC))
    card.wait_for_text()
    panel.tab.stop()
    card.wait_for_end("cancelled")
    shown = panel.tab.wait_for_output(MAGIC, "Interrupted")
    assert card.text.strip()[:20] in shown


def test_stop_ends_the_generation_of_a_cell(panel: PanelView) -> None:
    [card] = panel.sent(lambda: panel.tab.run(GENERATE))
    card.wait_for_text()
    panel.button("Stop").click()
    card.wait_for_end("cancelled")
    panel.tab.wait_for_output(GENERATE, "cancelled True True")


def test_stop_ends_a_prompt_of_the_magic(panel: PanelView) -> None:
    [card] = panel.sent(lambda: panel.tab.run(MAGIC))
    card.wait_for_text()
    panel.button("Stop").click()
    card.wait_for_end("cancelled")
    shown = panel.tab.wait_for_output(MAGIC, r"cancelled\s+\d+")
    assert card.text.strip()[:30] in shown


# -- with cells ------------------------------------------------------------------------------------


def test_requests_of_a_cell_are_shown(panel: PanelView) -> None:
    cards = panel.sent(lambda: panel.tab.run(PROMPTS), 2)
    for card in cards:
        card.wait_for_end()
        expect(card.facts).to_contain_text("from a cell · 8 tokens")
    assert panel.tab.wait_for_output(PROMPTS, r"\]").strip() == str([c.text for c in cards])


@pytest.mark.parametrize("seed", ["", "random"])
def test_copied_code_run_in_a_cell_gives_the_same_text(panel: PanelView, seed: str) -> None:
    page = panel.tab.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    temperature = "1" if seed else "0"
    panel.fill({"Prompt": 'My "name"\tis\\', "Copies": "3", "Max tokens": "16"})
    panel.fill({"Temperature": temperature, "Seed": seed})
    cards = panel.sent(panel.button("Send copies").click, 3)
    for card in cards:
        expect(card.state).to_have_text(re.compile("length|stop"))
    texts = [card.text for card in cards]
    assert len(set(texts)) == (3 if seed else 1)

    panel.button("Copy as code").click()
    expect(panel.root.locator(".ik-code")).to_contain_text("Copied: paste it into a cell.")
    code = panel.root.locator(".ik-code pre").inner_text()
    last = page.locator(".jp-CodeCell").count() - 1
    page.evaluate(f"{NOTEBOOK}.activeCellIndex = {last}")
    panel.tab.command("notebook:insert-cell-below")
    panel.tab.command("notebook:enter-edit-mode")
    page.keyboard.press("Control+V")
    assert page.evaluate(f"{NOTEBOOK}.activeCell.model.sharedModel.source") == code
    again = panel.sent(lambda: panel.tab.run(last + 1), 3)
    panel.tab.wait_until_idle()
    for card in again:
        expect(card.state).to_have_text(re.compile("length|stop"))
        expect(card.facts).to_contain_text("from a cell")
    assert [card.text for card in again] == texts
    panel.tab.run(COUNT)
    panel.tab.wait_for_output(COUNT, "1 loaded")  # the cell found the model that was there


def test_keep_figure_puts_the_plot_under_the_panel(panel: PanelView) -> None:
    panel.fill({"Prompt": ONCE, "Max tokens": "8", "Ignore end token": True})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    before = panel.figure()["traces"]
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    after = panel.figure()["traces"]
    assert after["ITL"] - before["ITL"] == 7
    assert after["TTFT"] - before["TTFT"] == 1
    assert panel.tab.cell(PANEL).locator(".js-plotly-plot").count() >= 2


def test_keys_that_are_typed_into_a_prompt_are_no_shortcuts(panel: PanelView) -> None:
    page = panel.tab.page
    cells, prompt = page.locator(".jp-Cell"), panel.input("Prompt")
    count, runs = cells.count(), page.locator(".jp-InputArea-prompt").all_inner_texts()
    prompt.click()
    for key in ("a", "b", "d", "d", "x", "m", "0", "0", "Enter", "z", "Shift+Enter", "Alt+Enter"):
        prompt.press(key)
    expect(prompt).to_have_value(re.compile(r"^abddxm00\nz\n*$"))
    typed = prompt.input_value()
    prompt.press("Control+Z")
    expect(prompt).not_to_have_value(typed)  # undone in the prompt, and in no cell
    assert cells.count() == count
    assert page.locator(".jp-InputArea-prompt").all_inner_texts() == runs
    assert page.locator(".jp-MarkdownCell").count() == 0


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "typed", "message"),
    [
        ("Max tokens", "x", "'x' is no whole number."),
        ("Max tokens", "0", "max_tokens"),
        ("Temperature", "hot", "'hot' is no number."),
        ("Temperature", "-1", "temperature"),
        ("Max batch", "0", "0 is too small; write 1 or more, as 16."),
        ("Context", "many", "'many' is no whole number; write one, as 4096."),
        ("Seed", "mine", "'mine' is no whole number; write one, or “random”."),
        ("Stop strings", '"open', "A quote is not closed, or is within a word."),
    ],
)
def test_what_is_wrong_is_said_at_the_field(
    panel: PanelView, label: str, typed: str, message: str
) -> None:
    former = panel.input(label).input_value()
    panel.fill({label: typed})
    expect(panel.wrong(label)).to_contain_text(message)
    expect(panel.input(label)).to_have_attribute("aria-invalid", "true")
    assert panel.root.locator(".ik-wrong:visible").count() == 1
    expect(panel.failure).to_be_hidden()
    panel.fill({label: former})
    expect(panel.wrong(label)).to_be_hidden()


def test_nothing_is_sent_with_a_wrong_field(panel: PanelView) -> None:
    before = panel.newest()
    panel.press_send()
    expect(panel.wrong("Prompt")).to_have_text("Write a prompt first.")
    panel.fill({"Prompt": ONCE})
    expect(panel.wrong("Prompt")).to_be_hidden()

    panel.fill({"Copies": "0"})
    panel.button("Send copies").click()
    copies = panel.root.locator("section > .ik-wrong")
    expect(copies).to_have_text("Copies: '0' is no number from 1 to 1000.")
    expect(panel.input("Copies")).to_have_attribute("aria-invalid", "true")

    panel.fill({"Copies": "8", "Temperature": "hot"})
    panel.press_send()
    expect(panel.wrong("Temperature")).to_have_text("'hot' is no number.")
    assert panel.newest() == before

    panel.fill({"Temperature": "0", "Max tokens": "2"})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    assert panel.root.locator(".ik-wrong:visible").count() == 0


# -- how it looks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_reads_on_both_themes(panel: PanelView, theme: str) -> None:
    panel.fill({"Prompt": ONCE, "Max tokens": "4"})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    panel.fill({"Temperature": "hot", "Model": "nobody/nothing"})
    panel.root.locator(".ik-plan.ik-no").wait_for()
    panel.wrong("Temperature").wait_for()
    panel.button("Copy as code").click()
    panel.tab.change_theme(theme)
    try:
        assert panel.tab.least_contrast(".inferkit-panel *") >= (4.5, "")
    finally:
        panel.tab.change_theme(LIGHT)


def test_nothing_hangs_over_the_edge_of_a_narrow_window(panel: PanelView) -> None:
    panel.fill({"Prompt": "wide" * 100, "Max tokens": "4"})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    panel.tab.page.set_viewport_size({"width": 600, "height": HEIGHT})
    panel.tab.wait_until_nothing_hangs_over(".inferkit-panel")
    panel.tab.wait_until_nothing_hangs_over(".inferkit-panel *", ".inferkit-panel")


def test_nothing_is_asked_of_another_machine(panel: PanelView) -> None:
    panel.fill({"Prompt": ONCE, "Max tokens": "4"})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    panel.figure()
    assert panel.tab.hosts - {""} == {"127.0.0.1"}


# -- what stays ------------------------------------------------------------------------------------


def test_a_saved_notebook_has_the_picture_and_the_requests(panel: PanelView, lab: Lab) -> None:
    panel.fill({"Prompt": "A prompt to be found", "Max tokens": "9", "Ignore end token": True})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    number = panel.newest()

    def saved() -> dict[str, str] | None:
        panel.tab.save()
        notebook = nbformat.read(lab.folder / "panel.ipynb", as_version=4)
        shown = [o.data for o in notebook.cells[PANEL].outputs if "data" in o]
        [picture] = [data["image/svg+xml"] for data in shown if "image/svg+xml" in data]
        [table] = [html for d in shown if "data-inferkit" in (html := d.get("text/html", ""))]
        row = re.search(rf">{number}<.*?</tr>", table)
        return {"picture": picture, "row": row[0]} if row else None

    found = wait_for(saved)
    assert found["picture"].startswith("<svg")
    assert len(re.findall(r"M[\d.]+ [\d.]+h0", found["picture"])) >= 8
    assert "l5 5l-5 5l-5 -5z" in found["picture"]  # a diamond, for a TTFT
    assert re.search(r">A prompt to be found<.*>length<.*>9<", found["row"])
    # Beside the live view they are not shown.
    kept = panel.tab.cell(PANEL).locator("img[src*='inferkit-'], [data-inferkit]")
    assert kept.count() == 2
    expect(kept.first).to_be_hidden()
    expect(kept.last).to_be_hidden()


def test_all_is_there_again_after_the_page_is_reloaded(panel: PanelView) -> None:
    panel.fill({"Prompt": ONCE, "Max tokens": "6", "Ignore end token": True})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    number, count, text = panel.newest(), panel.cards.count(), card.text
    panel.tab.save()
    panel.tab.page.reload()
    panel.tab.wait_until_ready()
    expect(card.state).to_have_text("length")
    assert panel.newest() == number
    assert panel.cards.count() == count
    assert card.text == text
    expect(panel.about).to_have_text(LOADED)
    expect(panel.input("Prompt")).to_have_value(ONCE)
    expect(panel.input("Max tokens")).to_have_value("6")
    panel.root.locator(".ik-plot canvas").first.wait_for()
    [again] = panel.sent(panel.press_send)
    again.wait_for_end()
    assert again.text == text


# -- notebooks of their own ------------------------------------------------------------------------


@pytest.fixture
def notebook(browser: Browser, lab: Lab) -> Iterator[Callable[..., Tab]]:
    """Open a notebook of these cells."""
    tabs: list[Tab] = []

    def opened(name: str, *cells: str) -> Tab:
        tab = open_notebook(browser, lab, lab.write(name, *cells), script=NOTE_WHAT_IS_PAINTED)
        tab.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        tabs.append(tab)
        return tab

    yield opened
    for tab in tabs:
        tab.close()


LOAD = (
    "import inferkit as ik\n"
    "model = ik.load('demo', batching='static', max_batch=2, progress=False)\n"
    f"gen = model.generate({ONCE!r}, max_tokens=4)"
)


def test_two_views_show_the_same_panel_over_a_loaded_model(
    notebook: Callable[..., Tab],
) -> None:
    tab = notebook("views.ipynb", f"{LOAD}\npanel = ik.Panel()\npanel", "panel")
    tab.run(0)
    one, two = view(tab, 0), view(tab, 1)
    expect(one.about).to_contain_text(
        " · precision none · static batching, at most 2 · context 4096"
    )
    tab.run(1)
    expect(two.about).to_have_text(LOADED)
    assert two.about.inner_text() == one.about.inner_text()
    for each in (one, two):
        expect(each.mode("static")).to_have_attribute("aria-pressed", "true")
        expect(each.input("Max batch")).to_have_value("2")

    one.input("Prompt").press_sequentially("My name")
    expect(two.input("Prompt")).to_have_value("My name")
    two.input("Prompt").press_sequentially(" is")
    expect(one.input("Prompt")).to_have_value("My name is")
    two.fill({"Max tokens": "5"})
    [card] = one.sent(two.press_send)
    card.wait_for_end()
    [same] = [two.card(two.newest())]
    same.wait_for_end()
    assert same.text == card.text
    assert one.cards.count() == two.cards.count()
    one.mode("off", "Batching").click()
    expect(two.about).to_contain_text("off batching")
    expect(two.mode("off", "Batching")).to_have_attribute("aria-pressed", "true")
    assert tab.errors == []


def test_a_panel_whose_kernel_was_restarted_says_so(notebook: Callable[..., Tab]) -> None:
    tab = notebook("restart.ipynb", f"{LOAD}\nik.Panel()")
    tab.run(0)
    panel = view(tab)
    expect(panel.about).to_have_text(LOADED)
    panel.fill({"Prompt": ONCE, "Max tokens": "4"})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    text = card.text
    panel.fill({"Max tokens": "2000", "Ignore end token": True})
    [running] = panel.sent(panel.press_send)
    expect(running.state).to_have_text("running")
    tab.start("notebook:restart-kernel")
    tab.page.locator(".jp-Dialog .jp-mod-accept").click()
    link = panel.root.locator(".ik-link")
    expect(link).to_contain_text("The kernel was restarted or shut down")
    expect(link).to_contain_text("Run its cell again for a new one")
    assert card.text == text
    expect(card.state).to_have_text("length")
    expect(running.state).to_have_text("lost")  # and nothing goes on
    expect(panel.root.locator(".ik-now")).to_contain_text("0 running, 0 waiting")
    for name in ("Load", "Unload", "Send", "Send copies", "Stop", "Keep figure"):
        expect(panel.button(name)).to_have_attribute("aria-disabled", "true")
    tab.wait_until_idle()
    assert tab.errors == []


def drag_over(page: Page, element: Locator) -> str:
    """What a person selects who drags the mouse over an element."""
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 1, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] - 1, steps=5)
    page.mouse.up()
    selected: str = page.evaluate("() => getSelection().toString()")
    return selected


def test_what_a_panel_without_a_kernel_shows_can_be_read_and_copied(
    notebook: Callable[..., Tab],
) -> None:
    tab = notebook("left.ipynb", f"{LOAD}\nik.Panel()")
    page = tab.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.run(0)
    panel = view(tab)
    panel.fill({"Prompt": ONCE, "Max tokens": "12"})
    [card] = panel.sent(panel.press_send)
    card.wait_for_end()
    text = card.text
    expect(panel.root.locator(".ik-summary")).to_be_visible()
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    expect(panel.root.locator(".ik-link")).to_contain_text("The kernel was restarted or shut down")

    answer = card.root.locator(".ik-text")
    assert drag_over(page, answer).strip() == text.strip()
    assert drag_over(page, panel.root.locator(".ik-summary")) != ""
    prompt = panel.input("Prompt")
    expect(prompt).not_to_be_editable()
    prompt.press("Control+a")
    prompt.press("Control+c")
    page.wait_for_function("async text => await navigator.clipboard.readText() === text", arg=ONCE)
    panel.button("Copy as code").click()
    expect(panel.root.locator(".ik-code [role=status]")).to_contain_text("Copied")
    assert ONCE in page.evaluate("navigator.clipboard.readText()")
    panel.root.locator(".ik-timeline summary").click()
    expect(panel.root.locator(".ik-timeline canvas").first).to_be_visible()
    panel.mode("All", "Time shown").click()
    expect(panel.mode("All", "Time shown")).to_have_attribute("aria-pressed", "true")

    before = panel.newest()
    for name in ("Send", "Load", "Stop"):
        expect(panel.button(name)).to_have_attribute("aria-disabled", "true")
    panel.button("Send").click(force=True)
    prompt.press("Control+Enter")
    panel.mode("nf4").click(force=True)
    expect(panel.mode("none")).to_have_attribute("aria-pressed", "true")
    assert panel.newest() == before
    assert tab.errors == []
