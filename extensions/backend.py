"""hatchling, and what a wheel needs where the JupyterLab extension is not built yet.

A wheel that is made of a built extension, as from an sdist, needs neither node nor yarn; nor does
an editable installation, which has none.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling import build as _hatchling
from hatchling.build import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).parent))
import labextension


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """PEP 517."""
    known = _hatchling.get_requires_for_build_wheel(config_settings)
    return [*known, *labextension.requirements()]


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    """PEP 517."""
    known = _hatchling.get_requires_for_build_sdist(config_settings)
    return [*known, *labextension.requirements()]
