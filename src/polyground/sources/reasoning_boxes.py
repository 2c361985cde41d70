"""Reasoning grounding, one box per question: LISA- and LLMSeg-Grounding on images, ReVOS- and ReasonVOS-Grounding on videos.

The four files are those UniVG-R1 was tested on (`zero_shot_evaluation/` of the hub data set GD-ML/UniVG-R1-data); their fields
are as its evaluation scripts read them (github.com/AMAP-ML/UniVG-R1, `eval/zero_shot`). The files themselves could not be
read for this: what their paths are relative to is set with `images_root` and `strip_prefix`.

Boxes are absolute pixels of the image file, upright, so the images must be there. As in those scripts, the first of several
boxes is the answer, and of a video the third frame is asked for. Numbers are read as written; the scripts cut off their
decimals (ReVOS) or take the digits on either side of the point for two numbers (ReasonVOS).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer, Located
from polyground.records import Example
from polyground.sources.pixels import Beyond, corner_box, measured, require_choice
from polyground.sources.questions import ask
from polyground.sources.reading import ImageRoot, Item, RowError, field_of, image_root, scan_rows, shortened

IMAGE_TEMPLATE = "Locate in the image what this asks for: {text}"
VIDEO_TEMPLATE = "These images are frames of one video, in order. Locate in the third image what this asks for: {text}"

FRAME = 3
"""The frame that is asked for, counted from 1."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PICTURES = (".jpg", ".png")


def scan_lisa(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    template: str = IMAGE_TEMPLATE,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "lisa",
) -> Iterator[Item]:
    """`lisa_val.json`, `lisa_test.json`: rows of `image_path`, `instruction`, `boxes` (corner boxes); keys are `name/position`.

    Bad rows have the reasons malformed, inverted, out_of_range, unsafe_path, those of an unusable image file (missing_image,
    unreadable_image, huge_image) and duplicate.
    """
    root = image_root(path, images_root, strip_prefix)
    fields = ("instruction", "boxes")
    yield from _scan_images(path, root, fields, template=template, beyond=beyond, duplicates=duplicates, name=name, source="lisa")


def scan_llmseg(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    template: str = IMAGE_TEMPLATE,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "llmseg",
) -> Iterator[Item]:
    """`LLMSeg_eval.json`: rows of `image_path` (below `LLMSeg/images/`), `question`, `bbox` (nested); else as `scan_lisa`."""
    root = image_root(path, images_root, strip_prefix)
    fields = ("question", "bbox")
    yield from _scan_images(
        path, root, fields, template=template, beyond=beyond, duplicates=duplicates, name=name, source="llmseg"
    )


def scan_revos(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    template: str = VIDEO_TEMPLATE,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "revos",
) -> Iterator[Item]:
    """`ReVOS_eval.json`: rows of `video_id`, `frames`, `question`, `bbox_list`; keys are `name/position`.

    `frames` are positions, from 0, among the .jpg and .png files of the folder `video_id`, in the order of the first number
    of their names. Bad rows have the reasons of `scan_lisa`, and bad_image for a row without a third frame.
    """
    root = image_root(path, images_root, strip_prefix)
    listed: dict[Path, list[str]] = {}

    def images(row: Any) -> tuple[Path, ...]:
        video = root.path(field_of(row, "video_id", str))
        if video not in listed:
            # One listing is remembered: rows about one video are likely to stand together.
            listed.clear()
            listed[video] = _frame_names(video)
        return tuple(video / _at(listed[video], frame, video) for frame in field_of(row, "frames", list))

    yield from _scan_videos(path, images, template=template, beyond=beyond, duplicates=duplicates, name=name, source="revos")


def scan_reasonvos(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    template: str = VIDEO_TEMPLATE,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "reasonvos",
) -> Iterator[Item]:
    """`ReasonVOS_eval.json`: rows of `image_list`, `question`, `bbox_list` (boxes written as text); else as `scan_revos`."""
    root = image_root(path, images_root, strip_prefix)

    def images(row: Any) -> tuple[Path, ...]:
        return root.paths(field_of(row, "image_list", list))

    yield from _scan_videos(path, images, template=template, beyond=beyond, duplicates=duplicates, name=name, source="reasonvos")


def _scan_images(
    path: Path,
    root: ImageRoot,
    fields: tuple[str, str],
    *,
    template: str,
    beyond: Beyond,
    duplicates: Literal["report", "keep"],
    name: str,
    source: str,
) -> Iterator[Item]:
    require_choice(beyond, ("report", "clip"), "beyond")
    text_field, box_field = fields

    def read_row(row: Any, key: str) -> Example:
        numbers = _flat(field_of(row, box_field, list))
        image = root.path(field_of(row, "image_path", str))
        question = ask(template, text=field_of(row, text_field, str))
        box = corner_box(numbers[:4], measured(image), what="first box", beyond=beyond)
        return Example(
            key=key,
            task=source,
            images=(image,),
            question=question,
            target=Answer((Located(1, box),)),
            meta={"source": source, "boxes": len(numbers) // 4},
        )

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def _scan_videos(
    path: Path,
    images_of: Callable[[Any], tuple[Path, ...]],
    *,
    template: str,
    beyond: Beyond,
    duplicates: Literal["report", "keep"],
    name: str,
    source: str,
) -> Iterator[Item]:
    require_choice(beyond, ("report", "clip"), "beyond")

    def read_row(row: Any, key: str) -> Example:
        boxes = field_of(row, "bbox_list", list)
        question = ask(template, text=field_of(row, "question", str))
        images = images_of(row)
        if not images:
            raise RowError("no_images", "the row has no frame")
        if min(len(images), len(boxes)) < FRAME:
            raise RowError("bad_image", f"frame {FRAME} is asked for; the row has {len(images)} frames and {len(boxes)} boxes")
        image = images[FRAME - 1]
        box = corner_box(_numbers(boxes[FRAME - 1]), measured(image), what=f"box of frame {FRAME}", beyond=beyond)
        return Example(
            key=key,
            task=source,
            images=images,
            question=question,
            target=Answer((Located(FRAME, box),)),
            meta={"source": source, "video": row.get("video_id")},
        )

    return scan_rows(path, read_row, name=name, duplicates=duplicates)


def _frame_names(video: Path) -> list[str]:
    try:
        names = [file.name for file in video.iterdir() if file.suffix in _PICTURES]
    except (OSError, ValueError) as error:
        raise RowError("missing_image", f"{str(video)!r} is no folder of frames ({error}); set images_root") from error
    numbered = [(int(found[0]), name) for name in names if (found := re.search(r"\d+", name))]
    return [name for _, name in sorted(numbered)]


def _at(names: list[str], frame: Any, video: Path) -> str:
    if isinstance(frame, bool) or not isinstance(frame, int):
        raise RowError("malformed", f"a frame must be a whole number; got {shortened(frame)}")
    if not 0 <= frame < len(names):
        raise RowError("missing_image", f"frame {frame} of {video}, which has {len(names)}; are all frames extracted?")
    return names[frame]


def _flat(boxes: list[Any]) -> list[Any]:
    """The numbers of `[[x0, y0, x1, y1], …]`, `[[x0, y0], [x1, y1]]` or `[x0, y0, x1, y1]`."""
    return [number for item in boxes for number in (item if isinstance(item, list) else [item])]


def _numbers(box: Any) -> list[Any]:
    """The numbers of a box, written as text or as a list of numbers or texts."""
    if isinstance(box, str):
        return [float(number) for number in _NUMBER.findall(box)]
    if not isinstance(box, list):
        raise RowError("malformed", f"a box must be a list or a text; got {shortened(box)}")
    return [float(n) if isinstance(n, str) and _NUMBER.fullmatch(n.strip()) else n for n in box]
