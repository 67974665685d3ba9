"""What a decode step costs by context and batch, and what of it the memory's bandwidth explains.

Each cell is one pass over so many rows (`SlottedRunner.decode`), every row at the last position of
its context, and the choice of the likeliest tokens as the engine makes it; nothing of scheduling,
text or events. The KV
cache is filled with numbers drawn at random beforehand, for the time does not depend on them, and
prefilling 64 prompts of 8,192 tokens would take longer than all the rest. Cells take turns, round
by round.

step
    the median over the rounds.
limit
    the time to read once every weight that a step reads and all keys and values that it reads of
    each row (those of a window and a chunk, where a layer has a window), at the bandwidth that a
    sum in this process had in the same run, the median of the rounds. Where a step takes much
    longer, it is bound by its arithmetic, or by the number of its operations.

Batches whose KV cache does not fit are left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from compiled import bandwidth, device_name, weights_read
from spread import Spread

CONTEXTS = (128, 512, 2048, 8192)
BATCHES = (1, 4, 16, 64)


def measure(
    path: str,
    threads: int,
    rounds: int,
    device: str = "cpu",
    dtype: str = "auto",
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
) -> dict[str, Any]:
    """Spreads over the rounds: of the step in ms, by context and batch."""
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    name = device_name(device)
    shape = {"device": device, "dtype": dtype, "context": max(contexts)}
    batches = [batch for batch in batches if ik.plan(path, max_batch=batch, **shape).fits]
    with ik.load(
        path, max_batch=max(batches), prefix_reuse=False, progress=False, **shape
    ) as model:
        model.compilation.wait()
        model.generate([[2, 3]], max_tokens=2)  # a compiled step is swapped in before a pass
        engine = model._parts.engine
        engine.call(lambda: _fill(engine.runner))
        cells = [(context, batch) for context in contexts for batch in batches]
        found: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
        speeds = []
        for number in range(rounds + 1):
            # In the engine's thread: with OpenMP threads of two, passes would wait for sleepers.
            speeds.append(engine.call(lambda: bandwidth(device)))
            for cell in cells if number % 2 else cells[::-1]:
                took = engine.call(lambda cell=cell: _step(engine.runner, *cell))
                if number:  # the first round warms up
                    found[cell].append(took)
        weights, speed = weights_read(model), median(speeds)
        rows = [
            {
                "context": context,
                "batch": batch,
                "step_ms": asdict(Spread.of(1e3 * took for took in found[context, batch])),
                "limit_ms": 1e3
                * (weights + engine.runner.cache.bytes_of([context] * batch))
                / speed,
            }
            for context, batch in cells
        ]
        return {
            "device": name,
            "torch": torch.__version__,
            "dtype": model.dtype,
            "step": str(model.compilation),
            "weights": weights,
            "kv_per_token": engine.runner.cache.bytes_of([1]),
            "bandwidth": speed,
            "rounds": rounds,
            "rows": rows,
        }


def _fill(runner: Any) -> None:
    """Have memory of its own behind every page of the KV cache, with numbers of a usual size."""
    for layer in runner.cache._layers:
        layer.keys.normal_()
        layer.values.normal_()


def _step(runner: Any, context: int, batch: int) -> float:
    """Seconds of a pass, in the engine's thread."""
    import torch

    from inferkit.sampling import RowSampler, SamplingParams, sample

    rows = runner.rows(batch)
    positions = [context - 1] * rows
    greedy = [RowSampler(SamplingParams(temperature=0.0), ())] * rows
    took = []
    with torch.inference_mode():
        for _ in range(6):
            began = time.perf_counter()
            sample(runner.decode([5] * rows, positions), greedy)
            took.append(time.perf_counter() - began)
    return median(took[3:])  # the first make the threads and memory that another shape had not


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
