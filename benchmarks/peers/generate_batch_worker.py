"""transformers: `generate_batch`, its continuous batching. Times are its own token timestamps.

Its manager (threads, paged KV cache) is kept between calls, and sized for the largest of them, so
that its start is not in the numbers. Prefix sharing is off, as for the other engines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from worker import Options, Output, serve


class GenerateBatch:
    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.config = ContinuousBatchingConfig(
            allow_block_sharing=False,
            auto_switch_to_flash=False,
            max_requests_per_batch=options.slots,
            max_batch_tokens=max(options.context, 512),
            num_blocks=2 * options.slots * -(-options.context // 256),
        )

    def about(self) -> dict[str, str]:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": "sdpa (paged)",
            "precision": "bf16",
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        done = self.model.generate_batch(
            [list(p) for p in prompts],
            generation_config=GenerationConfig(
                max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=self.config,
            record_timestamps=True,
            persistent_manager=True,
        )
        return [Output(list(g.generated_tokens), list(g.timestamps)) for g in done.values()]


serve(GenerateBatch)
