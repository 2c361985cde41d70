"""MGrounding-630k (Li et al., 2025), which trained Migician: conversations of several turns about several images.

Boxes are 0-1000 in box tokens, in answers and in questions; which image an answer's box is in stands in its prose ("It's in the
third image."). Rows are typed, and lie in one file or in one per task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.records import Example
from polyground.sources.conversations import Reading
from polyground.sources.reading import Item, RowError, image_root, scan_rows
from polyground.sources.sharegpt import Layout, read_conversation

_TASKS = {
    "common": "common_object",
    "diff": "diff",
    "difference": "diff",
    "free": "free_form",
    "freeform": "free_form",
    "gg": "group_grounding",
    "group": "group_grounding",
    "object": "object_tracking",
    "ot": "object_tracking",
    "refer": "refer_grounding",
    "referring": "refer_grounding",
    "region": "region",
}
"""The first word of a `type` or a file name, to the task as MIG-Bench calls it."""


def scan_migician(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    grid: str = "per_mille",
    unnamed_image: int | None = None,
    marked_image: int | None = 1,
    tasks: Sequence[str] | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "migician",
) -> Iterator[Item]:
    """All questions of a file, in file order; keys are `name/row`, or `name/row/turn` in rows of several turns.

    Images are named from the folder that holds `MGrounding-630k/`: set `images_root` to it for the files of single tasks,
    which lie deeper. `tasks` keeps only those (`task_of`). An answer that names no image is about the last image its question
    names, else about `unnamed_image`; a box in a question that names none is in `marked_image`, the first, as in MIG-Bench.
    Answers without a box (region descriptions, captions) are bad rows of reason no_box; the other reasons are those of
    `scan_trl`.
    """
    root = image_root(path, images_root, strip_prefix)
    reading = Reading(
        file=path,
        source="migician",
        grid=grid,
        unnamed_image=unnamed_image,
        marked_image=marked_image,
        last_named=True,
        task="grounding",
    )
    of_file = task_of(path.stem)
    layout = Layout(columns={"messages": "conversations"})

    def read_row(row: Any, key: str) -> Sequence[Example | RowError]:
        kind = row.get("type") if isinstance(row, dict) else None
        task = task_of(kind) or kind if isinstance(kind, str) and kind.strip() else of_file
        if tasks is not None and task not in tasks:
            return []
        return read_conversation(row, key, root, reading, layout, task=task)

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def task_of(name: str) -> str | None:
    """The task that a `type` or the stem of a file name means; None for others.

    >>> task_of("gg_train_120k"), task_of("_gg_reg_40k"), task_of("group_grounding"), task_of("MGrounding-630k")
    ('group_grounding', 'group_grounding_reg', 'group_grounding', None)
    """
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    task = _TASKS.get(words[0]) if words else None
    return f"{task}_reg" if task and "reg" in words else task
