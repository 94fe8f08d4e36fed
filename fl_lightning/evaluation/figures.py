"""Figures of a federation, for TensorBoard and for PNG files.

Every function takes plain arrays and returns a :class:`matplotlib.figure.Figure` of its own: there is no global state,
no window, and nothing to close. Sizes follow the number of clients, so that five and a hundred are both readable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import matplotlib
import numpy as np
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from fl_lightning.checks import one_of
from fl_lightning.files import replacing

if TYPE_CHECKING:
    from matplotlib.typing import ColorType  # matplotlib 3.8; not needed to run

# Okabe and Ito's colours, which the colour-blind can tell apart; https://jfly.uni-koeln.de/color/
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#000000")
MARKERS = "os^Dv<>P"
GAIN, LOSS, UNCLEAR = COLOURS[2], COLOURS[1], "#9ca3af"
_MOST_LABELS = 40  # names on an axis, before every other one is left out


class Curve(NamedTuple):
    """Local and global accuracy of one setting, the first value being the start.

    Without ``epochs`` there is one value per epoch.
    """

    local: Sequence[float]
    elsewhere: Sequence[float]
    epochs: Sequence[int] | None = None


def save_png(figure: Figure, path: str | Path, dpi: int = 120) -> NDArray[np.uint8]:
    """Write a figure as PNG, in one step (see :func:`fl_lightning.files.replacing`); return it as :func:`to_array`.

    Drawing takes longer than all the rest, so that what is shown twice had better be drawn once.
    """
    array = to_array(figure, dpi)
    with replacing(path) as file:
        Image.fromarray(array).save(file, format="png", dpi=(dpi, dpi))
    return array


def to_array(figure: Figure, dpi: int = 100) -> NDArray[np.uint8]:
    """A figure as an image (height, width, 3), as TensorBoard's ``add_image(..., dataformats="HWC")`` takes it."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def log_image(logger: Logger | None, name: str, image: NDArray[np.uint8], step: int = 0) -> None:
    """Show an image in whatever shows images: TensorBoard, W&B and the like by ``log_image``, MLflow.

    Args:
        logger: Of Lightning; None, and one that takes no images: nothing happens.
        name: What it is shown as.
        image: uint8 (height, width, 3).
        step: The round.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HWC")
    elif callable(log := getattr(logger, "log_image", None)):
        log(name, [image], step=step)
    elif isinstance(logger, MLFlowLogger):
        assert logger.run_id is not None
        logger.experiment.log_image(logger.run_id, image, artifact_file=f"{name}_{step:05d}.png")


def draw_partition(
    counts: ArrayLike,
    clients: Sequence[str],
    classes: Sequence[str],
    style: Literal["bubbles", "bars"] | None = None,
) -> Figure:
    """Who has how many examples of which class.

    Args:
        counts: Examples by client and class, (clients, classes).
        clients: Names.
        classes: Names.
        style: ``"bubbles"``, whose areas are the counts, or stacked ``"bars"``. Default: bubbles up to 20 classes and
            60 clients, else bars.
    """
    table = _table(counts, clients, classes)
    if style is None:
        style = "bubbles" if len(classes) <= 20 and len(clients) <= 60 else "bars"
    one_of("style", style, ("bubbles", "bars"))
    if style == "bars":
        figure, axes = _figure(_length(len(clients), 0.14, 5, 18) + 1.5, 4)
        colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(classes)))
        bottom = np.zeros(len(clients))
        for column, colour, name in zip(table.T, colours, classes, strict=True):
            _bars(axes, bottom, bottom + column, colour, _plain(name))
            bottom += column
        axes.set_xlim(-0.6, len(clients) - 0.4)
        axes.set_ylim(0, 1.03 * max(float(bottom.max()), 1))
        axes.set_ylabel("training examples")
        if len(classes) <= 26:
            axes.legend(
                title="class",
                bbox_to_anchor=(1.01, 1),
                loc="upper left",
                fontsize=8,
                ncols=math.ceil(len(classes) / 13),
            )
    else:
        figure, axes = _figure(_length(len(clients), 0.2, 4.5, 16) + 1, _length(len(classes), 0.27, 2.5, 8) + 0.8)
        x, y = np.nonzero(table)
        # Neighbouring bubbles of the largest count just touch: their diameter is the narrower cell, in points.
        width, height = figure.get_size_inches()
        cell = 72 * min((width - 1.5) / len(clients), (height - 1) / len(classes))
        sizes = table[x, y] / max(table.max(), 1) * (0.95 * cell) ** 2
        axes.scatter(x, y, s=sizes, color=COLOURS[0], alpha=0.8, linewidths=0)
        axes.set_xlim(-0.7, len(clients) - 0.3)
        axes.set_ylim(-0.7, len(classes) - 0.3)
        _name_axis(axes, "y", classes)
        axes.set_ylabel("class")
        axes.set_title(
            f"{int(table.sum()):,} training examples; the largest bubble is {int(table.max()):,}", fontsize=10
        )
    _name_axis(axes, "x", clients)
    axes.set_xlabel("client")
    return figure


def draw_confusion(counts: ArrayLike, classes: Sequence[str]) -> Figure:
    """Which class is taken for which: rows are true classes, columns predicted ones, shades are shares of a row.

    Args:
        counts: Examples by true and predicted class, (classes, classes).
        classes: Names.
    """
    table = _table(counts, classes, classes)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    side = _length(len(classes), 0.42, 3, 12)
    figure, axes = _figure(side + 1.4, side + 0.6, square=True)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if len(classes) <= 20:
        _write_cells(axes, shares, [[f"{int(count):,}" if count else "" for count in row] for row in table], dark=0.55)
    _name_axis(axes, "x", classes)
    _name_axis(axes, "y", classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def draw_client_rounds(
    values: ArrayLike, rounds: Sequence[int], clients: Sequence[str], label: str = "accuracy"
) -> Figure:
    """How every client fares over the rounds: one row a client, the one that ends worst on top.

    Args:
        values: One row per evaluated round, one column per client; NaN where there is no value.
        rounds: Their numbers, counting up.
        clients: Names.
        label: What the values are.
    """
    table = _table(values, [str(number) for number in rounds], clients)
    order = np.argsort(np.where(np.isnan(table[-1]), np.inf, table[-1]), kind="stable")
    figure, axes = _figure(7.5, _length(len(clients), 0.22, 2, 11) + 1)
    image = axes.pcolormesh(
        np.arange(len(rounds) + 1), np.arange(len(clients) + 1), table[:, order].T, cmap="viridis", rasterized=True
    )
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label=label)
    step = max(1, math.ceil(len(rounds) / 12))
    axes.set_xticks(np.arange(0, len(rounds), step) + 0.5, [str(number) for number in rounds[::step]])
    _name_axis(axes, "y", [clients[index] for index in order], offset=0.5)
    axes.set_xlabel("round")
    axes.set_ylabel("client, worst on top")
    return figure


def draw_matrix(
    values: ArrayLike,
    clients: Sequence[str],
    title: str = "",
    label: str = "accuracy",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """The score of every client's model on every client's test set; the diagonal is at home.

    Args:
        values: Row i, column j: model i on test set j, (clients, clients); NaN where it was not tried.
        clients: Names.
        title: The strategy.
        label: What the values are.
        limits: The ends of the colour scale, for several matrices to be alike; by default those of the values.
    """
    table = _table(values, clients, clients)
    low, high = limits or (float(np.nanmin(table)), float(np.nanmax(table)))
    side = _length(len(clients), 0.5, 3, 11)
    figure, axes = _figure(side + 1.6, side + 0.6, square=True)
    image = axes.imshow(table, cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label=_plain(label), shrink=0.8)
    if len(clients) <= 20:
        texts = [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in table]
        _write_cells(axes, table, texts, light=low + 0.55 * (high - low))
    _name_axis(axes, "x", clients)
    _name_axis(axes, "y", clients)
    axes.set_xlabel("test set of")
    axes.set_ylabel("model of")
    axes.set_title(_plain(title), fontsize=10)
    return figure


def draw_epochs(curves: Mapping[str, Curve], title: str = "", label: str = "accuracy") -> Figure:
    """Local (dashed) and global (solid) accuracy over the epochs of fine-tuning, for several settings.

    In the manner of Figure 2 of Chen et al., https://arxiv.org/abs/2511.12695: personalization overfitting is the
    solid line going down while the dashed one rises or stays.

    Args:
        curves: By setting (``"lr 0.01"``); the first value is that of epoch 0, before fine-tuning.
        title: What the settings are of.
        label: What the values are.
    """
    figure, axes = _figure(7, 4.2)
    for index, (_, curve) in enumerate(curves.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        x = range(len(curve.local)) if curve.epochs is None else curve.epochs
        axes.plot(x, curve.local, linestyle="--", **style)  # type: ignore[arg-type]
        axes.plot(x, curve.elsewhere, linestyle="-", **style)  # type: ignore[arg-type]
    kinds = [
        Line2D([], [], color="black", linestyle="--", label="local: own data"),
        Line2D([], [], color="black", linestyle="-", label="global: others' data"),
    ]
    settings = [
        Line2D([], [], color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=4, label=_plain(name))
        for i, name in enumerate(curves)
    ]
    axes.legend(handles=[*kinds, *settings], bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs trained (a soup: all its models together)")
    axes.set_ylabel(label)
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def draw_newcomers(
    numbers: Sequence[float],
    names: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str = "",
    label: str = "accuracy",
) -> Figure:
    """What clients that never took part reach, by their number of examples.

    Args:
        numbers: Of examples, rising.
        names: What stands below them.
        lines: By strategy a value and the ends of its interval for each number; ``none``, which needs no examples, is
            dashed.
        title: Where they were measured.
        label: What the values are.
    """
    figure, axes = _figure(7.4, 4.4)
    for index, (name, values) in enumerate(lines.items()):
        table = np.asarray(values, dtype=float)
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": "" if name == "none" else MARKERS[index % len(MARKERS)],
        }
        dash = "--" if name == "none" else "-"
        axes.plot(numbers, table[:, 0], linestyle=dash, markersize=5, label=_plain(name), **style)  # type: ignore[arg-type]
        axes.fill_between(numbers, table[:, 1], table[:, 2], color=style["color"], alpha=0.12, linewidth=0)
    if len(numbers) > 1:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [_plain(name) for name in names])
    axes.minorticks_off()
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=9)
    axes.set_xlabel("labelled examples of the new client")
    axes.set_ylabel(f"{_plain(label)} on its own test data")
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def draw_drop_against_distortion(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str = "", label: str = "global accuracy"
) -> Figure:
    """Whether models whose features moved further have forgotten more.

    In the manner of Figure 3a of Chen et al., https://arxiv.org/abs/2511.12695.

    Args:
        points: By strategy: feature distortions, and by how much the models are worse than the un-tuned one elsewhere
            (positive is worse), epoch after epoch.
        title: What the points are.
        label: What is lost, and in which unit.
    """
    figure, axes = _figure(6, 4.4)
    for index, (name, (distortions, drops)) in enumerate(points.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(distortions, drops, label=_plain(name), color=colour, marker=marker, alpha=0.8, linewidth=0.8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=9)
    axes.set_xlabel("feature distortion (mean $\\ell_2$ distance)")
    axes.set_ylabel(f"loss of {_plain(label)}")
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def draw_frontier(
    points: Mapping[str, Sequence[tuple[float, float]]],
    fronts: Mapping[str, Sequence[tuple[float, float]]],
    start: tuple[float, float] | None = None,
    title: str = "",
    label: str = "accuracy",
) -> Figure:
    """What each strategy can give at home for what it loses elsewhere.

    Args:
        points: By strategy its settings and what they pass on the way: values elsewhere and at home.
        fronts: By name (with the area, say) those that no other of the strategy reaches in both, as they are joined.
        start: The un-tuned model.
        title: Where they were measured.
        label: What the values are.
    """
    figure, axes = _figure(7.4, 4.6)
    for index, (name, front) in enumerate(fronts.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        cloud = np.asarray(list(points.values())[index], dtype=float).reshape(-1, 2)
        axes.plot(cloud[:, 0], cloud[:, 1], linestyle="", marker=marker, markersize=3, color=colour, alpha=0.3)
        x, y = zip(*front, strict=True)
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4, label=_plain(name))
    if start is not None:
        axes.plot(*start, marker="*", markersize=13, color="black", linestyle="", label="un-tuned")
        axes.axvline(start[0], color="black", linewidth=0.6, linestyle=":")
        axes.axhline(start[1], color="black", linewidth=0.6, linestyle=":")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=9)
    axes.set_xlabel(f"{_plain(label)} on others' data")
    axes.set_ylabel(f"{_plain(label)} at home")
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def draw_equal_loss(
    levels: Sequence[float],
    means: Mapping[str, Sequence[float]],
    stds: Mapping[str, Sequence[float]] | None = None,
    label: str = "global accuracy",
    title: str = "",
) -> Figure:
    """Strategies compared where they have learned their own data equally well.

    Figure 3b of Chen et al., https://arxiv.org/abs/2511.12695, does so by flooding.

    Args:
        levels: The local training loss at which each group was stopped from falling further.
        means: By strategy, one value per level.
        stds: Standard deviations over runs, drawn as error bars.
        label: What the values are.
        title: Where they were measured.
    """
    figure, axes = _figure(_length(len(levels) * len(means), 0.32, 4.5, 12) + 1.2, 4)
    width = 0.8 / max(len(means), 1)
    for index, (name, values) in enumerate(means.items()):
        x = np.arange(len(levels)) + (index - (len(means) - 1) / 2) * width
        errors = None if stds is None else stds.get(name)
        colour = COLOURS[index % len(COLOURS)]
        axes.bar(x, values, width * 0.92, yerr=errors, capsize=3, color=colour, label=_plain(name))
    numbers = np.concatenate([np.asarray(values, dtype=float) for values in means.values()])
    lowest = float(np.nanmin(numbers))
    axes.set_ylim(bottom=min(0.0, lowest))
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=9)
    axes.set_xlabel("flooding level of the local training loss")
    axes.set_title(_plain(title), fontsize=10)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def draw_gains(
    changes: ArrayLike,
    clients: Sequence[str],
    title: str = "",
    label: str = "change of accuracy",
    intervals: ArrayLike | None = None,
) -> Figure:
    """Who gains and who is harmed: one bar a client, the worst off first.

    Args:
        changes: Gain (positive) or loss of each client against a baseline; NaN for a client without a value.
        clients: Names.
        title: Which strategy against which baseline.
        label: What the values are.
        intervals: The low and high end of each change, of shape (clients, 2); NaN where it is not known. A change whose
            interval holds 0 is grey: neither gain nor harm. Without intervals the sign decides.
    """
    values = np.asarray(changes, dtype=np.float64)
    if values.shape != (len(clients),):
        raise ValueError(f"changes must be one for each of {len(clients)} clients, got shape {values.shape}")
    ends = np.stack([values, values], axis=1) if intervals is None else np.asarray(intervals, dtype=np.float64)
    ends = np.where(np.isnan(ends), values[:, None], ends)
    order = [index for index in np.argsort(values, kind="stable") if not np.isnan(values[index])]
    kept, low, high = values[order], ends[order, 0], ends[order, 1]
    figure, axes = _figure(_length(len(order), 0.2, 4.5, 16) + 0.8, 3.8)
    gain, hurt = low > 0, high < 0
    colours: list[ColorType] = [GAIN if up else LOSS if down else UNCLEAR for up, down in zip(gain, hurt, strict=True)]
    _bars(axes, np.zeros(len(kept)), kept, colours)
    axes.axhline(0, color="black", linewidth=0.8)
    if kept.size:
        if intervals is not None:
            axes.vlines(np.arange(len(kept)), low, high, color="black", linewidth=1)
        margin = 0.05 * max(float(np.ptp([0, *low, *high])), 1e-3)
        axes.set_ylim(min(0, low.min()) - margin, max(0, high.max()) + margin)
        mean = float(kept.mean())
        axes.axhline(mean, color="black", linestyle=":", linewidth=1.2, label=f"mean {mean:+.3f}")
        for which, colour, word in ((gain, GAIN, "gain"), (~gain & ~hurt, UNCLEAR, "unclear"), (hurt, LOSS, "hurt")):
            if which.any() or word == "hurt":
                axes.plot([], [], "s", color=colour, label=f"{word}: {int(which.sum())} of {len(order)} clients")
        axes.legend(fontsize=9, loc="upper left")
    axes.set_xlim(-0.7, max(len(order), 1) - 0.3)
    _name_axis(axes, "x", [clients[index] for index in order])
    axes.set_ylabel(label)
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _plain(name: object) -> str:
    """Return a name as matplotlib shows it unchanged: between dollars it would read mathematics."""
    return str(name).replace("$", r"\$")


def _figure(width: float, height: float, square: bool = False) -> tuple[Figure, Axes]:
    """Make a figure of one panel; where the cells are square, the layout counts on it, or labels would be cut off."""
    figure = Figure(figsize=(width, height), layout="compressed" if square else "constrained")
    return figure, figure.subplots()


def _bars(axes: Axes, low: ArrayLike, high: ArrayLike, colours: ColorType | list[ColorType], label: str = "") -> None:
    """Bars at 0, 1, 2, ... as one artist. ``Axes.bar`` makes one each: 16 s instead of 0.7 for 1,000 clients."""
    low, high = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    left = np.arange(len(low)) - 0.45
    corners = np.stack([[left, low], [left, high], [left + 0.9, high], [left + 0.9, low]])  # (4, 2, bars)
    axes.add_collection(
        PolyCollection(list(corners.transpose(2, 0, 1)), facecolors=colours, label=label), autolim=False
    )


def _length(number: int, each: float, least: float, most: float) -> float:
    """Inches for ``number`` things."""
    return min(max(number * each, least), most)


def _table(values: ArrayLike, rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.float64]:
    table = np.array(values, dtype=np.float64)
    if table.shape != (len(rows), len(columns)) or table.size == 0:
        raise ValueError(
            f"values must have the shape ({len(rows)}, {len(columns)}) of their names, not empty, got {table.shape}"
        )
    return table


def _name_axis(axes: Axes, which: Literal["x", "y"], names: Sequence[str], offset: float = 0.0) -> None:
    """Put names on an axis: each if there is room, else every n-th."""
    step = max(1, math.ceil(len(names) / _MOST_LABELS))
    positions = list(range(0, len(names), step))
    shown = [name if len(name) <= 20 else f"{name[:19]}…" for name in (str(names[index]) for index in positions)]
    labels = [_plain(name) for name in shown]
    size = 9 if len(labels) <= 20 else 7
    if which == "y":
        axes.set_yticks([position + offset for position in positions], labels, fontsize=size)
        return
    # A character of 9 points is about 0.08 inches wide; what the axes lose to their surroundings about 1.5 inches.
    assert isinstance(axes.figure, Figure)
    room = (axes.figure.get_size_inches()[0] - 1.5) / max(len(labels), 1)
    long = max((len(label) for label in labels), default=0) * 0.009 * size > room
    angle = 0 if not long else 30 if len(labels) <= 12 else 60
    axes.set_xticks([position + offset for position in positions], labels, fontsize=size, rotation=angle)
    if long:
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")


def _write_cells(
    axes: Axes,
    values: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    dark: float | None = None,
    light: float | None = None,
) -> None:
    """Write into the cells of an image: white on cells above ``dark``, or on cells below ``light``."""
    size = 9 if len(texts) <= 12 else 6.5
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            value = values[row, column]
            white = (dark is not None and value > dark) or (light is not None and value < light)
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if white else "black")
