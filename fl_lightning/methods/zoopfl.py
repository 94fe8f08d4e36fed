"""ZooPFL: a black box whose inputs and outputs are learnt to be changed, by zeroth-order estimates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fl_lightning.checks import above, whole
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule, with_value_of


class BlackBox(FederatedModule):
    r"""Changes the inputs of a frozen model by an auto-encoder, and its standardised outputs by a linear layer.

    Lu et al., ZooPFL: Exploring Black-box Foundation Models for Personalized Federated Learning, FL 2024 workshops,
    https://arxiv.org/abs/2310.05143. The model is only asked, never differentiated: the gradient of an example's loss
    by what the auto-encoder makes of it, :math:`\hat x`, is estimated as the mean over q Gaussian directions u of
    :math:`\frac{L(\hat x + \mu u) - L(\hat x - \mu u)}{2 \mu} u`, and goes on through the auto-encoder as usual. The
    auto-encoder is shared; an embedding, which is added to its code, the means and deviations by which outputs are
    standardised, and the linear layer are a client's own. First the auto-encoder learns to give back its inputs. The
    paper's equations could not be read: these are our reading of it.

    Args:
        model: The black box, as in :class:`FederatedModule`.
        num_classes: Outputs of the model.
        in_channels: Channels of an image.
        width: Channels of the auto-encoder's hidden layers, at least 1.
        code: Channels of its code, at least 1.
        directions: q, at least 1; the model is asked 2 q + 1 times for each example and step.
        mu: :math:`\mu`, above 0.
        pretraining: Fits of a client in which the auto-encoder learns to give back inputs, at least 0.
        label_smoothing: As there.
    """

    uses_all = True
    fits: Tensor

    def __init__(
        self,
        model: Model,
        num_classes: int,
        in_channels: int = 3,
        width: int = 16,
        code: int = 8,
        directions: int = 5,
        mu: float = 0.01,
        pretraining: int = 5,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing)
        for name, value in {"width": width, "code": code, "directions": directions}.items():
            whole(name, value, 1)
        whole("pretraining", pretraining, 0)
        above("mu", mu, 0)
        for part in (self.backbone, self.head):
            part.requires_grad_(False)
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, code, 3, padding=1)
        )
        self.embedding = nn.Parameter(torch.zeros(code, 1, 1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(code, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, in_channels, 1)
        )
        self.scale = nn.BatchNorm1d(num_classes, affine=False)
        self.remapping = nn.Linear(num_classes, num_classes)
        nn.init.eye_(self.remapping.weight)
        nn.init.zeros_(self.remapping.bias)
        self.register_buffer("fits", torch.tensor(0))
        self.directions = directions
        self.mu = mu
        self.pretraining = pretraining

    def changed(self, x: Tensor) -> Tensor:
        """Return what the auto-encoder makes of inputs (N, C, H, W), in their shape."""
        decoded = self.decoder(self.encoder(x) + self.embedding)
        return functional.interpolate(decoded, x.shape[2:]) if decoded.shape != x.shape else decoded

    @torch.no_grad()
    def ask(self, x: Tensor) -> Tensor:
        """Return the answers (N, C) of the black box, through which no gradient flows."""
        self.backbone.eval()
        answers: Tensor = self.head(self.backbone(x))
        return answers

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.remapped(self.ask(self.changed(x)), self.training)

    def remapped(self, answers: Tensor, learns: bool) -> Tensor:
        """Return logits (N, C) of answers; those of a batch, where it ``learns``, move the means and deviations."""
        self.scale.train(learns and len(answers) > 1)
        logits: Tensor = self.remapping(self.scale(answers))
        return logits

    @torch.no_grad()
    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the estimated gradient of each example's loss by its input, in the shape of the inputs."""
        found = torch.zeros_like(x)
        for _ in range(self.directions):
            u = torch.randn_like(x)
            ahead, behind = (self._losses(x + sign * self.mu * u, y) for sign in (1, -1))
            slope = (ahead - behind) / (2 * self.mu * self.directions)
            found += slope.reshape(-1, *[1] * (x.ndim - 1)) * u
        return found

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.remapped(self.ask(x), learns=False)
        return functional.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        changed = self.changed(x)
        of_task = self.criterion(self.remapped(self.ask(changed), learns=True), y)
        if self.fits < self.pretraining:
            return with_value_of(of_task, (changed - x).square().mean())
        return with_value_of(of_task, (changed * self.estimate(changed.detach(), y)).sum() / len(y))

    @override
    def on_train_end(self) -> None:
        self.fits += 1
