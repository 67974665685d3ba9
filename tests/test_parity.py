"""Parity: greedy tokens are those of transformers' generate, run on each prompt alone, in fp32.

Small models are random, so that no token is likelier by habit; what a test compares is decisive:
a prompt is drawn until generate's best token leads the second by far more than fp32 rounds.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers

import inferkit as ik
from inferkit.engine.guesses import Lookups
from inferkit.engine.request import Request
from inferkit.engine.scheduler import POLICIES

TOKENS = 24
CONTEXT = 192
LEAD = 1e-3  # logits are of the order of 1 to 10; fp32 rounds them by about 1e-5


@dataclass(frozen=True)
class Case:
    """A prompt, and what generate says after it."""

    prompt: tuple[int, ...]
    wanted: tuple[int, ...]


def generate_alone(
    module: Any, prompt: Sequence[int], tokens: int = TOKENS
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Greedy tokens, and the logits [tokens, vocab] that each was chosen from."""
    ids = torch.tensor([list(prompt)])
    out = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return tuple(out.sequences[0, len(prompt) :].tolist()), torch.cat(out.logits)


@cache
def reference(arch: str) -> Any:
    """The same weights as `tiny_model` saves, which know no end token."""
    module, _ = architectures.build(arch)
    module.generation_config.eos_token_id = None
    return module


def decisive(
    arch: str, draw: Callable[[random.Random], list[int]], tokens: int = TOKENS, seed: int = 0
) -> Case:
    for attempt in itertools.count():
        prompt = draw(random.Random(1000 * seed + attempt))
        wanted, logits = generate_alone(reference(arch), prompt, tokens)
        best = logits.topk(2).values
        if (best[:, 0] - best[:, 1]).min() > LEAD:
            return Case(tuple(prompt), wanted)
    raise AssertionError


def words(dice: random.Random, count: int) -> list[int]:
    return [dice.randrange(3, architectures.VOCABULARY) for _ in range(count)]


@cache
def ragged(arch: str) -> tuple[Case, ...]:
    """Eight prompts, from 1 token to ones that pass every window; three begin alike."""
    shared = words(random.Random(42), 40)
    lengths = ((0, 26), (40, 5), (0, 1), (0, 110), (40, 19), (0, 9), (33, 12), (0, 58))
    cases = tuple(
        decisive(arch, lambda dice, n=n, own=own: shared[:n] + words(dice, own), seed=seed)
        for seed, (n, own) in enumerate(lengths)
    )
    # Output that repeats one token could not tell a right cache from a wrong one.
    assert statistics.median(len(set(c.wanted)) for c in cases) >= TOKENS / 3
    return cases


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread where the model is small: more only wait for each other."""
    before = torch.get_num_threads()
    if not request.node.get_closest_marker("demo"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., ik.Model]]:
    """Load a small model by its architecture's name; unload it at the end."""
    loaded = []

    def of(arch: str, **options: Any) -> ik.Model:
        settings = {"dtype": "float32", "context": CONTEXT, "max_batch": 3, "prefill_chunk": 8}
        loaded.append(
            ik.load(tiny_model(arch), device="cpu", progress=False, name=arch, **settings | options)
        )
        return loaded[-1]

    yield of
    for model in loaded:
        model.unload()


def submit(model: ik.Model, case: Case, tokens: int = TOKENS) -> Request:
    return model.submit(list(case.prompt), max_tokens=tokens, ignore_eos=True)


def submit_in_turns(model: ik.Model, cases: Sequence[Case]) -> list[Request]:
    """Some prompts; more once those have produced tokens; the rest later still."""
    requests = [submit(model, case) for case in cases[:3]]
    wait_for_tokens(requests[0], 5)
    requests += [submit(model, case) for case in cases[3:6]]
    wait_for_tokens(requests[3], 3)
    return requests + [submit(model, case) for case in cases[6:]]


def wait_for_tokens(request: Request, count: int) -> None:
    while len(request.token_ids) < count and not request.done:
        time.sleep(0.0005)


def check(requests: Sequence[Request], cases: Sequence[Case]) -> list[ik.Generation]:
    done = [r.result(120).raise_for_error() for r in requests]
    for gen, case in zip(done, cases, strict=True):
        assert gen.token_ids == case.wanted[: len(gen.token_ids)], len(case.prompt)
        assert len(gen.token_ids) == gen.params.max_tokens or gen.finish_reason == "cancelled"
    return done


# -- over slots -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "chunk", "reuse"),
    [
        *(("continuous", chunk, reuse) for chunk in (8, 512) for reuse in (True, False)),
        ("static", 8, True),
        ("static", 512, False),
        ("off", 8, False),
        ("off", 512, True),
    ],
)
@pytest.mark.parametrize("arch", architectures.CONFIGS)
def test_a_ragged_batch_admitted_in_turns_gives_the_tokens_of_generate_alone(
    load, arch, policy, chunk, reuse
):
    rows = 8 if chunk == 512 else 3  # all eight at once, or some that wait for a slot
    model = load(arch, batching=policy, prefix_reuse=reuse, prefill_chunk=chunk, max_batch=rows)
    assert model.fallback is None
    done = check(submit_in_turns(model, ragged(arch)), ragged(arch))
    reused = [gen.latency.trace.cached_tokens for gen in done]
    assert (max(reused) >= 33) is reuse


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arch", architectures.UNUSUAL)
def test_unusual_attention_gives_the_tokens_of_generate_alone(load, arch, policy):
    model = load(arch, batching=policy)
    assert model.fallback is None
    check(submit_in_turns(model, ragged(arch)), ragged(arch))


def guesses_of(cases: Sequence[Case], dice: random.Random) -> Callable[..., list[int]]:
    """What comes next, as it is known, and every third guess from some token on wrong."""
    known = {case.prompt: [*case.prompt, *case.wanted] for case in cases}

    def guess(tokens: Sequence[int], room: int) -> list[int]:
        text = next(t for prompt, t in known.items() if tuple(tokens[: len(prompt)]) == prompt)
        found = text[len(tokens) : len(tokens) + max(0, min(room, dice.randrange(6)))]
        if found and not dice.randrange(3):
            wrong = dice.randrange(len(found))
            found[wrong:] = [dice.randrange(architectures.VOCABULARY) for _ in found[wrong:]]
        return found

    def guess_all(self: Lookups, entries: Any, rooms: Sequence[int]) -> list[list[int]]:
        return [guess(e.tokens, room) for e, room in zip(entries, rooms, strict=True)]

    return guess_all


@pytest.mark.parametrize(
    ("arch", "chunk"),
    [
        *((arch, 8) for arch in architectures.CONFIGS),
        *((arch, 512) for arch in (*architectures.UNUSUAL, "gemma3", "gpt2")),
    ],
)
def test_guessed_tokens_change_nothing_right_or_wrong(load, arch, chunk, monkeypatch):
    cases = ragged(arch)
    monkeypatch.setattr(Lookups, "learn", lambda *_: None)
    monkeypatch.setattr(Lookups, "guess", guesses_of(cases, random.Random(7)))
    model = load(arch, prefill_chunk=chunk, speculative="ngram", max_batch=4)
    done = check(submit_in_turns(model, cases), cases)
    done += check(submit_in_turns(model, cases), cases)  # over what the first ones left
    guessed = sum(gen.latency.trace.draft_tokens for gen in done)
    right = sum(gen.latency.trace.accepted_tokens for gen in done)
    assert 0 < right < guessed
    assert sum(len(gen.latency.itl) for gen in done) < len(done) * (TOKENS - 1) - right // 2


@pytest.mark.parametrize("arch", ["gemma3", "mistral", "phi3_window", "gpt_oss", "llama4"])
def test_guesses_go_round_the_ring_and_end_with_the_context(load, arch, monkeypatch):
    cases = [decisive(arch, lambda dice, n=n: words(dice, n)) for n in (300, 129, 250)]
    monkeypatch.setattr(Lookups, "learn", lambda *_: None)
    monkeypatch.setattr(Lookups, "guess", guesses_of(cases, random.Random(3)))
    model = load(arch, context=300 + TOKENS, prefill_chunk=10, speculative="ngram")
    check([submit(model, case) for case in cases], cases)


@pytest.mark.parametrize("arch", ["gemma3", "mistral", "phi3_window", "gpt_oss", "llama4"])
def test_prompts_longer_than_the_ring_of_a_window_layer(load, arch):
    """A window of 8 and chunks of 60 make rings of 128 positions; these prompts go round twice."""
    cases = [decisive(arch, lambda dice, n=n: words(dice, n)) for n in (300, 129, 250)]
    model = load(arch, context=384, prefill_chunk=60)
    assert model.fallback is None
    check([submit(model, case) for case in cases], cases)


@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_learned_positions_up_to_the_last_one(load, arch):
    lengths = (architectures.LEARNED_CONTEXT - 1, architectures.LEARNED_CONTEXT - 12, 3)
    cases = [
        decisive(arch, lambda dice, n=n: words(dice, n), architectures.LEARNED_CONTEXT - n)
        for n in lengths[:2]
    ]
    cases.append(decisive(arch, lambda dice: words(dice, 3)))
    model = load(arch, context=architectures.LEARNED_CONTEXT, prefill_chunk=100)
    requests = [submit(model, case) for case in cases]
    done = [r.result(120) for r in requests]
    assert [g.token_ids for g in done] == [c.wanted for c in cases]
    assert [g.finish_reason for g in done] == ["length"] * 3


def test_switching_the_policy_while_requests_wait_changes_no_token(load):
    model = load("gemma3", max_batch=2, batching="off")
    cases = ragged("gemma3")
    requests = [submit(model, case) for case in cases]
    for policy, request in zip(("static", "continuous", "off", "continuous"), requests[1:]):
        wait_for_tokens(request, 4)
        model.configure(batching=policy)
    check(requests, cases)


def test_changing_the_slots_while_requests_wait_changes_no_token(load):
    model = load("gemma3", max_batch=2)
    cases = ragged("gemma3")
    requests = [submit(model, case) for case in cases]
    wait_for_tokens(requests[1], 4)
    model.configure(max_batch=4, context=160)
    check(requests, cases)


# -- prefix reuse -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "deepseek_v3"])
def test_the_next_turns_of_a_chat_continue_in_the_cache(load, arch):
    model = load(arch)
    case = decisive(arch, lambda dice: words(dice, 20))
    for turn in range(3):
        (gen,) = check([submit(model, case)], [case])
        assert (gen.latency.trace.cached_tokens > 0) is (turn > 0)
        said = [*case.prompt, *case.wanted]
        assert gen.latency.trace.cached_tokens in (0, len(case.prompt) - 8)
        case = decisive(arch, lambda dice, said=said: said + words(dice, 7))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_a_prefix_is_taken_over_from_a_request_that_runs(load, arch):
    donor, heir = ragged(arch)[1], ragged(arch)[4]
    model = load(arch)
    first = submit(model, donor)
    wait_for_tokens(first, 2)
    gen = check([first, submit(model, heir)], [donor, heir])[1]
    assert gen.latency.trace.cached_tokens == 40


def test_a_prefix_that_a_window_layer_has_overwritten_is_computed_again(load):
    donor = ragged("mistral")[3]
    early = decisive("mistral", lambda dice: [*donor.prompt[:30], *words(dice, 9)])
    model = load("mistral")
    check([submit(model, donor)], [donor])
    (gen,) = check([submit(model, early)], [early])
    assert gen.latency.trace.cached_tokens == 0


def test_a_failed_request_does_not_spoil_the_slot_that_it_leaves(tiny_model, tmp_path):
    """NaN in a masked position is still NaN: it must not stay in the cache."""
    module, tokenizer = architectures.build("llama")
    bad = 77
    module.get_input_embeddings().weight.data[bad] = torch.nan
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cases = [c for c in ragged("llama") if bad not in c.prompt + c.wanted]
    assert len(cases) > 2
    with ik.load(
        tmp_path, device="cpu", dtype="float32", context=CONTEXT, max_batch=1, progress=False
    ) as model:
        for case in cases:
            broken = model.submit([*case.prompt[:5], bad, 5], max_tokens=4).result(60)
            assert isinstance(broken.error, ik.NonFiniteLogitsError)
            check([submit(model, case)], [case])


# -- one at a time ----------------------------------------------------------------------------

REASONS = {
    "mamba": "MambaForCausalLM keeps a recurrent state",
    "bloom": "BloomForCausalLM has an attention of its own",
    "falcon": "FalconForCausalLM has an attention of its own",
    "qwen3_next": "Qwen3NextForCausalLM keeps a recurrent state",
    "gemma3n": "Gemma3nForCausalLM has layers without a KV cache of their own",
    "phi3_long": "Phi3ForCausalLM changes its rotary positions for all rows",
    "llama4_tuned": "Llama4ForCausalLM computes with one length for all rows",
}


@pytest.mark.parametrize("arch", architectures.SEQUENTIAL)
def test_what_cannot_share_a_batch_runs_one_by_one_and_says_why(load, arch, caplog):
    with caplog.at_level(logging.WARNING, logger="inferkit"):
        model = load(arch)
    assert model.fallback.startswith(REASONS[arch])
    assert REASONS[arch] in caplog.text
    assert REASONS[arch] in repr(model)
    check(submit_in_turns(model, ragged(arch)), ragged(arch))


@pytest.mark.parametrize("arch", ["llama4_tuned", "phi3_long"])
def test_a_context_at_which_batches_would_be_wrong_is_refused(load, arch):
    """Below, the attention of the one is not sharpened and the other has its short positions."""
    model = load(arch, context=20)
    assert model.fallback is None
    case = decisive(arch, lambda dice: words(dice, 10), tokens=8)
    with pytest.raises(ik.OptionError, match=r"context=48 is too long .* Up to 20"):
        model.configure(context=48)
    assert model.context == 20
    check([submit(model, case, 8)], [case])
    model.unload()
    model = load(arch, context=48)
    assert model.fallback is not None
    case = decisive(arch, lambda dice: words(dice, 22))
    check([submit(model, case)], [case])


def test_one_by_one_the_request_and_not_the_generation_config_says_when_it_ends(tmp_path):
    module, tokenizer = architectures.build("bloom")
    case = ragged("bloom")[0]
    end = case.wanted[4]
    first = case.wanted.index(end)
    module.generation_config.update(
        eos_token_id=end, repetition_penalty=5.0, suppress_tokens=list(case.wanted), max_length=4
    )
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with ik.load(tmp_path, device="cpu", dtype="float32", context=CONTEXT, progress=False) as model:
        on = model.generate(list(case.prompt), max_tokens=TOKENS, ignore_eos=True)
        ends = model.generate(list(case.prompt), max_tokens=TOKENS)
    assert on.token_ids == case.wanted
    assert (ends.token_ids, ends.finish_reason) == (case.wanted[: first + 1], "stop")


def test_one_by_one_a_cancelled_request_ends_and_the_next_one_runs(load):
    model = load("mamba")
    cases = ragged("mamba")
    first = model.submit(list(cases[0].prompt), max_tokens=150, ignore_eos=True)
    second = submit(model, cases[1])
    wait_for_tokens(first, 3)
    first.cancel()
    check([second], [cases[1]])
    gen = first.result(60)
    assert gen.finish_reason == "cancelled"
    assert 3 <= len(gen.token_ids) < 150


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    config = transformers.T5Config(
        vocab_size=architectures.VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    architectures.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ik.UnsupportedModelError, match=r"(?i)t5"):
        ik.load(tmp_path, device="cpu", progress=False)


# -- random traffic ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gemma3", "llama"])
def test_random_arrivals_lengths_and_cancellations(load, arch):
    dice = random.Random(3)
    pool = [words(dice, 90) for _ in range(3)]
    cases = []
    for seed in range(40):
        start, own = dice.choice(pool)[: dice.choice((0, 0, 25, 60, 90))], dice.randint(1, 20)
        cases.append(
            decisive(arch, lambda d, start=start, own=own: start + words(d, own), seed=seed)
        )
    model = load(arch, max_batch=4)
    requests = []
    for case in cases:
        requests.append(submit(model, case, dice.randint(1, TOKENS)))
        if dice.random() < 0.15:
            dice.choice(requests).cancel()
        if dice.random() < 0.1:
            model.configure(batching=dice.choice(POLICIES))
        time.sleep(dice.choice((0, 0, 0.01, 0.03)))
    done = check(requests, cases)
    assert sum(g.finish_reason == "length" for g in done) > 20
    assert model.running == model.waiting == 0


# -- the real model ---------------------------------------------------------------------------

LONG = (
    "The library keeps a list of every book that it lends, with the name of the reader, the day "
    "on which the book left the house and the day on which it came back. "
) * 20
DEMO_PROMPTS = (
    "Once upon a time",
    "Q: What is the capital of France?\nA:",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "1, 2, 4, 8, 16,",
    "日本の首都は",
    "Dear Sir or Madam,\n\nI am writing to",
    LONG,
)


def demo(path: Path, dtype: torch.dtype) -> Any:
    module = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    module.generation_config = transformers.GenerationConfig()
    return module


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_model_in_fp32_gives_the_tokens_of_generate_at_batch_1_and_8(demo_model_path):
    with ik.load("demo", device="cpu", dtype="float32", context=2048, max_batch=8) as model:
        prompts = [tuple(model.tokenizer(p)["input_ids"]) for p in DEMO_PROMPTS]
        assert len(prompts[-1]) > 512  # the window
        module = demo(demo_model_path, torch.float32)
        cases = [Case(p, generate_alone(module, p, 12)[0]) for p in prompts]
        del module
        check([submit(model, case, 12) for case in cases], cases)
        for case in (cases[0], cases[-1]):
            check([submit(model, case, 12)], [case])


@pytest.mark.thorough
@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_model_in_bf16_first_differs_from_generate_where_two_logits_round_alike(
    demo_model_path, record_property
):
    with ik.load("demo", device="cpu", dtype="bfloat16", context=2048, max_batch=8) as model:
        prompts = [*DEMO_PROMPTS[:-1:3], LONG[:800]]
        done = model.generate(prompts, max_tokens=16, ignore_eos=True)
    module = demo(demo_model_path, torch.bfloat16)
    report = []
    for gen in done:
        wanted, logits = generate_alone(module, gen.prompt_token_ids, 16)
        pairs = enumerate(zip(gen.token_ids, wanted, strict=True))
        first = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
        found = {"prompt": gen.prompt[:20], "first difference": first}
        if first is not None:
            ours, theirs = (logits[first, t[first]].item() for t in (gen.token_ids, wanted))
            found |= {"gap": theirs - ours, "one step of bf16": bf16_step(theirs)}
        report.append(found)
    record_property("bf16 against generate", json.dumps(report))
    print(*report, sep="\n")
    for found in report:  # each of the two logits may be a step off
        assert found.get("gap", 0) <= 2 * found.get("one step of bf16", 0), found


def bf16_step(x: float) -> float:
    """The distance between neighbouring bf16 numbers at x."""
    value = torch.tensor(abs(x), dtype=torch.bfloat16)
    return (torch.nextafter(value, torch.tensor(torch.inf, dtype=torch.bfloat16)) - value).item()
