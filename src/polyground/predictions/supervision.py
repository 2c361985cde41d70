"""supervision: the truth through `DetectionDataset.from_coco`, each model's boxes as the arrays `Detections` is made of.

supervision reads no scores from COCO files and has no file format of its own for detections; hence the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyground.predictions import Asked, panes

README = """# Predictions for supervision

`SPLIT/truth.json` is the annotated truth, `SPLIT/MODEL.json` what a model answered, `images/SPLIT` the pictures: one per image
of a question, named `QUESTION-IMAGE`. Classes are tasks.

```python
import json
import numpy as np
import supervision as sv

truth = sv.DetectionDataset.from_coco("images/SPLIT", "SPLIT/truth.json")
arrays = json.load(open("SPLIT/MODEL.json"))

def detections(path):
    found = arrays[path.rsplit("/")[-1]]
    return sv.Detections(
        xyxy=np.array(found["xyxy"], dtype=np.float32).reshape(-1, 4),
        confidence=np.array(found["confidence"], dtype=np.float32),
        class_id=np.array(found["class_id"], dtype=int),
    )

path, image, annotated = truth[0]
picture = sv.BoxAnnotator().annotate(image.copy(), detections(path))
```
"""


def arrays(rows: Sequence[Asked], model: str) -> dict[str, dict[str, list[Any]]]:
    """By picture file: `xyxy` in pixels, `confidence`, `class_id` as `DetectionDataset.from_coco` counts the tasks (from 0)."""
    tasks = sorted({asked.example.task for asked in rows})
    found: dict[str, dict[str, list[Any]]] = {}
    for _, asked, picture in panes(rows):
        boxes = asked.on(picture, asked.answer(model))
        found[picture.file.rpartition("/")[2]] = {
            "xyxy": [
                [round(n, 3) for n in located.box.to_pixels(width=picture.width, height=picture.height)] for located in boxes
            ],
            "confidence": [located.confidence for located in boxes],
            "class_id": [tasks.index(asked.example.task)] * len(boxes),
        }
    return found
