"""Flower as a host: its ServerApp runs our loop, its ClientApp hands requests on to the site's process.

A ClientApp is a process of its own for every message, so it imports neither torch nor data.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_lightning.sites.relay import knock, run_command

client = ClientApp()
server = ServerApp()


@client.query()  # type: ignore[untyped-decorator]
def answer(message: Message, context: Context) -> Message:
    """Hand a request on to the site of ``--node-config 'name="ann" folder="sites/ann"'``, or say who it is."""
    name, folder = (str(context.node_config[key]) for key in ("name", "folder"))
    if "bytes" not in message.content:
        return Message(RecordDict({"name": ConfigRecord({"name": name})}), reply_to=message)
    return Message(_pack(knock(name, Path(folder), _unpack(message))), reply_to=message)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run what ``--run-config 'command="train.py executor=hosted …"'`` says."""
    run_command(str(context.run_config["command"]), GridCarrier(grid))


class GridCarrier:
    """Sends messages to SuperNodes, each as one call.

    Args:
        grid: Of the ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid, self._lock = grid, threading.Lock()
        self._nodes: dict[str, int] = {}

    def names(self) -> list[str]:
        """Return the names of the sites that are connected."""
        # A SuperNode that was started anew has another number.
        new = list(set(self._grid.get_node_ids()) - set(self._nodes.values()))
        with ThreadPoolExecutor(1 + len(new)) as threads:
            for node, reply in zip(new, threads.map(lambda node: self._call(RecordDict(), node), new), strict=True):
                self._nodes[str(reply.content["name"]["name"])] = node
        return list(self._nodes)

    def carry(self, site: str, message: bytes) -> bytes:
        """Bring a message to a site's door and return what it says."""
        if self._nodes[site] not in self._grid.get_node_ids():
            self.names()
        return _unpack(self._call(_pack(message), self._nodes[site]))

    def _call(self, content: RecordDict, node: int) -> Message:
        with self._lock:
            numbers = list(self._grid.push_messages([Message(content, node, "query", ttl=3600)]))
        while True:
            with self._lock:
                found: Iterable[Message] = self._grid.pull_messages(numbers)
            for reply in found:
                if reply.has_error():
                    raise ConnectionError(reply.error.reason)
                return reply
            time.sleep(0.2)


def _pack(data: bytes) -> RecordDict:
    return RecordDict({"bytes": ArrayRecord({"bytes": Array("uint8", (len(data),), "bytes", data)})})


def _unpack(message: Message) -> bytes:
    return bytes(message.content["bytes"]["bytes"].data)
