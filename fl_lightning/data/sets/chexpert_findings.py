"""CheXpert as it was published: several findings on each radiograph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from fl_lightning.checks import one_of, within
from fl_lightning.data.federated_data import Examples, ImageFileData
from fl_lightning.data.sets.chexpert import UNSURE, VALUES, patients_of, read_rows
from fl_lightning.data.splits import ClientIndices, hold_out

#: The five findings of the paper's evaluation.
FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")

Unsure = Literal["unknown", "negative", "positive"]


@dataclass(kw_only=True, eq=False, repr=False)
class CheXpertFindings(ImageFileData):
    """Radiographs with several findings each (``task=multilabel``), one client for each value of a column.

    Irvin et al., CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert Comparison, AAAI 2019,
    https://arxiv.org/abs/1901.07031. How the clients are formed is our choice.

    ``root`` is the unpacked folder with ``train.csv``. A share of the patients is tested on, and one kept for
    validation, and none of their images is trained on.

    Args:
        root: The folder (``CheXpert-v1.0`` or ``CheXpert-v1.0-small``).
        findings: Columns of the findings.
        client_by: Column whose values form the clients, such as ``AP/PA`` or ``Sex``; ``Age`` counts by decades.
        unsure: What a finding is that the report is unsure about (-1): ``unknown`` (it does not count), ``negative`` or
            ``positive``. One that is not mentioned counts as absent.
        frontal_only: Whether lateral views are left out.
        test_fraction: Share of the patients that are tested on, in (0, 1).
    """

    root: str = "datasets/CheXpert-v1.0-small"
    findings: Sequence[str] = FINDINGS
    client_by: str = "AP/PA"
    unsure: Unsure = "unknown"
    frontal_only: bool = True
    test_fraction: float = 0.2
    channels: int | None = 1

    @override
    def read(self) -> Examples:
        one_of("unsure", self.unsure, Unsure)
        within("test_fraction", self.test_fraction, "(0, 1)")
        if len(self.findings) < 2:
            raise ValueError(f"data.findings must name at least 2 columns, got {list(self.findings)}")
        root = Path(self.root)
        rows = [
            row
            for row in read_rows(root / "train.csv", self.findings, [self.client_by])
            if row["Frontal/Lateral"] == "Frontal" or not self.frontal_only
        ]
        tested, validated = self._drawn(rows)
        whose = np.array([self._client(row) for row in rows])
        targets = torch.tensor([[self._value(row[name]) for name in self.findings] for row in rows])
        clients = []
        for name in sorted(set(whose)):
            own = whose == name
            parts = own & ~tested & ~validated, own & tested, own & validated
            train, test, val = (torch.from_numpy(np.flatnonzero(part)) for part in parts)
            clients.append(ClientIndices(name, train, test, val))
        # The paths of the table begin with the name of the published folder, whatever it is called here.
        paths = [row["Path"].partition("/")[2] for row in rows]
        return Examples(
            name="chexpert",
            source=self.open_files(paths, targets, root),
            class_names=list(self.findings),
            clients=hold_out(clients, self.unseen_clients),
            description={"clients": f"by {self.client_by}"},
        )

    def _value(self, cell: str) -> float:
        if cell in UNSURE:
            return {"unknown": float("nan"), "negative": 0.0, "positive": 1.0}[self.unsure]
        return float(VALUES[cell])

    def _client(self, row: dict[str, str]) -> str:
        value = row[self.client_by]
        if self.client_by == "Age":
            value = f"{int(float(value or 0)) // 10 * 10}s"
        return f"{self.client_by} {value or 'not given'}"

    def _drawn(self, rows: Sequence[Mapping[str, str]]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For each image, whether its patient is tested on, and whether it is one for validation."""
        patients, order = patients_of(rows, self.seed)
        first = round(self.test_fraction * len(order))
        last = first + round(self.val_fraction * (len(order) - first))
        return np.isin(patients, order[:first]), np.isin(patients, order[first:last])
