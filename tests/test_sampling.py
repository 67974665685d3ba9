"""Sampling: the distributions of transformers' processors, exact seeds, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import architectures
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import inferkit as ik
from inferkit.errors import NonFiniteLogitsError, OptionError
from inferkit.sampling import RowSampler, Sampled, SamplingParams, sample

SEEN = (3, 7, 11, 50, 7)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More only wait for each other where tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class AtGrid(RowSampler):
    """Draws with a number that the test chooses."""

    def __init__(self, params: SamplingParams, number: float) -> None:
        super().__init__(params, SEEN)
        self._number = number

    def uniform(self) -> float:
        return self._number


def logits_of(vocab: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def by_transformers(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The probabilities [vocab] that transformers' generate would sample from."""
    steps = LogitsProcessorList()
    if p.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    steps.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        steps.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        steps.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        steps.append(MinPLogitsWarper(p.min_p))
    return steps(torch.tensor([SEEN]), logits.clone()).softmax(dim=-1)[0]


def by_inferkit(logits: torch.Tensor, p: SamplingParams, grid: int) -> torch.Tensor:
    """How often each token comes [vocab] when the random number runs evenly from 0 to 1."""
    counts = Counter[int]()
    for start in range(0, grid, 500):
        rows = [AtGrid(p, (start + i + 0.5) / grid) for i in range(500)]
        counts.update(s.token_id for s in sample(logits.expand(len(rows), -1), rows))
    return torch.tensor([counts[i] / grid for i in range(logits.shape[-1])])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "temperature": 1.4, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_transformers_processors_say(options):
    logits = logits_of(300, spread=2.0) - 6
    logits[0, [3, 7]] = torch.tensor([-1.0, 0.8])  # likely, and one of them negative
    params = SamplingParams(**{"temperature": 1.0} | options)
    wanted, got = by_transformers(logits, params), by_inferkit(logits, params, 4000)
    assert set(got.nonzero()[:, 0].tolist()) <= set(wanted.nonzero()[:, 0].tolist())
    # Inverting the distribution on an even grid gives every token its share to within one point.
    assert (got - wanted).abs().max() <= 1.01 / 4000


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1500}, 1500),
        ({"top_k": 2500, "top_p": 0.9}, None),
        ({"top_p": 0.99}, None),
        ({"min_p": 0.2}, None),
        ({"top_k": 1024}, 1024),
        ({"top_k": 1025}, 1025),
    ],
    ids=str,
)
def test_more_tokens_than_the_first_candidates_are_kept_where_the_options_say_so(options, kept):
    """A flat distribution over 5,000 tokens, of which the sampler first looks at 1,024."""
    logits = logits_of(5000, spread=0.3)
    params = SamplingParams(temperature=1.0, **options)
    wanted = by_transformers(logits, params)
    support = wanted.nonzero()[:, 0].tolist()
    assert len(support) >= 1024
    assert kept is None or len(support) == kept
    got = by_inferkit(logits, params, 1000)
    assert set(got.nonzero()[:, 0].tolist()) <= set(support)
    assert (got - wanted).abs().max() <= 1.01 / 1000
    # The last of the kept tokens is drawn by the largest numbers, and never one beyond it.
    last = sample(logits, [AtGrid(params, 1 - 2**-53)])[0].token_id
    assert last == wanted.masked_fill(wanted == 0, math.inf).argmin()


def test_each_row_of_a_batch_has_options_of_its_own():
    logits = logits_of(2000, spread=2.0)
    mixed = [
        SamplingParams(),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(temperature=1.0, top_k=1500),
        SamplingParams(temperature=3.0, min_p=0.01, repetition_penalty=1.3),
        SamplingParams(logprobs=2),
    ]
    together = sample(logits.expand(len(mixed), -1), [AtGrid(p, 0.37) for p in mixed])
    alone = [sample(logits, [AtGrid(p, 0.37)])[0] for p in mixed]
    assert together == alone
    assert len({s.token_id for s in alone}) >= 3


@pytest.mark.parametrize("vocab", [384, 1000, 2048, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_largest_logit_wherever_it_stands(vocab, dtype):
    logits = logits_of(vocab, 3.0).repeat(5, 1).to(dtype)
    places = [0, 127, 128, vocab // 2, vocab - 1]
    for row, place in enumerate(places):
        logits[row, place] = 100
    logits = torch.cat([logits, torch.full((1, vocab), -torch.inf, dtype=dtype), logits[:1]])
    logits[6, vocab - 2] = torch.nan
    chosen = sample(logits, [RowSampler(SamplingParams(), SEEN) for _ in range(7)])
    assert [c.token_id for c in chosen[:5]] == places
    assert all(isinstance(c.error, NonFiniteLogitsError) for c in chosen[5:])


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_temperature_zero_takes_the_likeliest_token_after_the_penalty(penalty):
    logits = logits_of(300, spread=2.0)
    logits[0, 7] = logits.max() + 0.1
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([SEEN]), logits.clone())
    for temperature in (0, 1e-6, 1e-40):
        params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
        assert sample(logits, [RowSampler(params, SEEN)])[0].token_id == wanted.argmax()
    assert bool(wanted.argmax() == 7) is (penalty == 1.0)


def test_a_low_temperature_does_not_overflow():
    logits = logits_of(300, spread=50.0)
    for top_k in (0, 40):
        params = SamplingParams(temperature=1e-5, top_k=top_k)
        assert sample(logits, [AtGrid(params, 0.999)])[0].token_id == logits.argmax()


def test_generated_tokens_are_penalized_like_those_of_the_prompt():
    logits = torch.tensor([[0.0, 2.0, 1.5, 1.1]])
    row = RowSampler(SamplingParams(repetition_penalty=2.0), [0])
    assert [sample(logits, [row])[0].token_id for _ in range(4)] == [1, 2, 3, 1]


# -- seeds ------------------------------------------------------------------------------------


def test_the_numbers_of_different_seeds_are_even_and_independent():
    """The first two numbers of 4,000 seeds fill an 8 x 8 board evenly (chi-square, 63 degrees)."""
    rows = [RowSampler(SamplingParams(seed=s), [1]) for s in range(4000)]
    counts = Counter((int(8 * r.uniform()), int(8 * r.uniform())) for r in rows)
    expected = 4000 / 64
    assert sum((counts[i, j] - expected) ** 2 / expected for i in range(8) for j in range(8)) < 104


def test_large_seeds_that_are_one_float_differ():
    rows = [RowSampler(SamplingParams(seed=10**300 + extra), [1]) for extra in (0, 0, 1)]
    first, same, other = (row.uniform() for row in rows)
    assert first == same != other


def test_no_seed_draws_one_that_is_told():
    first, second = (RowSampler(SamplingParams(seed=None), [1]) for _ in range(2))
    assert first.seed != second.seed
    assert RowSampler(SamplingParams(seed=first.seed), [1]).uniform() == first.uniform()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    with ik.load(
        tiny_model("llama"), device="cpu", dtype="float32", context=256, max_batch=6, progress=False
    ) as model:
        yield model


PROMPT = [5, 6, 7, 8]
RANDOM = {"temperature": 1.2, "top_p": 0.95, "max_tokens": 20, "ignore_eos": True}


def test_tokens_depend_on_the_seed_and_not_on_who_shares_the_batch(model):
    alone = [model.generate(PROMPT, seed=s, **RANDOM) for s in range(4)]
    assert len({g.token_ids for g in alone}) == 4
    crowd = [
        model.submit([9 + i] * (3 * i + 1), seed=100 + i, temperature=0.5 * i, max_tokens=5 + 4 * i)
        for i in range(5)
    ]
    again = [model.submit(PROMPT, seed=s, **RANDOM) for s in (3, 1, 0, 2)]
    for s, request in zip((3, 1, 0, 2), again, strict=True):
        assert request.result(60).token_ids == alone[s].token_ids
    assert all(r.result(60).error is None for r in crowd)
    model.configure(batching="off")
    assert model.generate([PROMPT], seed=[2], **RANDOM)[0].token_ids == alone[2].token_ids
    model.configure(batching="continuous")


def test_a_list_of_seeds_gives_one_to_each_prompt(model):
    gens = model.generate([PROMPT] * 4, seed=[1, 2, 1, None], **RANDOM)
    assert gens[0].token_ids == gens[2].token_ids != gens[1].token_ids
    assert [g.seed for g in gens[:3]] == [1, 2, 1]
    again = model.generate(PROMPT, seed=gens[3].seed, **RANDOM)
    assert again.token_ids == gens[3].token_ids
    with pytest.raises(OptionError, match="2 entries for 3 prompts"):
        model.generate([PROMPT] * 3, seed=[1, 2])


# -- log-probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_raw_logits(model, temperature):
    gen = model.generate(
        PROMPT, max_tokens=6, logprobs=5, temperature=temperature, repetition_penalty=1.3
    )
    module, _ = architectures.build("llama")
    with torch.no_grad():
        logits = module(torch.tensor([[*PROMPT, *gen.token_ids]])).logits[0]
    wanted = logits[len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    assert len(gen.logprobs) == len(gen.token_ids)
    for entry, token_id, row in zip(gen.logprobs, gen.token_ids, wanted, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        values, ids = row.topk(5)
        assert [i for i, _ in entry.top] == ids.tolist()
        assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    json.loads(gen.to_json())


def test_logprobs_of_more_tokens_than_there_are_give_all_of_them(model):
    gen = model.generate(PROMPT, max_tokens=1, logprobs=1000)
    top = gen.logprobs[0].top
    assert len(top) == architectures.VOCABULARY
    assert sum(math.exp(v) for _, v in top) == pytest.approx(1, abs=1e-4)
    assert model.generate(PROMPT, max_tokens=1).logprobs is None


# -- logits that are no numbers ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_row_without_finite_logits_is_an_error_and_the_others_are_not(bad, options):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(**options)
    wanted = sample(logits, [AtGrid(params, 0.6)] * 3)
    logits[1, 17] = bad
    found = sample(logits, [AtGrid(params, 0.6)] * 3)
    assert isinstance(found[1].error, NonFiniteLogitsError)
    assert "float16" in str(found[1].error)
    assert [found[0], found[2]] == [wanted[0], wanted[2]]


def test_minus_infinity_rules_a_token_out_and_all_of_them_are_an_error():
    logits = torch.full((2, 50), -torch.inf)
    logits[0, 8] = 1.0
    rows = [AtGrid(SamplingParams(temperature=1.0), u) for u in (0.0, 0.5)]
    found = sample(logits, rows)
    assert found[0] == Sampled(8)
    assert isinstance(found[1].error, NonFiniteLogitsError)


# -- where a generation ends ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Said:
    """A long greedy answer in which three tokens, from ``index`` on, add plain ``text``."""

    prompt: str
    gen: ik.Generation
    index: int
    text: str


@pytest.fixture(scope="module")
def said(model) -> Said:
    for number in range(200):
        prompt = f"Once upon {number}"
        gen = model.generate(prompt, max_tokens=60, ignore_eos=True)
        texts = [model.tokenizer.decode(gen.token_ids[:i]) for i in range(61)]
        for i in range(10, 50):
            pieces = [texts[j + 1][len(texts[j]) :] for j in range(i, i + 3)]
            text = "".join(pieces)
            plain = all(p.isascii() and p.isprintable() and len(p) > 1 for p in pieces)
            if plain and gen.text.find(text[1:-1]) == len(texts[i]) + 1:
                return Said(prompt, gen, i, text)
    raise AssertionError("nothing to stop at")


def test_a_stop_string_across_tokens_ends_the_text_before_it(model, said):
    stop = said.text[1:-1]  # begins within one token and ends within another
    options = {"max_tokens": 60, "ignore_eos": True, "stop": ["never said", stop]}
    gen = model.generate(said.prompt, **options)
    assert (gen.finish_reason, gen.stop_reason) == ("stop", stop)
    assert gen.text == said.gen.text[: said.gen.text.index(stop)]
    assert gen.token_ids == said.gen.token_ids[: said.index + 3]
    assert "".join(model.stream(said.prompt, **options)) == gen.text


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_known_to_be_none(model, said):
    request = model.submit(
        said.prompt, max_tokens=60, ignore_eos=True, stop=[said.text + "and something else"]
    )
    pieces = list(request)
    assert "".join(pieces) == said.gen.text
    assert request.result(60).finish_reason == "length"
    assert any(said.text in piece for piece in pieces)  # the three tokens came out as one piece


def test_text_held_back_is_given_out_when_the_tokens_run_out(model, said):
    gen = model.generate(
        said.prompt, max_tokens=said.index + 3, ignore_eos=True, stop=said.text + "!"
    )
    assert gen.finish_reason == "length"
    assert gen.text.endswith(said.text)


def test_a_stop_token_ends_and_is_kept_in_the_ids_but_not_in_the_text(model, said):
    ids = said.gen.token_ids
    end = ids[10]
    first = ids.index(end)
    gen = model.generate(said.prompt, max_tokens=60, ignore_eos=True, stop_token_ids=[1, end])
    assert (gen.finish_reason, gen.stop_reason) == ("stop", end)
    assert gen.token_ids == ids[: first + 1]
    assert gen.text == model.tokenizer.decode(ids[:first])


def test_an_end_token_ends_unless_it_is_ignored(tmp_path, tiny_model):
    module, tokenizer = architectures.build("llama")
    module.generation_config.eos_token_id = None
    wanted = module.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, 4:]
    end = int(wanted[6])
    module.generation_config.eos_token_id = [architectures.EOS, end]
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first = wanted.tolist().index(end)
    with ik.load(tmp_path, device="cpu", dtype="float32", context=64, progress=False) as model:
        ends = model.generate(PROMPT, max_tokens=12)
        goes_on = model.generate(PROMPT, max_tokens=12, ignore_eos=True)
    assert list(ends.token_ids) == wanted[: first + 1].tolist()
    assert (ends.finish_reason, ends.stop_reason) == ("stop", end)
    assert list(goes_on.token_ids) == wanted.tolist()
    assert goes_on.finish_reason == "length"


def test_max_tokens_one_gives_the_prefill_token_alone(model, said):
    gen = model.generate(said.prompt, max_tokens=1)
    assert gen.token_ids == said.gen.token_ids[:1]
    assert gen.finish_reason == "length"
    assert (gen.latency.tpot, gen.latency.itl) == (None, [])


def test_the_context_ends_a_generation_that_would_outgrow_it(model):
    gen = model.generate([5] * 250, max_tokens=100, ignore_eos=True)
    assert len(gen.token_ids) == 6
    assert gen.finish_reason == "length"


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens=0 .* at least 1"),
        ({"max_tokens": -5}, r"max_tokens=-5 .* at least 1"),
        ({"max_tokens": 2.5}, "not an integer"),
        ({"max_tokens": math.nan}, "not an integer"),
        ({"max_tokens": math.inf}, "not an integer"),
        ({"max_tokens": None}, "not an integer"),
        ({"max_tokens": True}, "not an integer"),
        ({"temperature": -0.1}, r"temperature=-0.1 .* at least 0"),
        ({"temperature": math.nan}, "not a number"),
        ({"temperature": math.inf}, "must be finite"),
        ({"seed": 10**309}, "seed is out of range"),
        ({"temperature": 10**400}, "temperature is out of range"),
        ({"temperature": Fraction(10**400)}, "temperature is out of range"),
        pytest.param({"seed": -(10**5000)}, "seed is out of range", id="no digits"),
        ({"temperature": "hot"}, "'hot' is not a number"),
        ({"temperature": None}, "not a number"),
        ({"top_p": 1.1}, "from 0 to 1"),
        ({"top_p": -0.1}, "from 0 to 1"),
        ({"top_p": 0, "temperature": 1.0}, "keeps no token"),
        ({"top_k": -1}, "at least 0"),
        ({"top_k": 0.5}, "not an integer"),
        ({"min_p": 2}, "from 0 to 1"),
        ({"repetition_penalty": 0}, "divides by zero"),
        ({"repetition_penalty": -1}, "at least 0"),
        ({"seed": "a"}, "not an integer"),
        ({"seed": 1.5}, "not an integer"),
        ({"seed": [1, 2]}, "not an integer"),
        ({"stop": ""}, "non-empty strings"),
        ({"stop": ["a", ""]}, "non-empty strings"),
        ({"stop": 5}, "non-empty strings"),
        ({"stop": [b"a"]}, "non-empty strings"),
        ({"stop_token_ids": 5}, "token ids"),
        ({"stop_token_ids": "ab"}, "token ids"),
        ({"stop_token_ids": [1.5]}, "token ids"),
        ({"stop_token_ids": [True]}, "token ids"),
        ({"ignore_eos": "yes"}, "True or False"),
        ({"logprobs": -1}, "from 0 to 1000"),
        ({"logprobs": 5000}, "from 0 to 1000"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_and_named(model, options, message):
    name = next(iter(options))
    with pytest.raises(OptionError, match=message) as caught:
        model.submit(PROMPT, **options)
    assert str(caught.value).startswith(name)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_new_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("stop_ids", "stop_token_ids"),
        ("repeat_penalty", "repetition_penalty"),
    ],
)
def test_an_unknown_option_names_the_nearest(name, near):
    with pytest.raises(OptionError, match=f"{name!r}; did you mean {near!r}"):
        SamplingParams.of({name: 1})


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(OptionError) as caught:
        SamplingParams.of({"quux": 1})
    assert "did you mean" not in str(caught.value)
    for field in dataclasses.fields(SamplingParams):
        assert field.name in str(caught.value)


def test_options_override_a_base_and_leave_it_as_it_is():
    base = SamplingParams(temperature=0.7, top_k=40, stop="\n")
    made = SamplingParams.of({"top_k": 0, "stop": None}, base)
    assert (made.temperature, made.top_k, made.stop) == (0.7, 0, ())
    assert (base.top_k, base.stop) == (40, ("\n",))


def test_numbers_of_numpy_are_taken_as_plain_ones():
    params = SamplingParams(
        max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.int32(4), top_k=5.0
    )
    assert (params.max_tokens, params.temperature, params.seed, params.top_k) == (3, 0.5, 4, 5)
    json.dumps(dataclasses.asdict(params))


def test_the_models_own_defaults_are_used_when_asked_for(tmp_path):
    module, tokenizer = architectures.build("llama")
    module.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with ik.load(tmp_path, device="cpu", dtype="float32", context=64, progress=False) as model:
        own = model.generate(PROMPT, sampling="model", max_tokens=2, top_k=7).params
        plain = model.generate(PROMPT, max_tokens=2).params
        with pytest.raises(OptionError, match="sampling='models'"):
            model.generate(PROMPT, sampling="models")
    assert (own.temperature, own.top_k, own.top_p, own.max_tokens) == (0.6, 7, 0.9, 2)
    assert (plain.temperature, plain.top_k, plain.top_p) == (0.0, 0, 1.0)
