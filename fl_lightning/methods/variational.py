"""VIRTUAL: the server and its clients as a Bayesian network, each fit an approximate posterior."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from fl_lightning.aggregators import Aggregator, Weights
from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import above, at_least, within
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule, with_value_of
from fl_lightning.state import State, without_prefix

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, Update

MEMORY = "factor|"
# A product of experts may leave a precision of zero or less, which no Gaussian has.
LEAST_SHARE = 0.01


class VariationalModule(FederatedModule):
    r"""A mean-field Gaussian over the backbone's parameters; the head is a point.

    Corinzia, Beuret, Buhmann, Variational Federated Multi-Task Learning, 2019, https://arxiv.org/abs/1906.06268. Read
    from its abstract, as expectation propagation: a client minimises :math:`E_q[\text{cross-entropy}] + \frac{\beta}{n}
    \mathrm{KL}(q \,\Vert\, s / t_i)`, where :math:`s` is the server's Gaussian and :math:`t_i` what the client has
    added to it so far, with one sample per batch. Predictions use the means.

    Args:
        model: As in :class:`FederatedModule`.
        std: Standard deviation of every parameter at the start, above 0.
        kl_weight: beta, at least 0.
        label_smoothing: As there.
    """

    def __init__(
        self,
        model: Model,
        std: float = 0.02,
        kl_weight: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing)
        above("std", std, 0)
        at_least("kl_weight", kl_weight, 0)
        logs = {f"backbone.{name}": torch.full_like(p, std).log() for name, p in self.backbone.named_parameters()}
        self.log_std = nn.ParameterDict({_key(name): nn.Parameter(log) for name, log in logs.items()})
        self.kl_weight = kl_weight
        self.num_examples = 1
        self.prior: State = {}

    @override
    def on_train_start(self) -> None:
        self.prior = {name: tensor.to(self.device) for name, tensor in self.prior.items()}

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        q, prior = dict(self.named_parameters()), self.prior
        parts = random_parts(q)
        sample = {name: q[name] + q[log].exp() * torch.randn_like(q[name]) for name, log in parts.items()}
        task = self.criterion(functional_call(self, sample, (x,)), y)
        weight = self.kl_weight / self.num_examples
        return with_value_of(
            task,
            *(weight * kl(q[name], q[log], prior[name], prior[log]) for name, log in parts.items() if name in prior),
        )


class ProductOfExperts(Aggregator):
    r"""Multiplies what the clients add into the server's Gaussian: :math:`s \prod_i (q_i / s)^\gamma`.

    Natural parameters are added up. In one round a precision falls to no less than a hundredth of what it was.

    Args:
        damping: gamma, in (0, 1]; one over the number of clients of a round makes this the mean of natural parameters.
        weights: As in :class:`Aggregator`, for tensors without a standard deviation.
    """

    def __init__(self, damping: float = 0.1, weights: Weights = "examples") -> None:
        super().__init__(weights)
        within("damping", damping, "(0, 1]")
        self.damping = damping

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        received = list(updates)
        if not received:
            return dict(state)
        before = natural(state)
        product = dict(before)
        for update in received:
            for name, tensor in natural(update.state).items():
                product[name] = product[name] + self.damping * (tensor - before[name])
        return {**super().aggregate(state, received), **moments(product, before)}


class ClientFactors(FederatedCallback):
    """Remembers at each client what it has added to the server's Gaussian, and takes it out of the prior of its fit.

    Args:
        damping: As in :class:`ProductOfExperts`.
    """

    def __init__(self, damping: float = 0.1) -> None:
        within("damping", damping, "(0, 1]")
        self.damping = damping

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        assert isinstance(module, VariationalModule)
        module.num_examples = max(1, client.num_examples)
        self._server = natural(broadcast.state)
        own = without_prefix(MEMORY, client.memory)
        others = {name: tensor - own[name] if own else tensor for name, tensor in self._server.items()}
        module.prior = moments(others, self._server)

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        own = without_prefix(MEMORY, client.memory)
        for name, tensor in natural(update.state).items():
            added = self.damping * (tensor - self._server[name])
            client.memory[MEMORY + name] = own[name] + added if own else added


def _key(name: str) -> str:
    """Return a parameter's name as a key of a ``ParameterDict``, which may hold no dots."""
    return name.replace(".", "/")


def random_parts(names: Iterable[str]) -> dict[str, str]:
    """Return, for each mean among some names, the name of the logarithm of its standard deviation."""
    names = list(names)
    logs = ((name, f"log_std.{_key(name)}") for name in names)
    return {name: log for name, log in logs if log in names}


def natural(state: State) -> State:
    """Return natural parameters of the random parts of a state; products of Gaussians are sums of them.

    The precision stands under the name of the logarithm of the standard deviation, precision times mean under that of
    the mean.
    """
    found = {}
    for name, log in random_parts(state).items():
        found[log] = (-2 * state[log]).exp()
        found[name] = found[log] * state[name]
    return found


def moments(parameters: State, before: State) -> State:
    """Return means and logarithms of standard deviations, the inverse of :func:`natural`.

    Args:
        parameters: Natural parameters.
        before: Others, of whose precision each part keeps at least a hundredth.
    """
    found = {}
    for name, log in random_parts(parameters).items():
        precision = torch.maximum(parameters[log], LEAST_SHARE * before[log])
        found[name], found[log] = parameters[name] / precision, -0.5 * precision.log()
    return found


def kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_log_std: Tensor) -> Tensor:
    """Return the divergence of one Gaussian with independent parts from another, a scalar."""
    ratio = (2 * (log_std - prior_log_std)).exp()
    distance = ((mean - prior_mean) * (-prior_log_std).exp()).square()
    return 0.5 * (ratio + distance - 1 - 2 * (log_std - prior_log_std)).sum()
