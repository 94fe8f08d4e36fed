"""What the server knows of each site, and of the data that are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fl_lightning.client import ClientInfo
from fl_lightning.data.partition import Partition
from fl_lightning.data.splits import ClientIndices
from fl_lightning.executors.worker import SentState
from fl_lightning.sites import messages
from fl_lightning.sites.held import Order


@dataclass
class Seat:
    """What the server knows of a site.

    Attributes:
        info: The client that lives there.
        description: What it said of its data.
        orders: What it was told to do with its state and has not yet said to have done.
        number: Of the last order.
        marked: The mark that it is known to hold.
        sent: Knows which model it was sent last.
        state: How many models it was sent.
        missing: Whether it was said to be missing.
    """

    info: ClientInfo
    description: dict[str, Any]
    orders: list[Order] = field(default_factory=list)
    number: int = 0
    marked: int | None = None
    sent: SentState = field(default_factory=SentState)
    state: int = 0
    missing: bool = False

    def order(self, word: str, what: Any) -> None:
        """Tell the site to do something with its state, before the next request."""
        self.number += 1
        self.orders.append((self.number, word, what))

    def standing(self) -> dict[str, Any]:
        """Return where the site's state must be when it does the next request, and how it gets there."""
        return {"orders": self.orders, "last_order": self.number}

    def done(self, number: int) -> None:
        """Strike off what it has done."""
        for _, word, what in [order for order in self.orders if order[0] <= number]:
            if word in ("mark", "load"):
                self.marked = what
        self.orders = [order for order in self.orders if order[0] > number]


class SiteData:
    """What is known at a server of data that are at sites: :class:`FederatedData` without an example.

    Args:
        seats: The sites, in the order of their clients.
    """

    def __init__(self, seats: Sequence[Seat] = (), **settings: Any) -> None:
        if not seats:
            raise ValueError("data=sites is for executor=sites, which says whose data they are; choose data=...")
        first = seats[0].description
        self.clients: list[Any] = []
        self.unseen: list[Any] = []
        self.num_classes: int = first["num_classes"]
        self.class_names: list[str] = first["class_names"]
        self.in_channels: int = first["in_channels"]
        self.image_size: int = first["image_size"]
        self.name = "sites"
        self._example = first["shape"], first["type"]
        self._target = first["target_shape"], first["target_type"], first["task"]
        nothing = torch.zeros(0, dtype=torch.int64)
        own = [one.description["partition"] for one in seats]
        self.partition = Partition(
            source="sites",
            fingerprint=hashlib.sha256(json.dumps(own).encode()).hexdigest(),
            num_examples=sum(one.info.num_train + one.info.num_val + one.info.num_test for one in seats),
            num_classes=self.num_classes,
            clients=tuple(ClientIndices(one.info.name, nothing, nothing, nothing, one.info.unseen) for one in seats),
            description={"clients": "one per site"},
        )

    def first_examples(self, number: int) -> Tensor:
        """Return zeros in the form of examples: the server has none."""
        shape, kind = self._example
        return torch.zeros(number, *shape, dtype=messages.torch_type(kind))

    def first_targets(self, number: int) -> Tensor:
        """Return what has the form of targets, and is of the task that the sites' own are of."""
        shape, kind, task = self._target
        return torch.full((number, *shape), 0.5 if task == "Regression" else 0, dtype=messages.torch_type(kind))


def disagreement(found: Mapping[str, Seat], name: str) -> str:
    """Say how a site's data do not go with those of the first; empty if they do."""
    first = next(iter(found))
    mine, other = found[name].description, found[first].description
    for key, word in {
        "shape": "examples of shape",
        "type": "examples of type",
        "class_names": "the classes",
    }.items():
        if mine.get(key) != other.get(key):
            return (
                f"site {name} has {word} {mine.get(key)}, site {first} {other.get(key)}; bring them to one with "
                "data.resize, data.channels and data.classes at the server"
            )
    return ""
