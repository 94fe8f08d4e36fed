"""Residual networks for small images: ResNet-18, and ResNet-8 for a CPU."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.models.resnet import BasicBlock

from fl_lightning.checks import at_least, one_of
from fl_lightning.models.model import Model


def resnet18(
    num_classes: int, in_channels: int = 3, image_size: int = 32, norm: str = "batch", num_groups: int = 2
) -> Model:
    """Build ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1 and no max pooling.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385.
    GroupNorm has no running statistics, so nothing in it depends on the label mix of a client's batches
    (Hsieh et al., The Non-IID Data Quagmire of Decentralized Machine Learning, ICML 2020,
    https://arxiv.org/abs/1910.00189). Tensor names are torchvision's.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels; any size works, the last feature map is pooled.
        norm: ``"batch"`` or ``"group"``.
        num_groups: Groups of each GroupNorm, a divisor of 64; unused with ``norm="batch"``.
    """
    one_of("norm", norm, ("batch", "group"))
    if num_groups < 1 or 64 % num_groups:
        raise ValueError(f"`num_groups` must divide 64, the channels of the first stage, got {num_groups}.")
    norm_layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, num_groups)
    plain = torchvision_resnet18(num_classes=num_classes, norm_layer=norm_layer)
    plain.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(plain.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    blocks = OrderedDict((name, block) for name, block in plain.named_children() if name not in ("maxpool", "fc"))
    return Model(nn.Sequential(OrderedDict(blocks, flatten=nn.Flatten())), plain.fc, "fc")


def resnet8(num_classes: int, in_channels: int = 3, image_size: int = 32, width: int = 16) -> Model:
    """Build ResNet-8: three stages of one block each, with BatchNorm; 78,042 parameters for 10 classes of 3x32x32.

    The smallest network of the family of 6n + 2 layers in He et al., Deep Residual Learning for Image Recognition,
    CVPR 2016, https://arxiv.org/abs/1512.03385, section 4.2. Shortcuts that change the shape are 1x1 convolutions.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels; any size works, the last feature map is pooled.
        width: Channels of the first stage; the second has twice, the third four times as many.
    """
    at_least("model.width", width, 1)
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, width, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(width), relu=nn.ReLU()
    )
    inner = width
    for stage, stride in enumerate((1, 2, 2)):
        outer = width * 2**stage
        shortcut = None
        if inner != outer:
            shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        blocks[f"layer{stage + 1}"] = BasicBlock(inner, outer, stride, shortcut)
        inner = outer
    blocks |= OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    backbone = nn.Sequential(blocks)
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return Model(backbone, nn.Linear(inner, num_classes), "fc")
