"""Fed-RoD against its two losses written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_lightning.methods.fedrod import RobustDecoupling
from fl_lightning.seeding import derive_seed
from fl_lightning.task import Regression
from tests.federations import federation, tiny_model


@pytest.mark.parametrize("hidden", [None, 5])
def test_two_rounds_by_hand_at_clients_that_lack_classes(hidden: int | None, tmp_path: Path) -> None:
    """With heads of their own, and with heads made from the shares of classes by a network that is averaged."""
    lr, gamma = 0.1, 0.5
    run = federation(
        skewed(tmp_path / "data"),
        tmp_path / "run",
        "method=fedrod",
        f"module.gamma={gamma}",
        f"module.hypernetwork={hidden or 'null'}",
        f"optimizer.lr={lr}",
        "optimizer.momentum=0",
    )
    if hidden:  # else its first layer would see no gradient before its last one has moved
        last = run.module.state_dict()["hypernetwork.2.weight"]
        last.copy_(torch.linspace(-0.1, 0.1, last.numel()).reshape(last.shape))
    start = {name: tensor.double() for name, tensor in run.module.state_dict().items()}
    run.fit()
    net = copy.deepcopy(run.module).double()
    made = [name for name in start if name.startswith("hypernetwork.")]
    assert bool(made) == bool(hidden)
    state = {name: start[name] for name in [*run.module.global_names, *made]}
    names = [] if hidden else ["personal.weight", "personal.bias"]
    own = [{name: torch.zeros_like(start[name]) for name in names} for _ in run.clients]
    counted = [client.data.label_counts("train").double() for client in run.clients]

    def personal(module: Any, z: Tensor, place: int) -> Tensor:
        if not hidden:
            return module.personal(z)
        first, _, second = module.hypernetwork
        a = (counted[place] / counted[place].sum()).to(z.dtype)
        h = second.weight @ (first.weight @ a + first.bias).clamp(min=0) + second.bias
        return z @ h[:-3].reshape(3, 16).T + h[-3:]

    for round in range(2):
        models = []
        for client in run.clients:
            net.load_state_dict({**state, **own[client.id]}, strict=False)
            net.train()
            counts = client.data.label_counts("train").double()
            assert 0 in counts
            client.data.seed(derive_seed(run.loop.seed, "batches", round, client.id))
            shared, mine = (
                [*net.backbone.parameters(), *net.head.parameters()],
                list((net.hypernetwork or net.personal).parameters()),
            )
            for x, y in client.data.train_dataloader():
                z = net.backbone(x.double())
                generic = net.head(z)
                weighed = counts**gamma * generic.exp()
                balanced = -(pick(weighed, y) / weighed.sum(1)).log().mean()
                both = (generic.detach() + personal(net, z.detach(), client.id)).softmax(1)
                slopes = torch.autograd.grad(balanced, shared)
                slopes += torch.autograd.grad(-pick(both, y).log().mean(), mine)
                with torch.no_grad():
                    for p, slope in zip([*shared, *mine], slopes, strict=True):
                        p -= lr * slope
            after = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            models.append({name: after[name] for name in state})
            own[client.id] = {name: after[name] for name in own[client.id]}
        n = [client.num_examples for client in run.clients]
        state = {name: sum(k * m[name] for k, m in zip(n, models, strict=True)) / sum(n) for name in state}
    for name, _ in run.module.named_parameters():
        if name in state:
            torch.testing.assert_close(run.loop.state[name].double(), state[name], rtol=1e-5, atol=1e-5)
    x = torch.randn(5, 3, 8, 8)
    for client in run.clients:
        for name, tensor in own[client.id].items():
            torch.testing.assert_close(client.personal[name].double(), tensor, rtol=1e-5, atol=1e-5)
        run.module.load_state_dict(run.loop.personal_state(client))
        run.module.eval()
        run.module.for_client(client)
        z = run.module.backbone(x)
        torch.testing.assert_close(
            run.module.personal_forward(x), run.module.head(z) + personal(run.module, z, client.id)
        )


def pick(values: Tensor, y: Tensor) -> Tensor:
    return values[torch.arange(len(y)), y]


def skewed(root: Path) -> Path:
    """Two clients of two classes each."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for name, classes in {"ann": (0, 0, 0, 1), "bob": (1, 2)}.items():
        split = {}
        for part, count in (("train", 24), ("test", 8)):
            y = np.resize(classes, count)
            x = 60 * y[:, None, None, None] + rng.integers(0, 60, (count, 8, 8, 3))
            split[f"x_{part}"], split[f"y_{part}"] = x.astype(np.uint8), y.astype(np.uint8)
        np.savez(root / f"{name}.npz", **split)
    return root


@pytest.mark.parametrize("hidden", [None, 5])
def test_a_client_begins_with_the_generic_model(hidden: int | None) -> None:
    module = RobustDecoupling(tiny_model(3), hypernetwork=hidden).eval()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(module.personal_forward(x), module(x))
    given = {name: torch.ones_like(module.state_dict()[name]) for name in module.global_names}
    module.start_from(given)
    assert torch.equal(module.personal_forward(x), module(x))


def test_other_tasks_are_refused(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "method=fedrod")
    run.module.task = Regression()
    with pytest.raises(RuntimeError, match="method=fedrod takes task=classification, got Regression"):
        run.fit()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="gamma"):
        RobustDecoupling(tiny_model(3), gamma=-1)
    with pytest.raises(ValueError, match="hypernetwork must be a whole number of at least 1"):
        RobustDecoupling(tiny_model(3), hypernetwork=0)
    model = tiny_model(3)._replace(head=nn.Sequential(nn.Linear(16, 3)))
    with pytest.raises(ValueError, match="hypernetwork must be null unless the model's head is"):
        RobustDecoupling(model, hypernetwork=4)
