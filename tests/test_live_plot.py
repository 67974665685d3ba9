"""What the live plot and the cards draw of a kernel's messages, in a browser without a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from lab import NOTE_WHAT_IS_PAINTED
from playwright.sync_api import Browser, Page, expect

from inferkit.notebook import assets

pytestmark = pytest.mark.browser

# A store, the plot and the cards, and a way to tell them something.
VIEW = """
let told;
const hear = (name, listener) => name === "msg:custom" && (told = listener);
const store = createStore({ on: hear, send() {} });
const button = (text, title, click) => h("button", { onclick: click }, text);
const cards = createCards(store, () => {}, button);
const plot = createPlot(store, document.body, cards.draw);
document.body.append(plot.element, cards.element, cards.others);
const made = {}; // as the plot keeps it from one redraw to the next
const tell = (message, buffers) => told(message, buffers.map((each) => new Float64Array(each)));
"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 800, "height": 600})
    opened.add_init_script(NOTE_WHAT_IS_PAINTED)
    opened.goto("data:text/html,<body></body>")
    opened.add_script_tag(content=assets.script(*assets.PLOT, "cards.js") + VIEW)
    yield opened
    opened.close()


def tell(page: Page, *, now: dict[str, Any], requests: Sequence[Any] = (), **tables: Any) -> None:
    """What the kernel sends, at a present of which only what matters is given."""
    usual = {"rate": 0, "p50": None, "p99": None, "running": 0, "waiting": 0, "capacity": 0}
    message = {
        "type": "update",
        "whole": False,
        "now": usual | now,
        "tables": [{"name": name, "reset": False} for name in tables],
        "marks": [],
        "requests": list(requests),
    }
    buffers = [[number for row in rows for number in row] for rows in tables.values()]
    page.evaluate("([message, buffers]) => tell(message, buffers)", [message, buffers])


def requests(status: str, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """What the kernel tells of requests that all stand alike."""
    same = {"status": status, "prompt": "Once", "text": "x", "tokens": 1, "origin": "panel"}
    return [{"number": number, **same} for number in numbers]


def step(began: float, seconds: float, running: int, waiting: int = 0, kv: int = 0) -> list[float]:
    return [began, 1e3 * seconds, 0, running, running, waiting, kv]


def occupancy(page: Page) -> list[list[float]]:
    """The rows of the line of occupancy from the first step on: time, running, waiting."""
    columns = page.evaluate(
        "() => stepwise(store.tables.steps, [RUNNING, WAITING], made, present(store))"
    )
    return [list(row) for row in zip(*columns, strict=True)][1:]


def levels(page: Page, rows: Sequence[Sequence[float]]) -> list[float | None]:
    """The p50 that is drawn for rows of time, p50 and p99; None where the line breaks."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    drawn: list[float | None] = page.evaluate("columns => broken(columns, {})[1]", columns)
    return drawn


def test_quantiles_of_a_slow_model_are_a_line(page: Page) -> None:
    slow = [[2.5 * i, 2500.0, 2600.0] for i in range(1, 6)]
    assert levels(page, slow) == [2500.0] * 5
    quick = [[1.0, 20.0, 30.0], [1.1, 20.0, 30.0], [3.0, 20.0, 30.0]]
    assert levels(page, quick) == [20.0, 20.0, None, 20.0]


def test_occupancy_goes_on_to_the_present_during_a_long_step(page: Page) -> None:
    tell(page, now={"time": 1.1, "running": 1}, steps=[step(1.0, 0.1, running=1)])
    tell(page, now={"time": 4.0, "running": 16, "waiting": 3})
    assert occupancy(page) == [[1.0, 1, 0], [1.1, 16, 3], [4.0, 16, 3]]
    tell(page, now={"time": 9.0, "running": 16, "waiting": 3})
    assert occupancy(page)[-1] == [9.0, 16, 3]
    tell(page, now={"time": 9.2}, steps=[step(1.1, 8.0, running=16, waiting=3)])
    assert occupancy(page) == [[1.0, 1, 0], [1.1, 16, 3], [pytest.approx(9.1), 0, 0]]


def test_nothing_ran_before_what_began_of_late(page: Page) -> None:
    tell(page, now={"time": 1.2}, steps=[step(1.0, 0.1, running=1)])
    tell(page, now={"time": 5.0, "running": 2})
    tell(page, now={"time": 7.0, "running": 2})
    assert occupancy(page) == [[1.0, 1, 0], [1.1, 0, 0], [5.0, 2, 0], [7.0, 2, 0]]


def test_a_row_without_tokens_is_waiting_and_no_step(page: Page) -> None:
    stood = [1.1, 900.0, 0, 0, 0, 3, 0]
    tell(page, now={"time": 2.2}, steps=[step(1.0, 0.1, 2, 3), stood, step(2.0, 0.1, 2, 1)])
    assert occupancy(page)[:3] == [[1.0, 2, 3], [1.1, 0, 3], [2.0, 2, 1]]
    whether = "() => [0, 1, 2].map(row => isStep(store.tables.steps, row))"
    assert page.evaluate(whether) == [True, False, True]


def test_what_was_of_late_is_forgotten_when_nothing_comes_but_a_beat(page: Page) -> None:
    tell(page, now={"time": 1.2, "p50": 31.0, "p99": 40.0}, steps=[step(1.0, 0.1, running=1)])
    legend = page.locator(".ik-legend").first
    expect(legend).to_contain_text("p50 31.0 ms")
    later = {"time": 12.0, "rate": 0, "p50": None, "p99": None, "running": 0, "waiting": 0}
    page.evaluate("now => told({ type: 'beat', now })", later | {"capacity": 0})
    expect(legend).not_to_contain_text("31.0 ms")


def test_the_plot_ends_at_the_present_while_requests_run(page: Page) -> None:
    begun = [[5.0, 100.0, 1]]
    tell(page, now={"time": 5.0, "running": 1}, steps=[step(0.5, 4.5, running=1)], firsts=begun)
    painted = "labels => labels.every(label => [...document.querySelectorAll('canvas')].some("
    painted += "canvas => canvas.painted?.texts.includes(label)))"
    page.wait_for_function(painted, arg=["4 s"])
    tell(page, now={"time": 25.0, "running": 1})
    page.wait_for_function(painted, arg=["20 s", "25 s"])


def test_requests_that_are_not_shown_are_counted_though_the_store_has_forgotten_them(
    page: Page,
) -> None:
    ended = requests("length", range(1, 301))
    tell(page, now={"time": 1.0}, requests=ended, firsts=[[1.0, 10.0, 1]])
    page.wait_for_function("document.querySelectorAll('.ik-card').length === 100")
    assert page.get_by_text("200 more requests are not shown.").is_visible()
    assert "1 token" in page.locator(".ik-card").first.inner_text()
    assert "1 tokens" not in page.locator(".ik-card").first.inner_text()


def test_those_that_wait_have_cards_beside_those_that_have_ended(page: Page) -> None:
    running, waiting = range(301, 305), range(305, 425)
    told = [*requests("length", range(1, 301)), *requests("running", running)]
    tell(page, now={"time": 1.0}, requests=[*told, *requests("waiting", waiting)])
    page.wait_for_function("document.querySelectorAll('.ik-card').length === 100")
    titles = page.locator(".ik-card .ik-title").all_inner_texts()
    shown = [int(title.removeprefix("#")) for title in titles]
    assert shown == [304, 303, 302, 301, *range(300, 252, -1), *waiting[:48]]
    assert page.get_by_text("324 more requests are not shown.").is_visible()
