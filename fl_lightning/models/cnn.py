"""The two small convolutional networks of the federated-learning literature."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fl_lightning.models.model import Model


def lenet5(num_classes: int, in_channels: int = 3, image_size: int = 32) -> Model:
    """Build LeNet-5 as the personalised-federated-learning literature uses it on CIFAR: ReLU, max pooling, 5x5 kernels.

    LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proceedings of the IEEE 1998,
    https://doi.org/10.1109/5.726791. 62,006 parameters for 10 classes of 3x32x32 images.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, at least 16.
    """
    side = _side_after_two_stages("lenet5", image_size)
    backbone = nn.Sequential(
        OrderedDict(
            stage1=nn.Sequential(nn.Conv2d(in_channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            stage2=nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(16 * side * side, 120), nn.ReLU()),
            fc2=nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        )
    )
    return Model(backbone, nn.Linear(84, num_classes), "fc3")


def cnn2(num_classes: int, in_channels: int = 3, image_size: int = 32) -> Model:
    """Build the network of two 5x5 convolutions (32 and 64 channels) and 512 hidden units of the FedAvg paper.

    McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
    https://arxiv.org/abs/1602.05629. 878,538 parameters for 10 classes of 3x32x32 images.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, at least 16.
    """
    side = _side_after_two_stages("cnn2", image_size)
    backbone = nn.Sequential(
        OrderedDict(
            stage1=nn.Sequential(nn.Conv2d(in_channels, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
            stage2=nn.Sequential(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(64 * side * side, 512), nn.ReLU()),
        )
    )
    return Model(backbone, nn.Linear(512, num_classes), "fc2")


def _side_after_two_stages(model: str, image_size: int) -> int:
    """Return the side of the feature map after two rounds of a 5x5 convolution and a 2x2 pooling."""
    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(
            f"{model} expects images of at least 16x16 pixels, but got {image_size}x{image_size}; "
            "enlarge the images, or choose another model."
        )
    return side
