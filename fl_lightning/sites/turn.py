"""A site's work on a model whose middle the server holds: what crosses in its midst, and what becomes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, cast, get_args

import torch
from torch import Tensor

from fl_lightning.executors.serial import torch_threads
from fl_lightning.sites.frame import MessageError, integer, number
from fl_lightning.sites.messages import Content
from fl_lightning.split.body import ServerBody
from fl_lightning.split.cost import Reach
from fl_lightning.split.cut import Cut
from fl_lightning.state import State

TENSORS = {"forward": {"activation", "base"}, "backward": {"gradient"}, "evaluate": {"activation"}}
"""All tensors that a site may send in the midst of its work, by call: no inputs, no labels, no weights."""


class Turn:
    """The server's half of one client's work. It begins with a body of its own, and whoever dies, it begins again.

    Args:
        new_body: Makes the body as the work begins with it.
        cut: The client's cut.
        shapes: Of one example's output of each block.
        precision: Of a fit: ``32-true`` or ``bf16-mixed``; scores are computed in float32.
        threads: Threads that torch uses, at least 1.
    """

    def __init__(
        self,
        new_body: Callable[[], ServerBody],
        cut: Cut,
        shapes: Sequence[torch.Size],
        precision: str = "32-true",
        threads: int = 1,
    ) -> None:
        self.new_body, self.cut, self.shapes, self.threads = new_body, cut, shapes, threads
        self.mixed = precision == "bf16-mixed"
        self._body: ServerBody | None = None

    def begin(self) -> None:
        """Forget what came so far."""
        self._body = None

    @property
    def body(self) -> ServerBody:
        """The body as it is now."""
        if self._body is None:
            self._body = self.new_body()
        return self._body

    def answer(self, header: Mapping[str, Any], sent: State) -> State:
        """Answer a site in the midst of its work.

        Raises:
            MessageError: If what it sends does not belong here; the body has not moved.
        """
        what = str(header.get("what"))
        calls = {"forward": self._forward, "backward": self._backward, "evaluate": self._evaluate}
        if what not in calls:
            raise MessageError(f"a site may ask for {', '.join(calls)} in the midst of its work, got {what!r}")
        if strange := sent.keys() - TENSORS[what]:
            raise MessageError(f"{what} may hold {', '.join(sorted(TENSORS[what]))}, got {', '.join(sorted(strange))}")
        try:
            with torch_threads(self.threads):
                return calls[what](header, sent)
        except (RuntimeError, ValueError, TypeError) as error:
            raise MessageError(str(error).splitlines()[0]) from error

    def _forward(self, header: Mapping[str, Any], sent: State) -> State:
        batch, reach = integer(header, "batch"), cast(Reach, header.get("reach"))
        if reach not in get_args(Reach):
            raise MessageError(f"`reach` of a message must be one of {', '.join(get_args(Reach))}, got {reach!r}")
        if batch == 0:  # a fit may begin anew by itself
            self.begin()
        if batch != len(self.body.batches):
            raise MessageError(f"batch {len(self.body.batches)} of its turn must be next, got {batch}")
        activation = self._checked("activation", sent, self.cut.at)
        base = self._checked("base", sent, self.cut.start) if "base" in sent else None
        if base is not None and len(base) != len(activation):
            raise MessageError(f"`base` must have {len(activation)} examples, got {len(base)}")
        with self._precision():
            output, copies = self.body.forward(self.cut, activation, base, reach)
        return {"output": output} if copies is None else {"output": output, "copies": copies}

    def _backward(self, header: Mapping[str, Any], sent: State) -> State:
        waits = self.body.waits_for()
        if waits is None or "gradient" not in sent:
            raise MessageError("a gradient must follow an activation")
        gradient = sent["gradient"].to(self._device)
        if (gradient.shape, gradient.dtype) != waits:
            raise MessageError(
                f"the gradient must be {waits[1]} {tuple(waits[0])}, got {gradient.dtype} {tuple(gradient.shape)}"
            )
        if not bool(torch.isfinite(gradient).all()):
            raise MessageError("its gradient holds NaN or an infinity; lower the learning rate or clip gradients")
        down = self.body.backward(gradient, number(header, "scale", 1.0))
        return {} if down is None else {"gradient": down}

    def _evaluate(self, header: Mapping[str, Any], sent: State) -> State:
        activation = self._checked("activation", sent, self.cut.at, finite=False)
        with self._precision():
            return {"output": self.body.evaluate(self.cut, activation)}

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self.mixed else nullcontext()

    @property
    def _device(self) -> torch.device:
        return next(self.body.blocks.parameters(), torch.empty(0)).device

    def _checked(self, name: str, sent: State, boundary: int, finite: bool = True) -> Tensor:
        """Return what came, if it is what crosses before a block."""
        kinds = (torch.float32, torch.bfloat16) if self.mixed else (torch.float32,)
        expected = self.shapes[boundary - 1]
        tensor = sent.get(name)
        if tensor is None or tensor.ndim == 0 or len(tensor) == 0 or tensor.shape[1:] != expected:
            got = "none" if tensor is None else str(tuple(tensor.shape))
            raise MessageError(f"`{name}` must be of shape (N, {', '.join(map(str, expected))}), got {got}")
        if tensor.dtype not in kinds:
            raise MessageError(f"`{name}` must be {kinds[0]}, got {tensor.dtype}")
        if finite and not bool(torch.isfinite(tensor).all()):
            raise MessageError(f"`{name}` holds NaN or an infinity; lower the learning rate or clip gradients")
        return tensor.to(self._device)


class RemoteBody:
    """The server's half as a site sees it: it is asked.

    Args:
        ask: Sends a header and tensors, and returns the tensors that come back.
    """

    def __init__(self, ask: Callable[[dict[str, Any], State], State]) -> None:
        self.ask = ask
        self.begin()

    def begin(self) -> None:
        """Begin a fit: the next batch is its first."""
        self._batch = 0

    def forward(self, cut: Cut, activation: Tensor, base: Tensor | None, reach: Reach) -> tuple[Tensor, Tensor | None]:
        """Exchange messages 1 and 2."""
        sent = {"activation": activation} if base is None else {"activation": activation, "base": base}
        found = self.ask({"what": "forward", "batch": self._batch, "reach": reach}, sent)
        self._batch += 1
        copies = found.get("copies")
        return found["output"].to(activation.device), None if copies is None else copies.to(activation.device)

    def backward(self, gradient: Tensor, scale: float) -> Tensor | None:
        """Exchange messages 3 and 4."""
        down = self.ask({"what": "backward", "scale": scale}, {"gradient": gradient}).get("gradient")
        return None if down is None else down.to(gradient.device)

    def evaluate(self, cut: Cut, activation: Tensor) -> Tensor:
        """Return the body's output without training."""
        return self.ask({"what": "evaluate"}, {"activation": activation})["output"].to(activation.device)


class EndedError(Exception):
    """The server has begun something else: this work is of no use to anybody any more."""


class Dialog:
    """Work in a thread, which may ask the server before it has an answer.

    Args:
        ticket: Names the work.
        work: What is done; it asks by :meth:`ask`.
    """

    def __init__(self, ticket: str, work: Callable[[], Content]) -> None:
        self.ticket = ticket
        self._work = work
        self._said: SimpleQueue[Content | BaseException] = SimpleQueue()
        self._heard: SimpleQueue[State | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> Content:
        """Begin, and return the first question, or the answer."""
        self._thread.start()
        return self._next()

    def hear(self, answer: State) -> Content:
        """Hand over what the server answered, and return the next question, or the answer."""
        self._heard.put(answer)
        return self._next()

    def end(self) -> None:
        """Let the work come to nothing."""
        self._heard.put(None)
        self._thread.join()

    def ask(self, header: dict[str, Any], sent: State) -> State:
        """Ask the server, from within the work."""
        self._said.put(({"kind": "exchange", "ticket": self.ticket, **header}, {"sent": sent}))
        heard = self._heard.get()
        if heard is None:
            raise EndedError
        return heard

    def _next(self) -> Content:
        said = self._said.get()
        if isinstance(said, BaseException):
            raise said
        return said

    def _run(self) -> None:
        try:
            self._said.put(self._work())
        except BaseException as error:  # whoever waits for the answer gets it
            self._said.put(error)
