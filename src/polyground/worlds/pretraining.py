"""Grounded questions for the base model's pretraining, answered in its native form; none of the ten tasks is among them.

Scenes of one step are shared by its questions, so that each is drawn and seen once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from polyground.geometry import PER_MILLE, Box
from polyground.worlds import language
from polyground.worlds.perception import PRACTICE_TASKS, about_scene
from polyground.worlds.scenes import Item, Scene, describe, name, sample_scene
from polyground.worlds.tasks import UnluckyError

Named = tuple[tuple[str, int, Box], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about some of a step's scenes, or a text of its own."""

    images: tuple[int, ...]
    """Positions in the step's scenes, in the order shown; none for plain text."""
    prompt: str
    """The question; empty for plain text, which is learned whole."""
    completion: str
    named: Named = ()
    """Phrases of the question and then of the completion, in their order, each with the image (from 1) and the box it means."""
    boxed: int = 1
    """The image, from 1, that the completion's boxes are in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Shares of the kinds of sample; they need not add up to one."""

    listing: float = 0.45
    finding: float = 0.20
    several: float = 0.28
    naming: float = 0.0
    choosing: float = 0.0
    text: float = 0.07


_LIST_ONE = ("List every object.", "List every object in image 1.", "Outline the position of each object.")
_FIND_ONE = ("Find the {phrase}.", "Locate the {phrase}.", "Find the {phrase} in image 1.", "Where is the {phrase}?")
_NAME_ONE = ("What is in the image?", "Describe the image.")
_FIND_IN = ("Find the {phrase} in image {n}.", "Locate the {phrase} in the {nth} image.")
_LIST_IN = ("List every object in image {n}.", "List every object in the {nth} image.")
_CONTENTS_ALL = ("What is in the images?", "Describe the images.", "What is in each image?")
_WHICH = ("Which image has the {phrase}?", "Find which image shows the {phrase}.")


def native_list(items: Sequence[Item], labels: Sequence[str]) -> str:
    """Boxes and labels in the base's native form, per mille of the image.

    >>> from polyground.geometry import Box
    >>> native_list([Item("star", "red", "small", "plain", Box(0.1, 0.2, 0.3, 0.4))], ["small red star"])
    '[{"bbox_2d": [100, 200, 300, 400], "label": "small red star"}]'
    """
    rows = [{"bbox_2d": list(PER_MILLE.write(item.box)), "label": label} for item, label in zip(items, labels, strict=True)]
    return json.dumps(rows)


def find_question(rng: Random, scene: Scene) -> tuple[str, str, Item]:
    """A question for one object of one image, its native answer and the object."""
    item = rng.choice(scene.items)
    phrase = describe(item, scene)
    return rng.choice(_FIND_ONE).format(phrase=phrase), native_list([item], [phrase]), item


def _list_one(rng: Random, scene: Scene) -> tuple[str, str]:
    return rng.choice(_LIST_ONE), native_list(scene.items, [name(item) for item in scene.items])


def _choose_one(rng: Random, scene: Scene) -> tuple[str, str]:
    """A multiple choice about one image, answered by its letter."""
    while True:
        try:
            text, choices, right, _ = about_scene(rng, rng.choice(PRACTICE_TASKS), scene)
        except UnluckyError:
            continue
        lettered = [f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False)]
        return "\n".join([text, *lettered]), "ABCD"[right]


def _about_several(rng: Random, scenes: Sequence[Scene]) -> tuple[str, str, Named, int]:
    n = rng.randint(1, len(scenes))
    scene, nth = scenes[n - 1], language.ordinal(n)
    match rng.choices(("list", "contents", "which", "find", "name", "one"), (0.26, 0.26, 0.14, 0.2, 0.08, 0.06))[0]:
        case "list":
            listed = native_list(scene.items, [name(item) for item in scene.items])
            return rng.choice(_LIST_IN).format(n=n, nth=nth), listed, (), n
        case "contents":
            lines = [language.contents(k, [describe(item, s) for item in s.items]) for k, s in enumerate(scenes, start=1)]
            every = tuple(named for k, s in enumerate(scenes, start=1) for named in _named(s, k))
            return rng.choice(_CONTENTS_ALL), " ".join(lines), every, n
        case "find":
            item = rng.choice(scene.items)
            phrase = describe(item, scene)
            # The phrase ends before the image is told, so that it means no object yet.
            return rng.choice(_FIND_IN).format(phrase=phrase, n=n, nth=nth), native_list([item], [phrase]), (), n
        case "name":
            item = rng.choice(scene.items)
            box = json.dumps(list(PER_MILLE.write(item.box)))
            return f"What is at {box} in image {n}?", f"The {describe(item, scene)}.", ((describe(item, scene), n, item.box),), n
        case "which":
            item = rng.choice(scene.items)
            pair = f"{item.colour} {item.shape}"
            if sum((other.colour, other.shape) == (item.colour, item.shape) for s in scenes for other in s.items) == 1:
                return rng.choice(_WHICH).format(phrase=pair), f"The {pair} is in image {n}.", ((pair, n, item.box),), n
    return f"What is in image {n}?", language.contents(n, [describe(item, scene) for item in scene.items]), _named(scene, n), n


def _named(scene: Scene, n: int) -> Named:
    return tuple((describe(item, scene), n, item.box) for item in scene.items)


def sample_step(rng: Random, *, scenes: int, samples: int, mix: Mix) -> tuple[list[Scene], list[Sample]]:
    """The scenes of one training step and the questions about them; no held-out colour-shape pair is drawn."""
    drawn = [sample_scene(rng) for _ in range(scenes)]
    texts = language.corpus(rng)
    made = []
    shares = {kind: getattr(mix, kind) for kind in ("listing", "finding", "naming", "several", "choosing", "text")}
    kinds = rng.choices(tuple(shares), tuple(shares.values()), k=samples)
    # Listing goes round the scenes, so that none of them is drawn for nothing.
    turn = 0
    for kind in kinds:
        match kind:
            case "listing":
                made.append(Sample((turn % scenes,), *_list_one(rng, drawn[turn % scenes])))
                turn += 1
            case "finding":
                shown = rng.randrange(scenes)
                prompt, completion, item = find_question(rng, drawn[shown])
                made.append(Sample((shown,), prompt, completion, ((describe(item, drawn[shown]), 1, item.box),)))
            case "naming":
                shown = rng.randrange(scenes)
                named = _named(drawn[shown], 1)
                phrases = language.contents(1, [phrase for phrase, _, _ in named])
                made.append(Sample((shown,), rng.choice(_NAME_ONE), phrases, named))
            case "several":
                shown_all = tuple(rng.sample(range(scenes), min(scenes, rng.choices((2, 3, 4), (0.4, 0.4, 0.2))[0])))
                made.append(Sample(shown_all, *_about_several(rng, [drawn[k] for k in shown_all])))
            case "choosing":
                shown = rng.randrange(scenes)
                made.append(Sample((shown,), *_choose_one(rng, drawn[shown])))
            case "text":
                made.append(Sample((), "", next(texts)))
    return drawn, made
