"""The examples of one client, as a Lightning data module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from typing_extensions import Self, override

from fl_lightning.checks import whole
from fl_lightning.data.batches import Batches, IndexBatches, TableBatches, TokenBatches
from fl_lightning.data.image_files import FileBatches, ImageFiles
from fl_lightning.data.pools import Pool, TablePool, TokenPool
from fl_lightning.data.splits import ClientIndices, Split
from fl_lightning.data.transforms import Normalization, Transform, check_transforms
from fl_lightning.task import guess

#: Where examples are: in memory or on disk.
Source = Pool | ImageFiles


@dataclass(frozen=True)
class BatchOptions:
    """How examples become batches; the same for all clients.

    Args:
        batch_size: Training examples per batch, at least 1.
        eval_batch_size: Validation and test examples per batch, at least 1; no gradients are kept, so it may be large.
        normalization: Mean and standard deviation.
        transforms: Augmentation of training batches.
        drop_last: Leave out a last training batch that is not full, unless it is the only one.
        avoid_single: Add a last training batch of one example to the one before it.
    """

    batch_size: int = 32
    eval_batch_size: int = 512
    normalization: Normalization = field(default_factory=Normalization)
    transforms: Sequence[Transform] = ()
    drop_last: bool = False
    avoid_single: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            whole(name, getattr(self, name), 1)
        check_transforms(self.transforms)


class ClientData(LightningDataModule):
    """One client's training, validation and test batches.

    Batches are ``(x, y)``: x float32 (N, C, H, W), normalised; y int64 (N,). Call :meth:`seed` before a fit; the
    epochs that follow, in one fit or in several phases of it, each have an order of their own.

    Args:
        id: Position in the federation.
        source: The images and labels of all clients.
        indices: Which of them are this client's.
        num_classes: Classes of the whole federation.
        options: How batches are made.
        default_seed: Of the order until :meth:`seed` is called.
    """

    def __init__(
        self,
        id: int,
        source: Source,
        indices: ClientIndices,
        num_classes: int,
        options: BatchOptions,
        default_seed: int = 0,
    ) -> None:
        super().__init__()
        self.id = id
        self.name: str = indices.name  # Lightning declares it as optional
        self.num_classes = num_classes
        self.batch_size = options.batch_size
        self.eval_batch_size = options.eval_batch_size
        self._source = source
        self._indices = indices
        self._options = options
        self._seed = default_seed
        self._train_batches: Batches | None = None

    @override
    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, num_classes={self.num_classes}, num_train={self.num_train}, "
            f"num_val={self.num_val}, num_test={self.num_test})"
        )

    # Lightning's own looks for the data sets of torch data loaders.
    __str__ = __repr__

    @property
    def num_train(self) -> int:
        """Number of training examples."""
        return len(self._indices.train)

    @property
    def num_val(self) -> int:
        """Number of validation examples."""
        return len(self._indices.indices("val"))

    @property
    def num_test(self) -> int:
        """Number of test examples."""
        return len(self._indices.test)

    def label_counts(self, split: Split = "train") -> Tensor:
        """How many targets of each class a split has: int64, (num_classes,), on the CPU; (0,) of numbers."""
        labels = self._source.labels
        own = labels[self._indices.indices(split).to(labels.device)].cpu()
        if own.ndim == 1 and not own.is_floating_point():
            return torch.bincount(own, minlength=self.num_classes)
        return guess(labels).label_counts(own, self.num_classes)

    def examples(self, split: Split) -> tuple[Tensor, Tensor]:
        """A whole split at once: images uint8 (n, C, H, W), not normalised, and labels int64 (n,)."""
        return self._source.gather(self._indices.indices(split))

    def with_training_labels(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same data, in the same order of batches, with other labels to train on, made from its own."""
        changed = copy.copy(self)
        changed._source = copy.copy(self._source)
        known = self._source.labels
        own = self._indices.train.to(known.device)
        changed._source.labels = known.index_copy(0, own, change(known[own].cpu()).to(known.device))
        changed._train_batches = None
        return changed

    def with_part(self, num_train: int, num_val: int, seed: int) -> Self:
        """Return the same data with some of the training and validation examples, drawn at random, and all test data.

        Args:
            num_train: How many to train on; of two numbers the smaller draw is part of the larger.
            num_val: How many for validation.
            seed: Of the draw.
        """
        part = copy.copy(self)
        generator = torch.Generator().manual_seed(seed)
        train, val = (
            known[torch.randperm(len(known), generator=generator)][:number]
            for known, number in ((self._indices.train, num_train), (self._indices.indices("val"), num_val))
        )
        part._indices = replace(self._indices, train=train, val=val)
        part._train_batches = None
        return part

    def seed(self, value: int) -> None:
        """Fix order and augmentation of the coming epochs: epoch *e* from now on depends on ``(value, e)`` alone."""
        self._seed = value
        if self._train_batches is not None:
            self._train_batches.set_seed(value)

    @override
    def train_dataloader(self) -> Batches:
        # Kept, because it counts the epochs: a second phase of a fit must not repeat the order of the first.
        if self._train_batches is None or self._train_batches.batch_size != self.batch_size:
            self._train_batches = self._batches("train", self.batch_size, self._seed)
        return self._train_batches

    @override
    def val_dataloader(self) -> Batches:
        return self.eval_dataloader("val")

    @override
    def test_dataloader(self) -> Batches:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: Split) -> Batches:
        """A split in order and not augmented, the training split too; counts no epoch, so training stays as it was."""
        return self._batches(split, self.eval_batch_size, None)

    def _batches(self, split: Split, batch_size: int, seed: int | None) -> Batches:
        options = self._options
        training = seed is not None
        kind: Callable[..., Batches] = IndexBatches
        if isinstance(self._source, (ImageFiles, TokenPool)):
            kind = FileBatches if isinstance(self._source, ImageFiles) else TokenBatches
        elif isinstance(self._source, TablePool):
            kind = TableBatches
        return kind(
            self._source,
            self._indices.indices(split),
            batch_size,
            normalization=options.normalization,
            seed=seed,
            transforms=options.transforms,
            drop_last=options.drop_last and training,
            avoid_single=options.avoid_single and training,
        )
