"""`fidelity`: what a model said in "none", kept to compare its other modes with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from inferkit.devices import out_of_memory
from inferkit.errors import GenerationError, OptionError, OutOfMemoryError, PromptError
from inferkit.html import format_bytes
from inferkit.intervals import Interval, bootstrap
from inferkit.model import Model
from inferkit.progress import Progress, bar, stopped
from inferkit.prompts import is_one
from inferkit.quality import Fidelity, SequenceFidelity
from inferkit.resident import uninterrupted

if TYPE_CHECKING:
    import torch

__all__ = ["Material", "Reference", "default_text", "encoded", "fidelity", "kept_reference"]
__all__ += ["material_of", "settings_back", "several"]

PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "The capital of France is",
    "def fibonacci(n):\n",
    "To make a good cup of tea, first",
)
_WINDOW = 512  # tokens of the text that are read together, as in llama.cpp's perplexity tool
_ROWS = 8  # positions compared at once: 8 MB per copy in fp32 at a vocabulary of 262,144


def default_text() -> str:
    """The text that perplexity is measured on: the opening of L. Carroll's Alice (1865)."""
    return (files("inferkit") / "texts" / "alice.txt").read_text(encoding="utf-8")


def fidelity(
    model: Model,
    prompts: Any = None,
    *,
    text: str | None = None,
    max_tokens: int = 32,
    reference: Model | None = None,
    progress: Progress = True,
) -> Fidelity:
    """Measure how far a model's outputs are from those of the same model in "none".

    The model is toggled to "none" for the reference and back; the reference's logits are kept in a
    temporary file as long as the model lives, so that the next mode needs one pass only. Requests
    that run finish first.

    Args:
        model: A loaded model, in the mode to be measured.
        prompts: Text or token ids, or a list of either; None for four short ones.
        text: What perplexity is measured on; None for a passage of English prose of 1865, which
            many models have seen in training.
        max_tokens: Tokens to generate greedily for each prompt.
        reference: Another loaded model with the same tokenizer to compare with, for one that is
            stored quantized.
        progress: Show progress bars, or call this with (what, done, total).

    Returns:
        A `Fidelity`; units and definitions stand there.

    Raises:
        OptionError: The model is stored quantized and there is no ``reference``, or one with
            another vocabulary.
        PromptError: A prompt or the text is empty, or a prompt too long for the context.
        DoesNotFitError: "none" does not fit, so that there is nothing to compare with.
        OutOfMemoryError, GenerationError: It could not be measured; the mode is as before.
        LoadError, ModelUnloadedError: As for `Model.quantize`.
    """
    material = material_of(model, prompts, text, max_tokens)
    with model._changing():  # nobody toggles it meanwhile
        if reference is None:
            with settings_back(model, progress):
                kept = kept_reference(model, material, progress)
        else:
            _check_vocabulary(model, reference)
            kept = Reference(reference, material, progress)
        return kept.compare(model, progress)


@contextmanager
def settings_back(model: Model, progress: Progress) -> Iterator[None]:
    """Whatever the body changes, the model has its mode, cache and policy again afterwards.

    Changes by other threads wait until then. A callable is not told of the way back, which it
    could stop.
    """
    with model._changing():
        form = model._parts.identity.format
        rows, context, policy = model.max_batch, model.context, model.batching
        guesses = model.speculative
        try:
            yield
        finally:
            if model.loaded:
                with uninterrupted():
                    model._become(
                        format=form,
                        max_batch=rows,
                        context=context,
                        force=True,
                        progress=progress is True,
                    )
                    model.configure(batching=policy, speculative=guesses)


@dataclass(frozen=True, slots=True)
class Material:
    """What two models are compared on, as token ids."""

    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    names: tuple[str | None, ...]
    max_tokens: int


class Reference:
    """What a model said, kept to compare others with: logits in a temporary file.

    Args:
        model: The model as it is now.
        material: What it reads.
        progress: Show a progress bar, or call this with (what, done, total).

    Raises:
        GenerationError: There is no room for the file.
    """

    def __init__(self, model: Model, material: Material, progress: Progress) -> None:
        self.name = f"{model.plan.format}, {model.dtype}"
        self.material = material
        self._greedy = _greedy(model, material)
        continued = [p + g for p, g in zip(material.prompts, self._greedy, strict=True)]
        self._sequences = (*material.windows, *continued)
        # Open as long as this lives, and gone with it.
        self._file = tempfile.TemporaryFile(prefix="inferkit-logits-")  # noqa: SIM115
        self._dtype: torch.dtype | None = None
        self._log_likelihood: list[float] = []
        _score(model, self._sequences, self._keep, "Reference", progress)

    def compare(self, model: Model, progress: Progress) -> Fidelity:
        """Compare what another model, or the same in another mode, says to the same tokens."""
        told = [_Told() for _ in self._sequences]
        self._file.seek(0)

        def take(index: int, start: int, logits: torch.Tensor) -> None:
            told[index].add(logits, self._read(logits), self._targets(index, start, len(logits)))

        _score(model, self._sequences, take, "Comparing", progress)
        greedy = _greedy(model, self.material)
        differs = [_first_difference(a, b) for a, b in zip(greedy, self._greedy, strict=True)]
        windows = len(self.material.windows)
        likelihood = [x for one in told[:windows] for x in one.log_likelihood]
        return Fidelity(
            quantization=str(model.plan.format),
            reference=self.name,
            kl=_mean([x for one in told for x in one.kl]),
            top1_agreement=_mean([x for one in told for x in one.agree]),
            perplexity=_perplexity(likelihood),
            reference_perplexity=_perplexity(self._log_likelihood),
            sequences=tuple(
                one.summary(name, where)
                for one, name, where in zip(
                    told, self.material.names, [None] * windows + differs, strict=True
                )
            ),
            max_tokens=self.material.max_tokens,
        )

    def _keep(self, index: int, start: int, logits: torch.Tensor) -> None:
        import torch

        host = logits.detach().cpu().contiguous()
        self._dtype = host.dtype
        try:
            self._file.write(host.view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise GenerationError(
                f"The reference's logits could not be kept in {tempfile.gettempdir()} ({error}); "
                f"{format_bytes(self._file.tell())} were written. Set TMPDIR to a folder with more "
                "room, or give a shorter text."
            ) from error
        if index < len(self.material.windows):
            targets = self._targets(index, start, len(logits))
            for rows in _parts(len(logits)):
                chosen = _log_probs(logits[rows]).gather(1, targets[rows, None].to(logits.device))
                self._log_likelihood += chosen[:, 0].tolist()

    def _read(self, like: torch.Tensor) -> torch.Tensor:
        """The logits that stand next in the file."""
        import torch

        assert self._dtype is not None
        wanted = like.numel() * self._dtype.itemsize
        raw = bytearray(self._file.read(wanted))
        return torch.frombuffer(raw, dtype=self._dtype).view(like.shape).to(like.device)

    def _targets(self, index: int, start: int, count: int) -> torch.Tensor:
        import torch

        return torch.tensor(self._sequences[index][start + 1 : start + 1 + count])


class _Told:
    """What the positions of one sequence told, one number per position."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.agree: list[float] = []
        self.log_likelihood: list[float] = []

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        for rows in _parts(len(logits)):
            got, wanted = _log_probs(logits[rows]), _log_probs(reference[rows])
            self.agree += (got.argmax(-1) == wanted.argmax(-1)).double().tolist()
            chosen = got.gather(1, targets[rows, None].to(got.device))
            self.log_likelihood += chosen[:, 0].tolist()
            self.kl += (wanted.exp() * (wanted - got)).sum(-1).tolist()

    def summary(self, prompt: str | None, differs_at: int | None) -> SequenceFidelity:
        count = len(self.kl)
        return SequenceFidelity(
            prompt, count, sum(self.kl) / count, sum(self.agree) / count, differs_at
        )


def kept_reference(model: Model, material: Material, progress: Progress) -> Reference:
    """What the model says in "none"; toggles it there, unless that is known already.

    Raises:
        OptionError: It is stored quantized.
    """
    parts = model._parts
    if model.plan.format.stored:
        raise OptionError(
            f"{model.ref!r} is stored quantized, so that it has no 'none' to compare with: load "
            "the unquantized checkpoint too, and give it as reference=."
        )
    found = parts.reference
    if isinstance(found, Reference) and found.material == material:
        return found
    model.quantize("none", progress=progress)
    parts.reference = None  # one file of logits at a time
    parts.reference = made = Reference(model, material, progress)
    return made


def material_of(model: Model, prompts: Any, text: str | None, max_tokens: int) -> Material:
    """What to compare on: the prompts, and windows of the text.

    Raises:
        OptionError, PromptError: As for `fidelity`.
    """
    from inferkit.memory import check_whole

    check_whole("max_tokens", max_tokens)
    given = several(PROMPTS if prompts is None else prompts)
    ids = encoded(model, given)
    windows = _windows(model, default_text() if text is None else text)
    names = tuple(p if isinstance(p, str) else f"{len(p)} tokens" for p in given)
    return Material(windows, ids, (*[None] * len(windows), *names), max_tokens)


def several(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    return [prompts] if is_one(prompts) else list(prompts)


def encoded(model: Model, prompts: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts.

    Raises:
        PromptError: One is empty or too long, or there is none.
    """
    if not prompts:
        raise PromptError("The list of prompts is empty; give one prompt or more.")
    encoder = model._encoder(model._parts)
    return tuple(encoder.prompt(p) for p in prompts)


def _windows(model: Model, text: str) -> tuple[tuple[int, ...], ...]:
    """The text's tokens in parts that each begin as the tokenizer begins a text."""
    tokenizer = model.tokenizer
    whole = list(tokenizer(text)["input_ids"])
    first = [i for i in whole[:1] if i == tokenizer.bos_token_id]
    rest = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(rest) < 2:
        raise OptionError("The text has no two tokens; give some sentences, or leave it out.")
    width = min(_WINDOW, model.context - 1) - len(first)
    parts = [rest[i : i + width] for i in range(0, len(rest), width)]
    return tuple((*first, *part) for part in parts if len(first) + len(part) > 1)


def _check_vocabulary(model: Model, reference: Model) -> None:
    if model.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise OptionError(
            f"reference={reference.name!r} has another vocabulary than {model.name!r}, so that "
            "their next tokens cannot be compared: load the checkpoint that was quantized."
        )


def _greedy(model: Model, material: Material) -> list[tuple[int, ...]]:
    """The greedy continuations, from an empty cache, so that all models prefill alike."""
    model._parts.forget_prefixes()
    prompts: Any = material.prompts
    requests = model.submit(prompts, max_tokens=material.max_tokens, ignore_eos=True)
    try:
        return [r.result().raise_for_error().token_ids for r in requests]
    finally:
        for request in requests:
            request.cancel()


def _score(
    model: Model, sequences: Sequence[tuple[int, ...]], take: Any, title: str, progress: Progress
) -> None:
    """Hand out the logits of all predictions: after every token but a sequence's last."""
    import torch

    total = sum(len(s) - 1 for s in sequences)
    counted = bar(progress, title, total, unit="tokens", delay=1, leave=False)

    @torch.inference_mode()
    def shown(index: int, start: int, logits: torch.Tensor) -> None:
        take(index, start, logits)
        counted.update(len(logits))

    problem = None
    try:
        with counted:
            model._parts.score([s[:-1] for s in sequences], shown)
    except Exception as error:
        if stopped(error) or not out_of_memory(error):
            raise
        problem = OutOfMemoryError(
            f"The device ran out of memory while logits were compared ({error}). Lower max_batch "
            "or context with model.configure(), and try again."
        )
    if problem is not None:
        raise problem


def _parts(count: int) -> Iterator[slice]:
    return (slice(i, i + _ROWS) for i in range(0, count, _ROWS))


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def _mean(values: Sequence[float]) -> Interval:
    import numpy as np

    return bootstrap(values, np.mean)


def _perplexity(log_likelihood: Sequence[float]) -> float:
    return math.exp(-sum(log_likelihood) / len(log_likelihood))


def _first_difference(got: Sequence[int], wanted: Sequence[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), None)
