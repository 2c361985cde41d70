"""MC-Bench (Xu et al., 2024): descriptions of any number of instances, none included, in pairs of images.

Both published files are read: `mc-bench_v0.2_val.json` (tables `descriptions`, `images`, `annotations`) and the
`MC-Bench_coco_format.json` of its evaluation script, whose images carry `pair_id` and `description` and which has no text
styles. Layouts as in the README and files of github.com/XuYunqiu/MC-Bench; images lie in `mc-bench_images/` beside the file.

`Example.meta` holds what average precision needs, in the words and units of the file:

- `version`: of the annotation (`"0.2"`), None where the file does not say
- `description_id`: the description's (or pair's) id
- `image_ids`: the id of each image, in prompt order; `sizes`: its [width, height] in pixels, as annotated
- `text_style`: "Referring", "Comparison", "Reasoning", or None; `positive_sample`: as annotated, or None
- `instances`: one `{id, image_id, category_id, bbox [x, y, width, height], area, iscrowd}` per annotation, crowds included;
  `category_id` is the group within the description ("the pairs of twins" has one group per pair), not a kind of object
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.pixels import Beyond, Size, require_choice, require_size, size_of, sized_box
from polyground.sources.questions import ask
from polyground.sources.reading import BadRow, Item, RowError, field_of, image_root, load_json, scan_rows

TEMPLATE = "Locate every instance in these images that fits this description, if there is any: {text}"
"""The question around a description; ours, as the publishers leave the wording to the evaluator."""

TASKS = ("referring", "comparison", "reasoning")
"""Text styles; a file without them has the one task `description`."""

_IMAGES = "mc-bench_images"


def scan_mc_bench(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    tasks: Sequence[str] | None = None,
    template: str = TEMPLATE,
    check_sizes: bool = False,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "mc_bench",
) -> Iterator[Item]:
    """One example per description: its images in order, every instance a target box; keys are `name/task/position in its task`.

    `tasks` keeps only those; `check_sizes` reads the header of every image and reports one whose size is not as annotated;
    `beyond="clip"` keeps of a box what lies in its image. Bad rows have the reasons malformed, inverted, out_of_range,
    unsafe_path, no_images, size_mismatch, duplicate, and orphan for an annotation of no description. Boxes are fractions of
    the annotated sizes.
    """
    require_choice(beyond, ("report", "clip"), "beyond")
    beside = path.parent / _IMAGES
    root = image_root(path, beside if images_root is None and beside.is_dir() else images_root, strip_prefix)
    tables = _tables(load_json(path), path)
    wanted = (tasks,) if isinstance(tasks, str) else tasks

    def read_row(row: Any, key: str) -> Sequence[Example]:
        if wanted is not None and row["task"] not in wanted:
            return []
        images = [_image(image_id, tables.images) for image_id in field_of(row["description"], "images_id", list)]
        paths = root.paths([field_of(image, "file_name", str) for image in images])
        sizes = [size_of(image) for image in images]
        if check_sizes:
            for image_path, size in zip(paths, sizes, strict=True):
                require_size(image_path, size)
        return [_read_row(row, key, paths=paths, sizes=sizes, template=template, beyond=beyond, version=tables.version)]

    yield from scan_rows(path, read_row, name=name, task_field="task", duplicates=duplicates, rows=tables.rows())
    yield from tables.orphans(name)


def _read_row(
    row: Mapping[str, Any],
    key: str,
    *,
    paths: tuple[Path, ...],
    sizes: Sequence[Size],
    template: str,
    beyond: Beyond,
    version: str | None,
) -> Example:
    description, image_ids = row["description"], row["description"]["images_id"]
    boxes = []
    for instance in row["instances"]:
        image = image_ids.index(instance["image_id"]) + 1
        box = sized_box(instance.get("bbox"), sizes[image - 1], what=f"box in image {image}", beyond=beyond)
        if not instance.get("iscrowd"):
            boxes.append(Located(image, box))
    return Example(
        key=key,
        task=row["task"],
        images=paths,
        question=ask(template, text=field_of(description, "text", str)),
        target=Answer(tuple(boxes)),
        meta={
            "source": "mc_bench",
            "version": version,
            "description_id": field_of(description, "id", int),
            "image_ids": list(image_ids),
            "sizes": [list(size) for size in sizes],
            "text_style": description.get("text_style"),
            "positive_sample": description.get("positive_sample"),
            "instances": [
                {field: instance.get(field) for field in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")}
                for instance in row["instances"]
            ],
        },
    )


class _Tables:
    """The tables of one file, joined by id."""

    def __init__(self, descriptions: list[Any], images: Iterable[Any], instances: Iterable[Any], version: str | None) -> None:
        self.version = version
        self.images = {image["id"]: image for image in images if isinstance(image, dict) and isinstance(image.get("id"), int)}
        self._descriptions = descriptions
        self._of_image: dict[Any, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        self._unread: dict[int, Any] = {}
        for number, instance in enumerate(instances, start=1):
            self._unread[number] = instance
            if isinstance(instance, dict) and isinstance(instance.get("image_id"), int):
                self._of_image[instance["image_id"]].append((number, instance))

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(1-based number, {task, description, instances}) of every description, in file order."""
        for number, description in enumerate(self._descriptions, start=1):
            known = description if isinstance(description, dict) else {}
            image_ids, identity, style = known.get("images_id"), known.get("id"), known.get("text_style")
            instances = []
            for image_id in image_ids if isinstance(image_ids, list) else ():
                for place, instance in self._of_image.get(image_id, ()) if isinstance(image_id, int) else ():
                    if instance.get("text_id", identity) == identity:
                        instances.append(instance)
                        self._unread.pop(place, None)
            task = style.lower() if isinstance(style, str) else "description"
            yield number, {"task": task, "description": description, "instances": instances}

    def orphans(self, name: str) -> Iterator[BadRow]:
        """The annotations that no description has claimed, once `rows` has come to its end."""
        for number, instance in self._unread.items():
            found = instance.get("id") if isinstance(instance, dict) else instance
            yield BadRow(number, f"{name}/annotation/{found}", "orphan", f"annotation {found} belongs to no description's image")


def _tables(content: Any, path: Path) -> _Tables:
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: holds no table of images; name mc-bench_v0.2_val.json or MC-Bench_coco_format.json")
    images, instances = content["images"], content.get("annotations")
    descriptions = content.get("descriptions")
    if not isinstance(instances, list) or not isinstance(descriptions, list | None):
        raise DataError(f"{path}: holds no list of annotations or descriptions; download it again")
    info = content.get("info")
    version = info.get("version") if isinstance(info, dict) else None
    if descriptions is None:
        descriptions = _pairs(images, path)
    return _Tables(descriptions, images, instances, version if isinstance(version, str) else None)


def _pairs(images: Iterable[Any], path: Path) -> list[dict[str, Any]]:
    """The descriptions of a COCO-format file: images that share a `pair_id`, by their `id_in_pair`."""
    pairs: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("pair_id"), int):
            raise DataError(f"{path}: has neither descriptions nor images with a pair_id; is it an MC-Bench annotation?")
        pairs[image["pair_id"]].append(image)
    found = []
    for pair_id, members in pairs.items():
        if all(isinstance(image.get("id_in_pair"), int) for image in members):
            members.sort(key=lambda image: image["id_in_pair"])
        found.append({"id": pair_id, "images_id": [i.get("id") for i in members], "text": members[0].get("description")})
    return found


def _image(image_id: Any, images: Mapping[Any, Any]) -> Any:
    if not isinstance(image_id, int) or image_id not in images:
        raise RowError("malformed", f"the description has image {image_id!r}, which the table of images does not hold")
    return images[image_id]
