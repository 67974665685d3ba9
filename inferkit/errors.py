"""Every error that inferkit raises on purpose.

    InferkitError
    ├── OptionError (ValueError)            an option is unknown, or its value makes no sense
    ├── PromptError (ValueError)            an empty prompt, or one longer than the context
    ├── DeviceError                         a device is not there, or cannot do what was asked
    ├── ModelError
    │   ├── ModelNotFoundError              the reference leads to no model
    │   ├── DamagedFileError                a file is truncated, or its sha256 differs
    │   ├── UnsupportedModelError           the architecture, or how it is stored, cannot be served
    │   ├── DoesNotFitError                 the memory plan says no, before a weight is read
    │   ├── LoadError                       loading failed half way
    │   └── ModelUnloadedError              the handle outlived its model
    ├── GenerationError                     a request failed while it ran
    │   ├── OutOfMemoryError (MemoryError)  memory ran out
    │   └── NonFiniteLogitsError            the model produced NaN or infinite logits
    ├── ForkedProcessError                  used in a forked child of the process that loaded it
    └── ExperimentError                     a recorded experiment cannot be read, or not run again

A message says what was wrong, with the value; what would have been right; and what to do next.
"""

from __future__ import annotations

__all__ = [
    "DamagedFileError",
    "DeviceError",
    "DoesNotFitError",
    "ExperimentError",
    "ForkedProcessError",
    "GenerationError",
    "InferkitError",
    "LoadError",
    "ModelError",
    "ModelNotFoundError",
    "ModelUnloadedError",
    "NonFiniteLogitsError",
    "OptionError",
    "OutOfMemoryError",
    "PromptError",
    "UnsupportedModelError",
]


class InferkitError(Exception):
    """The root: ``except ik.InferkitError`` catches all that inferkit raises on purpose."""


class OptionError(InferkitError, ValueError):
    """An option is unknown, or its value makes no sense."""


class PromptError(InferkitError, ValueError):
    """An empty prompt, or one longer than the model's context."""


class DeviceError(InferkitError):
    """A device is not attached, or cannot do what was asked."""


class ModelError(InferkitError):
    """Something about a model: finding, loading or holding it."""


class ModelNotFoundError(ModelError):
    """The reference is no hub id, folder, GGUF file or known name."""


class DamagedFileError(ModelError):
    """A model file is truncated, or its sha256 is not the expected one."""


class UnsupportedModelError(ModelError):
    """The architecture cannot be served (an encoder-decoder, for example), or its stored form.

    A checkpoint that is stored quantized needs the packages and devices of its method.
    """


class DoesNotFitError(ModelError):
    """The memory plan says that the model cannot fit; ``plan`` holds the numbers."""

    def __init__(self, message: str, plan: object = None) -> None:
        super().__init__(message)
        self.plan = plan


class LoadError(ModelError):
    """Loading failed half way; what was read has been released."""


class ModelUnloadedError(ModelError):
    """The handle's model was unloaded or replaced."""


class GenerationError(InferkitError):
    """A request failed while it ran; its text so far is kept in the Generation."""


class OutOfMemoryError(GenerationError, MemoryError):
    """The device ran out of memory, under a request or under a change of the KV cache."""


class NonFiniteLogitsError(GenerationError):
    """The model produced NaN or infinite logits: its weights or its dtype are at fault."""


class ForkedProcessError(InferkitError):
    """A model was used in a forked child of the process that loaded it."""


class ExperimentError(InferkitError):
    """A recorded experiment cannot be read, or cannot be run again here."""


def first_line(error: BaseException | None) -> str:
    """What another library's error says in its first line, or what kind it is."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
