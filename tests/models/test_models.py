"""The model factories against published sizes and against the plain models they are taken from."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18

from fl_lightning.models import (
    Model,
    cnn2,
    export_state_dict,
    import_state_dict,
    lenet5,
    resnet8,
    resnet18,
    timm_model,
    vit,
)
from fl_lightning.models.timm import compare_normalization

FACTORIES = {
    "lenet5": lenet5,
    "cnn2": cnn2,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet18_group": lambda **data: resnet18(norm="group", **data),
    "test_vit": lambda **data: timm_model("test_vit", **data),
    "test_resnet": lambda **data: timm_model("test_resnet", **data),
    "vit": lambda **data: vit(embed_dim=16, depth=2, num_heads=2, **data),
}


def named_state(model: Model) -> dict[str, torch.Tensor]:
    """The tensors of both parts under the library's names."""
    return nn.ModuleDict({"backbone": model.backbone, "head": model.head}).state_dict()


def num_parameters(model: Model) -> int:
    return sum(p.numel() for part in (model.backbone, model.head) for p in part.parameters())


@pytest.mark.parametrize(
    ("factory", "count"),
    [(lenet5, 62_006), (cnn2, 878_538), (resnet8, 78_042), (resnet18, 11_173_962)],
    ids=["lenet5", "cnn2", "resnet8", "resnet18"],
)
def test_parameter_count_is_the_published_one(factory, count: int) -> None:
    assert num_parameters(factory(num_classes=10, in_channels=3, image_size=32)) == count


@pytest.mark.parametrize("name", FACTORIES)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = FACTORIES[name](num_classes=5, in_channels=1, image_size=32)
    features = model.backbone(torch.randn(3, 1, 32, 32))
    assert features.ndim == 2
    logits = model.head(features)
    assert logits.shape == (3, 5)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for part in (model.backbone, model.head):
        for path, parameter in part.named_parameters():
            assert parameter.grad is not None, path


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (16, 3)])
def test_small_networks_take_the_image_sizes_of_the_data(size: int, channels: int) -> None:
    for factory in (lenet5, cnn2):
        model = factory(num_classes=4, in_channels=channels, image_size=size)
        assert model.head(model.backbone(torch.randn(2, channels, size, size))).shape == (2, 4)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "resnetv2_50", "dpn48b"]
)
def test_parts_equal_timm_and_export_loads_strictly(name: str) -> None:
    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    ours = timm_model(name, num_classes=7, in_channels=3, image_size=64)
    plain = timm.create_model(name, num_classes=7, **({"img_size": 64} if fixed else {}))
    plain.load_state_dict(export_state_dict(named_state(ours), ours.head_path), strict=True)
    for module in (ours.backbone, ours.head, plain):
        module.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours.backbone(x)), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_backbone_comes_from_a_file_of_a_plain_model(ending: str, tmp_path: Path) -> None:
    plain = timm.create_model("test_vit", num_classes=9, img_size=32)
    path = str(tmp_path / f"plain.{ending}")
    (torch.save if ending == "pt" else save_file)(plain.state_dict(), path)
    ours = timm_model("test_vit", num_classes=4, image_size=32, weights=path)
    own = ours.backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.state_dict().items() if name in own)
    assert ours.head.weight.shape[0] == 4
    with pytest.raises(ValueError, match=r"weights must be .* backbone, .* other shapes: pos_embed"):
        timm_model("test_vit", num_classes=4, image_size=64, weights=path)
    with pytest.raises(ValueError, match="weights must be null where pretrained is true"):
        timm_model("test_vit", num_classes=4, pretrained=True, weights=path)


def test_resnet_exports_to_torchvision() -> None:
    ours = resnet18(num_classes=10)
    plain = torchvision_resnet18(num_classes=10)
    plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    plain.load_state_dict(export_state_dict(named_state(ours), ours.head_path), strict=True)
    for module in (ours.backbone, ours.head, plain):
        module.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours.backbone(x)), plain(x), rtol=0, atol=0)


def test_group_norm_leaves_no_buffers() -> None:
    assert not list(resnet18(num_classes=2, norm="group").backbone.buffers())
    assert list(resnet18(num_classes=2, norm="batch").backbone.buffers())


def test_vit_is_a_plain_timm_transformer() -> None:
    model = vit(num_classes=3, embed_dim=16, depth=2, num_heads=2)
    assert isinstance(model.backbone, VisionTransformer)
    assert model.head_path == "head"


def test_import_undoes_export() -> None:
    model = timm_model("test_convnext", num_classes=3, image_size=64)
    state = named_state(model)
    plain = export_state_dict(state, model.head_path)
    assert "head.fc.weight" in plain
    back = import_state_dict(plain, model.head_path)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_export_keeps_foreign_names_and_refuses_colliding_ones() -> None:
    tensor = torch.zeros(1)
    assert export_state_dict({"prompt": tensor, "head.weight": tensor}, "fc").keys() == {"prompt", "fc.weight"}
    with pytest.raises(ValueError, match="two tensors would be exported as 'fc.weight'"):
        export_state_dict({"backbone.fc.weight": tensor, "head.weight": tensor}, "fc")
    with pytest.raises(ValueError, match="under the head's path 'head'"):
        import_state_dict({"fc.weight": tensor}, "head")


@pytest.mark.parametrize(
    ("model", "data", "keys"),
    [
        ({"pretrained": True}, {"mean": 0.5, "std": 0.5}, ["mean", "std"]),
        ({"weights": "file.pt"}, {"mean": [0.485, 0.456, 0.406], "std": 0.5}, ["std"]),
        ({"pretrained": True}, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, []),
        ({"pretrained": False, "weights": None}, {"mean": 0.5, "std": 0.5}, []),
        ({"pretrained": True}, {}, []),
    ],
)
def test_pixels_normalised_otherwise_than_pretrained_weights_want_are_told(
    model: dict[str, object], data: dict[str, object], keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    compare_normalization({"name": "resnet18.a1_in1k", **model}, data)
    assert len(caplog.messages) == len(keys)
    assert all(f"data.{key}=[" in message for key, message in zip(keys, caplog.messages, strict=True))


def test_unknown_timm_name_gives_close_names() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet10'; close names: .*resnet10t"):
        timm_model("resnet10", num_classes=2)
    with pytest.raises(ValueError, match="no model 'qqqqqqqq'; see timm.list_models"):
        timm_model("qqqqqqqq", num_classes=2)


@pytest.mark.parametrize(
    ("name", "found"),
    [("deit_tiny_distilled_patch16_224", "2 classifiers"), ("vit_tiny_patch16_224", "Identity")],
)
def test_model_without_one_classifier_is_refused(name: str, found: str) -> None:
    classes = 0 if found == "Identity" else 3
    with pytest.raises(ValueError, match=rf"classifier of '{name}' must be one linear layer .* got {found}"):
        timm_model(name, num_classes=classes)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16x16 pixels, but got 12x12"):
        lenet5(num_classes=2, image_size=12)
    with pytest.raises(ValueError, match="`patch_size` must divide the image size 28, got 8"):
        vit(num_classes=2, image_size=28)
    with pytest.raises(ValueError, match="`num_heads` must divide `embed_dim` 64, got 5"):
        vit(num_classes=2, num_heads=5)
    with pytest.raises(ValueError, match="norm must be one of batch, group, got 'layer'"):
        resnet18(num_classes=2, norm="layer")
    with pytest.raises(ValueError, match="`num_groups` must divide 64"):
        resnet18(num_classes=2, norm="group", num_groups=3)
