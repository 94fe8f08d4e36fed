"""What does measuring personal models on all clients cost, beside the forward passes that it needs?

    python -m benchmarks.matrix [--repeats 9]

Every one of 20 personal models is tried on the test images of all 20 clients (W1's clients, 100 test images each), as
``personalize.py`` does it, with all its measures, in one process.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from benchmarks.timing import circumstances, interleaved, ratio, spread
from fl_lightning.client import Client
from fl_lightning.data.client_data import BatchOptions, ClientData
from fl_lightning.data.pools import ImagePool
from fl_lightning.data.splits import ClientIndices
from fl_lightning.executors.serial import SerialExecutor
from fl_lightning.fit.local import LocalTraining
from fl_lightning.models import lenet5
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.measurement import Measurement, ModelMetrics
from fl_lightning.sharing import Sharing
from fl_lightning.state import snapshot

CLIENTS, IMAGES = 20, 100


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(circumstances())
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (CLIENTS * IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pool = ImagePool(images, torch.randint(0, 10, (CLIENTS * IMAGES,), generator=generator))
    own = torch.arange(len(pool)).split(IMAGES)
    options = BatchOptions(eval_batch_size=512)
    datas = [ClientData(i, pool, ClientIndices(str(i), index, index), 10, options) for i, index in enumerate(own)]
    module = FederatedModule(lenet5(10)).eval()
    start = snapshot(module.state_dict())
    states = [(owner, {name: 1.01 * tensor for name, tensor in start.items()}, False) for owner in range(CLIENTS)]
    local = LocalTraining(partial(Trainer, accelerator="cpu", devices=1, max_epochs=1), torch.optim.SGD)
    local.setup(module, Sharing(), [], seed=1)
    local.metrics = ModelMetrics(None, snapshot(module.backbone.state_dict()))
    executor = SerialExecutor()
    clients = [Client(data.id, data) for data in datas]
    executor.setup(local, clients)
    measurement = Measurement(executor.describe())
    batches: list[Tensor] = list((images.float() / 127.5 - 1).split(512))

    def forward_passes() -> None:
        with torch.inference_mode():
            for _ in range(CLIENTS):
                for x in batches:
                    module(x)

    def matrix() -> None:
        measurement.measure(executor, states)

    seconds = interleaved({"bare": forward_passes, "matrix": matrix}, arguments.repeats)
    bare = statistics.median(seconds["bare"])
    print(
        f"{CLIENTS} models x {CLIENTS} clients x {IMAGES} images: forward passes "
        f"{bare:.3f} s, matrix {ratio(seconds, 'matrix'):.3f} ({spread(seconds, 'matrix')})"
    )


if __name__ == "__main__":
    main()
