"""Editing gradients between the backward pass and the optimizer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from fl_lightning.callback import FederatedCallback
from fl_lightning.state import Layout, State


class GradientEdit(FederatedCallback, ABC):
    """A callback whose client half edits gradients number by number, so that it serves many clients in one pass.

    Where clients train side by side (``executor=cohort``), the parameters of K clients are the rows of one tensor. Each
    client then has a copy of the callback, whose ``on_client_start`` and ``on_client_end`` are called as ever, but with
    no client's tensors in the module; the methods here stand in the place of Lightning's hooks.
    """

    @abstractmethod
    def begin_rows(self, clients: Sequence[Self], start: State, layout: Layout) -> State:
        """Return the tensors that the edit needs, of shape (K, n) or (1, n) beside rows (K, n).

        Args:
            clients: The copies of this callback, one for each client.
            start: All tensors of the models as the fit began, (K, ...).
            layout: How the parameters that train lie in a row.
        """

    @abstractmethod
    def edit_rows(self, held: State, rows: Tensor, gradients: Tensor, alive: Tensor) -> None:
        """Edit gradients in place; every call must be the same operations on the same tensors.

        Args:
            held: What :meth:`begin_rows` gave.
            rows: The parameters, (K, n).
            gradients: Their gradients, (K, n).
            alive: 1 for clients that still train, 0 for the others, (K, 1).
        """

    def end_rows(self, clients: Sequence[Self], held: State, layout: Layout, steps: Sequence[int]) -> None:
        """Hand to each client's copy what it needs in ``on_client_end``; ``steps`` says how many each took."""


def stepped(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer
) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that the coming step moves: those with a gradient that belong to its optimizer.

    ``on_before_optimizer_step`` is called once for every optimizer, so an edit of all gradients would be made twice.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, p) for name, p in named_parameters if p.grad is not None and id(p) in own]


def add_pull(named_parameters: Iterable[tuple[str, Tensor]], anchors: Mapping[str, Tensor], weight: float) -> None:
    r"""Add the gradient of :math:`\frac{\mu}{2}\lVert w - a \rVert^2` to the gradients of some parameters.

    Args:
        named_parameters: The parameters w. One without a gradient takes no part in a step, and stays out.
        anchors: The tensors a, by the same names.
        weight: :math:`\mu`.
    """
    parameters: list[Tensor] = []
    targets: list[Tensor] = []
    gradients: list[Tensor] = []
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            parameters.append(parameter)
            targets.append(anchors[name])
            gradients.append(parameter.grad)
    if gradients:
        with torch.no_grad():
            torch._foreach_add_(gradients, torch._foreach_sub(parameters, targets), alpha=weight)


def refuse_scaled_gradients(callback: Any, trainer: Trainer) -> None:
    """Refuse optimizers that unscale gradients themselves, for callbacks that edit gradients."""
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers):
        raise TypeError(
            f"{type(callback).__name__} edits gradients, but this fused optimizer unscales them only within its step; "
            "set optimizer.fused=false, or trainer.precision=bf16-mixed"
        )
