"""Backbones as chains of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fl_lightning.checks import ArgumentError
from fl_lightning.models import lenet5, resnet18, timm_model
from fl_lightning.models.prompts import Prompt
from fl_lightning.split.blocks import chain, check, run, tensor_names
from fl_lightning.split.module import SplitModule
from tests.split.halves import MODELS, small_gpt, small_lenet, small_vit, timm_resnet

IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (small_lenet, ["stage1", "stage2", "fc1", "fc2"]),
        (small_vit, ["embed", "blocks.0", "blocks.1", "blocks.2", "readout"]),
        (small_gpt, ["embed", "h0", "h1", "h2", "readout"]),
        (
            lambda: resnet18(num_classes=2),
            ["conv1", "bn1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))],
        ),
        (timm_resnet, ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "global_pool"]),
    ],
    ids=["lenet5", "vit", "gpt", "resnet18", "timm_resnet"],
)
def test_blocks_compose_the_backbone(make, names: list[str]) -> None:
    backbone = make().backbone
    blocks = chain(backbone)
    assert list(blocks) == names
    check(blocks, backbone, torch.zeros(1, 6, dtype=torch.int64) if make is small_gpt else torch.randn(IMAGE.shape))


def test_pretrained_style_vit_with_fc_norm_composes() -> None:
    backbone = timm_model("test_vit2", num_classes=3, image_size=32).backbone  # registers and average pooling
    check(chain(backbone), backbone, torch.randn(1, 3, 32, 32))


def test_training_a_block_trains_the_backbone() -> None:
    backbone = small_vit().backbone
    blocks = chain(backbone)
    run(list(blocks.values()), torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_embedding_of_a_vit_holds_tokens_and_positions() -> None:
    backbone = small_vit().backbone
    held = tensor_names([chain(backbone)["embed"]], backbone.state_dict(keep_vars=True))
    assert set(held) == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_declared_blocks() -> None:
    backbone = timm_model("test_convnext", num_classes=2).backbone
    with pytest.raises(ValueError, match=r"blocks of a ConvNeXt are not known; declare them .*split.blocks=\[stem, "):
        chain(backbone)
    stages = [f"stages.{index}" for index in range(4)]
    blocks = chain(backbone, ["stem", *stages, ["norm_pre", "head"]])
    assert list(blocks) == ["stem", *stages, "norm_pre"]
    check(blocks, backbone, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"no module \['stages.9'\]; its children are stem, stages"):
        chain(backbone, ["stem", "stages.9"])


def test_wrong_declarations_are_refused() -> None:
    backbone = lenet5(num_classes=2, image_size=16).backbone
    with pytest.raises(ValueError, match=r"leave out fc2\.0\.bias, fc2\.0\.weight"):
        check(chain(backbone, ["stage1", "stage2", "fc1"]), backbone, IMAGE)
    shuffled = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="do not give what the backbone gives"):
        check(chain(shuffled, ["2", "1", "0"]), shuffled, torch.randn(1, 2))


def test_a_prompt_is_no_part_of_a_cut_model() -> None:
    with pytest.raises(ArgumentError, match="low-rank .* got a prompt, which belongs to no block"):
        SplitModule(Prompt(2).adapt(MODELS["vit"]()))
