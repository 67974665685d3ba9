"""Prompts on their way to a model, from a cell or from a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.model import Model


def submit(
    model: Model, prompts: Sequence[str], chat: bool, options: Mapping[str, Any]
) -> list[Request]:
    """Queue prompts, all at one moment.

    Args:
        model: Who answers.
        prompts: At least one.
        chat: Whether to put the model's chat template around each.
        options: As for `inferkit.Model.generate`.

    Raises:
        PromptError, OptionError: As for `inferkit.Model.submit`; none is queued then.
    """
    if not chat:
        return model.submit(list(prompts), **options)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return model.submit_chat(conversations, **options)
