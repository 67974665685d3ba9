"""The fallback for architectures that cannot share a batch over slots: one request at a time.

transformers' own ``generate`` runs the model, with whatever cache or state the architecture has.
Our sampler chooses each token, so that parameters, timing and cancellation are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from inferkit.offload import input_device


class SequentialRunner:
    """Runs one prompt from beginning to end. Used by the engine's thread alone.

    Attributes:
        reason: Why the model is not run over slots.
    """

    def __init__(self, module: Any, *, context: int, prefill_chunk: int, reason: str) -> None:
        self.module = module
        self.device = input_device(module)
        self.context = context
        self.prefill_chunk = prefill_chunk
        self.reason = reason

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], choose: Callable[[torch.Tensor], int | None]) -> None:
        """Generate until ``choose``, given logits [1, vocab], returns None instead of a token."""
        chooser = _Chooser(choose)
        prompt = torch.tensor([list(tokens)], device=self.device)
        config = GenerationConfig(
            max_new_tokens=self.context, do_sample=False, pad_token_id=0, use_cache=True
        )
        # generate would add the model's own end tokens and penalties; here the request decides.
        own, self.module.generation_config = self.module.generation_config, GenerationConfig()
        try:
            self.module.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                logits_processor=[chooser],
                stopping_criteria=[chooser.stopping],
            )
        finally:
            self.module.generation_config = own

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int]) -> torch.Tensor:
        prompt = torch.tensor([list(tokens)], device=self.device)
        logits: torch.Tensor = self.module(input_ids=prompt, use_cache=False).logits
        return logits[0]

    def score(self, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the logits [tokens, vocab] after each of the tokens."""
        yield self._logits(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of KV cache between requests: none."""
        return 0

    def release(self) -> None:
        """Nothing is held between requests."""


class _Chooser(LogitsProcessor):
    """Puts our choice in the place of generate's own."""

    def __init__(self, choose: Callable[[torch.Tensor], int | None]) -> None:
        self._choose = choose
        self.stopping = _Stopping()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token_id = self._choose(scores)
        self.stopping.over = token_id is None
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token_id or 0] = 0
        return forced


class _Stopping(StoppingCriteria):
    over = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.over, device=input_ids.device)
