"""Clients with architectures of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import nn

from fl_lightning.checks import ArgumentError
from fl_lightning.client import Client, ClientInfo
from fl_lightning.models.model import Model

FIRST = "model"
"""The name of the architecture that ``model`` gives, beside those of ``module.others``."""


class Choice:
    """Says which of several architectures a client has.

    Args:
        names: Of the architectures.
        clients: By client name, whose is which; None: each client takes the next one in turn.
        key: Of the argument that holds the architectures, for messages.
    """

    def __init__(self, names: Sequence[str], clients: Mapping[str, str] | None, key: str) -> None:
        self.names = tuple(names)
        self.clients = None if clients is None else dict(clients)
        self.key = key
        for client, name in (clients or {}).items():
            if name not in self.names:
                known = f"one of {', '.join(names)}" if names else f"left out where {key} has no names"
                raise ArgumentError(f"clients.{client} must be {known}, got {name!r}")

    def of(self, client: Client | ClientInfo) -> str:
        """Return the name of a client's architecture."""
        if self.clients is None:
            return self.names[client.id % len(self.names)]
        if client.name not in self.clients:
            raise ValueError(f"module.clients must name one of {self.key} for every client, got none for {client.name}")
        return self.clients[client.name]


def whole(model: Model) -> nn.Sequential:
    """Return a model's two parts as one module; they keep their names."""
    return nn.Sequential(OrderedDict(backbone=model.backbone, head=model.head))
