from __future__ import annotations

import math

import numpy as np
import pytest

from fl_lightning.evaluation.tables import (
    MeanStd,
    format_cell,
    latex_table,
    markdown_table,
    mean_std,
    plain_table,
)
from fl_lightning.evaluation.uncertainty import Interval

ROWS = [
    {"method": "ft", "local": MeanStd(0.9, 0.0123), "drop": 0.25},
    {"method": "lp_ft", "local": MeanStd(0.9001, 0.01), "drop": 0.125, "n": 3},
    {"method": "none & co", "local": None, "drop": math.nan, "n": 10},
]


def test_mean_std_is_the_sample_deviation() -> None:
    values = [0.1, 0.4, 0.7]
    assert mean_std(values) == pytest.approx((0.4, np.std(values, ddof=1)))
    assert math.isnan(mean_std([0.5]).std)
    with pytest.raises(ValueError, match="at least one run"):
        mean_std([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.12"),
        (3, "3"),
        ("a", "a"),
        (None, "-"),
        (math.nan, "-"),
        (MeanStd(0.5, 0.25), "0.50 ± 0.25"),
        (MeanStd(0.5, math.nan), "0.50"),
        (np.float32(0.5), "0.50"),
        (Interval(0.5, -0.25, 0.75), "0.50 [-0.25, 0.75]"),
        (Interval(0.5, math.nan, math.nan), "0.50"),
        (Interval(math.nan, math.nan, math.nan), "-"),
        (True, "True"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert format_cell(value, digits=2) == text


def test_rows_that_are_named_are_bold() -> None:
    table = markdown_table([{"a": Interval(0.5, 0.4, 0.6)}, {"a": 0.9}], best={"a": [0]})
    assert "**0.500 [0.400, 0.600]**" in table
    assert "**0.900" not in table


def test_markdown() -> None:
    assert markdown_table(ROWS, best={"local": "max", "drop": "min"}) == (
        "| method    |             local |      drop |   n |\n"
        "| --------- | ----------------: | --------: | --: |\n"
        "| ft        | **0.900 ± 0.012** |     0.250 |   - |\n"
        "| lp_ft     | **0.900 ± 0.010** | **0.125** |   3 |\n"
        "| none & co |                 - |         - |  10 |\n"
    )


def test_latex() -> None:
    assert latex_table(ROWS, ["method", "local"], digits=2, best={"local": "max"}) == (
        "\\begin{tabular}{lr}\n"
        "\\toprule\n"
        "method & local \\\\\n"
        "\\midrule\n"
        "ft & \\textbf{0.90 $\\pm$ 0.01} \\\\\n"
        "lp\\_ft & \\textbf{0.90 $\\pm$ 0.01} \\\\\n"
        "none \\& co & - \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_plain() -> None:
    assert plain_table(ROWS, ["method", "drop"], best={"drop": "max"}) == (
        "method       drop\n---------  ------\nft         0.250*\nlp_ft       0.125\nnone & co       -\n"
    )


def test_a_table_without_rows_is_its_head() -> None:
    assert markdown_table([], ["a"]) == "|   a |\n| --: |\n"


def test_unknown_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="best.drop must be max or min, got 'low'"):
        markdown_table(ROWS, best={"drop": "low"})  # type: ignore[dict-item]


def test_columns_that_do_not_fit_the_terminal_follow_below():
    rows = [{"method": "ft", "local": 0.9, "others": 0.8, "worst": 0.7}]
    assert plain_table(rows, width=21) == (
        "method  local  others\n------  -----  ------\nft      0.900   0.800\n\n"
        "method  worst\n------  -----\nft      0.700\n"
    )
    assert plain_table(rows, width=20).count("method") == 3
    assert plain_table(rows, width=1).count("method") == 3  # a column is never left out
    assert plain_table(rows) == plain_table(rows, width=1000)  # no terminal
