"""MIG-Bench (Li et al., 2025) and its revision, and everything written in that layout, such as the splits of the simulated world.

The original writes answers as fractions, the revision as whole per-mille numbers; scores on the two do not compare.
No field names the image to look in: it is read from the question, and where that is silent the box has no image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.prose import named_image
from polyground.sources.questions import plain
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows, stream_rows, unit_box

Version = Literal["original", "revised"]

_QUESTION_BOX = re.compile(r"<\|box_start\|>\s*\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)\s*<\|box_end\|>")
_REFERENCE_MARKS = re.compile(r"<\|object_ref_(?:start|end)\|>")


def scan_mig_bench(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    version: Version | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "mig_bench",
) -> Iterator[Item]:
    """All rows of an annotation, in file order; keys are `name/task/position in its task`.

    Bad rows have the reasons malformed, inverted, out_of_range, bad_image, unsafe_path, no_images and duplicate. A simulated
    world is written as `original`; a file is told apart by the numbers of its answers unless `version` says.
    """
    rows = list(stream_rows(path))
    found = version or version_of([row for _, row in rows], path)
    if found not in ("original", "revised"):
        raise DataError(f"{path}: version must be 'original' or 'revised'; got {found!r}")
    root = image_root(path, images_root, strip_prefix)

    def read_row(row: Any, key: str) -> Example:
        return _read_row(row, key, root=root, version=found)

    return scan_rows(path, read_row, name=name, task_field="task", duplicates=duplicates, rows=rows)


def version_of(rows: Sequence[Any], path: Path) -> Version:
    """Which version a file is, by the kind of number its answers are made of. Raises DataError when there are none."""
    answers = [row["answer"] for row in rows if isinstance(row, dict) and isinstance(row.get("answer"), list)]
    numbers = [n for answer in answers for n in answer if isinstance(n, int | float) and not isinstance(n, bool)]
    if not numbers:
        raise DataError(f"{path}: no row has an answer of four numbers; is this a MIG-Bench annotation?")
    return "original" if any(isinstance(n, float) for n in numbers) else "revised"


def _read_row(row: Any, key: str, *, root: ImageRoot, version: Version) -> Example:
    task = field_of(row, "task", str)
    images = root.paths(field_of(row, "images", list))
    text = plain(field_of(row, "question", str))
    size = 1.0 if version == "original" else 1000.0
    box = unit_box(field_of(row, "answer", list), width=size, height=size, what="answer")
    image = _target_image(task, text, str(row.get("additional_info") or ""))
    if image is not None and not 1 <= image <= len(images):
        raise RowError("bad_image", f"the question is about image {image} of {len(images)}")
    # In every MIG-Bench question the marked object is in the first image.
    marked = tuple(
        Located(1, unit_box([int(n) for n in numbers], width=1000, height=1000, what="box in the question"))
        for numbers in _QUESTION_BOX.findall(text)
    )
    return Example(
        key=key,
        task=task,
        images=images,
        question=" ".join(_REFERENCE_MARKS.sub("", _QUESTION_BOX.sub("<box>", text)).split()),
        target=Answer((Located(image, box),)),
        question_boxes=marked,
        meta={"source": "mig_bench", "version": version},
    )


def _target_image(task: str, question: str, additional_info: str) -> int | None:
    match task:
        case "region":
            return 1
        case "group_grounding":
            return named_image(additional_info)
        case _:
            return named_image(question)
