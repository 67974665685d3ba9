"""inferkit: `model.generate` with a list of prompts. Times are those of its own trace.

It is asked for nothing before its decode step is compiled; how long that took is told apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from worker import Options, Output, Request, serve, wait_until

import inferkit as ik


class Inferkit:
    def __init__(self, options: Options, mode: str) -> None:
        torch.set_num_threads(options.threads)
        self.model: Any = ik.load(
            options.model,
            dtype="bfloat16",
            device="cpu",
            quantize=mode,
            max_batch=options.slots,
            context=options.context,
            prefix_reuse=False,
            progress=False,
        )
        began = time.perf_counter()
        self.model.compilation.wait()
        self.waited = time.perf_counter() - began
        self.precision = "bf16" if mode == "none" else mode

    def about(self) -> dict[str, str]:
        return {
            "inferkit": ik.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "precision": self.precision,
            "step": f"{self.model.compilation}, waited for {self.waited:.0f} s",
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        done = self.model.generate(
            [list(p) for p in prompts], max_tokens=tokens, temperature=0.0, ignore_eos=True
        )
        return _outputs(done)

    def under(self, requests: Sequence[Request], began: float) -> list[Output]:
        sent = []
        for request in requests:
            wait_until(began + request.at)
            sent.append(
                self.model.submit(
                    request.prompt, max_tokens=request.tokens, temperature=0.0, ignore_eos=True
                )
            )
        return _outputs([each.result() for each in sent])


def _outputs(done: Iterable[ik.Generation]) -> list[Output]:
    return [Output(list(g.token_ids), [t / 1e9 for t in g.latency.trace.tokens]) for g in done]


serve(lambda options: Inferkit(options, sys.argv[1] if sys.argv[1:] else "none"))
