"""How long ``import inferkit`` takes in a fresh process, and what it brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from spread import Spread

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "plotly",
    "IPython",
    "ipywidgets",
    "bitsandbytes",
)
_PROGRAM = """
import json, sys, time
before = set(sys.modules)
began = time.perf_counter()
{statement}
seconds = time.perf_counter() - began
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
_STATEMENTS = {
    "import inferkit": "import inferkit",
    "import inferkit; inferkit.load": "import inferkit; inferkit.load",
    "import torch": "import torch",
    "import transformers": "import transformers",
}


def measure(threads: int, rounds: int, limit_s: float = 0.3) -> dict[str, Any]:
    """Interleaved; the first round warms the page cache and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in _STATEMENTS}
    modules: dict[str, Sequence[str]] = {}
    for number in range(rounds + 1):
        for name, statement in _STATEMENTS.items():
            taken, modules[name] = _run(statement)
            if number:
                seconds[name].append(taken)
    brought = modules["import inferkit"]
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    return {
        "seconds": {name: asdict(spread) for name, spread in spreads.items()},
        "modules": {name: len(found) for name, found in modules.items()},
        "heavy": [name for name in HEAVY if name in brought],
        "within_limit": spreads["import inferkit"].median <= limit_s and "torch" not in brought,
    }


def _run(statement: str) -> tuple[float, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
