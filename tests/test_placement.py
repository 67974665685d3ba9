"""Layers on several devices: where they go, what each holds, and that the tokens stay the same."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from held import interrupt

import inferkit as ik
from inferkit import loading, memory
from inferkit.devices import Device
from inferkit.errors import DeviceError, OptionError
from inferkit.loading import weight_bytes
from inferkit.placement import device_of, runs_on

GIB = 2**30
PROMPTS = [[5, 6, 7], list(range(10, 40))]
SIX: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
SMALL: dict[str, Any] = {"context": 64, "max_batch": 2, "prefill_chunk": 8, "progress": False}


def llama_8b() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )


def limit(folder: Path, share: float, **options: Any) -> dict[str, int]:
    """A ``max_memory`` that leaves room on the CPU for so much of the weights."""
    whole = ik.plan(folder, device="cpu", **{k: v for k, v in options.items() if k != "progress"})
    (cpu,) = whole.devices
    return {"cpu": int(cpu.kv_cache + 1.1 * cpu.activations + share * cpu.weights)}


@pytest.fixture
def offload_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which weights are written that are to be read back."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def split(
    tiny_model: Callable[[str], Path], offload_folders: Path
) -> Iterator[Callable[..., ik.Model]]:
    """Load a small model with most of it on disk."""
    loaded: list[ik.Model] = []

    def load(arch: str, share: float = 0.5, dtype: str = "float32", **more: Any) -> ik.Model:
        folder = tiny_model(arch)
        options = SMALL | {"dtype": dtype} | more
        bound = limit(folder, share, dtype=dtype, **SMALL)
        loaded.append(
            ik.load(folder, device=["cpu", "disk"], max_memory=bound, name="split", **options)
        )
        return loaded[-1]

    yield load
    for model in loaded:
        model.unload()


def tensors_on(model: ik.Model) -> dict[str, set[str]]:
    """Device name -> names of the parameters that really are there."""
    found: dict[str, set[str]] = {"cpu": set(), "disk": set()}
    module = model._parts.loaded.module
    for name, tensor in module.named_parameters():
        found["disk" if tensor.device.type == "meta" else "cpu"].add(name)
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_moe", "mamba"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_partly_on_disk_says_what_it_says_in_memory(
    tiny_model: Callable[[str], Path], split: Callable[..., ik.Model], arch: str, dtype: str
) -> None:
    with ik.load(tiny_model(arch), device="cpu", dtype=dtype, name="whole", **SMALL) as whole:
        wanted = [g.token_ids for g in whole.generate(PROMPTS, **SIX)]
        fallback = whole.fallback
    model = split(arch, dtype=dtype)
    assert model.devices == ("cpu", "disk")
    assert model.fallback == fallback
    assert [g.token_ids for g in model.generate(PROMPTS, **SIX)] == wanted
    assert model.generate(PROMPTS[0], **SIX).settings.device == "cpu, disk"


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_tensors_are_where_the_plan_says_and_take_what_it_says(
    split: Callable[..., ik.Model], arch: str, share: float
) -> None:
    model = split(arch, share)
    where = tensors_on(model)
    assert where["cpu"]
    assert where["disk"]
    for device, names in where.items():
        assert {device_of(model.plan.device_map, name) for name in names} == {device}
    cpu, disk = model.plan.devices
    assert weight_bytes(model._parts.loaded.module) == pytest.approx(cpu.weights, rel=0.01)
    module = model._parts.loaded.module
    on_disk = sum(p.nbytes for n, p in module.named_parameters() if n in where["disk"])
    assert on_disk == pytest.approx(disk.weights, rel=0.01)
    assert (disk.kv_cache, disk.activations) == (0, 0)
    assert model._engine.runner.nbytes == model.plan.kv_cache
    assert cpu.needed <= cpu.free


def test_weights_are_read_from_their_own_file_and_nothing_is_copied(
    split: Callable[..., ik.Model], offload_folders: Path
) -> None:
    model = split("llama")
    (folder,) = offload_folders.iterdir()
    assert list(folder.iterdir()) == []
    model.unload()
    assert list(offload_folders.iterdir()) == []


def test_weights_that_must_be_written_anew_are_gone_after_the_unload(
    split: Callable[..., ik.Model], offload_folders: Path
) -> None:
    """transformers fuses the experts of a mixture as it loads it."""
    model = split("qwen3_moe")
    assert [f for folder in offload_folders.iterdir() for f in folder.iterdir()]
    model.unload()
    assert list(offload_folders.iterdir()) == []


def test_what_stays_on_the_cpu_is_packed_all_the_same(split: Callable[..., ik.Model]) -> None:
    from inferkit.packing import PackedLinear, packable

    model = split("llama", 0.9, dtype="bfloat16")
    module = model._parts.loaded.module
    packed = [n for n, m in module.named_modules() if isinstance(m, PackedLinear)]
    here = [
        n
        for n, m in module.named_modules()
        if isinstance(m, torch.nn.Linear | PackedLinear)
        and device_of(model.plan.device_map, n) == "cpu"
    ]
    assert 0 < len(here) < 15
    assert packed == (here if packable("cpu", "bfloat16") else [])


def test_the_handle_may_live_on_and_nothing_stays_in_memory(
    split: Callable[..., ik.Model],
) -> None:
    model = split("llama")
    module = model._parts.loaded.module
    model.unload()
    assert weight_bytes(module) == 0
    with pytest.raises(ik.ModelUnloadedError):
        model.generate("Once")


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_load_that_is_stopped_leaves_no_folder(
    split: Callable[..., ik.Model],
    offload_folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    def stop(*_: Any) -> None:
        if how == "interrupt":
            interrupt()
        raise ValueError("broken")

    monkeypatch.setattr(loading, "read_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else ik.LoadError):
        split("llama")
    assert list(offload_folders.iterdir()) == []
    assert ik.models() == []


def test_a_mode_that_cannot_be_offloaded_is_refused_and_the_model_goes_on(
    split: Callable[..., ik.Model],
) -> None:
    model = split("qwen3_moe", 0.3)
    said = model.generate(PROMPTS[0], **SIX).token_ids
    with pytest.raises(OptionError, match=r"quantize='nf4' cannot be had.*take quantize='none'"):
        model.quantize("nf4")
    assert model.quantization == "none"
    assert model.generate(PROMPTS[0], **SIX).token_ids == said


def test_quantized_weights_that_fit_need_no_disk(split: Callable[..., ik.Model]) -> None:
    model = split("llama", 0.9)
    assert tensors_on(model)["disk"]
    said = [g.token_ids for g in model.generate(PROMPTS, **SIX)]
    model.quantize("nf4")
    assert set(model.plan.device_map.values()) == {"cpu"}
    assert model.plan.devices[1].weights == 0
    assert tensors_on(model)["disk"] == set()
    assert model.generate(PROMPTS[0], **SIX).settings.quantization == "nf4"
    model.quantize("none")
    assert tensors_on(model)["disk"]
    assert [g.token_ids for g in model.generate(PROMPTS, **SIX)] == said


def test_a_split_model_is_resized_where_it_is(split: Callable[..., ik.Model]) -> None:
    model = split("llama", 0.9)
    before = dict(model.plan.device_map)
    model.configure(max_batch=1)
    assert (model.plan.device_map, model.plan.max_batch) == (before, 1)
    assert model.generate(PROMPTS[1], **SIX).finish_reason == "length"
    with pytest.raises(ik.DoesNotFitError, match="on cpu"):
        model.configure(max_batch=500)
    assert model.max_batch == 1


def test_the_same_load_again_is_the_same_model_and_another_limit_another(
    split: Callable[..., ik.Model],
) -> None:
    model = split("llama")
    assert split("llama") is model
    other = split("llama", 0.9)
    assert other is not model
    assert not model.loaded


def test_a_model_that_runs_off_its_device_is_measured_and_compared_alike(
    split: Callable[..., ik.Model],
) -> None:
    model = split("llama")
    said = ik.fidelity(model, PROMPTS, text="Once upon a time there was a rabbit.", max_tokens=4)
    assert said.kl.value == 0


# -- plans for devices that are not here ----------------------------------------------------------


def imaginary(**options: Any) -> ik.MemoryPlan:
    free = options.pop("free")
    from inferkit.footprint import asked_format
    from inferkit.memory import plan_config

    return plan_config(
        llama_8b(),
        form=asked_format(options.pop("quantize", "none")),
        context=options.pop("context", 4096),
        max_batch=options.pop("max_batch", 4),
        devices=list(free),
        dtype="bfloat16",
        free=free,
        **options,
    )


@pytest.mark.parametrize("mode", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("gpu", [1, 6, 8])
def test_an_accelerator_is_filled_first_and_runs_all(mode: str, gpu: int) -> None:
    plan = imaginary(free={"cuda:0": gpu * GIB, "cpu": 64 * GIB}, quantize=mode)
    cuda, cpu = plan.devices
    whole = imaginary(free={"cuda:0": 80 * GIB}, quantize=mode)
    assert cuda.kv_cache == whole.kv_cache
    assert (cpu.kv_cache, cpu.activations) == (0, 0)
    assert cuda.activations > whole.activations or not cpu.weights
    away = [m for m, device in plan.device_map.items() if device == "cpu"]
    layers = [int(m.split(".")[2]) for m in away if m.startswith("model.layers.")]
    assert layers == list(range(32 - len(layers), 32))  # the last ones
    if gpu > 1:
        assert plan.fits
    # One more layer would not have found room beside what must be there.
    block = max(whole.weights - 2 * 2 * 128256 * 4096, 0) / 32
    if layers and plan.fits:
        assert cuda.free - cuda.needed < 2 * block + 2 * 2 * 128256 * 4096


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_what_is_offloaded_stays_unquantized_and_is_counted_so(mode: str) -> None:
    plan = imaginary(free={"cuda:0": 7 * GIB, "cpu": 64 * GIB}, quantize=mode)
    away = [m for m, device in plan.device_map.items() if device == "cpu"]
    assert away
    assert set(away) <= set(plan.format.skip or ())
    plain = imaginary(free={"cuda:0": 80 * GIB})
    quantized = imaginary(free={"cuda:0": 80 * GIB}, quantize=mode)
    assert quantized.weights < plan.weights < plain.weights
    layers = sum(m.startswith("model.layers.") for m in away)
    per_layer = (plain.weights - quantized.weights) / 32
    assert plan.weights == pytest.approx(quantized.weights + layers * per_layer, rel=1e-3)


def test_what_neither_takes_goes_to_disk() -> None:
    free = {"cuda:0": 7 * GIB, "cpu": 4 * GIB, "disk": 100 * GIB}
    plan = imaginary(free=free)
    assert plan.fits
    assert all(d.weights > GIB for d in plan.devices)
    assert not imaginary(free={"cuda:0": 7 * GIB, "cpu": 4 * GIB}).fits
    assert runs_on(list(free)) == {"cuda:0": "cuda:0", "cpu": "cuda:0", "disk": "cuda:0"}


def test_a_split_over_accelerators_alone_shares_out_in_proportion() -> None:
    plan = imaginary(free={"cuda:0": 20 * GIB, "cuda:1": 20 * GIB})
    one, other = plan.devices
    assert one.weights == pytest.approx(other.weights, rel=0.15)
    assert one.kv_cache == pytest.approx(other.kv_cache, rel=0.15)


def test_limits_bound_what_is_taken_of_a_device() -> None:
    free = {"cuda:0": 80 * GIB, "cpu": 64 * GIB}
    plan = imaginary(free=free, limits={"cuda:0": 6 * GIB})
    assert plan.fits
    assert plan.devices[0].free == 6 * GIB
    assert plan.devices[1].weights > 0
    assert imaginary(free=free).devices[1].weights == 0


def test_a_plan_that_does_not_fit_names_devices_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = {"cuda:0": 6 * GIB, "cuda:1": 6 * GIB, "cpu": 64 * GIB, "disk": 500 * GIB}
    attached = ["cuda:0", "cuda:1", "cpu"]
    monkeypatch.setattr(sys.modules["inferkit.devices"], "_attached_names", lambda: attached)
    monkeypatch.setattr(
        memory,
        "find_device",
        lambda name: Device(name, name.partition(":")[0], name, room[name], room[name], True),
    )
    plan = ik.plan(llama_8b(), device="cuda:0", dtype="bf16", context=2048, max_batch=1)
    assert plan.elsewhere == ("cuda:0", "cuda:1", "cpu")
    assert 0 < plan.travelling < plan.weights
    assert "device=['cuda:0', 'cuda:1', 'cpu'] would hold it" in plan.explain()
    assert "travel at every step: slow" in plan.explain()
    room["cuda:1"] = 20 * GIB
    both = ik.plan(llama_8b(), device="cuda:0", dtype="bf16", context=2048, max_batch=1)
    assert (both.elsewhere, both.travelling) == (("cuda:0", "cuda:1"), 0)
    assert "slow" not in both.explain()
    room.update({"cuda:0": GIB, "cuda:1": GIB, "cpu": GIB, "disk": GIB})
    assert (
        ik.plan(llama_8b(), device="cuda:0", dtype="bf16", context=2048, max_batch=1).elsewhere
        == ()
    )


# -- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "error", "said"),
    [
        ("disk", OptionError, "needs another device"),
        (["disk"], OptionError, "needs another device"),
        (["disk", "cpu"], OptionError, "'disk' last"),
        (["cpu", "cuda:7"], OptionError, "accelerators first"),
        (["cpu", "disk", "disk"], OptionError, "list of different ones"),
        (["cuda:77", "cpu"], DeviceError, "cuda:77 is not attached"),
    ],
)
def test_devices_that_cannot_be_placed_on_are_refused(
    tiny_model: Callable[[str], Path], device: Any, error: type[Exception], said: str
) -> None:
    for call in (ik.plan, ik.load):
        with pytest.raises(error, match=said):
            call(tiny_model("llama"), device=device)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"cuda:0": "6GiB"}, r"max_memory names 'cuda:0', and the devices are 'cpu', 'disk'"),
        ({"cpu": "much"}, r"max_memory\['cpu'\]='much' is no size.*write max_memory="),
        ({"cpu": -1}, "is no size"),
        ({"cpu": True}, "is no size"),
        ("6GiB", "is no dict"),
    ],
)
def test_limits_without_sense_are_refused(
    tiny_model: Callable[[str], Path], limits: Any, said: str
) -> None:
    for call in (ik.plan, ik.load):
        with pytest.raises(OptionError, match=said):
            call(tiny_model("llama"), device=["cpu", "disk"], max_memory=limits)


def test_sizes_are_read_as_people_write_them(tiny_model: Callable[[str], Path]) -> None:
    for size, wanted in (("1GiB", GIB), ("300MB", 300_000_000), (12345, 12345)):
        plan = ik.plan(tiny_model("llama"), device="cpu", max_memory={"cpu": size}, **_PLANNED)
        assert plan.devices[0].free == wanted


_PLANNED = {k: v for k, v in SMALL.items() if k != "progress"}


# -- with a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cuda:0", "cpu", "disk"]])
@pytest.mark.parametrize("mode", ["none", "nf4"])
def test_a_gpu_runs_what_it_cannot_hold(
    tiny_model: Callable[[str], Path], devices: list[str], mode: str
) -> None:
    options = SMALL | {"dtype": "bfloat16"}
    with ik.load(tiny_model("gemma3"), device="cuda:0", name="whole", **options) as whole:
        wanted = [g.token_ids for g in whole.generate(PROMPTS, **SIX)]
        (cuda,) = whole.plan.devices
    bound = {"cuda:0": int(cuda.kv_cache + 1.1 * cuda.activations + 0.6 * cuda.weights)}
    if "disk" in devices:
        bound["cpu"] = cuda.weights // 5
    with ik.load(
        tiny_model("gemma3"),
        device=devices,
        max_memory=bound,
        quantize=mode,
        name="split",
        **options,
    ) as model:
        assert {*model.plan.device_map.values()} == set(devices)
        runner: Any = model._engine.runner
        assert {x.keys.device for x in runner.cache._layers} == {torch.device("cuda:0")}
        hooks = [getattr(m, "_hf_hook", None) for m in model._parts.loaded.module.modules()]
        assert any(isinstance(h, AlignDevicesHook) and h.offload for h in hooks)
        said = [g.token_ids for g in model.generate(PROMPTS, **SIX)]
        assert (said == wanted) == (mode == "none")
        module = model._parts.loaded.module
    assert weight_bytes(module) == 0
