"""The panel without a browser: what it is told by clicks, what it tells, and what it leaves behind.

`Browser` plays static/store.js and panel.js: it sends what they send, and knows what they know.
"""

from __future__ import annotations

import contextvars
import gc
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comm import get_comm_manager
from held import held, wait_until
from IPython.core.inputtransformer2 import TransformerManager

import inferkit as ik
from inferkit import memory, registry
from inferkit.html import format_number
from inferkit.notebook import actions, assets, live, picture, recipe
from inferkit.notebook import panel as panels
from inferkit.notebook.feed import COLUMNS, Feed
from inferkit.notebook.form import (
    EMPTY,
    FormError,
    load_options,
    plan_options,
    prompts,
    sampling_options,
)
from inferkit.notebook.live import LivePlot
from inferkit.notebook.panel import Panel
from inferkit.notebook.recipe import Sent
from inferkit.notebook.sending import submit
from inferkit.notebook.tables import POINTS
from inferkit.notebook.worker import Worker
from inferkit.sampling import SamplingParams

OPTIONS: dict[str, Any] = {"dtype": "float32", "context": 256, "max_batch": 4, "progress": False}
SIX = {"max_tokens": "6", "ignore_eos": True}
LONG = {"max_tokens": 200, "ignore_eos": True}
AWKWARD = [
    "Say \"hi\" to 'them'",
    "one\ntwo\r\n\tthree",
    r"C:\new\table \" \u0041 {x} %s",
    '"""',
    "Crème brûlée, 東京 and 🙂👩‍💻",
    "nul\x00 bell\x07 del\x7f nel\x85 line\u2028end bom\ufeff",
    "%time 1\n!ls\nwhat?",
    "#",
]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ik.Model]]:
    """The models that are loaded: none from elsewhere, and none that stays."""
    loaded: dict[str, ik.Model] = {}
    monkeypatch.setattr(registry, "_table", loaded)
    yield loaded
    for each in list(loaded.values()):
        if each.name != "shared":
            each.unload()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views look often, so that no test waits for them."""
    monkeypatch.setattr(live, "INTERVAL", 0.01)
    monkeypatch.setattr(live, "_IDLE", 0.02)
    monkeypatch.setattr(panels, "_LOOK", 0.02)
    monkeypatch.setattr(panels, "_DEVICES", 0.1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads of a small model wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def _shared(folder: Path) -> Iterator[ik.Model]:
    with ik.load(folder, **OPTIONS, name="shared") as loaded:
        yield loaded


@pytest.fixture
def model(_shared: ik.Model, table: dict[str, ik.Model]) -> Iterator[ik.Model]:
    """A loaded model, which no test changes."""
    table[_shared.name] = _shared
    yield _shared
    wait_until(lambda: not _shared.running + _shared.waiting)


@pytest.fixture
def own(folder: Path) -> ik.Model:
    """A model for one test alone, which may change it."""
    return ik.load(folder, **OPTIONS)


class Browser:
    """One page that shows a panel, as far as the kernel can tell."""

    def __init__(self, panel: LivePlot) -> None:
        self.panel = panel
        self.parts: dict[str, Any] = {}
        self.history: list[tuple[str, Any]] = []
        self.messages: list[str] = []
        self.wholes = 0
        self.now: dict[str, Any] = {}
        self.beats: list[dict[str, Any]] = []
        self.broken: list[BaseException] = []
        self._lock = threading.Lock()
        self._forget()
        panel.send = self._receive  # type: ignore[method-assign]

    def _forget(self) -> None:
        self.tables: dict[str, list[list[float]]] = {name: [] for name in COLUMNS}
        self.requests: dict[int, dict[str, Any]] = {}
        self.marks: list[str] = []

    # -- from the kernel ------------------------------------------------------------------------

    def _receive(self, content: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        try:
            message = json.loads(json.dumps(content, allow_nan=False))
            with self._lock:
                getattr(self, f"_take_{message['type']}")(message, buffers or [])
                self.messages.append(message["type"])
        except BaseException as error:
            self.broken.append(error)
            raise

    def _take_state(self, message: dict[str, Any], _: list[bytes]) -> None:
        self.parts |= message["parts"]
        self.history += message["parts"].items()

    def _take_beat(self, message: dict[str, Any], _: list[bytes]) -> None:
        self.beats.append(message["now"])

    def _take_update(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        if message["whole"]:
            self._forget()
            self.wholes += 1
        assert len(message["tables"]) == len(buffers)
        for told, buffer in zip(message["tables"], buffers):
            width = len(COLUMNS[told["name"]])
            rows = np.frombuffer(buffer).reshape(-1, width).tolist()
            kept = [] if told["reset"] else self.tables[told["name"]]
            self.tables[told["name"]] = kept + rows
        for told in message["requests"]:
            known = self.requests.get(told["number"], {"text": ""})
            text = told.get("text", known["text"] + told.pop("add", ""))
            self.requests[told["number"]] = {**known, **told, "text": text}
        self.marks += [label for _, label in message["marks"]]
        self.now = message["now"]

    # -- to the kernel --------------------------------------------------------------------------

    def tell(self, message: dict[str, Any]) -> None:
        self.panel._receive(None, json.loads(json.dumps(message)), [])

    def hello(self) -> None:
        before = self.wholes
        self.tell({"type": "hello"})
        wait_until(lambda: self.wholes > before)

    def type(self, **typed: Any) -> None:
        """Edit fields, and pause."""
        self.act("edit", typed)

    def act(self, name: str, typed: dict[str, Any] | None = None, **details: Any) -> None:
        self.tell({"type": "act", "name": name, "fields": typed or {}, **details})

    def send(self, how: str, **typed: Any) -> None:
        self.act("send", typed, how=how)

    def pick(self, **typed: Any) -> None:
        """Click a toggle, or leave a field of the model's settings."""
        (name,) = typed
        self.act("apply", typed, field=name)

    # -- what it shows --------------------------------------------------------------------------

    def wait(self, part: str, shown: Callable[[Any], bool] = bool) -> Any:
        """The part of the state, once it is as it should be."""
        wait_until(lambda: part in self.parts and shown(self.parts[part]))
        return self.parts[part]

    def settle(self) -> None:
        """All that was clicked has been done."""
        for worker in (self.panel._changes, self.panel._sends, self.panel._plans):
            done = threading.Event()
            worker.do(done.set)
            assert done.wait(60)

    def ended(self, count: int) -> list[dict[str, Any]]:
        """So many requests, when they have ended."""
        wait_until(
            lambda: len(self.requests) == count and all("ms" in r for r in self.requests.values())
        )
        return [self.requests[n] for n in sorted(self.requests)]

    def were(self, part: str) -> list[Any]:
        """All that was told of a part."""
        with self._lock:
            return [value for name, value in self.history if name == part]


@pytest.fixture
def browse() -> Iterator[Callable[..., Browser]]:
    """Open a panel in a browser: ``browse(model)``."""
    opened: list[Browser] = []

    def browse(*args: Any, kind: type[LivePlot] = Panel) -> Browser:
        opened.append(Browser(kind(*args)))
        opened[-1].hello()
        return opened[-1]

    yield browse
    for browser in opened:
        browser.panel.close()
        assert browser.broken == []


@pytest.fixture
def feed() -> Iterator[Feed]:
    made = Feed(threading.Event())
    yield made
    made.attach(None)


@contextmanager
def seen(browser: Browser, model: ik.Model) -> Iterator[None]:
    """What is sent within is seen to run before it ends, however quick the model is."""
    with held(model) as hold:
        yield
        hold.wait()
        wait_until(lambda: browser.now["running"] > 0)
        wait_until(lambda: browser.panel._was_busy)


def run(code: str) -> dict[str, Any]:
    """Run what was copied, in a cell of its own."""
    names: dict[str, Any] = {}
    exec(TransformerManager().transform_cell(code), names)
    return names


def tokens(gens: Any) -> list[list[int]]:
    return [list(g.token_ids) for g in (gens if isinstance(gens, list) else [gens])]


def sent_by(panel: LivePlot) -> list[list[int]]:
    """The tokens of the last run, in the order of its requests."""
    return tokens(list(panel.generations))


# -- form -----------------------------------------------------------------------------------------


def typed(**values: Any) -> dict[str, Any]:
    return {**EMPTY, "prompt": "Once", **values}


def wrong(read: Callable[..., Any], *args: Any) -> dict[str, str]:
    with pytest.raises(FormError) as caught:
        read(*args)
    assert isinstance(caught.value, ik.OptionError)
    for message in caught.value.fields.values():
        assert message in str(caught.value)
        assert message.endswith(".")
        assert len(message) < 200
        # Python's own words are not for people who typed into a box.
        assert not re.search(
            r"invalid literal|could not convert|Exceeds|quotation|base 10", message
        )
    return caught.value.fields


def test_a_new_form_is_what_the_library_does_by_itself() -> None:
    assert SamplingParams.of(sampling_options(EMPTY)) == SamplingParams()
    usual = {n: p.default for n, p in inspect.signature(ik.load).parameters.items()}
    options = load_options(EMPTY)
    assert options.pop("ref") == "demo"
    assert options == {name: usual[name] for name in options}


@pytest.mark.parametrize("read", [load_options, plan_options])
def test_options_are_those_of_the_functions_they_are_for(read: Callable[..., Any]) -> None:
    options = read(typed(context="512", device="cpu", quantize="nf4"))
    assert options.pop("ref") == "demo"
    function = ik.load if read is load_options else ik.plan
    inspect.signature(function).bind("demo", **options)
    assert options["max_batch"] == 16
    assert options["context"] == 512


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("max_tokens", "8", 8),
        ("max_tokens", " 1_000 ", 1000),
        ("max_tokens", "٣", 3),
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("temperature", ".5", 0.5),
        ("temperature", "1e-3", 0.001),
        ("top_p", "1", 1.0),
        ("top_p", "0", 0.0),
        ("top_k", "0", 0),
        ("top_k", "40", 40),
        ("min_p", "0.05", 0.05),
        ("repetition_penalty", "1.1", 1.1),
        ("seed", "7", 7),
        ("seed", "-1", -1),
        ("seed", "9" * 300, int("9" * 300)),
        ("seed", " Random ", None),
        ("seed", "none", None),
        ("stop", "END", ("END",)),
        ("stop", "a 'b c' \"d's\"", ("a", "b c", "d's")),
        ("stop", r"\n\n '\t'", ("\n\n", "\t")),
        ("stop", "' '", (" ",)),
        ("stop", "# a\\", ("#", "a\\")),
        ("stop", "終わり 🙂", ("終わり", "🙂")),
        ("ignore_eos", True, True),
    ],
)
def test_what_is_typed_is_what_is_sampled_with(field: str, text: Any, value: Any) -> None:
    assert getattr(SamplingParams.of(sampling_options(typed(**{field: text}))), field) == value


@pytest.mark.parametrize("blank", ["", "   ", "\t", None])
def test_an_empty_field_is_the_default(blank: str | None) -> None:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    form = typed(**dict.fromkeys((*names, "seed", "stop"), blank))
    assert sampling_options(form) == {}
    modes = ("device", "quantize", "batching", "speculative", "max_batch", "context")
    form = typed(**dict.fromkeys(modes, blank))
    assert load_options(form) == {"ref": "demo"}


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("max_tokens", "x", "'x' is no whole number"),
        ("max_tokens", "0", "at least 1"),
        ("max_tokens", "-1", "-1"),
        ("max_tokens", "1.5", "whole number"),
        ("max_tokens", "1e3", "whole number"),
        ("max_tokens", "inf", "whole number"),
        ("max_tokens", "_", "'_'"),
        ("max_tokens", "²", "'²'"),
        ("max_tokens", "9" * 5000, "too long"),
        ("temperature", "warm", "'warm' is no number"),
        ("temperature", "-0.5", "at least 0"),
        ("temperature", "nan", "nan"),
        ("temperature", "inf", "finite"),
        ("temperature", "1e999", "finite"),
        ("temperature", "0,7", "'0,7'"),
        ("temperature", "9" * 5000, "finite"),
        ("top_p", "1.01", "from 0 to 1"),
        ("top_p", "-1", "from 0 to 1"),
        ("top_p", "nan", "nan"),
        ("top_k", "-1", "at least 0"),
        ("top_k", "4.5", "whole number"),
        ("min_p", "2", "from 0 to 1"),
        ("min_p", "-inf", "from 0 to 1"),
        ("repetition_penalty", "0", "divides by zero"),
        ("repetition_penalty", "-1", "at least 0"),
        ("repetition_penalty", "x" * 5000, "no number"),
        ("seed", "dice", "“random”"),
        ("seed", "1.5", "“random”"),
        ("seed", "9" * 5000, "has more than 300 characters"),
        ("stop", "don't", "quote"),
        ("stop", '"', "quote"),
        ("stop", '""', "non-empty"),
    ],
)
def test_what_makes_no_sense_is_said_at_its_field(field: str, text: str, says: str) -> None:
    fields = wrong(sampling_options, typed(**{field: text}))
    assert list(fields) == [field]
    assert says in fields[field]


def test_all_that_is_wrong_is_said_at_once() -> None:
    form = typed(max_tokens="x", top_p="7", seed="dice", stop="'", temperature="1")
    assert set(wrong(sampling_options, form)) == {"max_tokens", "top_p", "seed", "stop"}
    assert set(wrong(load_options, typed(ref=" ", max_batch="x", context="0"))) == {
        "ref",
        "max_batch",
        "context",
    }


def test_no_token_to_draw_from_is_said_at_top_p() -> None:
    assert sampling_options(typed(top_p="0"))["top_p"] == 0  # nothing is drawn
    fields = wrong(sampling_options, typed(top_p="0", temperature="1"))
    assert list(fields) == ["top_p"]
    assert "keeps no token" in fields["top_p"]


@pytest.mark.parametrize("field", ["max_batch", "context"])
@pytest.mark.parametrize("text", ["x", "0", "-4", "1.5", "4,096", "1e3", "nan", "²", "9" * 5000])
def test_settings_of_a_model_are_whole_numbers(field: str, text: str) -> None:
    for read in (load_options, plan_options):
        fields = wrong(read, typed(**{field: text}))
        assert list(fields) == [field]
        assert "write" in fields[field]


@pytest.mark.parametrize("ref", ["", "  ", None])
def test_a_model_must_be_named(ref: str | None) -> None:
    assert "demo" in wrong(load_options, typed(ref=ref))["ref"]


def test_the_reference_is_taken_without_the_spaces_around_it() -> None:
    assert load_options(typed(ref="  org/model \n"))["ref"] == "org/model"


def test_one_prompt_is_sent_as_it_is() -> None:
    text = "  one \n\n two\t"
    assert prompts(typed(prompt=text), "one") == [text]
    assert prompts(typed(prompt=text, copies="x"), "one") == [text]


@pytest.mark.parametrize(("text", "count"), [("1", 1), (" 12 ", 12), ("1000", 1000), ("１２", 12)])
def test_copies_of_a_prompt(text: str, count: int) -> None:
    assert prompts(typed(copies=text), "copies") == ["Once"] * count


@pytest.mark.parametrize(
    "text", ["", " ", "0", "00", "1001", "-1", "x", "1.0", "+5", "²", "nan", "9" * 5000]
)
def test_copies_are_from_1_to_1000(text: str) -> None:
    fields = wrong(prompts, typed(copies=text), "copies")
    assert list(fields) == ["copies"]
    assert "from 1 to 1000" in fields["copies"]


def test_each_line_is_a_prompt_and_blank_ones_are_none() -> None:
    text = "\n one \n\n   \ntwo\r\n\tthree\n"
    assert prompts(typed(prompt=text), "lines") == [" one ", "two", "\tthree"]


@pytest.mark.parametrize("how", ["one", "copies", "lines"])
@pytest.mark.parametrize("text", ["", "  ", "\n\n", None])
def test_no_prompt_is_said_at_the_prompt(how: str, text: str | None) -> None:
    fields = wrong(prompts, typed(prompt=text), how)
    assert list(fields) == ["prompt"]


# -- recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32", "context": 256},
        {"dtype": "bfloat16", "max_batch": 3, "context": 128, "batching": "static"},
        {"dtype": "float32", "context": 64, "prefix_reuse": False, "prefill_chunk": 32},
        {"dtype": "float32", "context": 64, "max_memory": {"cpu": "1GiB"}, "device": "cpu"},
        {"dtype": "float32", "context": 64, "name": 'mine, "quoted" \u2028'},
    ],
)
def test_the_load_that_is_written_gives_the_model_that_is_loaded(
    folder: Path, options: dict[str, Any]
) -> None:
    loaded = ik.load(folder, progress=False, **options)
    code = recipe.code(loaded, None)
    before = loaded.max_batch, loaded.context, loaded.batching, loaded.plan.format
    assert run(code)["model"] is loaded
    assert ik.models() == [loaded]
    assert (loaded.max_batch, loaded.context, loaded.batching, loaded.plan.format) == before


def test_the_load_that_is_written_gives_such_a_model_where_there_is_none(folder: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "context": 64, "batching": "static"}
    loaded = ik.load(folder, progress=False, name="mine", prefix_reuse=False, **options)
    code = recipe.code(loaded, None)
    loaded.unload()
    again = run(code)["model"]
    assert again is not loaded
    assert (again.name, again.ref) == ("mine", str(folder))
    assert recipe.code(again, None) == code


def test_the_load_that_is_written_follows_what_was_changed(own: ik.Model) -> None:
    own.configure(batching="off", max_batch=2, context=128)
    code = recipe.code(own, None)
    assert run(code)["model"] is own
    assert (own.batching, own.max_batch, own.context) == ("off", 2, 128)


def test_details_of_the_precision_are_written(own: ik.Model) -> None:
    own.quantize("nf4", double_quant=True, compute_dtype="bfloat16", progress=False)
    code = recipe.code(own, None)
    assert 'quantize="nf4"' in code
    form = own.plan.format
    assert run(code)["model"] is own
    assert own.plan.format == form


def test_the_second_of_two_models_of_one_folder_is_named(own: ik.Model, folder: Path) -> None:
    other = ik.load(folder, **OPTIONS, name="other")
    assert "name=" not in recipe.code(own, None)
    for each in (own, other):
        assert run(recipe.code(each, None))["model"] is each
    assert ik.models() == [own, other]


def test_without_a_model_there_is_a_panel_to_write() -> None:
    code = recipe.code(None, None)
    assert isinstance(run(code)["ik"].Panel(), Panel)
    assert code.endswith("ik.Panel()")


@pytest.mark.parametrize("prompt", AWKWARD)
def test_a_prompt_is_written_as_it_was(prompt: str) -> None:
    heard: list[Any] = []
    model = SimpleNamespace(generate=lambda *args, **options: heard.append((args, options)))
    options = {"stop": [prompt, "\n"], "max_tokens": 3}
    for sent in ([prompt], [prompt] * 3, [prompt, "other"], AWKWARD):
        lines = "\n".join(recipe._answers(Sent(sent, options, [0] * len(sent))))
        assert lines.isascii() or all(c.isprintable() or c == "\n" for c in lines)
        exec(TransformerManager().transform_cell(lines), {"model": model})
        assert heard.pop() == ((sent[0] if len(sent) == 1 else sent,), options)


def test_a_cell_is_not_wider_than_a_page() -> None:
    sent = Sent(["A prompt of some length " * 2] * 2, {"max_tokens": 64}, [0, 0])
    lines = recipe._answers(sent)[0].splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) < 88


@pytest.mark.parametrize(
    ("how", "form"),
    [
        ("one", {"prompt": "Once upon a time"}),
        ("one", {"prompt": AWKWARD[0], "temperature": "1", "seed": "5", "top_k": "50"}),
        ("one", {"prompt": AWKWARD[1], "temperature": "1", "seed": "random"}),
        ("copies", {"prompt": AWKWARD[2], "copies": "3", "temperature": "1", "seed": "random"}),
        ("copies", {"prompt": "Once", "copies": "2", "repetition_penalty": "1.3"}),
        ("lines", {"prompt": "One\n\n  two 'three'\nfour \\n", "min_p": "0.01"}),
        ("lines", {"prompt": "a\nb", "temperature": "1", "seed": "random", "stop": "' ' e"}),
        ("one", {"prompt": "Hi", "chat": True}),
        ("copies", {"prompt": 'Say "hi"', "copies": "2", "chat": True, "temperature": "1",
                    "seed": "random"}),
        ("lines", {"prompt": "a\nb", "chat": True, "temperature": "1", "seed": "3"}),
    ],
)  # fmt: skip
def test_what_was_sent_is_repeated_by_its_code(
    browse: Callable[..., Browser], model: ik.Model, how: str, form: dict[str, Any]
) -> None:
    browser = browse(model)
    browser.send(how, **SIX, **form)
    browser.settle()
    count = {"one": 1, "copies": int(form.get("copies", 0)), "lines": 0}[how]
    count = count or len([line for line in form["prompt"].splitlines() if line.strip()])
    browser.ended(count)
    expected = sent_by(browser.panel)
    assert len(expected) == count
    names = run(browser.parts["code"])
    assert names["model"] is model
    assert tokens(names["gens"]) == expected
    if form.get("seed") == "random" and count > 1:
        assert expected[0] != expected[1] or how == "lines"


# -- picture --------------------------------------------------------------------------------------


def fill(feed: Feed, count: int, gap: float = 20.0) -> None:
    """Requests of 50 tokens each, two at a time and more in between."""
    times = np.arange(1, count + 1) * gap / 1e3
    numbers = 1 + np.arange(count) // 50
    random = np.random.default_rng(0)
    gaps = random.gamma(4, gap / 4, count)
    feed.tables["tokens"].extend(np.c_[times, gaps, numbers])
    feed.tables["firsts"].extend(np.c_[times, 2 * gaps, numbers][::50])
    feed.tables["levels"].extend(np.c_[times, gaps, 2 * gaps])
    running = random.integers(1, 9, count)
    idle = np.zeros(count)
    steps = np.c_[times - gap / 1e3, idle + gap, idle, running, running, running % 3, running]
    feed.tables["steps"].extend(steps)


def test_the_figure_has_what_the_tables_have(feed: Feed) -> None:
    fill(feed, 200)
    feed.marks.append((1.0, "<nf4>"))
    figure = picture.figure(feed)
    traces = {trace.name: trace for trace in figure.data}
    rows = {name: table.rows for name, table in feed.tables.items()}
    drawn = {
        "ITL": rows["tokens"][:, :2],
        "TTFT": rows["firsts"][:, :2],
        "p50 of the last 10 s": rows["levels"][:, :2],
        "p99 of the last 10 s": rows["levels"][:, (0, 2)],
    }
    for name, points in drawn.items():
        assert np.c_[traces[name].x, traces[name].y] == pytest.approx(points, rel=1e-5, abs=1e-4)
    assert list(traces["ITL"].customdata) == rows["tokens"][:, 2].tolist()
    assert traces["TTFT"].visible is True
    assert traces["running"].y[:-1].tolist() == rows["steps"][:, 4].tolist()
    assert traces["waiting"].y[:-1].tolist() == rows["steps"][:, 5].tolist()
    assert "&lt;nf4&gt;" in [a.text for a in figure.layout.annotations]
    assert {shape.x0 for shape in figure.layout.shapes} == {1.0}
    figure.to_json()


def test_times_of_a_figure_are_exact_after_hours(feed: Feed) -> None:
    times = 36_000 + np.arange(5) * 0.0123
    feed.tables["tokens"].extend(np.c_[times, np.full(5, 12.3), np.ones(5)])
    assert np.array(picture.figure(feed).data[0].x) == pytest.approx(times, rel=0, abs=1e-4)


def test_ttft_that_would_flatten_the_gaps_is_hidden_at_first(feed: Feed) -> None:
    feed.tables["tokens"].extend(np.array([[1.0, 10.0, 1.0]]))
    feed.tables["firsts"].extend(np.array([[0.9, 41.0, 1.0]]))
    assert picture.figure(feed).data[1].visible == "legendonly"


def test_a_figure_of_nothing(feed: Feed) -> None:
    figure = picture.figure(feed)
    assert all(not len(trace.x) for trace in figure.data)
    figure.to_json()


@pytest.mark.parametrize("gap", [20.0, 2500.0])
def test_rolling_quantiles_are_a_line_that_breaks_where_nothing_ran(feed: Feed, gap: float) -> None:
    times = np.arange(1, 6) * gap / 1e3
    times = np.r_[times, times + 100]  # s
    feed.tables["levels"].extend(np.c_[times, np.full(10, gap), np.full(10, 2 * gap)])
    feed.tables["firsts"].extend(np.array([[0.0, gap, 1.0]]))
    drawn = np.array(picture.figure(feed).data[2].y, dtype=float)
    assert np.flatnonzero(np.isnan(drawn)).tolist() == [5]
    svg = ET.fromstring(picture.still(feed, "slot")[0])
    lines = [e.get("points", "").split() for e in svg.iter() if e.tag.endswith("polyline")]
    assert [len(points) for points in lines if points] == [5, 5, 5, 5]


def test_nothing_runs_where_no_step_is() -> None:
    steps = np.zeros((3, 7))
    steps[:, 0] = [1.0, 1.01, 3.0]
    steps[:, 1] = 10.0
    steps[:, 4] = [1, 2, 1]
    steps[:, 5] = [1, 0, 0]
    times, running, waiting = picture.occupancy(steps)
    assert times.tolist() == pytest.approx([1.0, 1.01, 1.02, 3.0, 3.01])
    assert running.tolist() == [1, 2, 0, 1, 0]
    assert waiting.tolist() == [1, 0, 0, 0, 0]


def check_svg(svg: str) -> ET.Element:
    """It is XML that does nothing but draw."""
    root = ET.fromstring(svg)
    for element in root.iter():
        assert element.tag.removeprefix("{http://www.w3.org/2000/svg}") in (
            "svg",
            "text",
            "path",
            "polyline",
        )
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            assert "href" not in name
            assert "nan" not in value
            assert "inf " not in value
    return root


def test_a_picture_of_nothing(feed: Feed) -> None:
    svg, table, text = picture.still(feed, "slot")
    root = check_svg(svg)
    assert root.get("id") == "inferkit-slot"
    assert "no token yet" in "".join(root.itertext())
    assert 'data-inferkit="slot"' in table
    assert text == "No request yet."


@pytest.mark.parametrize("count", [1, 2, 60, 2000])
def test_a_picture_is_plain_svg(feed: Feed, count: int) -> None:
    fill(feed, count)
    feed.marks.append((0.02, "bad\x07 <b>&\"' \ud800"))
    svg, _, _ = picture.still(feed, "slot")
    root = check_svg(svg)
    texts = [element.text for element in root.iter() if element.text]
    assert "bad <b>&\"' " in texts
    assert "<b>" not in svg
    (dots,) = [sum(p.get("d", "").count("h0") for p in root)]
    assert dots == count


def test_a_picture_of_one_token_and_no_gap(feed: Feed) -> None:
    feed.tables["firsts"].extend(np.array([[1.0, 30.0, 1.0]]))
    assert "TTFT 30 ms" in "".join(check_svg(picture.still(feed, "slot")[0]).itertext())


def test_a_picture_of_many_tokens_stays_small(feed: Feed) -> None:
    fill(feed, POINTS)
    for step in range(200):
        feed.marks.append((float(step), "continuous, max batch 16"))
    assert len(feed.tables["tokens"]) == POINTS
    svg, table, _ = picture.still(feed, "slot")
    check_svg(svg)
    assert len(svg) + len(table) < 300_000


def test_the_table_beneath_lists_the_newest_requests(feed: Feed, model: ik.Model) -> None:
    feed.attach(model)
    model.generate(["Once"] * 10, max_tokens=1)
    model.generate(["<script>alert(1)</script> & " + "long " * 30] * 15, max_tokens=1)
    svg, table, text = picture.still(feed, "slot")
    root = ET.fromstring(table)
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows[0] == list(picture._HEADER)
    assert [row[0] for row in rows[1:]] == [str(n) for n in range(6, 26)]
    assert all(len(row[1] or "") <= 48 for row in rows[1:])
    assert (rows[-1][1] or "").startswith("<script>alert(1)</script> &")
    assert "<script" not in table + svg
    assert "5 earlier requests are not listed" in table
    assert len(text.splitlines()) == 22


# -- worker ---------------------------------------------------------------------------------------


@contextmanager
def working() -> Iterator[tuple[Worker, list[BaseException], threading.Event]]:
    """A worker that stands at its first job until the event is set."""
    failed: list[BaseException] = []
    go = threading.Event()
    worker = Worker("test-worker", failed.append)
    worker.do(lambda: go.wait(60) and None)
    wait_until(lambda: not worker._jobs)
    yield worker, failed, go
    thread = worker._thread
    go.set()
    worker.close()
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()
    assert worker._thread is None


def test_a_worker_has_no_thread_until_there_is_work() -> None:
    worker = Worker("test-idle", print)
    worker.close()
    worker.do(lambda: pytest.fail("it was closed"))
    assert "test-idle" not in [thread.name for thread in threading.enumerate()]


def test_a_thread_without_jobs_ends_and_the_next_job_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inferkit.notebook.worker._PATIENCE", 0.05)
    done: list[int] = []
    worker = Worker("test-resting", print)

    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == "test-resting"]

    for number in range(3):
        worker.do(lambda number=number: done.append(number))
        wait_until(lambda number=number: len(done) == number + 1)
        wait_until(lambda: not threads())
    worker.close()


def test_jobs_are_done_in_the_order_of_coming() -> None:
    done: list[int] = []
    with working() as (worker, failed, go):
        for number in range(50):
            worker.do(lambda number=number: done.append(number))
        assert done == []
        go.set()
        wait_until(lambda: len(done) == 50)
    assert done == list(range(50))
    assert failed == []


def test_of_jobs_with_a_key_only_the_newest_is_done_and_last() -> None:
    done: list[str] = []
    with working() as (worker, _, go):
        worker.do(lambda: done.append("plan 1"), "plan")
        worker.do(lambda: done.append("load"))
        worker.do(lambda: done.append("other"), "other")
        worker.do(lambda: done.append("plan 2"), "plan")
        go.set()
        wait_until(lambda: len(done) == 3)
    assert done == ["load", "other", "plan 2"]


def test_a_job_may_come_again_under_the_key_it_runs_by() -> None:
    done: list[int] = []
    with working() as (worker, _, go):

        def again() -> None:
            done.append(len(done))
            if len(done) < 3:
                worker.do(again, "key")

        worker.do(again, "key")
        go.set()
        wait_until(lambda: len(done) == 3)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_worker_goes_on_after_an_error(kind: type[BaseException]) -> None:
    done: list[int] = []

    def fail() -> None:
        raise kind("boom")

    with working() as (worker, failed, go):
        worker.do(fail)
        worker.do(lambda: done.append(1))
        go.set()
        wait_until(lambda: done == [1])
    assert [type(error) for error in failed] == [kind]


def test_a_closed_worker_does_nothing_more() -> None:
    done: list[int] = []
    with working() as (worker, _, go):
        worker.do(lambda: done.append(1))
        worker.close()
        worker.do(lambda: done.append(2))
        go.set()
    assert done == []


def test_jobs_run_in_the_context_of_who_made_the_worker_work() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("cell", default="none")
    seen: list[str] = []
    variable.set("first cell")
    with working() as (worker, _, go):
        variable.set("another cell")
        worker.do(lambda: seen.append(variable.get()))
        go.set()
        wait_until(lambda: bool(seen))
    assert seen == ["first cell"]


# -- assets ---------------------------------------------------------------------------------------

MODULES = [LivePlot, Panel]


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_needs_no_network(kind: type[LivePlot]) -> None:
    source = str(kind._esm) + str(kind._css)
    comments = re.sub(r"/\*.*?\*/|(?<![:\w])//[^\n]*", "", source, flags=re.DOTALL)
    assert not re.findall(r"https?:|url\(|@import|\bimport\b|fetch\(|XMLHttpRequest", comments)
    assert "u-legend" in str(kind._css)  # uPlot's own sheet


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_a_module_is_javascript(kind: type[LivePlot], tmp_path: Path) -> None:
    module = tmp_path / "module.mjs"
    module.write_text(str(kind._esm), encoding="utf-8")
    subprocess.run(["node", "--check", module], check=True, timeout=60)


def test_files_come_in_their_order_behind_the_library() -> None:
    source = assets.script("dom.js", "entry.js")
    places = [source.index(part) for part in ("__inferkit_uPlot", "function h(", "export default")]
    assert places == sorted(places)
    assert source.count("export default") == 1


# -- panel: loading -------------------------------------------------------------------------------


def test_hello_is_answered_by_all_there_is(browse: Callable[..., Browser], model: ik.Model) -> None:
    browser = browse(model)
    gen = model.generate("Once upon", max_tokens=6, ignore_eos=True)
    (told,) = browser.ended(1)
    assert (told["text"], told["status"], told["origin"]) == (gen.text, "length", "cell")
    page = Browser(browser.panel)  # the page is read again, and knows nothing
    page.hello()
    assert page.requests == browser.requests
    assert page.tables == browser.tables
    page.wait("devices")
    assert page.parts["choices"]["loaded"] == ["shared"]
    assert page.parts["choices"]["refs"][0] == "demo"
    assert "cpu" in page.parts["choices"]["devices"]
    assert page.parts["model"]["name"] == "shared"
    assert page.parts["model"]["context"] == 256
    assert page.parts["plan"] is None  # it is loaded
    assert page.parts["errors"] == {}
    cpu = next(d for d in page.parts["devices"] if d["name"] == "cpu")
    assert cpu["mine"] == model.plan.weights + model.plan.kv_cache
    assert 0 < cpu["free"] < cpu["total"]
    tables, requests = page.tables, page.requests
    page.hello()
    assert (page.tables, page.requests) == (tables, requests)
    assert browser.broken == page.broken == []


def test_a_panel_shows_the_model_that_was_loaded_last(
    browse: Callable[..., Browser], model: ik.Model, own: ik.Model
) -> None:
    assert browse().panel.model is own
    assert browse(model).panel.model is model


def test_load(browse: Callable[..., Browser], folder: Path) -> None:
    browser = browse()
    assert browser.parts["model"] is None
    assert "Panel" in browser.parts["code"]
    browser.type(ref=str(folder), max_batch="3", context="128", device="cpu")
    browser.wait("plan", lambda told: told and told["fits"] and told["text"].startswith("Plan: "))
    browser.act("load")
    shown = browser.wait("model")
    browser.settle()
    (loaded,) = ik.models()
    assert browser.panel.model is loaded
    assert shown["ref"] == loaded.ref == str(folder)
    assert (loaded.max_batch, loaded.context, loaded.device) == (3, 128, "cpu")
    assert (shown["max_batch"], shown["context"], shown["device"]) == (3, 128, "cpu")
    assert browser.parts["failure"] is None
    works = browser.were("work")
    assert works[-1] is None
    assert works[0] == {"what": f"Loading {folder}", "done": 0, "total": 0, "cancel": True}
    assert any(told["total"] > 0 for told in works if told)  # with how far it is
    assert run(browser.parts["code"])["model"] is loaded


def test_loading_what_is_loaded_does_nothing(browse: Callable[..., Browser], folder: Path) -> None:
    loaded = ik.load(folder, context=64, progress=False)
    browser = browse()
    browser.act("load")
    browser.settle()
    assert not any(browser.were("work"))
    assert ik.models() == [loaded]
    assert browser.panel.model is loaded


def test_what_cannot_be_loaded_is_said_in_a_sentence(browse: Callable[..., Browser]) -> None:
    browser = browse()
    browser.act("load", {"ref": "/nowhere/at-all"})
    failure = browser.wait("failure")
    assert "/nowhere/at-all" in failure["text"]
    assert (failure["title"], failure["details"]) == ("", "")
    browser.settle()
    assert browser.parts["work"] is None
    assert browser.parts["model"] is None
    assert browser.parts["plan"] == {"text": failure["text"], "fits": False}
    browser.act("dismiss")
    browser.wait("failure", lambda told: told is None)


def test_a_load_that_makes_no_sense_is_said_at_its_fields(browse: Callable[..., Browser]) -> None:
    browser = browse()
    browser.act("load", {"ref": " ", "context": "much"})
    browser.settle()
    assert set(browser.wait("errors")) == {"ref", "context"}
    assert not any(browser.were("work"))
    assert not browser.parts.get("failure")


def test_an_unexpected_error_is_shown_with_its_details(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boom(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    browser = browse(model)
    with monkeypatch.context() as patched:
        patched.setattr(registry, "load", boom)
        browser.act("load", {"ref": "another"})
        failure = browser.wait("failure")
    assert failure["title"] == "Unexpected error."
    assert failure["text"] == "RuntimeError: boom"
    assert "Traceback" in failure["details"]
    browser.settle()
    assert browser.parts["work"] is None
    browser.send("one", prompt="Once", **SIX)  # and the panel goes on
    browser.ended(1)
    browser.settle()
    assert browser.parts["failure"] is None


def test_an_error_while_prompts_are_sent_is_shown(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = browse(model)
    with monkeypatch.context() as patched:
        patched.setattr(ik.Model, "submit", lambda *_, **__: 1 / 0)
        browser.send("one", prompt="Once")
        assert "ZeroDivisionError" in browser.wait("failure")["text"]
    browser.send("one", prompt="Once", **SIX)
    browser.ended(1)


def test_an_error_of_the_view_itself_is_shown(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = browse(model)
    with monkeypatch.context() as patched:
        patched.setattr(Feed, "now", lambda self: 1 / 0)
        browser.tell({"type": "hello"})
        assert "ZeroDivisionError" in browser.wait("failure")["text"]
    browser.hello()


def test_a_load_can_be_cancelled(
    browse: Callable[..., Browser], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Panel._told

    def slow(self: Panel, *args: Any) -> None:
        assert self._cancel.wait(60)
        told(self, *args)

    browser = browse()
    with monkeypatch.context() as patched:
        patched.setattr(Panel, "_told", slow)
        browser.act("load", {"ref": str(folder), "context": "64"})
        assert browser.wait("work")["cancel"] is True
        browser.act("cancel")
        browser.settle()
    assert browser.parts["work"] is None
    assert not browser.parts["failure"]
    assert ik.models() == []
    assert browser.parts["model"] is None
    browser.act("load")  # what was cancelled once is not cancelled for ever
    browser.wait("model")


def test_unload(browse: Callable[..., Browser], own: ik.Model, model: ik.Model) -> None:
    browser = browse(own)
    browser.act("unload")
    browser.settle()
    assert not own.loaded
    assert browser.panel.model is model
    assert browser.wait("model")["name"] == "shared"
    assert {"what": "Unloading llama", "done": 0, "total": 0, "cancel": False} in browser.were(
        "work"
    )
    assert browser.parts["work"] is None
    browser.wait("choices", lambda told: told["loaded"] == ["shared"])


def test_unloading_the_only_model_leaves_its_plan(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    with held(own) as hold:
        requests = own.submit(["Once", "Twice"], **LONG)
        hold.wait()
        browser.act("unload")
        wait_until(lambda: not own.loaded)
    assert {r.result(60).finish_reason for r in requests} == {"cancelled"}
    browser.settle()
    assert browser.parts["model"] is None
    assert browser.wait("plan")["fits"]
    assert browser.parts["form"]["ref"] == own.ref
    browser.act("unload")  # a second click that was on its way
    browser.settle()
    assert not browser.parts["failure"]
    assert [told["status"] for told in browser.ended(2)] == ["cancelled"] * 2


def test_attach_chooses_among_the_models(
    browse: Callable[..., Browser], model: ik.Model, own: ik.Model
) -> None:
    browser = browse(own)
    browser.wait("choices", lambda told: told["loaded"] == ["shared", "llama"])
    browser.act("attach", model="shared")
    browser.settle()
    assert browser.panel.model is model
    assert browser.parts["model"]["name"] == "shared"
    browser.send("one", prompt="Once", **SIX)
    browser.settle()
    assert browser.ended(1)[0]["tokens"] == 6
    browser.act("attach", model="gone")
    browser.settle()
    assert browser.panel.model is model
    assert run(browser.parts["code"])["model"] is model


# -- panel: modes ---------------------------------------------------------------------------------


def test_modes_of_the_model_change_at_once(browse: Callable[..., Browser], own: ik.Model) -> None:
    browser = browse(own)
    changes = {"batching": "static", "max_batch": "2", "context": "128"}
    for name, mark in zip(changes, ["static", "max batch 2", "context 128"]):
        browser.pick(**{name: changes[name]})
        browser.settle()
        wait_until(lambda mark=mark: browser.marks[-1:] == [mark])
    assert (own.batching, own.max_batch, own.context) == ("static", 2, 128)
    shown = browser.parts["model"]
    assert (shown["batching"], shown["max_batch"], shown["context"]) == ("static", 2, 128)
    assert not browser.parts["failure"]
    assert browser.parts["work"] is None
    assert not any(told and told["cancel"] for told in browser.were("work"))
    assert len(browser.marks) == 3
    assert run(browser.parts["code"])["model"] is own
    before = len(browser.were("work"))
    browser.pick(context="128")  # as it is
    browser.settle()
    assert len(browser.were("work")) == before


def test_guessing_is_switched_on_by_a_toggle_and_off_by_a_cell(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    browser.pick(speculative="ngram")
    browser.settle()
    assert own.speculative == "ngram"
    assert browser.parts["model"]["speculative"] == "ngram"
    assert 'speculative="ngram"' in browser.parts["code"]
    own.configure(speculative="off")
    browser.wait("form", lambda form: form["speculative"] == "off")


def test_the_precision_changes_with_progress(browse: Callable[..., Browser], own: ik.Model) -> None:
    browser = browse(own)
    browser.pick(quantize="int8")
    browser.settle()
    assert own.quantization == "int8"
    assert browser.parts["model"]["quantization"] == "int8"
    works = [told for told in browser.were("work") if told]
    assert works[0]["what"] == "Changing to int8"
    assert all(told["cancel"] for told in works)
    browser.send("one", prompt="Once", **SIX)
    browser.settle()
    assert browser.ended(1)[0]["mode"] == "int8"
    assert 'quantize="int8"' in browser.parts["code"]


@pytest.mark.parametrize(
    ("name", "typed"), [("context", "99999"), ("context", "1"), ("max_batch", "9" * 18)]
)
def test_what_is_refused_stays_with_the_reason_at_its_field(
    browse: Callable[..., Browser], model: ik.Model, name: str, typed: str
) -> None:
    browser = browse(model)
    browser.pick(**{name: typed})
    browser.settle()
    assert browser.wait("errors")[name]
    assert not browser.parts.get("failure")
    assert (model.context, model.max_batch) == (256, 4)
    assert browser.parts["form"][name] == typed
    assert not browser.parts.get("work")
    browser.pick(**{name: "256" if name == "context" else "4"})
    browser.settle()
    assert not browser.parts["errors"]


def test_a_failure_goes_with_the_model_that_it_was_of(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    browser.act("load", {"ref": "/no/such/model"})
    browser.settle()
    assert "/no/such/model" in browser.wait("failure")["text"]
    browser.type(ref="shared")
    browser.settle()
    assert browser.parts["failure"] is None


@pytest.mark.parametrize("ref", ["~nobody-of-this-name/x", "y" * 300])
def test_what_cannot_be_a_path_is_a_sentence(
    browse: Callable[..., Browser], model: ik.Model, ref: str
) -> None:
    browser = browse(model)
    browser.type(ref=ref)
    browser.settle()
    assert "names no model" in browser.wait("plan")["text"]
    assert not browser.parts.get("failure")


def test_a_refused_precision_puts_the_toggle_back(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ik.Model, mode: str, **_: Any) -> None:
        raise ik.OptionError(f"No {mode} today.")

    monkeypatch.setattr(ik.Model, "quantize", refuse)
    browser = browse(model)
    browser.pick(quantize="nf4")
    browser.settle()
    assert browser.wait("failure")["text"] == "No nf4 today."
    assert browser.parts["form"]["quantize"] == "none"
    assert browser.parts["model"]["quantization"] == "none"


def test_a_change_of_what_is_not_loaded_changes_the_plan_only(
    browse: Callable[..., Browser], model: ik.Model, folder: Path, tiny_model: Callable[[str], Path]
) -> None:
    other = tiny_model("qwen3")
    browser = browse(model)
    browser.type(ref=str(other))
    first = browser.wait("plan")
    browser.pick(max_batch="2")
    browser.wait("plan", lambda told: told and told != first)
    browser.settle()
    assert model.max_batch == 4
    browser.type(ref=str(folder))
    browser.wait("plan", lambda told: told is None)


# -- panel: prompts -------------------------------------------------------------------------------


def test_send_one_copies_and_lines(browse: Callable[..., Browser], model: ik.Model) -> None:
    browser = browse(model)
    (expected,) = tokens(model.generate("Once", max_tokens=6, ignore_eos=True))
    browser.ended(1)
    browser.send("one", prompt="Once", **SIX)
    browser.settle()
    browser.ended(2)
    assert sent_by(browser.panel) == [expected]
    browser.send("copies", copies="3")
    browser.settle()
    browser.ended(5)
    assert sent_by(browser.panel) == [expected] * 3
    browser.send("lines", prompt="Once\n\nTwice")
    browser.settle()
    told = browser.ended(7)
    assert sent_by(browser.panel)[0] == expected
    assert [t["origin"] for t in told] == ["cell", *["panel"] * 6]
    assert [t["prompt"] for t in told[-2:]] == ["Once", "Twice"]
    assert browser.parts["errors"] == {}


def test_a_chat_is_in_the_models_template(browse: Callable[..., Browser], model: ik.Model) -> None:
    expected = model.chat([{"role": "user", "content": "Hi"}], max_tokens=6, ignore_eos=True)
    browser = browse(model)
    browser.send("one", prompt="Hi", chat=True, **SIX)
    browser.settle()
    browser.ended(1)
    (gen,) = browser.panel.generations
    assert gen.prompt_token_ids == expected.prompt_token_ids
    assert gen.token_ids == expected.token_ids
    assert "model.chat" in browser.parts["code"]


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "a " * 2000}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "Once", "copies": "x"}, "copies"),
        ({"prompt": "Once", "max_tokens": "x"}, "max_tokens"),
        ({"prompt": "Once", "temperature": "1", "top_p": "0"}, "top_p"),
    ],
)
def test_what_cannot_be_sent_is_said_at_its_field(
    browse: Callable[..., Browser], model: ik.Model, form: dict[str, Any], field: str
) -> None:
    browser = browse(model)
    browser.type(**form)
    browser.settle()
    browser.send("copies")
    browser.settle()
    assert list(browser.wait("errors")) == [field]
    assert browser.requests == {}
    browser.send("one", prompt="Once", temperature="0", max_tokens="1", top_p="")
    browser.settle()
    browser.ended(1)
    assert browser.parts["errors"] == {}


def test_a_model_without_a_chat_template_says_so_at_the_prompt(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    browser = browse(model)
    browser.type(prompt="Hi", chat=True, copies="2")
    browser.settle()
    browser.send("copies")
    browser.settle()
    assert "chat template" in browser.wait("errors")["prompt"]
    assert browser.requests == {}


def test_without_a_model_nothing_is_sent(browse: Callable[..., Browser]) -> None:
    browser = browse()
    browser.type(prompt="Once")
    browser.settle()
    browser.send("one")
    browser.settle()
    assert browser.wait("errors") == {"prompt": "Load a model first."}


def test_what_is_typed_is_checked_as_it_is_typed(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    browser.type(temperature="warm", max_batch="x")
    assert set(browser.wait("errors")) == {"temperature", "max_batch"}
    browser.type(temperature="1", max_batch="4")
    browser.wait("errors", lambda told: told == {})


def test_what_is_typed_is_checked_while_a_plan_waits_for_the_hub(
    browse: Callable[..., Browser], monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = browse()
    browser.settle()
    answered, asked = threading.Event(), threading.Event()

    def plan(*_: Any, **__: Any) -> None:
        asked.set()
        answered.wait(60)
        raise ik.ModelNotFoundError("there is none")

    monkeypatch.setattr(memory, "plan", plan)
    browser.type(ref="some/model")
    assert asked.wait(60)
    browser.type(temperature="hot", max_batch="0")
    assert {*browser.parts["errors"]} == {"temperature", "max_batch"}
    browser.type(temperature="1", max_batch="2")
    assert browser.parts["errors"] == {}
    answered.set()
    browser.wait("plan", lambda told: told and told["text"] == "there is none")


def test_stop_one_and_stop_all(browse: Callable[..., Browser], model: ik.Model) -> None:
    browser = browse(model)
    with held(model) as hold:
        browser.send("copies", prompt="Once", copies="3", max_tokens="200", ignore_eos=True)
        browser.settle()
        theirs = model.submit("Of a cell", **LONG)
        hold.wait()
        wait_until(lambda: sorted(browser.requests) == [1, 2, 3, 4])
        browser.act("stop", number=2)
        hold.step(2)
        wait_until(lambda: browser.requests[2]["status"] == "cancelled")
        assert {browser.requests[n]["status"] for n in (1, 3, 4)} <= {"waiting", "running"}
        browser.act("stop", number=99)  # forgotten
        browser.act("stop")
    assert [told["status"] for told in browser.ended(4)] == ["cancelled"] * 4
    assert theirs.result(60).finish_reason == "cancelled"
    wait_until(lambda: browser.now["running"] + browser.now["waiting"] == 0)
    assert not model.running + model.waiting
    summary = dict(browser.wait("summary"))
    assert summary["last run"] == "4 requests"
    assert summary["of these stopped or failed"] == "4"


def test_a_change_of_precision_that_waits_for_requests_is_cancelled_without_a_word(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    with held(own) as hold:
        browser.send("one", prompt="Once", **SIX)
        browser.settle()
        hold.wait()
        browser.pick(quantize="nf4")
        browser.wait("work", lambda work: work and work["what"].startswith("Waiting for 1 request"))
        browser.act("cancel")
        browser.wait("work", lambda work: work is None)
    browser.settle()
    assert browser.parts.get("failure") is None
    assert own.quantization == "none"
    assert browser.wait("form", lambda form: form["quantize"] == "none")
    assert browser.ended(1)[0]["status"] == "length"


def test_stop_reaches_what_is_still_being_sent(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = browse(model)
    begun, stopped = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        begun.set()
        assert stopped.wait(30)
        return submit(*args)

    monkeypatch.setattr("inferkit.notebook.panel.submit", slow)
    browser.send("copies", prompt="Once", copies="3", max_tokens="200", ignore_eos=True)
    assert begun.wait(30)
    browser.act("stop")
    stopped.set()
    assert [told["status"] for told in browser.ended(3)] == ["cancelled"] * 3


def test_stopping_does_not_wait_for_a_change_that_waits_for_requests(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    with held(own) as hold:
        browser.send("one", prompt="Once", max_tokens="200", ignore_eos=True)
        browser.settle()
        hold.wait()
        browser.pick(max_batch="2")  # the requests that run finish first
        browser.wait("work")
        browser.act("stop")
    browser.settle()
    assert own.max_batch == 2
    assert browser.ended(1)[0]["status"] == "cancelled"


def test_the_last_run_is_summed_up(browse: Callable[..., Browser], model: ik.Model) -> None:
    browser = browse(model)
    with seen(browser, model):
        browser.send("one", prompt="Once", **SIX)
    one = dict(browser.wait("summary"))
    assert one["last run"] == "1 request"
    assert one["TTFT"].endswith(" ms")
    assert float(one["output tokens/s"].replace(",", "")) > 0
    with seen(browser, model):
        browser.send("copies", copies="2")
    many = dict(browser.wait("summary", lambda told: dict(told)["last run"] == "2 requests"))
    assert {"TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "queue p50"} <= set(many)
    found = ik.summarize(browser.panel.generations)
    assert many["TTFT p50"] == f"{format_number(1e3 * found['ttft'].p50)} ms"


def test_keep_shows_the_figure(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import IPython.display

    shown: list[Any] = []
    monkeypatch.setattr(IPython.display, "display", lambda *args, **_: shown.extend(args))
    browser = browse(model)
    model.generate("Once", max_tokens=6, ignore_eos=True)
    browser.ended(1)
    browser.act("keep")
    browser.settle()
    (figure,) = shown
    assert len(figure.data[0].x) == 5


# -- panel: what cells do -------------------------------------------------------------------------


def test_a_panel_follows_models_that_cells_load_change_and_unload(
    browse: Callable[..., Browser], folder: Path
) -> None:
    browser = browse()
    assert browser.parts["model"] is None
    browser.wait("choices")
    loaded = ik.load(folder, **OPTIONS)
    assert browser.wait("model")["context"] == 256
    assert browser.panel.model is loaded
    browser.wait("choices", lambda told: told["loaded"] == ["llama"])
    assert browser.parts["form"]["ref"] == loaded.ref
    loaded.configure(max_batch=3)
    browser.wait("model", lambda told: told["max_batch"] == 3)
    wait_until(lambda: "max batch 3" in browser.marks)
    assert "max_batch=3" in browser.wait("code", lambda told: "max_batch=3" in told)
    ik.load(folder, **{**OPTIONS, "dtype": "bfloat16"})  # takes the place of the first
    browser.wait("model", lambda told: told and told["dtype"] == "bfloat16")
    assert browser.panel.model is not loaded
    ik.models()[0].unload()
    browser.wait("model", lambda told: told is None)
    browser.wait("choices", lambda told: told["loaded"] == [])
    browser.settle()
    assert not browser.parts.get("failure")


def test_requests_of_cells_are_shown_as_they_come(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    with held(model) as hold:
        request = model.submit("Once", max_tokens=8, ignore_eos=True)
        hold.wait()
        hold.step(3)
        wait_until(lambda: browser.requests.get(1, {}).get("tokens") == request.generated)
        assert browser.requests[1]["status"] == "running"
        assert browser.requests[1]["text"] == request.text
        assert browser.now["running"] == 1
    gen = request.result(60)
    (told,) = browser.ended(1)
    assert (told["text"], told["tokens"], told["origin"]) == (gen.text, 8, "cell")
    assert len(browser.tables["tokens"]) == 7
    assert [gap for _, gap, _ in browser.tables["tokens"]] == pytest.approx(
        [1e3 * gap for gap in gen.latency.itl]
    )


# -- live: what is sent, and to whom --------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
def test_where_nothing_happens_there_is_a_beat(
    browse: Callable[..., Browser],
    model: ik.Model,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LivePlot],
) -> None:
    monkeypatch.setattr(live, "_BEAT", 0.05)
    browser = browse(model, kind=kind)
    wait_until(lambda: browser.messages.count("beat") > 2)
    assert browser.messages.count("update") <= 2  # there was nothing to tell


def test_nothing_is_sent_where_nobody_looks(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_BEAT", 0.02)
    browser = browse(model, kind=LivePlot)
    browser.panel._watched_until = time.monotonic() - 1  # it was
    wait_until(lambda: not browser.panel._followed)
    with browser.panel._sending:  # no message is on its way
        before = len(browser.messages)
    model.generate("Once", max_tokens=6)
    time.sleep(0.1)
    assert len(browser.messages) == before
    browser.hello()  # the page is seen again
    assert browser.requests[1]["tokens"] == len(browser.tables["tokens"]) + 1


def test_a_run_that_was_seen_to_begin_is_told_to_its_end(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model, kind=LivePlot)
    panel = browser.panel
    with held(model) as hold:
        request = model.submit("Once", **LONG)
        hold.wait()
        wait_until(lambda: panel._feed.live and browser.requests)
        panel._watched_until = time.monotonic() - 1
        hold.step(3)
        wait_until(lambda: browser.requests[1]["tokens"] >= 3)
        panel._cell_runs = True  # a cell's next run belongs to it: without subshells nobody can say
        request.cancel()
    wait_until(lambda: browser.requests[1]["status"] == "cancelled")
    with held(model) as hold:
        model.submit("Once", max_tokens=6, ignore_eos=True)
        hold.wait()
        wait_until(lambda: 2 in browser.requests)
    wait_until(lambda: browser.requests[2]["status"] == "length")
    panel._cell_runs = False
    wait_until(lambda: not panel._followed)
    model.generate("Once", max_tokens=6)
    assert 3 not in browser.requests


def test_who_watches_is_sent_more(browse: Callable[..., Browser], model: ik.Model) -> None:
    browser = browse(model)
    assert browser.panel._watched_until == pytest.approx(time.monotonic() + 30, abs=10)
    browser.tell({"type": "watch"})
    model.generate("Once", max_tokens=6)
    browser.ended(1)
    assert browser.wholes == 1
    browser.panel._watched_until = time.monotonic() - 1
    browser.tell({"type": "watch"})  # it may have missed something
    wait_until(lambda: browser.wholes == 2)


def test_a_message_that_nobody_knows_changes_nothing(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    browser.tell({"type": "dance"})
    browser.tell({})
    browser.act("dance")
    browser.settle()
    assert not browser.parts.get("failure")


def test_the_saved_notebook_keeps_a_picture_of_the_last_run(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr(live, "show", lambda bundle, **more: shown.append((bundle, more)))
    browser = browse(model)
    browser.panel._ipython_display_()
    view, *still = shown
    assert "application/vnd.jupyter.widget-view+json" in view[0]
    assert "run this cell" in view[0]["text/html"]
    slots = [f"{browser.panel._slot}-picture", f"{browser.panel._slot}-requests"]
    assert [more["display_id"] for _, more in still] == slots
    assert "no token yet" in still[0][0]["image/svg+xml"]
    shown.clear()
    with seen(browser, model):
        browser.send("one", prompt="Once <b>", **SIX)
    wait_until(lambda: len(shown) >= 2)
    newest = {more["display_id"]: bundle for bundle, more in shown if more["update"]}
    check_svg(newest[slots[0]]["image/svg+xml"])
    assert "Once &lt;b&gt;" in newest[slots[1]]["text/html"]
    assert "length" in newest[slots[1]]["text/plain"]


def test_a_terminal_says_that_it_shows_no_panel(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "get_ipython", object)  # a shell that has no kernel
    panel = Panel(model)
    panel._ipython_display_()
    assert capsys.readouterr().out.count("\n") == 1
    assert panel._ticker is None
    panel.close()


def threads_of_panels() -> list[threading.Thread]:
    names = ("inferkit-live", "inferkit-panel", "inferkit-send")
    return [thread for thread in threading.enumerate() if thread.name in names]


def test_a_closed_panel_has_no_threads_and_leaves_the_model(model: ik.Model) -> None:
    before = threads_of_panels()
    browser = Browser(Panel(model))
    browser.hello()
    browser.send("one", prompt="Once", **SIX)
    browser.settle()
    browser.ended(1)
    mine = [thread for thread in threads_of_panels() if thread not in before]
    assert {t.name for t in mine} == {"inferkit-live", "inferkit-panel", "inferkit-send"}
    browser.panel.close()
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()
    sent = len(browser.messages)
    browser.act("unload")
    browser.tell({"type": "hello"})
    model.generate("Once", max_tokens=2)
    assert len(browser.messages) == sent
    assert model.loaded
    assert browser.panel._feed._submitted not in model._engine.on_submit
    browser.panel.close()  # twice


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("thing", ["x", 7, Panel, {}])
def test_only_a_model_can_be_shown(kind: type[LivePlot], thing: Any) -> None:
    with pytest.raises(ik.OptionError, match="is no model"):
        kind(thing)


def test_a_model_that_is_gone_is_not_shown(own: ik.Model, model: ik.Model) -> None:
    own.unload()
    panel = Panel(own)
    assert panel.model is None or panel.model is model
    panel.close()


def in_python(code: str) -> str:
    """Run it in a process of its own; return what that complains of."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    return done.stderr


def test_a_panel_is_there_before_torch() -> None:
    in_python(
        "import sys; import inferkit as ik; panel = ik.Panel(); "
        "assert 'torch' not in sys.modules; assert 'plotly' not in sys.modules"
    )


def test_the_names_of_the_form_are_the_fields_of_the_browser(root: Path) -> None:
    source = (root / "inferkit/notebook/static/panel.js").read_text(encoding="utf-8")
    used = set(re.findall(r"\b(?:input|setting|toggle|checkbox)\(\"(\w+)\"", source))
    used |= set(re.findall(r"^  \[\"(\w+)\", \"", source, flags=re.MULTILINE))
    used |= set(re.findall(r"inputs\.(\w+) =", source))
    assert used == set(EMPTY)


def test_the_tables_of_the_browser_have_the_columns_of_the_feed(root: Path) -> None:
    source = (root / "inferkit/notebook/static/store.js").read_text(encoding="utf-8")
    (told,) = re.findall(r"const COLUMNS = \{(.*?)\};", source)
    assert {n: int(w) for n, w in re.findall(r"(\w+): (\d+)", told)} == {
        name: len(columns) for name, columns in COLUMNS.items()
    }


def test_clicks_are_taken_by_the_subshell_that_they_come_to() -> None:
    class Comm:
        def _reply_subshell_for(self, data: Any, default: Any) -> Any:
            return "the main shell"

    comm = Comm()
    live._answer_on_the_way_it_came(comm)
    assert comm._reply_subshell_for({"method": "custom"}, "where it came") == "where it came"


def test_a_comm_of_another_kernel_is_left_as_it_is() -> None:
    comm = SimpleNamespace()
    live._answer_on_the_way_it_came(comm)
    live._answer_on_the_way_it_came(None)
    assert vars(comm) == {}


def test_ipykernels_comm_has_the_method_that_is_overridden() -> None:
    """Where ipykernel renames it, clicks wait for the end of a cell again, and no one is told."""
    from ipykernel.comm.comm import BaseComm

    assert list(inspect.signature(BaseComm._reply_subshell_for).parameters) == [
        "self",
        "data",
        "default",
    ]


# -- what was wrong once --------------------------------------------------------------------------


class Shell:
    """An IPython shell whose kernel runs a cell of JupyterLab's."""

    def __init__(self) -> None:
        self.cell = "first"
        self.kernel = self
        self.events = self
        self.called: list[Any] = []

    def get_parent(self) -> dict[str, Any]:
        return {"metadata": {"cellId": self.cell}}

    def register(self, _: str, work: Any) -> None:
        self.called.append(work)

    def unregister(self, _: str, work: Any) -> None:
        self.called.remove(work)


def test_a_cell_that_is_run_again_leaves_no_view_at_work(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, listeners = Shell(), len(model._engine.on_submit)
    monkeypatch.setattr(live, "get_ipython", lambda: shell)
    monkeypatch.setattr(live, "show", lambda *_, **__: None)
    views = [LivePlot(model) for _ in range(3)]
    assert len(model._engine.on_submit) == listeners  # nobody has shown one
    for view in views:
        view._ipython_display_()
    views[-1]._ipython_display_()  # the same again
    assert [view._ticker is not None for view in views] == [False, False, True]
    assert len(model._engine.on_submit) == listeners + 1
    assert shell.called == [views[-1]._cell_begins, views[-1]._cell_ended]
    shell.cell = "second"
    views[-1]._ipython_display_()
    shell.cell = "first"
    views[0]._ipython_display_()
    assert views[-1]._ticker is not None  # it is shown by the second cell still
    for view in views:
        view.close()
    assert shell.called == []
    assert len(model._engine.on_submit) == listeners


def test_the_toggles_follow_what_cells_change(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    own.configure(batching="static", max_batch=2)
    browser.wait("model", lambda told: told["max_batch"] == 2)
    browser.wait("form", lambda form: (form["batching"], form["max_batch"]) == ("static", "2"))


def test_a_loaded_model_has_no_plan(browse: Callable[..., Browser], folder: Path) -> None:
    browser = browse()
    browser.type(ref=str(folder), max_batch="3", context="128", device="cpu")
    browser.wait("plan")
    browser.act("load")
    browser.wait("model")
    browser.settle()
    assert browser.parts["plan"] is None


def test_who_watches_again_misses_nothing(browse: Callable[..., Browser], model: ik.Model) -> None:
    """A busy kernel without subshells hears no ``watch`` for as long as a cell takes."""
    browser = browse(model, kind=LivePlot)
    browser.panel._watched_until = 0.0
    model.generate("Once", max_tokens=6)
    feed = browser.panel._feed
    wait_until(lambda: feed._ended and not feed._live)
    browser.tell({"type": "watch"})
    time.sleep(0.2)
    assert browser.requests[1]["tokens"] == 6


def test_what_is_wrong_with_a_prompt_stays_said(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    browser.settle()
    go = threading.Event()
    browser.panel._changes.do(lambda: go.wait(60) and None)
    browser.send("one", prompt=" ")
    browser.wait("errors")
    go.set()
    browser.settle()
    assert list(browser.parts["errors"]) == ["prompt"]


def test_sending_takes_no_error_of_another_field_away(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    browser.type(context="x", prompt="Once", max_tokens="1")
    browser.wait("errors")
    browser.settle()
    browser.send("one")
    browser.settle()
    assert list(browser.parts["errors"]) == ["context"]


def test_what_is_picked_holds_though_another_field_is_wrong_which_stays(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    browser.pick(max_batch="0")
    browser.pick(batching="static")
    browser.pick(context="128")
    browser.settle()
    assert (own.batching, own.context) == ("static", 128)
    form = browser.parts["form"]
    assert (form["batching"], form["context"], form["max_batch"]) == ("static", "128", "0")
    assert list(browser.parts["errors"]) == ["max_batch"]
    browser.pick(max_batch="3")
    browser.settle()
    assert own.max_batch == 3
    assert browser.parts["errors"] == {}
    assert browser.parts["form"]["context"] == "128"


def test_what_was_refused_stays_said_while_prompts_are_sent(
    browse: Callable[..., Browser], own: ik.Model
) -> None:
    browser = browse(own)
    browser.pick(context="9999999999")
    browser.settle()
    assert "context" in browser.parts["errors"]
    browser.send("one", prompt="Once", max_tokens="1")
    browser.settle()
    browser.send("one", prompt=" ")
    browser.settle()
    assert set(browser.parts["errors"]) == {"context", "prompt"}
    browser.send("one", prompt="Once")
    browser.settle()
    assert set(browser.parts["errors"]) == {"context"}
    browser.type(context="64")
    browser.settle()
    assert browser.parts["errors"] == {}


def test_memory_is_told_of_the_model_that_ran(
    browse: Callable[..., Browser], own: ik.Model, model: ik.Model
) -> None:
    browser = browse(own)
    own.generate("Once", max_tokens=1)
    browser.ended(1)
    wait_until(lambda: "KV cache" in dict(browser.parts.get("summary") or ()))
    request = own.submit("Once", max_tokens=100, ignore_eos=True)
    browser.act("attach", model=model.name)
    browser.settle()
    request.result()
    browser.ended(2)
    wait_until(lambda: "KV cache" not in dict(browser.parts["summary"]))


def test_a_beat_tells_the_present_whatever_else_is_told(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    wait_until(lambda: browser.panel._put("work", {"what": time.monotonic()}) or browser.beats)
    assert browser.beats[-1]["p50"] is None


def test_a_run_that_nobody_saw_running_is_summed_up(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    with browser.panel._sending:  # as between two looks, which are 0.1 s apart
        model.generate("Once", max_tokens=1)
    browser.ended(1)
    time.sleep(0.1)
    assert dict(browser.parts["summary"])["last run"] == "1 request"


def test_an_emptied_field_shows_what_is_again(
    browse: Callable[..., Browser], model: ik.Model
) -> None:
    browser = browse(model)
    browser.pick(context="")
    browser.settle()
    assert browser.parts["form"]["context"] == "256"


def test_a_refused_view_goes_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    for kind in MODULES:
        with pytest.raises(ik.OptionError):
            kind("x")
    gc.collect()
    assert seen == []


def test_a_panel_that_is_closed_while_it_loads_hears_of_no_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, load = threading.Event(), registry.load

    def slow(*args: Any, **options: Any) -> ik.Model:
        assert go.wait(60)
        return load(*args, **options)

    monkeypatch.setattr(registry, "load", slow)
    browser = Browser(Panel())
    browser.act("load", {"ref": str(folder), "context": "64"})
    browser.wait("work")
    browser.panel.close()
    go.set()
    browser.panel._changes._thread.join(60)
    (loaded,) = ik.models()  # a job that has begun goes on
    assert loaded._engine.on_submit == []


def test_a_process_with_a_panel_ends_quietly() -> None:
    assert in_python("import inferkit as ik; panel = ik.Panel()") == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_live_plot_goes_on_after_an_error(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def poll(_: Feed) -> None:
        failed.set()
        raise RuntimeError("boom")

    browser = browse(model, kind=LivePlot)
    with monkeypatch.context() as patched:
        patched.setattr(Feed, "poll", poll)
        assert failed.wait(60)
    browser.panel._ticker.join(0.2)
    assert browser.panel._ticker.is_alive()


def test_a_hello_is_answered_after_an_error(
    browse: Callable[..., Browser], model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = browse(model)
    with monkeypatch.context() as patched:
        patched.setattr(Feed, "now", lambda self: 1 / 0)
        browser.tell({"type": "hello"})
        browser.wait("failure")
    time.sleep(0.2)
    assert browser.wholes == 2


def test_a_closed_panel_can_be_shown(model: ik.Model) -> None:
    panel = Panel(model)
    panel.close()
    panel._ipython_display_()


# -- in a tab of JupyterLab ------------------------------------------------------------------------


def test_the_panel_of_a_tab_is_of_the_model_that_is_asked_for(folder: Path) -> None:
    first = ik.load(folder, **OPTIONS, name="first")
    ik.load(folder, **OPTIONS, name="second")
    shown = actions.panel("first")
    try:
        assert shown.model is first
        first.unload()
        shown._follow()
        assert shown.model is not None
        assert shown.model.name == "second"
        with pytest.raises(ik.InferkitError, match=r"No model 'first' is loaded .*: 'second'"):
            actions.panel("first")
        again = ik.load(folder, **OPTIONS, name="first")
        assert actions.panel("first") is shown
        assert shown.model is again
    finally:
        shown.close()
    other = actions.panel("first")  # a closed one shows nothing
    assert other is not shown
    other.close()


def test_the_panel_of_a_closed_tab_rests_and_goes_with_its_model(folder: Path) -> None:
    comms = get_comm_manager().comms
    before = set(comms)
    model = ik.load(folder, **OPTIONS, name="first")
    shown = actions.panel("first")
    shown._start()
    thread = shown._ticker
    assert thread is not None
    actions.put_away("first")
    thread.join(10)
    assert not thread.is_alive()
    assert actions.panel("first") is shown  # with all that it has shown
    actions.put_away("first")
    assert actions.do("stop", model="first").answer.ok
    assert not shown._closed
    model.unload()
    shown._start()  # another page shows it
    actions.do("stop")
    assert not shown._closed
    actions.put_away("first")
    assert shown._closed
    assert set(comms) == before
    actions.put_away("first")  # twice, or of what never was: nothing
