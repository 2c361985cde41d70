"""OdinW (Li et al., 2022; ELEVATER) and other detection sets in COCO's layout: where is every instance of a category?

One file is one data set of OdinW: `annotations_without_background.json` beside its images, in folders such as
`Aquarium/Aquarium Combined.v2-raw-1024.coco/test/`. One example per image and category that is in it.

`Example.meta` holds, in the words and units of the file: `dataset`, `image_id`, `category_ids`, `category`, `size` [width,
height], `instances` (one `{id, image_id, category_id, bbox [x, y, width, height], area, iscrowd}` per box, crowds included) and
`crowds`, their number. Crowds are no target: a detector is neither asked for them nor blamed for them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import MAX_BOXES, Answer, Located
from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.pixels import Beyond, require_choice, require_size, size_of, sized_box
from polyground.sources.questions import ask
from polyground.sources.reading import BadRow, Item, RowError, field_of, image_root, load_json, scan_rows

TEMPLATE = "Locate every {category} in the image, if there is any."

_log = logging.getLogger(__name__)


def scan_odinw(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    dataset: str = "odinw",
    absent: int = 0,
    template: str = TEMPLATE,
    check_sizes: bool = False,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "odinw",
) -> Iterator[Item]:
    """One example per image and category in it, images in file order; keys are `name/dataset/position`, the task is `dataset`.

    `absent` adds up to so many categories per image that it does not show, with an empty answer (the same ones every time);
    average precision asks about all. Categories of the same name are one. Bad rows have the reasons malformed, inverted,
    out_of_range, too_many (more boxes than an answer may hold), unsafe_path, size_mismatch, duplicate, and orphan
    for a box of no known image or category.
    """
    require_choice(beyond, ("report", "clip"), "beyond")
    root = image_root(path, images_root, strip_prefix)
    tables = _Tables(load_json(path), path)

    def read_row(row: Any, key: str) -> Example:
        image, category, instances = row["image"], row["category"], row["instances"]
        size, image_id = size_of(image), field_of(image, "id", (int, str))
        image_path = root.path(field_of(image, "file_name", str))
        if check_sizes:
            require_size(image_path, size)
        plain = [instance for instance in instances if not instance.get("iscrowd")]
        if len(plain) > MAX_BOXES:
            raise RowError("too_many", f"{len(plain)} boxes of {category!r}; an answer holds {MAX_BOXES} at most")
        boxes = [sized_box(i.get("bbox"), size, what=f"box of {category!r}", beyond=beyond) for i in plain]
        return Example(
            key=key,
            task=dataset,
            images=(image_path,),
            question=ask(template, category=category),
            target=Answer(tuple(Located(1, box) for box in boxes)),
            meta={
                "source": "odinw",
                "dataset": dataset,
                "image_id": image_id,
                "category_ids": row["category_ids"],
                "category": category,
                "size": list(size),
                "instances": [
                    {field: i.get(field) for field in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")}
                    for i in instances
                ],
                "crowds": len(instances) - len(plain),
            },
        )

    rows = tables.rows(dataset, absent)
    yield from scan_rows(path, read_row, name=name, task_field="task", duplicates=duplicates, rows=rows)
    yield from tables.orphans(name)
    if tables.crowds:
        _log.info("%s: %d crowd boxes are no targets", path, tables.crowds)


class _Tables:
    """The tables of one COCO file, joined by id."""

    def __init__(self, content: Any, path: Path) -> None:
        self._images, instances, categories = (_table(content, name, path) for name in ("images", "annotations", "categories"))
        names = {row["id"]: row["name"].strip() for row in categories if _named(row)}
        known = {row["id"] for row in self._images if isinstance(row, dict) and isinstance(row.get("id"), int | str)}
        self.crowds = 0
        self._category_ids: dict[str, list[int]] = defaultdict(list)
        self._of_image: dict[Any, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        self._orphans: list[BadRow] = []
        for category_id, category in names.items():
            self._category_ids[category].append(category_id)
        used = set()
        for number, instance in enumerate(instances, start=1):
            reference = instance if isinstance(instance, dict) else {}
            image_id, category_id = reference.get("image_id"), reference.get("category_id")
            joins = isinstance(image_id, int | str) and isinstance(category_id, int)
            if not joins or image_id not in known or category_id not in names:
                detail = f"annotation {reference.get('id')} is of image {image_id!r} and category {category_id!r}"
                self._orphans.append(BadRow(number, str(reference.get("id")), "orphan", f"{detail}; the file lacks one of them"))
                continue
            self.crowds += bool(reference.get("iscrowd"))
            used.add(names[category_id])
            self._of_image[image_id][names[category_id]].append(reference)
        # Exports of Roboflow list a parent category that labels nothing: nobody is asked for it.
        self._used = [category for category in self._category_ids if category in used]

    def rows(self, dataset: str, absent: int) -> Iterator[tuple[int, Any]]:
        """(1-based number of the image, {task, image, category, category_ids, instances}) of every pair that is asked about."""
        for number, image in enumerate(self._images, start=1):
            image_id = image.get("id") if isinstance(image, dict) else None
            if not isinstance(image_id, int | str):
                yield number, {"task": dataset, "image": image, "category": "?", "category_ids": [], "instances": []}
                continue
            there = self._of_image.get(image_id, {})
            lacking = [category for category in self._used if category not in there]
            asked = {*there, *sorted(lacking, key=lambda category: _draw(image_id, category))[: max(absent, 0)]}
            for category in self._used:
                instances = there.get(category, [])
                # A category that only crowds show is neither there nor absent.
                if category in asked and not (instances and all(i.get("iscrowd") for i in instances)):
                    yield number, self._row(dataset, image, category, instances)

    def _row(self, dataset: str, image: Any, category: str, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = self._category_ids[category]
        return {"task": dataset, "image": image, "category": category, "category_ids": ids, "instances": instances}

    def orphans(self, name: str) -> Iterator[BadRow]:
        for bad in self._orphans:
            yield BadRow(bad.row, f"{name}/annotation/{bad.key}", bad.reason, bad.detail)


def _table(content: Any, name: str, path: Path) -> list[Any]:
    table = content.get(name) if isinstance(content, dict) else None
    if not isinstance(table, list):
        raise DataError(f"{path}: holds no list of {name}; name a COCO detection file")
    return table


def _named(category: Any) -> bool:
    return isinstance(category, dict) and isinstance(category.get("id"), int) and isinstance(category.get("name"), str)


def _draw(image_id: Any, category: str) -> bytes:
    return hashlib.sha256(f"{image_id}/{category}".encode("utf-8", "surrogatepass")).digest()
