"""Facts about the drawings of the report: they say their numbers, hold their shape for odd ones, and escape every name."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from polyground import charts
from polyground.metrics import Estimate

NAMES = "<b>&\"'"

DRAWINGS: dict[str, Callable[[], Markup]] = {
    "difference_strip": lambda: charts.difference_strip({NAMES: Estimate(0.1, 0.05, 0.2), "b": Estimate(-0.1, -0.2, 0.0)}),
    "stacked_bars": lambda: charts.stacked_bars({NAMES: [(NAMES, "k-right", 3), ("wrong", "k-loose", 1)], "empty": []}),
    "diverging_bars": lambda: charts.diverging_bars({NAMES: (1, 2, 4), "none": (0, 0, 0)}),
    "matrix": lambda: charts.matrix([NAMES, "2"], ["1", NAMES], [[1, 0], [0, 0]], corner=NAMES),
    "shares_above": lambda: charts.shares_above({NAMES: [0.2, 0.8], "none": []}, mark=0.5),
    "columns": lambda: charts.columns([NAMES, "b"], {NAMES: [1, 3], "none": [0, 0]}),
    "curves": lambda: charts.curves({NAMES: [(1, 0.0), (2, 1.0)]}),
    "histogram": lambda: charts.histogram([(NAMES, 1), ("b", 0)]),
    "no-rows": lambda: charts.difference_strip({}),
    "no-bars": lambda: charts.diverging_bars({}),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_well_formed_whatever_its_names_hold(name: str) -> None:
    drawing = str(DRAWINGS[name]())
    root = ElementTree.fromstring(drawing)
    assert root.tag == "svg"
    assert "<b>" not in drawing
    assert not re.search(r"\b(nan|inf)\b", drawing)


def test_a_difference_is_coloured_where_its_interval_leaves_0_out() -> None:
    rows = {"up": Estimate(0.2, 0.1, 0.3), "down": Estimate(-0.2, -0.3, -0.1), "unsure": Estimate(0.2, 0.0, 0.3)}
    drawing = charts.difference_strip(rows)
    for name in rows:
        assert f'<g class="d-{name}"><title>{name}:' in drawing
    assert "up: +20.0 (+10.0 to +30.0)" in drawing


def test_shares_are_of_the_values_that_reach_a_threshold() -> None:
    drawing = charts.shares_above({"rl": [0.0, 0.5, 0.5, 0.9]}, mark=0.5)
    assert ">75 %<" in drawing


def test_a_readable_drawing_says_its_scales() -> None:
    drawing = charts.curves({"loss": [(1, 0.0), (3, 2.0)]}, width=360, height=190)
    [frame] = re.findall(r'data-frame="([^"]+)"', drawing)
    assert [float(number) for number in frame.split()] == [52, 10, 242, 144, 1, 3, 0, 2]


def test_a_long_number_beside_the_axis_has_room() -> None:
    drawing = charts.curves({"rate": [(1, 0.001), (100, 0.0)]})
    [x] = {float(x) for x in re.findall(r'text-anchor="end" x="([\d.]+)"', drawing)}
    assert ">0.00075<" in drawing
    assert x > 6.6 * len("0.00075")


def test_shares_at_a_threshold_say_so_above_them() -> None:
    drawing = charts.shares_above({"rl": [1.0, 1.0], "sft": [0.0]}, mark=0.5)
    texts = re.findall(r'<text[^>]* y="([\d.]+)">([^<]+)</text>', drawing)
    at, full = (float(next(y for y, text in texts if text == said)) for said in ("at 0.5", "100 %"))
    assert 0 < at < full
