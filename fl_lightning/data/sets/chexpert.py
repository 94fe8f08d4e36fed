"""CheXpert: a finding on chest radiographs, and a property of the patient or picture that goes together with it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fl_lightning.checks import one_of, within
from fl_lightning.data.sets.agreement import AgreementData, AttributeTable
from fl_lightning.seeding import derive_seed

Unsure = Literal["drop", "negative", "positive"]

VALUES = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "": 0}
"""What a cell of a finding means; one that is not mentioned counts as absent."""
UNSURE = ("-1.0", "-1")


def read_rows(path: Path, findings: Sequence[str], others: Sequence[str]) -> list[dict[str, str]]:
    """Read the published table.

    Args:
        path: ``train.csv``.
        findings: Columns whose cells must be findings.
        others: Further columns that must be there.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no '{path}'; put the unpacked CheXpert folder there (docs/data.md says where to get it)."
        )
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for wanted in ("Path", "Frontal/Lateral", *findings, *others):
            if wanted not in columns:
                raise ValueError(f"'{path}' has no column '{wanted}'; it has {', '.join(columns) or 'none'}.")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        wrong = next((name for name in findings if row[name] not in {*VALUES, *UNSURE}), None)
        if None in row.values() or wrong is not None:
            raise ValueError(f"Line {number} of '{path}' is truncated, or '{wrong or findings[0]}' is not a finding.")
    return rows


def patients_of(rows: Sequence[Mapping[str, str]], seed: int) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Return the patient of each image, and all patients in a drawn order, by which they are divided.

    A patient is ``patient00001`` of ``CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg``.
    """
    each = [next((part for part in row["Path"].split("/") if part.startswith("patient")), row["Path"]) for row in rows]
    patients = np.array(each, dtype=np.str_)
    return patients, np.random.default_rng(derive_seed(seed, "patients")).permutation(np.unique(patients))


@dataclass(kw_only=True, eq=False, repr=False)
class CheXpert(AgreementData):
    """Radiographs with or without a finding, which agrees more or less often with another column (concept shift).

    Irvin et al., CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert Comparison, AAAI 2019,
    https://arxiv.org/abs/1901.07031. How the clients are formed is our choice.

    ``root`` is the unpacked folder with ``train.csv`` (``CheXpert-v1.0`` or ``CheXpert-v1.0-small``). ``valid.csv`` has
    too few studies for several clients, so a share of the patients of ``train.csv`` is tested on, and none of their
    images is trained on. For further arguments see :class:`~fl_lightning.data.sets.agreement.AgreementData`.

    Args:
        root: The folder.
        label: Column of the finding.
        attribute: Column that goes together with it.
        attribute_value: Which of that column's values counts as 1; any other is 0.
        unsure: Findings that the report is unsure about (-1): ``"drop"``, ``"negative"`` or ``"positive"``. A finding
            that is not mentioned counts as absent.
        frontal_only: Whether lateral views are left out.
        test_fraction: Share of the patients that are tested on, in (0, 1).
    """

    root: str = "datasets/CheXpert-v1.0-small"
    label: str = "Pleural Effusion"
    attribute: str = "Sex"
    attribute_value: str = "Male"
    unsure: Unsure = "drop"
    frontal_only: bool = True
    test_fraction: float = 0.2
    channels: int = 1

    @override
    def read_table(self) -> AttributeTable:
        one_of("unsure", self.unsure, Unsure)
        within("test_fraction", self.test_fraction, "(0, 1)")
        root = Path(self.root)
        rows = [row for row in self._rows(root / "train.csv") if self._is_wanted(row)]
        return AttributeTable(
            name="chexpert",
            root=root,
            # The paths of the table begin with the name of the published folder, whatever it is called here.
            paths=[row["Path"].partition("/")[2] for row in rows],
            labels=np.array([self._label(row) for row in rows], dtype=np.int64),
            attributes=np.array([row[self.attribute] == self.attribute_value for row in rows], dtype=np.int64),
            tested=self._are_tested(rows),
            attribute_name=f"({self.attribute} is {self.attribute_value})",
        )

    def _rows(self, path: Path) -> list[dict[str, str]]:
        rows = read_rows(path, [self.label], [self.attribute])
        if self.attribute_value not in {row[self.attribute] for row in rows}:
            raise ValueError(
                f"No image of '{path}' has {self.attribute} = '{self.attribute_value}'; there are "
                f"{', '.join(sorted({row[self.attribute] for row in rows})[:8])}."
            )
        return rows

    def _is_wanted(self, row: dict[str, str]) -> bool:
        unsure = row[self.label] in UNSURE and self.unsure == "drop"
        return not unsure and (row["Frontal/Lateral"] == "Frontal" or not self.frontal_only)

    def _label(self, row: dict[str, str]) -> int:
        return int(self.unsure == "positive") if row[self.label] in UNSURE else VALUES[row[self.label]]

    def _are_tested(self, rows: Sequence[Mapping[str, str]]) -> NDArray[np.bool_]:
        """For each image, whether its patient is tested on."""
        patients, order = patients_of(rows, self.seed)
        return np.isin(patients, order[: round(self.test_fraction * len(order))])
