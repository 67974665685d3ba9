"""Speculative decoding: what is guessed, and that the text stays the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import inferkit as ik
from inferkit.engine.guesses import MOST, Lookup, Pace
from inferkit.engine.runner import SlottedRunner

# -- guessing -------------------------------------------------------------------------------------


def test_what_followed_the_same_tokens_last_time_is_guessed():
    lookup = Lookup()
    text = [1, 2, 3, 4, 9, 1, 2, 5, 6, 8, 1, 2]
    assert lookup.guess(text, 2) == [5, 6]
    assert Lookup().guess(text, 1) == [5]
    assert Lookup().guess(text, 0) == []
    assert Lookup().guess([*text[:7], 5, 7, 2, 3], 2) == [4, 9]


def test_the_longest_match_decides():
    text = [7, 1, 2, 3, 50, 8, 2, 3, 60, 7, 1, 2, 3]
    assert Lookup().guess(text, 1) == [50]


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3, 4], [5, 5]])
def test_nothing_is_guessed_of_a_text_without_repetition(text):
    assert Lookup().guess(text, MOST) == []


def test_a_short_repetition_goes_on_as_long_as_there_is_room():
    text = [4, 5] * 6
    assert Lookup().guess(text, MOST) == [4, 5] * (MOST // 2)


def test_tokens_that_come_later_are_taken_in():
    lookup, text, dice = Lookup(), [1, 2, 3], random.Random(0)
    for _ in range(300):
        assert lookup.guess(list(text), 1) == Lookup().guess(list(text), 1)
        text.append(dice.randrange(4))


def test_right_guesses_become_longer_and_wrong_ones_rarer():
    pace, lengths = Pace(), []
    for _ in range(4):
        lengths.append(pace.next())
        pace.learn(lengths[-1], lengths[-1])
    assert lengths == [2, 4, 8, MOST]
    pace.learn(8, 3)
    assert pace.next() == 3
    waits = []
    for _ in range(8):
        pace.learn(1, 0)
        waits.append(0)
        while not pace.next():
            waits[-1] += 1
    assert waits == [1, 2, 4, 8, 16, 32, 32, 32]
    pace.learn(1, 1)
    assert pace.next()


# -- on the demo model ----------------------------------------------------------------------------

QUOTING = (
    "Text: The northern lights, or aurora borealis, are seen where particles from the sun meet the "
    "upper atmosphere, near the magnetic poles.\nText again: The northern lights, or"
)
PROMPTS = (QUOTING, "1, 2, 3, 4, 5, 6, 7,", "Once upon a time", "def add(a, b):\n    return")


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> Iterator[ik.Model]:
    with ik.load(
        demo_model_path, dtype="float32", context=512, max_batch=4, compile=False, progress=False
    ) as model:
        yield model


@pytest.fixture
def model(demo: ik.Model) -> Iterator[ik.Model]:
    yield demo
    demo.configure(speculative="off")


@pytest.mark.demo
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 4, "logprobs": 2},
    ],
    ids=["greedy", "drawn"],
)
def test_the_text_is_the_same_alone_and_in_a_batch(model, options):
    options = {"max_tokens": 24, "ignore_eos": True, **options}
    wanted = model.generate(PROMPTS, **options)
    model.configure(speculative="ngram")
    for got in (model.generate(PROMPTS, **options), [model.generate(PROMPTS[0], **options)]):
        for one, expected in zip(got, wanted, strict=False):
            assert one.token_ids == expected.token_ids
            assert one.text == expected.text
            assert one.settings.speculative == "ngram"
            if one.logprobs:
                ours, theirs = ([e.logprob for e in g.logprobs] for g in (one, expected))
                assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.demo
def test_guesses_are_counted_where_latency_is_shown(model):
    model.configure(speculative="ngram")
    gen = model.generate(QUOTING, max_tokens=24, ignore_eos=True)
    latency, trace = gen.latency, gen.latency.trace
    assert 0 < trace.accepted_tokens <= trace.draft_tokens
    assert latency.acceptance_rate == trace.accepted_tokens / trace.draft_tokens
    # As many chunks as passes; a token more than guessed right in each.
    assert len(latency.itl) == len(set(trace.tokens)) - 1 == 23 - trace.accepted_tokens
    assert all(latency.itl)
    said = f"{trace.accepted_tokens} of {trace.draft_tokens}"
    assert said in repr(latency)
    assert said in latency._repr_html_()
    summary = ik.summarize([gen, model.generate("x", max_tokens=1)])
    assert summary.acceptance_rate == latency.acceptance_rate
    assert said in repr(summary)
    assert summary.to_dict()["acceptance_rate"] == summary.acceptance_rate
    model.configure(speculative="off")
    plain = model.generate(QUOTING, max_tokens=4)
    assert plain.latency.acceptance_rate is None
    assert "accepted" not in repr(ik.summarize([plain]))


@pytest.mark.demo
def test_a_recording_keeps_the_guesses_and_its_replay_makes_them_again(model, tmp_path):
    model.configure(speculative="ngram")
    with ik.record("guessing", path=tmp_path / "g.inferkit.json") as exp:
        gen = model.generate(QUOTING, max_tokens=24, ignore_eos=True)
    again = ik.open(tmp_path / "g.inferkit.json").generations[0]
    assert again.latency.trace.chunks == tuple(
        t - gen.latency.trace.arrival + again.latency.trace.arrival
        for t in gen.latency.trace.chunks
    )
    assert again.latency.acceptance_rate == gen.latency.acceptance_rate
    assert again.settings.speculative == "ngram"
    model.configure(speculative="off")
    replayed = ik.replay(tmp_path / "g.inferkit.json", progress=False)
    assert replayed.ok
    assert replayed.outcomes[0].measured.latency.acceptance_rate == gen.latency.acceptance_rate
    assert model.speculative == "off"
    assert exp.generations[0].token_ids == gen.token_ids


# -- a draft model --------------------------------------------------------------------------------

SMALL = {"device": "cpu", "dtype": "float32", "progress": False, "context": 96, "max_batch": 3}
IDS = [[5, 6, 7, 8] * 6, [9, 3, 1], list(range(3, 43))]


@pytest.fixture
def pair(tiny_model: Callable[[str], Path]) -> Iterator[tuple[ik.Model, ik.Model]]:
    """A model, and the same once more to guess its tokens: all guesses are right."""
    with (
        ik.load(tiny_model("gemma3"), name="served", prefill_chunk=16, **SMALL) as served,
        ik.load(tiny_model("gemma3"), name="small", **SMALL) as draft,
    ):
        yield served, draft


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": [1, 2, 3]}])
def test_the_text_is_the_same_with_a_draft(pair, options):
    served, _ = pair
    options = {"max_tokens": 30, "ignore_eos": True, **options}
    wanted = served.generate(IDS, **options)
    served.configure(speculative="draft:small")
    for _ in range(2):
        got = served.generate(IDS, **options)
        assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
    rate = got.summary().acceptance_rate
    assert rate == 1 if "seed" not in options else 0 < rate < 1
    assert got[0].settings.speculative == "draft:small"
    if rate == 1:
        assert all(len(g.latency.itl) <= 7 for g in got)  # 2, 4 and then 8 guesses, and one more


def test_a_draft_that_is_often_wrong_changes_nothing(tiny_model, pair):
    served, draft = pair
    weights = draft._parts.loaded.module.get_output_embeddings().weight
    wanted = served.generate(IDS, max_tokens=40, ignore_eos=True)
    with torch.no_grad():
        noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
        weights.add_(0.3 * weights.std() * noise)
    served.configure(speculative="draft:small")
    got = served.generate(IDS, max_tokens=40, ignore_eos=True)
    assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
    assert 0 < got.summary().acceptance_rate < 1


def test_it_goes_on_whatever_becomes_of_the_draft(pair):
    served, draft = pair
    wanted = served.generate(IDS, max_tokens=30, ignore_eos=True)

    def check(guessed: bool) -> None:
        got = served.generate(IDS, max_tokens=30, ignore_eos=True)
        assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
        assert (got.summary().acceptance_rate is not None) == guessed

    served.configure(speculative="draft:small")
    check(True)
    served.configure(max_batch=2)
    check(True)
    draft.quantize("int8", progress=False)
    check(True)
    draft.configure(max_batch=1, context=32)
    check(True)
    with draft._engine.held():
        check(False)
    requests = draft.submit(IDS[:1] * 8, max_tokens=20, ignore_eos=True)  # both at once
    got = served.generate(IDS, max_tokens=30, ignore_eos=True)
    assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
    assert {r.result(60).finish_reason for r in requests} == {"length"}
    draft.unload()
    assert served.speculative == "off"
    check(False)


def test_who_guesses_may_change_while_guesses_are_checked(pair, monkeypatch):
    served, _ = pair
    wanted = served.generate(IDS, max_tokens=20, ignore_eos=True)
    served.configure(speculative="draft:small")
    verify, others = SlottedRunner.verify, itertools.cycle(["ngram", "draft:small", "off"])

    def change(self, chunks):
        if self is served._engine.runner:
            served.configure(speculative=next(others))
        return verify(self, chunks)

    monkeypatch.setattr(SlottedRunner, "verify", change)
    got = served.generate(IDS, max_tokens=20, ignore_eos=True)
    assert [g.token_ids for g in got] == [g.token_ids for g in wanted]


def test_a_draft_that_fails_is_given_up(pair, monkeypatch, caplog):
    served, _ = pair
    wanted = served.generate(IDS, max_tokens=20, ignore_eos=True)
    served.configure(speculative="draft:small")
    monkeypatch.setattr("inferkit.engine.drafts.Drafts._next", lambda *_: 1 / 0)
    got = served.generate(IDS, max_tokens=20, ignore_eos=True)
    assert [g.token_ids for g in got] == [g.token_ids for g in wanted]
    assert served.speculative == "off"
    assert "no longer guessed" in caplog.text


def test_what_cannot_guess_is_refused(tiny_model, pair):
    served, _ = pair
    for draft, message in (("nobody", "No model 'nobody'"), ("served", "for itself")):
        with pytest.raises(ik.OptionError, match=message):
            served.configure(speculative=f"draft:{draft}", max_batch=4)
        assert served.max_batch == 3
    with (
        ik.load(tiny_model("mamba"), name="alone", progress=False),
        pytest.raises(ik.OptionError, match="one request at a time"),
    ):
        served.configure(speculative="draft:alone")
    assert served.speculative == "off"
    with pytest.raises(ik.OptionError, match="No model 'nobody'"):
        ik.load(tiny_model("llama"), progress=False, name="not", speculative="draft:nobody")
    assert "not" not in [m.name for m in ik.models()]


def test_another_vocabulary_is_refused(pair, monkeypatch):
    served, draft = pair
    tokenizer = type("T", (), {"get_vocab": lambda self: {}})()
    monkeypatch.setattr(draft._parts.loaded, "tokenizer", tokenizer)
    with pytest.raises(ik.OptionError, match="another vocabulary"):
        served.configure(speculative="draft:small")


# -- the option -----------------------------------------------------------------------------------


def test_the_option_is_checked_shown_and_kept(tiny_model: Callable[[str], Path]):
    path = tiny_model("llama")
    with pytest.raises(ik.InferkitError, match="off, ngram"):
        ik.load(path, speculative="eagle")
    with ik.load(path, progress=False, name="guessing", speculative="ngram") as model:
        assert model.speculative == "ngram"
        assert "speculation=ngram" in repr(model)
        with pytest.raises(ik.InferkitError, match="off, ngram"):
            model.configure(speculative="on")
        assert ik.load(path, progress=False, name="guessing") is model
        assert model.speculative == "off"
        assert "speculation" not in repr(model)


def test_nothing_is_guessed_under_a_penalty(tiny_model: Callable[[str], Path]):
    with ik.load(tiny_model("llama"), progress=False, speculative="ngram") as model:
        gen = model.generate([5, 6] * 8, max_tokens=12, ignore_eos=True, repetition_penalty=1.2)
        assert gen.latency.acceptance_rate is None
        assert len(gen.token_ids) == 12


def test_one_that_runs_alone_guesses_nothing_and_says_so(tiny_model: Callable[[str], Path]):
    with ik.load(tiny_model("mamba"), progress=False, speculative="ngram") as model:
        gen = model.generate([5, 6] * 8, max_tokens=6, ignore_eos=True)
        assert gen.settings.speculative == "off"
        assert gen.latency.acceptance_rate is None
