"""Where an experiment ran: versions, processor, devices, git commit, notebook.

Nothing that tells who ran it: no names of users, hosts or folders, no environment variables.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePath, PureWindowsPath

import psutil

from inferkit.devices import Device, devices
from inferkit.experiments.file import DeviceEntry, Environment

__all__ = ["describe", "environment", "notebook_name", "scrubbed"]

_PACKAGES = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "tokenizers", "safetensors"),
    *("numpy", "ipykernel", "jupyterlab"),
)
_GIT_SECONDS = 5
_PART = r"[^\\/\s:*?\"'<>|]+"  # of a path
_SPACED = r"[^\\/:*?\"'<>|\n]+(?=[\\/])"  # on Windows, where folders are called by people's names
_PRIVATE = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in (
        # Who asks, and the password, in an address.
        (r"\b([a-z][a-z0-9+.-]*://)(?:[^\s/@]*:[^\s@]*|[^\s/@]*)@", r"\1"),
        (r"\bfile:/+(?:localhost/+)?(?=[a-z]:)", ""),
        (r"\bfile:/+(?:localhost/+)?", "/"),
        # A home, also where nothing follows it.
        (rf"\b[a-z]:[\\/]+(?:{_PART}[\\/]+)*?users[\\/]+(?:{_SPACED}|{_PART})", "~"),
        (rf"(?<![\w.~/])(?:/{_PART})*?/(?:home|users)/+{_PART}", "~"),
        (rf"/(?:home|users)/+{_PART}", "/~"),  # within an address
        # Folders, up to the name that they lead to.
        (rf"\\\\+{_PART}\\+{_PART}(?:\\+(?:{_PART}\\+)*)?", ""),
        (rf"(?:\b[a-z]:[\\/]+|(?<![\w.~/])~\\+)(?:{_SPACED}[\\/]+)*", ""),
        (r"(?<![\w.~/])(?:~|/[\w.+@-]+)(?:/[\w.+@-]+)*/", ""),
    )
)


def environment() -> Environment:
    """The present one."""
    attached = devices()
    cpu = next(d for d in attached if d.kind == "cpu")
    commit = _git("rev-parse", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    return Environment(
        packages=_versions(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu.description,
        cores=psutil.cpu_count(logical=False),
        processors=_processors(),
        threads=_threads(),
        memory=cpu.total,
        devices=[_entry(device) for device in attached],
        commit=commit,
        uncommitted=None if changes is None else bool(changes),
        notebook=notebook_name(),
    )


def describe(env: Environment) -> str:
    """The machine and the library in a few words."""
    accelerators = [d.description for d in env.devices if d.kind != "cpu"]
    names = [f"{accelerators.count(a)} × {a}" for a in dict.fromkeys(accelerators)]
    parts = [*names, env.cpu if env.processors is None else f"{env.cpu}, {env.processors} CPUs"]
    parts += [
        f"{name} {env.packages[package]}"
        for name, package in (("torch", "torch"), ("inferkit", "jupyter-inferkit"))
        if package in env.packages
    ]
    return ", ".join(part for part in parts if part)


def notebook_name() -> str | None:
    """The name of the file of the notebook that runs this, where the frontend says it."""
    # JupyterLab and Notebook set the first, to the path of the file; VS Code the second.
    told = os.environ.get("JPY_SESSION_NAME", "")
    main = sys.modules.get("__main__")
    told = told or getattr(main, "__vsc_ipynb_file__", "") or ""
    name = PureWindowsPath(told).name if "\\" in told else PurePath(told).name
    return name if name.endswith(".ipynb") else None


def scrubbed(text: str) -> str:
    """A message or a name without the folders and the user that it may tell of."""
    short = text
    for pattern, instead in _PRIVATE:
        short = pattern.sub(instead, short)
    with suppress(KeyError, OSError, ImportError):  # a container may have no name for its user
        user = getpass.getuser()
        if len(user) > 2 and user != "root":
            short = re.sub(rf"\b{re.escape(user)}\b", "user", short)
    return short


def _versions() -> dict[str, str]:
    """Versions by distribution name; our own is that of the code, however it got here."""
    from inferkit import __version__

    found = {"jupyter-inferkit": __version__}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processors() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _entry(device: Device) -> DeviceEntry:
    return DeviceEntry(
        name=device.name,
        kind=device.kind,
        description=device.description,
        total=device.total,
        bf16=device.bf16,
        driver=_nvidia_driver() if device.kind == "cuda" else None,
    )


def _nvidia_driver() -> str | None:
    with suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    return None


def _git(*words: str) -> str | None:
    """What git says of the working directory; None where there is no repository, or no git."""
    try:
        done = subprocess.run(
            ["git", *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
