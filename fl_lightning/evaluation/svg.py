"""Small drawings as SVG text, for pages that must need no network, no program and no image files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from fl_lightning.evaluation.uncertainty import Interval

GAIN, HURT, UNCLEAR, INK = "#00785a", "#c2410c", "#6b7280", "#1f2937"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#000000")


class Scale(NamedTuple):
    """A stretch of numbers on a stretch of paper."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a number lies; what is outside lies at the end."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0), 1) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round numbers within, at most so many."""
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span))
        while span / step > most:
            step *= 2 if str(step).strip("0.")[0] in "15" else 2.5
        while span / step < most / 2.5:
            step /= 2
        first = math.ceil(self.low / step - 1e-9)
        return [round(number * step, 10) for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def around(values: Sequence[float], start: float, end: float, zero: bool = False) -> Scale:
    """Return a scale that holds some numbers, with a margin; ``zero``: and 0."""
    known = [value for value in values if not math.isnan(value)] + ([0.0] if zero else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.05
    return Scale(low - margin, high + margin, start, end)


def forest_row(found: Interval, scale: Scale, colour: str, height: float = 22) -> str:
    """Draw an interval on a line with 0 marked: a table draws one in each row, all on one scale.

    Args:
        found: A difference; without an interval nothing is drawn but the line of 0.
        scale: From differences to widths.
        colour: Of the interval.
        height: Of the row.
    """
    middle, zero = height / 2, scale(0)
    parts = [f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height}" stroke="#9ca3af" stroke-dasharray="2 2"/>']
    if not math.isnan(found.low):
        low, high, mean = (scale(value) for value in (found.low, found.high, found.mean))
        parts += [
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="2.5"/>',
            f'<circle cx="{mean:.1f}" cy="{middle}" r="4.5" fill="{colour}"/>',
        ]
    return _svg(scale.end + scale.start, height, parts, f"{found.mean:+.3f}")


def forest_axis(scale: Scale, height: float = 18) -> str:
    """Draw the numbers that stand over rows of :func:`forest_row`."""
    parts = [_text(scale(tick), height - 5, f"{tick:+g}" if tick else "0", size=10) for tick in scale.ticks(4)]
    return _svg(scale.end + scale.start, height, parts, "scale of the differences")


def scatter(
    points: Mapping[str, tuple[Interval, Interval]], x_label: str, y_label: str, line: str | None = None
) -> str:
    """Draw named points with intervals both ways.

    Args:
        points: By name the values along x and y.
        x_label: What x is.
        y_label: What y is.
        line: The point through which lines are drawn, for others to be compared with.

    A point far from all others is named beside the frame and not drawn: they would be one spot beside it.
    """
    known = {name: point for name, point in points.items() if not any(math.isnan(one.mean) for one in point)}
    inside = [name for name in known if not _far(name, known)]
    width, height, left, bottom, right = 720.0, 400.0, 62.0, 48.0, 190.0
    x = around([v for name in inside for v in known[name][0]], left, width - right)
    y = around([v for name in inside for v in known[name][1]], height - bottom, 14)
    parts = _frame(x, y, x_label, y_label, height)
    if line in inside:
        cx, cy = x(known[line][0].mean), y(known[line][1].mean)
        lines = (x.start, x.end, cy, cy), (cx, cx, y.end, y.start)
        parts += [_line(*ends, "#9ca3af", 'stroke-dasharray="4 3"') for ends in lines]
    for index, (name, (across, up)) in enumerate(known.items()):
        colour, hollow, spot = COLOURS[index % len(COLOURS)], index >= len(COLOURS), 26 + 20 * index
        where = "" if name in inside else f" (off: {across.mean:.2f}, {up.mean:.2f})"
        parts.append(_spot(x.end + 16, spot - 4, colour, hollow))
        parts.append(_text(x.end + 27, spot, f"{name}{where}", anchor="start"))
        if name in inside:
            cx, cy = x(across.mean), y(up.mean)
            if not math.isnan(across.low + up.low):
                faint = 'stroke-opacity="0.5" stroke-width="1.5"'
                parts.append(_line(x(across.low), x(across.high), cy, cy, colour, faint))
                parts.append(_line(cx, cx, y(up.low), y(up.high), colour, faint))
            parts.append(_spot(cx, cy, colour, hollow, name))
    return _svg(width, height, parts, f"{y_label} against {x_label}")


def curves(
    numbers: Sequence[float], names: Sequence[str], lines: Mapping[str, Sequence[Interval]], x_label: str, y_label: str
) -> str:
    """Draw values with intervals over rising numbers, which stand at equal distances.

    Args:
        numbers: Along x.
        names: What stands below them.
        lines: By name a value for each number; ``none`` is dashed.
        x_label: What x is.
        y_label: What y is.
    """
    width, height, left, bottom, right = 720.0, 360.0, 62.0, 48.0, 170.0
    x = Scale(-0.3, len(numbers) - 0.7, left, width - right)
    y = around([value for line in lines.values() for one in line for value in one], height - bottom, 14)
    parts = _frame(Scale(0, 0.5, x.start, x.end), y, x_label, y_label, height, ticks=False)
    parts += [_text(x(place), y.start + 16, name, size=11) for place, name in enumerate(names)]
    for index, (name, line) in enumerate(lines.items()):
        colour, hollow, spot = COLOURS[index % len(COLOURS)], index >= len(COLOURS), 26 + 20 * index
        shift = 3.0 * (index - (len(lines) - 1) / 2)  # beside one another
        known = [(x(place) + shift, one) for place, one in enumerate(line) if not math.isnan(one.mean)]
        dash = ' stroke-dasharray="5 4"' if name == "none" else ""
        points = " ".join(f"{at:.1f},{y(one.mean):.1f}" for at, one in known)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        for at, one in known:
            if not math.isnan(one.low):
                parts.append(_line(at, at, y(one.low), y(one.high), colour, 'stroke-opacity="0.5" stroke-width="1.5"'))
            parts.append(_spot(at, y(one.mean), colour, hollow, name))
        parts.append(_spot(width - right + 16, spot - 4, colour, hollow))
        parts.append(_text(width - right + 27, spot, name, anchor="start"))
    return _svg(width, height, parts, f"{y_label} by {x_label}")


def _far(name: str, points: Mapping[str, tuple[Interval, Interval]]) -> bool:
    """Tell whether a point lies so far from all others that these would be one spot beside it."""
    others = [point for other, point in points.items() if other != name]
    if len(others) < 3:
        return False
    for axis in (0, 1):
        rest, own = [point[axis].mean for point in others], points[name][axis].mean
        span = max(rest) - min(rest)
        if own < min(rest) - 2 * span or own > max(rest) + 2 * span:
            return True
    return False


def reliability(
    bins: Sequence[tuple[float, float, int]], title: str, colour: str = COLOURS[0], caption: str = ""
) -> str:
    """Draw how often predictions are right against how sure the model is of them.

    Args:
        bins: For each bin the mean confidence, the share that is right, and how many predictions it holds.
        title: Whose predictions.
        colour: Of the bins.
        caption: A second line.
    """
    side, left, top = 210.0, 38.0, 34.0
    x, y = Scale(0, 1, left, side - 8), Scale(0, 1, side - 30, top)
    parts = [
        _text(left, 13, title, anchor="start", bold=True),
        _text(left, 27, caption, anchor="start", size=10, colour=UNCLEAR),
        f'<rect x="{left}" y="{top}" width="{x.end - left}" height="{y.start - top}" fill="none" stroke="#d1d5db"/>',
        f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="#9ca3af" stroke-dasharray="4 3"/>',
    ]
    for tick in (0, 0.5, 1):
        parts.append(_text(x(tick), y.start + 13, f"{tick:g}", size=10))
        parts.append(_text(left - 5, y(tick) + 4, f"{tick:g}", size=10, anchor="end"))
    parts.append(_text((left + x.end) / 2, side - 4, "confidence", size=10))
    most = max((count for *_, count in bins), default=1)
    for confidence, right, count in bins:
        radius = 2 + 6 * math.sqrt(count / most)
        parts.append(
            f'<circle cx="{x(confidence):.1f}" cy="{y(right):.1f}" r="{radius:.1f}" fill="{colour}" '
            f'fill-opacity="0.75"><title>{count} predictions</title></circle>'
        )
    return _svg(side, side, parts, f"{title}: share right against confidence")


def _frame(x: Scale, y: Scale, x_label: str, y_label: str, height: float, ticks: bool = True) -> list[str]:
    parts = [
        f'<rect x="{x.start}" y="{y.end}" width="{x.end - x.start}" height="{y.start - y.end}" fill="none" '
        'stroke="#d1d5db"/>'
    ]
    for tick in x.ticks() if ticks else []:
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.end}" y2="{y.start}" stroke="#f0f1f3"/>')
        parts.append(_text(x(tick), y.start + 16, f"{tick:g}", size=11))
    for tick in y.ticks():
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#f0f1f3"/>')
        parts.append(_text(x.start - 7, y(tick) + 4, f"{tick:g}", size=11, anchor="end"))
    parts.append(_text((x.start + x.end) / 2, height - 8, x_label))
    middle = (y.start + y.end) / 2
    parts.append(
        f'<text x="14" y="{middle:.1f}" font-size="12" text-anchor="middle" fill="{INK}" '
        f'transform="rotate(-90 14 {middle:.1f})">{escape(y_label)}</text>'
    )
    return parts


def _line(x1: float, x2: float, y1: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def _spot(x: float, y: float, colour: str, hollow: bool, name: str = "") -> str:
    """Draw a point; the second of a colour is hollow. The name shows under the pointer."""
    fill = "#fff" if hollow else colour
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">{title}</circle>'


def _text(
    x: float, y: float, text: str, size: float = 12, anchor: str = "middle", colour: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>'
        f"{escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}" font-family="inherit">{"".join(parts)}</svg>'
    )
