"""The scripts as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fl_lightning.run.command_line import WORK, with_resume
from fl_lightning.run.config import CONF
from fl_lightning.run.training import comparable
from tests.scripts import call


def tiny(tiny_root: Path) -> list[str]:
    # resnet10t and 8x8 images: any timm model, quickly.
    return ["data=folder", f"data.root={tiny_root}", "model=timm", "model.name=resnet10t"]


@pytest.mark.every
def test_a_run_leaves_what_scripts_rely_on_and_goes_on(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lr=1"
    where = f"hydra.run.dir='{folder}'"
    assert call("train", *tiny(tiny_root), where, "method=fedavg", "loop.rounds=1", "seed=7") == 0
    shown = capsys.readouterr()
    assert "global" in shown.out
    assert "it/s" not in shown.err, "no bars where nobody watches"
    results = json.loads((folder / "results.json").read_text())
    expected = {"method", "rounds", "seed", "global", "personal", "unseen", "clients", "bytes_up", "bytes_down"}
    assert expected | {"seconds", "seconds_per_round_median"} <= results.keys()
    assert (results["method"], results["rounds"], results["seed"], results["personal"]) == ("fedavg", 1, 7, None)
    assert set(results["global"]) == {"mean", "weighted_mean", "std", "worst", "bottom_decile", "pooled"}
    keys = {"id", "name", "num_train", "num_val", "num_test", "global", "personal", "metrics"}
    assert set(results["clients"][0]) == keys
    for name in ("metrics.csv", "partition.json", "config.yaml", "checkpoints/last.pt", "figures/partition.png"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("events.out.tfevents.*"))

    import timm

    model = timm.create_model("resnet10t", num_classes=3)
    model.load_state_dict(torch.load(folder / "global_model.pt", weights_only=True), strict=True)

    assert call("train", *tiny(tiny_root), where, "loop.rounds=1", "seed=7") == 1
    assert "already holds a run" in capsys.readouterr().err
    assert call("train", f"resume={folder}", "loop.rounds=2") == 0
    assert json.loads((folder / "results.json").read_text())["rounds"] == 2
    assert (folder / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_the_script_in_a_process_of_its_own(tiny_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", *tiny(tiny_root), f"hydra.run.dir={tmp_path}", "loop.rounds=1"]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, "global" in done.stdout, "it/s" in done.stderr) == (0, True, False), done.stderr


@pytest.mark.parametrize("name", ["train", "personalize"])
def test_a_misspelt_key_ends_in_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "optimizer.lrr=1", f"hydra.run.dir={tmp_path / 'run'}") == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: there is no optimizer.lrr; did you mean optimizer.lr?\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", ["model", "optimizer", "trainer", "executor"])
def test_no_choice_ends_in_one_sentence(group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", f"{group}=null", f"hydra.run.dir={tmp_path / 'run'}") == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: there is no {group}=null; these are: ")
    assert told.err.count("\n") == 1


def test_a_mistake_that_shows_later_leaves_its_traceback_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "data=folder", "data.root=/nowhere/at/all", f"hydra.run.dir={tmp_path / 'run'}") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "/nowhere/at/all" in told
    assert "Traceback" not in told
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()


def test_curves_are_looked_at_beside_those_of_other_runs(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    assert comparable(logs / "train" / "fedavg" / "2026", logs) == logs
    assert comparable(tmp_path / "elsewhere" / "run", logs) == tmp_path / "elsewhere"


def test_resume_replays_the_overrides_of_the_first_start(tmp_path: Path) -> None:
    note(tmp_path, ["seed=7", "hydra.run.dir=elsewhere"], {})
    arguments = with_resume([f"resume={tmp_path}", "loop.rounds=9"])
    assert arguments[:2] == ["seed=7", "loop.rounds=9"]
    assert f"hydra.run.dir='{tmp_path}'" in arguments, "quoted, for a path may hold an equals sign"
    assert with_resume(["seed=1"]) == ["seed=1"]
    with pytest.raises(FileNotFoundError, match="no run in this folder"):
        with_resume(["resume=nowhere"])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["executor=processes", "executor.workers=2", "++executor.threads=2"], "executor=serial"),
        (["executor.threads=2"], "executor=processes"),
        (["executor.threads=2"], "executor=cohort"),
        (["data=cifar10", "data/partitioner=dirichlet", "data.partitioner.alpha=0.1"], "data/partitioner=iid"),
        (["data=cifar10", "data/partitioner=dirichlet", "data.partitioner.alpha=0.1", "+data.x=1"], "data=digits"),
    ],
)
def test_resume_with_another_choice_leaves_out_what_belonged_to_the_old_one(
    then: list[str], now: str, tmp_path: Path
) -> None:
    started(tmp_path, *then, "optimizer.lr=0.3")
    arguments = [argument for argument in with_resume([f"resume={tmp_path}", now]) if "hydra." not in argument]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", arguments)
        fresh = compose("train", [*(["data=cifar10"] if now.startswith("data/") else []), now])
    group = now.partition("=")[0].replace("/", ".")
    assert OmegaConf.to_container(OmegaConf.select(cfg, group)) == OmegaConf.to_container(
        OmegaConf.select(fresh, group)
    )
    assert cfg.optimizer.lr == 0.3


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["executor=processes", "executor.workers=2"], "executor=processes"),
        (["executor.threads=2"], "executor=serial"),  # the default
        (["executor=processes", "executor.workers=2"], "loop.rounds=9"),
    ],
)
def test_resume_with_the_same_choice_keeps_what_was_set(then: list[str], now: str, tmp_path: Path) -> None:
    started(tmp_path, *then)
    assert with_resume([f"resume={tmp_path}", now])[: len(then) + 1] == [*then, now]


def started(folder: Path, *overrides: str) -> None:
    """Leave what a run notes of its start."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        choices = compose("train", list(overrides), return_hydra_config=True).hydra.runtime.choices
    note(folder, overrides, OmegaConf.to_container(choices))


def note(folder: Path, overrides: Sequence[str], choices: Any) -> None:
    (folder / "overrides.yaml").write_text(json.dumps({"overrides": list(overrides), "choices": choices}))


@pytest.mark.parametrize(
    "damage", [b"", b'{"overrides": ["seed=1", "lo', b"\x80\x00\xff", b"- seed=1\n", b'{"overrides": 3}']
)
def test_damaged_notes_of_the_start_are_named(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "overrides.yaml").write_bytes(damage)
    with pytest.raises(ValueError, match="overrides.yaml is damaged"):
        with_resume([f"resume={tmp_path}"])


def test_a_refused_start_leaves_a_finished_run_as_it_was(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [*tiny(tiny_root), f"hydra.run.dir={tmp_path}", "dashboard=null", "logger=none"]
    assert call("train", *where, "loop.rounds=0") == 0
    assert call("train", *where, "loop.rounds=0", "seed=9", "optimizer.lr=0.7") == 1
    assert "already holds a run" in capsys.readouterr().err
    assert call("train", f"resume={tmp_path}") == 0


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "/proc/nowhere"])
def test_a_run_folder_that_cannot_be_made_ends_in_one_sentence(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert call("train", f"hydra.run.dir={tmp_path / place}") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the run folder cannot be made: ")
    assert told.count("\n") == 1


def test_torch_and_torchvision_of_different_builds_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_pair.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(WORK, "train", "broken_pair")
    assert call("train", f"hydra.run.dir={tmp_path}") == 1
    assert "error: the installed torch and torchvision come from different builds" in capsys.readouterr().err


def test_a_misspelt_key_does_not_wait_for_torch() -> None:
    code = "import sys, fl_lightning.run.command_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, check=False).returncode == 0


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda: sys.exit(), 143),  # so Lightning ends a fit on SIGTERM
        (lambda: {}, 130),  # stopped after a round
        (mock.Mock(side_effect=KeyboardInterrupt), 130),
    ],
    ids=["SIGTERM", "stopped", "Ctrl-C"],
)
def test_a_run_that_was_stopped_is_no_success(
    end: Callable[[], Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("fl_lightning.run.command_line.run_work", lambda *_: end())
    assert call("train", f"hydra.run.dir={tmp_path}") == code
    assert "Traceback" not in capsys.readouterr().err
