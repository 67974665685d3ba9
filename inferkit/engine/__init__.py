"""The engine: continuous batching over a slotted KV cache, in a thread of its own.

    cache.py       the slotted KV cache
    attention.py   the attention function registered with transformers
    runner.py      one forward pass over slots; sequential.py, the fallback for one request
    scheduler.py   which requests take part in a step, under which policy
    slots.py       who sits in which slot, and whose prefix is used again
    request.py     the live handle; detokenize.py, its text
    engine.py      the thread: submit, cancel, step, emit

It knows nothing of notebooks.
"""

from inferkit.engine.request import Request

__all__ = ["Request"]
