"""The format of an experiment: what is in its file, and in the lines of its journal.

The structures below are the format; its JSON Schema, ``schemas/experiment-1.json``, is made of
them. Where files and journals are is the concern of `store`.

What the types and `_check` refuse, no recording of inferkit's has written: such a file was edited
or damaged, and the error names the field. Requests that stand in another order than that of their
arrival are put in that order.
"""

from __future__ import annotations

import base64
import itertools
import re
import sys
import zlib
from array import array
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from inferkit.errors import ExperimentError
from inferkit.generation import FinishReason

FORMAT = "inferkit-experiment"
VERSION = 1
"""Goes up when a reader of this version could not read the file; readers take all up to theirs."""

_YEARS = (1970, 9000)  # of a beginning: a time counted from it is one that datetime has, too
_LATEST = 2**63 - 1  # ns since the beginning
_PLAIN = 32  # so many numbers are written as they are


Natural = Annotated[int, msgspec.Meta(ge=0)]

Count = Annotated[int, msgspec.Meta(ge=0, le=10**7)]
"""A number of tokens; of one request, each of which gets a time."""

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

Kind = Literal["hub", "folder", "gguf", "demo", "unknown"]
Step = Literal["compiled", "eager", "unknown"]
Policy = Literal["continuous", "static", "off", "unknown"]
"""Of these the last stands where the file of another tool does not say."""


class Packed(msgspec.Struct, frozen=True):
    """Many whole numbers: the first, and from then on differences, as int64 in little-endian order.

    Attributes:
        n: How many.
        zlib: Their bytes, compressed by zlib (RFC 1950), in base64 (RFC 4648).
    """

    n: int
    zlib: str


Ints = list[Int64] | Packed


class Entry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The base of what is in the file."""


class ModelEntry(Entry):
    """A model that requests ran on.

    Attributes:
        name: What it was loaded as.
        ref: The reference it was loaded by; of a path only the last part.
        kind: "hub", "folder", "gguf" or "demo"; "unknown" of another tool's.
        revision: Commit of a hub model.
        files: Hex sha256 by file name; empty where they were not hashed.
        devices: Canonical names.
        dtype: torch's name of the dtype.
        prefix_reuse: As it was loaded.
        prefill_chunk: As it was loaded.
        parameters_bytes: Bytes of the weights at the beginning.
        kernels: The version of inferkit's own kernels that it was computed with; None where the
            library's did all.
    """

    name: str
    ref: str
    kind: Kind
    revision: str | None = None
    files: dict[str, str] = {}
    devices: list[str] = []
    dtype: str = ""
    prefix_reuse: bool = True
    prefill_chunk: int | None = None
    parameters_bytes: Natural | None = None
    kernels: str | None = None


class ModeEntry(Entry):
    """What a model ran as from a moment on.

    Attributes:
        time: ns since the beginning.
        model: Its number in ``models``.
        quantize: The mode: "none", "nf4", ...
        format: The mode with its details, as inferkit writes it.
        double_quant: Of a 4-bit mode.
        compute_dtype: Of a 4-bit mode; "auto" is the model's.
        batching: The policy.
        max_batch: Most requests at once.
        context: Most tokens of prompt and output.
        step: "compiled" or "eager".
        speculative: How next tokens were guessed: "off", "ngram", or "draft:" with the name of the
            model that guessed, as in ``models`` where it is there.
    """

    time: Natural
    model: Natural
    quantize: str
    format: str
    batching: Policy
    max_batch: Natural
    context: Natural
    step: Step
    double_quant: bool = False
    compute_dtype: str = "auto"
    speculative: str = "off"


class Sampling(TypedDict, total=False):
    """How the tokens of a request were chosen, and when it was to end; what is left out is unknown.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: 0, or less than 1e-5, takes the likeliest token.
        top_p: Of the likeliest tokens only as many as reach this probability together.
        top_k: Of the likeliest tokens only so many; 0: all.
        min_p: Only tokens at least this share as likely as the likeliest one.
        repetition_penalty: Above 1, tokens of prompt and output are less likely; 1 does nothing.
        seed: As it was asked for; None: one was drawn, which is the request's ``seed``.
        stop: Strings that end the text; left out where prompts were.
        stop_token_ids: Token ids that end it besides the model's own.
        ignore_eos: Whether the model's own do not.
        logprobs: Of how many tokens the probabilities were asked for.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    temperature: Annotated[float, msgspec.Meta(ge=0)]
    top_p: Share
    top_k: Natural
    min_p: Share
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)]
    seed: int | None
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: Natural


class RanUnder(TypedDict):
    """What a request ran under; until it was scheduled, what it was submitted under.

    Attributes:
        model: What the model is called, as in ``models``.
        device: Names of its devices.
        dtype: torch's name of the dtype.
        quantization: The mode with its details.
        batching: The policy.
        max_batch: Most requests that could run with it.
        speculative: How next tokens were guessed, as in ``modes``; "off" where it is left out.
    """

    model: str
    device: str
    dtype: str
    quantization: str
    batching: Policy
    max_batch: Natural
    speculative: NotRequired[str]


class RequestEntry(Entry):
    """A request: what was asked, what came and when. Times are ns since the beginning.

    Attributes:
        model: Its number in ``models``.
        mode: The number in ``modes`` of what it began under.
        prompt: Text; None where token ids were given, or it was left out.
        prompt_token_ids: Empty where prompts were left out.
        prompt_tokens: How many there were.
        params: Sampling parameters.
        seed: The seed in force.
        token_ids: Output tokens; empty where prompts were left out.
        text: Their text.
        text_ends: Characters of the text that were there after each token.
        finish_reason: "stop", "length", "cancelled", "error"; None: it was on its way at the end.
        stop_reason: The stop string or token id that ended it.
        error: Kind and message.
        settings: What it ran under.
        arrival: When it was submitted.
        scheduled: When the first step that it took part in began.
        tokens: When each output token was emitted.
        chunks: When each chunk of output arrived, where a chunk may hold several tokens or none,
            and tokens of a chunk stand at its time; None: one per token; []: not known.
        finished: When the engine was done with it.
        cached_tokens: Prompt tokens whose KV cache was there.
        draft_tokens: Tokens that were guessed and checked (speculative decoding).
        accepted_tokens: How many of these were right.
    """

    model: Natural
    mode: Natural
    arrival: Natural
    prompt_tokens: Count
    params: Sampling
    seed: int
    settings: RanUnder
    prompt: str | None = None
    prompt_token_ids: Ints = []
    token_ids: Ints = []
    text: str = ""
    text_ends: Ints = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: list[str] | None = None
    scheduled: Natural | None = None
    tokens: Ints = []
    chunks: Ints | None = None
    finished: Natural | None = None
    cached_tokens: Count = 0
    draft_tokens: Natural = 0
    accepted_tokens: Natural = 0


class DeviceEntry(Entry):
    """A device that was attached.

    Attributes:
        name: Canonical: "cpu", "cuda:0", "mps".
        kind: "cpu", "cuda" or "mps".
        description: What it is, in words.
        total: Bytes of its memory.
        bf16: Whether it is good at bf16.
        driver: Version of its driver.
    """

    name: str
    kind: str
    description: str
    total: Natural
    bf16: bool
    driver: str | None = None


class Environment(Entry):
    """Where it ran. No names of users, hosts or folders.

    Attributes:
        packages: Versions by distribution name.
        python: Version.
        system: Name and release of the operating system, and the machine's architecture.
        cpu: Model name of the processor.
        cores: Physical cores; None where the system does not say.
        processors: Logical processors that the process may use.
        threads: What torch computes with.
        memory: Bytes, no more than the container allows.
        devices: What was attached.
        commit: git commit of the working directory.
        uncommitted: Whether tracked files had changes.
        notebook: Name of the notebook's file.
    """

    packages: dict[str, str] = {}
    python: str = ""
    system: str = ""
    cpu: str = ""
    cores: Natural | None = None
    processors: Natural | None = None
    threads: Natural | None = None
    memory: Natural | None = None
    devices: list[DeviceEntry] = []
    commit: str | None = None
    uncommitted: bool | None = None
    notebook: str | None = None


class ExperimentFile(Entry):
    """The whole file.

    Attributes:
        format: Always "inferkit-experiment".
        version: Of the format.
        name: What the experiment is called.
        created: When it began, ISO 8601, UTC.
        source: What measured it: "inferkit", or the tool whose file was imported.
        duration: ns; None where it was not brought to its end.
        redacted: Whether prompts and outputs were left out.
        notes: What a reader should know, in words.
        environment: Where it ran.
        models: What ran.
        modes: What each model ran as, in order of time.
        requests: In order of arrival.
    """

    name: str
    created: str
    environment: Environment
    format: str = FORMAT
    version: int = VERSION
    source: str = "inferkit"
    duration: Natural | None = None
    redacted: bool = False
    notes: list[str] = []
    models: list[ModelEntry] = []
    modes: list[ModeEntry] = []
    requests: list[RequestEntry] = []


# -- lines of the journal -------------------------------------------------------------------------


class Line(msgspec.Struct, tag_field="type", omit_defaults=True):
    """The base of a line of the journal."""


class Began(Line, tag="experiment"):
    """The first line: the file as it is before anything happened, with format and version.

    Plain data, so that a later version is known by what it says, whatever else it holds.
    """

    file: dict[str, Any]


class NewModel(Line, tag="model"):
    """A model has joined."""

    entry: ModelEntry


class Hashed(Line, tag="files"):
    """The digests of a model's files are known."""

    model: int
    files: dict[str, str]


class NewMode(Line, tag="mode"):
    """A model changed."""

    entry: ModeEntry


class NewRequest(Line, tag="request"):
    """A request was submitted."""

    entry: RequestEntry


class Progress(Line, tag="tokens"):
    """A request has got further: what is new, and all that its end tells."""

    request: int
    token_ids: list[int] = []
    tokens: list[int] = []
    text_ends: list[int] = []
    text: str = ""
    facts: dict[str, Any] = {}


class Ended(Line, tag="end"):
    """The experiment was brought to its end; only where the file itself could not be written."""

    duration: int
    models: list[ModelEntry]
    notes: list[str]


_LINES = Began | NewModel | Hashed | NewMode | NewRequest | Progress | Ended


def apply(file: ExperimentFile, line: Line) -> None:
    """Make a file say what a line of its journal says."""
    match line:
        case NewModel(entry):
            file.models.append(entry)
        case Hashed(number):
            file.models[number].files = line.files
        case NewMode(entry):
            file.modes.append(entry)
        case NewRequest(entry):
            file.requests.append(entry)
        case Progress(number):
            entry = file.requests[number]
            for name in ("token_ids", "tokens", "text_ends"):
                getattr(entry, name).extend(getattr(line, name))
            entry.text += line.text
            for name, value in line.facts.items():
                setattr(entry, name, value)
        case Ended(duration):
            file.duration, file.models, file.notes = duration, line.models, line.notes


# -- numbers --------------------------------------------------------------------------------------


def pack(values: Sequence[int]) -> Ints:
    """Numbers as the file has them: plain where they are few."""
    if isinstance(values, Packed):
        return values
    if len(values) <= _PLAIN:
        return list(values)
    steps = array("q", [values[0], *(b - a for a, b in itertools.pairwise(values))])
    if sys.byteorder == "big":
        steps.byteswap()
    return Packed(len(values), base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode())


def unpack(values: Ints) -> list[int]:
    """The numbers themselves.

    Raises:
        ExperimentError: They are damaged.
    """
    if isinstance(values, list):
        return values
    try:
        # No more than what was promised: a small text can unpack to gigabytes.
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(values.zlib, validate=True), 8 * values.n + 1)
        steps = array("q", raw)
    except (ValueError, OverflowError, MemoryError, zlib.error) as error:
        raise ExperimentError(f"a list of {values.n} numbers is damaged: {error}") from None
    if len(steps) != values.n:
        raise ExperimentError(f"a list of {values.n} numbers holds {len(steps)}")
    if sys.byteorder == "big":
        steps.byteswap()
    return list(itertools.accumulate(steps))


_NUMBERS = ("prompt_token_ids", "token_ids", "text_ends", "tokens", "chunks")


def _with_numbers(file: ExperimentFile, convert: Any) -> ExperimentFile:
    def entry(one: RequestEntry) -> RequestEntry:
        given = ((name, getattr(one, name)) for name in _NUMBERS)
        return msgspec.structs.replace(one, **{n: convert(v) for n, v in given if v is not None})

    return msgspec.structs.replace(file, requests=[entry(one) for one in file.requests])


# -- what is written of names --------------------------------------------------------------------


def public_name(name: str, *, local: bool = False) -> str:
    """A model's name or reference without the folders on the way to it, which tell of people.

    Args:
        name: As the model was loaded.
        local: Whether that was from a folder or file, so that every part but the last is one.
    """
    looks_local = name.startswith((".", "~", "/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name)
    if not (local or looks_local):
        return name
    return PurePath(name.replace("\\", "/")).name or "model"


# -- its bytes ------------------------------------------------------------------------------------


# What is nested deeply ends Python's stack, and text may be no UTF-8.
_DAMAGED = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def encode(file: ExperimentFile) -> bytes:
    """The bytes of the file: JSON, a line for each request."""
    packed = plain(_with_numbers(file, pack))
    requests = packed.pop("requests", [])
    head = msgspec.json.format(msgspec.json.encode(packed), indent=1).rstrip()
    head = head.removesuffix(b"}").rstrip()
    body = b",\n  ".join(msgspec.json.encode(one) for one in requests)
    return head + b',\n "requests": [\n  ' + body + b"\n ]\n}\n"


def plain(file: ExperimentFile) -> dict[str, Any]:
    """The file as plain data, beginning with what tells a reader whether it can read the rest."""
    return {"format": file.format, "version": file.version, **msgspec.to_builtins(file)}


def decode(data: bytes, where: str) -> ExperimentFile:
    """Read what `encode` wrote, now or in an earlier version.

    Args:
        data: The bytes.
        where: What messages call the file.

    Raises:
        ExperimentError: It is none, truncated, edited into nonsense, or of a later version.
    """
    try:
        head = msgspec.json.decode(data)
    except _DAMAGED as error:
        raise ExperimentError(
            f"{where} is no JSON, damaged or cut off ({error}). If it is a download, get it again."
        ) from None
    return _converted(head, where)


def decode_journal(data: bytes, where: str) -> ExperimentFile:
    """What a journal has, up to the first line that is damaged: later ones go on from that one.

    Arguments and errors are those of `decode`.
    """
    first, *rest = data.split(b"\n")
    file = _beginning(first, where)
    decoder = msgspec.json.Decoder(_LINES)
    read = 0
    for raw in rest:
        try:
            apply(file, decoder.decode(raw))
        except (*_DAMAGED, IndexError, AttributeError, TypeError):
            break
        read += 1
    # After the last line break stands nothing, or what a process that was killed had begun.
    lost = len(rest) - 1 - read
    if lost > 0:
        file.notes.append(
            f"Line {read + 2} of its journal is damaged: with it, {lost} lines were lost."
        )
    if file.duration is None:
        file.notes.append("It was not brought to its end: this is what its journal has.")
    return _converted(plain(file), where)


def _beginning(line: bytes, where: str) -> ExperimentFile:
    """The first line of a journal; errors as for `decode`."""
    try:
        began = msgspec.json.decode(line, type=Began)
    except _DAMAGED:
        raise ExperimentError(f"{where} has no beginning: nothing of it can be read.") from None
    # Journals of inferkit 0.1.0 do not say these.
    return _converted({"format": FORMAT, "version": 1} | began.file, where)


def _converted(head: Any, where: str) -> ExperimentFile:
    """Plain data as the file that it is; errors as for `decode`."""
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ExperimentError(
            f'{where} is no experiment of inferkit\'s: it lacks "format": "{FORMAT}". Files of '
            "vLLM's, AIPerf's and GuideLLM's benchmarks are read by ik.import_experiment."
        )
    version = head.get("version")
    if not isinstance(version, int) or version < 1:
        raise ExperimentError(f"{where} says version {version!r} of its format, which is none.")
    if version > VERSION:
        raise ExperimentError(
            f"{where} is of version {version} of the format, and this inferkit reads up to "
            f"{VERSION}: upgrade it with pip install -U jupyter-inferkit."
        )
    try:
        file = _with_numbers(msgspec.convert(head, ExperimentFile), unpack)
        _check(file)
        file.requests.sort(key=lambda one: one.arrival)
    except (msgspec.ValidationError, ExperimentError, RecursionError) as error:
        raise ExperimentError(f"{where} is damaged or was edited: {error}") from None
    return file


def _check(file: ExperimentFile) -> None:
    """What the types alone do not say."""
    try:
        year = datetime.fromisoformat(file.created).year
    except ValueError:
        raise ExperimentError(f"created is {file.created!r}, which is no ISO 8601 time") from None
    if not _YEARS[0] <= year <= _YEARS[1]:
        raise ExperimentError(f"created is {file.created!r}, when nothing was recorded")
    for number, mode in enumerate(file.modes):
        if mode.model >= len(file.models):
            raise ExperimentError(f"mode {number} is of model {mode.model}, which is not there")
        if mode.time > _LATEST:
            raise ExperimentError(f"mode {number} has a time that no clock gives")
    for number, one in enumerate(file.requests):
        fault = _fault(one, file)
        if fault:
            raise ExperimentError(f"request {number} {fault}")


def _fault(one: RequestEntry, file: ExperimentFile) -> str:
    """What is wrong with a request of a file; "" for nothing."""
    if one.model >= len(file.models):
        return f"is of model {one.model}, which is not there"
    if one.mode >= len(file.modes):
        return f"is of mode {one.mode}, which is not there"
    if file.modes[one.mode].model != one.model:
        return f"is of model {one.model}, and mode {one.mode} of model {file.modes[one.mode].model}"
    ids, ends, times = (unpack(x) for x in (one.token_ids, one.text_ends, one.tokens))
    if not {len(ids), len(ends)} <= {0, len(times)}:
        return f"has {len(ids)} tokens and {len(times)} times"
    if (given := len(unpack(one.prompt_token_ids))) not in (0, one.prompt_tokens):
        return f"has {given} tokens in its prompt and says {one.prompt_tokens}"
    if one.cached_tokens > one.prompt_tokens:
        return f"found {one.cached_tokens} tokens of its {one.prompt_tokens} in the cache"
    if ends and not (ends[0] >= 0 and ends == sorted(ends) and ends[-1] <= len(one.text)):
        return f"has tokens that end outside its text of {len(one.text)} characters"
    if one.accepted_tokens > one.draft_tokens:
        return f"guessed {one.draft_tokens} tokens, of which {one.accepted_tokens} were right"
    # They are in order (see `Trace`): the others lie between these.
    last = [*times[-1:], *unpack(one.chunks or [])[-1:], one.finished or 0]
    if any(abs(time) > _LATEST for time in (one.arrival, *last)):
        return "has times that no clock gives"
    return ""


# -- its schema ----------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON Schema of the file."""
    found = msgspec.json.schema(ExperimentFile)
    for definition in found["$defs"].values():
        _describe(definition)
    whole = found["$defs"][ExperimentFile.__name__]
    # Readers need them, although the structure has defaults: another version has another schema.
    for name, value in (("format", FORMAT), ("version", VERSION)):
        whole["properties"][name] = {"const": value}
        whole["required"].append(name)
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = f"inferkit experiment, version {VERSION}"
    return found


def _describe(definition: dict[str, Any]) -> None:
    """Say of each property what the structure's docstring says of it, in the words of JSON."""
    summary, _, attributes = definition["description"].partition("Attributes:")
    definition["description"] = _in_json(summary)
    for name, words in re.findall(r"^ +(\w+): ((?:.|\n {12})+)", attributes, re.MULTILINE):
        definition["properties"][name]["description"] = _in_json(words)


def _in_json(words: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(words.replace("`", "").split()))
