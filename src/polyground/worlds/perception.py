"""Multiple-choice perception questions over several images, as BLINK and MMIU ask them; nothing has to be located."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from polyground.worlds.language import NUMBER_WORDS, PERCEPTION, PRACTICE, SPATIAL_CHOICES, ordinal
from polyground.worlds.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    CrowdedError,
    Item,
    Look,
    Scene,
    arrange,
    describe,
    sample_look,
)
from polyground.worlds.tasks import CLEAR, Draw, Picture, UnluckyError, distinct_scene, find

BLINK_TASKS = ("Counting", "Visual_Similarity", "Spatial_Relation", "Odd_One_Out")
MMIU_TASKS = ("image_retrieval", "image_counting", "common_object", "most_objects")
PRACTICE_TASKS = tuple(PRACTICE)
"""Kinds of question to train on: they read one image of several, and none of them asks what the two sets above ask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceQuestion:
    """One multiple-choice question of the world."""

    task: str
    pictures: tuple[Picture, ...]
    text: str
    choices: tuple[str, ...]
    right: int
    """Position of the right choice, from 0."""
    image: int | None = None
    """1-based number of the one image that has to be looked at, where there is one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the teacher's conclusion needs; empty for questions that are never taught."""

    @property
    def letter(self) -> str:
        """Of the right choice."""
        return "ABCDEF"[self.right]


def ask_choice(rng: Random, task: str, draw: Draw) -> ChoiceQuestion:
    """One question of a sub-task; scenes are drawn until one can be asked without ambiguity. At most four images."""
    while True:
        try:
            return _practice(rng, task, draw) if task in PRACTICE else _GENERATORS[task](rng, draw)
        except (UnluckyError, CrowdedError):
            continue


def _counting(rng: Random, draw: Draw) -> ChoiceQuestion:
    scenes = [distinct_scene(rng, draw, [], rng.randint(1, 3)) for _ in range(rng.randint(2, 3))]
    total = sum(len(scene.items) for scene in scenes)
    return _of_numbers(rng, "Counting", scenes, total, [str(n) for n in range(10)])


def _visual_similarity(rng: Random, draw: Draw) -> ChoiceQuestion:
    look = sample_look(rng, pairs=draw.target)
    others = [distinct_scene(rng, draw, [], rng.randint(1, 3), avoid=[look]) for _ in range(2)]
    right = rng.randrange(3)
    others.insert(right, distinct_scene(rng, draw, [look], rng.randint(1, 3)))
    return _of_images("Visual_Similarity", [arrange(rng, [look], clutter=draw.clutter), *others], right, first=2)


def _spatial_relation(rng: Random, draw: Draw) -> ChoiceQuestion:
    scenes = [distinct_scene(rng, draw, [], rng.randint(2, 3)) for _ in range(2)]
    number = rng.randint(1, 2)
    item, other = rng.sample(scenes[number - 1].items, 2)
    dx, dy = (a - b for a, b in zip(item.box.center, other.box.center, strict=True))
    if max(abs(dx), abs(dy)) < 2 * CLEAR or min(abs(dx), abs(dy)) > CLEAR:
        raise UnluckyError("the one is on no clear side of the other")
    side = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    scene = scenes[number - 1]
    words = {"phrase": describe(item, scene), "other": describe(other, scene), "n": number}
    return _asked("Spatial_Relation", scenes, SPATIAL_CHOICES, SPATIAL_CHOICES.index(side), **words)


def _odd_one_out(rng: Random, draw: Draw) -> ChoiceQuestion:
    look = sample_look(rng, pairs=draw.target)
    scenes = [distinct_scene(rng, draw, [look], rng.randint(1, 3)) for _ in range(rng.randint(2, 3))]
    right = rng.randint(0, len(scenes))
    scenes.insert(right, distinct_scene(rng, draw, [], rng.randint(1, 3), avoid=[look]))
    return _of_images("Odd_One_Out", scenes, right, phrase=_pair(look))


def _image_retrieval(rng: Random, draw: Draw) -> ChoiceQuestion:
    look = sample_look(rng, pairs=draw.target)
    scenes = [distinct_scene(rng, draw, [], rng.randint(1, 3), avoid=[look]) for _ in range(rng.randint(2, 3))]
    right = rng.randint(0, len(scenes))
    scenes.insert(right, distinct_scene(rng, draw, [look], rng.randint(1, 3)))
    return _of_images("image_retrieval", scenes, right, phrase=_pair(look))


def _image_counting(rng: Random, draw: Draw) -> ChoiceQuestion:
    look = sample_look(rng, pairs=draw.target)
    count = rng.randint(2, 4)
    having = rng.randint(1, count)
    scenes = [distinct_scene(rng, draw, [look], rng.randint(1, 3)) for _ in range(having)]
    scenes += [distinct_scene(rng, draw, [], rng.randint(1, 3), avoid=[look]) for _ in range(count - having)]
    rng.shuffle(scenes)
    return _of_numbers(rng, "image_counting", scenes, having, NUMBER_WORDS[:5], phrase=_pair(look))


def _common_object(rng: Random, draw: Draw) -> ChoiceQuestion:
    look = sample_look(rng, pairs=draw.target)
    scenes: list[Scene] = []
    used = [look]
    for _ in range(rng.randint(2, 4)):
        scenes.append(distinct_scene(rng, draw, [look], rng.randint(2, 3), avoid=used))
        used.extend(item.look for item in scenes[-1].items)
    wrong = list(dict.fromkeys(_pair(item.look) for scene in scenes for item in scene.items if item != find(scene, look)))
    if len(wrong) < 3:
        raise UnluckyError("too few wrong choices")
    choices = [*rng.sample(wrong, 3), _pair(look)]
    rng.shuffle(choices)
    return _asked("common_object", scenes, choices, choices.index(_pair(look)))


def _most_objects(rng: Random, draw: Draw) -> ChoiceQuestion:
    count, most = rng.randint(2, 4), rng.randint(2, 4)
    right = rng.randrange(count)
    numbers = [most if i == right else rng.randint(1, most - 1) for i in range(count)]
    return _of_images("most_objects", [distinct_scene(rng, draw, [], number) for number in numbers], right)


def _practice(rng: Random, task: str, draw: Draw) -> ChoiceQuestion:
    scenes = [distinct_scene(rng, draw, [], rng.randint(1, 4)) for _ in range(rng.randint(*draw.images))]
    number = rng.randint(1, len(scenes))
    text, choices, right, facts = about_scene(rng, task, scenes[number - 1], where=f" in image {number}")
    return ChoiceQuestion(
        task=task,
        pictures=tuple(Picture(scene) for scene in scenes),
        text=text,
        choices=choices,
        right=right,
        image=number,
        facts=facts,
    )


def about_scene(rng: Random, task: str, scene: Scene, *, where: str = "") -> tuple[str, tuple[str, ...], int, dict[str, Any]]:
    """A question of PRACTICE about one scene: text, choices, position of the right one, and the facts of its conclusion.

    Raises UnluckyError where the scene does not allow it.
    """
    item = _told_apart(rng, task, scene)
    phrase = describe(item, scene)
    facts: dict[str, Any] = {"conclusion": task, "phrase": phrase}
    match task:
        case "colour" | "shape":
            bank = COLOURS if task == "colour" else SHAPES
            right = getattr(item, task)
            choices = [*rng.sample([word for word in bank if word != right], 3), right]
            facts |= {"colour": item.colour, "shape": item.shape}
        case "size":
            right, choices = item.size, list(SIZES)
            facts |= {"phrase": _pair(item.look), "size": item.size}
        case "count":
            start = rng.randint(max(0, len(scene.items) - 3), min(len(scene.items), len(NUMBER_WORDS) - 4))
            right, choices = NUMBER_WORDS[len(scene.items)], list(NUMBER_WORDS[start : start + 4])
            facts |= {"count": right}
        case _:
            right = _pair(item.look)
            there = {_pair(other.look) for other in scene.items}
            pairs = [f"{c} {s}" for c in COLOURS for s in SHAPES if item.look.held_out or (c, s) not in HELD_OUT_PAIRS]
            choices = [*rng.sample([pair for pair in pairs if pair not in there], 3), right]
    if task != "count":
        rng.shuffle(choices)
    words = {**facts, "colour": item.colour, "shape": item.shape, "where": where}
    return rng.choice(PRACTICE[task]).format(**words), tuple(choices), choices.index(right), facts


def _told_apart(rng: Random, task: str, scene: Scene) -> Item:
    """An object that the words of the question fit alone."""
    said = {"colour": ("shape",), "shape": ("colour",), "size": ("colour", "shape")}.get(task, ())

    def words(item: Item) -> tuple[str, ...]:
        return tuple(getattr(item, word) for word in said)

    alone = [item for item in scene.items if not said or sum(words(other) == words(item) for other in scene.items) == 1]
    if not alone:
        raise UnluckyError("no object of the scene can be named so")
    return rng.choice(alone)


_GENERATORS: dict[str, Callable[[Random, Draw], ChoiceQuestion]] = {
    "Counting": _counting,
    "Visual_Similarity": _visual_similarity,
    "Spatial_Relation": _spatial_relation,
    "Odd_One_Out": _odd_one_out,
    "image_retrieval": _image_retrieval,
    "image_counting": _image_counting,
    "common_object": _common_object,
    "most_objects": _most_objects,
}


def _pair(look: Look) -> str:
    return f"{look.colour} {look.shape}"


def _asked(task: str, scenes: Sequence[Scene], choices: Sequence[str], right: int, **words: object) -> ChoiceQuestion:
    return ChoiceQuestion(
        task=task,
        pictures=tuple(Picture(scene) for scene in scenes),
        text=PERCEPTION[task].format(**words),
        choices=tuple(choices),
        right=right,
    )


def _of_images(task: str, scenes: Sequence[Scene], right: int, *, first: int = 1, **words: object) -> ChoiceQuestion:
    """The choices are the images from number `first` on."""
    choices = [f"the {ordinal(number)} image" for number in range(first, len(scenes) + 1)]
    return _asked(task, scenes, choices, right, **words)


def _of_numbers(
    rng: Random, task: str, scenes: Sequence[Scene], right: int, names: Sequence[str], **words: object
) -> ChoiceQuestion:
    """The choices are four numbers in order, the right one anywhere among them."""
    start = rng.randint(max(0, right - 3), min(right, len(names) - 4))
    return _asked(task, scenes, names[start : start + 4], right - start, **words)
