"""Computes what training a cut model costs: FLOPs, bytes and simulated seconds, from the measured blocks."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fl_lightning.checks import ArgumentError, above
from fl_lightning.split.blocks import Chain
from fl_lightning.split.cut import Cut
from fl_lightning.split.traffic import Traffic

MEASURED = ("flops_per_second", "memory")
"""What a client can say of its own machine, of what `ClientProfile` holds."""


@dataclass(frozen=True)
class BlockProfile:
    """The cost of one block for one example.

    Attributes:
        name: The block's name in the chain.
        flops: Floating-point operations of a forward pass (a multiply-add counts 2).
        out_bytes: Bytes of the output in float32: what crosses a cut behind this block.
        saved_bytes: Bytes that autograd keeps for the backward pass, parameters not counted.
        param_bytes: Bytes of its parameters and buffers.
        trained_bytes: Bytes of the parameters among them that are trained; None: all of ``param_bytes``.
    """

    name: str
    flops: int
    out_bytes: int
    saved_bytes: int
    param_bytes: int
    trained_bytes: int | None = None

    def memory(self, batch_size: int, optimizer_slots: int) -> int:
        """Return the bytes that training it takes: weights, gradients, optimizer, activations."""
        trained = self.param_bytes if self.trained_bytes is None else self.trained_bytes
        return self.param_bytes + trained * (1 + optimizer_slots) + batch_size * (self.saved_bytes + self.out_bytes)


@dataclass(frozen=True)
class ModelProfile:
    """The cost of a model by block; the head comes last and is always the client's.

    Attributes:
        blocks: One profile per block of the chain.
        head: The head's profile.
    """

    blocks: tuple[BlockProfile, ...]
    head: BlockProfile

    def flops(self, first: int, last: int) -> int:
        """Return the FLOPs of one example's forward pass through blocks ``[first, last)``."""
        return sum(block.flops for block in self.blocks[first:last])

    def out_bytes(self, boundary: int) -> int:
        """Return the bytes of one example's activation that crosses before block ``boundary``, at least 1."""
        return self.blocks[boundary - 1].out_bytes

    def client_flops(self, at: int, end: int) -> int:
        """Return the FLOPs of one example's forward pass through a client's front ``[0, at)`` and tail."""
        return self.flops(0, at) + self.flops(end, len(self.blocks)) + self.head.flops

    def client_memory(self, at: int, end: int, batch_size: int, optimizer_slots: int) -> int:
        """Return the bytes a client needs to train front and tail: parameters, gradients, optimizer, activations.

        Args:
            at: The client's cut.
            end: First block of the tail.
            batch_size: Examples of a batch.
            optimizer_slots: See `optimizer_slots`.
        """
        held = [*self.blocks[:at], *self.blocks[end:], self.head]
        return sum(block.memory(batch_size, optimizer_slots) for block in held)


@dataclass(frozen=True)
class ClientProfile:
    """What a client's device and link can do. Infinite by default, so that an unset limit limits nothing.

    Attributes:
        flops_per_second: Speed of its processor, above 0.
        memory: Bytes it can spend on training, above 0.
        up: Bytes per second it sends, above 0.
        down: Bytes per second it receives, above 0.
    """

    flops_per_second: float = float("inf")
    memory: float = float("inf")
    up: float = float("inf")
    down: float = float("inf")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value != float("inf"):
                above(f"profiles.{name}", value, 0)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ClientProfile:
        """Make a profile from a configuration's keys."""
        unknown = values.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(
                f"a client profile has no {', '.join(sorted(map(str, unknown)))}; "
                f"it has {', '.join(cls.__dataclass_fields__)}."
            )
        return cls(**values)

    @classmethod
    def measured(cls, device: torch.device) -> ClientProfile:
        """Measure this machine: the memory that is free now, and the speed of a matrix product in float32.

        Its links are not measured.
        """
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        else:
            memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size, repeats, seconds = 256, 1, 0.0
        matrix = torch.ones(size, size, device=device) / size
        while seconds < 0.02:  # above the clock's noise
            repeats *= 2
            begin = time.perf_counter()
            product = matrix
            for _ in range(repeats):
                product = product @ matrix
            product.sum().item()  # waits for the device
            seconds = time.perf_counter() - begin
        return cls(flops_per_second=2 * size**3 * repeats / seconds, memory=float(memory))

    @classmethod
    def several(cls, profiles: Sequence[Mapping[str, Any]]) -> list[ClientProfile]:
        """Make the profiles that clients take in turn."""
        if not profiles:
            raise ArgumentError("profiles must hold at least one client profile, got none")
        return [cls.of(profile) for profile in profiles]


def profile_model(blocks: Chain, head: nn.Module, x: Tensor) -> ModelProfile:
    """Measure every block on one example: FLOPs with PyTorch's own counter, bytes by looking at the tensors.

    Args:
        blocks: The backbone's blocks.
        head: The head.
        x: One example with its batch dimension, ``(1, ...)``.
    """
    profiles = []
    modes = {module: module.training for block in (*blocks.values(), head) for module in block.modules()}
    for module in modes:
        module.eval()  # a BatchNorm in training mode refuses one example, and would count it
    try:
        for name, block in (*blocks.items(), ("head", head)):
            profile, x = _measure(name, block, x)
            profiles.append(profile)
    finally:
        for module, training in modes.items():
            module.training = training
    return ModelProfile(tuple(profiles[:-1]), profiles[-1])


def _measure(name: str, block: nn.Module, x: Tensor) -> tuple[BlockProfile, Tensor]:
    held = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach()
    if x.is_floating_point():
        x.requires_grad_()
    # the plain attention kernel is made of matrix products, which every version of the counter knows
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        out = block(x)
    size = _size((*block.parameters(), *block.buffers()))
    trained = _size(p for p in block.parameters() if p.requires_grad)
    out_bytes = out.numel() * out.element_size()
    return BlockProfile(name, counter.get_total_flops(), out_bytes, sum(saved.values()), size, trained), out.detach()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_slots(make: Callable[..., torch.optim.Optimizer]) -> int:
    """Count the tensors that an optimizer keeps for each parameter: 0 for SGD, 1 with momentum, 2 for Adam.

    It makes one step on a small matrix, and counts what has its size then. (Adafactor's rows and columns count 0.)
    """
    parameter = nn.Parameter(torch.zeros(3, 5))
    optimizer = make([parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = optimizer.state.get(parameter, {}).values()
    return sum(isinstance(tensor, Tensor) and tensor.shape == parameter.shape for tensor in kept)


Reach = Literal["front", "body", "tail"]
"""How far back a batch's gradient goes: into the client's front, no further than the body since the front is frozen, or
no further than the tail since the body is frozen too."""


@dataclass(frozen=True)
class BatchSeconds:
    """Simulated seconds of one batch, in the order in which they pass; waiting for the server comes on top.

    Attributes:
        front: Forward through the front, and message 1.
        body_forward: At the server, with its copy of the private top where it aligns.
        tail: Message 2, forward and backward through the tail, and message 3.
        body_backward: At the server.
        front_backward: Message 4, and backward through the front.
    """

    front: float
    body_forward: float
    tail: float
    body_backward: float
    front_backward: float

    @property
    def total(self) -> float:
        """Seconds from the first layer to the last gradient, if the server is free."""
        return self.front + self.body_forward + self.tail + self.body_backward + self.front_backward


def batch_bytes(
    cut: Cut, model: ModelProfile, batch_size: int, align_at: str | None, reach: Reach = "front"
) -> Traffic:
    """Return what one batch sends: twice the activations at the cut and at the end, and what alignment adds.

    Args:
        cut: The client's cut.
        model: What the blocks put out, in float32.
        batch_size: Examples in the batch.
        align_at: ``"server"``, ``"client"``, or ``None`` without alignment.
        reach: How far back the gradient goes; where it stops it is not sent.
    """
    at, end = batch_size * model.out_bytes(cut.at), batch_size * model.out_bytes(cut.end)
    aligned = align_at is not None and cut.at > cut.start
    base = batch_size * model.out_bytes(cut.start)
    return Traffic(
        activation_up=at + (base if aligned else 0),
        activation_down=end + (at if aligned and align_at == "client" else 0),
        gradient_up=0 if reach == "tail" else end,
        gradient_down=at if reach == "front" else 0,
    )


@dataclass(frozen=True)
class LatencyModel:
    """Prices a batch in seconds: forward FLOPs F, backward 2F, one server that computes one request at a time.

    Attributes:
        model: What the blocks cost.
        batch_size: Examples in a batch.
        server_flops_per_second: Speed of the server, above 0.
        align_at: Where the alignment is computed: ``"server"``, ``"client"``, or ``None`` without alignment.
        optimizer_slots: Tensors that the clients' optimizer keeps per parameter; see `optimizer_slots`.
    """

    model: ModelProfile
    batch_size: int
    server_flops_per_second: float = float("inf")
    align_at: str | None = None
    optimizer_slots: int = 0

    def batch(
        self, cut: Cut, client: ClientProfile, batch_size: int | None = None, reach: Reach = "front"
    ) -> BatchSeconds:
        """Return the seconds of one batch of one client that has the server to itself.

        Args:
            cut: The client's cut.
            client: Its device and link.
            batch_size: Examples, if not a full batch.
            reach: How far back the gradient goes.
        """
        size = self.batch_size if batch_size is None else batch_size
        model, sent = self.model, batch_bytes(cut, self.model, size, self.align_at, reach)
        front = size * model.flops(0, cut.at) / client.flops_per_second
        tail = size * (model.flops(cut.end, len(model.blocks)) + model.head.flops) / client.flops_per_second
        body = size * model.flops(cut.at, cut.end) / self.server_flops_per_second
        copies = size * model.flops(cut.start, cut.at) / self.server_flops_per_second if self.align_at else 0.0
        return BatchSeconds(
            front=front + sent.activation_up / client.up,
            body_forward=body + copies,
            tail=sent.activation_down / client.down + 3 * tail + sent.gradient_up / client.up,
            body_backward=0.0 if reach == "tail" else 2 * body,
            front_backward=sent.gradient_down / client.down + (2 * front if reach == "front" else 0.0),
        )


def with_weights(batches: Sequence[BatchSeconds], down: float, up: float) -> list[BatchSeconds]:
    """Return a fit's batches where the client's own weights come down before the first and go up after the last.

    Args:
        batches: At least one.
        down: Seconds of the way down.
        up: Seconds of the way up.
    """
    begun = [replace(batches[0], front=batches[0].front + down), *batches[1:]]
    return [*begun[:-1], replace(begun[-1], front_backward=begun[-1].front_backward + up)]


def sequential_seconds(clients: Sequence[Sequence[BatchSeconds]]) -> float:
    """Return the seconds of a round in which one client trains after the other."""
    return sum(batch.total for batches in clients for batch in batches)


def asynchronous_seconds(clients: Sequence[Sequence[BatchSeconds]]) -> float:
    """Return the seconds of a round in which all clients train at once and queue at one server, first come first.

    Args:
        clients: The batches of each client, in their order.
    """
    free, finished = 0.0, 0.0
    # (when a request reaches the server, whose it is, which batch, whether it is the backward half)
    requests = [(batches[0].front, index, 0, False) for index, batches in enumerate(clients) if batches]
    heapq.heapify(requests)
    while requests:
        arrival, index, step, backward = heapq.heappop(requests)
        batch = clients[index][step]
        free = max(arrival, free) + (batch.body_backward if backward else batch.body_forward)
        if not backward:
            heapq.heappush(requests, (free + batch.tail, index, step, True))
        elif step + 1 < len(clients[index]):
            following = free + batch.front_backward + clients[index][step + 1].front
            heapq.heappush(requests, (following, index, step + 1, False))
        else:
            finished = max(finished, free + batch.front_backward)
    return finished
