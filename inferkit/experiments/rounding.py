"""Whether rounding alone explains that another token came than the one that was recorded.

The probabilities of the next token, computed here after the same tokens, tell: a greedy request
takes the likeliest token, so that rounding can decide between two that are about equally likely; a
request that draws takes the token whose part of the distribution has the number that it drew, so
that rounding can decide between two where that number is near a border of the recorded one's part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inferkit.sampling import RowSampler, SamplingParams

if TYPE_CHECKING:
    import torch

    from inferkit.model import Model

__all__ = ["ROUNDING", "Judgement", "judge", "shift"]

ROUNDING = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25, "int8": 1.0}
"""How far apart (in nats) two likeliest tokens may be for rounding to choose between them.

For bf16 two units in the last place of a logit of 16 to 32, which is where they lie; the others in
proportion, with room for the layers before. LLM.int8() rounds what each layer takes to 8 bits, by
its largest numbers: between bf16 and fp32 the demo model's two likeliest were up to 0.5 nats apart.
"""

_MOST = 0.25  # of the probability, that rounding may move a border of a token's part


@dataclass(frozen=True, slots=True)
class Judgement:
    """How near the recorded token was to coming here.

    Attributes:
        near: Whether rounding explains that it did not come.
        gap: By how many nats the recorded token is less likely than the one that came, after the
            repetition penalty; None where it was drawn.
        said: In words.
    """

    near: bool
    gap: float | None
    said: str


def judge(
    model: Model,
    params: SamplingParams,
    prompt: Sequence[int],
    before: Sequence[int],
    came: int,
    recorded: int,
    limit: float,
) -> Judgement:
    """Compute what the token after ``prompt`` and ``before`` was chosen from, and look.

    Args:
        model: In the mode in which it came; requests that run finish first.
        params: Of the request, with the seed that it had.
        prompt: Token ids.
        before: Token ids that were generated, the same in the recording and here.
        came: The token that came here.
        recorded: The token that was recorded.
        limit: Nats that rounding may be wrong by: see `ROUNDING`.
    """
    row = RowSampler(params, prompt)
    for token in before:
        row.observe(token)
    scores = row.penalize(_last_logits(model, [*prompt, *before]))
    if not 0 <= recorded < len(scores):
        return Judgement(False, None, "the recorded token is none of this model's")
    if row.greedy:
        gap = abs(float(scores[came] - scores[recorded]))
        return Judgement(gap <= limit, gap, f"the two tokens are {gap:.3g} nats apart here")
    drawn = [row.uniform() for _ in range(len(before) + 1)][-1]
    missed = _missed(scores / params.temperature, row, drawn, recorded, limit / params.temperature)
    near = missed <= shift(limit, params.temperature)
    if missed == math.inf:
        return Judgement(False, None, "the recorded token is not among those to draw from here")
    return Judgement(
        near, None, f"the number drawn is {missed:.2g} of the probability off the recorded token"
    )


def shift(limit: float, temperature: float) -> float:
    """By how much probability rounding may move a border between the parts of two tokens.

    A border with the probability p below it moves by p (1 - p) (a - b) / temperature, where logits
    are wrong by a on the average of the tokens below and by b above: by ``limit / 4`` at most where
    two logits are ``limit`` apart at most. Half of that is allowed, for many tokens average; what
    was seen of bf16 beside fp32, of another processor and of a GPU beside a CPU was within half.
    """
    return min(_MOST, limit / (8 * temperature))


def _last_logits(model: Model, sequence: Sequence[int]) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def take(_: int, start: int, logits: torch.Tensor) -> None:
        if start + len(logits) == len(sequence):
            found.append(logits[-1].float().clone())

    model._parts.score([sequence], take)
    return found[0]


def _missed(scores: torch.Tensor, row: RowSampler, drawn: float, token: int, limit: float) -> float:
    """How much probability lies between the drawn number and a token's part; inf: it has none.

    Where filters drop tokens, the others are in the order of their likelihood, which rounding
    changes among those that are near to each other: the part reaches from where it begins if they
    come after the token to where it ends if they come before.
    """
    probs = scores.double().softmax(dim=-1)
    if not row.truncated:
        end = float(probs[: token + 1].sum())
        return max(0.0, end - float(probs[token]) - drawn, drawn - end)
    kept = _kept(probs, row.params)
    # A token that rounding may have dropped is the last of them.
    if scores[token] < scores[kept].min() - limit:
        return math.inf
    among = probs * kept / probs[kept].sum()
    begin = float(among[scores > scores[token] + limit].sum())
    end = float(among[scores >= scores[token] - limit].sum())
    return max(0.0, begin - drawn, drawn - end)


def _kept(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which tokens [vocab] top_k, top_p and min_p leave, in that order, as the sampler's do."""
    import torch

    ordered, order = probs.sort(descending=True)
    inside = torch.arange(len(ordered), device=probs.device) < (params.top_k or len(ordered))
    ordered = ordered * inside / ordered[inside].sum()
    inside &= (ordered.cumsum(dim=-1) - ordered < params.top_p) & (
        ordered >= params.min_p * ordered[0]
    )
    return torch.zeros_like(inside).scatter(0, order, inside)
