"""FedPPA: clients keep whole models, whose common layers are drawn towards the server's ever more."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import ArgumentError, at_least, whole, within
from fl_lightning.fit.gradients import add_pull, refuse_scaled_gradients, stepped
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule
from fl_lightning.sharing import Sharing
from fl_lightning.state import State

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, ClientInfo


class KeptModels(FederatedModule):
    """Keeps a client's model of its last fit beside the received one; some clients may have another architecture.

    The last model, named ``last.*``, is the personal one. Where the clients numbered every - 1, 2 every - 1, ... hold
    ``other``, its layers of the same name and shapes as the first model's are common to all; the others, named
    ``other.*``, are averaged among those clients alone, as the first model's others are among its own.

    Args:
        model: As in :class:`FederatedModule`; the global model.
        other: The other architecture; None: all clients have the first.
        every: Which clients hold it, at least 2.
        label_smoothing: As there.
    """

    fits: Tensor

    def __init__(self, model: Model, other: Model | None = None, every: int = 2, label_smoothing: float = 0.0) -> None:
        super().__init__(model, label_smoothing)
        whole("every", every, 2)
        self.every = every
        self.is_other = False
        self.has_batch_norm_apart = False
        first = self.state_dict()
        #: The tensors of either architecture, by their names in it, with those in the module.
        self.places = [{name: name for name in first}]
        self._networks: list[nn.Module] = []  # no part of the module: only its structure is used
        if other is not None:
            network = nn.Sequential(OrderedDict(backbone=other.backbone, head=other.head))
            held = network.state_dict()
            common = common_layers(first, held)
            if not common:
                raise ArgumentError("other must have a layer in common with the model, by name and shapes, got none")
            self.other = nn.Module()
            for name, parameter in network.named_parameters():
                if name not in common:
                    self.other.register_parameter(flat(name), nn.Parameter(parameter.detach().clone()))
            for name, buffer in network.named_buffers():
                if name not in common:
                    self.other.register_buffer(flat(name), buffer.detach().clone())
            self.places.append({name: name if name in common else f"other.{flat(name)}" for name in held})
            self._networks.append(network)
            apart = network.state_dict().keys() - common
            self.has_batch_norm_apart = any(
                f"{prefix}.running_mean" in apart
                for prefix, part in network.named_modules()
                if isinstance(part, _BatchNorm)
            )
        self.last = nn.Module()
        for name, tensor in self.state_dict().items():
            self.last.register_buffer(flat(name), tensor.detach().clone())
        self.register_buffer("fits", torch.tensor(0))

    def has_other(self, client_id: int) -> bool:
        """Tell whether a client holds the other architecture."""
        return bool(self._networks) and client_id % self.every == self.every - 1

    def names(self, client_id: int) -> list[str]:
        """Return the names of the tensors of a client's model."""
        return list(self.places[self.has_other(client_id)].values())

    @override
    def for_client(self, client: Client) -> None:
        self.is_other = self.has_other(client.id)

    def last_tensor(self, name: str) -> Tensor:
        """Return a tensor of the client's last model."""
        return self.last.get_buffer(flat(name))

    def _own(self, x: Tensor, state: State | None) -> Tensor:
        """Run the client's architecture with the module's own tensors, or with others by their names in the module."""
        if state is None and not self.is_other:
            logits: Tensor = self(x)
            return logits
        own = self.state_dict(keep_vars=True) if state is None else state
        network = self._networks[0].train(self.training) if self.is_other else self
        tensors = {name: own[place] for name, place in self.places[self.is_other].items()}
        logits = functional_call(network, tensors, (x,))
        return logits

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        return self._own(x, {name: self.last_tensor(name) for name in self.places[self.is_other].values()})

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return self.criterion(self._own(x, None), y)

    @override
    def start_from(self, state: State) -> None:
        super().start_from(state)
        for name, tensor in state.items():
            self.last_tensor(name).copy_(tensor)

    @override
    def on_train_end(self) -> None:
        own = self.state_dict()
        for name in self.places[self.is_other].values():
            self.last_tensor(name).copy_(own[name])
        self.fits += 1


class CommonLayers(Sharing):
    """Exchanges with a client the layers that its architecture has; module is :class:`KeptModels`."""

    @override
    def names(self, module: nn.Module, client: Client | ClientInfo | None = None) -> list[str]:
        names = super().names(module)
        if client is None or not isinstance(module, KeptModels):
            return names
        if module.has_batch_norm_apart and (self.personal_batch_norm or self.buffers != "average"):
            raise ValueError(
                "sharing.buffers must be average, and sharing.personal_batch_norm false, where module.other has "
                f"BatchNorm layers of its own, got {self.buffers} and {str(self.personal_batch_norm).lower()}"
            )
        held = set(module.names(client.id))
        return [name for name in names if name in held]


class ProgressiveAlignment(FederatedCallback):
    r"""Begins a fit between the client's last model and the received one, and pulls towards the latter.

    :math:`\theta \leftarrow \theta + \gamma_t (\bar\theta - \theta)` for the received layers, and
    :math:`\frac{\mu_t}{2} \lVert \theta - \bar\theta \rVert^2` in the loss. :math:`\gamma_t` and :math:`\mu_t` rise
    evenly over the first rounds.

    Prasetia et al., FedPPA: Progressive Parameter Alignment for Personalized Federated Learning, 2025,
    https://arxiv.org/abs/2510.14698, of which only the abstract could be read: that the weights of common layers are
    aligned with the global model's progressively, and each is averaged over the clients that have it. Both formulas and
    the schedule are our reading. A client's first fit begins as the received model.

    Args:
        interpolation: :math:`\gamma` at the end of the rise, in [0, 1]. At 1 with ``rise=1`` and ``mu=0`` this is
            FedAvg, to the bit.
        mu: :math:`\mu` at the end of the rise, at least 0.
        rise: Rounds over which both rise, at least 1.
    """

    def __init__(self, interpolation: float = 0.5, mu: float = 0.01, rise: int = 10) -> None:
        within("interpolation", interpolation, "[0, 1]")
        at_least("mu", mu, 0)
        whole("rise", rise, 1)
        self.interpolation = interpolation
        self.mu = mu
        self.rise = rise

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        if not isinstance(module, KeptModels):
            raise TypeError(
                f"callbacks.{self.name} needs the module fl_lightning.methods.fedppa.KeptModels, got "
                f"{type(module).__name__}; set method=fedppa"
            )

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._risen = min(1.0, (broadcast.round + 1) / self.rise)
        self._names = list(broadcast.state)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_scaled_gradients(self, trainer)
        assert isinstance(pl_module, KeptModels)
        own = pl_module.state_dict()
        parameters = {name for name, _ in pl_module.named_parameters()}
        self._received = {name: own[name].clone() for name in self._names if name in parameters} if self.mu else {}
        weight = self.interpolation * self._risen
        if weight < 1 and pl_module.fits:
            for name in self._names:
                if own[name].is_floating_point():
                    own[name].copy_(torch.lerp(pl_module.last_tensor(name), own[name], weight))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.mu:
            pulled = [
                (name, p) for name, p in stepped(pl_module.named_parameters(), optimizer) if name in self._received
            ]
            add_pull(pulled, self._received, self.mu * self._risen)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = {}


def common_layers(one: State, other: State) -> set[str]:
    """Return the names of the tensors of those layers that two models have alike: all names and shapes of a layer."""
    alike = {name for name in one.keys() & other.keys() if one[name].shape == other[name].shape}
    unlike = {name.rpartition(".")[0] for name in (one.keys() | other.keys()) - alike}
    return {name for name in alike if name.rpartition(".")[0] not in unlike}


def flat(name: str) -> str:
    """Return the name of a buffer that stands for a tensor: torch allows no dots in it."""
    return name.replace(".", "_")
