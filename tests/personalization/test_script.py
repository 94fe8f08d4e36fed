"""``personalize.py`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fl_lightning.command_line import CONF


def personalize(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "personalize.py", "epochs=1", "lp_epochs=1", "figures=false", *arguments]
    return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=240, check=False)


def test_one_command_prints_the_table(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = personalize(f"checkpoint={trained}", "personalization=[ft,lp_ft]", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = next(number for number, line in enumerate(lines) if line.startswith("strategy"))
    assert [line.split()[0] for line in lines[table + 2 : table + 6]] == ["none", "local", "ft", "lp_ft"]
    assert "global_others: mean of A[i, j], j != i" in done.stdout
    assert set(json.loads((folder / "results.json").read_text())["methods"]) == {"none", "local", "ft", "lp_ft"}
    assert (folder / "matrix" / "lp_ft.csv").is_file()
