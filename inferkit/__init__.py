"""Load, prompt and time language models from a notebook.

    import inferkit as ik

    model = ik.load("demo")
    gen = model.generate("Once upon a time", max_tokens=64)
    print(gen.text, gen.latency.ttft)

Names are looked up when they are first used (PEP 562), so that importing the package costs
milliseconds and imports no torch. Errors and ``devices`` are small and imported at once:
``devices`` is also the name of a submodule, and a submodule that is imported later would take the
function's place.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import TYPE_CHECKING

from inferkit.devices import devices
from inferkit.errors import (
    DamagedFileError,
    DeviceError,
    DoesNotFitError,
    ExperimentError,
    ForkedProcessError,
    GenerationError,
    InferkitError,
    LoadError,
    ModelError,
    ModelNotFoundError,
    ModelUnloadedError,
    NonFiniteLogitsError,
    OptionError,
    OutOfMemoryError,
    PromptError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from inferkit.comparison import Comparison
    from inferkit.engine import Request
    from inferkit.experiments.experiment import Experiment, open
    from inferkit.experiments.imports import import_experiment
    from inferkit.experiments.outcome import Replay
    from inferkit.experiments.recording import record
    from inferkit.experiments.replay import replay
    from inferkit.experiments.sharing import binder_link
    from inferkit.generation import Generation
    from inferkit.grid import compare
    from inferkit.latency import LatencySummary, summarize
    from inferkit.memory import MemoryPlan, plan
    from inferkit.model import Model
    from inferkit.notebook.live import LivePlot
    from inferkit.notebook.panel import Panel
    from inferkit.notebook.playback import Playback, play
    from inferkit.quality import Fidelity
    from inferkit.reference import fidelity
    from inferkit.registry import load, models
    from inferkit.sampling import SamplingParams
    from inferkit.trace import Latency

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "DamagedFileError",
    "DeviceError",
    "DoesNotFitError",
    "Experiment",
    "ExperimentError",
    "Fidelity",
    "ForkedProcessError",
    "Generation",
    "GenerationError",
    "InferkitError",
    "Latency",
    "LatencySummary",
    "LivePlot",
    "LoadError",
    "MemoryPlan",
    "Model",
    "ModelError",
    "ModelNotFoundError",
    "ModelUnloadedError",
    "NonFiniteLogitsError",
    "OptionError",
    "OutOfMemoryError",
    "Panel",
    "Playback",
    "PromptError",
    "Replay",
    "Request",
    "SamplingParams",
    "UnsupportedModelError",
    "binder_link",
    "compare",
    "devices",
    "fidelity",
    "import_experiment",
    "load",
    "models",
    "open",
    "plan",
    "play",
    "record",
    "replay",
    "summarize",
]

_HOME = {
    "Comparison": "inferkit.comparison",
    "Experiment": "inferkit.experiments.experiment",
    "Fidelity": "inferkit.quality",
    "Generation": "inferkit.generation",
    "Latency": "inferkit.trace",
    "LatencySummary": "inferkit.latency",
    "LivePlot": "inferkit.notebook.live",
    "MemoryPlan": "inferkit.memory",
    "Model": "inferkit.model",
    "Panel": "inferkit.notebook.panel",
    "Playback": "inferkit.notebook.playback",
    "Replay": "inferkit.experiments.outcome",
    "Request": "inferkit.engine",
    "SamplingParams": "inferkit.sampling",
    "binder_link": "inferkit.experiments.sharing",
    "compare": "inferkit.grid",
    "fidelity": "inferkit.reference",
    "import_experiment": "inferkit.experiments.imports",
    "load": "inferkit.registry",
    "models": "inferkit.registry",
    "open": "inferkit.experiments.experiment",
    "plan": "inferkit.memory",
    "play": "inferkit.notebook.playback",
    "record": "inferkit.experiments.recording",
    "replay": "inferkit.experiments.replay",
    "summarize": "inferkit.latency",
}

_importing = threading.RLock()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'inferkit' has no attribute {name!r}")
    # One thread at a time: two that import transformers at once find what the other has half done.
    with _importing:
        value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def load_ipython_extension(ipython: object) -> None:
    """``%load_ext inferkit``: the magics ``%infer`` and ``%%infer``, and their completion."""
    import_module("inferkit.notebook.magics").register(ipython)


def unload_ipython_extension(ipython: object) -> None:
    """``%unload_ext inferkit``: takes them out again."""
    import_module("inferkit.notebook.magics").unregister(ipython)
