"""Frozen weights in fewer bytes: what they compute, how far off it is, and what it costs."""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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

NF4 = (
    *(-1.0, -0.6961928010, -0.5250730515, -0.3949174881, -0.2844413817, -0.1847734302, -0.0910500363, 0.0),
    *(0.0795802996, 0.1609302014, 0.2461123019, 0.3379152417, 0.4407098293, 0.5626170039, 0.7229568362, 1.0),
)
"""The 16 values of QLoRA, appendix E."""

BASES = [
    *("bfloat16", "int8"),
    pytest.param("nf4", marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")),
]


def layer(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(6, 4)
    made = pytest.importorskip("transformers").pytorch_utils.Conv1D(4, 6)
    nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("base", BASES)
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
    if base == "nf4":
        bound = torch.full_like(own, 0.16 * float(own.detach().abs().max()))  # half the widest gap; all is one block
    assert ((dense - own).abs() <= bound * (1 + 1e-5)).all()
    if base == "int8":
        assert ((compact(x) - plain(x)).abs() <= x.abs().sum(-1, keepdim=True) * bound.T * (1 + 1e-5)).all()
        assert num_bytes({"w": compact.weight}) == own.numel()
    torch.testing.assert_close(torch.vmap(compact)(x), expected)


@pytest.mark.parametrize("base", BASES)
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


@pytest.mark.parametrize("shape", [(5, 3), (48, 32), (7, 100)])
def test_four_bits_are_the_nearest_value_of_each_block(shape: tuple[int, int]) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    plain = nn.Linear(shape[1], shape[0])
    compact = CompactLinear(plain, "nf4")
    flat = plain.weight.detach().flatten().numpy()
    blocks = [flat[start : start + 64] for start in range(0, len(flat), 64)]
    values = np.array(NF4)
    nearest = [
        values[np.abs(block[:, None] / abs(block).max() - values).argmin(1)] * abs(block).max() for block in blocks
    ]
    found = compact.restored(compact.weight, compact._parameters["scale"])
    np.testing.assert_allclose(found, np.concatenate(nearest).reshape(shape), rtol=1e-5)
    assert num_bytes({"w": compact.weight}) == -(-len(flat) // 2)
    torch.testing.assert_close(compact.to(torch.float64)(torch.eye(shape[1]).double()), (found.T + plain.bias).double())


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


@pytest.mark.parametrize("base", BASES[1:])
def test_stopped_and_resumed_equals_uninterrupted_and_checkpoints_hold_no_base(
    base: str, tiny_root: Path, tmp_path: Path
) -> None:
    one, other = whole_and_resumed(tiny_root, tmp_path, 1, *VIT, "method=fedit", f"model.adapters.base={base}")
    assert_same(outcome(one), outcome(other))
    assert {tensor.dtype for tensor in one.loop.state.values()} == {torch.float32}
    dtype = torch.int8 if base == "int8" else torch.uint8
    assert one.module.get_parameter("backbone.blocks.0.attn.qkv.base_layer.weight").dtype == dtype


def test_without_the_library_four_bits_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = INPUTS["vit"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'fl_lightning\[bitsandbytes\]'"):
        Adapters(rank=2, base="nf4").adapt(make())
    with pytest.raises(ImportError, match=r"pip install 'fl_lightning\[bitsandbytes\]'"):
        Adapters(rank=2, base="nf4").check(make().backbone)
    old = SimpleNamespace(__version__="0.45.3", functional=None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", old)
    with pytest.raises(ImportError, match=r"needs bitsandbytes 0\.46 or newer, got 0\.45\.3"):
        Adapters(rank=2, base="nf4").adapt(make())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.adapters={rank: 2, base: int4}"],
            "model.adapters.base must be one of float32, bfloat16, int8, nf4, got 'int4'",
        ),
        (["model.adapters={rank: 2, base: int8}"], "model.adapters.base must be float32 for a backbone without linear"),
        (["model.adapters={rank: 2, base: int8, dora: true}"], "model.adapters.base must be float32 with dora=true"),
        ([*VIT, "method=flora", "+model.adapters.base=int8"], "model.adapters.base must be float32 for this method"),
    ],
)
def test_wrong_bases_are_one_sentence(words: list[str], message: str, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        federation(tiny_root, tmp_path, *words).fit()
