"""The wheel, built and installed in an environment of its own, as a user has it: without node.

The libraries that it needs are those of the environment that runs the tests, which are not
installed anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_JUPYTER = Path(sys.prefix) / "share" / "jupyter"


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel.

    Attributes:
        wheel: What was installed.
        python: The environment's Python.
        variables: The process environment to run it in: no node on PATH, folders of its own.
    """

    wheel: Path
    python: Path
    variables: dict[str, str]

    def run(self, *arguments: str) -> str:
        """What a command of the environment's Python writes, on both streams."""
        done = subprocess.run(
            [str(self.python), *arguments],
            env=self.variables,
            cwd=self.python.parent,  # which has no inferkit of its own
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}"
        return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the wheel, and before it the extension where a source is newer than its last build."""
    _checked(sys.executable, str(ROOT / "extensions" / "labextension.py"), "build")
    _checked(*_pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)))
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Installed:
    """Install a wheel in a fresh environment."""
    place = folder / "environment"
    venv.create(place, symlinks=os.name != "nt")
    bin_folder = place / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    _checked(*_pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel)))
    # After its own packages come those of the tests' environment, without what is editable there.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    theirs = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (own / "theirs.pth").write_text("\n".join(theirs))
    _bring_along(place)
    home = folder / "home"
    home.mkdir()
    variables = os.environ | {
        "PATH": str(_without_node(bin_folder, folder)),
        "JUPYTERLAB_DIR": str(_JUPYTER / "lab"),
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
    }
    return Installed(wheel, python, variables)


def _bring_along(place: Path) -> None:
    """What other packages have beside their code: renderers of widgets, parts of the server."""
    for name in ("@jupyter-widgets", "anywidget"):
        widgets = Path("share", "jupyter", "labextensions", name)
        shutil.copytree(Path(sys.prefix) / widgets, place / widgets)
    enabled = Path("etc", "jupyter", "jupyter_server_config.d")
    for path in (Path(sys.prefix) / enabled).glob("*.json"):
        if path.name != "inferkit.json":
            shutil.copy(path, place / enabled)


def _without_node(bin_folder: Path, folder: Path) -> str:
    """A PATH with git and what a shell needs, and no node."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("git", "sh", "uname"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    path = os.pathsep.join(map(str, (bin_folder, tools)))
    assert shutil.which("node", path=path) is None
    return path


def _pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]


def _checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
