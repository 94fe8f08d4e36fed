"""Own and pooled scores of clients' models against predictions made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl_lightning.callbacks.pooled_evaluation import PooledEvaluation
from fl_lightning.state import load
from tests.federations import federation

POOLED = "+callbacks.pooled={_target_: fl_lightning.callbacks.pooled_evaluation.PooledEvaluation}"


def test_scores_by_hand(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "method=fedper", POOLED)
    run.fit()
    scores = run.loop.callbacks["pooled"].results(run.loop)["pooled"]
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
        assert scores["clients"][client.name]["all"] == pytest.approx(torch.cat(hits).float().mean().item())
    row = run.loop.history[-1]
    assert row["pooled/own"] == pytest.approx(scores["mean"]["own"])
    assert row["pooled/all"] == pytest.approx(scores["mean"]["all"])
    assert scores["mean"]["own"] != scores["mean"]["all"]


def test_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        PooledEvaluation(every=0)
