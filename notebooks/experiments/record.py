"""Record the example that the notebook on experiments opens: python record.py NAME [--device ...].

Five prompts under three settings, one after the other: batches of four, batches of two, and weights
in four bits with sampling.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import inferkit as ik

PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "1, 2, 3, 4,",
    "The best thing about a rainy day is",
    "My favourite recipe begins with",
]
MAX_TOKENS = 12


def main() -> None:
    """Write NAME.inferkit.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", help="fits Binder's memory everywhere")
    asked = parser.parse_args()
    model = ik.load(
        "demo", context=256, max_batch=4, device=asked.device, dtype=asked.dtype, compile=False
    )
    model.generate(["Hello", "Hi"], max_tokens=2)  # what a first use makes ready
    path = Path(__file__).parent / f"{asked.name}.inferkit.json"
    with ik.record(asked.name, path=path, overwrite=True) as recorded:
        model.generate(PROMPTS, max_tokens=MAX_TOKENS)
        model.configure(max_batch=2)
        model.generate(PROMPTS, max_tokens=MAX_TOKENS)
        model.quantize("nf4", progress=False)
        model.generate(PROMPTS, max_tokens=MAX_TOKENS, temperature=0.7, seed=1)
    print(recorded)


if __name__ == "__main__":
    main()
