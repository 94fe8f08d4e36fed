"""Scores of clients' models on their own and on everyone's data against predictions made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl_lightning.callbacks.everyone_evaluation import EveryoneEvaluation
from fl_lightning.state import load
from tests.federations import federation

EVERYONE = "+callbacks.everyone={_target_: fl_lightning.callbacks.everyone_evaluation.EveryoneEvaluation}"


def test_scores_by_hand(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "method=fedper", EVERYONE)
    run.fit()
    scores = run.loop.callbacks["everyone"].results(run.loop)["personal_on"]
    for client in run.clients:
        load(run.module, run.loop.personal_state(client))
        run.module.eval()
        hits = []
        for other in run.clients:
            x, y = next(iter(other.data.test_dataloader()))
            with torch.no_grad():
                hits.append(run.module(x).argmax(1) == y)
        own = hits[run.clients.index(client)].float().mean().item()
        assert scores["clients"][client.name]["own"] == pytest.approx(own)
        assert scores["clients"][client.name]["everyone"] == pytest.approx(torch.cat(hits).float().mean().item())
    row = run.loop.history[-1]
    assert row["personal_on/own"] == pytest.approx(scores["mean"]["own"])
    assert row["personal_on/everyone"] == pytest.approx(scores["mean"]["everyone"])
    assert scores["mean"]["own"] != scores["mean"]["everyone"]


def test_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        EveryoneEvaluation(every=0)
