"""BLINK (Fu et al., 2024): multiple-choice perception questions over one to four images, as rows of JSON or JSON lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows

_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
_IMAGE_FIELDS = ("image_1", "image_2", "image_3", "image_4")


def scan_blink(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    images_out: str | Path | None = None,
    sub_tasks: Sequence[str] | None = None,
    name: str = "blink",
) -> Iterator[Item]:
    """All rows of a file, in file order; keys are `name/sub-task/position in its sub-task`.

    `sub_tasks` keeps only those. Bad rows have the reasons malformed, no_images, unsafe_path, no_answer, bad_choice,
    duplicate.
    """
    root = image_root(path, images_root, strip_prefix, images_out)

    def read_row(row: Any, key: str) -> Sequence[Example]:
        wanted = sub_tasks is None or field_of(row, "sub_task", str) in sub_tasks
        return [_read_row(row, key, root)] if wanted else []

    return scan_rows(path, read_row, name=name, task_field="sub_task")


def _read_row(row: Any, key: str, root: ImageRoot) -> Example:
    task, choices = field_of(row, "sub_task", str), field_of(row, "choices", list)
    return Example(
        key=key,
        task=task,
        images=root.paths([row[field] for field in _IMAGE_FIELDS if row.get(field) is not None]),
        question=field_of(row, "question", str).strip(),
        target=Answer(choice=read_letter(field_of(row, "answer", str), len(choices))),
        choices=tuple(str(choice) for choice in choices),
        meta={"source": "blink", "idx": row.get("idx")},
    )


def read_letter(text: str, choices: int) -> str:
    """The letter of "(A)", "A" or "A."; RowError when it is hidden (a test split) or names no choice."""
    found = _LETTER.fullmatch(text.strip())
    if found is None:
        raise RowError("no_answer", f"the answer is no letter: {text!r}")
    if ord(found[1]) - ord("A") >= choices:
        raise RowError("bad_choice", f"the answer is {found[1]} of {choices} choices")
    return found[1]
