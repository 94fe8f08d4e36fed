"""A personalization that was stopped goes on, to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.personalization import run
from fl_lightning.personalization.outcome import KeptOutcomes
from fl_lightning.run.config import CONF
from tests.personalization.conftest import QUICK, compose_personalization
from tests.scripts import call

SETTINGS = ["personalization=[ft,soup_ft]", "seeds=2", "save_models=true"]


class KilledError(BaseException):
    """No Exception, so that nothing is put in order, as when the process is killed."""


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the run when it has kept so many strategies and seeds."""
    save, count = KeptOutcomes.save, iter(range(100))

    def killed(self: KeptOutcomes, outcomes: Any) -> None:
        if next(count) == number:
            raise KilledError
        save(self, outcomes)

    monkeypatch.setattr(KeptOutcomes, "save", killed)


def left(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves in numbers."""
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.csv")}
    models = {str(path.relative_to(folder)): torch.load(path) for path in sorted(folder.glob("models/**/*.pt"))}
    return {"results": json.loads((folder / "results.json").read_text()), "texts": texts, "models": models}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["results"] == other["results"]
    assert one["texts"] == other["texts"]
    assert one["models"].keys() == other["models"].keys()
    for name, state in one["models"].items():
        assert all(torch.equal(tensor, other["models"][name][key]) for key, tensor in state.items())


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(compose_personalization(f"checkpoint={trained}", *SETTINGS), folder)
    return folder


@pytest.mark.every
def test_the_same_command_goes_on_to_the_same_bits(
    whole: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose_personalization(f"checkpoint={trained}", *SETTINGS)
    with monkeypatch.context() as patch:
        stop_after(5, patch)  # none, local: two seeds each; then the first of ft
        with pytest.raises(KilledError):
            run(cfg, tmp_path)
    assert sorted(path.parent.name for path in tmp_path.glob("outcomes/*/*.pt")) == [
        "ft",
        *["local"] * 2,
        *["none"] * 2,
    ]
    first = tmp_path / "outcomes" / "ft" / "seed_0.pt"
    before = first.stat().st_mtime_ns
    run(cfg, tmp_path)
    assert first.stat().st_mtime_ns == before, "what had ended is not made again"
    assert_same(left(tmp_path), left(whole))
    run(cfg, tmp_path)  # once more: nothing is left to do
    assert_same(left(tmp_path), left(whole))


def test_other_settings_or_another_global_model_do_not_go_on(trained: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"epochs was 2, now 4"):
        run(compose_personalization(f"checkpoint={trained}", *SETTINGS, "epochs=4"), whole)
    outcomes = KeptOutcomes(whole / "outcomes", {"weight": torch.ones(2)}, ["accuracy"])
    ft = next(one for one in _strategies(trained) if one.name == "ft")
    with pytest.raises(ValueError, match="another global model"):
        outcomes.load(ft, 0)


def _strategies(trained: Path) -> Any:
    from fl_lightning.personalization.strategy import build_strategies

    return build_strategies(compose_personalization(f"checkpoint={trained}", *SETTINGS))


def test_resume_as_the_message_says(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    quick = ["epochs=1", "lp_epochs=1", "figures=false", "logger=none", "executor=serial", "trust=[tests]"]
    given = [f"checkpoint={trained}", "personalization=[ft]", f"hydra.run.dir={folder}", *quick]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with suppress(KilledError):
            assert call("personalize", *given) != 0
    assert not (folder / "results.json").exists()
    assert call("personalize", f"resume={folder}", "trust=[tests]") == 0
    assert set(json.loads((folder / "results.json").read_text())["methods"]) == {"none", "local", "ft"}


def test_a_start_that_failed_leaves_its_folder_free(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(KeptOutcomes, "save", lambda self, outcomes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(compose_personalization(f"checkpoint={trained}", "personalization=[]"), tmp_path)
    run(compose_personalization(f"checkpoint={trained}", "personalization=[]", "lr=0.3"), tmp_path)


@pytest.mark.slow
def test_killed_in_earnest(whole: Path, trained: Path, tmp_path: Path) -> None:
    settings = [f"checkpoint={trained}", *SETTINGS]
    script = str(CONF.parent / "personalize.py")
    command = [sys.executable, script, *QUICK, *settings, f"hydra.run.dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=CONF.parent, env={**os.environ, "PYTHONPATH": str(CONF.parent)})
    while not list(tmp_path.glob("outcomes/*/*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()
    run(compose_personalization(*settings), tmp_path)
    assert_same(left(tmp_path), left(whole))
