"""Clients whose batches a LightningDataModule makes, one for each."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from fl_lightning.data.partition import Partition
from fl_lightning.data.splits import ClientIndices, Split
from fl_lightning.seeding import derive_seed, global_seed
from fl_lightning.task import guess

log = logging.getLogger(__name__)

#: How the targets may be called in a batch that is a dict.
TARGETS = ("labels", "label", "targets", "target", "y")


class ModuleClient(LightningDataModule):
    """One client, whose batches a LightningDataModule makes.

    Its ``prepare_data`` and ``setup`` are called once, at the start, for ``fit`` and ``test``: what they draw is the
    same in all rounds. Batches are pairs of inputs and targets, or dicts with a key ``labels`` or ``target``.

    Args:
        id: Position in the federation.
        name: Of the client.
        module: Makes the batches.
        seed: Of what ``setup`` draws.
    """

    def __init__(self, id: int, name: str, module: LightningDataModule, seed: int = 0) -> None:
        super().__init__()
        self.id = id
        self.name: str = name
        self._module = module
        self._seed = seed
        self._loaders: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self.num_classes = 0
        with global_seed(derive_seed(seed, "setup", name), torch.device("cpu")):
            try:
                module.prepare_data()
                for stage in ("fit", "test"):
                    module.setup(stage)
                targets = [y for _, y in self.eval_dataloader("train")] if self.num_train else []
                for split in ("val", "test"):
                    self._count(split)
            except Exception as error:
                words = (str(error).splitlines() or [""])[0]
                what = "" if type(error) is ValueError else f"{type(error).__name__}: "
                raise ValueError(f"client {name}: {type(module).__name__} makes no batches: {what}{words}") from error
        if not targets:
            raise ValueError(f"client {name}: {type(module).__name__} has no training batch")
        self._targets: Tensor | None = torch.cat(targets)

    def settle(self, num_classes: int) -> None:
        """Learn how many classes, labels or values the federation has."""
        self.num_classes = num_classes
        assert self._targets is not None
        self._counts = guess(self._targets).label_counts(self._targets, num_classes)
        self._targets = None

    @property
    def targets(self) -> Tensor:
        """All training targets, until :meth:`settle`."""
        assert self._targets is not None
        return self._targets

    def count(self, split: Split) -> int:
        """Return the number of examples of a split."""
        return self._count(split)

    def label_counts(self, split: Split = "train") -> Tensor:
        """How many training targets of each class there are; empty where they are no classes."""
        return self._counts

    @property
    def num_train(self) -> int:
        """Number of training examples."""
        return self._count("train")

    @property
    def num_val(self) -> int:
        """Number of validation examples."""
        return self._count("val")

    @property
    def num_test(self) -> int:
        """Number of test examples."""
        return self._count("test")

    @property
    def batch_size(self) -> int:
        """Training examples of a batch."""
        return int(getattr(self._module, "batch_size", None) or getattr(self._loader("train"), "batch_size", None) or 1)

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        if size == self.batch_size:
            return
        if not hasattr(self._module, "batch_size"):
            raise ValueError(
                f"batch_size must be null, got {size}: {type(self._module).__name__} of client {self.name} has no "
                "attribute batch_size"
            )
        self._module, self._loaders = copy.copy(self._module), {}
        self._module.batch_size = size

    def seed(self, value: int) -> None:
        """Fix the order of the coming epochs where the loader has a generator; else it follows from the fit's seed."""
        self._seed = value

    @override
    def train_dataloader(self) -> Any:
        loader = self._module.train_dataloader()
        for part in (loader, getattr(loader, "sampler", None)):
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(self._seed)
        return loader

    @override
    def val_dataloader(self) -> Any:
        return self.eval_dataloader("val")

    @override
    def test_dataloader(self) -> Any:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: Split) -> Pairs:
        """A split in order; counts no epoch. What a data set draws for an example is drawn here too."""
        return Pairs(self._loader(split))

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._module.on_before_batch_transfer(batch, dataloader_idx)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._module.transfer_batch_to_device(batch, device, dataloader_idx)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._module.on_after_batch_transfer(batch, dataloader_idx)

    @override
    def setup(self, stage: str) -> None:
        self._module.trainer = self.trainer

    def _loader(self, split: Split) -> Any:
        if split not in self._loaders:
            try:
                loader = getattr(self._module, f"{split}_dataloader")()
            except MisconfigurationException:  # it has none
                loader = None
            if isinstance(loader, (list, tuple)):
                if len(loader) > 1:
                    raise ValueError(f"{split}_dataloader must return one loader, got {len(loader)}")
                loader = loader[0] if loader else None
            if split == "train" and isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
                loader = DataLoader(loader.dataset, batch_size=loader.batch_size or 1, collate_fn=loader.collate_fn)
            self._loaders[split] = loader
        return self._loaders[split]

    def _count(self, split: Split) -> int:
        if split not in self._sizes:
            loader = self._loader(split)
            try:
                number = 0 if loader is None else len(loader.dataset)
            except (AttributeError, TypeError):
                number = sum(len(y) for _, y in Pairs(loader))
            self._sizes[split] = number
        return self._sizes[split]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaders": {}, "trainer": None}  # loaders are made where they are used


class Pairs:
    """The batches of a loader as pairs of inputs and targets.

    Args:
        loader: A loader, or None for no batch.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 0 if self.loader is None else len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self.loader or ():
            yield pair_of(batch)


def pair_of(batch: Any) -> tuple[Any, Tensor]:
    """Divide a batch into inputs and targets."""
    if isinstance(batch, Mapping):
        for key in TARGETS:
            if key in batch:
                rest = {name: value for name, value in batch.items() if name != key}
                return (rest if len(rest) > 1 else next(iter(rest.values()))), torch.as_tensor(batch[key])
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], torch.as_tensor(batch[1])
    what = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    if isinstance(batch, (tuple, list)):
        what += f" of {len(batch)}; what stands beside them, such as weights, goes in a dict or in the inputs"
    raise ValueError(
        f"a batch must be a pair of inputs and targets, or a dict with one of {', '.join(TARGETS)}, got {what}"
    )


class DataModules:
    """A federation of clients, each with a LightningDataModule of its own.

    Args:
        clients: The data modules, by the name of the client, or a list, whose clients are ``client 0`` and so on.
        unseen_clients: Names of those that are held out of training.
        num_classes: Classes, labels or values of a target; None: what the data modules say (an attribute
            ``num_classes``), or what the training targets have.
        class_names: Their names; None: their numbers.
        seed: Of what a ``setup`` draws.
        client: Name of the one client that is made, at its site; None: all are.

    Raises:
        ValueError: If one is no LightningDataModule, has no training batch, or they differ in their classes.
    """

    def __init__(
        self,
        clients: Mapping[str, LightningDataModule] | Sequence[LightningDataModule],
        unseen_clients: Sequence[str] = (),
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        client: str | None = None,
    ) -> None:
        if not clients:
            raise ValueError("data.clients must be a LightningDataModule for each client, got none")
        if not isinstance(clients, (Mapping, Sequence)):
            raise ValueError(
                f"data.clients must be a list of LightningDataModules, or a dict by name, got {type(clients).__name__}"
            )
        named = clients if isinstance(clients, Mapping) else {f"client {k}": one for k, one in enumerate(clients)}
        if client is not None and client not in named and len(named) > 1:
            raise ValueError(f"data.clients must hold {client}, or one client alone, got {', '.join(named)}")
        if client is not None:
            named = {client: named.get(client, next(iter(named.values())))}
        for name, one in named.items():
            if not isinstance(one, LightningDataModule):
                raise ValueError(f"data.clients.{name} must be a LightningDataModule, got {type(one).__name__}")
        for name in unseen_clients:
            if name not in named:
                raise ValueError(f"data.unseen_clients must name clients, one of {', '.join(named)}, got {name!r}")
        ordered = sorted(named, key=lambda name: name in unseen_clients)
        everyone = [ModuleClient(place, name, named[name], seed) for place, name in enumerate(ordered)]
        self.clients = everyone[: len(named) - len(unseen_clients)]
        self.unseen = everyone[len(self.clients) :]
        if not self.clients:
            raise ValueError("data.unseen_clients must leave a client that takes part, got all of them")
        self.name = type(named[ordered[0]]).__name__
        self.num_classes = num_classes or _classes(named, everyone)
        self.class_names = list(class_names or map(str, range(self.num_classes)))
        for one in everyone:
            one.settle(self.num_classes)
            left_out: dict[Split, str] = {"val": "chooses no model", "test": "has no test score"}
            for split, words in left_out.items():
                if not one.count(split):
                    log.warning("client %s has no %s data: it trains, but %s", one.name, split, words)
        x, _ = next(iter(everyone[0].eval_dataloader("train")))
        shape: tuple[int, ...] = tuple(x.shape[1:]) if isinstance(x, Tensor) and x.ndim > 1 else (1,)
        shape = (*shape, 1) if isinstance(x, Tensor) and x.is_floating_point() and len(shape) == 1 else shape
        *channels, self.image_size = shape
        self.in_channels = channels[0] if channels else 1
        self.partition = _partition(self.name, everyone, self.num_classes, len(self.clients))

    def first_examples(self, number: int) -> Any:
        """Return the first training inputs of the first client, at most this many."""
        return first(next(iter(self.clients[0].eval_dataloader("train")))[0], number)

    def first_targets(self, number: int) -> Tensor:
        """Return the targets of :meth:`first_examples`."""
        return next(iter(self.clients[0].eval_dataloader("train")))[1][:number]

    def to(self, device: torch.device | str) -> bool:
        """Return False: batches are moved one by one."""
        return False


def first(inputs: Any, number: int) -> Any:
    """Return the first examples of a batch of inputs."""
    if isinstance(inputs, Mapping):
        return {name: first(value, number) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs[0], (str, bytes)):
        return type(inputs)(first(value, number) for value in inputs)
    return inputs[:number]


def _classes(named: Mapping[str, Any], clients: Sequence[ModuleClient]) -> int:
    said = {name: one.num_classes for name, one in named.items() if getattr(one, "num_classes", None)}
    if len(set(said.values())) > 1:
        words = ", ".join(f"{number} at {name}" for name, number in said.items())
        raise ValueError(f"data.clients must have the same num_classes, got {words}")
    if said:
        return int(next(iter(said.values())))
    targets = [client.targets for client in clients]
    kinds = {(y.is_floating_point(), y.ndim, *(y.shape[1:] if y.is_floating_point() else ())) for y in targets}
    if len(kinds) > 1:
        words = ", ".join(f"{tuple(y.shape)} {y.dtype} at {one.name}" for one, y in zip(clients, targets, strict=True))
        raise ValueError(f"data.clients must have targets of one kind, got {words}")
    if targets[0].is_floating_point():
        # Yes and no are two classes; of labels and numbers there are as many as a target has.
        binary = targets[0].numel() == len(targets[0]) and all(guess(y).name == "binary" for y in targets)
        return 2 if binary else max(1, targets[0][0].numel())
    return max(2, 1 + max(int(y.max()) for y in targets))


def _partition(name: str, clients: Sequence[ModuleClient], num_classes: int, num_seen: int) -> Partition:
    start, own, told = 0, [], []
    for place, client in enumerate(clients):
        parts = {}
        splits: tuple[Split, ...] = ("train", "test", "val")
        for split in splits:
            number = client.count(split)
            parts[split] = torch.arange(start, start + number)
            start += number
        own.append(ClientIndices(client.name, parts["train"], parts["test"], parts["val"], place >= num_seen))
        _, y = next(iter(client.eval_dataloader("train")))
        told.append([client.name, [len(part) for part in parts.values()], y.flatten()[:1000].tolist()])
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Partition(name, digest, start, num_classes, tuple(own), {"clients": "one per LightningDataModule"})
