"""COCO detection: the truth as `annotations`, a model's boxes as `results`.

Every image *of a question* is an image entry of its own: what is right in a picture depends on what was asked. A task is a
category, so that pycocotools also tells precision by task. A box in a wrong image of its question is a false positive there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyground.predictions import Asked, panes, pixels


def grounding(rows: Sequence[Asked]) -> list[Asked]:
    """The questions that COCO can hold: those answered by boxes."""
    return [asked for asked in rows if not asked.in_letters]


def truth(rows: Sequence[Asked], *, name: str) -> dict[str, Any]:
    """The annotation file of one split."""
    categories = _categories(rows)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, asked, picture in panes(rows):
        images.append(
            {
                "id": number,
                "file_name": picture.file,
                "width": picture.width,
                "height": picture.height,
                "question_id": asked.example.key,
                "image_in_question": picture.number,
                "images_in_question": len(asked.pictures),
                "question": asked.example.question,
                "task": asked.example.task,
            }
        )
        for located in asked.on(picture, asked.truth):
            box = pixels(located.box, picture)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": categories[asked.example.task],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": f"{name}: one image entry per image of a question; categories are tasks", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": task, "supercategory": "task"} for task, number in categories.items()],
    }


def results(rows: Sequence[Asked], model: str) -> list[dict[str, Any]]:
    """One model's boxes in COCO's result format; a box ranks by the confidence its answer says, 1 where it says none."""
    categories = _categories(rows)
    return [
        {
            "image_id": number,
            "category_id": categories[asked.example.task],
            "bbox": pixels(located.box, picture),
            "score": located.confidence,
        }
        for number, asked, picture in panes(rows)
        for located in asked.on(picture, asked.answer(model))
    ]


def _categories(rows: Sequence[Asked]) -> dict[str, int]:
    tasks = sorted({asked.example.task for asked in rows})
    return {task: number for number, task in enumerate(tasks, start=1)}
