"""Fed-RoD: a generic head with a loss that is balanced over classes, and a personal one that is added to it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fl_lightning.checks import ArgumentError, at_least, whole
from fl_lightning.methods.two_models import TwoModels
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, with_value_of
from fl_lightning.task import Classification

if TYPE_CHECKING:
    from fl_lightning.client import Client


class GeneratedHead(nn.Module):
    """A linear head of a client, whose weights a shared network makes from the client's share of each class.

    Only ``shares`` (C,) is its own; the network is given to every call.

    Args:
        head: The head whose shape it has.
    """

    shares: Tensor

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.features, self.classes, self.has_bias = head.in_features, head.out_features, head.bias is not None
        self.register_buffer("shares", torch.zeros(head.out_features))

    @property
    def size(self) -> int:
        """Number of the head's weights."""
        return self.classes * (self.features + self.has_bias)

    def forward(self, z: Tensor, network: nn.Module) -> Tensor:
        """Return logits (N, C) of features (N, D)."""
        made: Tensor = network(self.shares)
        weight = made[: self.classes * self.features].reshape(self.classes, self.features)
        return functional.linear(z, weight, made[self.classes * self.features :] if self.has_bias else None)


class RobustDecoupling(TwoModels):
    r"""Trains backbone f and generic head g by a balanced softmax, and a personal head h on top of both.

    :math:`L_g = -\log \frac{n_y^\gamma e^{g_y(f)}}{\sum_c n_c^\gamma e^{g_c(f)}}`, where the client has :math:`n_c`
    training examples of class c, and :math:`L_h = CE(g(f) + h(f))`, whose gradient reaches h alone.

    Chen, Chao, On Bridging Generic and Personalized Federated Learning for Image Classification, ICLR 2022,
    https://arxiv.org/abs/2107.00778. f and g are sent and averaged and make the global model; the personal model is
    :math:`g + h`. h is linear: a head of each client's own, which stays, or the paper's other variant, a head
    :math:`h = H(a)` that a network H, sent and averaged too, makes from the client's share a of each class. A class
    that a client does not hold takes no part in its balanced softmax.

    Args:
        model: As in :class:`FederatedModule`.
        gamma: :math:`\gamma`, at least 0. At 0 the global model is FedAvg's, to the bit.
        hypernetwork: Hidden units of H, at least 1; None: own heads. H begins with heads of 0.
        label_smoothing: As there, for the personal loss alone: a smoothed balanced softmax would ask for classes that
            the client does not hold.
    """

    needs_classes = True

    def __init__(
        self, model: Model, gamma: float = 1.0, hypernetwork: int | None = None, label_smoothing: float = 0.0
    ) -> None:
        at_least("gamma", gamma, 0)
        whole("hypernetwork", hypernetwork, 1, or_null=True)
        head: nn.Module
        if hypernetwork is None:
            head = copy.deepcopy(model.head)
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(model.head, nn.Linear):
            head = GeneratedHead(model.head)
        else:
            raise ArgumentError(
                f"hypernetwork must be null unless the model's head is one linear layer, got {hypernetwork}"
            )
        super().__init__(model, label_smoothing, head)
        self.gamma = gamma
        self.hypernetwork: nn.Sequential | None = None
        if isinstance(head, GeneratedHead) and hypernetwork is not None:
            last = nn.Linear(hypernetwork, head.size)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.hypernetwork = nn.Sequential(nn.Linear(head.classes, hypernetwork), nn.ReLU(), last)

    @override
    def for_client(self, client: Client) -> None:
        data: Any = client.data
        if isinstance(self.personal, GeneratedHead) and hasattr(data, "label_counts"):
            counts: Tensor = data.label_counts("train").float()
            self.personal.shares.copy_(counts / counts.sum().clamp(min=1))

    @override
    def second_parts(self) -> list[nn.Module]:
        return [self.personal] if self.hypernetwork is None else [self.hypernetwork]

    def personal_head(self, z: Tensor) -> Tensor:
        """Return what the personal head adds to the logits (N, C), of features (N, D)."""
        logits: Tensor = self.personal(z) if self.hypernetwork is None else self.personal(z, self.hypernetwork)
        return logits

    @override
    def on_train_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(self.task, Classification):
            raise TypeError(
                f"method=fedrod takes task=classification, got {type(self.task).__name__}; choose other data"
            )
        counts: Tensor = data.label_counts("train")
        self._log_prior = counts.float().pow(self.gamma).log().to(self.device)

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        z = self.features(x)
        logits: Tensor = self.head(z) + self.personal_head(z)
        return logits

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        z = self.features(x)
        generic = self.head(z)
        balanced = functional.cross_entropy(generic + self._log_prior, y)
        both = generic.detach() + self.personal_head(z.detach())
        return with_value_of(self.criterion(generic.detach(), y), balanced, self.criterion(both, y))
