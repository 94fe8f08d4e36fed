"""FedDPA: a global and a local adapter at every client, mixed for each example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fl_lightning.checks import whole, within
from fl_lightning.client import Client
from fl_lightning.methods.low_rank_merging import need_adapters
from fl_lightning.models.adapters import ADAPTER, LOCAL, Adapters
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule, with_value_of
from fl_lightning.state import State
from fl_lightning.task import Task


class _Mixture:
    """Sets what each layer multiplies its two adapters by, before the layer runs."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.shares: tuple[float | Tensor, float | Tensor] = (1.0, 0.0)  # of the global, of the local adapter

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        for name, share in zip((ADAPTER, LOCAL), self.shares, strict=True):
            if isinstance(share, Tensor):  # (N,); windows of an image come as several rows each
                share = share.repeat_interleave(len(inputs[0]) // len(share))
                share = share.view(-1, *[1] * (inputs[0].ndim - 1))
            layer.scaling[name] = self.scale * share


class DualAdapters(FederatedModule):
    r"""A global adapter, which is averaged, and a local one, which stays; a client uses both.

    Yang, Long, Shen, Jiang, Blumenstein, Dual-Personalizing Adapter for Federated Foundation Models, NeurIPS 2024,
    https://arxiv.org/abs/2403.19211. The personal model adds :math:`(1 - w) \Delta_{global} + w \Delta_{local}` to each
    adapted layer, with :math:`w(x) = \alpha \, \mathrm{mean}_j \cos(f(x), f(x_j))` over a few of the client's training
    examples and f the features under the local adapter alone (of sequences, those of the last token), as in the
    authors' code. There, the two are trained one after the other; here both on every batch: the global one by itself,
    the local one in the mixture with :math:`w = \alpha`, in which the global one and the head stand still.

    Args:
        model: With adapters in its backbone (``model.adapters``).
        label_smoothing: As in :class:`~fl_lightning.module.FederatedModule`.
        task: The same.
        alpha: Largest weight of the local adapter, in [0, 1]; at 0 this is FedIT.
        instances: Training examples that an example is compared with, at least 1.
    """

    def __init__(
        self,
        model: Model,
        label_smoothing: float = 0.0,
        task: Task | None = None,
        alpha: float = 0.5,
        instances: int = 5,
    ) -> None:
        super().__init__(model, label_smoothing, task)
        within("alpha", alpha, "[0, 1]")
        whole("instances", instances, 1)
        self.alpha = alpha
        self.instances = instances
        layers = need_adapters(self)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        rank = self.get_parameter(layers[0].a).shape[0]
        names = [layer.name.removeprefix("backbone.") for layer in layers]
        Adapters(rank, layers[0].scale * rank, targets=names).inject(self.backbone, LOCAL)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained or f".{LOCAL}." in name)
        self._mixture = _Mixture(layers[0].scale)
        self._layers: list[Any] = [self.get_submodule(layer.name) for layer in layers]
        for layer in self._layers:
            layer.set_adapter([ADAPTER, LOCAL])
            layer.register_forward_pre_hook(self._mixture)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained or f".{LOCAL}." in name)
        self._client: Client | None = None
        with self._shares(1.0, 0.0):
            pass

    @contextmanager
    def _shares(self, of_global: float | Tensor, of_local: float | Tensor) -> Iterator[None]:
        """Use the adapters in these shares, and the global one alone afterwards."""
        self._mixture.shares = (of_global, of_local)
        try:
            yield
        finally:
            self._mixture.shares = (1.0, 0.0)
            for layer in self._layers:
                layer.scaling.update({ADAPTER: self._mixture.scale, LOCAL: 0.0})

    @property
    @override
    def global_names(self) -> list[str]:
        return [name for name in super().global_names if f".{LOCAL}." not in name]

    @override
    def start_from(self, state: State) -> None:
        super().start_from({name: tensor for name, tensor in state.items() if f".{LOCAL}." not in name})

    @override
    def for_client(self, client: Client) -> None:
        self._client = client

    def weights(self, x: Tensor) -> Tensor:
        """Return the local adapter's weight for each of the inputs ``(N, ...)``: (N,)."""
        assert self._client is not None
        known = next(iter(self._client.data.eval_dataloader("train")))[0][: self.instances].to(x.device)
        with torch.no_grad(), self._shares(0.0, 1.0):
            own, others = (_pooled(self.features(part)) for part in (x, known))
        similarity = functional.cosine_similarity(own[:, None], others[None], dim=-1)
        return self.alpha * similarity.mean(1)

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        weights = self.alpha if self._client is None else self.weights(x)
        with self._shares(1.0 - weights, weights):
            logits: Tensor = self(x)
        return logits

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        shown = super().loss(batch)
        still = [p for n, p in self.named_parameters() if p.requires_grad and f".{LOCAL}." not in n]
        for parameter in still:
            parameter.requires_grad_(False)
        try:
            with self._shares(1.0 - self.alpha, self.alpha):
                hidden = self.criterion(self(x), y)
        finally:
            for parameter in still:
                parameter.requires_grad_(True)
        return with_value_of(shown, hidden)


def _pooled(features: Tensor) -> Tensor:
    """Return features (N, D): of sequences (N, T, D), those of the last token."""
    return (features[:, -1] if features.ndim == 3 else features).flatten(1)
