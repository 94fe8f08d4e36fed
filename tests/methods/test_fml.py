"""FML against its losses written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_lightning.methods.fml import MutualLearning, divergence
from fl_lightning.seeding import derive_seed
from fl_lightning.state import without_prefix
from tests.federations import assert_same, federation, tiny_model

OTHER = "module.private={_target_: tests.federations.tiny_model, batch_norm: false}"


def test_the_divergence_is_a_sum_over_classes_and_stops_at_the_teacher() -> None:
    student, teacher = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    q, p = teacher.softmax(1), student.softmax(1)
    value = divergence(student, teacher)
    torch.testing.assert_close(value, (q * (q / p).log()).sum(1).mean())
    value.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, ((p - q) / 4).detach())


def test_each_client_has_an_architecture_of_its_own(tiny_root: Path, tmp_path: Path) -> None:
    """With alpha=1 each is local training of that architecture, whoever else is there; nobody keeps another's."""
    many = "module.private={a: {_target_: tests.federations.tiny_model}, b: " + OTHER.partition("=")[2] + "}"
    whose = "module.clients={ann: b, bob: a, cid: b}"
    run = federation(tiny_root, tmp_path / "run", "method=fml", many, "module.alpha=1", whose)
    run.fit()
    initial = run.loop.initial
    for client, name in zip(run.clients, "bab", strict=True):
        assert {key.split(".")[1] for key in client.personal} == {name}
        assert any("norm1" in key for key in client.personal) == (name == "a")
    turns = federation(tiny_root, tmp_path / "turns", "method=fml", many, "loop.rounds=1")
    turns.fit()
    assert [next(iter(client.personal)).split(".")[1] for client in turns.clients] == ["a", "b", "a"]
    alone = federation(tiny_root, tmp_path / "one", "method=fml", OTHER, "module.alpha=1")
    for key in without_prefix("personal.", alone.module.state_dict()):
        alone.module.state_dict()[f"personal.{key}"].copy_(initial[f"personal.b.{key}"])
    alone.fit()
    for place in (0, 2):
        expected = without_prefix("personal.", alone.clients[place].personal)
        assert_same(without_prefix("personal.b.", run.clients[place].personal), expected)
    scores = run.loop.history[-1]
    assert 0 <= scores["test/personal/accuracy/mean"] <= 1


def test_clients_without_an_architecture_are_refused(tiny_root: Path, tmp_path: Path) -> None:
    models = {"a": tiny_model(3), "b": tiny_model(3)}
    with pytest.raises(ValueError, match=r"clients.ann must be one of"):
        MutualLearning(tiny_model(3), models, {"ann": "c"})
    many = "module.private={a: {_target_: tests.federations.tiny_model}}"
    run = federation(tiny_root, tmp_path, "method=fml", many, "module.clients={ann: a}")
    with pytest.raises(RuntimeError, match=r"module.clients must name one of private .* none for bob"):
        run.fit()


def test_two_rounds_by_hand_with_unlike_architectures(tiny_root: Path, tmp_path: Path) -> None:
    lr, alpha, beta = 0.1, 0.3, 0.6
    settings = [f"module.alpha={alpha}", f"module.beta={beta}", f"optimizer.lr={lr}", "optimizer.momentum=0"]
    run = federation(tiny_root, tmp_path, "method=fml", OTHER, *settings)
    assert not any("personal" in name and "norm1" in name for name in run.module.state_dict())
    initial = {name: tensor.double() for name, tensor in run.module.state_dict().items()}
    run.fit()
    state = {name: initial[name] for name in run.module.global_names}
    own = [without_prefix("personal.", initial) for _ in run.clients]
    meme = copy.deepcopy(run.module).double()
    private = copy.deepcopy(run.module.personal).double()

    def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
        return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()

    for round in range(2):
        models = []
        for client in run.clients:
            meme.load_state_dict(state, strict=False)
            private.load_state_dict(own[client.id])
            meme.train()
            private.train()
            client.data.seed(derive_seed(run.loop.seed, "batches", round, client.id))
            m = [*meme.backbone.parameters(), *meme.head.parameters()]
            p = list(private.parameters())
            for x, y in client.data.train_dataloader():
                of_m, of_p = meme(x.double()), private(x.double())
                # A teacher's own entropy has no gradient: what is left of KL is the cross-entropy with it.
                near_p = -(of_p.softmax(1).detach() * of_m.log_softmax(1)).sum(1).mean()
                near_m = -(of_m.softmax(1).detach() * of_p.log_softmax(1)).sum(1).mean()
                slopes = torch.autograd.grad(beta * cross_entropy(of_m, y) + (1 - beta) * near_p, m)
                slopes += torch.autograd.grad(alpha * cross_entropy(of_p, y) + (1 - alpha) * near_m, p)
                with torch.no_grad():
                    for parameter, slope in zip([*m, *p], slopes, strict=True):
                        parameter -= lr * slope
            models.append({name: meme.state_dict()[name].clone() for name in state})
            own[client.id] = {name: tensor.clone() for name, tensor in private.state_dict().items()}
        state = {name: sum(model[name] for model in models) / 3 for name in state}
    for name, tensor in run.loop.state.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), state[name], rtol=1e-5, atol=1e-5)
    for client in run.clients:
        for name, tensor in without_prefix("personal.", client.personal).items():
            torch.testing.assert_close(tensor.double(), own[client.id][name], rtol=1e-5, atol=1e-5)


def test_only_a_copy_starts_from_given_weights() -> None:
    given = {name: tensor + 1 for name, tensor in MutualLearning(tiny_model(3)).state_dict().items()}
    given = {name: tensor for name, tensor in given.items() if not name.startswith("personal.")}
    for private in (None, tiny_model(3)):
        module = MutualLearning(tiny_model(3), private)
        before = module.state_dict()["personal.head.bias"].clone()
        module.start_from(given)
        assert torch.equal(module.head.bias, given["head.bias"])
        assert torch.equal(module.state_dict()["personal.head.bias"], given["head.bias"] if private is None else before)


@pytest.mark.parametrize(("key", "value"), [("alpha", -0.1), ("beta", 1.1)])
def test_wrong_arguments_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        MutualLearning(tiny_model(3), **{key: value})
