"""Experiments made by hand, and their files."""

import json

import numpy as np

from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import (
    Environment,
    ExperimentFile,
    ModeEntry,
    ModelEntry,
    RequestEntry,
)

MS = 1_000_000
SETTINGS = {
    "model": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "quantization": "none",
    "batching": "continuous",
    "max_batch": 8,
}


def request(
    arrival,
    *tokens,
    reason="length",
    finished=None,
    error=None,
    prompt_tokens=7,
    text="",
    chunks=None,
):
    """Tokens so many ns after the arrival, which is in ns too."""
    at = [arrival + token for token in tokens]
    return RequestEntry(
        model=0,
        mode=0,
        arrival=arrival,
        prompt="a prompt",
        prompt_tokens=prompt_tokens,
        params={"max_tokens": 64},
        seed=0,
        settings=SETTINGS,
        text=text,
        finish_reason=reason,
        error=error,
        scheduled=arrival,
        tokens=at,
        chunks=chunks,
        finished=at[-1] if at and finished is None else finished,
    )


def experiment(*requests, duration=10**9):
    mode = ModeEntry(
        time=0,
        model=0,
        quantize="none",
        format="none",
        batching="continuous",
        max_batch=8,
        context=64,
        step="eager",
    )
    file = ExperimentFile(
        name="tiny run",
        created="2026-11-24T09:30:00.250+00:00",
        environment=Environment(),
        duration=duration,
        models=[ModelEntry(name="tiny", ref="owner/tiny", kind="hub")],
        modes=[mode],
        requests=list(requests),
    )
    return Experiment(file)


def small():
    """Two requests that succeed, one that is cancelled, one that fails, one on its way."""
    return experiment(
        request(0, 100 * MS, 120 * MS, 150 * MS, text="one two three"),
        request(50 * MS, 200 * MS, text="x", reason="stop"),
        request(60 * MS, 90 * MS, reason="cancelled", finished=170 * MS),
        request(70 * MS, reason="error", finished=80 * MS, error=["OutOfMemoryError", "no room"]),
        request(90 * MS, 95 * MS, reason=None),
    )


def random_experiment(seed=0, count=30):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        first = int(rng.integers(10**7, 10**8))
        gaps = rng.lognormal(17, 0.5, size=rng.integers(0, 40)).astype(int)
        made.append(request(int(rng.integers(0, 10**9)), *(first + np.cumsum([0, *gaps])).tolist()))
    made.append(request(10**8, reason="cancelled", finished=2 * 10**8))
    return experiment(*sorted(made, key=lambda one: one.arrival), duration=5 * 10**9)


def saved(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)
