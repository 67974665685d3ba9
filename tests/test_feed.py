"""What live views read: that a `Feed` tells all of every request, once, and what the engine says.

The models are small and random; where a test must decide what happens between two lines of the
feed, requests are played by hand (`Played`) on an engine that is none.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from held import held, wait_until

import inferkit as ik
from inferkit.engine.cache import SlotCache
from inferkit.engine.detokenize import Detokenizer
from inferkit.engine.request import Request
from inferkit.generation import Settings
from inferkit.kv import LayerKV
from inferkit.notebook import feed as feeds
from inferkit.notebook.feed import COLUMNS, Feed, Update, origin
from inferkit.notebook.tables import Table
from inferkit.sampling import Sampled, SamplingParams

SIX = {"max_tokens": 6, "ignore_eos": True}
LONG = {"max_tokens": 200, "ignore_eos": True}
OPTIONS = {"dtype": "float32", "context": 256, "max_batch": 4, "progress": False}
PROMPTS = ["Once upon a time", [5, 6, 7], "A prompt is a question"]
POISON = 66  # a token that a test makes fail
SECOND = 10**9
SETTINGS = Settings(
    model="played",
    device="cpu",
    dtype="float32",
    quantization="none",
    batching="continuous",
    max_batch=1,
)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    with ik.load(tiny_model("llama"), **OPTIONS, name="shared") as loaded:
        yield loaded
        assert not loaded._engine.on_submit


@pytest.fixture
def own(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    """A model for one test alone, which may change it."""
    with ik.load(tiny_model("llama"), **OPTIONS, name="own") as loaded:
        yield loaded


@pytest.fixture
def feed() -> Iterator[Feed]:
    made = Feed(threading.Event())
    yield made
    made.listen(False)


@pytest.fixture
def watching(feed: Feed, model: ik.Model) -> Feed:
    feed.attach(model)
    return feed


class View:
    """What a browser knows that was told all updates, as its store.js puts them together."""

    def __init__(self) -> None:
        self.tables: dict[str, list[list[float]]] = {name: [] for name in COLUMNS}
        self.requests: dict[int, dict[str, Any]] = {}
        self.marks: list[tuple[float, str]] = []
        self.resets = 0

    def take(self, update: Update) -> View:
        for name, rows in update.tables.items():
            if name in update.reset:
                self.tables[name] = []
                self.resets += 1
            self.tables[name] += rows.tolist()
        for told in update.requests:
            known = self.requests.setdefault(told["number"], {"text": ""})
            text = told.get("text", known["text"] + told.get("add", ""))
            known |= {**told, "text": text}
            known.pop("add", None)
        self.marks += update.marks
        return self

    def gaps(self, number: int) -> list[float]:
        """The ITLs of one request, in ms."""
        return [gap for _, gap, whose in self.tables["tokens"] if whose == number]

    def count(self, number: int) -> int:
        """Its tokens in the tables."""
        rows = self.tables["tokens"] + self.tables["firsts"]
        return sum(whose == number for *_, whose in rows)

    def times(self, name: str) -> list[float]:
        return [row[0] for row in self.tables[name]]

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.marks]


def check(view: View, number: int, gen: ik.Generation) -> None:
    """A view knows all of a request, as the request itself has it."""
    told, latency = view.requests[number], gen.latency
    assert view.gaps(number) == pytest.approx([1e3 * gap for gap in latency.itl])
    firsts = [ttft for _, ttft, whose in view.tables["firsts"] if whose == number]
    assert firsts == ([] if latency.ttft is None else pytest.approx([1e3 * latency.ttft]))
    assert told["tokens"] == view.count(number) == len(gen.token_ids)
    assert told["text"] == gen.text
    assert told["status"] == gen.finish_reason
    assert told["error"] == (str(gen.error) if gen.error else None)
    assert told["mode"] == gen.settings.quantization
    for name in ("queue", "ttft", "tpot", "e2e"):
        value = getattr(latency, name)
        assert told["ms"][name] == (None if value is None else pytest.approx(1e3 * value))


def end(requests: Sequence[Request]) -> list[ik.Generation]:
    return [r.result(60) for r in requests]


class Played(Request):
    """A request that a test takes through its life.

    Attributes:
        while_read: Called once, in the middle of a poll: when its times have been read.
    """

    def __init__(self, arrival: int | None = None, prompt: Sequence[int] = (5, 6)) -> None:
        super().__init__(
            None,
            tuple(prompt),
            SamplingParams(),
            SETTINGS,
            Detokenizer(None, prompt, ()),
            lambda: None,
            arrival=arrival,
        )
        self.while_read: Callable[[], None] | None = None

    def token(self, moment: int | None = None) -> None:
        now = time.perf_counter_ns() if moment is None else moment
        self.schedule(self.arrival, 0)
        self.emit(Sampled(7), now, end=False)

    def times_since(self, index: int) -> list[int]:
        times = super().times_since(index)
        work, self.while_read = self.while_read, None
        if work is not None:
            work()
        return times


def stage(*requests: Request, name: str = "played") -> Any:
    """A model whose engine has these requests, and takes more by ``submit``."""
    engine = SimpleNamespace(
        on_submit=[],
        requests=list(requests),
        steps_since=lambda moment: [],
        running=0,
        waiting=0,
        kv_capacity=0,
    )
    engine.submit = lambda *new: [heard(new) for heard in engine.on_submit]
    return SimpleNamespace(
        name=name,
        plan=SimpleNamespace(format="none"),
        batching="continuous",
        max_batch=1,
        context=64,
        compilation=False,
        speculative="off",
        _engine=engine,
        submit=engine.submit,
    )


# -- numbers and text -----------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_requests(watching: Feed, model: ik.Model) -> None:
    gens = model.generate(PROMPTS, **SIX)
    view = View().take(watching.poll())
    assert sorted(view.requests) == [1, 2, 3]
    for number, gen in enumerate(gens, 1):
        check(view, number, gen)
        first = (gen.latency.trace.tokens[0] - watching.epoch) * 1e-9
        assert [t for t, _, n in view.tables["firsts"] if n == number] == pytest.approx([first])
    assert [view.requests[n]["prompt"] for n in (1, 2, 3)] == [
        PROMPTS[0],
        "3 token ids",
        PROMPTS[2],
    ]
    assert not watching.poll()


def test_each_token_is_told_once_in_polls_between_its_steps(
    watching: Feed, model: ik.Model
) -> None:
    view, polls = View(), 0
    with held(model) as hold:
        requests = model.submit(PROMPTS, max_tokens=20, ignore_eos=True)
        hold.wait()
        for steps in (0, 1, 1, 3, 0, 5):
            hold.step(steps)
            update = watching.poll()
            polls += bool(update)
            view.take(update)
            for number, request in enumerate(requests, 1):
                assert view.count(number) == view.requests[number]["tokens"] == request.generated
                assert view.requests[number]["text"] == request.text
                assert "ms" not in view.requests[number]
    gens = end(requests)
    view.take(watching.poll())
    assert polls == 5  # the one that nothing happened before told nothing
    assert view.resets == 0
    for number, gen in enumerate(gens, 1):
        check(view, number, gen)


def test_a_snapshot_has_what_the_polls_told(watching: Feed, model: ik.Model) -> None:
    view = View()
    with held(model) as hold:
        running, waits = model.submit("Once", **LONG), model.submit("Twice", **LONG)
        hold.wait()
        hold.step(4)
        view.take(watching.poll())
        whole = View().take(watching.snapshot())
        assert whole.tables == view.tables
        assert whole.requests == view.requests
        assert whole.requests[1]["text"] == running.text != ""
        hold.step(2)
        running.cancel()
        waits.cancel()
    gens = end([running, waits])
    snapshot = watching.snapshot()  # of what no poll has told as well
    assert set(snapshot.reset) == set(snapshot.tables) == set(COLUMNS)
    for number, gen in enumerate(gens, 1):
        check(View().take(snapshot), number, gen)
        check(whole.take(snapshot), number, gen)
    assert not watching.poll()


def test_a_peek_takes_nothing_from_who_polls(
    watching: Feed, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in watching.tables.values():
        monkeypatch.setattr(table, "_rows", table._rows[:32])  # thinned on the way
    view = View()
    with held(model) as hold:
        request = model.submit("Once", max_tokens=60, ignore_eos=True)
        hold.wait()
        for step in range(50):
            hold.step()
            peeked = View().take(watching.peek())
            assert peeked.count(1) > 0
            if step % 3 == 2:
                view.take(watching.poll())
                assert view.tables["tokens"] == watching.tables["tokens"].rows.tolist()
                assert view.requests[1]["text"] == request.text
        assert view.resets
    gen = request.result(60)
    assert View().take(watching.peek()).requests[1]["status"] == "length"
    view.take(watching.poll())
    assert view.requests == View().take(watching.snapshot()).requests
    assert view.requests[1]["text"] == gen.text
    assert view.tables == peeked.take(watching.peek()).tables
    assert not watching.poll()


def test_after_a_snapshot_a_poll_tells_nothing_twice(watching: Feed, model: ik.Model) -> None:
    with held(model) as hold:
        request = model.submit("Once", **SIX)
        hold.wait()
        hold.step(2)
        watching.peek()
        view = View().take(watching.snapshot())
        hold.step()
        view.take(watching.poll())
    gen = request.result(60)
    check(view.take(watching.poll()), 1, gen)


def test_a_snapshot_does_not_change_when_the_feed_goes_on(watching: Feed, model: ik.Model) -> None:
    model.generate("Once", **SIX)
    before = watching.snapshot().tables["tokens"]
    copy = before.copy()
    watching.tables["tokens"].rows[:] = -1
    assert np.array_equal(before, copy)


def test_steps_are_those_of_the_engine(watching: Feed, model: ik.Model) -> None:
    gens = model.generate(PROMPTS, **SIX)
    first = watching.poll().tables["steps"]
    model.generate("Once", **SIX)
    wait_until(lambda: not model._engine.running)
    wait_until(lambda: len(model._engine.steps_since(watching.epoch)) == len(first) + 6)
    rows = np.concatenate([first, watching.poll().tables["steps"]])
    steps = model._engine.steps_since(watching.epoch)
    assert len(rows) == len(steps)
    for row, step in zip(rows, steps, strict=True):
        named = dict(zip(COLUMNS["steps"], row, strict=True))
        assert named["time"] == pytest.approx((step.began - watching.epoch) * 1e-9)
        assert named["duration"] == pytest.approx((step.ended - step.began) * 1e-6)
        assert (named["prefill"], named["decode"]) == (step.prefill_tokens, step.decode_tokens)
        assert (named["running"], named["waiting"]) == (step.running, step.waiting)
        assert named["kv"] == step.kv_bytes
    assert first[:, 3].sum() == sum(len(g.token_ids) - 1 for g in gens)


def test_requests_that_wait_while_none_runs_are_rows_without_tokens(feed: Feed) -> None:
    time.sleep(0.1)  # in which nobody waited
    arrived = time.perf_counter_ns()
    model = stage(Played(arrival=arrived), Played(arrival=arrived + 1))
    feed.attach(model)
    model._engine.waiting = 2
    assert "steps" not in feed.poll().tables  # a moment is no wait
    time.sleep(0.06)
    [row] = feed.poll().tables["steps"]
    assert row[0] == pytest.approx((arrived - feed.epoch) / 1e9)
    assert row[1] >= 60
    assert list(row[2:]) == [0, 0, 0, 2, 0]
    time.sleep(0.06)
    [later] = feed.poll().tables["steps"]
    assert later[0] == pytest.approx(row[0] + row[1] / 1e3)
    model._engine.running = 1
    time.sleep(0.06)
    assert "steps" not in feed.poll().tables


def test_a_request_that_ends_while_it_is_read_is_told_whole(feed: Feed) -> None:
    request = Played()

    def ends() -> None:
        request.token()
        request.finish("length")

    request.token()
    request.while_read = ends
    feed.attach(stage(request))
    view = View().take(feed.poll())
    assert view.requests[1]["status"] == "running"
    assert view.requests[1]["tokens"] == 1
    view.take(feed.poll())
    check(view, 1, request.result(0))


def test_a_snapshot_tells_no_end_before_the_tokens(feed: Feed) -> None:
    request = Played()

    def ends() -> None:
        request.token()
        request.finish("stop")

    request.token()
    request.while_read = ends
    feed.attach(stage(request))
    (told,) = feed.snapshot().requests
    assert (told["status"], told["tokens"]) == ("running", 1)
    assert "ms" not in told


def test_rows_come_in_the_order_of_time_though_steps_end_while_requests_are_read(
    feed: Feed,
) -> None:
    a, b = Played(), Played()
    for _ in range(2):
        a.token(), b.token()

    def steps() -> None:
        for _ in range(3):
            now = time.perf_counter_ns()
            a.token(now), b.token(now)

    feed.attach(stage(a, b))
    view = View()
    for _ in range(4):
        a.while_read = steps  # what a has then is read by the next poll, and so must be b's
        view.take(feed.poll())
    view.take(feed.poll())
    assert view.count(1) == view.count(2) == a.generated == b.generated == 14
    assert view.times("tokens") == sorted(view.times("tokens"))
    assert view.resets == 0


def test_tokens_that_ended_long_before_a_poll_are_put_where_they_belong(feed: Feed) -> None:
    now = time.perf_counter_ns()
    known = Played(now - 10 * SECOND)
    for second in range(8):
        known.token(now - (9 - second) * SECOND)
    feed.attach(stage(known))
    view = View().take(feed.poll())
    older = Played(now - 12 * SECOND)
    for second in range(11):
        older.token(now - (11 - second) * SECOND - 1000)
    feed.attach(stage(older))
    view.take(feed.poll())
    assert view.resets == 2  # of tokens and of firsts
    assert view.tables == View().take(feed.snapshot()).tables
    assert (view.count(1), view.count(2)) == (8, 11)
    for name in ("tokens", "firsts"):
        assert view.times(name) == sorted(view.times(name))
    assert feed.now()["rate"] == 1 / feeds.RATE_WINDOW


# -- statuses -------------------------------------------------------------------------------------


def test_a_request_waits_runs_and_ends(watching: Feed, model: ik.Model) -> None:
    statuses: list[list[str]] = []

    def look() -> None:
        view.take(watching.poll())
        statuses.append([view.requests[n]["status"] for n in sorted(view.requests)])

    view = View()
    model.configure(batching="off")
    try:
        with held(model) as hold:
            first, second = model.submit("Once", **SIX), model.submit("Twice", **SIX)
            hold.wait()
            look()
            hold.step()
            look()
        end([first, second])
    finally:
        model.configure(batching="continuous")
    look()
    assert statuses == [["running", "waiting"], ["running", "waiting"], ["length", "length"]]


def test_cancelled_requests_keep_what_they_have(watching: Feed, model: ik.Model) -> None:
    model.configure(batching="off")
    try:
        with held(model) as hold:
            running, waiting = model.submit("Once", **LONG), model.submit("Twice", **LONG)
            hold.wait()
            hold.step(4)
            running.cancel()
            waiting.cancel()
        gens = end([running, waiting])
    finally:
        model.configure(batching="continuous")
    view = View().take(watching.poll())
    assert [g.finish_reason for g in gens] == ["cancelled", "cancelled"]
    for number, gen in enumerate(gens, 1):
        check(view, number, gen)
    assert view.count(1) >= 4
    assert view.count(2) == 0
    assert view.requests[2]["ms"] == dict.fromkeys(("queue", "ttft", "tpot", "e2e"))


def test_an_error_is_told(watching: Feed, model: ik.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model._engine.runner.prefill

    def prefill(chunks: Sequence[Any]) -> torch.Tensor:
        if any(POISON in c.tokens for c in chunks):
            raise ValueError("broken")
        return real(chunks)

    monkeypatch.setattr(model._engine.runner, "prefill", prefill)
    good, bad = end([model.submit("Once", **SIX), model.submit([POISON, 5], **SIX)])
    view = View().take(watching.poll())
    check(view, 1, good)
    check(view, 2, bad)
    assert view.requests[2]["status"] == "error"
    assert "broken" in view.requests[2]["error"]


def test_a_request_says_where_it_was_submitted(watching: Feed, model: ik.Model) -> None:
    with origin("panel"):
        other = threading.Thread(target=lambda: end([model.submit("Other", **SIX)]))
        other.start()
        other.join(60)
        clicked = model.submit("Clicked", **SIX)
        watching.poll()  # however soon
    typed = model.submit("Typed", **SIX)
    end([clicked, typed])
    view = View().take(watching.snapshot())
    origins = {told["prompt"]: told["origin"] for told in view.requests.values()}
    assert origins == {"Other": "cell", "Clicked": "panel", "Typed": "cell"}


def test_an_origin_ends_with_its_block_though_that_fails(watching: Feed, model: ik.Model) -> None:
    with pytest.raises(ik.PromptError), origin("panel"):
        model.submit([], **SIX)
    end([model.submit("Typed", **SIX)])
    assert watching.snapshot().requests[0]["origin"] == "cell"


# -- tables ---------------------------------------------------------------------------------------


def rows_of(values: Sequence[float], start: int = 0) -> np.ndarray:
    """Rows of time, value and a number that marks the row."""
    times = np.arange(start, start + len(values), dtype=float)
    return np.stack([times, values, times], axis=1)


def test_a_table_keeps_all_rows_up_to_its_limit() -> None:
    table = Table(3, limit=64)
    rows = rows_of(np.random.default_rng(0).random(64))
    for start in range(0, 64, 7):
        assert not table.extend(rows[start : start + 7])
    assert np.array_equal(table.rows, rows)
    assert len(table) == 64
    assert not table.thinned


@pytest.mark.parametrize("limit", [8, 30, 64, 101])
@pytest.mark.parametrize("part", [1, 7, 33, 500])
def test_a_thinned_table_keeps_order_new_rows_and_extremes(limit: int, part: int) -> None:
    generator = np.random.default_rng(limit + part)
    rows = rows_of(generator.permutation(500).astype(float))
    table, thinned = Table(3, limit), False
    for start in range(0, len(rows), part):
        thinned |= table.extend(rows[start : start + part])
        assert len(table) <= limit
    kept = table.rows
    assert thinned
    assert table.thinned
    assert len(kept) > limit // 2
    assert np.all(np.diff(kept[:, 0]) > 0)
    assert np.array_equal(kept, rows[kept[:, 2].astype(int)])  # whole rows, as they were added
    assert {kept[:, 1].min(), kept[:, 1].max()} == {0, 499}
    assert np.array_equal(kept[-limit // 4 :], rows[-limit // 4 :])


def test_thinning_keeps_the_least_and_greatest_of_every_four_in_the_older_half() -> None:
    table = Table(3, limit=16)
    old = [1, 9, 5, 3, 8, 2, 4, 7]
    table.extend(rows_of([*old, *range(8)]))
    assert table.extend(rows_of([50], start=16))
    assert table.rows[:, 1].tolist() == [1, 9, 8, 2, *range(8), 50]


def test_equal_values_are_thinned_to_two_different_rows_of_four() -> None:
    table = Table(3, limit=16)
    table.extend(rows_of([5.0] * 16))
    assert table.extend(rows_of([5.0], start=16))
    assert len(table) == 13
    assert len(set(table.rows[:, 0])) == 13


def test_more_rows_than_thinning_makes_room_for_do_fit() -> None:
    table = Table(3, limit=64)
    rows = rows_of(np.arange(64 + 32, dtype=float))
    table.extend(rows[:64])
    assert table.extend(rows[64:])
    assert np.array_equal(table.rows[-16:], rows[-16:])


def test_a_full_table_is_told_anew_and_later_rows_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Table.__init__, "__defaults__", (64,))
    feed, request, view = Feed(threading.Event()), Played(), View()
    feed.attach(stage(request))
    for _ in range(40):
        for _ in range(5):
            request.token()
        view.take(feed.poll())
        assert view.tables["tokens"] == feed.tables["tokens"].rows.tolist()
    assert view.resets > 2
    assert len(view.tables["tokens"]) <= 64
    gaps = np.diff(request.times_since(0)) * 1e-6
    assert max(view.gaps(1)) == pytest.approx(gaps.max())
    request.finish("length")
    view.take(feed.poll())
    assert view.requests[1]["tokens"] == 200


# -- rolling numbers ------------------------------------------------------------------------------


def test_levels_are_the_quantiles_of_the_last_ten_seconds() -> None:
    feed, generator = Feed(threading.Event()), np.random.default_rng(7)
    gaps = generator.exponential(0.1, 400)
    times = np.cumsum(gaps)
    start = time.perf_counter_ns() - round((times[-1] + 1) * SECOND)
    moments = [start + round(t * SECOND) for t in times]
    request = Played(start - SECOND)
    request.token(start)
    feed.attach(stage(request))
    feed.poll()
    shown = 0
    for count in (1, 5, 60, 34, 150, 150):
        for moment in moments[shown : shown + count]:
            request.token(moment)
        shown += count
        ((when, p50, p99),) = feed.poll().tables["levels"].tolist()
        window = times[:shown] >= times[shown - 1] - feeds.WINDOW
        expected = np.percentile(1e3 * gaps[:shown][window], (50, 99))
        assert (p50, p99) == pytest.approx(tuple(expected), rel=1e-6)
        assert when == pytest.approx((moments[shown - 1] - feed.epoch) * 1e-9)
    assert "levels" not in feed.poll().tables


def test_the_present_in_numbers(watching: Feed, model: ik.Model) -> None:
    before = watching.now()
    assert (before["p50"], before["p99"], before["rate"]) == (None, None, 0)
    model.configure(batching="off")
    try:
        with held(model) as hold:
            requests = [model.submit("Once", **LONG) for _ in range(3)]
            hold.wait()
            hold.step(9)
            watching.poll()
            now = watching.now()
            assert (now["running"], now["waiting"]) == (1, 2)
            assert now["capacity"] == model._engine.runner.cache.nbytes > 0
            age = now["time"] - (requests[0].arrival - watching.epoch) * 1e-9
            assert now["rate"] == pytest.approx(requests[0].generated / min(feeds.RATE_WINDOW, age))
            assert now["p99"] >= now["p50"] > 0
            assert now["time"] > before["time"]
            for request in requests:
                request.cancel()
        end(requests)
    finally:
        model.configure(batching="continuous")


def test_the_rate_is_that_of_the_last_two_seconds(feed: Feed) -> None:
    request = Played(time.perf_counter_ns() - 20 * SECOND)
    now = time.perf_counter_ns()
    for tenths in (90, 80, 40, 30, 25, 15, 10, 5):
        request.token(now - tenths * SECOND // 10)
    feed.attach(stage(request))
    feed.poll()
    assert feed.now()["rate"] == 3 / 2


def test_nothing_is_attached(feed: Feed) -> None:
    assert feed.model is None
    assert feed.facts() == {}
    assert not feed.poll()
    assert (feed.live, feed.run, feed.generations(), feed.find(1)) == ([], [], [], None)
    assert feed.now()["capacity"] == 0
    feed.attach(None)
    assert not feed.poll()
    assert set(feed.snapshot().tables) == set(COLUMNS)


# -- marks ----------------------------------------------------------------------------------------


def test_a_first_model_is_no_change(feed: Feed, model: ik.Model) -> None:
    feed.attach(model)
    model.generate("Once", **SIX)
    assert len(feed.run) == 1  # whoever looked at the requests first
    assert feed.poll().marks == []
    assert feed.facts() == {
        "model": "shared",
        "quantization": "none",
        "batching": "continuous",
        "max_batch": 4,
        "context": 256,
        "step": "eager step",
        "speculative": "speculation off",
    }


def test_changes_of_mode_are_marked_when_they_are_seen(
    own: ik.Model, model: ik.Model, feed: Feed
) -> None:
    feed.attach(own)
    own.generate("Once", **SIX)
    view = View().take(feed.poll())
    before = feed.now()["time"]
    for change in (
        lambda: own.quantize("nf4", progress=False),
        lambda: own.configure(batching="static", max_batch=2),
        lambda: own.configure(context=128),
        lambda: own.generate("Once", **SIX),
        own.unload,
        lambda: None,
        lambda: feed.attach(model),
        lambda: feed.attach(None),
    ):
        change()
        view.take(feed.poll())
    assert view.labels == [
        "nf4",
        "static, max batch 2",
        "context 128",
        "unloaded",
        "shared, none",
        "unloaded",
    ]
    times = [when for when, _ in view.marks]
    assert times == sorted(times)
    assert before < times[0]
    assert times[-1] < feed.now()["time"]
    assert View().take(feed.snapshot()).marks == view.marks
    assert view.requests[1]["mode"] == "none"
    assert view.requests[2]["mode"] == "nf4"


def test_a_change_is_marked_before_the_request_that_came_after_it(
    own: ik.Model, feed: Feed
) -> None:
    feed.attach(own)
    own.generate("Once", **SIX)
    view = View().take(feed.poll())
    own.configure(max_batch=2)
    request = own.submit("Once", **SIX)
    request.result()
    time.sleep(0.05)
    view.take(feed.poll())
    [(when, label)] = view.marks
    assert label == "max batch 2"
    assert when <= (request.arrival - feed.epoch) * 1e-9


def test_another_model_is_marked_at_once(feed: Feed) -> None:
    one, other = stage(name="one"), stage(name="other")
    feed.attach(one)
    one.submit(Played())
    feed.attach(other)
    assert View().take(feed.poll()).labels == ["other, none"]


# -- which model ----------------------------------------------------------------------------------


def test_requests_that_run_when_a_model_is_attached_are_told_from_their_first_token(
    feed: Feed, model: ik.Model
) -> None:
    with held(model) as hold:
        requests = [model.submit("Once", **SIX), model.submit("Twice", **SIX)]
        hold.wait()
        hold.step(2)
        feed.attach(model)
        requests.append(model.submit("Thrice", **SIX))
        assert feed.live == requests
        assert feed.run == requests
    gens = end(requests)
    view = View().take(feed.poll())
    for number, gen in enumerate(gens, 1):
        check(view, number, gen)


def test_after_another_is_attached_the_former_ones_requests_run_to_their_end(
    feed: Feed, model: ik.Model, own: ik.Model
) -> None:
    feed.attach(own)
    with held(own) as hold:
        first = own.submit("Once", **SIX)
        hold.wait()
        feed.attach(model)
        unheard = own.submit("Unheard", **SIX)
        second = model.submit("Twice", **SIX)
        end([second])
        view = View().take(feed.poll())
    view.take(feed.poll())
    end([first, unheard])
    view.take(feed.poll())
    assert sorted(view.requests) == [1, 2]
    check(view, 1, first.result())
    check(view, 2, second.result())
    assert feed.model is model
    assert own._engine.on_submit == []


def test_a_model_that_is_attached_again_has_its_requests_once(feed: Feed, model: ik.Model) -> None:
    with held(model) as hold:
        feed.attach(model)
        request = model.submit("Once", **SIX)
        hold.wait()
        hold.step()
        view = View().take(feed.poll())
        for each in (model, None, model):
            feed.attach(each)
            view.take(feed.poll())
    end([request])
    view.take(feed.poll())
    assert sorted(view.requests) == [1]
    check(view, 1, request.result())
    assert len(model._engine.on_submit) == 1


def test_a_request_is_told_once_though_it_is_heard_of_again_after_its_end(feed: Feed) -> None:
    # Who submits tells the listeners after the engine has begun.
    request = Played()
    request.token()
    model = stage(request)
    feed.attach(model)
    request.finish("length")
    view = View().take(feed.poll())
    model.submit(request)
    view.take(feed.poll())
    assert view.count(1) == 1
    assert sorted(view.requests) == [1]
    assert feed.run == [request]


def test_a_detached_feed_keeps_what_it_has(watching: Feed, model: ik.Model) -> None:
    gen = model.generate("Once", **SIX)
    watching.attach(None)
    model.generate("Unheard", **SIX)
    view = View().take(watching.snapshot())
    assert sorted(view.requests) == [1]
    check(view, 1, gen)
    assert watching.find(1).result() is gen
    assert watching.now()["capacity"] == 0


def test_a_closed_feed_hears_nothing(watching: Feed, model: ik.Model) -> None:
    watching.listen(False)
    watching.listen(False)
    model.generate("Once", **SIX)
    assert "firsts" not in watching.poll().tables
    assert watching.run == []


def test_an_unloaded_model_is_refused_and_the_former_one_stays(
    watching: Feed, model: ik.Model, own: ik.Model
) -> None:
    own.unload()
    with pytest.raises(ik.ModelUnloadedError):
        watching.attach(own)
    assert watching.model is model
    model.generate("Once", **SIX)
    assert len(watching.run) == 1


def test_requests_of_a_model_that_is_unloaded_end_cancelled(feed: Feed, own: ik.Model) -> None:
    feed.attach(own)
    with held(own) as hold:
        request = own.submit("Once", **LONG)
        hold.wait()
        hold.step(2)
        leaving = threading.Thread(target=own.unload)
        leaving.start()
        wait_until(lambda: not own.loaded)
        assert feed.facts() == {}
        hold.release()
        leaving.join(60)
    view = View().take(feed.poll())
    check(view, 1, request.result(60))
    assert view.requests[1]["status"] == "cancelled"
    assert feed.live == []
    now = feed.now()
    assert (now["running"], now["waiting"], now["capacity"]) == (0, 0, 0)


# -- runs and numbers -----------------------------------------------------------------------------


def test_a_run_begins_when_a_request_comes_to_an_idle_model(
    watching: Feed, model: ik.Model
) -> None:
    first = model.generate(PROMPTS, **SIX)
    assert watching.generations() == list(first)
    watching.poll()
    assert watching.live == []
    assert watching.generations() == list(first)  # the last run, where none is live
    second = model.generate("Once", **SIX)
    third = model.generate("Twice", **SIX)  # no poll between the two
    assert watching.generations() == [third]
    assert third is not second


def test_a_request_that_comes_while_another_runs_belongs_to_its_run(
    watching: Feed, model: ik.Model
) -> None:
    with held(model) as hold:
        long = model.submit("Once", max_tokens=30, ignore_eos=True)
        hold.wait()
        short = model.submit("Twice", **SIX)
        while not short.done:
            hold.step()
        watching.poll()
        assert watching.generations() == [short.result()]
        later = model.submit("Thrice", **SIX)
        assert watching.run == [long, short, later]
        assert watching.live == [long, later]
    gens = end([long, short, later])
    assert watching.generations() == gens  # in the order of coming, not of ending


def test_a_run_is_the_same_however_late_somebody_looks(feed: Feed) -> None:
    base = time.perf_counter_ns()
    a = Played(base)
    b = Played(base + 1)
    a.token(), b.token()
    a.finish("length"), b.finish("length")
    c = Played()
    model = stage()
    feed.attach(model)
    model.submit(a, b)
    model.submit(c)
    assert feed.run == [c]
    d = Played()  # while c runs
    c.token()
    c.finish("length")
    model.submit(d)
    assert feed.run == [c, d]


def test_ended_requests_are_forgotten_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_REQUESTS", 3)
    feed, model = Feed(threading.Event()), stage()
    feed.attach(model)
    requests = [Played() for _ in range(6)]
    model.submit(*requests)
    assert [feed.find(n) for n in range(8)] == [None, *requests, None]  # live ones are all known
    for request in requests[:5]:
        request.token()
        request.finish("length")
    view = View().take(feed.poll())
    assert sorted(view.requests) == [1, 2, 3, 4, 5, 6]
    assert feed.find(1) is None
    assert feed.find(2) is None
    assert [feed.find(n) for n in (3, 4, 5, 6)] == requests[2:]
    assert sorted(told["number"] for told in feed.snapshot().requests) == [3, 4, 5, 6]
    assert feed.generations() == [r.result() for r in requests[:5]]  # a run is whole
    assert len(feed.tables["firsts"]) == 5


# -- threads --------------------------------------------------------------------------------------


def test_polls_of_several_threads_lose_nothing(watching: Feed, model: ik.Model) -> None:
    updates: deque[Update] = deque()
    over = threading.Event()

    def poll() -> None:
        while not over.is_set():
            updates.append(watching.poll())
            time.sleep(0.0005)

    threads = [threading.Thread(target=poll) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        prompts = [[5 + n, 6, 7] for n in range(24)]
        waves = [
            model.submit(prompts[n : n + 6], max_tokens=25, ignore_eos=True)
            for n in range(0, 24, 6)
        ]
        requests = [request for wave in waves for request in wave]
        gens = end(requests)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    view = View()
    updates.append(watching.poll())
    for update in updates:  # not in order: a thread may have paused before it appended
        for name, rows in update.tables.items():
            assert name not in update.reset
            view.tables[name] += rows.tolist()
    whole = View().take(watching.snapshot())
    for name in COLUMNS:
        assert sorted(view.tables[name]) == sorted(whole.tables[name])
        assert whole.times(name) == sorted(whole.times(name))
    for number, gen in enumerate(gens, 1):
        check(whole, number, gen)
    added = {n: "" for n in range(1, 25)}
    for told in (told for update in updates for told in update.requests):
        added[told["number"]] += told["add"]
    assert [sorted(text) for text in added.values()] == [sorted(gen.text) for gen in gens]


def test_a_request_wakes_whoever_waits(model: ik.Model) -> None:
    wake = threading.Event()
    feed = Feed(wake)
    feed.attach(model)
    wake.clear()
    try:
        model.generate("Once", **SIX)
        assert wake.is_set()
    finally:
        feed.listen(False)


# -- what the engine tells ------------------------------------------------------------------------


def test_listeners_hear_of_requests_as_they_are_queued(model: ik.Model) -> None:
    engine, heard = model._engine, []

    def leaver(requests: Sequence[Request]) -> None:
        engine.on_submit.remove(leaver)

    def listener(requests: Sequence[Request]) -> None:
        heard.append((list(requests), threading.get_ident()))

    engine.on_submit += [leaver, listener]
    try:
        both = model.submit(["Once", "Twice"], **SIX)
        one = model.submit("Thrice", **SIX)
    finally:
        engine.on_submit.remove(listener)
    end([*both, one])
    assert heard == [(both, threading.get_ident()), ([one], threading.get_ident())]


def test_a_refused_request_is_told_to_nobody(own: ik.Model) -> None:
    engine, heard = own._engine, []
    engine.on_submit.append(heard.extend)
    own.unload()
    with pytest.raises(ik.ModelUnloadedError):
        engine.submit([Played()])
    assert heard == []


def test_the_requests_of_an_engine_are_those_that_have_not_ended(own: ik.Model) -> None:
    own.configure(max_batch=2)
    engine = own._engine
    with held(own) as hold:
        requests = [own.submit("Once", **LONG) for _ in range(4)]
        hold.wait()
        assert engine.requests == requests
        hold.step(2)
        assert engine.requests == requests
        assert (engine.running, engine.waiting) == (2, 2)
        requests[0].cancel()
        hold.step()
        assert engine.requests == requests[1:]
        for request in requests:
            request.cancel()
    end(requests)
    assert engine.requests == []


def test_no_request_is_missed_on_its_way_to_a_slot(model: ik.Model) -> None:
    engine, missed = model._engine, []

    class Queue(deque[Any]):
        def popleft(self) -> Any:
            item = super().popleft()
            request = item if isinstance(item, Request) else item.request
            missed.append(engine.requests.count(request) != 1)
            return item

    scheduler = engine._scheduler
    before = engine._inbox, scheduler.waiting
    engine._inbox, scheduler.waiting = Queue(), Queue()
    try:
        model.generate(["Once", "Twice"], **SIX)
    finally:
        engine._inbox, scheduler.waiting = before
    assert missed == [False] * 4


def test_steps_since_a_moment(model: ik.Model) -> None:
    engine = model._engine
    before = time.perf_counter_ns()
    model.generate("Once", **SIX)
    wait_until(lambda: len(engine.steps_since(before)) == 6)
    steps = engine.steps_since(before)
    assert steps == list(engine.steps)[-6:]
    assert all(a.ended <= b.began for a, b in pairwise(steps))
    cached = [step.kv_bytes for step in steps]  # also in the step that the request ends with
    assert cached == sorted(cached)
    assert cached[0] > 0
    assert engine.steps_since(steps[2].ended) == steps[3:]
    assert engine.steps_since(steps[2].ended - 1) == steps[2:]
    assert engine.steps_since(steps[-1].ended) == []
    assert engine.steps_since(0) == list(engine.steps)


def test_what_a_request_tells_without_a_lock(model: ik.Model) -> None:
    with held(model) as hold:
        request = model.submit("Once upon a time", **SIX)
        hold.wait()
        assert request.times_since(0) == []
        hold.step(3)
        some, pieces = request.times_since(0), request.pieces_since(0)
        assert len(some) == request.generated >= 2
        assert "".join(pieces) == request.text
    gen = request.result(60)
    trace = gen.latency.trace
    assert request.scheduled == trace.scheduled is not None
    assert some + request.times_since(len(some)) == list(trace.tokens)
    assert "".join(pieces + request.pieces_since(len(pieces))) == gen.text
    assert request.times_since(6) == request.pieces_since(1000) == []
    some.append(0)  # a copy
    assert request.times_since(0) == list(trace.tokens)


def test_a_request_that_waits_is_not_scheduled(model: ik.Model) -> None:
    model.configure(batching="off")
    try:
        with held(model) as hold:
            first, second = model.submit("Once", **SIX), model.submit("Twice", **SIX)
            hold.wait()
            assert first.scheduled is not None
            assert second.scheduled is None
        end([first, second])
    finally:
        model.configure(batching="continuous")
    assert second.scheduled is not None


# -- KV bytes -------------------------------------------------------------------------------------


def test_kv_bytes_are_those_of_the_positions_that_were_written(
    tiny_model: Callable[[str], Path],
) -> None:
    # 8 tokens of window: rings of 64 positions beside full layers of 192.
    options = {**OPTIONS, "context": 128, "max_batch": 3, "prefill_chunk": 16}
    with ik.load(tiny_model("gemma3"), **options, name="windows") as model:
        engine, cache = model._engine, model._engine.runner.cache
        capacities = {layer.capacity for layer in cache._layers}
        assert capacities == {64, 192}
        assert engine.kv_capacity == sum(
            tensor.nbytes for layer in cache._layers for tensor in (layer.keys, layer.values)
        )
        lengths = []
        with held(model) as hold:
            requests = [model.submit(list(range(5, 105)), **LONG)]
            hold.wait()
            for _ in range(10):
                hold.step()
                wait_until(lambda: len(engine.steps) == hold.passes - 1)
                lengths.append((engine.steps[-1].kv_bytes, written(cache)))
            for request in requests:
                request.cancel()
        end(requests)
        wait_until(lambda: not engine.running)
    assert [told for told, _ in lengths] == [found for _, found in lengths]
    assert len({told for told, _ in lengths}) == 10  # every step adds to it


def written(cache: SlotCache) -> int:
    """Bytes of keys and values that are not zero as a whole, in all slots."""
    found = 0
    for layer in cache._layers:
        for store in (layer.keys, layer.values):
            used = (store != 0).any(dim=3).any(dim=1)  # [slots, positions]
            found += int(used.sum()) * store[0, :, 0].nbytes
    return found


def test_kv_bytes_of_a_batch_are_the_sum_over_its_rows(own: ik.Model) -> None:
    engine = own._engine
    with held(own) as hold:
        requests = [own.submit([5] * n, **LONG) for n in (4, 9, 30)]
        hold.wait()
        hold.step(6)
        wait_until(lambda: len(engine.steps) >= hold.passes - 3)
        step = engine.steps[-1]
        # Its last token is not in the cache yet.
        tokens = [
            len(r.prompt_token_ids) + sum(t <= step.ended for t in r.times_since(0)) - 1
            for r in requests
        ]
        layers = engine.runner.cache._layers
        per_token = sum(t[0, :, 0].nbytes for x in layers for t in (x.keys, x.values))
        assert step.kv_bytes == per_token * sum(tokens)
        assert step.kv_bytes < engine.kv_capacity
        for request in requests:
            request.cancel()
    end(requests)
    gen = own.generate("Once", **SIX)
    wait_until(lambda: not engine.running)
    wait_until(
        lambda: engine.steps[-1].began < gen.latency.trace.tokens[-1] <= engine.steps[-1].ended
    )
    before, last = list(engine.steps)[-2:]  # its row is let go at the end of the last
    assert last.kv_bytes == before.kv_bytes + per_token


def test_bytes_of_rows_by_the_shapes_of_the_cache() -> None:
    layers = (
        LayerKV("full", 2, 8, 16),
        LayerKV("sliding", 1, 4, 4, window=8),
        LayerKV("full", 3, 2, 2),
    )
    cache = SlotCache(
        layers,
        slots=3,
        context=200,
        prefill_chunk=8,
        dtype=torch.bfloat16,
        devices=[torch.device("cpu")] * 3,
    )
    full, ring = 2 * (2 * 24 + 3 * 4), 2 * 8
    assert cache.bytes_of([]) == 0
    assert cache.bytes_of([1]) == full + ring
    assert cache.bytes_of([10, 64, 150]) == full * 224 + ring * (10 + 64 + 64)
    assert cache.bytes_of([10_000] * 3) == cache.nbytes
    cache.release()
    assert cache.nbytes == 0


def test_a_model_without_slots_has_no_kv_bytes(
    tiny_model: Callable[[str], Path], feed: Feed
) -> None:
    with ik.load(tiny_model("mamba"), **OPTIONS, name="alone") as model:
        feed.attach(model)
        gens = model.generate(["Once", "Twice"], **SIX)
        wait_until(lambda: len(model._engine.steps) == 2)
        assert model._engine.kv_capacity == 0
        assert [step.kv_bytes for step in model._engine.steps] == [0, 0]
        view = View().take(feed.poll())
    for number, gen in enumerate(gens, 1):
        check(view, number, gen)
    assert feed.now()["capacity"] == 0
