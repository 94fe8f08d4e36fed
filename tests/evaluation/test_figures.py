from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.io import ImageReadMode, decode_image

from fl_lightning.evaluation.figures import (
    GAIN,
    LOSS,
    UNCLEAR,
    Curve,
    draw_client_rounds,
    draw_confusion,
    draw_drop_against_distortion,
    draw_epochs,
    draw_equal_loss,
    draw_gains,
    draw_matrix,
    draw_partition,
    log_image,
    save_png,
    to_array,
)

COUNTS = np.array([[3, 0, 5], [0, 20, 1]])
CLIENTS, CLASSES = ["first", "second"], ["cat", "dog", "owl"]


def axes_of(figure: Figure) -> Axes:
    return figure.axes[0]


def heights(axes: Axes) -> list[np.ndarray]:
    """Of all bars, by group."""
    return [
        np.array([np.ptp(path.vertices[:, 1]) for path in collection.get_paths()]) for collection in axes.collections
    ]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def test_bubble_areas_are_the_counts() -> None:
    axes = axes_of(draw_partition(COUNTS, CLIENTS, CLASSES))
    (bubbles,) = axes.collections
    assert bubbles.get_offsets().tolist() == [[0, 0], [0, 2], [1, 1], [1, 2]]
    areas = bubbles.get_sizes()
    assert areas / areas.max() == pytest.approx(np.array([3, 5, 20, 1]) / 20)
    assert [label.get_text() for label in axes.get_xticklabels()] == CLIENTS
    assert [label.get_text() for label in axes.get_yticklabels()] == CLASSES


def test_bars_are_stacked_to_the_totals() -> None:
    axes = axes_of(draw_partition(COUNTS, CLIENTS, CLASSES, style="bars"))
    assert np.array(heights(axes)) == pytest.approx(COUNTS.T)
    tops = [collection.get_paths()[1].vertices[:, 1].max() for collection in axes.collections]
    assert tops == pytest.approx([0, 20, 21])
    assert legend(axes) == CLASSES


@pytest.mark.parametrize(("num_clients", "num_classes", "bars"), [(5, 10, False), (50, 100, True), (100, 10, True)])
def test_style_follows_the_size(num_clients: int, num_classes: int, bars: bool) -> None:
    counts = np.ones((num_clients, num_classes))
    axes = axes_of(draw_partition(counts, [str(i) for i in range(num_clients)], [str(i) for i in range(num_classes)]))
    assert len(axes.collections) == (num_classes if bars else 1)
    assert len(axes.get_xticklabels()) <= 50


def test_confusion_shows_shares_and_writes_counts() -> None:
    axes = axes_of(draw_confusion([[3, 1], [0, 0]], ["a", "b"]))
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert texts(axes) == ["3", "1", "", ""]


def test_rounds_put_the_worst_client_on_top() -> None:
    axes = axes_of(draw_client_rounds([[0.1, 0.2, 0.3], [0.9, 0.4, 0.7]], [5, 10], ["a", "b", "c"]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]
    assert axes.yaxis_inverted()
    assert axes.collections[0].get_array().reshape(3, 2).tolist() == [[0.2, 0.4], [0.3, 0.7], [0.1, 0.9]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "10"]


def test_matrix_has_models_in_rows() -> None:
    figure = draw_matrix([[0.9, np.nan], [0.25, 0.5]], CLIENTS, title="ft")
    axes = axes_of(figure)
    assert axes.images[0].get_array()[1, 0] == 0.25
    assert texts(axes) == ["0.90", "", "0.25", "0.50"]
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_title()) == ("model of", "test set of", "ft")


def test_local_is_dashed_and_global_is_solid() -> None:
    axes = axes_of(draw_epochs({"lr 0.1": Curve([0.5, 0.7], [0.5, 0.4]), "lr 1": Curve([0.5, 0.8], [0.5, 0.2])}))
    styles = [(line.get_linestyle(), list(line.get_ydata())[-1]) for line in axes.lines]
    assert styles == [("--", 0.7), ("-", 0.4), ("--", 0.8), ("-", 0.2)]
    assert legend(axes) == ["local: own data", "global: others' data", "lr 0.1", "lr 1"]
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_drops_are_joined_in_the_order_of_the_epochs() -> None:
    axes = axes_of(draw_drop_against_distortion({"ft": ([1, 2], [2, 4]), "lp_ft": ([3], [6])}, "digits", "global f1"))
    assert legend(axes) == ["ft", "lp_ft"]
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [[[1, 2], [2, 4]], [[3, 6]]]
    assert (axes.get_title(), axes.get_ylabel()) == ("digits", "loss of global f1")


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    names = [r"$\frac$", "cost $x$"]
    for figure in (
        draw_matrix([[0.9, 0.8], [0.25, 0.5]], names, names[0]),
        draw_confusion(COUNTS[:, :2], names),
        draw_partition(COUNTS[:, :2], names, names, style="bars"),
        draw_epochs({names[0]: Curve([0.5], [0.5])}, names[1]),
        draw_gains([0.1, -0.1], names, names[0]),
        draw_drop_against_distortion({names[0]: ([1], [2])}, names[0]),
        draw_equal_loss([0.1], {names[0]: [0.5]}),
    ):
        to_array(figure)


def test_nothing_of_a_confusion_matrix_is_cut_off() -> None:
    counts = np.arange(100).reshape(10, 10)
    for figure in (draw_confusion(counts, list("0123456789")), draw_matrix(counts, list("0123456789"))):
        image = to_array(figure, 120)
        assert min(edge.min() for edge in (image[:, 0], image[:, -1], image[0], image[-1])) == 255


def test_equal_loss_groups_by_level() -> None:
    axes = axes_of(draw_equal_loss([0.1, 1.0], {"ft": [0.5, 0.6], "lp_ft": [0.7, 0.8]}, {"ft": [0.1, 0.1]}))
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.6, 0.7, 0.8]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "1"]


def test_gains_count_who_is_hurt_and_leave_the_absent_out() -> None:
    axes = axes_of(draw_gains([0.2, -0.1, np.nan, -0.3], ["a", "b", "c", "d"]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["d", "b", "a"]
    assert heights(axes)[0] == pytest.approx([0.3, 0.1, 0.2])
    colours = [tuple(colour[:3]) for colour in axes.collections[0].get_facecolor()]
    assert colours[0] == colours[1] == rgb(LOSS)
    assert colours[2] == rgb(GAIN)
    assert legend(axes) == ["mean -0.067", "gain: 1 of 3 clients", "hurt: 2 of 3 clients"]
    low, high = axes.get_ylim()
    assert low < -0.3
    assert high > 0.2


def test_a_change_whose_interval_holds_0_is_neither_gain_nor_harm() -> None:
    ends = [[0.1, 0.3], [-0.2, 0.05], [np.nan, np.nan], [-0.5, -0.2]]
    axes = axes_of(draw_gains([0.2, -0.1, np.nan, -0.3], ["a", "b", "c", "d"], intervals=ends))
    assert legend(axes) == ["mean -0.067", "gain: 1 of 3 clients", "unclear: 1 of 3 clients", "hurt: 1 of 3 clients"]
    colours = [tuple(colour[:3]) for colour in axes.collections[0].get_facecolor()]
    assert colours == [rgb(LOSS), rgb(UNCLEAR), rgb(GAIN)]
    assert axes.get_ylim()[0] < -0.5


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_png_and_array_are_the_same_image(tmp_path: Path) -> None:
    figure = draw_matrix([[0.5]], ["a"])
    save_png(figure, tmp_path / "a.png", dpi=100)
    array = to_array(draw_matrix([[0.5]], ["a"]), dpi=100)
    assert array.dtype == np.uint8
    assert np.array_equal(decode_image(str(tmp_path / "a.png"), ImageReadMode.RGB).permute(1, 2, 0).numpy(), array)


def test_no_global_state_of_pyplot() -> None:
    draw_matrix([[0.5]], ["a"])
    assert pyplot.get_fignums() == []  # figures that pyplot keeps are never freed


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2\) .* got \(2, 3\)"):
        draw_partition(COUNTS, CLIENTS, ["cat", "dog"])
    with pytest.raises(ValueError, match="style must be .*, got 'pie'"):
        draw_partition(COUNTS, CLIENTS, CLASSES, style="pie")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of 2 clients"):
        draw_gains([0.1], CLIENTS)


def test_images_go_to_every_logger_that_takes_them(tmp_path: Path) -> None:
    image = to_array(draw_partition(COUNTS, CLIENTS, CLASSES))
    seen: list[tuple[str, list, int]] = []

    class Recorder(CSVLogger):
        def log_image(self, key: str, images: list, step: int) -> None:
            seen.append((key, images, step))

    log_image(Recorder(str(tmp_path)), "clients/partition", image, 3)
    ((name, images, step),) = seen
    assert (name, step) == ("clients/partition", 3)
    assert np.array_equal(images[0], image)
    log_image(CSVLogger(str(tmp_path)), "clients/partition", image)
    log_image(None, "clients/partition", image)


@pytest.mark.slow
def test_mlflow_gets_images(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    logger = MLFlowLogger("test", tracking_uri=f"sqlite:///{tmp_path / 'm.db'}", artifact_location=str(tmp_path / "a"))
    log_image(logger, "clients/partition", to_array(draw_partition(COUNTS, CLIENTS, CLASSES)), 3)
    assert len(list((tmp_path / "a").rglob("clients/partition_00003.png"))) == 1
