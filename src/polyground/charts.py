"""Numbers to small inline SVG drawings for the report: grouped bars, interval strips, curves and histograms.

Colours come from the page (classes `c-base`, `c-sft`, …), so a drawing follows its light or dark theme. Nothing here
knows about models or stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup, escape


class Measure(Protocol):
    """A mean and its interval, all in the same unit (`metrics.Estimate` is one)."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area of a drawing and its two scales."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * self.width

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height - (value - low) / ((high - low) or 1.0) * self.height

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def right(self) -> float:
        return self.left + self.width


def grouped_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[Measure | None]], *, width: int = 1080, height: int = 320
) -> Markup:
    """Bars of shares in [0, 1] with interval whiskers, one cluster per group; a None leaves its place empty."""
    frame = Frame(40, 18, width - 48, height - 84, (0, max(1, len(groups))), (0.0, 1.0))
    marks = [_y_axis(frame, ticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0], unit="%")]
    bar = min(26.0, 0.78 * frame.width / max(1, len(groups)) / max(1, len(series)))
    for position, group in enumerate(groups):
        middle = frame.x(position + 0.5)
        for index, (name, measures) in enumerate(series.items()):
            measure = measures[position]
            if measure is None:
                continue
            left = middle + (index - len(series) / 2) * bar
            marks.append(_bar(frame, name, group, measure, left=left, width=bar - 2))
        marks.append(_slanted_label(middle, frame.bottom + 14, group))
    return _svg(width, height, marks, f"Bars by {len(groups)} groups")


def interval_strip(series: Mapping[str, Measure], *, width: int = 320, row: int = 24) -> Markup:
    """One dot and interval per name on a shared 0-1 axis."""
    height = row * len(series) + 22
    frame = Frame(14, 4, width - 30, height - 22, (0.0, 1.0), (0.0, 1.0))
    marks = [
        f'<line class="grid" x1="{frame.x(tick):.1f}" x2="{frame.x(tick):.1f}" y1="{frame.top}" y2="{frame.bottom}"/>'
        + _text(frame.x(tick), height - 5, f"{tick * 100:.0f}")
        for tick in (0, 0.25, 0.5, 0.75, 1.0)
    ]
    for index, (name, measure) in enumerate(series.items()):
        y = frame.top + (index + 0.5) * row
        low, high = frame.x(measure.low), frame.x(measure.high)
        marks.append(
            f'<g class="c-{escape(name)}"><title>{escape(name)}: {_percent(measure)}</title>'
            f'<line class="whisker-wide" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="fill" cx="{frame.x(measure.value):.1f}" cy="{y:.1f}" r="5.5"/></g>'
        )
    return _svg(width, height, marks, "Means and intervals")


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str = "step", width: int = 360, height: int = 190
) -> Markup:
    """Lines over a shared x axis: the raw values pale, a running mean strong, and the last mean written at the end.

    Points that are not finite are left out; with no point at all the drawing says so.
    """
    series = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
    points = [point for line in series.values() for point in line]
    if not points:
        return _svg(width, height, [_text(width / 2, height / 2, "no values")], "No values")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = nice_ticks(min(ys), max(ys))
    frame = Frame(46, 10, width - 112, height - 46, (min(xs), max(xs)), (min(ticks[0], *ys), max(ticks[-1], *ys)))
    marks = [_y_axis(frame, ticks=ticks)]
    for tick in nice_ticks(min(xs), max(xs), count=4):
        if frame.x_range[0] <= tick <= frame.x_range[1]:
            marks.append(_text(frame.x(tick), frame.bottom + 15, _number(tick)))
    marks.append(_text(frame.left + frame.width / 2, height - 4, x_label))
    ends: list[tuple[float, str, str]] = []
    for index, (name, line) in enumerate(series.items()):
        if not line:
            continue
        means = running_mean(line, window=max(1, len(line) // 15))
        marks.append(f'<g class="l-{index % 6}"><title>{escape(name)}</title>')
        if len(line) > 15:
            marks.append(f'<path class="line raw" d="{_path(frame, line)}"/>')
        marks.append(f'<path class="line" d="{_path(frame, means)}"/></g>')
        ends.append((frame.y(means[-1][1]), _number(means[-1][1]), f"l-{index % 6}"))
    for y, text, style in _spread(ends, gap=13, top=frame.top, bottom=frame.bottom):
        marks.append(_text(frame.right + 6, y + 4, text, anchor="start", style=f"end {style}"))
    return _svg(width, height, marks, ", ".join(series))


def histogram(counts: Sequence[tuple[str, int]], *, highlight: Sequence[str] = (), width: int = 520, height: int = 210) -> Markup:
    """Columns of counts in the given order; the labels in `highlight` are drawn in the strong colour."""
    most = max((count for _, count in counts), default=0)
    ticks = nice_ticks(0, max(1, most), count=4)
    frame = Frame(46, 18, width - 56, height - 48, (0, max(1, len(counts))), (0, max(ticks[-1], most)))
    marks = [_y_axis(frame, ticks=ticks)]
    column = frame.width / max(1, len(counts))
    for index, (label, count) in enumerate(counts):
        x, y = frame.x(index) + column * 0.1, frame.y(count)
        style = "kept" if label in highlight else "dropped"
        marks.append(
            f'<g><title>{escape(label)}: {count}</title><rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{column * 0.8:.1f}" '
            f'height="{max(0.0, frame.bottom - y):.1f}" rx="2"/></g>'
        )
        marks.append(_text(x + column * 0.4, y - 4, str(count), style="value"))
        marks.append(_text(x + column * 0.4, frame.bottom + 16, label))
    return _svg(width, height, marks, "Histogram")


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high].

    >>> nice_ticks(0, 1)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> nice_ticks(3, 3)
    [3.0, 4.0]
    """
    if high <= low:
        return [float(low), float(low) + (10.0 ** math.floor(math.log10(abs(low))) if low else 1.0)]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def running_mean(points: Sequence[tuple[float, float]], *, window: int) -> list[tuple[float, float]]:
    """Each y replaced by the mean of the last `window` values up to it.

    >>> running_mean([(1, 0.0), (2, 2.0), (3, 4.0)], window=2)
    [(1, 0.0), (2, 1.0), (3, 3.0)]
    """
    means = []
    for index, (x, _) in enumerate(points):
        recent = [y for _, y in points[max(0, index + 1 - window) : index + 1]]
        means.append((x, sum(recent) / len(recent)))
    return means


def _svg(width: float, height: float, marks: Sequence[str], label: str) -> Markup:
    body = "".join(marks)
    # Every label was escaped where it was written; what remains is our own markup.
    return Markup(f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>')  # noqa: S704


def _y_axis(frame: Frame, *, ticks: Sequence[float], unit: str = "") -> str:
    scale = 100 if unit == "%" else 1
    return "".join(
        f'<line class="grid" x1="{frame.left}" x2="{frame.right:.1f}" y1="{frame.y(tick):.1f}" y2="{frame.y(tick):.1f}"/>'
        + _text(frame.left - 6, frame.y(tick) + 4, _number(tick * scale), anchor="end")
        for tick in ticks
    )


def _bar(frame: Frame, name: str, group: str, measure: Measure, *, left: float, width: float) -> str:
    y, middle = frame.y(measure.value), left + width / 2
    low, high = frame.y(measure.low), frame.y(measure.high)
    whisker = f"M{middle:.1f} {low:.1f}V{high:.1f}M{middle - 3:.1f} {low:.1f}h6M{middle - 3:.1f} {high:.1f}h6"
    return (
        f'<g class="c-{escape(name)}"><title>{escape(group)}, {escape(name)}: {_percent(measure)}</title>'
        f'<rect class="fill" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(0.8, frame.bottom - y):.1f}" rx="2"/>'
        f'<path class="whisker" d="{whisker}"/></g>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", style: str = "tick") -> str:
    return f'<text class="{style}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _slanted_label(x: float, y: float, text: str) -> str:
    return f'<text class="tick" text-anchor="end" transform="translate({x + 6:.1f} {y:.1f}) rotate(-28)">{escape(text)}</text>'


def _path(frame: Frame, line: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line)


def _spread(ends: Sequence[tuple[float, str, str]], *, gap: float, top: float, bottom: float) -> list[tuple[float, str, str]]:
    """Labels pushed apart to `gap`, downwards; those that would leave the plot push back upwards.

    >>> _spread([(0.0, "1", "a"), (99.0, "0", "b"), (100.0, "0", "c")], gap=13, top=0, bottom=100)
    [(0.0, '1', 'a'), (87, '0', 'b'), (100, '0', 'c')]
    """
    placed: list[tuple[float, str, str]] = []
    for y, text, style in sorted(ends):
        placed.append((max(y, placed[-1][0] + gap) if placed else max(y, top), text, style))
    lowest = bottom
    for index in reversed(range(len(placed))):
        y, text, style = placed[index]
        placed[index] = (min(y, lowest), text, style)
        lowest = placed[index][0] - gap
    return placed


def _percent(measure: Measure) -> str:
    return f"{measure.value * 100:.1f} % ({measure.low * 100:.1f} to {measure.high * 100:.1f})"


def _number(value: float) -> str:
    """Three significant digits, no exponent between 0.001 and a million.

    >>> [_number(v) for v in (0, 0.25, 1234, 0.00004)]
    ['0', '0.25', '1234', '4e-05']
    """
    if value == 0:
        return "0"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
