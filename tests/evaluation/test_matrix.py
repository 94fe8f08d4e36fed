from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fl_lightning.evaluation.matrix import METRICS, AccuracyMatrix, average2, average3

VALUES = np.array([[0.9, 0.5, 0.7], [0.4, 0.8, 0.6], [0.2, 0.3, 1.0]])
SIZES = [10, 20, 70]

# Table 2 of the paper (arXiv 2511.12695): Local, Global, Worst, Average.
LP_FT_ROWS = {
    "CIFAR10-C": (63.55, 55.35, 26.33, 48.41),
    "CIFAR100-C": (32.60, 25.44, 5.92, 21.32),
    "Digit5": (91.20, 82.78, 65.80, 79.92),
    "DomainNet": (68.50, 57.52, 34.53, 53.52),
    "CheXpert": (77.64, 77.54, 77.43, 77.54),
    "CelebA": (93.24, 83.32, 71.89, 82.82),
}
CHEXPERT_ROWS = {
    "FT": (76.18, 76.25, 76.31),
    "Proximal": (76.44, 76.63, 76.81),
    "Soup": (77.51, 77.49, 77.46),
    "Sparse": (77.29, 77.20, 77.11),
    "LSS": (77.49, 77.51, 77.53),
    "LP-FT": (77.64, 77.54, 77.43),
}


def test_every_metric_by_hand() -> None:
    matrix = AccuracyMatrix(VALUES, SIZES)
    rows_std = [np.std(row) for row in VALUES.tolist()]
    expected = {
        "local": 2.7 / 3,
        "global_others": (0.6 + 0.5 + 0.25) / 3,
        "global_all": (0.7 + 0.6 + 0.5) / 3,
        "worst_row": (0.5 + 0.4 + 0.2) / 3,
        "worst_row_others": (0.5 + 0.4 + 0.2) / 3,
        "worst_local": 0.8,
        "cstd_row": sum(rows_std) / 3,
        "cstd_local": np.std([0.9, 0.8, 1.0]),
        "avg2": (0.9 + 0.45) / 2,
        "avg3": (0.9 + 0.45 + 1.1 / 3) / 3,
    }
    assert set(expected) == set(METRICS)
    assert {name: matrix.metric(name) for name in METRICS} == pytest.approx(expected)


def test_every_weighted_metric_by_hand() -> None:
    matrix = AccuracyMatrix(VALUES, SIZES)
    local = (0.9 * 10 + 0.8 * 20 + 1.0 * 70) / 100
    # Row 0: (0.5 * 20 + 0.7 * 70) / 90, row 1: (0.4 * 10 + 0.6 * 70) / 80, row 2: (0.2 * 10 + 0.3 * 20) / 30.
    others = (10 * 59 / 90 + 20 * 46 / 80 + 70 * 8 / 30) / 100
    # Each test example of row i is an example once: expand to single examples.
    expanded = [np.repeat(row, SIZES) for row in VALUES]
    worst = (10 * 0.5 + 20 * 0.4 + 70 * 0.2) / 100
    expected = {
        "local": local,
        "global_others": others,
        "global_all": np.average([row.mean() for row in expanded], weights=SIZES),
        "worst_row": worst,
        "worst_row_others": worst,
        "worst_local": 0.8,
        "cstd_row": np.average([row.std() for row in expanded], weights=SIZES),
        "cstd_local": np.std(np.repeat([0.9, 0.8, 1.0], SIZES)),
        "avg2": (local + others) / 2,
        "avg3": (local + others + worst) / 3,
    }
    assert {name: matrix.metric(name, weighted=True) for name in METRICS} == pytest.approx(expected)


def test_weights_change_nothing_when_all_are_equal() -> None:
    matrix = AccuracyMatrix(VALUES, [7, 7, 7])
    found = matrix.metrics()
    assert len(found) == 2 * len(METRICS)
    for name in METRICS:
        assert found[name] == pytest.approx(found[f"{name}_weighted"])


@pytest.mark.parametrize("data", LP_FT_ROWS)
def test_average_of_the_papers_table_is_of_three_columns(data: str) -> None:
    at_home, elsewhere, at_worst, average = LP_FT_ROWS[data]
    assert average3(at_home, elsewhere, at_worst) == pytest.approx(average, abs=0.031)
    if data != "CheXpert":  # whose three columns are nearly the same number
        assert average2(at_home, elsewhere) > average + 5


@pytest.mark.parametrize("method", CHEXPERT_ROWS)
def test_chexpert_rows_are_two_clients_with_global_including_own(method: str) -> None:
    at_home, overall, abroad = CHEXPERT_ROWS[method]
    matrix = AccuracyMatrix(np.array([[at_home, abroad], [abroad, at_home]]), [1, 1])
    assert matrix.metric("local") == pytest.approx(at_home)
    assert matrix.metric("worst_row_others") == pytest.approx(abroad)
    assert matrix.metric("global_all") == pytest.approx(overall, abs=0.011)


def test_the_identity_of_two_clients_holds_for_any_matrix() -> None:
    matrix = AccuracyMatrix(np.random.default_rng(0).random((2, 2)), [3, 4])
    found = (matrix.metric("local") + matrix.metric("worst_row_others")) / 2
    assert found == pytest.approx(matrix.metric("global_all"))
    assert matrix.metric("worst_row_others") == pytest.approx(matrix.metric("global_others"))
    assert matrix.metric("worst_row") < matrix.metric("worst_row_others")


def test_a_single_client_has_no_others() -> None:
    matrix = AccuracyMatrix(np.array([[0.5]]), [3])
    assert matrix.metric("local") == matrix.metric("global_all") == 0.5
    assert all(math.isnan(matrix.metric(name)) for name in ("global_others", "worst_row_others", "avg2", "avg3"))


def test_a_client_without_test_examples_is_left_out() -> None:
    values = np.array([[0.9, math.nan, 0.7], [0.4, math.nan, 0.6], [0.2, math.nan, 1.0]])
    expected = AccuracyMatrix(VALUES[np.ix_([0, 2], [0, 2])], [10, 70])
    assert AccuracyMatrix(values, [10, 0, 70]).metrics() == pytest.approx(expected.metrics())
    assert math.isnan(AccuracyMatrix(values, [0, 0, 0]).metric("local"))


def test_saved_to_the_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 2))
    values[0, 1] = math.nan
    AccuracyMatrix(values, [3, 0], ["a, b", 'c "d"']).save(tmp_path / "matrix" / "ft.csv")
    first, *rows = csv.reader((tmp_path / "matrix" / "ft.csv").open(newline=""))
    assert first == ["model", "a, b", 'c "d"']
    assert np.array([[float(cell or "nan") for cell in row[1:]] for row in rows]).tobytes() == values.tobytes()
    assert json.loads((tmp_path / "matrix" / "num_test.json").read_text())[0] == {"name": "a, b", "num_test": 3}


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3, 3\), 2 sizes and 2 names"):
        AccuracyMatrix(VALUES, [1, 2])
    with pytest.raises(ValueError, match="name must be one of .*worst_local, .* got 'global'"):
        AccuracyMatrix(VALUES, SIZES).metric("global")


def test_a_cell_that_was_not_tried_is_left_out() -> None:
    values = VALUES.copy()
    values[0, 1] = math.nan
    matrix = AccuracyMatrix(values, SIZES)
    assert matrix.metric("global_others") == pytest.approx(np.mean([0.7, (0.4 + 0.6) / 2, (0.2 + 0.3) / 2]))
    assert matrix.metric("global_others", weighted=True) == pytest.approx(
        (10 * 0.7 + 20 * (10 * 0.4 + 70 * 0.6) / 80 + 70 * (10 * 0.2 + 20 * 0.3) / 30) / 100
    )
    assert matrix.metric("worst_row") == pytest.approx(np.mean([0.7, 0.4, 0.2]))


def test_of_a_loss_the_highest_is_the_worst() -> None:
    matrix = AccuracyMatrix(VALUES, SIZES, higher_is_better=False)
    assert matrix.metric("worst_row") == pytest.approx(np.mean([0.9, 0.8, 1.0]))
    assert matrix.metric("worst_local") == 1.0
    others, home = matrix.metric("global_others"), matrix.metric("local")
    assert matrix.metric("avg3") == pytest.approx((home + others + matrix.metric("worst_row")) / 3)


def test_means_over_clients_are_the_metrics() -> None:
    for higher in (True, False):
        matrix = AccuracyMatrix(VALUES, SIZES, higher_is_better=higher)
        rows = matrix.by_client()
        for name in rows[0]:
            assert np.mean([row[name] for row in rows]) == pytest.approx(matrix.metric(name))
