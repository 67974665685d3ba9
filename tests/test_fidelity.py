"""Fidelity of a precision: against numbers that transformers and torch give by themselves."""

from __future__ import annotations

import gc
import json
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from held import held, interrupt, wait_until

import inferkit as ik
from inferkit import reference
from inferkit.intervals import bootstrap

PROMPTS = [[5, 6, 7], list(range(10, 40))]
TEXT = "Once upon a time there was a rabbit with pink eyes. "


@pytest.fixture
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def model(folder: Path) -> Iterator[ik.Model]:
    with ik.load(folder, dtype="float32", context=128, max_batch=4) as loaded:
        yield loaded


def own_logits(folder: Path, mode: str, tokens: list[int]) -> torch.Tensor:
    """What transformers alone says after each of the tokens, [tokens, vocab]."""
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=mode, bnb_4bit_compute_dtype=torch.float32
    )
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=None if mode == "none" else quantized,
    )
    with torch.inference_mode():
        logits: torch.Tensor = module(torch.tensor([tokens]), use_cache=False).logits[0].double()
    return logits


def test_divergence_agreement_and_perplexity_are_those_of_the_plain_formulas(
    folder: Path, model: ik.Model
) -> None:
    said = ik.fidelity(model.quantize("nf4"), [PROMPTS[1]], text=TEXT, max_tokens=5)
    assert (said.quantization, said.reference) == ("nf4", "none, float32")
    text = model.tokenizer(TEXT)["input_ids"]
    model.quantize("none")
    continued = PROMPTS[1] + list(
        model.generate(PROMPTS[1], max_tokens=5, ignore_eos=True).token_ids
    )
    kl, agree, losses = [], [], []
    for tokens in (text, continued):
        wanted, got = (own_logits(folder, m, tokens)[:-1].log_softmax(-1) for m in ("none", "nf4"))
        kl += torch.nn.functional.kl_div(got, wanted, log_target=True, reduction="none").sum(-1)
        agree += (got.argmax(-1) == wanted.argmax(-1)).double()
        losses.append(torch.nn.functional.nll_loss(got, torch.tensor(tokens[1:])).item())
        losses.append(torch.nn.functional.nll_loss(wanted, torch.tensor(tokens[1:])).item())
    # bitsandbytes multiplies 4-bit weights in bf16 on a CPU that can, and rounds as it goes.
    assert said.kl.value == pytest.approx(torch.stack(kl).mean().item(), rel=0.1)
    assert said.top1_agreement.value == pytest.approx(torch.stack(agree).mean().item(), abs=0.05)
    assert said.perplexity == pytest.approx(math.exp(losses[0]), rel=0.01)
    assert said.reference_perplexity == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert said.positions == len(text) + len(continued) - 2 == said.kl.n
    assert said.kl.low < said.kl.value < said.kl.high


def test_a_model_is_equal_to_itself(model: ik.Model) -> None:
    said = ik.fidelity(model, PROMPTS, text=TEXT)
    assert (said.kl.value, said.top1_agreement.value) == (0, 1)
    assert said.perplexity == said.reference_perplexity
    assert said.differs_at == (None, None)


def test_the_first_greedy_token_that_differs_is_told(model: ik.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    plain = [g.token_ids for g in model.generate(PROMPTS, **options)]
    model.quantize("fp4")
    other = [g.token_ids for g in model.generate(PROMPTS, **options)]
    assert plain != other
    said = ik.fidelity(model, PROMPTS, text=TEXT, max_tokens=24)
    for where, a, b in zip(said.differs_at, plain, other, strict=True):
        assert where is None or (a[:where] == b[:where] and a[where] != b[where])
        assert (where is None) == (a == b)
    assert f"none of {24}" in repr(said) or all(w is not None for w in said.differs_at)


def test_the_mode_is_as_before_and_the_reference_is_made_once(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = reference.Reference.__init__
    monkeypatch.setattr(
        reference.Reference, "__init__", lambda self, *a: (made.append(self), real(self, *a))[1]
    )
    model.quantize("nf4", double_quant=True)
    first = ik.fidelity(model, PROMPTS, text=TEXT)
    assert (model.plan.format.mode, model.plan.format.double_quant) == ("nf4", True)
    assert first.quantization == "nf4, double_quant=True"
    assert ik.fidelity(model, PROMPTS, text=TEXT) == first
    assert len(made) == 1
    assert ik.fidelity(model.quantize("int8"), PROMPTS, text=TEXT) != first
    assert len(made) == 1
    ik.fidelity(model, PROMPTS[:1], text=TEXT)
    assert len(made) == 2
    assert model.quantization == "int8"


@pytest.mark.parametrize("arch", ["gemma3", "mamba"])
def test_rings_and_models_that_run_alone_are_measured_alike(
    tiny_model: Callable[[str], Path], arch: str
) -> None:
    with ik.load(tiny_model(arch), dtype="float32", context=128, max_batch=2) as model:
        assert (model.fallback is None) == (arch == "gemma3")
        said = ik.fidelity(model, [list(range(5, 70))], text=TEXT)
        assert said.kl.value == pytest.approx(0, abs=1e-9)
        tokens = model.tokenizer(TEXT)["input_ids"]
        logits = own_logits(tiny_model(arch), "none", tokens)[:-1].log_softmax(-1)
        loss = torch.nn.functional.nll_loss(logits, torch.tensor(tokens[1:])).item()
        assert said.perplexity == pytest.approx(math.exp(loss), rel=1e-3)


def test_a_long_text_is_read_in_windows_that_begin_anew(model: ik.Model) -> None:
    said = ik.fidelity(model, PROMPTS[:1], text=TEXT * 8)
    count = len(model.tokenizer(TEXT * 8, add_special_tokens=False)["input_ids"])
    windows = [s.positions for s in said.sequences if s.prompt is None]
    assert len(windows) == math.ceil(count / 127)
    assert max(windows) <= 127


def test_an_interrupt_brings_the_mode_back(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.quantize("nf4")
    real = reference._log_probs
    monkeypatch.setattr(reference, "_log_probs", lambda x: (interrupt(), real(x))[1])
    with pytest.raises(KeyboardInterrupt):
        ik.fidelity(model, PROMPTS, text=TEXT)
    assert model.quantization == "nf4"
    monkeypatch.setattr(reference, "_log_probs", real)
    assert ik.fidelity(model, PROMPTS, text=TEXT).kl.value > 0


def test_another_interrupt_on_the_way_back_changes_nothing(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.quantize("nf4")
    real = ik.Model._become

    def become(self: ik.Model, **options: Any) -> None:
        if "format" in options and options["format"].mode == "nf4":
            interrupt()
        real(self, **options)

    monkeypatch.setattr(ik.Model, "_become", become)
    with pytest.raises(KeyboardInterrupt):
        ik.fidelity(model, PROMPTS, text=TEXT)
    assert model.quantization == "nf4"


def test_the_kept_reference_goes_with_the_model(model: ik.Model) -> None:
    ik.fidelity(model, PROMPTS, text=TEXT)
    parts = model._parts
    kept = weakref.ref(parts.reference)
    model.unload()
    gc.collect()
    assert parts.reference is None
    assert kept() is None


def test_another_threads_change_waits_until_it_is_measured(model: ik.Model) -> None:
    model.quantize("nf4")
    alone = ik.fidelity(model, PROMPTS, text=TEXT)
    model._parts.reference = None
    others = [threading.Thread(target=model.quantize, args=(m,)) for m in ("int8", "nf4")]
    found = []
    real = reference._log_probs

    def log_probs(logits: torch.Tensor) -> torch.Tensor:
        while others and others[0].ident is None:
            others[0].start()
        found.append(model.quantization)
        return real(logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_log_probs", log_probs)
        assert ik.fidelity(model, PROMPTS, text=TEXT) == alone
    assert found == sorted(found, key=["none", "nf4"].index)
    others[0].join(60)
    assert model.quantization == "int8"


def test_requests_that_run_finish_first_and_keep_their_answers(model: ik.Model) -> None:
    alone = model.generate("Once", max_tokens=20, ignore_eos=True).token_ids
    found: list[ik.Fidelity] = []
    with held(model) as hold:
        running = model.submit("Once", max_tokens=20, ignore_eos=True)
        hold.wait()
        measure = threading.Thread(
            target=lambda: found.append(ik.fidelity(model, PROMPTS, text=TEXT))
        )
        measure.start()
        wait_until(lambda: bool(model._engine._commands))
    assert running.result(60).token_ids == alone
    measure.join(120)
    assert found[0].kl.value == 0
    assert model.generate("Once", max_tokens=20, ignore_eos=True).token_ids == alone


def test_another_model_serves_as_reference_for_one_that_is_stored_quantized(
    folder: Path, model: ik.Model, tmp_path: Path
) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    module.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with ik.load(tmp_path, dtype="float32", context=128, max_batch=4, name="stored") as stored:
        with pytest.raises(ik.OptionError, match=r"stored quantized.*reference="):
            ik.fidelity(stored, PROMPTS, text=TEXT)
        said = ik.fidelity(stored, PROMPTS, text=TEXT, reference=model)
        assert said.kl.value > 0
        assert said.reference == "none, float32"
    other_words = transformers.AutoTokenizer.from_pretrained(folder)
    other_words.add_tokens(["<new>"])
    other_words.save_pretrained(tmp_path)
    with (
        ik.load(tmp_path, dtype="float32", context=128, name="other") as other,
        pytest.raises(ik.OptionError, match="another vocabulary"),
    ):
        ik.fidelity(model, PROMPTS, text=TEXT, reference=other)


def test_a_full_disk_is_told_and_the_mode_is_back(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def tell(self) -> int:
            return 0

        def write(self, _: memoryview) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference.tempfile, "TemporaryFile", lambda **_: Full())
    model.quantize("nf4")
    with pytest.raises(ik.GenerationError, match=r"No space left.*TMPDIR"):
        ik.fidelity(model, PROMPTS, text=TEXT)
    assert model.quantization == "nf4"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"text": ""}, ik.OptionError, "no two tokens"),
        ({"prompts": [""]}, ik.PromptError, "empty"),
        ({"prompts": []}, ik.PromptError, "list of prompts is empty"),
        ({"prompts": [list(range(5, 105)) * 2]}, ik.PromptError, "context of 128"),
        ({"max_tokens": 0}, ik.OptionError, "max_tokens=0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: ik.Model, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ik.fidelity(model, **{"prompts": PROMPTS, "text": TEXT} | options)


def test_an_unloaded_model_says_so(model: ik.Model) -> None:
    model.unload()
    with pytest.raises(ik.ModelUnloadedError):
        ik.fidelity(model)


def test_it_reads_as_text_html_json_and_a_frame(model: ik.Model) -> None:
    said = ik.fidelity(model.quantize("int8"), PROMPTS, text=TEXT)
    assert "Fidelity of int8 to none, float32" in repr(said)
    assert "nats per token" in said._repr_html_()
    plain = json.loads(json.dumps(said.to_dict()))
    assert plain["kl"]["value"] == said.kl.value
    assert list(said.to_frame()["prompt"].fillna("")) == ["", "3 tokens", "30 tokens"]


def test_the_intervals_cover_what_they_should() -> None:
    """Of 95 % intervals for the mean of 40 normal numbers, some 93 to 95 % hold the true one."""
    draw = np.random.default_rng(1).normal(3.0, 1.0, (400, 40))
    held_it = [not bootstrap(row, np.mean).excludes(3.0) for row in draw]
    assert 0.90 <= np.mean(held_it) <= 0.98
    one = bootstrap([2.0])
    assert (one.value, one.n) == (2.0, 1)
    assert math.isnan(one.low)
    assert not one.excludes(100.0)
    assert bootstrap([3, 1, 2]).value == 2


@pytest.mark.demo
def test_the_demo_model_loses_more_in_four_bits_than_in_eight(demo_model_path: Path) -> None:
    with ik.load(demo_model_path, context=1024, max_batch=4, name="fidelity") as model:
        few = {"text": reference.default_text()[:800], "max_tokens": 4}
        prompts = ["Once upon a time", "The capital of France is"]
        modes = ("int8", "nf4")
        found = {}
        for mode in modes:
            found[mode] = ik.fidelity(model.quantize(mode), prompts, **few)
            assert model.fallback is None  # rounding is not taken for a wrong cache
    kl = {mode: f.kl.value for mode, f in found.items()}
    assert 0.001 < kl["int8"] < 0.1 < kl["nf4"] < 2
    assert found["int8"].top1_agreement.value > found["nf4"].top1_agreement.value > 0.5
    plain = found["int8"].reference_perplexity
    assert 10 < plain < found["int8"].perplexity < found["nf4"].perplexity < 60
