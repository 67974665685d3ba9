"""Attention over a prompt cut into lots, beside attention over all of it at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from inferkit.engine import attention as attentions
from inferkit.engine.attention import attention

TOKENS, DIM, HEADS, KV_HEADS = 300, 16, 4, 2


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def mask_of(seen: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An additive mask [rows, 1, tokens, read] of what each token sees."""
    zero = torch.zeros(seen.shape, dtype=dtype)
    return zero.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def causal(past: int = 0, window: int | None = None) -> torch.Tensor:
    asked = torch.arange(past, past + TOKENS)[:, None]
    held = torch.arange(past + TOKENS)
    seen = held <= asked
    return seen if window is None else seen & (asked - held < window)


SEEN = {
    "from the start": causal()[None],
    "after others": causal(200)[None],
    "in a window": causal(200, window=100)[None],
    "in a ring": causal(200, window=100)[None].roll(-250, dims=-1),
    "of two rows, one padded": torch.stack([causal(), causal().roll(40, dims=0)]),
}


def inputs(seen: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys, values and the mask."""
    rows, _, read = seen.shape
    shapes = ((HEADS, TOKENS), (KV_HEADS, read), (KV_HEADS, read))
    made = [torch.randn(rows, heads, count, DIM).to(dtype) for heads, count in shapes]
    return [*made, mask_of(seen, dtype)]


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """By the definition, in fp32, each head with keys of its own."""
    query, key, value = (x.float() for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / DIM**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask.float()
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("more", ["plain", "bent", "sinks"])
def test_lots_give_what_the_whole_gives(seen: torch.Tensor, more: str) -> None:
    given = inputs(seen)
    softcap = 2.0 if more == "bent" else None
    sinks = torch.randn(HEADS) if more == "sinks" else None
    found, _ = attention(torch.nn.Module(), *given, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(found, written_out(*given, softcap, sinks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("products", [True, False], ids=["products", "fused"])
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_in_bf16_they_are_as_near_as_bf16_is(
    seen: torch.Tensor, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentions, "cpu_has_bf16", lambda: products)
    given = inputs(seen, torch.bfloat16)
    found, _ = attention(torch.nn.Module(), *given)
    assert found.dtype == torch.bfloat16
    error = (found.float() - written_out(*given)).abs()
    assert error.mean() < 0.002
    assert error.max() < 0.04


def test_a_lot_reads_no_more_than_its_tokens_may_see() -> None:
    mask = mask_of(causal(200, window=100)[None])
    lots = attentions._lots(mask, HEADS)
    assert [(lot.start, lot.stop) for lot, _ in lots] == [(0, 128), (128, 256), (256, 300)]
    assert [(seen.start, seen.stop) for _, seen in lots] == [(101, 328), (229, 456), (357, 500)]
    assert attentions._lots(mask, HEADS) is lots  # for the next layer


def test_a_lot_that_sees_nothing_is_no_failure() -> None:
    seen = causal()[None].clone()
    seen[:, :128] = False
    found, _ = attention(torch.nn.Module(), *(given := inputs(seen)))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 128:], written_out(*given)[:, 128:], rtol=1e-4, atol=1e-5)


def test_many_heads_and_positions_make_lots_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentions, "LOT", 40 * HEADS * TOKENS)
    lots = attentions._lots(mask_of(causal()[None]), HEADS)
    assert [lot.stop - lot.start for lot, _ in lots] == [40] * 7 + [20]
