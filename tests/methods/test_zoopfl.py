"""ZooPFL: its estimate against autograd, its fits by hand, and a black box that no gradient passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_lightning.methods.zoopfl import BlackBox
from fl_lightning.models.model import Model
from fl_lightning.seeding import derive_seed, global_seed
from tests.federations import federation, tiny_model

ZOO = ["method=zoopfl", "optimizer=sgd", "module.width=3", "module.code=2"]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        raise AssertionError("a gradient came to the black box")


class OpaqueLayer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Opaque.apply(x)


def opaque(num_classes: int, in_channels: int = 3, image_size: int = 8) -> Model:
    """A model that ends the run when a gradient reaches it."""
    model = tiny_model(num_classes, in_channels, image_size)
    return Model(nn.Sequential(OpaqueLayer(), model.backbone, OpaqueLayer()), model.head, "head")


def test_the_estimate_is_autograds_gradient_in_the_mean() -> None:
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh()), nn.Linear(6, 3), "head")
    module = BlackBox(model, 3, directions=4000, mu=1e-3).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])
    exact = torch.autograd.grad(functional.cross_entropy(model.head(model.backbone(x)), y, reduction="sum"), x)[0]
    found = module.estimate(x.detach(), y)
    assert float((found - exact).norm() / exact.norm()) < 0.1
    assert not torch.allclose(found[0], found[3])


def test_no_gradient_passes_the_black_box(tiny_root: Path, tmp_path: Path) -> None:
    probe = BlackBox(opaque(3), 3)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    with pytest.raises(AssertionError, match="a gradient came"):
        functional.cross_entropy(probe.head(probe.backbone(probe.changed(x))), y).backward()
    run = federation(
        tiny_root, tmp_path, *ZOO, "module.pretraining=1", "model._target_=tests.methods.test_zoopfl.opaque"
    )
    run.fit()
    moved = {n.split(".")[0] for n, t in run.loop.state.items() if not torch.equal(t, run.loop.initial[n])}
    assert moved == {"encoder", "decoder"}
    assert all(client.personal["embedding"].any() for client in run.clients)
    assert all(client.personal["fits"] == 2 for client in run.clients)


def test_two_rounds_by_hand(tiny_root: Path, tmp_path: Path) -> None:
    """One of pre-training, one of estimates along the same directions."""
    lr, mu, q = 0.05, 0.05, 2
    settings = [f"optimizer.lr={lr}", "optimizer.momentum=0", f"module.mu={mu}", f"module.directions={q}"]
    run = federation(tiny_root, tmp_path, *ZOO, *settings, "module.pretraining=1")
    net: Any = copy.deepcopy(run.module).double().eval()
    run.fit()
    own_names = ("embedding", "remapping.weight", "remapping.bias", "scale.running_mean", "scale.running_var")
    shared = {name: x.double() for name, x in run.loop.initial.items() if name.startswith(("encoder", "decoder"))}
    own = [{name: run.loop.initial[name].double() for name in own_names} for _ in run.clients]
    for round in range(2):
        sums = {name: torch.zeros_like(x) for name, x in shared.items()}
        for client in run.clients:
            net.load_state_dict({**shared, **own[client.id]}, strict=False)
            client.data.seed(derive_seed(run.loop.seed, "batches", round, client.id))
            with global_seed(derive_seed(run.loop.seed, "fit", round, client.id), torch.device("cpu")):
                for x, y in client.data.train_dataloader():
                    z = net.decoder(net.encoder(x.double()) + net.embedding)
                    answers = net.head(net.backbone(z)).detach()
                    parts = [net.remapping.weight, net.remapping.bias]
                    mean, middle, spread = answers.mean(0), net.scale.running_mean, net.scale.running_var
                    standard = (answers - mean) / ((answers - mean).square().mean(0) + 1e-5).sqrt()
                    slopes = torch.autograd.grad(functional.cross_entropy(net.remapping(standard), y), parts)
                    middle += 0.1 * (mean - middle)
                    spread += 0.1 * (answers.var(0) - spread)

                    def asked(x: torch.Tensor, middle: Any = middle, spread: Any = spread) -> torch.Tensor:
                        return net.remapping((net.head(net.backbone(x)) - middle) / (spread + 1e-5).sqrt())

                    outer = [*net.encoder.parameters(), net.embedding, *net.decoder.parameters()]
                    if round == 0:
                        more = torch.autograd.grad((z - x.double()).square().mean(), outer)
                    else:
                        g = torch.zeros_like(z)
                        for _ in range(q):
                            u = torch.randn(x.shape).double()
                            losses = [
                                functional.cross_entropy(asked(z + s * mu * u), y, reduction="none") for s in (1, -1)
                            ]
                            g += ((losses[0] - losses[1]) / (2 * mu * q)).detach()[:, None, None, None] * u
                        more = torch.autograd.grad(z, outer, g / len(y))
                    with torch.no_grad():
                        for p, slope in zip([*parts, *outer], [*slopes, *more], strict=True):
                            p -= lr * slope
            own[client.id] = {name: net.state_dict()[name].clone() for name in own_names}
            for name in sums:
                sums[name] += client.num_examples * net.state_dict()[name]
        shared = {name: x / sum(client.num_examples for client in run.clients) for name, x in sums.items()}
    for name, x in shared.items():
        torch.testing.assert_close(run.loop.state[name].double(), x, rtol=1e-3, atol=1e-4)
    for client in run.clients:
        for name in own_names:
            torch.testing.assert_close(client.personal[name].double(), own[client.id][name], rtol=1e-3, atol=1e-4)


def test_at_first_a_clients_answers_are_the_black_boxs() -> None:
    module = BlackBox(tiny_model(3), 3)
    x = torch.randn(2, 3, 9, 9)
    assert module.changed(x).shape == x.shape
    module.eval()
    torch.testing.assert_close(module(x), module.head(module.backbone(module.changed(x))))
    given = {name: x + 1 for name, x in module.state_dict().items() if name.startswith(("backbone.", "head."))}
    module.start_from(given)
    with pytest.raises(ValueError, match="another model's"):
        module.start_from({"head.bias": torch.ones(3)})
    assert torch.equal(module.head.bias, given["head.bias"])
    with pytest.raises(ValueError, match="mu"):
        BlackBox(tiny_model(3), 3, mu=0)
