"""Scenes of drawn shapes: sampled, rendered with exact boxes, and named in words.

Every length is a whole number of pixels on a canvas of `CANVAS` pixels a side, so a box is tight to the drawn pixels
by construction; `Item.box` gives it in unit coordinates. One object may hide a part of another, but never so much that the
box of what can be seen would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from polyground.geometry import Box

CANVAS = 224
"""Side of the canvas in pixels; boxes lie on its pixel grid."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("paper", "slate", "sand", "sky")

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "heart"),
        ("orange", "cross"),
        ("yellow", "star"),
        ("green", "ring"),
        ("cyan", "triangle"),
        ("blue", "diamond"),
        ("purple", "circle"),
        ("pink", "square"),
    }
)
"""(colour, shape) pairs kept out of every training split, so that unseen combinations can be asked about."""

_RGB = {
    "red": (214, 38, 38),
    "orange": (246, 136, 18),
    "yellow": (252, 222, 42),
    "green": (44, 158, 66),
    "cyan": (38, 200, 205),
    "blue": (38, 76, 208),
    "purple": (126, 52, 172),
    "pink": (250, 130, 190),
}
_BACKGROUND_RGB = {"paper": (246, 244, 238), "slate": (86, 96, 106), "sand": (216, 196, 158), "sky": (178, 210, 236)}
_SIDES = {"small": (30, 38), "medium": (50, 60), "large": (76, 92)}
"""Longest side of an object in canvas pixels, lowest and highest."""
_GAP = 3
"""Canvas pixels kept free between two boxes and along the edge."""
OCCLUSION = 0.3
"""Chance that the objects of a scene may overlap."""
_OVERLAP = 0.3
"""Share of the smaller of two boxes that they may have in common where overlap is allowed."""
_COUNTS = (2, 4, 5, 5, 4, 3, 2, 2)
"""How often a sampled scene has 1, 2, … 8 objects."""

Pairs = Literal["seen", "held_out", "any"]
"""Which colour-shape pairs a scene may show: none held out, at least one held out, or any."""


@dataclass(frozen=True, slots=True)
class Look:
    """How an object looks, wherever it lies."""

    shape: str
    colour: str
    size: str = "medium"
    texture: str = "plain"

    @property
    def held_out(self) -> bool:
        """Whether this pair of colour and shape is kept for the out-of-domain sets."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


@dataclass(frozen=True, slots=True)
class Item:
    """An object of a scene; `box` is tight to its drawn pixels, and to those of them that can be seen."""

    shape: str
    colour: str
    size: str
    texture: str
    box: Box

    @property
    def look(self) -> Look:
        """What it looks like, without where it is."""
        return Look(self.shape, self.colour, self.size, self.texture)


@dataclass(frozen=True, slots=True)
class Stroke:
    """A thin grey line behind the objects, in unit coordinates; a speck when its ends coincide."""

    x0: float
    y0: float
    x1: float
    y1: float
    grey: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that `render` needs: the same scene always gives the same pixels."""

    items: tuple[Item, ...]
    background: str = "paper"
    clutter: tuple[Stroke, ...] = ()
    light: float = 0.0
    """Direction of the background's gradient, in turns."""


class CrowdedError(ValueError):
    """The objects asked for do not fit on the canvas beside each other."""


# --- sampling -----------------------------------------------------------------------------------------------------


def sample_look(rng: Random, *, pairs: Pairs = "seen", sizes: Sequence[str] = SIZES) -> Look:
    """A random look; with `pairs="held_out"` its colour-shape pair is a held-out one."""
    if pairs == "held_out":
        colour, shape = rng.choice(sorted(HELD_OUT_PAIRS))
    else:
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        while pairs == "seen" and (colour, shape) in HELD_OUT_PAIRS:
            colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    return Look(shape, colour, rng.choice(list(sizes)), rng.choices(TEXTURES, (0.6, 0.2, 0.2))[0])


def sample_looks(
    rng: Random, count: int, *, pairs: Pairs = "seen", avoid: Sequence[Look] = (), likeness: float = 0.35
) -> list[Look]:
    """`count` different looks, none of them in `avoid`; at most two are large.

    With chance `likeness` a look borrows the colour, the shape or both of an earlier one, so that phrases need telling apart.
    """
    looks: list[Look] = []
    while len(looks) < count:
        first_held_out = pairs == "held_out" and not looks
        look = sample_look(rng, pairs="held_out" if first_held_out else "any" if pairs == "held_out" else pairs)
        if looks and rng.random() < likeness:
            other = rng.choice(looks)
            borrowed = rng.choice(("colour", "shape", "colour", "shape", "both"))
            look = Look(
                other.shape if borrowed != "colour" else look.shape,
                other.colour if borrowed != "shape" else look.colour,
                look.size,
                look.texture,
            )
        if look in looks or look in avoid or (pairs == "seen" and look.held_out):
            continue
        if look.size == "large" and sum(other.size == "large" for other in looks) == 2:
            continue
        looks.append(look)
    return looks


def place(rng: Random, look: Look, taken: Sequence[Box] = (), *, overlap: float = 0.0) -> Item:
    """Put an object at a random spot that is free, or shares at most `overlap` of the smaller box with each of `taken`.

    Raises CrowdedError when none is found.
    """
    low, high = _SIDES[look.size]
    for _ in range(60):
        longest = rng.randint(low, high)
        other = round(longest * rng.uniform(0.8, 1.0))
        width, height = (longest, other) if rng.random() < 0.5 else (other, longest)
        x0, y0 = rng.randint(_GAP, CANVAS - _GAP - width), rng.randint(_GAP, CANVAS - _GAP - height)
        box = Box(x0 / CANVAS, y0 / CANVAS, (x0 + width) / CANVAS, (y0 + height) / CANVAS)
        if not any(_near(box, there) and _shared(box, there) >= overlap for there in taken):
            return Item(look.shape, look.colour, look.size, look.texture, box)
    raise CrowdedError(f"no free spot of {low} pixels or more beside {len(taken)} objects")


def _near(a: Box, b: Box) -> bool:
    gap = _GAP / CANVAS
    return a.x0 < b.x1 + gap and b.x0 < a.x1 + gap and a.y0 < b.y1 + gap and b.y0 < a.y1 + gap


def _shared(a: Box, b: Box) -> float:
    """The share of the smaller box that lies in the other."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height) / min(a.area, b.area)


def arrange(
    rng: Random,
    looks: Sequence[Look],
    *,
    background: str | None = None,
    clutter: int | None = None,
    fixed: Sequence[Item] = (),
    occlusion: float = OCCLUSION,
) -> Scene:
    """A scene of `fixed` items where they lie and `looks` at random spots; items come in reading order, later ones in front.

    `background` and the number of `clutter` strokes are random when not given. With chance `occlusion` objects may overlap.
    Raises CrowdedError when it does not fit.
    """
    overlap = _OVERLAP if rng.random() < occlusion else 0.0
    for attempt in range(20):
        items = list(fixed)
        try:
            for look in sorted(looks, key=lambda look: -SIZES.index(look.size)):
                items.append(place(rng, look, [item.box for item in items], overlap=overlap))
        except CrowdedError:
            if attempt == 19:
                raise
            continue
        if overlap == 0 or boxes_are_seen(sorted(items, key=reading_order)):
            break
        if attempt >= 9:
            overlap = 0.0
    return Scene(
        items=tuple(sorted(items, key=reading_order)),
        background=background or rng.choice(BACKGROUNDS),
        clutter=_sample_clutter(rng, rng.choice((0, 0, 3, 6, 10)) if clutter is None else clutter),
        light=round(rng.random(), 3),
    )


def boxes_are_seen(items: Sequence[Item]) -> bool:
    """Whether each box is tight to what can still be seen of its object when later items are drawn over earlier ones.

    Objects of one colour may not overlap: no edge would be seen between them.
    """
    if any(a.colour == b.colour and _shared(a.box, b.box) > 0 for a, b in combinations(items, 2)):
        return False
    edges = [tuple(round(edge) for edge in item.box.to_pixels(width=CANVAS, height=CANVAS)) for item in items]
    top = np.full((CANVAS, CANVAS), -1)
    for number, (item, (x0, y0, x1, y1)) in enumerate(zip(items, edges, strict=True)):
        top[y0:y1, x0:x1][np.asarray(_mask(item.shape, x1 - x0, y1 - y0)) > 0] = number
    for number, (x0, y0, x1, y1) in enumerate(edges):
        seen = top[y0:y1, x0:x1] == number
        if not (seen[0].any() and seen[-1].any() and seen[:, 0].any() and seen[:, -1].any()):
            return False
    return True


def _sample_clutter(rng: Random, count: int) -> tuple[Stroke, ...]:
    strokes = []
    for _ in range(count):
        x, y, turn = rng.random(), rng.random(), rng.random() * 2 * math.pi
        length = rng.choice((0.0, rng.uniform(0.05, 0.25)))
        ends = (x, y, x + length * math.cos(turn), y + length * math.sin(turn))
        x0, y0, x1, y1 = (round(min(1.0, max(0.0, end)), 4) for end in ends)
        strokes.append(Stroke(x0, y0, x1, y1, rng.randint(120, 190)))
    return tuple(strokes)


def sample_scene(
    rng: Random,
    *,
    count: int | None = None,
    pairs: Pairs = "seen",
    include: Sequence[Look] = (),
    avoid: Sequence[Look] = (),
    background: str | None = None,
    clutter: int | None = None,
) -> Scene:
    """A scene of `count` objects (1 to 8 when not given), no two of the same look.

    `include` names looks it must show, `avoid` looks it must not; `pairs` says which colour-shape pairs the others may have.
    """
    if count is None:
        count = max(len(include), rng.choices(range(1, len(_COUNTS) + 1), _COUNTS)[0])
    if count < len(include):
        raise ValueError(f"a scene of {count} objects cannot include {len(include)} looks")
    while True:
        others = sample_looks(rng, count - len(include), pairs=pairs, avoid=[*include, *avoid])
        try:
            return arrange(rng, [*include, *others], background=background, clutter=clutter)
        except CrowdedError:
            # Only many large objects crowd a canvas; other looks are drawn, unless all of them were given.
            if not others:
                raise


def reading_order(item: Item) -> tuple[int, float]:
    """Sorting key: rows from top to bottom (a row is a quarter of the canvas high, by centre), left to right in a row."""
    x, y = item.box.center
    return (int(y * 4), x)


# --- words --------------------------------------------------------------------------------------------------------


def name(item: Item | Look) -> str:
    """The full name; a plain texture goes unsaid: "small red star", "small striped red star"."""
    texture = "" if item.texture == "plain" else item.texture + " "
    return f"{item.size} {texture}{item.colour} {item.shape}"


def describe(item: Item | Look, scene: Scene) -> str:
    """The shortest phrase that fits this object and no other of the scene: "red star", "large red star", "striped red star".

    Words are added to colour and shape, the size before the texture; "plain" is said where only it tells objects apart.
    """
    look = item.look if isinstance(item, Item) else item
    others = [other.look for other in scene.items if other.look != look]
    for count in range(3):
        for words in combinations(("size", "texture"), count):
            asked = (*words, "colour", "shape")
            if not any(all(getattr(look, word) == getattr(other, word) for word in asked) for other in others):
                return " ".join(getattr(look, word) for word in asked)
    return " ".join((look.size, look.texture, look.colour, look.shape))


# --- drawing ------------------------------------------------------------------------------------------------------


def _star() -> list[tuple[float, float]]:
    radii = [1.0, 0.45] * 5
    return [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))) for t in turns
    ]


def _fitted(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points moved and stretched to touch all four sides of the unit square."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return tuple(((x - left) / width, (y - top) / height) for x, y in points)


_OUTLINES = {
    "square": _fitted([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _fitted([(0.5, 0), (1, 1), (0, 1)]),
    "diamond": _fitted([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "star": _fitted(_star()),
    "heart": _fitted(_heart()),
    "cross": _fitted(
        [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)],
    ),
}


@cache
def _mask(shape: str, width: int, height: int) -> Image.Image:
    """The drawn pixels of a shape; they touch all four sides of the width x height rectangle."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    right, bottom = width - 1, height - 1
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, right, bottom), fill=255)
        if shape == "ring":
            pen.ellipse((round(right * 0.28), round(bottom * 0.28), round(right * 0.72), round(bottom * 0.72)), fill=0)
    else:
        pen.polygon([(round(x * right), round(y * bottom)) for x, y in _OUTLINES[shape]], fill=255)
    return mask


def _tile(width: int, height: int, marks: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    tile = Image.new("L", (width, height), 0)
    marks(ImageDraw.Draw(tile))
    return tile


@cache
def _texture_mask(texture: str, width: int, height: int, side: int) -> Image.Image | None:
    """Where the texture darkens the object, or None for a plain one. Its grain does not depend on the object's size."""
    grain = max(2, round(side / 22))
    if texture == "striped":

        def stripes(pen: ImageDraw.ImageDraw) -> None:
            for x in range(-height, width, grain):
                pen.line((x, height, x + height, 0), fill=255, width=max(1, grain // 3))

        return _tile(width, height, stripes)
    if texture == "dotted":

        def dots(pen: ImageDraw.ImageDraw) -> None:
            radius = grain * 0.3
            for row, y in enumerate(range(grain // 2, height + grain, grain)):
                for x in range(grain // 2 if row % 2 else 0, width + grain, grain):
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)

        return _tile(width, height, dots)
    return None


@cache
def _ground(background: str, light: float, side: int) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    shade = 14 * (x * math.cos(2 * math.pi * light) + y * math.sin(2 * math.pi * light))
    rgb = np.asarray(_BACKGROUND_RGB[background], dtype=np.float32) + shade[..., None]
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def render(scene: Scene, side: int = CANVAS) -> Image.Image:
    """The scene as an RGB image, `side` pixels square. On the default canvas every box is tight to the drawn pixels."""
    # Sixteen directions of light are told apart, so that the gradients can be kept.
    image = _ground(scene.background, round(scene.light * 16) / 16, side).copy()
    pen = ImageDraw.Draw(image)
    for stroke in scene.clutter:
        ends = (stroke.x0 * side, stroke.y0 * side, stroke.x1 * side, stroke.y1 * side)
        pen.line(ends, fill=(stroke.grey,) * 3, width=max(1, round(side / 150)))
        if ends[:2] == ends[2:]:
            pen.ellipse((ends[0] - 1, ends[1] - 1, ends[0] + 1, ends[1] + 1), fill=(stroke.grey,) * 3)
    for item in scene.items:
        x0, y0, x1, y1 = (round(edge) for edge in item.box.to_pixels(width=side, height=side))
        mask = _mask(item.shape, x1 - x0, y1 - y0)
        colour = _RGB[item.colour]
        image.paste(colour, (x0, y0), mask)
        marks = _texture_mask(item.texture, x1 - x0, y1 - y0, side)
        if marks is not None:
            # Stripes are a shade and dots a tint of the object's colour: never the background's, so the outline stays whole.
            ink = tuple(round(channel * 0.42 if item.texture == "striped" else 153 + channel * 0.4) for channel in colour)
            image.paste(ink, (x0, y0), ImageChops.multiply(mask, marks))
    return image
