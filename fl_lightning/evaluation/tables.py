"""Tables of results as Markdown, LaTeX and plain text."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fl_lightning.evaluation.uncertainty import Interval

Row = Mapping[str, Any]
Best = Mapping[str, Literal["max", "min"] | Collection[int]]
"""By column which cells are set in bold: the largest, the smallest, or those of rows by number."""


class MeanStd(NamedTuple):
    """A mean over runs and their standard deviation (NaN for a single run)."""

    mean: float
    std: float


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and standard deviation over independent runs.

    The runs are a sample of all seeds, so the deviation divides by n - 1 (over clients, which are everybody, it divides
    by n: :func:`fl_lightning.evaluation.summary.std`).
    """
    if len(values) == 0:
        raise ValueError("values must be of at least one run, got none")
    array = np.asarray(values, dtype=np.float64)
    return MeanStd(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else math.nan)


def format_cell(value: Any, digits: int = 3, plus_minus: str = " ± ") -> str:
    """One cell as text: floats with ``digits`` decimals, None and NaN as "-".

    :class:`MeanStd` becomes "mean ± std", an :class:`~fl_lightning.evaluation.uncertainty.Interval` "mean [low, high]".
    """
    if value is None:
        return "-"
    if isinstance(value, Interval):
        text, low, high = (format_cell(number, digits) for number in value)
        return text if "-" in (text, low, high) else f"{text} [{low}, {high}]"
    if isinstance(value, MeanStd):
        text = format_cell(value.mean, digits)
        return text if math.isnan(value.mean) or math.isnan(value.std) else f"{text}{plus_minus}{value.std:.{digits}f}"
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            return "-"
        text = f"{value:.{digits}f}"
        return text.removeprefix("-") if float(text) == 0 else text
    return str(value)


def markdown_table(
    rows: Sequence[Row], columns: Sequence[str] | None = None, digits: int = 3, best: Best | None = None
) -> str:
    """A Markdown table, readable as plain text too.

    Args:
        rows: Dicts of column to value: text, numbers, :class:`MeanStd`, intervals or None.
        columns: Which columns, in which order. Default: all, in the order in which they first appear.
        digits: Decimals of floats.
        best: Columns in which the largest (``"max"``) or smallest (``"min"``) value is set in bold, ties included, or
            the cells of some rows.
    """
    columns, cells = _cells(rows, columns, digits, best, str, " ± ", "**{}**")
    widths = _widths(columns, cells)
    right = _is_number(rows, columns)
    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, right, strict=True)]
    return _lines([_pad(columns, widths, right), rule, *(_pad(row, widths, right) for row in cells)], "| ", " | ", " |")


def latex_table(
    rows: Sequence[Row], columns: Sequence[str] | None = None, digits: int = 3, best: Best | None = None
) -> str:
    r"""A LaTeX ``tabular`` with the rules of the booktabs package. Arguments as in :func:`markdown_table`."""
    columns, cells = _cells(rows, columns, digits, best, _latex, r" $\pm$ ", r"\textbf{{{}}}")
    head = [_latex(name) for name in columns]
    alignment = "".join("r" if number else "l" for number in _is_number(rows, columns))
    body = _lines([head], "", " & ", r" \\") + "\\midrule\n" + _lines(cells, "", " & ", r" \\")
    return f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def plain_table(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    digits: int = 3,
    best: Best | None = None,
    width: int | None = None,
) -> str:
    """A table for the terminal; the best values carry a star.

    Args:
        rows: As in :func:`markdown_table`, and likewise the next three.
        columns: Which columns, in which order.
        digits: Decimals of floats.
        best: Which cells carry a star.
        width: Characters in a line. Columns that do not fit follow below, beside the first column. Default: those of
            the terminal that standard output is; any number where it is none.
    """
    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    laid = lay_out(rows, columns, digits, best, width)
    lines = [_pad(laid.columns, laid.widths, laid.right), ["-" * width for width in laid.widths]]
    lines += [_pad(row, laid.widths, laid.right) for row in laid.cells]
    parts = ["".join("  ".join(line[index] for index in part).rstrip() + "\n" for line in lines) for part in laid.parts]
    return "\n".join(parts)


class Layout(NamedTuple):
    """How a table for the terminal is laid out.

    Attributes:
        columns: Their names.
        cells: Row by row; the best carry a star.
        widths: Characters of each column.
        right: Whether a column is aligned to the right.
        parts: Columns by number that stand beside each other; each part begins with the first column.
    """

    columns: list[str]
    cells: list[list[str]]
    widths: list[int]
    right: list[bool]
    parts: list[list[int]]


def lay_out(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    digits: int = 3,
    best: Best | None = None,
    width: int | None = None,
) -> Layout:
    """Lay a table out for the terminal. Arguments as in :func:`plain_table`; ``width`` None: any."""
    names, cells = _cells(rows, columns, digits, best, str, " ± ", "{}*")
    widths = _widths(names, cells)
    return Layout(names, cells, widths, _is_number(rows, names), _parts(widths, width))


def _parts(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """The columns by number, in parts that are at most ``width`` characters wide; each part has the first column."""
    parts: list[list[int]] = [[0]] if widths else []
    for index in range(1, len(widths)):
        used = sum(widths[column] + 2 for column in parts[-1])
        if width is not None and used + widths[index] > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _cells(
    rows: Sequence[Row],
    columns: Sequence[str] | None,
    digits: int,
    best: Best | None,
    escape: Callable[[str], str],
    plus_minus: str,
    mark: str,
) -> tuple[list[str], list[list[str]]]:
    """The columns, and each cell as text with the best ones marked."""
    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))
    chosen = {name: kind for name, kind in (best or {}).items() if not isinstance(kind, str)}
    winners = {name: _winner(rows, name, kind, digits) for name, kind in (best or {}).items() if isinstance(kind, str)}
    cells = []
    for index, row in enumerate(rows):
        line = []
        for name in names:
            value = row.get(name)
            text = escape(value) if isinstance(value, str) else format_cell(value, digits, plus_minus)
            number = _number(value)
            # Compared as printed: two numbers that look the same are both the best.
            won = number is not None and format_cell(number, digits) == winners.get(name)
            won = won or index in chosen.get(name, ())
            line.append(mark.format(text) if won else text)
        cells.append(line)
    return names, cells


def _winner(rows: Sequence[Row], name: str, kind: str, digits: int) -> str | None:
    if kind not in ("max", "min"):
        raise ValueError(f"best.{name} must be max or min, got {kind!r}")
    numbers = [number for number in (_number(row.get(name)) for row in rows) if number is not None]
    if not numbers:
        return None
    return format_cell(max(numbers) if kind == "max" else min(numbers), digits)


def _number(value: Any) -> float | None:
    """What a cell counts as in a comparison: None for text and for missing values."""
    number = value.mean if isinstance(value, (MeanStd, Interval)) else value
    if isinstance(number, bool) or not isinstance(number, (int, float, np.integer, np.floating)):
        return None
    return None if math.isnan(number) else float(number)


def _is_number(rows: Sequence[Row], columns: Sequence[str]) -> list[bool]:
    """Columns without text, which are aligned to the right."""
    return [not any(isinstance(row.get(name), str) for row in rows) for name in columns]


def _widths(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(3, *(len(row[index]) for row in (columns, *cells))) for index in range(len(columns))]


def _pad(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [
        text.rjust(width) if number else text.ljust(width)
        for text, width, number in zip(row, widths, right, strict=True)
    ]


def _lines(rows: Sequence[Sequence[str]], left: str, between: str, right: str) -> str:
    return "".join(f"{left}{between.join(row)}{right}\n" for row in rows)


_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _latex(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(character, character) for character in text)
