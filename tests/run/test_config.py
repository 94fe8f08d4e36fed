"""Every kind of mistake in a configuration ends in one sentence that names the key."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from fl_lightning.run.config import check, differences, fits, instantiate, instantiate_dict
from tests.federations import federation


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, True),
        (3.0, int, False),
        (True, int, False),
        ("abc", int, False),
        (3, float, True),
        ("1e-3", float, False),
        (1, bool, False),
        (None, int | None, True),
        ("adam", Literal["adam", "yogi"], True),
        ("sgd", Literal["adam", "yogi"], False),
        (["a", "b"], Sequence[str], True),
        (["a", 1], Sequence[str], False),
        ("ab", Sequence[str], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "x"}, Mapping[str, int], False),
        ("x", Callable[[], int], False),
        ({"_target_": "a.b"}, Callable[[], int], True),
        ("/tmp", Path, True),
        (object(), Any, True),
    ],
)
def test_fits(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected


COHORT = {"_target_": "fl_lightning.cohort.Cohort"}


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({**COHORT, "fracton": 0.5}, r"cohort\.fracton: .*takes no such argument; did you mean fraction"),
        ({**COHORT, "fraction": "half"}, r"cohort\.fraction must be a number, got 'half'"),
        ({**COHORT, "number": 2.5}, r"cohort\.number must be an integer or null, got 2\.5"),
        ({**COHORT, "fraction": 7}, r"cohort\.fraction must lie in \(0, 1\], got 7"),
        ({"_target_": "fl_lightning.cohort.Choort"}, r"cohort\._target_: cannot import"),
    ],
)
def test_a_wrong_node_is_named(node: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        instantiate(node, "cohort")


def test_a_file_of_this_folder_that_python_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    node = {"_target_": "mine_alone.Part"}
    with pytest.raises(ValueError, match="cannot import 'mine_alone.Part'") as error:
        instantiate(node, "aggregator")
    assert "PYTHONPATH" not in str(error.value)
    Path("mine_alone.py").write_text("class Part: ...")
    with pytest.raises(ValueError, match=r"aggregator\._target_: cannot import .*; PYTHONPATH=\. lets Python find it$"):
        instantiate(node, "aggregator")


def test_nested_nodes_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"a\.b\[1\]\.fracton"):
        check({"b": [COHORT, {**COHORT, "fracton": 1}]}, "a")


def test_a_callback_without_a_class_is_an_error_with_the_close_name() -> None:
    node = {"proximal": {"_target_": "fl_lightning.callbacks.proximal_penalty.ProximalPenalty"}, "proximl": {"mu": 3}}
    with pytest.raises(ValueError, match=r"callbacks\.proximl has no _target_.*did you mean callbacks\.proximal\?"):
        instantiate_dict(node, "callbacks")


def test_null_switches_a_callback_off() -> None:
    assert instantiate_dict({"proximal": None}, "callbacks") == {}


def test_differences_names_the_keys_and_skips_what_may_change() -> None:
    old = {"seed": 1, "loop": {"rounds": 3, "x": 1}, "executor": {"_target_": "a"}}
    new = {"seed": 2, "loop": {"rounds": 5, "x": 1}, "executor": {"_target_": "b", "workers": 2}}
    assert differences(old, new, ("executor", "loop.rounds")) == ["seed was 1, now 2"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("loop.rounds=abc", r"loop\.rounds must be an integer, got 'abc'"),
        ("loop.rounds=-1", r"loop\.rounds must be at least 0, got -1"),
        ("optimizer.lr=fast", r"optimizer\.lr must be .*number.*, got 'fast'"),
        ("+trainer.max_epoch=3", r"trainer\.max_epoch: .*did you mean max_epochs"),
        ("trainer.precision=bf17", r"trainer\.precision must be one of .*got 'bf17'"),
        ("sharing.personal=[haed]", r"'haed' fits no tensor of the model; close names: .*head"),
        ("aggregator.weights=size", r"aggregator\.weights must be one of examples, uniform, entropy, got 'size'"),
        ("+callbacks.proximal.mu=1", r"callbacks\.proximal has no _target_"),
        ("cohort.number=9", r"asks for 9 clients a round, but the federation has 3"),
        ("evaluation.mode=best", r"evaluation\.mode must be one of max, min"),
        ("evaluation.metric=f2", r"evaluation\.metric must be one of accuracy, loss, .*f1, .* got 'f2'"),
        ("cohort=3", r"cohort: expected a node with _target_, got 3; for one value of it, write cohort\.<key>="),
        ("data.root=nowhere", r"nowhere"),
        ("data.batch_size=0", r"batch_size"),
    ],
)
def test_mistakes_are_named_before_the_first_round(
    override: str, sentence: str, tiny_root: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=sentence):
        federation(tiny_root, tmp_path / "run", override).fit()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_early_stopping_without_validation_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    stopping = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val_loss}"
    with pytest.raises(ValueError, match=r"EarlyStopping monitors 'val_loss'.*local\.validate=true"):
        federation(tiny_root, tmp_path / "run", f"+callbacks.stopping={stopping}").fit()
    federation(tiny_root, tmp_path / "other", f"+callbacks.stopping={stopping}", "local.validate=true").fit()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no GPU on this machine; take trainer=cpu"):
        federation(tiny_root, tmp_path / "run", "trainer=gpu")
