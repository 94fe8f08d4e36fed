"""What a client's model predicts for its own data, written to a file where the data are."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_lightning import files
from fl_lightning.checks import one_of
from fl_lightning.client import Client, Exam
from fl_lightning.data.splits import SPLITS
from fl_lightning.evaluation.predict import batches_of, predict
from fl_lightning.fit.local import LocalTraining


class Predictions:
    """A file of predictions, to be made with the model that a server and this site hold together.

    A ``.npz`` holds ``outputs`` float32 (N, ...), as the model gives them, ``targets`` (N, ...), ``examples`` int64
    (N,), their places in the site's data, and ``classes``, their names. A ``.csv`` has a line for each example; it is
    for models with one number or one score per class.

    Args:
        file: Where, ``.csv`` or ``.npz``; it must not exist.
        split: ``test``, ``val``, ``train``, or ``all`` three.

    Raises:
        ValueError: If the file cannot be written.
    """

    def __init__(self, file: Path, split: str = "test") -> None:
        one_of("--split", split, (*SPLITS, "all"))
        if file.suffix not in (".csv", ".npz"):
            raise ValueError(f"--infer must name a .csv or a .npz, got {file}")
        if file.exists():
            raise ValueError(f"--infer={file} is there already; choose another file")
        if not file.parent.is_dir():
            raise ValueError(f"--infer={file} must lie in a folder that exists; make {file.parent}")
        self.file = file
        self.splits = [one for one in SPLITS if split in (one, "all")]

    def write(self, local: LocalTraining, client: Client, exam: Exam, data: Any) -> tuple[int, dict[str, float]]:
        """Predict, and write the file.

        Args:
            local: Runs the model.
            client: Whose data.
            exam: The model.
            data: Names the classes, and knows which example is where in the site's data.

        Returns:
            The number of examples, and what the run's metrics make of them, if their targets are true.

        Raises:
            ValueError: If there is no example, or what is predicted is no table, and a ``.csv`` is asked for.
        """
        local.score(client, Exam(exam.split, exam.state, exam.personal, exam.stage, metrics=()))  # loads the model
        forward = local.module.personal_forward if exam.personal else local.module
        splits = [split for split in self.splits if client.describe().count(split)]
        if not splits:
            raise ValueError(f"there is no example to predict in {' or '.join(self.splits)}; choose another --split")
        parts = [predict(forward, batches_of(client.data, split)) for split in splits]
        outputs, targets = (torch.cat(own).cpu() for own in zip(*parts, strict=True))
        places = [data.partition.clients[0].indices(split) for split in splits]
        examples = torch.cat(places) if sum(map(len, places)) == len(outputs) else torch.arange(len(outputs))
        order = examples.argsort()
        outputs, targets, examples = outputs[order], targets[order], examples[order]
        names = [name for name in local.metrics.names if not local.metrics.is_logged(name)]
        values = local.metrics.of_outputs(outputs, targets, names, data.num_classes)
        classes = list(map(str, data.class_names))
        if self.file.suffix == ".csv":
            files.write_text(self.file, self._table(local, outputs, targets, examples, classes))
        else:
            content = io.BytesIO()
            np.savez(
                content,
                outputs=outputs.numpy(),
                targets=targets.numpy(),
                examples=examples.numpy(),
                classes=np.array(classes),
            )
            files.write_bytes(self.file, content.getvalue())
        return len(outputs), values

    def _table(
        self, local: LocalTraining, outputs: Tensor, targets: Tensor, examples: Tensor, classes: list[str]
    ) -> str:
        task = local.metrics.task
        scored = task.has_classes and outputs.ndim == 2 and outputs.shape[1] == len(classes) and targets.ndim == 1
        if not scored and (task.has_classes or outputs.numel() != len(outputs) or targets.numel() != len(outputs)):
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} are no table, with a line for each example; name a .npz"
            )
        lines = io.StringIO()
        table = csv.writer(lines, lineterminator="\n")
        if scored:
            table.writerow(["example", "target", "predicted", "probability"])
            found, sure = task.predicted(outputs).tolist(), outputs.softmax(1).max(1).values.tolist()
            for place, target, one, probability in zip(examples.tolist(), targets.tolist(), found, sure, strict=True):
                table.writerow([place, classes[target], classes[one], f"{probability:.6f}"])
        else:
            table.writerow(["example", "target", "predicted"])
            table.writerows(zip(examples.tolist(), targets.flatten().tolist(), outputs.flatten().tolist(), strict=True))
        return lines.getvalue()
