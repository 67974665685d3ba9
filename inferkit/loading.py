"""Loading: files and a plan in, a model on its devices and its tokenizer out; and the way back.

Whatever stops a load (an interrupt, a damaged file, lack of memory), what was read is released.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inferkit.catalog import Source
from inferkit.devices import release_memory
from inferkit.errors import DamagedFileError, LoadError, ModelError, UnsupportedModelError
from inferkit.memory import MemoryPlan
from inferkit.quantize import loading_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class Loaded:
    """A model on its devices. The one owner of the weights: see `release`.

    Attributes:
        module: The transformers model, in eval mode.
        tokenizer: Its tokenizer; None where the folder has none.
        end_ids: The tokens that end a generation, from the generation config.
        defaults: The sampling options that the model's authors recommend.
        vocab_size: Rows of the input embedding; prompts must stay below.
        devices: Canonical names.
    """

    module: Any
    tokenizer: Any
    end_ids: frozenset[int]
    defaults: dict[str, Any]
    vocab_size: int
    devices: tuple[str, ...]


def load_files(source: Source, plan: MemoryPlan, *, trust_remote_code: bool = False) -> Loaded:
    """Read a model's weights and tokenizer as the plan says.

    Raises:
        DamagedFileError: A weight file cannot be read.
        LoadError: Anything else went wrong; what was read is released.
    """
    devices = tuple(d.name for d in plan.devices)
    try:
        module = _read_weights(source, plan, trust_remote_code)
        tokenizer = _read_tokenizer(source, trust_remote_code)
        return Loaded(
            module=module,
            tokenizer=tokenizer,
            end_ids=_end_ids(module, tokenizer),
            defaults=_defaults(module),
            vocab_size=module.get_input_embeddings().weight.shape[0],
            devices=devices,
        )
    except ModelError:
        raise
    except Exception as error:  # any library's error, told in our words
        problem = _explain(error, source, plan)
    finally:
        release_memory(devices)
    raise problem


def release(loaded: Loaded) -> None:
    """Give the weights' memory back to the device, whoever still refers to the module.

    A notebook keeps references that nobody sees (``Out``, ``_``, the frames of a traceback), so
    that dropping ours is not enough: every tensor is emptied in place.
    """
    import torch

    for tensor in [*loaded.module.parameters(), *loaded.module.buffers()]:
        if tensor.device.type != "meta":
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        for state in ("quant_state", "CB", "SCB"):  # bitsandbytes hangs these on its parameters
            if getattr(tensor, state, None) is not None:
                setattr(tensor, state, None)
    for module in loaded.module.modules():
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = None
    loaded.module = loaded.tokenizer = None
    release_memory(loaded.devices)


def _read_weights(source: Source, plan: MemoryPlan, trust_remote_code: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        module = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=getattr(torch, plan.dtype),
            device_map=_device_map(plan),
            quantization_config=loading_config(plan.quantize, plan.dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{plan.architecture} is no causal language model that transformers can load; "
            "inferkit serves those that AutoModelForCausalLM knows."
        ) from None
    return module.eval()


def _device_map(plan: MemoryPlan) -> dict[str, str]:
    if len(plan.devices) == 1:
        return {"": plan.devices[0].name}
    return dict(plan.device_map)


def _read_tokenizer(source: Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"The tokenizer in {source.path} cannot be read ({_first_line(error)}). "
            "The folder needs the tokenizer's files (tokenizer.json or tokenizer.model) beside "
            "config.json: save it there with tokenizer.save_pretrained(folder)."
        ) from None


def _end_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    given = getattr(module.generation_config, "eos_token_id", None)
    if given is None:
        given = getattr(module.config, "eos_token_id", None)
    ids = set(given if isinstance(given, Sequence) else [given])
    if tokenizer is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(i for i in ids if i is not None)


def _defaults(module: Any) -> dict[str, Any]:
    """Sampling options of generation_config.json, as vLLM takes them (``do_sample`` counts)."""
    config = module.generation_config
    found = {
        name: getattr(config, name, None)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    if not getattr(config, "do_sample", False):
        return {"repetition_penalty": config.repetition_penalty or 1.0}
    found["temperature"] = 1.0 if found["temperature"] is None else found["temperature"]
    return {name: value for name, value in found.items() if value is not None}


def _explain(error: Exception, source: Source, plan: MemoryPlan) -> ModelError:
    """Our error without the traceback's frames, which would keep half-loaded weights alive."""
    kind, line = type(error).__name__, _first_line(error)
    problem: ModelError
    if kind in ("SafetensorError", "UnpicklingError"):
        problem = DamagedFileError(
            f"A weight file in {source.path} cannot be read ({line}). Get the model again."
        )
    elif isinstance(error, MemoryError) or "out of memory" in line or "allocate memory" in line:
        problem = LoadError(
            f"Memory ran out while {source.ref!r} was loading; what was read is released. "
            f"{plan.explain()}"
        )
    else:
        problem = LoadError(f"{source.ref!r} did not load: {kind}: {line}")
    problem.add_note(traceback.format_exc())
    return problem


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
