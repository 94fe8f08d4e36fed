"""CIFAR under corruptions, at clients that call some classes by each other's names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from fl_lightning.data.corrupted_cifar import CorruptedCifar
from fl_lightning.data.federated_data import Examples
from fl_lightning.data.image_pool import ImagePool
from fl_lightning.seeding import derive_seed


@dataclass(kw_only=True, eq=False, repr=False)
class CombinedShift(CorruptedCifar):
    """Covariate shift by corruption, and concept shift on top: what a class looks like differs by client.

    At each client some classes, drawn for it, exchange their names in a cycle, in its training and its test images
    alike. So P(x) differs by corruption, and P(y | x) differs for the classes that are renamed.

    Args:
        renamed_classes: How many classes are renamed at each client: 0, or from 2 to the number of classes.

    Raises:
        ValueError: If the number is out of range.
    """

    renamed_classes: int = 4

    @override
    def read(self) -> Examples:
        examples = super().read()
        num_classes = len(examples.class_names)
        if self.renamed_classes != 0 and not 2 <= self.renamed_classes <= num_classes:
            raise ValueError(f"`renamed_classes` must be 0 or from 2 to {num_classes}, got {self.renamed_classes}.")
        assert isinstance(examples.source, ImagePool)
        labels = examples.source.labels.clone()
        for client in examples.clients:
            rng = np.random.default_rng(derive_seed(self.seed, "renamed", client.name))
            chosen = torch.from_numpy(rng.permutation(num_classes)[: self.renamed_classes])
            names = torch.arange(num_classes)
            names[chosen] = chosen.roll(1)
            for part in (client.train, client.test):
                labels[part] = names[labels[part]]
        examples.source = ImagePool(examples.source.images, labels)
        examples.name = f"{examples.name}, {self.renamed_classes} classes renamed"
        return examples
