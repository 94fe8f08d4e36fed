"""FedProto: nothing but the mean features of each class travels, and clients draw their own towards them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fl_lightning.aggregators import Aggregator
from fl_lightning.checks import ArgumentError, at_least, one_of
from fl_lightning.client import Update
from fl_lightning.evaluation.predict import predict
from fl_lightning.methods.own_architecture import FIRST, Choice, whole
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule, with_value_of
from fl_lightning.state import State

if TYPE_CHECKING:
    from fl_lightning.client import Client

Predict = Literal["prototypes", "head"]
MEAN, COUNT = "prototypes.mean", "prototypes.count"


class PrototypeLearning(FederatedModule):
    r"""Trains :math:`CE + \lambda\, d(z, \bar C_y)`: features z are drawn towards the global prototype of their class.

    Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, FedProto: Federated Prototype Learning across Heterogeneous Clients, AAAI
    2022, https://arxiv.org/abs/2105.00243. After its fit a client sends, for each class that it holds, the mean of its
    features over all training examples and their number; :class:`PrototypeMean` merges them. As in the authors' code d
    is the mean of the squared differences, over the examples of a batch and the features; examples of a class that has
    no prototype yet count as 0. The personal model answers with the class of the nearest prototype.

    Args:
        model: As in :class:`FederatedModule`; its head must have a weight ``(C, D, ...)``.
        others: Other architectures by name, with features of the same number D: nothing but these meets.
        clients: Whose is which, by the clients' names, ``model`` for the first; None: in turn, beginning with it.
        lam: :math:`\lambda`, at least 0. At 0 with ``predict=head`` this is local training, to the bit.
        predict: What the personal model answers by: ``prototypes``, the negative squared distances to them, or
            ``head``. Before there are any prototypes it is the head.
        label_smoothing: As there.
    """

    needs_classes = True

    def __init__(
        self,
        model: Model,
        others: Mapping[str, Model] | None = None,
        clients: Mapping[str, str] | None = None,
        lam: float = 1.0,
        predict: Predict = "prototypes",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing)
        at_least("lam", lam, 0)
        one_of("predict", predict, Predict)
        shape = _class_features(model)
        for name, other in (others or {}).items():
            if (found := _class_features(other)) != shape:
                raise ArgumentError(f"others.{name} must have {shape[1]} features, as model has, got {found[1]}")
        self.others = nn.ModuleDict({name: whole(other) for name, other in (others or {}).items()})
        self.choice = Choice([FIRST, *self.others], clients, "others and model")
        self._chosen = FIRST
        self.lam = lam
        self.predict = predict
        self.prototypes = nn.Module()
        self.prototypes.register_buffer("mean", torch.zeros(shape))
        self.prototypes.register_buffer("count", torch.zeros(shape[0]))

    @override
    def for_client(self, client: Client) -> None:
        self._chosen = self.choice.of(client)
        prefixes = {FIRST: ("backbone.", "head."), **{name: (f"others.{name}.",) for name in self.others}}
        unused = tuple(prefix for name, found in prefixes.items() if name != self._chosen for prefix in found)
        self.idle = frozenset(name for name in self.state_dict() if unused and name.startswith(unused))

    def _parts(self) -> tuple[nn.Module, nn.Module]:
        if self._chosen == FIRST:
            return self.backbone, self.head
        other = self.others[self._chosen]
        return other.get_submodule("backbone"), other.get_submodule("head")

    @override
    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self._parts()[0](x)
        return features

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._parts()[1](self.features(x))
        return logits

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        known = self.prototypes.get_buffer("count") > 0
        if self.predict == "head" or not known.any():
            return super().personal_forward(x)
        near = -torch.cdist(self.features(x), self.prototypes.get_buffer("mean")).square()
        # A class that nobody has shown is never the answer, but its probability stays above 0.
        unknown = near[:, known].amin(1, keepdim=True) - 10
        return torch.where(known, near, unknown)

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        z = self.features(x)
        loss = self.criterion(self._parts()[1](z), y)
        if not self.lam:
            return loss
        known = self.prototypes.get_buffer("count")[y] > 0
        away = (z - self.prototypes.get_buffer("mean")[y]).square() * known[:, None]
        return with_value_of(loss, self.lam * away.mean())

    @override
    def on_train_end(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        z, y = (found.cpu() for found in predict(self.features, data.eval_dataloader("train")))
        held = functional.one_hot(y, len(self.prototypes.get_buffer("count"))).double()  # (N, C)
        count = held.sum(0)
        self.prototypes.get_buffer("mean").copy_((held.T @ z.double()) / count.clamp(min=1)[:, None])
        self.prototypes.get_buffer("count").copy_(count)


def _class_features(model: Model) -> tuple[int, int]:
    """Return the numbers of classes and of features, as a head's weight says them."""
    weight = getattr(model.head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise ValueError(f"method=fedproto needs a head with a weight (classes, features), got {model.head}")
    return weight.shape[0], weight.shape[1]


class PrototypeMean(Aggregator):
    r"""Averages the prototypes of each class over the clients of the round that hold it.

    Tan et al., AAAI 2022, equation (6), normalised: its further factor of one over the number of clients would draw
    prototypes to 0, and the authors' code, which weighs clients alike (``uniform``), has none. ``examples`` weighs a
    client by its examples of the class. A prototype of which no client of the round holds the class stays.

    Args:
        weights: ``examples`` or ``uniform``.
    """

    def __init__(self, weights: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weights)

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        total = torch.zeros(state[MEAN].shape, dtype=torch.float64)
        weight, count = (torch.zeros(state[COUNT].shape, dtype=torch.float64) for _ in range(2))
        for update in updates:
            held = update.state[COUNT].double()
            share = held if self.weights == "examples" else (held > 0).double()
            total += share[:, None] * update.state[MEAN].double()
            weight += share
            count += held
        seen = weight > 0
        mean = torch.where(seen[:, None], total / weight.clamp(min=1)[:, None], state[MEAN].double())
        merged = {MEAN: mean, COUNT: torch.where(seen, count, state[COUNT].double())}
        return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in merged.items()}}
