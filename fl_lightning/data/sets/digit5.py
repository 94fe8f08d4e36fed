"""Digit-Five: MNIST, MNIST-M, SVHN, synthetic digits and USPS, one client a domain."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from fl_lightning.checks import at_least
from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.pools import ImagePool, TrainTest, pool_clients
from fl_lightning.data.readers import conform, image_tensor, label_tensor, read_pickled_arrays
from fl_lightning.data.sets.torchvision_sets import read_published
from fl_lightning.data.splits import hold_out, stratified_split
from fl_lightning.seeding import derive_seed

IMAGE_SIZE = 32

Arrays = tuple[NDArray[Any], NDArray[Any]]  # images (N, H, W) or (N, H, W, C), and labels as they come


@dataclass(frozen=True)
class _Domain:
    """Where a domain may come from.

    Args:
        mat: Files of the Digit-Five archive, for training and for testing (often the same).
        read_mat: From the contents of one of them, and whether training is wanted, to arrays.
        folder: Folder of the FedBN archive, with ``train.pkl``, or ``partitions/train_part0.pkl`` and so on, and
            ``test.pkl``.
        torchvision: Name in torchvision, if it is there.
    """

    mat: tuple[str, str]
    read_mat: Callable[[dict[str, Any], bool], Arrays]
    folder: str
    torchvision: str | None = None


DOMAINS: dict[str, _Domain] = {
    "mnist": _Domain(
        ("mnist_data.mat", "mnist_data.mat"),
        lambda mat, train: (mat["train_32" if train else "test_32"], mat["label_train" if train else "label_test"]),
        "MNIST",
        "mnist",
    ),
    "mnist_m": _Domain(
        ("mnistm_with_label.mat", "mnistm_with_label.mat"),
        lambda mat, train: (mat["train" if train else "test"], mat["label_train" if train else "label_test"]),
        "MNIST_M",
    ),
    "svhn": _Domain(
        ("svhn_train_32x32.mat", "svhn_test_32x32.mat"),
        lambda mat, train: (mat["X"].transpose(3, 0, 1, 2), mat["y"]),
        "SVHN",
        "svhn",
    ),
    "synth": _Domain(
        ("syn_number.mat", "syn_number.mat"),
        lambda mat, train: (
            mat["train_data" if train else "test_data"],
            mat["train_label" if train else "test_label"],
        ),
        "SynthDigits",
    ),
    "usps": _Domain(
        ("usps_28x28.mat", "usps_28x28.mat"),
        lambda mat, train: (mat["dataset"][0 if train else 1][0][:, 0], mat["dataset"][0 if train else 1][1]),
        "USPS",
        "usps",
    ),
}


@dataclass(kw_only=True, eq=False, repr=False)
class Digit5(FederatedData):
    """Five sets of digits as five clients, all as 3x32x32: the same classes, five looks (feature shift).

    Peng et al., Moment Matching for Multi-Source Domain Adaptation, ICCV 2019, https://arxiv.org/abs/1812.01754.

    Each domain is taken from the first place that has it: the ``.mat`` file of the Digit-Five archive in ``root`` or
    ``root/Digit-Five``; the folder of the archive of Li et al., FedBN, ICLR 2021, https://arxiv.org/abs/2102.07623, in
    ``root``; for MNIST, SVHN and USPS torchvision's files in ``root``. The published training and test parts are kept.

    Args:
        root: The folder.
        domains: Names of :data:`DOMAINS`, in the order of the clients.
        max_train: Training images of a domain, validation included; more are left out at random, class by class. What
            there is less is not repeated: copies would end up on both sides of a later split. ``None`` keeps all.
        max_test: Test images of a domain. ``None`` keeps all.
        download: Whether torchvision may download what is missing of MNIST, SVHN and USPS.
        unseen_clients: Names of domains that are held out of training.
    """

    root: str = "datasets"
    domains: Sequence[str] = tuple(DOMAINS)
    max_train: int | None = 25_000
    max_test: int | None = 9_000
    download: bool = False
    unseen_clients: Sequence[str] = ()

    @override
    def read(self) -> Examples:
        for name in self.domains:
            if name not in DOMAINS:
                raise ValueError(f"`domains` names '{name}', but there are {', '.join(DOMAINS)}.")
        x, y, clients = pool_clients(
            {
                name: TrainTest(*self._read_part(name, train=True), *self._read_part(name, train=False))
                for name in self.domains
            }
        )
        return Examples(
            name="digit5",
            source=ImagePool(x, y),
            class_names=[str(digit) for digit in range(10)],
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": "one per domain"},
        )

    def _read_part(self, name: str, train: bool) -> tuple[Tensor, Tensor]:
        """Images and labels of one part of a domain, at most as many as are wanted."""
        most = self.max_train if train else self.max_test
        at_least("max_train" if train else "max_test", most, 1, or_null=True)
        images, labels = self._read_domain(name, train)
        if most is None or len(labels) <= most:
            return images, labels
        rng = np.random.default_rng(derive_seed(self.seed, "keep", name, "train" if train else "test"))
        kept = torch.from_numpy(stratified_split(labels.numpy(), most, rng)[1])
        return images[kept], labels[kept]

    def _read_domain(self, name: str, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 32, 32) and labels of one part of a domain."""
        domain, root = DOMAINS[name], Path(self.root)
        file = domain.mat[0 if train else 1]
        for path in (root / file, root / "Digit-Five" / file):
            if path.is_file():
                return _tensors(*_read_mat(path, domain, train), where=f"'{path}'")
        pickles = _pickles(root / domain.folder, train)
        if pickles:
            arrays = [read_pickled_arrays(path) for path in pickles]
            images, labels = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
            return _tensors(images, labels, where=f"'{pickles[0]}'")
        missing = (
            f"The domain '{name}' is missing: put {file} of the Digit-Five archive into '{root}', or the folder "
            f"{domain.folder} of the FedBN archive (with {'train' if train else 'test'}.pkl); docs/data.md says where "
            "to get them."
        )
        if domain.torchvision is None:
            raise FileNotFoundError(missing)
        try:
            x, y = read_published(domain.torchvision, self.root, train, self.download)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{missing} Torchvision's files may stand in: {error}") from error
        return conform(x, name, channels=3, resize=IMAGE_SIZE), y


def _pickles(folder: Path, train: bool) -> list[Path]:
    """The files of one part in a folder of the FedBN archive: one, or, of training, ten parts of a tenth each."""
    whole = folder / ("train.pkl" if train else "test.pkl")
    if whole.is_file() or not train:
        return [whole] if whole.is_file() else []
    return sorted((folder / "partitions").glob("train_part*.pkl"))


def _read_mat(path: Path, domain: _Domain, train: bool) -> Arrays:
    # Imported late: only this reader needs it.
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return domain.read_mat(loadmat(path), train)
    except KeyError as error:
        raise ValueError(f"'{path}' has no array {error}, as the file of the Digit-Five archive has.") from error
    except (
        MatReadError,
        ValueError,
        TypeError,
        IndexError,
        EOFError,
        OSError,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise ValueError(
            f"'{path}' is truncated or not the file of the Digit-Five archive ({error}); copy it again."
        ) from error


def _tensors(images: NDArray[Any], labels: NDArray[Any], where: str) -> tuple[Tensor, Tensor]:
    """Bring what the archives hold into one form: bytes or floats, one-hot or numbered labels, 0 written as 10."""
    if images.dtype != np.uint8:
        scale = 255 if images.dtype.kind == "f" and images.max(initial=0) <= 1 else 1
        images = np.clip(np.rint(images * scale), 0, 255).astype(np.uint8)
    if labels.ndim == 2 and labels.shape[1] == 10:
        labels = labels.argmax(axis=1)
    labels = labels.reshape(-1).astype(np.int64)
    labels = np.where(labels == 10, 0, labels)
    x = image_tensor(images, f"the images of {where}", channels=3, resize=IMAGE_SIZE)
    return x, label_tensor(labels, len(x), f"the labels of {where}", num_classes=10)
