"""Numbers to small inline SVG drawings for the report: bars, interval and difference strips, curves, histograms, matrices.

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
        """Pixels from the left edge of the drawing."""
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * self.width

    def y(self, value: float) -> float:
        """Pixels from the top edge of the drawing: larger values lie higher."""
        low, high = self.y_range
        return self.top + self.height - (value - low) / ((high - low) or 1.0) * self.height

    @property
    def bottom(self) -> float:
        """Pixels from the top, where the horizontal axis lies."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """Pixels from the left, where the plot ends."""
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
    left = max(52.0, 12 + 6.8 * max(len(_number(tick)) for tick in ticks))
    frame = Frame(left, 10, width - left - 66, height - 46, (min(xs), max(xs)), (min(ticks[0], *ys), max(ticks[-1], *ys)))
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
    return _svg(width, height, marks, ", ".join(series), reading=_reading(frame))


def difference_strip(series: Mapping[str, Measure], *, width: int = 520, row: int = 24) -> Markup:
    """One dot and interval per name around 0, in points: coloured where the interval leaves 0 out, in favour or against."""
    names = list(series)
    height = row * len(names) + 24
    left = min(width * 0.45, 20 + 7.0 * max((len(name) for name in names), default=0))
    reach = max((abs(end) for measure in series.values() for end in (measure.low, measure.high, measure.value)), default=0.0)
    ticks = nice_ticks(-max(reach, 0.01), max(reach, 0.01), count=4)
    frame = Frame(left, 4, width - left - 64, height - 24, (ticks[0], ticks[-1]), (0.0, 1.0))
    marks = [
        f'<line class="{"zero" if tick == 0 else "grid"}" x1="{frame.x(tick):.1f}" x2="{frame.x(tick):.1f}" y1="{frame.top}" '
        f'y2="{frame.bottom}"/>' + _text(frame.x(tick), height - 5, f"{tick * 100:+.3g}" if tick else "0")
        for tick in ticks
    ]
    for index, (name, measure) in enumerate(series.items()):
        y = frame.top + (index + 0.5) * row
        sure = "up" if measure.low > 0 else "down" if measure.high < 0 else "unsure"
        low, high = frame.x(measure.low), frame.x(measure.high)
        said = f"{_signed(measure.value)} ({_signed(measure.low)} to {_signed(measure.high)})"
        marks.append(
            f'<g class="d-{sure}"><title>{escape(name)}: {said}</title>'
            f'<line class="whisker-wide" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="fill" cx="{frame.x(measure.value):.1f}" cy="{y:.1f}" r="5"/></g>'
        )
        marks.append(_text(frame.left - 8, y + 4, name, anchor="end"))
        marks.append(_text(frame.right + 8, y + 4, _signed(measure.value), anchor="start", style=f"end d-{sure}"))
    return _svg(width, height, marks, f"Differences of {len(names)} rows, with intervals")


def stacked_bars(rows: Mapping[str, Sequence[tuple[str, str, int]]], *, width: int = 1080, row: int = 30) -> Markup:
    """One bar per name, parted as its (what, style, count) say; every bar is as long as the others. No parts leave it empty."""
    height = row * len(rows) + 22
    left = min(width * 0.3, 16 + 7.0 * max((len(name) for name in rows), default=0))
    frame = Frame(left, 2, width - left - 28, height - 24, (0.0, 1.0), (0.0, 1.0))
    marks = [_text(frame.x(tick), height - 5, f"{tick * 100:.0f} %") for tick in (0, 0.25, 0.5, 0.75, 1.0)]
    for index, (name, parts) in enumerate(rows.items()):
        y, total, start = frame.top + index * row, sum(count for *_, count in parts), 0
        marks.append(_text(frame.left - 8, y + row / 2 + 3, name, anchor="end"))
        for what, style, count in parts:
            if not count:
                continue
            x, end = frame.x(start / total), frame.x((start + count) / total)
            said = f"{name}, {what}: {count} of {total} ({100 * count / total:.1f} %)"
            marks.append(
                f'<g class="{escape(style)}"><title>{escape(said)}</title><rect class="fill" x="{x:.1f}" y="{y + 3:.1f}" '
                f'width="{max(0.5, end - x - 1):.1f}" height="{row - 8}" rx="2"/></g>'
            )
            if end - x > 30:
                marks.append(_text((x + end) / 2, y + row / 2 + 3, f"{100 * count / total:.0f}", style="inside"))
            start += count
    return _svg(width, height, marks, f"Shares of {len(rows)} rows")


def diverging_bars(rows: Mapping[str, tuple[int, int, int]], *, width: int = 520, row: int = 24) -> Markup:
    """(lost, gained, of how many) per name: losses to the left of a middle line, gains to the right, as shares of the last."""
    height = row * len(rows) + 22
    left = min(width * 0.45, 20 + 7.0 * max((len(name) for name in rows), default=0))
    most = max((max(lost, gained) / max(1, asked) for lost, gained, asked in rows.values()), default=0.0)
    ticks = nice_ticks(-max(most, 0.01), max(most, 0.01), count=4)
    frame = Frame(left, 2, width - left - 14, height - 22, (ticks[0], ticks[-1]), (0.0, 1.0))
    zero = frame.x(0)
    marks = [
        f'<line class="grid" x1="{frame.x(tick):.1f}" x2="{frame.x(tick):.1f}" y1="{frame.top}" y2="{frame.bottom}"/>'
        + _text(frame.x(tick), height - 5, f"{abs(tick) * 100:.3g} %")
        for tick in ticks
    ]
    for index, (name, (lost, gained, asked)) in enumerate(rows.items()):
        y = frame.top + index * row
        marks.append(_text(frame.left - 8, y + row / 2 + 4, name, anchor="end"))
        for style, count, sign in (("d-down", lost, -1), ("d-up", gained, 1)):
            length = abs(frame.x(count / max(1, asked)) - zero)
            x = zero if sign > 0 else zero - length
            said = f"{name}: {'gained' if sign > 0 else 'lost'} {count} of {asked}"
            marks.append(
                f'<g class="{style}"><title>{escape(said)}</title><rect class="fill" x="{x:.1f}" y="{y + 4:.1f}" '
                f'width="{length:.1f}" height="{row - 8}" rx="2"/></g>'
            )
            if count:
                inside = length > 26
                at = zero + sign * (length - 5 if inside else length + 5)
                anchor = "end" if (sign > 0) == inside else "start"
                marks.append(_text(at, y + row / 2 + 4, str(count), anchor=anchor, style="inside" if inside else f"end {style}"))
    marks.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
    return _svg(width, height, marks, f"Losses and gains of {len(rows)} rows")


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    counts: Sequence[Sequence[int]],
    *,
    style: str = "",
    corner: str = "",
    cell: int = 46,
) -> Markup:
    """Counts as a shaded table, each row shaded by its own shares; the cells of equal row and column name are outlined."""
    left, top = 16 + 7.0 * max((len(name) for name in (*rows, corner)), default=0), 24
    width, height = left + cell * len(columns) + 8, top + 28 * len(rows) + 6
    marks = [_text(left - 8, top - 8, corner, anchor="end")]
    marks += [_text(left + (place + 0.5) * cell, top - 8, name) for place, name in enumerate(columns)]
    for down, (name, line) in enumerate(zip(rows, counts, strict=True)):
        y, total = top + 28 * down, sum(line)
        marks.append(_text(left - 8, y + 18, name, anchor="end"))
        for across, count in enumerate(line):
            x, share = left + cell * across, count / max(1, total)
            edge = ' class="cell same"' if columns[across] == name else ' class="cell"'
            said = f"{name}, {columns[across]}: {count} of {total} ({100 * share:.0f} %)"
            marks.append(
                f'<g class="{escape(style)}"><title>{escape(said)}</title><rect class="fill" x="{x + 1:.1f}" y="{y + 1}" '
                f'width="{cell - 2}" height="26" rx="3" opacity="{0.06 + 0.84 * share:.2f}"/>'
                f'<rect{edge} x="{x + 1:.1f}" y="{y + 1}" width="{cell - 2}" height="26" rx="3"/></g>'
                + _text(x + cell / 2, y + 18, str(count) if count else "·", style="inside" if share > 0.55 else "count")
            )
    return _svg(round(width), round(height), marks, "Matrix of counts", natural=True)


def shares_above(
    series: Mapping[str, Sequence[float]], *, mark: float, x_label: str = "IoU at least", width: int = 520, height: int = 240
) -> Markup:
    """How large a share of each series reaches a value, for every value in [0, 1]; told in numbers for the line at `mark`."""
    frame = Frame(46, 10, width - 104, height - 46, (0.0, 1.0), (0.0, 1.0))
    marks = [_y_axis(frame, ticks=[0, 0.25, 0.5, 0.75, 1.0], unit="%")]
    marks += [_text(frame.x(tick), frame.bottom + 15, f"{tick:g}") for tick in (0, 0.25, 0.5, 0.75, 1.0)]
    marks.append(_text(frame.left + frame.width / 2, height - 4, x_label))
    at = frame.x(mark)
    marks.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
    ends: list[tuple[float, str, str]] = []
    for name, values in series.items():
        if not values:
            continue
        line = [(step / 50, _reaching(values, step / 50)) for step in range(1, 51)]
        marks.append(
            f'<g class="c-{escape(name)}"><title>{escape(name)}</title><path class="line" d="{_path(frame, line)}"/></g>'
        )
        share = _reaching(values, mark)
        ends.append((frame.y(share), f"{100 * share:.0f} %", f"c-{escape(name)}"))
    placed = _spread(ends, gap=13, top=frame.top + 13, bottom=frame.bottom)
    marks += [_text(frame.right + 6, y + 4, text, anchor="start", style=f"end {style}") for y, text, style in placed]
    if placed:
        # The lines end elsewhere: these are their values at the mark.
        marks.append(_text(frame.right + 6, placed[0][0] - 9, f"at {mark:g}", anchor="start"))
    return _svg(width, height, marks, f"Share of answers by value, {', '.join(series)}", reading=_reading(frame))


def _reaching(values: Sequence[float], threshold: float) -> float:
    # A hair of room, so that a value computed to the threshold counts there.
    return sum(value >= threshold - 1e-9 for value in values) / len(values)


def columns(labels: Sequence[str], series: Mapping[str, Sequence[int]], *, width: int = 520, height: int = 240) -> Markup:
    """Counts of several series side by side over the same labels, as shares of each series."""
    totals = {name: max(1, sum(counts)) for name, counts in series.items()}
    most = max((count / totals[name] for name, counts in series.items() for count in counts), default=0.0)
    ticks = nice_ticks(0, max(most, 0.01), count=4)
    frame = Frame(46, 10, width - 56, height - 46, (0, max(1, len(labels))), (0, ticks[-1]))
    marks = [_y_axis(frame, ticks=ticks, unit="%")]
    group = frame.width / max(1, len(labels))
    bar = group * 0.82 / max(1, len(series))
    for place, label in enumerate(labels):
        for index, (name, counts) in enumerate(series.items()):
            share = counts[place] / totals[name]
            x, y = frame.x(place) + group * 0.09 + index * bar, frame.y(share)
            said = f"{name}, {label}: {counts[place]} of {totals[name]} ({100 * share:.1f} %)"
            marks.append(
                f'<g class="c-{escape(name)}"><title>{escape(said)}</title><rect class="fill" x="{x:.1f}" y="{y:.1f}" '
                f'width="{max(1.0, bar - 1):.1f}" height="{max(0.0, frame.bottom - y):.1f}" rx="1"/></g>'
            )
        marks.append(_text(frame.x(place + 0.5), frame.bottom + 16, label))
    return _svg(width, height, marks, f"Shares of {len(labels)} columns")


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


def _svg(width: float, height: float, marks: Sequence[str], label: str, *, reading: str = "", natural: bool = False) -> Markup:
    """With `natural` the drawing is not stretched beyond its own width."""
    body = "".join(marks)
    size = f' style="max-width:{width}px"' if natural else ""
    # Every label was escaped where it was written; what remains is our own markup.
    return Markup(  # noqa: S704
        f'<svg class="chart" viewBox="0 0 {width} {height}"{size}{reading} role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def _reading(frame: Frame) -> str:
    """What a script needs to read values off the lines of a drawing: the plotting area and its two scales."""
    numbers = (frame.left, frame.top, frame.width, frame.height, *frame.x_range, *frame.y_range)
    return f' data-frame="{" ".join(f"{number:.6g}" for number in numbers)}"'


def _signed(share: float) -> str:
    """
    >>> _signed(0.123), _signed(-0.05), _signed(0.0)
    ('+12.3', '-5.0', '0')
    """
    return f"{share * 100:+.1f}" if round(share * 100, 1) else "0"


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
