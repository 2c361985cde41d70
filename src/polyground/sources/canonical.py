"""This project's own rows: `Example.to_json` as JSON lines, as `convert` writes them, read back with nothing lost.

Boxes are fractions of their image. Image names are relative to the file's folder where they lie under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from polyground.answer import Answer, Located
from polyground.records import Example
from polyground.sources.conversations import BOX, IMAGE
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows, shortened, unit_box


def scan_canonical(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "polyground",
) -> Iterator[Item]:
    """All rows of a file, in file order, under the keys they were given; `name` and the position name a row that is bad.

    The rows that `synthesize` keeps are read too: the answer they teach is the target, their reasoning goes into `meta`.

    Bad rows have the reasons malformed, no_images, unsafe_path, out_of_range, inverted, bad_image, bad_choice,
    placeholder_mismatch, duplicate_key and duplicate.
    """
    root = image_root(path, images_root, strip_prefix)
    keys: set[int] = set()

    def read_row(row: Any, key: str) -> Example:
        example = example_from_row(row, root)
        if hash(example.key) in keys:
            raise RowError("duplicate_key", f"an earlier row has the key {example.key!r}")
        keys.add(hash(example.key))
        return example

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def example_from_row(row: Any, root: ImageRoot) -> Example:
    """The example of a row; RowError says what is wrong with it."""
    images = root.paths(field_of(row, "images", list))
    question = field_of(row, "question", str)
    choices = field_of({"choices": [], **row}, "choices", list)
    meta = field_of({"meta": {}, **row}, "meta", dict)
    if row.get("reasoning") is not None:
        meta = {**meta, "reasoning": field_of(row, "reasoning", str)}
    marked = field_of({"question_boxes": [], **row}, "question_boxes", list)
    question_boxes = tuple(_located(box, len(images), "box in the question") for box in marked)
    for mark, count, known in ((BOX, len(question_boxes), (len(question_boxes),)), (IMAGE, len(images), (0, len(images)))):
        if question.count(mark) not in known:
            raise RowError("placeholder_mismatch", f"the question has {question.count(mark)} {mark} for {count}")
    return Example(
        key=field_of(row, "key", str),
        task=field_of(row, "task", str),
        images=images,
        question=question,
        target=_target(field_of(row, "answer" if "answer" in row else "target", dict), len(images), len(choices)),
        question_boxes=question_boxes,
        choices=tuple(str(choice) for choice in choices),
        meta=meta,
    )


def _target(row: dict[str, Any], images: int, choices: int) -> Answer:
    if "choice" not in row:
        return Answer(tuple(_located(box, images, "box") for box in field_of(row, "boxes", list)))
    letter = row["choice"]
    # An example may leave the listing of its choices to its question.
    if not isinstance(letter, str) or len(letter) != 1 or letter not in ascii_uppercase[: choices or None]:
        raise RowError("bad_choice", f"the answer is {shortened(letter)} of {choices} choices")
    return Answer(choice=letter)


def _located(row: Any, images: int, what: str) -> Located:
    box = unit_box(field_of(row, "box", list), width=1, height=1, what=what)
    image, confidence = row.get("image"), row.get("confidence", 1.0)
    if image is not None and (isinstance(image, bool) or not isinstance(image, int) or not 1 <= image <= images):
        raise RowError("bad_image", f"a {what} is in image {shortened(image)} of {images}")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise RowError("malformed", f"a confidence lies in [0, 1]; got {shortened(confidence)}")
    return Located(image, box, confidence)
