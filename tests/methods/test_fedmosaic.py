"""FedMosaic against its rules written by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional

from fl_lightning.methods.fedmosaic import (
    MosaicModel,
    RelevanceMean,
    canonical_map,
    closest_orthonormal,
    similarity,
)
from fl_lightning.models.model import Model
from fl_lightning.models.timm import vit
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import Federation, assemble
from fl_lightning.seeding import derive_seed
from fl_lightning.state import num_bytes
from tests.federations import TRANSFORMER, assert_same, federation, tiny_model, tiny_transformer

MOSAIC = ["method=fedmosaic", TRANSFORMER, "module.parts=2", "module.rank=3"]
NARROW = [
    "module.others={narrow: {_target_: tests.methods.test_fedmosaic.narrow}}",
    "module.clients={ann: model, bob: narrow, cid: narrow}",
]


def narrow(num_classes: int, in_channels: int = 3, image_size: int = 8) -> Model:
    """Other widths, five blocks, of which the second and the last end a part."""
    model = vit(num_classes, in_channels, image_size, patch_size=4, embed_dim=6, depth=5, num_heads=1)
    for part in model.backbone.modules():
        if isinstance(part, Attention):
            part.fused_attn = False
    return model


class Beside(nn.Module):
    """A layer with its two adapters, by the formula."""

    def __init__(self, layer: nn.Module, key: str, tensors: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.layer, self.key, self.tensors, self.scale = layer, key, tensors, scale

    def forward(self, h: Tensor) -> Tensor:
        t = {name.partition(".")[2]: x for name, x in self.tensors.items() if name.startswith(f"{self.key}.")}
        added = []
        for part in ("local", "received"):
            if "fixed_a" in t:
                inner = torch.einsum("ij,jk,ntk->nti", t[f"{part}.p"], t["fixed_a"], h) + t[f"{part}.q"]
                added.append(torch.einsum("oi,nti->nto", t["fixed_b"], inner))
            else:
                added.append(torch.einsum("or,rk,ntk->nto", t[f"{part}.b"], t[f"{part}.a"], h))
        share = 1 / (1 + (-t["gate"]).exp())
        return self.layer(h) + self.scale * ((1 - share) * added[0] + share * added[1])


def test_two_rounds_by_hand_with_unlike_architectures(tiny_root: Path, tmp_path: Path) -> None:
    lr, tau, every, keep, scale = 0.1, 0.3, 2, 0.5, 8 / 3
    settings = ["optimizer=sgd", f"optimizer.lr={lr}", "optimizer.momentum=0", f"aggregator.tau={tau}"]
    probe = [f"callbacks.relevance.{one}" for one in (f"every={every}", f"keep={keep}", "noise=0")]
    run = federation(tiny_root, tmp_path, *MOSAIC, *NARROW, *settings, *probe)
    module: Any = copy.deepcopy(run.module).double()
    run.fit()
    architecture = {"ann": "model", "bob": "narrow", "cid": "narrow"}
    start = {name: x.clone() for name, x in module.state_dict().items()}
    state, vectors = [], [None, None, None]
    for client in run.clients:
        prefix = f"adapters.{architecture[client.name]}."
        state.append({name.removeprefix(prefix): x.clone() for name, x in start.items() if name.startswith(prefix)})
    heads = [copy.deepcopy(one) for one in (module.head, *[module.others["narrow"].head] * 2)]
    # Blocks 0 and 1 of the first match blocks 1 and 4 of the other; blocks 0, 2 and 3 have plain adapters.
    layers = ("qkv", "proj")
    same = {f"blocks_{n}_attn_{one}": f"blocks_{m}_attn_{one}" for n, m in ((0, 1), (1, 4)) for one in layers}
    sent: list[dict[str, Tensor]] = []
    for round in range(2):
        if round:
            near = torch.zeros(3, 3, dtype=torch.float64)
            for i in range(3):
                for j in range(3):
                    columns = zip(vectors[i].T, vectors[j].T, strict=True)
                    near[i, j] = sum(u @ v / (u.norm() * v.norm()) for u, v in columns) / vectors[i].shape[1]
            for i, mine in enumerate(state):
                for name in [name for name in mine if ".received." in name]:
                    key, _, tensor = name.partition(".received.")
                    names = {}
                    for j in range(3):
                        if j != i:
                            other = key
                            if (i == 0) != (j == 0):
                                other = same.get(key) if i == 0 else {b: a for a, b in same.items()}.get(key)
                            if other is not None:
                                names[j] = f"{other}.local.{tensor}"
                    total = sum((near[i, j] / tau).exp() for j in names)
                    mine[name] = sum((near[i, j] / tau).exp() / total * sent[j][n] for j, n in names.items())
        for client in run.clients:
            mine, head = state[client.id], heads[client.id]
            backbone = copy.deepcopy(module.backbone_of(architecture[client.name])).train()
            for key in {name.partition(".")[0] for name in mine}:
                _, number, _, part = key.split("_")
                attention = backbone.blocks[int(number)].attn
                setattr(attention, part, Beside(getattr(attention, part), key, mine, scale))
            trained = {name: mine[name].requires_grad_() for name in mine if ".local." in name or name.endswith("gate")}
            parameters = [*trained.values(), *head.parameters()]
            client.data.seed(derive_seed(run.loop.seed, "batches", round, client.id))
            gradients = []
            for step, (x, y) in enumerate(client.data.train_dataloader()):
                if step % every == 0:
                    common = copy.deepcopy(run.module).double()
                    weight = common.backbone.blocks[-1].mlp.fc2.weight.requires_grad_()
                    loss = functional.cross_entropy(common.anchor(common.backbone(x.double())), y)
                    [g] = torch.autograd.grad(loss, weight)
                    gradients.append(g[:4])
                slopes = torch.autograd.grad(functional.cross_entropy(head(backbone(x.double())), y), parameters)
                with torch.no_grad():
                    for p, slope in zip(parameters, slopes, strict=True):
                        p -= lr * slope
            for p in trained.values():
                p.requires_grad_(False)
            new = sum(gradients) / len(gradients)
            vectors[client.id] = new if vectors[client.id] is None else (new + vectors[client.id]) / 2
        sent = [{name: x.clone() for name, x in mine.items()} for mine in state]
    rule: Any = run.loop.aggregator
    for client in run.clients:
        prefix, mine = f"adapters.{architecture[client.name]}.", state[client.id]
        assert any(name.startswith("head.") for name in client.personal) == (client.name == "ann")
        moved = [name for name in client.personal if name.startswith(prefix)]
        assert len(moved) == sum(".local." in name or name.endswith("gate") for name in mine)
        for name in moved:
            expected = mine[name.removeprefix(prefix)]
            torch.testing.assert_close(client.personal[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(rule.vectors[client.id].double(), vectors[client.id], rtol=1e-4, atol=1e-6)
        # Each is sent to others by the place that all architectures have.
        assert len(rule.adapters[client.id]) == len([name for name in mine if ".local." in name])
    gates = [name for name in run.clients[1].personal if name.endswith("gate")]
    assert gates
    assert all(run.clients[1].personal[name] != 0 for name in gates)


@pytest.mark.every
def test_texts_with_unlike_backbones_by_hand(tmp_path: Path) -> None:
    """A round on small GPT-2s of other widths and depths, whose layers have transposed weights."""
    root = tmp_path / "reviews"
    root.mkdir()
    for shop in ("books", "shoes", "tea"):
        lines = [{"text": f"{['bad', 'good'][n % 2]} {shop} {n % 7}", "label": n % 2} for n in range(20)]
        (root / f"{shop}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    still = "n_positions: 16, vocab_size: 256, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0, bos_token_id: 0"
    form = f"model_type: gpt2, n_head: 2, eos_token_id: 0, {still}"
    other = (
        f"_target_: fl_lightning.models.hf.hf, kind: sequence, padding: 0, config: {{n_embd: 6, n_layer: 3, {form}}}"
    )
    words = ["data=texts", f"data.root={root}", "data.label=label", "data.length=16", "data.batch_size=4", "model=hf"]
    words += [
        "model.kind=sequence",
        "model.padding=0",
        "~model.config",
        f"+model.config={{n_embd: 8, n_layer: 2, {form}}}",
    ]
    words += ["method=fedmosaic", "module.parts=2", "module.rank=3", f"module.others={{narrow: {{{other}}}}}"]
    words += ["module.clients={books: model, shoes: narrow, tea: narrow}", "optimizer=sgd", "optimizer.momentum=0"]
    words += [
        "callbacks.relevance.noise=0",
        "callbacks.relevance.every=1",
        "callbacks.relevance.keep=0.5",
        "loop.rounds=1",
    ]
    run = assemble(
        plain(composed("train", [*words, "optimizer.lr=0.1", "logger=none", "dashboard=null"])), RunFolder(tmp_path)
    )
    module: Any = copy.deepcopy(run.module).double()
    run.fit()
    rule: Any = run.loop.aggregator
    assert module._public.max() > 100  # of all tokens, not of the two classes
    for client, name in zip(run.clients, ("model", "narrow", "narrow"), strict=True):
        prefix = f"adapters.{name}."
        mine = {n.removeprefix(prefix): x.clone() for n, x in module.state_dict().items() if n.startswith(prefix)}
        backbone, head = copy.deepcopy(module.backbone_of(name)), copy.deepcopy(module.head)
        if name != "model":
            head = copy.deepcopy(module.others[name].head)
        for key, (layer, _) in module.layers[name].items():
            above, _, last = layer.rpartition(".")
            setattr(backbone.get_submodule(above), last, Beside(backbone.get_submodule(layer), key, mine, 8 / 3))
        trained = {n: mine[n].requires_grad_() for n in mine if ".local." in n or n.endswith("gate")}
        assert {n.partition(".")[0] for n in trained} == set(module.layers[name])
        parameters = [*trained.values(), *head.parameters()]
        client.data.seed(derive_seed(run.loop.seed, "batches", 0, client.id))
        gradients = []
        for x, y in client.data.train_dataloader():
            common = copy.deepcopy(module)
            weight = common.backbone.transformer.h[-1].mlp.c_proj.weight.requires_grad_()
            [g] = torch.autograd.grad(functional.cross_entropy(common.anchor(common.backbone(x)), y), weight)
            gradients.append(g.T[:4])
            slopes = torch.autograd.grad(functional.cross_entropy(head(backbone(x)), y), parameters, allow_unused=True)
            with torch.no_grad():
                for p, slope in zip(parameters, slopes, strict=True):
                    p -= 0.1 * slope
        for n in trained:
            torch.testing.assert_close(client.personal[prefix + n].double(), mine[n], rtol=1e-4, atol=1e-6, msg=n)
        torch.testing.assert_close(
            rule.vectors[client.id].double(), sum(gradients) / len(gradients), rtol=1e-4, atol=1e-6
        )
    # What is of one size goes to all; plain adapters go to those of the same architecture.
    infos = rule.clients
    near = torch.stack([similarity(rule.vectors[0], rule.vectors[k]) for k in (1, 2)]).div(0.5).softmax(0)
    down = rule.broadcast({}, infos[0])
    for place, key in module.invariant("model").items():
        parts = [rule.adapters[k][f"{place}|p"] for k in (1, 2)]
        assert all(part.abs().sum() > 0 for part in parts)
        mixed = near[0] * parts[0] + near[1] * parts[1]
        torch.testing.assert_close(down[f"adapters.model.{key}.received.p"], mixed)
    plainly = {key for key in module.layers["narrow"] if key not in module.invariant("narrow").values()}
    assert plainly
    assert all(f"adapters.narrow.{key}.received.a" in rule.broadcast({}, infos[1]) for key in plainly)
    assert not any("|".join(("narrow", key, "a")) in rule.adapters[0] for key in plainly)


def run_of(tiny_root: Path, folder: Path, *overrides: str) -> Federation:
    run = federation(tiny_root, folder, *MOSAIC, *overrides)
    run.fit()
    return run


@pytest.mark.slow
def test_at_share_0_clients_train_alone(tiny_root: Path, tmp_path: Path) -> None:
    """Whoever else is there; with another share they do not."""
    alone = run_of(tiny_root, tmp_path / "all", "module.mix=0")
    mixed = run_of(tiny_root, tmp_path / "mixed", "module.mix=0.5")
    one = federation(tiny_root, tmp_path / "one", *MOSAIC, "module.mix=0")
    one.loop.cohort.draw = lambda clients, round, seed: clients[:1]  # type: ignore[method-assign]
    one.fit()
    assert_same(alone.clients[0].personal, one.clients[0].personal)
    with pytest.raises(AssertionError):
        assert_same(alone.clients[0].personal, mixed.clients[0].personal)


def test_who_is_alone_gets_its_own_and_a_great_tau_takes_all_alike() -> None:
    module = MosaicModel(tiny_transformer(3), 3, 3, 8, parts=2)
    rule = RelevanceMean(tau=1e6)
    infos: Any = [type("Info", (), {"id": id, "name": str(id)})() for id in range(4)]
    rule.setup(module, infos)
    key = next(iter(module.exchanged("model")))
    name = module.exchanged("model")[key]
    assert torch.equal(rule.broadcast(module.state_dict(), infos[0])[name], module.state_dict()[name])
    for id in range(3):
        rule.adapters[id] = {key: torch.full((2, 2), float(id))}
        rule.vectors[id] = torch.randn(3, 5)
        if not id:
            assert torch.equal(rule.broadcast({}, infos[0])[name], torch.zeros(2, 2))
    torch.testing.assert_close(rule.broadcast({}, infos[0])[name], torch.full((2, 2), 1.5))
    torch.testing.assert_close(rule.broadcast({}, infos[3])[name], torch.full((2, 2), 1.0))
    rule.tau = 1e-4
    rule.vectors[2] = rule.vectors[0] + 1e-3
    torch.testing.assert_close(rule.broadcast({}, infos[0])[name], torch.full((2, 2), 2.0))


def test_only_adapters_and_what_data_are_like_travel(tiny_root: Path, tmp_path: Path) -> None:
    run = run_of(tiny_root, tmp_path, *NARROW, "loop.rounds=1")
    module: Any = run.module
    own = module.state_dict()
    sizes = [num_bytes({n: own[n] for n in module.exchanged(a).values()}) for a in ("model", "narrow", "narrow")]
    assert run.loop.bytes_down == sum(sizes)
    assert run.loop.bytes_up == sum(sizes) + 3 * 4 * 3 * 16  # three of eight rows of the last layer's weight
    assert not any(torch.equal(x, run.loop.initial[n]) for n, x in run.clients[0].personal.items() if ".local.p" in n)


def test_aligned_adapters_say_the_same_of_the_same_inputs() -> None:
    """Of equal hidden states A is the first one's, and B gives outputs as spread as a random one's."""
    torch.manual_seed(0)
    first = tiny_transformer(3)
    module = MosaicModel(first, 3, 3, 8, {"same": copy.deepcopy(first), "other": narrow(3)}, parts=2, rank=2)
    x = torch.randn(64, 3, 8, 8)
    before = {p: module.pair("same", key).get_buffer("fixed_b").clone() for p, key in module.invariant("same").items()}
    for place in module.invariant("model").values():
        a = module.pair("model", place).get_buffer("fixed_a")
        a.copy_(closest_orthonormal(a - a.mean(1, keepdim=True)))  # behind a LayerNorm the mean direction says nothing
    module.align(x)
    for place, tokens in module.inputs("model", x).items():
        h = tokens.flatten(0, 1)
        pivot, ours, other = (module.pair(name, module.invariant(name)[place]) for name in ("model", "same", "other"))
        a, b = ours.get_buffer("fixed_a"), ours.get_buffer("fixed_b")
        torch.testing.assert_close(a, pivot.get_buffer("fixed_a"), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other.get_buffer("fixed_a") @ other.get_buffer("fixed_a").T, torch.eye(2))
        inner = (h @ a.double().T).float()
        torch.testing.assert_close((inner @ b.T).T.cov(), (inner @ before[place].T).T.cov(), rtol=0.05, atol=1e-3)
    h = torch.randn(500, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    torch.testing.assert_close(h @ turn @ canonical_map(h, h @ turn), h @ turn @ turn.T, rtol=1e-2, atol=1e-2)
    long = torch.randn(2, 5)
    near = closest_orthonormal(long)
    torch.testing.assert_close(near @ near.T, torch.eye(2))
    assert all((long - near).norm() <= (long - closest_orthonormal(torch.randn(2, 5))).norm() for _ in range(20))


def test_what_cannot_work_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts must be at most 2, the blocks with adapters of model, got 4"):
        federation(tiny_root, tmp_path, "method=fedmosaic", TRANSFORMER)
    with pytest.raises(ValueError, match="without BatchNorm"):
        MosaicModel(tiny_model(3), 3, 3, 8)
    with pytest.raises(ValueError, match="uniform"):
        RelevanceMean(weights="examples")
    for key, value in {"parts": 0, "mix": 2.0, "public": 1}.items():
        with pytest.raises(ValueError, match=key):
            MosaicModel(tiny_transformer(3), 3, 3, 8, **{key: value})  # type: ignore[arg-type]
