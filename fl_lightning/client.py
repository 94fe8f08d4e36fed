"""A client, what the server knows of it, and what travels between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fl_lightning.state import State, num_bytes

if TYPE_CHECKING:
    from fl_lightning.data.client_data import ClientData

Split = Literal["train", "val", "test"]


@dataclass(eq=False)
class ClientInfo:
    """What the server knows of a client: its answer to ``describe``.

    Attributes:
        id: Its number, which also names its random streams.
        name: What tables and figures print.
        num_train: Number of training examples.
        num_val: Number of validation examples.
        num_test: Number of test examples.
        label_counts: Training examples of each class, int64 (num_classes,); empty where labels are no classes.
        batch_size: Training examples of a batch.
        unseen: Whether it never trains, and is only evaluated on.
        stays: Whether a model of its own never leaves it in whole, so that it is tried on its own data alone.
        device: What its machine can do, as it says itself: ``memory`` in bytes, ``flops_per_second``; what it does not
            say is missing.
    """

    id: int
    name: str
    num_train: int
    num_val: int
    num_test: int
    label_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    batch_size: int = 1
    unseen: bool = False
    stays: bool = False
    device: dict[str, float] = field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """Number of training examples, the usual weight of its update."""
        return self.num_train

    def count(self, split: Split) -> int:
        """Return the number of examples of a split."""
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}[split]


@dataclass
class Client:
    """One participant where its data are. The server never sees it: it asks through an executor.

    Nothing of it lives on an accelerator.

    Attributes:
        id: Its number, which also names its random streams.
        data: Its train, validation and test examples.
        personal: The tensors of the model that are its own, by name. Empty until its first fit: then the model's
            initial values count.
        memory: What a method remembers here between rounds and that is no part of the model (control variates, a
            mixing weight, an optimizer's momentum). Never sent.
        models: Whole models that trainings outside the rounds left here, by the name of their stage.
        kept: Personal tensors put aside, by label, such as those of the best round.
    """

    id: int
    data: ClientData
    personal: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)
    models: dict[str, State] = field(default_factory=dict)
    kept: dict[str, State] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name that tables and figures print."""
        return self.data.name

    @property
    def num_examples(self) -> int:
        """Number of training examples, the usual weight of its update."""
        return self.data.num_train

    def describe(self) -> ClientInfo:
        """Return what the server may know."""
        data = self.data
        info = ClientInfo(self.id, data.name, data.num_train, data.num_val, data.num_test, batch_size=data.batch_size)
        if hasattr(data, "label_counts"):
            info.label_counts = data.label_counts("train")
        return info


@dataclass
class Broadcast:
    """What the server sends to one client for a fit: exactly what goes down the wire.

    Attributes:
        round: The round, from 0.
        state: Tensors of the model, by name. Their names are the tensors that this fit shares.
        extra: What a method sends beside them (the server's control variate).
        train: Whether the client trains on it, or only takes it in.
        stage: Name of the callback whose own training this is for (see :meth:`FederatedCallback.stage`); empty in a
            round.
        request: Name of the callback that asks the client something, without a fit (see
            :meth:`FederatedCallback.on_request`); empty for a fit.
        here: Tensors that the client's side holds already: loaded like ``state``, never counted.
    """

    round: int
    state: State
    extra: State = field(default_factory=dict)
    train: bool = True
    stage: str = ""
    request: str = ""
    here: State = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that travel."""
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
        here: Tensors that the server's side holds already: merged like ``state``, never counted.
    """

    client_id: int
    num_examples: int
    state: State
    extra: State = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    here: State = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that travel."""
        return num_bytes(self.state) + num_bytes(self.extra)


@dataclass
class Fit:
    """What one fit leaves behind: the update that is sent, and what the client keeps.

    It is handed over whole, and taken in only when the round is over, so that a fit that fails and a round that is
    interrupted change nothing.
    """

    update: Update
    personal: State
    memory: State
    stage: str = ""  # of a training outside the rounds: `personal` is then the whole model


@dataclass
class Exam:
    """What the server sends to have a model scored on a client's data, where the data are.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        state: Tensors of the model, by name; those that are missing are the client's own if ``personal``, else the
            initial ones.
        personal: Whether the client's own tensors complete the model, which then is used as the personal one.
        stage: Name of a training outside the rounds, whose model the client has kept; empty for the rounds' model.
        confusion: Whether to count the test predictions by true and predicted class.
        metrics: Names of the metrics; None: all that the run has.
        fetch: Whether the model itself comes back.
    """

    split: Split
    state: State = field(default_factory=dict)
    personal: bool = False
    stage: str = ""
    confusion: bool = False
    metrics: tuple[str, ...] | None = None
    fetch: bool = False


@dataclass
class Scores:
    """What a client answers to an :class:`Exam`.

    Attributes:
        client_id: Whose data.
        num_examples: Examples of the split; 0: all values are NaN.
        values: The metrics by name.
        totals: What is needed to form a metric over several clients, by the metric's name: its state by name.
        confusion: int64 (true class, predicted class), if asked for.
        model: All tensors of the model, if asked for.
    """

    client_id: int
    num_examples: int
    values: dict[str, float]
    totals: dict[str, State] = field(default_factory=dict)
    confusion: Tensor | None = None
    model: State | None = None
