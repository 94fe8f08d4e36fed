"""PAC-PFL: priors as particles, which the server moves by Stein variational gradient descent."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from fl_lightning.aggregators import Aggregator
from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import above, at_least, whole
from fl_lightning.client import Update
from fl_lightning.evaluation.predict import batches_of
from fl_lightning.fit.gradients import refuse_scaled_gradients
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule
from fl_lightning.state import State, with_prefix, without_prefix

if TYPE_CHECKING:
    from fl_lightning.client import Client

PREFIX = "gradient|"


class PriorParticles(FederatedModule):
    r"""Holds k networks :math:`\phi_1 \dots \phi_k`, each a prior; a client weighs them by how they explain its data.

    Boroujeni, Krause, Ferrari-Trecate, Personalized Federated Learning of Probabilistic Models: A PAC-Bayesian
    Approach, TMLR 2025, https://arxiv.org/abs/2401.08351. The weights are a softmax of :math:`n \cdot
    \mathrm{mll}(\phi_j)` over a client's n training examples, and predictions the mixture of the particles' by them;
    the global model mixes them alike. Here a prior is a point, so that the marginal likelihood is the likelihood.
    Outputs are logarithms of mixed probabilities.

    Args:
        model: The first particle, as in :class:`FederatedModule`; the others have weights drawn anew.
        particles: k, at least 1.
        label_smoothing: As there.
    """

    uses_all = True

    def __init__(self, model: Model, particles: int = 4, label_smoothing: float = 0.0) -> None:
        super().__init__(model, label_smoothing)
        whole("particles", particles, 1)
        parts = OrderedDict(backbone=model.backbone, head=model.head)
        self.others = nn.ModuleList(nn.Sequential(copy.deepcopy(parts)) for _ in range(particles - 1))
        for part in self.others.modules():
            reset: Any = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
        self._data: Any = None
        self._weights: Tensor | None = None

    @override
    def for_client(self, client: Client) -> None:
        self._data, self._weights = client.data if self.context.optimizer is None else None, None

    def outputs(self, x: Tensor) -> Tensor:
        """Return the logits (k, N, C) of all particles."""
        return torch.stack([self.head(self.features(x)), *(other(x) for other in self.others)])

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the logarithm of the probabilities (N, C), mixed by weights (k,)."""
        return torch.logsumexp(self.outputs(x).log_softmax(2) + weights.log()[:, None, None], dim=0)

    @override
    def forward(self, x: Tensor) -> Tensor:
        number = 1 + len(self.others)
        mixed: Tensor = self.mixed(x, torch.full((number,), 1 / number, device=x.device))
        return mixed

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        if self._data is None:
            return self.forward(x)
        if self._weights is None:
            self._weights = self.posterior(self._data, x.device)
        return self.mixed(x, self._weights)

    def posterior(self, data: Any, device: torch.device) -> Tensor:
        """Return a client's weights (k,) of the particles."""
        found = torch.zeros(1 + len(self.others), dtype=torch.float64, device=device)
        for x, y in batches_of(data, "train"):
            found -= torch.stack([self.task.loss_sum(one, y.to(device)) for one in self.outputs(x.to(device))]).double()
        return found.softmax(0).float()

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return torch.stack([self.criterion(one, y) for one in self.outputs(x)]).sum()


class GradientUpload(FederatedCallback):
    """Sends the gradient of the loss over a client's training examples in the place of its parameters.

    The client's optimizer takes no step. Where a fit has several epochs, the gradient is their mean.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_scaled_gradients(self, trainer)
        self._sums: dict[str, Tensor] = {}
        self._examples = 0
        self._size = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._size = len(batch[1])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                term = self._size * parameter.grad
                self._sums[name] = self._sums[name] + term if name in self._sums else term
                parameter.grad = None
        self._examples += self._size

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        gradient = {name: (total / self._examples).cpu() for name, total in self._sums.items() if name in update.state}
        for name in gradient:
            del update.state[name]
        update.extra.update(with_prefix(PREFIX, gradient))
        assert isinstance(module, PriorParticles)
        update.metrics["train_loss"] = update.metrics.get("train_loss", math.nan) / (1 + len(module.others))
        self._sums = {}


class SteinDescent(Aggregator):
    r"""Moves particles to a hyper-posterior by Stein variational gradient descent, with Adam.

    Liu, Wang, Stein Variational Gradient Descent, NeurIPS 2016, https://arxiv.org/abs/1608.04471, as PAC-PFL has it
    (see :class:`PriorParticles`): :math:`\hat\varphi_i = \frac{1}{k} \sum_j [\kappa(\phi_j, \phi_i) \nabla \log
    p(\phi_j) + \nabla_{\phi_j} \kappa(\phi_j, \phi_i)]`, with the Gaussian kernel of width h, :math:`2 h^2 =
    \mathrm{median}(\lVert \phi_i - \phi_j \rVert^2) / \log(k + 1)`, and :math:`\log p(\phi) = \lambda \log N(\phi; 0,
    s^2) + \frac{\bar n}{\bar n + C} \sum_c \mathrm{mll}_c(\phi)`, where :math:`\bar n` is the harmonic mean of the
    sizes of the C clients and mll a mean over examples. A sum over a part of the clients is scaled up. Buffers are
    averaged.

    Args:
        lr: Step size of Adam, above 0.
        prior_factor: :math:`\lambda`, at least 0.
        prior_std: s, above 0.
        weights: Of buffers, as in :class:`Aggregator`.
    """

    saved = ("mean", "square", "steps")

    def __init__(
        self, lr: float = 0.003, prior_factor: float = 0.001, prior_std: float = 1.0, weights: Any = "examples"
    ) -> None:
        super().__init__(weights)
        above("lr", lr, 0)
        at_least("prior_factor", prior_factor, 0)
        above("prior_std", prior_std, 0)
        self.lr = lr
        self.prior_factor = prior_factor
        self.prior_std = prior_std
        self.mean: Tensor = torch.zeros(())
        self.square: Tensor = torch.zeros(())
        self.steps = 0

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        total: State = {}
        buffers: list[Update] = []
        for update in updates:
            for name, slope in without_prefix(PREFIX, update.extra).items():
                total[name] = total[name] - slope if name in total else -slope
            buffers.append(update)
        merged = super().aggregate(state, buffers)
        if not total:
            return merged
        count = len(self.clients)
        harmonic = count / sum(1 / max(1, client.num_train) for client in self.clients)
        factor = harmonic / (harmonic + count) * count / len(buffers)
        names = [[name for name in total if not name.startswith("others.")]]
        while own := [name for name in total if name.startswith(f"others.{len(names) - 1}.")]:
            names.append(own)
        points = torch.stack([torch.cat([state[name].flatten() for name in own]) for own in names])
        slopes = factor * torch.stack([torch.cat([total[name].flatten() for name in own]) for own in names])
        direction = stein(points, slopes - self.prior_factor / self.prior_std**2 * points)
        for point, own in zip(points + self.lr * self._adam(direction), names, strict=True):
            sizes = [state[name].numel() for name in own]
            merged.update({n: x.reshape(state[n].shape).clone() for n, x in zip(own, point.split(sizes), strict=True)})
        return merged

    def _adam(self, direction: Tensor) -> Tensor:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * direction
        self.square = 0.999 * self.square + 0.001 * direction.square()
        root = (self.square / (1 - 0.999**self.steps)).sqrt()
        return self.mean / (1 - 0.9**self.steps) / (root + 1e-8)


def stein(points: Tensor, slopes: Tensor) -> Tensor:
    """Return the direction (k, D) in which particles (k, D) move, given the gradients (k, D) of their log density."""
    squares = torch.stack([(points - point).square().sum(1) for point in points])
    width = squares.flatten().quantile(0.5) / math.log(len(points) + 1)  # twice that of the Gaussian, squared
    if not width > 0:
        return slopes.mean(0, keepdim=True).expand_as(slopes)
    kernel = (-squares / width).exp()
    away = 2 / width * (kernel.sum(1, keepdim=True) * points - kernel @ points)  # of the kernel's first argument
    return (kernel @ slopes + away) / len(points)
