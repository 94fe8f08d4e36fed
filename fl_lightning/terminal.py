"""Writes for people: colours, lines that fit and bars with the time left on a terminal, the same words plain elsewhere.

A terminal without colours (``NO_COLOR``) keeps bold and dim; one that can do nothing (``TERM=dumb``) gets plain text.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from fl_lightning.evaluation.tables import Best, Row, lay_out, plain_table
from fl_lightning.evaluation.uncertainty import Interval

GAIN, HURT, UNCLEAR = "green", "bold red", "dim"
"""How a cell looks whose client gains, is harmed, or has too few examples to tell."""

Tone = Callable[[Row], str]
"""Says how a cell of a row looks, as a style of rich; an empty one: like the rest."""

_LONGEST = 110  # characters of a line of prose; longer ones are hard to read


def table(rows: Sequence[Row], best: Best | None = None, tones: Mapping[str, Tone] | None = None) -> str:
    """Return a table for standard output; see :func:`fl_lightning.evaluation.tables.plain_table`.

    Args:
        rows: Dicts of column to value.
        best: Which cells carry a star; on a terminal they are bold, too.
        tones: By column what colours its cells on a terminal.
    """
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        return plain_table(rows, best=best)
    laid = lay_out(rows, best=best, width=console.width)
    texts = []
    for part in laid.parts:
        drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        drawn.header_style, drawn.border_style = "bold", "dim"
        for index in part:
            align: Literal["right", "left"] = "right" if laid.right[index] else "left"
            drawn.add_column(Text(laid.columns[index]), justify=align, no_wrap=True)
        for row, line in zip(rows, laid.cells, strict=True):
            drawn.add_row(*(_styled(row, laid.columns[index], line[index], tones or {}) for index in part))
        wide = Console(width=max(console.width, sum(laid.widths[index] + 2 for index in part)))
        with wide.capture() as captured:
            wide.print(drawn)
        texts.append(captured.get())
    return "\n".join(texts)


def of_change(column: str) -> Tone:
    """Return what colours a cell by the interval in a column: a gain, a harm, or too few examples to tell."""

    def tone(row: Row) -> str:
        found = row.get(column)
        if not isinstance(found, Interval) or math.isnan(found.low):
            return ""
        return HURT if found.below else GAIN if found.above else UNCLEAR

    return tone


def _styled(row: Row, column: str, text: str, tones: Mapping[str, Tone]) -> Text:
    style = tones[column](row) if column in tones else ""
    return Text(text, style=f"{style} bold".strip() if text.endswith("*") else style)


def prose(text: str) -> str:
    """Return sentences for standard output: on a terminal filled to lines that fit, elsewhere as they are.

    Args:
        text: Lines; one that ends without a full stop or a colon goes on in the next.
    """
    console = Console()
    if not console.is_terminal:
        return text
    width = min(console.width, _LONGEST)
    joined = re.sub(r"(?<![.:\n])\n(?!\n|$)", " ", text)
    return "".join(
        line
        if len(line) <= width
        else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) + "\n"
        for line in joined.splitlines(keepends=True)
    )


def command(script: str) -> str:
    """Return how ``train`` or ``personalize`` is called where this process was: from a checkout, or as installed."""
    return f"fl-{script}" if Path(sys.argv[0]).stem in ("fl-train", "fl-personalize") else f"python {script}.py"


def closing(lines: Mapping[str, str]) -> str:
    """Return the last lines of a run: what lies where, and what to look at next.

    Args:
        lines: By what they are of; a line is never broken, so that paths and commands can be copied.
    """
    width = max(map(len, lines)) + 2
    console = Console()
    with console.capture() as captured:
        for name, line in lines.items():
            text = Text.assemble((f"{name}:".ljust(width), "bold"), line)
            console.print(text, soft_wrap=True)
    return captured.get().rstrip("\n")


class Bar:
    """Draws how much is done and how long the rest takes, on standard error; nothing where that is no terminal.

    The time left is the work left at the mean pace so far; nothing is said before there is a pace. No thread draws: the
    bar moves when something has ended, and costs nothing in between. Lines that are printed or logged meanwhile stand
    above it.

    Args:
        words: What is counted.
        total: How many there are.
        done: How many were done before.
        inner: What is counted within one of them, on a line below; None: nothing.
        work: All the work that is left, in the unit of :meth:`advance`. Default: each one is as long as the others.
        starts_slowly: Whether the first one says nothing about the others: processes start, data are read.
        enabled: Whether to draw. Default: only on a terminal.
    """

    def __init__(
        self,
        words: str,
        total: int,
        done: int = 0,
        inner: str | None = None,
        work: float | None = None,
        starts_slowly: bool = False,
        enabled: bool | None = None,
    ) -> None:
        self._bars: Progress | None = None
        if not (sys.stderr.isatty() if enabled is None else enabled):
            return
        self._left = TimeLeft(total - done if work is None else work, starts_slowly)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[shown]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what is printed into a file must get there
        )
        self._outer = self._bars.add_task(words, total=total, completed=done, left="", shown="")
        self._inner = self._bars.add_task(inner, total=None, left="", shown="") if inner else None
        self._streams = sys.stdout, sys.stderr
        self._bars.start()
        self._moved = dict(zip(self._streams, (sys.stdout, sys.stderr), strict=True))
        self._send_log(self._moved)
        # A forked process has no bar.
        os.register_at_fork(after_in_child=self._forget)

    def begin(self, total: int) -> None:
        """Begin the line below anew.

        Args:
            total: How many there are on it.
        """
        if self._bars is not None and self._inner is not None:
            self._bars.reset(self._inner, total=total)
            self._bars.refresh()

    def advance_inner(self) -> None:
        """Count one on the line below."""
        if self._bars is not None and self._inner is not None:
            self._bars.advance(self._inner)
            self._bars.refresh()

    def advance(self, count: int = 1, work: float | None = None) -> None:
        """Count some that have ended.

        Args:
            count: How many.
            work: How much that was; None: as much as their number.
        """
        if self._bars is not None:
            self._left.add(count if work is None else work)
            self._bars.update(self._outer, advance=count, left=self._left.words())
            self._bars.refresh()

    def skip(self, count: int, work: float) -> None:
        """Count some that were done before, which say nothing about the pace."""
        if self._bars is not None:
            self._left.work -= work
            self._bars.update(self._outer, advance=count)

    def show(self, words: str) -> None:
        """Say something beside the bar."""
        if self._bars is not None:
            self._bars.update(self._outer, shown=escape(words))
            self._bars.refresh()

    def close(self) -> None:
        """Wipe the bar off the terminal."""
        if self._bars is not None:
            self._send_log({new: old for old, new in self._moved.items()})
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self) -> None:
        if self._bars is not None:
            self._bars = None
            self._send_log({new: old for old, new in self._moved.items()})
            sys.stdout, sys.stderr = self._streams

    @staticmethod
    def _send_log(to: Mapping[Any, Any]) -> None:
        for handler in logging.root.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in to:
                handler.setStream(to[handler.stream])


class TimeLeft:
    """Says how long the rest takes at the mean pace so far.

    Args:
        work: All of it.
        starts_slowly: Whether the pace counts from the end of the first part.
        clock: Seconds.
    """

    def __init__(self, work: float, starts_slowly: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.work = work
        self.clock = clock
        self._starts_slowly = starts_slowly
        self._done = self._from = 0.0
        self._began: float | None = None
        self._start = clock()

    def add(self, work: float) -> None:
        """Count work that has ended."""
        self._done += work
        if self._began is None:
            self._began, self._from = (self.clock(), self._done) if self._starts_slowly else (self._start, 0.0)

    @property
    def seconds(self) -> float | None:
        """Seconds left; None: there is no pace yet."""
        if self._began is None or self._done <= self._from:
            return None
        return max(0.0, (self.work - self._done) * (self.clock() - self._began) / (self._done - self._from))

    def words(self) -> str:
        """Return it as a reader wants it: the longer, the coarser."""
        seconds = self.seconds
        return "" if not seconds else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return a duration in words, to about a tenth: ``8 s``, ``2 min``, ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes >= 600:
        return f"{round(minutes / 60)} h"
    return f"{minutes // 60} h {minutes % 60 // 5 * 5} min".removesuffix(" 0 min")
