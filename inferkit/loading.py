"""Loading: files and a plan in, a model on its devices and its tokenizer out; and the way back.

Whatever stops a load (an interrupt, a damaged file, lack of memory), what was read is released.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

from inferkit import stored
from inferkit.catalog import Source
from inferkit.devices import out_of_memory, release_memory, runners
from inferkit.errors import (
    DamagedFileError,
    LoadError,
    ModelError,
    UnsupportedModelError,
    first_line,
)
from inferkit.memory import MemoryPlan
from inferkit.model_files import SIDE_FILES
from inferkit.placement import offloads, quiet
from inferkit.progress import Progress, library_bars, stopped
from inferkit.quantize import loading_config, quantize_weights, quantized_tensors, release_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inferkit.offload import Offloaded


# A tokenizer with a vocabulary of 262,144 takes 240 MiB, and a notebook that shows one keeps it:
# as long as it lives, the same files are not read into another.
_tokenizers: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()

FileStates = tuple[tuple[str, int, int], ...]


def file_states(source: Source, endings: tuple[str, ...] = ("",)) -> FileStates:
    """(name, size, modification time in ns) of a model's files: other ones, another model."""
    stats = [(n, (source.path / n).stat()) for n in source.files if n.endswith(endings)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@dataclass(slots=True)
class Loaded:
    """A model on its devices. The one owner of the weights: see `release`.

    Attributes:
        module: The transformers model, in eval mode.
        tokenizer: Its tokenizer; one object for all loads of the same files while it lives.
        end_ids: The tokens that end a generation, from the generation config.
        defaults: The sampling options that the model's authors recommend.
        vocab_size: Rows of the input embedding; prompts must stay below.
        devices: Canonical names.
        offloaded: The weights that lie elsewhere than on the device that runs them, if there are.
    """

    module: Any
    tokenizer: Any
    end_ids: frozenset[int]
    defaults: dict[str, Any]
    vocab_size: int
    devices: tuple[str, ...]
    offloaded: Offloaded | None


def load_files(
    source: Source, plan: MemoryPlan, *, trust_remote_code: bool = False, progress: Progress = True
) -> Loaded:
    """Read a model's weights and tokenizer as the plan says.

    Raises:
        DamagedFileError: A weight file cannot be read, or lacks weights.
        LoadError: Anything else went wrong; what was read is released.
    """
    offloaded = None
    try:
        with library_bars(progress):
            module, offloaded = _read_weights(source, plan, trust_remote_code, progress)
            tokenizer = read_tokenizer(source, trust_remote_code)
        return Loaded(
            module=module,
            tokenizer=tokenizer,
            end_ids=_end_ids(module, tokenizer),
            defaults=_defaults(module),
            vocab_size=module.get_input_embeddings().weight.shape[0],
            devices=tuple(d.name for d in plan.devices),
            offloaded=offloaded,
        )
    except BaseException as error:
        if offloaded is not None:
            offloaded.release()
        module = tokenizer = offloaded = None
        problem = failure(error, source, plan)
    raise problem


def weight_bytes(loaded: Loaded) -> int:
    """Bytes of a model's tensors in memory as they are now; shared ones once."""
    from inferkit.packing import PackedLinear

    module = loaded.module
    packed = sum(m.packed_bytes for m in module.modules() if isinstance(m, PackedLinear))
    tensors = [*module.parameters(), *module.buffers(), *quantized_tensors(module)]
    here = [t.untyped_storage() for t in tensors if t.device.type != "meta"]
    stored = {storage.data_ptr(): storage.nbytes() for storage in here}
    away = 0 if loaded.offloaded is None else loaded.offloaded.nbytes
    return packed + away + sum(stored.values())


def release(loaded: Loaded) -> None:
    """Give back all that it holds: `release_weights`, and the tokenizer. Safe to call twice."""
    loaded.tokenizer = None
    release_weights(loaded)


def release_weights(loaded: Loaded) -> None:
    """Give the weights' memory back to the device, whoever still refers to the module.

    A notebook keeps references that nobody sees (``Out``, ``_``, the frames of a traceback), so
    that dropping ours is not enough: every tensor is emptied in place. Safe to call twice.
    """
    import torch

    from inferkit.packing import release_packed

    if loaded.module is not None:
        for tensor in [*loaded.module.parameters(), *loaded.module.buffers()]:
            if tensor.device.type != "meta":
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        release_quantized(loaded.module)
        release_packed(loaded.module)
    if loaded.offloaded is not None:
        loaded.offloaded.release()
    loaded.module = None
    release_memory(loaded.devices)


def failure(error: BaseException, source: Source, plan: MemoryPlan) -> BaseException:
    """What to raise for an error that stopped a load; gives back the memory that it holds.

    A notebook keeps the last traceback, and its frames would keep what was half loaded: they are
    emptied. Interrupts, our own errors and those of a callable that is told of progress are handed
    on; to be raised outside of the ``except``.
    """
    problem = error
    if isinstance(error, Exception) and not (isinstance(error, ModelError) or stopped(error)):
        problem = _explain(error, source, plan)
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None:
            traceback.clear_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
    release_memory(d.name for d in plan.devices)
    return problem


def _read_weights(
    source: Source, plan: MemoryPlan, trust_remote_code: bool, progress: Progress
) -> tuple[Any, Offloaded | None]:
    from inferkit.packing import limit_kernels, pack_linears
    from inferkit.tiled import tile_linears

    limit_kernels()
    with ExitStack() as undo:
        module = _from_pretrained(source, plan, trust_remote_code, undo)
        if plan.format.stored:
            stored.finish(module, plan.dtype, trust_remote_code)
        # Without gradients: an autograd graph that somebody keeps would keep the weights.
        module.eval().requires_grad_(False)
        offloaded = None
        names = [d.name for d in plan.devices]
        if offloads(names):
            from inferkit.offload import offload

            offloaded = offload(module, plan.device_map, runners(names), undo.pop_all().close)
    quantize_weights(module, plan.format, progress=progress)
    pack_linears(module, progress=progress)
    tile_linears(module)
    _own_memory(module, plan.format.stored)
    _dense_input(module.get_output_embeddings())
    return module, offloaded


def _from_pretrained(
    source: Source, plan: MemoryPlan, trust_remote_code: bool, undo: ExitStack
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    folder, names = None, [d.name for d in plan.devices]
    if "disk" in plan.device_map.values():
        folder = undo.enter_context(TemporaryDirectory(prefix="inferkit-offloaded-"))
    how = loading_config(plan.format, plan.dtype, offloads(names))
    # To give None would take the place of what the checkpoint's config says.
    given = {} if how is None else {"quantization_config": how}
    try:
        with quiet("accelerate.big_modeling"):  # it warns of what was asked for
            module, found = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=getattr(torch, plan.dtype),
                device_map=_device_map(plan),
                offload_folder=folder,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **given,
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{plan.architecture} is no causal language model that transformers can load; "
            "inferkit serves those that AutoModelForCausalLM knows."
        ) from None
    missing = sorted(found["missing_keys"])
    if missing:  # transformers draws them at random, and the model would talk nonsense
        raise DamagedFileError(
            f"The weight files in {source.path} lack {len(missing)} of the weights of "
            f"{plan.architecture}: {', '.join(missing[:3])}{', ...' if missing[3:] else ''}. "
            "Get the model again; or its config.json belongs to another model."
        )
    return module


def _own_memory(module: Any, stored: bool) -> None:
    """Copy the weights that are still pages of their file into memory of the process.

    Whoever shortens a mapped file kills the kernel. And what is read here is not read, page by
    page, while the first tokens are timed; nor does it lie askew: see benchmarks/README.md. Whole
    numbers come from the file only where it is ``stored`` quantized.
    """
    own: dict[tuple[Any, ...], Any] = {}  # bitsandbytes has several tensors on the same memory
    for tensor in [*module.parameters(), *module.buffers(), *quantized_tensors(module)]:
        if tensor.device.type == "cpu" and (stored or tensor.is_floating_point()):
            key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
            if key not in own:
                own[key] = tensor.data.clone()
            tensor.data = own[key]


def _dense_input(head: Any) -> None:
    """Have the output embeddings read their input as dense rows.

    They get a slice, the last position of each row. On CPU, torch multiplies a slice by a weight
    without gradients in a batched way that expands the weight for every row: 50 times slower at a
    vocabulary of 262,144.
    """

    def pack(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        rows = hidden.flatten(0, -2).contiguous()
        return (rows.unflatten(0, hidden.shape[:-1]), *rest)

    if head is not None:
        head.register_forward_pre_hook(pack)


def _device_map(plan: MemoryPlan) -> dict[str, Any]:
    """The plan's device map, with "cpu" as accelerate means it: where weights lie offloaded.

    A CPU that runs layers is given as a torch device; bitsandbytes quantizes the weights on it.
    """
    import torch

    if len(plan.devices) == 1:
        return {"": plan.devices[0].name}
    run = runners([d.name for d in plan.devices])
    cpu = torch.device("cpu") if run == ("cpu",) else "cpu"
    return {name: cpu if d == "cpu" else d for name, d in plan.device_map.items()}


def read_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; one object for all that read the same files.

    Raises:
        LoadError: Its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    key = (source.path, file_states(source, SIDE_FILES))
    try:
        found = _tokenizers.get(key)
        if found is None:
            found = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=trust_remote_code, local_files_only=True
            )
            _tokenizers[key] = found
        return found
    except Exception as error:  # the tokenizers library raises plain Exception
        raise LoadError(
            f"The tokenizer in {source.path} cannot be read ({first_line(error)}). "
            "The folder needs the tokenizer's files (tokenizer.json or tokenizer.model) beside "
            "config.json: save it there with tokenizer.save_pretrained(folder)."
        ) from None


def _end_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    given = getattr(module.generation_config, "eos_token_id", None)
    if given is None:
        given = getattr(module.config, "eos_token_id", None)
    ids = {*(given if isinstance(given, Sequence) else [given]), tokenizer.eos_token_id}
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
    kind, line = type(error).__name__, first_line(error)
    problem: ModelError
    if "No space left on device" in line:
        problem = LoadError(
            f"The disk is full: weights of {source.ref!r} that lie offloaded are written to "
            f"{gettempdir()}. Make room there, or have TMPDIR name another folder before Python "
            "starts."
        )
    elif kind in ("SafetensorError", "UnpicklingError"):
        problem = DamagedFileError(
            f"A weight file in {source.path} cannot be read ({line}). Get the model again."
        )
    elif out_of_memory(error):
        problem = LoadError(
            f"Memory ran out while {source.ref!r} was loading; what was read is released. "
            f"{plan.explain()}"
        )
    else:
        problem = LoadError(f"{source.ref!r} did not load: {kind}: {line}")
    problem.add_note("".join(traceback.format_exception(error)))
    return problem
