r"""How far fine-tuning moves the features that the global model had learned.

Chen, Ghoukasian, Jin, Wang, Karimireddy, Li, A Closer Look at Personalized Fine-Tuning in Heterogeneous Federated
Learning, 2025, https://arxiv.org/abs/2511.12695, section 3.5: with the features :math:`f(\theta; x)` before the head,

.. math:: \Delta_c = \frac1n \sum_j \lVert f(\theta_G; x_{c,j}) - f(\theta_c; x_{c,j}) \rVert_2,

reported as the mean over clients *c*. The formula runs over the client's own data; the words beside it speak of all
data points of all clients. Both are here. Features are taken in eval mode, which the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def mean_distance(first: Tensor, second: Tensor) -> float:
    """Mean l2 distance between the features of the same examples in two models.

    Args:
        first: Features (n, D) or (n, ...).
        second: Features of the same examples in the same order.

    Returns:
        At least 0; 0 if and only if the features are the same; NaN without examples.
    """
    if first.shape != second.shape:
        raise ValueError(f"features must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    difference = (first - second.to(first.device)).flatten(1) if first.ndim > 1 else first[:, None] - second[:, None]
    return float(torch.linalg.vector_norm(difference, dim=1).mean())


def weight_norm(tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> float:
    """Frobenius norm of all weight matrices together, without biases and other vectors.

    Of the head it tells how linear probing leads to smaller feature changes afterwards, at a price in calibration:
    Tomihari, Sato, Understanding Linear Probing then Fine-tuning Language Models from NTK Perspective, NeurIPS 2024,
    https://arxiv.org/abs/2405.16747.

    Args:
        tensors: Names and tensors, such as ``module.head.named_parameters()`` or a state.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    squares = [tensor.detach().double().square().sum() for _, tensor in pairs if tensor.ndim >= 2]
    if not squares:
        raise ValueError("the state must hold at least one weight matrix, got none; it may be no head")
    return float(torch.stack(squares).sum().sqrt())
