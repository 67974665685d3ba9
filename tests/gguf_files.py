"""Small GGUF files of real architectures, written with gguf's own writer, for tests.

The tensors are those of the random models in architectures.py under llama.cpp's names. llama.cpp
also reorders some (rotary halves); these files do not, for they are only ever compared with what
transformers reads from the same file.
"""

from __future__ import annotations

import json
from pathlib import Path

import architectures
import gguf
import numpy as np
import torch
import transformers

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "lfm2": gguf.MODEL_ARCH.LFM2,
}


def write(
    path: Path, arch: str = "llama", *, split_count: int = 0, vocabulary: bool = True
) -> Path:
    """Write a GGUF of about 1 MB, matrices in Q8_0 where their rows allow it, to ``path``."""
    model = _model(arch)
    config = model.config.to_dict()
    gguf_arch = ARCHITECTURES[arch]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf_arch])
    layers = config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"]
    _add_shape(writer, arch, config, layers)
    if split_count:
        writer.add_uint16("split.count", split_count)
    if vocabulary:
        _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf_arch, layers)
    tied = set(model.all_tied_weights_keys)
    for name, values in model.state_dict().items():
        if name in tied:
            continue
        for gguf_name, array in _renamed(name, values.numpy(), names, arch):
            _add_tensor(writer, gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _model(arch: str) -> transformers.PreTrainedModel:
    if arch == "qwen3_moe":
        # transformers does not read the experts' width from a GGUF: it must be the default.
        config = architectures.CONFIGS[arch]()
        config.moe_intermediate_size = transformers.Qwen3MoeConfig().moe_intermediate_size
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if arch != "lfm2":
        return architectures.build(arch)[0]
    config = transformers.Lfm2Config(
        vocab_size=architectures.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=architectures.PAD,
        bos_token_id=architectures.BOS,
        eos_token_id=architectures.EOS,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _add_shape(writer: gguf.GGUFWriter, arch: str, config: dict, layers: int) -> None:
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    kv_heads = config.get("num_key_value_heads", heads)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * hidden)
    if arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if arch == "lfm2":
        kinds = config["layer_types"]
        writer.add_head_count_kv([kv_heads if k == "full_attention" else 0 for k in kinds])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        return
    writer.add_head_count_kv(kv_heads)
    head = config.get("head_dim") or hidden // heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    if arch == "qwen3_moe":
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    bpe = json.loads(architectures.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    special = len(architectures.SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * special + [1] * (len(tokens) - special))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(architectures.BOS)
    writer.add_eos_token_id(architectures.EOS)
    writer.add_pad_token_id(architectures.PAD)


def _renamed(
    name: str, values: np.ndarray, names: gguf.TensorNameMap, arch: str
) -> list[tuple[str, np.ndarray]]:
    layer = name.split(".")[2] if ".layers." in name else ""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(values, 2, axis=1)
        return [
            (f"blk.{layer}.ffn_gate_exps.weight", gate),
            (f"blk.{layer}.ffn_up_exps.weight", up),
        ]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{layer}.ffn_down_exps.weight", values)]
    stem, _, suffix = name.rpartition(".")
    found = names.get_name(stem) or names.get_name(stem.removeprefix("model."))
    assert found is not None, f"gguf knows no name for {name}"
    if arch == "gpt2" and values.ndim == 2 and ".h." in name:
        values = values.T
    if arch == "lfm2" and values.ndim == 3:
        values = values[:, 0]
    return [(f"{found}.{suffix}", np.ascontiguousarray(values))]


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    if values.ndim >= 2 and values.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.astype(np.float32))
