"""NVFlare as a host: the server of a Collab job runs our loop, its clients hand requests on to the sites' processes."""

from __future__ import annotations

import os
from pathlib import Path

from nvflare.collab import CollabRecipe, collab

from fl_lightning.sites.relay import POLL, knock, run_command

FOLDERS = "FL_LIGHTNING_SITES"
"""Environment variable of an NVFlare client: the folder in which the site's own folder is, under the client's name."""


class JobServer:
    """The server's half of the job.

    Args:
        command: ``train.py executor=hosted …`` or ``personalize.py … executor=hosted …``.
    """

    def __init__(self, command: str) -> None:
        self.command = command

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Run the command."""
        run_command(self.command, ProxyCarrier({one.name: one(timeout=6 * POLL) for one in collab.clients}))


class JobClient:
    """A client's half of the job."""

    @collab.publish  # type: ignore[untyped-decorator]
    def answer(self, message: bytes) -> bytes:
        """Hand a request on to the site."""
        if FOLDERS not in os.environ:
            raise ValueError(f"{FOLDERS} must name the folder that holds the site's folder; set it and start again")
        return knock(collab.site_name, Path(os.environ[FOLDERS]) / collab.site_name, message)


class ProxyCarrier:
    """Calls the clients of a job.

    Args:
        clients: Their proxies by name.
    """

    def __init__(self, clients: dict[str, object]) -> None:
        self._clients = clients

    def names(self) -> list[str]:
        """Return the names of the sites that are connected."""
        return list(self._clients)

    def carry(self, site: str, message: bytes) -> bytes:
        """Bring a message to a site's door and return what it says."""
        return bytes(self._clients[site].answer(message=message))  # type: ignore[attr-defined]


def job(command: str, sites: int) -> CollabRecipe:
    """Return a job; ``job(command, 3).execute(ProdEnv(startup_kit_location=…))`` runs it.

    Args:
        command: What the server runs.
        sites: How many clients it needs.
    """
    return CollabRecipe("fl_lightning", JobServer(command), JobClient(), min_clients=sites, sync_task_timeout=120)
