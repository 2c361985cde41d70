"""A FiftyOne dataset: one group per question, its images as slices, truth and every model as detections.

Written in the plain-JSON form of `fo.types.FiftyOneDataset` (the one without a version, which every release reads), so that
fiftyone need not be installed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from polyground.answer import Answer
from polyground.predictions import IMAGES, Asked, Picture, facts

README = """# Predictions for FiftyOne

```python
import fiftyone as fo

dataset = fo.Dataset.from_dir(dataset_dir=".", dataset_type=fo.types.FiftyOneDataset, name="predictions")
fo.launch_app(dataset)
```

A question is a group, its images are the slices `image_1`, `image_2`, …; `truth` and each model are fields with detections
(`_choice` behind the name for a letter), labelled with the task; `MODEL_right`, `MODEL_iou`, … stand on every slice. A split is
a tag.
"""


def metadata(name: str, models: Sequence[str]) -> dict[str, Any]:
    """The file `metadata.json`."""
    return {"name": name, "media_type": "group", "info": {"models": list(models)}}


def samples(split: str, rows: Iterable[Asked]) -> Iterator[dict[str, Any]]:
    """The entries of `samples.json` for one split."""
    for asked in rows:
        example = asked.example
        group = _identity(split, example.key)
        shared: dict[str, Any] = {
            "tags": [split],
            "key": example.key,
            "task": example.task,
            "question": example.question,
            "choices": list(example.choices),
        }
        for model in asked.replies:
            shared |= {f"{model}_{name}": value for name, value in facts(asked, model).items() if value is not None}
        for picture in asked.pictures:
            yield {
                "filepath": f"{IMAGES}/{picture.file}",
                "_media_type": "image",
                "metadata": {"_cls": "ImageMetadata", "width": picture.width, "height": picture.height},
                "group": {"_cls": "Group", "_id": {"$oid": group}, "name": f"image_{picture.number}"},
                **shared,
                **_labels(asked, picture, "truth", asked.truth, group),
                **{
                    field: label
                    for model in asked.replies
                    for field, label in _labels(asked, picture, model, asked.answer(model), group).items()
                },
            }


def _labels(asked: Asked, picture: Picture, who: str, answer: Answer | None, group: str) -> Mapping[str, Any]:
    """The detections or the letter that somebody says; a reply that cannot be read has neither."""
    if answer is None:
        return {}
    if answer.choice is not None:
        one = {"_cls": "Classification", "_id": _oid(group, who, picture.number, 0), "tags": [], "label": answer.choice}
        return {f"{who}_choice": one}
    detections = []
    for position, located in enumerate(asked.on(picture, answer)):
        box = located.box
        detection: dict[str, Any] = {
            "_cls": "Detection",
            "_id": _oid(group, who, picture.number, position),
            "attributes": {},
            "tags": [],
            "label": asked.example.task,
            "bounding_box": [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0],
        }
        detections.append(detection if who == "truth" else {**detection, "confidence": located.confidence})
    return {who: {"_cls": "Detections", "detections": detections}}


def _oid(*parts: object) -> dict[str, str]:
    return {"$oid": _identity(*parts)}


def _identity(*parts: object) -> str:
    """24 hexadecimal digits, as the data base behind FiftyOne names things; the same for the same parts."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
