"""Small random models of real architectures, with a tokenizer, for tests and benchmarks.

The weights are random but wide (see ``WIDE``): greedy output of a narrow random model falls into
repeating one token, and a test that compares such output could not tell a right engine from a
wrong one. Building one takes some hundredths of a second; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<bos>", "<eos>"]
VOCABULARY = 384
WIDE = 0.25
CONTEXT = 4096
LEARNED_CONTEXT = 1024
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Once upon a time there was a small model that learned to count: one, two, three, four.",
    "A prompt is a question; a completion is an answer; a request is both while it runs.",
    "Paris is the capital of France, and Rome is the capital of Italy, as everybody knows.",
    "Crème brûlée, naïve façade, 東京 and 🙂: characters of several bytes are split over tokens.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@cache
def _bpe() -> str:
    """A byte-level BPE of VOCABULARY tokens trained on CORPUS, as JSON."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A fresh byte-level tokenizer of 384 tokens with pad, bos, eos and a chat template."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def _rotary(**changes: Any) -> dict[str, Any]:
    """What the Llama-like configs share: grouped queries (4 heads over 2), rotary positions."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": WIDE,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **changes,
    }


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**_rotary())


def _qwen3() -> transformers.PretrainedConfig:
    # head_dim is explicit and not hidden_size / heads, as in the published Qwen3 models.
    return transformers.Qwen3Config(**_rotary(head_dim=32))


def _gemma3() -> transformers.PretrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(
        **_rotary(
            num_hidden_layers=4,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            layer_types=kinds,
        )
    )


def _mistral() -> transformers.PretrainedConfig:
    return transformers.MistralConfig(**_rotary(sliding_window=8))


def _phi3() -> transformers.PretrainedConfig:
    return transformers.Phi3Config(**_rotary(sliding_window=None))


def _mixtral() -> transformers.PretrainedConfig:
    return transformers.MixtralConfig(**_rotary(num_local_experts=4, num_experts_per_tok=2))


def _qwen3_moe() -> transformers.PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        **_rotary(head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    )


def _gpt_neox() -> transformers.PretrainedConfig:
    shared = _rotary()
    del shared["num_key_value_heads"]
    return transformers.GPTNeoXConfig(**shared)


def _opt() -> transformers.PretrainedConfig:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LEARNED_CONTEXT,
        init_std=WIDE,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _gpt2() -> transformers.PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=LEARNED_CONTEXT,
        initializer_range=WIDE,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _gemma2() -> transformers.PretrainedConfig:
    # Both caps are narrow enough to bend the scores and logits of these weights.
    return transformers.Gemma2Config(
        **_rotary(
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
        )
    )


def _cohere2() -> transformers.PretrainedConfig:
    # Sliding layers are rotary, the full one has no positions.
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Cohere2Config(
        **_rotary(num_hidden_layers=3, sliding_window=8, layer_types=kinds, logit_scale=1.0)
    )


def _phi3_window() -> transformers.PretrainedConfig:
    return transformers.Phi3Config(**_rotary(sliding_window=8))


def _phi3_long() -> transformers.PretrainedConfig:
    # Past 24 tokens, all rotary positions are stretched, those of the prompt too.
    half = 64 // 4 // 2
    return transformers.Phi3Config(
        **_rotary(
            original_max_position_embeddings=24,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * half,
                "long_factor": [4.0] * half,
                "original_max_position_embeddings": 24,
            },
        )
    )


def _gpt_oss() -> transformers.PretrainedConfig:
    return transformers.GptOssConfig(
        **_rotary(
            head_dim=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def _deepseek_v3() -> transformers.PretrainedConfig:
    # Latent attention: keys of 24, values of 16 elements.
    return transformers.DeepseekV3Config(
        **_rotary(
            num_key_value_heads=4,
            q_lora_rank=32,
            kv_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
        )
    )


def _llama4(**changes: Any) -> transformers.PretrainedConfig:
    return transformers.Llama4TextConfig(
        **_rotary(
            num_hidden_layers=4,
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=2,
            attention_chunk_size=8,
            **changes,
        )
    )


def _llama4_tuned() -> transformers.PretrainedConfig:
    # Beyond floor_scale positions, the layers without rotary positions sharpen their attention.
    return _llama4(floor_scale=24, attn_scale=1.0)


def _mamba() -> transformers.PretrainedConfig:
    return transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=WIDE,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _bloom() -> transformers.PretrainedConfig:
    return transformers.BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        n_layer=2,
        n_head=4,
        initializer_range=WIDE,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _falcon() -> transformers.PretrainedConfig:
    return transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=WIDE,
        alibi=True,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _qwen3_next() -> transformers.PretrainedConfig:
    # Three layers of linear attention and one of full attention.
    return transformers.Qwen3NextConfig(
        **_rotary(
            num_hidden_layers=4,
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
    )


def _gemma3n() -> transformers.PretrainedConfig:
    # The last two layers read the keys and values of the first two.
    return transformers.Gemma3nTextConfig(
        **_rotary(
            num_hidden_layers=4,
            head_dim=16,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=16,
            num_kv_shared_layers=2,
            sliding_window=8,
            laurel_rank=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 4,
        )
    )


Config = Callable[[], transformers.PretrainedConfig]

CONFIGS: dict[str, Config] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
# Attention with a twist of its own: caps, sinks, latent keys, chunks, layers without positions.
UNUSUAL: dict[str, Config] = {
    "gemma2": _gemma2,
    "cohere2": _cohere2,
    "phi3_window": _phi3_window,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "llama4": _llama4,
}
# What cannot share a batch over slots: recurrent states, ALiBi, shared keys, one length for all.
SEQUENTIAL: dict[str, Config] = {
    "mamba": _mamba,
    "bloom": _bloom,
    "falcon": _falcon,
    "qwen3_next": _qwen3_next,
    "gemma3n": _gemma3n,
    "llama4_tuned": _llama4_tuned,
    "phi3_long": _phi3_long,
}
_BY_NAME = {**CONFIGS, **UNUSUAL, **SEQUENTIAL}
ARCHITECTURES = tuple(CONFIGS)


def build(
    arch: str, seed: int = 0
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """A model in eval mode and fp32, and its tokenizer; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            _BY_NAME[arch](), dtype=torch.float32
        ).eval()
    return model, tokenizer()


def save(arch: str, folder: str | Path, seed: int = 0) -> Path:
    """Write config, safetensors, generation config and tokenizer to ``folder``; return it."""
    model, tokens = build(arch, seed)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return Path(folder)
