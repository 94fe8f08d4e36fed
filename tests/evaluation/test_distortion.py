from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from fl_lightning.evaluation.distortion import FeatureDistortion, mean_distance, weight_norm


class FakeData:
    num_classes = 3
    eval_batch_size = 8

    def __init__(self, seed: int, num_test: int) -> None:
        self.x = torch.randn(num_test, 4, generator=torch.Generator().manual_seed(seed))

    def test_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return [(x, torch.zeros(len(x), dtype=torch.long)) for x in self.x.split(3)]

    def val_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return []


DATAS = [FakeData(0, 5), FakeData(1, 2), FakeData(2, 0)]


def test_mean_distance_equals_scipy() -> None:
    first, second = torch.randn(6, 3), torch.randn(6, 3)
    assert mean_distance(first, second) == pytest.approx(cdist(first, second).diagonal().mean(), rel=1e-6)
    assert mean_distance(first, first) == 0
    assert math.isnan(mean_distance(torch.empty(0), torch.empty(0)))
    with pytest.raises(ValueError, match=r"same shape, but got \(6, 3\) and \(5, 3\)"):
        mean_distance(first, second[:5])


def test_a_shift_of_the_features_is_measured_exactly() -> None:
    """A layer whose output is moved by (3, 4) moves each feature by 5, whatever the data."""
    module = nn.Linear(4, 2)
    distortion = FeatureDistortion(module.forward, DATAS)
    assert distortion.own(module.forward, 0) == 0
    assert distortion.everyone(module.forward) == 0
    with torch.no_grad():
        module.bias += torch.tensor([3.0, 4.0])
    assert distortion.own(module.forward, 0) == pytest.approx(5, rel=1e-6)
    assert distortion.everyone(module.forward) == pytest.approx(5, rel=1e-6)
    assert math.isnan(distortion.own(module.forward, 2))


def test_own_and_everyone_use_other_data() -> None:
    distortion = FeatureDistortion(lambda x: x, DATAS)
    own = [distortion.own(lambda x: 3 * x, client) for client in (0, 1)]
    expected = [2 * DATAS[client].x.norm(dim=1).mean().item() for client in (0, 1)]
    assert own == pytest.approx(expected)
    assert own[0] != pytest.approx(own[1])
    assert distortion.everyone(lambda x: 3 * x) == pytest.approx((5 * own[0] + 2 * own[1]) / 7)


def test_features_are_taken_in_eval_mode() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    distortion = FeatureDistortion(module, DATAS)
    assert distortion.own(module, 0) == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weight_norm_leaves_biases_out() -> None:
    head = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    weights = torch.cat([head[0].weight.flatten(), head[1].weight.flatten()])
    assert weight_norm(head.named_parameters()) == pytest.approx(weights.norm().item())
    assert weight_norm({"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.ones(1)}) == 5
    with pytest.raises(ValueError, match="at least one weight matrix"):
        weight_norm({"bias": torch.ones(1)})
