"""Comparisons whose runs are personalized: every one of the LP-FT paper, verdicts by hand, a small one end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hydra.utils import instantiate
from scipy import stats

from fl_lightning import personalization
from fl_lightning.compare import main
from fl_lightning.comparison.definition import Comparison
from fl_lightning.comparison.runner import compare
from fl_lightning.comparison.study import (
    Claim,
    Federation,
    choice_rows,
    claims_of,
    paired,
    records_of,
    report,
    rows_of,
)
from fl_lightning.evaluation.records import Record, write_records
from fl_lightning.evaluation.results import read_json
from fl_lightning.evaluation.tables import MeanStd
from fl_lightning.evaluation.uncertainty import Interval
from fl_lightning.personalization.strategy import build_strategies
from fl_lightning.run import training
from fl_lightning.run.config import CONF, plain
from tests.data.sets.test_celeba import root as celeba_root  # noqa: F401 - fixtures
from tests.data.sets.test_chexpert import root as chexpert_root  # noqa: F401
from tests.data.sets.test_digit5 import write_mat_archive
from tests.data.sets.test_domainnet import root as domainnet_root  # noqa: F401

NAMES = sorted(path.stem for path in (CONF / "comparison" / "lpft").glob("[!_]*.yaml"))
TABLES = [name for name in NAMES if name.startswith("table2")]
TINY = [
    "~model",
    "+model._target_=tests.federations.tiny_model",
    "trust=[tests]",
    "loop.rounds=1",
    "data.batch_size=16",
    "logger=none",
    "dashboard=null",
]
SHORT = ["epochs=2", "lp_epochs=1", "figures=false"]


@pytest.mark.every
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * one.endswith("_scaled")) for one in NAMES]
)
def test_every_study_can_be_trained_and_personalized(name: str) -> None:
    comparison = Comparison.read(f"lpft/{name}")
    comparison.check()
    for run in comparison.runs:
        cfg = comparison.configuration(run, ["data.root=somewhere"], 7)
        own = comparison.personalization(cfg, Path("run"))
        wanted = [*own.baselines, *own.personalization]
        assert list(dict.fromkeys(strategy.base for strategy in build_strategies(own))) == wanted
        assert (own.epochs, own.seed, own.checkpoint) == (15, 7, "run")  # epochs: the paper's, for every strategy
        assert plain(own)["trainer"]["max_epochs"] == 15
    assert set(comparison.order) <= {*wanted}


def pretrained(name: str, folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The words that take a backbone from a made file, and what is in it: a transformer where LoRA is a strategy."""
    kind, size = ("test_vit", {"img_size": 32}) if name.startswith("peft_vit") else ("test_resnet", {})
    state = timm.create_model(kind, **size).state_dict()
    torch.save(state, folder / "weights.pt")
    return ["model=timm", f"model.name={kind}", f"model.weights={folder / 'weights.pt'}"], state


@pytest.mark.every
@pytest.mark.parametrize("name", NAMES)
def test_every_study_takes_a_pretrained_backbone_from_a_file(name: str, tmp_path: Path) -> None:
    words, state = pretrained(name, tmp_path)
    comparison = Comparison.read(f"lpft/{name}")
    for run in comparison.runs:
        cfg = comparison.configuration(run, ["data.root=x", *words])
        node = {key: value for key, value in plain(cfg)["model"].items() if key != "adapters"}
        held = instantiate(node, num_classes=3, in_channels=3, image_size=32).backbone.state_dict()
        assert len(held) > 20
        assert all(tensor.equal(state[key]) for key, tensor in held.items())
        assert build_strategies(comparison.personalization(cfg, Path("run")))


@pytest.mark.slow
def test_a_pretrained_backbone_goes_through_a_study(tmp_path: Path, tiny_root: Path) -> None:
    words, _ = pretrained("table2_digit5_scaled", tmp_path)
    rest = [f"data.root={tiny_root}", "loop.rounds=1", "seeds=1", f"folder={tmp_path / 'study'}"]
    own = [f"personalize.{word}" for word in (*SHORT, "personalization=[ft,lp_ft]")]
    main(["lpft/table2_digit5_scaled", *words, *rest, *own])
    assert "lp_ft" in (tmp_path / "study" / "table2_digit5_scaled" / "table.md").read_text()


@pytest.mark.parametrize("name", TABLES)
def test_published_rows_agree_with_each_other(name: str) -> None:
    comparison = Comparison.read(f"lpft/{name}")
    published = comparison.published
    assert set(published) == {"ft", "proximal_ft", "soup_ft", "sparse_ft", "lss_ft", "lp_ft"}
    for row in published.values():
        assert list(row) == list(comparison.columns)
        assert all(0 < mean < 100 and 0 < std < 6 for mean, std in row.values())
    # By the paper's own numbers: Average is the mean of the three others in all LP-FT rows, and LP-FT is best by it.
    row = {column: mean for column, (mean, _) in published["lp_ft"].items()}
    assert row["Average"] == pytest.approx((row["Local"] + row["Global"] + row["Worst"]) / 3, abs=0.04)
    for column in ("Global", "Average"):
        assert max(published, key=lambda strategy: published[strategy][column][0]) == "lp_ft"


def test_a_file_begins_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_lightning.comparison.definition.CONF", tmp_path)
    folder = tmp_path / "comparison"
    folder.mkdir()
    (folder / "one.yaml").write_text("folder: a\nseeds: [1, 2]\ncommon: [x=1]\nruns: {r: [y=1]}\npersonalize: [e=1]")
    (folder / "_two.yaml").write_text("common: [x=2]\norder: [ft]")
    (folder / "three.yaml").write_text("defaults: [one, _two]\nseeds: [3]\ncommon: [x=3]\nruns: {s: []}")
    found = Comparison.read("three")
    assert (found.name, found.folder, found.seeds, found.order) == ("three", "a", [3], ["ft"])
    assert (found.common, found.personalize) == (["x=1", "x=2", "x=3"], ["e=1"])  # the last one counts
    assert found.runs == {"r": ["y=1"], "s": []}
    assert found.personalized(3) == Path("a/three/seed_3")
    (tmp_path / "own.yaml").write_text("defaults: [three]\nseeds: [4]")
    own = Comparison.read(str(tmp_path / "own.yaml"))
    assert (own.name, own.seeds, own.common) == ("own", [4], found.common)
    (folder / "odd.yaml").write_text("foldr: a")
    with pytest.raises(ValueError, match=r"comparison odd: Key 'foldr' not in"):
        Comparison.read("odd")
    with pytest.raises(FileNotFoundError, match=r"no comparison 'thre'; did you mean three\?"):
        Comparison.read("thre")
    with pytest.raises(ValueError, match=r"published\.ft must have columns .*, got Best"):
        replace(found, published={"ft": {"Best": [1.0, 1.0]}}).check()
    (folder / "plain.yaml").write_text("folder: a\nruns: {r: []}")
    with pytest.raises(SystemExit, match=r"personalize\.\* must be left out, got 'epochs=2'"):
        main(["plain", "personalize.epochs=2"])


def test_a_pair_is_decided_by_its_interval_over_federations() -> None:
    first, second = [0.62, 0.66, 0.61, 0.64], [0.6, 0.61, 0.6, 0.62]
    test = paired("a > b", first, second)
    known = stats.ttest_rel(first, second)
    assert test.p == pytest.approx(known.pvalue)
    assert tuple(test.difference) == pytest.approx((0.025, *known.confidence_interval(0.95)))
    assert paired("b > a", second, first).p == pytest.approx(known.pvalue)
    assert math.isnan(paired("one", [1.0], [0.5]).p)
    assert paired("same", [1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired("shifted", [1.0, 2.0], [0.5, 1.5]).p == 0
    cases = (1, 0.04, "holds"), (-1, 0.04, "does not"), (1, 0.06, "undecided"), (1, math.nan, "undecided")
    for mean, p, verdict in cases:
        assert Claim("", Interval(mean, -9, 9), 0.001, p).verdict == verdict


def test_all_pairs_of_a_table_are_corrected_together() -> None:
    rng = np.random.default_rng(0)
    values = {
        name: {"local": list(0.8 + rng.normal(0, 0.01, 5)), "global_others": list(0.6 + shift + rng.normal(0, 0.01, 5))}
        for name, shift in (("ft", 0.0), ("proximal_ft", 0.1), ("lp_ft", 0.05))
    }
    comparison = Comparison(order=["lp_ft", "proximal_ft", "sparse_ft", "ft"])
    found = {claim.words: claim for claim in claims_of(values, comparison, {name: [0.5] * 5 for name in values})}
    assert len(found) == 9
    assert found["Global: lp_ft > ft"].verdict == "holds"
    assert found["Global: lp_ft > proximal_ft"].verdict == "does not"
    assert found["Front: lp_ft > ft"].verdict == "undecided"
    least = min(found.values(), key=lambda claim: claim.p)
    assert least.p_holm == pytest.approx(9 * least.p)
    by_level = {f"{name} level=1": row for name, row in values.items()}
    assert claims_of(by_level, comparison, {})[3].words == "Global: lp_ft level=1 > proximal_ft level=1"


def test_rows_from_numbers_by_hand() -> None:
    values = {"ft": {"g": [0.5, 0.7]}, "lp_ft": {"g": [0.6, 0.66]}}
    rows = rows_of(values, Comparison(columns={"Global": "g"}, published={"ft": {"Global": [67.87, 0.74]}}))
    assert rows[0]["Global"] == pytest.approx((60, 100 * math.sqrt(0.02)))
    assert rows[0]["Global, published"] == MeanStd(67.87, 0.74)
    assert rows[1]["Global, published"] is None
    with pytest.raises(ValueError, match=r"columns\.Global must be one of g, got 'globl'"):
        rows_of(values, Comparison(columns={"Global": "globl"}))


def test_each_validation_score_chooses_in_each_federation() -> None:
    def setting(metric: list[float], loss: list[float], elsewhere: list[float], local: float) -> dict[str, list[float]]:
        scores = {"val_metric": metric, "val_loss": loss, "val_elsewhere": elsewhere}
        return {**scores, "local": [local, local], "global_others": [1 - local] * 2}

    values = {
        "ft lr=1": setting([0.9, 0.8], [2.0, 3.0], [0.5, math.nan], 0.6),
        "ft lr=2": setting([0.8, 0.9], [1.0, 2.0], [0.4, 0.1], 0.8),
        "ft": setting([0.9, 0.9], [2, 2], [0, 0], 0.7),
    }
    by = {row["chosen by"]: row for row in choice_rows(values)}
    assert by["val_metric"]["settings"] == "lr=1 (1), lr=2 (1)"
    assert by["val_metric"]["Local"] == pytest.approx((70, 100 * 0.2 / math.sqrt(2)))
    assert by["val_metric"]["Global"].mean == pytest.approx(30)
    assert (by["val_loss"]["settings"], by["val_loss"]["Local"].mean) == ("lr=2 (2)", pytest.approx(80))
    assert by["val_elsewhere"]["Local"].mean == pytest.approx(70)
    assert choice_rows({"ft": values["ft"]}) == []


def tiny(name: str, folder: Path, root: Path, *overrides: str) -> Comparison:
    found = Comparison.read(f"lpft/{name}")
    common = [*found.common, *TINY, f"data.root={root}", *overrides]
    return replace(found, folder=str(folder), common=common, seeds=[1], personalize=[*found.personalize, *SHORT])


@pytest.mark.slow
def test_a_tuned_study_end_to_end(
    tmp_path: Path, tiny_root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = tiny("tuned_digits5", tmp_path, tiny_root, "data.resize=null")
    comparison.runs = {"net": []}
    comparison.personalize.append(
        "grid={lp_epochs:[1],ft:{optimizer.lr:[0.01,0.1]},proximal_ft:{callbacks.proximal.mu:[0.1,1.0]}}"
    )
    compare(comparison, ["net"], [], [1, 2])
    made = [
        Federation("net", seed, comparison.place(seed) / "net", comparison.personalized(seed) / "net")
        for seed in (1, 2)
    ]
    results = report(made, comparison, comparison.tables, "the command")
    text = (comparison.tables / "table.md").read_text()
    assert text.startswith("`the command`, commit ")
    for words in ("Global: lp_ft > ft", "Front: lp_ft > ft", "undecided", "val_loss", "federations, seeds 1, 2"):
        assert words in text
    assert "| ft lr=0.01" not in text
    assert "ft lr=0.01" in (comparison.tables / "grid.md").read_text()
    assert (comparison.tables / "frontier.png").exists()
    assert json.loads((comparison.tables / "results.json").read_text()) == results
    # The numbers are those of the federations; the row of a strategy is the setting that validates best in each.
    values = results["net"]["per_seed"]
    for position, one in enumerate(made):
        assert read_json(one.personalized / "results.json")["methods"]["ft"]["local"] == values["ft"]["local"][position]
        settings = [values[f"ft lr={lr}"] for lr in (0.01, 0.1)]
        best = max(settings, key=lambda row: row["val_metric"][position])
        assert values["ft"]["global_others"][position] == best["global_others"][position]
    # What is finished is not run again; what was stopped goes on.
    (made[1].personalized / "results.json").unlink()
    begun = []
    for module in (training, personalization):
        monkeypatch.setattr(module, "run", lambda cfg, folder, run=module.run: begun.append(folder) or run(cfg, folder))
    compare(comparison, ["net"], [], [1, 2])
    assert begun == [made[1].personalized]
    assert report(made, comparison, comparison.tables, "the command") == results


def small_cifar(root: Path, name: str, num_classes: int) -> Path:
    rng = np.random.default_rng(0)
    split = {}
    for part, count in (("train", 400), ("test", 200)):
        split[f"x_{part}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        split[f"y_{part}"] = np.arange(count) % num_classes
    np.savez(root / f"{name}.npz", **split)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_study_runs_in_small(name: str, tmp_path: Path, tiny_root: Path, request: pytest.FixtureRequest) -> None:
    """On made trees of the published layouts."""
    root, overrides = tmp_path, []
    comparison = Comparison.read(f"lpft/{name}")
    first = next(iter(comparison.runs))
    kind = str(comparison.configuration(first, ["data.root=x"]).data._target_).rpartition(".")[2]
    if kind == "Digit5":
        write_mat_archive(root)
    elif kind == "Folder":
        root = tiny_root
    elif kind == "DomainNet":
        root = request.getfixturevalue("domainnet_root")
        overrides = ["data.domains=[clipart,sketch]", "data.classes=3", "data.resize=16"]
    elif kind == "CelebA":
        root, overrides = request.getfixturevalue("celeba_root"), ["data.agreements=[0.9,0.1]", "data.resize=16"]
    elif kind == "CheXpert":
        root = request.getfixturevalue("chexpert_root")
        overrides = ["data.agreements=[0.75,0.25]", "data.resize=16", "data.test_fraction=0.4"]
    elif kind == "CorruptedCifar":
        cifar = "cifar100" if "100" in name else "cifar10"
        small_cifar(root, cifar, 100 if "100" in name else 10)
        overrides = ["data.corruptions=[contrast,brightness]"]
    else:
        small_cifar(root, "cifar10", 10)
        overrides = ["data.num_clients=2", "data.partitioner.min_size=4"]
    comparison = tiny(name, tmp_path / "study", root, *overrides)
    if name.startswith("peft_vit"):
        vit = ["model.embed_dim=8", "model.depth=1", "model.num_heads=2", "model.patch_size=4"]
        comparison.common = [word for word in comparison.common if not word.startswith(("~model", "+model"))] + vit
    elif name == "tuned_digits5":
        comparison.runs = {"tiny": []}
    if name.startswith("tuned"):
        comparison.personalize.append("grid.lp_epochs=[1,2]")
    names = list(comparison.runs)
    compare(comparison, names)
    made = [Federation(run, 1, comparison.place(1) / run, comparison.personalized(1) / run) for run in names]
    assert list(report(made, comparison, comparison.tables, "command")) == names
    drawn = {str(path.relative_to(comparison.tables)) for path in comparison.tables.glob("*.png")}
    assert len(list(comparison.tables.glob("events.out.tfevents.*"))) == 1
    for begin, figure in (("table2", "table"), ("fig2", "epochs_"), ("fig3a", "drop_"), ("fig3b", "equal_loss")):
        assert not name.startswith(begin) or any(path.startswith(figure) for path in drawn)
    assert ("runs.png" in drawn) == (len(names) > 1)


def test_records_of_federations_keep_their_seeds_apart(tmp_path: Path) -> None:
    made = []
    for seed in (1, 2):
        write_records(tmp_path / str(seed) / "records.csv", [Record("ft", "", 0, "ann", "end", "local", seed / 2)])
        made.append(Federation("", seed, tmp_path, tmp_path / str(seed)))
    assert [(one.seed, one.value) for one in records_of(made)] == [(1000, 0.5), (2000, 1.0)]
