"""Every YAML composes, and every node in it is something that could be made."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fl_lightning.personalization.strategy import build_strategies
from fl_lightning.run.config import CONF, check, instantiate
from fl_lightning.run.trust import check_trusted
from tests.federations import every

GROUPS = ("data", "model", "optimizer", "trainer", "executor", "logger", "method", "experiment")
WITHOUT_ROOT = ("digits", "digit_masks", "modules", "sites")
OPTIONS = [
    (group, str(path.relative_to(CONF / group).with_suffix("")))
    for group in GROUPS
    for path in sorted((CONF / group).rglob("*.yaml"))
    if (group, path.parent.name) != ("data", "partitioner") and not path.name.startswith("_")
]
FIRST = list({group: (group, option) for group, option in reversed(OPTIONS)}.values())
"""One of each group; the others run in the second part of ``make test``."""


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.mark.parametrize(
    ("group", "option"),
    [pytest.param(*pair, id="/".join(pair), marks=[] if pair in FIRST else pytest.mark.every) for pair in OPTIONS],
)
def test_every_option_composes_and_names_existing_arguments(group: str, option: str) -> None:
    cfg = composed(
        "train",
        f"{group}={option}",
        *(
            ["data.root=somewhere"]
            if group == "data" and option not in ("digits", "digit_masks", "modules", "sites")
            else []
        ),
    )
    for key, node in cfg.items():
        if isinstance(node, DictConfig) and not OmegaConf.missing_keys(node):
            check(node, str(key))
            # A run with it can be resumed, and goes to sites.
            check_trusted(OmegaConf.to_container(node, resolve=True), str(key), (), "the run")


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["method=fedrep", "method.head_epochs=5"], "trainer.max_epochs", 6),
        (["method=fedft", "method.tau_sync=1"], "trainer.max_epochs", 6),
        (["method=fedftha", "method.tau_head=2"], "trainer.max_epochs", 7),
        (["method=fedftha", "method.head=[head,backbone.fc2]"], "sharing.personal", ["head", "backbone.fc2"]),
        (["method=per_fedavg", "optimizer.lr=0.3"], "module.alpha", 0.3),
        (["method=per_fedavg", "module.alpha=0.2"], "callbacks.adaptation.callbacks.schedule.phases[0].lr", 0.2),
        (["method=l2gd", "optimizer.lr=0.3"], "callbacks.averaging.lr", 0.3),
        (["method=l2gd", "seed=7"], "callbacks.averaging.seed", 7),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_follows_from_another_key(overrides: list[str], key: str, value: object) -> None:
    assert OmegaConf.select(composed("train", *overrides), key) == value


@pytest.mark.parametrize(
    "name",
    [
        every(path.stem, fast=path.stem in ("ft", "lp_ft", "soup_ft"))
        for path in sorted((CONF / "personalization").glob("[!_]*.yaml"))
    ],
)
def test_every_strategy_can_be_made(name: str) -> None:
    if "ora_" in name:
        pytest.importorskip("peft")
    strategies = build_strategies(composed("personalize", "checkpoint=somewhere", f"personalization=[{name}]"))
    assert {strategy.name for strategy in strategies} == {"none", "local", name}


@pytest.mark.parametrize(
    "name",
    [
        every(path.stem, fast=path.stem == "dirichlet")
        for path in sorted((CONF / "data" / "partitioner").glob("*.yaml"))
    ],
)
def test_every_partitioner_composes_and_names_existing_arguments(name: str) -> None:
    cfg = composed("train", "data=cifar10", "data.root=somewhere", f"data/partitioner={name}")
    check(cfg.data, "data")


@pytest.mark.parametrize(
    "name", [every(path.stem, fast=path.stem == "cnn2") for path in sorted((CONF / "model").glob("*.yaml"))]
)
def test_every_model_can_be_made(name: str) -> None:
    cfg = composed("train", f"model={name}")
    channels = 1 if name.startswith(("gpt", "hf")) else 3  # token sequences have one
    model = instantiate(OmegaConf.to_container(cfg.model), "model", num_classes=10, in_channels=channels, image_size=32)
    assert sum(p.numel() for p in model.head.parameters()) > 0


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_yaml_targets_are_full_module_paths(path: Path) -> None:
    def walk(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("_target_"), str):
                assert node["_target_"].count(".") >= 1, node["_target_"]
            for value in node.values():
                walk(value)

    walk(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
