"""The truth drawn twice: as annotated, and after the way every box goes: written on the family's grid, read by the parser.

A box that comes back by more than the rounding of its grid was read on another grid than it was written on.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from polyground.answer import Answer, Located, Unreadable, read_answer, write_answer, write_native
from polyground.config import DataSource, load_recipe
from polyground.conventions import GRIDS, Canvas, Convention, load_convention, named_grid
from polyground.errors import DataError, StorageError, UsageError
from polyground.geometry import Box, Grid, InvertedBoxError, OffImageError, iou
from polyground.imagefile import ImageError, image_size
from polyground.prompts import question_text
from polyground.records import Example
from polyground.sources import SOURCES, BadRow
from polyground.splits import subsample
from polyground.stages import aligned, scan_file, source_options, split_files
from polyground.vision import beside, draw_boxes, fitted, load_image, stacked, text_strip

TRUTH, ASKED, GOOD, COARSE, OFF = "#00b050", "#2f6fff", "#ff9a00", "#ff9a00", "#e0002d"
"""Colours: the annotation, boxes of the question, and what was read back: as it should be, through a coarse grid, wrong."""

ROUNDING = 1.0
"""Grid units a corner may be off: half from rounding, and a box thinner than a unit is widened to one."""

COARSE_IOU = 0.9
"""Below this, rounding alone costs a box so much that a finer grid or a larger image is worth having."""

_SIDE, _GAP, _PAPER, _EDGE = 400, 10, "white", "#d0d4da"
_NUMBERS = re.compile(r"\[-?[\d.]+(?:, -?[\d.]+){3}\]")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe, whose model and pixel budget are used")
    parser.add_argument("split", nargs="?", help="a split of the recipe, such as train or test")
    parser.add_argument("--source", metavar="NAME", help=f"the format of --path: {', '.join(SOURCES)}")
    parser.add_argument("--path", type=Path, help="annotation file or folder")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the reader: images_root=photos")
    parser.add_argument("--model", metavar="FOLDER", help="model folder (its small JSON files suffice), or tiny")
    parser.add_argument("--max-pixels-total", type=int, metavar="N", help="pixels that the images of one prompt share")
    parser.add_argument(
        "--grid", choices=GRIDS, help="read boxes on this grid instead of the model's own: what other code makes of them"
    )
    parser.add_argument("--n", type=int, default=8, help="examples drawn (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other examples")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write, .png or .jpg")


def run(options: argparse.Namespace) -> str:
    """Draw some examples, and say of each how far its boxes moved. Raises DataError when a box came back wrong."""
    plan = _plan(options)
    seen = _Seen()
    examples = _drawn(_scan(plan.files, seen), count=options.n, seed=options.seed)
    if not examples:
        raise DataError(f"{plan.files[0].path}: {seen.nothing()}")
    trips = [_round_trip(example, plan) for example in examples]
    warnings = [*_causes(trips, plan), *seen.warnings()]
    text = _report(plan, trips, seen, warnings, out=options.out)
    _save(_sheet(plan, trips, warnings), options.out)
    if any(trip.off for trip in trips):
        raise DataError(text)
    return text


@dataclass(frozen=True, slots=True)
class _Plan:
    files: list[DataSource]
    convention: Convention
    grid: str | None
    """Name of another grid that boxes are read on."""

    def read_grids(self, sizes: Sequence[tuple[int, int]]) -> list[Grid]:
        if self.grid is None:
            return self.convention.grids(sizes)
        return [named_grid(self.grid, *size) for size in sizes]


def _plan(options: argparse.Namespace) -> _Plan:
    if options.n < 1:
        raise UsageError(f"--n {options.n}: draw at least one example")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--out {options.out}: a picture ends in .png or .jpg")
    model, budget = options.model, options.max_pixels_total
    if options.recipe is not None:
        if options.split is None:
            raise UsageError(f"which split of {options.recipe}? polyground check-coords {options.recipe} test --out FILE.png")
        recipe = load_recipe(options.recipe)
        files = split_files(recipe, options.split)
        model = model or recipe.model.path
        budget = budget or recipe.model.max_pixels_total
    elif options.source and options.path:
        reader = source_options(options.source, options.option)
        files = [DataSource(source=options.source, path=options.path, options=reader)]
    else:
        raise UsageError("give a recipe and a split, or --source NAME --path FILE --model FOLDER")
    if model is None:
        raise UsageError("--model FOLDER: which model's grid? A folder with config.json and preprocessor_config.json, or tiny")
    return _Plan(files, load_convention(model, max_pixels_total=budget), options.grid)


# ---------------------------------------------------------------- which examples


@dataclass(slots=True)
class _Seen:
    """What the whole file says of its boxes."""

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    areas: list[float] = field(default_factory=list)
    right: float = 0.0
    """The largest x of any box."""
    bottom: float = 0.0

    def count(self, example: Example) -> None:
        for located in example.target.boxes:
            self.areas.append(located.box.area)
            self.right, self.bottom = max(self.right, located.box.x1), max(self.bottom, located.box.y1)

    def nothing(self) -> str:
        why = [f"{count} {reason}" for reason, count in (self.skipped + self.bad).most_common()]
        return f"none of its {self.rows} rows has a box that can be drawn ({', '.join(why) or 'it is empty'})"

    def warnings(self) -> Iterator[str]:
        """What looks wrong in the annotation itself, before any model."""
        if len(self.areas) >= 20 and max(self.right, self.bottom) < 0.6:
            yield (
                f"all {len(self.areas)} boxes of the file lie in the upper left {self.right:.0%} x {self.bottom:.0%} of their "
                "images: the annotation is probably on a smaller scale than the reader divides by (0-1000 read as pixels?)"
            )
        out = self.bad["out_of_range"]
        if out and out >= 0.05 * self.rows:
            yield (
                f"{out} of {self.rows} rows have boxes that leave their image: the annotation is probably on a larger scale than "
                "the reader divides by, or made on images of another size"
            )
        inverted = self.bad["inverted"]
        if inverted and inverted >= 0.2 * self.rows:
            yield (f"{inverted} of {self.rows} rows have swapped corners: the annotation probably says x, y, width, height")


def _scan(files: Sequence[DataSource], seen: _Seen) -> Iterator[Example]:
    """Every example with boxes whose images are known, one in memory at a time."""
    for file in files:
        for item in scan_file(file):
            seen.rows += 1
            if isinstance(item, BadRow):
                seen.bad[item.reason] += 1
            elif not item.target.boxes:
                seen.skipped["without a box"] += 1
            elif any(located.image is None for located in item.target.boxes) and len(item.images) > 1:
                seen.skipped["that do not say which image"] += 1
            else:
                seen.count(item)
                yield item


def _drawn(examples: Iterable[Example], *, count: int, seed: int) -> list[Example]:
    """`splits.subsample` of a stream, holding a few rows of each task at a time."""
    pools: dict[str, list[Example]] = {}
    for example in examples:
        pool = pools.setdefault(example.task, [])
        pool.append(example)
        if len(pool) > 8 * count:
            pool.sort(key=lambda e: hashlib.sha256(f"{seed}/{e.key}".encode()).hexdigest())
            del pool[count:]
    return subsample([example for pool in pools.values() for example in pool], count, seed=seed)


# ---------------------------------------------------------------- there and back


@dataclass(frozen=True, slots=True)
class _Way:
    """One box, there and back."""

    image: int
    truth: Box
    found: Box | None
    """None when it could not be read."""
    written: tuple[float, ...]
    overlap: float
    pixels: float
    """The worst corner, in pixels of the original image."""
    units: float
    """The same on the grid the box was written on."""

    @property
    def off(self) -> bool:
        return self.found is None or self.units > ROUNDING


@dataclass(frozen=True, slots=True)
class _Trip:
    """One example: what the model is told and what it should answer, and both read back."""

    example: Example
    sizes: list[tuple[int, int]]
    canvases: list[Canvas]
    grids: list[Grid]
    read_grids: list[Grid]
    question: str
    text: str
    unreadable: Unreadable | None
    answer: list[_Way]
    asked: list[_Way]
    native_text: str | None
    """The same answer in the untrained family's own form."""
    native: list[_Way]

    @property
    def shown(self) -> list[_Way]:
        return [*self.answer, *self.asked]

    @property
    def ways(self) -> list[_Way]:
        return [*self.answer, *self.asked, *self.native]

    @property
    def off(self) -> bool:
        return any(way.off for way in self.ways)

    @property
    def overlap(self) -> float:
        return min(way.overlap for way in self.ways)

    @property
    def pixels(self) -> float:
        return max(way.pixels for way in self.ways)


def _round_trip(example: Example, plan: _Plan) -> _Trip:
    sizes = []
    for image in example.images:
        try:
            sizes.append(image_size(image))
        except ImageError as error:
            raise DataError(f"example {example.key}: {error}") from error
    grids, read_grids = plan.convention.grids(sizes), plan.read_grids(sizes)
    target = Answer(tuple(Located(located.image or 1, located.box) for located in example.target.boxes))
    text = f"<answer>{write_answer(target, grids)}</answer>"
    found = read_answer(text, read_grids)
    native_text, native_found = None, found
    if plan.convention.native is not None:
        native_text = write_native(target, grids, native=plan.convention.native)
        native_found = read_answer(native_text, read_grids, native=plan.convention.native)
    question = question_text(example, grids)
    asked = zip(example.question_boxes, _asked(question, example, read_grids), strict=True)
    return _Trip(
        example=example,
        sizes=sizes,
        canvases=plan.convention.canvases(sizes),
        grids=grids,
        read_grids=read_grids,
        question=question,
        text=text,
        unreadable=found if isinstance(found, Unreadable) else None,
        answer=[_way(located, box, sizes, grids) for located, box in _paired(target, found)],
        asked=[_way(located, box, sizes, grids) for located, box in asked],
        native_text=native_text,
        native=[]
        if native_text is None
        else [_way(located, box, sizes, grids) for located, box in _paired(target, native_found)],
    )


def _paired(target: Answer, found: Answer | Unreadable) -> list[tuple[Located, Box | None]]:
    """Each box of the target and the one that came back in its place."""
    back: list[Located] = list(found.boxes) if isinstance(found, Answer) else []
    if len(back) != len(target.boxes):
        return [(located, None) for located in target.boxes]
    # Where a form does not say the image, none is compared; a wrong one is no box at all.
    return [
        (located, box.box if box.image in (None, located.image) else None)
        for located, box in zip(target.boxes, back, strict=True)
    ]


def _asked(question: str, example: Example, grids: Sequence[Grid]) -> list[Box | None]:
    """The boxes of the question, read from its text."""
    numbers = _NUMBERS.findall(question)
    own = len(_NUMBERS.findall(example.question))
    boxes: list[Box | None] = []
    # A question may hold numbers in brackets of its own; then the text does not say which are boxes.
    written = numbers if own == 0 else [str(list(grids[(b.image or 1) - 1].write(b.box))) for b in example.question_boxes]
    for located, text in zip(example.question_boxes, written, strict=True):
        try:
            boxes.append(grids[(located.image or 1) - 1].read([float(n) for n in text[1:-1].split(",")]))
        except (InvertedBoxError, OffImageError):
            boxes.append(None)
    return boxes


def _way(located: Located, found: Box | None, sizes: Sequence[tuple[int, int]], grids: Sequence[Grid]) -> _Way:
    image = located.image or 1
    truth, grid, (width, height) = located.box, grids[image - 1], sizes[image - 1]
    written = grid.write(truth)
    if found is None:
        return _Way(image, truth, None, written, overlap=0.0, pixels=math.inf, units=math.inf)
    across, down = (
        max(abs(found.x0 - truth.x0), abs(found.x1 - truth.x1)),
        max(abs(found.y0 - truth.y0), abs(found.y1 - truth.y1)),
    )
    unit = 10.0**-grid.decimals
    return _Way(
        image,
        truth,
        found,
        written,
        overlap=iou(truth, found),
        pixels=max(across * width, down * height),
        units=max(across * grid.width, down * grid.height) / unit,
    )


# ---------------------------------------------------------------- what is wrong


def _causes(trips: Sequence[_Trip], plan: _Plan) -> Iterator[str]:
    """Plain words for what is off, from the two grids that are known."""
    off = [trip for trip in trips if trip.off]
    if off:
        trip, way = max(((trip, way) for trip in off for way in trip.ways), key=lambda pair: pair[1].units)
        wrote, read = trip.grids[way.image - 1], trip.read_grids[way.image - 1]
        yield f"{len(off)} of {len(trips)} examples do not come back: boxes are read on the wrong grid"
        if wrote.order != read.order:
            yield f"axis order: boxes are written {' '.join(_corners(wrote))} and read {' '.join(_corners(read))}"
        if (wrote.width, wrote.height) != (read.width, read.height):
            yield (
                f"scale: written on {wrote.width:g} x {wrote.height:g}, read on {read.width:g} x {read.height:g}: boxes come out "
                f"{wrote.width / read.width:.3g} times as wide and {wrote.height / read.height:.3g} times as high"
                + (" as they are; where they leave the image they are cut or unreadable" if wrote.width > read.width else "")
            )
    coarse = [trip for trip in trips if not trip.off and trip.overlap < COARSE_IOU]
    if coarse:
        trip = min(coarse, key=lambda trip: trip.overlap)
        way = min(trip.ways, key=lambda way: way.overlap)
        grid = trip.grids[way.image - 1]
        wide, high = (way.truth.x1 - way.truth.x0) * grid.width, (way.truth.y1 - way.truth.y0) * grid.height
        finer = "" if plan.convention.per_mille else "; a larger pixel budget makes it finer (max_pixels_total)"
        yield (
            f"coarse: rounding alone brings {len(coarse)} of {len(trips)} examples below IoU {COARSE_IOU:g}; a box of "
            f"{trip.example.key} is only {wide:.1f} x {high:.1f} units of its grid{finer}"
        )


def _corners(grid: Grid) -> tuple[str, ...]:
    return ("x0", "y0", "x1", "y1") if grid.order == "xyxy" else ("y0", "x0", "y1", "x1")


# ---------------------------------------------------------------- in words


def _grid_words(plan: _Plan) -> str:
    own = "0-1000 of each image" if plan.convention.per_mille else "pixels of the resized image"
    return own if plan.grid is None else f"{own}, and read on {plan.grid}, which --grid names"


def _report(plan: _Plan, trips: Sequence[_Trip], seen: _Seen, warnings: Sequence[str], *, out: Path) -> str:
    file = plan.files[0]
    more = f" and {len(plan.files) - 1} more" if len(plan.files) > 1 else ""
    left_out = [f"{count} {reason}" for reason, count in (seen.skipped + seen.bad).items()]
    areas = [100 * area for area in seen.areas]
    lines = [
        f"{len(trips)} of {seen.rows} rows of {file.path} ({file.source}){more}",
        f"model   {plan.convention.path} ({plan.convention.model_type}); boxes are written on {_grid_words(plan)}",
        f"boxes   {len(areas)} in the file, median area {statistics.median(areas):.2g} % of the image "
        f"({min(areas):.2g} to {max(areas):.2g} %)" + (f"; left out: {', '.join(left_out)}" if left_out else ""),
    ]
    names = ["example", "image", "original", "as seen", "truth in pixels", "written", "IoU", "worst corner"]
    if any(trip.off for trip in trips):
        names.append("read back in pixels")
    rows = []
    for trip in trips:
        for kind, way in [("", way) for way in trip.answer] + [(" (asked)", way) for way in trip.asked]:
            width, height = trip.sizes[way.image - 1]
            canvas = trip.canvases[way.image - 1]
            cells = [
                trip.example.key + kind,
                f"{way.image} of {len(trip.sizes)}",
                f"{width} x {height}",
                f"{canvas.width} x {canvas.height}",
                _pixels(way.truth, width, height),
                " ".join(f"{n:g}" for n in way.written),
                f"{way.overlap:.3f}",
                "-" if way.found is None else f"{way.pixels:.1f} px",
                str(trip.unreadable or "unreadable") if way.found is None else _pixels(way.found, width, height),
            ]
            rows.append(cells[: len(names)])
    lines += ["", aligned(names, rows, left=6), ""]
    if not any(trip.off for trip in trips):
        worst = max(trips, key=lambda trip: trip.pixels)
        lines.append(
            "every box comes back within the rounding of its grid"
            + (
                ""
                if plan.convention.native is None
                else f", in the contract and in the family's own form ({plan.convention.native})"
            )
            + f": lowest IoU {min(trip.overlap for trip in trips):.3f}, "
            f"worst corner {worst.pixels:.1f} px ({worst.example.key})"
        )
    lines += [f"WARNING {warning}" for warning in warnings]
    lines.append(f"drawn   {out}")
    return "\n".join(lines)


def _pixels(box: Box, width: int, height: int) -> str:
    return " ".join(f"{n:.0f}" for n in box.to_pixels(width=width, height=height))


# ---------------------------------------------------------------- drawn


def _sheet(plan: _Plan, trips: Sequence[_Trip], warnings: Sequence[str]) -> Image.Image:
    """A head that says what is shown, and a card per example in two columns of about the same height."""
    cards = [_card(number, trip) for number, trip in enumerate(trips, start=1)]
    columns: list[list[Image.Image]] = [[], []] if len(cards) > 1 else [[]]
    for card in cards:
        min(columns, key=lambda column: sum(image.height for image in column)).append(card)
    body = beside([stacked(column, gap=2 * _GAP) for column in columns if column], gap=2 * _GAP)
    width = body.width
    off = sum(trip.off for trip in trips)
    verdict = (
        f"{off} of {len(trips)} examples come back wrong"
        if off
        else f"all boxes come back: lowest IoU {min(trip.overlap for trip in trips):.3f}, worst corner "
        f"{max(trip.pixels for trip in trips):.1f} px"
    )
    file = plan.files[0]
    head = [
        text_strip(verdict, width=width, size=26, ink="white", paper=OFF if off else TRUTH, margin=12),
        text_strip(
            f"{file.path} ({file.source}), {plan.convention.model_type} in {plan.convention.path}: boxes are written on "
            f"{_grid_words(plan)}.",
            width=width,
            size=16,
        ),
        *(text_strip(warning, width=width, size=16, ink=OFF) for warning in warnings),
        beside(
            [
                text_strip("as annotated", width=150, size=15, ink="white", paper=TRUTH),
                text_strip("asked about", width=150, size=15, ink="white", paper=ASKED),
                text_strip("read back", width=150, size=15, ink="white", paper=GOOD),
                text_strip("read back, wrong", width=150, size=15, ink="white", paper=OFF),
            ],
            gap=_GAP,
        ),
    ]
    inner = stacked([*head, body], gap=_GAP)
    sheet = Image.new("RGB", (inner.width + 4 * _GAP, inner.height + 4 * _GAP), _PAPER)
    sheet.paste(inner, (2 * _GAP, 2 * _GAP))
    return sheet


def _card(number: int, trip: _Trip) -> Image.Image:
    example, width = trip.example, 2 * _SIDE + _GAP
    colour = OFF if trip.off else COARSE if trip.overlap < COARSE_IOU else TRUTH
    worst = "unreadable" if math.isinf(trip.pixels) else f"worst corner {trip.pixels:.1f} px"
    parts = [
        text_strip(
            f"{number}  {example.key}   IoU {trip.overlap:.3f}, {worst}",
            width=width,
            size=18,
            ink="white",
            paper=colour,
            margin=8,
        ),
        text_strip(" ".join(trip.question.replace("<image>", "").split()), width=width, size=15),
    ]
    for image in sorted({way.image for way in trip.shown}):
        parts.append(beside([_annotated(trip, image), _as_seen(trip, image)], gap=_GAP))
    if trip.unreadable is not None:
        parts.append(text_strip(f"cannot be read: {trip.unreadable}", width=width, size=16, ink="white", paper=OFF))
    parts.append(text_strip(trip.text, width=width, size=16, paper="#eef1f5", margin=8))
    if trip.native_text is not None:
        overlap = min(way.overlap for way in trip.native)
        parts.append(
            text_strip(
                f"the family's own form, IoU {overlap:.3f}: {' '.join(trip.native_text.split())}",
                width=width,
                size=14,
                ink=OFF if any(way.off for way in trip.native) else "#606770",
                paper="#eef1f5",
                margin=8,
            )
        )
    card = stacked(parts, gap=4)
    framed = Image.new("RGB", (card.width + 6, card.height + 6), _EDGE)
    framed.paste(card, (3, 3))
    return framed


def _annotated(trip: _Trip, image: int) -> Image.Image:
    width, height = trip.sizes[image - 1]
    boxes = [(way.truth, "", ASKED) for way in trip.asked if way.image == image]
    boxes += [(way.truth, "", TRUTH) for way in trip.answer if way.image == image]
    picture = draw_boxes(load_image(trip.example.images[image - 1]), boxes, min_side=_SIDE, halo=True)
    return _pane(picture, f"image {image} of {len(trip.sizes)} as annotated, {width} x {height}")


def _as_seen(trip: _Trip, image: int) -> Image.Image:
    """The image in the size the model sees, with the truth below what was read back."""
    canvas = trip.canvases[image - 1]
    picture = load_image(trip.example.images[image - 1]).resize((canvas.width, canvas.height), Image.Resampling.BICUBIC)
    boxes = [(way.truth, "", TRUTH) for way in trip.shown if way.image == image]
    for colour, ways in ((ASKED, trip.asked), (GOOD, trip.answer)):
        for way in ways:
            if way.image == image and way.found is not None:
                boxes.append((way.found, f"IoU {way.overlap:.2f}", OFF if way.off else colour))
    caption = f"as the model sees it, {canvas.width} x {canvas.height}, {canvas.tokens} tokens"
    return _pane(draw_boxes(picture, boxes, min_side=_SIDE, halo=True), caption)


def _pane(picture: Image.Image, caption: str) -> Image.Image:
    shown = fitted(picture, _SIDE)
    # Panes of one row differ in shape when a family stretches the image; the caption stays in line.
    held = Image.new("RGB", (_SIDE, shown.height), "#f4f4f4")
    held.paste(shown, ((_SIDE - shown.width) // 2, 0))
    return stacked([held, text_strip(caption, width=_SIDE, size=14)])


def _save(sheet: Image.Image, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from error
