"""PAC-PFL against Stein variational gradient descent by autograd, and its mixture by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fl_lightning.methods.pac_pfl import PriorParticles, SteinDescent, stein
from fl_lightning.state import num_bytes
from tests.federations import federation, tiny_model


def by_autograd(points: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The rule as it is written, one pair after another."""
    k = len(points)
    squares = torch.tensor([[float((a - b).square().sum()) for a in points] for b in points])
    h = math.sqrt(float(squares.flatten().quantile(0.5)) / (2 * math.log(k + 1)))
    found = []
    for i in range(k):
        total = torch.zeros_like(points[0])
        for j in range(k):
            x = points[j].clone().requires_grad_()
            kernel = torch.exp(-(x - points[i]).square().sum() / (2 * h**2))
            total += kernel.detach() * slopes[j] + torch.autograd.grad(kernel, x)[0]
        found.append(total / k)
    return torch.stack(found)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_direction_is_stein_gradient_descent_by_autograd(k: int) -> None:
    points, slopes = torch.randn(2, k, 7, dtype=torch.float64)
    torch.testing.assert_close(stein(points, slopes), by_autograd(points, slopes), rtol=1e-6, atol=1e-8)


def test_one_particle_climbs_its_own_gradient_and_equal_ones_stay_together() -> None:
    point, slope = torch.randn(2, 1, 5)
    assert torch.equal(stein(point, slope), slope)
    moved = stein(point.repeat(3, 1), torch.randn(3, 5))
    assert torch.equal(moved[0], moved[2])


def test_particles_find_a_gaussian() -> None:
    torch.manual_seed(0)
    points = torch.randn(30, 1, dtype=torch.float64) * 0.1
    for _ in range(600):
        points = points + 0.3 * stein(points, -(points - 2) / 0.5**2)
    assert float(points.mean()) == pytest.approx(2, abs=0.05)
    assert float(points.std()) == pytest.approx(0.5, rel=0.15)


def test_two_rounds_by_hand(tiny_root: Path, tmp_path: Path) -> None:
    lr, factor, std = 0.01, 0.3, 0.7
    settings = [f"aggregator.lr={lr}", f"aggregator.prior_factor={factor}", f"aggregator.prior_std={std}"]
    run = federation(
        tiny_root,
        tmp_path,
        "method=pac_pfl",
        "module.particles=3",
        "loop.rounds=2",
        "+model.batch_norm=false",
        *settings,
    )
    net: Any = copy.deepcopy(run.module).double()
    run.fit()
    groups = [[*net.backbone.parameters(), *net.head.parameters()], *(list(other.parameters()) for other in net.others)]
    points = [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in group])) for group in groups]
    optimizer = torch.optim.Adam(points, lr=lr)
    sizes = [p.numel() for p in groups[0]]
    counts = [client.num_examples for client in run.clients]
    harmonic = 3 / sum(1 / n for n in counts)
    for _ in range(2):
        slopes = []
        for group, point, place in zip(groups, points, range(3), strict=True):
            total = -factor / std**2 * point.detach()
            for client in run.clients:
                x, y = (torch.cat(parts) for parts in zip(*client.data.eval_dataloader("train"), strict=True))
                logits = (net.others[place - 1] if place else lambda z: net.head(net.backbone(z)))(x.double())
                slope = torch.autograd.grad(-functional.cross_entropy(logits, y), group)
                total = total + harmonic / (harmonic + 3) * torch.cat([one.flatten() for one in slope])
            slopes.append(total)
        direction = by_autograd(torch.stack([p.detach() for p in points]), torch.stack(slopes))
        for point, step in zip(points, direction, strict=True):
            point.grad = -step
        optimizer.step()
        for group, point in zip(groups, points, strict=True):
            for p, part in zip(group, point.detach().split(sizes), strict=True):
                p.data.copy_(part.view_as(p))
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(run.loop.state[name].double(), tensor, rtol=1e-4, atol=1e-5, msg=name)
    sent = num_bytes(run.loop.state)
    assert run.loop.bytes_up == run.loop.bytes_down == 2 * 3 * sent

    # Personal predictions: particles weighed by their likelihood of all training examples.
    net.eval()
    for client in run.clients:
        x, y = (torch.cat(parts) for parts in zip(*client.data.eval_dataloader("train"), strict=True))
        z, t = next(iter(client.data.eval_dataloader("test")))
        with torch.no_grad():
            logs = -torch.stack([functional.cross_entropy(one, y, reduction="sum") for one in net.outputs(x.double())])
            p = (logs.softmax(0)[:, None, None] * net.outputs(z.double()).softmax(2)).sum(0)
        with run.open():
            [score] = run.loop.score(
                [(run.loop.clients[client.id], run.loop.personal_exam(run.loop.clients[client.id], "test"))]
            )
        assert score.values["loss"] == pytest.approx(float(functional.nll_loss(p.log(), t)), rel=1e-4)
        assert score.values["accuracy"] == pytest.approx(float((p.argmax(1) == t).float().mean()))
        assert 0 <= score.values["calibration"] <= 1


def test_one_particle_without_a_prior_is_adam_on_the_clients_full_gradients(tiny_root: Path, tmp_path: Path) -> None:
    """Nothing repels it, and it holds all weight: the personal predictions are the global ones."""
    settings = ["module.particles=1", "aggregator.prior_factor=0", "aggregator.lr=0.01", "+model.batch_norm=false"]
    run = federation(tiny_root, tmp_path, "method=pac_pfl", *settings)
    net: Any = copy.deepcopy(run.module)
    run.fit()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        losses = []
        for client in run.clients:
            x, y = (torch.cat(parts) for parts in zip(*client.data.eval_dataloader("train"), strict=True))
            losses.append(functional.cross_entropy(net.head(net.backbone(x)), y))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # Adam follows no scale of all gradients
        optimizer.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(run.loop.state[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for client in run.clients:
        x, _ = next(iter(client.data.eval_dataloader("test")))
        run.module.for_client(client)
        torch.testing.assert_close(run.module.personal_forward(x), run.module(x))


def test_wrong_arguments_are_refused_and_one_particle_takes_given_weights() -> None:
    with pytest.raises(ValueError, match="particles"):
        PriorParticles(tiny_model(3), particles=0)
    for key in ("lr", "prior_std"):
        with pytest.raises(ValueError, match=key):
            SteinDescent(**{key: 0.0})  # type: ignore[arg-type]
    module = PriorParticles(tiny_model(3))
    before = module.state_dict()["others.0.head.bias"].clone()
    given = {name: x + 1 for name, x in module.state_dict().items() if name.startswith(("backbone.", "head."))}
    module.start_from(given)
    with pytest.raises(ValueError, match="another model's"):
        module.start_from({"head.bias": torch.ones(3)})
    assert torch.equal(module.head.bias, given["head.bias"])
    assert torch.equal(module.state_dict()["others.0.head.bias"], before)
    assert len({float(one[0, 0]) for one in module.outputs(torch.ones(2, 3, 8, 8)).detach()}) == 4
