"""Personal models of runs of train.py as rows: the scores that the run printed, and plain forward passes elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fl_lightning.evaluation.results import read_json
from fl_lightning.personalization import run as personalize
from fl_lightning.run.config import CONF
from fl_lightning.run.training import run as train
from fl_lightning.state import State
from tests.federations import by_name, config, every, federation
from tests.methods.test_personal_models import plain
from tests.personalization.conftest import compose_personalization
from tests.personalization.test_run import matrix_in

#: Methods whose clients all use the global model.
GLOBAL = {
    *(
        "fed_influence",
        "fedadam",
        "fedavg",
        "fedavgm",
        "feddyn",
        "fedex_lora",
        "fedit",
        "fedjets",
        "fedprox",
        "ffa_lora",
    ),
    *("flexlora", "flora", "hetlora", "krum", "median", "moon", "multi_krum", "norm_clipping", "rolora", "scaffold"),
    *("splitfed", "trimmed_mean"),
}
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem not in GLOBAL)
ROWS = ["baselines.local=null", "personalization=[]"]


def trained_by(tiny_root: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """Train a tiny run with a checkpoint."""
    return train(OmegaConf.create(config(tiny_root, "loop.rounds=1", *overrides)), folder)


def row_of(folder: Path, run: Path, *overrides: str, row: str) -> tuple[dict[str, Any], Any]:
    """Personalize with rows of runs alone; return the results and the matrix of one."""
    results = personalize(compose_personalization(f"checkpoint={run}", *ROWS, *overrides), folder)
    return results, matrix_in(folder / "matrix" / f"{row}.csv").values


@pytest.mark.parametrize("method", [every(one, one in ("fedper", "apfl", "reptile", "fedproto")) for one in METHODS])
def test_a_run_s_personal_models_score_at_home_what_it_printed(
    method: str, trained: Path, tiny_root: Path, tmp_path: Path
) -> None:
    printed = trained_by(tiny_root, tmp_path / "run", *by_name(method))
    results, matrix = row_of(tmp_path / "rows", trained, f"beside=[{tmp_path / 'run'}]", row=method)
    assert matrix.diagonal() == pytest.approx([one["personal"] for one in printed["clients"]], rel=1e-6)
    assert not results["methods"][method]["diverged"]
    assert {one["candidate"] for one in results["decisions"].values()} == {method}


def test_personal_models_meet_the_others_data_as_plain_networks_do(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "again", "method=ditto", "optimizer.lr=0.1", "loop.rounds=1")
    run.fit()
    trained_by(tiny_root, tmp_path / "run", "method=ditto", "optimizer.lr=0.1")
    _, matrix = row_of(tmp_path / "rows", tmp_path / "run", row="ditto")
    with torch.inference_mode():
        for number, owner in enumerate(run.clients):
            network = plain(run.loop.personal_state(owner), "personal.")
            for place, client in enumerate(run.clients):
                x, y = next(iter(client.data.test_dataloader()))
                assert matrix[number, place] == pytest.approx((network(x).argmax(1) == y).float().mean().item())


def test_the_owner_s_data_weigh_its_model_on_the_others_data(trained: Path, tiny_root: Path, tmp_path: Path) -> None:
    # PAC-PFL mixes by the client's training data: by those of the owner, not of the client whose test data it meets.
    words = ["method=pac_pfl", "optimizer.lr=0.3"]
    trained_by(tiny_root, tmp_path / "run", *words)
    _, matrix = row_of(
        tmp_path / "rows", trained, f"beside=[{tmp_path / 'run'}]", "evaluation.metric=loss", row="pac_pfl"
    )
    run = federation(tiny_root, tmp_path / "again", *words, "loop.rounds=1")
    run.fit()
    module: Any = run.module
    for number, owner in enumerate(run.clients):
        module.load_state_dict(run.loop.personal_state(owner))
        module.eval()
        weights = module.posterior(owner.data, module.device)
        for place, client in enumerate(run.clients):
            x, y = next(iter(client.data.test_dataloader()))
            with torch.inference_mode():
                loss = torch.nn.functional.cross_entropy(module.mixed(x, weights), y).item()
            assert matrix[number, place] == pytest.approx(loss, rel=1e-5)


def test_without_a_global_model_strategies_start_from_the_mean_model(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "again", "method=fedper", "optimizer.lr=0.1", "loop.rounds=1")
    run.fit()
    trained_by(tiny_root, tmp_path / "run", "method=fedper", "optimizer.lr=0.1")
    states = [run.loop.personal_state(client) for client in run.clients]
    sizes = [client.num_examples for client in run.clients]
    mean: State = {
        name: (sum(n * state[name].double() for n, state in zip(sizes, states, strict=True)) / sum(sizes)).to(tensor)
        for name, tensor in states[0].items()
    }
    overrides = ["save_models=true", "baselines.local=null", "personalization=[]"]
    results = personalize(compose_personalization(f"checkpoint={tmp_path / 'run'}", *overrides), tmp_path / "rows")
    start = torch.load(tmp_path / "rows" / "models" / "none" / "seed_0" / "client_0.pt", weights_only=True)
    for name, tensor in mean.items():
        assert torch.allclose(start[name.removeprefix("backbone.")], tensor, rtol=1e-6), name
    own = torch.load(tmp_path / "rows" / "models" / "fedper" / "seed_0" / "client_1.pt", weights_only=True)
    assert all(torch.equal(own[name.removeprefix("backbone.")], tensor) for name, tensor in states[1].items())
    assert results["source"]["start"] == "mean of the clients' models"
    assert "start from the mean of its clients' models" in (tmp_path / "rows" / "table.md").read_text()


def test_what_cannot_be_a_row_or_a_start_is_said(trained: Path, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"beside: .*trained has no personal models \(method=fedavg"):
        row_of(tmp_path / "none", trained, f"beside=[{trained}]", row="fedavg")
    trained_by(tiny_root, tmp_path / "alone", "method=local")
    with pytest.raises(ValueError, match="share no part of the model that is fine-tuned .*beside="):
        row_of(tmp_path / "one", tmp_path / "alone", row="local")
    trained_by(tiny_root, tmp_path / "bare", "method=ditto", "checkpoint=null")
    with pytest.raises(FileNotFoundError, match="keeps no checkpoint"):
        row_of(tmp_path / "two", trained, f"beside=[{tmp_path / 'bare'}]", row="ditto")
    trained_by(tiny_root, tmp_path / "else", "method=ditto", "data.val_fraction=0.4")
    with pytest.raises(ValueError, match="beside: The data are not divided as before"):
        row_of(tmp_path / "three", trained, f"beside=[{tmp_path / 'else'}]", row="ditto")


def test_a_row_keeps_its_name_where_a_strategy_has_it(trained: Path, tiny_root: Path, tmp_path: Path) -> None:
    trained_by(tiny_root, tmp_path / "alone", "method=local")
    overrides = [f"checkpoint={trained}", f"beside=[{tmp_path / 'alone'}]", "personalization=[]", "seeds=2"]
    results = personalize(compose_personalization(*overrides, "best_of=[none,'local (run)']"), tmp_path / "rows")
    assert {"local", "local (run)", "best_of"} <= results["methods"].keys()
    assert results["methods"]["local (run)"]["std"]["local"] == 0
    assert read_json(tmp_path / "rows" / "results.json")["methods"].keys() == results["methods"].keys()
