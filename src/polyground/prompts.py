"""What a model is shown: the layout of images, boxes and choices in a prompt, and the requests made of a teacher.

The annotation's answer and `Example.meta` never enter a student prompt. Chat templates and tokens belong to models. Texts
are data, each with a version, in `prompt_texts/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template, ascii_uppercase
from types import MappingProxyType

import yaml

from polyground.answer import Answer, Located, write_answer
from polyground.errors import ConfigError, DataError
from polyground.geometry import Grid
from polyground.records import Example, Message

PROMPT_VERSION = "1"
"""Goes up when any prompt text or layout of a student changes: answers to different versions do not compare."""

TEACHER_VERSION = "2"
"""Goes up when any text or layout in `prompt_texts/teacher.yaml` or `prompt_texts/tasks.yaml` changes."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What follows a benchmark's question."""

    name: str
    version: str
    boxes: str
    """After a grounding question."""
    choice: str
    """After a multiple choice."""


def _texts(file: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = yaml.safe_load((resources.files("polyground") / "prompt_texts" / file).read_text("utf-8"))
    return found


TEACHER_TEMPLATES: dict[str, Template] = {name: Template(entry["text"]) for name, entry in _texts("teacher.yaml").items()}
"""`ask` hides the annotation, so its answer can be checked; `explain` shows it and is for questions the teacher fails; `judge`
asks for marks."""

TASK_ADVICE: dict[str, str] = {name: entry["text"] for name, entry in _texts("tasks.yaml").items()}
"""What a teacher is told to look for, by task; `grounding` and `choice` are for the tasks without a text of their own."""

INSTRUCTIONS: dict[str, Instruction] = {name: Instruction(name, **entry) for name, entry in _texts("instructions.yaml").items()}
"""By the name that `evaluate.instruction` gives."""


def student_messages(example: Example, grids: Sequence[Grid], *, instruction: str = "") -> list[Message]:
    """The conversation a student answers: one user turn; `grids` has one entry per image.

    Several images are announced as "Image 1: ", "Image 2: "… before the question, unless the question says with
    `<image>` where each belongs.
    """
    text = question_text(example, grids)
    return [Message("user", _parts(example, f"{text}\n{instruction}" if instruction else text))]


def teacher_messages(
    example: Example, grids: Sequence[Grid], *, template: str = "ask", advice: Mapping[str, str] = MappingProxyType({})
) -> list[Message]:
    """The conversation a teacher answers in the contract; `grids` are those the *teacher* reads and writes boxes on.

    `advice` says in place of the built-in texts, by task, what to look for; its `*` is for tasks that have none.
    """
    if template not in ("ask", "explain"):
        raise ConfigError(f"teacher template {template!r} is unknown; known: ask, explain")
    return _teacher_turn(
        example,
        grids,
        template,
        advice=advice_for(example, advice),
        coordinates=_coordinates(example, grids),
        form=_form(example, grids),
        answer=_target(example, grids) if template == "explain" else "",
    )


def judge_messages(example: Example, grids: Sequence[Grid], *, reasoning: str, answer: Answer) -> list[Message]:
    """The conversation in which a judge marks somebody's reasoning; every box of `answer` names its image."""
    # A mark of ours in the reasoning would be taken for the place of an image.
    said = reasoning.replace("<image>", "image")
    kind = "The answer is a letter." if answer.choice is not None else _corners(grids)
    return _teacher_turn(example, grids, "judge", reasoning=said, coordinates=kind, answer=write_answer(answer, grids))


def advice_for(example: Example, own: Mapping[str, str] = MappingProxyType({})) -> str:
    """What the teacher of this question is told to look for: the user's text for its task, else the built-in one."""
    for texts, name in ((own, example.task), (TASK_ADVICE, example.task.removesuffix("_reg")), (own, "*")):
        if name in texts:
            return texts[name]
    return TASK_ADVICE["choice" if _is_choice(example) else "grounding"]


def can_be_explained(example: Example) -> bool:
    """Whether the annotation can be told to a teacher: it names the image of every box."""
    return all(located.image is not None for located in example.target.boxes)


def _teacher_turn(example: Example, grids: Sequence[Grid], template: str, **parts: str) -> list[Message]:
    text = TEACHER_TEMPLATES[template].substitute(question=question_text(example, grids), **parts)
    return [Message("user", _parts(example, text))]


def question_text(example: Example, grids: Sequence[Grid]) -> str:
    """The question with its boxes written on the model's grid and its choices listed; `<image>` is left in place."""
    if len(grids) != len(example.images):
        raise DataError(f"example {example.key}: {len(example.images)} images but {len(grids)} grids; pass one grid per image")
    pieces = example.question.split("<box>")
    if len(pieces) - 1 != len(example.question_boxes):
        raise DataError(
            f"example {example.key}: the question has {len(pieces) - 1} <box> but question_boxes has "
            f"{len(example.question_boxes)}; give one box per <box>, in order"
        )
    written = [_box_text(example, located, grids) for located in example.question_boxes]
    text = pieces[0] + "".join(box + piece for box, piece in zip(written, pieces[1:], strict=True))
    return _with_choices(example, text)


def _box_text(example: Example, located: Located, grids: Sequence[Grid]) -> str:
    if located.image is None and len(set(grids)) == 1:
        return str(list(grids[0].write(located.box)))
    if located.image is None or not 1 <= located.image <= len(grids):
        raise DataError(
            f"example {example.key}: a question box is on image {located.image}, but the example has images 1 to {len(grids)}; "
            "correct question_boxes"
        )
    return str(list(grids[located.image - 1].write(located.box)))


def _with_choices(example: Example, text: str) -> str:
    if len(example.choices) > len(ascii_uppercase):
        raise DataError(f"example {example.key}: {len(example.choices)} choices, but there are only 26 letters")
    letters = ascii_uppercase[: len(example.choices)]
    if all(re.search(rf"\({letter}\)", text) for letter in letters):
        return text
    lines = []
    for letter, choice in zip(letters, example.choices, strict=True):
        lines.append(choice if choice.startswith(f"({letter})") else f"({letter}) {choice}")
    return "\n".join([text, *lines])


def _parts(example: Example, text: str) -> tuple[str | Path, ...]:
    pieces = text.split("<image>")
    if len(pieces) > 1 and len(pieces) - 1 != len(example.images):
        raise DataError(
            f"example {example.key}: the question has {len(pieces) - 1} <image> but there are {len(example.images)} images; "
            "give one <image> per image, or none to put all images first"
        )
    parts: list[str | Path] = []
    if len(pieces) > 1:
        parts.append(pieces[0])
        for image, piece in zip(example.images, pieces[1:], strict=True):
            parts += [image, piece]
    elif len(example.images) == 1:
        parts = [example.images[0], f"\n{text}"]
    elif example.images:
        for number, image in enumerate(example.images, start=1):
            parts += [f"Image {number}: " if number == 1 else f"\nImage {number}: ", image]
        parts.append(f"\n{text}")
    else:
        parts = [text]
    return tuple(part for part in parts if part != "")


def _is_choice(example: Example) -> bool:
    return bool(example.choices) or example.target.choice is not None


def _coordinates(example: Example, grids: Sequence[Grid]) -> str:
    """How the teacher is told to write a box; nothing for a multiple choice."""
    if _is_choice(example):
        return "The answer is the letter of the right choice."
    return (
        f"{_corners(grids)} Give the number of the image of every box, counted from 1; give an empty list [] when nothing fits."
    )


def _corners(grids: Sequence[Grid]) -> str:
    if len(set(grids)) == 1:
        ranges = f"x runs from 0 to {grids[0].width:g} and y from 0 to {grids[0].height:g}"
    else:
        ranges = "; ".join(
            f"on image {number}, x runs from 0 to {grid.width:g} and y from 0 to {grid.height:g}"
            for number, grid in enumerate(grids, start=1)
        )
    return f"A box is {_order(grids)}, origin top left; {ranges}."


def _order(grids: Sequence[Grid]) -> str:
    return "[x0, y0, x1, y1]" if all(grid.order == "xyxy" for grid in grids) else "[y0, x0, y1, x1]"


def _form(example: Example, grids: Sequence[Grid]) -> str:
    return "A" if _is_choice(example) else f'[{{"image": 1, "bbox_2d": {_order(grids)}}}]'


def _target(example: Example, grids: Sequence[Grid]) -> str:
    if not can_be_explained(example):
        raise DataError(f"example {example.key}: the annotation does not name the image of its box; use the template 'ask'")
    return write_answer(example.target, grids)
