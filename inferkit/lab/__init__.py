"""Inference in all kernels at a glance: what JupyterLab's sidebar and `inferkit ps` show.

Each kernel that has a model keeps a small file of what it does (`status`) in a folder that only its
owner can read (`folder`). A handler of the Jupyter server (`server`) reads all of them, and the
devices (`machine`), and serves both in one document (`schema`). So viewing costs a kernel nothing,
and works while it is busy. Only a kernel's
own part of it, `status`, knows of models, and nothing imports torch that has not been.
"""

from __future__ import annotations

from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    """What Jupyter's server loads; a file in its ``jupyter_server_config.d`` enables it."""
    return [{"module": "inferkit.lab.server"}]
