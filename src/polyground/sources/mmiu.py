"""MMIU (Meng et al., 2024): multiple-choice questions over 2 to 32 images.

Rows are those of the hub data set FanqingM/MMIU-Benchmark (`all.parquet`, split test), or the same fields in JSON: `task`,
`visual_input_component`, `source`, `options` "A: …\\nB: …", `question`, `context` (what the question needs, then the options
again), `input_image_path` "./<relation>/<task>/<file>", `output` "A". Its images come in one zip per relation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer
from polyground.records import Example
from polyground.sources.blink import read_letter
from polyground.sources.questions import plain
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows

_OPTION = re.compile(r"^\s*([A-Z])\s*[:.)]\s*(.*?)\s*$")
_SELECT = re.compile(r"[ \t]*select from the following choices\.?[ \t]*", re.IGNORECASE)


def scan_mmiu(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    images_out: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "mmiu",
) -> Iterator[Item]:
    """All rows of a file, in file order; keys are `name/task/position in its task`.

    `tasks` keeps only those. Bad rows have the reasons malformed, no_images, unsafe_path, no_answer, bad_choice and duplicate.
    """
    root = image_root(path, images_root, strip_prefix, images_out)
    wanted = (tasks,) if isinstance(tasks, str) else tasks

    def read_row(row: Any, key: str) -> Sequence[Example]:
        kept = wanted is None or field_of(row, "task", str) in wanted
        return [_read_row(row, key, root)] if kept else []

    return scan_rows(path, read_row, name=name, task_field="task", duplicates=duplicates)


def _read_row(row: Any, key: str, root: ImageRoot) -> Example:
    choices = read_options(plain(field_of(row, "options", str)))
    return Example(
        key=key,
        task=field_of(row, "task", str),
        images=root.paths(field_of(row, "input_image_path", list)),
        question=plain(_question(field_of(row, "question", str), str(row.get("context") or ""), row["options"])),
        target=Answer(choice=read_letter(field_of(row, "output", str), len(choices))),
        choices=choices,
        meta={"source": "mmiu", "relation": _relation(row["input_image_path"][0])},
    )


def _relation(image: Any) -> str | None:
    """The folder that names how the images relate, such as "3D-spatial"; None where images are not named by path."""
    folders = [part for part in image.split("/")[:-1] if part != "."] if isinstance(image, str) else []
    return folders[0] if len(folders) >= 2 else None


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


def _question(question: str, context: str, options: str) -> str:
    """The question after what the context adds to it; the choices that the context repeats are listed by the prompt."""
    repeated = {line.strip() for line in options.splitlines()}
    kept = [line for line in context.splitlines() if line.strip() not in repeated]
    added = _SELECT.sub("", "\n".join(kept)).strip()
    question = question.strip()
    if not added or _words(added) in _words(question):
        return question
    return added if _words(question) in _words(added) else f"{added}\n{question}"


def _words(text: str) -> str:
    return " ".join(text.split())
