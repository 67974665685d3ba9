"""The compiled decode step: it says the same, is kept, is swapped in, and may fail without harm."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import inferkit as ik
from inferkit import kernels, packing, tiled
from inferkit.engine import compiled, compiling, tracing
from inferkit.engine.runner import Chunk

PROMPTS = [list(range(5, 5 + n)) for n in (1, 7, 30, 3, 90, 12)]
TOKENS = 24
PATIENCE = 280  # seconds; a test's time limit is not much more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the tests of this module share: what one compiled, the others find."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in use."""
    monkeypatch.setenv("INFERKIT_CACHE", str(folder))
    monkeypatch.setattr(compiling, "NICE", 0)  # beside other tests it would never get its turn
    # The code around the kernels takes longer to optimize than it ever runs here.
    monkeypatch.setenv("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
    return folder


@pytest.fixture
def load(
    tiny_model: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ik.Model]]:
    """Load a small model by its architecture's name; unload it at the end.

    Its linear layers are packed as those in bf16 are, which this processor may not have.
    """
    monkeypatch.setattr(packing, "packable", lambda device, dtype: device == "cpu")
    loaded = []

    def of(arch: str, **options: Any) -> ik.Model:
        settings = {"device": "cpu", "dtype": "float32", "context": 192, "max_batch": 3}
        folder = tiny_model(arch)
        loaded.append(ik.load(folder, progress=False, **settings | {"name": arch} | options))
        return loaded[-1]

    yield of
    for model in loaded:
        model.unload()


def compiled_model(load: Callable[..., ik.Model], arch: str, **options: Any) -> ik.Model:
    model = load(arch, compile=True, **options)
    assert model.compilation.wait(PATIENCE), str(model.compilation)
    return model


def say(model: ik.Model, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    gens = model.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
    return [list(gen.token_ids) for gen in gens]


def eager_reason(model: ik.Model, timeout: float = PATIENCE) -> str:
    assert not model.compilation.wait(timeout)
    assert model.compilation.status == "eager"
    assert str(model.compilation) == f"eager: {model.compilation.reason}"
    return model.compilation.reason


# -- the same tokens -----------------------------------------------------------------------------


def test_it_says_the_same_in_batches_and_alone(load: Callable[..., ik.Model]) -> None:
    model = load("gemma3", compile=False)
    wanted = say(model)
    assert load("gemma3", compile=True) is model
    assert model.compilation.wait(PATIENCE), str(model.compilation)
    assert say(model) == wanted
    assert [say(model, [prompt])[0] for prompt in PROMPTS] == wanted


def test_it_is_the_compiled_code_that_runs(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = compiled_model(load, "gemma3")._parts.engine.runner
    runner.prefill([Chunk(0, PROMPTS[1], 0)])
    wanted = runner.decode([9], [7])
    layer = runner.module.model.layers[0]

    def refuse(*_: Any) -> None:
        raise AssertionError("the layer's own code ran")

    monkeypatch.setattr(type(layer.mlp), "forward", refuse)
    assert torch.equal(runner.decode([9], [7]), wanted)
    runner.use_compiled(None)
    with pytest.raises(AssertionError, match="own code ran"):
        runner.decode([9], [7])


@pytest.mark.skipif(bool(kernels.reason()), reason=f"no kernels here: {kernels.reason()}")
def test_prompts_are_read_by_compiled_code_where_attention_is_one_operation(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = compiled_model(load, "gemma3", dtype="bfloat16")._parts.engine.runner
    parts = {
        "one": [Chunk(1, PROMPTS[2], 0)],
        "neighbours, one padded": [Chunk(1, PROMPTS[4], 0), Chunk(2, PROMPTS[5], 0)],
        "further on": [Chunk(0, PROMPTS[2], 0), Chunk(1, PROMPTS[4], 30)],
    }
    runner.compiled = False
    runner.prefill([Chunk(slot, PROMPTS[2], 0) for slot in range(3)])
    wanted = {name: runner.prefill(chunks) for name, chunks in parts.items()}
    runner.compiled = True
    layer = runner.module.model.layers[0]

    def refuse(*_: Any) -> None:
        raise AssertionError("the layer's own code ran")

    monkeypatch.setattr(type(layer.mlp), "forward", refuse)
    for name, chunks in parts.items():
        near = torch.cosine_similarity(runner.prefill(chunks).float(), wanted[name].float())
        assert near.min() > 0.999, (name, near)
    with pytest.raises(AssertionError, match="own code ran"):  # no neighbours: gathered
        runner.prefill([Chunk(0, PROMPTS[2], 0), Chunk(2, PROMPTS[5], 0)])


def test_it_is_swapped_in_while_requests_run(load: Callable[..., ik.Model]) -> None:
    wanted = say(compiled_model(load, "gemma3"))
    model = load("gemma3", name="another", compile=False, context=4096)
    request = model.submit(PROMPTS[2], max_tokens=4000, ignore_eos=True)
    next(iter(request))
    load("gemma3", name="another", compile=True, context=4096)
    assert model.compilation.wait(30), str(model.compilation)
    assert not request.done
    swapped = request.generated
    while request.generated < swapped + TOKENS:
        time.sleep(0.01)
    request.cancel()
    assert list(request.result(30).token_ids[:TOKENS]) == wanted[2]


@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_model_says_the_same(
    demo_model_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Once upon a time", "The capital of France is", "1, 2, 3,"]
    with ik.load(
        demo_model_path, device="cpu", dtype="float32", context=256, max_batch=4, compile=False
    ) as model:
        wanted = [g.token_ids for g in model.generate(prompts, max_tokens=TOKENS)]
        model.configure(compile="auto")
        assert model.compilation.reason == "INFERKIT_COMPILE=0"
        monkeypatch.delenv("INFERKIT_COMPILE")
        model.configure(compile=False).configure(compile="auto")
        assert model.compilation.wait(PATIENCE), str(model.compilation)
        assert [g.token_ids for g in model.generate(prompts, max_tokens=TOKENS)] == wanted


# -- the code is kept ----------------------------------------------------------------------------


def test_a_later_load_finds_the_code_whatever_its_batch_and_context(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = say(compiled_model(load, "gemma3"))
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is compiled any more
    model = compiled_model(load, "gemma3", name="other", context=1000, max_batch=7)
    assert say(model) == wanted
    model.configure(max_batch=2, context=300)
    assert model.compilation.status == "compiled"
    assert say(model) == wanted


def test_it_is_switched_off_and_on(load: Callable[..., ik.Model]) -> None:
    model = compiled_model(load, "gemma3")
    wanted = say(model)
    model.configure(compile=False)
    assert eager_reason(model) == "compile=False"
    assert not model._parts.engine.runner.compiled
    assert say(model) == wanted
    model.configure(compile=True)
    assert model.compilation.status == "compiled"
    assert say(model) == wanted


def test_quantized_layers_run_their_own_code_and_unquantized_ones_the_compiled(
    load: Callable[..., ik.Model],
) -> None:
    model = compiled_model(load, "gemma3")
    wanted = say(model)
    model.quantize("nf4", progress=False)
    assert "quantized layers" in eager_reason(model)
    model.quantize("none", progress=False)
    assert model.compilation.wait(PATIENCE)
    assert say(model) == wanted


@pytest.mark.thorough
@pytest.mark.slow
def test_weights_in_four_bits_run_compiled_too(load: Callable[..., ik.Model]) -> None:
    model = load("llama", quantize="int4wo", compile=False)
    wanted = say(model)
    model.configure(compile=True)
    assert model.compilation.wait(PATIENCE), str(model.compilation)
    assert say(model) == wanted


def test_rows_that_are_multiplied_by_tiles_are_not_compiled(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packing, "packable", lambda device, dtype: False)
    monkeypatch.setattr(tiled, "tileable", lambda device, dtype: device == "cpu")
    runner = load("llama", dtype="bfloat16", compile=False)._parts.engine.runner
    job = compiling._job(runner.module, runner.geometry) | {"folder": str(tmp_path)}
    monkeypatch.setattr(tracing, "_compile", lambda program, target: target.touch())
    monkeypatch.setattr(tracing, "_try_to_load", lambda file: None)
    tracing.run(job, lambda done, total: None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0-one.pt2", "layers.json"]

    class Ran(Exception):
        pass

    def boxed_run(given: list[Any]) -> Any:
        raise Ran

    monkeypatch.setattr(compiled, "program", lambda path: SimpleNamespace(boxed_run=boxed_run))
    runner.prefill([Chunk(slot, PROMPTS[1], 0) for slot in (0, 1)])
    wanted = runner.decode([9, 9], [7, 7])
    runner.use_compiled(compiled.CompiledLayers(runner.module, tmp_path))
    assert torch.equal(runner.decode([9, 9], [7, 7]), wanted)
    with pytest.raises(Ran):
        runner.decode([9], [7])
    runner.use_compiled(None)


@pytest.fixture
def traced(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], tuple[list[str], list[str]]]:
    """For which kinds of passes an architecture's layers are compiled in bf16, and the files."""
    if kernels.reason():
        pytest.skip(f"no kernels here: {kernels.reason()}")
    monkeypatch.setattr(tracing, "_compile", lambda program, target: target.touch())
    monkeypatch.setattr(tracing, "_try_to_load", lambda file: None)

    def of(arch: str) -> tuple[list[str], list[str]]:
        runner = load(arch, dtype="bfloat16", compile=False)._parts.engine.runner
        job = compiling._job(runner.module, runner.geometry) | {"folder": str(tmp_path)}
        told: list[tuple[int, int]] = []
        tracing.run(job, lambda *done: told.append(done))
        assert [done for done, _ in told] == list(range(len(told)))
        contents = json.loads((tmp_path / compiled.CONTENTS).read_text(encoding="utf-8"))
        return contents["kinds"], sorted(f.name for f in tmp_path.glob("*.pt2"))

    return of


def test_experts_are_not_copied_for_each_token_of_a_prompt(traced: Callable[..., Any]) -> None:
    assert traced("mixtral")[0] == ["one", "many"]


def test_where_prompts_cannot_be_compiled_the_step_still_is(
    traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tracing._make

    def fails(shared: Any, kind: str, folder: Path) -> None:
        make(shared, kind, folder)
        if kind == "read":
            raise RuntimeError("no luck")

    monkeypatch.setattr(tracing, "_make", fails)
    assert traced("llama") == (["one", "many"], ["0-many.pt2", "0-one.pt2"])
    monkeypatch.setattr(tracing, "_make", make)
    assert traced("llama") == (
        ["one", "many", "read"],
        ["0-many.pt2", "0-one.pt2", "0-read.pt2"],
    )


def test_damaged_code_is_made_again_by_the_next_load(
    load: Callable[..., ik.Model], cache: Path, tmp_path: Path
) -> None:
    compiled_model(load, "gemma3").unload()
    runner = load("gemma3", compile=False)._parts.engine.runner
    folder = compiling._home(compiling._job(runner.module, runner.geometry))
    shutil.copytree(folder, tmp_path / "kept")
    (folder / "0-one.pt2").write_bytes(b"damaged")
    model = load("gemma3", compile=True)
    assert eager_reason(model)
    assert len(say(model)) == len(PROMPTS)
    assert not folder.exists()
    shutil.copytree(tmp_path / "kept", folder)  # for the other tests


# -- what may go wrong ---------------------------------------------------------------------------


def test_without_a_compiler_the_step_stays_as_it_is(
    load: Callable[..., ik.Model], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = load("qwen3", compile=True)
    assert "no C++ compiler" in eager_reason(model)
    assert len(say(model)) == len(PROMPTS)


def test_a_compiler_that_fails_leaves_a_reason_and_no_files(
    load: Callable[..., ik.Model], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {*(cache / "compiled").glob("*")}
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    model = load("qwen3", compile=True)
    assert eager_reason(model)
    assert len(say(model)) == len(PROMPTS)
    left = {*(cache / "compiled").glob("*")} - before
    assert not [f for f in left if not f.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("loading", "error", "said"),
    [
        ("os.abort()", tracing.UntraceableError, "it ends the process, SIGABRT"),
        ("raise RuntimeError('odd')", tracing.UntraceableError, "RuntimeError: odd"),
        ("os.kill(os.getpid(), 9)", RuntimeError, "SIGKILL"),  # for want of memory, perhaps
        ("time.sleep(60)", RuntimeError, "does not load within"),
    ],
)
def test_code_that_cannot_be_loaded_is_not_kept(
    load: Callable[..., ik.Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loading: str,
    error: type[Exception],
    said: str,
) -> None:
    runner = load("llama", compile=False)._parts.engine.runner
    made = tmp_path / "made"
    made.mkdir()
    job = compiling._job(runner.module, runner.geometry) | {"folder": str(made)}
    # In the process that tries, what loads code is this.
    engine = tmp_path / "inferkit" / "engine"
    engine.mkdir(parents=True)
    for package in (engine, engine.parent):
        (package / "__init__.py").touch()
    (engine / "compiled.py").write_text(f"import os, time\ndef program(path):\n    {loading}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tracing, "_compile", lambda program, target: target.touch())
    monkeypatch.setattr(tracing, "_LOADED", 5)
    with pytest.raises(error, match=said) as raised:
        tracing.run(job, lambda done, total: None)
    assert type(raised.value) is error
    assert [f.name for f in made.iterdir()] == ["0-one.pt2"]


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="sessions share nothing out")
def test_the_compiler_gives_way_though_it_is_a_session_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "NICE", 7)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        compiling._give_way(process.pid)
        session = Path(f"/proc/{process.pid}/autogroup").read_text()
        assert psutil.Process(process.pid).nice() == 7
        process.kill()
    assert session.split()[-1] == "7"


@pytest.mark.parametrize("lasting", [True, False])
def test_what_would_fail_again_is_not_tried_again(
    load: Callable[..., ik.Model], cache: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    said = json.dumps({"error": "no luck", "lasting": lasting})
    tried = []

    @contextlib.contextmanager
    def worker(*_: Any) -> Iterator[subprocess.Popen[str]]:
        tried.append(1)
        pipe = subprocess.PIPE
        command = ["sh", "-c", 'read job; echo "$0"; exit 1', said]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            yield process

    monkeypatch.setattr(compiling, "_worker", worker)
    for name in ("first", "second"):
        model = load("qwen3", name=name, compile=True)
        assert eager_reason(model) == "no luck"
        assert len(say(model)) == len(PROMPTS)
    assert len(tried) == 1 + (not lasting)
    assert not [f for f in (cache / "compiled").iterdir() if ".tmp-" in f.name]
    for why in (cache / "compiled").glob(".*.why"):
        why.unlink()


def test_code_that_says_something_else_is_not_used(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = say(compiled_model(load, "gemma3"))
    own = compiled._weight
    monkeypatch.setattr(compiled, "_weight", lambda m, n: own(m, n) * 1.5)
    model = load("gemma3", name="wrong", compile=True)
    assert "gives other logits" in eager_reason(model)
    assert say(model) == wanted
    assert "forward" not in vars(model._parts.loaded.module.model.layers[0])


def test_an_unload_ends_the_work_and_leaves_nothing(
    load: Callable[..., ik.Model], cache: Path
) -> None:
    model = load("qwen3", compile=True)
    compilation, mine = model.compilation, psutil.Process()
    deadline = time.monotonic() + 60
    # A child of ours has our own command line until it is the program that it is to become.
    while not (found := [p for p in mine.children() if "inferkit.engine.tracing" in p.cmdline()]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (worker,) = found
    model.unload()
    assert not compilation.wait(30)
    assert compilation.reason == "it was stopped"
    worker.wait(30)
    assert not [f for f in (cache / "compiled").iterdir() if ".tmp-" in f.name]


def test_requests_one_at_a_time_are_not_compiled(load: Callable[..., ik.Model]) -> None:
    assert eager_reason(load("mamba", compile=True)) == "requests run one at a time"


def test_auto_leaves_small_models_and_obeys_the_environment(
    load: Callable[..., ik.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert eager_reason(load("gemma3", compile="auto")) == "INFERKIT_COMPILE=0"
    monkeypatch.delenv("INFERKIT_COMPILE")
    assert "gains little" in eager_reason(load("gemma3", name="small", compile="auto"))
    monkeypatch.setattr(compiling, "SMALL", 0)
    monkeypatch.setattr(compiling, "ROOM", 1 << 60)
    assert "are free" in eager_reason(load("qwen3", compile="auto"))


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_another_word_is_refused(tiny_model: Callable[[str], Path], value: Any) -> None:
    with pytest.raises(ik.OptionError, match="compile="):
        ik.load(tiny_model("llama"), compile=value)


# -- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["gemma3", "llama", "qwen3", "gpt2"])
def test_graphs_say_the_same(load: Callable[..., ik.Model], arch: str) -> None:
    model = load(arch, device="cuda", compile=False, context=1000, max_batch=6)
    wanted = say(model)
    model.configure(compile=True)
    assert str(model.compilation) == "compiled"
    graphs = model._parts.engine.runner.graphs
    assert say(model) == wanted
    assert [say(model, [prompt])[0] for prompt in PROMPTS] == wanted
    assert graphs is not None
    assert graphs.reason is None
    model.configure(max_batch=3, context=500)
    assert say(model) == wanted


@pytest.mark.gpu
def test_graphs_give_their_memory_back(load: Callable[..., ik.Model]) -> None:
    taken = []
    for _ in range(3):
        model = load("llama", device="cuda", compile=True, max_batch=8)
        say(model)
        model.unload()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert taken[1] == taken[2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arch", "mode"), [("llama", "nf4"), ("llama", "int8"), ("mixtral", "none")]
)
def test_another_step_is_captured_or_says_why_not(
    load: Callable[..., ik.Model], arch: str, mode: str
) -> None:
    model = load(arch, device="cuda", dtype="bfloat16", quantize=mode, compile=False)
    wanted = say(model, PROMPTS[:1])
    model.configure(compile=True)
    print(arch, mode, model.compilation)
    assert model.compilation.status == "compiled" or model.compilation.reason
    assert say(model, PROMPTS[:1]) == wanted
