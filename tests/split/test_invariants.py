"""The table of invariants of FlexP-SFL, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fl_lightning.models import Model, gpt
from fl_lightning.split.cost import batch_bytes, profile_model
from fl_lightning.split.module import SplitModule
from tests.split.halves import (
    DEEP,
    MODELS,
    SGD,
    batch_for,
    connect,
    make_body,
    make_module,
    step,
    twin,
    whole_state,
)


def legal_cuts(name: str) -> list[tuple[int, int, int]]:
    """Every (start, cut, end) that is legal for a model."""
    blocks = len(make_module(name).blocks)
    return [(start, at, end) for end in range(2, blocks + 1) for start in range(1, end) for at in range(start, end)]


@pytest.mark.parametrize("name", MODELS)
def test_one_client_trains_as_the_unsplit_model_at_every_legal_cut(name: str) -> None:
    plain = make_module(name)
    plain_optimizer = SGD(plain.parameters())
    losses = []
    for seed in range(3):
        x, y = batch_for(name, seed)
        loss = F.cross_entropy(plain.head(plain.backbone(x)), y)
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        losses.append(loss.item())
    expected = plain.state_dict()
    for start, at, end in legal_cuts(name):
        module = make_module(name, end=end, start=start)
        body = make_body(module)
        exchange = connect(module, body, at)
        optimizer = module.configure_optimizers()
        found = [step(module, optimizer, batch_for(name, seed)) for seed in range(3)]
        assert found == losses, (start, at, end)
        state = whole_state(module, body, exchange)
        for tensor_name in expected:
            assert torch.equal(state[tensor_name], expected[tensor_name]), (start, at, end, tensor_name)


@pytest.mark.parametrize("name", DEEP)
def test_gradients_and_statistics_of_deep_backbones_are_those_of_the_unsplit_model(name: str) -> None:
    """Every boundary between blocks is a cut, and so are the ends of a body of one block and of all but one."""
    plain = make_module(name).train()
    initial = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    x, y = batch_for(name, size=2)
    loss = F.cross_entropy(plain.head(plain.backbone(x)), y)
    loss.backward()
    gradients = {path: parameter.grad.clone() for path, parameter in plain.named_parameters()}
    buffers = {key: tensor.clone() for key, tensor in plain.named_buffers()}
    blocks = len(plain.blocks)
    for at, end in [(at, blocks) for at in range(1, blocks)] + [(1, 2), (1, blocks - 1)]:
        plain.load_state_dict(initial)
        plain.requires_grad_(True)
        module = SplitModule(Model(plain.backbone, plain.head, "head"), end=end).train()
        module.zero_grad()
        body = make_body(module)
        body.step = lambda: None  # keep the gradients to look at
        held = module.parts(connect(module, body, at).cut)
        split_loss = module.training_step((x, y), 0)
        split_loss.backward()
        assert split_loss.item() == loss.item()
        server = {body._full_names[local]: parameter.grad for local, parameter in body.blocks.named_parameters()}
        for path, parameter in module.named_parameters():
            found = server[path] if path in held.body else parameter.grad
            assert torch.equal(found, gradients[path]), (at, end, path)
        state = whole_state(module, body, module.exchange)
        assert all(torch.equal(state[key], buffers[key]) for key in buffers), (at, end)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_autograd_of_the_unsplit_model(name: str) -> None:
    module = make_module(name)
    x, y = batch_for(name)
    F.cross_entropy(module.head(module.backbone(x)), y).backward()
    expected = {path: parameter.grad.clone() for path, parameter in module.named_parameters()}
    module.zero_grad()
    body = make_body(module, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    body.step = lambda: None  # keep the gradients to look at
    connect(module, body, module.start + 1)
    module.training_step((x, y), 0).backward()
    held = module.parts(module.exchange.cut)
    for path, parameter in module.named_parameters():
        if path in held.client:
            assert torch.equal(parameter.grad, expected[path]), path
        else:
            assert parameter.grad is None, path
    for local, parameter in body.blocks.named_parameters():
        full = body._full_names[local]
        if full in held.body:
            assert torch.equal(parameter.grad, expected[full]), full


@pytest.mark.parametrize("name", MODELS)
def test_first_loss_does_not_depend_on_the_cut(name: str) -> None:
    losses = set()
    for start, at, end in legal_cuts(name):
        module = make_module(name, end=end, start=start)
        connect(module, make_body(module, weight=0.25), at)
        module.training_step(batch_for(name), 0)
        losses.add(module.context.losses[-1].item())
    assert len(losses) == 1


def test_kl_vanishes_while_private_top_and_server_copy_agree_and_not_after() -> None:
    module = make_module("vit")
    body = make_body(module, weight=0.25)
    connect(module, body, module.start + 2)
    x, _ = batch_for("vit")
    blocks = list(module.blocks.values())
    base = blocks[0](x).detach()
    private = base
    for block in blocks[module.start : module.start + 2]:
        private = block(private)
    private = private.detach().requires_grad_()
    penalty = body.alignment(private, body.copies(module.exchange.cut, base))
    (gradient,) = torch.autograd.grad(penalty, private)
    assert abs(penalty.item()) < 1e-6
    assert gradient.abs().max() < 1e-6
    with torch.no_grad():
        for parameter in body.blocks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    penalty = body.alignment(private, body.copies(module.exchange.cut, base))
    (gradient,) = torch.autograd.grad(penalty, private)
    assert penalty.item() > 1e-4
    assert gradient.abs().max() > 1e-7


@pytest.mark.parametrize("at", ["server", "client"])
def test_aligned_gradients_equal_autograd_of_the_whole_objective(at: str) -> None:
    """CE + 0.7 KL written out over whole models: p (log p - log q) over the width, meaned over examples and tokens."""
    module = make_module("vit")
    server = twin(module)
    with torch.no_grad():
        for parameter in server.backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    private, copies = list(module.blocks.values()), list(server.blocks.values())
    x, y = batch_for("vit")
    h = private[0](x)
    z = private[2](private[1](h))
    p, q = copies[2](copies[1](h)).detach().softmax(-1), z.softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    task = F.cross_entropy(module.head(private[4](copies[3](z))), y)
    wanted = [parameter for part in (*private[:3], private[4], module.head) for parameter in part.parameters()]
    expected = torch.autograd.grad(task + 0.7 * divergence, wanted)
    assert divergence.item() > 1e-3

    body = make_body(server, weight=0.7, at=at)
    connect(module, body, 3)
    module.training_step((x, y), 0).backward()
    for parameter, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_client_at_the_first_cut_sends_no_base_and_aligns_nothing() -> None:
    module = make_module("vit")
    exchange = connect(module, make_body(module, weight=0.25), module.start)
    assert not exchange.aligns
    module.training_step(batch_for("vit"), 0)
    assert module._penalty is None
    assert exchange.server.traffic.activation_up == 3 * 5 * 16 * 4  # batch, tokens with the class token, width, float32


def test_client_that_trains_alone_leaves_the_blocks_below_its_cut_untouched() -> None:
    module = make_module("vit")
    body = make_body(module, weight=0.25)
    before = body.state()
    exchange = connect(module, body, module.start + 2)
    optimizer = module.configure_optimizers()
    for seed in range(2):
        step(module, optimizer, batch_for("vit", seed))
    after, held = body.state(), module.parts(exchange.cut)
    assert held.top
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in held.top), name


def test_batch_norm_of_the_copies_is_untouched_too() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4)]
    module = SplitModule(Model(nn.Sequential(*blocks), nn.Linear(4, 2), "head"), end=0)
    body = make_body(module, weight=0.5)
    before = body.state()
    exchange = connect(module, body, 2)
    step(module, SGD(module.parameters()), (torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])))
    after, held = body.state(), module.parts(exchange.cut)
    assert any("running_mean" in name for name in held.top)
    assert all(torch.equal(before[name], after[name]) for name in held.top)
    statistics = [name for name in held.body if "running_mean" in name]
    assert statistics
    assert not any(torch.equal(before[name], after[name]) for name in statistics)


def test_alignment_at_server_and_at_client_give_the_same_update() -> None:
    results = []
    for at in ("server", "client"):
        module = make_module("vit")
        body = make_body(module, weight=0.7, at=at)
        with torch.no_grad():
            for parameter in body.blocks.parameters():
                parameter.mul_(1.1)
        exchange = connect(module, body, module.start + 2)
        optimizer = module.configure_optimizers()
        for seed in range(2):
            step(module, optimizer, batch_for("vit", seed))
        results.append((whole_state(module, body, exchange), exchange.server.traffic))
    (first, at_server), (second, at_client) = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    top = 2 * 3 * 5 * 16 * 4
    assert at_client.activation_down == at_server.activation_down + top
    assert at_client.up == at_server.up


def test_alignment_changes_the_clients_and_never_the_server_in_one_step() -> None:
    states = []
    for weight in (0.0, 0.7):
        module = make_module("vit")
        body = make_body(module, weight=weight)
        with torch.no_grad():
            for parameter in list(body.blocks)[0].parameters():
                parameter.mul_(1.1)
        exchange = connect(module, body, module.start + 2)
        step(module, module.configure_optimizers(), batch_for("vit"))
        states.append((module.parts(exchange.cut), module.state_dict(), body.state()))
    held, without, body_without = states[0]
    _, aligned, body_aligned = states[1]
    assert all(torch.equal(body_without[name], body_aligned[name]) for name in body_without)
    moved = [name for name in held.base + held.top if not torch.equal(without[name], aligned[name])]
    assert len(moved) > len(held.top) // 2
    assert all(torch.equal(without[name], aligned[name]) for name in held.tail + held.head)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("align_at", [None, "server", "client"])
def test_bytes_of_a_batch_equal_the_formula(name: str, align_at: str | None) -> None:
    module = make_module(name)
    x, y = batch_for(name)
    profile = profile_model(module.blocks, module.head, x[:1])
    for at in range(module.start, module.end):
        body = make_body(module, weight=0.25 if align_at else 0.0, at=align_at or "server")
        exchange = connect(module, body, at)
        step(module, module.configure_optimizers(), (x, y))
        formula = batch_bytes(exchange.cut, profile, len(x), align_at)
        assert vars(formula) == vars(exchange.server.traffic)
        if align_at is None:
            a, e = (profile.blocks[place - 1].out_bytes * len(x) for place in (at, module.end))
            assert exchange.server.traffic.up + exchange.server.traffic.down == 2 * (a + e)


def test_clients_and_server_share_no_storage() -> None:
    module = make_module("vit")
    body = make_body(module)
    other = twin(module)
    pointers = [
        {tensor.untyped_storage().data_ptr() for tensor in holder.state_dict().values()}
        for holder in (module, other, body.blocks)
    ]
    assert not pointers[0] & pointers[1]
    assert not pointers[0] & pointers[2]
    assert not pointers[1] & pointers[2]
    copied = twin(module)
    assert {id(p) for block in copied.blocks.values() for p in block.parameters()} <= {
        id(p) for p in copied.parameters()
    }


def test_tied_embedding_and_head_stay_at_the_client_and_train_there() -> None:
    torch.manual_seed(0)
    module = SplitModule(gpt(11, image_size=6, width=16, depth=3, num_heads=2, tie_weights=True))
    held = module.parts(module.cut_at(1))
    assert "head.weight" in held.base
    assert "backbone.embed.wte.weight" in held.base
    assert held.head == ()
    connect(module, make_body(module), 2)
    step(module, SGD(module.parameters()), batch_for("gpt"))
    assert torch.equal(module.head.weight, module.backbone.embed.wte.weight)


def test_cut_that_tears_a_tied_tensor_is_refused() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    blocks[2].weight = blocks[0].weight
    with pytest.raises(ValueError, match=r"tears apart the tied tensor 'backbone.0.weight'"):
        SplitModule(Model(blocks, nn.Linear(4, 2), "head"), start=1, end=3)
    SplitModule(Model(blocks, nn.Linear(4, 2), "head"), start=3, end=4)


def test_equal_cuts_without_alignment_are_plain_split_learning() -> None:
    """Two clients in turn through one body, against the same written out by hand with whole models."""
    clients = [make_module("lenet"), twin(make_module("lenet"))]
    body = make_body(clients[0])
    optimizers = []
    for module in clients:
        connect(module, body, module.start)
        optimizers.append(module.configure_optimizers())
    by_hand = [make_module("lenet"), twin(make_module("lenet"))]
    middle = twin(make_module("lenet"))
    held = middle.parts(middle.cut_at(middle.start))
    velocity: dict[str, dict[str, torch.Tensor]] = {}
    for seed in range(4):
        who = seed % 2
        x, y = batch_for("lenet", seed)
        step(clients[who], optimizers[who], (x, y))
        model = by_hand[who]
        named, server = dict(model.named_parameters()), dict(middle.named_parameters())
        with torch.no_grad():
            for name in held.body:
                named[name].copy_(server[name])
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                owner = "server" if name in held.body else str(who)
                moving = velocity.setdefault(owner, {})
                moving[name] = gradient + 0.9 * moving[name] if name in moving else gradient
                (server[name] if name in held.body else parameter).sub_(0.1 * moving[name])
    for who, module in enumerate(clients):
        for name in held.client:
            torch.testing.assert_close(module.state_dict()[name], by_hand[who].state_dict()[name])
    for name in held.body:
        torch.testing.assert_close(body.state()[name], middle.state_dict()[name])
