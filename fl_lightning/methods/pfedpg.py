"""pFedPG: the server learns to generate a prompt for each client, under a vision transformer that nobody trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fl_lightning.aggregators import Aggregator, Weights
from fl_lightning.checks import at_least, whole
from fl_lightning.client import ClientInfo, Update
from fl_lightning.models.model import Model
from fl_lightning.models.prompts import inserted
from fl_lightning.module import Batch, FederatedModule
from fl_lightning.state import RunningMean, State

PROMPT = "prompt.tokens"


class PromptedTransformer(FederatedModule):
    """Trains prompt tokens and the head of a vision transformer whose backbone stays as it is.

    The tokens stand behind the class token in all blocks, and are taken out after them. They are named
    ``prompt.tokens``, ``(K, D)``. The personal model has them, the global one, where heads are shared, does not.

    Args:
        model: As in :class:`FederatedModule`; its backbone must be timm's ``VisionTransformer``.
        tokens: K, at least 1.
        label_smoothing: As there.
    """

    def __init__(self, model: Model, tokens: int = 10, label_smoothing: float = 0.0) -> None:
        super().__init__(model, label_smoothing)
        whole("tokens", tokens, 1)
        if not isinstance(model.backbone, VisionTransformer):
            raise ValueError(
                "model must be a vision transformer of timm where prompts are generated for it, got "
                f"{type(model.backbone).__name__}; set model=vit_tiny, or model=timm model.name=vit_small_patch16_224"
            )
        self.backbone.requires_grad_(False)
        self.prompt = nn.Module()
        width = model.backbone.embed_dim
        self.prompt.register_parameter("tokens", nn.Parameter(0.02 * torch.randn(tokens, width)))
        #: Whence the server's generator begins, so that it follows from the run's seed.
        self.generator_seed = int(torch.randint(2**31, ()))

    @override
    def personal_forward(self, x: Tensor) -> Tensor:
        backbone, prompt = self.backbone, self.prompt.get_parameter("tokens")
        assert isinstance(backbone, VisionTransformer)
        with inserted(backbone, prompt):
            logits: Tensor = self(x)
        return logits

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return self.criterion(self.personal_forward(x), y)


class PromptGenerator(Aggregator):
    r"""Generates prompts :math:`P_n = P + \mathrm{softmax}(d_n W_Q (B W_K)^\top / \sqrt D)\, B W_V W_O`, and learns to.

    B is the basis P, each token normalised to mean 0 and variance 1. Client n starts from :math:`P_n`; the change
    :math:`\Delta P_n` in what it sends back is taken for the negative gradient at :math:`P_n`: the server takes a step
    down :math:`-\sum_n w_n \langle P_n, \Delta P_n \rangle` in the basis P, the descriptors :math:`d_n` and the
    matrices, with :math:`w_n` the clients' normalised weights.

    Yang, Wang, Wang, Efficient Model Personalization in Federated Learning via Client-Specific Prompt Generation, ICCV
    2023, https://arxiv.org/abs/2308.15367, of which abstract and figures could be read. Read: one head of attention,
    whose output is added to all tokens; :math:`W_O` begins at 0, so that all clients begin with one prompt; plain SGD.
    A client that the server has never heard of gets the prompt of the mean descriptor. Other shared tensors are
    averaged.

    Args:
        lr: Step size of the basis, at least 0. At 1 with ``generator_lr=0`` prompts are averaged as in FedAvg.
        generator_lr: Step size of descriptors and matrices, at least 0.
        weights: As in :class:`~fl_lightning.aggregators.Aggregator`.
    """

    saved = ("tensors",)

    def __init__(self, lr: float = 1.0, generator_lr: float = 0.3, weights: Weights = "examples") -> None:
        super().__init__(weights)
        at_least("lr", lr, 0)
        at_least("generator_lr", generator_lr, 0)
        self.lr = lr
        self.generator_lr = generator_lr
        self.tensors: State = {}

    @override
    def setup(self, module: nn.Module, clients: Sequence[ClientInfo] = (), device: torch.device | None = None) -> None:
        super().setup(module, clients, device)
        if not isinstance(module, PromptedTransformer):
            raise TypeError(
                "aggregator needs the module fl_lightning.methods.pfedpg.PromptedTransformer, got "
                f"{type(module).__name__}; set method=pfedpg"
            )
        self.places = {client.id: place for place, client in enumerate(clients)}
        basis = module.state_dict()[PROMPT].detach().cpu().clone()
        width = basis.shape[1]
        draw = torch.Generator().manual_seed(module.generator_seed)
        self.tensors = {"basis": basis, "descriptors": torch.randn(len(clients), width, generator=draw)}
        for name, scale in {"query": width**-0.5, "key": width**-0.5, "value": 1 / width}.items():
            self.tensors[name] = torch.randn(width, width, generator=draw) * scale
        self.tensors["out"] = torch.zeros(width, width)

    def generate(self, tensors: State, client_id: int) -> Tensor:
        """Return the prompt ``(K, D)`` of a client."""
        basis, descriptors = tensors["basis"], tensors["descriptors"]
        place = self.places.get(client_id)
        descriptor = descriptors.mean(0) if place is None else descriptors[place]
        normal = functional.layer_norm(basis, basis.shape[1:])
        scores = (descriptor @ tensors["query"]) @ (normal @ tensors["key"]).T / basis.shape[1] ** 0.5
        prompt: Tensor = basis + scores.softmax(0) @ normal @ tensors["value"] @ tensors["out"]
        return prompt

    @override
    def broadcast(self, state: State, client: ClientInfo) -> State:
        return {**state, PROMPT: self.generate(self.tensors, client.id)}

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in self.tensors.items()}
        value, total, rest = torch.zeros(()), 0.0, RunningMean()
        with torch.enable_grad():
            for update in updates:
                weight = self.weight(update)
                prompt = self.generate(tensors, update.client_id)
                value = value - weight * (prompt * (update.state[PROMPT] - prompt).detach()).sum()
                total += weight
                rest.add({name: tensor for name, tensor in update.state.items() if name != PROMPT}, weight)
        if total:
            slopes = torch.autograd.grad(value / total, list(tensors.values()))
            for (name, tensor), slope in zip(self.tensors.items(), slopes, strict=True):
                self.tensors[name] = tensor - (self.lr if name == "basis" else self.generator_lr) * slope
        return {**state, **rest.compute(), PROMPT: self.tensors["basis"].clone()}
