from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fl_lightning.callback import FederatedCallback
from fl_lightning.callbacks.round_schedule import RoundSchedule
from tests.federations import federation

FALL = ["+callbacks.rate._target_=fl_lightning.callbacks.round_schedule.RoundSchedule", "+callbacks.rate.gamma=0.1"]


def test_factors() -> None:
    assert [RoundSchedule(0.5).factor(round) for round in range(4)] == [1, 0.5, 0.25, 0.125]
    assert [RoundSchedule(0.5, [2, 3]).factor(round) for round in range(5)] == [1, 1, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("engine", ["lean", "stock"])
def test_fits_of_a_round_have_its_rate_and_fine_tuning_the_full_one(
    engine: str, tiny_root: Path, tmp_path: Path
) -> None:
    class Watch(FederatedCallback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    settings = ["method=reptile", "optimizer.lr=0.2", "callbacks.final.epochs=1", "loop.rounds=3"]
    run = federation(tiny_root, tmp_path, *settings, *FALL, "+callbacks.rate.milestones=[1]", f"local.engine={engine}")
    run.loop.add_callback("watch", Watch())
    final: Any = run.loop.callbacks["final"]
    final.callbacks["watch"] = Watch()
    run.fit()
    run.loop.personal_state(run.clients[0])
    assert rates == pytest.approx([0.2] * 3 + [0.02] * 6 + [0.2] * 3)


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"gamma": 2.0}, {"milestones": [-1]}])
def test_wrong_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RoundSchedule(**arguments)
