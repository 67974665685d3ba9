"""`compare`: a model under a grid of settings, interleaved, on the same prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from inferkit.comparison import Cell, Comparison, Run
from inferkit.engine.scheduler import check_batching
from inferkit.errors import InferkitError, ModelUnloadedError, OptionError
from inferkit.footprint import asked_format, modes_on
from inferkit.memory import check_known, check_whole
from inferkit.model import Model
from inferkit.progress import Progress, bar
from inferkit.quality import Fidelity
from inferkit.reference import (
    Material,
    Reference,
    default_text,
    encoded,
    kept_reference,
    material_of,
    settings_back,
    several,
)

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["compare"]

_LEAST_PROMPTS = 8
_PROMPT_WORDS = 24
_COMPARED_PROMPTS = 4  # of a reference, 0.5 MB are kept per token at a vocabulary of 262,144
_WARM_UP_TOKENS = 4


def compare(
    model: Model,
    quantize: str | Sequence[str] | None = None,
    max_batch: int | Sequence[int] | None = None,
    batching: str | Sequence[str] | None = None,
    *,
    prompts: Any = None,
    max_tokens: int | Sequence[int] = 32,
    repeat: int = 5,
    fidelity: bool = True,
    progress: Progress = True,
    **unknown: Any,
) -> Comparison:
    """Run a loaded model under every combination of settings, and compare what comes out.

    Each round visits every cell of the grid once, in an order that turns from round to round. In
    a cell all prompts are submitted at one moment: first for a few tokens, to warm up, and then,
    with an empty cache, for ``max_tokens`` greedy tokens that no end token cuts short, so that
    every cell does the same work. The model has its own settings again afterwards.

    An interrupt (Ctrl-C, the kernel's stop button) ends it and keeps the runs that are done. A cell
    that cannot be run (it does not fit, say) is noted, and the others go on.

    Args:
        model: A loaded model.
        quantize: Modes; None for all that its devices run (of "int8wo" and "int4wo" only a CPU), or
            for its own where it is stored quantized.
        max_batch: Batch sizes; None for the present one. "off" runs one request at a time whatever
            they are.
        batching: Policies; None for the present one.
        prompts: Text or token ids, or a list of either; None for passages of English prose, as many
            as the largest batch has rows and at least 8.
        max_tokens: Tokens per request, 2 or more; or a list of such numbers, one per prompt, for
            only requests of unequal length tell "static" from "continuous".
        repeat: Rounds. An interval says little where there are fewer than 5.
        fidelity: Also measure each mode's `inferkit.fidelity`, once.
        progress: Show a progress bar, or call this with (what, done, total).
        unknown: None; a misspelt option is an OptionError that names the nearest one.

    Returns:
        A `Comparison`: a table, ``.to_frame()``, ``.plot()``, ``.front()``.

    Raises:
        OptionError: An option is unknown or out of range, or names a setting twice.
        PromptError: A prompt is empty, or longer than the context.
        ModelUnloadedError: The model was unloaded, before or meanwhile.
        KeyboardInterrupt: There was an interrupt before the first run was done.
    """
    check_known(unknown, compare)
    check_whole("repeat", repeat)
    cells = _cells(model, quantize, max_batch, batching)
    if prompts is None:
        prompts = _passages(max(_LEAST_PROMPTS, *(cell.max_batch for cell in cells)))
    ids = encoded(model, several(prompts))
    lengths = _lengths(max_tokens, len(ids))
    material = None
    if fidelity and any(cell.quantize != "none" for cell in cells):
        material = material_of(model, ids[:_COMPARED_PROMPTS], None, max(lengths))
    grid = _Grid(model, cells, ids, lengths, material, repeat, progress)
    with settings_back(model, progress=False):
        grid.run()
    return grid.comparison()


@dataclass(slots=True)
class _Grid:
    """The runs of one comparison, as far as they are done."""

    model: Model
    cells: list[Cell]
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    material: Material | None
    repeat: int
    progress: Progress
    runs: list[Run] = field(default_factory=list)
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reference: Reference | None = None

    def run(self) -> None:
        """Fill the grid; an interrupt ends it where a run is there to be kept."""
        total = self.repeat * len(self.cells)
        try:
            with bar(self.progress, "Comparing", total, unit="run", leave=False) as shown:
                if self.material is not None:
                    shown.set_description("reference for fidelity")
                    self._attempt(None, self._make_reference)
                for number in range(self.repeat):
                    self._round(number, shown)
        except KeyboardInterrupt:
            if not self.runs:
                raise
            warnings.warn(
                f"The comparison was interrupted after {len(self.runs)} of {total} runs, which are "
                "kept.",
                stacklevel=3,
            )

    def comparison(self) -> Comparison:
        """What there is."""
        most = max(cell.max_batch for cell in self.cells)
        count = len(self.prompts)
        if count < most:
            self.notes.append(f"{count} prompts never fill a batch of {most}.")
        if self.model.fallback is not None:
            self.notes.append(f"Requests ran one at a time: {self.model.fallback}.")
        return Comparison(
            model=self.model.name,
            device=", ".join(self.model.devices),
            dtype=self.model.dtype,
            runs=tuple(self.runs),
            fidelity=dict(self.fidelity),
            failed=dict(self.failed),
            rounds=self.repeat,
            max_tokens=self.max_tokens,
            note=" ".join(self.notes),
        )

    def _round(self, number: int, shown: tqdm[Any]) -> None:
        for mode, cells in _turned_by_mode(self.cells, number):
            for cell in _turned(list(cells), number):
                if cell not in self.failed:
                    shown.set_description(f"round {number + 1}, {cell}")
                    self._attempt(cell, lambda cell=cell: self._visit(cell, number))
                shown.update()
            if self._lacks_fidelity(mode):
                shown.set_description(f"fidelity of {mode}")
                self._attempt(None, lambda mode=mode: self._measure_fidelity(mode))

    def _attempt(self, cell: Cell | None, work: Any) -> None:
        """Do it; what goes wrong is noted of the cell, or of fidelity where there is none."""
        try:
            work()
        except ModelUnloadedError:
            raise
        except InferkitError as error:
            if cell is None:
                self.reference = None
                self.notes.append(f"Fidelity could not be measured: {error}")
            else:
                self.failed[cell] = str(error)

    def _visit(self, cell: Cell, number: int) -> None:
        model = self.model
        model._become(format=model._asked(cell.quantize), max_batch=cell.max_batch)
        batching: Any = cell.batching
        model.configure(batching=batching)
        self._generate((_WARM_UP_TOKENS,) * len(self.prompts))
        model._parts.forget_prefixes()
        latencies = self._generate(self.max_tokens)
        self.runs.append(Run(cell, number, latencies, model._parts.nbytes))

    def _generate(self, max_tokens: tuple[int, ...]) -> tuple[Any, ...]:
        """The latencies of all prompts, submitted at one moment."""
        prompts: Any = self.prompts
        requests = self.model.submit(prompts, max_tokens=max_tokens, ignore_eos=True)
        try:
            return tuple(r.result().raise_for_error().latency for r in requests)
        finally:
            for request in requests:
                request.cancel()

    def _make_reference(self) -> None:
        assert self.material is not None
        self.reference = kept_reference(self.model, self.material, progress=False)

    def _measure_fidelity(self, mode: str) -> None:
        assert self.reference is not None
        self.fidelity[mode] = self.reference.compare(self.model, progress=False)

    def _lacks_fidelity(self, mode: str) -> bool:
        """Whether the model, which is in this mode now, is still to be compared."""
        if self.reference is None or mode in self.fidelity:
            return False
        return not all(cell in self.failed for cell in self.cells if cell.quantize == mode)


def _cells(model: Model, quantize: Any, max_batch: Any, batching: Any) -> list[Cell]:
    """The grid, mode by mode, so that a round toggles each mode once."""
    own = (model.quantization,) if model.plan.format.stored else modes_on(model.devices)
    modes = _several("quantize", quantize, own)
    sizes = _several("max_batch", max_batch, (model.max_batch,))
    policies = _several("batching", batching, (model.batching,))
    for mode in modes:
        if mode not in own:
            asked_format(mode)
    for policy in policies:
        for size in sizes:
            check_batching(policy, size)
    alone = {("off", 1): None} if "off" in policies else {}
    shared = {(p, s): None for p in policies if p != "off" for s in sizes}
    return [Cell(mode, p, s) for mode in modes for p, s in [*shared, *alone]]


def _lengths(max_tokens: Any, count: int) -> tuple[int, ...]:
    each = list(max_tokens) if isinstance(max_tokens, Sequence) else [max_tokens] * count
    for tokens in each:
        check_whole("max_tokens", tokens, 2, "TPOT is the time between two")
    if len(each) != count:
        raise OptionError(
            f"max_tokens has {len(each)} entries for {count} prompts; give one for each."
        )
    return tuple(each)


def _several(name: str, given: Any, default: Sequence[Any]) -> list[Any]:
    if given is None:
        return list(default)
    values = [given] if isinstance(given, str | int) else list(given)
    if not values or len(set(values)) < len(values):
        raise OptionError(f"{name}={given!r}: give one value or several different ones.")
    return values


def _passages(count: int) -> list[str]:
    """So many different beginnings, from all over the text that the project ships."""
    words = default_text().split()
    starts = [i * (len(words) - _PROMPT_WORDS) // max(1, count - 1) for i in range(count)]
    return [" ".join(words[start : start + _PROMPT_WORDS]) for start in starts]


def _turned(items: list[Any], by: int) -> list[Any]:
    by %= len(items)
    return items[by:] + items[:by]


def _turned_by_mode(cells: list[Cell], by: int) -> Iterator[tuple[str, list[Cell]]]:
    groups = [(mode, list(found)) for mode, found in groupby(cells, key=lambda c: c.quantize)]
    yield from _turned(groups, by)
