"""Boxes in unit coordinates, their overlap, and the coordinate grids that models speak.

The only IoU of the project lives here. Nothing here knows about text, images or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box in unit coordinates: origin top-left, x right, y down.

    >>> Box(0.25, 0.5, 0.75, 1.0).to_pixels(width=640, height=480)
    (160.0, 240.0, 480.0, 480.0)
    """

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        if not (0 <= self.x0 < self.x1 <= 1 and 0 <= self.y0 < self.y1 <= 1):
            raise ValueError(f"box needs 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1; got {astuple(self)}")

    @property
    def area(self) -> float:
        """In (0, 1]: the share of the image."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in fractions of the image."""
        return ((self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2)

    def to_pixels(self, *, width: int, height: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels of an image of this size, not rounded."""
        return (self.x0 * width, self.y0 * height, self.x1 * width, self.y1 * height)

    @classmethod
    def from_pixels(cls, x0: float, y0: float, x1: float, y1: float, *, width: int, height: int) -> Box:
        """The box of absolute pixels; raises ValueError when it does not lie in the image."""
        return cls(x0 / width, y0 / height, x1 / width, y1 / height)


FULL_IMAGE = Box(0.0, 0.0, 1.0, 1.0)


def _shared_area(a: Box, b: Box) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]. Boxes that only touch score 0.

    Areas so small that they vanish in floating point score 0, unless the boxes are equal.
    """
    if a == b:
        return 1.0
    shared = _shared_area(a, b)
    union = a.area + b.area - shared
    return min(1.0, shared / union) if shared > 0 and union > 0 else 0.0


def reaches(overlap: float, threshold: float) -> bool:
    """True at or above the threshold; an IoU of exactly one half does not miss 0.5 through floating point."""
    return overlap >= threshold - 1e-9


def giou(a: Box, b: Box) -> float:
    """Generalised IoU (Rezatofighi et al., 2019), in (-1, 1]: unlike IoU it still grows as distant boxes approach."""
    hull = (max(a.x1, b.x1) - min(a.x0, b.x0)) * (max(a.y1, b.y1) - min(a.y0, b.y0))
    union = a.area + b.area - _shared_area(a, b)
    return iou(a, b) - (hull - union) / hull if hull > 0 else iou(a, b)


def match_boxes(overlaps: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """One-to-one matching of rows to columns with the largest total overlap; pairs with no overlap are left out.

    `overlaps` is [predicted][gold], each in [0, 1]. A prediction is used once: repeating a good box earns nothing.
    """
    matrix = np.asarray(overlaps, dtype=float)
    if matrix.size == 0:
        return []
    if 1 in matrix.shape:
        # The common case of one box needs no assignment, and no half second to import scipy.
        row, column = np.unravel_index(int(matrix.argmax()), matrix.shape)
        return [(int(row), int(column))] if matrix[row, column] > 0 else []
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if matrix[r, c] > 0]


class OffImageError(ValueError):
    """The box lies outside its image altogether."""


class InvertedBoxError(ValueError):
    """The box has its corners swapped, or no area."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How one model family writes a box of one image: the range of each axis, the axis order, whole numbers or not.

    >>> PER_MILLE.write(Box(0.1, 0.2, 0.5, 0.75))
    (100, 200, 500, 750)
    >>> Grid(width=640, height=480).read((64, 96, 320, 480))
    Box(x0=0.1, y0=0.2, x1=0.5, y1=1.0)
    """

    width: float
    """What x = 1 is written as: 1000 for per-mille, the pixel width of the image *as processed* for absolute pixels."""
    height: float
    order: Literal["xyxy", "yxyx"] = "xyxy"
    decimals: int = 0

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.height > 0):
            raise ValueError(f"grid needs a positive width and height; got {self.width} x {self.height}")

    def write(self, box: Box) -> tuple[float, ...]:
        """The box on this grid, rounded to `decimals`; every corner is within half a unit of the exact one.

        A box so thin that both ends round to the same number is widened to one unit, so that it can be read back.
        """
        x0, x1 = self._ends(box.x0, box.x1, self.width)
        y0, y1 = self._ends(box.y0, box.y1, self.height)
        numbers = (x0, y0, x1, y1) if self.order == "xyxy" else (y0, x0, y1, x1)
        return numbers if self.decimals else tuple(int(n) for n in numbers)

    def _ends(self, low: float, high: float, size: float) -> tuple[float, float]:
        """Both ends of one axis, rounded, and one unit apart where they would fall together."""
        low, high = round(low * size, self.decimals), round(high * size, self.decimals)
        if high > low:
            return low, high
        unit = 10.0**-self.decimals
        # Rounded once more: 0.128 + 0.001 is 0.129 only on paper.
        if (above := round(low + unit, self.decimals)) <= size:
            return low, above
        return round(low - unit, self.decimals), low

    def read(self, numbers: Sequence[float]) -> Box:
        """The unit box of four numbers on this grid, clipped to the image.

        Raises InvertedBoxError when corners are swapped, not finite or without area, OffImageError when nothing of
        the box lies in the image, ValueError when there are not four numbers.
        """
        if len(numbers) != 4:
            raise ValueError(f"a box has four numbers; got {len(numbers)}")
        a, b, c, d = (float(n) for n in numbers)
        x0, y0, x1, y1 = (a, b, c, d) if self.order == "xyxy" else (b, a, d, c)
        if not (math.isfinite(x0 + x1 + y0 + y1) and x0 < x1 and y0 < y1):
            raise InvertedBoxError(f"box has no area or swapped corners: {tuple(numbers)}")
        x0, x1 = max(0.0, x0 / self.width), min(1.0, x1 / self.width)
        y0, y1 = max(0.0, y0 / self.height), min(1.0, y1 / self.height)
        if x0 >= x1 or y0 >= y1:
            raise OffImageError(f"box lies outside the image: {tuple(numbers)} on a {self.width} x {self.height} grid")
        return Box(x0, y0, x1, y1)


PER_MILLE = Grid(width=1000, height=1000)
"""0-1000 whichever the image size: Qwen2-VL, Qwen3-VL, InternVL, GLM-4.xV."""

UNIT = Grid(width=1, height=1, decimals=3)
"""0-1 with three decimals: the LLaVA family, MIG-Bench (original)."""
