"""What does ``personalize.py`` cost, with all its strategies, beside the passes that it needs?

    python -m benchmarks.personalize [--epochs 15] [--repeats 3]

The bundled digits and LeNet-5. The first run is watched: every pass through the model is written down, forward alone or
with the backward pass, of how many images, with the backbone frozen or not. A bare script then does the same passes in
the same order, with an optimizer's step after each that trains; the command, all but its start and its pictures, is
timed beside it, in one process of one thread.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import circumstances, interleaved, ratio, spread
from benchmarks.workloads import LR, MOMENTUM
from fl_lightning import personalization
from fl_lightning.models import lenet5
from fl_lightning.module import FederatedModule
from fl_lightning.run import training
from fl_lightning.run.config import CONF


@dataclass(frozen=True)
class Pass:
    """One pass through the model.

    Attributes:
        images: Of how many images.
        trains: Whether gradients are asked for.
        whole: Whether of the backbone, too.
    """

    images: int
    trains: bool
    whole: bool


def passes_of(work: Callable[[], Any]) -> list[Pass]:
    """Return the passes that something takes through modules, in order."""
    found: list[Pass] = []
    features = FederatedModule.features

    def watched(self: FederatedModule, x: Tensor) -> Tensor:
        whole = any(parameter.requires_grad for parameter in self.backbone.parameters())
        found.append(Pass(len(x), torch.is_grad_enabled(), whole))
        return features(self, x)

    with patch.object(FederatedModule, "features", watched):
        work()
    return found


class BareScript:
    """Takes given passes through a model, by hand."""

    def __init__(self, passes: list[Pass]) -> None:
        self.passes = passes
        model = lenet5(10)
        self.backbone, self.head = model.backbone, model.head
        self.parameters = [*self.backbone.parameters(), *self.head.parameters()]
        most = max(one.images for one in passes)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(most, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (most,), generator=generator)

    def __call__(self) -> None:
        """Take them once."""
        optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM)
        for one in self.passes:
            index = torch.randperm(len(self.images))[: one.images]
            x, y = self.images[index], self.labels[index]
            if not one.trains:
                with torch.inference_mode():
                    functional.cross_entropy(self.head(self.backbone(x)), y)
                continue
            optimizer.zero_grad()
            with torch.set_grad_enabled(one.whole):
                features = self.backbone(x)
            functional.cross_entropy(self.head(features), y).backward()
            optimizer.step()


def configuration(name: str, *overrides: str) -> DictConfig:
    """Compose what the command would have been given."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, ["logger=none", "model=lenet5" if name == "train" else "figures=false", *overrides])


def measure(epochs: int, repeats: int) -> tuple[list[Pass], dict[str, list[float]]]:
    """Return the passes of the command, and the seconds of both by name."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        quiet = redirect_stdout(io.StringIO())
        with quiet:
            training.run(configuration("train", "loop.rounds=1", "dashboard=null"), folder / "global")
        given = (f"checkpoint={folder / 'global'}", f"epochs={epochs}", f"lp_epochs={epochs // 2}", "executor=serial")
        config = configuration("personalize", *given)
        numbers = iter(range(repeats + 1))

        def command() -> None:
            with quiet:
                personalization.run(config, folder / f"run_{next(numbers)}")

        passes = passes_of(command)
        return passes, interleaved({"bare": BareScript(passes), "personalize": command}, repeats, warm_up=0)


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(circumstances())
    passes, seconds = measure(arguments.epochs, arguments.repeats)
    for what, some in (("trained", True), ("scored", False)):
        images = [one.images for one in passes if one.trains is some]
        print(f"{what}: {len(images)} batches, {sum(images)} images")
    print(
        f"all strategies, {arguments.epochs} epochs: bare {statistics.median(seconds['bare']):.2f} s, "
        f"personalize.py {ratio(seconds, 'personalize'):.3f} ({spread(seconds, 'personalize')}), target 1.15"
    )


if __name__ == "__main__":
    main()
