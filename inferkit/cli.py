"""The ``inferkit`` command: ``run``, ``plan``, ``devices``, ``ps``, ``replay`` and ``export``.

Options are the library's keywords with dashes (``--max-tokens 64``). Text and tables go to stdout,
latency and progress to stderr, so that the output can be piped. Exit status: 0; 1 from ``plan``
for a model that does not fit, and from ``replay --check`` for outputs that differ; 2 for an error;
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inferkit as ik
from inferkit.arguments import (
    LOAD_OPTIONS,
    MODEL_OPTIONS,
    REPLAY_OPTIONS,
    RUN_OPTIONS,
    SAMPLING_OPTIONS,
    Options,
    flag,
    given,
    replay_options,
)
from inferkit.experiments.store import check_free
from inferkit.html import text_table

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.generation import Generation
    from inferkit.model import Model

_FAILED, _INTERRUPTED = 2, 130
_WATCHED = 0.1  # seconds that `ps` watches the processor for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit status."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows "?" instead of ending the program.
        sys.stdout.reconfigure(errors="replace")
    try:
        status: int = arguments.command(arguments)
        sys.stdout.flush()
    except ik.InferkitError as error:
        return _complain(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left; what Python flushes at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    return status


def _run(arguments: argparse.Namespace) -> int:
    prompts = [sys.stdin.read().rstrip("\n") if p == "-" else p for p in arguments.prompt]
    options = given(arguments, SAMPLING_OPTIONS)
    model = ik.load(arguments.model, **given(arguments, LOAD_OPTIONS))
    try:
        requests = _submit(model, prompts, arguments.chat, options)
        out = io.StringIO() if arguments.json else sys.stdout
        generations, interrupted = _show(prompts, requests, out)
        if arguments.json:
            print(_as_json(model, generations))
        else:
            print(_latency_table(generations), file=sys.stderr)
    finally:
        model.unload()
    errors = [gen.error for gen in generations if gen.error]
    for error in errors:
        _complain(error)
    return _INTERRUPTED if interrupted else _FAILED if errors else 0


def _submit(
    model: Model, prompts: Sequence[str], chat: bool, options: dict[str, Any]
) -> list[Request]:
    if chat:
        each = ([{"role": "user", "content": prompt}] for prompt in prompts)
        return [model.submit_chat(messages, **options) for messages in each]
    return model.submit(prompts, **options)


def _show(
    prompts: Sequence[str], requests: Sequence[Request], out: io.TextIOBase | Any
) -> tuple[list[Generation], bool]:
    """Write each request's text as it comes, in order; Ctrl-C cancels all and keeps the text."""
    generations: list[Generation] = []
    interrupted = False
    for number, (prompt, request) in enumerate(zip(prompts, requests), start=1):
        if len(prompts) > 1:
            out.write(f"{_header(number, prompt)}\n")
        written = 0
        try:
            for piece in request:
                written += out.write(piece)
                out.flush()
        except ik.InferkitError:
            pass  # kept in the generation's error, which the caller reports after all the text
        except KeyboardInterrupt:
            interrupted = True
            for other in requests:
                other.cancel()
        generation = request.result()
        out.write(generation.text[written:] + "\n")
        generations.append(generation)
    return generations, interrupted


def _header(number: int, prompt: str, width: int = 72) -> str:
    line = " ".join(prompt.split())
    return f"=== {number}: {line if len(line) <= width else line[: width - 1] + '…'}"


def _latency_table(generations: Sequence[Generation]) -> str:
    def row(number: int, gen: Generation) -> tuple[object, ...]:
        latency = gen.latency
        times = (latency.queue, latency.ttft, latency.tpot, latency.e2e)
        shown = ("–" if t is None else f"{1000 * t:.1f}" for t in times)
        return (number, gen.finish_reason, len(gen.token_ids), *shown)

    header = ("prompt", "finish", "tokens", "queue ms", "TTFT ms", "TPOT ms", "E2E ms")
    rows = (row(number, gen) for number, gen in enumerate(generations, start=1))
    return text_table(header, rows) + "\nTTFT, TPOT and E2E as vllm bench serve defines them"


def _as_json(model: Model, generations: Sequence[Generation]) -> str:
    document = {
        "model": model.name,
        "generations": [gen.to_dict() for gen in generations],
        "summary": ik.summarize(generations).to_dict(),
    }
    return json.dumps(document, indent=2)  # in ASCII, which every pipe carries


def _plan(arguments: argparse.Namespace) -> int:
    plan = ik.plan(arguments.model, **given(arguments, MODEL_OPTIONS))
    print(json.dumps(plan.to_dict(), indent=2) if arguments.json else plan)
    return 0 if plan.fits else 1


def _devices(arguments: argparse.Namespace) -> int:
    table = ik.devices()
    print(json.dumps([asdict(device) for device in table], indent=2) if arguments.json else table)
    return 0


def _ps(arguments: argparse.Namespace) -> int:
    from inferkit.lab import survey

    found = survey.survey(pause=_WATCHED)
    print(survey.as_json(found) if arguments.json else survey.as_text(found))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.save is not None:
        check_free(Path(arguments.save), arguments.overwrite)  # before minutes of work
    found = ik.replay(arguments.experiment, **replay_options(arguments))
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    if arguments.save is not None:
        found.measured.save(arguments.save, overwrite=arguments.overwrite)
    if found.interrupted:
        return _INTERRUPTED
    if arguments.check and not found.verified:
        print(
            "inferkit: no token was verified, and --check has only times to go by", file=sys.stderr
        )
    good = found.exact if arguments.exact else found.ok
    return 0 if good or not (arguments.check or arguments.exact) else 1


def _export(arguments: argparse.Namespace) -> int:
    experiment = ik.open(arguments.experiment)
    other = ik.open(arguments.beside) if arguments.beside is not None else None
    path = experiment.export(
        arguments.out, arguments.to, overwrite=arguments.overwrite, other=other
    )
    print(path)
    return 0


def _complain(error: ik.InferkitError) -> int:
    print(f"inferkit: {' '.join(str(error).split())}", file=sys.stderr)
    return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inferkit", description="Load, prompt and time language models."
    )
    parser.add_argument("--version", action="version", version=f"inferkit {ik.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_plan(commands)
    _add_devices(commands)
    _add_ps(commands)
    _add_replay(commands)
    _add_export(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="prompt a model; text to stdout, latency to stderr",
        description="Prompt a model. One prompt streams; several are batched and shown in order.",
        argument_default=argparse.SUPPRESS,
    )
    run.set_defaults(command=_run)
    run.add_argument("prompt", nargs="+", metavar="PROMPT", help="a prompt; - reads it from stdin")
    run.add_argument(
        "--model", default="demo", help="demo, a hub id, a folder or a .gguf file (default: demo)"
    )
    run.add_argument(
        "--chat", action="store_true", default=False, help="use the model's chat template"
    )
    _add_json(run)
    _add_options(run.add_argument_group("model"), MODEL_OPTIONS)
    _add_options(run, RUN_OPTIONS)
    _add_options(run.add_argument_group("sampling (default: greedy)"), SAMPLING_OPTIONS)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory that a model needs, from its config alone",
        description="The memory that a model needs, from its config alone. Exit status 1: no fit.",
        argument_default=argparse.SUPPRESS,
    )
    plan.set_defaults(command=_plan)
    plan.add_argument("model", metavar="MODEL", help="demo, a hub id, a folder or a .gguf file")
    _add_json(plan)
    _add_options(plan.add_argument_group("model"), MODEL_OPTIONS)


def _add_devices(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    devices = commands.add_parser("devices", help="attached devices and their memory")
    devices.set_defaults(command=_devices)
    _add_json(devices)


def _add_ps(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "ps",
        help="models in all running kernels, and the devices that they are on",
        description="What JupyterLab's sidebar shows: models in all kernels of this user.",
    )
    command.set_defaults(command=_ps)
    _add_json(command)


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "replay",
        help="run a recorded experiment again; compare tokens and latency",
        description="Run a recorded experiment again on this machine, and compare.",
        argument_default=argparse.SUPPRESS,
    )
    command.set_defaults(command=_replay)
    command.add_argument("experiment", metavar="FILE", help="what ik.record made")
    command.add_argument(
        "--check",
        action="store_true",
        default=False,
        help="exit status 1 where outputs differ and rounding does not explain it; where outputs "
        "were left out of the file, no token is verified: stderr says so, and the status is 0",
    )
    command.add_argument(
        "--exact",
        action="store_true",
        default=False,
        help="exit status 1 where any token differs",
    )
    command.add_argument("--save", metavar="FILE", default=None, help="keep what was measured")
    command.add_argument(
        "--overwrite",
        action="store_true",
        default=False,
        help="save: replace a file that is there",
    )
    _add_json(command)
    _add_options(command, REPLAY_OPTIONS)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="an experiment as a page, a table, or a file of another tool's",
        description="Write an experiment in another form.",
    )
    command.set_defaults(command=_export)
    command.add_argument("experiment", metavar="FILE", help="what ik.record made")
    command.add_argument("out", metavar="OUT", help=".html, .csv, .parquet, .jsonl, or see --to")
    command.add_argument("--to", choices=["html", "csv", "parquet", "vllm", "aiperf", "playback"])
    command.add_argument("--beside", metavar="FILE", help="html: compare with this experiment")
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", default=False, help="one JSON document instead of text"
    )


def _add_options(target: argparse._ActionsContainer, options: Options) -> None:
    for name, keywords in options.items():
        target.add_argument(flag(name), **keywords)
