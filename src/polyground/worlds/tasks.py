"""The ten multi-image grounding tasks of the simulated world, each a generator of one question over freshly sampled scenes.

They mirror MIG-Bench's tasks. A question has exactly one right box; what a teacher may know of it is kept as facts.
Nothing is drawn or written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from PIL import Image, ImageEnhance

from polyground.geometry import PER_MILLE, Box
from polyground.worlds.language import QUESTIONS, RELATIONS, TASKS, UNSEEN_QUESTIONS, UNSEEN_RELATIONS, ordinal
from polyground.worlds.scenes import (
    CANVAS,
    COLOURS,
    HELD_OUT_PAIRS,
    OCCLUSION,
    SHAPES,
    CrowdedError,
    Item,
    Look,
    Pairs,
    Scene,
    arrange,
    describe,
    reading_order,
    render,
    sample_look,
    sample_looks,
)

_EDGE = 2
"""Canvas pixels kept free along the edge when objects move."""
CLEAR = 0.12
"""Two centres closer than this share of the canvas are neither left nor right of, nor above nor below, one another."""


class UnluckyError(ValueError):
    """The scenes drawn do not allow an unambiguous question; draw again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What the questions of a split may look like."""

    images: tuple[int, int] = (2, 4)
    """Fewest and most images of a question; `diff` and `view_diff` always have two."""
    target: Pairs = "seen"
    """Which colour-shape pairs the object asked for may have."""
    others: Pairs = "seen"
    """Which colour-shape pairs all other objects may have."""
    clutter: int | None = None
    """Strokes behind the objects of each image; none to a few when not given."""
    unseen_language: bool = False
    """Phrasings and relations kept out of training."""

    def __post_init__(self) -> None:
        if not 2 <= self.images[0] <= self.images[1] <= 6:
            raise ValueError(f"a question has 2 to 6 images; got {self.images}")


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene and how brightly it is lit."""

    scene: Scene
    brightness: float = 1.0

    def draw(self) -> Image.Image:
        """The image, brightened or darkened as the picture says."""
        image = render(self.scene)
        return image if self.brightness == 1.0 else ImageEnhance.Brightness(image).enhance(self.brightness)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of the world with its only right answer."""

    task: str
    pictures: tuple[Picture, ...]
    text: str
    """The question as MIG-Bench would write it: a box in it is per-mille, in box tokens."""
    image: int
    """1-based number of the image that holds the answer."""
    item: Item
    """The object asked for; its box is the answer."""
    additional_info: str = ""
    """As in MIG-Bench, the answer where the question does not name the image. Never shown to a model."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the teacher's conclusion needs: conclusion (its name), phrase, and other, shape, colour or i where they apply."""
    looked_at: tuple[int, ...] = ()
    """The images that the reasoning goes through, 1-based."""


def ask(rng: Random, task: str, draw: Draw) -> Question:
    """One question of a task; scenes are drawn until one can be asked without ambiguity."""
    while True:
        try:
            return _GENERATORS[task](rng, draw)
        except (UnluckyError, CrowdedError):
            continue


def box_tokens(box: Box) -> str:
    """A box in a question, as MIG-Bench writes it.

    >>> box_tokens(Box(0.1, 0.2, 0.5, 0.75))
    '<|box_start|>(100,200),(500,750)<|box_end|>'
    """
    x0, y0, x1, y1 = PER_MILLE.write(box)
    return f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"


# --- the ten tasks ------------------------------------------------------------------------------------------------


def _region(rng: Random, draw: Draw) -> Question:
    regions = _image_count(rng, draw) - 1
    source = distinct_scene(rng, draw, [_target(rng, draw)], rng.randint(max(2, regions), max(4, regions)))
    shown = rng.sample(source.items, regions)
    asked = rng.randint(1, regions)
    item = (
        next((it for it in source.items if it.look.held_out), shown[asked - 1]) if draw.target == "held_out" else shown[asked - 1]
    )
    if item not in shown:
        shown[asked - 1] = item
    asked = shown.index(item) + 1
    crops = [Picture(Scene((_centred(it),), source.background, (), source.light)) for it in shown]
    text = _pick(rng, "region", draw).format(i=asked)
    return _question("region", [Picture(source), *crops], text, 1, item, looked_at=(1, asked + 1), i=asked)


def _common_object(rng: Random, draw: Draw) -> Question:
    count = _image_count(rng, draw)
    look = _target(rng, draw)
    scenes: list[Scene] = []
    used: list[Look] = [look]
    for _ in range(count):
        scene = distinct_scene(rng, draw, [look], _item_count(rng, count, fewest=2), avoid=used)
        used.extend(item.look for item in scene.items)
        scenes.append(scene)
    number = rng.randint(1, count)
    return _question(
        "common_object",
        [Picture(scene) for scene in scenes],
        _fill(rng, _pick(rng, "common_object", draw), number),
        number,
        find(scenes[number - 1], look),
        looked_at=range(1, count + 1),
    )


def _object_tracking(rng: Random, draw: Draw) -> Question:
    count = _image_count(rng, draw)
    first = distinct_scene(rng, draw, [_target(rng, draw)], rng.randint(2, 3), apart=True)
    frames = [first]
    for _ in range(count - 1):
        frames.append(replace(first, items=_moved(rng, frames[-1].items)))
    number = rng.randint(2, count)
    marked = _asked_item(rng, first, draw)
    text = _fill(rng, _pick(rng, "object_tracking", draw), number, box=marked.box)
    item = find(frames[number - 1], marked.look)
    return _question("object_tracking", [Picture(frame) for frame in frames], text, number, item, looked_at=(1, number))


def _diff(rng: Random, draw: Draw) -> Question:
    pictures, number, item = _changed_pair(rng, draw)
    return _question("diff", pictures, _fill(rng, _pick(rng, "diff", draw), number), number, item, looked_at=(1, 2))


def _view_diff(rng: Random, draw: Draw) -> Question:
    pictures, _, _ = _changed_pair(rng, draw, changed_image=2)
    first, second = pictures
    changed = next(item for item in second.scene.items if item not in first.scene.items)
    moved = _seen_from_elsewhere(rng, second.scene, scale=1.0, mirror=False)
    item = find(moved, changed.look)
    shown = [first, Picture(moved, rng.choice((0.75, 0.85, 1.1, 1.2)))]
    return _question("view_diff", shown, _fill(rng, _pick(rng, "view_diff", draw), 2), 2, item, looked_at=(1, 2))


def _multi_view(rng: Random, draw: Draw) -> Question:
    count = _image_count(rng, draw)
    first = distinct_scene(rng, draw, [_target(rng, draw)], rng.randint(2, 3), apart=True)
    views = [first]
    for _ in range(count - 1):
        views.append(_seen_from_elsewhere(rng, first, scale=rng.uniform(0.88, 1.12), mirror=rng.random() < 0.5))
    number = rng.randint(2, count)
    marked = _asked_item(rng, first, draw)
    text = _fill(rng, _pick(rng, "multi_view", draw), number, box=marked.box)
    item = find(views[number - 1], marked.look)
    return _question("multi_view", [Picture(view) for view in views], text, number, item, looked_at=(1, number))


def _correspondence(rng: Random, draw: Draw) -> Question:
    count = _image_count(rng, draw)
    number = rng.randint(2, count)
    look = _target(rng, draw)
    marked_look = _other_of(rng, look, draw, shape=look.shape)
    scenes = [distinct_scene(rng, draw, [], _item_count(rng, count)) for _ in range(count)]
    scenes[0] = distinct_scene(rng, draw, [marked_look], rng.randint(1, 3))
    scenes[number - 1] = distinct_scene(
        rng, draw, [look], _item_count(rng, count, fewest=2), unlike=lambda other: other.shape != look.shape
    )
    marked = find(scenes[0], marked_look)
    return _question(
        "correspondence",
        [Picture(scene) for scene in scenes],
        _fill(rng, _pick(rng, "correspondence", draw), number, box=marked.box),
        number,
        find(scenes[number - 1], look),
        looked_at=(1, number),
        shape=look.shape,
    )


def _refer_grounding(rng: Random, draw: Draw) -> Question:
    count = _image_count(rng, draw)
    number = rng.randint(2, count)
    look = _target(rng, draw)
    scenes = [distinct_scene(rng, draw, [], _item_count(rng, count), avoid=[look]) for _ in range(count)]
    scenes[0] = arrange(rng, [look], clutter=draw.clutter)
    scenes[number - 1] = distinct_scene(rng, draw, [look], _item_count(rng, count, fewest=2))
    text = _fill(rng, _pick(rng, "refer_grounding", draw), number)
    item = find(scenes[number - 1], look)
    return _question("refer_grounding", [Picture(scene) for scene in scenes], text, number, item, looked_at=(1, number))


def _group_grounding(rng: Random, draw: Draw) -> Question:
    count = _image_count(rng, draw)
    number = rng.randint(1, count)
    look = _target(rng, draw)
    scenes = [distinct_scene(rng, draw, [], _item_count(rng, count), avoid=[look]) for _ in range(count)]
    scenes[number - 1] = distinct_scene(rng, draw, [look], _item_count(rng, count))
    phrase = describe(look, Scene(tuple(item for scene in scenes for item in scene.items)))
    item = find(scenes[number - 1], look)
    text = _pick(rng, "group_grounding", draw).format(phrase=phrase)
    info = f"It is in the {ordinal(number)} image. {box_tokens(item.box)}. "
    pictures = [Picture(scene) for scene in scenes]
    return _question("group_grounding", pictures, text, number, item, info=info, looked_at=range(1, count + 1), phrase=phrase)


def _reasoning(rng: Random, draw: Draw) -> Question:
    bank = UNSEEN_RELATIONS if draw.unseen_language else RELATIONS
    relation = rng.choice(tuple(bank))
    count = _image_count(rng, draw)
    look = _target(rng, draw)
    related = _RELATED[relation](rng, draw, look)
    others = [distinct_scene(rng, draw, [], _item_count(rng, count)) for _ in range(count - 1)]
    number, shown = rng.randint(1, count), None
    scenes = [*others[: number - 1], related.scene, *others[number - 1 :]]
    if related.reference is not None:
        shown = rng.choice([n for n in range(1, count + 1) if n != number])
        scenes[shown - 1] = arrange(rng, [related.reference], clutter=draw.clutter)
    phrase = describe(related.anchor, related.scene) if related.anchor else ""
    return _question(
        "reasoning",
        [Picture(scene) for scene in scenes],
        rng.choice(bank[relation]).format(n=number, nth=ordinal(number), k=shown, phrase=phrase),
        number,
        related.item,
        conclusion=relation,
        looked_at=sorted({number} if shown is None else {number, shown}),
        other=phrase,
        colour=related.reference.colour if related.reference else "",
        shape=related.reference.shape if related.reference else "",
    )


_GENERATORS: dict[str, Callable[[Random, Draw], Question]] = {
    "region": _region,
    "common_object": _common_object,
    "object_tracking": _object_tracking,
    "diff": _diff,
    "view_diff": _view_diff,
    "multi_view": _multi_view,
    "correspondence": _correspondence,
    "refer_grounding": _refer_grounding,
    "group_grounding": _group_grounding,
    "reasoning": _reasoning,
}
SEVERAL_IMAGES = tuple(task for task in TASKS if task not in ("diff", "view_diff"))
"""The tasks that can have more than two images."""


# --- relations of the reasoning task ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Related:
    scene: Scene
    item: Item
    anchor: Item | None = None
    """The object of the same image that the question starts from."""
    reference: Look | None = None
    """The object of another image that the question starts from."""


def _beside(side: Callable[[Item, Item], float]) -> Callable[[Random, Draw, Look], _Related]:
    """`side(a, b)` is positive where a lies on the side asked for of b."""

    def related(rng: Random, draw: Draw, look: Look) -> _Related:
        scene = distinct_scene(rng, draw, [look], rng.randint(2, 4))
        item = find(scene, look)
        anchors = []
        for anchor in scene.items:
            sides = [side(other, anchor) for other in scene.items if other != anchor]
            if all(abs(s) > CLEAR for s in sides) and sum(s > 0 for s in sides) == 1 and side(item, anchor) > 0:
                anchors.append(anchor)
        if not anchors:
            raise UnluckyError("nothing lies on one side of the others alone")
        return _Related(scene, item, anchor=rng.choice(anchors))

    return related


def _utmost(side: Callable[[Item, Item], float]) -> Callable[[Random, Draw, Look], _Related]:
    def related(rng: Random, draw: Draw, look: Look) -> _Related:
        scene = distinct_scene(rng, draw, [look], rng.randint(2, 4))
        item = find(scene, look)
        if any(side(item, other) < CLEAR for other in scene.items if other != item):
            raise UnluckyError("the object is not furthest to that side")
        return _Related(scene, item)

    return related


def _of_size(size: str) -> Callable[[Random, Draw, Look], _Related]:
    def related(rng: Random, draw: Draw, look: Look) -> _Related:
        look = replace(look, size=size)
        scene = distinct_scene(rng, draw, [look], rng.randint(2, 4), unlike=lambda other: other.size != size)
        return _Related(scene, find(scene, look))

    return related


def _same(attribute: str) -> Callable[[Random, Draw, Look], _Related]:
    def related(rng: Random, draw: Draw, look: Look) -> _Related:
        value = getattr(look, attribute)
        scene = distinct_scene(rng, draw, [look], rng.randint(2, 4), unlike=lambda other: getattr(other, attribute) != value)
        return _Related(scene, find(scene, look), reference=_other_of(rng, look, draw, **{attribute: value}))

    return related


def _other_colour(rng: Random, draw: Draw, look: Look) -> _Related:
    colour = rng.choice([colour for colour in COLOURS if colour != look.colour])
    shapes = [shape for shape in SHAPES if draw.others != "seen" or (colour, shape) not in HELD_OUT_PAIRS]
    reference, *crowd = (replace(sample_look(rng), shape=shape, colour=colour) for shape in rng.sample(shapes, rng.randint(3, 4)))
    scene = arrange(rng, [look, *crowd], clutter=draw.clutter)
    return _Related(scene, find(scene, look), reference=reference)


def _dx(a: Item, b: Item) -> float:
    return a.box.center[0] - b.box.center[0]


def _dy(a: Item, b: Item) -> float:
    return a.box.center[1] - b.box.center[1]


_RELATED: dict[str, Callable[[Random, Draw, Look], _Related]] = {
    "left": _beside(lambda a, b: -_dx(a, b)),
    "right": _beside(_dx),
    "above": _beside(lambda a, b: -_dy(a, b)),
    "below": _beside(_dy),
    "same_colour": _same("colour"),
    "same_shape": _same("shape"),
    "largest": _of_size("large"),
    "smallest": _of_size("small"),
    "leftmost": _utmost(lambda a, b: _dx(b, a)),
    "rightmost": _utmost(_dx),
    "other_colour": _other_colour,
}


# --- helpers ------------------------------------------------------------------------------------------------------


def _question(
    task: str,
    pictures: Sequence[Picture],
    text: str,
    image: int,
    item: Item,
    *,
    looked_at: Sequence[int],
    info: str = "",
    conclusion: str | None = None,
    **facts: Any,
) -> Question:
    phrase = facts.pop("phrase", "") or describe(item, pictures[image - 1].scene)
    return Question(
        task=task,
        pictures=tuple(pictures),
        text=text,
        image=image,
        item=item,
        additional_info=info,
        facts={"conclusion": conclusion or task, "phrase": phrase, **facts},
        looked_at=tuple(looked_at),
    )


def _pick(rng: Random, task: str, draw: Draw) -> str:
    return rng.choice((UNSEEN_QUESTIONS if draw.unseen_language else QUESTIONS)[task])


def _fill(rng: Random, template: str, number: int, *, box: Box | None = None) -> str:
    return template.format(n=number, nth=ordinal(number), box=box_tokens(box) if box else "")


def _image_count(rng: Random, draw: Draw) -> int:
    return rng.randint(*draw.images)


def _item_count(rng: Random, images: int, *, fewest: int = 1) -> int:
    # The reasoning lists what it sees, and has to stay short.
    return rng.randint(fewest, 4 if images == 2 else 3)


def _target(rng: Random, draw: Draw) -> Look:
    return sample_look(rng, pairs=draw.target)


def distinct_scene(
    rng: Random,
    draw: Draw,
    include: Sequence[Look],
    count: int,
    *,
    avoid: Sequence[Look] = (),
    unlike: Callable[[Look], bool] | None = None,
    apart: bool = False,
) -> Scene:
    """A scene of `count` objects, each the only one of its colour and shape there and unlike those of `avoid`.

    Objects that are to be moved or replaced stand `apart`; others may overlap.
    """
    looks = list(include)
    taken = {(look.colour, look.shape) for look in [*include, *avoid]}
    for _ in range(400):
        if len(looks) == count:
            return arrange(rng, looks, clutter=draw.clutter, occlusion=0.0 if apart else OCCLUSION)
        [look] = _one_like(rng, looks, draw) if looks and rng.random() < 0.3 else sample_looks(rng, 1, pairs=draw.others)
        if (look.colour, look.shape) in taken or (unlike is not None and not unlike(look)):
            continue
        looks.append(look)
        taken.add((look.colour, look.shape))
    raise UnluckyError(f"no {count} different looks found")


def _one_like(rng: Random, looks: Sequence[Look], draw: Draw) -> list[Look]:
    """A look that shares colour or shape with one of `looks`, so that both have to be seen."""
    other = rng.choice(looks)
    borrowed: dict[str, str] = {"colour": other.colour} if rng.random() < 0.5 else {"shape": other.shape}
    return [_other_of(rng, other, draw, **borrowed)]


def _other_of(rng: Random, look: Look, draw: Draw, **kept: str) -> Look:
    """A look with the attributes `kept`, of another colour-shape pair than `look`."""
    while True:
        other = replace(sample_look(rng, pairs=draw.others), **kept)
        allowed = draw.others != "seen" or not other.held_out
        if allowed and (other.colour, other.shape) != (look.colour, look.shape):
            return other


def find(scene: Scene, look: Look) -> Item:
    """The object of that look."""
    return next(item for item in scene.items if item.look == look)


def _asked_item(rng: Random, scene: Scene, draw: Draw) -> Item:
    """The object to mark: any, or the held-out one where the split is about those."""
    fitting = [item for item in scene.items if item.look.held_out] if draw.target == "held_out" else scene.items
    return rng.choice(list(fitting))


def _shifted(item: Item, dx: int, dy: int) -> Item:
    x0, y0, x1, y1 = (round(edge) for edge in item.box.to_pixels(width=CANVAS, height=CANVAS))
    x0, y0, x1, y1 = x0 + dx, y0 + dy, x1 + dx, y1 + dy
    if x0 < _EDGE or y0 < _EDGE or x1 > CANVAS - _EDGE or y1 > CANVAS - _EDGE:
        raise UnluckyError("an object leaves the canvas")
    return replace(item, box=Box.from_pixels(x0, y0, x1, y1, width=CANVAS, height=CANVAS))


def _centred(item: Item) -> Item:
    x, y = item.box.center
    return _shifted(item, round((0.5 - x) * CANVAS), round((0.5 - y) * CANVAS))


def _apart(items: Sequence[Item]) -> bool:
    gap = _EDGE / CANVAS
    boxes = [item.box for item in items]
    return not any(
        a.x0 < b.x1 + gap and b.x0 < a.x1 + gap and a.y0 < b.y1 + gap and b.y0 < a.y1 + gap
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def _moved(rng: Random, items: Sequence[Item]) -> tuple[Item, ...]:
    """The next frame: every object has moved by up to 45 pixels each way, none onto another."""
    for _ in range(60):
        moved = []
        for item in items:
            try:
                moved.append(_shifted(item, rng.randint(-45, 45), rng.randint(-45, 45)))
            except UnluckyError:
                break
        if len(moved) == len(items) and _apart(moved):
            return tuple(sorted(moved, key=reading_order))
    raise UnluckyError("no room to move")


def _seen_from_elsewhere(rng: Random, scene: Scene, *, scale: float, mirror: bool) -> Scene:
    """All objects shifted alike, scaled about the centre and mirrored; the surroundings stay."""
    for _ in range(60):
        dx, dy = rng.randint(-40, 40), rng.randint(-40, 40)
        if abs(dx) + abs(dy) < 12:
            continue
        items = []
        for item in scene.items:
            centre_x, centre_y = item.box.center
            x, y = ((0.5 - centre_x) if mirror else (centre_x - 0.5)) * scale, (centre_y - 0.5) * scale
            width, height = ((edge * CANVAS * scale) for edge in (item.box.x1 - item.box.x0, item.box.y1 - item.box.y0))
            x0, y0 = round((x + 0.5) * CANVAS + dx - width / 2), round((y + 0.5) * CANVAS + dy - height / 2)
            x1, y1 = x0 + round(width), y0 + round(height)
            if x0 < _EDGE or y0 < _EDGE or x1 > CANVAS - _EDGE or y1 > CANVAS - _EDGE:
                break
            items.append(replace(item, box=Box.from_pixels(x0, y0, x1, y1, width=CANVAS, height=CANVAS)))
        if len(items) == len(scene.items) and _apart(items):
            return replace(scene, items=tuple(sorted(items, key=reading_order)))
    raise UnluckyError("no other view holds every object")


def _changed_pair(rng: Random, draw: Draw, *, changed_image: int | None = None) -> tuple[list[Picture], int, Item]:
    """Two images that differ in one object (replaced in its place, or there in one only), and the one to point at."""
    look = _target(rng, draw)
    scene = distinct_scene(rng, draw, [look], rng.randint(2, 4), apart=True)
    item = find(scene, look)
    number = changed_image or rng.randint(1, 2)
    rest = [other for other in scene.items if other != item]
    if rng.random() < 0.6:
        kept = {"colour": look.colour} if rng.random() < 0.5 else {"shape": look.shape}
        new = replace(_other_of(rng, look, draw, **kept), size=look.size)
        if (new.colour, new.shape) in {(other.colour, other.shape) for other in rest}:
            raise UnluckyError("the changed object looks like another")
        rest.append(Item(new.shape, new.colour, new.size, new.texture, item.box))
    other_scene = replace(scene, items=tuple(sorted(rest, key=reading_order)))
    scenes = (scene, other_scene) if number == 1 else (other_scene, scene)
    return [Picture(scene) for scene in scenes], number, item
