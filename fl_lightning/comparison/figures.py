"""Draws the figures of personalized runs: strategies beside published numbers, and over runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fl_lightning.evaluation.figures import COLOURS, MARKERS
from fl_lightning.evaluation.tables import MeanStd

UNTUNED = "none"
"""The strategy that leaves the global model as it is: the bar for all others."""

_NOTHING = MeanStd(np.nan, np.nan)
_STYLES = (
    ("here", "", {"color": COLOURS[0], "marker": "o"}),
    ("published", ", published", {"color": COLOURS[1], "marker": "D", "markerfacecolor": "white"}),
)


def draw_beside_published(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Figure:
    """Draw every strategy's accuracy as measured, and, where there is one, as published.

    Points with error bars on an axis that is cut to the data: differences between strategies are of a few points. A
    line marks the un-tuned model.

    Args:
        rows: By strategy: ``<column>`` and ``<column>, published``, each a mean and deviation in percent.
        columns: Which; a panel each.
    """
    figure = Figure(figsize=(0.7 * len(rows) + 2.4, 2.6 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), squeeze=False)[:, 0]
    for axes, column in zip(panels, columns, strict=True):
        shown = [style for style in _STYLES if any(row.get(f"{column}{style[1]}") is not None for row in rows.values())]
        for index, (kind, suffix, style) in enumerate(shown):
            cells = [row.get(f"{column}{suffix}") or _NOTHING for row in rows.values()]
            _points(
                axes, np.arange(len(rows)) + _beside(index, len(shown), 0.3), cells, label=kind, linestyle="", **style
            )
        bar = rows.get(UNTUNED, {}).get(column)
        if bar is not None:
            axes.axhline(bar.mean, color=COLOURS[0], linestyle=":", linewidth=1.2, label="un-tuned, here")
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_xticks(range(len(rows)), list(rows), rotation=25, ha="right", fontsize=9)
        axes.set_ylabel(f"{column} accuracy (%)")
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=9, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def draw_runs(values: Mapping[str, Mapping[str, tuple[MeanStd, MeanStd]]]) -> Figure:
    """Draw global and local accuracy over the runs of a comparison, such as growing heterogeneity.

    Args:
        values: By run and strategy: global and local accuracy in percent.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    strategies = list(dict.fromkeys(name for row in values.values() for name in row))
    for axes, position, title in zip(figure.subplots(1, 2), (0, 1), ("Global", "Local"), strict=True):
        for index, name in enumerate(strategies):
            cells = [row[name][position] if name in row else _NOTHING for row in values.values()]
            x = np.arange(len(values)) + _beside(index, len(strategies), 0.3)
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            _points(axes, x, cells, label=name, linestyle=":" if name == UNTUNED else "-", linewidth=1, **style)
        axes.set_xticks(range(len(values)), list(values), fontsize=9)
        axes.set_ylabel(f"{title} accuracy (%)")
        axes.grid(axis="y", alpha=0.3)
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=":" if name == UNTUNED else "-",
            markersize=5,
            label=name,
        )
        for i, name in enumerate(strategies)
    ]
    axes.legend(handles=handles, bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=9)
    return figure


def _beside(index: int, count: int, width: float) -> float:
    """How far to the right one of several points goes, so that they stand side by side."""
    return 0.0 if count == 1 else (index / (count - 1) - 0.5) * width


def _points(axes: Axes, x: np.ndarray, cells: Sequence[MeanStd], **style: Any) -> None:
    """Means, with error bars where there are several runs."""
    single = all(np.isnan(cell.std) for cell in cells)
    errors = None if single else [float(np.nan_to_num(cell.std)) for cell in cells]
    axes.errorbar(x, [cell.mean for cell in cells], yerr=errors, capsize=2.5, markersize=5, **style)
