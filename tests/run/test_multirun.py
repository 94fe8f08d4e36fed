"""Sweeps: every job runs, a failing one stops none, and a sweeper is handed the validation score of the kept model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn

from tests.scripts import call


@pytest.mark.every
def test_a_sweep(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[Any] = []  # what a sweeper, such as Optuna's, gets from each job
    kept: Any = JobReturn.return_value

    def keep(self: JobReturn, value: Any) -> None:
        returned.append(value)
        kept.fset(self, value)

    monkeypatch.setattr(JobReturn, "return_value", property(kept.fget, keep))
    tiny = ["data=folder", f"data.root={tiny_root}", "logger=none", "dashboard=null", "loop.rounds=1"]
    own = ["~model", "+model._target_=tests.federations.tiny_model", f"paths.log_dir={tmp_path}"]
    assert call("train", "-m", *tiny, *own, "optimizer.lr=-1,0.1", "seed=1,2") == 1, "two jobs failed"
    assert "Invalid learning rate" in capsys.readouterr().err
    (folder,) = (tmp_path / "train" / "multirun").iterdir()
    runs = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("*/results.json")}
    assert sorted(runs) == [2, 3]
    assert [returned[job] for job in (2, 3)] == [runs[job]["validation"]["global"]["value"] for job in (2, 3)]
