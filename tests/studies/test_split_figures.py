"""The figure of accuracy against simulated time and bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_lightning.evaluation.results import MetricsTable, write_json
from studies.split_figures import draw, main, read_curve


def write_run(folder: Path, *, scored: bool = True) -> Path:
    folder.mkdir()
    table = MetricsTable(folder / "metrics.csv")
    for round in range(3):
        row = {"traffic/bytes_up": 1e6, "traffic/bytes_down": 2e6, "split/simulated_seconds": 5.0 * (round + 1)}
        if scored and round != 1:
            row |= {"personal_on/own": 0.5 + 0.1 * round, "personal_on/everyone": 0.3}
        table.append({"round": round, **row})
    write_json(folder / "results.json", {"method": "sl"})
    return folder


def test_curve_holds_the_evaluated_rounds_and_all_traffic_before_them(tmp_path: Path) -> None:
    curve = read_curve(write_run(tmp_path / "run"))
    assert curve.seconds == [5.0, 15.0]
    assert curve.megabytes == [3.0, 9.0]
    assert curve.accuracy == {"own": [0.5, 0.7], "everyone": [0.3, 0.3]}


def test_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write_run(tmp_path / "run")), "--out", str(tmp_path / "figures" / "split.png")])
    assert (tmp_path / "figures" / "split.png").stat().st_size > 10_000
    draw([read_curve(tmp_path / "run")], tmp_path / "again.svg")


def test_run_without_scored_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no personal_on/own, personal_on/everyone; run it with"):
        main([str(write_run(tmp_path / "run", scored=False)), "--out", str(tmp_path / "x.png")])
