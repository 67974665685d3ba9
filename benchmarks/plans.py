"""`inferkit.plan` against what loading takes: weights and KV cache, for models of several kinds.

Each case is a process of its own. A tiny model of the same kind and mode is loaded and unloaded
first, so that libraries, thread stacks and the kernels' own buffers are there before the
measurement begins. The model is then loaded and used once (bitsandbytes packs 4-bit weights on
first use), and its memory is read in three ways:

resident, as found
    growth of the process's resident set. Pages of the weight file that were only read to quantize
    or restack them count here, although the system may take them back at any time; pages of an
    embedding that no token has used yet do not.
kept
    what of it stays in the process after the unload, kernels that oneDNN compiled for one. It is no
    part of the model and is taken off before the comparison.
in use
    the same after the kernel was asked to take the file's pages back (MADV_PAGEOUT) and every
    tensor of the model and of the KV cache was touched, page by page. This is compared with the
    plan.
tensors
    the bytes of the tensors' storages, which neither allocator nor page size can blur.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import fill

MODES = ("none", "int8", "nf4", "fp4")
_PAGE = 4096
_SIZE = {"vocab_size": 32_000, "max_position_embeddings": 4096, "tie_word_embeddings": False}


def configs(tiny: bool = False) -> dict[str, Any]:
    """Random models of 250 to 280 MB in bf16, or of 1 MB of the same kinds."""
    import transformers as t

    wide = {**_SIZE, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    narrow = {**_SIZE, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    small = {"vocab_size": 512, "num_hidden_layers": 2} if tiny else {}
    heads = {"num_attention_heads": 12}
    grouped = {**heads, "num_key_value_heads": 4}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    return {
        "llama": t.LlamaConfig(**wide | grouped | small),
        "mistral": t.MistralConfig(**wide | grouped | {"sliding_window": 256} | small),
        "gpt_neox": t.GPTNeoXConfig(**wide | heads | {"intermediate_size": 3072} | small),
        "qwen3_moe": t.Qwen3MoeConfig(
            **narrow | experts | {"num_key_value_heads": 2, "head_dim": 128} | small
        ),
    }


def build(folder: str, threads: int) -> list[str]:
    """Save the random models and their tiny likes; return their names."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    for tiny in (False, True):
        for name, config in configs(tiny).items():
            target = Path(folder) / (f"{name}-tiny" if tiny else name)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(target)
            _tokenizer().save_pretrained(target)
    return list(configs())


def measure(
    path: str, tiny: str, mode: str, threads: int, context: int, max_batch: int
) -> dict[str, Any]:
    """Bytes predicted and measured for one model in one mode."""
    import torch

    import inferkit as ik

    torch.set_num_threads(threads)
    shape: dict[str, Any] = {"quantize": mode, "dtype": "bfloat16", "device": "cpu"}
    _load_and_use(tiny, shape, context=64, max_batch=1).unload()
    shape |= {"context": context, "max_batch": max_batch}
    plan = ik.plan(path, **shape)
    tokenizer = _tokenizer_of(path)
    before = _resident()
    model = _load_and_use(path, shape)
    found = _resident() - before
    runner = model._engine.runner
    model._engine.call(lambda: _touch_all(runner))
    in_use = _resident() - before
    row = {
        "architecture": plan.architecture,
        "mode": mode,
        "context": context,
        "max_batch": max_batch,
        "predicted": {"weights": plan.weights, "kv_cache": plan.kv_cache},
        "tensors": {
            "weights": _weights(runner.module),
            "kv_cache": sum(t.nbytes for t in _storages(_cache_tensors(runner.cache))),
        },
        "resident_as_found": found,
        "in_use": in_use,
    }
    model.unload()
    kept = _resident() - before
    del tokenizer
    return {**row, "kept": kept}


def _tokenizer_of(path: str) -> Any:
    """The tokenizer, which a load then shares: its 300 MB for the demo model are no weights."""
    from inferkit import catalog
    from inferkit.loading import read_tokenizer

    return read_tokenizer(catalog.resolve(path))


def _load_and_use(path: str, shape: dict[str, Any], **more: Any) -> Any:
    import inferkit as ik

    model = ik.load(path, progress=False, **shape | more)
    model.generate([5, 6, 7], max_tokens=4, ignore_eos=True)
    return model


def _resident() -> int:
    import psutil

    from inferkit.devices import release_memory

    release_memory(["cpu"])
    return int(psutil.Process().memory_info().rss)


def _touch_all(runner: Any) -> None:
    """Leave in memory what the tensors need, all of it, and nothing else of the weight files."""
    _page_out(".safetensors")
    fill(runner.cache)
    for tensor in _storages(_model_tensors(runner.module)):
        tensor[::_PAGE].sum()


def _page_out(ending: str) -> None:
    """Give back the pages of mapped files; what was changed in memory stays (MADV_PAGEOUT)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name.endswith(ending):
            begin, end = (int(x, 16) for x in span.split("-"))
            if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 21):
                raise OSError(ctypes.get_errno(), f"madvise on {name}")


def _cache_tensors(cache: Any) -> Iterator[Any]:
    for layer in cache._layers:
        yield layer.keys
        yield layer.values


def _model_tensors(module: Any) -> Iterator[Any]:
    """Parameters, buffers, and what bitsandbytes hangs on them."""
    import torch

    for tensor in [*module.parameters(), *module.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for holder, names in ((tensor, ("CB", "SCB")), (state, ("absmax", "code"))):
            for name in names:
                if isinstance(getattr(holder, name, None), torch.Tensor):
                    yield getattr(holder, name)


def _weights(module: Any) -> int:
    """Bytes of a model's tensors; a packed weight is no tensor that has a storage."""
    from inferkit.packing import PackedLinear

    packed = [m.packed_bytes for m in module.modules() if isinstance(m, PackedLinear)]
    return sum(packed) + sum(t.nbytes for t in _storages(_model_tensors(module)))


def _storages(tensors: Iterator[Any]) -> Iterator[Any]:
    """The tensors' bytes as flat uint8 tensors; shared ones once."""
    import torch

    seen = set()
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if flat.numel() and flat.data_ptr() not in seen:
            seen.add(flat.data_ptr())
            yield flat


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"word{i}": i for i in range(500)} | {"<unk>": 500}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )


if __name__ == "__main__":
    _ACTIONS = {"build": build, "measure": measure}
    _options = json.loads(sys.argv[1])
    print(json.dumps(_ACTIONS[_options.pop("action")](**_options)))
