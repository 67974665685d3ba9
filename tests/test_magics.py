"""``%infer`` and ``%%infer`` in a shell: what they print, display, keep and refuse."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from held import interrupt_after, wait_until
from IPython.core.completer import provisionalcompleter
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import inferkit as ik
from inferkit.generation import Generations
from inferkit.notebook import completion
from inferkit.notebook.commands import COMMANDS, split
from inferkit.notebook.completion import loaded_models
from inferkit.notebook.display import output_rate
from inferkit.notebook.variables import interpolate

LOAD_EXT_BUDGET = 0.3  # seconds


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[ik.Model]:
    options: dict[str, Any] = {"dtype": "float32", "context": 1024, "max_batch": 4}
    with ik.load(folder, name="tiny", progress=False, **options) as loaded:
        yield loaded


class Notebook:
    """A shell of its own, as a terminal has it or with the displays of a kernel."""

    def __init__(self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell = shell
        self.capsys = capsys
        self.published: list[dict[str, Any]] = []

    def __getitem__(self, name: str) -> Any:
        return self.shell.user_ns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.shell.user_ns

    def run(self, source: str) -> str:
        """Run a cell that succeeds; return what it printed."""
        result = self._run(source)
        assert result.success, result.error_in_exec
        return self.capsys.readouterr().out

    def fails(self, source: str) -> str:
        """Run a cell that fails with one line; return it."""
        result = self._run(source)
        assert isinstance(result.error_in_exec, UsageError)
        captured = self.capsys.readouterr()
        shown = (captured.out + captured.err).strip().splitlines()
        assert "Traceback" not in captured.out + captured.err
        assert shown[-1].startswith("UsageError: ")
        return shown[-1]

    def _run(self, source: str) -> Any:
        self.capsys.readouterr()
        result = self.shell.run_cell(source)
        publisher = self.shell.display_pub
        if isinstance(publisher, CapturingDisplayPublisher):
            self.published = list(publisher.outputs)
            publisher.outputs.clear()
        return result

    def outputs(self) -> list[dict[str, str]]:
        """What a saved notebook has of the last cell: each output in its last state."""
        shown: dict[str, dict[str, str]] = {}
        for message in self.published:
            shown[message["transient"]["display_id"]] = message["data"]
        return list(shown.values())

    def completions(self, text: str) -> list[str]:
        """What Tab offers at the end of a text."""
        with provisionalcompleter():
            return [each.text for each in self.shell.Completer.completions(text, len(text))]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    InteractiveShell.clear_instance()
    config = Config(
        {"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}}
    )
    made = InteractiveShell.instance(config=config)
    hook = sys.displayhook
    yield made
    sys.displayhook = hook
    InteractiveShell.clear_instance()


@pytest.fixture
def terminal(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> Notebook:
    shell.run_line_magic("load_ext", "inferkit")
    return Notebook(shell, capsys)


@pytest.fixture
def notebook(terminal: Notebook, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    monkeypatch.setattr(terminal.shell, "kernel", object(), raising=False)
    terminal.shell.display_pub = CapturingDisplayPublisher()
    return terminal


# -- the extension --------------------------------------------------------------------------------


def test_loading_the_extension_is_quick_and_imports_no_torch(root: Path) -> None:
    code = (
        "import sys, time\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "start = time.perf_counter()\n"
        "shell.run_line_magic('load_ext', 'inferkit')\n"
        "print(time.perf_counter() - start)\n"
        "shell.run_cell('%infer help')\n"
        "assert not {'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, capture_output=True, text=True, cwd=root) for _ in range(3)]
    assert [one.stderr for one in done] == [""] * 3
    assert min(float(one.stdout.splitlines()[0]) for one in done) <= LOAD_EXT_BUDGET


def test_the_extension_can_be_loaded_twice_and_taken_out(terminal: Notebook) -> None:
    terminal.shell.run_line_magic("reload_ext", "inferkit")
    matchers = terminal.shell.Completer.custom_matchers
    assert len(matchers) == 1
    terminal.shell.run_line_magic("unload_ext", "inferkit")
    assert matchers == []
    assert terminal.shell.find_line_magic("infer") is None


# -- one prompt, several prompts ------------------------------------------------------------------


def test_a_cell_shows_settings_prompt_answer_and_latency(
    notebook: Notebook, model: ik.Model
) -> None:
    notebook.run("%%infer --max-tokens 12 --temperature 0.5 --seed 7\nOnce <upon> a time")
    gen = notebook["_infer"]
    settings, prompt, answer, latency = notebook.outputs()
    expected = model.generate("Once <upon> a time", max_tokens=12, temperature=0.5, seed=7)
    assert (gen.prompt, gen.token_ids) == ("Once <upon> a time", expected.token_ids)
    for fact in ("model tiny", "cpu", "float32", "continuous", "temperature=0.5", "seed=7"):
        assert fact in settings["text/html"]
    assert "Once &lt;upon&gt; a time" in prompt["text/html"]
    assert answer == {"text/markdown": gen.text, "text/plain": gen.text}
    assert "<table" in latency["text/html"]
    assert f"{1000 * gen.latency.ttft:.1f}" in latency["text/html"]
    assert "output tokens/s" in latency["text/plain"]


def test_raw_shows_the_text_verbatim(notebook: Notebook, model: ik.Model) -> None:
    notebook.run("%%infer --raw --max-tokens 8\nOnce")
    answer = notebook.outputs()[2]
    assert "text/markdown" not in answer
    assert "pre-wrap" in answer["text/html"]


def test_a_long_prompt_is_folded_up(notebook: Notebook, model: ik.Model) -> None:
    notebook.run("%%infer --max-tokens 2\n" + "a long way " * 60)
    assert "<details>" in notebook.outputs()[1]["text/html"]


def test_text_and_latency_are_updated_while_it_runs_at_most_ten_times_a_second(
    notebook: Notebook, model: ik.Model
) -> None:
    start = time.perf_counter()
    notebook.run("%%infer --max-tokens 600\nOnce")
    elapsed = time.perf_counter() - start
    texts = [m["data"]["text/plain"] for m in notebook.published if m.get("update")]
    live = [text for text in texts if "TTFT" in text and "ITL p50" in text]
    assert 1 <= len(live) <= 10 * elapsed + 1
    full = notebook["_infer"].text
    growing = [text for text in texts if text and full.startswith(text)]
    assert growing == sorted(growing, key=len)
    assert len(growing) >= 2


def test_prompts_of_a_cell_run_as_one_batch(notebook: Notebook, model: ik.Model) -> None:
    prompts = ["Once upon a time", "The quick brown fox", "Paris is"]
    notebook.run("%%infer --max-tokens 10 --to mine\n" + "\n---\n".join(prompts) + "\n")
    done = notebook["_infer"]
    assert isinstance(done, Generations)
    assert notebook["mine"] is done
    assert [gen.prompt for gen in done] == prompts
    assert len({gen.latency.trace.arrival for gen in done}) == 1
    expected = model.generate(prompts, max_tokens=10)
    assert [gen.text for gen in done] == [gen.text for gen in expected]
    outputs = notebook.outputs()
    assert len(outputs) == 1 + 2 * 3 + 1
    assert [o.get("text/markdown") for o in outputs[2:-1:2]] == [gen.text for gen in done]
    assert "Prompt 2" in outputs[3]["text/html"]


def test_the_rate_is_that_of_the_summary(notebook: Notebook, model: ik.Model) -> None:
    notebook.run("%%infer --max-tokens 10\none\n---\ntwo")
    done = notebook["_infer"]
    expected = ik.summarize(done).output_tokens_per_second
    assert output_rate(done) == pytest.approx(expected, rel=0.05)


def test_a_quoted_line_is_a_prompt(terminal: Notebook, model: ik.Model) -> None:
    out = terminal.run('%infer "load the don\'t" --max-tokens 8 --to kept')
    assert terminal["kept"].prompt == "load the don't"
    assert terminal["kept"].text.strip() in out
    assert "TTFT ms" in out


def test_a_terminal_streams_prompts_in_order(terminal: Notebook, model: ik.Model) -> None:
    out = terminal.run("%%infer --max-tokens 10\nfirst\n---\nsecond")
    first, second = terminal["_infer"]
    places = [out.index(part) for part in ("=== 1: first", "=== 2: second", "queue ms")]
    assert places == sorted(places)
    assert first.text in out[places[0] : places[1]]
    assert second.text in out[places[1] : places[2]]


def test_chat_uses_the_template(notebook: Notebook, model: ik.Model) -> None:
    notebook.run("%%infer --chat --max-tokens 4\nhi")
    expected = model.chat([{"role": "user", "content": "hi"}], max_tokens=4)
    assert notebook["_infer"].prompt_token_ids == expected.prompt_token_ids
    assert "chat template" in notebook.outputs()[0]["text/plain"]


def test_sampling_options_reach_the_request(terminal: Notebook, model: ik.Model) -> None:
    terminal.run(
        r'%infer "x" --max-tokens 3 --top-k 5 --temperature 1 --stop "\n" --stop "a b" --logprobs 2'
    )
    params = terminal["_infer"].params
    assert (params.max_tokens, params.top_k, params.stop) == (3, 5, ("\n", "a b"))
    assert len(terminal["_infer"].logprobs[0].top) == 2


# -- interrupts and errors ------------------------------------------------------------------------


def test_an_interrupt_keeps_the_text_and_ends_without_an_error(
    notebook: Notebook, model: ik.Model
) -> None:
    with interrupt_after(model, 60):
        notebook.run("%%infer --max-tokens 900 --to kept\nOnce\n---\nTwice")
    done = notebook["_infer"]
    assert notebook["kept"] is done
    assert [gen.finish_reason for gen in done] == ["cancelled", "cancelled"]
    assert all(gen.token_ids for gen in done)
    outputs = notebook.outputs()
    assert outputs[2]["text/plain"] == done[0].text
    assert "Interrupted; what was generated is in _infer." in outputs[-1]["text/html"]
    wait_until(lambda: model.running == 0)


def test_an_interrupt_in_a_terminal_shows_what_there_is(
    terminal: Notebook, model: ik.Model
) -> None:
    with interrupt_after(model, 6):
        out = terminal.run('%infer "Once" --max-tokens 900')
    assert terminal["_infer"].text in out
    assert "Interrupted" in out
    assert "cancelled" in out


def test_a_request_that_fails_keeps_its_text(
    notebook: Notebook, model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    decode = model._engine.runner.decode

    def broken(*args: Any) -> Any:
        passes.append(1)
        if len(passes) == 4:
            raise ValueError("a broken kernel")
        return decode(*args)

    monkeypatch.setattr(model._engine.runner, "decode", broken)
    assert "a broken kernel" in notebook.fails("%%infer --max-tokens 50\nOnce")
    gen = notebook["_infer"]
    assert gen.finish_reason == "error"
    assert notebook.outputs()[2]["text/plain"] == gen.text != ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("%infer lod demo", "did you mean %infer load?"),
        ("%infer Hello there", 'A prompt is quoted: %infer "Hello there"'),
        ('%infer "open', "A quote is not closed"),
        ('%infer "say "hi" now"', "A quote is not closed, or is within a word"),
        ("%infer 'it''s'", "A quote is not closed, or is within a word"),
        ('%infer load a"b"c', "a cell under %%infer"),
        ("%infer load", "the following arguments are required"),
        ("%infer load /no/such/folder", "/no/such/folder"),
        ("%infer help lod", "did you mean %infer load?"),
        ("%infer quantize int3", "int3"),
        ("%infer batching sometimes", "sometimes"),
        ("%%infer --max-tokens many\nhi", "--max-tokens"),
        ("%%infer --max-tokens 0\nhi", "max_tokens=0"),
        ("%%infer --temprature 1\nhi", "did you mean --temperature?"),
        ("%%infer --to 2x\nhi", "no name of a variable"),
        ("%%infer --to class\nhi", "no name of a variable"),
        ("%%infer --model other\nhi", "No model 'other' is loaded; these are: 'tiny'"),
        ("%%infer load demo\nhi", "one percent sign"),
        ("%%infer\n\n---\n", "The cell has no prompt"),
        ("%%infer\n" + "word " * 3000, "context"),
        ("%infer load ~nobody-of-this-name/x", "names no model"),
        ("%infer plan " + "y" * 300, "names no model"),
        ("%%infer\n\ud83d alone", "half of a character"),
        ('%infer record a --path ""', "--path is empty"),
    ],
)
def test_bad_input_is_one_line(
    terminal: Notebook, model: ik.Model, source: str, message: str
) -> None:
    assert message in terminal.fails(source)
    assert "_infer" not in terminal


@pytest.mark.parametrize("prompt", ["-x", "--", "-hello world", "--max-tokens 3", "load"])
def test_a_quoted_prompt_may_look_like_an_option(
    terminal: Notebook, model: ik.Model, prompt: str
) -> None:
    terminal.run(f'%infer "{prompt}" --max-tokens 2')
    assert terminal["_infer"].prompt == prompt
    assert len(terminal["_infer"].token_ids) <= 2
    terminal.shell.user_ns["it"] = prompt
    terminal.run('%infer "{it}" --max-tokens 2')
    assert terminal["_infer"].prompt == prompt


@pytest.mark.parametrize("source", ["%%infer --help\nhi", '%infer "hi" -h', "%infer -h"])
def test_help_is_shown_wherever_it_is_asked_for(terminal: Notebook, source: str) -> None:
    assert terminal.run(source) == terminal.run("%infer help")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b> a < b <3", "&lt;b>x&lt;/b> a < b <3"),
        ("`<b>` <i>", "`<b>` &lt;i>"),
        ("```html\n<p>\n```\n<p>", "```html\n<p>\n```\n&lt;p>"),
        ("```\n<p> unclosed", "```\n<p> unclosed"),
        ("    <p>\n<p>", "    <p>\n&lt;p>"),
        ("$a<b$ <!-- x -->", "$a<b$ &lt;!-- x -->"),
    ],
)
def test_tags_in_an_answer_are_shown_and_not_taken_as_html(text: str, shown: str) -> None:
    from inferkit.notebook.display import _no_html

    assert _no_html(text) == shown


def test_without_a_model_the_message_says_how_to_load_one(
    terminal: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferkit.registry._table", {})
    assert "%infer load demo" in terminal.fails('%infer "hi"')


# -- models ---------------------------------------------------------------------------------------


def test_a_model_is_loaded_changed_and_unloaded(terminal: Notebook, folder: Path) -> None:
    terminal.shell.user_ns["where"] = folder
    loaded = terminal.run(
        "%infer load {where} --name other --to mine --dtype float32 --context 64 --max-batch 2"
    )
    assert "other: none in float32 on cpu" in loaded
    assert terminal["mine"] is next(m for m in ik.models() if m.name == "other")
    changed = terminal.run("%infer batching static --max-batch 3 --model other")
    assert "static batching of at most 3" in changed
    assert "other" in terminal.run("%infer models")
    assert "int8" in terminal.run("%infer quantize int8 --model other")
    terminal.run("%infer unload other")
    assert not terminal["mine"].loaded


def test_with_several_models_the_one_used_last_answers(
    terminal: Notebook, model: ik.Model, folder: Path
) -> None:
    with ik.load(folder, name="second", dtype="float32", context=64, progress=False):
        assert "'tiny', 'second'" in terminal.fails('%infer "hi" --max-tokens 2')
        terminal.run('%infer "hi" --max-tokens 2 --model second')
        terminal.run('%infer "hi" --max-tokens 2')
        assert terminal["_infer"].settings.model == "second"
        assert "Several" in terminal.fails("%infer unload")
    terminal.run('%infer "hi" --max-tokens 2')
    assert terminal["_infer"].settings.model == "tiny"


def test_devices_and_plans_are_displayed(terminal: Notebook, folder: Path) -> None:
    assert "cpu" in terminal.run("%infer devices")
    out = terminal.run(f"%infer plan {folder} --max-batch 3")
    assert str(ik.plan(folder, max_batch=3)).splitlines()[0] in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_of_every_subcommand(terminal: Notebook, name: str) -> None:
    example = COMMANDS[name].example
    assert example in terminal.run(f"%infer help {name}")
    assert example in terminal.run("%infer help")
    assert terminal.run(f"%infer {name} --help") == terminal.run(f"%infer help {name}")
    words = split(example.removeprefix("%infer "))
    assert COMMANDS[words[0]].parse(words[0], words[1:]) is not None


# -- variables ------------------------------------------------------------------------------------

NAMESPACE = {
    "name": "Ada",
    "n": 3,
    "i": 1,
    "rows": ["first", "second"],
    "card": {"k": "value", "a b": {"deep": [1, 2]}},
    "thing": types.SimpleNamespace(part=types.SimpleNamespace(x=1.5)),
    "function": len,
    "module": types,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi {name}, {n} times", "Hi Ada, 3 times"),
        ("{rows[0]} {rows[-1]}", "first second"),
        ("{card[\"k\"]} {card['k']}", "value value"),
        ('{card["a b"]["deep"][1]}', "2"),
        ("{thing.part.x}", "1.5"),
        ("report_{n}.txt", "report_3.txt"),
        ('say "{name}"', 'say "Ada"'),
    ],
)
def test_variables_are_put_in(text: str, expected: str) -> None:
    assert interpolate(text, NAMESPACE) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{nobody}",
        "{name.missing}",
        "{rows[9]}",
        "{rows[n]}",
        "{card[k]}",
        "{card.keys()}",
        "{n + 1}",
        "{n!r} {n:>3}",
        "{{name}}",
        "{ name }",
        "{}",
        "{0}",
        "{function} {module}",
        '{"name": "x", "n": [1, {"k": 2}]}',
        "{'name': n}",
        "int main() { return n; }",
        "for (i = 0; i < n; i++) { n += i; }",
        'print(f"{name} {n}")',
        r"\frac{n}{i} + x_{i}^{n} \sqrt[3]{n}",
        "echo ${name}",
        'f"""\nHello {name}\n"""',
        "f'''{name}'''",
        r'f"say \"{name}\""',
        r"\sum_{n} \prod_{i}^{n} \begin{name}[n]{i}",
        "{'a'} {1, 2}",
    ],
)
def test_other_braces_are_left_alone(text: str) -> None:
    assert interpolate(text, NAMESPACE) == text


def test_a_cell_says_which_variables_stand_in_it_and_can_leave_them_out(
    notebook: Notebook, model: ik.Model
) -> None:
    notebook.shell.user_ns |= {"name": "Ada", "n": 3}
    notebook.run("%%infer --max-tokens 2\nHi {name}, {n} and {name}, {nobody}")
    assert notebook["_infer"].prompt == "Hi Ada, 3 and Ada, {nobody}"
    assert "with the variables name, n" in notebook.outputs()[0]["text/plain"]
    notebook.run("%%infer --max-tokens 2 --no-variables\nint n[] = {n};")
    assert notebook["_infer"].prompt == "int n[] = {n};"
    assert "variables" not in notebook.outputs()[0]["text/plain"]
    notebook.run('%infer "{name}" --max-tokens 2 --no-variables')
    assert notebook["_infer"].prompt == "{name}"


def test_an_object_that_fails_to_be_looked_up_is_left_alone() -> None:
    class Broken:
        @property
        def value(self) -> str:
            raise RuntimeError("no")

    assert interpolate("{it.value}", {"it": Broken()}) == "{it.value}"


def test_a_prompt_takes_variables_of_the_notebook(terminal: Notebook, model: ik.Model) -> None:
    terminal.run("city = 'Paris'")
    terminal.run('%%infer --max-tokens 2\n{city} is {"a": 1} for $city')
    assert terminal["_infer"].prompt == 'Paris is {"a": 1} for $city'


# -- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%infer lo", ["load"]),
        ("%infer un", ["unload"]),
        ("x = 1\n%infer qu", ["quantize"]),
        ("%infer load de", ["demo"]),
        ("%infer load demo --quantize n", ["none", "nf4"]),
        ("%infer load demo --dtype=bf", ["bfloat16"]),
        ("%infer load demo --max-b", ["--max-batch"]),
        ("%infer quantize i", ["int8", "int8wo", "int4wo"]),
        ("%infer quantize nf4 --d", ["--double-quant"]),
        ("%infer batching st", ["static"]),
        ("%infer unload t", ["tiny"]),
        ("%infer help pl", ["plan"]),
        ("%%infer --max", ["--max-tokens"]),
        ("%%infer --model t", ["tiny"]),
        ("%%infer --seed 1 --s", ["--sampling", "--stop"]),
        ('%infer "hi" --top', ["--top-p", "--top-k"]),
        ("%infer load demo --device c", ["cpu"]),
    ],
)
def test_completion(
    terminal: Notebook,
    model: ik.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where no file begins like any of these
    assert sorted(terminal.completions(text)) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%infer load mo", ["models/"]),
        ("%infer load ./models/t", ["./models/tiny/"]),
        ("%infer load ./models/tiny/m", ["./models/tiny/m"]),  # its name needs quotes
        ("%infer load ./models/[1]/", ["./models/[1]/a.gguf"]),
        ("%infer load ~", ["~/"]),
        ("%infer load ~/mod", ["~/models/"]),
        ("%infer replay fi", ["first.inferkit.json"]),
        ("%infer replay first.inferkit.json --model=./m", ["./models/"]),
        ("%infer replay first.inferkit.json --model=tiny=./m", ["tiny=./models/"]),
        ("%infer replay first.inferkit.json --model=run=3/m", ["run=3/m/"]),
        ("%infer record --path mo", ["models/"]),
    ],
)
def test_completion_of_paths(
    terminal: Notebook,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: list[str],
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "model 1.gguf").touch()
    (tmp_path / "run=3" / "m").mkdir(parents=True)
    (tmp_path / "models" / "[1]").mkdir()
    (tmp_path / "models" / "[1]" / "a.gguf").touch()
    (tmp_path / "first.inferkit.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert terminal.completions(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%infer unload ", "--help"),
        ("%infer quantize nf4 --model ", ""),
        ('%infer "hi" --seed ', ""),
        ('%infer "hi" --max-tokens 1', "1"),
        ("%infer replay nothing-of-this-name", "nothing-of-this-name"),
        ("%infer share --ref ma", "ma"),
    ],
)
def test_where_there_is_nothing_to_offer_no_word_of_pythons_is(
    terminal: Notebook, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.setattr(completion, "loaded_names", list)
    assert terminal.completions(text) == [expected]


def test_words_are_as_they_are_quoted() -> None:
    line = r"""load 'my models/a' --stop="\n" --to='x y' "it's" C:\new --name="" """
    assert split(line) == [
        "load", "my models/a", r"--stop=\n", "--to=x y", "it's", r"C:\new", "--name=",
    ]  # fmt: skip


def test_one_token_is_no_tokens(terminal: Notebook, model: ik.Model) -> None:
    assert "\n1 token, " in terminal.run('%infer "Once" --max-tokens 1')


def test_help_on_what_is_no_subcommand_speaks_of_no_prompt(terminal: Notebook) -> None:
    said = terminal.fails("%infer help nothing")
    assert "'nothing' is no subcommand; there are load, unload" in said
    assert "prompt" not in said


def test_a_prompt_is_not_completed_as_an_option(terminal: Notebook) -> None:
    assert "--max-tokens" not in terminal.completions("%%infer\n--max")


# -- a real kernel --------------------------------------------------------------------------------


def test_a_saved_notebook_shows_everything_without_a_kernel(folder: Path, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    cells = [
        "%load_ext inferkit",
        f"%infer load {folder} --name tiny --dtype float32 --context 128",
        "who = 'fox'",
        "%%infer --max-tokens 12\nThe quick brown {who}\n---\nParis",
        "%infer lod demo",
    ]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(made, timeout=120, kernel_name="python3", allow_errors=True).execute()
    nbformat.validate(made)
    outputs = made.cells[3].outputs
    assert [o.output_type for o in outputs] == ["display_data"] * 6
    assert "model tiny" in outputs[0].data["text/html"]
    assert "The quick brown fox" in outputs[1].data["text/html"]
    assert outputs[2].data["text/markdown"]
    assert "length" in outputs[5].data["text/html"]
    failed = made.cells[4].outputs
    assert not any("Traceback" in str(o) for o in failed)
    assert "did you mean %infer load?" in str(failed)


# -- experiments ----------------------------------------------------------------------------------


def test_recorded_replayed_and_shared(
    model: ik.Model, terminal: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "one-run.inferkit.json; %infer record --stop ends it" in terminal.run(
        '%infer record "one run"'
    )
    assert "'one run' is recorded already" in terminal.fails("%infer record another")
    terminal.run("%%infer --max-tokens 5 --seed 1\nOnce upon a time")
    said = terminal["_infer"]
    assert "Experiment 'one run': 1 request" in terminal.run("%infer record --stop --to kept")
    assert terminal["kept"] is terminal["_infer"]
    assert [gen.text for gen in terminal["kept"].generations] == [said.text]
    assert "Nothing is recorded" in terminal.fails("%infer record --stop")
    assert "Give it a name" in terminal.fails("%infer record")
    assert "exists already" in terminal.fails('%infer record "one run"')

    assert "Reproduced: 1 of 1" in terminal.run("%infer replay one-run.inferkit.json --to again")
    assert terminal["again"].exact
    assert "nothing.json" in terminal.fails("%infer replay nothing.json")

    assert "repo=" in terminal.fails("%infer share")  # no clone here
    told = terminal.run("%infer share --repo owner/name --ref main --notebook a.ipynb")
    assert "https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/a.ipynb" in told
    assert "GPU" not in told
    gpu = Path(__file__).resolve().parent.parent / "notebooks/experiments/demo-h200.inferkit.json"
    told = terminal.run(f"%infer share --repo owner/name --ref main --experiment {gpu}")
    assert "'demo-h200' ran on cuda:0, and Binder has no GPU" in told


def test_completion_sees_no_models_while_another_thread_imports_what_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = types.ModuleType("inferkit.registry")  # as it is at the begin of its import
    monkeypatch.setitem(sys.modules, "inferkit.registry", half)
    assert loaded_models() == []
