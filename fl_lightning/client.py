"""A client, and what travels between it and the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fl_lightning.state import State, num_bytes

if TYPE_CHECKING:
    from fl_lightning.data.client_data import ClientData


@dataclass
class Client:
    """One participant: its data, and what it keeps from round to round. Nothing of it lives on an accelerator.

    Attributes:
        id: Its number, which also names its random streams.
        data: Its train, validation and test examples.
        personal: The tensors of the model that are its own, by name. Empty until its first fit: then the model's
            initial values count.
        memory: What a method remembers here between rounds and that is no part of the model (control variates, a
            mixing weight, an optimizer's momentum). Never sent.
    """

    id: int
    data: ClientData
    personal: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name that tables and figures print."""
        return self.data.name

    @property
    def num_examples(self) -> int:
        """Number of training examples, the usual weight of its update."""
        return self.data.num_train


@dataclass
class Broadcast:
    """What the server sends to one client: exactly what goes down the wire.

    Attributes:
        round: The round, from 0.
        state: Tensors of the model, by name.
        extra: What a method sends beside them (the server's control variate).
        train: Whether the client trains on it, or only takes it in.
        stage: Name of the callback whose own training this is for (see :meth:`FederatedCallback.stage`); empty in a
            round.
    """

    round: int
    state: State
    extra: State = field(default_factory=dict)
    train: bool = True
    stage: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return num_bytes(self.state) + num_bytes(self.extra)


@dataclass
class Update:
    """What a client sends back: exactly what goes up the wire.

    Attributes:
        client_id: Whose it is.
        num_examples: Number of training examples.
        state: Tensors of the model, by name: only shared ones.
        extra: What a method sends beside them.
        metrics: Numbers about the fit, such as ``train_loss``; not counted as traffic.
    """

    client_id: int
    num_examples: int
    state: State
    extra: State = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return num_bytes(self.state) + num_bytes(self.extra)
