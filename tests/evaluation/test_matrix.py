from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

from fl_lightning.evaluation.matrix import METRICS, AccuracyMatrix, average2, average3, score_matrix

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


def test_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 2))
    values[0, 1] = math.nan
    AccuracyMatrix(values, [3, 0], ["a, b", 'c "d"']).save(tmp_path / "matrix" / "ft.csv")
    matrix = AccuracyMatrix.load(tmp_path / "matrix" / "ft.csv")
    assert matrix.values.tobytes() == values.tobytes()
    assert (matrix.num_test, matrix.names) == ([3, 0], ["a, b", 'c "d"'])
    first = (tmp_path / "matrix" / "ft.csv").read_text().splitlines()[0]
    assert first == 'model,"a, b","c ""d"""'
    assert json.loads((tmp_path / "matrix" / "num_test.json").read_text())[0] == {"name": "a, b", "num_test": 3}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    AccuracyMatrix(VALUES, SIZES).save(tmp_path / "ft.csv")
    text = (tmp_path / "ft.csv").read_text()
    for damaged in (text.replace("model,0", "model,x"), text[: text.rfind("\n2")], "", text.replace("0.9,", "0.9a,")):
        (tmp_path / "ft.csv").write_text(damaged)
        with pytest.raises(ValueError, match=r"ft.csv'"):
            AccuracyMatrix.load(tmp_path / "ft.csv")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3, 3\), 2 sizes and 2 names"):
        AccuracyMatrix(VALUES, [1, 2])
    with pytest.raises(ValueError, match="worst_local, .* but got 'global'"):
        AccuracyMatrix(VALUES, SIZES).metric("global")


class FakeData:
    num_classes = 3
    eval_batch_size = 8

    def __init__(self, seed: int, num_test: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name, self.num_test = f"client {seed}", num_test
        self.x = torch.randn(num_test, 4, generator=generator)
        self.y = torch.randint(3, (num_test,), generator=generator)

    def test_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.x, self.y)] if self.num_test else []

    def val_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return []


class BackboneAndHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.head = nn.Linear(5, 3)
        self.encodings = 0

    def features(self, x: Tensor) -> Tensor:
        self.encodings += len(x)
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def models_of(seed: int, heads_only: bool) -> list[dict[str, Tensor]]:
    torch.manual_seed(seed)
    states = [{name: value.clone() for name, value in BackboneAndHead().state_dict().items()} for _ in range(4)]
    if heads_only:
        for state in states:
            state.update({name: value for name, value in states[0].items() if name.startswith("backbone.")})
    return states


@pytest.mark.parametrize("encode_once", [False, True])
@pytest.mark.parametrize("heads_only", [False, True])
def test_scored_matrix_equals_scoring_each_pair_alone(encode_once: bool, heads_only: bool) -> None:
    datas = [FakeData(seed, size) for seed, size in enumerate([5, 12, 0, 3])]
    states = models_of(0, heads_only)
    module = BackboneAndHead().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    order = [2, 0, 3, 1]
    found = score_matrix(module, ((client, states[client]) for client in order), datas, encode_once=encode_once)

    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.encodings == 20 * (1 if encode_once and heads_only else 4)
    assert found.names == ["client 0", "client 1", "client 2", "client 3"]
    for i, state in enumerate(states):
        alone = BackboneAndHead()
        alone.load_state_dict(state)
        alone.eval()
        for j, data in enumerate(datas):
            if data.num_test == 0:
                assert math.isnan(found.values[i, j])
            else:
                assert found.values[i, j] == pytest.approx(accuracy_score(data.y, alone(data.x).argmax(1)))


def test_a_changed_buffer_alone_is_encoded_anew() -> None:
    datas, states = [FakeData(0, 30), FakeData(1, 30)], models_of(0, heads_only=True)[:2]
    states[1]["backbone.1.running_mean"] = torch.full((5,), 2.0)
    plain, once = (
        score_matrix(BackboneAndHead(), enumerate(states), datas, encode_once=once) for once in (False, True)
    )
    assert np.array_equal(plain.values, once.values)
    assert not np.array_equal(plain.values[0], plain.values[1])


def test_one_model_for_each_client_is_needed() -> None:
    datas, states = [FakeData(0, 3), FakeData(1, 3)], models_of(0, False)
    with pytest.raises(ValueError, match=r"got none for \[1\]"):
        score_matrix(BackboneAndHead(), [(0, states[0])], datas)
    with pytest.raises(ValueError, match="a second one for client 0"):
        score_matrix(BackboneAndHead(), [(0, states[0]), (0, states[1])], datas)
    with pytest.raises(ValueError, match=r"each client 0 ... 1, but got one for client 2"):
        score_matrix(BackboneAndHead(), [(2, states[0])], datas)
