"""A decode step as CUDA graphs: all its kernels started at once, instead of one by one from Python.

A graph has fixed shapes and addresses, so there is one for each number of rows (powers of two) and
of positions read (the same), captured when it is first needed: some tens of milliseconds each.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inferkit.errors import first_line

_READ = 256  # the fewest positions that a graph reads

# What another model ran on the stream of a capture would be captured with it.
_capturing = threading.Lock()

Pass = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(tokens [rows, 1], positions [rows, 1], longest position) -> logits [rows, vocab]."""


@dataclass(slots=True)
class _Graph:
    """A captured step: its inputs [2, rows, 1] (tokens, positions), and logits [rows, vocab]."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    logits: torch.Tensor


class CudaGraphs:
    """The decode steps of one runner. Used by the engine's thread alone.

    Args:
        run: One decode pass over the slots 0, 1, ...; it must not wait for the device.
        device: Where it runs.
        slots: The most rows.
        longest: The longest position.

    Attributes:
        reason: Why some step could not be captured, once that was tried in vain.
    """

    def __init__(self, run: Pass, device: torch.device, slots: int, longest: int) -> None:
        self.reason: str | None = None
        self._run = run
        self._device = device
        self._slots = slots
        self._longest = longest
        self._graphs: dict[tuple[int, int], _Graph | None] = {}  # None: not to be captured
        self._pool = torch.cuda.graph_pool_handle()

    def rows(self, wanted: int) -> int:
        """How many rows a step of so many has: those that are too many are computed in vain."""
        return min(_power(wanted), self._slots)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor | None:
        """The logits [rows, vocab], until the next step; None where it cannot be captured."""
        longest = min(max(_READ, _power(max(positions) + 1)) - 1, self._longest)
        key = len(tokens), longest
        given = torch.tensor([tokens, positions])[:, :, None]
        with torch.inference_mode(), torch.cuda.device(self._device):
            if key not in self._graphs:
                self._graphs[key] = self._tried(given, longest)
            found = self._graphs[key]
            if found is None:
                return None
            found.inputs.copy_(given)
            found.graph.replay()
            return found.logits

    def release(self) -> None:
        """Give the graphs' memory back; the next step captures anew."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _tried(self, given: torch.Tensor, longest: int) -> _Graph | None:
        try:
            with _capturing:
                return self._capture(given, longest)
        except RuntimeError as error:  # an operation that waits, or lack of memory
            self.reason = f"the step cannot be captured as a CUDA graph ({first_line(error)})"
            return None

    def _capture(self, given: torch.Tensor, longest: int) -> _Graph:
        inputs = given.to(self._device)
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            # Libraries that allocate, or choose a kernel by trying, do so now. The passes write the
            # keys and values of this very step, so that the replay writes the same again.
            for _ in range(2):
                self._run(inputs[0], inputs[1], longest)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do on the device meanwhile is not our concern.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            logits = self._run(inputs[0], inputs[1], longest)
        return _Graph(graph, inputs, logits)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device: cuBLAS keeps 32 MiB for each that it ever ran on."""
    return torch.cuda.Stream(device)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
