"""bf16 by tiles beside the plain products, and beside fp32, on a CPU that multiplies no bf16.

One model in bf16 whose layers are made plain and tiled again in turn, and one in fp32, all with the
architecture's own code; rounds are interleaved and ratios are formed round by round.

step
    the median over the sequences of a batch of (last token - first token) / (tokens - 1).
prefill
    time to the first token of one prompt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from spread import steps_against

WAYS = ("bf16, plain", "bf16, tiles", "fp32")
PROMPT = 500  # tokens that are prefilled


def measure(
    path: str, threads: int, batches: Sequence[int], tokens: int, rounds: int
) -> dict[str, Any] | None:
    """Spreads of the steps and of a prefill; None where this CPU multiplies bf16 itself."""
    import torch

    import inferkit as ik
    from inferkit.tiled import tileable

    torch.set_num_threads(threads)
    if not tileable("cpu", "bfloat16"):
        return None
    shape = {"device": "cpu", "max_batch": max(batches), "prefix_reuse": False, "compile": False}
    with (
        ik.load(path, name="bf16", dtype="bfloat16", progress=False, **shape) as half,
        ik.load(path, name="fp32", dtype="float32", progress=False, **shape) as full,
    ):
        steps = []
        for number in range(rounds + 1):
            for way in WAYS if number % 2 else WAYS[::-1]:
                model = full if way == "fp32" else half
                _become(half, way)
                for batch in (0, *batches):
                    step = _prefill(model) if batch == 0 else _step(model, batch, tokens)
                    if number:  # the first round warms up
                        steps.append({"round": number, "way": way, "batch": batch, "step": step})
    rows = steps_against(steps, "way", WAYS[0], [(w, b) for b in (0, *batches) for w in WAYS])
    return {"rounds": rounds, "prompt": PROMPT, "rows": rows}


def _become(model: Any, way: str) -> None:
    from torch import nn

    from inferkit.tiled import TiledLinear

    for child in model._parts.loaded.module.modules():
        if type(child) is nn.Linear and way == "bf16, tiles":
            child.__class__ = TiledLinear
        elif type(child) is TiledLinear and way == "bf16, plain":
            child.__class__ = nn.Linear


def _prefill(model: Any) -> float:
    return float(model.generate([range(5, 5 + PROMPT)], max_tokens=1)[0].latency.ttft)


def _step(model: Any, batch: int, tokens: int) -> float:
    prompts = [[5 + row, *range(20, 35)] for row in range(batch)]
    gens = model.generate(prompts, max_tokens=tokens, ignore_eos=True)
    return float(median(gen.latency.tpot for gen in gens))


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
