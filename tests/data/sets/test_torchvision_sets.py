"""Nothing is downloaded: made files in the published layout, and a stand-in where torchvision checks the bytes."""

from __future__ import annotations

import bz2
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets

from fl_lightning.data.partitioners import Iid
from fl_lightning.data.sets import torchvision_sets
from fl_lightning.data.sets.torchvision_sets import TorchvisionSet
from tests.data.made import sizes, write_npz


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's files: two zero bytes, the type (8: uint8), the number of dimensions, then these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def made(num_images: int, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_images)
    return rng.integers(0, 256, (num_images, size, size), dtype=np.uint8), np.arange(num_images) % 10


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files(tmp_path: Path, name: str, folder: str) -> None:
    for prefix, num_images in (("train", 40), ("t10k", 20)):
        images, labels = made(num_images)
        write_idx(tmp_path / folder / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / folder / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
    data = TorchvisionSet(
        name=name, root=str(tmp_path), num_clients=2, partitioner=Iid(), val_fraction=0.0, download=False
    )
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert data.class_names[0] == {"mnist": "0", "fashion_mnist": "T-shirt/top"}[name]
    indices = data.partition.clients[0].train
    assert torch.equal(data.clients[0].examples("train")[0][:, 0], torch.from_numpy(made(40)[0])[indices])
    coloured = TorchvisionSet(name=name, root=str(tmp_path), num_clients=2, partitioner=Iid(), channels=3, resize=32)
    assert (coloured.in_channels, coloured.image_size) == (3, 32)


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    for prefix, num_images in (("train", 94), ("test", 47)):
        images, _ = made(num_images)
        write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-balanced-{prefix}-images-idx3-ubyte", images)
        write_idx(
            tmp_path / "EMNIST" / "raw" / f"emnist-balanced-{prefix}-labels-idx1-ubyte", np.arange(num_images) % 47
        )
    data = TorchvisionSet(name="emnist", root=str(tmp_path), num_clients=2, partitioner=Iid(), download=False)
    assert data.num_classes == 47
    assert data.class_names[10] == "A"
    index = int(data.partition.clients[0].train[0])
    assert np.array_equal(data.clients[0].examples("train")[0][0, 0].numpy(), made(94)[0][index].T)


def test_usps(tmp_path: Path) -> None:
    """LIBSVM's text format: label from 1, then 256 numbered values in [-1, 1]."""
    for file, num_images in (("usps.bz2", 40), ("usps.t.bz2", 20)):
        images, labels = made(num_images, 16)
        rows = [
            f"{label + 1} " + " ".join(f"{i + 1}:{value / 127.5 - 1:.6f}" for i, value in enumerate(image.ravel()))
            for image, label in zip(images, labels, strict=True)
        ]
        (tmp_path / file).write_bytes(bz2.compress("\n".join(rows).encode()))
    data = TorchvisionSet(name="usps", root=str(tmp_path), num_clients=2, partitioner=Iid(), download=False)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 16)
    index = int(data.partition.clients[0].train[0])
    difference = data.clients[0].examples("train")[0][0, 0].int() - torch.from_numpy(made(40, 16)[0][index]).int()
    assert difference.abs().max() <= 1


def test_cifar_and_svhn_arrays_are_brought_into_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def cifar(root: str, train: bool, download: bool) -> SimpleNamespace:
        size = 40 if train else 20
        return SimpleNamespace(data=images[:size], targets=(np.arange(size) % 10).tolist())

    def svhn(root: str, split: str, download: bool) -> SimpleNamespace:
        size = 40 if split == "train" else 20
        return SimpleNamespace(data=images[:size].transpose(0, 3, 1, 2), labels=np.arange(size) % 10)

    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(datasets, "SVHN", svhn)

    read = torchvision_sets._read_cifar(cifar)  # type: ignore[arg-type]
    monkeypatch.setitem(torchvision_sets.PUBLISHED, "cifar10", replace(torchvision_sets.PUBLISHED["svhn"], read=read))
    one, other = (TorchvisionSet(name=name, num_clients=2, partitioner=Iid()) for name in ("cifar10", "svhn"))
    assert one.partition.hash == other.partition.hash
    index = int(one.partition.clients[0].train[0])
    assert np.array_equal(one.clients[0].examples("train")[0][0].permute(1, 2, 0).numpy(), images[index])


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("mnist", "MNIST/raw/"),
        ("fashion_mnist", "FashionMNIST/raw/"),
        ("emnist", "EMNIST/raw/gzip.zip"),
        ("svhn", "train_32x32.mat and test_32x32.mat"),
        ("usps", "usps.bz2 and usps.t.bz2"),
    ],
)
def test_missing_files_are_named_with_their_place(tmp_path: Path, name: str, files: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{name}' is not complete in the folder '{tmp_path}'.*put .*{files}"):
        TorchvisionSet(name=name, root=str(tmp_path), download=False)


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.usps, "download_url", offline)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded \(no route to host\); put usps.bz2"):
        TorchvisionSet(name="usps", root=str(tmp_path))


def test_truncated_files_are_named(tmp_path: Path) -> None:
    for prefix in ("train", "t10k"):
        images, labels = made(20)
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match="'mnist' is not complete"):
        TorchvisionSet(name="mnist", root=str(tmp_path), download=False)


def test_one_npz(tmp_path: Path) -> None:
    labels = {"y_train": np.arange(60) % 10, "y_test": np.arange(30) % 10}
    path = write_npz(tmp_path / "cifar10.npz", 60, 30, **labels)
    given = TorchvisionSet(name="cifar10", root=str(path), num_clients=3, partitioner=Iid())
    found = TorchvisionSet(name="cifar10", root=str(tmp_path), num_clients=3, partitioner=Iid())
    given.partition.check_equal(found.partition)
    assert given.num_classes == 10
    assert given.class_names[3] == "cat"
    write_npz(path, 60, 30, y_train=np.full(60, 10))
    with pytest.raises(ValueError, match="y_train of .*cifar10.npz' holds the label 10, outside the 10 classes 0 to 9"):
        TorchvisionSet(name="cifar10", root=str(path))
    with pytest.raises(FileNotFoundError, match="There is no file '.*other.npz'; it must hold the arrays x_train"):
        TorchvisionSet(name="cifar10", root=str(tmp_path / "other.npz"))


def test_real_cifar(real_data: Path) -> None:
    data = TorchvisionSet(name="cifar10", root=str(real_data / "cifar10.npz"), num_clients=5, val_fraction=0.0)
    assert np.sum(sizes(data), axis=0).tolist() == [5000, 0, 2000]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name must be one of cifar10, .*, got 'imagenet'"):
        TorchvisionSet(name="imagenet")
