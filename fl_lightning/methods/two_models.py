"""A second model at each client, beside the global one."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from typing_extensions import override

from fl_lightning.models.model import Model
from fl_lightning.module import FederatedModule
from fl_lightning.state import State


class TwoModels(FederatedModule):
    """Holds a second model, named ``personal.*``: a copy of the whole global one, unless another is given.

    One optimizer trains both. What must not couple them is kept apart: a gradient of either reaches that one alone,
    and clipping measures each by itself. In the configuration, ``sharing.personal`` keeps the copy at the client.

    Args:
        model: As in :class:`FederatedModule`.
        label_smoothing: As there.
        personal: The second model; None: a copy, which also takes the weights that the global one starts from.
    """

    def __init__(self, model: Model, label_smoothing: float = 0.0, personal: nn.Module | None = None) -> None:
        super().__init__(model, label_smoothing)
        self.is_copy = personal is None
        if personal is None:
            parts = OrderedDict(backbone=copy.deepcopy(model.backbone), head=copy.deepcopy(model.head))
            personal = nn.Sequential(parts)
        self.personal = personal

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.personal(x)
        return logits

    def second_parts(self) -> list[nn.Module]:
        """Return the modules that hold the second model's parameters."""
        return [self.personal]

    @override
    def start_from(self, state: State) -> None:
        super().start_from(state)
        if self.is_copy:
            self.personal.load_state_dict(state)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if not gradient_clip_val:
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for parts in ([self.backbone, self.head], self.second_parts()):
            clip([p for part in parts for p in part.parameters()], gradient_clip_val)
