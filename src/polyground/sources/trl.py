"""TRL's conversational rows: `prompt` (and `completion`) or `messages`, whose contents are text or parts, beside `images`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.records import Example
from polyground.sources.conversations import (
    Reading,
    answer_field,
    examples_of,
    identity_of,
    images_in,
    images_of,
    messages_of,
    turns_of,
)
from polyground.sources.reading import ImageRoot, Item, RowError, image_root, scan_rows, shortened

_ANSWERS = ("solution", "answer", "ground_truth")


def scan_trl(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    images_out: str | Path | None = None,
    grid: str | None = None,
    unnamed_image: int | None = None,
    marked_image: int | None = None,
    answer: str | None = None,
    task: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "trl",
) -> Iterator[Item]:
    """All questions of a file, in file order; keys are `name/row`, or `name/row/turn` in rows of several turns.

    A prompt without completion (as GRPO takes it) is answered by the field `answer`, else by `solution`, `answer` or
    `ground_truth`. `grid` is the one boxes are written on (`conventions.GRIDS`) and has no default. `unnamed_image` is the
    image of an answer's box that nothing names, `marked_image` that of a question's; left open, such a box has no image.
    `task` is that of rows without a field `task`. Images are named in `images`, `image` or the parts of the messages, or
    embedded. Bad rows have the reasons malformed, no_images, unsafe_path, embedded_image,
    placeholder_mismatch, no_answer, no_box, bad_choice, bad_image, unnamed_image, out_of_range, inverted, too_many and
    duplicate; and, where boxes are in pixels, those of `imagefile.ImageError`.
    """
    root = image_root(path, images_root, strip_prefix, images_out)
    reading = Reading(file=path, source="trl", grid=grid, unnamed_image=unnamed_image, marked_image=marked_image, task=task)

    def read_row(row: Any, key: str) -> Sequence[Example | RowError]:
        return _read_row(row, key, root, reading, answer)

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def _read_row(row: Any, key: str, root: ImageRoot, reading: Reading, answer: str | None) -> Sequence[Example | RowError]:
    if not isinstance(row, dict):
        raise RowError("malformed", f"a row must be an object; got {type(row).__name__}")
    if row.get("messages") is not None:
        messages = row["messages"]
    else:
        messages = [*_said(row.get("prompt"), "user"), *_said(row.get("completion"), "assistant")]
    turns = turns_of(messages_of(messages, "role", "content"), answer_field(row, answer, _ANSWERS))
    images = root.paths(images_of(row, "images", "image", among=images_in(messages)))
    task, meta = identity_of(row)
    return examples_of(turns, images, key, reading, task=task, meta=meta)


def _said(value: Any, role: str) -> list[Any]:
    """A prompt or completion as messages: it is a list of them, or (in the standard format) a string."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise RowError("malformed", f"a prompt or completion is neither text nor messages: {shortened(value)}")
