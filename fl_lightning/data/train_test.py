"""Images and labels with a training and a test part, of one client or of a whole data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.data.client_indices import ClientIndices
from fl_lightning.data.image_pool import ImagePool


@dataclass
class TrainTest:
    """Examples as they are published.

    Args:
        train_images: uint8, (N, C, H, W).
        train_labels: int64, (N,).
        test_images: uint8, (M, C, H, W).
        test_labels: int64, (M,).
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def pool_clients(clients: Mapping[str, TrainTest]) -> tuple[ImagePool, list[ClientIndices]]:
    """Put the examples of clients into one pool, one client after the other.

    Args:
        clients: By name; all images of one shape.
    """
    images = [part for data in clients.values() for part in (data.train_images, data.test_images)]
    labels = [part for data in clients.values() for part in (data.train_labels, data.test_labels)]
    parts = torch.arange(sum(len(y) for y in labels)).split([len(y) for y in labels])
    indices = [
        ClientIndices(name=name, train=train, test=test)
        for name, train, test in zip(clients, parts[0::2], parts[1::2], strict=True)
    ]
    return ImagePool(torch.cat(images), torch.cat(labels)), indices
