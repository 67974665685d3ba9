"""Products and attention of our own, beside torch's in higher precision."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import inferkit as ik
from inferkit import exclusive, kernels
from inferkit.engine import attention

needed = pytest.mark.skipif(
    bool(kernels.reason()), reason=f"no kernels of our own here: {kernels.reason()}"
)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the rounding of the result, and that of bf16 weights on the way."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0.02, atol=0.02)


@needed
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 64, 600])
@pytest.mark.parametrize(("inner", "outer"), [(2, 1), (64, 64), (130, 100), (640, 257)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_torch(rows: int, inner: int, outer: int, biased: bool) -> None:
    x, w = some(rows, inner), some(outer, inner, seed=1) * inner**-0.5
    bias = some(outer, seed=2) if biased else None
    got = torch.ops.inferkit.packed_linear(x, kernels.pack(w), bias, outer)
    wanted = x.double() @ w.double().T + (0 if bias is None else bias.double())
    close(got, wanted)


@needed
def test_a_row_is_the_same_in_any_batch() -> None:
    x, w = some(40, 640), kernels.pack(some(300, 640, seed=1))
    whole = torch.ops.inferkit.packed_linear(x, w, None, 300)
    for size in (1, 3, 7, 16):
        part = torch.ops.inferkit.packed_linear(x[5 : 5 + size], w, None, 300)
        assert torch.equal(part, whole[5 : 5 + size])


@needed
@pytest.mark.parametrize("shape", [(1, 2), (64, 6), (65, 64), (300, 640)])
def test_packed_weights_are_unpacked_as_they_were(shape: tuple[int, int]) -> None:
    w = some(*shape)
    packed = kernels.pack(w)
    assert packed.shape == kernels.packed_shape(*shape)
    assert torch.equal(kernels.unpack(packed, shape[0]), w)


def attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in double precision."""
    q, k, v, mask = (t.double() for t in (q, k, v, mask))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)


# rows, heads, KV heads, tokens, positions, dim, value dim
SHAPES = [
    (1, 4, 1, 1, 64, 256, 256),
    (5, 4, 1, 1, 700, 256, 256),
    (4, 14, 2, 1, 300, 64, 64),
    (2, 8, 8, 3, 130, 80, 80),
    (2, 6, 3, 8, 257, 96, 40),
    (1, 2, 1, 9, 9, 64, 64),
    (2, 8, 2, 49, 300, 96, 100),
    (1, 4, 1, 200, 600, 256, 256),
]


@needed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
def test_attention_is_that_of_torch(shape: tuple[int, ...], kind: str) -> None:
    rows, heads, kv_heads, tokens, read, dim, value_dim = shape
    # As the cache gives them: parts of larger tensors; and queries with their heads inside.
    k = some(rows, kv_heads, read + 30, dim, seed=1)[:, :, :read]
    v = some(rows, kv_heads, read + 30, value_dim, seed=2)[:, :, :read]
    q = some(rows, tokens, heads, dim).transpose(1, 2)
    last = torch.linspace(tokens, read, rows).long()[:, None] - tokens + torch.arange(tokens)
    held = torch.arange(read)
    seen = held <= last[:, :, None]
    if kind == "window":
        seen &= last[:, :, None] - held < 40
    mask = torch.zeros(seen.shape).bfloat16()
    mask = mask.masked_fill_(~seen, torch.finfo(torch.bfloat16).min)[:, None]
    softcap = 5.0 if kind == "softcap" else 0.0
    sinks = some(heads, seed=3) if kind == "sinks" else None
    got = torch.ops.inferkit.masked_attention(q, k, v, mask, dim**-0.5, softcap, sinks)
    assert got.shape == (rows, tokens, heads, value_dim)
    close(got, attended(q, k, v, mask, softcap, sinks))


@needed
@pytest.mark.parametrize("tokens", [1, 20])
def test_what_is_not_seen_is_not_read(tokens: int) -> None:
    """But for the panel of 64 positions, of a prompt, that has something to be seen."""
    k, v = some(1, 1, 320, 64, seed=1), some(1, 1, 320, 64, seed=2)
    q = some(1, 2, tokens, 64)
    mask = torch.zeros(1, 1, tokens, 320).bfloat16()
    mask[..., :64] = mask[..., 256:] = torch.finfo(q.dtype).min
    before = torch.ops.inferkit.masked_attention(q, k, v, mask, 0.125, 0.0, None)
    k[:, :, 256:] = v[:, :, :64] = torch.nan
    after = torch.ops.inferkit.masked_attention(q, k, v, mask, 0.125, 0.0, None)
    assert torch.equal(before, after)
    v[:, :, 100] = torch.nan  # what is seen is not made up
    after = torch.ops.inferkit.masked_attention(q, k, v, mask, 0.125, 0.0, None)
    assert after.isnan().all()


@needed
@pytest.mark.parametrize("tokens", [3, 20, 100])
def test_masks_may_be_infinite(tokens: int) -> None:
    read = 600
    q, k, v = some(1, 2, tokens, 64), some(1, 1, read, 64, seed=1), some(1, 1, read, 64, seed=2)
    seen = torch.arange(read) <= torch.arange(tokens)[:, None] + (read - tokens)
    seen &= torch.arange(read) > torch.arange(tokens)[:, None] * 4
    mask = torch.zeros(1, 1, tokens, read).masked_fill_(~seen, -torch.inf).bfloat16()
    got = torch.ops.inferkit.masked_attention(q, k, v, mask, 0.125, 0.0, None)
    close(got, attended(q, k, v, mask))


@needed
def test_a_query_that_sees_nothing_gives_finite_numbers() -> None:
    k, v = some(1, 1, 80, 64, seed=1), some(1, 1, 80, 64, seed=2)
    for tokens in (1, 20):
        mask = torch.full((1, 1, tokens, 80), torch.finfo(torch.bfloat16).min).bfloat16()
        got = torch.ops.inferkit.masked_attention(
            some(1, 2, tokens, 64), k, v, mask, 0.125, 0.0, None
        )
        assert got.isfinite().all()


# -- what they are given ---------------------------------------------------------------------------


@needed
@pytest.mark.parametrize("kind", ["for all rows", "for all tokens", "sinks in fp32"])
def test_attention_that_is_not_theirs_is_computed_all_the_same(kind: str) -> None:
    q, k, v = some(2, 4, 12, 64), some(2, 2, 100, 64, seed=1), some(2, 2, 100, 64, seed=2)
    mask, sinks = some(2, 1, 12, 100, seed=3), None
    if kind == "for all rows":
        mask = mask[:1]
    elif kind == "for all tokens":
        mask = mask[:, :, :1]
    elif kind == "sinks in fp32":
        sinks = torch.arange(8.0)[::2]
    got, _ = attention.attention(SimpleNamespace(), q, k, v, mask, scaling=0.125, s_aux=sinks)
    close(got, attended(q, k, v, mask.expand(2, 4, 12, 100), sinks=sinks))


def test_a_mask_for_each_head_is_not_taken_for_one_that_holds_for_all() -> None:
    q, k, v = some(2, 4, 12, 64), some(2, 2, 100, 64, seed=1), some(2, 2, 100, 64, seed=2)
    mask = some(2, 4, 12, 100, seed=3)
    with pytest.raises(RuntimeError):  # then its architecture is served one request at a time
        attention.attention(SimpleNamespace(), q, k, v, mask)


@needed
def test_products_of_other_shapes_and_dtypes_are_refused() -> None:
    w, bias = kernels.pack(some(70, 96)), some(70)
    for x, b in (
        (some(3, 192), bias),
        (some(3, 96).float(), bias),
        (some(3, 96), bias.float()),
    ):
        with pytest.raises(RuntimeError, match="no product"):
            torch.ops.inferkit.packed_linear(x, w, b, 70)


@needed
def test_they_do_not_wait_for_who_loads_a_model() -> None:
    done = threading.Event()

    def ask() -> None:
        kernels.reason()
        done.set()

    with exclusive.alone():
        thread = threading.Thread(target=ask)
        thread.start()
        assert done.wait(10)
    thread.join()


# -- where they cannot be had ----------------------------------------------------------------------


def test_a_model_says_whose_they_are(tiny_model: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"device": "cpu", "context": 64, "progress": False}
    with ik.load(tiny_model("llama"), dtype="bfloat16", **options) as model:
        why = kernels.reason()
        assert model.kernels == (f"torch: {why}" if why else "inferkit")
        products = [m for m in model._parts.loaded.module.modules() if hasattr(m, "own")]
        assert all(m.own is (why is None) for m in products)
    with ik.load(tiny_model("llama"), dtype="float32", **options) as model:
        assert model.kernels == "torch"


def command(path: Path, does: str) -> str:
    """Put a command there, and name it."""
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def reason_elsewhere(**environment: str) -> str:
    """What another process says of the kernels."""
    code = "from inferkit import kernels; print(kernels.reason())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_they_can_be_switched_off() -> None:
    assert reason_elsewhere(INFERKIT_KERNELS="0") == "INFERKIT_KERNELS=0"


@needed
@pytest.mark.parametrize("named", ["", "clang++", "no-such-compiler -m64"])
def test_no_compiler_is_a_reason(tmp_path: Path, named: str) -> None:
    """Nor is clang's one: its threads are of another library."""
    command(tmp_path / "clang++", "")
    said = reason_elsewhere(INFERKIT_CACHE=str(tmp_path), PATH=str(tmp_path), CXX=named)
    assert "g++ was not found" in said
    assert not list(tmp_path.glob("kernels/*"))


@needed
def test_a_compiler_that_fails_is_a_reason(tmp_path: Path) -> None:
    bad = command(tmp_path / "bad", "echo 'error: out of ideas' >&2; exit 1")
    said = reason_elsewhere(INFERKIT_CACHE=str(tmp_path), CXX=bad)
    assert "does not compile them (error: out of ideas)" in said
    assert not list(tmp_path.glob("kernels/*"))


@needed
def test_an_interrupt_of_the_kernel_is_not_the_compilers(tmp_path: Path) -> None:
    bad = command(tmp_path / "bad", "echo error of session $(ps -o sid= -p $$) >&2; exit 1")
    said = reason_elsewhere(INFERKIT_CACHE=str(tmp_path), CXX=bad)
    found = re.search(r"error of session +(\d+)", said)
    assert found
    assert int(found[1]) != os.getsid(0)


@needed
def test_the_library_is_kept_and_made_anew_where_it_is_not_what_was_made(tmp_path: Path) -> None:
    def have(**options: Any) -> Path:
        assert reason_elsewhere(INFERKIT_CACHE=str(tmp_path), **options) == "None"
        [library] = tmp_path.glob("kernels/*")
        return library

    before = os.umask(0o002)  # as many systems have it
    try:
        library = have()
    finally:
        os.umask(before)
    assert not library.stat().st_mode & 0o077
    made = library.stat().st_mtime_ns
    assert have(PATH="").stat().st_mtime_ns == made
    library.write_bytes(library.read_bytes()[:20_000])  # loading it would end the process
    assert have().stat().st_mtime_ns != made
    library.chmod(0o777)
    assert not have().stat().st_mode & 0o077


@needed
def test_a_folder_that_others_may_write_to_is_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    assert "others may write to" in reason_elsewhere(INFERKIT_CACHE=str(tmp_path))
    assert not list(folder.iterdir())
