"""Facts about boxes, their overlap, and the grids models write them on."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polyground.geometry import (
    FULL_IMAGE,
    PER_MILLE,
    UNIT,
    Box,
    Grid,
    InvertedBoxError,
    OffImageError,
    giou,
    iou,
    match_boxes,
)

LEFT, RIGHT, MIDDLE = Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.0, 1.0, 1.0), Box(0.25, 0.0, 0.75, 1.0)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Any box a float can hold, down to ones whose area vanishes."""
    unit = st.floats(0, 1)
    (x0, x1), (y0, y1) = (sorted((draw(unit), draw(unit))) for _ in range(2))
    assume(x0 < x1 and y0 < y1)
    return Box(x0, y0, x1, y1)


grids = st.builds(
    Grid,
    width=st.integers(28, 4000),
    height=st.integers(28, 4000),
    order=st.sampled_from(["xyxy", "yxyx"]),
    decimals=st.integers(0, 3),
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(LEFT, LEFT, 1.0, id="same"),
        pytest.param(LEFT, RIGHT, 0.0, id="touching"),
        pytest.param(LEFT, MIDDLE, 1 / 3, id="half-covered"),
        pytest.param(LEFT, FULL_IMAGE, 0.5, id="inside"),
        pytest.param(Box(0, 0, 5e-324, 1), Box(0, 0, 5e-324, 1), 1.0, id="same-and-vanishing"),
        pytest.param(Box(0, 0, 1e-200, 1e-200), Box(0, 0, 1e-200, 2e-200), 0.0, id="vanishing"),
    ],
)
def test_iou(a: Box, b: Box, expected: float) -> None:
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == iou(a, b)


@given(boxes(), boxes())
def test_overlap_is_symmetric_and_bounded(a: Box, b: Box) -> None:
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1
    assert giou(a, b) == pytest.approx(giou(b, a))
    assert -1 <= giou(a, b) <= iou(a, b) + 1e-9


@given(boxes())
def test_a_box_overlaps_itself_wholly(box: Box) -> None:
    assert iou(box, box) == 1.0
    assert giou(box, box) == pytest.approx(1.0)


def test_giou_grows_as_distant_boxes_approach() -> None:
    far, near, target = Box(0, 0, 0.1, 0.1), Box(0.5, 0, 0.6, 0.1), Box(0.8, 0, 0.9, 0.1)
    assert iou(far, target) == iou(near, target) == 0
    assert giou(far, target) < giou(near, target) < 0


@pytest.mark.parametrize(
    "corners",
    [(0.5, 0, 0.5, 1), (0.6, 0, 0.5, 1), (-0.1, 0, 0.5, 1), (0, 0, 1.01, 1), (0, 0, math.nan, 1), (0, math.inf, 1, 1)],
)
def test_a_box_without_area_or_outside_its_image_cannot_be_made(corners: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="box needs"):
        Box(*corners)


def test_pixels_there_and_back() -> None:
    box = Box.from_pixels(160, 240, 480, 480, width=640, height=480)
    assert box == Box(0.25, 0.5, 0.75, 1.0)
    assert box.to_pixels(width=640, height=480) == (160, 240, 480, 480)
    assert box.center == (0.5, 0.75)
    assert box.area == pytest.approx(0.25)


@given(boxes(), grids)
def test_what_a_grid_writes_it_reads_back_within_half_a_unit(box: Box, grid: Grid) -> None:
    unit = 10.0**-grid.decimals
    back = grid.read(grid.write(box))
    for size, before, after in [
        (grid.width, (box.x0, box.x1), (back.x0, back.x1)),
        (grid.height, (box.y0, box.y1), (back.y0, back.y1)),
    ]:
        # A box thinner than a unit is widened, so one of its ends moves by up to one more.
        slack = 0.5 if (before[1] - before[0]) * size >= unit else 1.5
        for exact, read in zip(before, after, strict=True):
            assert abs(exact - read) * size <= slack * unit + 1e-9


@given(boxes(), grids)
def test_writing_what_was_read_writes_the_same_numbers(box: Box, grid: Grid) -> None:
    numbers = grid.write(box)
    assert grid.write(grid.read(numbers)) == numbers


@given(boxes())
def test_written_numbers_have_no_more_decimals_than_the_grid(box: Box) -> None:
    assert all(len(repr(number).partition(".")[2]) <= 3 for number in UNIT.write(box) if "e" not in repr(number))
    assert all(isinstance(number, int) and 0 <= number <= 1000 for number in PER_MILLE.write(box))


@pytest.mark.parametrize(
    ("grid", "numbers", "expected"),
    [
        pytest.param(PER_MILLE, (100, 200, 500, 750), Box(0.1, 0.2, 0.5, 0.75), id="per-mille"),
        pytest.param(UNIT, (0.1, 0.2, 0.5, 0.75), Box(0.1, 0.2, 0.5, 0.75), id="unit"),
        pytest.param(Grid(640, 480), (64, 96, 320, 480), Box(0.1, 0.2, 0.5, 1.0), id="pixels"),
        pytest.param(Grid(1000, 1000, order="yxyx"), (200, 100, 750, 500), Box(0.1, 0.2, 0.5, 0.75), id="y-first"),
        pytest.param(PER_MILLE, (-50, 0, 500, 2000), Box(0.0, 0.0, 0.5, 1.0), id="clipped"),
    ],
)
def test_grids_read_their_own_convention(grid: Grid, numbers: tuple[float, ...], expected: Box) -> None:
    assert grid.read(numbers) == expected


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        pytest.param((500, 0, 100, 10), InvertedBoxError, id="swapped"),
        pytest.param((5, 0, 5, 10), InvertedBoxError, id="no-width"),
        pytest.param((0, 0, math.nan, 10), InvertedBoxError, id="nan"),
        pytest.param((0, 0, math.inf, 10), InvertedBoxError, id="infinite"),
        pytest.param((1000, 0, 1200, 10), OffImageError, id="right-of-it"),
        pytest.param((-20, 0, 0, 10), OffImageError, id="left-of-it"),
        pytest.param((1, 2, 3), ValueError, id="three-numbers"),
    ],
)
def test_a_grid_says_what_is_wrong_with_a_box(numbers: tuple[float, ...], error: type[ValueError]) -> None:
    with pytest.raises(error):
        PER_MILLE.read(numbers)


def test_a_grid_needs_a_size() -> None:
    with pytest.raises(ValueError, match="positive"):
        Grid(width=0, height=10)


@pytest.mark.parametrize(
    ("overlaps", "expected"),
    [
        pytest.param([], [], id="no-prediction"),
        pytest.param([[], []], [], id="no-gold"),
        pytest.param([[0.9], [0.8]], [(0, 0)], id="a-duplicate-earns-nothing"),
        pytest.param([[0.6, 0.5], [0.5, 0.0]], [(0, 1), (1, 0)], id="the-total-counts-not-the-greedy-pair"),
        pytest.param([[0.0]], [], id="no-overlap-is-no-match"),
    ],
)
def test_boxes_are_matched_one_to_one(overlaps: list[list[float]], expected: list[tuple[int, int]]) -> None:
    assert match_boxes(overlaps) == expected
