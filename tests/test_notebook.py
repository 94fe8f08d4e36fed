"""Runs from Python leave what the scripts leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fl_lightning as fl
from fl_lightning.evaluation.results import read_json

WORDS = ("data=folder", "~model", "+model._target_=tests.federations.tiny_model", "logger=none", "dashboard=null")


def test_it_is_the_scripts_run_and_goes_on_from_either(tiny_root: Path, tmp_path: Path) -> None:
    run = fl.train(*WORDS, method="fedavg", data={"root": tiny_root}, rounds=1, folder=tmp_path / "run")
    assert run.results == read_json(tmp_path / "run" / "results.json")
    assert run.table.loc["global", "mean"] == run.results["global"]["mean"]
    assert list(run.clients.index) == [one["name"] for one in run.results["clients"]]
    assert len(run.metrics) == 1
    more = fl.train(resume=run.folder, rounds=2, trust=["tests"])
    whole = fl.train(*WORDS, method="fedavg", data={"root": tiny_root}, rounds=2, folder=tmp_path / "whole")
    assert more.results["global"] == whole.results["global"]
    states = [torch.load(one.folder / "global_model.pt", weights_only=True) for one in (more, whole)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


@pytest.mark.every
def test_personalization(tiny_root: Path, tmp_path: Path) -> None:
    run = fl.train(*WORDS, data={"root": tiny_root}, rounds=1, folder=tmp_path / "run")
    settings = {"executor": "serial", "logger": "none", "baselines": {"local": {"epochs": 1}}, "trust": ["tests"]}
    tuned = fl.personalize(run, ["ft"], epochs=1, folder=tmp_path / "tuned", **settings)
    assert list(tuned.table.index) == ["none", "local", "ft"]
    matrix = tuned.matrix("ft")
    assert matrix.shape == (3, 3)
    assert matrix.to_numpy().diagonal().mean() == pytest.approx(tuned.table.loc["ft", "local"])
    assert "matrix/ft" in tuned.figures
    assert tuned.figures["matrix/ft"].size[0] > 100
    with pytest.raises(KeyError, match="there is no matrix of lp; there are ft, local, none"):
        tuned.matrix("lp")


def test_mistakes_are_said_as_by_the_scripts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no method=fedavgg; did you mean method=fedavg"):
        fl.train(method="fedavgg")
    with pytest.raises(ValueError, match="there is no optimizer.lrr"):
        fl.train(optimizer={"lrr": 0.1})
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        fl.TrainingRun(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fl.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (1e-3, "0.001"),
        ("ft", "ft"),
        ("a b's", r"'a b\'s'"),
        ([1, "x"], "[1, x]"),
    ],
)
def test_values_are_written_as_hydra_reads_them(value: object, text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from fl_lightning.notebook import _value

    assert _value(value) == text
    (override,) = OverridesParser.create().parse_overrides([f"key={text}"])
    assert override.value() == value or str(override.value()) == str(value)
