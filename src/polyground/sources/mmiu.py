"""MMIU (Meng et al., 2024): multiple-choice questions over 2 to 32 images, as rows of JSON or JSON lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.blink import read_letter
from polyground.sources.reading import OnBad, RowError, Source, examples_of, field_of, require_images, scan_choices

_OPTION = re.compile(r"^\s*([A-Z])\s*[:.)]\s*(.*?)\s*$")
_SELECT = re.compile(r"\s*select from the following choices\.?\s*", re.IGNORECASE)


def read_mmiu(
    path: str | Path,
    *,
    images_root: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    on_bad: OnBad = "raise",
    check_images: bool = True,
    name: str = "mmiu",
) -> list[Example]:
    """The examples of a file, in file order; keys are `name/task/position in its task`.

    `tasks` keeps only those; image paths are relative to `images_root` (the file's folder when not given).
    """
    source = scan_mmiu(path, images_root=images_root, name=name)
    wanted = [example for example in examples_of(source, Path(path), on_bad=on_bad) if tasks is None or example.task in tasks]
    if check_images:
        require_images(wanted, Path(path))
    return wanted


def scan_mmiu(path: str | Path, *, images_root: str | Path | None = None, name: str = "mmiu") -> Source:
    """All rows of a file, the bad ones with their reasons: malformed, no_answer, bad_choice, duplicate."""
    return scan_choices(path, images_root=images_root, name=name, task_field="task", read_row=_read_row)


def _read_row(row: Any, key: str, root: Path) -> Example:
    names = field_of(row, "input_image_path", list)
    if not names or not all(isinstance(n, str) for n in names):
        raise RowError("malformed", f"field 'input_image_path' must list file names; got {names!r}")
    choices = read_options(field_of(row, "options", str))
    return Example(
        key=key,
        task=field_of(row, "task", str),
        images=tuple(root / n for n in names),
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
