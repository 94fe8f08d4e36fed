"""CIFAR-10-C and CIFAR-100-C: one corruption and severity a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fl_lightning.checks import one_of, within
from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.pools import ImagePool, TrainTest, pool_clients
from fl_lightning.data.readers import image_tensor, label_tensor
from fl_lightning.data.sets.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from fl_lightning.data.sets.torchvision_sets import PUBLISHED, read_image_set
from fl_lightning.data.splits import IntArray, hold_out, stratified_split
from fl_lightning.seeding import derive_seed

#: Images in each published file: as many for each severity, in order.
PUBLISHED_PER_SEVERITY = 10_000

FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}


@dataclass(kw_only=True, eq=False, repr=False)
class CorruptedCifar(FederatedData):
    """CIFAR under corruptions: each client sees one type at one severity (feature shift).

    The published files of Hendrycks and Dietterich, ICLR 2019, https://arxiv.org/abs/1903.12261, are used where they
    are; otherwise corruptions are made, see :mod:`fl_lightning.data.sets.corruptions`. The name of the data and the
    partition say which. Underneath all clients lie the same images, and whether one of them is trained or
    tested on is decided for all clients together, so that no image is tested on that another client trained on.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: A folder with ``CIFAR-10-C`` or ``CIFAR-100-C`` (``<corruption>.npy`` and ``labels.npy``), or that folder;
            for made corruptions, as :class:`~fl_lightning.data.sets.torchvision_sets.TorchvisionSet` has it.
        source: ``"published"``, ``"made"``, or ``"auto"`` for the first if it is there.
        corruptions: Types; each with each severity is a client.
        severities: 1 to 5.
        underlying: ``"disjoint"`` deals the underlying images out, so that no two clients have the same one;
            ``"shared"`` gives every client all of them (published: 10,000 a client).
        images_per_client: At most so many images of a client, training and test together; ``None`` for no limit.
        swapped_classes: For each client, the labels of so many classes, chosen at random, are exchanged in a circle:
            the images stay and their meaning changes (concept shift on top of the feature shift). 0 for none.
        test_fraction: Share of the published images that is tested on, in (0, 1). Made corruptions keep CIFAR's split.
        download: Whether torchvision may download CIFAR.
        unseen_clients: Names of clients held out of training, such as ``"pixelate 3"``.
    """

    name: str = "cifar10"
    root: str = "datasets"
    source: Literal["auto", "published", "made"] = "auto"
    corruptions: Sequence[str] = tuple(CORRUPTIONS)
    severities: Sequence[int] = SEVERITIES
    underlying: Literal["disjoint", "shared"] = "disjoint"
    images_per_client: int | None = None
    swapped_classes: int = 0
    test_fraction: float = 0.2
    download: bool = False
    unseen_clients: Sequence[str] = ()

    @override
    def read(self) -> Examples:
        one_of("name", self.name, FOLDERS)
        one_of("source", self.source, ("auto", "published", "made"))
        one_of("underlying", self.underlying, ("disjoint", "shared"))
        within("test_fraction", self.test_fraction, "(0, 1)")
        num_classes = len(PUBLISHED[self.name].class_names)
        if self.swapped_classes not in (0, *range(2, num_classes + 1)):
            raise ValueError(f"`swapped_classes` must be 0, or 2 to {num_classes}, got {self.swapped_classes}.")
        if not self.corruptions or not set(self.severities) <= set(SEVERITIES) or not self.severities:
            raise ValueError(
                f"`corruptions` and `severities` must not be empty, and severities are 1 to 5; got {self.corruptions} "
                f"and {self.severities}."
            )
        published = self._published_folder()
        clients_data = self._read_published(published) if published else self._make()
        for client, data in clients_data.items():
            meaning = self._meaning(client, num_classes)
            data.y_train, data.y_test = meaning[data.y_train], meaning[data.y_test]
        x, y, clients = pool_clients(clients_data)
        kind = "published" if published else "made by fl_lightning"
        return Examples(
            name=f"{FOLDERS[self.name].lower()} ({kind})",
            source=ImagePool(x, y),
            class_names=PUBLISHED[self.name].class_names,
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": "one per corruption and severity", "corruptions": kind},
        )

    def _published_folder(self) -> Path | None:
        """The folder with the published files; ``None`` if corruptions are to be made."""
        if self.source == "made":
            return None
        files = ["labels.npy", *(f"{name}.npy" for name in self.corruptions)]
        root = Path(self.root)
        folder = next((path for path in (root / FOLDERS[self.name], root) if (path / "labels.npy").is_file()), None)
        if folder is None and self.source == "auto":
            return None
        folder = folder or root / FOLDERS[self.name]
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"'{folder}' lacks {', '.join(missing)} of {FOLDERS[self.name]}; put them there (docs/data.md says "
                "where to get them), choose other `corruptions`, or set `source: made`."
            )
        return folder

    def _meaning(self, client: str, num_classes: int) -> Tensor:
        """The label at a client of each published label."""
        rng = np.random.default_rng(derive_seed(self.seed, "meaning", client))
        chosen = rng.permutation(num_classes)[: self.swapped_classes]
        meaning = np.arange(num_classes)
        meaning[chosen] = np.roll(chosen, 1)
        return torch.from_numpy(meaning)

    def _cells(self) -> list[tuple[str, int]]:
        return [(kind, severity) for kind in self.corruptions for severity in self.severities]

    def _deal(self, labels: IntArray, part: str) -> list[IntArray]:
        """Which underlying images each client has."""
        rng = np.random.default_rng(derive_seed(self.seed, "underlying", part))
        num_clients = len(self._cells())
        if self.underlying == "disjoint":
            return [np.sort(hand) for hand in np.array_split(rng.permutation(len(labels)), num_clients)]
        return [np.arange(len(labels))] * num_clients

    def _limit(self, train: IntArray, test: IntArray, client: str) -> tuple[IntArray, IntArray]:
        """Leave images out at random, of training and test alike, until there are ``images_per_client``."""
        if self.images_per_client is None or len(train) + len(test) <= self.images_per_client:
            return train, test
        rng = np.random.default_rng(derive_seed(self.seed, "limit", client))
        num_test = round(self.images_per_client * len(test) / (len(train) + len(test)))
        num_train = self.images_per_client - num_test
        return np.sort(rng.permutation(train)[:num_train]), np.sort(rng.permutation(test)[:num_test])

    def _read_published(self, folder: Path) -> dict[str, TrainTest]:
        path = folder / "labels.npy"
        num_classes = len(PUBLISHED[self.name].class_names)
        first = np.asarray(_open_npy(path)[:PUBLISHED_PER_SEVERITY])
        labels = label_tensor(first, PUBLISHED_PER_SEVERITY, f"'{path}'", num_classes)
        rng = np.random.default_rng(derive_seed(self.seed, "test"))
        train_part, test_part = stratified_split(
            labels.numpy(), round(self.test_fraction * PUBLISHED_PER_SEVERITY), rng
        )
        train_hands = [train_part[hand] for hand in self._deal(train_part, "train")]
        test_hands = [test_part[hand] for hand in self._deal(test_part, "test")]
        clients = {}
        for (kind, severity), train, test in zip(self._cells(), train_hands, test_hands, strict=True):
            train, test = self._limit(train, test, f"{kind} {severity}")
            path = folder / f"{kind}.npy"
            stored = _open_npy(path)
            if len(stored) != PUBLISHED_PER_SEVERITY * len(SEVERITIES):
                raise ValueError(f"'{path}' must hold 50,000 images, 10,000 for each severity, got {len(stored)}.")
            severe = stored[PUBLISHED_PER_SEVERITY * (severity - 1) :]
            train_images, test_images = (image_tensor(severe[part], f"'{path}'", channels=3) for part in (train, test))
            clients[f"{kind} {severity}"] = TrainTest(train_images, labels[train], test_images, labels[test])
        return clients

    def _make(self) -> dict[str, TrainTest]:
        try:
            data = read_image_set(self.name, self.root, self.download, channels=3)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is neither '{Path(self.root) / FOLDERS[self.name]}' with the published corruptions "
                f"(labels.npy, {self.corruptions[0]}.npy, …), nor {self.name} to make corruptions of: {error}"
            ) from error
        train_hands = self._deal(data.y_train.numpy(), "train")
        test_hands = self._deal(data.y_test.numpy(), "test")
        clients = {}
        for (kind, severity), train, test in zip(self._cells(), train_hands, test_hands, strict=True):
            train, test = self._limit(train, test, f"{kind} {severity}")
            generator = torch.Generator().manual_seed(derive_seed(self.seed, kind, severity))
            clients[f"{kind} {severity}"] = TrainTest(
                corrupt(data.x_train[train], kind, severity, generator),
                data.y_train[train],
                corrupt(data.x_test[test], kind, severity, generator),
                data.y_test[test],
            )
        return clients


def _open_npy(path: Path) -> np.ndarray:
    """Open an array without reading it whole."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"'{path}' is truncated or not a plain .npy array ({error}); copy it again.") from error
