from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from fl_lightning.data.sets.chexpert import CheXpert
from tests.data.made import write_image

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Pneumonia", "Pleural Effusion"]
FINDINGS = ["1.0", "0.0", "", "-1.0"]
NUM_PATIENTS = 64


def write_rows(root: Path, rows: list[list[str]]) -> None:
    with open(root / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two frontal and one lateral view a patient; a grey value says the patient. Every finding with every sex."""
    root = tmp_path / "CheXpert-v1.0-small"
    rows = []
    for patient in range(NUM_PATIENTS):
        finding, sex = FINDINGS[patient % 4], ["Male", "Female"][patient // 4 % 2]
        for view, kind in (("view1_frontal", "Frontal"), ("view2_frontal", "Frontal"), ("view3_lateral", "Lateral")):
            path = f"train/patient{patient + 1:05d}/study1/{view}.jpg"
            write_image(root / path, 3 * patient, width=10, height=8)
            rows.append([f"{root.name}/{path}", sex, "60", kind, "AP", "", "", finding])
    write_rows(root, rows)
    return root


def patients(data: CheXpert, split: str) -> list[int]:
    return [
        round(int(value) / 3)
        for client in data.clients
        for value in client.examples(split)[0][:, 0, 0, 0]  # type: ignore[arg-type]
    ]


def test_two_clients_differ_in_what_sex_says_about_the_finding(root: Path) -> None:
    data = CheXpert(root=str(root), resize=4, test_fraction=0.4, agreements=(0.75, 0.25), val_fraction=0.0)
    assert [client.name for client in data.clients] == ["agreement 0.75", "agreement 0.25"]
    assert data.class_names == ["not Pleural Effusion", "Pleural Effusion"]
    assert data.in_channels == 1
    for client, agreement in zip(data.clients, (0.75, 0.25), strict=True):
        x, y = client.examples("train")
        numbers = np.round(x[:, 0, 0, 0].numpy() / 3).astype(int)
        assert ((numbers % 4 == 0) == y.numpy().astype(bool)).all()
        assert not (numbers % 4 == 3).any()  # unsure
        male = numbers // 4 % 2 == 0
        assert (male == y.numpy()).mean() == pytest.approx(agreement, abs=0.06)


def test_no_patient_is_trained_and_tested_on(root: Path) -> None:
    data = CheXpert(root=str(root), resize=4, test_fraction=0.4, agreements=(0.5, 0.5), val_fraction=0.0)
    assert [client.name for client in data.clients] == ["agreement 0.5", "agreement 0.5 (2)"]
    assert not set(patients(data, "train")) & set(patients(data, "test"))


@pytest.mark.parametrize(("unsure", "label"), [("negative", 0), ("positive", 1)])
def test_unsure_findings_may_count(root: Path, unsure: str, label: int) -> None:
    data = CheXpert(root=str(root), resize=4, test_fraction=0.4, agreements=(0.5,), unsure=unsure, frontal_only=False)
    x, y = data.clients[0].examples("train")
    is_unsure = (x[:, 0, 0, 0].float() / 3).round().int() % 4 == 3
    assert is_unsure.any()
    assert (y[is_unsure] == label).all()


def test_the_folder_may_be_called_otherwise(root: Path) -> None:
    expected = CheXpert(root=str(root), resize=4, test_fraction=0.4, agreements=(0.5,))
    shutil.move(root, root.parent / "mine")
    moved = CheXpert(root=str(root.parent / "mine"), resize=4, test_fraction=0.4, agreements=(0.5,))
    expected.partition.check_equal(moved.partition)


def test_bad_files(root: Path) -> None:
    shutil.rmtree(root / "train")
    with pytest.raises(FileNotFoundError, match=r"no image file '.*train/patient\d+/study1/view._frontal.jpg'"):
        CheXpert(root=str(root), test_fraction=0.4)
    text = (root / "train.csv").read_text()
    (root / "train.csv").write_text(text[:-30])
    with pytest.raises(ValueError, match="Line 193 of '.*train.csv' is truncated, or 'Pleural Effusion' is not"):
        CheXpert(root=str(root))
    (root / "train.csv").unlink()
    with pytest.raises(FileNotFoundError, match="There is no '.*train.csv'; put the unpacked CheXpert folder there"):
        CheXpert(root=str(root))


def test_bad_settings(root: Path) -> None:
    with pytest.raises(ValueError, match="unsure must be one of drop, negative, positive, got 'maybe'"):
        CheXpert(root=str(root), unsure="maybe")
    with pytest.raises(ValueError, match=r"test_fraction must lie in \(0, 1\), got 0"):
        CheXpert(root=str(root), test_fraction=0)
    with pytest.raises(ValueError, match="has no column 'Broken Heart'; it has Path, Sex, Age"):
        CheXpert(root=str(root), label="Broken Heart")
    with pytest.raises(ValueError, match="No image of '.*train.csv' has Sex = 'Other'; there are Female, Male"):
        CheXpert(root=str(root), attribute_value="Other")
    with pytest.raises(ValueError, match="'Age' is not a finding"):
        CheXpert(root=str(root), label="Age")
    with pytest.raises(ValueError, match=r"images with Pleural Effusion = . and \(AP/PA is AP\) = 0"):
        CheXpert(root=str(root), attribute="AP/PA", attribute_value="AP")
