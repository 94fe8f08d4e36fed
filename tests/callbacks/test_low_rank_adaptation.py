"""Low-rank changes of attention: their rank, and that nothing of the adapters is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fl_lightning.callbacks.freeze_schedule import FreezeSchedule
from fl_lightning.callbacks.low_rank_adaptation import LowRankAdaptation
from fl_lightning.models import vit
from fl_lightning.module import FederatedModule
from fl_lightning.run.config import CONF
from tests.callbacks.conftest import ADAMW, NUM_CLASSES, TinyFit

peft = pytest.importorskip("peft")


def tiny_vit() -> FederatedModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vit(NUM_CLASSES, in_channels=1, image_size=4, patch_size=2, embed_dim=8, depth=2, num_heads=2)
    return FederatedModule(model)


def test_with_lengths_the_same_layers_move_by_more_than_the_rank(tiny_fit: TinyFit) -> None:
    tiny_fit({"lora": LowRankAdaptation(rank=1, targets=["qkv"], dora=True)}, ADAMW, module=tiny_vit())
    layers = {f"backbone.blocks.{block}.attn.qkv.weight" for block in (0, 1)}
    assert tiny_fit.changed() == layers | {"head.weight", "head.bias"}
    changes = [tiny_fit.after[layer] - tiny_fit.before[layer] for layer in layers]
    assert all(int(torch.linalg.matrix_rank(change, atol=1e-6)) > 1 for change in changes)


@pytest.mark.parametrize("schedule", [False, True])
def test_the_change_of_a_layer_has_the_rank_and_nothing_else_of_the_backbone_moves(
    tiny_fit: TinyFit, schedule: bool
) -> None:
    module = tiny_vit()
    callbacks = {"lora": LowRankAdaptation(rank=2, targets=["qkv"])}
    if schedule:
        callbacks["freeze"] = FreezeSchedule([{"train": ["*"]}])
    tiny_fit(callbacks, ADAMW, module=module)
    changed = tiny_fit.changed()
    layers = {f"backbone.blocks.{block}.attn.qkv.weight" for block in (0, 1)}
    assert changed == layers | {"head.weight", "head.bias"}
    for layer in layers:
        change = tiny_fit.after[layer] - tiny_fit.before[layer]
        assert int(torch.linalg.matrix_rank(change, atol=1e-6)) in (1, 2)
    assert all(p.requires_grad for p in module.parameters())
    assert not hasattr(module.backbone, "peft_config")
    first = tiny_fit.after
    tiny_fit(callbacks, ADAMW, module=tiny_vit())
    assert all(torch.equal(first[name], tensor) for name, tensor in tiny_fit.after.items())


def test_of_the_bundled_transformer_the_attention_alone_is_adapted() -> None:
    """The convolution that cuts an image into patches is named ``proj`` too."""
    module = FederatedModule(
        instantiate(OmegaConf.load(CONF / "model/vit_tiny.yaml"), num_classes=10, in_channels=3, image_size=32)
    )
    node: Any = OmegaConf.load(CONF / "personalization/lora_soup_ft.yaml")
    lora = instantiate(node.lora_soup_ft.callbacks.lora)
    trainer: Any = None
    lora.setup(trainer, module, "fit")
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    adapted = [name for name, part in module.backbone.named_modules() if isinstance(part, kind)]
    lora.teardown(trainer, module, "fit")
    assert adapted == [f"blocks.{block}.attn.{layer}" for block in range(6) for layer in ("qkv", "proj")]
    assert not any(isinstance(part, kind) for part in module.modules())


def test_a_convolutional_backbone_is_refused(tiny_fit: TinyFit) -> None:
    with pytest.raises(ValueError, match="targets must fit a layer of the backbone, got attention"):
        tiny_fit({"lora": LowRankAdaptation()})


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_wrong_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LowRankAdaptation(**arguments)  # type: ignore[arg-type]
