"""Intervals from predictions: against the matrix, plain resampling and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fl_lightning.client import ClientInfo
from fl_lightning.evaluation.matrix import AccuracyMatrix
from fl_lightning.evaluation.resampling import Resampled, resampled
from fl_lightning.evaluation.uncertainty import RESAMPLES
from fl_lightning.personalization.evidence import LINEAR, Evidence, over_clients
from fl_lightning.personalization.measurement import SCALARS, Measures
from fl_lightning.personalization.outcome import Outcome
from fl_lightning.personalization.predictions import examples_of, read_predictions, write_predictions
from fl_lightning.seeding import derive_seed
from fl_lightning.task import Binary

SIZES = (30, 50, 0, 7)
CLIENTS = [ClientInfo(id, f"c{id}", 9, 0, size) for id, size in enumerate(SIZES)]


def outcomes(right: Any, seeds: int = 1, tried: Any = None, metric: str = "accuracy") -> list[list[Outcome]]:
    """Models of which ``right(seed, model, data)`` says which examples are right (n,), or what their losses are."""
    runs = []
    for seed in range(seeds):
        run = []
        for model in range(len(SIZES)):
            examples = {}
            for data, size in enumerate(SIZES):
                if size and (tried is None or tried[model, data]):
                    found = torch.as_tensor(np.asarray(right(seed, model, data), dtype=float))
                    zero = torch.zeros(size, dtype=torch.uint8)
                    accuracy = metric == "accuracy"
                    examples[data] = {
                        "target": zero,
                        "prediction": (1 - found).to(torch.uint8) if accuracy else zero,
                        "loss": zero.float() if accuracy else found.float(),
                    }
            measures = Measures({}, *[0.0] * len(SCALARS), examples=examples)
            run.append(Outcome(None, model, seed, measures, {}))  # type: ignore[arg-type]
        runs.append(run)
    return runs


def coins(share: float, salt: int) -> Any:
    def right(seed: int, model: int, data: int) -> np.ndarray:
        return np.random.default_rng([salt, seed, model, data]).random(SIZES[data]) < share

    return right


def matrix(runs: list[list[Outcome]]) -> AccuracyMatrix:
    values = np.full((4, 4), np.nan)
    for one in runs[0]:
        for data, examples in one.measures.examples.items():
            values[one.client, data] = (examples["prediction"] == examples["target"]).double().mean()
    return AccuracyMatrix(values, SIZES)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_middle_is_the_metric_of_the_matrix(sampled: bool) -> None:
    tried = np.eye(4, dtype=bool) | np.array([True, False, False, False]) if sampled else None
    groups = {"none": outcomes(coins(0.6, 0), tried=tried), "ft": outcomes(coins(0.8, 1), tried=tried)}
    evidence = Evidence(groups, CLIENTS, "accuracy")
    for name, runs in groups.items():
        for metric in LINEAR:
            assert evidence.interval(name, metric).mean == pytest.approx(matrix(runs).metric(metric))
        for index in (0, 1, 3):
            assert evidence.client(name, index).mean == pytest.approx(matrix(runs).values[index, index])
        assert math.isnan(evidence.client(name, 2).mean)


def test_the_width_is_that_of_independent_clients() -> None:
    """Of Local: the root of the sum of p (1 - p) / n over clients, by their number; normal for many examples."""
    groups = {"none": outcomes(coins(0.6, 0)), "ft": outcomes(coins(0.8, 1))}
    found = Evidence(groups, CLIENTS, "accuracy").interval("ft", "local")
    values = np.diagonal(matrix(groups["ft"]).values)[[0, 1, 3]]
    sigma = math.sqrt(sum(p * (1 - p) / n for p, n in zip(values, (30, 50, 7), strict=True))) / 3
    assert found.high - found.low == pytest.approx(2 * 1.96 * sigma, rel=0.1)


def test_differences_are_paired() -> None:
    """Two models that differ in one example of 30 differ by little, however uncertain each of them is."""
    before = coins(0.5, 0)

    def after(seed: int, model: int, data: int) -> np.ndarray:
        found = before(seed, model, data).copy()
        if model == data == 0:
            found[np.flatnonzero(~found)[0]] = True
        return found

    evidence = Evidence({"none": outcomes(before), "ft": outcomes(after)}, CLIENTS, "accuracy")
    paired, alone = evidence.difference("ft", "none", "local"), evidence.interval("ft", "local")
    assert paired.mean == pytest.approx(1 / 30 / 3)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    changes = evidence.changes("ft", "none")
    assert changes[0].interval.low == 0, "one picture is nothing"
    assert changes[0].p_value == 1
    assert changes[1].interval == (0, 0, 0)
    assert math.isnan(changes[2].p_value)


def ranked(how: Resampled, salt: int, shift: float) -> list[list[Outcome]]:
    """Models of scores that are higher for positives by a shift; client 3 has no positive."""
    run = []
    for model in range(len(SIZES)):
        examples = {}
        for data, size in enumerate(SIZES):
            if size:
                rng = np.random.default_rng([salt, model, data])
                truth = (np.arange(size) % 3 == 0) & (data != 3)
                scores = torch.from_numpy(rng.normal(size=size) + shift * truth).float()
                examples[data] = {"parts": how.parts(scores[:, None], torch.from_numpy(truth).float()[:, None])}
        run.append(Outcome(None, model, 0, Measures({}, *[0.0] * len(SCALARS), examples=examples), {}))  # type: ignore[arg-type]
    return [run]


def test_a_metric_that_is_no_mean_is_resampled_as_a_plain_loop_does_it() -> None:
    how = resampled(Binary(), "auroc")
    assert how is not None
    how = replace(how, resamples=15)
    groups = {"none": ranked(how, 0, 0.5), "ft": ranked(how, 1, 2.0)}
    evidence = Evidence(groups, CLIENTS, "auroc", how=how)
    generator = np.random.default_rng(derive_seed(0, "bootstrap"))
    values: dict[str, dict[tuple[int, int], list[float]]] = {name: {} for name in groups}
    for data, size in enumerate(SIZES):
        if not size or data == 3:  # the metric has no value there
            continue
        draws = [np.arange(size), *generator.integers(size, size=(15, size))]
        for name, [run] in groups.items():
            for one in run:
                scores, truth = one.measures.examples[data]["parts"].double().numpy().T
                values[name][one.client, data] = [roc_auc_score(truth[draw], scores[draw]) for draw in draws]

    def local(name: str) -> np.ndarray:
        return np.mean([values[name][i, i] for i in (0, 1)], axis=0)

    def others(name: str) -> np.ndarray:
        rows = [[values[name][i, j] for j in (0, 1) if j != i] for i in (0, 1, 2, 3)]
        return np.mean([np.mean(row, axis=0) for row in rows], axis=0)

    for metric, plain in (("local", local), ("global_others", others)):
        difference = plain("ft") - plain("none")
        ends = np.quantile(difference[1:], [0.025, 0.975])
        assert evidence.difference("ft", "none", metric) == pytest.approx((difference[0], *ends))
    changes, elsewhere = evidence.changes("ft", "none"), evidence.elsewhere("ft", "none")
    for client in (0, 1):
        gain = np.subtract(values["ft"][client, client], values["none"][client, client])
        assert changes[client].interval == pytest.approx((gain[0], *np.quantile(gain[1:], [0.025, 0.975])))
        beyond = min((gain[1:] <= 0).sum(), (gain[1:] >= 0).sum())
        assert changes[client].p_value == pytest.approx(2 * (beyond + 1) / 16)
    assert math.isnan(changes[3].interval.mean)
    assert elsewhere[0].mean == pytest.approx(values["ft"][0, 1][0] - values["none"][0, 1][0])
    assert evidence.client("ft", 0).mean == pytest.approx(values["ft"][0, 0][0])
    assert evidence.best(["none", "ft"], "local") == "ft"


def test_of_too_many_models_there_are_intervals_at_home_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    how = resampled(Binary(), "auroc")
    assert how is not None
    monkeypatch.setattr("fl_lightning.personalization.evidence.MOST_PAIRS", 5)
    groups = {"none": ranked(how, 0, 0.5), "ft": ranked(how, 1, 2.0)}
    evidence = Evidence(groups, CLIENTS, "auroc", how=how)
    assert evidence.difference("ft", "none", "local").above
    assert math.isnan(evidence.interval("ft", "global_others").low)
    assert all(math.isnan(one.mean) for one in evidence.elsewhere("ft", "none"))


def test_who_is_hurt_is_beyond_chance() -> None:
    """Client 0 loses all of 30, client 1 one of 50, client 3 gains all of 7; corrected for three tests."""

    def before(seed: int, model: int, data: int) -> np.ndarray:
        return np.ones(SIZES[data]) if data != 3 else np.zeros(7)

    def after(seed: int, model: int, data: int) -> np.ndarray:
        return {0: np.zeros(30), 1: np.arange(50) > 0, 3: np.ones(7)}[data]

    evidence = Evidence({"none": outcomes(before), "ft": outcomes(after)}, CLIENTS, "accuracy")
    changes = evidence.changes("ft", "none")
    assert [one.interval.below for one in changes] == [True, False, False, False]
    assert [one.interval.above for one in changes] == [False, False, False, True]
    assert evidence.share_hurt("ft", "none") == pytest.approx(1 / 3)
    assert changes[0].p_value == pytest.approx(2 / 2**30)
    assert changes[0].p_holm == pytest.approx(3 * 2 / 2**30)
    assert changes[3].p_holm == pytest.approx(2 * 2 / 2**7)


def test_of_a_loss_less_is_better_and_seeds_are_averaged() -> None:
    groups = {
        "none": outcomes(lambda seed, model, data: np.full(SIZES[data], 2.0), seeds=2, metric="loss"),
        "ft": outcomes(lambda seed, model, data: np.full(SIZES[data], 1.0 + seed / 2), seeds=2, metric="loss"),
    }
    evidence = Evidence(groups, CLIENTS, "loss", higher_is_better=False)
    assert evidence.interval("ft", "local") == pytest.approx((1.25, 1.25, 1.25))
    assert evidence.difference("ft", "none", "global_others") == pytest.approx((0.75, 0.75, 0.75))
    assert evidence.best(["none", "ft"], "local") == "ft"
    assert all(one.interval.above for one in evidence.changes("ft", "none")[:2])


def test_the_best_is_none_within_chance() -> None:
    groups = {"a": outcomes(coins(0.5, 0)), "b": outcomes(coins(0.55, 1)), "c": outcomes(coins(0.99, 2))}
    evidence = Evidence(groups, CLIENTS, "accuracy")
    assert evidence.best(["a", "b"], "local") is None
    assert evidence.best(["a", "b", "c"], "local") == "c"
    assert evidence.best(["c"], "local") is None
    assert Evidence({**groups, "d": groups["c"]}, CLIENTS, "accuracy").best([*"abcd"], "local") is None


def test_what_is_no_mean_over_examples_has_no_interval() -> None:
    evidence = Evidence({"none": outcomes(coins(0.5, 0))}, CLIENTS, "f1")
    assert math.isnan(evidence.interval("none", "local").mean)
    assert math.isnan(evidence.share_hurt("none", "none"))
    assert evidence.best(["none", "ft"], "local") is None


def test_company_changes_no_interval() -> None:
    one, other = outcomes(coins(0.6, 0)), outcomes(coins(0.8, 1))
    alone = Evidence({"none": one}, CLIENTS, "accuracy", seed=3)
    both = Evidence({"ft": other, "none": one}, CLIENTS, "accuracy", seed=3)
    assert alone.interval("none", "avg2") == both.interval("none", "avg2")


def test_over_clients() -> None:
    found = over_clients([0.2, 0.4, math.nan, 0.6])
    assert found.mean == pytest.approx(0.4)
    assert found.low == pytest.approx(0.2, abs=0.07)
    assert RESAMPLES >= 1000


def test_predictions_come_back(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        (model, data): examples_of(torch.randn(n, 3, generator=generator), torch.arange(n) % 3, 3)
        for model, data, n in ((0, 0, 4), (0, 1, 2), (1, 1, 2))
    }
    models = [{data: made[model, data] for model, data in made if model == number} for number in range(2)]
    write_predictions(tmp_path / "p.npz", models)
    found = dict(read_predictions(tmp_path / "p.npz").items())
    assert found.keys() == made.keys()
    for pair, examples in made.items():
        assert examples.keys() == found[pair].keys()
        assert all(torch.equal(examples[name], found[pair][name]) for name in examples)
    with np.load(tmp_path / "p.npz", allow_pickle=False) as content:
        assert content["prediction"].dtype == np.uint8
    (tmp_path / "p.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="p.npz is damaged, or no predictions"):
        read_predictions(tmp_path / "p.npz")
