"""What a kernel's file and the server's answer hold: version 1 of the state.

The structures below are the format; its JSON Schema, ``schemas/state-1.json``, is made of them, and
the extension's TypeScript types are made of that. A field that is added keeps the version, for
readers ignore what they do not know; anything else is a new one. Times are seconds since 1970,
latencies milliseconds, memory bytes.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

import msgspec

__all__ = [
    "VERSION",
    "Answer",
    "Attached",
    "Head",
    "History",
    "Kernel",
    "KernelState",
    "ModelState",
    "OnDevice",
    "Report",
    "Share",
    "State",
    "Work",
    "schema",
]

VERSION = 1
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what JavaScript's numbers hold
Bytes = Count
Real = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_STEPS = msgspec.Meta(max_length=1000)


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every version of a kernel's file says.

    Attributes:
        version: Of the format.
        inferkit: The library's version in the kernel.
        kernel_id: Jupyter's id of the kernel.
        pid: Its process.
        started: When that process began, so that a later one of the same number is told apart.
        host: Where that number means something: see `inferkit.lab.folder.host`.
    """

    version: int
    inferkit: str
    kernel_id: str
    pid: Count
    started: float
    host: str = ""


class OnDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device, as a kernel with models on it sees it.

    Attributes:
        name: What the kernel calls it: "cuda:0", "mps", "cpu".
        uuid: The driver's name for a GPU, the same in all kernels; "" where there is none.
        description: What the maker calls it.
        total: Its memory.
        free: What of it was free when this was written.
        own: What the kernel's process holds of an accelerator's; 0 for the CPU, where the system
            tells.
    """

    name: str
    uuid: str
    description: str
    total: Bytes
    free: Bytes
    own: Bytes


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The last minute of a model, in steps of equal length; the last step ends at ``end``.

    Attributes:
        end: When the last step ends.
        seconds: The length of a step.
        itl: Median gap between tokens in each step; None without one.
        ttft: Median time to the first token of the requests that began to answer in it.
        tokens: Tokens that came in it.
    """

    end: float
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    itl: Annotated[list[Real | None], _STEPS]
    ttft: Annotated[list[Real | None], _STEPS]
    tokens: Annotated[list[Count], _STEPS]


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model.

    Attributes:
        name: What the kernel calls it.
        ref: What it was loaded by.
        state: "running" while it has requests; "stopped" where its engine has failed.
        devices: Their names.
        dtype: What it runs in.
        quantization: The mode.
        modes: Those that it can be in; its own alone where it is stored quantized.
        batching: The policy.
        max_batch: Most requests that run at once.
        context: Most tokens of prompt and output together.
        fallback: Why requests run one at a time whatever the policy, or None.
        step: How decode steps are run.
        memory: Weights and KV cache per device.
        running: Requests that run.
        waiting: Requests that wait.
        rate: Output tokens per second now.
        itl: Median gap between tokens in the ten seconds up to the latest one, as far as they were
            in this mode; None without one.
        itl_p99: The 99th percentile of these gaps.
        ttft: Time to the first token of the latest request that has one; None if that ran in
            another mode.
        history: The last minute; None without a token in it.
    """

    name: str
    ref: str
    state: Literal["ready", "running", "stopped"]
    devices: list[str]
    dtype: str
    quantization: str
    modes: list[str]
    batching: Literal["continuous", "static", "off"]
    max_batch: Count
    context: Count
    fallback: str | None
    step: str
    memory: dict[str, Bytes]
    running: Count
    waiting: Count
    rate: Real
    itl: Real | None
    itl_p99: Real | None
    ttft: Real | None
    history: History | None


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a click has the kernel do that takes a while.

    Attributes:
        what: In words.
        done: Steps that are done.
        total: All steps, where that is known.
        id: What `cancel` is given to end it; 0 where it cannot be ended.
    """

    what: str
    done: Count = 0
    total: Count | None = None
    id: Count = 0


class KernelState(Head, frozen=True, kw_only=True):
    """A kernel's file.

    Attributes:
        written: When.
        notebook: The path of the notebook that the kernel was started for; "" if unknown.
        models: Those that are loaded, in the order of loading.
        devices: Those that they are on.
        work: What is being done, in the order of beginning.
        actions: Names of what `inferkit.notebook.actions` can do in this kernel.
        experiment: The name of the experiment that was recorded last, or is being; or None.
        recording: Whether it is being recorded.
    """

    written: float
    notebook: str
    models: list[ModelState]
    devices: list[OnDevice]
    work: list[Work]
    actions: list[str]
    experiment: str | None
    recording: bool = False


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What a kernel holds of a device's memory."""

    kernel_id: str
    used: int


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """A device of this machine.

    Attributes:
        name: "cpu", or what the first kernel on it calls it.
        description: What the maker calls it.
        total: Its memory.
        used: What of it is in use, whoever uses it.
        utilization: How busy it is, in percent; None if unknown.
        kernels: What of the memory is a kernel's; the rest is some other program's.
    """

    name: str
    description: str
    total: int
    used: int
    utilization: float | None
    kernels: list[Share]


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel with inferkit.

    Attributes:
        kernel_id: Jupyter's id.
        pid: Its process.
        inferkit: The library's version in it.
        here: Whether the server that answers has started it, so that it can be reached by it.
        memory: What its process has in the machine's memory.
        state: Its file, as it is; None where it is of another version than the reader's.
        problem: Why there is no state, and what to do about it; "" where there is one.
    """

    kernel_id: str
    pid: int
    inferkit: str
    here: bool
    memory: int
    state: KernelState | None
    problem: str


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``GET inferkit/api/state``, and what ``inferkit ps --json`` prints.

    Attributes:
        version: Of the format.
        inferkit: The library's version where this was read.
        time: When it was read.
        devices: Accelerators first, the CPU last.
        kernels: In the order of their ids.
        out_of_sight: Ids of kernels that run on another machine, or in another container.
    """

    version: int
    inferkit: str
    time: float
    devices: list[Attached]
    kernels: list[Kernel]
    out_of_sight: list[str]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an action in a kernel gives: see `inferkit.notebook.actions`.

    Attributes:
        ok: Whether it was done.
        text: What was done, or what went wrong, in a sentence for a person.
        kind: The name of the error's class; "" without one.
        link: An address to be opened, where the action gives one.
        code: A cell's text, where the action gives one.
        notes: What else a person should know.
        details: For whoever looks into an error: where it was raised.
    """

    ok: bool
    text: str
    kind: str = ""
    link: str = ""
    code: str = ""
    notes: list[str] = []
    details: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that travels between the library and the extension, for the schema."""

    state: State
    answer: Answer


def schema() -> dict[str, Any]:
    """The JSON Schema of what travels (`Report`)."""
    found = msgspec.json.schema(Report)
    for definition in found["$defs"].values():
        definition["description"] = inspect.cleandoc(definition["description"])
        definition["required"] = list(definition["properties"])  # defaults are written too
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = "State of inferkit's kernels"
    return found
