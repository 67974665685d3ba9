"""The engine: continuous batching over a slotted KV cache, in a thread of its own.

    engine.py      the thread: inbox, commands, the loop
    stepper.py     one step, and what if it fails
    scheduler.py   which requests take part in a step, under which policy
    slots.py       who sits in which slot, and whose prefix is used again
    serving.py     which runner serves a model, and the proof that it serves it rightly
    runner.py      one forward pass over slots; sequential.py, the fallback for one request
    cache.py       the slotted KV cache
    attention.py   the attention function registered with transformers
    request.py     the live handle; detokenize.py, its text
    openmp.py      one team of OpenMP threads at a time

It knows nothing of notebooks.
"""

from inferkit.engine.request import Request

__all__ = ["Request"]
