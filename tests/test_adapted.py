"""A LightningModule and a LightningDataModule as they are."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from fl_lightning.adapted import AdaptedModule
from fl_lightning.aggregators import Aggregator
from fl_lightning.callbacks.proximal_penalty import ProximalPenalty
from fl_lightning.client import Client
from fl_lightning.cohort import Cohort
from fl_lightning.data.module_data import DataModules, pair_of
from fl_lightning.executors import SerialExecutor
from fl_lightning.fit.local import LocalTraining
from fl_lightning.loop import FederatedLoop
from fl_lightning.models.export import export_state_dict, read_global_model
from fl_lightning.personalization import run as personalize
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import assemble, run
from fl_lightning.seeding import derive_seed, global_seed
from fl_lightning.sharing import Sharing
from fl_lightning.task import Regression
from tests.own import Data, Lit, NoLoss, Tensors, hospitals

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "enable_checkpointing": False,
}
WORDS = ["data=modules", "+data.clients._target_=tests.own.hospitals", "logger=none", "dashboard=null"]


def loop_of(engine: Any = "auto", **callbacks: Any) -> FederatedLoop:
    trainer = partial(Trainer, accelerator="cpu", max_epochs=3)
    local = LocalTraining(trainer, partial(torch.optim.SGD, lr=0.1), engine=engine)
    return FederatedLoop(1, 7, Cohort(), Sharing(), local, Aggregator(), SerialExecutor(), callbacks)


@pytest.mark.parametrize("kind", [Lit, Tensors])
def test_one_client_has_the_bits_of_plain_lightning(kind: type[LightningModule]) -> None:
    torch.manual_seed(0)
    mine = kind()
    data = Data()
    plain_module = copy.deepcopy(mine)
    with global_seed(derive_seed(7, "fit", 0, 0), torch.device("cpu")):
        trainer = Trainer(accelerator="cpu", max_epochs=3, limit_val_batches=0, **QUIET)
        trainer.fit(plain_module, datamodule=Data())
    federation = DataModules([data])
    module = AdaptedModule(mine, "fc" if kind is Lit else "net.2", Regression())
    state = loop_of().fit(module, [Client(0, federation.clients[0])])
    expected = plain_module.state_dict()
    found = export_state_dict(state, module.head_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert getattr(mine, "epochs_seen", 3) == getattr(plain_module, "epochs_seen", 3) == 3


def test_names_forward_and_features() -> None:
    mine = Lit().eval()
    module = AdaptedModule(mine, "fc")
    x = torch.randn(4, 3)
    assert [name for name in module.state_dict() if name.startswith("head.")] == ["head.weight", "head.bias"]
    assert len(module.state_dict()) == len(mine.state_dict())
    torch.testing.assert_close(module(x), mine(x))
    torch.testing.assert_close(module.features(x), mine.backbone(x))
    torch.testing.assert_close(module.head(module.features(x)), mine(x))
    module.train()
    assert mine.training
    assert mine.fc.training
    module.backbone.eval()
    assert not mine.training  # the whole without its head is the whole
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.head.weight.zero_()
        assert float(twin.whole.fc.weight.abs().sum()) == 0 < float(mine.fc.weight.abs().sum())


def test_a_callback_of_the_federation_acts_on_it() -> None:
    torch.manual_seed(0)
    start = Tensors()
    clients = DataModules([Data()]).clients
    ends = []
    for mu in (0.0, 5.0):
        module = AdaptedModule(copy.deepcopy(start), task=Regression())
        state = loop_of(proximal=ProximalPenalty(mu)).fit(module, [Client(0, clients[0])])
        moved = export_state_dict(state, "")
        ends.append(sum(float((moved[name] - tensor).norm()) for name, tensor in start.state_dict().items()))
    assert ends[1] < 0.7 * ends[0]


def config(*words: str) -> Any:
    return composed("train", [*WORDS, *words])


def test_from_yaml(tmp_path: Path) -> None:
    results = run(config("module._target_=tests.own.Lit", "+module.head=fc", "loop.rounds=2"), tmp_path)
    assert results["metric"] == "rmse"
    assert [entry["name"] for entry in results["clients"]] == ["north", "south", "west"]
    assert results["global"]["mean"] == results["metrics"]["global"]["rmse"]["mean"] < 3
    weights = torch.load(tmp_path / "global_model.pt", weights_only=True)
    Lit().load_state_dict(weights)  # it is the user's own model's, by its own names
    module = AdaptedModule(Lit(), "fc")
    again = read_global_model(tmp_path, "fc", module.state_dict())
    assert again.keys() == module.state_dict().keys()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["module._target_=tests.own.NoLoss"], "NoLoss.training_step must return a loss, .* got NoneType"),
        (["module._target_=tests.own.Lit", "+module.head=backbone"], "module.head must be the part whose output"),
        (["module._target_=tests.own.Lit", "+module.head=fs"], "module.head must be the path of a part, .*fc"),
        (["module._target_=tests.own.Lit", "+module.widht=3"], "module.widht: .* no such argument; did you mean width"),
        (
            ["module._target_=tests.own.Lit", "module.label_smoothing=0.1"],
            "module.label_smoothing: .* no such argument",
        ),
        (["module._target_=tests.own.Tensors", "method=fedper"], "'head' fits no tensor"),
        (
            ["module._target_=tests.own.Lit", "method=fedproto"],
            "module.others: .* needs the module of the method: choose",
        ),
        (["module._target_=tests.own.Lit", "method=moon"], "keeps to itself; choose another method"),
        (["module._target_=tests.own.Lit", "aggregator.weights=entropy"], "weights must be examples or uniform where"),
        (["model=mlp", "method=fml"], "task must be classification for method=fml, .* got regression"),
        (
            ["model=mlp", "method=fedftha", "callbacks.heads.average=class_wise"],
            "average must be uniform under task=reg",
        ),
        (["model=mlp", "task=regression", "task.loss=hubert"], "task.loss must be one of mse, mae, huber"),
        (
            ["module._target_=tests.own.Lit", "+evaluation.metrics=[r2,f1]"],
            "evaluation.metrics.f1 must be .* one of rmse",
        ),
        (["module._target_=tests.own.Plateau"], "which is not available.*; a fit validates with local.validate=true"),
        (["module._target_=tests.own.Lit", "task=classification"], "task=classification takes one whole number"),
        (["module._target_=tests.own.Lit", "evaluation.metric=accuracy"], "evaluation.metric must be one of rmse"),
    ],
)
def test_it_is_refused_before_the_first_round(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        assemble(plain(config(*words)), RunFolder(tmp_path)).fit()
    assert not (tmp_path / "metrics.csv").exists()


def test_a_data_module_without_a_test_loader_trains_and_is_not_scored(caplog: Any) -> None:
    federation = DataModules({"a": Data(0), "b": Data(1, tested=False)})
    assert "client b has no test data: it trains, but has no test score" in caplog.text
    assert [client.num_test for client in federation.clients] == [10, 0]
    assert [client.num_train for client in federation.clients] == [30, 30]


def test_data_modules_that_do_not_go_together() -> None:
    def with_classes(number: int) -> Data:
        data = Data()
        data.num_classes = number  # type: ignore[attr-defined]
        return data

    with pytest.raises(ValueError, match="must have the same num_classes, got 3 at a, 4 at b"):
        DataModules({"a": with_classes(3), "b": with_classes(4)})
    with pytest.raises(ValueError, match="client a: Data makes no batches: num_samples should be a positive"):
        DataModules({"a": Data(number=0)})
    with pytest.raises(ValueError, match="data.clients must be a list of LightningDataModules, .* got Data"):
        DataModules(Data())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data.clients.b must be a LightningDataModule, got int"):
        DataModules({"a": Data(), "b": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="data.unseen_clients must name clients"):
        DataModules(hospitals(), ["east"])


def test_a_module_without_a_loss_is_tried_on_a_copy() -> None:
    module = AdaptedModule(NoLoss())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"training_step must return a loss"):
        module.try_step((torch.randn(4, 3), torch.randn(4, 1)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_schedule_may_follow_what_validation_logs(tmp_path: Path) -> None:
    results = run(config("module._target_=tests.own.Plateau", "loop.rounds=1", "local.validate=true"), tmp_path)
    assert results["global"]["mean"] < 3


def test_what_stands_beside_inputs_and_targets_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"must be a pair .* got tuple of 3; .* in a dict or in the inputs"):
        pair_of((x, x, torch.ones(4)))
    (inputs, weights), targets = pair_of(((x, torch.ones(4)), x[:, :1]))
    assert inputs is x
    assert weights.shape == targets[:, 0].shape


class Logs(Lit):
    """Logs in its own steps the mean square of a batch, and a second number."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_square", (self(x) - y).square().mean(), on_epoch=True)

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log_dict({"val_square": (self(x) - y).square().mean(), "other": 1})


LOGGED = "{_target_: fl_lightning.evaluation.predict.Logged, name: test_square, val: VAL, mode: min}"
LISTED = f"+evaluation.metrics={{square: {LOGGED}, rmse: rmse}}"


def test_what_the_module_s_own_steps_log_is_a_metric(tmp_path: Path) -> None:
    words = [*WORDS, "module._target_=tests.test_adapted.Logs", "+module.head=fc", "loop.rounds=2"]
    words += [LISTED.replace("VAL", "val_square"), "evaluation.metric=square"]
    results = run(composed("train", words), tmp_path)
    # Of two batches of 8 and 2 it is the mean over examples, whose root the task forms, too.
    for client in results["clients"]:
        assert client["metrics"]["global"]["square"] == pytest.approx(
            client["metrics"]["global"]["rmse"] ** 2, rel=1e-5
        )
    assert results["validation"]["global"]["mode"] == "min"
    words = [f"checkpoint={tmp_path}", "personalization=[ft]", "epochs=1", "executor=serial", "logger=none"]
    tuned = personalize(composed("personalize", [*words, "trust=[tests]", "figures=false"]), tmp_path / "tuned")
    assert tuned["metric"] == "square"
    assert tuned["methods"]["none"]["local"] == pytest.approx(results["global"]["mean"], rel=1e-5)
    assert "square is a metric of your own" in (tmp_path / "tuned" / "table.md").read_text()


@pytest.mark.parametrize(
    ("module", "val", "words"),
    [
        ("Logs", "nothing", "val steps must log 'nothing', got val_square, other"),
        ("Lit", "x", "must have a validation_step"),
    ],
)
def test_a_metric_that_nobody_logs_is_named_before_the_first_round(
    module: str, val: str, words: str, tmp_path: Path
) -> None:
    place = "test_adapted" if module == "Logs" else "own"
    given = [*WORDS, f"module._target_=tests.{place}.{module}", LISTED.replace("VAL", val), "evaluation.metric=square"]
    with pytest.raises(ValueError, match=f"metrics.square must be logged by the module's own steps.*{words}"):
        run(composed("train", given), tmp_path)
