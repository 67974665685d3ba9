"""One forward pass: slots, tokens and positions in, one row of logits per slot out.

`SlottedRunner` runs any decoder of transformers that takes explicit positions, a cache and masks.
That an architecture is served rightly is not read from a list of names: `probe` compares the first
logits with those of the architecture's own forward, and where they differ the model is not served
this way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from inferkit.engine import attention
from inferkit.engine.cache import SlotCache, View
from inferkit.engine.compiled import CompiledLayers
from inferkit.engine.cudagraphs import CudaGraphs
from inferkit.errors import UnsupportedModelError
from inferkit.kv import LayerKV, cache_argument
from inferkit.offload import input_device, running
from inferkit.quantize import is_quantized, rounds_inputs

_WIDTHS = 8
_SCORED = 64  # positions whose logits are there at once; 34 MB at a vocabulary of 262,144 in bf16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt to prefill: ``tokens`` go to ``slot`` from position ``start`` on."""

    slot: int
    tokens: Sequence[int]
    start: int


class SlottedRunner:
    """Runs the model over the slots of a `SlotCache`. Used by the engine's thread alone.

    A pass has fixed shapes but for the number of rows, of tokens and of cache positions read, and
    no control flow that depends on data, so that it can be compiled.

    Attributes:
        layers: The compiled code of the model's layers, if there is any.
        compiled: Whether passes run it.
        graphs: The decode steps as CUDA graphs, where they run as such.
    """

    def __init__(
        self,
        module: Any,
        geometry: Sequence[LayerKV],
        *,
        slots: int,
        context: int,
        prefill_chunk: int,
    ) -> None:
        self.module = module
        self.device = input_device(module)
        self.dtype = _activation_dtype(module)
        self._cache_argument = cache_argument(module)
        self.prefill_chunk = prefill_chunk
        self.geometry = tuple(geometry)
        self._devices = _layer_devices(module, len(self.geometry), self.device)
        self.layers: CompiledLayers | None = None
        self.compiled = False
        self.graphs: CudaGraphs | None = None
        self.cache = self._new_cache(slots, context)
        module.set_attn_implementation(attention.NAME)

    def resize(self, slots: int, context: int) -> None:
        """Replace the cache by an empty one of another size; the old one goes first."""
        if self.graphs is not None:
            self.graphs.release()  # they write to its addresses
        self.cache.release()
        self.cache = self._new_cache(slots, context)
        self.use_graphs(self.graphs is not None)

    def use_graphs(self, wanted: bool) -> None:
        """Run decode steps as CUDA graphs from the next one on, or not; any thread may say so."""
        cache = self.cache
        self.graphs = (
            CudaGraphs(self._step, self.device, cache.slots, cache.context) if wanted else None
        )

    def use_compiled(self, layers: CompiledLayers | None) -> None:
        """Run these layers' compiled code from the next pass on, or with None the architecture's.

        Any thread may say so.
        """
        self.layers = layers or self.layers
        self.compiled = layers is not None

    def _new_cache(self, slots: int, context: int) -> SlotCache:
        return SlotCache(
            self.geometry,
            slots=slots,
            context=context,
            prefill_chunk=self.prefill_chunk,
            dtype=self.dtype,
            devices=self._devices,
        )

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Read parts of prompts; return the logits after each part's last token [chunks, vocab].

        Shorter parts are padded on the left with tokens at positions beyond the part's end, where
        nothing reads them (see `SlotCache`), so that every part's last token stands last.
        """
        return self._read(chunks, self.width(chunks))[:, -1]

    def _read(self, chunks: Sequence[Chunk], width: int, keep: int = 1) -> torch.Tensor:
        """`_forward` over chunks, padded to one width."""
        tokens, positions, last = [], [], []
        for c in chunks:
            end = c.start + len(c.tokens)
            pad = width - len(c.tokens)
            tokens.append([0] * pad + list(c.tokens))
            positions.append([*range(end, end + pad), *range(c.start, end)])
            last.append(end - 1)
        longest = max(max(row) for row in positions)
        return self._forward([c.slot for c in chunks], tokens, positions, last, longest, keep)

    def width(self, chunks: Sequence[Chunk]) -> int:
        """How many tokens each row of a prefill has, padding included.

        A multiple of eight where there is room: kernels are compiled and kept for every shape.
        """
        longest = max(len(c.tokens) for c in chunks)
        room = self.cache.context - max(c.start for c in chunks)
        return max(longest, min(-(-longest // _WIDTHS) * _WIDTHS, self.prefill_chunk, room))

    def rows(self, wanted: int) -> int:
        """How many rows a decode step takes to give so many a token."""
        graphs = self.graphs
        return wanted if graphs is None else graphs.rows(wanted)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """One token for each of the slots 0, 1, ... n-1; return logits [n, vocab].

        They hold until the next step. n is best one of those that `rows` gives.
        """
        graphs = self.graphs  # another thread may switch them off meanwhile
        logits = None if graphs is None else graphs.step(tokens, positions)
        if logits is not None:
            return logits
        return self._step(
            torch.tensor(tokens, device=self.device)[:, None],
            torch.tensor(positions, device=self.device)[:, None],
            max(positions),
        )

    def verify(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Read several tokens of each of some rows; the logits [tokens, vocab] after each token.

        A row may have fewer tokens than others; what `prefill` says of padding holds here too.
        """
        width = max(len(c.tokens) for c in chunks)
        logits = self._read(chunks, width, keep=0)
        return [row[width - len(c.tokens) :] for row, c in zip(logits, chunks, strict=True)]

    def _step(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """A decode pass; see `cudagraphs.Pass`."""
        rows = slice(0, len(tokens))
        return self._pass(tokens, View(rows, positions, positions[:, 0], longest), 1)[:, -1]

    def score(self, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the logits after each of a row's tokens, [part, vocab] at a time.

        It takes slot 0, so that nothing may run: see `Engine.held`.
        """
        width = min(_SCORED, self.prefill_chunk)
        for start in range(0, len(tokens), width):
            part = list(tokens[start : start + width])
            end = start + len(part)
            where = list(range(start, end))
            yield self._forward([0], [part], [where], [end - 1], end - 1, keep=0)[0]

    def _forward(
        self,
        slots: list[int],
        tokens: list[list[int]],
        positions: list[list[int]],
        last: list[int],
        longest: int,
        keep: int = 1,
    ) -> torch.Tensor:
        """`_pass` over plain numbers."""
        where = torch.tensor(positions, device=self.device)
        side_by_side = slots == list(range(slots[0], slots[0] + len(slots)))
        rows = slice(slots[0], slots[-1] + 1) if side_by_side else slots
        view = View(rows, where, torch.tensor(last, device=self.device), longest)
        return self._pass(torch.tensor(tokens, device=self.device), view, keep)

    @torch.inference_mode()
    def _pass(self, tokens: torch.Tensor, view: View, keep: int) -> torch.Tensor:
        """The logits [rows, kept, vocab] after the last ``keep`` tokens, or after all for 0."""
        self.cache.compiled = self.compiled
        self.cache.begin(view)
        masks = self.cache.masks(self.dtype)
        out = self.module(
            input_ids=tokens,
            attention_mask=_as_model_wants(masks),
            position_ids=view.positions,
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_argument: self.cache},
        )
        logits: torch.Tensor = out.logits
        return logits

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache."""
        return self.cache.nbytes

    def release(self) -> None:
        """Give the cache's memory back, and let go of the weights."""
        self.use_graphs(False)
        self.cache.release()
        if self.layers is not None:
            self.layers.release()


def _as_model_wants(masks: dict[str, torch.Tensor]) -> Any:
    """One mask as it is; several by transformers' names of layer types."""
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {f"{kind}_attention": mask for kind, mask in masks.items()}


def _activation_dtype(module: Any) -> torch.dtype:
    """The dtype of the layers' activations: that of the norms, which nothing quantizes."""
    for p in module.parameters():
        if p.dim() == 1 and p.is_floating_point():
            return p.dtype
    return module.dtype


def _layer_devices(module: Any, layers: int, default: torch.device) -> list[torch.device]:
    """The device that runs each layer's attention."""
    found = [default] * layers
    for child, device in running(module):
        index = getattr(child, "layer_idx", None)
        if isinstance(index, int) and 0 <= index < layers and device is not None:
            found[index] = device
    return found


def supports_slots(module: Any, geometry: Sequence[LayerKV], context: int) -> str | None:
    """Why an architecture cannot run over slots, or None where it may (then `probe` it)."""
    name = type(module).__name__
    if getattr(module, "_is_stateful", False) or any(g.state_bytes for g in geometry):
        return f"{name} keeps a recurrent state, which has no slots"
    if not all(g.kind in ("full", "sliding", "chunked") for g in geometry):
        return f"{name} has layers without a KV cache of their own"
    windows = {(g.kind, g.window) for g in geometry}
    if len(windows) > len({kind for kind, _ in windows}):
        return f"{name} has windows of several sizes, and masks are made for one"
    if not getattr(module, "_supports_attention_backend", False):
        return f"{name} has an attention of its own that takes no attention function"
    if _rope_depends_on_length(module.config, context):
        return f"{name} changes its rotary positions for all rows when one row grows long"
    accepted = inspect.signature(module.forward).parameters
    needed = {"position_ids", cache_argument(module), "attention_mask", "logits_to_keep"}
    missing = needed - set(accepted)
    if missing:
        return f"{name}.forward takes no {', '.join(sorted(missing))}"
    return None


def _rope_depends_on_length(config: Any, context: int) -> bool:
    """Dynamic and LongRoPE scaling look at the longest row of a batch."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = kind.get("original_max_position_embeddings") or text.max_position_embeddings
            if context > limit:
                return True
    return False


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How near the slotted pass came to the architecture's own forward (cosine of the logits)."""

    cosine: float
    threshold: float

    @property
    def ok(self) -> bool:
        """Whether that is near enough."""
        return self.cosine >= self.threshold


@torch.inference_mode()
def reference_logits(module: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The architecture's own logits [prompts, vocab] after each prompt, run alone, uncached."""
    device = input_device(module)
    rows = [
        module(input_ids=torch.tensor([p], device=device), use_cache=False).logits[0, -1].float()
        for p in prompts
    ]
    return torch.stack(rows)


def probe_prompts(vocab: int, window: int | None) -> list[list[int]]:
    """Two ragged prompts; the longer one passes the window where that is short enough to test."""
    long = 9 if window is None or window > 64 else window + 9
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, vocab, (long + 5,), generator=generator).tolist()
    return [draw[:5], draw[5:]]


def slotted_logits(runner: SlottedRunner, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits [prompts, vocab] after each prompt, prefilled and decoded over slots."""
    for i in range(0, max(len(p) for p in prompts) - 1, runner.prefill_chunk):
        chunks = [
            Chunk(slot, p[i : min(len(p) - 1, i + runner.prefill_chunk)], i)
            for slot, p in enumerate(prompts)
            if i < len(p) - 1
        ]
        runner.prefill(chunks)
    return runner.decode([p[-1] for p in prompts], [len(p) - 1 for p in prompts]).float()


def probe(
    runner: SlottedRunner, prompts: Sequence[Sequence[int]], wanted: torch.Tensor
) -> ProbeResult:
    """Compare the logits over slots with the model's own, of each prompt alone.

    In int8 the demo model comes to a cosine of 0.962, as its prompts share a batch; with two of
    their tokens swapped, or one lost, to 0.8, as in any precision.
    """
    found = nearness(runner, slotted_logits(runner, prompts), wanted)
    return replace(found, threshold=0.9) if rounds_inputs(runner.module) else found


def nearness(runner: SlottedRunner, got: torch.Tensor, wanted: torch.Tensor) -> ProbeResult:
    """Compare logits [prompts, vocab] that should be the same but for rounding."""
    cosine = torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min().item()
    return ProbeResult(cosine, 0.9999 if _exact(runner) else 0.97)


def _exact(runner: SlottedRunner) -> bool:
    """Whether the same numbers in another order give almost the same sum.

    Not in bf16 or fp16, nor where quantized layers round their input to one of these.
    """
    return runner.dtype == torch.float32 and not is_quantized(runner.module)


def require_decoder(config: Any) -> None:
    """Refuse what is no causal language model, by name."""
    kinds = config.architectures or [config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kinds[0]} is an encoder-decoder; inferkit serves causal language models. "
            "Load a decoder-only model (its config has is_encoder_decoder=False)."
        )
