"""Questions with the annotated truth and what each model answered, as other people's tools for looking at boxes read them.

One module per layout; each takes `Asked` rows whose images lie in the export's own folder. Reading a run and writing folders
belong to the export stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.records import Example, Rollout

LAYOUTS = {
    "coco": "COCO JSON: the truth, and each model's results for pycocotools' loadRes",
    "fiftyone": "a FiftyOne dataset: one group per question, one slice per image, truth and every model as fields",
    "label-studio": "Label Studio: labelling configurations and tasks with the truth as annotation, models as predictions",
    "supervision": "supervision: images, the truth as a COCO dataset, each model's detections as arrays",
    "hf-dataset": "a data set for the Hugging Face hub: parquet with images, truth, predictions; results; its card",
    "model-card": "a model folder for the Hugging Face hub: weights, card with results and model-index",
}
"""What a run can be exported as, by the name `polyground export RUN --to` takes."""

IMAGES = "images"
"""Folder of the pictures, in the exports that have one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image of one question, as it lies in the export."""

    number: int
    """1-based position in its question."""
    file: str
    """Under the export's image folder, with `/`. Every question has files of its own, even for a picture asked about twice."""
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question, and what every model answered."""

    example: Example
    pictures: Sequence[Picture]
    replies: Mapping[str, Rollout]
    """By model."""
    right: Mapping[str, float]
    """By model: 1 where the headline's rule counts the reply as right, 0 where it does not."""

    @property
    def truth(self) -> Answer:
        """What is annotated."""
        return self.example.target

    def answer(self, model: str) -> Answer | None:
        """What could be read of a model's reply; None where nothing could, or it was not asked."""
        reply = self.replies.get(model)
        return None if reply is None else reply.score.answer

    def on(self, picture: Picture, answer: Answer | None) -> list[Located]:
        """The boxes of an answer that lie in this picture. One without an image is in it when it is the only one."""
        boxes = () if answer is None else answer.boxes
        alone = len(self.pictures) == 1
        return [box for box in boxes if box.image == picture.number or (box.image is None and alone)]

    def unplaced(self, answer: Answer | None) -> int:
        """Boxes of which nothing says the image."""
        return 0 if answer is None or len(self.pictures) == 1 else sum(box.image is None for box in answer.boxes)

    @property
    def in_letters(self) -> bool:
        """Whether it is a multiple choice, which has no boxes."""
        return self.truth.choice is not None


def panes(rows: Sequence[Asked]) -> Iterator[tuple[int, Asked, Picture]]:
    """Every picture of every question with a number of its own, counted from 1."""
    number = 0
    for asked in rows:
        for picture in asked.pictures:
            number += 1
            yield number, asked, picture


def pixels(box: Box, picture: Picture) -> list[float]:
    """x, y, width, height in pixels of the picture."""
    x0, y0, x1, y1 = box.to_pixels(width=picture.width, height=picture.height)
    return [round(x0, 3), round(y0, 3), round(x1 - x0, 3), round(y1 - y0, 3)]


def facts(asked: Asked, model: str) -> dict[str, Any]:
    """What a tool may want to filter a reply by."""
    reply = asked.replies[model]
    return {
        "right": asked.right.get(model),
        "iou": reply.score.iou,
        "image_correct": reply.score.image_correct,
        "unreadable": reply.score.unreadable,
        "truncated": reply.completion.truncated,
        "reply": reply.completion.text,
    }
