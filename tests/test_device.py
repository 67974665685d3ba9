"""The same promises on every kind of device: tokens, memory, plan, quantization.

Each test runs on the CPU, which shows that the test is right, and on a CUDA device where there is
one (`make gpu-check`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import inferkit as ik

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = [[5, 6, 7], list(range(10, 60)), [9], list(range(100, 119)), list(range(10, 50))]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def tensor_bytes(device: str) -> int:
    """Bytes of all tensors that live on a device, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == device:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def own_tokens(folder: Path, device: str, dtype: torch.dtype, count: int) -> list[list[int]]:
    """What transformers' generate says after each of `PROMPTS` alone, on the same device."""
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    greedy = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    module.generation_config.eos_token_id = None
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=device)
        made = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        said.append(made[0, len(prompt) :].tolist())
    return said


@on_each_device
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "mixtral", "gpt2"])
def test_greedy_tokens_in_fp32_are_generates(
    tiny_model: Callable[[str], Path], device: str, arch: str
) -> None:
    folder = tiny_model(arch)
    wanted = own_tokens(folder, device, torch.float32, 12)
    with ik.load(
        folder, device=device, dtype="float32", context=128, max_batch=3, prefill_chunk=16
    ) as model:
        assert model.fallback is None
        assert torch.device(model.device).type == device
        gens = model.generate(PROMPTS, max_tokens=12, ignore_eos=True)
    assert [list(g.token_ids) for g in gens] == wanted


@on_each_device
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4", "fp4"])
def test_every_mode_serves_a_batch(
    tiny_model: Callable[[str], Path], device: str, quantize: str
) -> None:
    with ik.load(
        tiny_model("llama"), device=device, quantize=quantize, context=128, max_batch=4
    ) as model:
        gens = model.generate(PROMPTS, max_tokens=6, ignore_eos=True, logprobs=2)
        again = model.generate(PROMPTS, max_tokens=6, temperature=1.0, seed=3, ignore_eos=True)
    assert [g.finish_reason for g in [*gens, *again]] == ["length"] * 2 * len(PROMPTS)
    assert all(g.error is None for g in gens)


@on_each_device
def test_memory_comes_back_while_everything_refers_to_the_model(
    tiny_model: Callable[[str], Path], device: str
) -> None:
    kept: list[Any] = []
    before = None
    for _ in range(3):
        model = ik.load(tiny_model("gemma3"), device=device, context=256, max_batch=4)
        gens = model.generate(PROMPTS, max_tokens=4)
        try:
            model.generate("")
        except ik.InferkitError as error:
            kept.append(error)
        kept += [model, gens, gens[0].latency]
        model.unload()
        after = tensor_bytes(device)
        before = after if before is None else before  # the first round leaves tables of libraries
        assert after <= before + 2**16
        if device == "cuda":
            # 32 MiB of cuBLAS for each stream that a thread ever computed on, and no more.
            assert torch.cuda.memory_reserved() <= 5 * 2**25


@on_each_device
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral"])
def test_weights_and_cache_take_what_the_plan_says(
    tiny_model: Callable[[str], Path], device: str, arch: str
) -> None:
    settings = {"device": device, "dtype": "float32", "context": 512, "max_batch": 8}
    plan = ik.plan(tiny_model(arch), **settings)
    before = tensor_bytes(device)
    with ik.load(tiny_model(arch), **settings):
        taken = tensor_bytes(device) - before
    assert taken == pytest.approx(plan.weights + plan.kv_cache, rel=0.1)


@on_each_device
def test_what_cannot_fit_is_refused_before_anything_is_read(
    tiny_model: Callable[[str], Path], device: str
) -> None:
    before = tensor_bytes(device)
    with pytest.raises(ik.DoesNotFitError, match="max_batch="):
        ik.load(tiny_model("llama"), device=device, max_batch=10**7)
    assert tensor_bytes(device) == before


@pytest.mark.gpu
def test_layers_on_two_devices_give_the_tokens_of_one(tiny_model: Callable[[str], Path]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    folder = tiny_model("llama")
    wanted = own_tokens(folder, "cuda", torch.float32, 12)
    with ik.load(
        folder, device=["cuda:0", "cuda:1"], dtype="float32", context=128, max_batch=3
    ) as model:
        gens = model.generate(PROMPTS, max_tokens=12, ignore_eos=True)
    assert [list(g.token_ids) for g in gens] == wanted


@pytest.mark.gpu
@pytest.mark.demo
def test_the_demo_model_in_fp32_says_what_generate_says(demo_model_path: Path) -> None:
    wanted = own_tokens(demo_model_path, "cuda", torch.float32, 64)
    with ik.load("demo", device="cuda", dtype="float32", context=256, max_batch=8) as model:
        gens = model.generate(PROMPTS, max_tokens=64, ignore_eos=True)
    assert [list(g.token_ids) for g in gens] == wanted
