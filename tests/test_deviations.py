"""Runs on several partitions, with several trainings each: what is run, and that finished runs are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_lightning.deviations import main, read_runs, run
from fl_lightning.evaluation.nested import components
from fl_lightning.evaluation.results import read_json
from tests.federations import tiny
from tests.personalization.conftest import QUICK

WORDS = (*QUICK, "personalization=[ft]", "baselines.local=null", "curves.every=null")
TUNED = [f"personalize.{word}" for word in WORDS]


@pytest.mark.slow
def test_partitions_trainings_and_fine_tunings(tiny_root: Path, tmp_path: Path) -> None:
    words = [*tiny(tiny_root), "loop.rounds=1", "logger=none", "dashboard=null", *TUNED]
    folder = tmp_path / "runs"
    text = run([f"folder={folder}", "partitions=1,2", "trainings=3,4", "tunings=2", *words])
    results = [
        [read_json(folder / f"partition_{p}" / f"training_{t}" / "personalized" / "results.json") for t in (3, 4)]
        for p in (1, 2)
    ]
    hashes = [[one["partition_hash"] for one in row] for row in results]
    assert hashes[0][0] == hashes[0][1] != hashes[1][0] == hashes[1][1]
    values = [[[seed["local"] for seed in one["methods"]["ft"]["per_seed"]] for one in row] for row in results]
    kept = read_json(folder / "deviations.json")["ft"]["local"]
    expected = components(values)
    assert kept["mean"]["mean"] == pytest.approx(expected.mean.mean)
    assert [kept[key] for key in ("partition", "training", "tuning")] == pytest.approx(expected[1:])
    assert "ft - none" in text
    folders = sorted(folder.glob("*/*/personalized"))
    assert read_runs(folders)["ft"]["local"] == expected
    with pytest.raises(ValueError, match="as many trainings each"):
        read_runs(folders[:3])
    with pytest.raises(SystemExit, match="no run of personalize.py"):
        main([str(one.with_name("trained")) for one in folders[:1]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["partitions=1,2"], "folder must say"),
        (["folder=x", "partitions=1,1"], "partitions must be whole numbers"),
        (["folder=x", "tunings=0"], "tunings must be at least 1"),
        (["folder=x", "seed=3"], "seed=3 must be left out"),
    ],
)
def test_bad_input(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(words)
