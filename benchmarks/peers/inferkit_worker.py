"""inferkit: `model.generate` with a list of prompts. Times are those of its own trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from worker import Options, Output, serve

import inferkit as ik


class Inferkit:
    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self.model: Any = ik.load(
            options.model,
            dtype="bfloat16",
            device="cpu",
            max_batch=options.slots,
            context=options.context,
            prefix_reuse=False,
            progress=False,
        )

    def about(self) -> dict[str, str]:
        return {
            "inferkit": ik.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "precision": "bf16",
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        done = self.model.generate(
            [list(p) for p in prompts], max_tokens=tokens, temperature=0.0, ignore_eos=True
        )
        return [Output(list(g.token_ids), [t / 1e9 for t in g.latency.trace.tokens]) for g in done]


serve(Inferkit)
