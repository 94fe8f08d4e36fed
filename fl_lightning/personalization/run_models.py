"""The personal models of a run of ``train.py``, formed anew from its last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fl_lightning.callbacks.checkpoint import read_checkpoint
from fl_lightning.callbacks.federated_evaluation import FederatedEvaluation
from fl_lightning.client import Client, ClientInfo, Exam
from fl_lightning.data.federated_data import FederatedData
from fl_lightning.data.partition import Partition
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.evaluation.results import read_json
from fl_lightning.executors import SerialExecutor
from fl_lightning.executors.executor import Executor, Outcome, Task
from fl_lightning.loop import FederatedLoop
from fl_lightning.module import FederatedModule
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.training import build_loop, fitting_module
from fl_lightning.run.trust import check_trusted
from fl_lightning.state import State

SPLIT = "fl_lightning.split.executor.SplitExecutor"
AT_SITES = "fl_lightning.sites.executor.SitesExecutor"

MADE = (
    *("model", "module", "task", "optimizer", "scheduler", "trainer", "sharing", "local", "cohort", "aggregator"),
    *("loop", "evaluation", "callbacks"),
)
"""What of a run's configuration is made anew for its personal models."""


def path_of(thing: object) -> str:
    """Return the path of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def keeps_personal_models(run: RunFolder) -> bool:
    """Tell whether a finished run has personal models, as its results say."""
    if not run.results.is_file():
        raise FileNotFoundError(f"{run.path} has not ended; continue it with python train.py resume={run.path}")
    return read_json(run.results).get("personal") is not None


class RunModels:
    """The personal models that a finished run kept: those of the round that validation chose.

    They are formed as ``train.py resume=`` would form them: what clients hold comes from the checkpoint, and training
    after the rounds is done again, to the same bits. The models live in the run's own module, whose
    ``personal_forward`` they are; :meth:`run` answers exams by them, in this process. Of a run at sites each stays
    there: its site takes up what it held at the checkpoint, and scores it on its own data alone.

    Args:
        run: The run folder.
        config: Its configuration, plain.
        data: Its clients.
        trust: Packages of one's own that the configuration may name.
        executor: The way to the sites that the run was trained at; None: there is none.

    Attributes:
        stay: Whether they stay at sites.

    Raises:
        FileNotFoundError: If the run keeps no checkpoint.
        ValueError: If the run has no personal models, was trained at sites to which there is no way, or is of another
            partition.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        data: FederatedData,
        trust: Sequence[str] = (),
        executor: Executor | None = None,
    ) -> None:
        self.path = run.path
        self.method = str(config["method"]["name"])
        self.name = self.method
        self._run = run
        self._config = config
        self.data = data
        self.data_config = config["data"]
        if not keeps_personal_models(run):
            raise ValueError(
                f"{run.path} has no personal models (method={self.method}); give it as checkpoint=, or leave it out"
            )
        self.stay = config["executor"]["_target_"] == AT_SITES
        self._executor = executor
        if self.stay and (executor is None or path_of(executor) != AT_SITES):
            raise ValueError(
                f"{run.path} was trained at sites, which keep their personal models; set executor=sites with the same "
                "sites, or leave it out"
            )
        if self.stay and "server" in config["callbacks"]:
            raise ValueError(
                f"{run.path} is of a model in parts (method={self.method}), of which a site holds some; leave it out"
            )
        if not run.last.is_file():
            raise FileNotFoundError(
                f"{run.path} keeps no checkpoint, which its personal models are read from; train without "
                "checkpoint=null"
            )
        data.partition.check_equal(Partition.load(run.partition))
        for key in MADE:
            check_trusted(config.get(key), key, trust, str(run.config))

    @contextmanager
    def open(self, scored: Mapping[str, Any] | None = None) -> Iterator[RunModels]:
        """Form the models, for as long as the context lasts.

        Args:
            scored: At sites: what of a recipe says by what models are measured.
        """
        config = {**self._config, "resume": None, "logger": None}
        if config["executor"]["_target_"] != SPLIT:
            config["executor"] = {"_target_": f"{SerialExecutor.__module__}.{SerialExecutor.__qualname__}"}
        identity = self._run.identity(self._config, Partition.load(self._run.partition))
        content = read_checkpoint(self._run.last, identity)
        loop = build_loop(config, self._run, None)
        loop.rounds = content["round"]
        if self.stay:
            from fl_lightning.sites.executor import recipe

            assert self._executor is not None
            self._executor.recipe = {**recipe(self._config), **(scored or {})}
            loop.executor = self._executor
        self.module = fitting_module(loop, config, self.data)
        clients = [Client(one.id, one) for one in self.data.clients]
        unseen = [Client(one.id, one) for one in self.data.unseen]
        self._clients = {client.id: client for client in clients}
        with loop.open(self.module, clients, unseen, content):
            loop.run_rounds()  # none are left: callbacks get ready
            evaluation = loop.callbacks["evaluation"]
            assert isinstance(evaluation, FederatedEvaluation)
            if "personal" in evaluation.best:
                evaluation.restore(loop, "personal")
            self.loop: FederatedLoop = loop
            self.round = loop.state_round
            yield self
        if self.stay and self._executor is not None:
            self._executor.begin()

    def measured_by(self, metrics: Metrics) -> None:
        """Let exams be answered by some metrics."""
        self.loop.local.metrics = metrics

    def models(self, clients: Sequence[ClientInfo]) -> Iterator[State]:
        """Yield all tensors of the personal model of each client, by the names of the run's module; none at sites."""
        for client in clients:
            if self.stay:
                yield {}
                continue
            self._owner = self._clients[client.id]
            yield self.loop.personal_state(self._owner)

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Answer exams by the model that :meth:`models` yielded last, on any client's data."""
        for client, exam in tasks:
            assert isinstance(exam, Exam)
            if self.stay:
                own = self.loop.personal_exam(client, exam.split, metrics=exam.metrics)
                yield from self.loop.executor.run([(client, own)])
                continue
            try:
                scores = self.loop.local.score(self._clients[client.id], exam, self._owner)
            except Exception as error:
                yield Outcome(client, error=error)
            else:
                yield Outcome(client, scores=scores)

    def mean(self, module: FederatedModule) -> State:
        """Return the mean of the clients' models, weighted by training examples, by the names of a module."""
        own = module.state_dict()
        if not any(name in own and name not in module.base_names for name in self.loop.state):
            raise ValueError(
                f"checkpoint={self.path}: its clients share no part of the model that is fine-tuned "
                f"(method={self.method}), so that there is nothing to start from; give checkpoint= a run with a "
                f"global model, and beside=[{self.path}]"
            )
        infos = [one for one in self.loop.clients if one.num_train]
        total = math.fsum(one.num_train for one in infos)
        sums = {name: tensor.double() * 0 for name, tensor in own.items()}
        for info, state in zip(infos, self.models(infos), strict=True):
            for name, tensor in own.items():
                if name not in state or state[name].shape != tensor.shape:
                    raise ValueError(
                        f"checkpoint={self.path}: its clients' models have no mean, for {name} is not in all of them "
                        f"alike (method={self.method}); give checkpoint= a run with a global model, and "
                        f"beside=[{self.path}]"
                    )
                sums[name] += state[name].double() * (info.num_train / total)
        return {name: total.to(own[name].dtype) for name, total in sums.items()}
