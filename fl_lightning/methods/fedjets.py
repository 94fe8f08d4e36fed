"""FedJETs (DDOME): experts of which each client trains a few, and a gate that knows who needs which."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.checks import ArgumentError, at_least, whole
from fl_lightning.client import Split
from fl_lightning.evaluation.predict import batches_of
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule, with_value_of
from fl_lightning.sharing import Sharing
from fl_lightning.state import State

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, ClientInfo, Split

ANCHOR = "expert of the anchor"


class ExpertMixture(FederatedModule):
    r"""Experts :math:`W_1 \dots W_M`, and a gate over them that sees the features of a frozen common expert.

    Farhat et al., Learning to Specialize: Joint Gating-Expert Training for Adaptive MoEs in Decentralized Settings
    (DDOME; earlier FedJETs, by Dun et al.), NeurIPS 2025, https://arxiv.org/abs/2306.08586. A client gets the K experts
    whose gate scores, summed over its data, are highest. It minimises the cross-entropy of their outputs weighted by
    the gate; an anchor of expert q gets that one, and minimises its cross-entropy and that of the gate to q. Scored,
    a client's K experts are found in the same way, without labels, and each example goes to the best of them: this
    works for clients that never trained.

    ``backbone`` and ``head`` are the common expert, and experts begin as copies of it.

    Args:
        model: The common expert, as in :class:`FederatedModule`.
        experts: M, at least 1. One expert without anchors is FedAvg, to the bit.
        chosen: K, at least 1 and at most M.
        width: Hidden units of the gate, a network of two layers.
        gate_factor: What the learning rate of the gate is multiplied by, at least 0.
        label_smoothing: As there.
    """

    uses_all = True

    def __init__(
        self,
        model: Model,
        experts: int = 3,
        chosen: int = 2,
        width: int = 64,
        gate_factor: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing)
        for name, value in {"experts": experts, "chosen": chosen, "width": width}.items():
            whole(name, value, 1)
        at_least("gate_factor", gate_factor, 0)
        if chosen > experts:
            raise ArgumentError(f"chosen must be at most experts={experts}, got {chosen}")
        if not isinstance(model.head, nn.Linear):
            raise ArgumentError(f"model must have one linear layer as head, got {type(model.head).__name__}")
        parts = OrderedDict(backbone=model.backbone, head=model.head)
        self.experts = nn.ModuleList(nn.Sequential(copy.deepcopy(parts)) for _ in range(experts))
        self.gate = nn.Sequential(nn.Linear(model.head.in_features, width), nn.ReLU(), nn.Linear(width, experts))
        for part in (self.backbone, self.head):
            part.requires_grad_(False)
        self.chosen = chosen
        self.gate_factor = gate_factor
        self.received: Sequence[int] = range(experts)
        self.anchor: int | None = None
        self.scores = torch.zeros(experts)

    @override
    def start_from(self, state: State) -> None:
        super().start_from(state)
        if not any(name.startswith("experts.") for name in state):  # a plain model is the common expert
            for expert in self.experts:
                expert.load_state_dict(state)

    def names_of(self, experts: Iterable[int]) -> set[str]:
        """Return the names of the tensors of some experts."""
        prefixes = tuple(f"experts.{number}." for number in experts)
        return {name for name in self.state_dict() if name.startswith(prefixes)} if prefixes else set()

    @override
    def for_client(self, client: Client) -> None:
        self.received, self.anchor, self.idle = range(len(self.experts)), None, frozenset()
        if self.context.optimizer is None:  # no fit, which is told what it gets
            self.scores = self.gate_scores(client.data)
            self.received = top(self.scores, self.chosen)

    @torch.no_grad()
    def gate_scores(self, data: Any) -> Tensor:
        """Return the sums of the gate's scores over a client's examples without their labels, (M,)."""
        device = next(self.gate.parameters()).device
        split: Split = "train" if data.num_train else "test"
        return torch.stack([self.weights(x.to(device)).sum(0) for x, _ in batches_of(data, split)]).sum(0)

    def weights(self, x: Tensor) -> Tensor:
        """Return the gate's scores (N, M) of inputs (N, ...): positive, of sum 1."""
        self.backbone.eval()  # the common expert's BatchNorm statistics stay, too
        with torch.no_grad():
            features = self.features(x).flatten(1)
        return functional.softmax(self.gate(features), dim=1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        best = self.weights(x)[:, list(self.received)].argmax(1)
        outputs = torch.stack([self.experts[number](x) for number in self.received])
        return outputs[best, torch.arange(len(x), device=outputs.device)]

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        weights = self.weights(x)
        if self.anchor is not None:
            logits = self.experts[self.anchor](x)
            to_anchor = functional.nll_loss(weights.clamp_min(1e-12).log(), torch.full_like(y, self.anchor))
            return with_value_of(self.criterion(logits, y), to_anchor)
        weights = weights[:, list(self.received)]
        outputs = torch.stack([self.experts[number](x) for number in self.received], dim=1)
        return self.criterion((outputs * (weights / weights.sum(1, keepdim=True)).unsqueeze(-1)).sum(1), y)

    @override
    def configure_optimizers(self) -> Any:
        gate = {"params": list(self.gate.parameters()), "lr_factor": self.gate_factor}
        return self.context.configure([{"params": list(self.experts.parameters())}, gate])


class ExpertSharing(Sharing):
    """Shares the gate with all clients, and with each the experts that it was given for the round.

    Arguments are those of :class:`fl_lightning.sharing.Sharing`.
    """

    given: dict[int, Sequence[int]] | None = None
    """The experts of each client in the running round, by its id; None: all."""

    @override
    def names(self, module: nn.Module, client: Client | ClientInfo | None = None) -> list[str]:
        names = super().names(module, client)
        if client is None or self.given is None:
            return names
        assert isinstance(module, ExpertMixture)
        given = self.given.get(client.id, ())
        left_out = module.names_of(number for number in range(len(module.experts)) if number not in given)
        return [name for name in names if name not in left_out]


class ExpertChoice(FederatedCallback):
    """Gives each client of a round its experts: one to an anchor, to any other those that its gate scores ask for.

    Before a round, the clients that are no anchors get the gate and answer with its scores, summed over their data.

    Args:
        anchors: Names of the anchors; the first is that of the first expert, and so on in turn. None: the first half of
            all clients.
    """

    def __init__(self, anchors: Sequence[str] | None = None) -> None:
        self.anchors = None if anchors is None else list(anchors)

    @override
    def on_federation_start(self, loop: Server) -> None:
        module, sharing = loop.module, loop.sharing
        if not isinstance(module, ExpertMixture) or not isinstance(sharing, ExpertSharing):
            raise ArgumentError("experts need module=ExpertMixture and sharing=ExpertSharing; set method=fedjets")
        self._module, self._sharing = module, sharing
        ids = {client.name: client.id for client in loop.clients}
        names = list(ids)[: (len(ids) + 1) // 2] if self.anchors is None else self.anchors
        if unknown := [name for name in names if name not in ids]:
            raise ArgumentError(f"anchors must be among {', '.join(ids)}, got {', '.join(map(str, unknown))}")
        self._expert_of = {ids[name]: place % len(module.experts) for place, name in enumerate(names)}

    @override
    def on_round_start(self, loop: Server, cohort: Sequence[ClientInfo]) -> None:
        normal = [client for client in cohort if client.id not in self._expert_of]
        self._sharing.given = {}  # the request takes the gate alone
        answers = loop.ask(self.name, normal) if normal else {}
        wanted = {id: top(answer["scores"], self._module.chosen) for id, answer in answers.items()}
        self._sharing.given = {**wanted, **{id: [expert] for id, expert in self._expert_of.items()}}
        for number in range(len(self._module.experts)):
            takers = sum(number in self._sharing.given[client.id] for client in cohort)
            loop.log({f"experts/{number}": float(takers)})

    @override
    def on_request(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> State:
        assert isinstance(module, ExpertMixture)
        return {"scores": module.scores}

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        if client.id in self._expert_of:
            broadcast.extra[ANCHOR] = torch.tensor(self._expert_of[client.id])

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        assert isinstance(module, ExpertMixture)
        module.received = sorted({int(name.split(".")[1]) for name in broadcast.state if name.startswith("experts.")})
        module.anchor = int(broadcast.extra[ANCHOR]) if ANCHOR in broadcast.extra else None
        module.idle = frozenset(module.names_of(range(len(module.experts))))  # what was not received is not kept

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        self._sharing.given = None


def top(scores: Tensor, number: int) -> list[int]:
    """Return the places of the highest scores, in order of place."""
    return sorted(scores.argsort(descending=True, stable=True)[:number].tolist())
