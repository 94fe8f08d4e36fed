"""Trains the server's half of a cut model: forward, backward, optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_lightning.checks import above
from fl_lightning.fit.optimizer_state import pack, unpack
from fl_lightning.split.alignment import Alignment
from fl_lightning.split.blocks import named_tensors, run
from fl_lightning.split.cost import Reach
from fl_lightning.split.cut import Cut
from fl_lightning.split.module import SplitModule
from fl_lightning.split.traffic import Traffic
from fl_lightning.state import State, all_finite, overwrite, snapshot

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class ServerBody:
    """One copy of the blocks ``[start, end)``, updated by every client's batch.

    It knows neither inputs nor labels nor a client's weights: activations and gradients come in, activations and
    gradients go out. The same object serves clients in this process and over the network. It answers a client at a
    time, and counts what the client's batches send.

    Args:
        module: The whole model; the body's blocks are copied from it, so that no storage is shared, and its tensors are
            named after its ``state_dict``.
        optimizer: Makes the body's optimizer from its parameters.
        alignment: How private tops are held near the body's blocks.
        clip: Largest norm of a gradient of the body; ``None`` clips nothing. Clients clip their own.
        frozen: Whether the body is not trained; its BatchNorm statistics stand still too.
        guarded: Whether every gradient of the body must be finite before the body moves.
        device: Where it computes; None: where the module is.

    Attributes:
        batches: The sizes of the batches that were trained, in their order.
        traffic: What they sent.
    """

    def __init__(
        self,
        module: SplitModule,
        optimizer: MakeOptimizer,
        alignment: Alignment,
        clip: float | None = None,
        frozen: bool = False,
        guarded: bool = False,
        device: torch.device | None = None,
    ) -> None:
        above("clip", clip, 0, or_null=True)
        self.start = module.start
        own = list(module.blocks.values())[module.start : module.end]
        full: dict[int, list[str]] = {}
        for name, tensor in named_tensors(module).items():
            full.setdefault(id(tensor), []).append(name)
        local = named_tensors(nn.ModuleList(own))
        self._full_names = {name: full[id(tensor)].pop(0) for name, tensor in local.items()}
        self.blocks = copy.deepcopy(nn.ModuleList(own)).to(device)
        self.alignment = alignment
        self.clip = clip
        self.frozen = frozen
        self.guarded = guarded
        named = [(self._full_names[name], parameter) for name, parameter in self.blocks.named_parameters()]
        for name, parameter in named:
            parameter.requires_grad_(not frozen and name not in module.base_names)
        self.optimizer = optimizer([parameter for name, parameter in named if name not in module.base_names])
        self.begin()

    def begin(self) -> None:
        """Begin an account of batches."""
        self.batches: list[int] = []
        self.traffic = Traffic()
        self._outputs: list[Tensor] = []  # of the batch whose gradient has not come yet
        self._activation: Tensor | None = None

    def state(self) -> State:
        """Return copies of the body's tensors under the model's names."""
        return snapshot({self._full_names[name]: tensor for name, tensor in self.blocks.state_dict().items()})

    def load_state(self, state: State) -> None:
        """Take those tensors of a state of the model that are the body's; what is not in it stays as it is."""
        own = {self._full_names[name]: tensor for name, tensor in self.blocks.state_dict().items()}
        if held := own.keys() & state.keys():
            overwrite({name: own[name] for name in held}, {name: state[name] for name in held})

    def forward(self, cut: Cut, activation: Tensor, base: Tensor | None, reach: Reach) -> tuple[Tensor, Tensor | None]:
        """Answer message 1: train on an activation.

        Args:
            cut: The client's cut.
            activation: At the cut, ``(N, ...)``.
            base: The base's output, where alignment needs it.
            reach: How far back the gradient will go; at ``tail`` none comes.

        Returns:
            The body's output, and where the client aligns the output of the body's copies of its private top.
        """
        self.blocks.train(not self.frozen)
        self._outputs = []
        self._activation = activation.detach().requires_grad_(reach == "front")
        # The copy is a node of its own, behind which the body's gradient is summed up before the alignment's is added.
        with torch.enable_grad():
            output = run(self._used(cut), self._activation.clone())
        copies = None if base is None or self.alignment.place is None else self.copies(cut, base)
        down = copies if self.alignment.place == "client" else None
        if reach != "tail":
            self._outputs = [output]
            if copies is not None and down is None:
                with torch.enable_grad():
                    self._outputs.append(self.alignment(self._activation, copies))
        self.batches.append(len(activation))
        self.traffic.add("activation_up", activation, base)
        self.traffic.add("activation_down", output, down)
        return output.detach(), down

    def backward(self, gradient: Tensor, scale: float = 1.0) -> Tensor | None:
        """Answer message 3: move the body.

        Args:
            gradient: Of the loss with respect to the body's output.
            scale: By what the client multiplies its loss (accumulated batches).

        Returns:
            The gradient with respect to the activation at the cut, if it is wanted.

        Raises:
            ValueError: If the gradient of the body is not finite; the body has not moved.
        """
        assert self._activation is not None
        gradients = [gradient, *(torch.full_like(penalty, scale) for penalty in self._outputs[1:])]
        torch.autograd.backward(self._outputs, gradients)
        if self.guarded and not all_finite(
            {n: p.grad for n, p in self.blocks.named_parameters() if p.grad is not None}
        ):
            raise ValueError("its gradient would move the body to NaN or an infinity; lower the learning rate")
        self.step()
        wanted = self._activation.grad
        self.traffic.add("gradient_up", gradient)
        self.traffic.add("gradient_down", wanted)
        self._outputs, self._activation = [], None
        return wanted

    def waits_for(self) -> tuple[torch.Size, torch.dtype] | None:
        """Return shape and type of the gradient that is to come; None: no batch is under way."""
        return (self._outputs[0].shape, self._outputs[0].dtype) if self._outputs else None

    @torch.no_grad()
    def evaluate(self, cut: Cut, activation: Tensor) -> Tensor:
        """Return the body's output without training."""
        self.blocks.eval()
        return run(self._used(cut), activation)

    def step(self) -> None:
        """Update the body with the gradients that are there, and forget them. Blocks without one stay as they are."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.blocks.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _used(self, cut: Cut) -> list[nn.Module]:
        return list(self.blocks)[cut.at - self.start :]

    @torch.no_grad()
    def copies(self, cut: Cut, base: Tensor) -> Tensor:
        """Return what the server's copies of a client's private top make of its base's output, without a trace.

        BatchNorm layers normalise as in training but their running statistics stay as they are: only the clients that
        leave these blocks to the server may move them.
        """
        for block in list(self.blocks)[: cut.at - self.start]:
            buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
            base = functional_call(block, buffers, (base,)) if buffers else block(base)
        return base

    def optimizer_state(self) -> dict[str, Any]:
        """Return what the optimizer keeps, by the names of the tensors: plain values and copies on the CPU."""
        return pack(self.optimizer, self._parameter_names())

    def load_optimizer_state(self, packed: dict[str, Any]) -> None:
        """Take back what `optimizer_state` gave."""
        unpack(self.optimizer, packed, self._parameter_names())

    def _parameter_names(self) -> dict[Tensor, str]:
        return {parameter: self._full_names[name] for name, parameter in self.blocks.named_parameters()}
