from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_lightning.evaluation.results import (
    MetricsTable,
    read_json,
    to_json,
)
from fl_lightning.models.model import Model
from fl_lightning.run.overrides import composed
from fl_lightning.run.results import result_table
from fl_lightning.run.training import run
from tests.federations import tiny, tiny_model


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_json_is_strict_and_plain() -> None:
    value = {
        "nan": math.nan,
        "infinite": [np.float32("inf"), torch.tensor(-math.inf)],
        "tensor": torch.tensor([[1, 2]]),
        "numpy": (np.int64(3), np.float64(0.5), np.bool_(True)),
        "path": Path("a") / "b",
    }
    assert json.loads(to_json(value), parse_constant=refuse_constant) == {
        "nan": None,
        "infinite": [None, None],
        "tensor": [[1, 2]],
        "numpy": [3, 0.5, True],
        "path": "a/b",
    }


def test_what_is_not_plain_is_named() -> None:
    with pytest.raises(TypeError, match="/a/1 must be a plain value, got set"):
        to_json({"a": [0, {1, 2}]})
    with pytest.raises(TypeError, match="keys at /a must be text, got 3"):
        to_json({"a": {3: 0}})


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"results.json' is not valid JSON"):
        read_json(tmp_path / "results.json")


def test_metrics_come_back_to_the_bit(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    rows = [{"round": 1, "a": 1 / 3, "b": 'text, with "quotes"'}, {"round": 2, "a": 1e-300, "b": None}]
    for row in rows:
        table.append(row)
    again = MetricsTable(tmp_path / "metrics.csv")
    assert again.rows == rows
    assert again.column("a") == [1 / 3, 1e-300]
    text = (tmp_path / "metrics.csv").read_text()
    assert text == f'round,a,b\n1,{1 / 3!r},"text, with ""quotes"""\n2,1e-300,\n'


def test_new_columns_widen_the_table(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append({"round": 1, "a": 1})
    table.append({"round": 2, "b": torch.tensor(0.5)})
    table.append({"round": 3, "a": np.float32(0.25)})
    assert (tmp_path / "metrics.csv").read_text() == "round,a,b\n1,1,\n2,,0.5\n3,0.25,\n"
    assert MetricsTable(tmp_path / "metrics.csv").column("b") == [None, 0.5, None]


@pytest.mark.parametrize("damage", [b"", b"\x80\x00\xff", b"round,a\n1,2,3,4\n,,\n", b"round,a\none,2\n", None])
def test_a_resumed_table_equals_an_uninterrupted_one(damage: bytes | None, tmp_path: Path) -> None:
    rows = [{"round": number, "loss": 1 / number, **({"late": 0.1} if number >= 3 else {})} for number in range(1, 6)]
    whole, cut = MetricsTable(tmp_path / "whole.csv"), tmp_path / "cut.csv"
    for row in rows:
        whole.append(row)
    if damage is not None:
        cut.write_bytes(damage)
    resumed = MetricsTable(cut, rows[:2])
    assert cut.read_text().count("\n") == 3
    for row in rows[2:]:
        resumed.append(row)
    assert cut.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    MetricsTable(cut, [])
    assert not cut.exists()


def test_a_half_written_line_does_not_join_the_next(tmp_path: Path) -> None:
    MetricsTable(tmp_path / "metrics.csv").append({"round": 1, "a": 1})
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("2,0.1")
    MetricsTable(tmp_path / "metrics.csv").append({"round": 2, "a": 3})
    assert (tmp_path / "metrics.csv").read_text() == "round,a\n1,1\n2,3\n"


def test_the_round_must_count_up(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append({"round": 3})
    for bad in ({"round": 3}, {"a": 1}):
        with pytest.raises(ValueError, match="above 3"):
            table.append(bad)


def test_a_foreign_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,age\n")
    with pytest.raises(ValueError, match="begin with the column 'round', got 'name,age"):
        MetricsTable(tmp_path / "metrics.csv")
    assert (tmp_path / "metrics.csv").read_text() == "name,age\n"


def test_an_unknown_column_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append({"round": 1, "loss": 0.5})
    with pytest.raises(KeyError, match="It has: round, loss"):
        table.column("los")
    with pytest.raises(TypeError, match="loss must be a number or text, got list"):
        table.append({"round": 2, "loss": [1]})


def lopsided(num_classes: int, in_channels: int = 3, image_size: int = 8) -> Model:
    """Always answers with the second class."""
    model = tiny_model(num_classes, in_channels, image_size)
    with torch.no_grad():
        model.head.get_parameter("bias")[1] = 100.0
    return model


@pytest.mark.every
def test_a_model_that_predicts_one_class_is_said_to(tiny_root: Path, tmp_path: Path) -> None:
    words = [*tiny(tiny_root), "logger=none", "dashboard=null", "loop.rounds=1"]
    words += ["model._target_=tests.evaluation.test_results.lopsided"]
    results = run(composed("train", words), tmp_path)
    assert results["one_class"] == ["ann", "bob", "cid"]
    assert "The global model predicts one class for all test data of ann, bob, cid." in " ".join(
        result_table(results).split()
    )
