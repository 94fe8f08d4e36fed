"""Fine-tuning and the client-by-client matrix at sites: models travel, data do not, and the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fl_lightning.evaluation.results import read_json
from tests.federations import assert_same, tiny
from tests.scripts import call
from tests.sites.federation import NAMES, free_port, sites

QUICK = ["personalization=[ft]", "personalization@baselines=[none]", "epochs=1", "curves.every=1", "figures=false"]


def table(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "results.json")
    for key in ("source", "partition_hash"):
        found.pop(key, None)
    return {key: value for key, value in found.items() if "second" not in key}


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if "second" not in key}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("strategies", ["[ft]", "[lp_ft,soup_ft,lora_ft]"])
def test_the_matrix_of_sites_is_that_of_the_simulation(strategies: str, tiny_root: Path, tmp_path: Path) -> None:
    quiet = ["logger=none"]
    words = [*QUICK[1:], f"personalization={strategies}", "batch_size=5", "lp_epochs=0", "trust=[tests]"]
    assert call("train", *tiny(tiny_root), *quiet, "dashboard=null", f"hydra.run.dir={tmp_path / 'serial'}") == 0
    one = [f"checkpoint={tmp_path / 'serial'}", "executor=serial", *words, *quiet]
    assert call("personalize", *one, f"hydra.run.dir={tmp_path / 'one'}") == 0
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", f"executor.sites=[{','.join(NAMES)}]"]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model"]
    training = [*at, "data.classes=3", "data.batch_size=8", *model, "loop.rounds=2", "dashboard=null", *quiet]
    with sites(port, tiny_root, tmp_path / "sites", once=False) as threads:
        assert call("train", *training, f"hydra.run.dir={tmp_path / 'train'}") == 0
        two = [f"checkpoint={tmp_path / 'train'}", *at, *words, *quiet]
        assert call("personalize", *two, f"hydra.run.dir={tmp_path / 'two'}") == 0
        for thread in threads:
            thread.line.close()
    assert_same(without_seconds(table(tmp_path / "two")), without_seconds(table(tmp_path / "one")))


@pytest.mark.slow
def test_a_site_whose_model_stays_says_so(tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", "executor.sites=1", "logger=none"]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model"]
    with sites(port, tiny_root, tmp_path / "sites", ["ann"], once=False, stays=True) as threads:
        training = [*at, "data.classes=3", *model, "loop.rounds=1", "dashboard=null"]
        assert call("train", *training, f"hydra.run.dir={tmp_path / 'train'}") == 0
        words = [f"checkpoint={tmp_path / 'train'}", *at, *QUICK, "trust=[tests]", f"hydra.run.dir={tmp_path / 'two'}"]
        assert call("personalize", *words) == 1
        assert (
            "site ann: the run cannot be set up at site ann: it was started with --keep-model"
            in capsys.readouterr().err
        )
        assert threads
