"""Packed linear layers: the same products bit for bit, in the plain layers' place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import inferkit as ik
from inferkit.footprint import WeightFormat, meta_model, packed_growth
from inferkit.packing import PackedLinear, pack_linears, packable, packed_bytes, release_packed

needs_packing = pytest.mark.skipif(
    not packable("cpu", "bfloat16"), reason="this CPU or torch does not pack bf16"
)
SHAPES = [(256, 640), (640, 2048), (50, 48), (1000, 33), (32, 32), (64, 64)]


def layer(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=bias).to(torch.bfloat16)
    return made.requires_grad_(False)


@needs_packing
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_plain_layers_ones(rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(rows + columns)
    plain = layer(rows, columns, bias)
    packed = PackedLinear(plain)
    for shape in [(1,), (3, 5), (16, 1), (2, 70)]:
        x = torch.randn(*shape, columns, dtype=torch.bfloat16)
        torch.testing.assert_close(packed(x), plain(x), rtol=2**-7, atol=2**-6)
    cut = torch.randn(4, 9, columns, dtype=torch.bfloat16)[:, -1:]
    assert torch.equal(packed(cut), packed(cut.contiguous()))


@needs_packing
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_size_is_as_predicted(rows: int, columns: int) -> None:
    packed, predicted = PackedLinear(layer(rows, columns)), packed_bytes(rows, columns)
    # Kernels of our own leave out up to 30 columns of oneDNN's last block.
    assert packed.packed_bytes == predicted or (packed.own and packed.packed_bytes < predicted)


@needs_packing
def test_who_reads_the_weight_gets_it_exactly_and_the_layer_is_plain_from_then_on() -> None:
    plain = layer(96, 40, bias=True)
    packed = PackedLinear(plain)
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.packed_bytes == 0
    assert torch.equal(packed(x), plain(x))
    assert packed.weight is packed.weight


@needs_packing
def test_only_plain_bf16_layers_are_packed() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "bf16": layer(8, 8),
            "fp32": nn.Linear(8, 8),
            "own": Own(8, 8).to(torch.bfloat16),
            "meta": nn.Linear(8, 8, device="meta", dtype=torch.bfloat16),
            "inner": nn.ModuleDict({"bf16": layer(8, 8)}),
        }
    )
    pack_linears(model)
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {"bf16", "inner.bf16"}
    release_packed(model)
    assert model["bf16"].packed_bytes == 0
    assert model["bf16"].weight is None


@needs_packing
@pytest.mark.parametrize("arch", ["gemma3", "llama", "opt"])
def test_a_packed_model_gives_its_own_logits_and_takes_what_the_plan_says(
    tiny_model: Callable[[str], Path], arch: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model(arch), dtype=torch.bfloat16
    ).eval()
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain = {n: 0 if shared and n == "lm_head" else m.weight.nbytes for n, m in linears(model)}
    ids = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]])
    with torch.inference_mode():
        before = model(ids).logits
        pack_linears(model)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=2**-6, atol=2**-5)
    packed = {n: m.packed_bytes for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == plain.keys()
    growth = packed_growth(meta_model(model.config, "bfloat16"), WeightFormat("none"))
    assert growth == {n: packed[n] - plain[n] for n in packed}


@needs_packing
def test_a_loaded_model_is_packed_and_keeps_no_page_of_its_file(
    tiny_model: Callable[[str], Path],
) -> None:
    folder = tiny_model("llama")
    with ik.load(folder, dtype="bfloat16", device="cpu") as model:
        module = model._parts.loaded.module
        assert isinstance(module.get_output_embeddings(), PackedLinear)
        if sys.platform == "linux":
            assert str(folder) not in Path("/proc/self/maps").read_text()
    assert module.get_output_embeddings().packed_bytes == 0


def linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in module.named_modules() if type(m) is nn.Linear]


def test_nothing_is_packed_elsewhere() -> None:
    assert not packable("cuda:0", "bfloat16")
    assert not packable("cpu", "float32")
    assert not packable("meta", "bfloat16")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    assert packed_growth(meta_model(config, "float32"), WeightFormat("none")) == {}
