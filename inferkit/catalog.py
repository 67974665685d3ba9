"""A model reference -> a local folder that transformers can load.

A reference is one of these, tried in this order:

1. the word ``"demo"``: the small real model of the ``[demo]`` extra (a folder of that name is
   ``"./demo"``, or ``Path("demo")``);
2. a path that exists: a folder with config.json, weights and tokenizer, or a ``.gguf`` file;
3. a Hugging Face Hub id, ``"org/name"`` or ``"name"``.

GGUF files (and the demo, which is one) are converted once to bfloat16 safetensors, in the folder
named by the environment variable ``INFERKIT_CACHE`` or else the user's cache folder. What is in
the local hub cache is used as it is, without asking the hub: ``revision=`` names another state.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inferkit import gguf_convert, model_files
from inferkit.errors import (
    DamagedFileError,
    ModelNotFoundError,
    OptionError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["CachedModel", "Kind", "Source", "cached_models", "config", "resolve"]

Kind = Literal["hub", "folder", "gguf", "demo"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
