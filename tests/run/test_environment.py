from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import fl_lightning
from fl_lightning.run import environment as module
from fl_lightning.run.environment import environment
from fl_lightning.run.training import run
from tests.federations import config, federation


def test_it_names_versions_machine_and_command() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["fl_lightning"] == fl_lightning.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["cpu"].endswith(torch.backends.cpu.get_cpu_capability())
    assert ("mkldnn" in found["kernels"]) == torch.backends.mkldnn.is_available()
    version = found["kernels"].partition("mkldnn ")[2].partition(",")[0]
    assert f"MKL-DNN v{version} " in torch.__config__.show()
    assert Path(sys.argv[0]).name in found["command"]
    assert all(isinstance(value, str) for value in json.loads(json.dumps(found)).values())


def test_it_names_what_chooses_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "variables" not in environment()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert environment()["variables"] == "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"


def test_the_commit_is_that_of_the_source_and_of_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "theirs" / "site-packages" / "fl_lightning"
    package.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path / "theirs"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(module.fl_lightning, "__file__", str(package / "__init__.py"))
    assert module._commit.__wrapped__() == ""
    monkeypatch.setattr(module.fl_lightning, "__file__", str(tmp_path / "theirs" / "fl_lightning" / "__init__.py"))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert head.startswith(module._commit.__wrapped__())
    assert module._commit.__wrapped__()


def test_a_resumed_run_says_what_changed(tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    federation(tiny_root, folder, "loop.rounds=1").fit()
    (first,) = json.loads((folder / "environment.json").read_text())
    with caplog.at_level(logging.WARNING):
        federation(tiny_root, folder, f"resume='{folder}'")
    assert not caplog.records
    (folder / "environment.json").write_text(json.dumps([{**first, "torch": "1.0.0", "command": "elsewhere"}]))
    with caplog.at_level(logging.WARNING):
        federation(tiny_root, folder, f"resume='{folder}'", "loop.rounds=2").fit()
    assert f"torch was '1.0.0', now '{torch.__version__}'" in caplog.text
    assert "command" not in caplog.text
    assert [one["torch"] for one in json.loads((folder / "environment.json").read_text())] == [
        "1.0.0",
        torch.__version__,
    ]


def test_a_start_that_failed_leaves_its_folder_free(tiny_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopping = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: nothing}"
    settings = OmegaConf.create(config(tiny_root, f"+callbacks.stopping={stopping}"))
    with pytest.raises(RuntimeError, match="nothing"):
        run(settings, folder)
    run(OmegaConf.create(config(tiny_root)), folder)
    with pytest.raises(ValueError, match="already holds a run"):
        run(settings, folder)
