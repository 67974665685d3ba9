"""``%infer`` and ``%%infer``: the library in the words of a notebook, one table of subcommands.

Options are the library's keywords with dashes (see `inferkit.arguments`). Every error of inferkit
and every bad option is one line without a traceback. Models run in their engine's thread; the cell
waits for them in short steps, so that the kernel's stop button ends it at once.
"""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

import inferkit as ik
from inferkit.arguments import (
    LOAD_OPTIONS,
    MODEL_OPTIONS,
    SAMPLING_OPTIONS,
    given,
    replay_options,
)
from inferkit.experiments import player
from inferkit.html import format_bytes, listed
from inferkit.notebook import completion
from inferkit.notebook.commands import (
    CELL,
    COMMANDS,
    HELP_FLAGS,
    PROMPT,
    help_of,
    no_command,
    split,
)
from inferkit.notebook.sending import submit
from inferkit.notebook.variables import interpolate
from inferkit.notebook.words import leading

if TYPE_CHECKING:
    from inferkit.engine import Request
    from inferkit.experiments.recording import Recording
    from inferkit.model import Model

_RESULT = "_infer"
_SEPARATOR = re.compile(r"^---[ \t]*$", re.MULTILINE)


@magics_class
class InferMagics(Magics):
    """``%infer`` and ``%%infer`` of one shell."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)  # type: ignore[no-untyped-call]
        self._used: str | None = None  # the model that the magics had to do with last
        self._recording: Recording | None = None

    @line_cell_magic
    @no_var_expand
    def infer(self, line: str, cell: str | None = None) -> None:
        """Load, prompt and time language models: %infer help."""
        with _one_line_errors():
            if cell is None:
                self._line(line)
            else:
                self._cell(line, cell)

    def _line(self, line: str) -> None:
        # A prompt may begin with a dash, or be "--": quoted ones are taken out before the options.
        prompts, after = leading(line)
        words = self._words(after if prompts else line)
        asked = HELP_FLAGS.intersection(words if prompts else words[:1])
        if asked or not (prompts or words):
            print(help_of(""))
        elif prompts:
            arguments = PROMPT.parse("", ["", *words])
            arguments.prompt[:1] = prompts
            self._prompt(arguments)
        elif line.lstrip().startswith(('"', "'", "-")):
            arguments = PROMPT.parse("", words)
            arguments.no_variables = True  # they are in already
            self._prompt(arguments)
        elif words[0] not in COMMANDS:
            raise UsageError(no_command(words[0], line))
        elif HELP_FLAGS.intersection(words):
            print(help_of(words[0]))
        else:
            name, *rest = words
            getattr(self, f"_{name}")(COMMANDS[name].parse(name, rest))

    def _cell(self, line: str, cell: str) -> None:
        words = self._words(line)
        if words and not words[0].startswith("-"):
            raise UsageError(
                f"%%infer takes options only, and its cell is the prompt; {words[0]!r} is neither. "
                "A subcommand has one percent sign: %infer help"
            )
        if HELP_FLAGS.intersection(words):
            print(help_of(""))
            return
        parts = (part.strip("\n") for part in _SEPARATOR.split(cell))
        prompts = [part for part in parts if part.strip()]
        if not prompts:
            raise UsageError("The cell has no prompt: write it under the %%infer line.")
        arguments = CELL.parse("", words)
        arguments.prompt = prompts
        self._prompt(arguments)

    # -- subcommands ----------------------------------------------------------------------------

    def _load(self, arguments: argparse.Namespace) -> None:
        target = _target(arguments)
        model = ik.load(arguments.ref, **given(arguments, (*LOAD_OPTIONS, "name")))
        if target:
            self._variables[target] = model
        self._tell(model)

    def _unload(self, arguments: argparse.Namespace) -> None:
        names = completion.loaded_names()
        if "model" not in arguments and len(names) > 1:
            raise UsageError(f"Several models are loaded: %infer unload {names[0]}, for one.")
        model = self._model(arguments)
        model.unload()
        print(f"Unloaded {model.name!r}.")

    def _models(self, arguments: argparse.Namespace) -> None:
        self._show(ik.models())

    def _devices(self, arguments: argparse.Namespace) -> None:
        self._show(ik.devices())

    def _plan(self, arguments: argparse.Namespace) -> None:
        self._show(ik.plan(arguments.ref, **given(arguments, MODEL_OPTIONS)))

    def _quantize(self, arguments: argparse.Namespace) -> None:
        model = self._model(arguments)
        options = given(arguments, ("double_quant", "compute_dtype"))
        self._tell(model.quantize(arguments.quantize, **options))

    def _batching(self, arguments: argparse.Namespace) -> None:
        options = given(arguments, ("batching", "max_batch", "context", "speculative"))
        self._tell(self._model(arguments).configure(**options))

    def _record(self, arguments: argparse.Namespace) -> None:
        target = _target(arguments)
        under_way = self._recording
        if under_way is not None and not under_way.running:
            under_way = None
        if "stop" in arguments:
            if under_way is None:
                raise UsageError('Nothing is recorded: %infer record "a name" begins.')
            self._keep(under_way.stop(), target)
            return
        if under_way is not None:
            raise UsageError(
                f"{under_way.experiment.name!r} is recorded already: %infer record --stop ends it."
            )
        if "name" not in arguments or arguments.name is None:
            raise UsageError('Give it a name: %infer record "nf4 against bf16"')
        options = given(arguments, ("path", "redact", "overwrite"))
        if options.get("path") == "":
            raise UsageError("--path is empty: name a file, or leave it out.")
        recording = ik.record(arguments.name, **options)
        experiment = recording.start()
        self._recording = recording
        if target:
            self._variables[target] = experiment
        print(f"Recording to {experiment.path}; %infer record --stop ends it.")

    def _replay(self, arguments: argparse.Namespace) -> None:
        target = _target(arguments)
        self._keep(ik.replay(arguments.experiment, **replay_options(arguments)), target)

    def _share(self, arguments: argparse.Namespace) -> None:
        options = given(arguments, ("repo", "ref", "notebook"))
        shown = None if self._recording is None else self._recording.experiment
        if "experiment" in arguments:
            shown = ik.open(arguments.experiment)
        plays = None if shown is None or "notebook" in options else player.beside(shown)
        if plays is not None:
            print(f"{plays} plays it where it cannot be run again.")
        self._show(ik.binder_link(**options, experiment=shown))

    def _keep(self, result: object, target: str | None) -> None:
        self._variables.update({name: result for name in (_RESULT, target) if name})
        self._show(result)

    def _panel(self, arguments: argparse.Namespace) -> None:
        self._show(ik.Panel(self._model(arguments)) if "model" in arguments else ik.Panel())

    def _help(self, arguments: argparse.Namespace) -> None:
        print(help_of(getattr(arguments, "command", "")))

    def _prompt(self, arguments: argparse.Namespace) -> None:
        from inferkit.notebook import display

        target = _target(arguments)
        model = self._model(arguments)
        chat, raw = "chat" in arguments, "raw" in arguments
        options = given(arguments, SAMPLING_OPTIONS)
        replaced: dict[str, None] = {}
        prompts = arguments.prompt
        if "no_variables" not in arguments:
            prompts = [interpolate(prompt, self._variables, replaced) for prompt in prompts]
        requests = submit(model, prompts, chat, options)
        run = display.Run(prompts, requests, chat=chat, raw=raw, variables=tuple(replaced))
        with _cancelled_on_error(requests):
            view = display.view(self.shell, run)
        done, interrupted = display.follow(run, view)
        result = done[0] if len(done) == 1 else done
        self._variables.update({name: result for name in (_RESULT, target) if name})
        view.finish(done, interrupted)
        for number, gen in enumerate(done, start=1):
            if gen.error is not None:
                which = f"Prompt {number} of {len(done)} failed: " if len(done) > 1 else ""
                raise UsageError(_one_line(f"{which}{gen.error}"))

    # -- within ---------------------------------------------------------------------------------

    @property
    def _variables(self) -> dict[str, Any]:
        assert self.shell is not None, "magics belong to a shell"
        return self.shell.user_ns

    def _words(self, line: str) -> list[str]:
        words = split(line)
        if "--no-variables" in words:
            return words
        return [interpolate(word, self._variables) for word in words]

    def _model(self, arguments: argparse.Namespace) -> Model:
        """The model that is named; else the only one, or the one used last by the magics."""
        name = getattr(arguments, "model", None)
        loaded = {model.name: model for model in completion.loaded_models()}
        if not loaded:
            raise UsageError("No model is loaded: %infer load demo loads the small demo model.")
        if name is None:
            name = next(iter(loaded)) if len(loaded) == 1 else self._used
        if name in loaded:
            self._used = name
            return loaded[name]
        if getattr(arguments, "model", None) is None:
            raise UsageError(
                f"Several models are loaded, {listed(loaded)}: say which, as --model "
                f"{shlex.quote(next(iter(loaded)))}"
            )
        raise UsageError(f"No model {name!r} is loaded; these are: {listed(loaded)}.")

    def _tell(self, model: Model) -> None:
        """A line of what a model runs as, which is the one in use from now on."""
        self._used = model.name
        print(
            f"{model.name}: {model.plan.format} in {model.dtype} on {', '.join(model.devices)}, "
            f"{model.batching} batching of at most {model.max_batch}, context {model.context}, "
            f"{'' if model.speculative == 'off' else f'speculation {model.speculative}, '}"
            f"weights {format_bytes(model.plan.weights)}"
        )

    def _show(self, value: object) -> None:
        from IPython.display import display

        display(value)  # type: ignore[no-untyped-call]


@contextmanager
def _cancelled_on_error(requests: Sequence[Request]) -> Iterator[None]:
    """Requests that nobody will wait for must not run on."""
    try:
        yield
    except BaseException:
        for request in requests:
            request.cancel()
        raise


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors of inferkit and interrupts, as IPython shows bad usage: a line, and no traceback."""
    try:
        yield
    except ik.InferkitError as error:
        raise UsageError(_one_line(str(error))) from None
    except KeyboardInterrupt:
        raise UsageError("Interrupted.") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _target(arguments: argparse.Namespace) -> str | None:
    """The variable that was asked for with --to."""
    name: str | None = getattr(arguments, "to", None)
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise UsageError(f"--to {name!r} is no name of a variable; write one, as --to result")
    return name


def register(shell: Any) -> None:
    """Give an IPython shell the magics and their completion."""
    shell.register_magics(InferMagics)
    completion.install(shell)


def unregister(shell: Any) -> None:
    """Take both out again."""
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("infer", None)
    completion.remove(shell)
