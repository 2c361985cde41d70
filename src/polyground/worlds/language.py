"""Every phrase the simulated world can say: questions, choices, reasoning, pretraining prompts, and a corpus of them all.

The corpus is ungrounded (random words in real sentences), so that a base model trained on it knows the language of the world
and nothing about its tasks. No scene is drawn and no question is answered here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence

from polyground.worlds.scenes import COLOURS, SHAPES, SIZES, TEXTURES

TASKS = (
    "region",
    "common_object",
    "object_tracking",
    "diff",
    "view_diff",
    "multi_view",
    "correspondence",
    "refer_grounding",
    "group_grounding",
    "reasoning",
)
"""The ten tasks, by the names MIG-Bench's annotation uses."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

# Placeholders: {n} number and {nth} ordinal of the image to look in, {k} another image, {i} a region, {box} a box of image 1,
# {phrase} a noun phrase. The image to look in is always the last one named, as in MIG-Bench, which has no field for it.
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "region": (
        "Image 1 is the source and the others are regions of it. Locate region {i} in image 1.",
        "You are given a source image followed by its regions. Please locate region {i} in the first image.",
    ),
    "common_object": (
        "These images share one object. Locate it in image {n}.",
        "Find the object that all images have in common. Locate it in the {nth} image.",
    ),
    "object_tracking": (
        "These images show moving objects. Locate the object marked {box} in the first image in image {n}.",
        "Follow the object marked {box} in image 1. Where is it in the {nth} image?",
    ),
    "diff": (
        "Compare these two images. Locate their difference in image {n}.",
        "What has changed between the two images? Locate it in the {nth} image.",
    ),
    "view_diff": (
        "Compare these two views. Locate their real difference in image {n}.",
        "The view has moved. Find the real change in the {nth} image.",
    ),
    "multi_view": (
        "These are views of one scene. Locate the object marked {box} in the first image in image {n}.",
        "The object marked {box} in image 1 is seen from another side. Find it in the {nth} image.",
    ),
    "correspondence": (
        "Find the object of the same shape as the one marked {box} in image 1. It is in image {n}.",
        "Which object corresponds in shape to the one marked {box} in the first image? Locate it in the {nth} image.",
    ),
    "refer_grounding": (
        "Locate the object of image 1 in image {n}.",
        "Find where the object in the first image is in the {nth} image.",
    ),
    "group_grounding": (
        "Find the {phrase}.",
        "Which image has the {phrase}? Locate it.",
    ),
}
"""Question templates by task, as in training; those of `reasoning` are in RELATIONS."""

UNSEEN_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "region": ("From which part of the whole picture was crop {i} cut? Show it in image 1.",),
    "common_object": ("Something appears in every picture. Point to it in image {n}.",),
    "object_tracking": ("The thing at {box} in image 1 moves over time. Point to it in image {n}.",),
    "diff": ("Spot what is not the same and point to it in image {n}.",),
    "view_diff": ("Ignore the shift and the light. Spot what is not the same in image {n}.",),
    "multi_view": ("The camera has turned. Point to the thing at {box} in image 1 again in image {n}.",),
    "correspondence": ("Point to the partner with the form of the thing at {box} in image 1, now in image {n}.",),
    "refer_grounding": ("The first picture shows a thing alone. Point to it in image {n}.",),
    "group_grounding": ("Somewhere in these pictures there is a {phrase}. Point to it.",),
}
"""Phrasings kept out of training."""

RELATIONS: Mapping[str, tuple[str, ...]] = {
    "left": ("Find the object left of the {phrase} in image {n}.", "What is left of the {phrase}? Locate it in the {nth} image."),
    "right": (
        "Find the object right of the {phrase} in image {n}.",
        "What is right of the {phrase}? Locate it in the {nth} image.",
    ),
    "above": ("Find the object above the {phrase} in image {n}.", "What is above the {phrase}? Locate it in the {nth} image."),
    "below": ("Find the object below the {phrase} in image {n}.", "What is below the {phrase}? Locate it in the {nth} image."),
    "same_colour": (
        "Find the object of the same colour as the object in image {k}. It is in image {n}.",
        "What has the same colour as the object in image {k}? Locate it in the {nth} image.",
    ),
    "same_shape": (
        "Find the object of the same shape as the object in image {k}. It is in image {n}.",
        "What has the same shape as the object in image {k}? Locate it in the {nth} image.",
    ),
    "largest": ("Find the largest object in image {n}.", "Which object is the largest? Locate it in the {nth} image."),
}
"""Templates of the `reasoning` task by relation, as in training."""

UNSEEN_RELATIONS: Mapping[str, tuple[str, ...]] = {
    "smallest": ("Find the smallest object in image {n}.",),
    "leftmost": ("Find the object furthest to the left in image {n}.",),
    "rightmost": ("Find the object furthest to the right in image {n}.",),
    "other_colour": ("Only one object does not have the colour of the object in image {k}. Point to it in image {n}.",),
}
"""Relations kept out of training."""

PERCEPTION: Mapping[str, str] = {
    "Counting": "How many objects are there in the images together?",
    "Visual_Similarity": "Which image has the same object as the first image?",
    "Spatial_Relation": "Which side of the {other} is the {phrase} in image {n}?",
    "Odd_One_Out": "Which image does not have the {phrase}?",
    "image_retrieval": "Which image has the {phrase}?",
    "image_counting": "How many images have a {phrase}?",
    "common_object": "Which object do all images have in common?",
    "most_objects": "Which image has the most objects?",
}
"""Question templates of the multiple-choice sets, by sub-task; the first four in BLINK's layout, the others in MMIU's."""

PRACTICE: Mapping[str, tuple[str, ...]] = {
    "colour": ("What colour is the {shape}{where}?", "Which colour has the {shape}{where}?"),
    "shape": ("What shape is the {colour} object{where}?", "Which shape has the {colour} object{where}?"),
    "size": ("What size is the {phrase}{where}?", "Which size has the {phrase}{where}?"),
    "count": ("How many objects are there{where}?", "Count the objects{where}. How many?"),
    "contents": ("Which object is there{where}?", "Which of these can be seen{where}?"),
}
"""Multiple-choice questions for training, by kind; none of them asks what the perception sets ask. {where} names an image."""

PRACTICE_CONCLUSIONS: Mapping[str, str] = {
    "colour": "The {shape} is {colour}.",
    "shape": "The {colour} object is a {shape}.",
    "size": "The {phrase} is {size}.",
    "count": "There are {count} objects.",
    "contents": "The {phrase} is there.",
}
"""How the teacher ends its reasoning about them."""

SPATIAL_CHOICES = ("left", "right", "above", "below")
CHOOSE = "Select from the following choices."

PRETRAINING: Mapping[str, tuple[str, ...]] = {
    "list": ("List every object in image {n}.", "List every object.", "What is in image {n}?"),
    "find": (
        "Find the {phrase} in image {n}.",
        "Locate the {phrase} in the {nth} image.",
        "Find the {phrase}.",
        "Locate the {phrase}.",
    ),
    "which": ("Which image has the {phrase}?",),
    "count": ("How many objects are there in image {n}?",),
    "name": ("What is at {box} in image {n}?",),
}
"""Prompts for the base model's grounded pretraining, answered in its native form; none of them is one of the ten tasks."""

THINK_FIRST = "Think first, then answer."

CONTENTS = "Image {n}: {phrases}."
NOTHING = "nothing"

CONCLUSIONS: Mapping[str, str] = {
    "region": "Region {i} shows the {phrase}. It is in image {n}.",
    "common_object": "All images have the {phrase}. It is in image {n}.",
    "object_tracking": "The marked object is the {phrase}. It has moved in image {n}.",
    "diff": "The {phrase} has changed. It is in image {n}.",
    "view_diff": "The real change is the {phrase}. It is in image {n}.",
    "multi_view": "The marked object is the {phrase}. It is in image {n}.",
    "correspondence": "The marked object is a {shape}. The {phrase} has the same shape. It is in image {n}.",
    "refer_grounding": "Image 1 shows the {phrase}. It is in image {n}.",
    "group_grounding": "The {phrase} is in image {n}.",
    "left": "The {phrase} is left of the {other}. It is in image {n}.",
    "right": "The {phrase} is right of the {other}. It is in image {n}.",
    "above": "The {phrase} is above the {other}. It is in image {n}.",
    "below": "The {phrase} is below the {other}. It is in image {n}.",
    "same_colour": "The colour is {colour}. The {phrase} has the same colour. It is in image {n}.",
    "same_shape": "The shape is {shape}. The {phrase} has the same shape. It is in image {n}.",
    "largest": "The largest object is the {phrase}. It is in image {n}.",
    "smallest": "The smallest object is the {phrase}. It is in image {n}.",
    "leftmost": "The {phrase} is furthest to the left. It is in image {n}.",
    "rightmost": "The {phrase} is furthest to the right. It is in image {n}.",
    "other_colour": "The {phrase} does not have the same colour. It is in image {n}.",
}
"""How the teacher ends its reasoning, by task (by relation for `reasoning`)."""

LEAKS = (
    "The ground truth is given.",
    "As the hint says, the answer is known.",
    "The box is {box}.",
)
"""What a careless teacher says; synthesis has to filter it."""


def ordinal(number: int) -> str:
    """1 -> "first"; beyond the sixth as MIG-Bench writes them, "7th"."""
    return ORDINALS[number - 1] if number <= len(ORDINALS) else f"{number}th"


def contents(number: int, phrases: Sequence[str]) -> str:
    """What one image holds, in the teacher's words.

    >>> contents(2, ["red star", "blue ring"])
    'Image 2: red star, blue ring.'
    """
    return CONTENTS.format(n=number, phrases=", ".join(phrases) or NOTHING)


def corpus(rng: random.Random) -> Iterator[str]:
    """Endless random text in every form the world uses, nothing of it grounded; every word of the world comes up soon."""
    makers = (_random_question, _random_thought, _random_completion, _random_native, _random_choices, _random_dialogue)
    while True:
        yield rng.choice(makers)(rng)


def every_template() -> tuple[str, ...]:
    """All question templates, training, unseen, perception, practice and pretraining alike."""
    banks: list[Sequence[str]] = [
        *PRACTICE.values(),
        *QUESTIONS.values(),
        *UNSEEN_QUESTIONS.values(),
        *RELATIONS.values(),
        *UNSEEN_RELATIONS.values(),
    ]
    return tuple(t for bank in [*banks, tuple(PERCEPTION.values()), *PRETRAINING.values()] for t in bank)


_TEMPLATES = every_template()


def _random_phrase(rng: random.Random) -> str:
    words = [rng.choice(COLOURS), rng.choice(SHAPES)]
    if rng.random() < 0.3:
        words.insert(0, rng.choice(TEXTURES))
    if rng.random() < 0.5:
        words.insert(0, rng.choice(SIZES))
    return " ".join(words)


def _random_numbers(rng: random.Random) -> list[int]:
    limit = rng.choice((112, 224, 1000))
    (x0, x1), (y0, y1) = (sorted(rng.sample(range(limit), 2)) for _ in range(2))
    return [x0, y0, x1, y1]


def _random_box(rng: random.Random) -> str:
    x0, y0, x1, y1 = numbers = _random_numbers(rng)
    return rng.choice((json.dumps(numbers), f"({x0},{y0}),({x1},{y1})"))


def _fill(template: str, rng: random.Random) -> str:
    number = rng.randint(1, 6)
    return template.format(
        n=number,
        nth=ordinal(number),
        k=rng.randint(1, 6),
        i=rng.randint(1, 5),
        box=_random_box(rng),
        phrase=_random_phrase(rng),
        other=_random_phrase(rng),
        shape=rng.choice(SHAPES),
        colour=rng.choice(COLOURS),
        size=rng.choice(SIZES),
        count=rng.choice(NUMBER_WORDS),
        where=rng.choice(("", f" in image {number}")),
    )


def _random_question(rng: random.Random) -> str:
    question = _fill(rng.choice(_TEMPLATES), rng)
    return f"{question} {THINK_FIRST}" if rng.random() < 0.1 else question


def _random_thought(rng: random.Random) -> str:
    lines = [contents(n, [_random_phrase(rng) for _ in range(rng.randint(0, 4))]) for n in range(1, rng.randint(2, 5))]
    if rng.random() < 0.05:
        lines.append(_fill(rng.choice(LEAKS), rng))
    bank = CONCLUSIONS if rng.random() < 0.8 else PRACTICE_CONCLUSIONS
    return " ".join([*lines, _fill(rng.choice(tuple(bank.values())), rng)])


def _random_answer(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice("ABCDEF")
    boxes = rng.choices((0, 1, 2, 3), weights=(1, 12, 2, 1))[0]
    return json.dumps([{"image": rng.randint(1, 6), "bbox_2d": _random_numbers(rng)} for _ in range(boxes)])


def _random_completion(rng: random.Random) -> str:
    return f"<think>{_random_thought(rng)}</think><answer>{_random_answer(rng)}</answer>"


def _random_native(rng: random.Random) -> str:
    rows = [{"bbox_2d": _random_numbers(rng), "label": _random_phrase(rng)} for _ in range(rng.randint(1, 4))]
    return json.dumps(rows)


def _random_choices(rng: random.Random) -> str:
    kind = rng.randrange(6)
    count = 4
    if kind == 0:
        options = [_random_phrase(rng) for _ in range(count)]
    elif kind == 1:
        options = list(rng.sample(SPATIAL_CHOICES, count))
    elif kind == 2:
        options = [str(rng.randint(0, 16)) for _ in range(count)]
    elif kind == 3:
        options = rng.sample(NUMBER_WORDS, count)
    elif kind == 4:
        options = rng.sample(rng.choice((COLOURS, SHAPES)), count)
    else:
        options = [rng.choice((f"Image {n}", f"the {ordinal(n)} image")) for n in rng.sample(range(1, 7), count)]
    lettered = rng.choice(("({}) {}", "{}: {}", "{}. {}"))
    lines = [lettered.format("ABCDEF"[i], option) for i, option in enumerate(options)]
    asked = rng.choice((*PERCEPTION.values(), *(template for bank in PRACTICE.values() for template in bank)))
    return "\n".join([_fill(asked, rng), rng.choice(("", CHOOSE)), *lines]).replace("\n\n", "\n")


def _random_dialogue(rng: random.Random) -> str:
    images = "\n".join(f"Image {n}: " for n in range(1, rng.randint(2, 7)))
    return f"{images}\n{_random_question(rng)}\n{rng.choice((_random_completion, _random_native))(rng)}"
