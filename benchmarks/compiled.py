"""The compiled decode step beside the architecture's own code, on one device.

One process and one model whose compiled step is switched on and off (``model.configure(compile=)``)
in turn; rounds are interleaved and ratios are formed round by round. `transformers` ``generate``
takes its turns beside them, on weights of its own.

step
    median gap between a sequence's successive tokens, all sequences of a batch alike long, with
    all that an engine does for a token. For ``generate``: its time for all tokens less its time for
    one, per token.
limit
    the time to read every weight that a step reads once, at the bandwidth that this process
    measures in each round, in its turn. The input embeddings are looked up, not read.
share
    the limit against the compiled step at batch 1, round by round.
compile
    from ``ik.load`` to a compiled step: with nothing kept, and again with the code kept.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from spread import Spread, steps_against

_WAYS = ("own code", "compiled")


def measure(
    path: str,
    threads: int,
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    device: str = "cpu",
    dtype: str = "bfloat16",
    context: int = 2048,
) -> dict[str, Any]:
    """Spreads over the rounds: of steps by way and batch, and of their ratios."""
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    shape = {
        "dtype": dtype,
        "device": device,
        "max_batch": max(batches),
        "context": context,
        "prefix_reuse": False,
        "progress": False,
    }
    with tempfile.TemporaryDirectory() as kept:
        os.environ["INFERKIT_CACHE"] = kept
        first, second = (_load_s(path, shape) for _ in range(2))
        model = ik.load(path, compile=True, **shape)
        model.compilation.wait()
        status = str(model.compilation)
    generate, weights = _generate(path, device, dtype), weights_read(model)
    found: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        for batch in batches:
            ways: dict[str, Callable[[], float]] = {
                way: lambda way=way, batch=batch: _step(model, way, batch, tokens) for way in _WAYS
            }
            if batch == 1:
                ways |= {
                    "generate": lambda: generate(tokens),
                    "limit": lambda: weights / bandwidth(device),
                }
            order = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
            for way in order:
                step = ways[way]()
                if number:
                    found.append({"round": number, "way": way, "batch": batch, "step": step})
    cases = dict.fromkeys((r["way"], r["batch"]) for r in found)
    model.unload()
    at_one = {(r["round"], r["way"]): r["step"] for r in found if r["batch"] == 1}
    shares = [at_one[n, "limit"] / at_one[n, "compiled"] for n in range(1, rounds + 1)]
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "dtype": dtype,
        "context": context,
        "status": status,
        "compile_s": first,
        "kept_s": second,
        "share": asdict(Spread.of(shares)),
        "weights": weights,
        "steps": steps_against(found, "way", "own code", cases),
        "rounds": rounds,
    }


def _load_s(path: str, shape: dict[str, Any]) -> float:
    """Seconds from the call of ``ik.load`` to a step that is compiled, or will not be."""
    import inferkit as ik

    began = time.perf_counter()
    with ik.load(path, compile=True, **shape) as model:
        model.compilation.wait()
        return time.perf_counter() - began


def _step(model: Any, way: str, batch: int, tokens: int) -> float:
    model.configure(compile=way == "compiled")
    prompts = [[2, *range(1000 + 20 * i, 1015 + 20 * i)] for i in range(batch)]
    model.generate(prompts, max_tokens=4, ignore_eos=True)
    gens = model.generate(prompts, max_tokens=tokens, ignore_eos=True)
    return median(gap for gen in gens for gap in gen.latency.itl)


def _generate(path: str, device: str, dtype: str) -> Callable[[int], float]:
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    ids = torch.tensor([[2, *range(1000, 1015)]], device=device)

    def timed(count: int) -> float:
        began = time.perf_counter()
        module.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - began

    return lambda tokens: (timed(tokens + 1) - timed(1)) / tokens


def weights_read(model: Any) -> int:
    """Bytes of the weights that a decode step reads in whole."""
    from inferkit.loading import weight_bytes

    embedding = model._parts.loaded.module.get_input_embeddings().weight
    tied = model._parts.loaded.module.get_output_embeddings()
    shared = getattr(tied, "_parameters", {}).get("weight") is embedding
    return weight_bytes(model._parts.loaded) - (0 if shared else embedding.nbytes)


def bandwidth(device: str) -> float:
    """Bytes per second that a sum over half a GiB reads, the best of some."""
    import torch

    block = torch.ones(64 << 20, dtype=torch.float64, device=device)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - began)
    return block.nbytes / min(seconds)


def device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
