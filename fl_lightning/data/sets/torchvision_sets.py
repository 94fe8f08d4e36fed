"""The small image sets that torchvision knows, divided among clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from typing_extensions import override

from fl_lightning.checks import one_of
from fl_lightning.data.partitioned_data import PartitionedData
from fl_lightning.data.pools import TrainTest
from fl_lightning.data.readers import conform, read_train_test_npz

Read = Callable[[str, bool, bool], tuple[Tensor, Tensor]]

_DIGITS = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class _Published:
    """How torchvision offers a data set.

    Args:
        read: From (root, train, download) to images, uint8 (N, C, H, W), and labels.
        files: What its download consists of, relative to the root; for people.
        class_names: In the order of the labels.
    """

    read: Read
    files: str
    class_names: Sequence[str]


def _read_cifar(kind: type[datasets.CIFAR10]) -> Read:
    def read(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        data = kind(root, train=train, download=download)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)

    return read


def _read_mnist(kind: type[datasets.MNIST]) -> Read:
    def read(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        data = kind(root, train=train, download=download)
        return data.data.unsqueeze(1), data.targets

    return read


def _read_emnist(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    data = datasets.EMNIST(root, split="balanced", train=train, download=download)
    return data.data.transpose(1, 2).unsqueeze(1), data.targets  # the files store each image column by column


def _read_svhn(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    data = datasets.SVHN(root, split="train" if train else "test", download=download)
    return torch.from_numpy(data.data), torch.from_numpy(np.asarray(data.labels))


def _read_usps(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    data = datasets.USPS(root, train=train, download=download)
    return torch.from_numpy(np.asarray(data.data)).unsqueeze(1), torch.tensor(data.targets)


_CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_IDX = "raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"

PUBLISHED = {
    "cifar10": _Published(_read_cifar(datasets.CIFAR10), "cifar-10-python.tar.gz", _CIFAR10),
    "cifar100": _Published(
        _read_cifar(datasets.CIFAR100), "cifar-100-python.tar.gz", [str(label) for label in range(100)]
    ),
    "mnist": _Published(_read_mnist(datasets.MNIST), f"MNIST/{_IDX}", _DIGITS),
    "fashion_mnist": _Published(
        _read_mnist(datasets.FashionMNIST), f"FashionMNIST/{_IDX}", datasets.FashionMNIST.classes
    ),
    "emnist": _Published(_read_emnist, "EMNIST/raw/gzip.zip", list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")),
    "svhn": _Published(_read_svhn, "train_32x32.mat and test_32x32.mat", _DIGITS),
    "usps": _Published(_read_usps, "usps.bz2 and usps.t.bz2", _DIGITS),
}


@dataclass(kw_only=True, eq=False, repr=False)
class TorchvisionSet(PartitionedData):
    """CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST, EMNIST (balanced), SVHN or USPS.

    Args:
        name: One of :data:`PUBLISHED`.
        root: A folder with torchvision's files, to which they are downloaded if they are missing; or a ``.npz`` with
            ``x_train, y_train, x_test, y_test``, such as a smaller version of the data set; or a folder with that file
            as ``<name>.npz``, which is preferred.
        download: Whether missing files may be downloaded.
        channels: 1 or 3; ``None`` keeps what the data set has.
        resize: Height and width in pixels; ``None`` keeps what the data set has.
    """

    name: str = "cifar10"
    root: str = "datasets"
    download: bool = True
    channels: int | None = None
    resize: int | None = None

    @override
    def read_train_test(self) -> tuple[str, TrainTest, Sequence[str]]:
        data = read_image_set(self.name, self.root, self.download, self.channels, self.resize)
        return self.name, data, PUBLISHED[self.name].class_names


def read_image_set(
    name: str, root: str, download: bool = False, channels: int | None = None, resize: int | None = None
) -> TrainTest:
    """Read a data set of torchvision, or what stands for it in a ``.npz``. See :class:`TorchvisionSet`."""
    one_of("name", name, PUBLISHED)
    path = Path(root)
    if (path / f"{name}.npz").is_file():
        path = path / f"{name}.npz"
    if path.suffix.lower() == ".npz":
        num_classes = len(PUBLISHED[name].class_names)
        data = read_train_test_npz(path, num_classes, channels, resize)
        if len(data.y_train) and (most := int(data.y_train.max())) < num_classes - 1:
            raise ValueError(
                f"'{path}' has labels up to {most}, and {name} has the classes 0 to {num_classes - 1}; for data of "
                "your own take data=npz"
            )
        return data
    train_images, train_labels = read_published(name, root, True, download)
    test_images, test_labels = read_published(name, root, False, download)
    return TrainTest(
        conform(train_images, name, channels, resize),
        train_labels,
        conform(test_images, name, channels, resize),
        test_labels,
    )


def read_published(name: str, root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Read one part of a data set of torchvision.

    Args:
        name: One of :data:`PUBLISHED`.
        root: The folder with torchvision's files.
        train: Whether the training part is wanted.
        download: Whether missing files may be downloaded.

    Returns:
        Images, uint8 (N, C, H, W), as published, and labels, int64 (N,).
    """
    published = PUBLISHED[name]
    try:
        images, labels = published.read(root, train, download)
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        tried = "could not be downloaded" if download else "`download` is false"
        raise FileNotFoundError(
            f"'{name}' is not complete in the folder '{root}', and {tried} ({' '.join(str(error).split())}); put "
            f"{published.files} there, or set `data.root` to another folder or to one .npz."
        ) from error
    return images, labels.long()
