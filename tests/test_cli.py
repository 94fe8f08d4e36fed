"""The scripts as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fl_lightning.command_line import with_resume

ROOT = Path(__file__).resolve().parent.parent


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


def tiny(tiny_root: Path, folder: Path) -> list[str]:
    # resnet10t and 8x8 images: any timm model, quickly.
    return ["data=folder", f"data.root={tiny_root}", "model=timm", "model.name=resnet10t", f"hydra.run.dir={folder}"]


def test_a_run_leaves_what_scripts_rely_on_and_goes_on(tiny_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(*tiny(tiny_root, folder), "method=fedavg", "loop.rounds=1", "seed=7")
    assert done.returncode == 0, done.stderr
    assert "global" in done.stdout
    assert "it/s" not in done.stderr, "no bars where nobody watches"
    results = json.loads((folder / "results.json").read_text())
    expected = {"method", "rounds", "seed", "global", "personal", "unseen", "clients", "bytes_up", "bytes_down"}
    assert expected | {"seconds", "seconds_per_round_median"} <= results.keys()
    assert (results["method"], results["rounds"], results["seed"], results["personal"]) == ("fedavg", 1, 7, None)
    assert set(results["global"]) == {"mean", "weighted_mean", "std", "worst", "bottom_decile", "pooled"}
    assert set(results["clients"][0]) == {"id", "name", "num_train", "num_val", "num_test", "global", "personal"}
    for name in ("metrics.csv", "partition.json", "config.yaml", "checkpoints/last.pt", "figures/partition.png"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("events.out.tfevents.*"))

    import timm

    model = timm.create_model("resnet10t", num_classes=3)
    model.load_state_dict(torch.load(folder / "global_model.pt", weights_only=True), strict=True)

    again = train(*tiny(tiny_root, folder), "loop.rounds=1", "seed=7")
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
    more = train(f"resume={folder}", "loop.rounds=2")
    assert more.returncode == 0, more.stderr
    assert json.loads((folder / "results.json").read_text())["rounds"] == 2
    assert (folder / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["loop.round=3"], "loop.round"),
        (["method=fedavgg"], "fedavgg"),
        (["data=folder", "data.root=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes_end_in_a_sentence_without_a_traceback(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = train(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_resume_replays_the_overrides_of_the_first_start(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- seed=7\n- hydra.run.dir=elsewhere\n")
    arguments = with_resume([f"resume={tmp_path}", "loop.rounds=9"])
    assert arguments[:2] == ["seed=7", "loop.rounds=9"]
    assert f"hydra.run.dir={tmp_path}" in arguments
    assert with_resume(["seed=1"]) == ["seed=1"]
    with pytest.raises(FileNotFoundError, match="no run in this folder"):
        with_resume(["resume=nowhere"])
