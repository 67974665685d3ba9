"""Fidelity: how far a model's outputs are from those of a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from inferkit.html import format_number, table, text_table
from inferkit.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Fidelity", "SequenceFidelity"]


@dataclass(frozen=True, slots=True)
class SequenceFidelity:
    """The comparison over one sequence: a window of the text, or a prompt with its continuation.

    Attributes:
        prompt: The prompt, or None where it is a window of the text.
        positions: Predictions compared.
        kl: Mean KL divergence, nats per token.
        top1_agreement: Share of positions with the same most likely token.
        differs_at: Of a prompt, the first generated token (from 0) that is another one than the
            reference's, or None where none is.
    """

    prompt: str | None
    positions: int
    kl: float
    top1_agreement: float
    differs_at: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Fidelity:
    """How far a model's outputs are from those of a reference: the same model in "none".

    The two are compared where they read the same tokens: at every position of a text, and of each
    prompt followed by what the reference continues it with. Equal models have KL 0, agreement 1.

    Attributes:
        quantization: The mode that was measured, with its details.
        reference: What it was compared with.
        kl: Mean over all positions of the Kullback-Leibler divergence KL(reference || measured) of
            the next-token distributions at temperature 1, in nats per token (S. Kullback and
            R. Leibler, 1951; "Mean KLD" of llama.cpp's llama-perplexity), with its interval.
        top1_agreement: Share of all positions, 0 to 1, where both have the same most likely token
            ("Same top p" there), with its interval.
        perplexity: exp of the mean negative log-likelihood per token of the text, in windows of at
            most 512 tokens that each begin anew (with the tokenizer's first token, where it has
            one). Lower is better; it depends on the text and the tokenizer.
        reference_perplexity: The same of the reference.
        sequences: The comparison one sequence at a time.
        max_tokens: Tokens that were generated greedily for each prompt.
    """

    quantization: str
    reference: str
    kl: Interval
    top1_agreement: Interval
    perplexity: float
    reference_perplexity: float
    sequences: tuple[SequenceFidelity, ...]
    max_tokens: int

    @property
    def positions(self) -> int:
        """Predictions that were compared."""
        return sum(s.positions for s in self.sequences)

    @property
    def differs_at(self) -> tuple[int | None, ...]:
        """For each prompt the first greedy token (from 0) that differs; None where none does."""
        return tuple(s.differs_at for s in self.sequences if s.prompt is not None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return asdict(self) | {"positions": self.positions, "differs_at": list(self.differs_at)}

    def to_frame(self) -> pd.DataFrame:
        """One row per sequence."""
        import pandas as pd

        return pd.DataFrame([asdict(s) for s in self.sequences])

    def __repr__(self) -> str:
        return f"{self._title()}\n{text_table(_HEADER, self._rows())}\n{self._note()}"

    def _repr_html_(self) -> str:
        return table(_HEADER, self._rows(), caption=self._title(), note=self._note())

    def _title(self) -> str:
        return f"Fidelity of {self.quantization} to {self.reference}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for s in self.sequences:
            name, differs = "the text", "-"
            if s.prompt is not None:
                name, differs = _short(s.prompt), _ordinal(s.differs_at, self.max_tokens)
            agreement = f"{s.top1_agreement:.1%}"
            yield (name, str(s.positions), format_number(s.kl), agreement, differs)
        kl, top1 = self.kl, self.top1_agreement
        yield (
            "all",
            str(self.positions),
            f"{kl.value:.3g} ({kl.low:.3g} to {kl.high:.3g})",
            f"{top1.value:.1%} ({top1.low:.1%} to {top1.high:.1%})",
            "-",
        )

    def _note(self) -> str:
        return (
            f"Perplexity of the text {self.perplexity:.3f}, of the reference "
            f"{self.reference_perplexity:.3f}. KL: nats per token, KL(reference || measured); "
            "agreement: same most likely token; in brackets 95 % intervals (bootstrap over "
            f"positions). Greedy output of {self.max_tokens} tokens per prompt."
        )


_HEADER = ("sequence", "positions", "KL", "top-1 agreement", "greedy differs from token")


def _ordinal(where: int | None, length: int) -> str:
    return f"none of {length}" if where is None else str(where)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39].rstrip() + "…"
