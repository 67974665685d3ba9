"""Sampling: what a request asks for, and the batched sampler that serves it.

Parameter names and meanings are those of vLLM's ``SamplingParams``. The order of operations is
repetition penalty, temperature, ``top_k``, ``top_p``, ``min_p``.

A token is drawn by inverting the cumulative distribution at one uniform number, which comes from a
generator of the request's own. The numbers a request sees therefore depend on its seed alone:
not on the device, and not on who shares the batch.
"""

from __future__ import annotations

import difflib
import math
import numbers
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from inferkit.errors import NonFiniteLogitsError, OptionError

if TYPE_CHECKING:
    import torch

# Truncated sampling looks at this many of the likeliest tokens first. The number is fixed, so that
# a row's arithmetic is the same in every batch; rows that need more tokens are sorted in full.
_CANDIDATES = 1024

# How many of the last random numbers can be taken back.
_REMEMBERED = 64

# A lower temperature is greedy, as in vLLM: dividing by it would overflow.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        max_tokens: Most tokens to generate, at least 1.
        temperature: 0 (or less than 1e-5) picks the likeliest token (greedy); higher values flatten
            the distribution.
        top_p: Keep the smallest set of likeliest tokens whose probability reaches this, in (0, 1].
        top_k: Keep the k likeliest tokens; 0 keeps all.
        min_p: Drop tokens less likely than this share of the likeliest one, in [0, 1].
        repetition_penalty: Above 1 makes tokens of the prompt and the output less likely
            (Keskar et al. 2019, CTRL); 1 does nothing.
        seed: Seed of this request's random numbers; None draws one.
        stop: Strings that end the text; the text returned leaves them out.
        stop_token_ids: Token ids that end the request, besides the model's own end tokens.
        ignore_eos: Go on past the model's end tokens (for timing a fixed length).
        logprobs: Also return the log-probability of each token and of this many likeliest ones,
            computed from the model's raw logits as vLLM does; 0 returns none.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0

    def __post_init__(self) -> None:
        strings = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _checked_each("stop", strings, _is_text, _STRINGS))
        ids = _checked_each("stop_token_ids", self.stop_token_ids, _is_integer, _TOKEN_IDS)
        object.__setattr__(self, "stop_token_ids", tuple(map(int, ids)))
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos={self.ignore_eos!r}: give True or False.")
        for name, low, high, kind in _RANGES:
            number = _checked_number(name, getattr(self, name), low, high, kind)
            object.__setattr__(self, name, number)
        if self.temperature > 0 and self.top_p == 0:
            raise OptionError("top_p=0 keeps no token: give a number in (0, 1], or temperature=0.")
        if self.repetition_penalty == 0:
            raise OptionError("repetition_penalty=0 divides by zero: 1.0 means no penalty.")

    @classmethod
    def of(cls, options: Mapping[str, Any], base: SamplingParams | None = None) -> SamplingParams:
        """Build parameters from keyword options over ``base``.

        Raises:
            OptionError: An option is unknown (the nearest known one is named) or out of range.
        """
        known: dict[str, Any] = {
            f.name: getattr(base, f.name) if base else f.default for f in fields(cls)
        }
        for name, value in options.items():
            if name not in known:
                raise OptionError(unknown_option(name, known))
            known[name] = value
        return cls(**known)


# (name, lowest, highest, type); None for an open end.
_RANGES: tuple[tuple[str, float | None, float | None, type], ...] = (
    ("max_tokens", 1, None, int),
    ("temperature", 0, None, float),
    ("top_p", 0, 1, float),
    ("top_k", 0, None, int),
    ("min_p", 0, 1, float),
    ("repetition_penalty", 0, None, float),
    ("seed", None, None, int),
    ("logprobs", 0, 1000, int),
)


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The message for an option that does not exist, naming the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"Unknown option {name!r}{hint} The options are: {', '.join(names)}."


_STRINGS = "give non-empty strings, as stop=['\\n\\n']."
_TOKEN_IDS = "give token ids (integers), as stop_token_ids=[2]."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _checked_each(
    name: str, values: Any, accepts: Callable[[Any], bool], wanted: str
) -> tuple[Any, ...]:
    """Several values of one kind as a tuple; None for none."""
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{name}={values!r}: {wanted}")
    found = tuple(values)
    if not all(map(accepts, found)):
        raise OptionError(f"{name}={values!r}: {wanted}")
    return found


def _checked_number(
    name: str, value: Any, low: float | None, high: float | None, kind: type
) -> float | None:
    """The value as a plain ``kind`` (NumPy's numbers are taken too), if it is in range."""
    if value is None and name == "seed":
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        whole = number and math.isfinite(value) and value == int(value)
    except OverflowError:  # not shown: it may have more digits than Python writes, or JSON reads
        least, most = ("-1e308" if low is None else low), ("1e308" if high is None else high)
        raise OptionError(f"{name} is out of range: it must be from {least} to {most}.") from None
    if not number or math.isnan(value) or (kind is int and not whole):
        raise OptionError(f"{name}={value!r} is not {'an integer' if kind is int else 'a number'}.")
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise OptionError(f"{name}={value!r} is out of range: it must be {wanted}.")
    if math.isinf(value):
        raise OptionError(f"{name}={value!r} must be finite.")
    return kind(value)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithm) at one position, before temperature and filters.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its log-probability.
        top: (token id, log-probability) of the likeliest ones, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class RowSampler:
    """One request's sampling state: its parameters, its random numbers, the tokens seen so far."""

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.params = params
        self.seed = (
            params.seed if params.seed is not None else random.SystemRandom().getrandbits(63)
        )
        self._random = random.Random(self.seed)
        # The latest numbers, and those that are to be given out again, the next one last.
        self._given: deque[float] = deque(maxlen=_REMEMBERED)
        self._again: list[float] = []
        self._seen_ids = set(prompt_token_ids) if params.repetition_penalty != 1.0 else None
        self._seen: torch.Tensor | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.params.temperature < _GREEDY_BELOW

    @property
    def plain(self) -> bool:
        """Whether the raw logits alone decide: greedy, without penalty and without logprobs."""
        return self.greedy and self._seen_ids is None and not self.params.logprobs

    @property
    def truncated(self) -> bool:
        """Whether top_k, top_p or min_p drop tokens."""
        p = self.params
        return bool(p.top_k) or p.top_p < 1 or p.min_p > 0

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's own sequence."""
        number = self._again.pop() if self._again else self._random.random()
        self._given.append(number)
        return number

    def take_back(self, tokens: int) -> None:
        """The last so many tokens were chosen in vain: their numbers are drawn by again."""
        if not self.greedy:
            self._again += [self._given.pop() for _ in range(tokens)]

    def draw(self) -> float:
        """The number that the next token is drawn by; a greedy row has no need of one."""
        return 0.0 if self.greedy else self.uniform()

    def observe(self, token_id: int) -> None:
        """Remember a token that was generated."""
        if self._seen_ids is not None and token_id not in self._seen_ids:
            self._seen_ids.add(token_id)
            if self._seen is not None:
                self._seen[token_id] = True

    def penalize(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the repetition penalty to one row of logits [vocab]."""
        if self._seen_ids is None:
            return logits
        import torch

        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            inside = [i for i in self._seen_ids if i < logits.shape[-1]]
            self._seen[torch.tensor(inside, device=logits.device)] = True
        penalty = self.params.repetition_penalty
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._seen, lowered, logits)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler chose for one row; ``error`` where the logits were not finite."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: NonFiniteLogitsError | None = None


def sample(logits: torch.Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
    """Choose one token per row.

    All rows are worked on together on the logits' device, and what was chosen comes from there in
    one piece: a GPU is waited for once, whatever the rows ask for. Log-probabilities come in two
    pieces more; and once more is waited where a row's filters leave more candidates than were
    looked at.

    Args:
        logits: [rows, vocab], in the model's dtype.
        rows: One state per row; each sampled row consumes one random number.
    """
    import torch

    best, ids = _best(logits)
    enough = torch.ones_like(ids, dtype=torch.bool)
    busy = [i for i, row in enumerate(rows) if not row.plain]
    if busy:
        states, uniform = [rows[i] for i in busy], [rows[i].draw() for i in busy]
        asked_of = logits if len(busy) == len(rows) else logits[busy]
        scores = _penalized(asked_of.float(), states)
        ids[busy], enough[busy] = _choose(scores, states, uniform)
    finite, looked, chosen = torch.stack([best.isfinite().long(), enough.long(), ids]).tolist()
    for j, i in enumerate(busy):
        if finite[i] and not looked[i]:
            chosen[i] = _of_all(scores[j], states[j], uniform[j])
    asked = [i for i in busy if finite[i] and rows[i].params.logprobs]
    wanted = [(i, chosen[i], rows[i].params.logprobs) for i in asked]
    told = dict(zip(asked, _logprobs(logits, wanted), strict=True))
    out = []
    for i, row in enumerate(rows):
        if finite[i]:
            row.observe(chosen[i])
            out.append(Sampled(chosen[i], told.get(i)))
        else:
            out.append(Sampled(-1, error=NonFiniteLogitsError(_NON_FINITE)))
    return out


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, NaN where there is one, and its token.

    In two halves, first which part of the vocabulary and then which token: on a CPU, where torch
    finds a maximum three times faster than where it is, that saves two thirds of the time.
    """
    import torch

    part = next((n for n in (1024, 512, 256, 128) if logits.shape[-1] % n == 0), 0)
    if not part:
        return logits.max(dim=-1)
    parts = logits.unflatten(-1, (-1, part))
    best, chosen = parts.amax(dim=-1).max(dim=-1)
    inside = parts[torch.arange(len(parts), device=logits.device), chosen].argmax(dim=-1)
    return best, chosen * part + inside


_NON_FINITE = (
    "The model's logits are NaN or infinite, so no token can be chosen. The usual causes are "
    "float16 overflow (load with dtype='bfloat16' or 'float32') and damaged weights."
)


def _penalized(raw: torch.Tensor, rows: Sequence[RowSampler]) -> torch.Tensor:
    import torch

    if all(row.params.repetition_penalty == 1.0 for row in rows):
        return raw
    return torch.stack([row.penalize(line) for row, line in zip(rows, raw, strict=True)])


def _choose(
    scores: torch.Tensor, rows: Sequence[RowSampler], uniform: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows] for fp32 scores [rows, vocab]; each kind of row in one batched call.

    Also tells, per row, whether enough candidates were looked at: see `_of_all`.
    """
    import torch

    ids = scores.argmax(dim=-1)
    enough = torch.ones_like(ids, dtype=torch.bool)
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    truncated = [i for i in drawn if rows[i].truncated]
    whole = [i for i in drawn if not rows[i].truncated]
    if whole:
        ids[whole] = _whole(scores[whole], [rows[i] for i in whole], [uniform[i] for i in whole])
    if truncated:
        ids[truncated], enough[truncated] = _truncated(
            scores[truncated], [rows[i] for i in truncated], [uniform[i] for i in truncated]
        )
    return ids, enough


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _whole(
    scores: torch.Tensor, rows: Sequence[RowSampler], uniform: Sequence[float]
) -> torch.Tensor:
    """Draw from the whole distribution, in the order of the vocabulary."""
    probs = (scores / _column([r.params.temperature for r in rows], scores)).softmax(dim=-1)
    return _invert(probs, uniform)


def _truncated(
    scores: torch.Tensor, rows: Sequence[RowSampler], uniform: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the likeliest tokens that top_k, top_p and min_p leave.

    Only so many candidates are looked at; also tells, per row, whether they were enough.
    """
    scores = scores / _column([r.params.temperature for r in rows], scores)
    log_total = scores.logsumexp(dim=-1, keepdim=True)
    count = min(_CANDIDATES, scores.shape[-1])
    top, top_ids = scores.topk(count, dim=-1)
    kept, enough = _keep(top, log_total, rows, scores.shape[-1])
    chosen = top_ids.gather(-1, _invert(kept, uniform)[:, None])[:, 0]
    return chosen, enough if count < scores.shape[-1] else enough | True


def _of_all(scores: torch.Tensor, row: RowSampler, uniform: float) -> int:
    """Draw for one row [vocab] from all the tokens that its filters leave."""
    scores = scores[None] / row.params.temperature
    log_total = scores.logsumexp(dim=-1, keepdim=True)
    ordered, order = scores.sort(dim=-1, descending=True)
    kept, _ = _keep(ordered, log_total, [row], scores.shape[-1])
    return int(order[0, _invert(kept, [uniform])[0]])


def _keep(
    top: torch.Tensor, log_total: torch.Tensor, rows: Sequence[RowSampler], vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [rows, n] of sorted candidates with the dropped ones at 0.

    Also tells, per row, whether the candidates were enough: whether the next token beyond them
    would have been dropped as well.
    """
    import torch

    n = top.shape[-1]
    top_k = _column([r.params.top_k if r.params.top_k < vocab else 0 for r in rows], top)
    top_k = torch.where(top_k > 0, top_k, math.inf)
    top_p = _column([r.params.top_p for r in rows], top)
    min_p = _column([r.params.min_p for r in rows], top)
    rank = torch.arange(n, device=top.device)[None]
    within_k = rank < top_k
    probs = (top - log_total).exp() * within_k
    mass = torch.where(top_k <= n, probs.sum(dim=-1, keepdim=True), torch.ones_like(top_k))
    probs = probs / mass
    before = probs.cumsum(dim=-1) - probs
    keep = within_k & (before < top_p) & (probs >= min_p * probs[:, :1])
    enough = (top_k[:, 0] <= n) | (top_k[:, 0].isinf() & ~keep[:, -1])
    return probs * keep, enough


def _invert(weights: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """First index whose cumulative weight exceeds uniform x total; weights [rows, n]."""
    import torch

    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = _column(uniform, weights) * total
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding can put the target on the total: take the last token with weight, not one past it.
    last = (cumulative < total).sum(dim=-1)
    return torch.minimum(index, last)


def _logprobs(logits: torch.Tensor, wanted: Sequence[tuple[int, int, int]]) -> list[TokenLogprobs]:
    """Log-probabilities for (row, token, how many of the likeliest) of logits [rows, vocab]."""
    import torch

    if not wanted:
        return []
    logprobs = logits[[row for row, _, _ in wanted]].float().log_softmax(dim=-1)
    tokens = torch.tensor([token for _, token, _ in wanted], device=logits.device)[:, None]
    top, top_ids = logprobs.topk(min(max(n for _, _, n in wanted), logits.shape[-1]))
    values = torch.cat([logprobs.gather(-1, tokens), top], dim=-1).tolist()
    return [
        TokenLogprobs(token, own, tuple(zip(ids, likeliest))[:count])
        for (_, token, count), (own, *likeliest), ids in zip(wanted, values, top_ids.tolist())
    ]
