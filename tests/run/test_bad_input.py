"""Settings that cannot work end in one sentence with the key, before any training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fl_lightning.run.command_line import with_resume
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import assemble
from fl_lightning.run.trust import KNOWN, check_trusted, is_trusted
from tests.scripts import call

COSINE = "{_target_:torch.optim.lr_scheduler.CosineAnnealingLR,T_max:5}"

ROWS = [
    ("method=ditto module.lam=inf", r"module\.lam must be a finite number, got inf"),
    ("method=fedadam aggregator.lr=inf", r"aggregator\.lr must be a finite number, got inf"),
    ("optimizer.momentum=nan", r"optimizer\.momentum must be a finite number, got nan"),
    ("optimizer.lr=[0.1]", r"optimizer\.lr must be .*number.*, got \[0\.1\]"),
    ("optimizer.lr={a:1}", r"optimizer\.lr must be .*number.*, got {'a': 1}"),
    ("optimizer.lr=-1", "optimizer: .*-1"),
    ("data.std=inf", r"data\.std must be a finite number, got inf"),
    ("data.mean=nan", r"data\.mean must be a finite number, got nan"),
    ("data.mean=[0.1,nan]", r"data\.mean\[1\] must be a finite number, got nan"),
    ("data.num_workers=-1", r"data\.num_workers must be at least 0, got -1"),
    ("data.mean=[] data.std=[]", r"data\.mean must .*not empty, got \[\]"),
    ("~loop", r"loop must be given"),
    ("~loop.rounds", r"loop\.rounds must be given"),
    *((f"{key}=null", f"{key} must be given, got null") for key in ("aggregator", "cohort", "local", "sharing")),
    *((f"{key}=null", f"{key} must be given, got null") for key in ("module", "loop", "evaluation")),
    ("+task={a:1}", r"task must name a class by _target_, got the keys a"),
    (f"scheduler={COSINE}", r"scheduler\.optimizer must be given, or scheduler\._partial_=true"),
    ("module=abc", r"module: expected a node with _target_, got 'abc'"),
    ("~module._target_", r"module must name a class by _target_, got the keys label_smoothing"),
    ("module._target_=null", r"module\._target_ must name a class or function, got null"),
    ("+evaluation.metrics={auroc:1}", r"evaluation\.metrics\.auroc must be a node with _target_, null or auroc, got 1"),
    ("+evaluation.metrics=3", r"evaluation\.metrics must be a list of names, or nodes by name, got 3"),
    ("method=fedbabu callbacks.schedule.phases=[{train:-1}]", r"callbacks\.schedule\.phases\.train .*, got -1"),
    ("method=fedbabu callbacks.schedule.phases=[{train:[1]}]", r"callbacks\.schedule\.phases\.train .*, got \[1\]"),
    ("method=l2gd callbacks.averaging.lr=-1", r"callbacks\.averaging\.lr must be at least 0, got -1"),
    ("method=flexp_sfl callbacks.server.clip=-1", r"callbacks\.server\.clip must be above 0 or null, got -1"),
    ("method=flexp_sfl callbacks.server.policy=abc", r"callbacks\.server\.policy must be CutPolicy or null, got 'abc'"),
    (
        "method=flexp_sfl ~callbacks.server.policy._target_",
        r"callbacks\.server\.policy must be CutPolicy or null, got \{",
    ),
    ("method=virtual callbacks.factors.damping=-1", r"callbacks\.factors\.damping must lie in \(0, 1\], got -1"),
    ("method=pac_pfl evaluation.metrics=0", r"evaluation\.metrics must be a list of names, or nodes by name, got 0"),
    ("evaluation.metric=''", r"evaluation\.metric must be a name or null, got ''"),
    ("trainer._partial_=null", r"trainer\._partial_ must be true or false, got None"),
    ("model._target_=builtins.len", r"model\._target_ must take num_classes.*'builtins\.len'"),
    ("model._target_=os.getcwd", r"model\._target_ must take num_classes.*'os\.getcwd'"),
    ("model._target_=math.pi", r"model\._target_ must name a class or function.*'math\.pi'"),
    ("executor.threads=100000", r"executor\.threads must lie in \[1, 1024\] or null, got 100000"),
    ("sharing.shared=[head] sharing.personal=[head]", r"sharing\.shared must .*, got \['head'\]"),
    ("cohort.fraction=0.5 cohort.number=2", r"cohort\.fraction must be 1 where number is given, got 0\.5"),
    ("trainer.accelerator=tpu", r"trainer\.accelerator must be one of auto, cpu, .*, got 'tpu'"),
    ("evaluation.metric=loss evaluation.mode=max", r"evaluation\.mode=max would keep the model with the worst loss"),
    (
        "evaluation.metric=f1 +evaluation.metrics.f1={_target_:torchmetrics.F1Score,_partial_:true,task:binary}",
        r"evaluation\.metrics\.f1 must take outputs for 3 classes, got ",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), ROWS, ids=[words for words, _ in ROWS])
def test_it_is_refused_before_any_training(words: str, sentence: str, tiny_root: Path, tmp_path: Path) -> None:
    overrides = ["data=folder", f"data.root={tiny_root}", "logger=none", "dashboard=null"]
    model = [] if "model." in words else ["+model._target_=tests.federations.tiny_model"]
    cfg = composed("train", [*overrides, *(["~model", *model] if model else []), *words.split(" ")])
    with pytest.raises((ValueError, TypeError), match=f"^{sentence}") as caught:
        assemble(plain(cfg), RunFolder(tmp_path / "run")).fit()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("+method.x=1", r"method\.x is read by no other key; leave it out"),
        ("+method={x:1}", r"method\.x is read by no other key; leave it out"),
        ("method=fedrep +method.head_epoch=1", r"method\.head_epoch is .*; did you mean method\.head_epochs"),
        ("method=fedavg +method.tau_sync=3", r"method\.tau_sync is read by no other key"),
        ("~method", r"method\.name must be a name, got null; set method="),
        ("+trainer.foo=1", r"trainer\.foo: lightning\.pytorch\.Trainer takes no such argument"),
        ("+callbacks.x.y=1", r"callbacks\.x has no _target_"),
        ("+paths.logs=1", r"paths\.logs is no key of the configuration; these are: log_dir"),
    ],
)
def test_an_added_key_that_nothing_reads_is_refused(words: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        assemble(plain(composed("train", [*words.split(" "), "logger=none"])), RunFolder(tmp_path))


def test_an_added_key_may_be_read_by_others() -> None:
    more = "+callbacks.x._target_=fl_lightning.callbacks.proximal_penalty.ProximalPenalty"
    config = plain(composed("train", ["+method.rounds=3", "loop.rounds=${method.rounds}", more, "+callbacks.x.mu=1"]))
    assert (config["loop"]["rounds"], config["callbacks"]["x"]["mu"]) == (3, 1)
    plain(composed("train", ["method=fedft", "method.tau_sync=1"]))


def test_callbacks_and_checkpoints_may_be_left_out(tiny_root: Path) -> None:
    config = plain(composed("train", ["~callbacks", "~checkpoint", "~dashboard"]))
    assert (config["callbacks"], config["checkpoint"], config["dashboard"]) == ({}, None, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("loop.rounds=${nothing}", "error: loop.rounds: Interpolation key 'nothing' not found"),
        ("optimizer.lr=${oc.env:NOT_THERE}", "error: optimizer.lr: .*'NOT_THERE' not found"),
        ("task=[1]", r"error: there is no task=\[1\]; these are: binary, "),
        ("method.name=null", "error: method.name must be a name, got null; set method=fedavg\n"),
        ("~method", "error: method.name must be a name, got null; set method=fedavg\n"),
        ("resume=", "error: resume must be a folder, got nothing\n"),
        ("paths.log_dir=null", "error: paths.log_dir: field 'paths.log_dir' is not Optional"),
        ("~paths.log_dir", "error: paths.log_dir: PathsConfig .* does not support deletion"),
        ("paths.log_dir=[1]", "error: paths.log_dir: Cannot convert 'list' to string"),
        ("optimizer={lrr: 1}", "error: there is no optimizer.lrr; did you mean optimizer.lr"),
        ("@x=1", "error: '@x=1' is not of the form key=value"),
        ("--config-name=foo", "error: --config-name must be left out, got 'foo'"),
        ("--config-path=/nowhere", "error: --config-path must be left out, got '/nowhere'"),
        ("--config-dir=/nowhere", "error: --config-dir must be a folder, got '/nowhere'"),
        ("resume=/nowhere", "error: resume=/nowhere: there is no run in this folder"),
    ],
)
def test_the_command_line(words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", words, f"hydra.run.dir={tmp_path / 'run'}") == 1
    told = capsys.readouterr().err
    assert re.match(sentence, told), told


def test_a_run_folder_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "hydra.run.dir=") == 1
    assert capsys.readouterr().err == "error: hydra.run.dir must be a folder, got nothing\n"


@pytest.mark.parametrize(
    "every",
    ["loop.on_bad_update=drop optimizer.lr=1e38 data.batch_size=4", "loop.on_client_error=skip +callbacks.x={e}"],
)
def test_rounds_that_trained_nothing_end_in_an_error(
    every: str, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:nothing}"
    overrides = [word.replace("{e}", broken) for word in every.split(" ")]
    where = ["data=folder", f"data.root={tiny_root}", "logger=none", "dashboard=null", "loop.rounds=2"]
    model = ["~model", "+model._target_=tests.federations.tiny_model", f"hydra.run.dir={tmp_path / 'run'}"]
    code = call("train", *where, *model, *overrides, "optimizer.momentum=0.9")
    assert (code, "failed or diverged in all 2 rounds" in capsys.readouterr().err) == (1, True)


EVIL = {"_target_": "torch.load", "f": "partition.bin", "weights_only": False}


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.optim.sgd.torch.load",
        "fl_lightning.files.write_text",
        "fl_lightning.files.os.system",
        "torchvision.datasets.utils.download_url",
        "os.system",
        "mine.net",
        3,
        None,
    ],
)
def test_a_strangers_run_names_known_code_alone(target: object) -> None:
    assert not is_trusted(target, [])
    with pytest.raises(ValueError, match=r"^data\.x\[?.*_target_ must name code of a known package.*trust="):
        check_trusted({"x": [{"_target_": target}]}, "data", [], "config.yaml")


def test_known_and_trusted_code_passes() -> None:
    for target in (
        "torch.optim.SGD",
        "fl_lightning.models.lenet5",
        "torchmetrics.F1Score",
        "lightning.pytorch.Trainer",
    ):
        assert is_trusted(target, []), target
    assert is_trusted("tests.federations.tiny_model", ["tests"])
    assert not is_trusted("tests.federations.copy.deepcopy", ["tests"])
    with pytest.raises(ValueError, match=r"data\.root must be a plain value, got .*oc\.env"):
        check_trusted({"root": "${oc.env:HOME}"}, "data", [], "config.yaml")
    assert KNOWN


def test_a_run_to_resume_says_neither_whom_to_trust_nor_what_hydra_does(tmp_path: Path) -> None:
    words = ["trust=[os]", "hydra.searchpath=[x]", "seed=3", "data.root=${oc.env:HOME}"]
    (tmp_path / "overrides.yaml").write_text(json.dumps({"overrides": words, "choices": {}}))
    with pytest.raises(ValueError, match=r"data\.root must be given again"):
        with_resume([f"resume={tmp_path}"])
    words = with_resume([f"resume={tmp_path}", "data.root=here"])
    assert "seed=3" in words
    assert not any("trust" in word or "searchpath" in word for word in words)


def test_resume_of_own_code_asks_for_trust(tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["data=folder", f"data.root={tiny_root}", "logger=none", "dashboard=null", "~model"]
    own = ["+model._target_=tests.federations.tiny_model", f"hydra.run.dir={tmp_path / 'run'}"]
    assert call("train", *where, *own, "loop.rounds=1") == 0
    assert call("train", f"resume={tmp_path / 'run'}", "loop.rounds=2") == 1
    assert "model._target_ must name code of a known package" in capsys.readouterr().err
    assert call("train", f"resume={tmp_path / 'run'}", "loop.rounds=2", "trust=[tests]") == 0
