"""Experiments: recorded as they happen, kept in one file, opened, and run again."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastjsonschema
import measured
import pytest

import inferkit as ik
from inferkit import catalog, conversions
from inferkit.engine.request import Request
from inferkit.experiments import exports, recording, replay, rounding, store
from inferkit.experiments import file as files
from inferkit.experiments.environment import environment, scrubbed
from inferkit.generation import Settings

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "notebooks" / "experiments"
SCHEMA = ROOT / "inferkit" / "experiments" / "schemas" / "experiment-1.json"
PROMPTS = [list(range(5, 5 + n)) for n in (1, 7, 30, 3)]
OPTIONS: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}


def load(folder: Path) -> ik.Model:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 192}
    return ik.load(folder, max_batch=3, progress=False, **options)


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    with load(tiny_model("llama")) as loaded:
        yield loaded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "one.json"


@pytest.fixture(scope="module")
def taken(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ik.Experiment, Path]:
    """What `recorded` gives a copy of, and its file."""
    path = tmp_path_factory.mktemp("taken") / "one.json"
    with load(tiny_model("llama")) as model, ik.record("first", path=path, progress=False) as exp:
        model.generate(PROMPTS, **OPTIONS)
        model.quantize("nf4", progress=False)
        model.generate(PROMPTS, temperature=0.8, seed=3, **OPTIONS)
        request = model.submit(PROMPTS[0], max_tokens=150, ignore_eos=True)
        while request.generated < 5:
            time.sleep(0.001)
        model.configure(batching="static")
        request.cancel()
        request.result()
    return exp, path


@pytest.fixture
def recorded(taken: tuple[ik.Experiment, Path], path: Path, model: ik.Model) -> ik.Experiment:
    """Four greedy requests, four that are drawn, one that is cancelled; nf4 and back."""
    shutil.copy(taken[1], path)
    return ik.Experiment(copy.deepcopy(taken[0].file), path, fresh=True)


# -- what is recorded ----------------------------------------------------------------------------


def test_all_of_every_request_is_in_the_file(model: ik.Model, path: Path) -> None:
    before = model.generate(PROMPTS, **OPTIONS)
    with ik.record("all", path=path, progress=False) as exp:
        gens = model.generate(PROMPTS, **OPTIONS)
        drawn = model.generate("Once", temperature=1.0, seed=None, stop=["zzz"], **OPTIONS)
    opened = ik.open(path)
    assert opened.file == exp.file
    assert len(opened.generations) == len(PROMPTS) + 1
    for got, gen in zip(opened.generations, [*gens, drawn]):
        names = ("token_ids", "prompt_token_ids", "text", "prompt", "finish_reason", "settings")
        assert [getattr(got, n) for n in names] == [getattr(gen, n) for n in names]
        assert (got.seed, got.params) == (gen.seed, gen.params)
        for name in ("ttft", "tpot", "itl", "e2e", "queue"):
            assert getattr(got.latency, name) == pytest.approx(getattr(gen.latency, name))
    assert [gen.token_ids for gen in before] == [gen.token_ids for gen in gens]
    assert opened.complete
    assert opened.duration == exp.duration
    assert opened.summary().ttft.p50 == pytest.approx(ik.summarize([*gens, drawn]).ttft.p50)


def test_it_says_what_it_ran_on_and_nothing_of_who_ran_it(
    recorded: ik.Experiment, path: Path, model: ik.Model
) -> None:
    (entry,) = recorded.file.models
    assert entry.files == model.source.sha256(progress=False)
    assert "model.safetensors" in entry.files
    env = recorded.environment
    assert env.packages["torch"]
    assert env.devices[-1].name == "cpu"
    # In base64 a short name may be found that nobody wrote.
    text = re.sub(r'"zlib":"[^"]*"', "", path.read_text(encoding="utf-8"))
    for secret in (str(Path.home()), str(path.parent), os.uname().nodename, str(model.path)):
        assert secret not in text


def test_changes_of_mode_are_where_they_happened(recorded: ik.Experiment) -> None:
    modes = recorded.file.modes
    assert [(m.quantize, m.batching) for m in modes][:3] == [
        ("none", "continuous"),
        ("nf4", "continuous"),
        ("nf4", "static"),
    ]
    of_requests = [modes[one.mode].quantize for one in recorded.file.requests]
    assert of_requests == ["none"] * 4 + ["nf4"] * 5
    assert modes[1].time <= recorded.file.requests[4].arrival
    assert modes[1].time >= max(one.finished or 0 for one in recorded.file.requests[:4])


def test_what_is_loaded_meanwhile_is_recorded_too(
    tiny_model: Callable[[str], Path], path: Path
) -> None:
    with (
        ik.record("later", path=path, progress=False) as exp,
        ik.load(tiny_model("llama"), device="cpu", progress=False) as loaded,
    ):
        gen = loaded.generate(PROMPTS[0], max_tokens=3)
    assert exp.generations[0].token_ids == gen.token_ids
    assert not recording.registry.on_load


def test_redacted_leaves_out_what_was_said_and_keeps_the_times(model: ik.Model, path: Path) -> None:
    with ik.record("secret", path=path, redact=True, progress=False) as exp:
        gen = model.generate("my password", stop=["hunter2"], **OPTIONS)
    text = path.read_text(encoding="utf-8")
    (one,) = ik.open(path).generations
    assert "password" not in text
    assert "hunter2" not in text
    assert (one.prompt, one.text, one.token_ids, one.prompt_token_ids) == (None, "", (), ())
    assert one.latency.itl == pytest.approx(gen.latency.itl)
    assert one.latency.prompt_tokens == len(gen.prompt_token_ids)
    assert "password" not in repr(exp)


def test_a_failed_request_keeps_its_error_without_folders(
    model: ik.Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = model._parts.engine.runner

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"no luck in {Path.home()}/models/x")

    monkeypatch.setattr(runner, "prefill", fail)
    with ik.record("failed", path=path, progress=False), pytest.warns(UserWarning, match="failed"):
        model.generate(PROMPTS[0])
    (gen,) = ik.open(path).generations
    assert isinstance(gen.error, ik.GenerationError)
    assert "no luck in" in str(gen.error)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


def test_requests_from_many_threads_are_all_there(model: ik.Model, path: Path) -> None:
    with ik.record("threads", path=path, progress=False) as exp:
        threads = [
            threading.Thread(target=model.generate, args=(PROMPTS,), kwargs={"max_tokens": 2})
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(exp.generations) == 20
    assert len(ik.open(path).generations) == 20


def test_two_recordings_at_once_have_the_same(model: ik.Model, tmp_path: Path) -> None:
    with (
        ik.record("a", path=tmp_path / "a.json", progress=False) as a,
        ik.record("b", path=tmp_path / "b.json", progress=False) as b,
    ):
        model.generate(PROMPTS[0], max_tokens=3)
    assert a.generations[0].token_ids == b.generations[0].token_ids


# -- the file -------------------------------------------------------------------------------------


CRASHES = """
import os, sys, time
import inferkit as ik
model = ik.load(sys.argv[1], device="cpu", dtype="float32", context=4096, progress=False)
recording = ik.record("crash", path=sys.argv[2], progress=False)
recording.start()
done = model.generate([5, 6, 7], max_tokens=4, ignore_eos=True)
request = model.submit([5, 6, 7], max_tokens=4000, ignore_eos=True)
while request.generated < 20:
    time.sleep(0.01)
print(request.generated, flush=True)
time.sleep(1)
os.kill(os.getpid(), 9)
"""


def test_a_crash_loses_no_more_than_the_last_second(
    tiny_model: Callable[[str], Path], path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tiny_model("llama")), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    exp = ik.open(path)
    assert not exp.complete
    assert "not brought to its end" in exp.notes[-1]
    finished, cut = exp.file.requests
    assert finished.finish_reason == "length"
    assert cut.finish_reason is None
    assert len(cut.tokens) >= int(done.stdout)  # those of a second before
    with pytest.raises(ik.OptionError, match=r"ik\.open"):  # nothing is lost by starting again
        ik.record("crash", path=path)


def test_remembered_digests_are_in_the_journal_from_the_beginning(
    model: ik.Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where requests never leave time to read the files.
    monkeypatch.setattr(recording.Recording, "_hash_meanwhile", lambda _: None)
    digests = model.source.sha256(progress=False)
    recorder = ik.record("busy", path=path, progress=False)
    recorder.start()
    assert ik.open(path).file.models[0].files == digests
    recorder.stop()


def test_a_model_that_joins_is_hashed_too(
    model: ik.Model,
    path: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowly(of: ik.Model) -> dict[str, str]:
        time.sleep(0.6)  # longer than a tick
        return {}

    monkeypatch.setattr(conversions, "sha256_notes", lambda: tmp_path / "notes")
    monkeypatch.setattr(recording, "_known_files", slowly)
    with (
        ik.record("joined", path=path, progress=False) as exp,
        ik.load(tiny_model("qwen3"), progress=False),
    ):
        deadline = time.monotonic() + 20
        while not all(entry.files for entry in exp.file.models):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_no_piece_of_text_is_lost_on_the_way(
    model: ik.Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(list[int]):
        def append(self, end: int) -> None:
            super().append(end)
            time.sleep(0.02)  # the file is written meanwhile

    made = Request.__init__

    def make(request: Request, *args: Any, **options: Any) -> None:
        made(request, *args, **options)
        request._text_ends = Slow()

    monkeypatch.setattr(Request, "__init__", make)
    monkeypatch.setattr(recording, "_TICK", 0.01)
    with ik.record("slow", path=path, progress=False):
        gen = model.generate(PROMPTS[0], max_tokens=60, ignore_eos=True)
    assert ik.open(path).generations[0].text == gen.text


def test_digests_are_known_before_the_end_and_read_while_nothing_runs(
    model: ik.Model, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversions, "sha256_notes", lambda: tmp_path / "notes")
    recorder = ik.record("long", path=path, progress=False)
    exp = recorder.start()
    request = model.submit(PROMPTS[0], max_tokens=180, ignore_eos=True)
    while not request.done:
        assert exp.file.models[0].files == {}
        time.sleep(0.001)
    deadline = time.monotonic() + 20
    while not ik.open(path).file.models[0].files:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ik.open(path).file.models[0].files == model.source.sha256(progress=False)
    recorder.stop()
    assert ik.open(path).file.models[0].files


def test_a_replay_says_where_it_cannot_check_the_model(model: ik.Model, path: Path) -> None:
    with ik.record("crashed", path=path, progress=False) as exp:
        model.generate(PROMPTS[0], **OPTIONS)
    assert not any("sha256" in note for note in ik.replay(exp, progress=False).notes)
    exp.file.models[0].files = {}
    (note,) = (note for note in ik.replay(exp, progress=False).notes if "sha256" in note)
    assert "was not checked" in note
    assert note in repr(ik.replay(exp, progress=False))


def test_a_damaged_last_line_of_the_journal_is_left_out(
    recorded: ik.Experiment, path: Path
) -> None:
    whole = store.Journal(path, recorded.file)
    whole.close()
    journal = path.with_name(path.name + store.PARTIAL)
    with journal.open("ab") as out:
        out.write(b'{"type":"tokens","requ')
    path.unlink()
    assert len(ik.open(path).generations) == len(recorded.generations)


@pytest.mark.parametrize("length", [0, 1, 100, 2000])
def test_a_truncated_file_says_so(recorded: ik.Experiment, path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ik.ExperimentError, match="cut off"):
        ik.open(path)


def change(data: dict[str, Any], keys: list[Any], value: Any) -> None:
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["format"], "other", "no experiment"),
        (["version"], 2, "upgrade"),
        (["version"], "x", "none"),
        (["models", 0, "name"], 7, r"models\[0\].name"),
        (["requests", 0, "model"], 5, "model 5"),
        (["requests", 0, "mode"], -1, r"requests\[0\].mode"),
        (["requests", 0, "mode"], 99, "mode 99"),
        (["requests", 0, "tokens"], [1, 2], "times"),
        (["requests", 0, "tokens"], {"n": 40, "zlib": "!"}, "damaged"),
        (["requests", 0, "tokens"], {"n": 1, "zlib": "eNpjYIAAxlF6UNAAJ9gAMg=="}, "damaged"),
        (["requests", 0, "arrival"], 10**15, "backwards"),
        (["requests", 0, "params", "temperature"], -1, "temperature"),
        (["requests", 0, "settings"], {}, "missing"),
        (["requests"], 3, r"\$.requests"),
        (["created"], "yesterday", "created"),
    ],
)
def test_an_edited_file_says_what_is_wrong(
    recorded: ik.Experiment, path: Path, keys: list[Any], value: Any, said: str
) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data, keys, value)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ik.ExperimentError, match=said):
        ik.open(path)


def test_what_a_later_version_adds_is_left_alone(recorded: ik.Experiment, path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["new"] = data["requests"][0]["newer"] = {"a": 1}
    path.write_text(json.dumps(data), encoding="utf-8")
    assert len(ik.open(path).generations) == len(recorded.generations)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00\xff", '{"format": null}'])
def test_another_file_is_refused(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ik.ExperimentError):
        ik.open(path)


def test_no_file_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ik.ExperimentError, match=r"ik\.record"):
        ik.open(tmp_path / "none.json")
    with pytest.raises(ik.ExperimentError, match="cannot be read"):
        ik.open(tmp_path)


def test_a_file_that_is_there_stays(recorded: ik.Experiment, path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ik.OptionError, match="overwrite=True"):
        ik.record("again", path=path)
    with pytest.raises(ik.OptionError, match="overwrite=True"):
        recorded.save(path)
    with pytest.raises(ik.OptionError, match="no folder"):
        recorded.save(tmp_path / "no" / "where.json")
    assert path.read_bytes() == before
    assert recorded.save(tmp_path / "copy.json").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir() if ".partial" in f.name] == []


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_it_needs_a_name(name: Any) -> None:
    with pytest.raises(ik.OptionError, match="call the experiment"):
        ik.record(name)


def test_a_full_disk_ends_the_recording_and_not_the_run(
    model: ik.Model, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    recorder = ik.record("full", path=path, progress=False)
    exp = recorder.start()
    monkeypatch.setattr(store.Journal, "add", full)
    monkeypatch.setattr(store, "write", full)
    gen = model.generate(PROMPTS[0], **OPTIONS)
    with pytest.warns(UserWarning, match=r"No space left.*exp\.save"):
        recorder.stop()
    monkeypatch.undo()
    assert gen.finish_reason == "length"
    saved = exp.save(tmp_path / "elsewhere.json")
    assert ik.open(saved).generations[0].token_ids == gen.token_ids


def test_the_schema_is_that_of_the_code_and_files_follow_it(
    recorded: ik.Experiment, path: Path
) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema == files.schema()
    check = fastjsonschema.compile({**schema, "$schema": "http://json-schema.org/draft-07/schema#"})
    data = json.loads(path.read_text(encoding="utf-8"))
    check(data)
    data["requests"][0]["arrival"] = "soon"
    with pytest.raises(fastjsonschema.JsonSchemaException):
        check(data)
    data = json.loads(path.read_text(encoding="utf-8"))
    for other in ({"format": "other"}, {"version": 2}):
        with pytest.raises(fastjsonschema.JsonSchemaException, match=next(iter(other))):
            check(data | other)
    del data["version"]
    with pytest.raises(fastjsonschema.JsonSchemaException, match="version"):
        check(data)


def test_the_schema_says_what_a_reader_in_another_language_needs() -> None:
    made = files.schema()["$defs"]
    params = made["RequestEntry"]["properties"]["params"]
    sampling = made[params["$ref"].rpartition("/")[2]]["properties"]
    assert set(sampling) == {f.name for f in dataclasses.fields(ik.SamplingParams)}
    assert sampling["temperature"] == {
        "type": "number",
        "minimum": 0,
        "description": "0, or less than 1e-5, takes the likeliest token.",
    }
    settings = made["RequestEntry"]["properties"]["settings"]
    ran_under = made[settings["$ref"].rpartition("/")[2]]["properties"]
    assert set(ran_under) == {f.name for f in dataclasses.fields(Settings)}
    reason = made["RequestEntry"]["properties"]["finish_reason"]["anyOf"][0]
    assert set(reason["enum"]) == {"stop", "length", "cancelled", "error"}
    assert made["ModeEntry"]["properties"]["step"]["enum"] == ["compiled", "eager", "unknown"]
    for structure in made.values():
        for name, one in structure["properties"].items():
            assert "const" in one or one["description"], (structure["title"], name)
    text = SCHEMA.read_text(encoding="utf-8")
    assert "`" not in text
    assert "None" not in text


def test_what_is_saved_meanwhile_can_be_read(
    model: ik.Model, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a request gets further at the very moment."""
    apply, half_done, saved = files.apply, threading.Event(), []

    def slow(file: files.ExperimentFile, line: files.Line) -> None:
        if isinstance(line, files.Progress) and line.tokens and not half_done.is_set():
            file.requests[line.request].token_ids.extend(line.token_ids)
            line.token_ids = []
            half_done.set()
            time.sleep(0.3)
        apply(file, line)

    monkeypatch.setattr(files, "apply", slow)
    with ik.record("meanwhile", path=path, progress=False) as exp:
        model.generate(PROMPTS[0], **OPTIONS)
        assert half_done.wait(20)
        saved.append(exp.save(tmp_path / "copy.json"))
    assert ik.open(saved[0]).name == "meanwhile"


@pytest.mark.parametrize("values", [[], [0], list(range(100)), [2**62, -5] * 40, [7] * 5000])
def test_numbers_are_packed_and_come_back(values: list[int]) -> None:
    packed = files.pack(values)
    assert files.unpack(packed) == values
    assert len(values) <= 32 or isinstance(packed, files.Packed)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no /home/alice/x/model.bin here", "no model.bin here"),
        (r"C:\Users\alice\m.gguf is bad", "m.gguf is bad"),
        (r"C:\Users\Alice Smith\my models\m.gguf is bad", "m.gguf is bad"),
        (r"'C:\\Users\\alice\\m.gguf'", "'m.gguf'"),
        ("C:/Users/alice/m.gguf", "m.gguf"),
        (r"D:\work\alice\m.gguf", "m.gguf"),
        (r"\\server\alice\x", "x"),
        (r"\\server\alice", ""),
        ("error:/home/alice/x", "error:x"),
        ("/home/alice", "~"),
        ("in /Users/alice: denied", "in ~: denied"),
        ("/mnt/c/Users/alice", "~"),
        ("file:///home/alice/x.bin", "x.bin"),
        ("file:///C:/Users/alice/x.bin", "x.bin"),
        ("~/models/x.bin", "x.bin"),
        ("https://user:tok@host/x", "https://host/x"),
        ("https://user:t/k@host/x", "https://host/x"),
        ("https://tok@host/x", "https://host/x"),
        ("https://example.org/home/alice/x", "https://example.org/~/x"),
        ("https://example.org/a/b stays", "https://example.org/a/b stays"),
        ("https://example.org:8000/a/b stays", "https://example.org:8000/a/b stays"),
        ("1/2 of a/b", "1/2 of a/b"),
        ("RuntimeError: org/model at 3:4", "RuntimeError: org/model at 3:4"),
    ],
)
def test_folders_and_users_are_taken_out_of_messages(text: str, left: str) -> None:
    assert scrubbed(text) == left


@pytest.fixture
def same_named(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ik.Model, ik.Model]]:
    """Two models from folders of one name, called by their paths in the working directory."""
    monkeypatch.chdir(tmp_path)
    for folder in ("alice/a/m", "alice/b/m"):
        shutil.copytree(tiny_model("llama"), folder)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 128}
    with (
        ik.load("alice/a/m", progress=False, **options) as a,
        ik.load("alice/b/m", progress=False, **options) as b,
    ):
        yield a, b


def test_models_from_folders_of_one_name_are_told_apart_without_their_folders(
    same_named: tuple[ik.Model, ik.Model], path: Path
) -> None:
    a, b = same_named
    with ik.record("two", path=path, progress=False) as exp:
        assert b.name == "alice/b/m"
        for model in (a, b):
            model.generate(PROMPTS[1], **OPTIONS)
    assert [entry.name for entry in exp.file.models] == ["m", "m-2"]
    assert [gen.settings.model for gen in exp.generations] == ["m", "m-2"]
    assert "alice" not in re.sub(r'"zlib":"[^"]*"', "", path.read_text(encoding="utf-8"))
    folders = {"m": "alice/a/m", "m-2": "alice/b/m"}
    assert ik.replay(path, model=folders, progress=False).exact


@pytest.mark.parametrize("joined", [True, False])
def test_a_draft_model_is_named_without_its_folders(
    same_named: tuple[ik.Model, ik.Model], path: Path, joined: bool
) -> None:
    a, b = same_named
    a.configure(speculative=f"draft:{b.name}")
    only = None if joined else [a]
    with recording.Recording("draft", path, progress=False, models=only) as exp:
        a.generate(PROMPTS[2], **OPTIONS)
    assert [mode.speculative for mode in exp.file.modes][:1] == ["draft:m-2"]
    assert exp.generations[0].settings.speculative == "draft:m-2"
    assert [entry.name for entry in exp.file.models] == ["m", "m-2"][: 1 + joined]
    assert "alice" not in re.sub(r'"zlib":"[^"]*"', "", path.read_text(encoding="utf-8"))


def test_the_environment_tells_the_notebook_by_its_name_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/alice/work/01.ipynb")
    assert environment().notebook == "01.ipynb"
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert environment().notebook is None


# -- run again -----------------------------------------------------------------------------------


def test_a_replay_gives_the_same_tokens_and_its_own_times(
    recorded: ik.Experiment, path: Path, model: ik.Model
) -> None:
    found = ik.replay(path, progress=False)
    assert found.exact
    assert found.ok
    assert [o.kind for o in found.outcomes] == ["equal"] * 9
    assert found.verdict.startswith("Reproduced: 9 of 9 requests gave the recorded tokens.")
    assert len(found.measured.generations) == 9
    assert [m.quantize for m in found.measured.file.modes][:2] == ["none", "nf4"]
    cancelled = found.outcomes[-1]
    assert cancelled.measured is not None
    assert len(cancelled.measured.token_ids) == len(cancelled.recorded.token_ids)
    json.dumps(found.to_dict())
    assert "measured here and now" in repr(found)
    assert "measured here and now" in found._repr_html_()
    # The model is as it was before.
    assert (model.quantization, model.batching, model.max_batch) == ("none", "continuous", 3)


def test_a_replay_loads_the_model_and_unloads_it(
    recorded: ik.Experiment, path: Path, model: ik.Model, tiny_model: Callable[[str], Path]
) -> None:
    model.unload()
    with pytest.raises(ik.ExperimentError, match="model='path'"):
        ik.replay(path, progress=False)
    assert ik.replay(path, model=tiny_model("llama"), progress=False).exact
    assert ik.models() == []


@pytest.fixture
def overlapping(
    model: ik.Model,
    path: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[ik.Experiment]:
    """A model becomes nf4, and then something else, while another one generates."""
    monkeypatch.setattr(recording, "_TICK", 0.01)  # each change is seen, without a request
    model.quantize("nf4", progress=False).quantize("none", progress=False)  # quicker next time
    with ik.load(tiny_model("qwen3"), context=4096, progress=False) as other:
        with ik.record("two", path=path, progress=False) as exp:
            long = other.submit("Meanwhile", max_tokens=4000, ignore_eos=True)
            model.generate(PROMPTS, **OPTIONS)
            for change in (
                lambda: model.quantize("nf4", progress=False),
                lambda: model.configure(batching="off"),
                lambda: model.configure(batching="static"),
            ):
                seen, deadline = len(exp.file.modes), time.monotonic() + 20
                change()
                while len(exp.file.modes) == seen:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            model.generate(PROMPTS, **OPTIONS)
            long.cancel()
            assert long.result().finish_reason == "cancelled", "it ended too early"
        model.quantize("none", progress=False).configure(batching="continuous")
        yield exp


class SlowChange:
    """Changes of mode take longer than in the recording: the earlier, the longer."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.seconds = 0.9
        self.on_begin: Callable[[], None] = lambda: None
        self.go_on = threading.Event()
        self._change = replay._Run._change

    def __call__(self, run: Any, mode: Any) -> None:
        self.begun += 1
        if self.begun == 1:
            self.on_begin()
        self.go_on.wait(self.seconds / self.begun)
        self._change(run, mode)
        self.ended += 1


@pytest.fixture
def slow_change(monkeypatch: pytest.MonkeyPatch) -> SlowChange:
    slow = SlowChange()
    monkeypatch.setattr(replay._Run, "_change", lambda run, mode: slow(run, mode))
    # Models are not brought to their first mode by it.
    monkeypatch.setattr(replay._Run, "_become", lambda run, mode: slow._change(run, mode))
    return slow


def test_changes_of_mode_that_take_longer_here_are_waited_for_in_their_order(
    overlapping: ik.Experiment, slow_change: SlowChange
) -> None:
    found = ik.replay(overlapping, progress=False)
    assert slow_change.ended == 3
    assert [o.kind for o in found.outcomes[1:]] == ["equal"] * 2 * len(PROMPTS)
    last = [o.measured for o in found.outcomes[-len(PROMPTS) :]]
    assert {gen.settings.batching for gen in last} == {"static"}
    # What they waited for is no time of theirs.
    assert min(gen.latency.queue for gen in last) < 0.5


def test_a_difference_is_judged_in_the_mode_in_which_it_came(
    overlapping: ik.Experiment, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = overlapping.file.requests[1], overlapping.file.requests[-1]
    for one in (early, late):
        ids = list(files.unpack(one.token_ids))
        one.token_ids = [*ids[:5], (ids[5] + 1) % 100, *ids[6:]]
    seen = []

    def judge(of: ik.Model, *args: Any) -> rounding.Judgement:
        seen.append(of.quantization)
        time.sleep(0.1)  # so that a change would be recorded
        return rounding.judge(of, *args)

    monkeypatch.setattr(replay, "judge", judge)
    found = ik.replay(overlapping, progress=False)
    assert seen == ["none", "nf4"]
    assert [o.kind for o in found.outcomes].count("differs") == 2
    measured = found.measured.file
    (number,) = (i for i, entry in enumerate(measured.models) if entry.name == model.name)
    modes = [mode.quantize for mode in measured.modes if mode.model == number]
    assert [quantize for quantize, _ in itertools.groupby(modes)] == ["none", "nf4"]


def test_a_difference_that_cannot_be_judged_says_why(
    overlapping: ik.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = overlapping.file.requests[1]
    ids = list(files.unpack(one.token_ids))
    one.token_ids = [*ids[:5], (ids[5] + 1) % 100, *ids[6:]]

    def full(*_: Any) -> None:
        raise ik.DoesNotFitError("no room")

    monkeypatch.setattr(replay._Run, "_as_it_came", full)
    outcome = ik.replay(overlapping, progress=False).outcomes[1]
    assert outcome.kind == "differs"
    assert outcome.reason.startswith("it was not judged in none (no room)")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupt_during_a_change_of_mode_leaves_the_models_as_they_were(
    overlapping: ik.Experiment,
    slow_change: SlowChange,
    model: ik.Model,
    monkeypatch: pytest.MonkeyPatch,
    again: bool,
) -> None:
    shutdown = ThreadPoolExecutor.shutdown

    def end(pool: ThreadPoolExecutor, *args: Any, **options: Any) -> None:
        if pool._thread_name_prefix != "inferkit-replay":
            return shutdown(pool, *args, **options)
        shutdown(pool, wait=False, cancel_futures=True)
        if again:
            interrupt()
        slow_change.go_on.set()
        return shutdown(pool, *args, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", end)
    slow_change.seconds = 60
    # While the replay waits for the change, as what comes next is due at once.
    slow_change.on_begin = lambda: threading.Timer(0.4, interrupt).start()
    if again:
        with pytest.raises(KeyboardInterrupt):
            ik.replay(overlapping, progress=False)
    else:
        found = ik.replay(overlapping, progress=False)
        assert any("interrupted" in note for note in found.notes)
    assert (slow_change.begun, slow_change.ended) == (1, 1)
    assert model.quantization == "none"
    assert "inferkit-record" not in {thread.name for thread in threading.enumerate()}


def test_a_change_of_mode_that_fails_ends_the_replay(
    overlapping: ik.Experiment, slow_change: SlowChange, model: ik.Model
) -> None:
    def fail() -> None:
        raise ik.OptionError("no room")

    slow_change.on_begin = fail
    with pytest.raises(ik.OptionError, match="no room"):
        ik.replay(overlapping, progress=False)
    assert model.quantization == "none"


def test_another_model_is_refused_unless_it_is_wanted(
    recorded: ik.Experiment, path: Path, model: ik.Model, tiny_model: Callable[[str], Path]
) -> None:
    model.unload()
    with pytest.raises(ik.ExperimentError, match="sha256"):
        ik.replay(path, model=tiny_model("qwen3"), progress=False)
    found = ik.replay(path, model=tiny_model("qwen3"), check_files=False, progress=False)
    assert not found.ok
    differing = [o for o in found.outcomes if o.kind == "differs"]
    assert differing
    assert found.verdict.startswith("Differs")
    greedy = next(o for o in differing if o.request < 4)
    assert greedy.gap is not None
    assert "nats apart" in greedy.reason


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json"], "other files beside the weights"),
        (["model.safetensors"], "other weights"),
        (["config.json", "model.safetensors"], "other weights, files beside the weights"),
    ],
)
def test_other_files_are_a_reason_and_noted(
    recorded: ik.Experiment, path: Path, names: list[str], said: str
) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["models"][0]["files"] |= dict.fromkeys(names, "0" * 64)
    ids = list(recorded.generations[0].token_ids)
    data["requests"][0]["token_ids"] = [*ids[:5], (ids[5] + 1) % 100, *ids[6:]]
    path.write_text(json.dumps(data), encoding="utf-8")
    found = ik.replay(path, check_files=False, progress=False)
    assert found.outcomes[0].reason.endswith(f"; {said}")
    (note,) = (note for note in found.notes if "other files than were recorded" in note)
    assert note.endswith(f"{', '.join(names)} have another sha256")


def failed_after(path: Path, count: int, reason: str | None = "error") -> None:
    """Make the first request of a file one that did not come to its end."""
    data = json.loads(path.read_text(encoding="utf-8"))
    one = data["requests"][0]
    for name in ("tokens", "token_ids", "text_ends"):
        one[name] = files.unpack(files.Packed(**one[name]))[:count]
    one["text"] = one["text"][: [0, *one["text_ends"]][-1]]
    one |= {"finish_reason": reason, "error": ["OutOfMemoryError", "no room"]}
    if reason is None:
        del one["error"], one["finished"]
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_request_that_failed_is_the_same_where_its_tokens_are(
    recorded: ik.Experiment, path: Path
) -> None:
    failed_after(path, 3)
    found = ik.replay(path, progress=False)
    first = found.outcomes[0]
    assert found.exact, found
    assert first.kind == "equal"
    assert first.reason == "up to where it failed (OutOfMemoryError: no room), after 3 tokens"
    assert first.measured is not None
    assert len(first.measured.token_ids) == 3


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("error", "it failed (OutOfMemoryError: no room) before its first token"),
        ("cancelled", "it was cancelled before its first token"),
        (None, "it had not ended before its first token"),
    ],
)
def test_a_request_without_a_token_is_not_run_again_and_says_why(
    recorded: ik.Experiment, path: Path, reason: str | None, said: str
) -> None:
    failed_after(path, 0, reason)
    found = ik.replay(path, progress=False)
    assert (found.outcomes[0].kind, found.outcomes[0].reason) == ("not run", said)
    assert found.ok


def test_a_difference_that_rounding_makes_is_told_from_one_that_it_does_not(
    recorded: ik.Experiment, path: Path, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    exp = ik.open(path)
    ids = list(exp.generations[0].token_ids)
    data["requests"][0]["token_ids"] = [*ids[:10], (ids[10] + 1) % 100, *ids[11:]]
    path.write_text(json.dumps(data), encoding="utf-8")
    found = ik.replay(path, progress=False)
    first = found.outcomes[0]
    assert (first.kind, first.difference) == ("differs", 10)
    assert "the same settings and versions" in first.reason
    assert not found.ok
    monkeypatch.setitem(rounding.ROUNDING, "float32", 1e6)
    found = ik.replay(path, progress=False)
    assert (found.ok, found.exact) == (True, False)
    assert found.verdict.startswith("Reproduced up to rounding")


def test_what_runs_the_same_way_again_rounds_the_same_way(
    path: Path, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rounding.ROUNDING, "float32", 1e6)
    with ik.record("alone", path=path, progress=False):
        model.generate([[40, 41, 42], [50, 51]], **OPTIONS)
    data = json.loads(path.read_text(encoding="utf-8"))
    ids = list(ik.open(path).generations[0].token_ids)
    data["requests"][0]["token_ids"] = [(ids[0] + 1) % 100, *ids[1:]]

    def replayed(**changes: Any) -> ik.Replay:
        path.write_text(json.dumps({**data, **changes}), encoding="utf-8")
        return ik.replay(path, progress=False)

    found = replayed()
    assert not found.ok
    assert "nothing rounds otherwise here; the same settings" in found.outcomes[0].reason
    packages = {**data["environment"]["packages"], "torch": "2.0"}
    found = replayed(environment={**data["environment"], "packages": packages})
    assert found.ok
    assert "rounding decides; other torch" in found.outcomes[0].reason
    entry = {**data["models"][0], "kernels": "0123456789abcdef"}
    assert "rounding decides; other kernels" in replayed(models=[entry]).outcomes[0].reason
    one, *others = data["requests"]
    later = [{**other, "arrival": other["arrival"] + 1} for other in others]
    assert replayed(requests=[one, *later]).ok  # for then it may have joined another batch
    found = [{**one, "cached_tokens": 1}, *others]
    assert replayed(requests=found).ok  # what earlier passes had computed


def test_every_change_of_mode_is_recorded_however_short(model: ik.Model, path: Path) -> None:
    before = model.max_batch, model.batching
    with ik.record("short", path=path, progress=False) as exp:
        model.configure(max_batch=3, batching="static")
        model.configure(max_batch=2)
        model.configure(max_batch=before[0], batching=before[1])
        model.configure()
    wanted = [before, (3, "static"), (2, "static"), before]
    assert [(mode.max_batch, mode.batching) for mode in exp.file.modes] == wanted
    assert [(mode.max_batch, mode.batching) for mode in ik.open(path).file.modes] == wanted
    times = [mode.time for mode in exp.file.modes]
    assert times == sorted(times)


def test_what_a_conversion_made_otherwise_is_named_by_what_it_is(
    path: Path, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rounding.ROUNDING, "float32", 1e6)
    with ik.record("alone", path=path, progress=False):
        model.generate([40, 41, 42], **OPTIONS)
    data = json.loads(path.read_text(encoding="utf-8"))
    ids = list(ik.open(path).generations[0].token_ids)
    data["requests"][0]["token_ids"] = [(ids[0] + 1) % 100, *ids[1:]]
    sha256 = catalog.Source.sha256
    monkeypatch.setattr(
        catalog.Source, "sha256", lambda self, **how: {**sha256(self, **how), "it.gguf": "00"}
    )
    for name, kind in (
        ("model.safetensors", "weights"),
        ("config.json", "files beside the weights"),
    ):
        files = {**data["models"][0]["files"], name: "1f" * 32, "it.gguf": "00"}
        changed = {**data, "models": [{**data["models"][0], "files": files}]}
        path.write_text(json.dumps(changed), encoding="utf-8")
        reason = ik.replay(path, progress=False).outcomes[0].reason
        assert f"other conversion of the {kind}" in reason


def test_the_verdict_says_of_times_what_the_difference_says(model: ik.Model, path: Path) -> None:
    with ik.record("few", path=path, progress=False):
        model.generate(PROMPTS, **OPTIONS)
        model.generate(PROMPTS[0], **OPTIONS)
    few = ik.replay(path, progress=False)
    assert few.latency.latency["tpot"].groups == 2
    assert few.verdict.count("2 groups of requests: too few to tell") == 2
    assert "interval" not in few.verdict
    with ik.record("more", path=path, overwrite=True, progress=False):
        for prompt in (*PROMPTS, PROMPTS[0]):
            model.generate(prompt, **OPTIONS)
    more = ik.replay(path, progress=False)
    found = more.latency.latency["tpot"]
    span = f"95 % interval {found.ratio.low:.2f} to {found.ratio.high:.2f}"
    assert f"({span} over 5 groups of requests: {found.verdict})" in more.verdict


def test_a_redacted_experiment_compares_times_alone(model: ik.Model, path: Path) -> None:
    with ik.record("secret", path=path, redact=True, progress=False):
        model.generate(PROMPTS, **OPTIONS)
    found = ik.replay(path, progress=False)
    assert {o.kind for o in found.outcomes} == {"not compared"}
    assert found.ok
    lengths = [g.latency.output_tokens for g in found.measured.generations]
    assert lengths == [40] * 4
    assert found.verdict.startswith("No token was verified: 4 requests ran again")
    assert "only times compare" in found.verdict
    assert not found.verified
    assert found.to_dict()["verified"] is False


def test_what_a_replay_did_otherwise_is_in_its_file(
    model: ik.Model, path: Path, tmp_path: Path
) -> None:
    with ik.record("secret", path=path, redact=True, progress=False) as exp:
        model.generate(PROMPTS, **OPTIONS)
    exp.file.models[0].devices = ["cuda:7"]
    found = ik.replay(exp, progress=False)
    saved = ik.open(found.measured.save(tmp_path / "saved.json"))
    assert saved.redacted
    assert all(gen.prompt_token_ids == () for gen in saved.generations)
    assert saved.notes == found.notes == found.measured.notes
    assert "prompts are random tokens of the recorded lengths" in saved.notes
    assert any("cuda:7, which is not attached" in note for note in saved.notes)


def test_the_command_line_says_where_no_token_was_verified(
    model: ik.Model, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from inferkit.cli import main

    for redact, said in ((True, 1), (False, 0)):
        with ik.record("x", path=path, redact=redact, overwrite=True, progress=False):
            model.generate(PROMPTS[0], max_tokens=3)
        capsys.readouterr()
        assert main(["replay", str(path), "--check"]) == 0
        assert capsys.readouterr().err.count("no token was verified") == said
    with pytest.raises(SystemExit):
        main(["replay", "--help"])
    assert "no token is verified" in " ".join(capsys.readouterr().out.split())


def test_requests_that_followed_each_other_do_so_again(model: ik.Model, path: Path) -> None:
    with ik.record("one by one", path=path, progress=False):
        for prompt in PROMPTS:
            model.generate(prompt, **OPTIONS)
    # A machine that is faster, or slower, is the same to it.
    data = json.loads(path.read_text(encoding="utf-8"))
    found = ik.replay(path, pause=0, progress=False)
    requests = found.measured.file.requests
    for before, after in itertools.pairwise(requests):
        assert after.arrival >= (before.finished or 0)
    assert len(data["requests"]) == len(requests)


def test_requests_that_arrived_together_do_so_again(model: ik.Model, path: Path) -> None:
    model.configure(batching="static")
    with ik.record("together", path=path, progress=False):
        model.generate(PROMPTS, **OPTIONS)
    found = ik.replay(path, progress=False)
    assert len({one.arrival for one in found.measured.file.requests}) == 1


def test_an_interrupt_keeps_what_was_measured(
    model: ik.Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ik.record("long", path=path, progress=False):
        model.generate(PROMPTS[0], **OPTIONS)
        model.generate(PROMPTS[1], **OPTIONS)
    part = replay._Run._part
    calls = []

    def interrupted(self: Any, *args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        part(self, *args, **options)

    monkeypatch.setattr(replay._Run, "_part", interrupted)
    found = ik.replay(path, progress=False)
    assert [o.kind for o in found.outcomes] == ["equal", "interrupted"]
    assert "interrupted" in found.notes[-1]
    assert not found.exact


@pytest.mark.parametrize("pause", [-1, "x", True, float("nan")])
def test_a_pause_is_a_time(recorded: ik.Experiment, pause: Any) -> None:
    with pytest.raises(ik.OptionError, match="pause="):
        ik.replay(recorded, pause=pause)


def test_nothing_to_run_again_says_so(model: ik.Model, path: Path) -> None:
    with ik.record("empty", path=path, progress=False) as exp:
        pass
    with pytest.raises(ik.ExperimentError, match="no requests"):
        ik.replay(path)
    with pytest.raises(ik.OptionError, match="no request that ended"):
        exp.summary()
    assert "0 requests" in repr(exp)


# -- the command line ----------------------------------------------------------------------------


def test_the_command_line_checks_and_exports(
    recorded: ik.Experiment, path: Path, model: ik.Model, tiny_model: Callable[[str], Path]
) -> None:
    from inferkit.cli import main

    folder = str(tiny_model("llama"))
    model.unload()
    assert main(["replay", str(path), "--model", folder, "--check", "--exact", "--json"]) == 0
    out = path.with_name("out.csv")
    assert main(["export", str(path), str(out)]) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) >= 10
    assert main(["export", str(path), str(out)]) == 2  # it is there already
    data = json.loads(path.read_text(encoding="utf-8"))
    data["requests"][0]["token_ids"] = [1] * 40
    path.write_text(json.dumps(data), encoding="utf-8")
    assert main(["replay", str(path), "--model", folder]) == 0
    assert main(["replay", str(path), "--model", folder, "--check"]) == 1
    path.write_bytes(b"{")
    assert main(["replay", str(path)]) == 2


def edit(path: Path, number: int, **values: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["requests"][number] |= values
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"repetition_penalty": 1.3}]
)
def test_a_drawn_token_that_rounding_does_not_explain_is_a_difference(
    model: ik.Model, path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    with ik.record("drawn", path=path, progress=False):
        gen = model.generate(PROMPTS[2], **sampling, **options)
    assert ik.replay(path, progress=False).exact
    least = min(range(8, 100), key=lambda token: abs(token - (gen.token_ids[6] + 50) % 100))
    edit(path, 0, token_ids=[*gen.token_ids[:6], least, *gen.token_ids[7:]])
    monkeypatch.setattr(replay._Run, "_what_differs", lambda *_: ["torch"])
    found = ik.replay(path, progress=False)
    assert (found.outcomes[0].kind, found.outcomes[0].difference) == ("differs", 6)
    assert "off the recorded token" in found.outcomes[0].reason or (
        "not among those" in found.outcomes[0].reason
    )
    assert not found.ok


def test_a_number_near_the_border_of_a_tokens_part_is_rounding() -> None:
    import torch

    params = ik.SamplingParams(temperature=1.0, seed=0)
    row = rounding.RowSampler(params, [])
    scores = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    assert rounding._missed(scores, row, 0.55, 1, 0) == 0
    assert rounding._missed(scores, row, 0.49, 1, 0) == pytest.approx(0.01, abs=1e-6)
    assert rounding._missed(scores, row, 0.85, 1, 0) == pytest.approx(0.05, abs=1e-6)
    few = rounding.RowSampler(ik.SamplingParams(temperature=1.0, seed=0, top_k=2), [])
    assert rounding._missed(scores, few, 0.7, 1, 0) == 0  # the second begins at 0.5 / 0.8
    assert rounding._missed(scores, few, 0.5, 1, 0) == pytest.approx(0.125, abs=1e-6)
    assert rounding._missed(scores, few, 0.7, 2, 0) == float("inf")
    # Where rounding may order the second before the first, its part may begin at 0.
    assert rounding._missed(scores, few, 0.3, 1, 0.6) == 0


def test_rounding_moves_a_border_by_less_where_the_temperature_is_higher() -> None:
    assert rounding.shift(0.25, 1.0) == 0.25 / 8
    assert rounding.shift(0.25, 2.0) == 0.25 / 16
    assert rounding.shift(0.25, 1e-3) == 0.25


@pytest.mark.parametrize("token", [10**9, -5])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_token_that_the_model_does_not_have_is_a_difference(
    model: ik.Model, path: Path, token: int, temperature: float
) -> None:
    with ik.record("edited", path=path, progress=False):
        gen = model.generate(PROMPTS[1], temperature=temperature, seed=1, **OPTIONS)
    edit(path, 0, token_ids=[*gen.token_ids[:3], token, *gen.token_ids[4:]])
    (outcome,) = ik.replay(path, progress=False).outcomes
    assert (outcome.kind, outcome.difference) == ("differs", 3)
    assert "none of this model's" in outcome.reason


def test_every_difference_is_looked_at(model: ik.Model, path: Path) -> None:
    with ik.record("many", path=path, progress=False):
        gens = model.generate([[i, i + 1] for i in range(24)], max_tokens=4, repetition_penalty=1.1)
    data = json.loads(path.read_text(encoding="utf-8"))
    for one, gen in zip(data["requests"], gens):
        one["token_ids"] = [(gen.token_ids[0] + 1) % 100, *gen.token_ids[1:]]
    path.write_text(json.dumps(data), encoding="utf-8")
    found = ik.replay(path, progress=False)
    assert all("nats apart" in outcome.reason for outcome in found.outcomes)
    assert len(found.outcomes) == 24


def test_the_same_tokens_that_end_otherwise_are_no_reproduction(
    model: ik.Model, path: Path
) -> None:
    with ik.record("ends", path=path, progress=False):
        model.generate(PROMPTS, max_tokens=5, ignore_eos=True)
    edit(path, 0, finish_reason="stop")
    edit(path, 1, text="something else")
    found = ik.replay(path, progress=False)
    assert [outcome.kind for outcome in found.outcomes] == ["differs", "differs", "equal", "equal"]
    assert "ended by 'length', not 'stop'" in found.outcomes[0].reason
    assert "another text" in found.outcomes[1].reason


def test_without_prompts_a_shared_beginning_is_not_compared(
    tiny_model: Callable[[str], Path], path: Path
) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 192}
    with ik.load(tiny_model("llama"), max_batch=2, progress=False, **options) as model:
        with ik.record("shared", path=path, redact=True, progress=False):
            for last in (1, 2, 3):
                model.generate([*range(5, 105), last], max_tokens=4, ignore_eos=True)
        found = ik.replay(path, progress=False)
    assert "TTFT" not in found.verdict
    assert "TPOT" in found.verdict
    assert "2 requests found part of their prompt in the cache" in repr(found)


# -- several models, and the committed examples ----------------------------------------------------


def test_several_models_run_again_beside_each_other(
    tiny_model: Callable[[str], Path], path: Path
) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 128}
    with (
        ik.load(tiny_model("llama"), name="a", progress=False, **options) as a,
        ik.load(tiny_model("qwen3"), name="b", progress=False, **options) as b,
        ik.record("both", path=path, progress=False),
    ):
        requests = [model.submit(PROMPTS[1], **OPTIONS) for model in (a, b, a, b)]
        for request in requests:
            request.result()
    folders = {"a": tiny_model("llama"), "b": tiny_model("qwen3")}
    again = ik.replay(path, model=folders, progress=False)
    assert again.exact, again
    assert [entry.name for entry in again.measured.file.models] == ["a", "b"]
    assert [one.model for one in again.measured.file.requests] == [0, 1, 0, 1]
    assert ik.models() == []


def test_one_model_in_two_precisions_runs_again_as_two(
    tiny_model: Callable[[str], Path], path: Path
) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 128}
    folder = tiny_model("llama")
    with (
        ik.load(folder, name="plain", progress=False, **options) as plain,
        ik.load(folder, name="nf4", quantize="nf4", progress=False, **options) as nf4,
    ):
        with ik.record("both", path=path, progress=False):
            for model in (plain, nf4):
                model.generate(PROMPTS[2], **OPTIONS)
        assert ik.replay(path, progress=False).exact
    again = ik.replay(path, model={"plain": folder, "nf4": folder}, progress=False)
    assert again.exact, again
    assert [mode.format for mode in again.measured.file.modes] == ["none", "nf4"]


@pytest.fixture
def reloaded(tiny_model: Callable[[str], Path], path: Path) -> Path:
    """A model that was loaded three times under one name, in two dtypes and two modes."""
    options: dict[str, Any] = {"device": "cpu", "context": 128, "name": "m", "progress": False}
    with ik.record("reloaded", path=path, progress=False) as exp:
        for dtype, mode in (("float32", "none"), ("bfloat16", "none"), ("float32", "nf4")):
            # The second takes the place of the first, which was not unloaded.
            model = ik.load(tiny_model("llama"), dtype=dtype, quantize=mode, **options)
            model.generate(PROMPTS[:2], **OPTIONS)
        model.unload()
    assert [entry.dtype for entry in exp.file.models] == ["float32", "bfloat16", "float32"]
    return path


def test_a_model_that_was_loaded_again_runs_again_one_load_after_the_other(
    reloaded: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    monkeypatch.setattr(recording.registry, "on_load", [lambda _: at_once.append(len(ik.models()))])
    found = ik.replay(reloaded, model=tiny_model("llama"), progress=False)
    assert found.exact, found
    assert at_once == [1, 1, 1]
    assert ik.models() == []
    recorded, measured = found.recorded.file, found.measured.file
    assert [entry.dtype for entry in measured.models] == ["float32", "bfloat16", "float32"]
    assert [entry.name for entry in measured.models] == ["m", "m", "m"]
    assert [gen.settings.model for gen in found.measured.generations] == ["m"] * 6
    assert [one.model for one in measured.requests] == [one.model for one in recorded.requests]
    assert len(found.latency.pairs) == 6
    # The first two arrive together, however long it took to load the model for them.
    arrivals = [one.arrival for one in measured.requests]
    assert arrivals[2] == arrivals[3]


@pytest.mark.parametrize("loaded", [True, False])
def test_every_request_is_measured_once_and_in_its_own_mode(
    tiny_model: Callable[[str], Path], path: Path, loaded: bool
) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 128, "name": "m"}
    with ik.record("twice", path=path, progress=False):
        for mode in ("none", "nf4"):
            with ik.load(tiny_model("llama"), quantize=mode, progress=False, **options) as model:
                model.generate(PROMPTS[2], **OPTIONS)
    if loaded:
        ik.load(tiny_model("llama"), progress=False, **options)
    found = ik.replay(path, model={"m": tiny_model("llama")}, progress=False)
    for model in ik.models():
        model.unload()
    assert found.exact, found
    file = found.measured.file
    assert [one.model for one in file.requests] == [0, 1]
    assert [file.modes[one.mode].quantize for one in file.requests] == ["none", "nf4"]
    assert [file.modes[one.mode].model for one in file.requests] == [0, 1]


def test_models_of_other_names_and_files_need_a_path_each(
    tiny_model: Callable[[str], Path], path: Path
) -> None:
    with ik.record("two", path=path, progress=False):
        for name in ("llama", "qwen3"):
            with ik.load(tiny_model(name), name=name, device="cpu", progress=False) as model:
                model.generate(PROMPTS[0], max_tokens=2)
    with pytest.raises(ik.OptionError, match=r"2 models: give model=\{'llama': .*'qwen3'"):
        ik.replay(path, model=tiny_model("llama"), progress=False)


def test_a_model_that_only_stood_by_need_not_be_named(
    model: ik.Model, tiny_model: Callable[[str], Path], path: Path
) -> None:
    from inferkit.cli import main

    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 64}
    with (
        ik.load(tiny_model("qwen3"), name="idle", progress=False, **options),
        ik.record("one", path=path, progress=False),
    ):
        model.generate(PROMPTS[1], **OPTIONS)
    folder = str(tiny_model("llama"))
    model.unload()
    assert main(["replay", str(path), "--model", folder, "--check"]) == 0
    assert main(["replay", str(path), "--model", f"llama={folder}", "--check"]) == 0
    there = str(path)  # refused before anything runs
    assert main(["replay", str(path), "--model", folder, "--save", there]) == 2
    assert main(["replay", str(path), "--model", folder, "--save", there, "--overwrite"]) == 0
    assert ik.open(path).name == "replay of one"


def test_a_replay_is_of_its_own_models_alone(
    model: ik.Model, tiny_model: Callable[[str], Path], path: Path
) -> None:
    folder = tiny_model("llama")
    with ik.record("one", path=path, progress=False):
        model.generate(PROMPTS, **OPTIONS)
    model.unload()
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 64}
    with ik.load(tiny_model("qwen3"), name="idle", progress=False, **options):
        found = ik.replay(path, model=folder, progress=False)
    assert found.exact
    assert len(found.measured.file.models) == 1
    assert found.latency.paired
    assert len(found.latency.pairs) == len(PROMPTS)


def test_an_interrupted_replay_says_so_to_the_shell(
    recorded: ik.Experiment, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferkit.cli import main

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replay._Run, "_look_at_differences", interrupted)
    assert main(["replay", str(path), "--check"]) == 130


def test_the_examples_say_where_they_are_from() -> None:
    there = {path.name: ik.open(path) for path in EXAMPLES.glob("*.inferkit.json")}
    assert set(there) == {"demo-cpu.inferkit.json", "demo-h200.inferkit.json"}
    for exp in there.values():
        assert exp.complete
        assert len(exp.generations) == 15
        assert exp.file.models[0].files
    assert "NVIDIA H200" in there["demo-h200.inferkit.json"].origin


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_the_demo_model_is_reproduced(demo_model_path: Path) -> None:
    # In bf16, where other processors round in other ways: --check accepts that and nothing else.
    command = [sys.executable, "-m", "inferkit", "replay", "--check", "--json"]
    example = EXAMPLES / "demo-cpu.inferkit.json"
    done = subprocess.run([*command, str(example)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"].startswith("Reproduced")
    assert len(told["outcomes"]) == 15


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_sampling_than_was_recorded_is_no_rounding(demo_model_path: Path, path: Path) -> None:
    sampling = {"temperature": 0.8, "max_tokens": 8}
    prompts = ["Once upon a time", "The moon is", "My favourite recipe begins with"]
    changes: list[Callable[[dict[str, Any]], None]] = [
        lambda request: request["params"].update(temperature=0.9),
        lambda request: request["params"].update(top_k=20),
        lambda request: request.update(seed=request["seed"] + 100),
    ]
    options = {"context": 64, "max_batch": 4, "compile": False}
    with ik.load(demo_model_path, **options, progress=False) as model:
        cold = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 24}
        with ik.record("nearly greedy", path=path, progress=False):
            model.generate([*prompts, "The best thing about rain is"], seed=1, **cold)
        assert ik.replay(path, progress=False).exact
        data = json.loads(path.read_text(encoding="utf-8"))
        for one in data["requests"]:
            one["seed"] = one["params"]["seed"] = 0
        path.write_text(json.dumps(data), encoding="utf-8")
        assert ik.replay(path, progress=False).verdict.startswith("Differs")
        path.unlink()
        with ik.record("drawn", path=path, progress=False):
            for seed in range(4):
                model.generate(prompts, seed=seed, **sampling)
        assert ik.replay(path, progress=False, pause=0).ok
        # A processor that multiplies bf16 runs the model in it, and rounds nearly all otherwise.
        assert ik.replay(path, dtype="float32", progress=False, pause=0).ok
        for change in changes:
            data = json.loads(path.read_text(encoding="utf-8"))
            for one in data["requests"]:
                change(one)
            other = path.with_name("other.json")
            other.write_text(json.dumps(data), encoding="utf-8")
            found = ik.replay(other, progress=False, pause=0)
            assert not found.ok
            assert found.verdict.startswith("Differs")


def test_a_model_that_the_recording_lacks_is_named(
    recorded: ik.Experiment, path: Path, model: ik.Model
) -> None:
    with pytest.raises(ik.OptionError, match="'other', which the recording lacks"):
        ik.replay(path, model={"other": model.path}, progress=False)


def test_requests_that_had_not_ended_are_shown_as_such(caplog: pytest.LogCaptureFixture) -> None:
    exp = measured.small()
    assert "5 requests, 1 of them not ended" in repr(exp)
    assert "not ended" in repr(exp).splitlines()[-1]
    assert exp.to_frame()["finish_reason"].isna().tolist() == [False] * 4 + [True]
    assert len(list(exports.to_aiperf(exp))) == 4
    assert "1 request of 'tiny run' had not ended" in caplog.text


def test_one_request_is_no_requests() -> None:
    assert "'tiny run': 1 request, " in repr(measured.experiment(measured.request(0, 20)))
