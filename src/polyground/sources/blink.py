"""BLINK (Fu et al., 2024): multiple-choice perception questions over one to four images, as rows of JSON or JSON lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.reading import BadRow, OnBad, RowError, Source, examples_of, field_of, load_rows, require_images

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
    path = Path(path)
    root = path.parent if images_root is None else Path(images_root)
    positions: Counter[str] = Counter()
    examples, bad, seen = [], [], set()
    for number, row in enumerate(load_rows(path), start=1):
        task = str(row.get("sub_task")) if isinstance(row, dict) else "?"
        key = f"{name}/{task}/{positions[task]}"
        positions[task] += 1
        try:
            example = _read_row(row, key, root)
            identity = (task, example.images, example.question, example.choices)
            if identity in seen:
                raise RowError("duplicate", "an earlier row asks the same question about the same images")
        except RowError as error:
            bad.append(BadRow(number, key, error.reason, str(error)))
        else:
            seen.add(identity)
            examples.append(example)
    return Source(tuple(examples), tuple(bad))


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
