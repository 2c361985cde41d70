"""BLINK (Fu et al., 2024): multiple-choice perception questions over one to four images, as rows of JSON or JSON lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.reading import OnBad, RowError, Source, examples_of, field_of, require_images, scan_choices

_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
_IMAGE_FIELDS = ("image_1", "image_2", "image_3", "image_4")


def read_blink(
    path: str | Path,
    *,
    images_root: str | Path | None = None,
    sub_tasks: Sequence[str] | None = None,
    on_bad: OnBad = "raise",
    check_images: bool = True,
    name: str = "blink",
) -> list[Example]:
    """The examples of a file, in file order; keys are `name/sub-task/position in its sub-task`.

    `sub_tasks` keeps only those; image paths are relative to `images_root` (the file's folder when not given).
    """
    source = scan_blink(path, images_root=images_root, name=name)
    wanted = [
        example for example in examples_of(source, Path(path), on_bad=on_bad) if sub_tasks is None or example.task in sub_tasks
    ]
    if check_images:
        require_images(wanted, Path(path))
    return wanted


def scan_blink(path: str | Path, *, images_root: str | Path | None = None, name: str = "blink") -> Source:
    """All rows of a file, the bad ones with their reasons: malformed, no_answer, bad_choice, duplicate."""
    return scan_choices(path, images_root=images_root, name=name, task_field="sub_task", read_row=_read_row)


def _read_row(row: Any, key: str, root: Path) -> Example:
    names = [_file_name(row, field) for field in _IMAGE_FIELDS if field_of(row, "sub_task", str) and row.get(field) is not None]
    if not names:
        raise RowError("malformed", "the row has no image_1")
    choices = field_of(row, "choices", list)
    return Example(
        key=key,
        task=field_of(row, "sub_task", str),
        images=tuple(root / n for n in names),
        question=field_of(row, "question", str).strip(),
        target=Answer(choice=read_letter(field_of(row, "answer", str), len(choices))),
        choices=tuple(str(choice) for choice in choices),
        meta={"source": "blink", "idx": row.get("idx")},
    )


def _file_name(row: Any, field: str) -> str:
    # The Hugging Face export writes an image as {"path": …, "bytes": …}.
    value = row[field]
    found = value.get("path") if isinstance(value, dict) else value
    if not isinstance(found, str) or not found:
        raise RowError("malformed", f"field {field!r} must be a file name; export the images to files first")
    return found


def read_letter(text: str, choices: int) -> str:
    """The letter of "(A)", "A" or "A."; RowError when it is hidden (a test split) or names no choice."""
    found = _LETTER.fullmatch(text.strip())
    if found is None:
        raise RowError("no_answer", f"the answer is no letter: {text!r}")
    if ord(found[1]) - ord("A") >= choices:
        raise RowError("bad_choice", f"the answer is {found[1]} of {choices} choices")
    return found[1]
