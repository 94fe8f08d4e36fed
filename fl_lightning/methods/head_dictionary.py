"""FedFTHA's server side: a dictionary of the clients' heads, averaged when a global model is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.checks import one_of
from fl_lightning.state import State, match, snapshot, weighted_mean, with_prefix, without_prefix
from fl_lightning.task import Classification

if TYPE_CHECKING:
    from fl_lightning.client import Client, ClientInfo, Update
    from fl_lightning.module import FederatedModule

Average = Literal["uniform", "class_wise", "sample_weighted"]
Include = Literal["all", "seen"]
COUNTS = "label_counts"
PREFIX = "head dictionary|"


class HeadDictionary(FederatedCallback):
    """Keeps the last head that each client sent, and makes a global head of them.

    Wang, Xu, Ali, Li, Zhou, Shao, FedFTHA: A Fine-Tuning and Head Aggregation Method in Federated Learning, IEEE IoT
    Journal 10(14), 2023. The head stays the client's own; the dictionary is the server's replica of it. The global head
    is formed when somebody asks for the global model and never flows back: training is the same with and without.

    Args:
        head: Shell patterns of the head's tensors. Those that ``sharing`` exchanges anyway are left out.
        average: ``uniform``; ``sample_weighted``, by training examples; or ``class_wise``: row c of the last layer is
            the mean over the clients whose data contain class c, by the label counts they sent. A class that none of
            them holds, and tensors without a row for each class, take the uniform mean.
        include: ``all``: clients never heard of count with the initial head, which holds no class. ``seen``: they do
            not.
    """

    saved = ("heads",)

    def __init__(self, head: Sequence[str] = ("head",), average: Average = "uniform", include: Include = "all") -> None:
        one_of("average", average, Average)
        one_of("include", include, Include)
        self.head = tuple(head)
        self.average = average
        self.include = include
        self.heads: dict[int, State] = {}

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        if self.average == "class_wise" and not isinstance(module.task, Classification):
            raise ValueError(
                f"callbacks.{self.name}.average must be uniform under task={module.task.name}, where a head has no row "
                "for each class, got class_wise"
            )

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        own = module.state_dict()
        entry = snapshot(own, [name for name in match(own, self.head) if name not in update.state])
        if self.average == "class_wise":
            entry[COUNTS] = client.data.label_counts("train")
        update.extra.update(with_prefix(PREFIX, entry))

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        self.heads[client.id] = without_prefix(PREFIX, update.extra)

    @override
    def on_round_end(self, loop: Server) -> None:
        loop.log({"heads/untouched": len(loop.clients) - len(self.heads)})

    @override
    def global_state(self, loop: Server) -> State:
        initial = loop.initial
        names = [name for name in match(initial, self.head) if name not in loop.state]
        counted = [client for client in loop.clients if self.include == "all" or client.id in self.heads]
        heads = [self.heads.get(client.id, initial) for client in counted]
        if not names or not heads:
            return {name: initial[name] for name in names}
        weights = [client.num_examples if self.average == "sample_weighted" else 1 for client in counted]
        mean = weighted_mean([{name: head[name] for name in names} for head in heads], weights)
        holders = [head for head in heads if COUNTS in head]
        if self.average == "class_wise" and holders:
            return {name: class_wise_mean(mean[name], name, holders) for name in names}
        return mean


def class_wise_mean(mean: Tensor, name: str, heads: Sequence[State]) -> Tensor:
    """Average each row of a tensor over the heads whose clients hold its class.

    Args:
        mean: ``(C, ...)``, what a class without holders gets.
        name: The tensor's name in the heads.
        heads: Heads with ``label_counts`` ``(C,)``.

    Returns:
        ``(C, ...)``, or ``mean`` itself if it has not one row for each class.
    """
    held = torch.stack([head[COUNTS] > 0 for head in heads]).to(torch.float64)  # (K, C)
    if not name.startswith("head.") or len(mean) != held.shape[1]:
        return mean
    rows = torch.stack([head[name].to(torch.float64) for head in heads])  # (K, C, ...)
    sums = torch.einsum("kc,kc...->c...", held, rows)
    number = held.sum(0).view(-1, *[1] * (mean.dim() - 1))
    return torch.where(number > 0, sums / number.clamp(min=1), mean.to(torch.float64)).to(mean.dtype)
