"""Detokeniser: pieces that join to the whole text, and never a character in halves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

import architectures
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from inferkit.engine.detokenize import Detokenizer

REPLACEMENT = "\ufffd"
SPECIAL = ["<pad>", "<bos>", "<eos>"]
# One to four bytes a character, combining marks, right to left, and emoji of several characters.
ALPHABET = [
    *"aZ09 .,\n\t'",
    *"éßñøčž",
    *"東京語中文字한글ไทย",
    *"שלוםمرحبا",
    *"🙂🚀🧠",
    "e\u0301",
    "👩‍👩‍👧",
    "🇫🇷",
    "👍🏽",
    " the",
    " world",
    "  ",
]


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """As in GPT-2, Llama 3 and Qwen: every byte has a token, so characters are split."""
    return architectures.tokenizer()


@cache
def byte_fallback() -> PreTrainedTokenizerBase:
    """As in Llama 2, Mistral and Gemma: "▁" for a space, bytes only for unknown characters."""
    tokenizer = Tokenizer(BPE())
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.pre_tokenizer = spaces
    trainer = BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(architectures.CORPUS, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocab = learned["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    model = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True))
    model.pre_tokenizer = spaces
    model.add_special_tokens(SPECIAL)
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(model)


@cache
def metaspace() -> PreTrainedTokenizerBase:
    """As in T5 and ALBERT: a unigram model with the Metaspace decoder."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=300,
        special_tokens=[*SPECIAL, "<unk>"],
        unk_token="<unk>",
        initial_alphabet=sorted({c for text in ALPHABET for c in text if not c.isspace()}),
        show_progress=False,
    )
    tokenizer.train_from_iterator(architectures.CORPUS, trainer)
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    ids: list[int],
    stop: tuple[str, ...] = (),
) -> list[str]:
    """What each token gives until a stop string ends the text, and at the end the rest."""
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    found = []
    for token_id in ids:
        found.append(detokenizer.add(token_id))
        if detokenizer.stopped_by is not None:
            break
    return [*found, detokenizer.flush()]


def random_text(dice: random.Random, length: int) -> str:
    return "".join(dice.choice(ALPHABET) for _ in range(length))


@pytest.mark.parametrize("seed", range(30))
def test_pieces_of_any_text_are_valid_and_join_to_what_decoding_all_gives(tokenizer, seed):
    dice = random.Random(seed)
    prompt = encode(tokenizer, "Once upon a time " + random_text(dice, dice.randint(0, 8)))
    ids = encode(tokenizer, random_text(dice, 60))
    assert len(ids) > 60
    told, whole = decode(tokenizer, prompt), decode(tokenizer, prompt + ids)
    assert whole.startswith(told)
    found = pieces(tokenizer, prompt, ids)
    assert "".join(found) == whole[len(told) :]
    assert REPLACEMENT not in "".join(found)
    assert found[-1] == ""
    assert sum(map(bool, found)) > 20  # it streams


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_any_token_ids_join_to_what_decoding_all_gives(name, seed):
    """A model may say bytes that make no character; the text shows them as the tokenizer does."""
    tokenizer = TOKENIZERS[name]()
    dice = random.Random(seed)
    prompt = encode(tokenizer, "The quick brown fox")
    ids = [dice.randrange(len(SPECIAL), len(tokenizer)) for _ in range(80)]
    whole = decode(tokenizer, prompt + ids)
    assert "".join(pieces(tokenizer, prompt, ids)) == whole[len(decode(tokenizer, prompt)) :]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("<0xF0> <0x9F> <0x99> <0x82> <0xF0> <0x9F>", "🙂" + 2 * REPLACEMENT),
        ("<0x5A> <0xE3> ▁the", f"Z{REPLACEMENT} the"),
        ("▁the <0xE3> <0x81> <0x82> <0xE3> ▁the", f" theあ{REPLACEMENT} the"),
    ],
)
def test_byte_fallback_keeps_what_was_whole_when_broken_bytes_follow(said, shown):
    """Decoding all would show the whole run of bytes as broken, when some of it is long told."""
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(said.split())
    assert "".join(pieces(tokenizer, encode(tokenizer, "the dog"), ids)) == shown


def test_a_character_of_four_bytes_comes_out_when_its_last_token_does():
    tokenizer = byte_level()
    prompt, ids = encode(tokenizer, "so"), encode(tokenizer, "🚀!")
    assert len(ids) > 3
    assert pieces(tokenizer, prompt, ids) == [""] * (len(ids) - 2) + ["🚀", "!", ""]


def test_an_unfinished_character_is_shown_at_the_end():
    tokenizer = byte_level()
    ids = encode(tokenizer, "ok🚀")[:-1]
    found = pieces(tokenizer, encode(tokenizer, "so"), ids)
    assert "".join(found[:-1]) == "ok"
    assert set(found[-1]) == {REPLACEMENT}


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_character_begun_in_the_prompt_is_shown_whole_once_it_is_complete(name):
    """As when a generation that max_tokens cut within a character is continued by its ids."""
    tokenizer = TOKENIZERS[name]()
    ids = encode(tokenizer, "to the moon 🧠 and back")
    middle = next(i for i in range(len(ids)) if decode(tokenizer, ids[:i]).endswith(REPLACEMENT))
    found = pieces(tokenizer, ids[:middle], ids[middle:])
    assert "".join(found) == "🧠 and back"


def test_a_replacement_character_in_the_prompt_is_not_said_again():
    tokenizer = byte_level()
    found = pieces(tokenizer, encode(tokenizer, f"odd {REPLACEMENT}"), encode(tokenizer, " text"))
    assert "".join(found) == " text"


def test_a_replacement_character_that_the_model_says_is_kept():
    tokenizer = byte_level()
    text = f" odd {REPLACEMENT} text {REPLACEMENT}"
    assert "".join(pieces(tokenizer, encode(tokenizer, "so"), encode(tokenizer, text))) == text


def test_the_space_between_prompt_and_answer_is_kept(tokenizer):
    """A tokenizer that decodes a token alone strips its leading space."""
    prompt, ids = encode(tokenizer, "the dog"), encode(tokenizer, "the dog does not mind")
    answer = ids[len(prompt) :]
    assert decode(tokenizer, prompt + answer) == "the dog does not mind"
    assert "".join(pieces(tokenizer, prompt, answer)) == " does not mind"
    if tokenizer.decode([answer[0]])[:1] != " ":
        assert pieces(tokenizer, prompt, answer)[0].startswith(" ")


@pytest.mark.parametrize("prompt", [[], [1]], ids=["empty", "bos"])
def test_without_words_before_it_the_text_begins_as_decoding_all_does(tokenizer, prompt):
    ids = encode(tokenizer, " one two three")
    assert "".join(pieces(tokenizer, prompt, ids)) == decode(tokenizer, prompt + ids)


def test_special_tokens_are_not_shown_and_break_nothing(tokenizer):
    dice = random.Random(1)
    prompt = [1, *encode(tokenizer, "Once upon")]
    ids = encode(tokenizer, "one two 東京 three 🙂 four")
    for _ in range(6):
        ids.insert(dice.randrange(len(ids)), dice.choice((0, 1, 2)))
    told, whole = decode(tokenizer, prompt), decode(tokenizer, prompt + ids)
    text = "".join(pieces(tokenizer, prompt, ids))
    assert text == whole[len(told) :]
    assert not any(s in text for s in SPECIAL)


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_ends_the_text_where_it_first_appears(tokenizer, seed):
    dice = random.Random(seed)
    prompt = encode(tokenizer, "Once upon a time ")
    ids = encode(tokenizer, random_text(dice, 60))
    whole = decode(tokenizer, prompt + ids)[len(decode(tokenizer, prompt)) :]
    start = dice.randrange(len(whole) - 6)
    stop = whole[start : start + dice.randint(1, 6)]
    found = pieces(tokenizer, prompt, ids, (stop, "never said", stop + "never said"))
    assert "".join(found) == whole[: whole.index(stop)]
    assert len(found) <= len(ids)  # no more tokens were needed than those up to the string


def test_of_two_stop_strings_in_one_token_the_first_in_the_text_counts():
    tokenizer = byte_level()
    (the,) = encode(tokenizer, " the")
    for stop in (("e", "h"), ("h", "e")):
        detokenizer = Detokenizer(tokenizer, encode(tokenizer, "so"), stop)
        assert (detokenizer.add(the), detokenizer.stopped_by) == (" t", "h")


def test_the_end_of_the_text_may_look_like_the_beginning_of_a_stop_string():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, "so"), ("abab!", "bc"))
    said = [detokenizer.add(i) for i in encode(tokenizer, "xababab")]
    assert "".join(said) == "xab"  # "abab" may become "abab!"
    assert detokenizer.add(*encode(tokenizer, "c")) == "aba"  # and "bc" is one
    assert detokenizer.stopped_by == "bc"
    assert detokenizer.flush() == ""


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None, [1, 2], ("a",))
    assert (detokenizer.add(3), detokenizer.flush(), detokenizer.stopped_by) == ("", "", None)
