"""A training step of many clients at once, on tensors that may stay where they are from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from fl_lightning.fit.gradients import GradientEdit
from fl_lightning.module import FederatedModule
from fl_lightning.state import Layout, State, bring

#: Layers that have a form of their own here; every other subclass of theirs is refused.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = {nn.Dropout: 0, nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5}


class MixingLayers:
    """BatchNorm and dropout where clients stand side by side and batches are filled up.

    Statistics are those of the examples that count. What dropout draws is given to it: the layer cannot draw for each
    client from a generator of its own.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.norms = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
        self.dropouts = [part for part in module.modules() if isinstance(part, _DropoutNd) and part.p]
        self.smallest_batch = 2
        self._weight = torch.ones(0)
        self._noise: Iterator[Tensor] = iter(())
        self._moved: State = {}
        self._asked: list[tuple[nn.Module, torch.Size]] | None = None

    @property
    def statistics(self) -> list[str]:
        """Names of the tensors that a pass changes."""
        return [f"{name}.{key}" for name, part in self.norms.items() for key in part._buffers]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model's layers do as is said here, for as long as the context lasts."""
        parts: list[nn.Module] = [*self.norms.values(), *self.dropouts]
        for name, norm in self.norms.items():
            vars(norm)["forward"] = partial(self._normalize, name, norm)
        for dropout in self.dropouts:
            vars(dropout)["forward"] = partial(self._drop, dropout)
        try:
            yield
        finally:
            for part in parts:
                del vars(part)["forward"]

    def loss(
        self,
        precision: AbstractContextManager[Any],
        parameters: State,
        rest: State,
        common: State,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        noise: Sequence[Tensor],
    ) -> tuple[Tensor, State]:
        """The loss of one client's batch, the mean over examples of weight 1; those of weight 0 fill up.

        Returns:
            The loss, and the statistics (B,) that have changed, by name.
        """
        self._weight, self._noise, self._moved = weight, iter(noise), {}
        module = self.module
        assert isinstance(module, FederatedModule)
        with precision:
            logits = functional_call(module, {**parameters, **rest, **common}, (x,))
            losses = functional.cross_entropy(logits, y, reduction="none", label_smoothing=module.label_smoothing)
            return (losses * weight).sum() / weight.sum().clamp(min=1.0), self._moved

    def places(self, tensors: State, x: Tensor) -> list[tuple[nn.Module, torch.Size]]:
        """Return the dropout layers in the order in which a pass comes to them, each with the shape that it gets."""
        if not any(part.training for part in self.dropouts):
            return []
        self._asked, self._weight, self._moved = [], torch.ones(len(x), device=x.device), {}
        try:
            with torch.no_grad(), self.in_place():
                functional_call(self.module, tensors, (x,))
            return self._asked
        finally:
            self._asked = None

    def _normalize(self, name: str, part: _BatchNorm, x: Tensor) -> Tensor:
        if not part.training:
            return type(part).forward(part, x)
        if self.smallest_batch * prod(x.shape[2:]) == 1:
            raise ValueError(f"{name} cannot train on a batch of one example; set data.avoid_single=true")
        mean, variance, counter = (
            self._moved.get(f"{name}.{key}", part._buffers.get(key))
            for key in ("running_mean", "running_var", "num_batches_tracked")
        )
        shape = (1, -1, *[1] * (x.ndim - 2))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        weight = self._weight.view(-1, *[1] * (x.ndim - 1))
        values = x.float()
        examples = self._weight.sum()
        number = (examples * prod(x.shape[2:])).clamp(min=1.0)
        batch_mean = (values * weight).sum(axes) / number
        centred = (values - batch_mean.view(shape)) * weight
        batch_variance = centred.square().sum(axes) / number
        if mean is not None and variance is not None and counter is not None:
            counter = counter + (examples > 0)
            factor = 1 / counter.clamp(min=1) if part.momentum is None else part.momentum
            factor = torch.where(examples > 0, factor, 0.0)
            unbiased = batch_variance * (number / (number - 1).clamp(min=1.0))
            self._moved[f"{name}.running_mean"] = (mean + factor * (batch_mean - mean)).to(mean.dtype)
            self._moved[f"{name}.running_var"] = (variance + factor * (unbiased - variance)).to(variance.dtype)
            self._moved[f"{name}.num_batches_tracked"] = counter
        normal = (values - batch_mean.view(shape)) * torch.rsqrt(batch_variance + part.eps).view(shape)
        if part.affine:
            normal = normal * part.weight.view(shape) + part.bias.view(shape)
        return normal.to(x.dtype)

    def _drop(self, part: _DropoutNd, x: Tensor) -> Tensor:
        if not part.training:
            return x
        if self._asked is not None:
            self._asked.append((part, x.shape))
            return x
        return x * next(self._noise).to(x.dtype)


def draw(places: Sequence[tuple[nn.Module, torch.Size]], number: int, generator: torch.Generator) -> list[Tensor]:
    """Draw what a client's dropout layers multiply by in one step, as they would on a CPU: 0, or 1 / (1 - p).

    Args:
        places: See :meth:`MixingLayers.places`.
        number: Examples in the client's batch.
        generator: The client's.
    """
    found = []
    for part, shape in places:
        assert isinstance(part, _DropoutNd)
        axes = DROPOUTS[type(part)]
        if axes and len(shape) != axes:
            raise ValueError(f"{type(part).__name__} gets {len(shape)} dimensions where {axes} are expected")
        wanted = (number, shape[1], *[1] * (axes - 2)) if axes else (number, *shape[1:])
        found.append(
            torch.empty(wanted).bernoulli_(1 - part.p, generator=generator).div_(1 - part.p)
            if part.p < 1
            else torch.zeros(wanted)
        )
    return found


def draw_side_by_side(
    places: Sequence[tuple[nn.Module, torch.Size]],
    numbers: Sequence[int],
    size: int,
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> list[Tensor]:
    """Draw for many clients, of which each has its own generator.

    Args:
        places: See :meth:`MixingLayers.places`.
        numbers: Examples in each client's batch; 0 where it has none any more.
        size: Examples to fill up to.
        generators: The clients'.
        device: Where they are wanted.

    Returns:
        For each layer (K, ``size``, ...).
    """
    blocks: list[Tensor] = []
    for client, (number, generator) in enumerate(zip(numbers, generators, strict=False)):
        drawn = draw(places, number, generator) if number else []
        if not blocks:  # the first client has a batch as long as there are steps
            blocks = [tensor.new_zeros(len(numbers), size, *tensor.shape[1:]) for tensor in drawn]
        for block, tensor in zip(blocks, drawn, strict=False):
            block[client, :number] = tensor
    return bring(blocks, device)


@dataclass
class Inputs:
    """What a step of K clients gets: x (K, B, ...), y (K, B), weights (K, B), dropout's factors, shares (K, 1).

    A client's share is the part of the optimizer's step that it takes: 0 when it is through, and its learning rate over
    the highest where a scheduler has set rates apart.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    noise: list[Tensor]
    share: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [self.x, self.y, self.weight, self.share, *self.noise]


@dataclass
class Rows:
    """The tensors of many clients that a stretch of training works on.

    Attributes:
        flat: The parameters that train, (K, n).
        rest: Tensors that are each client's own and do not train, (K, ...).
        common: Those that are the same for all.
        held: What each edit of gradients needs.
        total: Sums of losses, (K,).
    """

    flat: Tensor
    rest: State
    common: State
    held: list[State]
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(len(self.flat), device=self.flat.device)

    def tensors(self) -> dict[str, Tensor]:
        """All but the sums, by names of their own."""
        held = {f"held|{place}|{name}": x for place, one in enumerate(self.held) for name, x in one.items()}
        return {"flat": self.flat, **self.rest, **self.common, **held}


class CohortStep:
    """Forward and backward passes, edits of gradients and the optimizer's step, for the first clients of a stack.

    Nothing in a step waits for the device, and no number of the host's differs between steps of as many clients.

    Args:
        layers: Of the model.
        precision: Makes the context of a forward pass.
        layout: How the parameters that train lie in a row.
        edits: Change gradients, in this order.
        optimizer: Makes the optimizer.
        rows: What is trained; written to.
        partly: Whether a share is ever another than 1.
    """

    def __init__(
        self,
        layers: MixingLayers,
        precision: AbstractContextManager[Any],
        layout: Layout,
        edits: Sequence[GradientEdit],
        optimizer: Callable[[Tensor], Optimizer],
        rows: Rows,
        partly: bool,
    ) -> None:
        self.layout, self.edits, self.rows, self.partly = layout, edits, rows, partly
        self._make = optimizer
        self._optimizers: dict[int, Optimizer] = {}
        passes = grad_and_value(partial(layers.loss, precision), has_aux=True)
        self._passes = vmap(passes, in_dims=(0, 0, None, 0, 0, 0, 0))

    @property
    def result(self) -> State:
        """The tensors that trained and the clients' own statistics, (K, ...)."""
        return {**self.layout.views({self.rows.flat.dtype: self.rows.flat}), **self.rows.rest}

    def __call__(self, inputs: Inputs) -> None:
        """Take a step."""
        rows, count = self.rows, len(inputs.x)
        flat = rows.flat[:count]
        parameters = self.layout.views({flat.dtype: flat})
        rest = {name: tensor[:count] for name, tensor in rows.rest.items()}
        gradients, (losses, moved) = self._passes(
            parameters, rest, rows.common, inputs.x, inputs.y, inputs.weight, inputs.noise
        )
        alive = inputs.weight.amax(1)
        rows.total[:count].add_(torch.where(alive > 0, losses, 0.0))
        [gradient] = self.layout.join(gradients).values()
        for edit, held in zip(self.edits, rows.held, strict=True):
            edit.edit_rows({name: x[:count] for name, x in held.items()}, flat, gradient, alive.unsqueeze(1))
        if moved:
            torch._foreach_copy_([rest[name] for name in moved], list(moved.values()))
        before = flat.clone() if self.partly else None
        optimizer = self._optimizer(count)
        [own] = optimizer.param_groups[0]["params"]
        own.grad = gradient
        optimizer.step()
        if before is not None:
            flat.copy_(before.lerp_(flat, inputs.share))

    def _optimizer(self, count: int) -> Optimizer:
        """The optimizer of the first clients; what it remembers of each number is a part of what that of all does."""
        if count not in self._optimizers:
            flat = self.rows.flat[:count]
            optimizer = self._optimizers[count] = self._make(flat)
            whole = self._optimizers[max(self._optimizers)]
            for first in list(whole.state.values()) if whole is not optimizer else []:
                optimizer.state[flat] = {key: _first(value, self.rows.flat, count) for key, value in first.items()}
        return self._optimizers[count]

    def state(self) -> list[Tensor]:
        """All tensors that a step writes to."""
        rows = self.rows
        optimizers = sorted(self._optimizers.items(), reverse=True)[
            :1
        ]  # that of all; the others see parts of its state
        states = [one for _, optimizer in optimizers for one in optimizer.state.values()]
        remembered = [value for one in states for value in one.values() if isinstance(value, Tensor)]
        held = [tensor for one in rows.held for tensor in one.values()]
        return [rows.flat, rows.total, *rows.rest.values(), *held, *remembered]


def _first(value: Any, whole: Tensor, count: int) -> Any:
    return value[:count] if isinstance(value, Tensor) and value.shape == whole.shape else value


class RecordedStep:
    """A step that is recorded once for each number of clients, and from then on replayed.

    Its tensors stay; what comes is copied into them.

    Args:
        step: The step; its rows are kept and written to.
        inputs: Of as many clients as there ever are.
        record: Runs something some times, and returns what does it once more, on the same tensors.
    """

    def __init__(
        self, step: CohortStep, inputs: Inputs, record: Callable[[Callable[[], None]], Callable[[], None]]
    ) -> None:
        self.step = step
        copies = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs.tensors()]
        self._inputs = Inputs(copies[0], copies[1], copies[2], copies[4:], copies[3])
        self._record = record
        self._replays: dict[int, Callable[[], None]] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what the next stretch starts with; see :meth:`Rows.tensors`."""
        own = self.step.rows.tensors()
        for tensor in self.step.state():
            if not any(tensor is known for known in own.values()):
                tensor.zero_()  # sums, and what the optimizer remembers
        for name, tensor in own.items():
            if tensor is not tensors[name]:
                tensor.copy_(tensors[name])

    def __call__(self, inputs: Inputs) -> None:
        """Take a step."""
        count = len(inputs.x)
        for own, given in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            own[:count].copy_(given)
        if count not in self._replays:
            self._replays[count] = self._recorded(count)
        self._replays[count]()

    def _recorded(self, count: int) -> Callable[[], None]:
        parts = [tensor[:count] for tensor in self._inputs.tensors()]
        inputs = Inputs(parts[0], parts[1], parts[2], parts[4:], parts[3])
        before = [(tensor, tensor.clone()) for tensor in self.step.state()]
        replay = self._record(lambda: self.step(inputs))
        # Recording has taken steps; they did not count.
        known = {id(tensor) for tensor, _ in before}
        for tensor in self.step.state():
            if id(tensor) not in known:
                tensor.zero_()
        for tensor, value in before:
            tensor.copy_(value)
        return replay


def record_cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what something launches on a GPU as a CUDA graph.

    Args:
        work: Run three times before, outside of the default stream, as recording demands, and once for the record.
        device: The GPU.

    Returns:
        Launches all of it at once.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay
