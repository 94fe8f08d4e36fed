"""What docs/python.md shows runs as it stands there, and says what is so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.data.sets.folder import Folder
from fl_lightning.run.config import CONF
from tests.federations import make_tiny_federation

PAGE = (CONF.parent / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page supposes it: ``mine.py``, and a federation in ``DIR``."""
    make_tiny_federation(tmp_path / "DIR")
    (tmp_path / "mine.py").write_text(next(block for block in BLOCKS if block.startswith("# mine.py\n")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Set first, so that the module of this folder is forgotten afterwards.
    monkeypatch.setitem(sys.modules, "mine", None)
    del sys.modules["mine"]
    return tmp_path


@pytest.mark.every
def test_blocks_run_in_order(folder: Path) -> None:
    torch.set_num_threads(1)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)

    # The personal model that was predicted with is the one that the checkpoint gives to a plain network.
    with torch.inference_mode():
        assert torch.equal(names["network"](names["x"]).argmax(1), names["predicted"])
    shared, personal = names["last"]["state"], names["own"]
    assert not any(name.startswith("head.") for name in shared)
    assert set(personal) == {"head.weight", "head.bias"}

    assert names["results"]["rounds"] == 2
    assert not (folder / "logs" / "folder" / ".hydra").exists()

    # Indices of partition.json count as the page says.
    data = Folder(root=str(folder / "DIR"), seed=names["cfg"].seed)
    for client, entry in zip(data.clients, names["partition"]["clients"], strict=True):
        for split in ("train", "val", "test"):
            images = torch.from_numpy(names["images"][entry[split]]).permute(0, 3, 1, 2)
            assert torch.equal(client.examples(split)[0], images)
    assert len(names["validation"]) == data.clients[1].num_val > 0
