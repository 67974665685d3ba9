"""GGUF file -> a folder that transformers can load: config, bfloat16 safetensors, tokenizer.

transformers reads GGUF itself, but slowly (its reader builds a NumPy array for every token of the
vocabulary, four times over) and with every weight in float32 at once. Here the header is read
once, without the vocabulary, and each tensor goes from its blocks to its place in the file, so
that memory stays near the size of one slice. Names and layouts of the tensors are transformers'
own (``modeling_gguf_pytorch_utils``); the result equals its dequantized load bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from inferkit.errors import DamagedFileError, ModelNotFoundError, UnsupportedModelError
from inferkit.exclusive import alone
from inferkit.progress import library_bars, stopped

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from tqdm import tqdm
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["convert", "open_gguf", "output_bytes", "read_config"]

_LONG_ARRAY = 4096  # longer metadata arrays are vocabularies: only their length matters here
_SLICE_ELEMENTS = 1 << 23  # dequantized at a time: 32 MiB of float32
_SAFETENSORS_NAMES = {"torch.bfloat16": "BF16", "torch.float32": "F32"}
_swap_lock = threading.Lock()


def open_gguf(path: Path, *, header_only: bool = False) -> GGUFReader:
    """Read a GGUF header, and check that the file is as long as its header says.

    With ``header_only`` the tensors have no data, and the file may end after the header.

    Raises:
        DamagedFileError: The file is no GGUF, its header is broken, or its end is missing.
        UnsupportedModelError: The file is one part of a split model.
    """
    with path.open("rb") as file:
        magic = file.read(16)
    if magic[:4] != b"GGUF":
        hint = "run `git lfs pull`" if magic.startswith(b"version https") else "download it again"
        raise DamagedFileError(
            f"{path} is no GGUF file: it starts with {magic[:4]!r} instead of b'GGUF'; {hint}."
        )
    try:
        reader = _lean_reader()(path, header_only)
    except _Truncated as cut:
        raise DamagedFileError(
            f"{path} is truncated: its header describes {cut.expected:,} bytes, the file has "
            f"{cut.actual:,}; download it again."
        ) from None
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise DamagedFileError(
            f"{path} has a broken GGUF header ({type(error).__name__}: {error}); the file has "
            f"{path.stat().st_size:,} bytes. Download it again."
        ) from error
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise UnsupportedModelError(
            f"{path} is one of {int(split.contents())} parts of a split model; join them with "
            f"`llama-gguf-split --merge {path.name} model.gguf` and load model.gguf."
        )
    return reader


def read_config(path: Path, reader: GGUFReader | None = None) -> PretrainedConfig:
    """The transformers config that a GGUF header describes; no weight is read.

    Raises:
        DamagedFileError: See ``open_gguf``.
        UnsupportedModelError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig

    reader = reader or open_gguf(path, header_only=True)
    try:
        with _transformers_reads_with(reader):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a header without an expected key fails in many ways
        raise _unsupported(path, reader, error) from error
    config.dtype = torch.bfloat16
    return config


def output_bytes(reader: GGUFReader) -> int:
    """Bytes that the converted weights take on disk, in bfloat16."""
    return sum(2 * int(tensor.n_elements) for tensor in reader.tensors)


def convert(path: Path, folder: Path, bar: tqdm[Any]) -> None:
    """Write the model in ``path`` to ``folder`` (which must exist), weights in bfloat16.

    Args:
        path: A GGUF file.
        folder: Gets config.json, generation_config.json, model.safetensors and the tokenizer.
        bar: Advances by the bytes of ``path`` that are done.

    Raises:
        DamagedFileError: See ``open_gguf``.
        ModelNotFoundError: The file holds no tokenizer, or no weights.
        UnsupportedModelError: No causal language model of transformers has this architecture.
    """
    from transformers import AutoTokenizer

    reader = open_gguf(path)
    bar.reset(total=sum(int(tensor.n_bytes) for tensor in reader.tensors))
    if not reader.tensors or reader.get_field("tokenizer.ggml.tokens") is None:
        lack = "tokenizer" if reader.tensors else "weights"
        raise ModelNotFoundError(
            f"{path} holds no {lack}; a language model's GGUF has both (an adapter, an mmproj "
            "file or a bare vocabulary has not). Pass the model's main file."
        )
    config = read_config(path, reader)
    try:
        if _has_own_loader(reader):
            _convert_whole(path, folder, config, bar)
        else:
            _stream(path, reader, folder, config, bar)
        bar.set_postfix_str("tokenizer")
        with _transformers_reads_with(reader):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        if stopped(error):
            raise
        raise _unsupported(path, reader, error) from error
    tokenizer.init_kwargs.pop("local_files_only", None)  # of this conversion, not of the tokenizer
    tokenizer.save_pretrained(folder)


def _architecture(reader: GGUFReader) -> str:
    field = reader.get_field("general.architecture")
    return "unknown" if field is None else str(field.contents())


def _unsupported(path: Path, reader: GGUFReader, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers cannot read the GGUF architecture {_architecture(reader)!r} of {path} as "
        f"a causal language model ({error}); load the safetensors version of the model instead."
    )


class _Truncated(Exception):
    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(expected, actual)
        self.expected = expected
        self.actual = actual


@lru_cache
def _lean_reader() -> type[Any]:
    """``gguf.GGUFReader`` without the vocabulary; made on first use, for gguf imports NumPy."""
    import gguf
    import numpy as np

    class LeanReader(gguf.GGUFReader):
        def __init__(self, path: Path, header_only: bool) -> None:
            self.header_only = header_only
            super().__init__(path)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            types = gguf.GGUFValueType
            if raw_type != types.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            element = types(int(self._get(orig_offs, np.uint32)[0]))
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            if count <= _LONG_ARRAY or element == types.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            start = orig_offs + 12
            data: Any = self.data
            _, first, _, _ = super()._get_field_parts(start, element)
            if element == types.STRING:
                end = _skip_strings(memoryview(data), start, count)
            else:
                end = start + count * first[0].nbytes
            # The first element stands for all: transformers asks a vocabulary for its length only.
            return end - orig_offs, first, [len(first) - 1] * count, [types.ARRAY, element]

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            if self.header_only:
                self.tensors = [_bare_tensor(field, start_offs) for field in fields]
                return
            ends = (_bare_tensor(field, start_offs) for field in fields)
            expected = max((t.data_offset + t.n_bytes for t in ends), default=start_offs)
            if expected > len(self.data):
                raise _Truncated(expected, len(self.data))
            super()._build_tensors(start_offs, fields)

    def _bare_tensor(field: Any, start: int) -> ReaderTensor:
        _, name, _, dims, kind, offset = field.parts
        tensor_type = gguf.GGMLQuantizationType(int(kind[0]))
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        elements = math.prod(int(d) for d in dims)
        return gguf.gguf_reader.ReaderTensor(
            name=bytes(name).decode("utf-8"),
            tensor_type=tensor_type,
            shape=dims,
            n_elements=elements,
            n_bytes=elements * block_bytes // block,
            data_offset=start + int(offset[0]),
            data=np.empty(0, dtype=np.uint8),
            field=field,
        )

    return LeanReader


def _skip_strings(data: memoryview, start: int, count: int) -> int:
    """The offset after ``count`` length-prefixed strings."""
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        start += 8 + length_at(data, start)[0]
    return start


@contextmanager
def _transformers_reads_with(reader: GGUFReader) -> Iterator[None]:
    """Within, transformers gets ``reader`` in this thread when it opens a GGUF file.

    transformers imports ``gguf.GGUFReader`` inside its functions and offers no other way in; other
    threads keep the original.
    """
    import gguf

    library: Any = gguf
    owner = threading.get_ident()
    with _swap_lock:
        original = library.GGUFReader

        def open_reader(*args: Any, **kwargs: Any) -> Any:
            return reader if threading.get_ident() == owner else original(*args, **kwargs)

        library.GGUFReader = open_reader
        try:
            yield
        finally:
            library.GGUFReader = original


def _has_own_loader(reader: GGUFReader) -> bool:
    """Whether transformers maps this architecture with its newer loader, which has no table."""
    from transformers.integrations import gguf as loaders

    return _architecture(reader) in loaders.GGUF_CONFIG_ARCHS


def _convert_whole(path: Path, folder: Path, config: PretrainedConfig, bar: tqdm[Any]) -> None:
    """Load with transformers, in memory, and save."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    whole, half = bar.total, 0

    def advance(_: str, done: int, total: int | None) -> None:
        if total:  # loading is one half of the work, writing the other
            bar.update((half + whole * done // total // 2) - bar.n)

    with library_bars(advance):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        # save_pretrained refuses a model that carries the mark of its GGUF quantization.
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        half = whole // 2
        model.save_pretrained(folder)
    bar.update(whole - bar.n)


def _stream(
    path: Path, reader: GGUFReader, folder: Path, config: PretrainedConfig, bar: tqdm[Any]
) -> None:
    """Write config and weights tensor by tensor."""
    import torch
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    with alone(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    processors = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS
    processor = processors.get(_architecture(reader), modeling_gguf_pytorch_utils.TensorProcessor)(
        config=config.to_dict()
    )
    names = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor)

    bar.set_postfix_str("weights")
    with (folder / "model.safetensors").open("wb") as file:
        writer = _SafetensorsWriter(file, model, path)
        rebuilt: dict[str, torch.Tensor] = {}  # where processors put experts that they merge
        # float32 tensors come first, so that every tensor starts at a multiple of its item size.
        order = sorted(reader.tensors, key=lambda t: not writer.keeps_float32(names.get(t.name)))
        for tensor in order:
            for slices, name in _processed(tensor, processor, names, rebuilt):
                writer.write(names[name], slices, bar, int(tensor.n_bytes))
        for name, whole in rebuilt.items():
            writer.write(name, iter([whole]), bar, 0)
        writer.finish()
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _processed(
    tensor: ReaderTensor, processor: Any, names: dict[str, str], rebuilt: dict[str, torch.Tensor]
) -> Iterator[tuple[Iterator[torch.Tensor], str]]:
    """A tensor's float32 values as row slices, with its GGUF name; or nothing.

    A tensor that the model does not have (rotary frequencies, say) yields nothing. A processor
    rearranges some tensors (rotary halves, experts, norms stored plus one). It returns the very
    array it got where it changes nothing: only then can slices be handled one by one.
    """
    import numpy as np
    import torch
    from gguf import dequantize

    def run(rows: Any) -> Any:
        return processor.process(
            weights=dequantize(rows, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": rebuilt},
        )

    data = tensor.data
    step = max(1, _SLICE_ELEMENTS * len(data) // max(1, int(tensor.n_elements)))
    if data.ndim == 2 and len(data) > step:
        # An array of the full shape that takes no memory tells what the processor would change.
        values = np.broadcast_to(np.float32(0), tuple(reversed(tensor.shape.tolist())))
        probe = processor.process(
            weights=values,
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": {}},
        )
        if probe.weights is values and probe.name == tensor.name:
            if tensor.name in names:
                parts = (data[i : i + step] for i in range(0, len(data), step))
                yield (
                    (torch.from_numpy(dequantize(p, tensor.tensor_type)) for p in parts),
                    tensor.name,
                )
            return
    result = run(data)
    if result.name in names:
        yield iter([torch.tensor(result.weights)]), result.name


class _SafetensorsWriter:
    """Writes a safetensors file front to back, holding one slice in memory.

    Format (https://github.com/huggingface/safetensors): 8 bytes header length, JSON header padded
    with spaces, data without gaps. Room for the header is left first and filled in last.
    """

    def __init__(self, file: BinaryIO, model: PreTrainedModel, source: Path) -> None:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = model.state_dict()
        self._file = file
        self._source = source
        self._shapes = {name: tuple(value.shape) for name, value in state.items()}
        self._required = {name for name, _ in model.named_parameters() if name not in tied}
        self._float32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self._entries: dict[str, dict[str, object]] = {}
        self._end = 0
        self._room = -(-(256 + sum(160 + len(name) for name in state)) // 8) * 8
        file.seek(8 + self._room)

    def keeps_float32(self, name: str | None) -> bool:
        """Whether transformers keeps this tensor in float32 within a bfloat16 model."""
        return name is not None and any(part in self._float32 for part in name.split("."))

    def write(
        self, name: str, slices: Iterator[torch.Tensor], bar: tqdm[Any], source_bytes: int
    ) -> None:
        """Append one tensor, given as consecutive rows; ``bar`` gains ``source_bytes``."""
        import torch

        dtype = torch.float32 if self.keeps_float32(name) else torch.bfloat16
        total = math.prod(self._shapes.get(name, ())) or 1
        rows, done, start = 0, 0, self._end
        tail: tuple[int, ...] = ()
        for part in slices:
            raw = part.to(dtype).contiguous()
            self._end += self._file.write(raw.reshape(-1).view(torch.uint8).numpy().data)
            rows, tail = rows + (part.shape[0] if part.ndim else 1), tuple(part.shape[1:])
            advance = source_bytes * part.numel() // total
            bar.update(advance)
            done += advance
        bar.update(source_bytes - done)
        if name not in self._shapes or (rows, *tail) != self._shapes[name]:
            raise UnsupportedModelError(
                f"{self._source} holds {name} with shape {(rows, *tail)}, but the architecture "
                f"that its header describes has {self._shapes.get(name)}; the file's metadata is "
                "wrong, or this variant is not supported: load the model's safetensors version."
            )
        self._entries[name] = {
            "dtype": _SAFETENSORS_NAMES[str(dtype)],
            "shape": [rows, *tail],
            "data_offsets": [start, self._end],
        }

    def finish(self) -> None:
        """Check that no weight is missing, and write the header."""
        missing = sorted(self._required - set(self._entries))
        if missing:
            raise UnsupportedModelError(
                f"{self._source} lacks {len(missing)} of the model's weights, the first being "
                f"{missing[0]}; load the model's safetensors version instead."
            )
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
        if len(header) > self._room:
            raise AssertionError(f"header of {len(header)} bytes in room of {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
