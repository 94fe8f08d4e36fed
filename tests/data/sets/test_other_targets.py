"""Data whose targets are no single class: tables, masks, several findings, yes and no."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes

from fl_lightning.data.sets.chexpert_findings import FINDINGS, CheXpertFindings
from fl_lightning.data.sets.digit_masks import DigitMasks
from fl_lightning.data.sets.digits import Digits
from fl_lightning.data.sets.table import Table
from fl_lightning.task import guess


def test_the_diabetes_table_by_age_is_scikit_learn_s() -> None:
    data = Table(root="diabetes", client_by="age", groups=4, scale=False, val_fraction=0)
    bunch = load_diabetes(scaled=False)
    assert (data.num_classes, data.class_names, data.in_channels, data.image_size) == (1, ["progression"], 10, 1)
    assert sum(client.num_train + client.num_test for client in data.clients) == len(bunch.target)
    rows = {
        (*x, y)
        for x, y in zip(bunch.data.astype(np.float32).tolist(), bunch.target.tolist(), strict=True)
        for x in [tuple(x)]
    }
    for client in data.clients:
        low, high = client.name.removeprefix("age ").split(" to ")
        for split in ("train", "test"):
            x, y = client.examples(split)
            assert ((x[:, 0] >= float(low)) & (x[:, 0] <= float(high))).all()
            assert {(*a, b[0]) for a, b in zip(x.tolist(), y.tolist(), strict=True)} <= rows
        assert client.label_counts().shape == (0,)
    x, y = next(iter(data.clients[0].train_dataloader()))
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (32, 10), torch.float32, (32, 1))
    assert guess(y).name == "regression"


def test_a_scaled_table_has_mean_0_and_deviation_1_over_the_training_rows_of_those_that_take_part() -> None:
    data = Table(root="diabetes", client_by="age", groups=4, unseen_clients=["age 19 to 38"], val_fraction=0)
    xs, ys = zip(*(client.examples("train") for client in data.clients), strict=True)
    for values in (torch.cat(xs), torch.cat(ys)):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1]), atol=1e-5, rtol=0)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_csv_of_classes(tmp_path: Path) -> None:
    lines = "".join(f"{k % 3},{k / 7},{'ab'[k % 2]},{k}\n" for k in range(40))
    file = write(tmp_path / "own.csv", f"kind,size,site,extra\n{lines}")
    data = Table(root=file, target="kind", classes=3, client_by="site", features=["size"], scale=False)
    assert [client.name for client in data.clients] == ["site a", "site b"]
    x, y = data.clients[1].examples("test")
    assert all(float(b) == round(float(a) * 7) % 3 for a, b in zip(x[:, 0], y, strict=True))
    assert data.clients[0].label_counts().sum() == data.clients[0].num_train


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("a,b\n1,2\n3,x\n", {}, r"line 3: the column 'b' must hold a number, got 'x'"),
        ("a,b\n1,2\n3\n", {}, "line 3: 1 cells, but 2 columns"),
        ("a,b\n1,2\n", {"client_by": "c"}, "no column 'c'; it has a, b"),
        ("a,b\n1,0.5\n2,1\n", {"classes": 2}, "one column of whole numbers from 0"),
        ("a,a\n1,2\n", {}, "a first line of different names"),
    ],
)
def test_a_csv_that_cannot_be_read(text: str, options: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        Table(root=write(tmp_path / "own.csv", text), **{"client_by": "a", "groups": 2, **options})  # type: ignore[arg-type]


def test_masks_lie_on_their_pictures() -> None:
    data = DigitMasks(per_client=12, val_fraction=0)
    assert [client.name for client in data.clients] == ["clear", "dim", "grainy", "negative"]
    x, y = data.clients[0].examples("train")
    assert (x.dtype, tuple(x.shape[1:]), y.dtype, tuple(y.shape[1:])) == (
        torch.uint8,
        (1, 32, 32),
        torch.int64,
        (32, 32),
    )
    assert x[:, 0][y == 1].float().mean() > 200  # white digits on black
    assert x[:, 0][y == 0].float().mean() < 40
    assert set(y.unique().tolist()) == {0, 1, 2, 3}
    assert data.clients[0].label_counts().tolist() == torch.bincount(y.flatten()).tolist()
    with pytest.raises(ValueError, match=r"data.augment must be null with masks"):
        DigitMasks(per_client=12, augment=[torch.nn.Identity()])


def test_yes_and_no_of_classes() -> None:
    plain, data = Digits(), Digits(positive=["8", 3])
    assert data.class_names == ["other", "8 or 3"]
    for one, other in zip(data.clients, plain.clients, strict=True):
        _, y = one.examples("test")
        _, digits = other.examples("test")
        assert torch.equal(y, ((digits == 8) | (digits == 3)).long())
    with pytest.raises(ValueError, match="data.positive must name classes, some of 0, 1"):
        Digits(positive=["ten"])


@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    rows = []
    for number in range(24):
        path = Path(f"train/patient{number // 2:05}/study1/view{number % 2}_frontal.jpg")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), number * 10, dtype=np.uint8)).save(tmp_path / path)
        values = ["1.0" if number % 2 else "", "-1.0", "0.0", "1.0", ""]
        rows.append(
            [f"CheXpert-v1.0-small/{path}", "Male", 20 + number, "Frontal", "AP" if number < 16 else "PA", *values]
        )
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS], *rows])
    return tmp_path


def test_several_findings_as_published(chexpert: Path) -> None:
    data = CheXpertFindings(root=str(chexpert), resize=8)
    assert [client.name for client in data.clients] == ["AP/PA AP", "AP/PA PA"]
    assert data.class_names == list(FINDINGS)
    _, y = data.clients[0].examples("train")
    assert y[:, 1].isnan().all()
    assert y[:, 3].eq(1).all()
    assert guess(y).name == "multilabel"
    assert data.clients[0].label_counts()[3] == data.clients[0].num_train
    positive = CheXpertFindings(root=str(chexpert), resize=8, unsure="positive").clients[0].examples("train")[1]
    assert positive[:, 1].eq(1).all()
    numbers = [client.num_train + client.num_val + client.num_test for client in data.clients]
    assert numbers == [16, 8]
    with pytest.raises(ValueError, match="no column 'View'"):
        CheXpertFindings(root=str(chexpert), client_by="View")
