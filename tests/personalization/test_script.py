"""``personalize.py`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_lightning.evaluation.results import read_json
from fl_lightning.run.config import CONF
from tests.scripts import call


@pytest.mark.every
def test_one_command_prints_the_table(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    quick = ["epochs=1", "lp_epochs=1", "figures=false"]
    given = [f"checkpoint={trained}", "trust=[tests]", "personalization=[ft,lp_ft]", f"hydra.run.dir={folder}"]
    assert call("personalize", *given, *quick) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    table = next(number for number, line in enumerate(lines) if line.startswith("strategy"))
    assert [line.split()[0] for line in lines[table + 2 : table + 6]] == ["none", "local", "ft", "lp_ft"]
    assert "global_others: mean of A[i, j], j != i" in shown
    assert set(json.loads((folder / "results.json").read_text())["methods"]) == {"none", "local", "ft", "lp_ft"}
    assert (folder / "matrix" / "lp_ft.csv").is_file()


@pytest.mark.every
def test_every_strategy_leaves_its_results_as_it_is_shipped(trained: Path, tmp_path: Path) -> None:
    """All at once, with figures, TensorBoard and worker processes."""
    pytest.importorskip("peft")
    # prompt_ft is for transformers: test_prompts_of_images_personalize.
    strategies = sorted({path.stem for path in (CONF / "personalization").glob("[!_]*.yaml")} - {"prompt_ft"})
    given = [f"checkpoint={trained}", f"personalization=[{','.join(strategies)}]", f"hydra.run.dir={tmp_path}"]
    assert call("personalize", *given, "epochs=1", "lp_epochs=1", "trust=[tests]") == 0
    methods = read_json(tmp_path / "results.json")["methods"]
    assert sorted(methods) == strategies
    assert {path.stem for path in (tmp_path / "matrix").glob("*.csv")} == set(strategies)
    assert list((tmp_path / "figures").glob("*.png"))
    assert list(tmp_path.rglob("events.out.tfevents*"))
