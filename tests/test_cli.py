"""The command line, run as a person runs it, on small random models and on the real one."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import inferkit as ik
from inferkit.cli import main

TinyModel = Callable[[str], Path]
PROMPTS = ["Once upon a time", "The quick brown fox", "Paris is"]
LONG = 3000  # tokens: some seconds, even for a small model


@pytest.fixture
def model(tiny_model: TinyModel) -> list[str]:
    """The options that run the small Llama in fp32, where greedy output is exact."""
    return ["--model", str(tiny_model("llama")), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def expected(tiny_model: TinyModel) -> Callable[[str, int], str]:
    """Greedy text by transformers.generate: the independent reference."""
    import transformers

    folder = tiny_model("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def text(prompt: str, max_tokens: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = reference.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        new = output[0, inputs.input_ids.shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    return text


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "inferkit", *arguments]


def test_one_prompt_prints_the_text_and_its_latency(
    model: list[str],
    expected: Callable[[str, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", PROMPTS[0], *model, "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == expected(PROMPTS[0], 12) + "\n"
    assert "TTFT ms" in err
    assert "vllm bench serve" in err


def test_several_prompts_are_printed_in_order_under_their_headers(
    model: list[str],
    expected: Callable[[str, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *PROMPTS, *model, "--max-tokens", "8"]) == 0
    blocks = [f"=== {i}: {p}\n{expected(p, 8)}\n" for i, p in enumerate(PROMPTS, start=1)]
    assert capsys.readouterr().out == "".join(blocks)


@pytest.mark.parametrize("batching", ["continuous", "static", "off"])
def test_every_batching_policy_gives_the_same_greedy_text(
    model: list[str],
    expected: Callable[[str, int], str],
    capsys: pytest.CaptureFixture[str],
    batching: str,
) -> None:
    options = ["--max-tokens", "8", "--batching", batching, "--max-batch", "2", "--json"]
    assert main(["run", *PROMPTS, *model, *options]) == 0
    generations = json.loads(capsys.readouterr().out)["generations"]
    assert [gen["text"] for gen in generations] == [expected(p, 8) for p in PROMPTS]


def test_json_holds_every_generation_and_the_summary(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *PROMPTS, *model, "--max-tokens", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [gen["prompt"] for gen in document["generations"]] == PROMPTS
    assert all(len(gen["token_ids"]) == 4 for gen in document["generations"])
    assert document["summary"]
    assert "TTFT ms" not in err


def test_dash_reads_the_prompt_from_stdin(
    model: list[str],
    expected: Callable[[str, int], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[1] + "\n"))
    assert main(["run", "-", *model, "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == expected(PROMPTS[1], 8) + "\n"


def test_chat_applies_the_models_template(
    model: list[str],
    expected: Callable[[str, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "hi", "--chat", *model, "--max-tokens", "8"]) == 0
    # The template that tests/architectures.py gives its tokenizers.
    assert capsys.readouterr().out == expected("<user> hi\n<assistant> ", 8) + "\n"


def test_a_stop_string_ends_the_text(
    model: list[str],
    expected: Callable[[str, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = expected(PROMPTS[0], 12)
    stop = whole[5:7]
    assert main(["run", PROMPTS[0], *model, "--max-tokens", "12", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_a_seed_makes_sampling_repeatable(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(seed: str) -> str:
        options = ["--max-tokens", "16", "--temperature", "1.5", "--seed", seed]
        assert main(["run", PROMPTS[0], *model, *options]) == 0
        return capsys.readouterr().out

    assert sampled("1") == sampled("1")
    assert sampled("1") != sampled("2")


def test_text_is_shown_as_it_comes(model: list[str]) -> None:
    arguments = command("run", PROMPTS[0], *model, "--max-tokens", str(LONG), "--temperature", "1")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert process.poll() is None, "the first character came only with the last"
        process.kill()


def test_ctrl_c_keeps_what_was_generated_and_exits_130(model: list[str]) -> None:
    arguments = command("run", *PROMPTS, *model, "--max-tokens", str(LONG), "--temperature", "1")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        header = process.stdout.readline()
        first = process.stdout.read(20)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert header == f"=== 1: {PROMPTS[0]}\n".encode()
    assert len(first) == 20
    assert [p.encode() in rest for p in PROMPTS[1:]] == [True, True]
    assert err.count(b"cancelled") >= 1  # the others may have met an end token before
    assert b"Traceback" not in err


def test_a_reader_that_leaves_early_causes_no_traceback(model: list[str]) -> None:
    arguments = command("run", PROMPTS[0], *model, "--max-tokens", str(LONG), "--temperature", "1")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 2
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--temperature", "-1"],
        ["--max-tokens", "0"],
        ["--top-p", "7"],
        ["--batching", "sometimes"],
        ["--quantize", "int3"],
        ["--device", "cuda:99"],
        ["--dtype", "float7"],
        ["--context", "0"],
    ],
)
def test_a_wrong_value_is_one_clear_line_and_exit_2(
    model: list[str], capfd: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    assert main(["run", "hi", *model, *wrong]) == 2
    out, err = capfd.readouterr()
    message = [line for line in err.splitlines() if line.startswith("inferkit: ")]
    assert len(message) == 1
    assert wrong[1].lstrip("-") in message[0]
    assert out == ""


@pytest.mark.parametrize("arguments", [["run", ""], ["run", "hi", "--model", "no/such-model"]])
def test_an_empty_prompt_or_an_unknown_model_exits_2(
    model: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    command_line = arguments if "--model" in arguments else [*arguments, *model]
    assert main(command_line) == 2
    assert "inferkit: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["fly"], ["run", "hi", "--max-tokens", "many"], ["run", "hi", "--warmth", "1"]],
)
def test_a_malformed_command_line_exits_2_with_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: inferkit" in capsys.readouterr().err


def test_plan_exits_0_where_the_model_fits(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_model("qwen3")), "--device", "cpu", "--max-batch", "4"]) == 0
    assert "cpu" in capsys.readouterr().out


def test_plan_exits_1_where_it_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    # A config alone: 80 layers of this width are some terabytes of weights.
    huge = transformers.LlamaConfig(
        hidden_size=65536, intermediate_size=262144, num_hidden_layers=80, num_attention_heads=512
    )
    huge.architectures = ["LlamaForCausalLM"]
    huge.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--device", "cpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)


def test_plan_takes_the_librarys_keywords(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_model("gemma3"))
    options = {"device": "cpu", "dtype": "float32", "context": 128, "max_batch": 3}
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["plan", folder, *words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    wanted = json.loads(json.dumps(ik.plan(folder, **options).to_dict()))
    for part in ("weights", "kv_cache", "activations"):
        assert shown[part] == wanted[part]


def test_devices_shows_the_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    assert "cpu" in capsys.readouterr().out
    assert main(["devices", "--json"]) == 0
    names = [device["name"] for device in json.loads(capsys.readouterr().out)]
    assert names == [device.name for device in ik.devices()]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"inferkit {ik.__version__}\n"


@pytest.mark.demo
def test_the_demo_model_is_the_default(
    demo_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo_model_path.is_dir()
    assert main(["run", "Q: What is the capital of France?\nA:", "--max-tokens", "8"]) == 0
    assert "Paris" in capsys.readouterr().out
