"""The folder binder/: what Binder installs, builds and starts, and whether all of it fits there.

`make binder-check` makes the environment as Binder does and executes every notebook in it with the
memory that mybinder.org gives. Among the usual tests, test_notebooks.py holds the quickstart to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from limited import Limited, run_limited
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "binder"
SCRIPTS = ("postBuild", "start")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEMORY = 2 << 30  # bytes that mybinder.org gives a session
START_SECONDS = 60
PATIENCE = ("--timeout", "3600")  # seconds for a cell: two slow processors may be all there are
# How this machine reaches package indexes: PyPI for pip, and npm for the extension's build.
_OF_THIS_NETWORK = ("PIP_", "SSL_", "NODE_EXTRA_CA_CERTS", "npm_config_", "YARN_")
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"])
]


def lines(path: Path) -> list[str]:
    """What a file of requirements asks for, without its comments."""
    read = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in read if line and not line.startswith("#")]


def pins(path: Path) -> dict[str, str]:
    """Versions by name; every requirement has to be one exact version."""
    named = [line.partition("==") for line in lines(path) if not line.startswith("--")]
    assert all(version for _, _, version in named)
    return {canonicalize_name(name): version for name, _, version in named}


REQUIREMENTS, CONSTRAINTS = pins(FOLDER / "requirements.txt"), pins(ROOT / "constraints.txt")
PYTHON = (FOLDER / "runtime.txt").read_text(encoding="ascii").strip().removeprefix("python-")


# -- the files ------------------------------------------------------------------------------------


def holds(marker: Marker | None, extras: set[str]) -> bool:
    """Whether a requirement is one on Binder, whatever this machine is."""
    there = {
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "python_full_version": f"{PYTHON}.0",
        "python_version": PYTHON,
        "sys_platform": "linux",
    }
    return marker is None or any(marker.evaluate(there | {"extra": e}) for e in ("", *extras))


def needed() -> set[str]:
    """All that the library and its extra "demo" need, as what is installed here tells it."""
    found: set[tuple[str, frozenset[str]]] = set()
    todo = list(DIRECT)
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in found:
            continue
        found.add(key)
        try:
            asked = map(Requirement, metadata.requires(one.name) or ())
        except metadata.PackageNotFoundError:
            continue  # what this Python or system does without, needs nothing itself
        todo += [each for each in asked if holds(each.marker, one.extras)]
    return {name for name, _ in found}


def test_pins_are_those_that_the_tests_ran_with() -> None:
    differ = {
        name: f"{version}, and in constraints.txt {CONSTRAINTS.get(name)}"
        for name, version in REQUIREMENTS.items()
        if version.removesuffix("+cpu" if name == "torch" else "") != CONSTRAINTS.get(name)
    }
    assert differ == {}


def test_pins_are_all_that_the_library_and_the_demo_need_and_no_more() -> None:
    # Without constraints are setuptools, which every environment of conda has, and what PyPI's
    # torch needs for CUDA.
    expected = needed() & CONSTRAINTS.keys()
    assert {"missing": expected - REQUIREMENTS.keys(), "more": REQUIREMENTS.keys() - expected} == {
        "missing": set(),
        "more": set(),
    }


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_pins_are_versions_that_the_library_accepts(requirement: Requirement) -> None:
    assert requirement.specifier.contains(REQUIREMENTS[canonicalize_name(requirement.name)])


def test_torch_is_the_build_for_the_cpu() -> None:
    assert REQUIREMENTS["torch"].endswith("+cpu")
    options = [line for line in lines(FOLDER / "requirements.txt") if line.startswith("--")]
    assert options == ["--extra-index-url https://download.pytorch.org/whl/cpu"]


def test_python_is_one_that_the_library_accepts() -> None:
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(f"{PYTHON}.0")


def test_nothing_is_needed_of_debian_and_the_file_says_so() -> None:
    text = (FOLDER / "apt.txt").read_text(encoding="ascii")
    assert "Nothing is needed" in text
    assert lines(FOLDER / "apt.txt") == []  # repo2docker leaves out what follows a "#"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_correct_bash(name: str) -> None:
    assert os.access(FOLDER / name, os.X_OK)
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


@pytest.mark.parametrize(
    ("limit", "threads"), [("2.0", "2"), ("1", "1"), ("0.5", "1"), ("", "-"), ("None", "-")]
)
def test_start_hands_its_command_on_in_binders_environment(limit: str, threads: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    show = 'echo "$INFERKIT_COMPILE $INFERKIT_DTYPE ${OMP_NUM_THREADS:--}"; echo "$1|$2"; exit 3'
    done = subprocess.run(
        [str(FOLDER / "start"), "bash", "-c", show, "_", "a b", ""],
        env=env | {"CPU_LIMIT": limit},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, f"0 bfloat16 {threads}\na b|\n")


def test_repo2docker_accepts_the_folder() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert f"python={PYTHON}" in told
    steps = (
        'pip install --no-cache-dir -r "binder/requirements.txt"',
        "COPY --chown=1000:1000 src/ ${REPO_DIR}/",
        "RUN ./binder/postBuild",
        'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"',
    )
    places = [re.sub(r"--chown=\d+:\d+", "--chown=1000:1000", told).find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)


# -- the whole ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """What Binder would have made: the repository's folder and its processes' environment."""

    repository: Path
    env: dict[str, str]

    def start(self, *command: str) -> list[str]:
        """A command as Binder runs it."""
        return [str(self.repository / "binder" / "start"), *command]

    def limited(self, *command: str) -> Limited:
        return run_limited(command, MEMORY, self.repository, self.env)


def report(what: str, begun: float, done: Limited | None = None) -> None:
    """Print how long something took, and how much memory."""
    memory = "" if done is None else f", at most {done.peak / 2**20:.0f} MiB"
    print(f"\n  {what}: {time.monotonic() - begun:.1f} s{memory}", flush=True)


def finds(pip: list[str], requirement: str, env: dict[str, str]) -> bool:
    """Whether pip, as it is set up here, finds a package without a further index."""
    look = [*pip, "install", "--quiet", "--dry-run", "--no-deps", requirement]
    return subprocess.run(look, env=env, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The environment of requirements.txt alone, with postBuild run in a copy of the files."""
    home = tmp_path_factory.mktemp("binder")
    repository, venv = home / "repository", home / "venv"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, repository / name)

    begun = time.monotonic()
    python = shutil.which(f"python{PYTHON}") or sys.executable
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    env = {
        # How packages are reached from here, and nothing else of this machine.
        **{n: v for n, v in os.environ.items() if n.startswith(_OF_THIS_NETWORK) or n in PROXIES},
        "PATH": f"{venv / 'bin'}:{os.defpath}",
        "HOME": str(home),
        "CPU_LIMIT": "2.0",
    }
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    wanted = (repository / "binder" / "requirements.txt").read_text(encoding="utf-8")
    if finds(pip, f"torch=={REQUIREMENTS['torch']}", env):  # a mirror may be all that is reached
        wanted = re.sub(r"^--extra-index-url.*\n", "", wanted, flags=re.MULTILINE)
    (home / "requirements.txt").write_text(wanted, encoding="utf-8")
    install = [*pip, "install", "--quiet", "--no-cache-dir", "-r", str(home / "requirements.txt")]
    subprocess.run(install, check=True, env=env)
    report("pip install", begun)

    made = Image(repository, env)
    begun = time.monotonic()
    done = made.limited(str(repository / "binder" / "postBuild"))
    assert done.status == 0, done.stderr
    report("postBuild", begun, done)
    for folder in (venv, home / ".cache"):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"  {folder.name}: {size / 2**20:.0f} MiB")
    return made


def answers(address: str) -> Iterator[bool]:
    """Whether a server answers at an address, until it does."""
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                yield True
            return
        except (urllib.error.URLError, OSError):
            yield False


@pytest.mark.binder
@pytest.mark.timeout(4000)
class TestEmulation:
    def test_the_environment_is_whole(self, image: Image) -> None:
        subprocess.run(["python", "-m", "pip", "check"], env=image.env, check=True)

    def test_the_demo_model_is_there_when_a_session_starts(self, image: Image) -> None:
        seen = "from inferkit import conversions as c; assert c.finished_demo(); print(c.__file__)"
        done = image.limited("sh", "-c", f"cd / && exec python -c '{seen}'")
        assert done.status == 0, done.stderr
        assert "site-packages" in done.stdout  # what postBuild installed, not the folder's

    def test_jupyterlab_answers_soon(self, image: Image) -> None:
        begun = time.monotonic()
        port = 18889
        options = ("--no-browser", "--allow-root", f"--port={port}", "--ServerApp.token=")
        server = subprocess.Popen(
            image.start("jupyter", "lab", *options),
            cwd=image.repository,
            env=image.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for there in answers(f"http://127.0.0.1:{port}/lab"):
                assert server.poll() is None
                assert time.monotonic() - begun < START_SECONDS
                if not there:
                    time.sleep(0.2)
            report("start of JupyterLab", begun)
        finally:
            server.terminate()
            server.wait(30)

    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
    def test_every_notebook_runs_in_the_memory_of_a_session(
        self, notebook: Path, image: Image
    ) -> None:
        begun = time.monotonic()
        done = image.limited(
            *image.start("python", "notebooks/execute.py", f"notebooks/{notebook.name}", *PATIENCE)
        )
        report(notebook.stem, begun, done)
        assert done.status == 0, done.stderr
        assert not done.killed
        assert done.peak <= MEMORY
