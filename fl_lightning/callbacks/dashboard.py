"""Draws the pictures of a run, for TensorBoard and as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.checks import at_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fl_lightning.callbacks.federated_evaluation import FederatedEvaluation

CELLS = 1_000_000
"""Clients times rounds of the largest heat map."""


class Dashboard(FederatedCallback):
    """Draws who holds which classes, how every client fares over the rounds, and which classes are confused, if any.

    PNG files always; a logger that takes images gets the pictures, too, and TensorBoard's also the clients' scores as
    histograms over rounds and the configuration as text.

    Args:
        folder: Where PNG files go.
        evaluation: What scores the clients; it runs before this callback.
        class_names: The names of the classes.
        every: Rounds between two heat maps, at least 1; the last round always gets one.
        text: The resolved configuration, shown under TensorBoard's text tab.
    """

    saved = ("history",)

    def __init__(
        self,
        folder: str | Path,
        evaluation: FederatedEvaluation,
        class_names: Sequence[str],
        every: int = 10,
        text: str = "",
    ) -> None:
        at_least("every", every, 1)
        self.folder = Path(folder)
        self.evaluation = evaluation
        self.class_names = list(class_names)
        self.every = every
        self.text = text
        self.history: dict[str, list[tuple[int, Tensor]]] = {}

    @override
    def on_federation_start(self, loop: Server) -> None:
        if loop.round:
            return
        from fl_lightning.evaluation.figures import draw_partition  # matplotlib takes half a second to import

        people = [*loop.clients, *loop.unseen]
        names = [c.name for c in loop.clients] + [f"{c.name} (unseen)" for c in loop.unseen]
        counts, classes = torch.stack([client.label_counts for client in people]), self.class_names
        if not counts.shape[1]:  # no classes to tell apart: how much everybody has
            counts, classes = torch.tensor([[client.num_train] for client in people]), ["training examples"]
        self._show(loop, "clients/partition", draw_partition(counts.numpy(), names, classes), 0)
        writer = self._writer(loop)
        if writer is not None and self.text:
            writer.add_text("configuration", "\n".join(f"    {line}" for line in self.text.splitlines()), 0)

    @override
    def on_round_end(self, loop: Server) -> None:
        writer = self._writer(loop)
        for view, values in self.evaluation.by_client.items():
            row = torch.tensor(values)
            self.history[view] = thinned([*self.history.get(view, []), (loop.round, row)], max(20, CELLS // len(row)))
            known = row[~row.isnan()]
            if writer is not None and len(known):
                writer.add_histogram(f"test_by_client/{view}", known, loop.round)
        last = loop.round + 1 == loop.rounds
        if last or (loop.round + 1) % self.every == 0:
            self._draw_rounds(loop)

    @override
    def on_federation_end(self, loop: Server) -> None:
        from fl_lightning.evaluation.figures import draw_confusion

        if not loop.metrics.task.has_classes:
            return
        exam, people = loop.global_exam("test", metrics=(), confusion=True), self.evaluation.people(loop, "global")
        if exam is not None:
            name, scores = "clients/confusion_global", loop.score((client, exam) for client in people)
        else:
            exams = [(one, loop.personal_exam(one, "test", metrics=(), confusion=True)) for one in people]
            name, scores = "clients/confusion_personal", loop.score(exams)
        counts = sum(one.confusion for one in scores if one.confusion is not None)
        if isinstance(counts, Tensor):
            self._show(loop, name, draw_confusion(counts.numpy(), self.class_names), loop.round - 1)

    def _draw_rounds(self, loop: Server) -> None:
        from fl_lightning.evaluation.figures import draw_client_rounds

        names = [client.name for client in self.evaluation.people(loop, "global")]
        for view, rows in self.history.items():
            values = torch.stack([values for _, values in rows])
            rounds = [round for round, _ in rows]
            figure = draw_client_rounds(values.numpy(), rounds, names, self.evaluation.metric)
            self._show(loop, f"clients/by_round_{view}", figure, loop.round)

    def _writer(self, loop: Server) -> Any:
        return loop.logger.experiment if isinstance(loop.logger, TensorBoardLogger) else None

    def _show(self, loop: Server, name: str, figure: Figure, step: int) -> None:
        from fl_lightning.evaluation.figures import log_image, save_png

        # TensorBoard orders cards by name: who is served well and who is not comes first, then fit/train_loss.
        file = name.removeprefix("clients/").replace("by_round", "clients_over_rounds")
        log_image(loop.logger, name, save_png(figure, self.folder / f"{file}.png"), step)


def thinned(rows: list[tuple[int, Tensor]], most: int) -> list[tuple[int, Tensor]]:
    """Leave every second of the older half of the rows out, where there are more than a picture and its file take."""
    if len(rows) <= most:
        return rows
    half = len(rows) // 2
    return [*rows[:half:2], *rows[half:]]
