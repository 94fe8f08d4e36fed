"""Lightning code of somebody who has never heard of this library."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Lit(LightningModule):
    """A regression with names that the library uses too, a dropout, and parameter groups by name."""

    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1))
        self.fc = nn.Linear(width, 1)
        self.loss = nn.MSELoss()
        self.lr = lr
        self.epochs_seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("mine", loss)
        return {"loss": loss}

    def on_train_epoch_end(self) -> None:
        self.epochs_seen += 1

    def configure_optimizers(self) -> Any:
        head = [p for name, p in self.named_parameters() if name.startswith("fc.")]
        rest = [p for name, p in self.named_parameters() if not name.startswith("fc.")]
        optimizer = torch.optim.Adam([{"params": rest}, {"params": head, "lr": 2 * self.lr}], lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Tensors(LightningModule):
    """The same with a plain tensor as its loss, which the lean fit takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Anneals(LightningModule):
    """A classifier of images whose loss depends on what it has counted, with a metric and a schedule."""

    begun: ClassVar[list[int]] = []

    def __init__(self, num_classes: int, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2))
        self.body(torch.zeros(2, 3, 8, 8))
        self.fc = nn.Linear(6, num_classes)
        self.accuracy = MulticlassAccuracy(num_classes)
        self.steps, self.losses = 0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))

    def on_train_start(self) -> None:
        self.begun.append(self.steps)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        outputs = self(x)
        loss = nn.functional.cross_entropy(outputs, y) * (1 + 1 / (1 + self.steps)) * self.losses[-1]
        self.steps += 1
        self.losses.append(min(float(loss.detach()), 1.0))
        self.accuracy(outputs, y)
        self.log("annealed", loss, on_step=True, on_epoch=True)
        self.log("seen", self.accuracy, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("steps", float(self.steps))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 10 * self.hparams["lr"], total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Plateau(Tensors):
    """Lowers its rate where what its validation logs does not fall."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_mse", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val_mse"},
        }


class NoLoss(Tensors):
    """Forgets to return its loss."""

    def training_step(self, batch: Any) -> None:  # type: ignore[override]
        self(batch[0])


class Data(LightningDataModule):
    """One hospital: made numbers."""

    def __init__(self, seed: int = 0, number: int = 40, tested: bool = True) -> None:
        super().__init__()
        self.made_from, self.number, self.tested = seed, number, tested
        self.batch_size = 16

    def setup(self, stage: str) -> None:
        g = torch.Generator().manual_seed(self.made_from)
        x = torch.randn(self.number, 3, generator=g)
        y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(self.number, 1, generator=g)
        cut = self.number * 3 // 4
        self.train, self.rest = TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rest, 8)

    def test_dataloader(self) -> Any:
        if not self.tested:
            return super().test_dataloader()
        return DataLoader(self.rest, 8)


def hospitals() -> dict[str, Data]:
    return {name: Data(seed) for seed, name in enumerate(("north", "south", "west"))}
