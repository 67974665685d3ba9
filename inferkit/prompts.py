"""What a person prompts with -> the token ids that a model reads, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from inferkit.errors import OptionError, PromptError

_WANTED = "A prompt is text or a list of token ids, or a list of those"


def is_one(prompt: Any) -> bool:
    """Whether this is one prompt (text, or a sequence of token ids) and not several.

    Raises:
        PromptError: It is neither.
    """
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(f"{_WANTED}; this is of type {type(prompt).__name__}.")
    return bool(prompt) and isinstance(prompt[0], Integral)


def is_one_conversation(messages: Any) -> bool:
    """Whether this is no list of conversations, each a list of messages."""
    return not (
        isinstance(messages, list | tuple)
        and bool(messages)
        and all(isinstance(each, list | tuple) for each in messages)
    )


def options_of_each(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of several prompts: ``seed`` and ``max_tokens`` may be one for each."""
    each = [dict(options) for _ in range(count)]
    for name in ("seed", "max_tokens"):
        values = options.get(name)
        if not isinstance(values, Sequence) or isinstance(values, str):
            continue
        if len(values) != count:
            raise OptionError(
                f"{name} has {len(values)} entries for {count} prompts; give one for each."
            )
        for one, value in zip(each, values):
            one[name] = value
    return each


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns prompts into token ids.

    Attributes:
        model: What messages call the model.
        tokenizer: A transformers tokenizer.
        vocab_size: Token ids are below it.
        context: Most tokens of prompt and output together.
        max_context: The largest context that the model could be given here.
    """

    model: str
    tokenizer: Any
    vocab_size: int
    context: int
    max_context: int

    def prompt(self, prompt: Any) -> tuple[int, ...]:
        """The token ids of text, or token ids as given.

        Raises:
            PromptError: It is empty, too long, or no prompt.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("The prompt is empty; give at least one character.")
            return self._checked(self._ids(prompt, special=True))
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise PromptError(f"{_WANTED}; this is {prompt!r}, of type {type(prompt).__name__}.")
        for i in prompt:
            whole = isinstance(i, Integral) and not isinstance(i, bool)
            if not whole or not 0 <= int(i) < self.vocab_size:
                raise PromptError(
                    f"{i!r} is no token id of {self.model!r}: give text, or integers from 0 to "
                    f"{self.vocab_size - 1}."
                )
        return self._checked([int(i) for i in prompt])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[int, ...]]:
        """A conversation in the format of the model's chat template: its text and token ids.

        Raises:
            PromptError: There is no template, or it refuses the messages; or as for `prompt`.
        """
        if not self.tokenizer.chat_template:
            raise PromptError(
                f"{self.model!r} has no chat template: it is a base model that continues text. "
                "Use model.generate(text), or set model.tokenizer.chat_template."
            )
        wanted = 'Each is a dict as {"role": "user", "content": "hi"}.'
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise PromptError(f"A conversation is a list of messages, not {messages!r}. {wanted}")
        if not messages:
            raise PromptError("The conversation is empty; give at least one message.")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise PromptError(f"{message!r} is no message. {wanted}")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the model's authors
            raise PromptError(
                f"The chat template of {self.model!r} refuses these messages: {error}. {wanted}"
            ) from None
        return text, self._checked(self._ids(text, special=False))

    def _ids(self, text: str, special: bool) -> list[int]:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise PromptError(
                "The prompt has half of a character in it (a lone surrogate), which is no text: "
                "take it out, as text.encode('utf-8', 'ignore').decode() does."
            )
        try:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        except (TypeError, UnicodeError) as error:
            raise PromptError(f"The prompt cannot be tokenized: {error}.") from None

    def _checked(self, ids: list[int]) -> tuple[int, ...]:
        if not ids:
            raise PromptError("The prompt has no tokens; give at least one.")
        if len(ids) >= self.context:
            advice = "shorten it"
            if len(ids) < self.max_context:
                wanted = min(len(ids) + 256, self.max_context)
                advice += f", or model.configure(context={wanted})"
            raise PromptError(
                f"The prompt has {len(ids)} tokens, and the context of {self.context} must hold it "
                f"and at least one more: {advice}."
            )
        return tuple(ids)
