"""Small federations for tests: any configuration, composed as a user would, on a tiny model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from timm.layers import Attention
from torch import nn

import fl_lightning.run.config  # noqa: F401 - registers the schema
from fl_lightning.callback import FederatedCallback
from fl_lightning.callbacks.checkpoint import read_checkpoint
from fl_lightning.models.model import Model
from fl_lightning.models.timm import vit
from fl_lightning.run.config import CONF, plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.training import Federation, assemble


def tiny_model(num_classes: int, in_channels: int = 3, image_size: int = 8, batch_norm: bool = True) -> Model:
    """About 300 parameters, with BatchNorm and named blocks in order."""
    blocks = OrderedDict(
        conv1=nn.Conv2d(in_channels, 4, 3, stride=2, padding=1),
        norm1=nn.BatchNorm2d(4) if batch_norm else nn.Identity(),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(4, 4, 3, stride=2, padding=1),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
    )
    return Model(nn.Sequential(blocks), nn.Linear(16, num_classes), "head")


def tiny_transformer(num_classes: int, in_channels: int = 3, image_size: int = 8) -> Model:
    """About 2,000 parameters, for methods of transformers."""
    model = vit(num_classes, in_channels, image_size, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    for part in model.backbone.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # a kernel of the CPU's own, with bits of its own
    return model


#: What a method needs beside ``method=`` where the tiny model will not do.
TRANSFORMER = "model._target_=tests.federations.tiny_transformer"
NEEDS = {"pfedpg": [TRANSFORMER], "fedmosaic": [TRANSFORMER, "module.parts=1"]}


def every(name: str, fast: bool) -> Any:
    """Return a parameter of a table over all methods: what is not one of its kind is left to ``make test-every``."""
    return pytest.param(name, marks=[] if fast else pytest.mark.every)


def by_name(method: str) -> list[str]:
    """Return what chooses a method in a tiny run."""
    return [f"method={method}", *NEEDS.get(method, [])]


def make_tiny_federation(root: Path, size: int = 8) -> Path:
    """Write a federation of three clients of different sizes and shifts, learnable, as ``data=folder`` reads it."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (3, size, size, 3))
    for number, (name, examples) in enumerate({"ann": 26, "bob": 34, "cid": 19}.items()):
        split = {}
        for part, count in (("train", examples), ("test", 12)):
            y = np.arange(count) % 3
            x = prototypes[y] * (0.6 + 0.2 * number) + rng.normal(0, 25, (count, size, size, 3))
            split[f"x_{part}"], split[f"y_{part}"] = np.clip(x, 0, 255).astype(np.uint8), y.astype(np.uint8)
        np.savez(root / f"{name}.npz", **split)
    return root


def config(tiny_root: Path, *overrides: str, name: str = "train") -> dict[str, Any]:
    """Compose the configuration of a tiny run."""
    return copy.deepcopy(_compose(tiny_root, overrides, name))


def tiny(tiny_root: Path) -> list[str]:
    """Return what makes a run tiny and leaves all else as it is shipped."""
    return [
        "data=folder",
        f"data.root={tiny_root}",
        "data.batch_size=8",
        "model=lenet5",
        "model._target_=tests.federations.tiny_model",
        "loop.rounds=2",
    ]


@lru_cache
def _compose(tiny_root: Path, overrides: tuple[str, ...], name: str) -> dict[str, Any]:
    # Remembered, for composing takes longer than the run, and most tests of a method begin with the same words.
    # Pictures and curves take longer still: they are on where tests/test_methods.py runs every method as shipped.
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [*tiny(tiny_root), "logger=none", "dashboard=null", *overrides]
        cfg = compose(name, words, return_hydra_config=False)
    return plain(cfg)


def federation(tiny_root: Path, folder: Path, *overrides: str) -> Federation:
    """Assemble a tiny run."""
    return assemble(config(tiny_root, *overrides), RunFolder(folder))


class Recorder(FederatedCallback):
    """Keeps every update that arrives, and may stop the run after some rounds."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.updates: list[Any] = []
        self.stop_after = stop_after

    def on_update(self, loop: Any, client: Any, update: Any) -> None:
        self.updates.append(update)

    def on_round_end(self, loop: Any) -> None:
        if self.stop_after is not None and loop.round + 1 >= self.stop_after:
            loop.should_stop = loop.interrupted = True


def add_recorder(run: Federation, stop_after: int | None = None) -> Recorder:
    """Put a recorder into a federation that is not yet running."""
    recorder = Recorder(stop_after)
    run.loop.add_callback("recorder", recorder)
    return recorder


def whole_and_resumed(tiny_root: Path, folder: Path, stop_after: int, *overrides: str) -> tuple[Federation, Federation]:
    """Return one run that was never stopped, and one that was stopped after some rounds and then went on."""
    whole = federation(tiny_root, folder / "whole", *overrides)
    whole.fit()
    return whole, stopped_and_resumed(tiny_root, folder / "stopped", stop_after, *overrides)


def stopped_and_resumed(tiny_root: Path, folder: Path, stop_after: int, *overrides: str) -> Federation:
    """Return a run that was stopped after some rounds and then went on."""
    stopped = federation(tiny_root, folder, *overrides)
    add_recorder(stopped, stop_after)
    stopped.fit()
    assert stopped.loop.round == stop_after
    rest = federation(tiny_root, folder, *overrides, f"resume='{folder}'")
    assert rest.resume is not None
    rest.resume["callbacks"].pop("recorder")
    rest.fit()
    return rest


def outcome(run: Federation | Path) -> dict[str, Any]:
    """Return all that a run (or a run folder) leaves behind, but for wall-clock times and what only watches."""
    content = run.loop.state_dict() if isinstance(run, Federation) else read_checkpoint(run / "checkpoints" / "last.pt")
    for key in ("seconds", "format"):
        content.pop(key, None)
    for name in ("recorder", "dashboard"):
        content["callbacks"].pop(name, None)
    content["history"] = [
        {key: value for key, value in row.items() if not key.startswith("time/")} for row in content["history"]
    ]
    return content


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare nested dicts, lists, tensors and numbers to the bit."""
    assert type(one) is type(other), f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        assert one.keys() == other.keys(), f"{where}: {one.keys() ^ other.keys()}"
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: differs by {(one.double() - other.double()).abs().max()}"
    else:
        assert one == other or (one != one and other != other), f"{where}: {one} and {other}"
