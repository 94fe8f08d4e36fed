"""What is wrong is said in one sentence, before any training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fl_lightning.fit.local import LocalTraining
from fl_lightning.personalization import run
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import run as train
from tests.federations import config, tiny_model
from tests.personalization.conftest import compose_personalization

Run = Callable[..., tuple[Any, Path]]


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a fit began")

    monkeypatch.setattr(LocalTraining, "fit", fail)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A run folder that may be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["personalization=[lp]", "head=[classifier]"], "head: the pattern 'classifier' fits no tensor"),
        (["personalization=[lp_ft]", "lp_epochs=3"], "lp_ft: the phases .* take 3 epochs, but the fit has 2"),
        (["personalization=[ft]", "seeds=0"], "seeds must be at least 1"),
        (["personalization=[ft]", "batch_size=0"], "batch_size must be a whole number of at least 1 or null, got 0"),
        (["personalization=[ft]", "head=[x]"], "head: the pattern 'x' fits no tensor"),
        (["personalization=[ft]", "trainer.max_epochs=3"], "trainer.max_epochs .*; set epochs"),
        (["personalization=[ft]", "matrix={clients: 0}"], "matrix.clients must be a whole number of at least 1, got 0"),
        (["personalization=[ft]", "matrix=3"], "matrix must be true, false or {clients: N}"),
        (["checkpoint="], "checkpoint must be a run folder"),
        (["personalization=[ft]", "curves.every=0"], "curves.every must be a whole number of at least 1"),
        (["personalization=[ft]", "batch_norm=eval"], "one of train, frozen_stats, frozen"),
        (["personalization=[ft]", "flooding.level=-1"], "flooding.level must be at least 0"),
        (
            ["personalization=[lora_ft]", "personalization.lora_ft.adapters.targets=attention"],
            "personalization.lora_ft.adapters.targets must fit a layer .* got attention",
        ),
        (["personalization=[ft]", "+personalization.ft.callback.x=1"], "did you mean callbacks"),
        (["personalization=[ft]", "+personalization.ft.start=zero"], "start must be one of global, random"),
        (["personalization=[ft]", "grid={lrr: [1, 2]}"], "grid: there is no key 'lrr'.*; did you mean lr"),
        (["personalization=[ft]", "grid={lr.x: [1, 2]}"], "grid: there is no key 'lr.x'"),
        (["personalization=[ft]", "grid={callbacks.freeze.phases.x: [1]}"], "grid: there is no key 'callbacks"),
        (["personalization=[ft]", "grid={lr: [a]}"], "^grid: lr: Value 'a' of type 'str' could not be .* Float$"),
        (["personalization=[ft]", "grid={lr: 0.1}"], "^grid: expected a list of values for lr, .*, got 0.1$"),
        (["personalization=[ft]", "grid={lr: abc}"], "^grid: expected a list of values for lr, .*, got 'abc'$"),
        (["personalization=[ft]", "grid={lr: []}"], r"^grid: expected a list of values for lr, .*, got \[\]$"),
        (["personalization=[ft]", "grid=[lr]"], r"^grid: expected keys with lists of values, .*, got \['lr'\]$"),
        (["personalization=[ft]", "+optimizer.momentun=1"], "did you mean momentum"),
        (["checkpoint=no_such_thing"], "neither a run folder .* nor a file, nor a folder of .* name of a timm model"),
        (["checkpoint=resnet10t"], "a model of timm, without clients; add data="),
    ],
)
def test_settings(overrides: list[str], sentence: str, personalized: Run) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        personalized(*overrides)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        *((f"+{node}.x=1", f"{node}.x is no key of the") for node in ("select", "newcomers", "evaluation", "curves")),
        *((f"{node}=3", node) for node in ("select", "newcomers", "evaluation", "curves")),
        *((f"{node}=null", f"{node}: field .* is not Optional") for node in ("select", "newcomers", "curves")),
        ("~select.by", "select.by: .* does not support deletion"),
        ("newcomers.examples=-1", "newcomers.examples: "),
        ("newcomers.examples=[a]", r"newcomers.examples\[0\]: Value 'a'"),
        ("newcomers.draws=[1]", "newcomers.draws: Value"),
        ("evaluation.metric=[1]", "evaluation.metric: Cannot convert 'list' to string"),
        ("evaluation.metrics=3", "evaluation.metrics must be a list of names"),
        ("curves.every={a:1}", "curves.every: Value"),
        ("flooding=3", "flooding: "),
        ("flooding.from_epoch=-1", "personalization.local.flooding.from_epoch must be at least 0, got -1"),
        ("+flooding.x=1", "flooding.x is no key of the"),
        ("+personalization.ft.flooding={x:1}", "personalization.ft.flooding.x: .* takes no such argument"),
        ("evaluation.metric=''", "evaluation.metric must be a name or null, got ''"),
        ("trainer=3", "there is no trainer=3"),
        ("personalization.ft.optimizer=3", "personalization.ft.optimizer must be a node with settings, got 3"),
        ("personalization.ft.optimizer=null", "personalization.ft.optimizer must be a node with settings, got None"),
        ("+personalization.ft.callbacks=null", "personalization.ft.callbacks must be a node with settings, got None"),
        ("lp_epochs=-1", "lp_epochs must be a whole number of at least 0, got -1"),
        ("lp_lr=nan", "lp_lr must be a finite number, got nan"),
        ("ft_lr=-1", "ft_lr must be above 0 or null, got -1"),
    ],
)
def test_settings_that_no_strategy_of_the_run_reads(words: str, sentence: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        run(
            composed("personalize", [f"checkpoint={trained}", "trust=[tests]", "personalization=[ft]", words]), tmp_path
        )


def test_a_refused_run_leaves_no_run_behind(personalized: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds"):
        personalized("seeds=0")
    assert not list(tmp_path.rglob("config.yaml"))


def test_another_partition(copy: Path, personalized: Run) -> None:
    with pytest.raises(ValueError, match="not divided as before.*client 0 'ann'.*another train split"):
        personalized("data=folder", f"data.root={OmegaConf.load(copy / 'config.yaml').data.root}", "data.seed=7")


def test_a_checkpoint_of_another_model(copy: Path, personalized: Run) -> None:
    state = torch.load(copy / "global_model.pt", weights_only=True)
    state["conv1.weight"] = torch.zeros(5, 3, 3, 3)
    state["extra.weight"] = state.pop("conv2.weight")
    torch.save(state, copy / "global_model.pt")
    sentence = (
        r"another model: missing backbone.conv2.weight; unexpected backbone.extra.weight; .*backbone.conv1.weight \(5,"
    )
    with pytest.raises(ValueError, match=sentence):
        personalized(checkpoint=copy)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(lambda t: t.to(torch.int64), "must be of type torch.float32, got torch.int64"), (lambda t: t / 0, "holds NaN")],
)
def test_a_checkpoint_of_no_use(
    change: Callable[[torch.Tensor], torch.Tensor], sentence: str, copy: Path, personalized: Run
) -> None:
    state = torch.load(copy / "global_model.pt", weights_only=True)
    torch.save({**state, "conv1.weight": change(state["conv1.weight"])}, copy / "global_model.pt")
    with pytest.raises(ValueError, match=sentence):
        personalized(checkpoint=copy)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "config.yaml is damaged: it lacks seed, data, model"),
        (b"[1, 2]", "config.yaml is damaged"),
        (b"seed: 1\ndata: {}\nmodel: {}\n", "there is no method in it"),
        (b"\x80\x81", "config.yaml is damaged"),
        (
            b"seed: 1\ndata: \nmodel: \npersonalization: {}\ncheckpoint: before\n",
            "is a run of personalize.py.*checkpoint=before",
        ),
    ],
)
def test_a_run_folder_with_another_configuration(content: bytes, sentence: str, copy: Path, personalized: Run) -> None:
    (copy / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        personalized(checkpoint=copy)


def test_a_head_that_is_not_there(copy: Path, personalized: Run) -> None:
    state = torch.load(copy / "global_model.pt", weights_only=True)
    torch.save({name.replace("head.", "fc."): tensor for name, tensor in state.items()}, copy / "global_model.pt")
    with pytest.raises(ValueError, match="under the head's path 'head'"):
        personalized(checkpoint=copy)


def test_a_client_without_validation_data(tiny_root: Path, tmp_path: Path, personalized: Run, monkeypatch: Any) -> None:
    monkeypatch.undo()
    train(OmegaConf.create(config(tiny_root, "data.val_fraction=0.0", "loop.rounds=0")), tmp_path / "no_val")
    with pytest.raises(ValueError, match="greedy_soup_ft chooses by validation data, but client ann has none"):
        personalized("personalization=[greedy_soup_ft]", checkpoint=tmp_path / "no_val")


def test_what_is_missing_or_damaged(copy: Path, tmp_path: Path, personalized: Run) -> None:
    (copy / "global_model.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="global_model.pt is damaged"):
        personalized(checkpoint=copy)
    (copy / "global_model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="holds no global_model.pt .method=fedavg."):
        personalized(checkpoint=copy)
    (copy / "partition.json").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run of train.py"):
        personalized(checkpoint=tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(tiny_model(3).backbone.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not say what data it belongs to; add data="):
        personalized(checkpoint=tmp_path / "list.pt")


def test_nothing_is_overwritten(trained: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        run(compose_personalization(f"checkpoint={trained}", "personalization=[ft]"), trained)
