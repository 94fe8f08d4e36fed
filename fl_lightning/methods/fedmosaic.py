"""FedMosaic: unlike transformers exchange adapters of one size, each most with those whose data are like its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from fl_lightning.aggregators import Aggregator, Weights
from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import ArgumentError, above, at_least, whole, within
from fl_lightning.methods.own_architecture import FIRST, Choice
from fl_lightning.methods.own_architecture import whole as joined
from fl_lightning.models.adapters import Adapters, is_transposed, layer_sides
from fl_lightning.models.model import Model
from fl_lightning.module import Batch, FederatedModule
from fl_lightning.sharing import Sharing
from fl_lightning.state import State, snapshot

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, ClientInfo, Update

RELEVANCE = "relevance"


class TwoAdapters(nn.Module):
    r"""What is added to a layer's output: :math:`(1 - \sigma(\beta))\, L(h) + \sigma(\beta)\, G(h)`.

    L is the client's own adapter and trains, G came down and does not. Both are
    :math:`\frac{\alpha}{r} B (P A h + Q)` with A (r, in) and B (out, r) that nobody trains, or plain
    :math:`\frac{\alpha}{r} B A h`.

    Args:
        layer: The layer, a linear one.
        rank: r, at most the smaller side of the layer's weight.
        scale: :math:`\alpha / r`.
        invariant: Whether they are of the first kind, of which P and Q travel: their sizes are the same at all layers.
        mix: In the place of :math:`\sigma(\beta)`; None: it is learnt, from 0.5 on.
    """

    def __init__(self, layer: nn.Module, rank: int, scale: float, invariant: bool, mix: float | None) -> None:
        super().__init__()
        self.scale, self.mix, self.invariant = scale, mix, invariant
        outputs, inputs = layer_sides(layer)
        if invariant:
            self.register_buffer("fixed_a", closest_orthonormal(torch.randn(rank, inputs)))
            self.register_buffer("fixed_b", closest_orthonormal(torch.randn(outputs, rank)))
            start = {"p": torch.zeros(rank, rank), "q": torch.zeros(rank)}
        else:
            start = {"a": torch.randn(rank, inputs) / inputs**0.5, "b": torch.zeros(outputs, rank)}
        self.local, self.received = nn.Module(), nn.Module()
        for name, tensor in start.items():
            self.local.register_parameter(name, nn.Parameter(tensor))
            self.received.register_buffer(name, tensor.clone())
        if mix is None:
            self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """Return what is added, (..., out), for the layer's inputs (..., in)."""
        own, theirs = (
            self._one(h, dict(self.local.named_parameters())),
            self._one(h, dict(self.received.named_buffers())),
        )
        share = self.gate.sigmoid() if self.mix is None else self.mix
        added: Tensor = self.scale * ((1 - share) * own + share * theirs)
        return added

    def _one(self, h: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        if not self.invariant:
            return functional.linear(functional.linear(h, tensors["a"]), tensors["b"])
        inner = functional.linear(functional.linear(h, self.get_buffer("fixed_a")), tensors["p"], tensors["q"])
        return functional.linear(inner, self.get_buffer("fixed_b"))


class MosaicModel(FederatedModule):
    """A frozen transformer of one of several architectures, two adapters beside some of its layers, and a head.

    Seo, Kim, Lee, Choi, Tuytelaars, Not All Clients Are Equal: Collaborative Model Personalization on Heterogeneous
    Multi-Modal Clients (FedMosaic; Co-LoRA), ICLR 2026, https://arxiv.org/abs/2506.11024. A transformer's blocks are
    cut into as many parts as all others'; the last block of each part has adapters of one size for all architectures,
    the others plain ones, which only clients of the same architecture exchange. What stands fixed around the former is
    aligned once, on inputs that are nobody's: A by least squares to what the first architecture's gives, made
    orthonormal, B by canonical correlation (:func:`canonical_map`).

    Read from the paper's summaries and facts of the authors' code. There, public data align, token by token, and A
    takes gradient steps; here random inputs do, in closed form, and by the means over tokens where numbers of tokens
    differ. In the code, not in the paper, a layer's share depends on its input. Heads are the clients' own: there is
    one vocabulary, here are classes.

    Args:
        model: The first architecture, as in :class:`FederatedModule`.
        num_classes: Outputs of a head.
        in_channels: Channels of an image.
        image_size: Height and width of an image, or the length of a sequence of tokens.
        others: Other architectures by name.
        clients: Whose is which, by the clients' names, ``model`` for the first; None: in turn, beginning with it.
        rank: r of all adapters, at least 1.
        alpha: What they add is multiplied by ``alpha / rank``; above 0.
        parts: Parts that the blocks are cut into, at least 1 and at most the blocks of any of them.
        targets: Layers with adapters, as in :class:`~fl_lightning.models.adapters.Adapters`.
        mix: Share of what came down in an adapted layer, in [0, 1]; None: each layer's is learnt. At 0 clients train
            alone.
        public: Number of random inputs that align, at least 2.
        label_smoothing: As there.

    Raises:
        ValueError: If a backbone has BatchNorm, which would not stay frozen, or other layers than the first.
    """

    def __init__(
        self,
        model: Model,
        num_classes: int,
        in_channels: int,
        image_size: int,
        others: Mapping[str, Model] | None = None,
        clients: Mapping[str, str] | None = None,
        rank: int = 4,
        alpha: float = 8.0,
        parts: int = 4,
        targets: str | Sequence[str] = "attention",
        mix: float | None = None,
        public: int = 256,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing)
        whole("parts", parts, 1)
        whole("public", public, 2)
        within("mix", mix, "[0, 1]", or_null=True)
        adapters = Adapters(rank, alpha, targets)
        self.anchor = copy.deepcopy(model.head)
        self.others = nn.ModuleDict({name: joined(other) for name, other in (others or {}).items()})
        self.choice = Choice([FIRST, *self.others], clients, "others and model")
        self._chosen = FIRST
        self.adapters = nn.ModuleDict()
        #: Of each architecture: by the name of its adapters, the layer, and the place that all architectures have.
        self.layers: dict[str, dict[str, tuple[str, str | None]]] = {}
        for name in self.choice.names:
            backbone, where = self.backbone_of(name), "model" if name == FIRST else f"others.{name}"
            backbone.requires_grad_(False)
            if any(isinstance(part, _BatchNorm) for part in backbone.modules()):
                raise ArgumentError(f"{where} must be a transformer without BatchNorm for method=fedmosaic")
            self.layers[name] = _places(adapters.layers(backbone), backbone, parts, where)
            self.adapters[name] = nn.ModuleDict(
                {
                    key: TwoAdapters(backbone.get_submodule(layer), rank, alpha / rank, place is not None, mix)
                    for key, (layer, place) in self.layers[name].items()
                }
            )
            if self.invariant(name).keys() != self.invariant(FIRST).keys():
                raise ArgumentError(
                    f"{where} must have layers named as the first model's where adapters are, "
                    f"{', '.join(self.invariant(FIRST))}; got {', '.join(self.invariant(name))}"
                )
        self.anchor.requires_grad_(False)
        self._public: Tensor | None = None
        if others:
            known = min(_vocabulary(self.backbone_of(name)) for name in self.choice.names)
            shape = (public, in_channels, image_size, image_size)
            self._public = torch.randint(known, (public, image_size)) if known else torch.randn(shape)
            self.align(self._public)

    def backbone_of(self, name: str) -> nn.Module:
        """Return an architecture's backbone."""
        return self.backbone if name == FIRST else self.others[name].get_submodule("backbone")

    def pair(self, name: str, key: str) -> TwoAdapters:
        """Return the two adapters of a layer of an architecture."""
        found = self.adapters[name].get_submodule(key)
        assert isinstance(found, TwoAdapters)
        return found

    def invariant(self, name: str) -> dict[str, str]:
        """Return, by the place that all architectures have, the names of the adapters of one size."""
        return {place: key for key, (_, place) in self.layers[name].items() if place is not None}

    def exchanged(self, name: str) -> dict[str, str]:
        """Return the names of the tensors that come down to an architecture, by what they are compared by."""
        found = {}
        for key, (_, place) in self.layers[name].items():
            for tensor, _ in self.pair(name, key).received.named_buffers():
                same = f"{name}|{key}|{tensor}" if place is None else f"{place}|{tensor}"
                found[same] = f"adapters.{name}.{key}.received.{tensor}"
        return found

    @torch.no_grad()
    def align(self, inputs: Tensor) -> None:
        """Make the fixed parts of the other architectures' adapters fit those of the first, on some inputs (N, ...)."""
        first = self.inputs(FIRST, inputs)
        for name in self.others:
            own = self.inputs(name, inputs)
            for place, key in self.invariant(name).items():
                ours, theirs = self.pair(name, key), self.pair(FIRST, self.invariant(FIRST)[place])
                a, b, pivot = (
                    ours.get_buffer("fixed_a"),
                    ours.get_buffer("fixed_b"),
                    theirs.get_buffer("fixed_b").double(),
                )
                h, other = _alike(own[place], first[place])
                inner = other @ theirs.get_buffer("fixed_a").double().T
                a.copy_(closest_orthonormal(torch.linalg.lstsq(h, inner, rcond=1e-6, driver="gelsd").solution.T))
                mapped = canonical_map(inner @ pivot.T, h @ a.double().T @ b.double().T)
                b.copy_(mapped @ pivot)

    def inputs(self, name: str, inputs: Tensor) -> dict[str, Tensor]:
        """Return what comes into each layer with adapters of one size, by its place, float64 (N, tokens, in)."""
        found: dict[str, Tensor] = {}
        backbone = self.backbone_of(name)
        hooks = [
            backbone.get_submodule(self.layers[name][key][0]).register_forward_hook(_keep(found, place))
            for place, key in self.invariant(name).items()
        ]
        was = backbone.training
        backbone.eval()(inputs.to(next(backbone.parameters()).device))
        backbone.train(was)
        for hook in hooks:
            hook.remove()
        return found

    @override
    def start_from(self, state: State) -> None:
        super().start_from(state)
        self.anchor.load_state_dict({n.removeprefix("head."): x for n, x in state.items() if n.startswith("head.")})
        if self._public is not None:
            self.align(self._public)

    @override
    def for_client(self, client: Client) -> None:
        self._chosen = self.choice.of(client)
        unused = [f"adapters.{name}." for name in self.choice.names if name != self._chosen]
        unused += [f"others.{name}." for name in self.others if name != self._chosen]
        unused += [] if self._chosen == FIRST else ["head."]
        self.idle = frozenset(name for name in self.state_dict() if unused and name.startswith(tuple(unused)))

    @contextmanager
    def _adapted(self) -> Iterator[nn.Module]:
        backbone = self.backbone_of(self._chosen)
        hooks = [
            backbone.get_submodule(layer).register_forward_hook(_add(self.pair(self._chosen, key)))
            for key, (layer, _) in self.layers[self._chosen].items()
        ]
        try:
            yield backbone
        finally:
            for hook in hooks:
                hook.remove()

    @override
    def features(self, x: Tensor) -> Tensor:
        with self._adapted() as backbone:
            features: Tensor = backbone(x)
        return features

    @override
    def forward(self, x: Tensor) -> Tensor:
        head = self.head if self._chosen == FIRST else self.others[self._chosen].get_submodule("head")
        logits: Tensor = head(self.features(x))
        return logits

    def relevance(self, batch: Batch) -> Tensor:
        """Return the gradient (out, in) of a batch's loss by the last linear layer of the first backbone."""
        x, y = batch
        parts = self.backbone.named_modules()
        layers = [(name, part) for name, part in parts if isinstance(part, nn.Linear) or is_transposed(part)]
        name, last = f"{layers[-1][0]}.weight", layers[-1][1]
        weight = self.backbone.get_parameter(name).detach().requires_grad_()
        was = self.backbone.training
        self.backbone.eval()
        with torch.enable_grad():
            outputs = self.anchor(functional_call(self.backbone, {name: weight}, (x,)))
            [gradient] = torch.autograd.grad(self.criterion(outputs, y), weight)
        self.backbone.train(was)
        return gradient.T if is_transposed(last) else gradient


class MosaicSharing(Sharing):
    """Exchanges the adapters of a client's architecture; module is :class:`MosaicModel`.

    Arguments are those of :class:`~fl_lightning.sharing.Sharing`.
    """

    @override
    def names(self, module: nn.Module, client: Client | ClientInfo | None = None) -> list[str]:
        names = super().names(module)
        if client is None or not isinstance(module, MosaicModel):
            return names
        prefix = f"adapters.{module.choice.of(client)}."
        return [name for name in names if name.startswith(prefix)]


class RelevanceUpload(FederatedCallback):
    r"""Sends a client's own adapter, and with it :math:`v \leftarrow \frac{1}{2} (\bar g + v)`, what its data are like.

    :math:`\bar g` is the mean of gradients (:meth:`MosaicModel.relevance`) over some batches of a fit, of which a part
    is kept and Gaussian noise is added to each; in the first fit it is v itself.

    Args:
        every: Steps from one of these batches to the next, at least 1.
        keep: Share of the rows of a gradient that is kept, the first ones, in (0, 1].
        noise: Standard deviation of the noise, at least 0.
    """

    def __init__(self, every: int = 10, keep: float = 0.4, noise: float = 1e-4) -> None:
        whole("every", every, 1)
        within("keep", keep, "(0, 1]")
        at_least("noise", noise, 0)
        self.every = every
        self.keep = keep
        self.noise = noise

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        if not isinstance(module, MosaicModel):
            raise TypeError(
                f"callbacks.{self.name} needs the module fl_lightning.methods.fedmosaic.MosaicModel, got "
                f"{type(module).__name__}; set method=fedmosaic"
            )

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._found: list[Tensor] = []
        self._step = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step % self.every == 0:
            assert isinstance(pl_module, MosaicModel)
            gradient = pl_module.relevance(batch)
            kept = gradient[: max(1, int(self.keep * len(gradient)))].cpu()  # the noise is the same on any device
            self._found.append(kept + self.noise * torch.randn_like(kept))
        self._step += 1

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        own = module.state_dict()
        for name in update.state:
            update.state[name] = own[name.replace(".received.", ".local.")].detach().cpu().clone()
        if self._found:
            new = torch.stack(self._found).mean(0)
            client.memory[RELEVANCE] = (new + client.memory[RELEVANCE]) / 2 if RELEVANCE in client.memory else new
        if RELEVANCE in client.memory:
            update.extra[RELEVANCE] = client.memory[RELEVANCE]
        self._found = []


class RelevanceMean(Aggregator):
    r"""Sends each client :math:`G_i = \sum_{j \neq i} w_{ij} L_j` with :math:`w_{ij} \propto e^{S_{ij} / \tau}` (RELA).

    Seo et al., ICLR 2026. L is what clients sent last, S the cosine similarity of their vectors v, column by column and
    then averaged. The sum is over those who have the tensor: all clients for adapters of one size, those of the same
    architecture for the others. A client with no vector yet takes all alike; where nobody else has the tensor it gets
    its own.

    Args:
        tau: :math:`\tau`, above 0: the smaller, the more is taken from the nearest.
        weights: Only ``uniform``: similarities weigh.
    """

    saved = ("adapters", "vectors")

    def __init__(self, tau: float = 0.5, weights: Weights = "uniform") -> None:
        super().__init__(weights)
        if weights != "uniform":
            raise ValueError("aggregator weighs clients by their similarities; set aggregator.weights=uniform")
        above("tau", tau, 0)
        self.tau = tau
        self.adapters: dict[int, State] = {}
        self.vectors: dict[int, Tensor] = {}

    @override
    def setup(self, module: nn.Module, clients: Sequence[ClientInfo] = (), device: torch.device | None = None) -> None:
        super().setup(module, clients, device)
        if not isinstance(module, MosaicModel):
            raise TypeError(
                "aggregator needs the module fl_lightning.methods.fedmosaic.MosaicModel, got "
                f"{type(module).__name__}; set method=fedmosaic"
            )
        self._module = module

    @override
    def broadcast(self, state: State, client: ClientInfo) -> State:
        found = {}
        for same, name in self._module.exchanged(self._module.choice.of(client)).items():
            holders = [id for id, tensors in self.adapters.items() if same in tensors]
            others = [id for id in holders if id != client.id]
            if others:
                weights = self.shares(client.id, others)
                terms = [w * self.adapters[id][same] for w, id in zip(weights, others, strict=True)]
                found[name] = torch.stack(terms).sum(0)
            elif holders:
                found[name] = self.adapters[client.id][same]
        return {**state, **found}

    def shares(self, client_id: int, others: Sequence[int]) -> Tensor:
        """Return the weights of some clients for one of them, (K,), of sum 1."""
        if client_id not in self.vectors:
            return torch.full((len(others),), 1 / len(others))
        near = [similarity(self.vectors[client_id], self.vectors[other]) for other in others]
        return (torch.stack(near) / self.tau).softmax(0)

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        for update in updates:
            names = {name: same for same, name in self._exchanged_by(update.client_id, update.state).items()}
            self.adapters[update.client_id] = snapshot({names[name]: x for name, x in update.state.items()})
            self.vectors[update.client_id] = update.extra[RELEVANCE]
        return state

    def _exchanged_by(self, client_id: int, sent: State) -> dict[str, str]:
        [info] = [client for client in self.clients if client.id == client_id]
        return self._module.exchanged(self._module.choice.of(info))


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean over columns of the cosines of two vectors' columns, each (R, C)."""
    return functional.cosine_similarity(one, other, dim=0).mean()


def closest_orthonormal(matrix: Tensor) -> Tensor:
    """Return the matrix with orthonormal rows, or columns if it is taller, that is nearest to a given one."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ v
    return nearest


def canonical_map(x: Tensor, y: Tensor, ridge: float = 1e-4) -> Tensor:
    r"""Return the map (E, D) from one set of outputs to another by their canonical correlations.

    :math:`S_y^{1/2} U V^\top S_x^{-1/2}` with :math:`U \Sigma V^\top = S_y^{-1/2} S_{yx} S_x^{-1/2}`.

    Args:
        x: Outputs (N, D), float64.
        y: Outputs (N, E) for the same inputs.
        ridge: Added to both covariances.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    root_x, root_y = (_root(one.T @ one / len(one) + ridge * torch.eye(one.shape[1]).to(one)) for one in (x, y))
    u, _, v = torch.linalg.svd(root_y.inverse() @ (y.T @ x / len(x)) @ root_x.inverse(), full_matrices=False)
    found: Tensor = root_y @ u @ v @ root_x.inverse()
    return found


def _root(square: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(square)
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root


def _places(layers: Sequence[str], backbone: nn.Module, parts: int, where: str) -> dict[str, tuple[str, str | None]]:
    """Return, by a name without dots, each linear layer within a block, with its place if its block ends a part."""
    found = []
    for layer in layers:
        match = re.search(r"(?:^|\.)h?(\d+)\.(.+)$", layer)
        if match and not isinstance(backbone.get_submodule(layer), nn.Conv2d):
            found.append((layer, int(match[1]), match[2]))
    depths = sorted({number for _, number, _ in found})
    if len(depths) < parts:
        raise ArgumentError(f"parts must be at most {len(depths)}, the blocks with adapters of {where}, got {parts}")
    step = len(depths) // parts
    ends = [depths[part * step - 1] for part in range(1, parts)] + [depths[-1]]
    return {
        layer.replace(".", "_"): (layer, f"{ends.index(number)}|{rest}" if number in ends else None)
        for layer, number, rest in found
    }


def _vocabulary(backbone: nn.Module) -> int:
    """Return how many tokens a backbone knows; 0 where it reads none."""
    return next((part.num_embeddings for part in backbone.modules() if isinstance(part, nn.Embedding)), 0)


def _keep(found: dict[str, Tensor], place: str) -> Callable[..., None]:
    def keep(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        found[place] = inputs[0].double().flatten(1, -2).cpu()

    return keep


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two (N, tokens, D) as rows that belong together: tokens, or their means where there are not as many."""
    if one.shape[1] == other.shape[1]:
        return one.flatten(0, 1), other.flatten(0, 1)
    return one.mean(1), other.mean(1)


def _add(pair: TwoAdapters) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed: Tensor = output + pair(inputs[0])
        return changed

    return add
