"""Memory over many requests: does the process grow?

Requests of many lengths go through the engine, greedy and sampled, with logprobs and stop strings;
one in ten is cancelled on its way. After every ``every`` of them, when the engine has rested for
two seconds (it gives free pages of the heap back after one), the resident memory is noted. Growth
is the slope of a straight line through the notes of the second half and is given per 100 requests.
The KV cache is written to beforehand: its pages cost nothing until then, and their filling is no
growth.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any


def measure(path: str, threads: int, requests: int, every: int = 25) -> dict[str, Any]:
    """Notes of resident bytes, and what follows from them."""
    import psutil
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    process = psutil.Process()
    model = ik.load(
        path,
        dtype="bfloat16",
        device="cpu",
        max_batch=16,
        context=512,
        compile=False,
        progress=False,
    )
    loaded = process.memory_info().rss
    model._engine.call(lambda: fill(model._engine.runner.cache))
    filled = process.memory_info().rss
    draw = random.Random(0)
    notes: list[tuple[int, int]] = []
    finished: dict[str, int] = {}
    for done in range(every, requests + 1, every):
        for reason in _serve(model, draw, every):
            finished[reason] = finished.get(reason, 0) + 1
        gc.collect()
        time.sleep(2)
        notes.append((done, process.memory_info().rss))
    model.unload()
    half = notes[len(notes) // 2 :]
    return {
        "requests": requests,
        "finished": finished,
        "after_load": loaded,
        "cache_filled": filled,
        "notes": notes,
        "first": notes[0][1],
        "half": half[0][1],
        "last": notes[-1][1],
        "bytes_per_100_requests": 100 * slope(half),
        "after_unload": process.memory_info().rss,
    }


def fill(cache: Any) -> None:
    """Write to every position, so that the cache has all its memory."""
    for layer in cache._layers:
        layer.keys.zero_()
        layer.values.zero_()


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Of the straight line that is nearest in least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def _serve(model: Any, draw: random.Random, count: int) -> list[str]:
    live = []
    for number in range(count):
        prompt = [2, *(draw.randrange(100, 200_000) for _ in range(draw.randrange(4, 200)))]
        options: dict[str, Any] = {"max_tokens": draw.randrange(8, 48), "seed": number}
        if number % 2:
            options |= {"temperature": 0.8, "top_p": 0.9, "logprobs": 2, "stop": ["\n\n"]}
        live.append(model.submit(prompt, **options))
    for request in live[::10]:
        next(iter(request), None)
        request.cancel()
    return [request.result().finish_reason for request in live]


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
