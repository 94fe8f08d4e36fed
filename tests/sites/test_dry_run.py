"""What a dry run prints is what an update holds, and nothing is called."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from unittest import mock

import pytest

from fl_lightning.sites.process import main
from tests.federations import add_recorder, by_name, federation

MODEL = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model", "trust=[tests]"]


@pytest.mark.parametrize("method", ["fedper", "scaffold"])
def test_what_would_leave_is_what_leaves(
    method: str, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=folder", f"data.root={tiny_root / 'bob.npz'}", *MODEL, *by_name(method), "seed=3"]
    with mock.patch.object(socket.socket, "connect", side_effect=AssertionError("somebody was called")):
        main(["--name", "bob", "--folder", str(tmp_path / "own"), "--dry-run", *words])
    told = capsys.readouterr().out
    run = federation(tiny_root, tmp_path / "run", *by_name(method), "seed=3", "loop.rounds=1")
    recorder = add_recorder(run)
    run.fit()
    update = next(one for one in recorder.updates if run.clients[one.client_id].name == "bob")
    sent = [("model", name, value) for name, value in update.state.items()]
    sent += [("method", name, value) for name, value in update.extra.items()]
    lines = re.findall(r"^  (model|method) +(\S+)  (\w+) (\(.*\))  ([\d,]+) bytes$", told, re.MULTILINE)
    assert [(part, name, shape) for part, name, _, shape, _ in lines] == [
        (part, name, str(tuple(value.shape))) for part, name, value in sent
    ]
    assert f"  {update.num_bytes:,} bytes of tensors, and the numbers {', '.join(update.metrics)}" in told
    assert f"'num_train': {run.clients[1].data.num_train}" in told
    stays = [name for name in run.clients[1].personal if name not in update.state] or ["no tensor of the model"]
    assert told.endswith(f"Never: examples, labels one by one, {', '.join(stays)}\n")
    assert not (tmp_path / "own").exists(), "a dry run leaves nothing behind"


def test_a_dry_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^error: .*nowhere"):
        main(["--name", "bob", "--dry-run", "data=folder", f"data.root={tmp_path / 'nowhere'}"])
