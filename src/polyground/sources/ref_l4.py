"""Ref-L4 (Chen et al., 2024): long referring expressions, one box in one image.

Rows are those of `ref-l4-val.parquet` and `ref-l4-test.parquet` of the hub data set JierunChen/Ref-L4 (columns `id`, `caption`,
`bbox` [x, y, width, height] in pixels, `bbox_area`, `bbox_id`, `ori_category_id`, `image_id`, `height`, `width`, `file_name`,
`is_rewrite`, `split`); the images are in its `images.tar.gz`, under the names that `file_name` gives.

`Example.meta` keeps what the published scores need: `id`, `ori_category_id`, `bbox` (its size class is the root of
width x height: below 128, to 256, above), `split` and `size` [width, height].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polyground.answer import Answer, Located
from polyground.records import Example
from polyground.sources.pixels import Beyond, require_choice, require_size, size_of, sized_box
from polyground.sources.questions import ask
from polyground.sources.reading import Item, field_of, image_root, scan_rows

TEMPLATE = "Locate what this describes: {caption}"

_KEPT = ("id", "bbox_id", "ori_category_id", "image_id", "is_rewrite", "split")


def scan_ref_l4(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    split: str | None = None,
    template: str = TEMPLATE,
    check_sizes: bool = False,
    beyond: Beyond = "report",
    duplicates: Literal["report", "keep"] = "report",
    name: str = "ref_l4",
) -> Iterator[Item]:
    """All rows of a file or of a folder of both; keys are `name/position`, the one task is `ref_l4`.

    `split` ("val", "test") keeps only its rows. Bad rows have the reasons malformed, inverted, out_of_range, unsafe_path,
    size_mismatch (with `check_sizes`) and duplicate.
    """
    require_choice(beyond, ("report", "clip"), "beyond")
    root = image_root(path, images_root, strip_prefix)

    def read_row(row: Any, key: str) -> Sequence[Example]:
        if split is not None and field_of(row, "split", str) != split:
            return []
        size = size_of(row)
        image = root.path(field_of(row, "file_name", str))
        if check_sizes:
            require_size(image, size)
        box = sized_box(row.get("bbox"), size, what="box", beyond=beyond)
        example = Example(
            key=key,
            task="ref_l4",
            images=(image,),
            question=ask(template, caption=field_of(row, "caption", str)),
            target=Answer((Located(1, box),)),
            meta={
                "source": "ref_l4",
                "size": list(size),
                "bbox": list(row["bbox"]),
                **{field: row.get(field) for field in _KEPT},
            },
        )
        return [example]

    yield from scan_rows(path, read_row, name=name, duplicates=duplicates)
