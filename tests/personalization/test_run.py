"""Every strategy over one saved model: degenerate cases, independence, and what is left behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_lightning.client import Broadcast, Client
from fl_lightning.evaluation.matrix import AccuracyMatrix
from fl_lightning.evaluation.records import curves_of, read_records
from fl_lightning.models.export import export_state_dict
from fl_lightning.personalization import run
from fl_lightning.personalization.source import open_source
from fl_lightning.personalization.strategy import build_strategies
from fl_lightning.run.config import plain
from fl_lightning.state import State, snapshot
from tests.personalization.conftest import compose_personalization

Run = Callable[..., tuple[Any, Path]]


def model(folder: Path, strategy: str, client: int = 0, seed: int = 0) -> State:
    path = folder / "models" / strategy / f"seed_{seed}" / f"client_{client}.pt"
    return torch.load(path, weights_only=True)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def matrix_in(path: Path) -> AccuracyMatrix:
    """Read a matrix that a run has left."""
    _, *rows = csv.reader(path.open(newline=""))
    sizes = json.loads((path.parent / "num_test.json").read_text())
    return AccuracyMatrix(
        np.array([[float(cell) for cell in row[1:]] for row in rows]), [one["num_test"] for one in sizes]
    )


DEGENERATE = {
    "wise_ft": ["personalization.wise_ft.local.plan.alpha=1.0"],
    "lp_ft": ["lp_epochs=0"],
    "proximal_ft": ["personalization.proximal_ft.callbacks.proximal.mu=0.0"],
    "sparse_ft": ["personalization.sparse_ft.callbacks.sparse.density=1.0"],
    "soup_ft": ["personalization.soup_ft.local.plan.ingredients=1"],
    "greedy_soup_ft": ["personalization.greedy_soup_ft.local.plan.ingredients=1"],
    "lss_ft": [
        "personalization.lss_ft.local.plan.models=1",
        "personalization.lss_ft.local.plan.affinity=0.0",
        "personalization.lss_ft.local.plan.diversity=0.0",
        "personalization.lss_ft.local.plan.with_start=false",
    ],
}


@pytest.fixture(scope="module")
def fine_tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ft") / "run"
    overrides = [f"checkpoint={trained}", "personalization=[ft,lp]", "save_models=true", "seeds=2"]
    run(compose_personalization(*overrides), folder)
    return folder


@pytest.mark.every
@pytest.mark.parametrize("strategy", DEGENERATE)
def test_degenerate_cases_are_ft_to_the_bit(strategy: str, personalized: Run, fine_tuned: Path) -> None:
    _, folder = personalized(f"personalization=[{strategy}]", "save_models=true", "seeds=2", *DEGENERATE[strategy])
    for client in range(3):
        for seed in range(2):
            assert same(model(folder, strategy, client, seed), model(fine_tuned, "ft", client, seed))


def test_linear_probing_moves_the_head_alone(trained: Path, fine_tuned: Path) -> None:
    before = torch.load(trained / "global_model.pt", weights_only=True)
    for client in range(3):
        after = model(fine_tuned, "lp", client)
        assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}
    methods = json.loads((fine_tuned / "results.json").read_text())["methods"]
    assert methods["lp"]["feature_distortion"] == methods["lp"]["feature_distortion_all"] == 0
    assert methods["none"]["feature_distortion"] == 0
    assert methods["ft"]["feature_distortion"] > 0
    changed = model(fine_tuned, "ft")
    assert all(not torch.equal(before[name], changed[name]) for name in before)


@pytest.mark.every
def test_neither_order_nor_workers_nor_company_change_a_result(personalized: Run) -> None:
    one, _ = personalized("personalization=[ft,lp_ft,soup_ft]")
    two, _ = personalized(
        "personalization=[soup_ft,lp_ft,ft]", "executor=processes", "executor.workers=2", "curves.every=null"
    )
    assert one["methods"] == {name: two["methods"][name] for name in one["methods"]}
    alone, _ = personalized("personalization=[ft]")
    for results in (alone, one):  # only what is corrected for the number of comparisons depends on it
        results["methods"]["ft"]["against_none"].pop("p_holm")
    assert alone["methods"]["ft"] == one["methods"]["ft"]


def without_settings(method: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key != "settings"}


def test_the_stock_trainer_gives_the_same_bits(personalized: Run) -> None:
    lean, _ = personalized("personalization=[lp_ft]")
    stock, _ = personalized("personalization=[lp_ft]", "local.engine=stock")
    assert without_settings(lean["methods"]["lp_ft"]) == without_settings(stock["methods"]["lp_ft"])


def test_personalizing_one_client_does_not_touch_another(fine_tuned: Path, trained: Path) -> None:
    """A federation in which another client has other data gives this one the same model."""
    cfg = compose_personalization(f"checkpoint={trained}", "personalization=[ft]")
    source = open_source(plain(cfg))
    (strategy,) = [one for one in build_strategies(cfg) if one.name == "ft"]
    strategy.prepare(source.module, cfg.seed)
    client = Client(2, source.data.clients[2])
    fit = strategy.local.fit(client, Broadcast(0, snapshot(source.module.state_dict())))
    assert same(export_state_dict(fit.update.state, source.module.head_path), model(fine_tuned, "ft", client=2))


def test_what_is_left_behind(personalized: Run, trained: Path) -> None:
    results, folder = personalized("personalization=[ft,lp_ft]", "seeds=2", "figures=true", "logger=tensorboard")
    assert list(results["methods"]) == ["none", "local", "ft", "lp_ft"]
    boards = {path.parent.name for path in folder.glob("curves/*/events.out.tfevents*")}
    assert boards == {"all strategies", "none", "local", "ft", "lp_ft"}
    assert not list(folder.glob("events.out.tfevents*")), "a run without a name"
    for name, method in results["methods"].items():
        matrix = matrix_in(folder / "matrix" / f"{name}.csv")
        assert method["local"] == pytest.approx(np.diagonal(matrix.values).mean())
        off = matrix.values[~np.eye(3, dtype=bool)]
        assert method["global_others"] == pytest.approx(off.mean())
        assert method["global_all"] == pytest.approx(matrix.values.mean())
        assert method["avg2"] == pytest.approx((method["local"] + method["global_others"]) / 2)
        runs = [matrix_in(folder / "matrix" / f"seed_{n}" / f"{name}.csv") for n in (0, 1)]
        assert matrix.values == pytest.approx((runs[0].values + runs[1].values) / 2)
        assert [seed["worst_row"] for seed in method["per_seed"]] == pytest.approx(
            [m.metric("worst_row") for m in runs]
        )
        numbers = [seed["local"] for seed in method["per_seed"]]
        assert method["std"]["local"] == pytest.approx(np.std(numbers, ddof=1))
        assert 0 <= method["share_hurt"] <= method["share_worse"] + 1e-9
        low, high = method["intervals"]["examples"]["global_others"]
        assert low <= method["global_others"] <= high
        for client in method["clients"]:
            low, high = client["change_from_none_interval"]
            assert low <= client["change_from_none"] <= high
        assert len(method["clients"]) == 3
    trained_results = json.loads((trained / "results.json").read_text())
    assert results["methods"]["none"]["local"] == pytest.approx(trained_results["global"]["mean"])
    assert results["methods"]["none"]["share_hurt"] == 0
    ft = results["methods"]["ft"]
    worse = [client["change_from_none"] < 0 for client in ft["clients"]]
    pairs = {(pair["first"], pair["second"]): pair for pair in results["comparisons"]}
    assert pairs["none", "ft"]["wins"] == ft["against_none"]["losses"] == sum(worse)
    assert results["methods"]["lp_ft"]["against_ft"]["wins"] == pairs["ft", "lp_ft"]["losses"]
    assert "worst change" in (folder / "table.md").read_text()
    assert results == json.loads((folder / "results.json").read_text())
    assert "[" in (folder / "table.md").read_text().splitlines()[5]
    assert r"\toprule" in (folder / "table.tex").read_text()
    records = read_records(folder / "records.csv")
    curves = curves_of(records)
    assert list(curves["ft"]) == [0, 1, 2]
    assert curves["lp_ft"][2]["global_others"] == pytest.approx(results["methods"]["lp_ft"]["global_others"])
    assert curves["lp_ft"][0]["local"] == pytest.approx(results["methods"]["none"]["local"])
    ends = [one.value for one in records if one[:1] == ("ft",) and one.epoch == "end" and one.measure == "worst_row"]
    assert np.mean(ends) == pytest.approx(results["methods"]["ft"]["worst_row"])
    figures = {str(path.relative_to(folder / "figures")) for path in (folder / "figures").rglob("*.png")}
    assert {"matrix/ft.png", "gains/lp_ft.png", "epochs/strategies.png", "drop_against_distortion.png"} <= figures


@pytest.mark.every
def test_a_grid_runs_what_it_changes_and_flooding_is_compared(personalized: Run) -> None:
    results, folder = personalized("personalization=[ft]", "grid={flooding.level: [0.5, 1.0]}", "figures=true")
    names = ["none", "local", "ft level=0.5", "ft level=1.0"]
    assert list(results["methods"]) == names
    assert results["methods"]["ft level=0.5"]["local"] is not None
    assert (folder / "figures" / "equal_loss.png").exists()
    assert (folder / "figures" / "epochs" / "ft.png").exists()
    assert (folder / "matrix" / "ft_level=0.5.csv").exists()
    assert "against_ft" not in results["methods"]["ft level=1.0"]  # which would be itself


def test_options_reach_every_strategy(personalized: Run, trained: Path) -> None:
    before = torch.load(trained / "global_model.pt", weights_only=True)
    _, folder = personalized("personalization=[ft,lp_ft]", "batch_norm=frozen", "save_models=true", "optimizer=adamw")
    for strategy in ("ft", "lp_ft"):
        after = model(folder, strategy)
        stays = {name for name in before if torch.equal(before[name], after[name])}
        assert stays == {name for name in before if name.startswith("norm1.")}


def test_null_switches_a_strategy_off(personalized: Run) -> None:
    results, _ = personalized("personalization=[ft,lp]", "baselines.local=null", "personalization.ft=null")
    assert list(results["methods"]) == ["none", "lp"]


def test_best_epoch_and_schedule(personalized: Run) -> None:
    best = "{_target_: fl_lightning.callbacks.best_epoch.BestEpoch, patience: 1}"
    schedule = "{_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true, T_max: 4}"
    results, _ = personalized(
        "personalization=[ft]", f"+callbacks.best={best}", "local.validate=true", f"scheduler={schedule}", "epochs=4"
    )
    assert results["methods"]["ft"]["local"] > 0
