"""CelebA: an attribute of faces to predict, and another that goes together with it differently at each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from fl_lightning.data.sets.agreement import AgreementData, AttributeTable
from fl_lightning.data.splits import IntArray

_ATTRIBUTES, _PARTS, _IMAGES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"


@dataclass(kw_only=True, eq=False, repr=False)
class CelebA(AgreementData):
    """Two attributes of faces: one is the label, with the other it agrees more or less often (concept shift).

    Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015, https://arxiv.org/abs/1411.7766. Hair colour
    as the label and gender as the attribute are those of Izmailov et al., On Feature Learning in the Presence of
    Spurious Correlations, NeurIPS 2022, https://arxiv.org/abs/2210.11369. How clients are formed is our choice.

    Files lie as torchvision has them: ``root/celeba/`` with ``list_attr_celeba.txt``, ``list_eval_partition.txt`` and
    ``img_align_celeba/``. Training images come from the official training and validation parts, test images from the
    official test part: no person is in both. For further arguments see
    :class:`~fl_lightning.data.sets.agreement.AgreementData`.

    Args:
        root: The folder that holds ``celeba``.
        label: Name of an attribute in the table.
        attribute: Name of another.
    """

    root: str = "datasets"
    label: str = "Blond_Hair"
    attribute: str = "Male"
    agreements: Sequence[float] = (0.9, 0.7, 0.3, 0.1)

    @override
    def read_table(self) -> AttributeTable:
        folder = Path(self.root) / "celeba"
        for name in (_ATTRIBUTES, _PARTS, _IMAGES):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"There is no '{folder / name}'; put CelebA's {_ATTRIBUTES}, {_PARTS} and {_IMAGES}/ into "
                    f"'{folder}' (docs/data.md says where to get them)."
                )
        names, labels, attributes = _read_attributes(folder / _ATTRIBUTES, self.label, self.attribute)
        return AttributeTable(
            name="celeba",
            root=folder,
            paths=[f"{_IMAGES}/{name}" for name in names],
            labels=labels,
            attributes=attributes,
            tested=_read_parts(folder / _PARTS, names) == 2,
            attribute_name=self.attribute,
        )


def _read_attributes(path: Path, label: str, attribute: str) -> tuple[list[str], IntArray, IntArray]:
    """File names, and two attributes as 0 or 1.

    The file has the number of images, then the names of the attributes, then a line per image: its name and -1 or 1 for
    each attribute.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[1].split() if len(lines) > 1 else []
    for wanted in (label, attribute):
        if wanted not in header:
            raise ValueError(f"'{path}' has no attribute '{wanted}'; it has {', '.join(header) or 'none'}.")
    rows = [line.split() for line in lines[2:]]
    wrong = next((number for number, row in enumerate(rows, 3) if len(row) != len(header) + 1), None)
    if wrong is not None or lines[0].strip() != str(len(rows)):
        raise ValueError(
            f"'{path}' is truncated: it announces {lines[0].strip()} images and has {len(rows)}"
            f"{f', and line {wrong} is not complete' if wrong else ''}."
        )
    columns = [1 + header.index(wanted) for wanted in (label, attribute)]
    labels, attributes = (np.array([row[column] == "1" for row in rows], dtype=np.int64) for column in columns)
    return [row[0] for row in rows], labels, attributes


def _read_parts(path: Path, names: list[str]) -> IntArray:
    """The official part of each image: 0 training, 1 validation, 2 test."""
    part_of = dict(line.split()[:2] for line in path.read_text(encoding="utf-8").splitlines() if line.count(" "))
    missing = next((name for name in names if part_of.get(name) not in ("0", "1", "2")), None)
    if missing is not None:
        raise ValueError(f"'{path}' is truncated: it does not say which part '{missing}' belongs to.")
    return np.array([int(part_of[name]) for name in names], dtype=np.int64)
