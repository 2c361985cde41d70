"""MIG-Bench (Li et al., 2025) and its revision, and everything written in that layout, such as the splits of the simulated world.

The original writes answers as fractions, the revision as whole per-mille numbers; scores on the two do not compare.
No field names the image to look in: it is read from the question, and where that is silent the box has no image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources.reading import BadRow, OnBad, RowError, Source, examples_of, field_of, load_rows, require_images

Version = Literal["original", "revised"]

_ORDINALS = {
    word: n for n, word in enumerate(("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"), start=1)
}
_IMAGE = re.compile(rf"\b(?:(\d+)(?:st|nd|rd|th)|({'|'.join(_ORDINALS)}))[ -]image\b|\bimage[ -]?(\d+)", re.IGNORECASE)
_QUESTION_BOX = re.compile(r"<\|box_start\|>\s*\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)\s*<\|box_end\|>")
_REFERENCE_MARKS = re.compile(r"<\|object_ref_(?:start|end)\|>")


def read_mig_bench(
    path: str | Path,
    *,
    images_root: str | Path | None = None,
    version: Version | None = None,
    on_bad: OnBad = "raise",
    check_images: bool = True,
    name: str = "mig_bench",
) -> list[Example]:
    """The examples of an annotation file, in file order; keys are `name/task/position in its task`.

    Image paths are relative to `images_root` (the annotation's folder when not given). Bad rows raise a DataError, or are left
    out with `on_bad="quarantine"`: `scan_mig_bench` tells which and why. `check_images=False` reads an annotation without images.
    """
    source = scan_mig_bench(path, images_root=images_root, version=version, name=name)
    examples = examples_of(source, Path(path), on_bad=on_bad)
    if check_images:
        require_images(examples, Path(path))
    return examples


def scan_mig_bench(
    path: str | Path, *, images_root: str | Path | None = None, version: Version | None = None, name: str = "mig_bench"
) -> Source:
    """All rows of an annotation, the bad ones with their reasons: malformed, inverted, out_of_range, bad_image, duplicate."""
    path = Path(path)
    rows = load_rows(path)
    version = version or version_of(rows, path)
    if version not in ("original", "revised"):
        raise DataError(f"{path}: version must be 'original' or 'revised'; got {version!r}")
    root = path.parent if images_root is None else Path(images_root)
    positions: Counter[str] = Counter()
    examples, bad, seen = [], [], set()
    for number, row in enumerate(rows, start=1):
        task = str(row.get("task")) if isinstance(row, dict) else "?"
        key = f"{name}/{task}/{positions[task]}"
        positions[task] += 1
        try:
            example = _read_row(row, key, root=root, version=version)
            identity = (task, example.images, example.question, example.question_boxes)
            if identity in seen:
                raise RowError("duplicate", "an earlier row asks the same question about the same images")
        except RowError as error:
            bad.append(BadRow(number, key, error.reason, str(error)))
        else:
            seen.add(identity)
            examples.append(example)
    return Source(tuple(examples), tuple(bad))


def version_of(rows: Sequence[Any], path: Path) -> Version:
    """Which version a file is, by the kind of number its answers are made of. Raises DataError when there are none."""
    answers = [row["answer"] for row in rows if isinstance(row, dict) and isinstance(row.get("answer"), list)]
    numbers = [n for answer in answers for n in answer if isinstance(n, int | float) and not isinstance(n, bool)]
    if not numbers:
        raise DataError(f"{path}: no row has an answer of four numbers; is this a MIG-Bench annotation?")
    return "original" if any(isinstance(n, float) for n in numbers) else "revised"


def named_image(text: str) -> int | None:
    """The last image a text names: "in the 2th image", "the second image", "image-2"; None when it names none.

    >>> named_image("Find where the object in image-1 is in the second image.")
    2
    """
    found = None
    for digits, word, number in _IMAGE.findall(text):
        found = _ORDINALS[word.lower()] if word else int(digits or number)
    return found


def _read_row(row: Any, key: str, *, root: Path, version: Version) -> Example:
    task = field_of(row, "task", str)
    names = field_of(row, "images", list)
    if not names or not all(isinstance(n, str) for n in names):
        raise RowError("malformed", f"field 'images' must list file names; got {names!r}")
    text = field_of(row, "question", str)
    box = _read_box(field_of(row, "answer", list), scale=1.0 if version == "original" else 1000.0, what="answer")
    image = _target_image(task, text, str(row.get("additional_info") or ""))
    if image is not None and not 1 <= image <= len(names):
        raise RowError("bad_image", f"the question is about image {image} of {len(names)}")
    # In every MIG-Bench question the marked object is in the first image.
    marked = tuple(
        Located(1, _read_box([int(n) for n in numbers], scale=1000.0, what="box in the question"))
        for numbers in _QUESTION_BOX.findall(text)
    )
    return Example(
        key=key,
        task=task,
        images=tuple(root / n for n in names),
        question=" ".join(_REFERENCE_MARKS.sub("", _QUESTION_BOX.sub("<box>", text)).split()),
        target=Answer((Located(image, box),)),
        question_boxes=marked,
        meta={"source": "mig_bench", "version": version},
    )


def _target_image(task: str, question: str, additional_info: str) -> int | None:
    match task:
        case "region":
            return 1
        case "group_grounding":
            return named_image(additional_info)
        case _:
            return named_image(question)


def _read_box(numbers: Sequence[Any], *, scale: float, what: str) -> Box:
    if len(numbers) != 4 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise RowError("malformed", f"the {what} must be four numbers; got {numbers!r}")
    x0, y0, x1, y1 = (n / scale for n in numbers)
    if not (min(x0, y0, x1, y1) >= 0 and max(x0, y0, x1, y1) <= 1):
        raise RowError("out_of_range", f"the {what} leaves the image: {list(numbers)}")
    if not (x0 < x1 and y0 < y1):
        raise RowError("inverted", f"the {what} has swapped corners or no area: {list(numbers)}")
    return Box(x0, y0, x1, y1)
