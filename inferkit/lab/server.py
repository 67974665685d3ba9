"""The Jupyter server's part: ``GET inferkit/api/state``, for whoever may read its kernels.

Authenticated and authorized as Jupyter's own handlers are. It has no port of its own, writes
nothing, and reaches no kernel: it reads the files that they write.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.utils import url_path_join
from tornado import web

from inferkit.lab.survey import survey

__all__ = ["PATH", "StateHandler"]

PATH = "inferkit/api/state"


class StateHandler(APIHandler):
    """Answers with the state of all kernels and devices: see `inferkit.lab.schema.State`."""

    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Read it, beside the server's loop, which has others to serve."""
        ids = frozenset(self.kernel_manager.list_kernel_ids())
        remote = frozenset(i for i in ids if _elsewhere(self.kernel_manager, i))
        found = await asyncio.to_thread(survey, ids - remote, remote)
        self.set_header("Cache-Control", "no-store")
        self.finish(msgspec.json.encode(found))


def _elsewhere(manager: Any, kernel_id: str) -> bool:
    """Whether a kernel runs on another machine, whose files are not seen from here."""
    if GatewayClient.instance().gateway_enabled:
        return True
    provisioner = getattr(manager.get_kernel(kernel_id), "provisioner", None)
    return provisioner is not None and not isinstance(provisioner, LocalProvisioner)


def _load_jupyter_server_extension(server: Any) -> None:
    """Add the handler to a Jupyter server."""
    path = url_path_join(server.web_app.settings["base_url"], PATH)
    server.web_app.add_handlers(".*$", [(path, StateHandler)])
