"""MMIU (Meng et al., 2024): multiple-choice questions over 2 to 32 images, as rows of JSON or JSON lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.blink import read_letter
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows

_OPTION = re.compile(r"^\s*([A-Z])\s*[:.)]\s*(.*?)\s*$")
_SELECT = re.compile(r"\s*select from the following choices\.?\s*", re.IGNORECASE)


def scan_mmiu(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    tasks: Sequence[str] | None = None,
    name: str = "mmiu",
) -> Iterator[Item]:
    """All rows of a file, in file order; keys are `name/task/position in its task`.

    `tasks` keeps only those. Bad rows have the reasons malformed, no_images, unsafe_path, no_answer, bad_choice and duplicate.
    """
    root = image_root(path, images_root, strip_prefix)

    def read_row(row: Any, key: str) -> Sequence[Example]:
        wanted = tasks is None or field_of(row, "task", str) in tasks
        return [_read_row(row, key, root)] if wanted else []

    return scan_rows(path, read_row, name=name, task_field="task")


def _read_row(row: Any, key: str, root: ImageRoot) -> Example:
    choices = read_options(field_of(row, "options", str))
    return Example(
        key=key,
        task=field_of(row, "task", str),
        images=root.paths(field_of(row, "input_image_path", list)),
        question=_question(field_of(row, "question", str), str(row.get("context") or "")),
        target=Answer(choice=read_letter(field_of(row, "output", str), len(choices))),
        choices=choices,
        meta={"source": "mmiu"},
    )


def read_options(text: str) -> tuple[str, ...]:
    r"""The options of "A: one\nB: two", in letter order; an unlettered line goes on with the option above it.

    >>> read_options("A: the first image\nB: the second image")
    ('the first image', 'the second image')
    """
    options: list[str] = []
    for line in text.splitlines():
        found = _OPTION.match(line)
        if found is not None and ord(found[1]) - ord("A") == len(options):
            options.append(found[2])
        elif options and line.strip():
            options[-1] = f"{options[-1]} {line.strip()}"
    if not options:
        raise RowError("malformed", f"no lettered options in {text!r}")
    return tuple(options)


def _question(question: str, context: str) -> str:
    """The question after what the context adds to it; the choices that the context repeats are listed by the prompt."""
    lines = [line for line in context.splitlines() if not _OPTION.match(line) and not _SELECT.fullmatch(line)]
    added = _SELECT.sub(" ", " ".join(line.strip() for line in lines)).strip()
    question = question.strip()
    if not added or added in question:
        return question
    return added if question in added else f"{added}\n{question}"
