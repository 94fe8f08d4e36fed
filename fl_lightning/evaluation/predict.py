"""One model on one client's data: predictions and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric

from fl_lightning.checks import one_of
from fl_lightning.client import Scores, Split
from fl_lightning.evaluation.named_metrics import Mean, Named
from fl_lightning.state import State
from fl_lightning.task import Classification, Task

Forward = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class HasExamples(Protocol):
    """What evaluation needs of a client's data: :class:`fl_lightning.data.client_data.ClientData` has it.

    ``eval_dataloader("train")`` gives the training examples in order and not augmented; ``train_dataloader`` would do
    neither, and counts epochs, so that looking at the training loss would change the training.
    """

    num_classes: int

    def val_dataloader(self) -> Any:
        """Return the validation batches."""

    def test_dataloader(self) -> Any:
        """Return the test batches."""


@contextmanager
def evaluating(forward: Forward) -> Iterator[nn.Module | None]:
    """Put the module behind ``forward`` in eval mode, and every sub-module back into its own mode afterwards.

    ``module.train()`` at the end would not do: a frozen backbone in eval mode beside a head in train mode must stay so.

    Args:
        forward: A module, or a method of a module such as ``module.features``. Any other function is left alone.

    Yields:
        The module, or None.
    """
    owner = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
    if not isinstance(owner, nn.Module):
        yield None
        return
    modes = [(module, module.training) for module in owner.modules()]
    owner.eval()
    try:
        yield owner
    finally:
        for module, training in modes:
            module.training = training


def predict(forward: Forward, batches: Iterable[Batch]) -> Batch:
    """Run a model over batches without gradients, in eval mode, and without waiting for the device in between.

    Args:
        forward: From x (N, ...) to outputs (N, ...): a module, a method of one, or a function.
        batches: Pairs x (N, ...), y (N, ...). They are moved to the module's device.

    Returns:
        All outputs in float32 and all targets, on the module's device, in the order of the batches.
    """
    outputs, targets = [], []
    with evaluating(forward) as module:
        device = _device(module)
        for x, y in batches:
            outputs.append(_outputs(forward, x, device))
            targets.append(y.to(outputs[-1].device, non_blocking=True))
    if not outputs:
        raise ValueError("batches must hold at least one, got none; the client may have no examples")
    return torch.cat(outputs), torch.cat(targets)


class Logged:
    """A metric that a LightningModule logs itself, in its ``validation_step`` and ``test_step``.

    Of several batches it is the mean over examples of what was logged for each, as Lightning's ``on_epoch`` has it; for
    a metric that is no mean over examples let a test batch hold all data of a client.

    Args:
        name: As in ``self.log(name, ...)`` of ``test_step``.
        val: As in that of ``validation_step``; None: the same.
        mode: Which of its values are better, ``max`` or ``min``.
    """

    def __init__(self, name: str, val: str | None = None, mode: str = "max") -> None:
        one_of("mode", mode, ("max", "min"))
        self.keys: dict[str, str] = {"test": name, "val": val or name}
        self.mode = mode

    def of_batches(self, forward: Forward, batches: Iterable[Batch], split: Split) -> tuple[float, float]:
        """Return the sum over examples, and their number."""
        owner = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
        step = getattr(owner, "logged_in", None)
        if step is None:
            raise ValueError("Logged must be of a LightningModule of your own; name it by module._target_")
        key, total, count = self.keys[split], 0.0, 0.0
        # No inference mode: data that a loader makes here and keeps must stay usable for training.
        with evaluating(forward) as module, torch.no_grad():
            for number, batch in enumerate(batches):
                x, y = batch
                device = _device(module)
                moved = (x, y) if device is None else move_data_to_device((x, y), device)
                found = step("test_step" if split == "test" else "validation_step", moved, number)
                if key not in found:
                    raise ValueError(
                        f"{split} steps must log {key!r}, got {', '.join(found) or 'nothing'}; name another one"
                    )
                total += found[key] * len(y)
                count += len(y)
        return total, count


class Metrics:
    """The metrics of a run: forms them where a client's data are, and over several clients from what these sent.

    Every client is scored alone, in batches of its own, so that a score has the same bits wherever it is formed.

    Args:
        makers: By name what makes a torchmetrics metric, which takes (outputs, targets) and computes one number, a
            :class:`Logged`, or None for the metric that the task has under this name. Default: the task's own; of
            classes ``accuracy``, the share of examples that are right, and ``loss``, their mean cross-entropy in nats.
        task: What the model is trained for.
    """

    def __init__(
        self, makers: Mapping[str, Callable[..., Metric] | Logged | None] | None = None, task: Task | None = None
    ) -> None:
        self.makers = makers
        self.task = task or Classification()
        self._made: dict[int, dict[str, Metric]] = {}
        self._means: dict[str, Mean] = {}
        self._logged: dict[str, Logged] = {}
        self._makers: dict[str, Callable[..., Metric]] = {}
        self.names: tuple[str, ...] = ()
        for name, maker in (dict.fromkeys(self.task.defaults) if makers is None else makers).items():
            self._add(name, maker)

    def use(self, task: Task, name: str | None = None) -> None:
        """Form the metrics of another task, and one of its metrics besides, if it has it.

        Args:
            task: The task.
            name: The metric that chooses.
        """
        Metrics.__init__(self, self.makers, task)
        if name is not None and name not in self.names and name in task.metrics:
            self._add(name, None)

    def _add(self, name: str, maker: Callable[..., Metric] | Logged | None) -> None:
        known = self.task.metrics
        if maker is None and name not in known:
            raise ValueError(
                f"evaluation.metrics.{name} must be a torchmetrics metric or one of {', '.join(known)}, which "
                f"task={self.task.name} has"
            )
        named: Named | Logged = known[name] if maker is None else maker
        if isinstance(named, Mean):
            self._means[name] = named
        elif isinstance(named, Logged):
            self._logged[name] = named
        else:
            self._makers[name] = named
        self.names = (*self.names, name)

    def score(
        self,
        forward: Forward,
        data: HasExamples,
        split: Split = "test",
        names: Iterable[str] | None = None,
        confusion: bool = False,
    ) -> tuple[dict[str, float], dict[str, State], Tensor | None]:
        """Score one model on one client's data.

        Args:
            forward: From x (N, ...) to outputs (N, ...): a module, a method of one, or a function.
            data: The client's data.
            split: ``train``, ``val`` or ``test``.
            names: Which metrics; all by default.
            confusion: Whether to count predictions by true and predicted class, where the task has classes.

        Returns:
            The metrics by name, NaN where there is no example; the sums that form them over several clients; the counts
            int64 (true class, predicted class), or None.
        """
        chosen = self.names if names is None else tuple(names)
        confusion = confusion and self.task.has_classes
        if not chosen and not confusion:
            return {}, {}, None
        means = [name for name in chosen if name in self._means]
        found = self._torchmetrics(data.num_classes, chosen)
        examples: dict[str, int | Tensor] = {name: 0 for name in means if self._means[name].count is not None}
        total: Tensor | None = None
        counts: Tensor | None = None
        seen: int | Tensor = 0
        with evaluating(forward) as module:
            device = _device(module)
            for x, y in batches_of(data, split):
                outputs = _outputs(forward, x, device)
                whole = (outputs, y.to(outputs.device, non_blocking=True))
                outputs, y = self.task.flat(*whole)
                seen = seen + self.task.count(y)
                for name in examples:
                    examples[name] = examples[name] + self._counted(name, whole[1])
                if means:
                    one = torch.stack([self._means[name].sum(whole, (outputs, y)) for name in means])
                    total = one if total is None else total + one
                for metric in found.values():
                    self._update(metric, outputs, y)
                if confusion:
                    places = (y.long() * data.num_classes + self.task.predicted(outputs)).flatten()
                    more = torch.bincount(places, minlength=data.num_classes**2)
                    counts = more if counts is None else counts + more
        number = float(seen)
        if not number:
            return dict.fromkeys(chosen, math.nan), {}, None
        values, totals = self.logged(forward, data, split, chosen)
        if total is not None:
            # One transfer from the device. The quotient is float32, as torchmetrics forms it.
            total = total.cpu()
            for name, part in zip(means, total, strict=True):
                over = float(examples.get(name, number))
                values[name] = self._means[name].value(part / over)
                totals[name] = {"sum": part.double(), "count": torch.tensor(over, dtype=torch.float64)}
        for name, metric in found.items():
            values[name] = one_number(name, metric)
            totals[name] = {key: _joined(value) for key, value in metric.metric_state.items()}
        shape = (data.num_classes, data.num_classes)
        return values, totals, None if counts is None else counts.cpu().reshape(shape)

    def logged(
        self, forward: Forward, data: HasExamples, split: Split, names: Iterable[str]
    ) -> tuple[dict[str, float], dict[str, State]]:
        """Return those of some metrics that the module logs itself, and the sums that form them over clients."""
        values, totals = {}, {}
        for name in names:
            if name in self._logged and split != "train":
                total, count = self._logged[name].of_batches(forward, batches_of(data, split), split)
                values[name] = total / count if count else math.nan
                parts = {"sum": torch.tensor(total), "count": torch.tensor(count)}
                totals[name] = {key: one.double() for key, one in parts.items()}
        return values, totals

    def of_outputs(self, outputs: Tensor, targets: Tensor, names: Iterable[str], num_classes: int) -> dict[str, float]:
        """Form metrics of outputs and targets that are there already."""
        chosen = tuple(names)
        whole = (outputs, targets)
        outputs, targets = self.task.flat(outputs, targets)
        values = {}
        for name in chosen:
            if name == "loss" and name in self._means:
                values[name] = float(self.task.mean_loss(outputs, targets))
            elif name in self._means:
                over = self._counted(name, whole[1]) if self._means[name].count else self.task.count(targets)
                mean = self._means[name].sum(whole, (outputs, targets)).double() / over
                values[name] = self._means[name].value(mean)
        for name, metric in self._torchmetrics(num_classes, chosen).items():
            self._update(metric, outputs, targets)
            values[name] = one_number(name, metric)
        return values

    def _counted(self, name: str, targets: Tensor) -> Tensor:
        count = self._means[name].count
        assert count is not None
        return count(targets)

    def mode(self, name: str, num_classes: int) -> str:
        """Return ``max`` or ``min``: which values of a metric are better, as torchmetrics says of it."""
        if name in self._logged:
            return self._logged[name].mode
        if name in self._means:
            return "max" if self._means[name].higher_is_better else "min"
        return "min" if self._torchmetrics(num_classes, (name,))[name].higher_is_better is False else "max"

    def is_logged(self, name: str) -> bool:
        """Tell whether a metric is one that the module logs itself."""
        return name in self._logged

    def is_mean(self, name: str) -> bool:
        """Tell whether a metric has a value wherever there is an example; another may lack one (AUROC of one class)."""
        return name in self._means

    def pooled(self, scores: Sequence[Scores], num_classes: int) -> dict[str, float]:
        """Return the metrics over the examples of several clients together, NaN where there are none.

        A metric whose states cannot be merged (torchmetrics' ``full_state_update``) is NaN, too.
        """
        found = {}
        for name in self.names:
            parts = [one.totals[name] for one in scores if name in one.totals]
            if not parts:
                found[name] = math.nan
            elif name in self._logged:
                found[name] = float(sum(part["sum"] for part in parts) / sum(part["count"] for part in parts))
            elif name in self._means:
                mean = sum(part["sum"] for part in parts) / sum(part["count"] for part in parts)
                found[name] = self._means[name].value(mean)  # type: ignore[arg-type]
            else:
                found[name] = self._merged(name, parts, num_classes)
        return found

    def _merged(self, name: str, parts: Sequence[State], num_classes: int) -> float:
        metric = self._torchmetrics(num_classes, (name,))[name].cpu()
        for part in parts:
            lists = {key for key, default in metric._defaults.items() if isinstance(default, list)}
            metric._update_count += 1  # it has been updated, as far as it knows
            try:
                metric.merge_state({key: [value] if key in lists else value for key, value in part.items()})
            except RuntimeError:
                return math.nan
        return one_number(name, metric)

    def _update(self, metric: Metric, outputs: Tensor, targets: Tensor) -> None:
        scores = self.task.scores(outputs)
        if (
            isinstance(self.task, Classification)
            and scores.shape[1] == 2
            and type(metric).__name__.startswith("Binary")
        ):
            scores = scores.softmax(1)[:, 1]  # what a metric of yes and no takes of two classes
        metric.to(outputs.device).update(scores, self.task.truths(targets))

    def _torchmetrics(self, num_classes: int, names: Sequence[str]) -> dict[str, Metric]:
        wanted = [name for name in names if name in self._makers]
        if not wanted:
            return {}
        if num_classes not in self._made:  # making one takes longer than a forward pass over a small client
            self._made[num_classes] = {
                name: make(**self.task.arguments(make, num_classes)) for name, make in self._makers.items()
            }
        chosen = {name: self._made[num_classes][name] for name in wanted}
        for metric in chosen.values():
            metric.reset()
        return chosen


def score(forward: Forward, data: HasExamples, split: Split = "test") -> dict[str, float]:
    """Return the default metrics of its task of one model on one client's data, NaN where there is no example."""
    return Metrics(task=task_of(forward)).score(forward, data, split)[0]


def quality(forward: Forward, data: HasExamples, split: Split = "test") -> float:
    """Return the first default metric of its task of one model on one client's data, such that more is better.

    Where this metric has no value, as the AUROC of one class alone, it is the loss that is compared.
    """
    metrics = Metrics(task=task_of(forward))
    values = metrics.score(forward, data, split)[0]
    first = metrics.names[0]
    if math.isnan(values[first]):
        return -values["loss"]
    return values[first] if metrics.mode(first, data.num_classes) == "max" else -values[first]


def task_of(forward: Forward) -> Task | None:
    """Return what the module behind a function was trained for; None where that is not said."""
    owner = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
    task = getattr(owner, "task", None)
    return task if isinstance(task, Task) else None


def batches_of(data: Any, split: Split) -> Iterable[Batch]:
    """Return the batches of a split, in order and not augmented."""
    batches: Iterable[Batch]
    if split == "train":
        batches = data.eval_dataloader(split)
    else:
        batches = data.val_dataloader() if split == "val" else data.test_dataloader()
    return batches


def one_number(name: str, metric: Metric) -> float:
    """Return what a metric computes."""
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"evaluation.metrics.{name} must compute one number, got {value!r}; choose an average such as macro"
        )
    return value.detach().float().item()


def _joined(state: Any) -> Tensor:
    return torch.cat(state).cpu() if isinstance(state, list) else state.cpu()


def _device(module: nn.Module | None) -> torch.device | None:
    parameter = None if module is None else next(module.parameters(), None)
    return None if parameter is None else parameter.device


def _outputs(forward: Forward, x: Tensor, device: torch.device | None) -> Tensor:
    # Only the forward pass is in inference mode: data that a loader makes once and keeps must stay usable for training.
    with torch.inference_mode():
        if device is not None:
            x = x.to(device, non_blocking=True) if isinstance(x, Tensor) else move_data_to_device(x, device)
        return forward(x).float()
