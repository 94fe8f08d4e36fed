"""Frozen weights in fewer bytes: what they compute, how far off it is, and what it costs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fl_lightning.models.adapters import Adapters, merged, with_adapters
from fl_lightning.models.compact import CompactLinear
from fl_lightning.module import FederatedModule
from fl_lightning.state import num_bytes
from tests.federations import assert_same, federation, outcome, whole_and_resumed
from tests.models.test_adapters import INPUTS, randomize

pytest.importorskip("peft")


def layer(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(6, 4)
    made = pytest.importorskip("transformers").pytorch_utils.Conv1D(4, 6)
    nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("base", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_is_the_dense_layer_of_the_restored_weight_and_near_the_first(kind: str, base: Any) -> None:
    plain = layer(kind)
    compact = CompactLinear(plain, base)
    x = torch.randn(3, 5, 6, requires_grad=True)
    scale = compact._parameters.get("scale")
    weight = compact.restored(compact.weight, scale)
    dense = weight.T if kind == "conv1d" else weight
    expected = torch.nn.functional.linear(x, dense, plain.bias)
    torch.testing.assert_close(compact(x), expected)
    [slope] = torch.autograd.grad(compact(x).square().sum(), x)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.square().sum(), x)[0])
    own = plain.weight.T if kind == "conv1d" else plain.weight
    bound = own.abs().amax(1, keepdim=True) / 254 if base == "int8" else own.abs() * 2**-8
    assert ((dense - own).abs() <= bound * (1 + 1e-5)).all()
    if base == "int8":
        assert ((compact(x) - plain(x)).abs() <= x.abs().sum(-1, keepdim=True) * bound.T * (1 + 1e-5)).all()
        assert num_bytes({"w": compact.weight}) == own.numel()
    torch.testing.assert_close(torch.vmap(compact)(x), expected)


@pytest.mark.parametrize("base", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_adapters_train_beside_it_as_beside_the_restored_weights(kind: str, base: Any) -> None:
    make, x = INPUTS[kind]
    plain = FederatedModule(make()).eval()
    module = FederatedModule(Adapters(rank=2, base=base).adapt(make())).eval()
    module.load_state_dict(with_adapters(module, plain.state_dict()))
    assert {tensor.dtype for name, tensor in module.state_dict().items() if "lora_" in name} == {torch.float32}
    randomize(module)
    found = merged(module, module.state_dict())
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    near = FederatedModule(make()).eval()
    near.load_state_dict(found)
    torch.testing.assert_close(module(x), near(x), rtol=1e-4, atol=1e-3)
    again = with_adapters(module, merged(module, {n: t for n, t in module.state_dict().items() if "lora_" not in n}))
    own = module.state_dict()
    assert all(
        torch.equal(again[name], own[name]) for name in own if "lora_" not in name and not name.endswith("scale")
    )
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))
    module(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for n, p in module.named_parameters() if "head" not in n)


def test_the_frozen_weights_take_a_quarter_of_the_memory() -> None:
    make, _ = INPUTS["vit"]
    names = ("qkv.base_layer.weight", "proj.base_layer.weight", "fc1.weight", "fc2.weight")
    sizes = {}
    for base in ("float32", "bfloat16", "int8"):
        state = FederatedModule(Adapters(rank=2, base=base).adapt(make())).state_dict()  # type: ignore[arg-type]
        sizes[base] = num_bytes({name: tensor for name, tensor in state.items() if name.endswith(names)})
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["int8"]


VIT = ["model._target_=fl_lightning.models.vit", "+model.patch_size=4", "+model.embed_dim=8", "+model.depth=1"]
VIT += ["+model.num_heads=2"]


def test_stopped_and_resumed_equals_uninterrupted_and_checkpoints_hold_no_base(tiny_root: Path, tmp_path: Path) -> None:
    one, other = whole_and_resumed(tiny_root, tmp_path, 1, *VIT, "method=fedit", "model.adapters.base=int8")
    assert_same(outcome(one), outcome(other))
    assert {tensor.dtype for tensor in one.loop.state.values()} == {torch.float32}
    assert one.module.get_parameter("backbone.blocks.0.attn.qkv.base_layer.weight").dtype == torch.int8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.adapters={rank: 2, base: int4}"],
            "model.adapters.base must be one of float32, bfloat16, int8, got 'int4'",
        ),
        (["model.adapters={rank: 2, base: int8}"], "model.adapters.base must be float32 for a backbone without linear"),
        (["model.adapters={rank: 2, base: int8, dora: true}"], "model.adapters.base must be float32 with dora=true"),
        ([*VIT, "method=flora", "+model.adapters.base=int8"], "model.adapters.base must be float32 for this method"),
    ],
)
def test_wrong_bases_are_one_sentence(words: list[str], message: str, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        federation(tiny_root, tmp_path, *words).fit()
