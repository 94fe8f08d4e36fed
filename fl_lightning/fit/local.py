"""One client's fit with a Lightning Trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch import Tensor

from fl_lightning.callback import FederatedCallback, Stage
from fl_lightning.checks import one_of
from fl_lightning.client import Broadcast, Client, Exam, Fit, Scores, Update
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.fit.lean import LeanFit, needs_logging, why_not
from fl_lightning.fit.options import PRECISIONS, Engine, Interval, NotCoveredError, check_optimizer, check_trainer
from fl_lightning.fit.stock import QUIET, FitLogger, quiet_warnings, silence_lightning
from fl_lightning.fit.tensors import ModuleTensors, PlainAttributes
from fl_lightning.module import FitContext, MakeOptimizer
from fl_lightning.seeding import derive_seed, global_seed
from fl_lightning.sharing import Sharing
from fl_lightning.state import DeviceCopy, State, checksum, overwrite, pack, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fl_lightning.data.client_data import ClientData
    from fl_lightning.module import FederatedModule

log = logging.getLogger(__name__)


class FitPlan:
    """How often a client is fitted, and what becomes of the fits: once, and what comes out."""

    needs_validation = False
    """Whether every client must have validation data."""

    def check(self, module: FederatedModule) -> None:
        """Called once before any training: raise here for what cannot work."""

    def fit(self, local: LocalTraining, client: Client, broadcast: Broadcast) -> Fit:
        """Train on one client, by :meth:`LocalTraining.fit_once` as often as it takes."""
        return local.fit_once(client, broadcast)


class LocalTraining:
    """Trains the model on one client: load, ``Trainer.fit``, take out what was learned.

    Args:
        trainer: Makes a Lightning Trainer; epochs, precision, clipping and accumulation are set there.
        optimizer: Makes the optimizer of one fit from the parameters.
        scheduler: Makes a learning-rate scheduler from that optimizer; None: constant.
        plan: How often a client is fitted, and what becomes of the fits; None: once.
        validate: Whether every fit also runs the client's validation data, for callbacks that monitor it.
        engine: What runs the loop; the result is the same to the bit. ``stock``: Lightning's own ``Trainer.fit``, with
            a new Trainer for every fit. ``lean``: :class:`~fl_lightning.fit.lean.LeanFit`, about as fast as a bare
            loop, which refuses what it does not cover. ``auto``: lean where everything in use is covered, else stock,
            with one line in the log that says why.
        channels_last: Whether convolutions keep images with their channels innermost, as tensor cores and many CPUs
            like it. The result differs in the last bits.
        scheduler_interval: Whether the scheduler steps after every ``epoch`` or after every ``step`` of the optimizer.
    """

    def __init__(
        self,
        trainer: Callable[..., Trainer],
        optimizer: MakeOptimizer,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        plan: FitPlan | None = None,
        validate: bool = False,
        engine: Engine = "auto",
        channels_last: bool = False,
        scheduler_interval: Interval = "epoch",
    ) -> None:
        one_of("engine", engine, Engine)
        one_of("scheduler_interval", scheduler_interval, Interval)
        check_trainer(getattr(trainer, "keywords", {}))
        self.trainer = trainer
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.plan = plan or FitPlan()
        self.validate = validate
        self.engine = engine
        self.channels_last = channels_last
        self.batch_size: int | None = None
        """In the place of that of the clients' data, for all fits."""
        self.scheduler_interval = scheduler_interval
        self._lean: LeanFit | None = None
        self._needs_stock = ""
        self.callbacks: list[Callback] = []
        self.folder: Path | None = None
        self.stage = ""
        self.stages: dict[str, LocalTraining] = {}
        self.metrics = Metrics()
        self.keeps_updates = False  # whether updates stay where they were trained, for only a mean is taken of them
        self._scored: tuple[State, list[int]] | None = None  # the model that was scored last, as it was loaded

    def setup(self, module: FederatedModule, sharing: Sharing, callbacks: Sequence[Callback], seed: int) -> None:
        """Learn what stays the same over all fits, and check what can be checked before the first.

        Args:
            module: The model, with its initial values; it serves all clients, one after another.
            sharing: Which tensors travel.
            callbacks: Federated callbacks, and Lightning callbacks of which each fit gets a copy.
            seed: The seed of the run.

        Raises:
            ValueError: If a callback monitors validation data and ``validate`` is off, or finds that it cannot work; if
                the Trainer's precision is none of :data:`PRECISIONS`; if optimizer or scheduler refuse an argument.
        """
        self.module = module
        self.sharing = sharing
        self.callbacks = list(callbacks)
        self.seed = seed
        self.tensors = ModuleTensors(module)
        # Of what nobody ever writes to, the module's own tensors are the initial values: there is one copy of a base.
        own, base = self.tensors(), sharing.base_names(module)
        copied = snapshot(own, [name for name in own if name not in base])
        self.initial = {name: own[name].detach() if name in base else copied[name] for name in own}
        self._checksums = {name: checksum(own[name]) for name in base}
        self._fixed: dict[str, tuple[Tensor, int]] = {}
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if not self.validate and isinstance(monitor, str) and monitor.startswith("val"):
                raise ValueError(
                    f"{type(callback).__name__} monitors {monitor!r}, but no validation runs within a fit; "
                    "set local.validate=true"
                )
            if isinstance(callback, ProgressBar):
                raise ValueError(
                    f"callbacks must hold no {type(callback).__name__}: a fit shows no bar; set progress.enabled"
                )
        silence_lightning()
        trainer = self._new_trainer([])
        self.device = trainer.strategy.root_device
        self.precision = str(trainer.precision)
        self.sent = DeviceCopy(self.device)  # what came down last: the model of the round, for all its clients
        if trainer.num_devices != 1:
            raise ValueError(
                f"a fit runs on one device, but the trainer asks for {trainer.num_devices}; set trainer.devices=1, and "
                "for several GPUs executor=processes executor.workers=N"
            )
        if trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={trainer.precision} would change the type of the weights, which travel and are "
                f"averaged; expected one of {', '.join(PRECISIONS)}"
            )
        self.check_optimizer(module)
        self.plan.check(module)
        for callback in self.federated_callbacks:
            callback.check(module, trainer)
            if (stage := callback.stage()) is not None:
                self.stages[callback.name] = self._stage(callback.name, stage)

    def check_optimizer(self, module: FederatedModule) -> None:
        """Try out optimizer and scheduler on a model's parameters."""
        check_optimizer(self._context(), module.trained_parameters())

    def _stage(self, name: str, stage: Stage) -> LocalTraining:
        """Make a training of another length and with other callbacks; all else is as in the rounds."""
        length = {"max_epochs": stage.epochs or -1, "max_steps": stage.steps or -1}
        make = self.trainer
        # Hydra's partial is a subclass, which does not merge with another: the call is written out.
        func, args, known = (make.func, make.args, make.keywords) if isinstance(make, partial) else (make, (), {})
        training = copy.copy(self)
        training.trainer = partial(func, *args, **{**known, **length})
        training.plan = FitPlan()
        training.stage, training.stages = name, {}
        training._lean, training._needs_stock = None, ""
        for key, callback in stage.callbacks.items():
            if isinstance(callback, FederatedCallback):
                callback.name = f"{name}.{key}"
        sharing = Sharing(shared=(), merged=self.sharing.merged)
        seed = derive_seed(self.seed, "stage", name)
        training.setup(self.module, sharing, list(stage.callbacks.values()), seed)
        return training

    def _context(self, **changes: Any) -> FitContext:
        """Return the context of a new fit."""
        context = FitContext(self.optimizer, self.scheduler, self.scheduler_interval, self.stage)
        return replace(context, **changes)

    @property
    def federated_callbacks(self) -> list[FederatedCallback]:
        """The callbacks that live for the whole federation."""
        return [callback for callback in self.callbacks if isinstance(callback, FederatedCallback)]

    def client_state(self, client: Client, shared: State) -> State:
        """Return every tensor of the model as a client sees it: shared, its own, and the initial ones for the rest."""
        return {**self.initial, **client.personal, **shared}

    def answer(self, client: Client, message: Broadcast | Exam) -> Fit | Scores:
        """Return what a client answers to a message: a fit, or the scores of an exam."""
        return self.score(client, message) if isinstance(message, Exam) else self.fit(client, message)

    def score(self, client: Client, exam: Exam, owner: Client | None = None) -> Scores:
        """Score a model on a client's data; see :class:`~fl_lightning.client.Exam`.

        Args:
            client: Whose data.
            exam: The model and the split.
            owner: Whose personal model it is, where that is not this client; its data may weigh parts of the model.
        """
        own: State = {}
        if exam.personal:
            own = client.models[exam.stage] if exam.stage else client.personal
        # Many clients in a row are scored with one model: it is loaded once.
        tensors = self.tensors()
        known, versions = self._scored or (None, [])
        if own or known is not exam.state or versions != [tensor._version for tensor in tensors.values()]:
            self._load({**self.initial, **own, **exam.state})
        self._scored = None if own else (exam.state, [tensor._version for tensor in tensors.values()])
        self.module.for_client(owner or client)
        self.module.to(self.device)
        forward = self.module.personal_forward if exam.personal else self.module
        values, totals, confusion = self.metrics.score(forward, client.data, exam.split, exam.metrics, exam.confusion)
        number = getattr(client.data, f"num_{exam.split}")
        model = snapshot(self.tensors()) if exam.fetch else None
        return Scores(client.id, number, values, totals, confusion, model)

    def fit(self, client: Client, broadcast: Broadcast) -> Fit:
        """Train on one client, as often as the plan says.

        Args:
            client: The client; it is not changed.
            broadcast: What the server sent to it.

        Returns:
            The update, and what the client keeps.
        """
        if broadcast.stage:
            whole = replace(client, personal=self.client_state(client, broadcast.state))
            fit = self.stages[broadcast.stage].fit(whole, Broadcast(broadcast.round, {}, here=broadcast.here))
            return replace(fit, stage=broadcast.stage)
        if broadcast.request:
            return self._reply(client, broadcast)
        return self.plan.fit(self, client, broadcast) if broadcast.train else self.fit_once(client, broadcast)

    def fit_once(
        self,
        client: Client,
        broadcast: Broadcast,
        *,
        seed: int | None = None,
        optimizer: MakeOptimizer | None = None,
        batch_size: int | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Fit:
        """Fit once. Arguments after the first two are of this fit alone.

        Args:
            client: The client; it is not changed.
            broadcast: What the server sent to it.
            seed: In the place of the run's.
            optimizer: In the place of the run's.
            batch_size: In the place of the data's.
            settings: Values of the module in the place of its own (see :class:`FitContext`).
            callbacks: More callbacks, behind the others.
        """
        client = replace(client, data=self.sized(client.data, batch_size))
        seed = self.seed if seed is None else seed
        callbacks = [*self.callbacks, *callbacks]
        changes = {"optimizer": optimizer or self.optimizer, "settings": settings or {}}
        before = PlainAttributes(self.module.whole) if self.engine == "auto" and not self._needs_stock else None
        try:
            return self._fit(client, broadcast, seed, callbacks, self._context(**changes))
        except NotCoveredError as reason:
            self._use_stock(str(reason))
        # Nothing of the attempt is left: a fit changes neither client nor message, and starts by loading the model.
        if before is not None:
            before.restore()
        return self._fit(client, broadcast, seed, callbacks, self._context(**changes))

    def sized(self, data: ClientData, batch_size: int | None = None) -> ClientData:
        """Return a client's data in the batches of these fits."""
        batch_size = batch_size or self.batch_size
        if batch_size is None or batch_size == data.batch_size:
            return data
        data = copy.copy(data)
        data.batch_size = batch_size
        return data

    def _fit(
        self, client: Client, broadcast: Broadcast, seed: int, callbacks: Sequence[Callback], context: FitContext
    ) -> Fit:
        module = self.module
        federated = [callback for callback in callbacks if isinstance(callback, FederatedCallback)]
        client = replace(client, memory=dict(client.memory))
        versions = _versions(broadcast)
        module.context = context
        try:
            with self._layout(), global_seed(derive_seed(seed, "fit", broadcast.round, client.id), self.device):
                self._load(self._near(self.start(client, broadcast, seed), broadcast.state))
                module.for_client(client)
                with self.sharing.prepared(module):
                    for callback in federated:
                        callback.on_client_start(client, module, broadcast)
                    metrics = self._train(client, broadcast, callbacks) if broadcast.train else {}
                fit = self.finish(client, broadcast, self.tensors(), metrics, federated)
        finally:
            module.context = FitContext()
        if any(tensor._version != version for _, tensor, version in versions):
            written = ", ".join([name for name, tensor, version in versions if tensor._version != version][:4])
            raise ValueError(
                f"client {client.name}: {written} of the broadcast was written to, which other clients read too; "
                "clone a tensor before changing it"
            )
        return fit

    def _reply(self, client: Client, broadcast: Broadcast) -> Fit:
        """Let the callback that asked answer, with the client's model loaded; nothing is left behind."""
        self._load(self.client_state(client, broadcast.state))
        self.module.for_client(client)
        self.module.to(self.device)
        [asked] = [callback for callback in self.federated_callbacks if callback.name == broadcast.request]
        with global_seed(derive_seed(self.seed, "request", broadcast.round, client.id), self.device):
            answer = asked.on_request(client, self.module, broadcast)
        update = Update(client.id, client.num_examples, {}, extra=snapshot(answer))
        return Fit(update, client.personal, client.memory)

    def _load(self, state: State) -> None:
        """Write a state into the model; fixed tensors that nobody wrote to since the last time are left alone."""
        own, fixed = self.tensors(), self.sharing.fixed_names(self.module)
        # A model of a stage may have other values of what is fixed in the rounds.
        still = {n for n in fixed if self._is_still(n, own[n]) and state.get(n) is self.initial[n]}
        overwrite({k: v for k, v in own.items() if k not in still}, {k: v for k, v in state.items() if k not in still})
        initial = [name for name in fixed if state.get(name) is self.initial[name]]
        self._fixed = {name: (own[name], own[name]._version) for name in initial}

    def _near(self, state: State, sent: State) -> State:
        """Put what came down where the module is: it is carried to an accelerator once, for all clients."""
        if self.module.device.type == "cpu":
            return state
        near = self.sent(sent)
        return {name: near[name] if tensor is sent.get(name) else tensor for name, tensor in state.items()}

    def _is_still(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor is the one that was loaded last, and was not written to since."""
        known, version = self._fixed.get(name, (None, 0))
        return known is tensor and version == tensor._version

    @property
    def base_checksum(self) -> int:
        """A number that tells the weights that nobody trains from others; 0 where there are none."""
        return sum(self._checksums.values())

    def _differs(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a fixed tensor has other values than at the start."""
        if name in self._checksums:
            return checksum(tensor) != self._checksums[name]
        return not torch.equal(tensor.to("cpu"), self.initial[name])

    @contextmanager
    def _layout(self) -> Iterator[None]:
        """Lay the weights out as asked for, for one fit: what comes after must not depend on what was before."""
        if not self.channels_last:
            yield
            return
        # Convolutions follow their weights: what comes into the first one is turned there, once.
        self.module.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            self.module.to(memory_format=torch.contiguous_format)

    def start(self, client: Client, broadcast: Broadcast, seed: int | None = None) -> State:
        """Return all tensors of the model where a fit starts, and fix the order of its batches."""
        if unknown := broadcast.state.keys() - self.initial.keys():
            raise ValueError(f"client {client.name}: the model has no tensor {', '.join(sorted(unknown)[:4])}")
        seed = self.seed if seed is None else seed
        client.data.seed(derive_seed(seed, "batches", broadcast.round, client.id))
        state = {**broadcast.state, **{name: t for name, t in broadcast.here.items() if name in self.initial}}
        for callback in self.federated_callbacks:
            state = callback.on_download(client, state)
        return self.client_state(client, state)

    def finish(
        self,
        client: Client,
        broadcast: Broadcast,
        own: State,
        metrics: dict[str, float],
        callbacks: Sequence[FederatedCallback] | None = None,
    ) -> Fit:
        """Divide all tensors of the model after a fit into what is sent and what stays.

        Args:
            client: The client.
            broadcast: What came down; its tensors are those that are shared.
            own: All tensors of the model.
            metrics: What the fit logged.
            callbacks: Those of this fit; None: those of every fit.

        Raises:
            ValueError: If the fit changed a tensor declared as fixed.
        """
        shared, here = list(broadcast.state), [name for name in broadcast.here if name in own]
        take = pack if self.keeps_updates else snapshot
        update = Update(client.id, client.num_examples, take(own, shared), here=snapshot(own, here))
        update.metrics = metrics
        callbacks = self.federated_callbacks if callbacks is None else callbacks
        for callback in callbacks:
            callback.on_client_end(client, self.module, update)
            if unknown := update.state.keys() - {*shared, *here}:
                raise ValueError(
                    f"callbacks.{callback.name} put {', '.join(sorted(unknown)[:4])} into update.state, which takes "
                    "the model's shared tensors alone; for anything else there is update.extra"
                )
        for callback in callbacks:
            callback.on_upload(client, self.module, update)
        fixed = self.sharing.fixed_names(self.module)
        for name in fixed:
            if not self._is_still(name, own[name]) and self._differs(name, own[name]):
                raise ValueError(f"{name} is declared as sharing.fixed, but the fit changed it; freeze it")
        elsewhere = fixed.union(shared, here, self.module.idle)
        return Fit(update, snapshot(own, [name for name in own if name not in elsewhere]), client.memory)

    def _train(self, client: Client, broadcast: Broadcast, callbacks: Sequence[Callback]) -> dict[str, float]:
        module = self.module
        callbacks = [
            callback if isinstance(callback, FederatedCallback) else copy.deepcopy(callback) for callback in callbacks
        ]
        # Since Lightning 2.2 `fit` no longer does this, and an evaluation may have left the module in eval mode.
        self.tensors.train()
        prefix = f"{self.stage}_" if self.stage else ""
        logger = FitLogger(self.folder, f"{prefix}round_{broadcast.round}_client_{client.id}")
        lean = self._lean_fit(module, callbacks)
        seen = [module.seen_by(one) if isinstance(one, FederatedCallback) else one for one in callbacks]
        with module.fitting():
            if lean is not None:
                lean.fit(module.whole, client.data, seen, logger)
            else:
                module.context.logs_loss = needs_logging(callbacks)
                trainer = self._new_trainer(seen, logger)
                with quiet_warnings():
                    trainer.fit(module.whole, datamodule=client.data)
        metrics = dict(logger.metrics)
        if module.context.losses:
            metrics["train_loss"] = torch.stack(module.context.losses).mean().item()
        return metrics

    def _lean_fit(self, module: FederatedModule, callbacks: Sequence[Callback]) -> LeanFit | None:
        """Return what runs the lean fit, or None where Lightning's own loop is to be taken."""
        if self.engine == "stock" or self._needs_stock:
            return None
        reason = why_not(self.trainer, module.whole, callbacks, self.validate)
        if reason is None and self._lean is None:
            assert isinstance(self.trainer, partial)  # `why_not` made sure
            try:
                self._lean = LeanFit(self.trainer, {**QUIET, **self._options(callbacks)}, self.tensors)
            except NotCoveredError as error:
                reason = str(error)
        if reason is not None:
            self._use_stock(reason)
            return None
        return self._lean

    def _use_stock(self, reason: str) -> None:
        if self.engine == "lean":
            raise ValueError(f"local.engine=lean cannot run this fit, because {reason}; set local.engine=auto")
        self._needs_stock = reason
        log.info("fits run in Lightning's own loop, because %s: the same result, but slower for small clients", reason)

    def _new_trainer(self, callbacks: Sequence[Callback], logger: FitLogger | None = None) -> Trainer:
        return self.trainer(callbacks=list(callbacks), logger=logger or False, **self._options(callbacks), **QUIET)

    def _options(self, callbacks: Sequence[Callback]) -> dict[str, Any]:
        return {
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
            "log_every_n_steps": 1,
            **self._place(),
            **({} if self.validate else {"limit_val_batches": 0}),
        }

    def _place(self) -> dict[str, Any]:
        """Keep a Trainer from what it does in a job of Slurm.

        It would save a client's fit in the working folder when the job is about to end, and load that into every later
        fit of whatever run.
        """
        given = getattr(self.trainer, "keywords", {})
        place: dict[str, Any] = {}
        if not given.get("plugins") and given.get("strategy") in (None, "auto"):
            place["plugins"] = LightningEnvironment()
        if self.folder is not None and not given.get("default_root_dir"):
            place["default_root_dir"] = str(self.folder / "fits")
        return place

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer does not travel to another process; one is made there.
        own = {name: tensor for name, tensor in self.initial.items() if name not in self._checksums}
        sent = DeviceCopy(self.device)
        return {**self.__dict__, "_scored": None, "_lean": None, "_fixed": {}, "sent": sent, "initial": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "tensors" in state:
            base = self.tensors()
            self.initial = {name: self.initial[name] if name in self.initial else base[name].detach() for name in base}


def _versions(broadcast: Broadcast) -> list[tuple[str, Tensor, int]]:
    """The tensors of a message, and how often each was written to."""
    return [
        (name, tensor, tensor._version) for part in (broadcast.state, broadcast.extra) for name, tensor in part.items()
    ]
