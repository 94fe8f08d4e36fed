from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from fl_lightning.evaluation.distortion import mean_distance, weight_norm


def test_mean_distance_equals_scipy() -> None:
    first, second = torch.randn(6, 3), torch.randn(6, 3)
    assert mean_distance(first, second) == pytest.approx(cdist(first, second).diagonal().mean(), rel=1e-6)
    assert mean_distance(first, first) == 0
    assert math.isnan(mean_distance(torch.empty(0), torch.empty(0)))
    with pytest.raises(ValueError, match=r"same shape, got \(6, 3\) and \(5, 3\)"):
        mean_distance(first, second[:5])


def test_weight_norm_leaves_biases_out() -> None:
    head = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    weights = torch.cat([head[0].weight.flatten(), head[1].weight.flatten()])
    assert weight_norm(head.named_parameters()) == pytest.approx(weights.norm().item())
    assert weight_norm({"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.ones(1)}) == 5
    with pytest.raises(ValueError, match="at least one weight matrix"):
        weight_norm({"bias": torch.ones(1)})
