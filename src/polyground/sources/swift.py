"""ms-swift: `messages` and `images`, and boxes in `objects` whose places the text marks `<bbox>`, their names `<ref-object>`.

`bbox_type` says what the numbers are: `real` (absolute pixels of the image file, the default) or `norm1` (0-1). `image_id` counts
from 0. Rows without `objects` carry boxes in the text of one model family, on a grid that the user declares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Located
from polyground.records import Example
from polyground.sources.conversations import (
    Reading,
    answer_field,
    examples_of,
    identity_of,
    images_of,
    mark_given,
    messages_of,
    turns_of,
)
from polyground.sources.pixels import corner_box, measured
from polyground.sources.reading import ImageRoot, Item, RowError, image_root, scan_rows, shortened, unit_box

_BBOX, _REF = "<bbox>", "<ref-object>"


def scan_swift(
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
    name: str = "swift",
) -> Iterator[Item]:
    """All questions of a file, in file order; keys are `name/row`, or `name/row/turn` in rows of several turns.

    A `real` box without `image_id` is in the first image, as ms-swift scales it; a `norm1` box without one is in the image that
    the text names. `grid` is only needed for boxes outside `objects`. A last question without answer is answered by the field
    `answer`, else by `solution`. The other options and the reasons of bad rows are as for `scan_trl`, with placeholder_mismatch
    also for `<bbox>` and `<ref-object>`; points are no boxes (no_box).
    """
    root = image_root(path, images_root, strip_prefix, images_out)
    reading = Reading(file=path, source="swift", grid=grid, unnamed_image=unnamed_image, marked_image=marked_image, task=task)

    def read_row(row: Any, key: str) -> Sequence[Example | RowError]:
        return _read_row(row, key, root, reading, answer)

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def _read_row(row: Any, key: str, root: ImageRoot, reading: Reading, answer: str | None) -> Sequence[Example | RowError]:
    if not isinstance(row, dict):
        raise RowError("malformed", f"a row must be an object; got {type(row).__name__}")
    if any(row.get(field) for field in ("videos", "audios")):
        raise RowError("malformed", "the row has videos or audios; only images are read")
    messages = list(messages_of(row.get("messages"), "role", "content"))
    solution = answer_field(row, answer, ("solution",))
    if solution is not None and messages[-1][0] == "user":
        messages.append(("assistant", solution))
    images = root.paths(images_of(row, "images", "image"))
    given: list[Located] = []
    if row.get("objects"):
        objects = _objects(row["objects"])
        given = _boxes(objects, images)
        messages = _filled(messages, _list(objects, "ref"), len(given))
    own, meta = identity_of(row)
    return examples_of(turns_of(messages), images, key, reading, task=own, given=given, meta=meta)


def _objects(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("malformed", f"objects is text and no JSON: {shortened(value)}") from error
    if not isinstance(value, dict):
        raise RowError("malformed", f"objects must hold ref and bbox; got {shortened(value)}")
    return value


def _list(objects: Mapping[str, Any], name: str) -> list[Any]:
    value = objects.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise RowError("malformed", f"objects.{name} must be a list; got {shortened(value)}")
    return list(value)


def _boxes(objects: Mapping[str, Any], images: tuple[Path, ...]) -> list[Located]:
    boxes, ids = _list(objects, "bbox"), _list(objects, "image_id")
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise RowError("malformed", f"bbox_type must be real or norm1; got {shortened(kind)}")
    if len(ids) > len(boxes):
        raise RowError("malformed", f"{len(ids)} image_id for {len(boxes)} bbox")
    sizes: dict[Path, tuple[int, int]] = {}
    found = []
    for number, box in enumerate(boxes):
        if isinstance(box, list | tuple) and len(box) == 2:
            raise RowError("no_box", f"objects.bbox holds a point: {list(box)}")
        # ms-swift scales a real box without image_id by the first image, so that is where it is.
        position = ids[number] if number < len(ids) else 0 if kind == "real" else None
        if position is not None and (isinstance(position, bool) or not isinstance(position, int)):
            raise RowError("malformed", f"image_id must count images from 0; got {shortened(position)}")
        if position is not None and not 0 <= position < len(images):
            raise RowError("bad_image", f"image_id {position} for {len(images)} images; it counts from 0")
        image = None if position is None else position + 1
        if kind == "norm1" or position is None:
            found.append(Located(image, unit_box(box, width=1, height=1, what="norm1 box")))
            continue
        file = images[position]
        if file not in sizes:
            sizes[file] = measured(file)
        found.append(Located(image, corner_box(box, sizes[file], what="real box")))
    return found


def _filled(messages: Sequence[tuple[str, str]], names: Sequence[Any], boxes: int) -> list[tuple[str, str]]:
    """The messages with names in place of `<ref-object>` and a mark for each `<bbox>`, each kind counted over all of them."""
    for mark, count in ((_BBOX, boxes), (_REF, len(names))):
        written = sum(text.count(mark) for _, text in messages)
        # ms-swift leaves names unused that no <ref-object> asks for; a box nowhere in the text would be lost.
        if written > count or (mark == _BBOX and written < count):
            raise RowError("placeholder_mismatch", f"{written} {mark} in the text, {count} in objects")
    number, name = iter(range(boxes)), iter(names)
    filled = []
    for role, text in messages:
        first, *others = text.split(_REF)
        text = first + "".join(f"{next(name)}{piece}" for piece in others)
        first, *others = text.split(_BBOX)
        filled.append((role, first + "".join(mark_given(next(number)) + piece for piece in others)))
    return filled
