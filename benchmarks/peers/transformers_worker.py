"""transformers: `generate`, one static batch. A streamer notes the time of each step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from worker import Options, Output, serve


class Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generate:
    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        self.model = model.eval()
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def about(self) -> dict[str, str]:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": self.model.config._attn_implementation,
            "precision": "bf16",
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        clock = Clock()
        ids = torch.tensor(prompts)  # prompts are equally long: nothing is padded
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        times = clock.times[1:]  # the first call brings the prompt
        return [Output(row, times) for row in made[:, ids.shape[1] :].tolist()]


serve(Generate)
