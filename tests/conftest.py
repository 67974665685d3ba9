"""What the tests share: small models on disk, the demo model, a browser, and quiet libraries."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab import Lab
    from playwright.sync_api import Browser

# Before the first import of torch or huggingface_hub, which read them once. Small models run
# slower on many threads, and no test may reach a hub. Tests that run side by side share the
# processors: threads that wait for each other by spinning would take ten times as long.
_side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = str(max(1, min(4, (os.cpu_count() or 1) // _side_by_side)))
if _side_by_side > 1:
    os.environ["OMP_NUM_THREADS"] = _threads  # in the place of the first process's
os.environ.setdefault("OMP_NUM_THREADS", _threads)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What "auto" compiles in the background would compete with the tests; test_compile.py asks for it.
os.environ.setdefault("INFERKIT_COMPILE", "0")

# A job that a shell starts in the background ignores Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, by name and with the reason, where there is no CUDA device.

    Files with the most slow tests come first: run side by side, the last one keeps nobody waiting.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Leave what the imports have made out of garbage collections, of which each load does some.

    Half of the time of a test of small models would go into them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a small random model: ``tiny_model("gemma3")``; see architectures.py."""
    import architectures

    saved: dict[str, Path] = {}

    def folder(arch: str) -> Path:
        if arch not in saved:
            saved[arch] = architectures.save(arch, tmp_path_factory.mktemp("models") / arch)
        return saved[arch]

    return folder


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model's folder of safetensors, converted in the user's cache on first use."""
    from inferkit import catalog

    return Path(catalog.resolve("demo").path)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for Playwright's ``executable_path``; fails where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(
            f"This test drives a browser and none of {', '.join(BROWSERS)} is on PATH. Install one "
            "(Debian: apt-get install chromium), or leave these tests out: make test-fast."
        )
    return found


@pytest.fixture(scope="session")
def lab(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running JupyterLab, whose kernels find the demo model converted."""
    from lab import serve

    folders = (tmp_path_factory.mktemp(name) for name in ("jupyter", "notebooks"))
    with serve(*folders) as running:
        yield running


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A browser; not longer than for a module, for Playwright's event loop disturbs async tests."""
    from lab import browse

    with browse(chromium) as found:
        yield found
