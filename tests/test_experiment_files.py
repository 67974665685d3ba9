"""What may happen to the file of an experiment: damage, odd names, interrupts, other folders."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from measured import small

import inferkit as ik
from inferkit.experiments import file as files
from inferkit.experiments import store
from inferkit.experiments.environment import environment
from inferkit.experiments.store import PARTIAL

OPTIONS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "context": 192}
    with ik.load(tiny_model("llama"), max_batch=3, progress=False, **options) as loaded:
        yield loaded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "one.json"


# -- the journal ----------------------------------------------------------------------------------


def journal(path: Path) -> list[dict[str, Any]]:
    """Write the journal of five requests, and give its lines."""
    made = small().file
    requests, made.requests, made.duration = made.requests, [], None
    writer = store.Journal(path, made)
    writer.add([files.NewRequest(one) for one in requests])
    writer.close()
    return [json.loads(line) for line in beside(path).read_bytes().splitlines()]


def beside(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def write_lines(path: Path, lines: list[Any]) -> None:
    beside(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_journal_begins_with_its_format_and_version(path: Path) -> None:
    first = journal(path)[0]["file"]
    assert list(first)[:2] == ["format", "version"]
    assert (first["format"], first["version"]) == (files.FORMAT, files.VERSION)
    assert len(ik.open(path).file.requests) == 5


def test_a_journal_that_does_not_say_its_version_is_of_the_first(path: Path) -> None:
    lines = journal(path)
    del lines[0]["file"]["format"], lines[0]["file"]["version"]
    write_lines(path, lines)
    assert len(ik.open(path).file.requests) == 5


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("version", 9, "version 9 of the format.*upgrade"),
        ("version", "x", "which is none"),
        ("format", "other", "no experiment"),
        ("name", 7, r"damaged or was edited.*\$.name"),
        ("created", "yesterday", "damaged or was edited: created"),
    ],
)
def test_a_journal_is_checked_as_the_whole_file(
    path: Path, field: str, value: Any, said: str
) -> None:
    lines = journal(path)
    lines[0]["file"][field] = value
    write_lines(path, lines)
    with pytest.raises(ik.ExperimentError, match=said):
        ik.open(path)


def test_facts_of_a_journal_are_checked_as_those_of_the_file(path: Path) -> None:
    facts = {"type": "tokens", "request": 0, "facts": {"finish_reason": 5}}
    write_lines(path, [*journal(path), facts])
    with pytest.raises(ik.ExperimentError, match=r"damaged or was edited.*finish_reason"):
        ik.open(path)


def test_facts_that_a_later_line_cannot_go_on_from_are_damage(path: Path) -> None:
    lines = [{"type": "tokens", "request": 0, "facts": {"text": None}}]
    write_lines(path, [*journal(path), *lines, {"type": "tokens", "request": 0, "text": "a"}])
    with pytest.raises(ik.ExperimentError, match=r"damaged or was edited.*text"):
        ik.open(path)


def test_lines_after_a_damaged_one_are_counted_as_lost(path: Path) -> None:
    journal(path)
    lines = beside(path).read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:20] + b"\r\0" + lines[3][22:]
    beside(path).write_bytes(b"".join(lines))
    found = ik.open(path)
    assert len(found.file.requests) == 2
    assert "Line 4 of its journal is damaged: with it, 3 lines were lost." in found.notes
    assert "not brought to its end" in found.notes[-1]


def test_a_line_that_a_killed_process_had_begun_is_no_damage(path: Path) -> None:
    journal(path)
    with beside(path).open("ab") as out:
        out.write(b'{"type":"tokens","requ')
    assert "damaged" not in " ".join(ik.open(path).notes)


def test_a_journal_without_a_beginning_says_so(path: Path) -> None:
    write_lines(path, journal(path)[1:])
    with pytest.raises(ik.ExperimentError, match="no beginning"):
        ik.open(path)


def journal_over(path: Path) -> None:
    """Save an experiment, and leave the journal of one that was to replace it."""
    earlier = small()
    earlier.file.name = "earlier"
    earlier.save(path)
    journal(path)
    written = path.stat().st_mtime_ns
    os.utime(beside(path), ns=(written + 10**9, written + 10**9))


def test_a_recording_that_was_to_replace_a_file_is_what_opens(path: Path) -> None:
    journal_over(path)
    found = ik.open(path)
    assert found.name == "tiny run"
    assert "not brought to its end" in found.notes[-2]
    assert f"{path.name} itself is of an earlier recording" in found.notes[-1]
    beside(path).rename(path.with_name("elsewhere.partial"))
    assert ik.open(path).name == "earlier"
    assert ik.open(path.with_name("elsewhere.partial")).name == "tiny run"


def test_a_journal_that_is_older_than_its_file_is_not_read(path: Path) -> None:
    """It was not removed yet when the process ended."""
    journal_over(path)
    os.utime(beside(path), ns=(0, 0))
    assert ik.open(path).name == "earlier"


def test_overwriting_keeps_a_recording_that_was_cut_off(path: Path) -> None:
    journal_over(path)
    cut = beside(path).read_bytes()
    with (
        pytest.warns(UserWarning, match=r"kept as one\.json\.\w+\.partial, which ik\.open reads"),
        ik.record("again", path=path, overwrite=True, progress=False),
    ):
        pass
    assert ik.open(path).name == "again"
    (kept,) = path.parent.glob("*.partial")
    assert kept.read_bytes() == cut
    assert ik.open(kept).name == "tiny run"


def test_a_file_that_is_being_recorded_to_is_not_replaced(path: Path, model: ik.Model) -> None:
    first = ik.record("first", path=path, overwrite=True, progress=False)
    second = ik.record("second", path=path, overwrite=True, progress=False)
    first.start()
    model.generate([5, 6, 7], **OPTIONS)
    with pytest.raises(ik.OptionError, match="is being recorded to: stop that recording"):
        second.start()
    with pytest.raises(ik.OptionError, match="is being recorded to"):
        ik.record("third", path=path, overwrite=True)
    first.stop()
    assert len(ik.open(path).generations) == 1
    with ik.record("second", path=path, overwrite=True, progress=False):
        assert ik.open(path).name == "second"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_journal_is_removed_by_whoever_wrote_it(path: Path) -> None:
    recorder = ik.record("mine", path=path, progress=False)
    recorder.start()
    beside(path).rename(path.with_name("moved.partial"))
    beside(path).write_text("of somebody else", encoding="utf-8")
    recorder.stop()
    assert beside(path).read_text(encoding="utf-8") == "of somebody else"


def test_a_journal_that_cannot_begin_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Journal, "add", full)
    with pytest.raises(ik.ExperimentError, match="No space left"):
        ik.record("full", path=path, progress=False).start()
    assert list(path.parent.iterdir()) == []


# -- damage that would be no error of ours --------------------------------------------------------


@pytest.mark.parametrize("count", [2**62, 2**60 - 1, -1])
def test_numbers_that_promise_too_much_are_damaged(path: Path, count: int) -> None:
    data = json.loads(small().save(path).read_bytes())
    data["requests"][0]["tokens"] = {"n": count, "zlib": "eNpjYIAAAAAIAAE="}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ik.ExperimentError, match="damaged"):
        ik.open(path)


def test_numbers_for_which_there_is_no_memory_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any, **__: Any) -> bytes:
        raise MemoryError

    monkeypatch.setattr(files.base64, "b64decode", none_left)
    with pytest.raises(ik.ExperimentError, match="damaged"):
        files.unpack(files.Packed(40, "AA=="))


def test_text_that_is_no_utf_8_is_damaged(path: Path) -> None:
    path.write_bytes(b'{"format": "inferkit-experiment", "name": "Th\xe9 moon"}')
    with pytest.raises(ik.ExperimentError, match="damaged"):
        ik.open(path)
    path.unlink()
    lines = journal(path)
    whole = beside(path).read_bytes()
    beside(path).write_bytes(whole + b'{"type": "tokens", "request": 0, "facts": {"x": "\xe9"}}\n')
    assert len(ik.open(path).file.requests) == len(lines) - 1
    beside(path).write_bytes(whole.replace(b'"name":"', b'"name":"\xe9', 1))
    with pytest.raises(ik.ExperimentError, match="no beginning"):
        ik.open(path)


def test_json_that_is_nested_too_deep_is_damaged(path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    path.write_text(f'{{"format": "inferkit-experiment", "x": {deep}}}', encoding="utf-8")
    with pytest.raises(ik.ExperimentError, match="damaged"):
        ik.open(path)
    path.unlink()
    lines = journal(path)
    with beside(path).open("a", encoding="utf-8") as out:
        out.write(f'{{"type": "tokens", "request": 0, "facts": {{"x": {deep}}}}}\n')
    assert len(ik.open(path).file.requests) == len(lines) - 1


def edited(path: Path, **values: Any) -> Path:
    data = json.loads(small().save(path).read_bytes())
    for name, value in values.items():
        where = data if name in data else data["requests"][0]
        where[name] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("created", ["9999-12-31T23:59:59", "0001-01-01T00:00:00+00:00"])
def test_a_time_at_which_nothing_was_recorded_is_refused(path: Path, created: str) -> None:
    with pytest.raises(ik.ExperimentError, match="created is"):
        ik.open(edited(path, created=created))


@pytest.mark.parametrize("finished", [2**63, 10**40])
def test_times_that_no_clock_gives_are_refused(path: Path, finished: int) -> None:
    with pytest.raises(ik.ExperimentError, match="no clock gives"):
        ik.open(edited(path, finished=finished))


def test_the_latest_time_that_is_taken_can_be_exported(path: Path) -> None:
    latest = ik.open(edited(path, created="9000-12-31T23:59:59", finished=2**63 - 1))
    for kind in ("vllm", "aiperf", "csv"):
        latest.export(path.with_name(kind), kind)


def test_settings_that_a_later_version_adds_are_left_alone(path: Path) -> None:
    settings = json.loads(small().save(path).read_bytes())["requests"][0]["settings"]
    path.unlink()
    found = ik.open(edited(path, settings=settings | {"newer": 1}))
    assert found.generations[0].settings.model == "tiny"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"finish_reason": "banana"}, "banana.*finish_reason"),
        ({"prompt_tokens": -5}, "prompt_tokens"),
        ({"prompt_tokens": 10**12}, "prompt_tokens"),
        ({"prompt_tokens": 10**30}, "prompt_tokens"),
        ({"cached_tokens": -1}, "cached_tokens"),
        ({"draft_tokens": -3}, "draft_tokens"),
        ({"draft_tokens": 3, "accepted_tokens": 9}, "guessed 3 tokens, of which 9 were right"),
        ({"arrival": -1}, "arrival"),
        ({"duration": -5}, "duration"),
        ({"prompt_token_ids": [1]}, "has 1 tokens in its prompt and says 7"),
        ({"text_ends": [3, 7, 99]}, "end outside its text of 13 characters"),
        ({"text_ends": [-7, 7, 8]}, "end outside its text"),
        ({"text_ends": [7, 3, 8]}, "end outside its text"),
        ({"token_ids": [10**30, 1, 2]}, "token_ids"),
        ({"params": {"temperature": "hot"}}, r"params\.temperature"),
        ({"params": {"stop": 5}}, r"params\.stop"),
        ({"settings": {"model": 5}}, r"settings\.model"),
    ],
)
def test_what_no_recording_has_written_is_refused_by_name(
    path: Path, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ik.ExperimentError, match=rf"damaged or was edited.*{said}"):
        ik.open(edited(path, **values))


def test_a_request_under_a_mode_of_another_model_is_refused(path: Path) -> None:
    data = json.loads(small().save(path).read_bytes())
    data["models"].append(data["models"][0] | {"name": "other"})
    data["requests"][0]["model"] = 1
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ik.ExperimentError, match="request 0 is of model 1, and mode 0 of model 0"):
        ik.open(path)


def test_requests_are_in_order_of_arrival_however_they_stand(path: Path) -> None:
    made = small()
    made.file.requests.reverse()
    found = ik.open(made.save(path))
    assert [one.arrival for one in found.file.requests] == sorted(
        one.arrival for one in made.file.requests
    )
    assert found.generations[0].text == "one two three"


def test_whatever_is_opened_can_be_a_table(path: Path) -> None:
    most = ik.open(edited(path, prompt_tokens=10**7))
    most.export(path.with_name("one.parquet"))
    assert most.to_frame()["prompt_tokens"].iloc[0] == 10**7


# -- names and paths ------------------------------------------------------------------------------


def test_a_name_that_no_folder_takes_is_refused_with_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ik.OptionError, match=r"314 bytes long.* may have \d+ here"):
        ik.record("a" * 300)
    with pytest.raises(ik.OptionError, match=r"may have \d+ here"):
        small().save("é" * 125)
    with pytest.raises(ik.OptionError, match="too long"):
        small().save("d/" * 5000 + "one.json")
    with pytest.raises(ik.ExperimentError, match="cannot be read"):
        ik.open("a" * 300)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path", ["/", ".", "/dev/null"])
def test_what_is_no_file_is_not_replaced(path: str, overwrite: bool) -> None:
    for write in (lambda: small().save(path, overwrite=overwrite), lambda: begin(path, overwrite)):
        with pytest.raises(ik.OptionError, match=r"is a folder|no file to replace"):
            write()
    assert not Path("/dev/null").is_file()


def begin(path: str, overwrite: bool) -> None:
    with ik.record("one", path=path, overwrite=overwrite):
        pass


def test_the_longest_name_that_is_taken_can_be_recorded_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ik.OptionError) as refused:
        small().save("a" * 300)
    room = int(str(refused.value).partition("may have ")[2].split()[0])
    name = "a" * (room - len(".inferkit.json"))
    with ik.record(name, progress=False):
        pass
    assert ik.open(f"{name}.inferkit.json").name == name
    # It may be called what it likes where the file has another name.
    with ik.record("a" * 300, path="short.json", progress=False):
        pass
    assert ik.open("short.json").name == "a" * 300


def test_a_name_that_is_no_text_is_refused(path: Path) -> None:
    with pytest.raises(ik.OptionError, match="is no text"):
        ik.record("half \ud83d", path=path)
    with pytest.raises(ik.OptionError, match="is no path"):
        ik.record("whole", path=f"{path}\ud83d")


@pytest.mark.parametrize("given", [None, 3, b"one.json", ["one.json"], "a\0b", "~nobody-of-that/x"])
def test_what_is_no_path_is_refused(given: Any) -> None:
    for take in (ik.open, ik.import_experiment, small().save, small().export):
        with pytest.raises(ik.OptionError, match="is no path"):
            take(given)
    with pytest.raises(ik.OptionError, match="is no path"):
        small().export(given, "csv")


@pytest.mark.parametrize("given", ["", "."])
def test_a_folder_is_no_experiment(given: str) -> None:
    with pytest.raises(ik.ExperimentError, match="cannot be read"):
        ik.open(given)


@pytest.mark.parametrize("given", ["x", 1.0, True])
def test_which_result_is_said_by_its_number(path: Path, given: Any) -> None:
    with pytest.raises(ik.OptionError, match=r"benchmark=.*from 0"):
        ik.import_experiment(path, benchmark=given)


def test_it_is_written_where_it_began(
    tmp_path: Path, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    first.mkdir()
    then.mkdir()
    monkeypatch.chdir(first)
    with ik.record("moved", progress=False):
        monkeypatch.chdir(then)
        model.generate([5, 6, 7], **OPTIONS)
    assert list(then.iterdir()) == []
    (written,) = first.iterdir()
    assert written.name == "moved.inferkit.json"
    assert len(ik.open(written).generations) == 1
    assert str(tmp_path) not in written.read_text(encoding="utf-8")


# -- an interrupt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["join", "write"])
def test_a_second_stop_does_what_was_left_of_the_first(
    path: Path, model: ik.Model, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    recorder = ik.record("twice", path=path, progress=False)
    recorder.start()
    model.generate([5, 6, 7], **OPTIONS)
    with monkeypatch.context() as patched:
        if where == "join":
            patched.setattr(threading.Thread, "join", interrupted)
        else:
            patched.setattr(store, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorder.stop()
    assert not path.exists()
    assert not recorder.running
    exp = recorder.stop()
    assert ik.open(path).file == exp.file
    assert exp.complete
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    before = path.stat().st_mtime_ns
    recorder.stop()
    assert path.stat().st_mtime_ns == before


# -- the environment ------------------------------------------------------------------------------


def test_our_version_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the package is run from its sources, or another version's metadata is about."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ik, "__version__", "9.8.7")
    assert environment().packages["jupyter-inferkit"] == "9.8.7"
    monkeypatch.setattr(metadata, "version", missing)
    assert environment().packages == {"jupyter-inferkit": "9.8.7"}
    assert sys.modules["inferkit"].__version__ == "9.8.7"
