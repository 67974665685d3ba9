"""What of a decode step is not the model: where each microsecond between two steps goes.

A *period* is the time from the begin of one engine step to the begin of the next, with nothing
left out. Only steps that decode the whole batch and prefill nothing count. Its parts:

model
    inside the transformers module's ``forward`` (timed by hooks on the module): embedding, layers,
    the engine's attention function and KV writes within them, logits;
prepare
    in the runner but outside the module: index tensors, masks;
sample
    choosing the tokens from the logits (greedy: an argmax over the vocabulary);
emit
    the rest of the step: detokenising, time stamps, waking readers, finishing;
between
    after a step and before the next: admission, cancellations, new requests.

"Outside the model's forward" is all but ``model``. `StepRecord.forward` of the engine also counts
``prepare`` as forward; that reading is given beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any

from spread import Spread

PARTS = ("model", "prepare", "sample", "emit", "between")


class Stopwatch:
    """Adds up the time of a function's calls, with the moment at which each began."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self._began = 0

    def start(self, *_: Any) -> None:
        self._began = time.perf_counter_ns()

    def stop(self, *_: Any) -> None:
        self.calls.append((self._began, time.perf_counter_ns()))

    def around(self, function: Any) -> Any:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            result = function(*args, **kwargs)
            self.stop()
            return result

        return timed

    def within(self, began: int, ended: int) -> int:
        """Time of the calls that lie in an interval."""
        return sum(b - a for a, b in self.calls if a >= began and b <= ended)


def watch(model: Any) -> tuple[Stopwatch, Stopwatch]:
    """Time the module's forward and the engine's sampling."""
    from inferkit.engine import stepper

    forward, sampling = Stopwatch(), Stopwatch()
    module = model._engine.runner.module
    module.register_forward_pre_hook(forward.start)
    module.register_forward_hook(forward.stop)
    stepper.sample = sampling.around(stepper.sample)
    return forward, sampling


def split(records: Sequence[Any], forward: Stopwatch, sampling: Stopwatch) -> list[dict[str, int]]:
    """The parts of each period, in ns."""
    periods = []
    for step, following in pairwise(records):
        model = forward.within(step.began, step.ended)
        chosen = sampling.within(step.began, step.ended)
        periods.append(
            {
                "model": model,
                "prepare": step.forward - model,
                "sample": chosen,
                "emit": step.ended - step.began - step.forward - chosen,
                "between": following.began - step.ended,
            }
        )
    return periods


def decode_steps(records: Sequence[Any], batch: int) -> list[Any]:
    """The run of steps that decode the whole batch and prefill nothing."""
    return [r for r in records if r.decode_tokens == batch and not r.prefill_tokens]


def measure(
    path: str, threads: int, batches: Sequence[int], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per batch: median ms of each part, and the share outside the model by round."""
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    model = ik.load(
        path,
        dtype="bfloat16",
        device="cpu",
        max_batch=max(batches),
        context=512,
        prefix_reuse=False,
        compile=False,
        progress=False,
    )
    forward, sampling = watch(model)
    engine = model._engine
    found: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
    for number in range(rounds + 1):
        for batch in batches:
            engine.steps.clear()
            forward.calls.clear()
            sampling.calls.clear()
            prompts = [[2, *range(1000 + 20 * i, 1015 + 20 * i)] for i in range(batch)]
            model.generate(prompts, max_tokens=tokens, temperature=0.0, ignore_eos=True)
            time.sleep(0.2)  # the last step's record comes after its tokens
            periods = split(decode_steps(list(engine.steps), batch), forward, sampling)
            if number and periods:
                found[batch].append(_of_round(periods))
    model.unload()
    return [{"batch": batch, **_of_rounds(each)} for batch, each in found.items()]


def _of_round(periods: Sequence[dict[str, int]]) -> dict[str, Any]:
    parts = {name: median(p[name] for p in periods) for name in PARTS}
    outside = [1 - p["model"] / sum(p.values()) for p in periods]
    record = [1 - (p["model"] + p["prepare"]) / (sum(p.values()) - p["between"]) for p in periods]
    engine_only = [(sum(p.values()) - p["model"] - p["sample"]) / sum(p.values()) for p in periods]
    return {
        "parts": parts,
        "period": median(sum(p.values()) for p in periods),
        "outside": median(outside),
        "by_step_record": median(record),
        "without_sampling": median(engine_only),
        "steps": len(periods),
    }


def _of_rounds(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shares = ("outside", "by_step_record", "without_sampling")
    return {
        "period_ms": asdict(Spread.of(r["period"] / 1e6 for r in each)),
        "parts_ms": {n: asdict(Spread.of(r["parts"][n] / 1e6 for r in each)) for n in PARTS},
        **{name: asdict(Spread.of(r[name] for r in each)) for name in shares},
        "steps": sum(r["steps"] for r in each),
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
