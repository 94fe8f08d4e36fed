"""A data set divided among clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fl_lightning.checks import at_least, one_of, within
from fl_lightning.data.client_data import BatchOptions, ClientData, Source
from fl_lightning.data.image_files import Fit, ImageFiles
from fl_lightning.data.partition import Partition
from fl_lightning.data.pools import Pool
from fl_lightning.data.splits import MIN_TRAIN, ClientIndices, with_validation
from fl_lightning.data.transforms import Normalization, Transform
from fl_lightning.seeding import derive_seed

#: Decoded images up to this many bytes are kept in memory under ``in_memory="auto"``.
AUTO_BYTES = 2 * 2**30

#: Targets of this value do not count.
IGNORED = -100


@dataclass
class Examples:
    """What a data set hands over: images, labels, and which client has which.

    Args:
        name: Of the data set.
        source: All images and labels, of all clients.
        class_names: One per class.
        clients: Training and test examples of each client. ``val`` may be left open.
        description: How clients were formed, for people.
    """

    name: str
    source: Source
    class_names: Sequence[str]
    clients: Sequence[ClientIndices]
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False, repr=False)
class FederatedData(ABC):
    """All clients of a data set. Each data set is a subclass that says in :meth:`read` where examples come from.

    Everything that can be wrong with the data is checked here, once, before any training.

    Args:
        batch_size: Training examples per batch.
        eval_batch_size: Validation and test examples per batch.
        val_fraction: Share of each client's training examples that is kept for validation, in [0, 1), class by class.
        seed: Of everything drawn here: partition, splits, and the order of batches unless a client is seeded.
        augment: Random transforms of training batches, see :mod:`fl_lightning.data.transforms`.
        mean: Of the pixels scaled to [0, 1]: one value, or one per channel.
        std: Likewise.
        drop_last: Leave out a last training batch that is not full, unless it is a client's only one.
        avoid_single: Add a last training batch of one example to the one before it, for the sake of BatchNorm.
        client: Name of the one client whose data are here, at a site of its own: the client of this name if there is
            one, else the only one, which gets it. None: all clients are here.
        positive: Names or numbers of the classes that count as 1, all others as 0; None keeps the classes.

    Attributes:
        clients: Those that take part.
        unseen: Those held out, on which a method is tried that never saw them.
        num_classes: Classes.
        class_names: Their names.
        in_channels: 1 or 3; 1 of tokens.
        image_size: Height and width in pixels; the length of a sequence of tokens.
        name: Of the data set.
        partition: Who has which example.
    """

    batch_size: int = 32
    eval_batch_size: int = 512
    val_fraction: float = 0.2
    seed: int = 0
    augment: Sequence[Transform] | None = None
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    drop_last: bool = False
    avoid_single: bool = True
    client: str | None = None
    positive: Sequence[str | int] | None = None

    clients: list[ClientData] = field(init=False)
    unseen: list[ClientData] = field(init=False)
    num_classes: int = field(init=False)
    class_names: list[str] = field(init=False)
    in_channels: int = field(init=False)
    image_size: int = field(init=False)
    partition: Partition = field(init=False)
    name: str = field(init=False)

    @abstractmethod
    def read(self) -> Examples:
        """Read the data set and say which client has which example."""

    def __post_init__(self) -> None:
        within("val_fraction", self.val_fraction, "[0, 1)")
        self._options = BatchOptions(
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            normalization=Normalization(self.mean, self.std),
            transforms=tuple(self.augment or ()),
            drop_last=self.drop_last,
            avoid_single=self.avoid_single,
        )
        examples = self.read()
        if self.client is not None:
            examples = replace(examples, clients=[_the_one(examples.clients, self.client)])
        if self.positive is not None:
            examples = _yes_or_no(examples, self.positive)
        self.name = examples.name
        self.class_names = list(examples.class_names)
        self.num_classes = len(self.class_names)
        *channels, self.image_size = examples.source.shape  # of images (C, H, W), of tokens (T,)
        self.in_channels = channels[0] if channels else 1
        self._options.normalization.check_channels(self.in_channels)
        self._source = examples.source
        _check_labels(examples.source.labels, self.num_classes, self.name)
        _check_clients(examples.clients)
        labels = examples.source.labels
        if labels.ndim == 3 and self.augment:
            raise ValueError("data.augment must be null with masks, which would not turn with the images")
        # Where targets are no classes, there is nothing to stratify by.
        of_classes = labels.ndim == 1 and not labels.is_floating_point()
        strata = (labels if of_classes else torch.zeros(len(labels), dtype=torch.int64)).numpy()
        ordered = sorted(examples.clients, key=lambda client: client.unseen)
        self._use(
            Partition(
                source=self.name,
                fingerprint=examples.source.fingerprint(),
                num_examples=len(examples.source),
                num_classes=self.num_classes,
                clients=tuple(
                    with_validation(client, strata[client.train.numpy()], self.val_fraction, self.seed)
                    for client in ordered
                ),
                description={**examples.description, "val_fraction": self.val_fraction, "seed": self.seed},
            )
        )

    def _use(self, partition: Partition) -> None:
        self.partition = partition
        everyone = [
            ClientData(
                id=position,
                source=self._source,
                indices=indices,
                num_classes=self.num_classes,
                options=self._options,
                default_seed=derive_seed(self.seed, "batches", position),
            )
            for position, indices in enumerate(partition.clients)
        ]
        num_seen = sum(not indices.unseen for indices in partition.clients)
        self.clients, self.unseen = everyone[:num_seen], everyone[num_seen:]

    def first_examples(self, number: int) -> Tensor:
        """Return the first training examples of the first client, at most this many, as a model sees them."""
        x: Tensor = next(iter(self.clients[0].eval_dataloader("train")))[0]
        return x[:number]

    def first_targets(self, number: int) -> Tensor:
        """Return the targets of :meth:`first_examples`."""
        y: Tensor = next(iter(self.clients[0].eval_dataloader("train")))[1]
        return y[:number]

    def to(self, device: torch.device | str) -> bool:
        """Move the images of all clients to a device, if they are in memory and fit there.

        Args:
            device: Where batches are wanted.

        Returns:
            Whether batches are now made on that device.
        """
        if not isinstance(self._source, Pool) or not self._source.fits(device):
            return False
        self._source.to(device)
        return True


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFileData(FederatedData):
    """A data set of image files.

    Args:
        channels: 1 (grey) or 3 (colour).
        resize: Height and width in pixels.
        fit: How images that are not square become so: ``"crop"`` cuts the centre, ``"squash"`` keeps all.
        in_memory: Whether images are decoded once into memory, or for every batch (with ``num_workers``); ``"auto"``
            decodes once if the result is at most 2 GiB.
        num_workers: Processes that decode the images of a batch, where they are not in memory; 0 decodes in this one.
        unseen_clients: Names of clients that are held out of training.
    """

    channels: int | None = 3
    resize: int | None = 64
    fit: Fit = "crop"
    in_memory: bool | Literal["auto"] = "auto"
    num_workers: int = 0
    unseen_clients: Sequence[str] = ()

    @override
    def __post_init__(self) -> None:
        at_least("num_workers", self.num_workers, 0)
        super().__post_init__()

    def open_files(self, paths: Sequence[str], labels: Tensor, root: Path) -> Source:
        """Decode image files into memory, if that is wanted, or leave them on disk.

        Args:
            paths: Relative to ``root``.
            labels: int64, one per path.
            root: The folder of the data set.
        """
        one_of("in_memory", self.in_memory, (True, False, "auto"))
        if self.resize is None:
            raise ValueError(
                f"'{root}' has image files; set data.resize to the height and width in pixels that all shall have"
            )
        channels = 3 if self.channels is None else self.channels
        files = ImageFiles(paths, labels, root, channels, self.resize, self.fit, self.num_workers)
        decode = files.num_bytes <= AUTO_BYTES if self.in_memory == "auto" else self.in_memory
        if decode:
            return files.decode()
        files.check()
        return files


def _the_one(clients: Sequence[ClientIndices], name: str) -> ClientIndices:
    found = [one for one in clients if one.name == name] or list(clients)
    if len(found) > 1:
        raise ValueError(
            f"there are {len(found)} clients, and none is named {name!r}: {', '.join(one.name for one in found)}; "
            "a site is one of them"
        )
    return replace(found[0], name=name, unseen=False)


def _yes_or_no(examples: Examples, positive: Sequence[str | int]) -> Examples:
    """Let some classes count as 1 and all others as 0."""
    names = list(examples.class_names)
    for one in positive:
        if one not in names and not (isinstance(one, int) and 0 <= one < len(names)):
            raise ValueError(f"data.positive must name classes, some of {', '.join(names)}, got {one!r}")
    chosen = [names.index(str(one)) if str(one) in names else int(one) for one in positive]
    if not 0 < len(set(chosen)) < len(names):
        raise ValueError(f"data.positive must name some classes and not all, got {list(positive)}")
    labels = examples.source.labels
    examples.source.labels = torch.isin(labels, torch.tensor(chosen)).long()
    return replace(examples, class_names=["other", " or ".join(names[one] for one in chosen)])


def _check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    if len(labels) == 0:
        raise ValueError(f"'{name}' has no examples")
    if labels.is_floating_point():
        return  # numbers, or labels of yes and no, which the task checks
    if labels.ndim > 1:
        labels = labels[labels != IGNORED]
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= num_classes:
        wrong = least if least < 0 else most
        raise ValueError(f"'{name}' has the label {wrong}, outside its {num_classes} classes 0 to {num_classes - 1}")
    if least == most:
        raise ValueError(f"'{name}' has the label {least} alone; there must be at least two classes")


def _check_clients(clients: Sequence[ClientIndices]) -> None:
    if all(client.unseen for client in clients):
        raise ValueError("at least one client must take part in training, got none that is not held out as unseen")
    names = [client.name for client in clients]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"clients must have different names, got '{twice}' more than once")
    for client in clients:
        if len(client.train) < MIN_TRAIN:
            raise ValueError(
                f"client '{client.name}' must have at least {MIN_TRAIN} training examples, got {len(client.train)}; "
                "give it more or leave it out"
            )
        if len(client.test) == 0:
            raise ValueError(f"client '{client.name}' must have a test example to be scored by, got none")
    trained = torch.cat([client.indices(split) for client in clients for split in ("train", "val")])
    leaked = torch.isin(torch.cat([client.test for client in clients]), trained)
    for client, part in zip(clients, leaked.split([len(client.test) for client in clients]), strict=True):
        if part.any():
            raise ValueError(
                f"client '{client.name}' is tested on {int(part.sum())} example(s) that a client trains on or chooses "
                "by; no example may be in both"
            )
