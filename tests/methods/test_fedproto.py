"""FedProto against its equations written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fl_lightning.client import Update
from fl_lightning.methods.fedproto import COUNT, MEAN, PrototypeLearning, PrototypeMean
from fl_lightning.models.model import Model
from fl_lightning.seeding import derive_seed
from tests.federations import federation, tiny_model

ROWS = "module.others={rows: {_target_: fl_lightning.models.small.mlp, width: 16}}"


@pytest.mark.parametrize("whose", [None, "ann: rows, bob: model, cid: rows"])
def test_two_rounds_by_hand(whose: str | None, tiny_root: Path, tmp_path: Path) -> None:
    """All clients have one architecture, or two of them another."""
    lr, lam = 0.1, 3.0
    plain = [f"optimizer.lr={lr}", "optimizer.momentum=0", f"module.lam={lam}"]
    plain += [ROWS, f"module.clients={{{whose}}}"] if whose else []
    run = federation(tiny_root, tmp_path, "method=fedproto", *plain)
    others = {"ann", "cid"} if whose else set()
    initial = {name: tensor.double() for name, tensor in run.module.state_dict().items()}
    run.fit()
    net = copy.deepcopy(run.module).double()
    own = [initial for _ in run.clients]

    def parts(module: Any, client: Any) -> Any:
        return module.others["rows"] if client.name in others else module

    prototypes = torch.zeros(3, 16, dtype=torch.float64)
    for round in range(2):
        sums, numbers = torch.zeros_like(prototypes), torch.zeros(3, dtype=torch.float64)
        for client in run.clients:
            net.load_state_dict(own[client.id])
            net.train()
            client.data.seed(derive_seed(run.loop.seed, "batches", round, client.id))
            mine = parts(net, client)
            parameters = [*mine.backbone.parameters(), *mine.head.parameters()]
            for x, y in client.data.train_dataloader():
                z = mine.backbone(x.double())
                loss = -mine.head(z).log_softmax(1)[torch.arange(len(y)), y].mean()
                if round:
                    loss = loss + lam * ((z - prototypes[y]) ** 2).mean()
                slopes = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for p, slope in zip(parameters, slopes, strict=True):
                        p -= lr * slope
            own[client.id] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            net.eval()
            for x, y in client.data.eval_dataloader("train"):
                for z, label in zip(mine.backbone(x.double()).detach(), y, strict=True):
                    sums[label] += z
                    numbers[label] += 1
        prototypes = sums / numbers[:, None]
    torch.testing.assert_close(run.loop.state[MEAN].double(), prototypes, rtol=1e-5, atol=1e-5)
    assert run.loop.state[COUNT].tolist() == numbers.tolist()
    x = torch.randn(6, 3, 8, 8)
    for client in run.clients:
        kept = {name for name in client.personal if name.startswith("others.")}
        assert {name for name, _ in run.module.named_parameters()} & client.personal.keys()
        assert (kept == client.personal.keys()) if client.name in others else not kept
        for name in client.personal.keys() & dict(run.module.named_parameters()).keys():
            torch.testing.assert_close(client.personal[name].double(), own[client.id][name], rtol=1e-5, atol=1e-5)
        run.module.load_state_dict(run.loop.personal_state(client))
        run.module.eval()
        run.module.for_client(client)
        found = run.module.personal_forward(x).detach()
        z = parts(run.module, client).backbone(x).detach().double()
        far = [[((one - prototype) ** 2).sum() for prototype in prototypes] for one in z]
        torch.testing.assert_close(found.double(), -torch.tensor(far).double(), rtol=1e-3, atol=1e-3)
    assert run.loop.bytes_up == run.loop.bytes_down == 2 * 3 * 4 * (3 * 16 + 3)


@pytest.mark.parametrize(("weights", "share"), [("examples", 0.75), ("uniform", 0.5)])
def test_a_prototype_is_the_mean_over_those_that_hold_the_class(weights: Any, share: float) -> None:
    """Class 0 is held by both, 1 by one, 2 by nobody of this round."""
    old = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    ann, bob = torch.tensor([[4.0, 0.0], [0.0, 0.0], [9.0, 9.0]]), torch.tensor([[8.0, 4.0], [5.0, 7.0], [9.0, 9.0]])
    updates = [
        Update(0, 30, {MEAN: ann, COUNT: torch.tensor([30.0, 0.0, 0.0])}),
        Update(1, 99, {MEAN: bob, COUNT: torch.tensor([10.0, 89.0, 0.0])}),
    ]
    merged = PrototypeMean(weights).aggregate({MEAN: old, COUNT: torch.tensor([1.0, 0.0, 5.0])}, updates)
    torch.testing.assert_close(merged[MEAN], torch.stack([share * ann[0] + (1 - share) * bob[0], bob[1], old[2]]))
    assert merged[COUNT].tolist() == [40, 89, 5]


def test_answers_are_classes_that_somebody_has_shown() -> None:
    module = PrototypeLearning(tiny_model(3)).eval()
    x = torch.randn(8, 3, 8, 8)
    assert torch.equal(module.personal_forward(x), module(x)), "there are no prototypes yet"
    module.prototypes.get_buffer("count").copy_(torch.tensor([1.0, 0.0, 1.0]))
    module.prototypes.get_buffer("mean").copy_(torch.randn(3, 16))
    logits = module.personal_forward(x)
    assert torch.isfinite(logits).all()
    assert not (logits.argmax(1) == 1).any()


def test_architectures_that_do_not_fit_are_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module.others.rows must have 16 features, as model has, got 8"):
        federation(tiny_root, tmp_path, "method=fedproto", ROWS.replace("16", "8"))
    with pytest.raises(ValueError, match=r"module.clients.ann must be one of model, rows, got 'cnn'"):
        federation(tiny_root, tmp_path, "method=fedproto", ROWS, "module.clients={ann: cnn}")


def test_wrong_arguments_are_refused() -> None:
    for wrong in ({"lam": -1}, {"predict": "both"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrototypeLearning(tiny_model(3), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight"):
        PrototypeLearning(Model(nn.Flatten(), nn.Identity(), "head"))
