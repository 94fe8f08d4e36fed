"""Clients that never took part: what they would gain, by how many examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from fl_lightning.evaluation.results import read_json
from fl_lightning.evaluation.uncertainty import Interval
from fl_lightning.personalization import run as personalize
from fl_lightning.personalization.newcomers import Arrival, Arrivals, Plan
from fl_lightning.run.config import instantiate
from fl_lightning.run.training import run as train
from tests.federations import config
from tests.personalization.conftest import compose_personalization

NAN = float("nan")
DRAWS = {"examples": [6, 12, None], "draws": 2}


@pytest.fixture(scope="module")
def with_unseen(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unseen") / "run"
    train(OmegaConf.create(config(tiny_root, "data.unseen_clients=[bob]")), folder)
    return folder


def data_of(tiny_root: Path) -> Any:
    return instantiate(config(tiny_root, "data.unseen_clients=[bob]")["data"], "data")


def test_the_examples_of_a_draw_are_nested_and_in_proportion(tiny_root: Path) -> None:
    plan = Plan.of(DRAWS, data_of(tiny_root).unseen)
    places, clients = plan.places(), plan.clients(seed=1)
    assert places == [(6, 0, 0), (6, 1, 0), (12, 0, 0), (12, 1, 0), (None, 0, 0)]
    assert [(one.data.num_train, one.data.num_val) for one in clients[2:4]] == [(10, 2), (10, 2)]
    assert len({client.id for client in clients} | {0, 1, 2}) == 8
    taken = [
        {split: set(one.data._indices.indices(split).tolist()) for split in ("train", "val", "test")} for one in clients
    ]
    assert taken[0]["train"] < taken[2]["train"] < taken[4]["train"]
    assert taken[1]["val"] < taken[3]["val"] < taken[4]["val"]
    assert taken[0]["train"] != taken[1]["train"]
    assert all(one["test"] == taken[4]["test"] for one in taken)


def test_sizes_that_no_newcomer_has_are_left_out_with_a_word(tiny_root: Path) -> None:
    plan = Plan.of({"examples": [6, 34, 500, None], "draws": 1}, data_of(tiny_root).unseen)
    assert plan.sizes == [6, None]
    assert plan.left_out == "New clients are not tried with 34, 500 examples: the smallest of them has 34 examples."
    assert plan.words(None) == "all (34)"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"examples": [3], "draws": 1}, "newcomers.examples"),
        ({"examples": [6], "draws": 0}, "newcomers.draws"),
    ],
)
def test_bad_input(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan.of(given, [])


@pytest.mark.every
def test_the_un_tuned_model_scores_what_the_run_printed_of_unseen_clients(with_unseen: Path, tmp_path: Path) -> None:
    overrides = [f"checkpoint={with_unseen}", "personalization=[ft]", "newcomers={examples: [6,12,null], draws: 2}"]
    results = personalize(compose_personalization(*overrides, "seeds=2", "grid={lr: [0.0001, 0.1]}"), tmp_path / "run")
    found = results["newcomers"]
    printed = read_json(with_unseen / "results.json")["unseen"]["mean"]
    assert [one["score"]["mean"] for one in found["methods"]["none"]] == pytest.approx([printed] * 3)
    assert [one["examples"] for one in found["methods"]["ft"]] == [6, 12, None]
    assert all(one["change_from_none"]["mean"] == 0 for one in found["methods"]["none"])
    for one, none in zip(found["methods"]["ft"], found["methods"]["none"], strict=True):
        gain = one["score"]["mean"] - none["score"]["mean"]
        assert one["change_from_none"]["mean"] == pytest.approx(gain)
        assert one["clients"][0]["change_from_none"]["mean"] == pytest.approx(gain)
    # Newcomers get the setting that the federation's clients validate best.
    settings = {name: results["methods"][f"ft lr={name}"]["val_metric"] for name in ("0.0001", "0.1")}
    assert found["settings"]["ft"] == f"lr={max(settings, key=lambda name: settings[name])}"
    assert "What would a new client gain?" in (tmp_path / "run" / "report.html").read_text()
    assert "New clients, which never took part (bob)" in (tmp_path / "run" / "table.md").read_text()


def test_nobody_is_held_out_or_nothing_is_asked_for(with_unseen: Path, tmp_path: Path) -> None:
    overrides = [f"checkpoint={with_unseen}", "personalization=[]", "baselines.local=null", "newcomers.examples=[]"]
    assert "newcomers" not in personalize(compose_personalization(*overrides), tmp_path / "run")


def arrival(low: float, high: float) -> Arrival:
    return Arrival(Interval(0.5, NAN, NAN), Interval((low + high) / 2, low, high), [], NAN)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([(-0.3, -0.1), (-0.1, 0.2), (0.1, 0.2), (0.1, 0.3)], "beyond chance from 30 examples on; worse with 5."),
        ([(0.1, 0.3), (-0.1, 0.2), (-0.1, 0.2), (0.1, 0.3)], "beyond chance with all (34) examples."),
        ([(0.1, 0.3), (0.1, 0.2), (0.1, 0.2), (-0.1, 0.3)], "no gain over the global model beyond chance."),
    ],
)
def test_enough_is_where_all_that_is_more_gains_too(
    gains: list[tuple[float, float]], words: str, tiny_root: Path
) -> None:
    plan = Plan.of({"examples": [6, None], "draws": 1}, data_of(tiny_root).unseen)
    found = {"ft": {size: arrival(*one) for size, one in zip((5, 10, 30, None), gains, strict=True)}}
    assert Arrivals(plan, ["bob"], found, {}).sentences()[0].endswith(words)


def test_draws_and_seeds_are_runs_of_one_client(with_unseen: Path, tmp_path: Path) -> None:
    overrides = [f"checkpoint={with_unseen}", "personalization=[ft]", "baselines.local=null", "curves.every=null"]
    words = ["newcomers={examples: [8], draws: 3}", "save_models=true"]
    results = personalize(compose_personalization(*overrides, *words), tmp_path / "run")
    [one] = results["newcomers"]["methods"]["ft"]
    content = np.load(tmp_path / "run" / "newcomers" / "predictions" / "ft" / "seed_0.npz")
    scores = [
        (content["prediction"][start:end] == content["target"][start:end]).mean()
        for start, end in zip(content["starts"], content["starts"][1:], strict=False)
    ]
    assert len(scores) == 3
    assert one["score"]["mean"] == pytest.approx(np.mean(scores))
    assert one["spread"] == pytest.approx(np.std(scores, ddof=1))
    assert not (tmp_path / "run" / "newcomers" / "models").exists()
