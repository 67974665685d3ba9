"""A notebook that plays an experiment: what can be seen of it where it cannot be run again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from inferkit.errors import OptionError
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.store import check_free, local_path, write_bytes, writing
from inferkit.html import format_bytes

__all__ = ["beside", "player_of", "reasons_against", "to_notebook"]

_SUFFIX = ".playback.ipynb"
_ROOM = 1_200_000_000  # bytes of weights that 2 GB hold beside torch and a kernel


def reasons_against(experiment: Experiment) -> Iterator[str]:
    """Why an experiment cannot be run again on Binder, if that is so."""
    accelerators = {d for entry in experiment.models for d in entry.devices} - {"cpu", "disk"}
    if accelerators:
        where = ", ".join(sorted(accelerators))
        yield f"{experiment.name!r} ran on {where}, and Binder has no GPU"
    for entry in experiment.models:
        if (entry.parameters_bytes or 0) > _ROOM:
            yield (
                f"The weights of {entry.name} take {format_bytes(entry.parameters_bytes or 0)}, "
                "more than Binder's 2 GB of memory have room for"
            )


def player_of(path: PurePath) -> PurePath:
    """Where the notebook that plays an experiment's file is, if there is one."""
    name = path.name.removesuffix(".json").removesuffix(".inferkit")
    return path.with_name(name + _SUFFIX)


def beside(experiment: Experiment) -> Path | None:
    """Write that notebook where Binder could not run the experiment again and it is not there.

    Returns:
        Where it is; None where there is no need of one, or the experiment is in no file.

    Raises:
        ExperimentError: It cannot be written.
    """
    if experiment.path is None or not any(reasons_against(experiment)):
        return None
    path = Path(player_of(experiment.path))
    return path if path.exists() else to_notebook(experiment, path)


def to_notebook(
    experiment: Experiment, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write a notebook that shows an experiment's tables and plays its file.

    Raises:
        OptionError: There is a file already, or no folder for it; the experiment is in no file.
        ExperimentError: It cannot be written.
    """
    target = local_path(path)
    check_free(target, overwrite)
    if experiment.path is None:
        raise OptionError(f"{experiment.name!r} is in no file to play: exp.save(path) first.")
    folder, name = os.path.split(os.path.abspath(experiment.path))
    way = PurePath(os.path.relpath(folder, os.path.abspath(target.parent))) / name
    with writing(target, ": choose another path."):
        write_bytes(json.dumps(_notebook(experiment, way.as_posix()), indent=1).encode(), target)
    return target


def _notebook(experiment: Experiment, way: str) -> dict[str, object]:
    origin = experiment.as_recorded().origin
    said = f"# {experiment.name}\n\nAs it was {origin}. Nothing is run again."
    code = f"import inferkit as ik\n\nexp = ik.open({way!r})\nexp"
    cells = [_cell("markdown", said), _cell("code", code), _cell("code", "ik.play(exp)")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, source: str) -> dict[str, object]:
    cell: dict[str, object] = {"cell_type": kind, "metadata": {}, "source": source}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
