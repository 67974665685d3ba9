"""memory: what a plan says is what transformers, bitsandbytes and the engine really take."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import psutil
import pytest
import torch
import transformers
from architectures import CONFIGS, build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from inferkit import kernels
from inferkit.demand import Demand
from inferkit.devices import find_device
from inferkit.engine.runner import Chunk, SlottedRunner
from inferkit.errors import DeviceError, DoesNotFitError, OptionError, UnsupportedModelError
from inferkit.footprint import WeightFormat, asked_format, meta_model, weight_bytes
from inferkit.kv import LayerKV, kv_geometry, read_geometry
from inferkit.memory import MemoryPlan, context_limit, plan, plan_config

GIB = 2**30
PLAIN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
}
LATENT = {
    **PLAIN,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def _deepseek_v3():
    return transformers.DeepseekV3Config(**LATENT)


def _qwen3_next():
    return transformers.Qwen3NextConfig(
        **PLAIN,
        head_dim=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


def _mamba():
    return transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=3, vocab_size=384, state_size=8
    )


def _falcon_h1():
    """Attention and a state-space mixer side by side in every layer."""
    return transformers.FalconH1Config(
        **PLAIN, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8
    )


def _llama4():
    return transformers.Llama4TextConfig(
        **PLAIN, head_dim=16, num_local_experts=2, attention_chunk_size=32, intermediate_size_mlp=64
    )


def _gpt_oss():
    return transformers.GptOssConfig(**PLAIN, head_dim=16, sliding_window=16, num_local_experts=4)


def _gemma3n():
    """The last layers read the KV cache of earlier ones."""
    return transformers.Gemma3nTextConfig(
        **PLAIN,
        vocab_size_per_layer_input=384,
        hidden_size_per_layer_input=16,
        head_dim=16,
        num_kv_shared_layers=2,
        sliding_window=16,
        laurel_rank=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )


def _tied_gemma3():
    config = CONFIGS["gemma3"]()
    config.tie_word_embeddings = True
    return config


SMALL = {
    **CONFIGS,
    "deepseek_v3": _deepseek_v3,
    "qwen3_next": _qwen3_next,
    "mamba": _mamba,
    "falcon_h1": _falcon_h1,
    "llama4": _llama4,
    "gpt_oss": _gpt_oss,
    "gemma3n": _gemma3n,
    "gemma3_tied": _tied_gemma3,
}


def gemma3_270m():
    return transformers.Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        sliding_window=512,
        max_position_embeddings=32768,
    )


def llama_70b():
    return transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    )


def planned(config, **changes) -> MemoryPlan:
    settings = {
        "quantize": "none",
        "context": 1024,
        "max_batch": 4,
        "dtype": "bfloat16",
        "free": {"cuda:0": 80 * GIB},
    } | changes
    form = asked_format(settings.pop("quantize"))
    return plan_config(config, form=form, devices=list(settings["free"]), **settings)


# -- KV cache ---------------------------------------------------------------------------------


def cached_for_real(config, dtype: torch.dtype, tokens: int) -> int:
    """Bytes in transformers' own cache after a real forward pass on the CPU."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    cache = DynamicCache(config=model.config)
    name = "cache_params" if isinstance(config, transformers.MambaConfig) else "past_key_values"
    with torch.no_grad():
        model(torch.arange(tokens)[None] + 3, use_cache=True, **{name: cache})
    held = []
    for layer in cache.layers:
        held += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += dict(getattr(layer, "conv_states", None) or {}).values()
        held += dict(getattr(layer, "recurrent_states", None) or {}).values()
    return sum(t.nbytes for t in held if t is not None)


def cached_by_geometry(layers: tuple[LayerKV, ...], itemsize: int, tokens: int) -> int:
    """The same from the geometry; transformers keeps the last window - 1 tokens of a window."""
    total = 0
    for x in layers:
        kept = tokens if x.window is None else min(tokens, x.window - 1)
        total += kept * x.heads * (x.key_dim + x.value_dim) * itemsize + x.state_bytes
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", SMALL)
def test_geometry_gives_the_bytes_that_transformers_really_caches(arch, dtype):
    real = cached_for_real(SMALL[arch](), dtype, tokens=40)
    layers = kv_geometry(SMALL[arch](), str(dtype).removeprefix("torch."))
    assert cached_by_geometry(layers, dtype.itemsize, tokens=40) == real


def usual_formula(config, tokens: int, itemsize: int) -> int:
    text = config.get_text_config(decoder=True)
    per_head = text.hidden_size / text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * heads * per_head * text.num_hidden_layers * tokens * itemsize)


@pytest.mark.parametrize(
    ("arch", "right"),
    [
        ("llama", True),
        ("gpt_neox", True),
        ("qwen3", False),  # explicit head_dim
        ("gemma3", False),  # head_dim and sliding layers
        ("mistral", False),  # window
        ("deepseek_v3", False),  # latent attention
        ("qwen3_next", False),  # linear-attention layers
        ("gemma3n", False),  # layers that share
    ],
)
def test_the_usual_formula_is_wrong_where_layers_are_not_plain(arch, right):
    config = SMALL[arch]()
    real = cached_for_real(config, torch.float32, tokens=40)
    assert (usual_formula(config, 40, 4) == real) is right


def test_each_kind_of_layer_is_told_apart():
    def kinds(arch):
        return [x.kind for x in kv_geometry(SMALL[arch](), "float32")]

    assert kinds("llama") == ["full"] * 2
    assert kinds("gemma3") == ["sliding", "sliding", "full", "sliding"]
    assert kinds("llama4") == ["chunked"] * 3 + ["full"]
    assert kinds("qwen3_next") == ["linear"] * 3 + ["full"]
    assert kinds("mamba") == ["linear"] * 3
    assert kinds("gemma3n") == ["sliding", "full", "none", "none"]
    both = kv_geometry(_falcon_h1(), "float32")[0]
    assert both.kind == "full"
    assert both.state_bytes > 0


def test_a_sparse_attention_indexer_is_counted_per_token():
    config = transformers.DeepseekV32Config(
        **LATENT, index_topk=8, index_n_heads=2, index_head_dim=40
    )
    layer = kv_geometry(config, "bfloat16")[0]
    assert (layer.heads, layer.key_dim + layer.value_dim, layer.indexer_dim) == (1, 24 + 16, 40)
    assert layer.bytes(context=63, rows=1, itemsize=2) == 64 * (24 + 16 + 40) * 2


def test_a_full_layer_holds_the_context_and_a_ring_its_window_and_one_chunk():
    full, ring = LayerKV("full", 2, 16, 16), LayerKV("sliding", 2, 16, 16, window=100)
    assert full.capacity(1000) == 1024
    assert full.capacity(1024) == 1088
    assert ring.capacity(4096, prefill_chunk=512) == 640
    assert ring.capacity(4096, prefill_chunk=29) == 128
    assert ring.capacity(200) == full.capacity(200) == 256
    assert LayerKV("linear", state_bytes=10).bytes(4096, rows=3, itemsize=2) == 30
    assert LayerKV("none").bytes(4096, rows=3, itemsize=2) == 0


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral", "deepseek_v3"])
def test_the_plan_counts_the_cache_that_the_engine_allocates(arch):
    from inferkit.engine.cache import SlotCache

    made = planned(SMALL[arch](), context=700, max_batch=3, prefill_chunk=64)
    geometry = kv_geometry(SMALL[arch](), "bfloat16")
    cache = SlotCache(
        geometry,
        slots=3,
        context=700,
        prefill_chunk=64,
        dtype=torch.bfloat16,
        devices=[torch.device("cpu")] * len(geometry),
    )
    assert made.kv_cache == cache.nbytes


@pytest.mark.parametrize(
    "config",
    [
        transformers.RwkvConfig(hidden_size=64, num_hidden_layers=2, vocab_size=384),
        transformers.RecurrentGemmaConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=384
        ),
    ],
    ids=["rwkv", "recurrent_gemma"],
)
def test_an_architecture_with_a_hidden_state_of_its_own_is_refused_by_name(config):
    with pytest.raises(UnsupportedModelError, match=r"(Rwkv|RecurrentGemma)ForCausalLM keeps"):
        kv_geometry(config, "float32")


@pytest.mark.parametrize(
    "config", [transformers.T5Config(), transformers.BartConfig(), transformers.ViTConfig()]
)
def test_what_is_no_causal_language_model_is_refused_by_name(config):
    with pytest.raises(UnsupportedModelError, match=config.model_type):
        planned(config)


class OffMeta(transformers.LlamaForCausalLM):
    """Looks at a value on the way, as model code from the hub may; meta tensors have none."""

    def forward(self, input_ids=None, **kwargs):
        assert int(input_ids.max()) >= 0
        return super().forward(input_ids=input_ids, **kwargs)


def test_plain_attention_that_cannot_run_on_meta_is_read_from_its_projections():
    config = CONFIGS["llama"]()
    with torch.device("meta"):
        model = OffMeta(config)
    assert read_geometry(model) == kv_geometry(config, "float32")
    model.config.head_dim = 24  # the config and the projections now disagree
    with pytest.raises(UnsupportedModelError, match="OffMeta does not run on the meta device"):
        read_geometry(model)


# -- weights ----------------------------------------------------------------------------------


def held_by(model) -> int:
    """Bytes of a loaded model, with what bitsandbytes keeps beside its weights."""
    total = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        scales = getattr(parameter, "SCB", None)
        total += 0 if scales is None else scales.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.code.nbytes
            if state.nested:
                total += state.offset.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes
    return total


def bnb(mode: str, double: bool = False) -> BitsAndBytesConfig | None:
    if mode == "none":
        return None
    if mode == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=mode, bnb_4bit_use_double_quant=double
    )


def loaded(config, folder: Path, dtype: torch.dtype, how: BitsAndBytesConfig | None):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=how, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("mode", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize(
    "arch",
    ["llama", "gemma3_tied", "phi3", "gpt_neox", "gpt2", "opt", "mixtral", "deepseek_v3", "mamba"],
)
def test_weights_are_what_loading_them_takes(arch, mode, tmp_path):
    real = held_by(loaded(SMALL[arch](), tmp_path, torch.bfloat16, bnb(mode)))
    assert planned(SMALL[arch](), quantize=mode).weights == real


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["deepseek_v3", "gpt_oss"])
def test_tensors_that_transformers_keeps_in_fp32_are_counted_so(arch, dtype, tmp_path):
    real = held_by(loaded(SMALL[arch](), tmp_path, dtype, None))
    name = str(dtype).removeprefix("torch.")
    assert planned(SMALL[arch](), dtype=name).weights == real


def test_a_checkpoint_already_quantized_by_bitsandbytes_keeps_its_format(tmp_path):
    config = CONFIGS["llama"]()
    real = held_by(loaded(config, tmp_path, torch.bfloat16, bnb("nf4", double=True)))
    config.quantization_config = bnb("nf4", double=True)
    made = planned(config)
    assert (made.weights, made.quantize, list(made.totals)) == (real, "nf4", ["nf4"])
    with pytest.raises(OptionError, match="stored quantized, as 'nf4"):
        planned(config, quantize="int8")


def test_a_checkpoint_quantized_by_another_method_is_counted_unpacked_and_says_so():
    config = CONFIGS["llama"]()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    made = planned(config)
    assert made.weights == planned(CONFIGS["llama"]()).weights
    assert "stored as gptq" in made.explain()


def test_the_demo_model_takes_536_mb_and_at_nf4_385_mb_plus_a_scale_per_64_weights():
    whole = planned(gemma3_270m()).weights
    assert whole == pytest.approx(536e6, rel=0.01)
    linear = (whole - 2 * 262144 * 640) / 2  # all weights but the embedding
    scales = 4 * linear / 64
    nf4 = planned(gemma3_270m(), quantize="nf4").weights
    assert nf4 - scales == pytest.approx(385e6, rel=0.005)


# -- activations ------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations create and that are still alive; keeps the peak."""

    def __init__(self, held) -> None:
        super().__init__()
        self.held = {t.untyped_storage()._cdata for t in held}
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self.held:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "phi3", "mixtral"])
def test_activations_bound_the_measured_peak_of_a_prefill_step(arch):
    chunk, past = 256, 512
    model, _ = build(arch)
    model = model.to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 384, (1, past)), past_key_values=cache)
        with LiveBytes([*model.parameters(), *model.buffers()]) as watch:
            tokens = torch.randint(3, 384, (1, chunk))
            model(tokens, past_key_values=cache, logits_to_keep=1)
    made = planned(CONFIGS[arch](), context=past + chunk, max_batch=1, prefill_chunk=chunk)
    grown = made.kv_cache  # a dynamic cache makes new tensors; the slotted one does not
    assert watch.peak - grown <= made.activations
    assert made.activations < 12 * watch.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_activations_bound_the_measured_peak_of_the_engines_own_attention(arch, dtype, monkeypatch):
    """Caps (Gemma 2) and sinks (GPT-OSS) keep it from torch's fused kernels.

    inferkit's own, which take less, may not be there.
    """
    monkeypatch.setattr(kernels, "_outcome", ["torch's are measured"])
    chunk, context = 128, 4000
    model, _ = build(arch)
    model = model.to(dtype)
    name = str(dtype).removeprefix("torch.")
    geometry = kv_geometry(model.config, name)
    runner = SlottedRunner(model, geometry, slots=1, context=context, prefill_chunk=chunk)
    tokens = torch.randint(3, 384, (chunk,)).tolist()
    runner.prefill([Chunk(0, tokens, 0)])
    with LiveBytes([*model.parameters(), *model.buffers()]) as watch:
        runner.prefill([Chunk(0, tokens, context - chunk)])
    settings = {"context": context, "max_batch": 1, "prefill_chunk": chunk, "dtype": name}
    made = planned(model.config, **settings)
    assert watch.peak <= made.activations
    assert made.activations < 4 * watch.peak


def test_larger_steps_and_contexts_need_more_memory():
    base = planned(llama_70b())
    assert planned(llama_70b(), prefill_chunk=1024).activations > base.activations
    assert planned(llama_70b(), context=2048).activations > base.activations
    assert planned(llama_70b(), max_batch=8).activations > base.activations
    assert planned(llama_70b(), quantize="nf4").activations > base.activations


# -- plans ------------------------------------------------------------------------------------


def test_a_70b_model_is_planned_in_seconds_without_allocating_it():
    process = psutil.Process()
    planned(CONFIGS["llama"]())  # imports
    before, start = process.memory_info().rss, time.perf_counter()
    made = planned(llama_70b(), context=8192, max_batch=16)
    assert time.perf_counter() - start < 15
    assert process.memory_info().rss - before < 500 * 2**20
    layer = 8192 * (8192 + 1024) * 2 + 3 * 8192 * 28672 + 2 * 8192
    parameters = 80 * layer + 2 * 128256 * 8192 + 8192
    assert made.weights == pytest.approx(2 * parameters, rel=1e-6)
    assert made.kv_cache == 80 * 2 * 8 * 128 * 2 * 16 * (8192 + 64)
    assert not made.fits


def test_a_full_size_mixture_of_experts_with_latent_attention_is_planned():
    made = planned(transformers.DeepseekV3Config(), context=1023, max_batch=1)
    assert made.weights == pytest.approx(2 * 671e9, rel=0.01)
    assert made.kv_cache == 61 * 1024 * (512 + 64) * 2
    # its experts are one fused parameter each, which bitsandbytes does not quantize
    assert made.totals["nf4"] > 0.95 * made.totals["none"]


def test_a_plan_that_fits_says_how_far_it_could_go():
    made = planned(CONFIGS["llama"](), context=100, free={"cuda:0": 4 * 2**20})
    assert made.fits
    assert made.require() is made
    assert 100 < made.max_context < 4096
    assert 4 < made.max_batch_fit < 4096
    again = {"context": 100, "free": {"cuda:0": 4 * 2**20}}
    assert planned(CONFIGS["llama"](), **again | {"context": made.max_context}).fits
    assert not planned(CONFIGS["llama"](), **again | {"context": made.max_context + 1}).fits
    assert planned(CONFIGS["llama"](), **again, max_batch=made.max_batch_fit).fits
    assert not planned(CONFIGS["llama"](), **again, max_batch=made.max_batch_fit + 1).fits


def test_the_largest_context_is_at_most_the_models_own():
    assert planned(CONFIGS["llama"]()).max_context == 4096
    assert context_limit(CONFIGS["gpt2"]()) == 1024
    assert context_limit(_mamba()) is None
    assert planned(_mamba(), context=500_000).max_context == 1 << 20


def test_a_model_that_does_not_fit_is_refused_with_the_numbers_and_the_mode_that_fits():
    config = transformers.Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
    )
    free = {"cuda:0": int(11.2 * GIB)}
    made = planned(config, model="Qwen/Qwen3-8B", max_batch=1, free=free)
    with pytest.raises(DoesNotFitError) as error:
        made.require()
    assert error.value.plan is made
    text = str(error.value)
    assert text.startswith("Qwen/Qwen3-8B needs 15.")
    assert "GiB on cuda:0 and 11.2 GiB are free; quantize='int8' needs" in text
    nf4 = planned(config, quantize="nf4", max_batch=1, free=free)
    assert nf4.fits
    assert made.alternatives["nf4"] == nf4.total
    assert f"quantize='nf4' needs {nf4.total / GIB:.1f} GiB" in text


def test_advice_falls_back_to_a_smaller_context_batch_or_model():
    config = CONFIGS["llama"]
    weights = planned(config()).weights
    less = planned(config(), context=4096, max_batch=64, free={"cuda:0": weights + 40 * 2**20})
    assert f"max_batch={less.max_batch_fit} fits at context=4096" in less.explain()
    assert f"context={less.max_context} fits at max_batch=64" in less.explain()
    none = planned(config(), free={"cuda:0": weights // 4})
    assert (none.max_context, none.max_batch_fit, dict(none.alternatives)) == (0, 0, {})
    assert "use a smaller model" in none.explain()


def test_a_near_miss_is_explained_with_digits_that_differ():
    need = planned(llama_70b()).total
    text = planned(llama_70b(), free={"cuda:0": need - 50 * 2**20}).explain()
    needed, free = text.split("needs ")[1].split(" on cuda:0 and ")
    assert needed != free.split(" are free")[0]


def test_layers_are_spread_in_order_and_in_proportion_of_free_memory():
    single = planned(llama_70b(), free={"cuda:0": 400 * GIB})
    made = planned(llama_70b(), free={"cuda:1": 150 * GIB, "cuda:0": 50 * GIB})
    first, second = made.devices
    assert (first.name, second.name) == ("cuda:1", "cuda:0")
    assert first.weights + second.weights == single.weights
    assert first.kv_cache + second.kv_cache == single.kv_cache
    assert first.weights / second.weights == pytest.approx(3, rel=0.1)
    assert first.kv_cache / second.kv_cache == pytest.approx(3, rel=0.1)
    places = [made.device_map[f"model.layers.{i}"] for i in range(80)]
    assert places == sorted(places, reverse=True)
    accelerate.utils.modeling.check_device_map(
        meta_model(llama_70b(), "bfloat16"), dict(made.device_map)
    )


def test_a_split_counts_quantized_and_tied_weights_once():
    free = {"cuda:0": GIB, "cuda:1": GIB}
    for mode in ("none", "int8", "nf4"):
        made = planned(gemma3_270m(), quantize=mode, free=free)
        assert made.weights == planned(gemma3_270m(), quantize=mode).weights
        assert made.device_map["lm_head"] == made.device_map["model.embed_tokens"] == "cuda:0"
        assert all(d.weights for d in made.devices)


def test_one_full_device_is_enough_not_to_fit():
    made = planned(llama_70b(), free={"cuda:0": 200 * GIB, "cuda:1": 8 * GIB})
    assert made.fits
    tight = planned(llama_70b(), max_batch=64, context=8192, free={"cuda:0": GIB, "cuda:1": GIB})
    assert not tight.fits
    assert sum(d.fits for d in tight.devices) == 0


def test_modules_that_are_placed_already_stay_where_they_are():
    even = {"cuda:0": 200 * GIB, "cuda:1": 200 * GIB}
    before = planned(llama_70b(), free=even)
    uneven = {"cuda:0": 250 * GIB, "cuda:1": 100 * GIB}
    assert planned(llama_70b(), free=uneven).device_map != before.device_map
    after = planned(llama_70b(), free=uneven, context=64, device_map=before.device_map)
    assert after.device_map == before.device_map
    assert [d.weights for d in after.devices] == [d.weights for d in before.devices]
    assert after.within(before)
    assert not before.within(after)


def test_what_will_be_free_and_what_is_promised_change_what_a_device_says():
    def free(**adjust):
        settings = {"form": WeightFormat("none"), "context": 64, "max_batch": 1, "dtype": "float32"}
        names = list(adjust) or ["cpu"]
        made = plan_config(CONFIGS["llama"](), devices=names, adjust=adjust, **settings)
        assert made.devices[0].total == free_now.total
        return made.devices[0].free

    free_now = find_device("cpu")
    assert free(cpu=-(1 << 60)) == 0
    assert free(cpu=1 << 40) - free_now.free == pytest.approx(1 << 40, rel=0.01)


def test_planning_leaves_the_config_as_it_was():
    config = CONFIGS["mixtral"]()
    config.quantization_config = {"quant_method": "gptq"}
    before = config.to_dict()
    planned(config)
    assert config.to_dict() == before
    assert config._attn_implementation != "eager"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "int3"}, r"quantize='int3'.*'none', 'int8', 'nf4', 'fp4'"),
        ({"context": 5000}, r"context=5000.*4096"),
        ({"context": 0}, r"context=0"),
        ({"context": 1}, r"context=1 .*at least 2: a prompt token and a token that follows"),
        ({"context": 1.5}, r"context=1.5"),
        ({"max_batch": 0}, r"max_batch=0"),
        ({"max_batch": -(10**5000)}, "max_batch is out of range"),
        ({"context": 10**400}, "context is out of range"),
        ({"max_batch": True}, r"max_batch=True"),
        ({"prefill_chunk": -1}, r"prefill_chunk=-1"),
    ],
)
def test_an_option_without_sense_is_refused_with_its_value(changes, said):
    with pytest.raises(OptionError, match=said):
        planned(CONFIGS["llama"](), **changes)


def test_plan_takes_a_config_and_fills_in_device_dtype_and_context():
    made = plan(CONFIGS["gpt2"](), device="cpu")
    assert [d.name for d in made.devices] == ["cpu"]
    assert made.context == 1024
    assert 0 < made.devices[0].free <= made.devices[0].total
    assert made.architecture == "GPT2LMHeadModel"
    assert plan(CONFIGS["llama"](), device="cpu", dtype="fp32").dtype == "float32"


def test_plan_reads_the_config_of_a_local_folder(tmp_path):
    model, tokenizer = build("qwen3")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = plan(str(tmp_path), device="cpu", dtype="bf16")
    assert made.model == str(tmp_path)
    assert made.weights == planned(CONFIGS["qwen3"]()).weights


def test_a_path_is_a_path_where_the_same_word_is_a_model(tmp_path, monkeypatch):
    model, _ = build("gpt2")
    model.save_pretrained(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    made = plan(Path("demo"), device="cpu")
    assert (made.architecture, made.model) == ("GPT2LMHeadModel", "demo")


def test_an_option_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(OptionError, match=r"Unknown option 'contxt'; did you mean 'context'\?"):
        plan(CONFIGS["llama"](), contxt=8)


def test_a_plan_for_the_cpu_asks_no_gpu(monkeypatch):
    def busy(index):
        raise torch.AcceleratorError("CUDA error: all devices are busy")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert plan(CONFIGS["llama"](), device="cpu", dtype="float32").fits
    with pytest.raises(DeviceError, match="cuda:0 does not answer"):
        plan(CONFIGS["llama"](), device="cuda", dtype="float32")


def test_plan_refuses_devices_that_are_not_attached():
    with pytest.raises(DeviceError, match="cuda:63"):
        plan(CONFIGS["llama"](), device="cuda:63")


def test_a_plan_reads_as_text_html_and_json():
    made = planned(CONFIGS["llama"](), free={"cuda:0": GIB, "cpu": GIB})
    assert "MiB" in repr(made)
    assert made.explain() in repr(made)
    assert "`" not in repr(made) + made._repr_html_()
    assert made._repr_html_().count("<tr>") == 3
    data = json.loads(json.dumps(made.to_dict()))
    assert data["total"] == sum(d["needed"] for d in data["devices"]) == made.total
    assert data["fits"] is True
    assert data["max_batch_fit"] == made.max_batch_fit


def test_weights_of_a_plan_are_the_sum_of_its_tensors():
    model = meta_model(CONFIGS["llama"](), "bfloat16")
    form = WeightFormat("int8")
    sizes = weight_bytes(model, form)
    memory = {"cpu": (GIB, GIB)}
    demand = Demand.of(model, read_geometry(model), form, memory, prefill_chunk=64)
    assert demand.at(64, 1)[0].weights == sum(sizes.values())


def test_importing_memory_imports_neither_torch_nor_transformers():
    code = "import sys, inferkit.memory; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_one_thread_at_a_time_builds_a_model(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes the dtype torch's default meanwhile, and puts back what it found."""
    make = AutoModelForCausalLM.from_config
    building: list[int] = []
    most: list[int] = []

    def slow(*args: Any, **options: Any) -> Any:
        building.append(1)
        most.append(len(building))
        time.sleep(0.02)
        try:
            return make(*args, **options)
        finally:
            building.pop()

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", slow)
    folder = tiny_model("llama")
    threads = [
        threading.Thread(target=plan, args=(folder,), kwargs={"dtype": dtype})
        for dtype in ("bfloat16", "float32", "float16") * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) >= len(threads)
    assert max(most) == 1
    assert torch.get_default_dtype() is torch.float32
