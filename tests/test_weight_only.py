"""Weight-only modes: torch's kernels against plain products of the dequantized weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CONFIGS, tokenizer
from test_memory import GIB, gemma3_270m, planned
from test_placement import lies_in, on_disk
from torch import nn

import inferkit as ik
from inferkit import weight_only
from inferkit.footprint import WeightFormat
from inferkit.quantize import quantize_weights
from inferkit.weight_only import WeightOnlyLinear, packed_bytes, quantize_linear

MODES = ("int8wo", "int4wo")
PROMPT = list(range(5, 40))
OPTIONS: dict[str, Any] = {"context": 128, "max_batch": 2, "progress": False}


def dequantized(weight: torch.Tensor, mode: str) -> torch.Tensor:
    """What a weight [out, in] becomes, in fp64, by the plain formulas of the two formats."""
    weight = weight.detach().double()

    def kept(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.bfloat16().double()

    if mode == "int8wo":
        scale = kept(weight.abs().amax(1, keepdim=True) / 127)
        return (weight / scale).round().clamp(-127, 127) * scale
    groups = weight.reshape(len(weight), -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = kept((high - low) / 15)
    zero = kept(low + 8 * scale)
    numbers = ((groups - zero) / scale).round().clamp(-8, 7)
    return (numbers * scale + zero).reshape(weight.shape)


def layer(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(rows + columns)
    return nn.Linear(columns, rows, bias=bias).requires_grad_(False)


def held_bytes(model: ik.Model) -> int:
    """Bytes of the weights, as the tensors have them."""
    return model._parts.nbytes - model._engine.runner.nbytes


def layers(model: ik.Model) -> dict[str, WeightOnlyLinear]:
    modules = model._parts.loaded.module.named_modules()
    return {name: m for name, m in modules if isinstance(m, WeightOnlyLinear)}


# -- one layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 640), (384, 32), (80, 96), (1552, 512)])
def test_products_are_those_of_the_dequantized_weight(
    mode: str, dtype: torch.dtype, rows: int, columns: int
) -> None:
    plain = layer(rows, columns, bias=True).to(dtype)
    made = quantize_linear(mode, plain)
    weight = dequantized(plain.weight, mode)
    for shape in [(1,), (2, 1), (1, 40), (5, 30), (0,), ()]:
        x = torch.randn(*shape, columns).to(dtype)
        got = made(x)
        wanted = x.bfloat16().double() @ weight.T + plain.bias.double()
        assert (got.dtype, got.shape) == (dtype, wanted.shape)
        # Two roundings to bf16, of the sum and of the sum with the bias; fp32 while it adds up.
        torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(("mode", "steps"), [("int8wo", 127), ("int4wo", 7.5)])
def test_a_weight_is_rounded_by_half_a_step_at_most(mode: str, steps: float) -> None:
    plain = layer(256, 128)
    unpacked = quantize_linear(mode, plain)(torch.eye(128)).T
    # A step of a group of a row is at most one of the largest weight; the rest is bf16's rounding.
    step = plain.weight.abs().amax() / steps
    assert (unpacked - plain.weight).abs().max() <= step / 2 + 2**-7 * plain.weight.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "weight", [torch.zeros(64, 64), torch.full((64, 64), -3.0), torch.eye(64) * 1e4]
)
def test_rows_of_equal_weights_stay_finite(mode: str, weight: torch.Tensor) -> None:
    plain = layer(64, 64)
    plain.weight.data = weight
    got = quantize_linear(mode, plain)(torch.eye(64)).T
    torch.testing.assert_close(got, weight, rtol=2**-7, atol=1e-6)


def test_int4_bytes_in_an_unknown_order_are_left_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = layer(128, 64)
    made, x = quantize_linear("int4wo", plain), torch.randn(200, 64)
    by_tiles = made(x)
    monkeypatch.setattr(weight_only, "_half_block", lambda: 0)
    monkeypatch.setattr(weight_only, "by_tiles", pytest.fail)
    torch.testing.assert_close(made(x), by_tiles, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [layer(256, 640), transformers.pytorch_utils.Conv1D(256, 640)])
def test_size_is_as_predicted(mode: str, model: nn.Module) -> None:
    made = quantize_linear(mode, model)
    assert sum(b.nbytes for b in made.buffers()) == packed_bytes(mode, 256, 640)
    assert "640, 256" in repr(made)


# -- a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")]
)
def test_a_model_says_what_it_says_with_dequantized_weights(
    tiny_model: Callable[[str], Path], arch: str, mode: str, dtype: str
) -> None:
    with ik.load(tiny_model(arch), dtype=dtype, quantize=mode, **OPTIONS) as model:
        assert model.fallback is None
        names = layers(model).keys()
        wide = {"wte", "wpe", "embed_tokens"}
        assert {name.rpartition(".")[2] for name in model.unquantized} <= wide
        assert "lm_head" in names
        assert model.plan.weights == held_bytes(model)
        done = model.generate(PROMPT, max_tokens=3, ignore_eos=True, logprobs=5)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model(arch), dtype=getattr(torch, dtype)
    ).float()
    for name in names:
        weight = module.get_submodule(name).weight
        turned = arch == "gpt2" and name != "lm_head"  # Conv1D
        exact = dequantized(weight.T if turned else weight, mode)
        weight.data = (exact.T if turned else exact).float()
    with torch.inference_mode():
        tokens = torch.tensor([PROMPT + list(done.token_ids[:-1])])
        wanted = module(tokens).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
    for entry, row in zip(done.logprobs, wanted, strict=True):
        # Wide random weights: bf16 between the layers moves the logits, which go to 30, by 0.1.
        got = torch.tensor([p for _, p in entry.top])
        assert (got - row[[token for token, _ in entry.top]]).abs().max() < 0.6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_output_embeddings_are_quantized_beside_the_input_ones(
    tmp_path: Path, mode: str, dtype: str
) -> None:
    config = CONFIGS["gemma3"]()
    config.tie_word_embeddings = True
    folder = saved(config, tmp_path)
    with ik.load(folder, dtype=dtype, **OPTIONS) as model:
        before = model._parts.loaded.module.get_input_embeddings().weight.clone()
        model.quantize(mode, progress=False)
        module = model._parts.loaded.module
        assert isinstance(module.get_output_embeddings(), WeightOnlyLinear)
        assert torch.equal(module.get_input_embeddings().weight, before)
        assert model.unquantized == ("model.embed_tokens",)
        assert model.plan.weights == held_bytes(model)
        assert model.generate(PROMPT, max_tokens=4).error is None


def test_layers_that_the_kernels_do_not_take_stay_and_are_named(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    config.vocab_size, config.intermediate_size = 392, 120  # not divided by 16, by 16 and 32
    with ik.load(saved(config, tmp_path), dtype="float32", **OPTIONS) as model:
        down = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
        wide = tuple(f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up"))
        model.quantize("int8wo", progress=False)
        assert set(model.unquantized) == {"model.embed_tokens", *down}
        model.quantize("int4wo", progress=False)
        assert set(model.unquantized) == {"model.embed_tokens", "lm_head", *down, *wide}
        assert model.plan.weights == held_bytes(model)
        assert model.generate(PROMPT, max_tokens=4).error is None


def saved(config: transformers.PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_each_weight_goes_before_the_next_layer_is_quantized(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    module = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    module.requires_grad_(False)
    gone: list[weakref.ref[Any]] = []

    def quantize(*args: Any) -> WeightOnlyLinear:
        assert not any(weight() is not None for weight in gone)
        gone.append(weakref.ref(args[1].weight))
        return quantize_linear(*args)

    monkeypatch.setattr(weight_only, "quantize_linear", quantize)
    quantize_weights(module, WeightFormat(mode))
    assert len(gone) == 15


def test_memory_is_given_back_whoever_holds_the_layers(tiny_model: Callable[[str], Path]) -> None:
    with ik.load(tiny_model("llama"), dtype="float32", quantize="int4wo", **OPTIONS) as model:
        module, kept = model._parts.loaded.module, layers(model)
        model.quantize("none", progress=False)
        assert not layers(model)
    tensors = [*module.buffers(), *(b for m in kept.values() for b in m.buffers())]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 0


def test_what_lies_on_disk_stays_unquantized(tiny_model: Callable[[str], Path]) -> None:
    folder = Path(tiny_model("gemma3"))
    least = min(
        ik.plan(folder, device="cpu", quantize=m, dtype="float32", context=128, max_batch=2).total
        for m in MODES
    )
    limits = {"cpu": least - 2**14}
    options = {**OPTIONS, "device": ["cpu", "disk"], "max_memory": limits, "dtype": "float32"}
    with ik.load(folder, quantize="int8wo", **options) as model:
        away = on_disk(model)
        assert away
        assert layers(model)
        assert not any(lies_in(name, away) for name in layers(model))
        cpu = model.plan.devices[0]
        assert model._parts.nbytes == pytest.approx(cpu.weights + cpu.kv_cache, rel=0.1)
        assert model.generate(PROMPT, max_tokens=4).error is None


# -- plans and refusals -----------------------------------------------------------------------


def test_a_plan_counts_a_tied_head_beside_its_embeddings() -> None:
    free = {"cpu": 80 * GIB}
    plain = planned(gemma3_270m(), free=free, dtype="float32")
    table = 262144 * 640
    for mode, bits in (("int8wo", 8), ("int4wo", 5)):  # 4, and 32 of scale and zero per 32 weights
        made = planned(gemma3_270m(), free=free, dtype="float32", quantize=mode)
        counted = 4 * table + (plain.weights // 4) * bits // 8
        assert made.weights == pytest.approx(counted, rel=0.02)
        assert made.activations < plain.activations + 2**24
    assert set(plain.totals) == {"none", "int8", "nf4", "fp4", *MODES}


@pytest.mark.parametrize("names", [("cuda:0",), ("cuda:0", "cpu"), ("cuda:0", "cuda:1"), ("mps",)])
def test_other_devices_have_no_such_kernels_and_are_not_offered_them(
    tiny_model: Callable[[str], Path], names: tuple[str, ...]
) -> None:
    free = dict.fromkeys(names, 8 * GIB)
    options: dict[str, Any] = {"device": list(names), "free": free}
    for mode, instead in (("int8wo", "int8"), ("int4wo", "nf4")):
        said = f"quantize='{mode}' has kernels for a CPU alone.*quantize='{instead}'"
        with pytest.raises(ik.OptionError, match=said):
            ik.plan(tiny_model("llama"), quantize=mode, **options)
    assert set(ik.plan(tiny_model("llama"), **options).totals) == {"none", "int8", "nf4", "fp4"}


# -- quality ----------------------------------------------------------------------------------


def test_fidelity_is_measured_as_of_any_mode(tiny_model: Callable[[str], Path]) -> None:
    with ik.load(tiny_model("llama"), dtype="float32", **OPTIONS) as model:
        text = "Once upon a time there was a rabbit with pink eyes."
        said = {
            mode: ik.fidelity(model.quantize(mode, progress=False), [PROMPT], text=text)
            for mode in ("none", *MODES)
        }
        assert model.quantization == "int4wo"
    assert said["none"].kl.value == 0 < said["int8wo"].kl.value < said["int4wo"].kl.value
    assert said["int4wo"].reference == "none, float32"


@pytest.mark.thorough
@pytest.mark.demo
def test_the_demo_model_counts_on_and_loses_more_in_four_bits(demo_model_path: Path) -> None:
    text = "Alice was beginning to get very tired of sitting by her sister on the bank, and of"
    text += " having nothing to do."
    options: dict[str, Any] = {"dtype": "float32", **OPTIONS}
    with ik.load(demo_model_path, name="weight-only", **options) as model:
        kl = {}
        for mode in ("none", *MODES):  # "none" first: what it says is kept for the others
            model.quantize(mode, progress=False)
            said = ik.fidelity(model, ["Once upon a time"], text=text, max_tokens=4, progress=False)
            kl[mode] = said.kl.value
            counted = model.generate("one, two, three, four,", max_tokens=7)
            assert counted.text == " five, six, seven, eight"
            assert mode == "none" or model.unquantized == ("model.embed_tokens",)
            assert held_bytes(model) == pytest.approx(model.plan.weights, rel=0.01)
    # Over the text that the project ships it is 0.0055 and 0.25 nats per token: eight bits with a
    # scale per row are 0.9 % of a weight off, four with one per 32 weights some 8 %, and KL goes
    # with the square. The bounds leave a factor of four for a text this short.
    assert kl["none"] == 0 < kl["int8wo"] < 0.022
    assert 5 * kl["int8wo"] < kl["int4wo"] < 1
