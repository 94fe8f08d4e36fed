"""Images with a label and a second attribute, divided among clients by how often the two agree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from fl_lightning.checks import within
from fl_lightning.data.federated_data import Examples, ImageFileData
from fl_lightning.data.splits import ClientIndices, IntArray, hold_out
from fl_lightning.seeding import derive_seed


@dataclass
class AttributeTable:
    """What a data set's tables say of its images.

    Args:
        name: Of the data set.
        root: Folder that the paths are relative to.
        paths: Image files.
        labels: 0 or 1, (N,).
        attributes: 0 or 1, (N,).
        tested: Whether an image is for testing, (N,).
        attribute_name: For people.
    """

    name: str
    root: Path
    paths: Sequence[str]
    labels: IntArray
    attributes: IntArray
    tested: NDArray[np.bool_]
    attribute_name: str


@dataclass(kw_only=True, eq=False, repr=False)
class AgreementData(ImageFileData):
    """Clients for which an attribute means different things about the label (concept shift by spurious correlation).

    See :func:`deal_by_agreement` for how they are formed.

    Args:
        root: The folder of the data set.
        label: What is predicted.
        attribute: What goes together with it.
        agreements: One per client: how often label and attribute agree, in [0, 1].
        train_per_client: Training images of each client, validation included; ``None`` for as many as there are.
        test_per_client: Likewise for testing.
    """

    root: str
    label: str
    attribute: str
    agreements: Sequence[float] = (0.9, 0.1)
    train_per_client: int | None = None
    test_per_client: int | None = None

    @abstractmethod
    def read_table(self) -> AttributeTable:
        """Read the tables of the data set."""

    @override
    def read(self) -> Examples:
        if self.label == self.attribute:
            raise ValueError(f"`label` and `attribute` must differ, got '{self.label}' for both.")
        table = self.read_table()
        train = self._deal(table, np.flatnonzero(~table.tested), "train", self.train_per_client)
        test = self._deal(table, np.flatnonzero(table.tested), "test", self.test_per_client)
        used = np.concatenate([*train, *test])
        positions = torch.arange(len(used)).split([len(part) for part in (*train, *test)])
        clients = [
            ClientIndices(name=name, train=of_train, test=of_test)
            for name, of_train, of_test in zip(
                self._names(), positions[: len(train)], positions[len(train) :], strict=True
            )
        ]
        paths = [table.paths[position] for position in used]
        return Examples(
            name=table.name,
            source=self.open_files(paths, torch.from_numpy(table.labels[used]), table.root),
            class_names=[f"not {self.label}", self.label],
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": f"by agreement of {self.label} with {table.attribute_name}"},
        )

    def _names(self) -> list[str]:
        """After the agreement; where several clients have the same, numbered from the second on."""
        names: list[str] = []
        for position, agreement in enumerate(self.agreements):
            earlier = list(self.agreements[:position]).count(agreement)
            names.append(f"agreement {agreement}" + (f" ({earlier + 1})" if earlier else ""))
        return names

    def _deal(self, table: AttributeTable, part: IntArray, split: str, size: int | None) -> list[IntArray]:
        rng = np.random.default_rng(derive_seed(self.seed, "agreement", split))
        names = (self.label, table.attribute_name)
        hands = deal_by_agreement(table.labels[part], table.attributes[part], self.agreements, size, names, rng)
        return [part[hand] for hand in hands]


def deal_by_agreement(
    labels: IntArray,
    attributes: IntArray,
    agreements: Sequence[float],
    size: int | None,
    names: tuple[str, str],
    rng: np.random.Generator,
) -> list[IntArray]:
    """Draw disjoint sets of examples in which label and attribute agree equally often as wanted.

    In set *i* half of the examples have label 1, and in both halves the attribute equals the label with frequency
    ``agreements[i]``: at 0.5 the attribute says nothing about the label, at 0.9 it predicts it, and at 0.1 it predicts
    the opposite. So clients agree in P(label) and in P(attribute) and differ in what the attribute means.

    Args:
        labels: 0 or 1, (N,).
        attributes: 0 or 1, (N,).
        agreements: One per set, each in [0, 1].
        size: Examples of each set; ``None`` for as many as there are enough of.
        names: Of the label and the attribute, for error messages.
        rng: Chooses.

    Returns:
        One array of positions per set, ascending.
    """
    for agreement in agreements:
        within("agreements", agreement, "[0, 1]")
    pools = {
        (label, attribute): rng.permutation(np.flatnonzero((labels == label) & (attributes == attribute)))
        for label in (0, 1)
        for attribute in (0, 1)
    }
    if size is None:
        size = _largest_size({group: len(pool) for group, pool in pools.items()}, agreements)
    wanted = [_group_sizes(size, agreement) for agreement in agreements]
    for group, pool in pools.items():
        label, attribute = group
        needed = sum(sizes[group] for sizes in wanted)
        is_wanted = any(agreement != (label != attribute) for agreement in agreements)
        if needed > len(pool) or (is_wanted and not len(pool)):
            raise ValueError(
                f"There are {len(pool)} images with {names[0]} = {label} and {names[1]} = {attribute}, and clients of "
                f"{size} with agreements {list(agreements)} need {max(needed, 1)}; ask for fewer images or "
                "other agreements."
            )
    taken = dict.fromkeys(pools, 0)
    sets = []
    for sizes in wanted:
        pieces = []
        for group, count in sizes.items():
            pieces.append(pools[group][taken[group] : taken[group] + count])
            taken[group] += count
        sets.append(np.sort(np.concatenate(pieces)))
    return sets


def _group_sizes(size: int, agreement: float) -> dict[tuple[int, int], int]:
    """Examples of each (label, attribute)."""
    positive = size // 2
    negative = size - positive
    agreeing_positive, agreeing_negative = round(agreement * positive), round(agreement * negative)
    return {
        (0, 0): agreeing_negative,
        (0, 1): negative - agreeing_negative,
        (1, 0): positive - agreeing_positive,
        (1, 1): agreeing_positive,
    }


def _largest_size(available: dict[tuple[int, int], int], agreements: Sequence[float]) -> int:
    """The largest size that every combination suffices for."""

    def suffices(size: int) -> bool:
        wanted = [_group_sizes(size, agreement) for agreement in agreements]
        return all(sum(sizes[group] for sizes in wanted) <= count for group, count in available.items())

    least, most = 0, sum(available.values()) // len(agreements)
    while least < most:
        middle = (least + most + 1) // 2
        if suffices(middle):
            least = middle
        else:
            most = middle - 1
    return least
