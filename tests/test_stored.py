"""Checkpoints that are stored quantized: loaded, counted and left as they are."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored_files
import torch
import transformers

import inferkit as ik

PROMPTS = [[5, 6, 7], list(range(10, 40)), [9]]
TWELVE = {"max_tokens": 12, "ignore_eos": True}
# In fp32, so that who shares a batch with whom decides no token.
OPTIONS = {"dtype": "float32", "context": 128, "max_batch": 4, "progress": False}

Make = Callable[[Path], Path]
COMPRESSED: dict[str, Make] = {
    "int8": lambda folder: stored_files.compressed(folder, 8),
    "int8_activations": lambda folder: stored_files.compressed(folder, 8, activations=True),
    "int4": lambda folder: stored_files.compressed(folder, 4),
}
MADE: dict[str, tuple[Make, str]] = {
    **{name: (make, "compressed-tensors") for name, make in COMPRESSED.items()},
    "fp8": (stored_files.fp8, "fp8"),
    "nf4": (lambda folder: stored_files.bitsandbytes(folder, load_in_4bit=True, **NF4), "nf4"),
    "bnb_int8": (lambda folder: stored_files.bitsandbytes(folder, load_in_8bit=True), "int8"),
}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FOREIGN = [name for name in MADE if name not in ("nf4", "bnb_int8")]

with_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="gptqmodel and optimum, which run GPTQ and AWQ, are not installed",
)
KERNELS = {"gptq": stored_files.gptq, "awq": stored_files.awq}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            make = {**{n: m for n, (m, _) in MADE.items()}, **KERNELS}[name]
            made[name] = make(tmp_path_factory.mktemp("stored") / name)
        return made[name]

    return folder


def tokens(model: ik.Model) -> list[list[int]]:
    return [list(g.token_ids) for g in model.generate(PROMPTS, **TWELVE)]


def tokens_of_transformers(folder: Path) -> list[list[int]]:
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}
    )
    if getattr(module, "hf_quantizer", None) is None:
        module.float()  # where it unpacked fp8 it left the rest in bf16, and cannot run so
    made = []
    for prompt in PROMPTS:
        out = module.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


def measured(model: ik.Model) -> int:
    """Bytes of weights, as the tensors have them; without the KV cache."""
    return model._parts.nbytes - model._parts.engine.runner.nbytes


def stays_so(model: ik.Model, kept: str) -> None:
    """Every toggle is refused with the reason, and the model goes on as before."""
    said = tokens(model)
    for mode in ("none", "int8", "nf4", "fp4", "int4wo"):
        if mode != kept:
            with pytest.raises(ik.OptionError, match=f"stored quantized, as '{kept}"):
                model.quantize(mode)
    with pytest.raises(ik.OptionError, match="compute_dtype"):
        model.quantize("nf4", compute_dtype="float32")
    assert model.quantize(kept) is model
    assert tokens(model) == said


@pytest.mark.parametrize("name", MADE)
def test_it_says_what_transformers_says(checkpoint: Callable[[str], Path], name: str) -> None:
    with ik.load(checkpoint(name), **OPTIONS) as model:
        assert tokens(model) == tokens_of_transformers(checkpoint(name))
        assert model.fallback is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MADE)
def test_the_plan_counts_what_it_takes(
    checkpoint: Callable[[str], Path], name: str, dtype: str
) -> None:
    planned = ik.plan(checkpoint(name), context=128, max_batch=4, dtype=dtype)
    with ik.load(checkpoint(name), **{**OPTIONS, "dtype": dtype}) as model:
        tokens(model)  # what unpacks its weights when it first runs has done so
        assert planned.weights == model.plan.weights == pytest.approx(measured(model), rel=0.1)


@pytest.mark.parametrize("name", MADE)
def test_it_is_called_by_its_method_and_stays_so(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    kept = MADE[name][1]
    with ik.load(checkpoint(name), **OPTIONS) as model:
        assert model.quantization == model.plan.quantize == model.plan.to_dict()["quantize"] == kept
        assert model.generate("Once", **TWELVE).settings.quantization.startswith(kept)
        assert all(kept in shown for shown in map(repr, (model, model.plan, ik.models())))
        stays_so(model, kept)
        assert ik.load(checkpoint(name), **OPTIONS) is model


@pytest.mark.parametrize("name", FOREIGN)
def test_another_mode_is_refused_before_a_weight_is_read(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(checkpoint(name), tmp_path / name))
    (folder / "model.safetensors").unlink()
    for ask in (ik.plan, ik.load):
        with pytest.raises(ik.OptionError, match=r"stored quantized.*quantize='none'"):
            ask(folder, quantize="nf4")


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_kernel_runs_here_says_that_it_saves_no_memory(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    assert "saves no memory" in ik.plan(checkpoint(name), device="cpu").explain()


def test_layers_whose_weights_alone_were_quantized_are_packed(
    checkpoint: Callable[[str], Path],
) -> None:
    def kinds(name: str) -> set[str]:
        with ik.load(checkpoint(name), **{**OPTIONS, "dtype": "bfloat16"}) as model:
            layers = model._parts.loaded.module.model.layers
            return {type(m).__name__ for m in layers.modules() if hasattr(m, "in_features")}

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 kernels to pack for")
    assert kinds("int4") == kinds("int8") == kinds("fp8") == {"PackedLinear"}
    assert kinds("int8_activations") == {"Linear"}  # they round their input too


def test_the_weights_outlive_their_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in MADE:
        folder = Path(shutil.copytree(checkpoint(name), tmp_path / name))
        with ik.load(folder, **OPTIONS) as model:
            said = tokens(model)
            path = folder / "model.safetensors"
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
            assert tokens(model) == said, name


def test_without_progress_no_bar_is_drawn(
    checkpoint: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with ik.load(checkpoint("int4"), **OPTIONS):
        assert "it/s" not in capfd.readouterr().err
    with ik.load(checkpoint("int4"), **{**OPTIONS, "progress": True}):
        assert "it/s" in capfd.readouterr().err


def test_it_is_compared_in_its_own_mode(checkpoint: Callable[[str], Path]) -> None:
    with ik.load(checkpoint("int8"), context=600, max_batch=2, progress=False) as model:
        made = ik.compare(
            model, max_batch=[1, 2], prompts=PROMPTS, max_tokens=4, repeat=1, progress=False
        )
    assert {cell.quantize for cell in made.cells} == {"compressed-tensors"}
    assert len(made.runs) == 2


def test_details_that_a_stored_mode_has_are_no_other_mode(
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("nf4")
    with ik.load(folder, quantize="nf4", double_quant=True, **OPTIONS) as model:
        assert model.quantize("nf4", double_quant=True) is model
        assert str(model.plan.format) == "nf4, double_quant=True"
    with pytest.raises(ik.OptionError, match="compute_dtype"):
        ik.load(folder, quantize="nf4", compute_dtype="float32", **OPTIONS)


# -- what is not to be had here ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "absent", "advice"),
    [
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            "utils.quantization_config.is_compressed_tensors_available",
            "pip install compressed-tensors",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "quantizers.quantizer_gptq.is_optimum_available",
            "pip install optimum",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            "quantizers.quantizer_awq.is_gptqmodel_available",
            "pip install gptqmodel",
        ),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else None,
)
def test_a_missing_package_is_named_before_weights_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
    absent: str,
    advice: str,
) -> None:
    monkeypatch.setattr(f"transformers.{absent}", lambda *_: False)
    folder = stored_files.described(tmp_path / "model", said)
    with pytest.raises(ik.UnsupportedModelError, match=f"{said['quant_method']}.*{advice}"):
        ik.load(folder)
    planned = ik.plan(folder)
    assert planned.quantize == said["quant_method"]
    assert "upper bound" in planned.explain()
    assert advice in planned.explain()


def test_a_device_that_cannot_run_the_method_is_said_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = {"quant_method": "spqr", "beta1": 16, "beta2": 16, "bits": 3, "shapes": {}}
    folder = stored_files.described(tmp_path / "model", said)
    with pytest.raises(ik.UnsupportedModelError, match=r"on cpu here: GPU is required"):
        ik.load(folder, device="cpu")


@pytest.mark.parametrize("said", [{"quant_method": "magic"}, {}], ids=["unknown", "unnamed"])
def test_a_method_that_transformers_does_not_know_is_refused(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    folder = stored_files.described(tmp_path / "model", said)
    with pytest.raises(ik.UnsupportedModelError, match="cannot load that"):
        ik.load(folder)
    assert "upper bound" in ik.plan(folder).explain()


# -- GPTQ and AWQ, where their kernels are -------------------------------------------------------


@with_gptqmodel
@pytest.mark.slow  # gptqmodel compiles its kernels when they are first used
@pytest.mark.parametrize("name", KERNELS)
def test_gptq_and_awq_run_over_slots(checkpoint: Callable[[str], Path], name: str) -> None:
    folder = checkpoint(name)
    with ik.load(folder, **OPTIONS) as model:
        assert model.fallback is None
        assert model.quantization == name
        assert tokens(model) == tokens_of_transformers(folder)
        assert model.plan.weights == pytest.approx(measured(model), rel=0.1)
        assert model.plan.weights < 0.6 * ik.plan(architecture(folder), dtype="float32").weights
        stays_so(model, name)


def architecture(folder: Path) -> transformers.PretrainedConfig:
    """The config of the same model unquantized."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config
