"""What is measured, against plain PyTorch, and on whom."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from fl_lightning.models.export import import_state_dict
from fl_lightning.personalization.predictions import read_predictions
from fl_lightning.personalization.source import open_source
from fl_lightning.run.config import plain
from fl_lightning.run.training import run as train
from fl_lightning.state import load
from tests.federations import config
from tests.personalization.conftest import compose_personalization

Run = Callable[..., tuple[Any, Path]]

F1 = "{_target_: torchmetrics.classification.MulticlassF1Score, _partial_: true, average: macro}"


def matrix(path: Path) -> np.ndarray:
    with path.open() as file:
        return np.array([[float(cell or "nan") for cell in row[1:]] for row in list(csv.reader(file))[1:]])


def test_every_number_against_plain_pytorch(personalized: Run, trained: Path) -> None:
    metrics = f"evaluation.metrics={{f1: {F1}}}"
    results, folder = personalized("personalization=[ft]", "save_models=true", metrics, "evaluation.metric=f1")
    source = open_source(plain(compose_personalization(f"checkpoint={trained}")))
    module, datas = source.module.eval(), source.data.clients
    batches = [next(iter(data.eval_dataloader("test"))) for data in datas]
    with torch.no_grad():
        before = [module.features(x) for x, _ in batches]
        for row, data in enumerate(datas):
            state = torch.load(folder / "models" / "ft" / "seed_0" / f"client_{row}.pt")
            load(module, import_state_dict(state, module.head_path))
            logits = [module(x) for x, _ in batches]
            for column, (found, (_, y)) in enumerate(zip(logits, batches, strict=True)):
                f1 = multiclass_f1_score(found, y, 3, average="macro")
                assert matrix(folder / "matrix" / "ft.csv")[row, column] == pytest.approx(float(f1))
                right = float((found.argmax(1) == y).float().mean())
                assert matrix(folder / "matrix" / "accuracy" / "ft.csv")[row, column] == pytest.approx(right)
            if row == 1:
                x, y = next(iter(data.eval_dataloader("train")))
                loss = float(torch.nn.functional.cross_entropy(module(x), y))
                moved = [
                    float((module.features(x) - f).norm(dim=1).mean())
                    for (x, _), f in zip(batches, before, strict=True)
                ]
                ece = float(multiclass_calibration_error(logits[1].softmax(1), batches[1][1], 3))
                norm = float(module.head.weight.norm())
                vals = [next(iter(data.val_dataloader())) for data in datas]
                val = [(module(x), y) for x, y in vals]
                val_f1 = [float(multiclass_f1_score(found, y, 3, average="macro")) for found, y in val]
                val_loss = float(torch.nn.functional.cross_entropy(*val[1]))
                kept_logits = logits
    kept = torch.load(folder / "outcomes" / "ft" / "seed_0.pt")["outcomes"][1]["measures"][0]
    weights = [len(y) for _, y in batches]
    expected = [moved[1], np.average(moved, weights=weights), ece, norm, loss, 0.0]
    expected += [val_f1[1], val_loss, (val_f1[0] + val_f1[2]) / 2]
    assert kept[:9].tolist() == pytest.approx(expected, rel=1e-5)
    predicted = dict(read_predictions(folder / "predictions" / "ft" / "seed_0.npz").items())
    assert len(predicted) == 9
    for column, (found, (_, y)) in enumerate(zip(kept_logits, batches, strict=True)):
        examples = predicted[1, column]
        assert torch.equal(examples["prediction"].long(), found.argmax(1))
        assert torch.equal(examples["target"].long(), y)
        losses = torch.nn.functional.cross_entropy(found, y, reduction="none")
        assert torch.allclose(examples["loss"], losses, atol=1e-5)
        assert torch.allclose(examples["confidence"].float(), found.softmax(1).amax(1), atol=1e-3)
    assert results["methods"]["ft"]["share_hurt"] is None, "torchmetrics' own f1 is not resampled"
    assert "f1 is a metric of your own, which cannot be resampled" in (folder / "table.md").read_text()
    assert results["methods"]["ft"]["local"] == pytest.approx(np.diagonal(matrix(folder / "matrix" / "ft.csv")).mean())
    assert "accuracy/local" in (folder / "table.md").read_text()


def test_metrics_of_the_run_are_taken_over(tiny_root: Path, tmp_path: Path, personalized: Run) -> None:
    overrides = [f"+evaluation.metrics.f1={F1}", "evaluation.metric=f1", "loop.rounds=1"]
    train(OmegaConf.create(config(tiny_root, *overrides)), tmp_path / "f1")
    results, _ = personalized("personalization=[]", checkpoint=tmp_path / "f1")
    assert results["metric"] == "f1"
    results, _ = personalized("personalization=[]", "evaluation.metric=loss", "evaluation.metrics=null")
    none = results["methods"]["none"]
    assert none["worst_row"] >= none["global_all"]  # of a loss the highest is the worst


def test_an_unknown_metric(personalized: Run) -> None:
    with pytest.raises(ValueError, match="evaluation.metric must be one of accuracy, .*f1.* got 'f2'"):
        personalized("personalization=[]", "evaluation.metric=f2")


@pytest.mark.parametrize(("given", "tried"), [("false", 1), ("{clients: 1}", 2), ("true", 3)])
def test_how_many_clients_a_model_is_tried_on(given: str, tried: int, personalized: Run) -> None:
    results, folder = personalized("personalization=[ft]", f"matrix={given}")
    for name in ("none", "local", "ft"):
        found = matrix(folder / "matrix" / f"{name}.csv")
        assert np.isfinite(np.diagonal(found)).all()
        counts = np.isfinite(found).sum(axis=1)
        assert counts.max() == tried
        assert counts.min() >= tried - 1
    if given == "false":
        assert results["methods"]["ft"]["global_others"] is None
    else:
        others = [np.nanmean(np.where(np.eye(3)[row], np.nan, found[row])) for row in range(3) if counts[row] > 1]
        assert results["methods"]["ft"]["global_others"] == pytest.approx(np.mean(others))
    assert ("The others are" in (folder / "table.md").read_text()) == (given != "true")


def test_the_global_model_is_measured_once(personalized: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_lightning.personalization.measurement import ModelMetrics

    calls = []
    score = ModelMetrics.score
    monkeypatch.setattr(ModelMetrics, "score", lambda self, *args: calls.append(args[2]) or score(self, *args))
    personalized("personalization=[]", "baselines.local=null", "seeds=3")
    assert sorted(calls) == ["test"] * 3 + ["train"] * 3 + ["val"] * 3


def test_models_that_predict_one_class_are_named(personalized: Run, trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "global_model.pt")
    given = Path(shutil.copytree(trained, tmp_path / "lopsided"))
    torch.save(state | {"head.bias": torch.tensor([1e6, 0.0, 0.0])}, given / "global_model.pt")
    _, folder = personalized("personalization=[]", "baselines.local=null", checkpoint=given)
    assert (
        "none: 3 of 3 models predict one class for all of their client's test data" in (folder / "table.md").read_text()
    )
