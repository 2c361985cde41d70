"""BLINK (Fu et al., 2024): multiple-choice perception questions over one to four images.

Rows are those of the hub data set BLINK-Benchmark/BLINK (one configuration per sub-task, parquet with embedded images), or the
same fields in JSON: `idx`, `question`, `sub_task`, `image_1` … `image_4`, `choices`, `answer` "(A)", `prompt`. The answers of its
test split are hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.pixels import require_choice
from polyground.sources.questions import plain
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows

MULTI_IMAGE = (
    "Art_Style",
    "Forensic_Detection",
    "Functional_Correspondence",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Semantic_Correspondence",
    "Visual_Correspondence",
    "Visual_Similarity",
)
"""The sub-tasks that show several images; `sub_tasks: multi_image` keeps these."""

_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
_CHOICE_LINE = re.compile(r"\s*\([A-Z]\)")
_SELECT = re.compile(r"\s*select (?:from|between|one of) the following (?:choices|options)[.:]?\s*$", re.IGNORECASE)
_IMAGE_FIELDS = ("image_1", "image_2", "image_3", "image_4")


def scan_blink(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    images_out: str | Path | None = None,
    sub_tasks: Sequence[str] | None = None,
    wording: Literal["prompt", "question"] = "prompt",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "blink",
) -> Iterator[Item]:
    """All rows of a file, in file order; keys are `name/sub-task/position in its sub-task`.

    `sub_tasks` keeps only those; "multi_image" stands for `MULTI_IMAGE`. The question is the row's `prompt`, as its publishers
    ask it, without the choices at its end; `wording="question"` takes the short question, which leaves out what marks and
    images stand for. Bad rows have the reasons malformed, no_images, unsafe_path, embedded_image, no_answer, bad_choice and
    duplicate.
    """
    require_choice(wording, ("prompt", "question"), "wording")
    root = image_root(path, images_root, strip_prefix, images_out)
    wanted = None if sub_tasks is None else _wanted(sub_tasks)

    def read_row(row: Any, key: str) -> Sequence[Example]:
        kept = wanted is None or _plain(field_of(row, "sub_task", str)) in wanted
        return [_read_row(row, key, root, wording)] if kept else []

    return scan_rows(path, read_row, name=name, task_field="sub_task", duplicates=duplicates)


def _wanted(sub_tasks: Sequence[str]) -> set[str]:
    names = [sub_tasks] if isinstance(sub_tasks, str) else sub_tasks
    return {_plain(name) for wanted in names for name in (MULTI_IMAGE if wanted == "multi_image" else (wanted,))}


def _plain(sub_task: str) -> str:
    # Configurations are called Art_Style; rows may say Art Style.
    return re.sub(r"[ _-]+", "_", sub_task).lower()


def _read_row(row: Any, key: str, root: ImageRoot, wording: str) -> Example:
    task, choices = field_of(row, "sub_task", str), field_of(row, "choices", list)
    return Example(
        key=key,
        task=task,
        images=root.paths([row[field] for field in _IMAGE_FIELDS if row.get(field) is not None]),
        question=plain(_question(row, wording)),
        target=Answer(choice=read_letter(field_of(row, "answer", str), len(choices))),
        choices=tuple(plain(str(choice)) for choice in choices),
        meta={"source": "blink", "idx": row.get("idx")},
    )


def _question(row: Any, wording: str) -> str:
    question, prompt = field_of(row, "question", str).strip(), row.get("prompt")
    if wording == "question" or not isinstance(prompt, str):
        return question
    lines = prompt.strip().splitlines()
    while lines and _CHOICE_LINE.match(lines[-1]):
        lines.pop()
    return _SELECT.sub("", "\n".join(lines)).strip() or question


def read_letter(text: str, choices: int) -> str:
    """The letter of "(A)", "A" or "A."; RowError when it is hidden (a test split) or names no choice."""
    found = _LETTER.fullmatch(text.strip())
    if found is None:
        raise RowError("no_answer", f"the answer is no letter: {text!r}")
    if ord(found[1]) - ord("A") >= choices:
        raise RowError("bad_choice", f"the answer is {found[1]} of {choices} choices")
    return found[1]
