"""TensorBoard's HPARAMS hold what was said on the command line, every word of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from fl_lightning.loop import FederatedLoop
from fl_lightning.run.results import log_hyperparameters

CONFIG = {
    "method": {"name": "fedprox"},
    "seed": 3,
    "model": {"_target_": "mine.net"},
    "data": {"_target_": "fl_lightning.data.sets.digits.Digits"},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05},
    "trainer": {"max_epochs": 1},
}
WORDS = ["data.num_clients=4", "+callbacks.rate._target_=mine.Rate", "~optimizer.momentum", "seed=3", "model.c=a=b"]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_every_override_is_a_hyperparameter(kind: type, tmp_path: Path) -> None:
    said: dict[str, Any] = {}

    class Recorder(kind):  # type: ignore[misc]
        def log_hyperparams(self, params: dict[str, Any], *rest: Any, **more: Any) -> None:
            said.update(params)

    loop = SimpleNamespace(seed=3, rounds=2, round=2, logger=Recorder(str(tmp_path)))
    log_hyperparameters(cast(FederatedLoop, loop), CONFIG, {"test_final/a": 1.0}, WORDS)
    assert said["data.num_clients"] == "4"
    assert said["callbacks.rate._target_"] == "mine.Rate"
    assert said["model.c"] == "a=b"
    assert "optimizer.momentum" in said
    assert (said["seed"], said["method"], said["optimizer.lr"], said["data"]) == (3, "fedprox", 0.05, "Digits")
