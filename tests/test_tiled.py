"""Linear layers in 16 bits by tiles: the plain layers' products from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import inferkit as ik
from inferkit import packing, tiled
from inferkit.tiled import TILE, TiledLinear, tile_linears, tileable

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies no 16-bit numbers, whatever this one does."""
    monkeypatch.setattr(packing, "packable", lambda device, dtype: False)
    monkeypatch.setattr(
        tiled, "tileable", lambda device, dtype: device == "cpu" and dtype == "bfloat16"
    )


def layer(rows: int, columns: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(rows + columns)
    return nn.Linear(columns, rows).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "columns"), [(2048, 640), (50, 48), (1, 33), (TILE // 64, 192)])
def test_products_are_the_plain_layers_ones(dtype: torch.dtype, rows: int, columns: int) -> None:
    made = layer(rows, columns, dtype)
    weight, bias = made.weight.double(), made.bias.double()
    made.__class__ = TiledLinear
    for shape in [(), (1,), (3, 1), (8,), (5, 30), (2, 1, 40), (0,)]:
        x = torch.randn(*shape, columns).to(dtype)
        got, wanted = made(x), x.double() @ weight.T + bias
        assert (got.dtype, got.shape) == (dtype, wanted.shape)
        # Two roundings, of the sum and of the sum with the bias; in fp32 while it adds up.
        torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=2**-8)


def test_few_rows_are_left_to_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(64, 32, torch.bfloat16)
    made.__class__ = TiledLinear
    monkeypatch.setattr(tiled, "by_tiles", lambda *_: pytest.fail("by tiles"))
    made(torch.randn(7, 1, 32).bfloat16())
    with pytest.raises(pytest.fail.Exception, match="by tiles"):
        made(torch.randn(2, 4, 32).bfloat16())


def test_only_plain_layers_in_16_bits_are_tiled(unable: None) -> None:
    class Own(nn.Linear):
        pass

    plain, fp32 = layer(8, 8, torch.bfloat16), nn.Linear(8, 8)
    own, away = Own(8, 8).bfloat16(), nn.Linear(8, 8, device="meta", dtype=torch.bfloat16)
    hooked = layer(8, 8, torch.bfloat16)
    hooked.forward = lambda x: x  # as of a library that moves weights about
    embedding = nn.Embedding(8, 8).bfloat16()
    plain.weight = embedding.weight
    tile_linears(nn.ModuleList([plain, fp32, own, away, hooked, embedding]))
    assert type(plain) is TiledLinear
    assert plain.weight is embedding.weight
    assert (type(fp32), type(own), type(away), type(hooked)) == (nn.Linear, Own, *[nn.Linear] * 2)


def test_it_is_for_cpus_without_kernels_of_their_own() -> None:
    assert not tileable("cuda:0", "bfloat16")
    assert not tileable("meta", "bfloat16")
    assert not tileable("cpu", "float32")
    assert tileable("cpu", "bfloat16") != packing.packable("cpu", "bfloat16")


@pytest.mark.parametrize("arch", ["gemma3", "llama"])
def test_a_model_says_what_its_plain_layers_say(
    tiny_model: Callable[[str], Path], unable: None, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    options = {"dtype": "bfloat16", "device": "cpu", "context": 128, "max_batch": 8}
    prompts = [list(range(5, 5 + n)) for n in (1, 7, 30, 3, 60)]
    with ik.load(tiny_model(arch), name="tiled", **options) as model:
        module = model._parts.loaded.module
        assert type(module.get_output_embeddings()) is TiledLinear
        assert model.plan.weights == model._parts.nbytes - model._engine.runner.nbytes
        got = model.generate(prompts, max_tokens=1, logprobs=5)
    monkeypatch.setattr(tiled, "tileable", lambda device, dtype: False)
    with ik.load(tiny_model(arch), name="plain", **options) as model:
        assert not any(isinstance(m, TiledLinear) for m in model._parts.loaded.module.modules())
        wanted = model.generate(prompts, max_tokens=1, logprobs=5)
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.05)
