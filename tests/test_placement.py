"""Placement: a model over several devices, what lies on "cpu" or "disk" travelling to run.

Splits are forced on the CPU by ``max_memory``; the plans are also of machines that are not here.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import psutil
import pytest
import torch
import transformers
from architectures import CONFIGS, build
from held import interrupt
from safetensors import safe_open
from test_device import PROMPTS, own_tokens, tensor_bytes
from test_memory import GIB, gemma3_270m, llama_70b, planned

import inferkit as ik
from inferkit import loading
from inferkit.devices import release_memory
from inferkit.footprint import meta_model
from inferkit.offload import offload
from inferkit.packing import PackedLinear

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "context": 128,
    "max_batch": 3,
    "prefill_chunk": 16,
    "progress": False,
}
SPLIT = ["cpu", "disk"]
TWELVE = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def limit(folder: Path, share: float = 0.5, **options: Any) -> dict[str, int]:
    """A limit on the CPU under which that share of the weights must go to disk, or more."""
    asked = {n: v for n, v in (OPTIONS | options).items() if n != "progress"}
    plan = ik.plan(folder, device="cpu", **asked)
    return {"cpu": plan.total - int(share * plan.weights)}


def split(folder: Path, share: float = 0.5, **options: Any) -> ik.Model:
    """The model, forced to lie on CPU and disk."""
    limits = limit(folder, share, **options)
    return ik.load(folder, device=SPLIT, max_memory=limits, **(OPTIONS | options))


def tokens(model: ik.Model) -> list[list[int]]:
    return [list(g.token_ids) for g in model.generate(PROMPTS, **TWELVE)]


def module_of(model: ik.Model) -> Any:
    return model._parts.loaded.module


def on_disk(model: ik.Model) -> set[str]:
    """Modules that the plan has on disk."""
    return {name for name, device in model.plan.device_map.items() if device == "disk"}


def lies_in(name: str, modules: set[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


# -- running ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral", "gpt2", "mamba"])
def test_a_split_model_says_what_the_whole_one_says(
    tiny_model: Callable[[str], Path], arch: str
) -> None:
    folder = tiny_model(arch)
    with split(folder) as model:
        assert on_disk(model)
        assert model.plan.fits
        assert (model.fallback is None) == (arch != "mamba")
        assert tokens(model) == own_tokens(folder, "cpu", torch.float32, 12)


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_embeddings_that_share_their_weights_do_so_wherever_they_lie(
    tmp_path: Path, share: float
) -> None:
    config = CONFIGS["gemma3"]()
    config.tie_word_embeddings = True
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    build("gemma3")[1].save_pretrained(tmp_path / "tied")
    with split(tmp_path / "tied", share=share) as model:
        assert ("lm_head" in on_disk(model)) == ("model.embed_tokens" in on_disk(model))
        assert tokens(model) == own_tokens(tmp_path / "tied", "cpu", torch.float32, 12)


def test_in_bf16_it_is_served_over_slots_and_what_stays_is_packed(
    tiny_model: Callable[[str], Path],
) -> None:
    folder = tiny_model("gemma3")
    with ik.load(folder, device="cpu", **(OPTIONS | {"dtype": "bfloat16"})) as whole:
        said = tokens(whole)
        packs = any(isinstance(m, PackedLinear) for m in module_of(whole).modules())
    with split(folder, dtype="bfloat16") as model:
        assert model.fallback is None
        assert tokens(model) == said
        layers = {n for n, m in module_of(model).named_modules() if isinstance(m, PackedLinear)}
        assert bool(layers) == packs
        assert not any(lies_in(name, on_disk(model)) for name in layers)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_everything_but_the_cache_may_lie_on_disk(
    tiny_model: Callable[[str], Path], arch: str
) -> None:
    folder = tiny_model(arch)
    options = OPTIONS | {"force": True}  # no room for the layer that travels is left by the limit
    with ik.load(folder, device=SPLIT, max_memory={"cpu": 0}, **options) as model:
        assert all(p.device.type == "meta" for p in module_of(model).parameters())
        assert tokens(model) == own_tokens(folder, "cpu", torch.float32, 12)
        assert [d.weights > 10_000 for d in model.plan.devices] == [False, True]


@pytest.mark.parametrize("tied", [False, True])
def test_what_lies_in_memory_travels_too(tied: bool) -> None:
    """As under an accelerator; here it travels to the CPU itself."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        wanted = module(ids).logits
    whole = sum(p.nbytes for p in module.parameters())
    ended: list[bool] = []
    away = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    device_map = {"model.rotary_emb": "cpu"} | dict.fromkeys(away, "elsewhere")
    held = offload(module, device_map, ["cpu"], lambda: ended.append(True))
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert held.nbytes == whole
    with torch.inference_mode():
        assert torch.equal(module(ids).logits, wanted)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    held.release()
    assert held.nbytes == 0
    assert ended == [True]


# -- where things are -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral"])
def test_the_plan_says_where_every_weight_is_and_how_much(
    tiny_model: Callable[[str], Path], arch: str
) -> None:
    folder = tiny_model(arch)
    limits = limit(folder)
    plan = ik.plan(
        folder,
        device=SPLIT,
        max_memory=limits,
        **{n: OPTIONS[n] for n in OPTIONS if n != "progress"},
    )
    before = tensor_bytes("cpu")
    with ik.load(folder, device=SPLIT, max_memory=limits, **OPTIONS) as model:
        taken = tensor_bytes("cpu") - before
        assert (model.plan.device_map, model.plan.devices[0].weights) == (
            plan.device_map,
            plan.devices[0].weights,
        )
        module, away = module_of(model), on_disk(model)
        for name, parameter in module.named_parameters():
            assert (parameter.device.type == "meta") == lies_in(name, away), name
        assert {b.device.type for b in module.buffers()} == {"cpu"}
        lying = sum(p.nbytes for n, p in module.named_parameters() if lies_in(n, away))
        cpu, disk = model.plan.devices
        assert taken == pytest.approx(cpu.weights + cpu.kv_cache, rel=0.1)
        assert disk.weights == pytest.approx(lying, rel=0.1)
        assert (disk.kv_cache, disk.activations) == (0, 0)
        assert model._parts.nbytes == pytest.approx(cpu.weights + cpu.kv_cache, rel=0.1)
        assert cpu.needed <= limits["cpu"]


def test_weights_that_safetensors_have_are_read_from_there(
    tiny_model: Callable[[str], Path], temporary: Path
) -> None:
    folder = tiny_model("llama")
    with split(folder) as model:
        tokens(model)
        assert not [f for f in temporary.rglob("*") if f.is_file()]
        if sys.platform == "linux":
            assert str(folder) not in Path("/proc/self/maps").read_text()
        held = {n for n, _ in module_of(model).named_parameters() if lies_in(n, on_disk(model))}
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            sizes = {n: file.get_tensor(n).nbytes for n in file.keys()}  # noqa: SIM118
        disk = model.plan.devices[1]
        assert disk.weights == sum(sizes[n] for n in held)


def test_weights_that_transformers_puts_together_are_written_and_go_with_the_model(
    tiny_model: Callable[[str], Path], temporary: Path
) -> None:
    with split(tiny_model("mixtral")):
        written = [f.name for f in temporary.rglob("*.safetensors")]
        assert written
        assert all(".experts." in name for name in written)
    assert not list(temporary.iterdir())


def test_no_copy_of_the_disks_weights_is_in_memory(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=640, intermediate_size=2560, num_hidden_layers=8, vocab_size=384
    )
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole = sum(p.nbytes for p in module.parameters())
    module.save_pretrained(tmp_path / "model")
    build("llama")[1].save_pretrained(tmp_path / "model")
    del module
    split(tmp_path / "model", share=0.8).unload()  # imports, and what libraries keep
    ik.devices()
    release_memory(["cpu"])
    before = psutil.Process().memory_info().rss
    with split(tmp_path / "model", share=0.8) as model:
        model.generate([5, 6, 7], max_tokens=2)
        release_memory(["cpu"])  # what other tests left in the heap comes and goes
        taken = psutil.Process().memory_info().rss - before
        cpu, disk = model.plan.devices
        assert disk.weights > 0.7 * whole
        assert taken < cpu.needed + 0.3 * whole


def test_what_is_loaded_tells_of_its_devices(tiny_model: Callable[[str], Path]) -> None:
    with split(tiny_model("llama")) as model:
        assert model.devices == ("cpu", "disk")
        assert model.device == "cpu"
        assert "device=cpu, disk" in repr(model)
        assert "cpu, disk" in repr(ik.models())
        assert model.generate("Once", **TWELVE).settings.device == "cpu, disk"
        assert "travel to cpu at every step" in repr(model.plan)


# -- changing, loading again, unloading -------------------------------------------------------


def test_precision_is_toggled_and_what_lies_on_disk_stays_unquantized(
    tiny_model: Callable[[str], Path],
) -> None:
    folder, modes = tiny_model("gemma3"), ("none", "int8", "nf4", "fp4")
    sizes = {n: v for n, v in OPTIONS.items() if n != "progress"}
    least = min(ik.plan(folder, device="cpu", quantize=mode, **sizes).total for mode in modes)
    limits = {"cpu": least - 2**16}  # no mode fits whole
    with ik.load(folder, device=SPLIT, max_memory=limits, **OPTIONS) as model:
        said = tokens(model)
        for mode, kind in (("int8", "Linear8bitLt"), ("nf4", "Linear4bit"), ("fp4", "Linear4bit")):
            model.quantize(mode, progress=False)
            tokens(model)
            kinds = {
                name: type(m).__name__
                for name, m in module_of(model).named_modules()
                if name.endswith("_proj")
            }
            away = on_disk(model)
            assert away
            assert kind in kinds.values()
            for name, found in kinds.items():
                assert found == ("Linear" if lies_in(name, away) else kind)
                assert (name in model.unquantized) == lies_in(name, away)
            assert "stay unquantized" in model.plan.explain()
            cpu = model.plan.devices[0]
            assert model._parts.nbytes == pytest.approx(cpu.weights + cpu.kv_cache, rel=0.1)
        model.quantize("none")
        assert tokens(model) == said


def test_a_cache_that_needs_the_room_of_layers_moves_them(
    tiny_model: Callable[[str], Path],
) -> None:
    with split(tiny_model("gemma3"), share=0.25) as model:
        said, before = tokens(model), on_disk(model)
        model.configure(context=256)
        assert on_disk(model) > before
        assert model.plan.fits
        assert tokens(model) == said
        with pytest.raises(ik.DoesNotFitError, match="max_memory allows"):
            model.configure(max_batch=3000)
        assert tokens(model) == said


def test_the_same_load_gives_the_same_model_and_another_limit_another(
    tiny_model: Callable[[str], Path],
) -> None:
    folder = tiny_model("llama")
    limits = limit(folder)
    model = ik.load(folder, device=SPLIT, max_memory=limits, **OPTIONS)
    again = {"cpu": f"{limits['cpu']} B"}
    assert ik.load(folder, device=SPLIT, max_memory=again, **OPTIONS) is model
    other = ik.load(folder, device=SPLIT, max_memory={"cpu": "1GiB"}, **OPTIONS)
    assert other is not model
    assert not on_disk(other)
    assert not model.loaded
    other.unload()


def test_ten_rounds_give_back_memory_and_files(
    tiny_model: Callable[[str], Path], temporary: Path
) -> None:
    kept: list[Any] = []
    after = []
    for _ in range(10):
        model = split(tiny_model("mixtral"), context=64)
        gens = model.generate([5, 6, 7], max_tokens=1)
        kept += [model, module_of(model), gens]
        model.unload()
        assert not list(temporary.iterdir())
        if len(kept) in (3, 30):  # the first round leaves tables of libraries
            after.append(tensor_bytes("cpu"))
    assert after[1] <= after[0] + 2**14


@pytest.mark.parametrize("place", ["_from_pretrained", "read_tokenizer", "pack_linears"])
@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_load_that_is_stopped_leaves_nothing(
    tiny_model: Callable[[str], Path],
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    how: str,
) -> None:
    from inferkit import packing

    owner = packing if place == "pack_linears" else loading
    real = getattr(owner, place)

    def call(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        if how == "error":
            raise OSError("No space left on device")
        interrupt()
        return made

    before = tensor_bytes("cpu")
    monkeypatch.setattr(owner, place, call)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else ik.LoadError) as error:
        split(tiny_model("mixtral"))
    assert how == "interrupt" or "TMPDIR" in str(error.value)
    assert not list(temporary.iterdir())
    assert tensor_bytes("cpu") <= before + 2**14
    assert not ik.models()


def test_files_that_change_under_it_end_requests_with_a_clear_error(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))
    with split(folder) as model:
        said = tokens(model)
        file = folder / "model.safetensors"
        stat = file.stat()
        os.utime(file, ns=(1, 1))
        with pytest.warns(UserWarning, match="no longer the file that was loaded"):
            gen = model.generate("Once", **TWELVE)
        assert gen.finish_reason == "error"
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert tokens(model) == said


# -- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("disk", "runs nothing.*'cpu', 'disk'"),
        (["disk"], "runs nothing"),
        (["disk", "cpu"], r"write \['cpu', 'disk'\]"),
        (["cpu", "disk", "disk"], "is not a device"),
    ],
)
def test_devices_in_no_order_are_refused_with_the_right_one(device: Any, said: str) -> None:
    with pytest.raises(ik.OptionError, match=said):
        ik.plan(CONFIGS["llama"](), device=device)
    with pytest.raises(ik.OptionError, match=said):
        ik.load("nowhere", device=device)


def test_the_order_of_devices_that_are_only_imagined_counts_too() -> None:
    free = {"cuda:0": GIB, "mps": GIB}
    with pytest.raises(ik.OptionError, match=r"write \['cuda:0', 'cpu'\]"):
        ik.plan(CONFIGS["llama"](), device=["cpu", "cuda:0"], free=free)
    with pytest.raises(ik.OptionError, match=r"'mps', or \['mps', 'disk'\]"):
        ik.plan(CONFIGS["llama"](), device=["mps", "cpu"], free=free)
    made = ik.plan(CONFIGS["llama"](), device=["cuda", "cpu"], free=free)
    assert [d.name for d in made.devices] == ["cuda:0", "cpu"]
    assert made.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("max_memory", "said"),
    [
        ({"cuda:0": "6GiB"}, "names 'cuda:0'.*write 'cpu', 'disk'"),
        ({"cpu": "6 parrots"}, r"'6 parrots'.*'6GiB'"),
        ({"cpu": -1}, "-1"),
        ({"cpu": True}, "True"),
        ({"cpu": 1.5}, "1.5"),
        ({"cpu": None}, "None"),
        ("6GiB", "give a dictionary"),
    ],
)
def test_a_limit_without_sense_is_refused_with_what_to_write(max_memory: Any, said: str) -> None:
    with pytest.raises(ik.OptionError, match=said):
        ik.plan(CONFIGS["llama"](), device=SPLIT, max_memory=max_memory)


@pytest.mark.parametrize(
    ("size", "count"),
    [("6GiB", 6 * GIB), ("300MB", 300_000_000), ("1.5 GB", 1_500_000_000), ("77", 77), (5, 5)],
)
def test_sizes_are_read_as_accelerate_reads_them(size: Any, count: int) -> None:
    made = ik.plan(CONFIGS["llama"](), device="cpu", max_memory={"cpu": size}, dtype="float32")
    assert made.max_memory == {"cpu": count}
    assert made.devices[0].free <= count


def test_a_checkpoint_that_is_stored_quantized_is_not_offloaded(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=config, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "stored")
    with pytest.raises(ik.OptionError, match=r"stored quantized.*device='cpu'"):
        ik.plan(tmp_path / "stored", device=SPLIT)
    with pytest.raises(ik.OptionError, match=r"stored quantized.*device='cpu'"):
        ik.load(tmp_path / "stored", device=SPLIT)


def test_the_command_line_takes_lists_and_limits(
    tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from inferkit.cli import main

    folder = str(tiny_model("llama"))
    options = ["--device", "cpu,disk", "--max-memory", "cpu=1KiB,disk=1GB"]
    assert main(["plan", folder, *options]) == 1
    assert "1.0 KiB" in (said := capsys.readouterr().out) or "max_memory allows" in said
    assert main(["plan", folder, "--device", "cpu,disk", "--max-memory", "1KiB"]) == 2
    assert "names '1KiB'" in capsys.readouterr().err


# -- plans ------------------------------------------------------------------------------------

MACHINES = [
    ("cuda:0", "cpu"),
    ("cuda:0", "disk"),
    ("cuda:0", "cpu", "disk"),
    ("cuda:0", "cuda:1", "cpu"),
    ("cuda:0", "cuda:1", "cpu", "disk"),
    ("cpu", "disk"),
]
ROOM = {"cuda:0": 8 * GIB, "cuda:1": 5 * GIB, "cpu": 10 * GIB, "disk": 1000 * GIB}


@pytest.mark.parametrize("mode", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("names", MACHINES, ids="+".join)
def test_every_mode_is_planned_over_every_machine(names: tuple[str, ...], mode: str) -> None:
    config = llama_70b()
    config.num_hidden_layers = 12
    made = planned(config, free={name: ROOM[name] for name in names}, quantize=mode)
    whole = planned(config, free={"cuda:0": 400 * GIB})
    run = [d for d in made.devices if d.name.startswith("cuda")] or list(made.devices[:1])
    away = [d for d in made.devices if d not in run]
    assert sum(d.kv_cache for d in run) == whole.kv_cache
    assert all(d.kv_cache == d.activations == d.streamed == 0 for d in away)
    if any(d.weights for d in away):
        assert run[-1].streamed > 0
        assert f"travel to {run[-1].name} at every step" in made.note
        assert ("unquantized" in made.note) == (mode != "none")
        assert all(d.free - d.needed < whole.weights // 12 for d in run)  # full, to a layer
    assert any(d.weights for d in away) or mode != "none"
    accelerate.utils.modeling.check_device_map(
        meta_model(config, "bfloat16"), dict(made.device_map)
    )
    if mode == "none":
        assert made.weights == pytest.approx(whole.weights, rel=0.01)
    assert made.fits or "disk" not in names


def test_earlier_devices_are_filled_first_and_a_larger_cache_leaves_them_less() -> None:
    free = {"cuda:0": 80 * GIB, "cpu": 200 * GIB}
    small = planned(llama_70b(), free=free, max_batch=1)
    large = planned(llama_70b(), free=free, max_batch=16, context=8192)
    for made in (small, large):
        assert made.fits
        assert made.devices[0].free - made.devices[0].needed < 2 * GIB
    assert large.devices[1].weights > small.devices[1].weights + 30 * GIB
    assert small.max_context > 60_000
    assert planned(llama_70b(), free=free, max_batch=1, context=small.max_context).fits


def test_what_shares_weights_lies_together() -> None:
    made = planned(gemma3_270m(), free={"cuda:0": 500 * 2**20, "cpu": GIB})
    assert made.device_map["lm_head"] == made.device_map["model.embed_tokens"]
    whole = planned(gemma3_270m())
    assert made.weights == pytest.approx(whole.weights, rel=0.001)


def test_a_plan_that_does_not_fit_names_devices_over_which_it_would() -> None:
    free = {"cuda:0": 80 * GIB, "cuda:1": 80 * GIB, "cpu": GIB, "disk": 1000 * GIB}
    two = ik.plan(llama_70b(), device="cuda:0", free=free)
    assert two.spread == ("cuda:0", "cuda:1")
    assert "Over device=['cuda:0', 'cuda:1'] it fits." in two.explain()
    assert planned(llama_70b(), free=dict(list(free.items())[:2])).fits
    small = {**free, "cuda:1": 40 * GIB}
    three = ik.plan(llama_70b(), device="cuda:0", free={**small, "cpu": 90 * GIB})
    assert three.spread == ("cuda:0", "cuda:1", "cpu")
    assert "weights on cpu travel at every step, so it is slow" in three.explain()
    four = ik.plan(llama_70b(), device="cuda:0", free=small)
    assert four.spread == ("cuda:0", "cuda:1", "cpu", "disk")
    busy = ik.plan(llama_70b(), device="cuda:0", free={**free, "cuda:1": GIB, "cpu": 90 * GIB})
    assert busy.spread == ("cuda:0", "cpu")
    slow = {"device": "cpu", "dtype": "bfloat16"}  # "auto" is float32 on an older processor
    cpu = ik.plan(llama_70b(), **slow, free={"cpu": 40 * GIB, "disk": 1000 * GIB})
    assert cpu.spread == ("cpu", "disk")
    nowhere = ik.plan(llama_70b(), **slow, free={"cpu": GIB, "disk": 1000 * GIB})
    assert nowhere.spread == ()


def test_a_limit_is_told_from_what_is_free() -> None:
    free = {"cuda:0": 80 * GIB}
    made = ik.plan(llama_70b(), device="cuda:0", free=free, max_memory={"cuda:0": "6GiB"})
    assert "6.0 GiB are what max_memory allows" in made.explain()
    assert made.devices[0].total == 80 * GIB
    even = planned(llama_70b(), free={"cuda:0": 100 * GIB, "cuda:1": 100 * GIB})
    less = planned(
        llama_70b(),
        free={"cuda:0": 100 * GIB, "cuda:1": 100 * GIB},
        max_memory={"cuda:0": 50 * GIB},
    )
    assert less.devices[0].weights < even.devices[0].weights
    assert less.fits


# -- on a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def gpu_limit(tiny_model: Callable[[str], Path]) -> Callable[[str], dict[str, int]]:
    def limits(arch: str) -> dict[str, int]:
        plan = ik.plan(
            tiny_model(arch),
            device="cuda:0",
            dtype="float32",
            context=128,
            max_batch=3,
            prefill_chunk=16,
        )
        return {"cuda:0": plan.total - plan.weights // 2}

    return limits


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("names", [("cuda:0", "cpu"), ("cuda:0", "cpu", "disk")], ids="+".join)
def test_offloaded_weights_run_on_the_gpu(
    tiny_model: Callable[[str], Path],
    gpu_limit: Callable[[str], dict[str, int]],
    arch: str,
    names: tuple[str, ...],
) -> None:
    folder, limits = tiny_model(arch), gpu_limit(arch)
    if "disk" in names:
        limits["cpu"] = 2**17
    wanted = own_tokens(folder, "cuda", torch.float32, 12)
    before = tensor_bytes("cuda"), tensor_bytes("cpu")
    with ik.load(folder, device=list(names), max_memory=limits, **OPTIONS) as model:
        assert model.fallback is None
        gpu, cpu, *_ = model.plan.devices
        assert cpu.weights or arch == "mixtral"
        assert tensor_bytes("cuda") - before[0] == pytest.approx(
            gpu.weights + gpu.kv_cache, rel=0.1
        )
        assert tensor_bytes("cpu") - before[1] == pytest.approx(cpu.weights, rel=0.1, abs=2**12)
        for name, parameter in module_of(model).named_parameters():
            where = next(d for m, d in model.plan.device_map.items() if lies_in(name, {m}))
            assert parameter.device.type == ("cuda" if where == "cuda:0" else "meta")
        assert {str(d) for d in model._engine.runner._devices} == {"cuda:0"}
        assert tokens(model) == wanted
    assert tensor_bytes("cuda") <= before[0] + 2**16


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_on_the_gpu_what_is_offloaded_stays_unquantized(
    tiny_model: Callable[[str], Path], gpu_limit: Callable[[str], dict[str, int]], mode: str
) -> None:
    folder, limits = tiny_model("gemma3"), gpu_limit("gemma3")
    with ik.load(folder, device=["cuda:0", "cpu"], max_memory=limits, **OPTIONS) as model:
        said = tokens(model)
        model.quantize(mode)
        tokens(model)
        gpu = model.plan.devices[0]
        assert tensor_bytes("cuda") == pytest.approx(gpu.weights + gpu.kv_cache, rel=0.15)
        assert tokens(model.quantize("none")) == said
