"""The engine against transformers' own generate, on small random models of many architectures."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import architectures
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import inferkit as ik

LENGTHS = (3, 30, 12, 70, 5, 41, 23, 9)
TOKENS = 16
SERVED = ("llama", "qwen3", "gemma3", "mistral", "phi3", "gpt_neox", "opt", "gpt2", "mixtral")


def ragged_prompts() -> list[list[int]]:
    """Eight prompts of different lengths; two share the beginning of a third."""
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 380) for _ in range(n)] for n in LENGTHS]
    prompts[5][:25] = prompts[3][:25]
    prompts[6][:20] = prompts[3][:20]
    return prompts


def alone(module: PreTrainedModel, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """Greedy tokens of transformers.generate for one prompt, whatever end tokens come."""
    module.generation_config.eos_token_id = None
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    out = module.generate(torch.tensor([prompt]), generation_config=config)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def expected() -> Callable[[str], list[list[int]]]:
    made: dict[str, list[list[int]]] = {}

    def of(arch: str) -> list[list[int]]:
        if arch not in made:
            module, _ = architectures.build(arch)
            made[arch] = [alone(module, p) for p in ragged_prompts()]
        return made[arch]

    return of


@pytest.fixture
def llama(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    model = ik.load(tiny_model("llama"), dtype="float32", max_batch=4, context=256, name="llama")
    yield model
    model.unload()


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("chunk", [8, 512])
@pytest.mark.parametrize("arch", SERVED)
def test_a_ragged_batch_gives_the_tokens_of_generate_alone(
    arch: str,
    chunk: int,
    reuse: bool,
    tiny_model: Callable[[str], Path],
    expected: Callable[[str], list[list[int]]],
) -> None:
    model = ik.load(
        tiny_model(arch),
        dtype="float32",
        max_batch=4,
        context=128,
        prefill_chunk=chunk,
        prefix_reuse=reuse,
        name="parity",
        progress=False,
    )
    try:
        assert model.fallback is None
        prompts = ragged_prompts()
        for batching in ("continuous", "static", "off"):
            model.configure(batching=batching)
            requests = [model.submit(p, max_tokens=TOKENS, ignore_eos=True) for p in prompts[:4]]
            next(iter(requests[0]))  # the others arrive while these run
            requests += [model.submit(p, max_tokens=TOKENS, ignore_eos=True) for p in prompts[4:]]
            got = [list(r.result(60).token_ids) for r in requests]
            assert got == expected(arch), batching
    finally:
        model.unload()


def test_a_shared_prefix_is_computed_once(llama: ik.Model) -> None:
    prefix = [7 + i % 300 for i in range(100)]
    first = llama.generate([*prefix, 5], max_tokens=4, ignore_eos=True)
    second = llama.generate([*prefix, 9, 11], max_tokens=4, ignore_eos=True)
    assert first.latency.trace.cached_tokens == 0
    assert second.latency.trace.cached_tokens == 100
    module, _ = architectures.build("llama")
    assert list(second.token_ids) == alone(module, [*prefix, 9, 11], 4)


def test_policy_switched_while_requests_wait(llama: ik.Model) -> None:
    llama.configure(batching="off")
    requests = [llama.submit([5 + i, 6], max_tokens=12, ignore_eos=True) for i in range(8)]
    llama.configure(batching="continuous")
    module, _ = architectures.build("llama")
    for i, request in enumerate(requests):
        assert list(request.result(60).token_ids) == alone(module, [5 + i, 6], 12)


def test_cancelled_request_frees_its_slot_and_keeps_its_text(llama: ik.Model) -> None:
    long = [llama.submit([5, 6, i], max_tokens=200, ignore_eos=True) for i in range(4)]
    waits = llama.submit([9, 9], max_tokens=4, ignore_eos=True)
    next(iter(long[0]))
    long[0].cancel()
    assert waits.result(60).finish_reason == "length"
    gen = long[0].result(60)
    assert gen.finish_reason == "cancelled"
    assert 0 < len(gen.token_ids) < 200
    for request in long[1:]:
        request.cancel()


def test_tokens_depend_on_the_seed_alone(llama: ik.Model) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    alone_ = [llama.generate([5, 6, 7], seed=s, **options).token_ids for s in range(4)]
    together = llama.generate([[5, 6, 7]] * 4, seed=list(range(4)), **options)
    assert [g.token_ids for g in together] == alone_
    assert len(set(alone_)) > 1


def test_a_hundred_requests_from_ten_threads(llama: ik.Model) -> None:
    done: list[ik.Generation] = []

    def ten(first: int) -> None:
        requests = [llama.submit([5 + first, 6 + i], max_tokens=6) for i in range(10)]
        done.extend(r.result(60) for r in requests)

    threads = [threading.Thread(target=ten, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(done) == 100
    assert {g.finish_reason for g in done} <= {"stop", "length"}


def test_out_of_memory_fails_one_request_and_the_others_finish(
    llama: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llama._engine.runner
    real = runner.prefill

    def prefill(chunks: list) -> torch.Tensor:
        if any(66 in c.tokens for c in chunks):
            raise torch.OutOfMemoryError("out of memory")
        return real(chunks)

    monkeypatch.setattr(runner, "prefill", prefill)
    with pytest.warns(UserWarning, match="ran out of memory"):
        gens = llama.generate([[5, 6], [66, 6], [7, 8]], max_tokens=4, ignore_eos=True)
    assert [g.finish_reason for g in gens] == ["length", "error", "length"]
    assert isinstance(gens[1].error, ik.OutOfMemoryError)
    assert llama.generate([5, 6], max_tokens=2).finish_reason in ("length", "stop")


def test_non_finite_logits_fail_only_their_request(
    llama: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llama._engine.runner
    real = runner.prefill

    def prefill(chunks: list) -> torch.Tensor:
        logits = real(chunks).clone()
        for row, chunk in enumerate(chunks):
            if 66 in chunk.tokens:
                logits[row, 3] = float("nan")
        return logits

    monkeypatch.setattr(runner, "prefill", prefill)
    with pytest.warns(UserWarning, match="NaN"):
        gens = llama.generate([[5, 6], [66, 6]], max_tokens=4, ignore_eos=True)
    assert gens[0].finish_reason == "length"
    assert isinstance(gens[1].error, ik.NonFiniteLogitsError)


def test_unloaded_handle_says_what_to_do(tiny_model: Callable[[str], Path]) -> None:
    model = ik.load(tiny_model("llama"), dtype="float32", context=64, name="gone")
    model.unload()
    model.unload()
    with pytest.raises(ik.ModelUnloadedError, match=r"ik\.load"):
        model.generate("hello")
    assert "unloaded" in repr(model)


def test_loading_twice_gives_the_same_model(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("qwen3")
    with ik.load(folder, dtype="float32", context=64, name="twice") as model:
        assert ik.load(folder, dtype="float32", context=64, name="twice") is model
        assert ik.load(folder, dtype="float32", context=64, name="twice", max_batch=2) is model
        assert model.max_batch == 2
        other = ik.load(folder, dtype="bfloat16", context=64, name="twice")
        assert other is not model
        assert not model.loaded
        other.unload()
    assert not ik.models()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_tokens": 0}, ik.OptionError),
        ({"max_tokens": -3}, ik.OptionError),
        ({"temperature": -0.1}, ik.OptionError),
        ({"temprature": 0.1}, ik.OptionError),
        ({"top_p": 1.5}, ik.OptionError),
    ],
)
def test_bad_options_are_refused(llama: ik.Model, options: dict, error: type) -> None:
    with pytest.raises(error):
        llama.generate([5, 6], **options)


@pytest.mark.parametrize("prompt", ["", [], [5] * 256, [100_000], [-1]])
def test_bad_prompts_are_refused(llama: ik.Model, prompt: object) -> None:
    with pytest.raises(ik.PromptError):
        llama.generate(prompt)


def test_failed_load_leaves_the_loaded_model_alone(llama: ik.Model, tmp_path: Path) -> None:
    with pytest.raises(ik.ModelNotFoundError):
        ik.load(tmp_path, name="llama")
    assert llama.generate([5, 6], max_tokens=2).finish_reason in ("stop", "length")


@pytest.mark.demo
@pytest.mark.parametrize("batch", [1, 8])
def test_demo_model_in_fp32_gives_the_tokens_of_generate(demo_model_path: Path, batch: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["The capital of France is", "Once upon a time", "1, 2, 3,", "The moon is"] * 2
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    module = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32)
    prompts = [tokenizer(t)["input_ids"] for t in texts[:batch]]
    wanted = {tuple(p): alone(module, p, 64) for p in prompts}
    del module
    with ik.load("demo", dtype="float32", max_batch=8, context=256, name="fp32") as model:
        gens = model.generate(prompts, max_tokens=64, ignore_eos=True)
    for prompt, gen in zip(prompts, gens, strict=True):
        assert list(gen.token_ids) == wanted[tuple(prompt)]
