"""A LightningModule and LightningDataModules of a user's own at sites."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import Federation, assemble
from tests.federations import assert_same, outcome
from tests.sites.federation import free_port, sites

HOSPITALS = ["data=modules", "+data.clients._target_=tests.own.hospitals"]
WORDS = ["module._target_=tests.own.Lit", "+module.head=fc", "method=fedper", "loop.rounds=2", "logger=none"]


def run(folder: Path, *words: str) -> Federation:
    made = assemble(plain(composed("train", [*WORDS, "dashboard=null", *words])), RunFolder(folder))
    made.fit()
    return made


@pytest.mark.slow
def test_own_modules_have_the_bits_of_the_simulation(tmp_path: Path) -> None:
    expected = outcome(run(tmp_path / "serial", *HOSPITALS))
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", "executor.sites=3"]
    with sites(port, tmp_path, tmp_path / "sites", ("north", "south", "west"), data=HOSPITALS):
        made = run(tmp_path / "server", *at)
        found = outcome(made)
        made.loop.executor.disconnect()
    for one in (found, expected):
        one.pop("executor")
    assert_same(found, expected)
