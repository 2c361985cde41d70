"""Boxes that an annotation writes in absolute pixels, and the image sizes they are measured on.

A box may pass the edge of its image by a pixel, because publishers round corners and sizes apart: that is clipped. What leaves
the image by more is refused, or clipped where the reader was asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.errors import DataError
from polyground.geometry import Box
from polyground.imagefile import ImageError, image_size
from polyground.sources.reading import RowError, field_of, shortened, unit_box

Beyond = Literal["report", "clip"]
"""What becomes of a box that leaves its image by more than EDGE: a BadRow of reason out_of_range, or the part that is inside."""

EDGE = 1.0
"""Pixels by which a published box may pass the edge of its image."""

_HUGE = 1e12
"""No coordinate is as large; sums of whole numbers that no float holds fail."""

Size = tuple[int, int]
"""Width and height in pixels."""


def corner_box(numbers: Any, size: Size, *, what: str, beyond: Beyond = "report") -> Box:
    """The box of two corners (x0, y0, x1, y1); RowError of reason malformed, out_of_range or inverted."""
    x0, y0, x1, y1 = _four(numbers, what)
    width, height = size
    slack = EDGE if beyond == "report" else float("inf")
    inside = [_clipped(x0, width, slack), _clipped(y0, height, slack), _clipped(x1, width, slack), _clipped(y1, height, slack)]
    return unit_box(inside, width=width, height=height, what=what)


def sized_box(numbers: Any, size: Size, *, what: str, beyond: Beyond = "report") -> Box:
    """The box of a corner and a size (x, y, width, height), as COCO writes it; RowError as `corner_box`.

    >>> sized_box([50, 25, 100, 50], (200, 100), what="box")
    Box(x0=0.25, y0=0.25, x1=0.75, y1=0.75)
    """
    x, y, width, height = _four(numbers, what)
    if not (width > 0 and height > 0):
        raise RowError("inverted", f"the {what} has no area: {list(numbers)} is x, y, width, height")
    return corner_box([x, y, x + width, y + height], size, what=what, beyond=beyond)


def size_of(row: Any) -> Size:
    """The `width` and `height` that a row gives for its image, or a RowError."""
    width, height = field_of(row, "width", int), field_of(row, "height", int)
    if not (0 < width < _HUGE and 0 < height < _HUGE):
        raise RowError("malformed", f"no image is {shortened(width)} x {shortened(height)} pixels large")
    return width, height


def measured(path: Path) -> Size:
    """The size of an image file, upright, from its header; RowError with the reason of an ImageError where it cannot be read."""
    try:
        return image_size(path)
    except ImageError as error:
        raise RowError(error.reason, str(error)) from error


def require_size(path: Path, size: Size) -> None:
    """RowError of reason size_mismatch when the file is not as large as its annotation says: its boxes are then misplaced."""
    found = measured(path)
    if found != size:
        raise RowError(
            "size_mismatch",
            f"{path} is {found[0]} x {found[1]} pixels, the annotation says {size[0]} x {size[1]}; "
            "fetch the image in its published size",
        )


def require_choice(value: str, known: Sequence[str], option: str) -> None:
    """DataError for an option of a reader that is none of the known words."""
    if value not in known:
        raise DataError(f"{option} must be one of {', '.join(map(repr, known))}; got {value!r}")


def _four(numbers: Any, what: str) -> tuple[float, float, float, float]:
    good = isinstance(numbers, list | tuple) and len(numbers) == 4
    if not good or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise RowError("malformed", f"the {what} must be four numbers; got {shortened(numbers)}")
    if any(abs(n) >= _HUGE for n in numbers):
        raise RowError("out_of_range", f"the {what} leaves the image: {shortened(numbers)}")
    a, b, c, d = numbers
    return a, b, c, d


def _clipped(number: float, size: int, slack: float) -> float:
    if -slack <= number < 0:
        return 0
    return size if size < number <= size + slack else number
