"""llama.cpp through llama-cpp-python's low-level interface: one decode call per step.

The high-level class serves one sequence; llama.cpp itself batches, so the loop is written as in
llama.cpp's own example of it. The next token is NumPy's argmax of the logits, which is faster over
262,144 of them than llama.cpp's sampler.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from worker import Options, Output, serve

_BF16 = 32  # LLAMA_FTYPE_MOSTLY_BF16


class LlamaCpp:
    def __init__(self, options: Options, precision: str) -> None:
        llama_cpp.llama_backend_init()
        self.precision = precision
        path = options.gguf if precision == "Q4_K_M" else _unpacked(options.gguf)
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.context * 2
        params.n_batch = options.context * 2
        params.n_seq_max = options.slots
        params.n_threads = params.n_threads_batch = options.threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp makes no context")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def about(self) -> dict[str, str]:
        return {"llama-cpp-python": llama_cpp.__version__, "precision": self.precision}

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Output]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        outputs = [Output([], []) for _ in prompts]
        self._run(
            [(t, i, row, i == len(p) - 1) for row, p in enumerate(prompts) for i, t in enumerate(p)]
        )
        for step in range(tokens):
            chosen = self._chosen(len(prompts))
            now = time.perf_counter()
            for output, token in zip(outputs, chosen, strict=True):
                output.token_ids.append(token)
                output.times.append(now)
            if step < tokens - 1:
                self._run(
                    [
                        (token, len(prompt) + step, row, True)
                        for row, (token, prompt) in enumerate(zip(chosen, prompts, strict=True))
                    ]
                )
        return outputs

    def _run(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode (token, position, sequence, whether logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = wanted
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {code}")

    def _chosen(self, rows: int) -> list[int]:
        logits = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (rows, self.vocab)).argmax(-1).tolist()


def _unpacked(gguf: str) -> str:
    """The same weights as bf16, made once beside the packed file."""
    made = Path(gguf).with_suffix(".bf16.gguf")
    if not made.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = _BF16, True
        part = made.with_suffix(".part")
        if llama_cpp.llama_model_quantize(gguf.encode(), str(part).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp does not unpack {gguf}")
        os.replace(part, made)
    return str(made)


serve(lambda options: LlamaCpp(options, sys.argv[1]))
