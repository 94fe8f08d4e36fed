from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from fl_lightning.compare import main
from fl_lightning.comparison.definition import Comparison
from fl_lightning.comparison.runner import compare, validation_score
from fl_lightning.comparison.table import in_every_seed, over_seeds, read_runs
from fl_lightning.evaluation.results import read_json
from fl_lightning.loop import DivergedError
from fl_lightning.run import training
from fl_lightning.run.config import CONF, check

ROOT = CONF / "comparison"
COMPARISONS = sorted(str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("[!_]*.yaml"))


@pytest.fixture
def tiny(tiny_root: Path, tmp_path: Path) -> Comparison:
    common = [
        "data=folder",
        f"data.root={tiny_root}",
        "model=lenet5",
        "~model",
        "+model._target_=tests.federations.tiny_model",
        "logger=none",
        "dashboard=null",
        "loop.rounds=2",
    ]
    runs = {"fedavg": [], "warm": ["method=lg_fedavg", "init_from='{folder}/fedavg'"]}
    return Comparison(folder=str(tmp_path), common=common, runs=runs)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        pytest.param(name, run, marks=[] if number == 0 else pytest.mark.every, id=f"{name}-{run}")
        for name in COMPARISONS
        for number, run in enumerate(Comparison.read(name).runs)
    ],
)
def test_every_run_of_every_comparison_composes_and_is_sound(name: str, run: str) -> None:
    comparison = Comparison.read(name)
    comparison.check()
    cfg = comparison.configuration(run, comparison.candidates(run)[-1])
    for key in ("module", "sharing", "aggregator", "callbacks", "cohort", "loop", "data", "trainer"):
        check(cfg[key], key)
    phases = (cfg.callbacks.get("schedule") or {}).get("phases", [])
    if len(phases) > 1:
        assert sum(phase["epochs"] for phase in phases) == cfg.trainer.max_epochs


def test_a_finished_run_of_another_environment_is_said_to_be(
    tiny: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(tiny, ["fedavg"])
    file = tiny.place(1) / "fedavg" / "environment.json"
    compare(tiny, ["fedavg"])
    assert "finished before" not in capsys.readouterr().err
    (made,) = json.loads(file.read_text())
    file.write_text(json.dumps([{**made, "lightning": "1.0"}]))
    compare(tiny, ["fedavg"])
    assert "finished before: lightning was '1.0', now" in capsys.readouterr().err


def test_finished_runs_are_read_and_stopped_ones_go_on(tiny: Comparison) -> None:
    rows = compare(tiny, ["fedavg", "warm"])
    assert list(rows) == ["fedavg", "warm"]
    (fedavg,), (warm,) = rows.values()
    assert fedavg["method"] == "fedavg"
    assert fedavg["global"] is not None
    assert fedavg["personal"] is None
    assert warm["global"] is None
    assert warm["personal"] is not None
    result = tiny.place(1) / "fedavg" / "results.json"
    written = result.stat().st_mtime_ns
    assert compare(tiny, ["fedavg"]) == {"fedavg": [fedavg]}
    assert result.stat().st_mtime_ns == written
    result.unlink()  # as if killed between the last checkpoint and the results
    (again,) = compare(tiny, ["fedavg"])["fedavg"]
    assert {**again, "seconds": 0} == {**fedavg, "seconds": 0}


@pytest.mark.every
def test_seeds_are_runs_of_their_own(tiny: Comparison) -> None:
    rows = compare(tiny, ["fedavg", "warm"], seeds=[3, 1])
    first, second = rows["fedavg"]
    assert first["global"] != second["global"]
    assert compare(tiny, ["fedavg"], seeds=[1])["fedavg"] == [second]
    merged = over_seeds(rows["fedavg"])
    assert merged["global"].mean == pytest.approx((first["global"] + second["global"]) / 2)
    assert merged["global"].std == pytest.approx(abs(first["global"] - second["global"]) / 2**0.5)
    assert merged["MB up"] == first["MB up"]
    assert merged["method"] == "fedavg"
    assert read_json(tiny.place(3) / "warm" / "results.json")["seed"] == 3
    with pytest.raises(ValueError, match="seeds that differ, as in seeds=1,2,3, got 1,1"):
        compare(tiny, ["fedavg"], seeds=[1, 1])


@pytest.mark.every
def test_a_grid_is_tried_with_the_first_seed_and_chosen_by_validation(tiny: Comparison) -> None:
    # At rate 0 nothing is learned, at 1e30 every update diverges.
    tiny.grids = {"fedavg": {"optimizer.lr": [0.0001, 0.1, 1e30], "loop.rounds": [2]}, "warm": {"seed": [1, 1, 1]}}
    rows = compare(replace(tiny, grids={"fedavg": tiny.grids["fedavg"]}, runs={"fedavg": []}), ["fedavg"], [], [1, 2])
    assert [row["chosen"] for row in rows["fedavg"]] == ["lr=0.1 rounds=2"] * 2
    values = {
        lr: read_json(tiny.place(1) / "tuning" / "fedavg" / f"optimizer.lr={lr}_loop.rounds=2" / "results.json")
        for lr in ("0.0001", "0.1")
    }
    assert validation_score(values["0.1"]) > validation_score(values["0.0001"])
    assert read_json(tiny.place(1) / "fedavg" / "results.json") == values["0.1"]
    assert read_json(tiny.place(2) / "fedavg" / "results.json")["seed"] == 2
    assert not (tiny.place(2) / "tuning").exists()


@pytest.mark.every
def test_a_combination_that_diverges_in_a_later_seed_is_out_for_all(
    tiny: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {"fedavg": {"optimizer.lr": [0.1, 0.0001]}}
    two = replace(tiny, grids=grids, runs={"fedavg": []})
    train = training.run

    def run(cfg: DictConfig, path: Path) -> Mapping[str, Any]:
        if cfg.seed == 3 and cfg.optimizer.lr == 0.1:
            (path / "train.log").write_text("as far as it came")
            raise DivergedError("round 1: the mean holds NaN")
        return train(cfg, path)

    monkeypatch.setattr(training, "run", run)
    rows = compare(two, ["fedavg"], [], [1, 2, 3])["fedavg"]
    assert [row["chosen"] for row in rows] == ["lr=0.0001"] * 3
    assert [read_json(two.place(seed) / "fedavg" / "results.json")["seed"] for seed in (1, 2, 3)] == [1, 2, 3]
    assert compare(two, ["fedavg"], [], [1, 2, 3])["fedavg"] == rows  # remembered, not tried again
    grids["fedavg"] = {"optimizer.lr": [0.1]}
    with pytest.raises(DivergedError):
        compare(replace(two, folder=two.folder + "_one"), ["fedavg"], [], [3])


def test_every_run_is_tuned_alike() -> None:
    comparison = Comparison(runs={"a": [], "b": []}, grids={"a": {"x": [1, 2], "y": [1, 2]}, "b": {"x": [1, 2, 3, 4]}})
    comparison.check()
    assert comparison.candidates("a") == [["x=1", "y=1"], ["x=1", "y=2"], ["x=2", "y=1"], ["x=2", "y=2"]]
    with pytest.raises(ValueError, match="same number of combinations, got a 4, b 1; make them equal"):
        replace(comparison, grids={"a": comparison.grids["a"]}).check()
    with pytest.raises(ValueError, match="grids must be of runs, got c"):
        replace(comparison, grids={"c": {}}).check()


def test_what_holds_in_every_seed() -> None:
    def rows(*values: tuple[float | None, float | None]) -> list[dict[str, float | None]]:
        return [{"global": shared, "personal": personal} for shared, personal in values]

    found = {
        "a": rows((0.1, 0.9), (0.1, 0.8)),
        "b": rows((0.7, None), (0.7, None)),
        "c": rows((0.8, None), (0.6, None)),
    }
    assert in_every_seed(found).splitlines() == ["* a: above b, c", "* b: above none", "* c: above none"]


def test_a_finished_run_with_other_settings_is_refused(tiny: Comparison) -> None:
    compare(tiny, ["fedavg"])
    with pytest.raises(ValueError, match="optimizer.lr was"):
        compare(tiny, ["fedavg"], ["optimizer.lr=0.123"])
    with pytest.raises(ValueError, match="loop.rounds was 2, now 3"):
        compare(tiny, ["fedavg"], ["loop.rounds=3"])


def test_what_does_not_exist_is_named_with_what_does(tiny: Comparison) -> None:
    with pytest.raises(ValueError, match="fedavgg; there are fedavg, warm"):
        compare(tiny, ["fedavgg"])
    with pytest.raises(SystemExit, match="fedftha/two_cores"):
        main(["nothing"])
    with pytest.raises(SystemExit, match="whole numbers, as in seeds=1,2,3, got seeds=one"):
        main([COMPARISONS[0], "seeds=one"])
    with pytest.raises(SystemExit, match="there is no run nothing, nothing"):  # longer than the name of a file may be
        main([COMPARISONS[0], "runs=" + ",".join(["nothing"] * 50)])


@pytest.mark.every
def test_finished_runs_of_a_sweep_are_put_into_one_table(
    tiny: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare(tiny, ["fedavg"], ["loop.rounds=1"], [1, 2])["fedavg"]
    other = compare(replace(tiny, folder=str(tmp_path / "other")), ["fedavg"], ["loop.rounds=1", "optimizer.lr=0.1"])[
        "fedavg"
    ]
    folders = [tiny.place(1) / "fedavg", tiny.place(2) / "fedavg", tmp_path / "other" / "seed_1" / "fedavg"]
    for folder, lr in zip(folders, (0.05, 0.05, 0.1), strict=True):
        words = ["data=folder", f"optimizer.lr={lr}", "seed=1", "method=fedavg"]
        (folder / "overrides.yaml").write_text(json.dumps({"overrides": words, "choices": {}}))
    found = read_runs(folders)
    assert list(found) == ["fedavg optimizer.lr=0.05", "fedavg optimizer.lr=0.1"]
    assert [row["global"] for row in found["fedavg optimizer.lr=0.05"]] == [row["global"] for row in rows]
    assert [row["global"] for row in found["fedavg optimizer.lr=0.1"]] == [row["global"] for row in other]
    with pytest.raises(SystemExit, match=r"(?s)do not compare:\n  seeds: \[1, 2\] .*pass --mixed"):
        main([*map(str, folders), str(tmp_path / "multirun.yaml")])
    main([*map(str, folders), str(tmp_path / "multirun.yaml"), "--mixed"])
    assert "fedavg optimizer.lr=0.1" in capsys.readouterr().out
    main([str(folders[0]), str(folders[2])])
    with pytest.raises(ValueError, match="are both fedavg with seed 1; leave one out"):
        read_runs([folders[0], shutil.copytree(folders[0], tmp_path / "copy")])
    (folders[0] / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no finished run; continue it with resume="):
        read_runs(folders)
