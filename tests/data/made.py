"""Made data for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typing_extensions import override

from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.partitioned_data import PartitionedData
from fl_lightning.data.pools import ImagePool, TrainTest
from fl_lightning.data.splits import ClientIndices


def pool(num_images: int = 20, channels: int = 3, image_size: int = 4, num_classes: int = 3) -> ImagePool:
    """Random images; labels 0, 1, 2, 0, 1, 2, …"""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (num_images, channels, image_size, image_size), dtype=torch.uint8, generator=generator
    )
    return ImagePool(images, torch.arange(num_images) % num_classes)


def numbered_pool(num_images: int) -> ImagePool:
    """Image i has the value i in all its pixels, and so says in a batch which one it is."""
    images = torch.arange(num_images).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return ImagePool(images, torch.arange(num_images))


@dataclass(kw_only=True, eq=False, repr=False)
class Made(FederatedData):
    """Clients of given sizes, (train, test), one after the other in one pool."""

    sizes: tuple[tuple[int, int], ...] = ((10, 4), (6, 4))
    labels: torch.Tensor | None = None
    names: tuple[str, ...] | None = None
    num_unseen: int = 0

    @override
    def read(self) -> Examples:
        source = pool(sum(train + test for train, test in self.sizes))
        if self.labels is not None:
            source.labels = self.labels
        parts = torch.arange(len(source)).split([size for pair in self.sizes for size in pair])
        clients = [
            ClientIndices(
                name=self.names[i] if self.names else f"c{i}",
                train=parts[2 * i],
                test=parts[2 * i + 1],
                unseen=i < self.num_unseen,
            )
            for i in range(len(self.sizes))
        ]
        return Examples(name="made", source=source, class_names=["a", "b", "c"], clients=clients)


@dataclass(kw_only=True, eq=False, repr=False)
class MadeSet(PartitionedData):
    """200 + 60 images of four classes, to be divided."""

    num_train: int = 200
    num_test: int = 60

    @override
    def read_train_test(self) -> tuple[str, TrainTest, list[str]]:
        train, test = pool(self.num_train, num_classes=4), pool(self.num_test, num_classes=4)
        return "made", TrainTest(train.examples, train.labels, test.examples, test.labels), list("abcd")


def sizes(data: FederatedData) -> list[tuple[int, int, int]]:
    """Training, validation and test examples of every client, unseen ones last."""
    return [(client.num_train, client.num_val, client.num_test) for client in [*data.clients, *data.unseen]]


def write_npz(path: Path, num_train: int = 6, num_test: int = 3, **changed: np.ndarray | None) -> Path:
    """A client file as ``data=folder`` reads it, with some arrays replaced, or left out where ``None``."""
    rng = np.random.default_rng(len(path.stem))
    arrays: dict[str, np.ndarray | None] = {
        "x_train": rng.integers(0, 256, (num_train, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(num_train) % 3,
        "x_test": rng.integers(0, 256, (num_test, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(num_test) % 3,
    }
    arrays.update(changed)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def write_image(path: Path, value: int = 0, width: int = 8, height: int = 8) -> Path:
    """An image file of one colour, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path)
    return path


def small_cifar(root: Path) -> Path:
    """Write ``root/cifar10.npz`` with 150 + 50 images of coarse blocks, and return its path."""
    rng = np.random.default_rng(0)
    x = np.kron(rng.integers(0, 256, (200, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    y = np.arange(200) % 10
    return write_npz(root / "cifar10.npz", x_train=x[:150], y_train=y[:150], x_test=x[150:], y_test=y[150:])
