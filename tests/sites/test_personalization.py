"""Fine-tuning and the client-by-client matrix at sites: models travel, data do not, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_lightning.evaluation.results import read_json
from fl_lightning.sites.frame import decode_states
from tests.federations import assert_same, tiny
from tests.scripts import call
from tests.sites.federation import NAMES, free_port, sites

QUICK = ["personalization=[ft]", "personalization@baselines=[none]", "epochs=1", "curves.every=1", "figures=false"]


def table(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "results.json")
    for key in ("source", "partition_hash"):
        found.pop(key, None)
    return {key: value for key, value in found.items() if "second" not in key}


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if "second" not in key}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("strategies", ["[ft]", "[lp_ft,soup_ft,lora_ft]"])
def test_the_matrix_of_sites_is_that_of_the_simulation(strategies: str, tiny_root: Path, tmp_path: Path) -> None:
    quiet = ["logger=none"]
    words = [*QUICK[1:], f"personalization={strategies}", "batch_size=5", "lp_epochs=0", "trust=[tests]"]
    assert call("train", *tiny(tiny_root), *quiet, "dashboard=null", f"hydra.run.dir={tmp_path / 'serial'}") == 0
    one = [f"checkpoint={tmp_path / 'serial'}", "executor=serial", *words, *quiet]
    assert call("personalize", *one, f"hydra.run.dir={tmp_path / 'one'}") == 0
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", f"executor.sites=[{','.join(NAMES)}]"]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model"]
    training = [*at, "data.classes=3", "data.batch_size=8", *model, "loop.rounds=2", "dashboard=null", *quiet]
    with sites(port, tiny_root, tmp_path / "sites", once=False) as threads:
        assert call("train", *training, f"hydra.run.dir={tmp_path / 'train'}") == 0
        two = [f"checkpoint={tmp_path / 'train'}", *at, *words, *quiet]
        assert call("personalize", *two, f"hydra.run.dir={tmp_path / 'two'}") == 0
        for thread in threads:
            thread.line.close()
    assert_same(without_seconds(table(tmp_path / "two")), without_seconds(table(tmp_path / "one")))


@pytest.mark.slow
def test_a_site_whose_model_stays_is_scored_at_home(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", "executor.sites=3", "logger=none"]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model"]
    folders, words = [tmp_path / "given", tmp_path / "kept"], [*QUICK, "trust=[tests]"]
    with ExitStack() as stack:
        threads = stack.enter_context(sites(port, tiny_root, tmp_path / "sites", once=False))
        training = [*at, "data.classes=3", "data.batch_size=8", *model, "loop.rounds=2", "dashboard=null"]
        assert call("train", *training, f"hydra.run.dir={tmp_path / 'train'}") == 0
        left = []
        for folder in folders:
            assert call("personalize", f"checkpoint={tmp_path / 'train'}", *at, *words, f"hydra.run.dir={folder}") == 0
            threads[1].site.stays = True
            threads[1].site.answer = recording(threads[1].site.answer, left)
        choice = ["select.per=client", "select.by=val_elsewhere", "grid={lr: [0.1, 0.2]}"]
        assert call("personalize", f"checkpoint={tmp_path / 'train'}", *at, *words, *choice) == 1
        for thread in threads:
            thread.line.close()
    told = capsys.readouterr()
    assert "select.by must be val_metric or val_loss, got val_elsewhere: the model of bob stays at its site" in told.err
    assert "bob: the model stays at the site and was tried on its own data alone" in told.out
    assert left
    assert not any(name.startswith("update with") for name in left), left
    given, kept = (read_json(folder / "results.json") for folder in folders)
    assert (given["models_stay_at"], kept["models_stay_at"]) == ([], ["bob"])
    for strategy, full in (("ft", False), ("none", True)):
        before, after = (
            np.genfromtxt(folder / "matrix" / f"{strategy}.csv", delimiter=",")[1:, 1:] for folder in folders
        )
        expected = before.copy()
        if not full:
            expected[1, [0, 2]] = np.nan
        assert not np.isnan(before).any()
        np.testing.assert_array_equal(after, expected)
    one, other = (without_seconds(found["methods"]["ft"]["clients"]) for found in (given, kept))
    assert one[1]["local"] == other[1]["local"]
    same = ("head_norm", "train_loss", "ece", "feature_distortion", "val_metric", "val_loss", "local")
    assert all(given["methods"]["ft"][key] == kept["methods"]["ft"][key] for key in same)


@pytest.mark.slow
def test_personal_models_of_sites_are_scored_at_home_and_new_sites_are_tried(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ["method=ditto", "data.unseen_clients=[cid]", "optimizer.lr=0.1", "logger=none"]
    words = [*QUICK, "personalization@baselines=[none]", "trust=[tests]", "logger=none", "batch_size=5"]
    assert call("train", *tiny(tiny_root), *method, "dashboard=null", f"hydra.run.dir={tmp_path / 'serial'}") == 0
    one = [f"checkpoint={tmp_path / 'serial'}", "executor=serial", *words, "newcomers.examples=[null]"]
    assert call("personalize", *one, f"hydra.run.dir={tmp_path / 'one'}") == 0
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", f"executor.sites=[{','.join(NAMES)}]"]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model"]
    training = [*at, *method, "data.classes=3", "data.batch_size=8", *model, "loop.rounds=2", "dashboard=null"]
    with sites(port, tiny_root, tmp_path / "sites", once=False) as threads:
        assert call("train", *training, f"hydra.run.dir={tmp_path / 'train'}") == 0
        two = [f"checkpoint={tmp_path / 'train'}", *at, *words]
        assert call("personalize", *two, f"hydra.run.dir={tmp_path / 'two'}") == 0
        for thread in threads:
            thread.line.close()
    capsys.readouterr()
    assert call("personalize", *one, f"beside=[{tmp_path / 'train'}]", f"hydra.run.dir={tmp_path / 'three'}") == 1
    assert "was trained at sites, which keep their personal models; set executor=sites" in capsys.readouterr().err
    expected, found = (without_seconds(read_json(tmp_path / name / "results.json")) for name in ("one", "two"))
    assert_same(found["methods"]["ft"], expected["methods"]["ft"])
    assert found["newcomers"] == expected["newcomers"]
    at_home = ("local", "train_loss", "val_metric", "val_loss", "ece", "worst_local")
    assert [found["methods"]["ditto"][key] for key in at_home] == [expected["methods"]["ditto"][key] for key in at_home]
    assert found["methods"]["ditto"]["global_others"] is None
    text = (tmp_path / "two" / "table.md").read_text()
    assert "ditto: its models stay at their sites" in text
    assert "New clients are not tried with 10, 30, 100 examples: a site trains on all that it has." in text


def recording(answer: Callable[..., bytes], left: list[str]) -> Callable[..., bytes]:
    """Note the tensors of models that are in a site's answers."""

    def answers(*args: Any) -> bytes:
        header, states = decode_states(found := answer(*args))
        left.append(header["kind"] if not (states.get("state") or states.get("extra")) else f"update with {[*states]}")
        return found

    return answers
