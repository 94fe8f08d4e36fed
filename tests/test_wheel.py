"""The installed package does in an empty folder what the scripts do in a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_lightning.run.config import CONF

ROOT = CONF.parent
SCRIPT = """
import sys
from importlib.metadata import entry_points
next(iter(entry_points(group="console_scripts", name=sys.argv.pop(1)))).load()()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy, without what earlier builds left, and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("fl_lightning", "conf"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), "-v"]
    done = subprocess.run([*build, str(folder / "source")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def shell(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a console script of the wheel in an empty folder."""

    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, "-c", SCRIPT, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_wheel_holds_the_configuration_and_the_licence(installed: Path) -> None:
    packed = {path.relative_to(installed / "fl_lightning" / "conf") for path in installed.rglob("*.yaml")}
    assert packed == {path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    modules = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert modules == {path.relative_to(ROOT) for path in (ROOT / "fl_lightning").rglob("*.py")}
    assert (installed / "fl_lightning" / "py.typed").is_file()
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


@pytest.mark.slow
def test_training_and_personalization_from_an_empty_folder(shell: Callable[..., str], tmp_path: Path) -> None:
    words = ["model=lenet5", "loop.rounds=1"]
    assert "global" in shell("fl-train", *words)
    (run,) = (tmp_path / "logs" / "train" / "fedavg").iterdir()
    command = [sys.executable, "train.py", *words, f"hydra.run.dir={tmp_path / 'checkout'}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert (run / "global_model.pt").read_bytes() == (tmp_path / "checkout" / "global_model.pt").read_bytes()
    quick = ["epochs=1", "figures=false", "logger=none"]
    words = [f"checkpoint={run}", "personalization=[ft]", "personalization@baselines=[none]", *quick]
    assert "ft" in shell("fl-personalize", *words)
    assert list((tmp_path / "logs" / "personalize").rglob("results.json"))


@pytest.mark.slow
def test_comparisons_are_found(shell: Callable[..., str]) -> None:
    with pytest.raises(AssertionError, match="there is no comparison 'x'; there are fedftha/cifar10"):
        shell("fl-compare", "x")
