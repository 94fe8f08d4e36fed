"""Trains many clients in one pass on one accelerator: all tensors get a leading dimension of clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.callbacks.freeze_schedule import FreezeSchedule, Phase, freeze, scale_rates
from fl_lightning.checks import at_least
from fl_lightning.client import Broadcast, Client, Exam, Fit, Scores, Update
from fl_lightning.data.batches import Batches
from fl_lightning.executors.cohort_batches import padded_steps, stack_sizes
from fl_lightning.executors.cohort_step import (
    DROPOUTS,
    NORMS,
    CohortStep,
    Inputs,
    MixingLayers,
    RecordedStep,
    Rows,
    draw_side_by_side,
    record_cuda_graph,
)
from fl_lightning.executors.executor import Message, Simulation
from fl_lightning.fit.gradients import GradientEdit
from fl_lightning.fit.local import FitPlan, LocalTraining
from fl_lightning.module import FederatedModule
from fl_lightning.seeding import derive_seed
from fl_lightning.state import DeviceCopy, Layout, Packed, State, all_finite, bring

#: Optimizers that treat every number by itself, so that those of many clients may stand side by side.
OPTIMIZERS = (SGD, Adam, AdamW, Adagrad, RMSprop)

#: Arguments of the Trainer that mean the same for one client and for many.
ARGUMENTS = ("accelerator", "benchmark", "deterministic", "devices", "max_epochs")

BF16 = "bf16-mixed"

#: Hooks that run at the server, whatever trains the clients.
SERVER_HOOKS = {
    "check",
    "global_state",
    "groups",
    "load_state_dict",
    "on_aggregate_end",
    "on_broadcast",
    "on_federation_end",
    "on_federation_start",
    "on_round_end",
    "on_round_start",
    "on_federation_close",
    "on_receive",
    "on_round_logged",
    "on_update",
    "personalizes",
    "prepare_personal",
    "results",
    "state_dict",
    "state_key",
}


@dataclass(frozen=True)
class Stretch:
    """Epochs in which the same parameters train.

    Attributes:
        epochs: How many.
        names: The parameters that train.
        phase: Of the freeze schedule, which says so; None: there is none.
    """

    epochs: int
    names: frozenset[str]
    phase: Phase | None = None


class CohortExecutor(Simulation):
    """Trains many clients in one pass over stacked parameters, by ``torch.func.vmap``.

    A step of a small network is over before an accelerator has been told of the next one; a hundred clients a step take
    hardly longer than one. The result is that of the serial executor but for the last bits of floating point: batches,
    their order, what dropout draws and the number of steps are each client's own, filled up to a common size with
    examples that count nothing. (On a GPU dropout draws what it would on a CPU.) On a CPU this is slower than
    ``executor=processes``.

    It is for methods whose client half treats every number of the model by itself: FedAvg and its relatives at the
    server, FedProx, SCAFFOLD, FedDyn, freezing. Anything else is refused.

    Args:
        clients: Clients trained at once, at least 1; bounds the memory on the device.
        graph: Whether a step is recorded once as a CUDA graph, and then launched as one for every batch. The recording
            is kept for as long as rounds have as many clients and as large batches.
    """

    def __init__(self, clients: int = 100, graph: bool = False) -> None:
        at_least("clients", clients, 1)
        self.clients_at_once = clients
        self.graph = graph

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        """Get ready."""
        super().setup(local, clients)
        reason = why_not(local)
        if reason is not None:
            raise ValueError(f"executor=cohort cannot train this, because {reason}; take executor=serial or processes")
        if self.graph:
            self._check_graph(local)
        local.module.to(local.device)
        self.layers = MixingLayers(local.module)
        self.stretches = list(stretches(local))
        learning_rates(local, self.stretches, 1)
        assert isinstance(local.trainer, partial)
        self.mixed = local.trainer.keywords.get("precision") == BF16
        self._recorded: dict[int, tuple[Any, RecordedStep]] = {}

    def _check_graph(self, local: LocalTraining) -> None:
        if local.device.type != "cuda":
            raise ValueError(
                f"executor.graph must be false without CUDA, got true on {local.device.type}; set trainer=gpu, or "
                "executor.graph=false"
            )
        optimizer = local.optimizer([nn.Parameter(torch.zeros(1))])
        [group] = optimizer.param_groups
        if "capturable" not in group and not (type(optimizer) is SGD and group["dampening"] == 0):
            raise ValueError(
                f"executor.graph must be false with this {type(optimizer).__name__}, got true; take SGD without "
                "dampening, Adam, AdamW or RMSprop"
            )

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        return record_cuda_graph(work, self.local.device)

    @override
    def keeps_updates(self, device: torch.device) -> bool:
        return True

    @override
    def _answers(self, tasks: Iterable[tuple[Client, Message]]) -> Iterator[Fit | Scores | Exception]:
        source = iter(tasks)
        while group := list(islice(source, self.clients_at_once)):
            try:
                yield from list(self._group(group))
            except Exception as error:  # the loop decides what failed clients mean
                yield from (error for _ in group)

    def _group(self, group: Sequence[tuple[Client, Message]]) -> Iterator[Fit | Scores]:
        local = self.local
        training = [(client, message) for client, message in group if isinstance(message, Broadcast) and message.train]
        done = {fit.update.client_id: fit for fit in self._fit(training)} if training else {}
        for client, message in group:
            if isinstance(message, Exam):
                yield local.score(client, message)
            else:
                yield done.get(client.id) or local.finish(client, message, local.start(client, message), {})

    def _fit(self, training: Sequence[tuple[Client, Broadcast]]) -> list[Fit]:
        """Train clients side by side, and divide what comes out into what is sent and what stays."""
        local = self.local
        training = [
            (replace(client, data=local.sized(client.data), memory=dict(client.memory)), broadcast)
            for client, broadcast in training
        ]
        # Those with the most steps first: who still trains is then always the beginning of the stack.
        training.sort(key=lambda task: -len(task[0].data.train_dataloader()))
        starts = [local.start(client, broadcast) for client, broadcast in training]
        edits = {one: [copy(one) for _ in training] for one in local.callbacks if isinstance(one, GradientEdit)}
        for own in edits.values():
            for callback, (client, broadcast) in zip(own, training, strict=True):
                callback.on_client_start(client, local.module, broadcast)
        moving = frozenset(self.layers.statistics).union(*(stretch.names for stretch in self.stretches))
        stacked, common = stack(starts, moving, local.sent)
        loaders = [client.data.train_dataloader() for client, _ in training]
        self.layers.smallest_batch = min(min(loader.sizes) for loader in loaders)
        generators = [
            torch.Generator().manual_seed(derive_seed(local.seed, "fit", broadcast.round, client.id))
            for client, broadcast in training
        ]
        rates = {number: learning_rates(local, self.stretches, number) for number in {len(one) for one in loaders}}
        total = torch.zeros(len(training), device=local.device)
        start = dict(stacked)
        for place, stretch in enumerate(self.stretches):
            numbers = [stretch.epochs * len(loader) for loader in loaders]
            layout = Layout(tuple((n, x.dtype, x.shape[1:]) for n, x in stacked.items() if n in stretch.names))
            # One tensor of all that trains, (K, n): the optimizer steps once, and a client is a row.
            [flat] = layout.join(stacked).values()
            rest = {n: x for n, x in stacked.items() if n not in stretch.names}
            rest |= {n: rest[n].clone(memory_format=torch.contiguous_format) for n in self.layers.statistics}
            held = [callback.begin_rows(own, start, layout) for callback, own in edits.items()]
            with held_still(local, stretch.phase):
                rows = Rows(flat, rest, common, held)
                own_rates = [rates[len(loader)][place] for loader in loaders]
                rows = self._run(place, stretch, loaders, generators, own_rates, layout, rows, list(edits))
            stacked = {**layout.views({flat.dtype: rows.flat}), **rows.rest}
            total += rows.total
            for (callback, own), tensors in zip(edits.items(), rows.held, strict=True):
                callback.end_rows(own, tensors, layout, numbers)
        epochs = sum(stretch.epochs for stretch in self.stretches)
        means = total / torch.tensor([epochs * len(loader) for loader in loaders], device=local.device)
        fixed = local.sharing.fixed_names(local.module)
        for name in fixed & stacked.keys():
            if not torch.equal(stacked[name], local.initial[name].to(local.device).expand_as(stacked[name])):
                raise ValueError(f"{name} is declared as sharing.fixed, but the fit changed it; freeze it")
        whole = {name: stacked[name] if name in stacked else _repeat(common[name], len(training)) for name in starts[0]}
        fits = _divide(training, whole, fixed, means, local.keeps_updates)
        for own in edits.values():
            for callback, (client, _), fit in zip(own, training, fits, strict=True):
                callback.on_client_end(client, local.module, fit.update)
                fit.memory = client.memory
        return fits

    def _run(
        self,
        place: int,
        stretch: Stretch,
        loaders: Sequence[Batches],
        generators: Sequence[torch.Generator],
        rates: Sequence[Sequence[float]],
        layout: Layout,
        rows: Rows,
        edits: Sequence[GradientEdit],
    ) -> Rows:
        """Train for some epochs.

        Args:
            place: Which stretch of the fit this is.
            stretch: How long, and what trains.
            loaders: The clients' batches, the longest first.
            generators: What each client's dropout draws from.
            rates: The learning rate of each step of each client.
            layout: How the parameters that train lie in a row.
            rows: The clients' tensors, in the same order; written to.
            edits: Edits of gradients.

        Returns:
            The tensors after it.
        """
        device, layers = self.local.device, self.layers
        sizes = stack_sizes([len(own) for own in rates])
        best = max(map(max, rates)) or 1.0
        several = any(rate != best for own in {len(own): own for own in rates}.values() for rate in own)
        partly = several or sum(sizes) > sum(map(len, rates))
        shares = torch.ones(1, 1, 1, device=device).expand(len(sizes), len(loaders), 1)
        if partly:
            table = [[rate / best for rate in own] + [0.0] * (len(sizes) - len(own)) for own in rates]
            shares = torch.tensor(table).T.unsqueeze(2).to(device)
        places: list[tuple[nn.Module, torch.Size]] | None = None
        step: CohortStep | RecordedStep | None = None
        for number, (x, y, weight) in enumerate(padded_steps(loaders, stretch.epochs, sizes, device)):
            if places is None:
                first = {n: t[0] for n, t in {**layout.views({rows.flat.dtype: rows.flat}), **rows.rest}.items()}
                places = layers.places({**first, **rows.common}, x[0])
            noise = []
            if places:
                taken = zip(loaders[: len(x)], rates, strict=False)
                lengths = [one.sizes[number % len(one)] if number < len(own) else 0 for one, own in taken]
                noise = draw_side_by_side(places, lengths, x.shape[1], generators, device)
            inputs = Inputs(x, y, weight, noise, shares[number, : len(x)])
            if step is None:
                step = self._step(place, layout, rows, edits, best, partly, inputs)
            try:
                with layers.in_place():
                    step(inputs)
            except RuntimeError as error:
                if "randomness" not in str(error):
                    raise
                raise ValueError(
                    "executor=cohort cannot train this, because the model draws random numbers outside of its dropout "
                    "layers; take executor=serial or processes"
                ) from error
        return step.step.rows if isinstance(step, RecordedStep) else rows

    def _step(
        self,
        place: int,
        layout: Layout,
        rows: Rows,
        edits: Sequence[GradientEdit],
        lr: float,
        partly: bool,
        inputs: Inputs,
    ) -> CohortStep | RecordedStep:
        """Return what takes a step: as it is written, or recorded now or in a round before."""

        def optimizer(flat: Tensor) -> Optimizer:
            made = self.local.optimizer([flat])
            for group in made.param_groups:
                group["lr"] = lr
                if self.graph and "capturable" in group:
                    group["capturable"] = True
            return made

        precision: AbstractContextManager[Any] = nullcontext()
        if self.mixed:
            # What is remembered of casts would be remembered of the recording.
            precision = torch.autocast(self.local.device.type, torch.bfloat16, cache_enabled=not self.graph)
        step = partial(CohortStep, self.layers, precision, layout, edits, optimizer, partly=partly)
        if not self.graph:
            return step(rows)
        given = [*rows.tensors().items(), *enumerate(inputs.tensors())]
        key = (layout, lr, partly, [(name, tensor.dtype, tensor.shape) for name, tensor in given])
        if self._recorded.get(place, (None,))[0] != key:
            own = Rows(rows.flat.clone(), _copies(rows.rest), _copies(rows.common), [_copies(one) for one in rows.held])
            self._recorded[place] = key, RecordedStep(step(own), inputs, self._record)
        recorded = self._recorded[place][1]
        recorded.begin(rows.tensors())
        return recorded


def _copies(state: State) -> State:
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def stack(states: Sequence[State], trained: Collection[str], sent: DeviceCopy) -> tuple[State, State]:
    """Put the tensors of several clients side by side on a device.

    Args:
        states: Every client's, of the same names.
        trained: Names of those that will differ.
        sent: Carries to the device what is one and the same for all clients, once a round.

    Returns:
        Those that train or differ, (K, ...), and those that are and stay the same for all, as they are.
    """
    names = list(states[0])
    alike = sent({n: states[0][n] for n in names if all(state[n] is states[0][n] for state in states)})
    others = [name for name in names if name not in alike]
    own = bring([torch.stack([state[name] for state in states]) for name in others], sent.device)
    stacked = dict(zip(others, own, strict=True))
    stacked.update({name: _repeat(alike[name], len(states)) for name in alike if name in trained})
    return {n: stacked[n] for n in names if n in stacked}, {n: x for n, x in alike.items() if n not in stacked}


def _repeat(tensor: Tensor, number: int) -> Tensor:
    return tensor.expand(number, *tensor.shape)


def _divide(
    training: Sequence[tuple[Client, Broadcast]],
    tensors: State,
    fixed: Collection[str],
    losses: Tensor,
    stays: bool,
) -> list[Fit]:
    """Divide all tensors of many models after a fit into what each client sends and what it keeps.

    Args:
        training: The clients, and what came down to each, whose names are those that are shared.
        tensors: All tensors of all models, (K, ...).
        fixed: Names of those that are neither sent nor kept.
        losses: The clients' mean losses, (K,).
        stays: Whether updates stay on the device: they are then rows of one tensor.

    Returns:
        What each fit leaves behind.
    """
    shared = [tuple(broadcast.state) for _, broadcast in training]
    kept = [tuple(n for n in tensors if n not in fixed and n not in names) for names in shared]
    own, _ = _rows(tensors, kept, on_host=True)
    sent, sums = _rows(tensors, shared, on_host=not stays)
    told = torch.stack([losses, sums]).tolist() if stays else [losses.tolist()]
    fits = []
    for place, (client, _) in enumerate(training):
        if stays:
            # The sum of huge numbers may overflow.
            sent[place].finite = math.isfinite(told[1][place]) or all_finite(dict(sent[place]))
        state = sent[place] if stays else {name: tensor.clone() for name, tensor in sent[place].items()}
        update = Update(client.id, client.num_examples, state, metrics={"train_loss": told[0][place]})
        personal = {name: tensor.clone() for name, tensor in own[place].items()}
        fits.append(Fit(update, personal, dict(client.memory)))
    return fits


def _rows(tensors: State, names: Sequence[tuple[str, ...]], on_host: bool) -> tuple[list[Packed], Tensor]:
    """Return some tensors of each client as a row of one tensor for all, and the sum of each row's numbers."""
    found: dict[int, Packed] = {}
    sums = torch.zeros(len(names), device=next(iter(tensors.values())).device)
    for wanted in dict.fromkeys(names):
        places = [place for place, own in enumerate(names) if own == wanted]
        where = slice(None) if len(places) == len(names) else torch.tensor(places, device=sums.device)
        layout = Layout(tuple((name, tensors[name].dtype, tensors[name].shape[1:]) for name in wanted))
        vectors = layout.join({name: tensors[name][where] for name in wanted})
        for vector in vectors.values():
            if vector.is_floating_point() and not on_host:
                sums[where] += vector.sum(1)
        if on_host:
            vectors = {dtype: vector.to("cpu") for dtype, vector in vectors.items()}
        pieces = {name: tensor.unbind() for name, tensor in layout.views(vectors).items()}
        single = {dtype: vector.unbind() for dtype, vector in vectors.items()}
        for row, place in enumerate(places):
            views = {name: pieces[name][row] for name in wanted}
            found[place] = Packed(layout, {dtype: vector[row] for dtype, vector in single.items()}, views)
    return [found[place] for place in range(len(names))], sums


def stretches(local: LocalTraining) -> Iterator[Stretch]:
    """What trains when, from the freeze schedule if there is one."""
    assert isinstance(local.trainer, partial)
    epochs = local.trainer.keywords["max_epochs"]
    schedule = next((callback for callback in local.callbacks if isinstance(callback, FreezeSchedule)), None)
    phases: Sequence[Phase | None] = [None] if schedule is None else schedule.phases
    rest = epochs - sum(phase.epochs or 0 for phase in phases if phase is not None)
    for phase in phases:
        length = rest if phase is None or phase.takes_the_rest else phase.epochs or 0
        if length:
            with held_still(local, phase):
                named = local.module.named_parameters()
                yield Stretch(length, frozenset(name for name, p in named if p.requires_grad), phase)


@contextmanager
def held_still(local: LocalTraining, phase: Phase | None) -> Iterator[None]:
    """Hold still what a phase freezes, parameters and modes, for as long as the context lasts."""
    local.tensors.train()
    if phase is None:
        yield
        return
    module = local.module
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    freeze(module, phase.train, phase.batch_norm, trainable)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_()
        module.train()


def learning_rates(local: LocalTraining, stretches: Sequence[Stretch], per_epoch: int) -> list[list[float]]:
    """Return the learning rate of each step of each stretch, for a client of so many steps an epoch."""
    optimizer = local.optimizer([nn.Parameter(torch.zeros(1))])
    [group] = optimizer.param_groups
    before = _all_but_rates(group)
    scheduler = local.scheduler(optimizer) if local.scheduler is not None else None
    found = []
    ratio = 1.0
    for stretch in stretches:
        wanted = 1.0
        if stretch.phase is not None and stretch.phase.lr is not None:
            wanted = stretch.phase.lr / optimizer.defaults["lr"]
        scale_rates([optimizer], [] if scheduler is None else [scheduler], wanted / ratio)
        ratio = wanted
        if scheduler is None:
            found.append([group["lr"]] * (stretch.epochs * per_epoch))
            continue
        own = []
        for step in range(1, stretch.epochs * per_epoch + 1):
            own.append(float(group["lr"]))
            optimizer.step()
            if local.scheduler_interval == "step" or step % per_epoch == 0:
                scheduler.step()
        found.append(own)
    if (now := _all_but_rates(group)) != before:
        names = ", ".join(name for name in now if now[name] != before.get(name))
        raise ValueError(
            f"executor=cohort cannot train this, because {type(scheduler).__name__} changes {names}; take "
            "executor=serial or processes"
        )
    return found


def _all_but_rates(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr", "max_lr", "min_lr")
    }


def why_not(local: LocalTraining) -> str | None:
    """Say why clients cannot be trained side by side.

    Returns:
        The reason, to follow the word "because"; None if they can.
    """
    for find in (_trainer_problem, _module_problem, _callback_problem):
        if (reason := find(local)) is not None:
            return reason
    return None


def _trainer_problem(local: LocalTraining) -> str | None:
    if type(local.plan) is not FitPlan or local.stages:
        return f"{type(local.plan).__name__} fits in a way of its own"
    if not isinstance(local.trainer, partial) or local.trainer.func is not Trainer:
        return "the trainer is not lightning.pytorch.Trainer"
    plain: Mapping[str, tuple[Any, ...]] = {"accumulate_grad_batches": (1,), "precision": ("32-true", 32, "32", BF16)}
    for name, value in local.trainer.keywords.items():
        if name not in ARGUMENTS and value is not None and value not in plain.get(name, ()):
            return f"trainer.{name} is {value}"
    if local.trainer.keywords.get("max_epochs") in (None, -1):
        return "trainer.max_epochs is not set"
    for name in ("validate", "channels_last"):
        if getattr(local, name):
            return f"local.{name} is true"
    return "local.engine is stock" if local.engine == "stock" else None


def _module_problem(local: LocalTraining) -> str | None:
    module = local.module
    for name in ("loss", "forward", "features", "training_step", "configure_optimizers", "for_client"):
        if getattr(type(module), name) is not getattr(FederatedModule, name):
            return f"{type(module).__name__} overrides {name}"
    if not module.task.is_plain_cross_entropy:
        return f"task={module.task.name} has another loss than the plain cross-entropy of classes"
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and type(part) not in NORMS:
            return f"{name} is a {type(part).__name__}, and not one of torch's plain BatchNorm layers"
        if isinstance(part, _InstanceNorm) and part.track_running_stats:
            return f"{name} is a {type(part).__name__} with statistics, which would count what fills up"
        if isinstance(part, _DropoutNd) and part.p and type(part) not in DROPOUTS:
            return f"{name} is a {type(part).__name__}, and not one of torch's plain dropout layers"
        if isinstance(part, nn.MultiheadAttention) and part.dropout:
            return f"{name} draws dropout within attention, not in a layer of its own"
    if len({parameter.dtype for parameter in module.parameters()}) > 1:
        return "the parameters are numbers of several types"
    optimizer = local.optimizer([nn.Parameter(torch.zeros(1))])
    if local.scheduler is not None and isinstance(local.scheduler(optimizer), ReduceLROnPlateau):
        return "ReduceLROnPlateau waits for a metric"
    if type(optimizer) not in OPTIMIZERS:
        return f"{type(optimizer).__name__} may mix the parameters of clients"
    return None


def _callback_problem(local: LocalTraining) -> str | None:
    for callback in local.callbacks:
        if isinstance(callback, FreezeSchedule):
            if any(phase.steps is not None for phase in callback.phases):
                return "a phase of the freeze schedule is given in steps, which are not the same for all clients"
        elif (hook := _client_hook(callback)) is not None:
            return f"{type(callback).__name__} has {hook}, which acts on one client at a time"
    return None


def _client_hook(callback: Callback) -> str | None:
    """A hook of the client half that a callback has, and that nothing does for many clients."""
    kind = type(callback)
    edit = _owner(kind, "edit_rows") if isinstance(callback, GradientEdit) else object
    for name in dir(FederatedCallback):
        if name.startswith("_") or name in SERVER_HOOKS or not callable(getattr(FederatedCallback, name)):
            continue
        # A subclass that changes a hook of a gradient edit does not do what the edit does.
        if not issubclass(FederatedCallback, owner := _owner(kind, name)) and not issubclass(edit, owner):
            return name
    return None


def _owner(kind: type, name: str) -> type:
    """The class from which a class has something."""
    return next((one for one in kind.__mro__ if name in vars(one)), object)
