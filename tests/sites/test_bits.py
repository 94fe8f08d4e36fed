"""A method at sites gives the bits of the serial simulation, scores included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_lightning.evaluation.results import read_json
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.results import finish
from fl_lightning.run.training import Federation
from fl_lightning.sites.held import Store
from tests.federations import assert_same, by_name, config, federation, outcome
from tests.sites.federation import NAMES, at_sites, free_port, sites
from tests.test_methods import METHODS

FAST = ("fedavg", "fedper", "scaffold", "fedftha", "ditto")


def finished(run: Federation, root: Path, folder: Path, *words: str) -> dict[str, Any]:
    """Run a federation to its results, which are all that a user sees of it."""
    try:
        with run.open():
            run.loop.run_rounds()
            held = outcome(run)
            found = finish(run.loop, RunFolder(folder), config(root, *words), "")
    finally:
        run.loop.executor.disconnect()
    held.pop("executor")
    for key in ("seconds", "seconds_per_round_median", "data"):
        found.pop(key)
    return {
        "held": held,
        "results": json.loads(json.dumps(found)),
        "file": read_json(folder / "results.json")["metrics"],
    }


def compare(method: str, root: Path, folder: Path) -> None:
    words = (*by_name(method), "seed=3")
    serial = federation(root, folder / "serial", *words)
    expected = finished(serial, root, folder / "serial", *words)
    port = free_port()
    with sites(port, root, folder / "sites"):
        run = at_sites(root, folder / "server", port, *words)
        found = finished(run, root, folder / "server", *words)
    if method == "l2gd":  # at sites nobody knows the mean in rounds after which it is not sent
        found, expected = (one["results"]["metrics"]["personal"] for one in (found, expected))
    assert_same(found, expected)
    run_id = run.loop.executor.run_id  # type: ignore[attr-defined]
    for name, client in zip(NAMES, serial.clients, strict=True):
        held = Store(folder / "sites" / name / f"run_{run_id}").held
        if method == "l2gd":
            client.kept.pop("global", None)
            held.kept.pop("global", None)
        assert_same(
            {"personal": held.personal, "memory": held.memory, "kept": held.kept},
            {"personal": client.personal, "memory": client.memory, "kept": client.kept},
        )


@pytest.mark.parametrize("method", FAST[1:2])
def test_bits_are_those_of_the_serial_simulation(method: str, tiny_root: Path, tmp_path: Path) -> None:
    compare(method, tiny_root, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method not in FAST[1:2]])
def test_every_method_has_the_bits_of_the_serial_simulation(method: str, tiny_root: Path, tmp_path: Path) -> None:
    compare(method, tiny_root, tmp_path)
