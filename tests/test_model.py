"""What a person does with a loaded model: generate, stream, submit, chat, and read the result."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers
from held import held, wait_until

import inferkit as ik
from inferkit.generation import Generations

LONG = {"max_tokens": 200, "ignore_eos": True}
SIX = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Iterator[ik.Model]:
    with ik.load(tiny_model("qwen3"), dtype="float32", context=256, max_batch=4) as loaded:
        yield loaded


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small model whose files a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "copy"))


# -- generate -------------------------------------------------------------------------------------


def test_one_prompt_gives_one_generation(model: ik.Model) -> None:
    gen = model.generate("Once upon a time", **SIX)
    assert isinstance(gen, ik.Generation)
    assert gen.prompt == "Once upon a time"
    assert list(gen.prompt_token_ids) == model.tokenizer("Once upon a time")["input_ids"]
    assert len(gen.token_ids) == 6
    assert gen.finish_reason == "length"
    assert gen.text == model.tokenizer.decode(gen.token_ids, skip_special_tokens=True)
    assert model.last is gen


def test_prompts_give_generations_in_their_order(model: ik.Model) -> None:
    prompts = [f"number {n}" for n in range(11)]  # more than there are slots
    gens = model.generate(prompts, **SIX)
    assert isinstance(gens, Generations)
    assert [g.prompt for g in gens] == prompts
    assert [g.token_ids for g in gens] == [model.generate(p, **SIX).token_ids for p in prompts]


def test_prompts_submitted_together_form_one_static_batch(model: ik.Model) -> None:
    model.configure(batching="static")
    try:
        requests = model.submit(["one", "two", "three"], seed=[1, 2, 3], **SIX)
        done = [r.result(60) for r in requests]
    finally:
        model.configure(batching="continuous")
    assert [g.prompt for g in done] == ["one", "two", "three"]
    assert [g.seed for g in done] == [1, 2, 3]
    assert len({g.latency.trace.arrival for g in done}) == 1
    assert len({g.latency.trace.scheduled for g in done}) == 1


def test_last_of_several_is_the_list(model: ik.Model) -> None:
    gens = model.generate(["a", "b"], **SIX)
    assert model.last is gens


@pytest.mark.parametrize(
    "ids", [[5, 6, 7], (5, 6, 7), range(5, 8), [np.int64(5), np.int64(6), np.int64(7)]]
)
def test_token_ids_are_a_prompt(model: ik.Model, ids: object) -> None:
    gen = model.generate(ids, **SIX)
    assert gen.prompt is None
    assert gen.prompt_token_ids == (5, 6, 7)
    assert all(type(i) is int for i in gen.prompt_token_ids)


def test_lists_of_token_ids_are_prompts(model: ik.Model) -> None:
    gens = model.generate([[5, 6, 7], [8, 9]], **SIX)
    assert [g.prompt_token_ids for g in gens] == [(5, 6, 7), (8, 9)]
    assert gens[0].token_ids == model.generate([5, 6, 7], **SIX).token_ids


def test_text_and_its_token_ids_give_the_same(model: ik.Model) -> None:
    ids = model.tokenizer("The moon is")["input_ids"]
    assert model.generate("The moon is", **SIX).token_ids == model.generate(ids, **SIX).token_ids


def test_each_prompt_can_have_a_length_of_its_own(model: ik.Model) -> None:
    gens = model.generate(["dice"] * 3, max_tokens=[1, 5, 3], ignore_eos=True)
    assert [len(g.token_ids) for g in gens] == [1, 5, 3]
    with pytest.raises(ik.OptionError, match="max_tokens has 2 entries for 3 prompts"):
        model.generate(["dice"] * 3, max_tokens=[1, 2])


def test_each_prompt_can_have_a_seed_of_its_own(model: ik.Model) -> None:
    gens = model.generate(["dice"] * 3, seed=[1, 2, 1], temperature=1.5, **SIX)
    assert [g.seed for g in gens] == [1, 2, 1]
    assert gens[0].token_ids == gens[2].token_ids != gens[1].token_ids
    with pytest.raises(ik.OptionError, match="2 entries for 3 prompts"):
        model.generate(["dice"] * 3, seed=[1, 2])


def test_parameters_can_be_given_as_one_and_overridden(model: ik.Model) -> None:
    base = ik.SamplingParams(max_tokens=3, temperature=0.5, ignore_eos=True)
    gen = model.generate("a", sampling=base, max_tokens=4)
    assert gen.params == dataclasses.replace(base, max_tokens=4)
    assert len(gen.token_ids) == 4


def test_context_ends_a_generation(model: ik.Model) -> None:
    gen = model.generate(range(5, 250), max_tokens=100, ignore_eos=True)
    assert gen.finish_reason == "length"
    assert len(gen.prompt_token_ids) + len(gen.token_ids) == model.context == 256


def test_stop_string_and_stop_token_end_a_generation(model: ik.Model) -> None:
    whole = model.generate("Once", max_tokens=24, ignore_eos=True)
    third = whole.token_ids[2]
    cut = model.generate("Once", max_tokens=24, ignore_eos=True, stop_token_ids=[third])
    assert (cut.finish_reason, cut.stop_reason) == ("stop", third)
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(third) + 1]
    word = whole.text[4:7]
    cut = model.generate("Once", max_tokens=24, ignore_eos=True, stop=word)
    assert (cut.finish_reason, cut.stop_reason) == ("stop", word)
    assert cut.text == whole.text[: whole.text.index(word)]


# -- sampling defaults ----------------------------------------------------------------------------


def test_sampling_of_the_models_authors_is_used_when_asked_for(folder: Path) -> None:
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=5, eos_token_id=2
    )
    config.save_pretrained(folder)
    with ik.load(folder, context=64) as model:
        assert model.default_sampling == ik.SamplingParams(temperature=0.7, top_p=0.9, top_k=5)
        gen = model.generate("a", sampling="model", max_tokens=2)
        assert gen.params == dataclasses.replace(model.default_sampling, max_tokens=2)
        assert model.generate("a", max_tokens=2).params.temperature == 0


def test_sampling_options_count_only_where_the_authors_sample(folder: Path) -> None:
    written = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(written))
    with ik.load(folder, context=64) as model:
        assert model.default_sampling == ik.SamplingParams(repetition_penalty=1.3)


def test_sampling_must_be_parameters_or_the_word_model(model: ik.Model) -> None:
    with pytest.raises(ik.OptionError, match="'model'"):
        model.generate("a", sampling="authors")


# -- stream ---------------------------------------------------------------------------------------


def test_stream_gives_the_text_of_generate_in_pieces(model: ik.Model) -> None:
    pieces = list(model.stream("Once upon", **SIX))
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == model.last.text == model.generate("Once upon", **SIX).text


def test_leaving_a_stream_early_cancels_its_request(model: ik.Model) -> None:
    for _ in itertools.islice(model.stream("Once", **LONG), 3):
        pass
    gc.collect()
    last = model.last
    assert last.finish_reason == "cancelled"
    assert 3 <= len(last.token_ids) < 200
    wait_until(lambda: model.running == 0)


def test_a_stream_that_nobody_reads_is_cancelled(model: ik.Model) -> None:
    with held(model) as hold:
        pieces = model.stream("Once", **LONG)
        hold.wait()
        del pieces
        gc.collect()
        hold.release()
        assert model.last.finish_reason == "cancelled"


def test_a_stream_raises_what_went_wrong_after_the_last_piece(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = model._engine.runner.decode, itertools.count()

    def decode(*args: object) -> object:
        if next(calls) == 4:
            raise ValueError("a kernel of the model's failed")
        return real(*args)

    monkeypatch.setattr(model._engine.runner, "decode", decode)
    pieces: list[str] = []
    with pytest.raises(ik.GenerationError, match="ValueError: a kernel"):
        pieces.extend(model.stream("Once", **LONG))
    assert "".join(pieces) == model.last.text
    assert len(model.last.token_ids) == 5


def test_bad_options_of_a_stream_are_told_at_once(model: ik.Model) -> None:
    with pytest.raises(ik.OptionError, match="max_tokens"):
        model.stream("Once", max_token=3)


# -- submit ---------------------------------------------------------------------------------------


def test_submit_returns_before_a_token_is_made(model: ik.Model) -> None:
    with held(model) as hold:
        request = model.submit("Once", **SIX)
        assert not request.done
        hold.wait()
        assert request.token_ids == ()
        hold.step(2)
        assert len(request.token_ids) == 2
        assert request.status == "running"
        assert request.latency.output_tokens == 2
    gen = request.result()
    assert request.done
    assert request.status == gen.finish_reason == "length"
    assert (request.text, request.token_ids) == (gen.text, gen.token_ids)
    assert request.result() is gen


def test_every_reader_of_a_request_sees_all_of_it(model: ik.Model) -> None:
    request = model.submit("Once", **SIX)
    assert list(request) == list(request)
    assert "".join(request) == request.result().text


# -- chat -----------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <b>"},
]


def test_chat_prompts_in_the_format_of_the_template(model: ik.Model) -> None:
    text = model.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    gen = model.chat(TALK, **SIX)
    assert gen.prompt == text == "<system> be brief\n<user> hi <b>\n<assistant> "
    assert list(gen.prompt_token_ids) == ids
    assert model.last is gen
    assert gen.token_ids == model.generate(ids, **SIX).token_ids
    assert model.submit_chat(TALK, **SIX).result().token_ids == gen.token_ids


def test_chat_without_a_template_says_so(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    for file in folder.glob("chat_template*"):
        file.unlink()
    with (
        ik.load(folder, context=64) as model,
        pytest.raises(ik.PromptError, match=r"no chat template.*model\.generate"),
    ):
        model.chat(TALK)


@pytest.mark.parametrize(
    "messages", [[], "hi", {"role": "user", "content": "hi"}, [{"content": "hi"}], [5], None]
)
def test_messages_that_are_none_are_refused(model: ik.Model, messages: object) -> None:
    with pytest.raises(ik.PromptError):
        model.chat(messages)


def test_a_template_that_refuses_is_quoted(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(model.tokenizer, "chat_template", refusing)
    with pytest.raises(ik.PromptError, match="roles must alternate"):
        model.chat(TALK)


# -- what comes with a generation -----------------------------------------------------------------


def test_latency_comes_with_every_generation(model: ik.Model) -> None:
    for gen in model.generate(["a", "b", "c", "d", "e", "f"], **SIX):
        latency = gen.latency
        assert 0 <= latency.queue <= latency.ttft <= latency.e2e
        assert len(latency.itl) == 5
        assert latency.tpot == pytest.approx(sum(latency.itl) / 5)
        assert latency.ttft + sum(latency.itl) == pytest.approx(latency.e2e)
        assert latency.prompt_tokens == len(gen.prompt_token_ids)


def test_prompts_of_one_call_arrive_together_and_wait_for_slots(model: ik.Model) -> None:
    gens = model.generate([f"{n}" for n in range(9)], **SIX)
    assert len({g.latency.trace.arrival for g in gens}) == 1
    assert gens[-1].latency.queue > gens[0].latency.ttft


def test_settings_tell_the_mode_in_force(model: ik.Model) -> None:
    try:
        assert model.generate("a", **SIX).settings.batching == "continuous"
        model.configure(batching="static", max_batch=2)
        settings = model.generate("a", **SIX).settings
        assert (settings.batching, settings.max_batch) == ("static", 2)
        assert (settings.model, settings.device, settings.dtype) == (model.name, "cpu", "float32")
        assert settings.quantization == "none"
    finally:
        model.configure(batching="continuous", max_batch=4)


def test_a_request_that_waited_has_the_settings_it_started_under(model: ik.Model) -> None:
    try:
        model.configure(batching="off")
        with held(model) as hold:
            first = model.submit("a", **SIX)
            hold.wait()
            waiting = model.submit("b", **SIX)
            assert waiting.settings.batching == "off"
            model.configure(batching="continuous")
        assert first.result().settings.batching == "off"
        assert waiting.result().settings.batching == "continuous"
    finally:
        model.configure(batching="continuous")


def test_a_model_that_cannot_share_batches_says_so(tiny_model: Callable[[str], Path]) -> None:
    with ik.load(tiny_model("mamba"), dtype="float32", context=64, max_batch=8) as model:
        assert "recurrent state" in model.fallback
        assert "one at a time" in repr(model)
        gens = model.generate(["a", "b"], **SIX)
        assert [len(g.token_ids) for g in gens] == [6, 6]
        assert (gens[0].settings.batching, gens[0].settings.max_batch) == ("off", 1)
        model.configure(context=96, max_batch=2)
        longer = model.generate("a", max_tokens=1000, ignore_eos=True)
        assert len(longer.prompt_token_ids) + len(longer.token_ids) == 96


def test_a_warning_of_a_failure_points_to_the_callers_line(
    model: ik.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(model._engine.runner, "prefill", fail)
    for call in (
        lambda: model.generate("a"),
        lambda: model.generate(["a", "b"]),
        lambda: model.chat(TALK),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert {w.filename for w in caught} == {__file__}
        assert "broken" in str(caught[0].message)


# -- what the handle says -------------------------------------------------------------------------


def test_handle_tells_what_is_loaded(model: ik.Model, tiny_model: Callable[[str], Path]) -> None:
    assert model.name == "qwen3"
    assert model.path == tiny_model("qwen3")
    assert (model.device, model.devices, model.dtype) == ("cpu", ("cpu",), "float32")
    assert (model.quantization, model.batching) == ("none", "continuous")
    assert (model.max_batch, model.context) == (4, 256)
    assert model.fallback is None
    assert model.loaded
    own = transformers.AutoModelForCausalLM.from_pretrained(model.path)
    assert own.config.model_type == "qwen3"


def test_running_and_waiting_requests_are_counted(model: ik.Model) -> None:
    with held(model) as hold:
        requests = [model.submit("a", **SIX) for _ in range(7)]
        hold.wait()
        wait_until(lambda: model.running + model.waiting == 7)
        assert f"{model.running} running, {model.waiting} waiting" in repr(model)
    for request in requests:
        request.result()
    assert (model.running, model.waiting) == (0, 0)


def test_what_a_notebook_shows(tiny_model: Callable[[str], Path]) -> None:
    model = ik.load(tiny_model("llama"), dtype="float32", context=128, name="a<b")
    gens = model.generate(["x <i>", "y"], **SIX)
    request = model.submit("z", **SIX)
    request.result()
    for shown in (model, ik.models()):
        assert "a&lt;b" in shown._repr_html_()
        assert "a<b" in repr(shown)
        assert "continuous" in repr(shown)
    for shown in (gens, gens[0]):
        assert "x &lt;i&gt;" in shown._repr_html_()
        assert "<i>" not in shown._repr_html_()
        assert "length" in repr(shown)
    assert "length" in repr(request)
    table = type(ik.models())([model])
    model.unload()
    assert "unloaded" in repr(model)
    assert "unloaded" in model._repr_html_()
    assert repr(table) == "No model is loaded."
    assert "ik.load" in table._repr_html_()
    assert "x &lt;i&gt;" in gens._repr_html_()
