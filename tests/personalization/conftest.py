"""A trained tiny federation, and personalization of it with any overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fl_lightning.personalization import run as personalize
from fl_lightning.run.config import CONF
from fl_lightning.run.training import run as train
from tests.federations import config

QUICK = [
    "trust=[tests]",
    "epochs=2",
    "lp_epochs=1",
    "logger=none",
    "figures=false",
    "executor=serial",
    "curves.every=1",
    "lr=0.1",
]


def compose_personalization(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("personalize", [*QUICK, *overrides], return_hydra_config=False)


@pytest.fixture(scope="session")
def trained(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a federation of three clients, with BatchNorm in the model."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(OmegaConf.create(config(tiny_root)), folder)
    return folder


@pytest.fixture
def personalized(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, Path]]:
    """Personalize the tiny federation; returns the results and the run folder."""
    count = iter(range(100))

    def run(*overrides: str, checkpoint: Path | str = trained) -> tuple[Any, Path]:
        folder = tmp_path / f"personalized{next(count)}"
        results = personalize(compose_personalization(f"checkpoint={checkpoint}", *overrides), folder)
        return results, folder

    return run
