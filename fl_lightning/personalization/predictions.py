"""What models predicted for every test example, in small files that later questions are answered from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fl_lightning.files import replacing
from fl_lightning.state import State

Examples = Mapping[str, Tensor]
"""Of one model on one client's test data, in order: ``prediction`` (n,) the class, ``confidence`` (n,) its probability
in float16, ``loss`` (n,) the cross-entropy in nats, ``target`` (n,); these where an example has one class. Of a metric
that is no mean of them ``parts`` (n, S): what each example adds to it (:mod:`fl_lightning.evaluation.resampling`)."""

MEANS = ("accuracy", "loss")
"""Metrics that are a mean over examples of what is kept of predictions."""

PARTS = "parts"


def examples_of(logits: Tensor, targets: Tensor, num_classes: int) -> State:
    """Return what is kept of a model's outputs (n, classes) where each example has one class."""
    label = torch.uint8 if num_classes <= 256 else torch.int32
    shares = logits.softmax(1)
    return {
        "prediction": logits.argmax(1).to(label),
        "confidence": shares.amax(1).half(),
        "loss": F.cross_entropy(logits, targets, reduction="none"),
        "target": targets.to(label),
    }


def score_of(examples: Examples, metric: str) -> NDArray[np.float64]:
    """Return the score of each example, whose mean is a metric of :data:`MEANS`."""
    if metric == "loss":
        return examples["loss"].double().numpy()
    return (examples["prediction"] == examples["target"]).double().numpy()


class Predictions(NamedTuple):
    """What the models of one strategy and seed predicted.

    Attributes:
        pairs: Positions of the model's client and of the data's client, (pairs, 2).
        starts: Where the examples of each pair begin in the arrays, and where the last end, (pairs + 1,).
        arrays: What is kept of all pairs, one behind the other, by name.
    """

    pairs: NDArray[np.int32]
    starts: NDArray[np.int64]
    arrays: dict[str, NDArray[np.generic]]

    def items(self) -> Iterator[tuple[tuple[int, int], dict[str, Tensor]]]:
        """Yield each pair with what the one's model predicted on the other's data."""
        for (model, data), start, end in zip(self.pairs.tolist(), self.starts, self.starts[1:], strict=False):
            yield (model, data), {name: torch.from_numpy(array[start:end]) for name, array in self.arrays.items()}


def write_predictions(path: Path, models: Sequence[Mapping[int, Examples]]) -> None:
    """Write the predictions of one strategy and seed as a compressed ``.npz``.

    Args:
        path: The file.
        models: For each client's model, by the position of the client whose data it was tried on.
    """
    pairs = [(model, data) for model, tried in enumerate(models) for data in sorted(tried)]
    kept = [models[model][data] for model, data in pairs]
    lengths = [len(next(iter(one.values()))) for one in kept]
    names = [name for name in kept[0] if all(name in one for one in kept)] if kept else []
    arrays: dict[str, Any] = {name: np.concatenate([one[name].numpy() for one in kept]) for name in names}
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with replacing(path) as file:
        np.savez_compressed(file, pairs=np.array(pairs, dtype=np.int32).reshape(-1, 2), starts=starts, **arrays)


def read_predictions(path: Path) -> Predictions:
    """Read what :func:`write_predictions` wrote."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
            return Predictions(arrays.pop("pairs"), arrays.pop("starts"), arrays)
    except (OSError, EOFError, KeyError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is damaged, or no predictions: {error}") from error
