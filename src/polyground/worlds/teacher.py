"""The scripted teacher: short reasoning from a scene's facts, and the mistakes a real teacher makes, at a chosen rate.

It stands in for a strong model so that synthesis runs anywhere; whatever it gets wrong is for synthesis to filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

from polyground.answer import Answer, Located, write_completion
from polyground.errors import DataError
from polyground.geometry import Box, Grid
from polyground.records import Example
from polyground.storage import read_rows
from polyground.worlds.language import CONCLUSIONS, LEAKS, PRACTICE_CONCLUSIONS, contents


class Mistake(StrEnum):
    """What a teacher does wrong."""

    WRONG_IMAGE = "wrong_image"
    """An object of another image."""
    WRONG_OBJECT = "wrong_object"
    """Another object of the right image."""
    MALFORMED = "malformed"
    """An answer that cannot be read."""
    COORDINATES = "coordinates"
    """The right answer, but its box is already in the reasoning."""
    GROUND_TRUTH = "ground_truth"
    """The right answer, but the reasoning says that it was given."""


def read_scene_rows(path: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a `scenes.jsonl` by key; `row_of` finds an example's."""
    return {row["key"]: row for row in read_rows(Path(path))}


def row_of(example: Example, rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The scene row of an example of the world: task and position end its key. Raises DataError when it is not there."""
    key = "/".join(example.key.split("/")[-2:])
    if key not in rows:
        raise DataError(f"example {example.key}: no scene row {key!r}; use the scenes.jsonl of the example's own split")
    return rows[key]


def reason(row: Mapping[str, Any], *, brief: bool = False) -> str:
    """The reasoning to the right answer: what the images hold (not if brief), what follows, and which image it is.

    No coordinates are in it.

    >>> items = [{"phrase": "red star"}, {"phrase": "blue ring"}]
    >>> row = {"images": [{"items": items[:1]}, {"items": items}], "target": {"image": 2, "item": 0}, "looked_at": [1, 2],
    ...        "facts": {"conclusion": "refer_grounding", "phrase": "red star"}}
    >>> reason(row)
    'Image 1: red star. Image 2: red star, blue ring. Image 1 shows the red star. It is in image 2.'
    >>> reason(row, brief=True)
    'Image 1 shows the red star. It is in image 2.'
    """
    if "choice" in row["target"]:
        facts = row["facts"]
        conclusion = PRACTICE_CONCLUSIONS[facts["conclusion"]].format(**facts)
        return conclusion if brief else " ".join([*_seen(row), conclusion])
    return _reasoning(row, image=row["target"]["image"], phrase=row["facts"]["phrase"], brief=brief)


def scripted_completion(
    row: Mapping[str, Any],
    example: Example,
    grids: Sequence[Grid],
    rng: Random,
    error_rate: float = 0.0,
    brief_rate: float = 0.0,
) -> str:
    """A whole completion in the contract; with chance `error_rate` one of the mistakes, each as often.

    With chance `brief_rate` what is right is not reasoned out: it goes straight to the conclusion.
    """
    if rng.random() >= error_rate:
        return write_completion(reason(row, brief=rng.random() < brief_rate), example.target, grids)
    return mistaken_completion(row, example, grids, rng, rng.choice(tuple(Mistake)))


def mistaken_completion(row: Mapping[str, Any], example: Example, grids: Sequence[Grid], rng: Random, mistake: Mistake) -> str:
    """A completion with one mistake. Where the right image has no other object, WRONG_OBJECT falls back to WRONG_IMAGE."""
    if example.target.choice is not None:
        return _mistaken_choice(row, example, grids, rng, mistake)
    match mistake:
        case Mistake.WRONG_OBJECT | Mistake.WRONG_IMAGE:
            image, item = _another_item(row, rng, same_image=mistake is Mistake.WRONG_OBJECT)
            answer = Answer((Located(image, Box(*item["box"])),))
            return write_completion(_reasoning(row, image=image, phrase=item["phrase"]), answer, grids)
        case Mistake.MALFORMED:
            return _malformed(row, example, grids, rng)
        case Mistake.COORDINATES | Mistake.GROUND_TRUTH:
            [located] = example.target.boxes
            box = list(grids[row["target"]["image"] - 1].write(located.box))
            leaks = [leak for leak in LEAKS if ("{box}" in leak) == (mistake is Mistake.COORDINATES)]
            return write_completion(f"{reason(row)} {rng.choice(leaks).format(box=box)}", example.target, grids)


def _mistaken_choice(row: Mapping[str, Any], example: Example, grids: Sequence[Grid], rng: Random, mistake: Mistake) -> str:
    """There is no box to leak or to miss: another letter, or one of the other mistakes."""
    right = example.target.choice or ""
    match mistake:
        case Mistake.MALFORMED:
            return _malformed(row, example, grids, rng)
        case Mistake.GROUND_TRUTH:
            leak = rng.choice([leak for leak in LEAKS if "{box}" not in leak])
            return write_completion(f"{reason(row)} {leak}", example.target, grids)
    letters = [letter for letter in "ABCDEF"[: len(row["choices"])] if letter != right]
    return write_completion(reason(row), Answer(choice=rng.choice(letters)), grids)


def _malformed(row: Mapping[str, Any], example: Example, grids: Sequence[Grid], rng: Random) -> str:
    whole = write_completion(reason(row), example.target, grids)
    cut = whole[: whole.index("</answer>") - 1]
    return rng.choice((cut, whole.replace("<answer>", ""), reason(row)))


def _reasoning(row: Mapping[str, Any], *, image: int, phrase: str, brief: bool = False) -> str:
    facts = {**row["facts"], "phrase": phrase, "n": image}
    conclusion = CONCLUSIONS[facts["conclusion"]].format(**facts)
    return conclusion if brief else " ".join([*_seen(row), conclusion])


def _seen(row: Mapping[str, Any]) -> list[str]:
    return [contents(n, [item["phrase"] for item in row["images"][n - 1]["items"]]) for n in row["looked_at"]]


def _another_item(row: Mapping[str, Any], rng: Random, *, same_image: bool) -> tuple[int, Mapping[str, Any]]:
    right = row["target"]["image"]
    elsewhere = [(n, item) for n, picture in enumerate(row["images"], start=1) if n != right for item in picture["items"]]
    beside = [(right, item) for i, item in enumerate(row["images"][right - 1]["items"]) if i != row["target"]["item"]]
    return rng.choice(beside if same_image and beside else elsewhere)
