"""The commands of docs/tasks.md run as they stand there, and end in the metric of their task."""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.personalization import run as personalize
from fl_lightning.run.config import CONF
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import run as train

PAGE = (CONF.parent / "docs" / "tasks.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FENCED = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {title: FENCED.findall(body) for title, body in SECTIONS.items()}
#: What chooses, whether more of it is better, and what a model that has learnt nothing would score.
KNOWN = {
    "Regression": ("rmse", False, 1.0),
    "Imbalanced classes and an operating point": ("auroc", True, 0.5),
    "Several labels": ("auroc", True, 0.5),
    "Segmentation": ("dice", True, 0.25),
    "Text": ("accuracy", True, 0.5),
    "Your own LightningModule and LightningDataModule": ("rmse", False, 1.8),
}


def run(line: str, *more: str) -> dict[str, Any]:
    """Run a command of the page in this process."""
    _, script, *words = shlex.split(line)
    if script == "train.py":
        folder = next(word for word in words if word.startswith("hydra.run.dir=")).partition("=")[2]
        words = [word for word in words if not word.startswith("hydra.")]
        return train(composed("train", [*words, *more]), Path(folder))
    return personalize(composed("personalize", [*words, "executor=serial", *more]), Path("logs/personal"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "lit", None)
    del sys.modules["lit"]
    torch.set_num_threads(1)
    return tmp_path


def test_every_section_with_commands_is_known() -> None:
    assert {title for title, blocks in BLOCKS.items() if blocks} == set(KNOWN)


def test_regression_in_short(place: Path) -> None:
    """The first of the slow ones, as short as it gets: both scripts by an error that is to be small."""
    [(_, lines)] = BLOCKS["Regression"]
    first, second = lines.strip().splitlines()
    quiet = ["logger=none"]
    results = run(first, *quiet, "dashboard=null", "loop.rounds=3")
    assert results["metric"] == "rmse"
    assert results["validation"]["global"]["mode"] == "min"
    assert results["global"]["worst"] == max(entry["global"] for entry in results["clients"])
    rows = (place / "logs" / "regression" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"test/global/rmse/mean", "test/global/r2/mean", "test/global/mae/pooled"} <= set(rows)
    personal = run(second, *quiet, "figures=false", "curves.every=null", "epochs=1", "lp_epochs=1")
    assert personal["metric"] == "rmse"
    for method in personal["methods"].values():
        assert method["worst_row"] >= method["local"]  # the worst of an error is the highest
        for client in method["clients"]:
            gain = personal["methods"]["none"]["clients"][client["id"]]["local"] - client["local"]
            assert client["change_from_none"] == pytest.approx(gain)  # a fall of the error is a gain


@pytest.mark.slow
@pytest.mark.parametrize("title", KNOWN)
def test_the_page(title: str, place: Path) -> None:
    if title == "Text":
        pytest.importorskip("transformers")
    metric, higher, naive = KNOWN[title]
    for kind, block in BLOCKS[title]:
        if block.startswith("# lit.py"):
            (place / "lit.py").write_text(block)
        elif kind == "python":
            exec(compile(block, f"docs/tasks.md, {title}", "exec"), {"__name__": "page"})
        else:
            results, personal = (run(line) for line in block.strip().splitlines())
            assert results["metric"] == personal["metric"] == metric
            assert (results["global"]["mean"] > naive) == higher
            assert results["global"]["mean"] != naive
            assert {"none", "local", "ft", "lp_ft"} == set(personal["methods"])
            assert all(math.isfinite(one["local"]) for one in personal["methods"].values())
            assert (place / "logs" / "personal" / "figures" / "matrix" / "ft.png").is_file()
