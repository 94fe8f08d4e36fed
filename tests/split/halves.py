"""Small split models for tests: a module, a server's body, and single training steps without a Trainer."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from fl_lightning.models import Model, cnn2, gpt, lenet5, resnet18, timm_model, vit
from fl_lightning.module import FitContext
from fl_lightning.split.alignment import Alignment
from fl_lightning.split.body import ServerBody
from fl_lightning.split.exchange import Exchange
from fl_lightning.split.module import SplitModule

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def small_vit() -> Model:
    return vit(num_classes=5, image_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2)


def small_lenet() -> Model:
    return lenet5(num_classes=5, image_size=16)


def small_gpt() -> Model:
    return gpt(num_classes=11, image_size=6, width=16, depth=3, num_heads=2)


def small_cnn() -> Model:
    return cnn2(num_classes=5, image_size=16)


def small_resnet() -> Model:
    return resnet18(num_classes=5)


def timm_resnet() -> Model:
    return timm_model("test_resnet", num_classes=5)


def timm_vit() -> Model:
    return timm_model("test_vit2", num_classes=5, image_size=16)  # registers, average pooling


def padded_gpt() -> Model:
    return gpt(num_classes=11, image_size=6, width=16, depth=3, num_heads=2, padding=0)


MODELS = {"vit": small_vit, "lenet": small_lenet, "gpt": small_gpt}
DEEP = {
    "cnn": small_cnn,
    "resnet": small_resnet,
    "timm_resnet": timm_resnet,
    "timm_vit": timm_vit,
    "padded_gpt": padded_gpt,
}


def batch_for(name: str, seed: int = 0, size: int = 3) -> tuple[Tensor, Tensor]:
    """A batch of the inputs that a model of `MODELS` takes."""
    generator = torch.Generator().manual_seed(seed)
    if name.endswith("gpt"):
        tokens = torch.randint(11, (size, 6), generator=generator)
        tokens[0, :3] = 0  # padding, for a model that knows of it
        return tokens, torch.randint(11, (size,), generator=generator)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.randint(5, (size,), generator=generator)


def make_module(name: str, end: int = -1, start: int = 1, optimizer=SGD) -> SplitModule:
    """A split module with the same weights every time."""
    torch.manual_seed(0)
    module = SplitModule({**MODELS, **DEEP}[name](), start=start, end=end)
    module.context = FitContext(optimizer)
    return module


def make_body(module: SplitModule, weight: float = 0.0, at: str = "server", optimizer=SGD, **rest) -> ServerBody:
    """A server's body with the module's weights."""
    alignment = Alignment(weight=weight, at=at)
    return ServerBody(module, optimizer, alignment, **rest)


def connect(module: SplitModule, body: ServerBody, at: int) -> Exchange:
    """Attach a client at a cut."""
    exchange = Exchange(body, module.cut_at(at), body.alignment)
    module.connect(exchange)
    return exchange


def step(module: SplitModule, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    """One training step as Lightning makes it; returns the loss of the task."""
    module.train()
    loss = module.training_step(batch, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return module.context.losses[-1].item()


def twin(module: SplitModule) -> SplitModule:
    """A copy that shares nothing, with its own blocks."""
    exchange, module.exchange = module.exchange, None
    copied = copy.deepcopy(module)
    module.exchange = exchange
    return copied


def whole_state(module: SplitModule, body: ServerBody, exchange: Exchange) -> dict[str, Tensor]:
    """All tensors of a client's personal model: its own, and the server's behind its cut."""
    held = module.parts(exchange.cut)
    own = module.state_dict()
    server = body.state()
    return {name: server[name] if name in held.body else own[name].clone() for name in own}
