"""Compile the decoder layers of a model: what runs in a process of its own, without weights.

    python -m inferkit.engine.tracing    # a line of JSON on its standard input is the job

A layer is a pure function of its inputs, of one layer's keys and values, and of its weights. It is
traced on empty tensors and compiled ahead of time by torch's inductor (AOTInductor), for three
kinds of passes: a token of "one" row; one of "many" rows, unless tiles are faster
(:mod:`inferkit.tiled`); and several tokens of any rows, which "read" a prompt, where attention is
one operation for any shapes (:mod:`inferkit.kernels`). Layers that trace to
the same graph share its code, so that the time does not grow with the depth of a model. The code
holds no weights and no size of the KV cache, so that it serves every load of the same architecture.

Each line of the output is JSON: ``{"done": 1, "total": 4}``, or at the end ``{"error": "...",
"lasting": false}``.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call

from inferkit import kernels
from inferkit.engine import attention
from inferkit.engine.cache import write
from inferkit.errors import first_line
from inferkit.footprint import meta_model
from inferkit.kv import LayerKV, cache_argument
from inferkit.packing import product
from inferkit.weight_only import empty_linear

Where = tuple[str | int, ...]
"""The way to a value among a call's arguments: ("args", 0) or ("kwargs", "attention_mask")."""

KINDS = {"one": (1, 1), "many": (16, 1), "read": (16, 48)}
"""Rows and tokens of the example of each kind of pass; more than one stand for any number."""
# What differs between two sizes of (rows, tokens, read positions) depends on them.
_Sizes = tuple[int, int, int]
_DECODING: tuple[_Sizes, _Sizes] = ((3, 1, 192), (5, 1, 320))
_READING: tuple[_Sizes, _Sizes] = ((3, 24, 192), (5, 40, 320))
_SLOTS, _CAPACITY = 24, 1024  # of the example's KV cache
_LOADED = 120  # seconds after which code that is being loaded will not be any more


class UntraceableError(Exception):
    """Why a layer cannot be compiled: it could not the next time either."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How a layer is called, and what its compiled code takes.

    Attributes:
        tensors: The way to each tensor among the arguments.
        cache: The way to the KV cache.
        weights: Names of the layer's parameters and buffers.
        wrapped: Whether the layer returns a tuple around its only tensor.
    """

    tensors: tuple[Where, ...]
    cache: Where
    weights: tuple[str, ...]
    wrapped: bool


class PackedTwin(nn.Module):
    """What a `PackedLinear` computes, as a function of a weight that is a plain parameter."""

    def __init__(self, linear: nn.Linear, own: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.own = linear.weight, linear.bias, own
        self.out_features = linear.out_features
        if own:
            shape = kernels.packed_shape(linear.out_features, linear.in_features)
            self.weight = nn.Parameter(linear.weight.new_empty(shape), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear.forward`."""
        return product(x, self.weight, self.bias, self.out_features, self.own)


class _LayerCache:
    """The KV cache as one layer sees it; see `SlotCache`."""

    is_compileable = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        where: torch.Tensor,
        entries: torch.Tensor,
    ) -> None:
        self.keys, self.values, self.rows, self.where = keys, values, rows, where
        self.entries = entries

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, read = keys.shape[0], self.entries.shape[0]
        found = []
        for store, new in ((self.keys, keys), (self.values, values)):
            torch._check(rows <= store.shape[0])
            torch._check(read <= store.shape[2])
            write(store, new, self.rows, self.where)
            found.append(store[:rows, :, :read])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _ModelCache:
    """The KV cache as the whole model sees it, of a layer each."""

    is_compileable = False

    def __init__(self, layers: Sequence[_LayerCache]) -> None:
        self.layers_ = layers

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers_[layer_idx].update(keys, values, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclass(slots=True)
class _Call:
    """The arguments that a layer was called with, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any = None

    def leaves(self) -> Iterator[tuple[Where, Any]]:
        yield from _leaves(self.args, ("args",))
        yield from _leaves(self.kwargs, ("kwargs",))

    def with_(self, new: Mapping[Where, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _rebuilt(self.args, ("args",), new), _rebuilt(self.kwargs, ("kwargs",), new)


def _leaves(value: Any, where: Where) -> Iterator[tuple[Where, Any]]:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(item, (*where, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*where, key))
    else:
        yield where, value


def _rebuilt(value: Any, where: Where, new: Mapping[Where, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_rebuilt(item, (*where, i), new) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _rebuilt(item, (*where, key), new) for key, item in value.items()}
    return new.get(where, value)


# -- the model without weights -------------------------------------------------------------------


def twin(job: Mapping[str, Any]) -> Any:
    """The model of a job on the meta device, its tensors of the same shapes and dtypes."""
    from transformers import AutoConfig

    model = meta_model(AutoConfig.for_model(**job["config"]), job["dtype"])
    if type(model).__name__ != job["class"]:
        raise UntraceableError(f"its config makes a {type(model).__name__}, not a {job['class']}")
    for name, own in job["packed"].items():
        model.set_submodule(name, PackedTwin(model.get_submodule(name), own))
    for name, mode in job["weight_only"].items():
        model.set_submodule(name, empty_linear(mode, model.get_submodule(name)))
    for name, (dtype, shape) in job["tensors"].items():
        owner, _, last = name.rpartition(".")
        empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        holder = model.get_submodule(owner)
        if last in holder._parameters:
            holder._parameters[last] = nn.Parameter(empty, requires_grad=False)
        else:
            holder._buffers[last] = empty
    model.eval().requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return model


def decoder_layers(model: nn.Module, count: int) -> list[tuple[str, nn.Module]]:
    """The layers that have a KV cache each, by name: the first list of so many modules."""
    for name, child in model.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return [(f"{name}.{i}", layer) for i, layer in enumerate(child)]
    raise UntraceableError("it has no list of decoder layers")


def _calls(
    model: Any, layers: Sequence[nn.Module], geometry: Sequence[LayerKV], sizes: _Sizes
) -> list[_Call]:
    """How a pass of so many rows and tokens calls each layer, on the meta device."""
    rows, tokens, read = sizes
    found: dict[int, _Call] = {}

    def before(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: found.update({index: _Call(args, kwargs)})

    def after(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs, out: setattr(found[index], "out", out)

    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
        hooks.append(layer.register_forward_hook(after(i), with_kwargs=True))
    dtype = next(p.dtype for p in model.parameters() if p.dim() == 1)
    kinds = {g.kind for g in geometry}
    with torch.device("meta"):
        masks = {f"{k}_attention": torch.zeros(rows, 1, tokens, read, dtype=dtype) for k in kinds}
        caches = [_LayerCache(*_operands(g, dtype, sizes)) for g in geometry]
        model(
            input_ids=torch.zeros(rows, tokens, dtype=torch.long),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=torch.zeros(rows, tokens, dtype=torch.long),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): _ModelCache(caches)},
        )
    for hook in hooks:
        hook.remove()
    if len(found) < len(layers):
        raise UntraceableError("some of its layers are not run in a step")
    return [found[i] for i in range(len(layers))]


def _operands(g: LayerKV, dtype: torch.dtype, sizes: _Sizes) -> list[torch.Tensor]:
    """Empty ones, in the order of `SlotCache.operands`."""
    rows, tokens, read = sizes
    return [
        torch.empty(_SLOTS, g.heads, _CAPACITY, g.key_dim, dtype=dtype),
        torch.empty(_SLOTS, g.heads, _CAPACITY, g.value_dim, dtype=dtype),
        torch.empty(rows, dtype=torch.long),
        torch.empty(rows, tokens, dtype=torch.long),
        torch.empty(read, dtype=torch.long),
    ]


@dataclass(frozen=True, slots=True)
class _Passes:
    """How a layer was called in passes of two sizes."""

    calls: tuple[_Call, _Call]
    sizes: tuple[_Sizes, _Sizes]


def _passes(
    model: Any,
    layers: Sequence[nn.Module],
    geometry: Sequence[LayerKV],
    sizes: tuple[_Sizes, _Sizes],
) -> list[_Passes]:
    small, large = (_calls(model, layers, geometry, size) for size in sizes)
    return [_Passes(calls, sizes) for calls in zip(small, large, strict=True)]


# -- one layer -----------------------------------------------------------------------------------


class _Layer(nn.Module):
    """A layer as a pure function of all that it reads."""

    def __init__(self, layer: nn.Module, call: _Call, signature: Signature) -> None:
        super().__init__()
        self._parts = (layer, call, signature)  # in a tuple: their weights are not this module's

    def forward(
        self,
        tensors: list[torch.Tensor],
        operands: list[torch.Tensor],
        weights: list[torch.Tensor],
    ) -> torch.Tensor:
        layer, call, signature = self._parts
        new: dict[Where, Any] = dict(zip(signature.tensors, tensors, strict=True))
        new[signature.cache] = _LayerCache(*operands)
        args, kwargs = call.with_(new)
        named = dict(zip(signature.weights, weights, strict=True))
        out = functional_call(layer, named, args, kwargs)
        made: torch.Tensor = out[0] if signature.wrapped else out
        return made


def _signature(layer: nn.Module, small: _Call, large: _Call) -> Signature:
    tensors: list[Where] = []
    cache: list[Where] = []
    for (where, one), (_, other) in zip(small.leaves(), large.leaves(), strict=True):
        if isinstance(one, torch.Tensor):
            tensors.append(where)
        elif isinstance(one, _ModelCache):
            cache.append(where)
        elif one != other:
            raise UntraceableError(f"a layer takes a value that changes ({where[-1]}={one!r})")
    if len(cache) != 1:
        raise UntraceableError("its layers do not take the KV cache as an argument")
    wrapped = not isinstance(small.out, torch.Tensor)
    outs = [x for _, x in _leaves(small.out, ()) if x is not None]
    if len(outs) != 1 or (wrapped and small.out[0] is not outs[0]):
        raise UntraceableError("its layers return more than their hidden state")
    names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    return Signature(tuple(tensors), cache[0], tuple(names), wrapped)


def _export(
    layer: nn.Module, g: LayerKV, passes: _Passes, signature: Signature, kind: str
) -> ExportedProgram:
    """A layer's graph for a kind of pass."""
    small, large = passes.calls
    sizes = (*KINDS[kind], passes.sizes[0][2])
    ones, others = dict(small.leaves()), dict(large.leaves())
    tensors, dims = [], []
    for where in signature.tensors:
        shape, free = _example(ones[where].shape, others[where].shape, passes.sizes, sizes)
        tensors.append(torch.empty(shape, dtype=ones[where].dtype))
        dims.append(free)
    row = {0: Dim.DYNAMIC} if sizes[0] > 1 else {}
    token = {1: Dim.DYNAMIC} if sizes[1] > 1 else {}
    stores = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    dtype = _activations(layer)
    weights = [torch.empty_like(t, device="cpu") for t in (*layer.parameters(), *layer.buffers())]
    with torch.no_grad():
        return export(
            _Layer(layer, small, signature),
            (tensors, _operands(g, dtype, sizes), weights),
            dynamic_shapes=(
                dims,
                [stores, stores, row, row | token, {0: Dim.DYNAMIC}],
                [{}] * len(weights),
            ),
            strict=False,
        )


def _activations(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's activations: that of its norms."""
    return next(p.dtype for p in layer.parameters() if p.dim() == 1)


def _example(
    small: Sequence[int], large: Sequence[int], varied: tuple[_Sizes, _Sizes], sizes: _Sizes
) -> tuple[list[int], dict[int, Any]]:
    """The shape of an input of a pass of these sizes, and which of its dimensions vary.

    Args:
        small: Its shape in a pass of the first of the sizes ``varied``.
        large: Its shape in a pass of the second.
        varied: Two times rows, tokens, read positions.
        sizes: Those of the example; what is one there is always one.
    """
    of_what = dict(zip(zip(*varied, strict=True), sizes, strict=True))
    shape, free = [], {}
    for dim, (a, b) in enumerate(zip(small, large, strict=True)):
        if a == b:
            shape.append(a)
        elif (a, b) in of_what:
            shape.append(of_what[a, b])
            if of_what[a, b] > 1:
                free[dim] = Dim.DYNAMIC
        else:
            raise UntraceableError(f"a layer takes a tensor whose size varies oddly ({a}, {b})")
    return shape, free


def _compile(program: ExportedProgram, target: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    _take_packed_weights_as_inputs()
    options = {"aot_inductor.custom_ops_to_c_shims": dict(kernels.SHIMS)}
    aoti_compile_and_package(program, package_path=str(target), inductor_configs=options)


def _take_packed_weights_as_inputs() -> None:
    """Have inductor compile a product with a packed weight that is no constant of the graph.

    Its own rule takes constants alone, which it may try kernels on, and would put into the code.
    """
    from torch._inductor.ir import TensorBox

    # Makes inductor's own rules known, one of which is replaced. Before torch 2.13 the module that
    # has them, mkldnn_lowerings, cannot be imported ahead of this one.
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    @register_lowering(torch.ops.mkldnn._linear_pointwise.default, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        return TensorBox.create(LinearUnary.create(*args))


# -- the job -------------------------------------------------------------------------------------


def run(job: Mapping[str, Any], tell: Callable[[int, int], None]) -> None:
    """Compile the layers of a job into its folder, with a table of contents.

    Raises:
        UntraceableError: The layers cannot be compiled, or their code cannot be loaded.
        Exception: Whatever torch raises on the way.
    """
    torch.set_num_threads(job["threads"])
    if kernels.used(["cpu"], job["dtype"]) != job["kernels"]:  # loaded now, with tensors to try
        raise RuntimeError(f"its kernels are not those of the model ({kernels.reason()})")
    folder = Path(job["folder"])
    geometry = [LayerKV(**g) for g in job["geometry"]]
    model = twin(job)
    named = decoder_layers(model, len(geometry))
    layers = [layer for _, layer in named]
    passes = _passes(model, layers, geometry, _DECODING)
    graphs: dict[str, int] = {}
    contents: list[dict[str, Any]] = []
    chosen: list[int] = []
    shared: list[_Shared] = []
    for layer, g, called in zip(layers, geometry, passes, strict=True):
        signature = _signature(layer, *called.calls)
        text = _text(_export(layer, g, called, signature, "many"), signature)
        if text not in graphs:
            shared.append(_Shared(len(graphs), layer, g, called, signature))
            graphs[text] = len(graphs)
            contents.append(asdict(signature))
        chosen.append(graphs[text])
    # Weights that are multiplied by tiles where there are several rows are faster than compiled.
    kinds = ["one"] if job["tiled"] else ["one", "many"]
    read = _reads(job, model, geometry)
    total = len(shared) * (len(kinds) + read)
    done = itertools.count()
    for kind in kinds:
        for example in shared:
            tell(next(done), total)
            _make(example, kind, folder)
    if read:
        try:
            for example in _reading(model, layers, geometry, shared, chosen):
                tell(next(done), total)
                _make(example, "read", folder)
            kinds.append("read")
        except Exception:  # what was made for the decode step serves without it
            traceback.print_exc()
            for made in folder.glob("*-read.pt2"):
                made.unlink()
    table = {
        "layers": [[name, g] for (name, _), g in zip(named, chosen)],
        "graphs": contents,
        "kinds": kinds,
    }
    (folder / "layers.json").write_text(json.dumps(table), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Shared:
    """The layer that stands for all that share a graph."""

    graph: int
    layer: nn.Module
    geometry: LayerKV
    passes: _Passes
    signature: Signature


def _make(example: _Shared, kind: str, folder: Path) -> None:
    """Compile a graph for a kind of pass, and see that its code can be loaded."""
    program = _export(example.layer, example.geometry, example.passes, example.signature, kind)
    made = folder / f"{example.graph}-{kind}.pt2"
    _compile(program, made)
    _try_to_load(made)


def _reads(job: Mapping[str, Any], model: nn.Module, geometry: Sequence[LayerKV]) -> bool:
    """Whether layers can be compiled for several tokens.

    Not where attention, or a product by a weight of fewer bits, goes another way for other shapes;
    nor where there are experts, whose weights the twin copies for each token.
    """
    return (
        job["kernels"] is not None
        and all(g.key_dim % 2 == 0 for g in geometry)
        and not (job["weight_only"] or job["tiled"])
        and not any(p.dim() == 3 for p in model.parameters())
    )


def _reading(
    model: Any,
    layers: Sequence[nn.Module],
    geometry: Sequence[LayerKV],
    shared: Sequence[_Shared],
    chosen: Sequence[int],
) -> Iterator[_Shared]:
    """Those that stand for others, in passes over several tokens."""
    passes = _passes(model, layers, geometry, _READING)
    for layer, called, graph in zip(layers, passes, chosen, strict=True):
        if _signature(layer, *called.calls) != shared[graph].signature:
            raise UntraceableError("a layer is called in another way with several tokens")
    for example in shared:
        yield replace(example, passes=passes[chosen.index(example.graph)])


def _try_to_load(file: Path) -> None:
    """Load code in a process that has nothing to lose.

    It may end the process: seen on one system, with two versions of torch, and not where another
    libstdc++ came first. That must not be the process that has the model. Other libraries that a
    kernel loaded before torch may still make a difference.
    """
    code = "import os, sys; from inferkit.engine.compiled import program; program(sys.argv[1]); "
    command = [sys.executable, "-P", "-c", code + "os._exit(0)", str(file)]
    try:
        tried = subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_LOADED
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the compiled code does not load within {_LOADED} s") from None
    if not tried.returncode:
        return
    said = tried.stderr.decode(errors="replace")
    sys.stderr.write(said)
    if tried.returncode > 0:
        how = said.strip().rpartition("\n")[2]
    else:
        how = f"it ends the process, {signal.Signals(-tried.returncode).name}"
    problem = f"the compiled code cannot be loaded on this system ({how})"
    if -tried.returncode in (signal.SIGKILL, signal.SIGTERM):  # by another hand
        raise RuntimeError(problem)
    raise UntraceableError(problem)


def _text(program: ExportedProgram, signature: Signature) -> str:
    """All that two layers must share to share their code."""
    return repr(signature) + program.graph_module.print_readable(print_output=False)


def main() -> int:
    """Do the job that is the first line of the standard input; its end ends this."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is none of ours
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        run(job, lambda done, total: say(done=done, total=total))
    except Exception as error:  # whatever torch, a compiler or a model's code may raise
        say(error=first_line(error), lasting=isinstance(error, UntraceableError))
        raise
    return 0


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)  # the C++ compiler too


if __name__ == "__main__":
    sys.exit(main())
