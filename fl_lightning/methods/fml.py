"""FML: a private model of any architecture and a shared one that learn from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fl_lightning.checks import within
from fl_lightning.methods.own_architecture import Choice, whole
from fl_lightning.methods.two_models import TwoModels
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, with_value_of

if TYPE_CHECKING:
    from fl_lightning.client import Client


class MutualLearning(TwoModels):
    r"""Trains a private model p and the shared one m, the meme, on labels and on each other's predictions.

    :math:`L_p = \alpha\, CE(p) + (1 - \alpha)\, KL(m \Vert p)` and :math:`L_m = \beta\, CE(m) + (1 - \beta)\,
    KL(p \Vert m)`, where KL is over the teacher's predictions, through which no gradient flows.

    Shen et al., Federated Mutual Learning, 2020, https://arxiv.org/abs/2006.16765. As in the authors' code both models
    take their step on the same batch, from predictions made before it. The meme travels, so that private models need
    not be alike.

    Args:
        model: As in :class:`FederatedModule`.
        private: The private model, or several by name; None: the same architecture with the same initial weights.
        clients: Which of several is whose, by the clients' names; None: each client takes the next one in turn.
        alpha: Weight of the labels in the private model's loss, in [0, 1]. At 1 it is local training, to the bit.
        beta: Weight of the labels in the meme's loss, in [0, 1]. At 1 the meme is FedAvg's, to the bit.
        label_smoothing: As there.
    """

    needs_classes = True

    def __init__(
        self,
        model: Model,
        private: Model | Mapping[str, Model] | None = None,
        clients: Mapping[str, str] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        label_smoothing: float = 0.0,
    ) -> None:
        several = private if isinstance(private, Mapping) else {}
        other: nn.Module | None = nn.ModuleDict({name: whole(one) for name, one in several.items()})
        if not isinstance(private, Mapping):
            other = None if private is None else whole(private)
        super().__init__(model, label_smoothing, other)
        within("alpha", alpha, "[0, 1]")
        within("beta", beta, "[0, 1]")
        self.choice = Choice(list(several), clients, "private")
        self._chosen = next(iter(several), "")
        self.alpha = alpha
        self.beta = beta

    @override
    def for_client(self, client: Client) -> None:
        if not self.choice.names:
            return
        self._chosen = self.choice.of(client)
        unused = tuple(f"personal.{name}." for name in self.choice.names if name != self._chosen)
        self.idle = frozenset(name for name in self.state_dict() if name.startswith(unused))

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        chosen = self.personal[self._chosen] if isinstance(self.personal, nn.ModuleDict) else self.personal
        logits: Tensor = chosen(x)
        return logits

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        own, meme = self.personal_forward(x), self(x)
        of_meme = self.criterion(meme, y)
        of_own = self.criterion(own, y)
        return with_value_of(
            of_meme.detach(),
            self.beta * of_meme + (1 - self.beta) * divergence(meme, own),
            self.alpha * of_own + (1 - self.alpha) * divergence(own, meme),
        )


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far a student's predictions are from a teacher's: a mean over examples, of logits ``(N, C)``."""
    target = functional.softmax(teacher.detach(), dim=1)
    return functional.kl_div(functional.log_softmax(student, dim=1), target, reduction="batchmean")
