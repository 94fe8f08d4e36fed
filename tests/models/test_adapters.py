"""Adapters in a model: what they stand beside stays and is there once; what travels is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fl_lightning.models import vit
from fl_lightning.models.adapters import Adapters, adapted_layers, merged, save_peft_change, with_adapters
from fl_lightning.models.export import export_state_dict
from fl_lightning.models.model import Model
from fl_lightning.module import FederatedModule
from fl_lightning.state import num_bytes
from tests.federations import add_recorder, assert_same, federation, outcome, tiny_model, whole_and_resumed

pytest.importorskip("peft")

ADAPTERS = "model.adapters={rank: 2, alpha: 4}"


def small_vit() -> Model:
    return vit(3, in_channels=3, image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)


def small_gpt2() -> Model:
    pytest.importorskip("transformers")
    from fl_lightning.models.hf import hf

    return hf(11, image_size=6, config={"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2}, last=True)


INPUTS = {
    "vit": (small_vit, torch.rand(4, 3, 8, 8)),
    "convolutions": (lambda: tiny_model(3), torch.rand(4, 3, 8, 8)),
    "gpt2": (small_gpt2, torch.randint(0, 11, (4, 6))),
}


def randomize(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_the_plain_model_with_the_adapters_added_computes_the_same(kind: str, dora: bool) -> None:
    make, x = INPUTS[kind]
    plain = FederatedModule(make()).eval()
    module = FederatedModule(Adapters(rank=2, dora=dora).adapt(make())).eval()
    module.load_state_dict(with_adapters(module, plain.state_dict()))
    torch.testing.assert_close(module(x), plain(x))  # B is zero at the start
    randomize(module)
    assert not torch.allclose(module(x), plain(x))
    found = merged(module, module.state_dict())
    assert found.keys() == plain.state_dict().keys()
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(x), module(x), rtol=1e-4, atol=1e-3)
    assert export_state_dict(found, module.head_path)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_mean_of_products_is_one_adapter_that_peft_reads(kind: str, count: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, x = INPUTS[kind]
    plain = FederatedModule(make()).eval()
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    adapters, states = Adapters(rank=1), []
    for _ in range(count):
        module = FederatedModule(adapters.adapt(make())).eval()
        module.load_state_dict(with_adapters(module, start))
        randomize(module)
        states.append(merged(module, module.state_dict()))
    plain.load_state_dict({name: sum(one[name].double() for one in states) / count for name in start})
    soup = plain.state_dict()
    assert save_peft_change(tmp_path, plain, start, soup, adapters, count, plain.head_path)
    before = FederatedModule(make()).eval()
    before.load_state_dict(start)
    read = peft.PeftModel.from_pretrained(before.backbone, str(tmp_path)).eval()
    assert {len(tensor) for name, tensor in read.named_parameters() if "lora_A" in name} == {count}
    torch.testing.assert_close(read.base_model.model(x), plain.backbone(x), rtol=1e-4, atol=1e-4)
    # What is more than adapters have done has no folder.
    assert not save_peft_change(tmp_path / "no", plain, start, soup, Adapters(1, dora=True), count, plain.head_path)
    other = next(n for n in soup if n.endswith("bias") and not n.startswith("head."))
    soup[other] = soup[other] + 1
    assert not save_peft_change(tmp_path / "no", plain, start, soup, adapters, count, plain.head_path)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "targets", "count"),
    [
        ("vit", "attention", 4),
        ("vit", "auto", 4),
        ("vit", "linear", 8),
        ("vit", ["qkv", "blocks.1.mlp.fc1"], 3),
        ("convolutions", "auto", 2),
        ("convolutions", ["conv2"], 1),
        ("gpt2", "attention", 4),
        ("gpt2", "linear", 8),
    ],
)
def test_adapts_the_layers_that_it_says(kind: str, targets: Any, count: int) -> None:
    module = FederatedModule(Adapters(rank=2, targets=targets).adapt(INPUTS[kind][0]()))
    assert len(adapted_layers(module)) == count
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} <= {"head.weight", "head.bias"}
    assert sum("lora_" in name for name in trained) == 2 * count
    assert len(module.trained_parameters()) == len(trained)


def test_only_the_adapters_and_the_head_travel_and_are_kept(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, ADAPTERS, "method=fedavg", "+model.batch_norm=false", "seed=3")
    recorder = add_recorder(run)
    run.fit()
    own, base = run.module.state_dict(), run.module.base_names
    assert base == {name for name in own if "lora_" not in name and not name.startswith("head.")}
    travels = {name: tensor for name, tensor in own.items() if name not in base}
    assert run.loop.bytes_up == run.loop.bytes_down == 2 * 3 * num_bytes(travels)
    assert all(update.state.keys() == travels.keys() for update in recorder.updates)
    assert run.loop.state.keys() == travels.keys()
    saved = run.loop.state_dict()
    best = saved["callbacks"]["evaluation"]["best"]["global"]
    assert best["state"].keys() == best["global"].keys() == travels.keys()
    whole = run.loop.global_state()
    assert whole is not None
    assert whole.keys() == own.keys()
    moved = {name for name in own if not torch.equal(own[name], run.loop.initial[name])}
    assert moved & travels.keys()
    for name in base:  # one copy: the initial values are the module's own tensors, and no client has others
        assert run.loop.initial[name].data_ptr() == own[name].data_ptr()
    assert not any(client.personal for client in run.clients)
    with mock.patch("torch.optim.SGD", side_effect=torch.optim.SGD):
        run.module.context.optimizer = torch.optim.SGD
        optimizer = run.module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for name, parameter in run.module.named_parameters() if name not in base}


def test_stopped_and_resumed_equals_uninterrupted(tiny_root: Path, tmp_path: Path) -> None:
    one, other = whole_and_resumed(tiny_root, tmp_path, 1, ADAPTERS, "method=fedavg", "seed=3")
    assert_same(outcome(one), outcome(other))


def test_a_run_does_not_go_on_beside_other_weights(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "one", ADAPTERS, "method=fedavg", "loop.rounds=1")
    run.fit()
    other = federation(tiny_root, tmp_path / "other", ADAPTERS, "method=fedavg", "seed=9")
    other.resume = run.loop.state_dict()
    with pytest.raises(ValueError, match="the frozen weights must be those that the run began with"):
        other.fit()


def test_a_fit_that_changes_the_base_is_an_error(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, ADAPTERS, "method=fedavg")
    step = type(run.module).training_step

    def careless(batch: Any, index: int) -> Any:
        with torch.no_grad():
            run.module.get_parameter("backbone.conv1.base_layer.weight").add_(1)
        return step(run.module, batch, index)

    with mock.patch.object(run.module, "training_step", careless), pytest.raises(RuntimeError) as caught:
        run.fit()
    assert "backbone.conv1.base_layer.weight is declared as sharing.fixed, but the fit changed it" in str(caught.value)


def test_begins_with_the_weights_of_a_plain_model(tiny_root: Path, tmp_path: Path) -> None:
    plain = federation(tiny_root, tmp_path / "plain", "method=fedavg", "loop.rounds=1")
    plain.fit()
    state = plain.loop.global_state()
    assert state is not None
    file = tmp_path / "global_model.pt"
    torch.save(export_state_dict(state, "head"), file)
    run = federation(tiny_root, tmp_path / "run", ADAPTERS, "method=ditto", f"init_from='{file}'", "loop.rounds=0")
    x = torch.rand(4, 3, 8, 8)
    expected = plain.module.eval()
    expected.load_state_dict(state)
    torch.testing.assert_close(run.module.eval()(x), expected(x))
    torch.testing.assert_close(run.module.personal_forward(x), expected(x))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{rank: 0}", "model.adapters.rank must be a whole number of at least 1, got 0"),
        ("{rank: 9}", "model.adapters.rank must be at most 4, the smaller side of conv1 (4 x 27), got 9"),
        ("{alpha: 0}", "model.adapters.alpha must be above 0, got 0"),
        ("{rang: 2}", "model.adapters.rang: .*did you mean rank"),
        ("{targets: attention}", "model.adapters.targets must fit a layer of the backbone, got attention"),
        (
            "{targets: [konv2]}",
            "model.adapters.targets must fit layers .* got 'konv2'; close names: conv2",
        ),
        ("{targets: []}", "model.adapters.targets must name a layer"),
        ("{targets: some}", "model.adapters.targets must be one of auto, attention, linear, got 'some'"),
        ("4", "model.adapters must be null or a mapping"),
        ("{rank: 2} method=splitfed", "the server must have something to train, but with model.adapters"),
    ],
)
def test_bad_input_is_one_sentence(words: str, message: str, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        federation(tiny_root, tmp_path, *f"model.adapters={words}".rsplit(" ", "method" in words))


def test_without_peft_the_extra_is_named() -> None:
    with mock.patch.dict("sys.modules", peft=None), pytest.raises(ImportError, match=r"fl_lightning\[lora\]"):
        Adapters().adapt(small_vit())
