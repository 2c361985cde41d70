"""VLM-R1 and Qwen's fine-tuning scripts: JSON lines of `image` (one name or several) and `conversations`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.records import Example
from polyground.sources.conversations import Reading
from polyground.sources.reading import Item, RowError, image_root, scan_rows
from polyground.sources.sharegpt import Layout, read_conversation


def scan_vlm_r1(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    grid: str | None = None,
    unnamed_image: int | None = None,
    marked_image: int | None = None,
    task: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "vlm_r1",
) -> Iterator[Item]:
    """All questions of a file, in file order; keys are `name/row`, or `name/row/turn` in rows of several turns.

    `images_root` is VLM-R1's image folder. An answer may be a list of numbers instead of text. VLM-R1's own referring data
    is written in pixels of the image file (`grid: pixels`), its InternVL version 0-1000 (`grid: per_mille`): say which. The
    other options and the reasons of bad rows are as for `scan_trl`.
    """
    root = image_root(path, images_root, strip_prefix)
    reading = Reading(file=path, source="vlm_r1", grid=grid, unnamed_image=unnamed_image, marked_image=marked_image, task=task)
    layout = Layout(columns={"messages": "conversations"})

    def read_row(row: Any, key: str) -> Sequence[Example | RowError]:
        return read_conversation(row, key, root, reading, layout)

    return scan_rows(path, read_row, name=name, duplicates=duplicates)
