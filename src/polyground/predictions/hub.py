"""A data set for the Hugging Face hub: a row per question with its images, the truth, and each model's reply in own columns.

Boxes are fractions of their image, in lists beside the numbers of the images, so that the hub's viewer shows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyground.answer import Answer
from polyground.errors import MissingLibraryError
from polyground.extras import install_command
from polyground.predictions import Asked

TEXT, NUMBER, WHOLE = ("string", "float64", "int64")

_ANSWER: dict[str, Any] = {"images": [WHOLE], "boxes": [[NUMBER]], "choice": TEXT}
_REPLY: dict[str, Any] = {
    "reply": TEXT,
    **_ANSWER,
    "confidence": [NUMBER],
    "unreadable": TEXT,
    "right": NUMBER,
    "iou": NUMBER,
    "image_correct": NUMBER,
}


def columns(models: Sequence[str]) -> dict[str, Any]:
    """Every column and its type: a name of a number or text, in brackets for a list of it; `image` for a picture."""
    asked = {"key": TEXT, "task": TEXT, "question": TEXT, "choices": [TEXT], "images": ["image"]}
    marked = {"question_images": [WHOLE], "question_boxes": [[NUMBER]]}
    truth = {f"truth_{name}": kind for name, kind in _ANSWER.items()}
    return {**asked, **marked, **truth, **{f"{model}_{name}": kind for model in models for name, kind in _REPLY.items()}}


def row(asked: Asked, models: Sequence[str], images: Sequence[bytes]) -> dict[str, Any]:
    """One question; `images` are the files of its pictures."""
    example = asked.example
    found: dict[str, Any] = {
        "key": example.key,
        "task": example.task,
        "question": example.question,
        "choices": list(example.choices),
        "images": [
            {"bytes": content, "path": picture.file.rpartition("/")[2]}
            for picture, content in zip(asked.pictures, images, strict=True)
        ],
        "question_images": [located.image for located in example.question_boxes],
        "question_boxes": [_box(located) for located in example.question_boxes],
        **{f"truth_{name}": value for name, value in _answer(asked.truth).items()},
    }
    for model in models:
        reply = asked.replies.get(model)
        if reply is None:
            found |= dict.fromkeys((f"{model}_{name}" for name in _REPLY), None)
            continue
        answer = reply.score.answer
        found |= {
            f"{model}_reply": reply.completion.text,
            **{f"{model}_{name}": value for name, value in _answer(answer).items()},
            f"{model}_confidence": [] if answer is None else [located.confidence for located in answer.boxes],
            f"{model}_unreadable": reply.score.unreadable,
            f"{model}_right": asked.right.get(model),
            f"{model}_iou": reply.score.iou,
            f"{model}_image_correct": reply.score.image_correct,
        }
    return found


def _answer(answer: Answer | None) -> dict[str, Any]:
    boxes = () if answer is None else answer.boxes
    return {
        "images": [located.image for located in boxes],
        "boxes": [_box(located) for located in boxes],
        "choice": None if answer is None else answer.choice,
    }


def _box(located: Any) -> list[float]:
    box = located.box
    return [box.x0, box.y0, box.x1, box.y1]


def schema(models: Sequence[str]) -> Any:
    """The parquet schema (a `pyarrow.Schema`), which also tells `datasets` what is an image. Raises DataError without pyarrow."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingLibraryError(f"writing parquet needs pyarrow; {install_command('train')}") from error
    plain = {TEXT: pa.string(), NUMBER: pa.float64(), WHOLE: pa.int64()}
    plain["image"] = pa.struct({"bytes": pa.binary(), "path": pa.string()})

    def arrow(kind: Any) -> Any:
        return pa.list_(arrow(kind[0])) if isinstance(kind, list) else plain[kind]

    kinds = columns(models)
    told = {"info": {"features": {name: _feature(kind) for name, kind in kinds.items()}}}
    return pa.schema({name: arrow(kind) for name, kind in kinds.items()}, metadata={"huggingface": json.dumps(told)})


def _feature(kind: Any) -> dict[str, Any]:
    """As `datasets` writes it; `Sequence` is what every version of it reads."""
    if isinstance(kind, list):
        return {"feature": _feature(kind[0]), "_type": "Sequence"}
    return {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}


def split_name(split: str) -> str:
    """A name that the hub accepts for a split.

    >>> split_name("ood_lisa-test.v2"), split_name("test")
    ('ood_lisa_test_v2', 'test')
    """
    return re.sub(r"\W+", "_", split)


RESULT_COLUMNS = ("split", "model", "task", "questions", "measure", "value", "low", "high")


def result_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`results.json` as flat rows: every measure of every model by split and task, `macro` and `micro` among the tasks."""
    rows = []
    for split, table in results["splits"].items():
        for model, summary in table["models"].items():
            for task, found in {**summary["tasks"], "macro": summary["macro"], "micro": summary["micro"]}.items():
                for measure, value in _measures(found).items():
                    here = {"split": split, "model": model, "task": task, "questions": found["examples"]}
                    rows.append({**here, "measure": measure, **value})
    return rows


def _measures(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    told = {f"accuracy at IoU {threshold}": value for threshold, value in found["accuracy"].items()}
    told["mean IoU"] = found["mean_iou"]
    told["image accuracy"] = found["image_accuracy"]
    told |= found.get("measures", {})
    rate = found["unreadable_rate"]
    known = {name: {key: value[key] for key in ("value", "low", "high")} for name, value in told.items() if value is not None}
    return {**known, "unreadable": {"value": rate, "low": rate, "high": rate}}
