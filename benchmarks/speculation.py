"""Prompt lookup beside plain decoding, on texts that quote, repeat or do neither.

One model, compiled, whose guessing is switched on and off in turn; rounds are interleaved and
ratios are formed round by round.

tpot
    the median over the sequences of a batch of (last token - first token) / (tokens - 1): the gap
    between tokens would leave out how many come at once.
accepted
    of the tokens that were guessed, the share that was right; and how many tokens a pass gave.
same
    whether the tokens were those of plain decoding. Rounding may differ, as passes are wider.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from spread import steps_against

_WAYS = ("off", "ngram")
_ARTICLE = (
    "The northern lights, or aurora borealis, are seen where charged particles from the sun meet "
    "the upper atmosphere near the magnetic poles. They are strongest in the years when the sun "
    "has most spots, and seen best on clear winter nights, away from the lights of towns."
)
TEXTS = {
    "quotes": f"Text: {_ARTICLE}\nThe same text again: The northern lights, or",
    "lists": "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a,",
    "tells": "Once upon a time, in a village by the sea, there lived",
}
"""What a text does, and one that does it; "tells" is drawn, so that it does not repeat itself."""


def measure(
    path: str,
    threads: int,
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """For each text and precision: spreads of TPOT over the rounds, and what was accepted."""
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    found = []
    with ik.load(
        path,
        device=device,
        max_batch=max(batches),
        prefix_reuse=False,
        compile=True,
        progress=False,
    ) as model:
        for mode in ("none", "int4wo") if device == "cpu" else ("none",):
            model.quantize(mode, progress=False)
            model.compilation.wait()
            found += [
                {"mode": mode, "dtype": model.dtype, "text": text}
                | _of_text(model, text, batches, tokens, rounds)
                for text in TEXTS
            ]
    return found


def _of_text(
    model: Any, text: str, batches: Sequence[int], tokens: int, rounds: int
) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    seen: dict[tuple[int, str], Any] = {}
    for number in range(rounds + 1):
        for batch in batches:
            for way in _WAYS if number % 2 else _WAYS[::-1]:
                gens = _run(model, text, way, batch, tokens)
                seen[batch, way] = gens
                if number:  # the first round warms up
                    step = median(gen.latency.tpot for gen in gens)
                    steps.append({"round": number, "way": way, "batch": batch, "step": step})
    rows = steps_against(steps, "way", "off", [(way, b) for b in batches for way in _WAYS])
    for row in rows:
        row |= _accepted(seen[row["batch"], row["way"]], seen[row["batch"], "off"])
    return {"rounds": rounds, "rows": rows}


def _run(model: Any, text: str, way: str, batch: int, tokens: int) -> Any:
    model.configure(speculative=way)
    drawn = {"temperature": 0.8} if text == "tells" else {}
    seeds = list(range(batch))
    return model.generate(
        [TEXTS[text]] * batch, max_tokens=tokens, ignore_eos=True, seed=seeds, **drawn
    )


def _accepted(gens: Any, plain: Any) -> dict[str, Any]:
    passes = sum(len(gen.latency.itl) for gen in gens)
    return {
        "accepted": gens.summary().acceptance_rate,
        "tokens_per_pass": sum(len(gen.token_ids) - 1 for gen in gens) / passes,
        "same": sum(a.token_ids == b.token_ids for a, b in zip(gens, plain, strict=True)),
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
