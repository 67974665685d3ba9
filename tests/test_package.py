"""The package as a whole: what importing it gives and costs, and the rules the code is held to."""

from __future__ import annotations

import ast
import importlib.metadata
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import inferkit as ik

HEAVY = ("torch", "transformers", "pandas", "plotly", "ipywidgets", "bitsandbytes")
IMPORT_BUDGET = 0.3  # seconds


def python(code: str, cwd: Path) -> str:
    """Run ``code`` in a fresh interpreter and return what it printed."""
    return run([sys.executable, "-c", code], cwd)


def run(command: list[str], cwd: Path) -> str:
    """Run a command that must succeed and return its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_importing_is_quick(root: Path) -> None:
    timed = (
        "import time; start = time.perf_counter(); import inferkit; "
        "print(time.perf_counter() - start)"
    )
    seconds = [float(python(timed, root)) for _ in range(5)]
    assert statistics.median(seconds) <= IMPORT_BUDGET


def test_importing_leaves_the_heavy_libraries_alone(root: Path) -> None:
    loaded = f"import sys, inferkit; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(loaded, root).strip() == "[]"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
def test_help_and_version_import_no_torch(root: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom inferkit.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    python(code, root)


@pytest.mark.parametrize("name", ik.__all__)
def test_public_name_resolves_and_has_a_docstring(name: str) -> None:
    value = getattr(ik, name)
    assert not isinstance(value, ModuleType)
    assert value.__doc__
    # A dataclass without a docstring gets its signature as one.
    assert not value.__doc__.startswith(f"{name}(")


def test_dir_lists_every_public_name_before_it_is_used(root: Path) -> None:
    assert python("import inferkit as ik; print(set(ik.__all__) <= set(dir(ik)))", root) == "True\n"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        ik.no_such_name  # noqa: B018


def test_type_checkers_see_the_names_that_are_resolved_at_run_time(root: Path) -> None:
    tree = ast.parse((root / "inferkit" / "__init__.py").read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    declared = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert declared == ik._HOME


@pytest.mark.parametrize(
    "first",
    [
        "import inferkit.devices",
        "from inferkit.devices import Device; assert isinstance(Device, type)",
        "import inferkit.devices as module",
        "from inferkit import devices; assert len(devices()) >= 1",
    ],
)
def test_devices_is_the_function_whatever_was_imported_before(root: Path, first: str) -> None:
    code = f"{first}\nimport inferkit as ik\nprint(ik.devices()[-1].name)"
    assert python(code, root).strip() == "cpu"


def test_no_submodule_takes_the_place_of_a_public_name(root: Path) -> None:
    code = (
        "import importlib, pkgutil, types, inferkit as ik\n"
        "for found in pkgutil.walk_packages(ik.__path__, 'inferkit.'):\n"
        "    if found.name != 'inferkit.__main__':\n"
        "        importlib.import_module(found.name)\n"
        "print([n for n in ik.__all__ if isinstance(getattr(ik, n), types.ModuleType)])"
    )
    assert python(code, root).strip() == "[]"


def test_version_is_that_of_the_installed_distribution() -> None:
    assert importlib.metadata.version("jupyter-inferkit") == ik.__version__


def test_every_error_is_public_and_derives_from_the_root() -> None:
    from inferkit import errors

    for name in errors.__all__:
        assert getattr(ik, name) is getattr(errors, name)
        assert issubclass(getattr(errors, name), ik.InferkitError)


def test_a_development_build_of_the_extension_is_built_anew_for_a_wheel(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(root / "extensions")
    import labextension

    monkeypatch.setattr(labextension, "FOLDER", tmp_path)
    monkeypatch.setattr(labextension, "BUILT", tmp_path / "labextension")
    for name in labextension._SOURCES:
        (tmp_path / name).touch()
    assert labextension.stale()
    built = tmp_path / "labextension" / "static"
    built.mkdir(parents=True)
    (built / "style.js").touch()
    assert not labextension.stale()
    (built / "lib_index_js.1.js.map").touch()  # what `watch` writes beside
    assert labextension.stale()


def test_imports_point_one_way(root: Path) -> None:
    assert "0 broken" in run([str(Path(sys.executable).with_name("lint-imports"))], root)


def test_code_is_formatted_and_lint_free(root: Path) -> None:
    run([sys.executable, "-m", "ruff", "format", "--check", "."], root)
    run([sys.executable, "-m", "ruff", "check", "."], root)


def test_types_are_consistent(root: Path) -> None:
    run([sys.executable, "-m", "mypy"], root)
