"""Label Studio: one labelling configuration per number of images, tasks with the truth as annotation and models as predictions.

Images of a question stand side by side, each with a rectangle tool of its own; a multiple choice has its letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any
from xml.sax.saxutils import quoteattr

from polyground.answer import Answer
from polyground.predictions import Asked, Picture

LABEL = "answer"
"""The one label: what the question asks for."""


def by_images(rows: Iterable[Asked]) -> dict[int, list[Asked]]:
    """Questions by their number of images: Label Studio wants every image of a configuration in every task."""
    found: dict[int, list[Asked]] = {}
    for asked in rows:
        found.setdefault(len(asked.pictures), []).append(asked)
    return dict(sorted(found.items()))


def configuration(rows: Sequence[Asked]) -> str:
    """The labelling interface of questions with one and the same number of images."""
    images = len(rows[0].pictures)
    letters = _letters(rows)
    parts = ['<View>\n  <Header value="$task"/>\n  <Text name="question" value="$question"/>']
    if letters:
        choices = "".join(f"<Choice value={quoteattr(letter)}/>" for letter in letters)
        parts.append(f'  <Choices name="choice" toName="question" choice="single" showInline="true">{choices}</Choices>')
    parts.append('  <View style="display: flex; flex-wrap: wrap; gap: 1em">')
    for number in range(1, images + 1):
        parts.append(
            f'    <View style="flex: 1 1 20em">\n      <Header value="Image {number}" size="5"/>\n'
            f'      <RectangleLabels name="box_{number}" toName="image_{number}"><Label value="{LABEL}"/></RectangleLabels>\n'
            f'      <Image name="image_{number}" value="$image_{number}" zoomControl="true"/>\n    </View>'
        )
    parts.append('  </View>\n  <Text name="replies" value="$replies"/>\n</View>\n')
    return "\n".join(parts)


def task(asked: Asked, number: int, *, prefix: str) -> dict[str, Any]:
    """One question; `prefix` goes before every image's file to make the address that Label Studio loads it from."""
    example = asked.example
    said = "\n\n".join(f"{model}: {reply.completion.text}" for model, reply in asked.replies.items())
    return {
        "id": number,
        "data": {
            "key": example.key,
            "task": example.task,
            "question": _question(asked),
            "replies": said,
            **{f"image_{picture.number}": f"{prefix}{picture.file}" for picture in asked.pictures},
        },
        "annotations": [{"ground_truth": True, "result": _result(asked, asked.truth, "truth")}],
        "predictions": [
            {
                "model_version": model,
                "score": asked.right.get(model, 0.0),
                "result": [] if (answer := asked.answer(model)) is None else _result(asked, answer, model),
            }
            for model in asked.replies
        ],
    }


def _question(asked: Asked) -> str:
    listed = zip(ascii_uppercase, asked.example.choices, strict=False)
    return "\n".join([asked.example.question, *(f"({letter}) {choice}" for letter, choice in listed)])


def _letters(rows: Sequence[Asked]) -> str:
    """As many letters as the longest list of choices takes, and all that are answered."""
    said = {answer.choice for asked in rows for answer in (asked.truth, *map(asked.answer, asked.replies)) if answer is not None}
    highest = max((ascii_uppercase.index(choice) + 1 for choice in said if choice is not None), default=0)
    return ascii_uppercase[: max([highest, *(min(26, len(asked.example.choices)) for asked in rows)])]


def _result(asked: Asked, answer: Answer, who: str) -> list[Mapping[str, Any]]:
    if answer.choice is not None:
        choice = {"choices": [answer.choice]}
        return [{"id": f"{who}-choice", "from_name": "choice", "to_name": "question", "type": "choices", "value": choice}]
    return [
        _rectangle(
            picture, located.box.to_pixels(width=100, height=100), f"{who}-{picture.number}-{position}", located.confidence
        )
        for picture in asked.pictures
        for position, located in enumerate(asked.on(picture, answer), start=1)
    ]


def _rectangle(picture: Picture, corners: tuple[float, float, float, float], name: str, score: float) -> dict[str, Any]:
    """Label Studio counts in percent of the picture."""
    x0, y0, x1, y1 = corners
    return {
        "id": name,
        "from_name": f"box_{picture.number}",
        "to_name": f"image_{picture.number}",
        "type": "rectanglelabels",
        "original_width": picture.width,
        "original_height": picture.height,
        "image_rotation": 0,
        "score": score,
        "value": {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "rotation": 0, "rectanglelabels": [LABEL]},
    }
