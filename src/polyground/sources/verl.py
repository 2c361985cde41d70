"""EasyR1 and verl: a question in `problem` or `prompt`, its answer in `answer` or `reward_model.ground_truth`, `images` embedded.

Rows are parquet or JSON lines; embedded images are written out, once each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.records import Example
from polyground.sources.conversations import (
    Reading,
    answer_field,
    examples_of,
    identity_of,
    images_of,
    messages_of,
    text_of,
    turns_of,
)
from polyground.sources.reading import ImageRoot, Item, RowError, image_root, scan_rows

_QUESTIONS = ("problem", "prompt", "question")
_ANSWERS = ("answer", "reward_model.ground_truth", "solution", "ground_truth")


def scan_verl(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    images_out: str | Path | None = None,
    grid: str | None = None,
    unnamed_image: int | None = None,
    marked_image: int | None = None,
    question: str | None = None,
    answer: str | None = None,
    images: str | None = None,
    task: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "verl",
) -> Iterator[Item]:
    """All questions of a file or a folder of shards, in file order; keys are `name/row`.

    `question`, `answer` and `images` name the fields (EasyR1's prompt_key, answer_key and image_key; dots lead into objects)
    where they are not the usual ones: `problem`, `prompt` or `question`; `answer`, `reward_model.ground_truth`, `solution` or
    `ground_truth`; `images` or `image`. Embedded images go to `images_out`, by default `<file>_images` beside the file.
    The other options and the reasons of bad rows are as for `scan_trl`.
    """
    root = image_root(path, images_root, strip_prefix, images_out)
    reading = Reading(file=path, source="verl", grid=grid, unnamed_image=unnamed_image, marked_image=marked_image, task=task)
    columns = (images,) if images else ("images", "image")

    def read_row(row: Any, key: str) -> Sequence[Example | RowError]:
        return _read_row(row, key, root, reading, question=question, answer=answer, images=columns)

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def _read_row(
    row: Any, key: str, root: ImageRoot, reading: Reading, *, question: str | None, answer: str | None, images: Sequence[str]
) -> Sequence[Example | RowError]:
    if not isinstance(row, dict):
        raise RowError("malformed", f"a row must be an object; got {type(row).__name__}")
    columns = (question,) if question else _QUESTIONS
    asked = next((row[column] for column in columns if row.get(column) is not None), None)
    if asked is None:
        raise RowError("malformed", f"the row has no {' or '.join(columns)}")
    messages = [("user", text_of(asked))] if isinstance(asked, str) else list(messages_of(asked, "role", "content"))
    turns = turns_of(messages, answer_field(row, answer, _ANSWERS))
    task, meta = identity_of(row)
    return examples_of(turns, root.paths(images_of(row, *images)), key, reading, task=task, meta=meta)
