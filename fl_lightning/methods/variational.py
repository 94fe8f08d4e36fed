"""VIRTUAL: the server and its clients as a Bayesian network, each fit an approximate posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from typing_extensions import override

from fl_lightning.aggregators import Aggregator, Weights
from fl_lightning.callback import FederatedCallback
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule, with_value_of
from fl_lightning.state import State

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, Update

PREFIX = "log_std."
MEMORY = "factor|"
Gaussian = dict[str, tuple[Tensor, Tensor]]


class VariationalModule(FederatedModule):
    r"""A mean-field Gaussian over the backbone's parameters; the head is a point.

    Corinzia, Beuret, Buhmann, Variational Federated Multi-Task Learning, 2019, https://arxiv.org/abs/1906.06268. Read
    from its abstract, as expectation propagation: a client minimises :math:`E_q[\text{cross-entropy}] + \frac{\beta}{n}
    \mathrm{KL}(q \,\Vert\, s / t_i)`, where :math:`s` is the server's Gaussian and :math:`t_i` what the client has
    added to it so far, with one sample per batch. Predictions use the means.

    Args:
        model: As in :class:`FederatedModule`.
        optimizer: As there.
        scheduler: As there.
        label_smoothing: As there.
        std: Standard deviation of every parameter at the start, above 0.
        kl_weight: beta, at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        label_smoothing: float = 0.0,
        std: float = 0.02,
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__(model, optimizer, scheduler, label_smoothing)
        if not std > 0:
            raise ValueError(f"module.std must be above 0, got {std}")
        if not kl_weight >= 0:
            raise ValueError(f"module.kl_weight must be at least 0, got {kl_weight}")
        names = [f"backbone.{name}" for name, _ in self.backbone.named_parameters()]
        # Names of modules may hold no dots.
        logs = {_key(name): torch.full_like(self.get_parameter(name), std).log() for name in names}
        self.log_std = nn.ParameterDict({key: nn.Parameter(log) for key, log in logs.items()})
        self.kl_weight = kl_weight
        self.num_examples = 1
        self.prior: Gaussian = {}

    def gaussian(self) -> Gaussian:
        """Return mean and logarithm of the standard deviation of each random parameter."""
        pairs = ((f"backbone.{name}", mean) for name, mean in self.backbone.named_parameters())
        return {name: (mean, self.log_std[_key(name)]) for name, mean in pairs}

    @override
    def on_train_start(self) -> None:
        self.prior = {name: (m.to(self.device), s.to(self.device)) for name, (m, s) in self.prior.items()}

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        q = self.gaussian()
        sample = {name: mean + log.exp() * torch.randn_like(mean) for name, (mean, log) in q.items()}
        task = functional.cross_entropy(functional_call(self, sample, (x,)), y, label_smoothing=self.label_smoothing)
        divergences = [kl(*q[name], *prior) for name, prior in self.prior.items()]
        return with_value_of(task, *(self.kl_weight / self.num_examples * divergence for divergence in divergences))


class ProductOfExperts(Aggregator):
    r"""Multiplies what the clients add into the server's Gaussian: :math:`s \prod_i (q_i / s)^\gamma`.

    Natural parameters are added up. A precision falls to no less than a hundredth of what it was.

    Args:
        damping: gamma, in (0, 1]; one over the number of clients of a round makes this the mean of natural parameters.
        weights: As in :class:`Aggregator`, for tensors without a standard deviation.
    """

    def __init__(self, damping: float = 0.1, weights: Weights = "examples") -> None:
        super().__init__(weights)
        if not 0 < damping <= 1:
            raise ValueError(f"aggregator.damping must lie in (0, 1], got {damping}")
        self.damping = damping

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        received = list(updates)
        merged = super().aggregate(state, received)
        for name, log in random_parts(state).items():
            old_precision, old_shift = precision, shift = natural(state[name], state[log])
            for update in received:
                new_precision, new_shift = natural(update.state[name], update.state[log])
                precision = precision + self.damping * (new_precision - old_precision)
                shift = shift + self.damping * (new_shift - old_shift)
            merged[name], merged[log] = moments(precision, shift, floor=0.01 * old_precision)
        return merged


class ClientFactors(FederatedCallback):
    """Remembers at each client what it has added to the server's Gaussian, and takes it out of the prior of its fit.

    Args:
        damping: As in :class:`ProductOfExperts`.
    """

    def __init__(self, damping: float = 0.1) -> None:
        self.damping = damping

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        assert isinstance(module, VariationalModule)
        module.num_examples = max(1, client.num_examples)
        module.prior = {}
        self._server: Gaussian = {}
        for name, log in random_parts(broadcast.state).items():
            self._server[name] = precision, shift = natural(broadcast.state[name], broadcast.state[log])
            own = client.memory.get(MEMORY + log, 0 * precision), client.memory.get(MEMORY + name, 0 * shift)
            module.prior[name] = moments(precision - own[0], shift - own[1], floor=0.01 * precision)

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        for name, log in random_parts(update.state).items():
            q = natural(update.state[name], update.state[log])
            for key, new, old in zip((MEMORY + log, MEMORY + name), q, self._server[name], strict=True):
                client.memory[key] = client.memory.get(key, 0 * new) + self.damping * (new - old)


def _key(name: str) -> str:
    return name.replace(".", "/")


def random_parts(state: State) -> dict[str, str]:
    """Return the name of each mean in a state with the name of its logarithm of the standard deviation."""
    logs = [name for name in state if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX).replace("/", "."): name for name in logs}


def natural(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return precision, and precision times mean."""
    precision = (-2 * log_std).exp()
    return precision, precision * mean


def moments(precision: Tensor, shift: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and logarithm of the standard deviation; a precision below the floor is raised to it."""
    precision = torch.maximum(precision, floor)
    return shift / precision, -0.5 * precision.log()


def kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_log_std: Tensor) -> Tensor:
    """Return the divergence of one Gaussian with independent parts from another, a scalar."""
    ratio = (2 * (log_std - prior_log_std)).exp()
    distance = ((mean - prior_mean) * (-prior_log_std).exp()).square()
    return 0.5 * (ratio + distance - 1 - 2 * (log_std - prior_log_std)).sum()
