"""Figures of a study: strategies beside the paper's numbers, and over variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fl_lightning.evaluation.figures import COLOURS, MARKERS
from fl_lightning.evaluation.tables import MeanStd


def draw_beside_paper(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Figure:
    """Draw every strategy's accuracy as measured, and, where there is one, as published.

    Args:
        rows: By strategy: ``<column>`` and ``<column>, paper``, each a mean and deviation in percent.
        columns: Which; a panel each.
    """
    figure = Figure(figsize=(0.62 * len(rows) + 2.2, 2.6 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), squeeze=False)[:, 0]
    for axes, column in zip(panels, columns, strict=True):
        kinds = {"here": (column, COLOURS[0], ""), "paper": (f"{column}, paper", "#dddddd", "//")}
        kinds = {
            kind: style for kind, style in kinds.items() if any(row.get(style[0]) is not None for row in rows.values())
        }
        width = 0.8 / len(kinds)
        for index, (kind, (key, colour, hatch)) in enumerate(kinds.items()):
            x = np.arange(len(rows)) + (index - (len(kinds) - 1) / 2) * width
            cells = [row.get(key) or MeanStd(np.nan, np.nan) for row in rows.values()]
            axes.bar(
                x,
                [cell.mean for cell in cells],
                width * 0.92,
                yerr=_errors(cells),
                capsize=2,
                color=colour,
                hatch=hatch,
                edgecolor="#777777" if hatch else colour,
                label=kind,
            )
        axes.set_xticks(range(len(rows)), list(rows), rotation=25, ha="right", fontsize=9)
        axes.set_ylabel(f"{column} (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    if len(kinds) > 1:
        panels[0].legend(fontsize=9, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def draw_variants(values: Mapping[str, Mapping[str, tuple[MeanStd, MeanStd]]]) -> Figure:
    """Draw global and local accuracy over the variants of a study, such as growing heterogeneity.

    Args:
        values: By variant and strategy: global and local accuracy in percent.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    strategies = list(dict.fromkeys(name for row in values.values() for name in row))
    for axes, position, title in zip(figure.subplots(1, 2), (0, 1), ("Global", "Local"), strict=True):
        for index, name in enumerate(strategies):
            cells = [row[name][position] if name in row else MeanStd(np.nan, np.nan) for row in values.values()]
            axes.errorbar(
                range(len(cells)),
                [cell.mean for cell in cells],
                yerr=_errors(cells),
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                capsize=2,
                label=name,
            )
        axes.set_xticks(range(len(values)), list(values), fontsize=9)
        axes.set_ylabel(f"{title} (%)")
        axes.grid(alpha=0.3)
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=9)
    return figure


def _errors(cells: Sequence[MeanStd]) -> list[float] | None:
    """Deviations for error bars; None for a single run, which has none."""
    return None if all(np.isnan(cell.std) for cell in cells) else [float(np.nan_to_num(cell.std)) for cell in cells]
