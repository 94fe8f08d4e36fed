"""Fed-Influence against its recursion written by hand, and against training without a client."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_lightning.callbacks.attacks import LabelNoise
from fl_lightning.methods.fed_influence import InfluenceEstimate
from fl_lightning.models.model import Model
from fl_lightning.run.training import Federation
from fl_lightning.seeding import derive_seed
from tests.federations import assert_same, federation

LINEAR = ["method=fed_influence", "model._target_=tests.methods.test_fed_influence.linear"]


def linear(num_classes: int, in_channels: int = 3, image_size: int = 8) -> Model:
    """Logistic regression on pooled images: a convex loss."""
    pooled = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten()))
    return Model(pooled, nn.Linear(4 * in_channels, num_classes), "head")


def trained(tiny_root: Path, folder: Path, *overrides: str) -> Federation:
    run = federation(tiny_root, folder, *LINEAR, *overrides)
    run.fit()
    return run


def test_two_rounds_by_hand(tiny_root: Path, tmp_path: Path) -> None:
    """Against dense matrices, with cohorts of two of three clients."""
    lr, samples = 0.2, 2
    settings = [f"optimizer.lr={lr}", f"callbacks.influence.samples={samples}", "callbacks.influence.truncate=false"]
    run = trained(tiny_root, tmp_path, *settings, "cohort.number=2", "seed=2", "loop.rounds=3")
    net = copy.deepcopy(run.module).double()
    names = [name for name, _ in net.named_parameters()]

    def flat(tensors: Any) -> torch.Tensor:
        return torch.cat([t.detach().double().flatten() for t in tensors])

    def put(vector: torch.Tensor) -> None:
        sizes = [p.numel() for p in net.parameters()]
        for p, part in zip(net.parameters(), vector.split(sizes), strict=True):
            p.data.copy_(part.view_as(p))

    w = flat(run.loop.initial[name] for name in names)
    epsilon = {client.id: torch.zeros_like(w) for client in run.clients}
    seen = set()
    for round in range(3):
        cohort = run.loop.cohort.draw(run.loop.clients, round, run.loop.seed)
        ends, products, counts = {}, {}, {}
        for info in cohort:
            seen.add(info.id)
            data = run.clients[info.id].data
            data.seed(derive_seed(run.loop.seed, "batches", round, info.id))
            put(w)
            product = torch.eye(len(w), dtype=torch.float64)
            for x, y in data.train_dataloader():
                fisher = torch.zeros(len(w), len(w), dtype=torch.float64)
                for i in range(samples):
                    one = functional.cross_entropy(net(x[i : i + 1].double()), y[i : i + 1])
                    g = flat(torch.autograd.grad(one, list(net.parameters())))
                    fisher += torch.outer(g, g) / samples
                product = (torch.eye(len(w), dtype=torch.float64) - lr * fisher) @ product
                slope = flat(torch.autograd.grad(functional.cross_entropy(net(x.double()), y), list(net.parameters())))
                put(flat(net.parameters()) - lr * slope)
            ends[info.id], products[info.id], counts[info.id] = flat(net.parameters()), product, info.num_train
        w = sum(counts[k] * ends[k] for k in ends) / sum(counts.values())
        for c in epsilon:
            rest = [k for k in ends if k != c]
            total = sum(counts[k] for k in rest)
            moved = sum(counts[k] * products[k] @ epsilon[c] for k in rest) / total
            epsilon[c] = moved + sum(counts[k] * ends[k] for k in rest) / total - w
    method: Any = run.loop.callbacks["influence"]
    for c, expected in epsilon.items():
        torch.testing.assert_close(flat(method.influence[c][name] for name in names), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3


def test_after_one_round_the_estimate_is_retraining(tiny_root: Path, tmp_path: Path) -> None:
    run = trained(tiny_root, tmp_path / "all", "loop.rounds=1")
    method: Any = run.loop.callbacks["influence"]
    for client in run.clients:
        rest = trained(tiny_root, tmp_path / client.name, "loop.rounds=1", f"cohort.without=[{client.name}]")
        for name, change in method.influence[client.id].items():
            torch.testing.assert_close(run.loop.state[name] + change, rest.loop.state[name], rtol=1e-4, atol=1e-6)


@pytest.mark.every
def test_estimates_follow_retraining_on_a_convex_model(tiny_root: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ["loop.rounds=6", "optimizer.lr=0.05", "callbacks.influence.samples=8"]
    run = trained(tiny_root, tmp_path / "all", *settings)
    method: Any = run.loop.callbacks["influence"]
    estimated, true = [], []
    for client in run.clients:
        rest = trained(tiny_root, tmp_path / client.name, *settings, f"cohort.without=[{client.name}]")
        for name, change in method.influence[client.id].items():
            estimated.append(change.flatten())
            true.append((rest.loop.state[name] - run.loop.state[name]).flatten())
    correlation = float(np.corrcoef(torch.cat(estimated), torch.cat(true))[0, 1])
    error = float((torch.cat(estimated) - torch.cat(true)).norm() / torch.cat(true).norm())
    with capsys.disabled():
        print(
            f" Fed-Influence, estimated against retrained: Pearson {correlation:.3f}, relative error {error:.3f} ",
            end="",
        )
    assert correlation > 0.9


def test_training_is_fedavgs_and_who_never_takes_part_has_no_influence(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "method=fed_influence", "cohort.without=[bob]")
    run.fit()
    method: Any = run.loop.callbacks["influence"]
    assert all(not change.any() for change in method.influence[1].values())
    assert any(change.any() for change in method.influence[0].values())
    whole = federation(tiny_root, tmp_path / "whole", "method=fed_influence")
    whole.fit()
    fedavg = federation(tiny_root, tmp_path / "fedavg", "method=fedavg", "optimizer.momentum=0")
    fedavg.fit()
    assert_same(whole.loop.state, fedavg.loop.state)
    with pytest.raises(ValueError, match="without must name clients"):
        federation(tiny_root, tmp_path / "eve", "method=fed_influence", "cohort.without=[eve]").fit()


def test_the_harmful_client_is_removed(tiny_root: Path, tmp_path: Path) -> None:
    settings = ["callbacks.influence.remove=0.34", "callbacks.influence.at=3", "loop.rounds=4", "optimizer.lr=0.2"]
    run = federation(tiny_root, tmp_path, *LINEAR, *settings, "trainer.max_epochs=3")
    run.loop.add_callback("attack", LabelNoise(clients=["bob"]))
    run.fit()
    assert run.loop.callbacks["influence"].results(run.loop)["removed"] == ["bob"]  # type: ignore[attr-defined]
    assert [row["round/trained"] for row in run.loop.history] == [3, 3, 3, 2]


def test_layers_that_grow_are_cut_off() -> None:
    method = InfluenceEstimate()
    method._names = ["a", "b"]
    parts = [torch.zeros(2), torch.zeros(2)]
    cut = method._cut(0, torch.tensor([2.0, 0, 1, 0]), torch.tensor([1.0, 0, 1, 0]), parts)
    assert cut.tolist() == [0, 0, 1, 0]
    assert method._cut(0, torch.tensor([0.1, 0, 1, 0]), torch.ones(4), parts).tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="samples"):
        InfluenceEstimate(samples=0)
