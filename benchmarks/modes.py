"""The quantize modes: their decode step, and the time and memory that a toggle takes.

One process and one model, toggled in place. Rounds are interleaved: each goes through the modes in
an order that turns by one from round to round, and in each mode through the batches; ratios are
formed round by round.

decode step
    median gap between a sequence's successive tokens, all sequences of a batch alike long.
toggle
    time of ``model.quantize(mode)`` from the mode before it in the round, against ``ik.load`` of
    the same mode under another name in the same process, right after. Files are in the page cache
    and the tokenizer is in memory for both.
memory while toggling
    sampled every 5 ms by a thread. *Anonymous* is what the process has to itself; pages of the
    weight file are left out, which the system takes back when somebody needs them. The peak is
    compared with what it would take to hold the new weights beside the old ones.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from spread import Spread, steps_against

MODES = ("none", "int8", "nf4", "fp4")
_TICK = 0.005


def measure(
    path: str, threads: int, batches: Sequence[int], tokens: int, rounds: int
) -> dict[str, Any]:
    """Spreads over the rounds: of steps by mode and batch, of toggles by mode and by pair."""
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    shape = {
        "dtype": "bfloat16",
        "device": "cpu",
        "max_batch": max(batches),
        "context": 512,
        "prefix_reuse": False,
        "compile": False,
        "progress": False,
    }
    model = ik.load(path, name="toggled", **shape)
    steps: list[dict[str, Any]] = []
    toggles: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        order = [MODES[(number + i) % len(MODES)] for i in range(len(MODES))]
        for mode in order:
            toggle = _toggle(model, mode)
            began = time.perf_counter()
            other = ik.load(path, name="loaded", quantize=mode, **shape)
            toggle["load_s"] = time.perf_counter() - began
            other.unload()
            if number and toggle["from"] != mode:
                toggles.append(toggle)
            for batch in batches:
                step = _step(model, batch, tokens)
                if number:
                    steps.append({"round": number, "mode": mode, "batch": batch, "step": step})
    model.unload()
    return {
        "steps": steps_against(steps, "mode", "none", product(MODES, batches)),
        "toggles": _toggles(toggles),
        "memory": _memory(toggles),
        "rounds": rounds,
    }


def _step(model: Any, batch: int, tokens: int) -> float:
    """Seconds of a decode step of a full batch, after a short one that warms up."""
    prompts = [[2, *range(1000 + 20 * i, 1015 + 20 * i)] for i in range(batch)]
    model.generate(prompts, max_tokens=4, ignore_eos=True)
    gens = model.generate(prompts, max_tokens=tokens, ignore_eos=True)
    return median(gap for gen in gens for gap in gen.latency.itl)


def _toggle(model: Any, mode: str) -> dict[str, Any]:
    """Change the mode; its time, and the memory before, after and at most meanwhile."""
    from inferkit.devices import release_memory

    former = model.quantization
    release_memory(["cpu"])
    before = _anonymous()
    with _watched() as peak:
        began = time.perf_counter()
        model.quantize(mode, progress=False)
        seconds = time.perf_counter() - began
    release_memory(["cpu"])
    return {
        "from": former,
        "to": mode,
        "toggle_s": seconds,
        "before": before,
        "after": _anonymous(),
        "peak": peak[0],
        "new": model._parts.nbytes - model._engine.runner.nbytes,
    }


@contextmanager
def _watched() -> Iterator[list[int]]:
    """The most anonymous memory seen while the body runs, as the one entry of a list."""
    peak, over = [_anonymous()], threading.Event()

    def watch() -> None:
        while not over.wait(_TICK):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _anonymous() -> int:
    """Resident bytes that are no pages of a file."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def _toggles(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for mode in MODES:
        mine = [t for t in found if t["to"] == mode]
        rows.append(
            {
                "mode": mode,
                "toggle_s": asdict(Spread.of(t["toggle_s"] for t in mine)),
                "load_s": asdict(Spread.of(t["load_s"] for t in mine)),
                "ratio": asdict(Spread.of(t["toggle_s"] / t["load_s"] for t in mine)),
            }
        )
    return rows


def _memory(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of each pair of modes."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for toggle in found:
        pair = toggle["from"], toggle["to"]
        over = toggle["peak"] - max(toggle["before"], toggle["after"])
        if pair not in worst or over > worst[pair]["over"]:
            kept = {k: toggle[k] for k in ("from", "to", "before", "after", "peak", "new")}
            worst[pair] = {**kept, "over": over}
    return list(worst.values())


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
