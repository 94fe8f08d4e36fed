from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.callbacks.partial_work import KEY, PartialWork
from fl_lightning.client import Broadcast
from tests.federations import add_recorder, assert_same, federation

LATE = "+callbacks.late._target_=fl_lightning.callbacks.partial_work.PartialWork"
PROX = ["method=fedprox", "loop.rounds=1"]


def recorded(tiny_root: Path, folder: Path, *overrides: str) -> tuple[Any, list[Any]]:
    run = federation(tiny_root, folder, *PROX, *overrides)
    recorder = add_recorder(run)
    run.fit()
    return run, recorder.updates


@pytest.mark.parametrize("engine", ["lean", "stock"])
def test_who_is_slow_sends_what_shorter_training_gives(engine: str, tiny_root: Path, tmp_path: Path) -> None:
    settings = [LATE, "+callbacks.late.share=0.67", "trainer.max_epochs=3", f"local.engine={engine}"]
    run, updates = recorded(tiny_root, tmp_path / "run", *settings)
    slow = run.loop.callbacks["late"]._epochs
    assert len(slow) == 2
    shorter = {
        epochs: recorded(tiny_root, tmp_path / str(epochs), f"trainer.max_epochs={epochs}")[1]
        for epochs in {3, *map(int, slow.values())}
    }
    for update in updates:
        epochs = int(slow.get(update.client_id, 3))
        [expected] = [other for other in shorter[epochs] if other.client_id == update.client_id]
        assert_same(update.state, expected.state)


def test_without_slow_clients_nothing_changes(tiny_root: Path, tmp_path: Path) -> None:
    runs = [
        recorded(tiny_root, tmp_path / str(len(extra)), "trainer.max_epochs=2", *extra)[0]
        for extra in ([], [LATE, "+callbacks.late.share=0"])
    ]
    assert_same(runs[0].loop.state, runs[1].loop.state)
    assert runs[0].loop.bytes_down == runs[1].loop.bytes_down


def test_the_draw_is_even_and_new_in_each_round() -> None:
    partial_work = PartialWork(share=0.4)
    partial_work._asked = 4
    loop: Any = type("Loop", (), {"seed": 1, "round": 0})
    cohort: list[Any] = [type("Client", (), {"id": 7 * number}) for number in range(10)]
    epochs, slow = [], torch.zeros(10)
    for loop.round in range(300):
        partial_work.on_round_start(loop, cohort)
        for place, client in enumerate(cohort):
            broadcast = Broadcast(loop.round, {})
            partial_work.on_broadcast(loop, client, broadcast)
            slow[place] += KEY in broadcast.extra
            epochs += [int(broadcast.extra[KEY])] if KEY in broadcast.extra else []
    assert len(epochs) == 1200
    assert (slow / 300 - 0.4).abs().max() < 0.1
    assert (torch.bincount(torch.tensor(epochs))[1:] / 1200 - 1 / 3).abs().max() < 0.05
    assert set(epochs) == {1, 2, 3}


def test_one_epoch_cannot_be_cut_short(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs"):
        federation(tiny_root, tmp_path, *PROX, LATE).fit()
    with pytest.raises(ValueError, match="share"):
        PartialWork(share=1.5)
