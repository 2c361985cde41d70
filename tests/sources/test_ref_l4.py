"""Ref-L4: pixels from corner and size, what its scores need, one split of a folder of both."""

from pathlib import Path
from typing import Any

import pytest
from source_fixtures import ref_l4, ref_l4_row, write_json, write_parquet

from polyground.geometry import Box
from polyground.sources import read_source
from polyground.sources.reading import collect, reasons_of
from polyground.sources.ref_l4 import scan_ref_l4


def test_a_row_of_the_parquet_file(tmp_path: Path) -> None:
    path, options = ref_l4(tmp_path)
    example = read_source("ref_l4", path, **options)[0]
    assert example.target.boxes[0].box == Box(0.1, 0.1, 0.6, 0.6)
    assert (example.key, example.task) == ("ref_l4/0", "ref_l4")
    assert example.question == "Locate what this describes: The red ball on the left."
    assert example.meta["bbox"] == [20, 10, 100, 50]
    assert {key: example.meta[key] for key in ("id", "ori_category_id", "split", "size")} == {
        "id": "000001",
        "ori_category_id": "o365_1",
        "split": "val",
        "size": [200, 100],
    }


def test_a_folder_of_both_files_is_both_splits_or_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "ref-l4-val.parquet", [ref_l4_row()])
    write_parquet(tmp_path / "ref-l4-test.parquet", [ref_l4_row(split="test", caption="A cat."), ref_l4_row(split="test")])
    assert len(collect(scan_ref_l4(tmp_path, duplicates="keep"))[0]) == 3
    assert [e.question for e in collect(scan_ref_l4(tmp_path, split="val"))[0]] == [
        "Locate what this describes: The red ball on the left."
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [20, 10, 0, 50]}, "inverted"),
        ({"bbox": [20, 10, 190, 50]}, "out_of_range"),
        ({"bbox": [20, 10, 190]}, "malformed"),
        ({"caption": None}, "malformed"),
        ({"width": None}, "malformed"),
        ({"file_name": "../x.jpg"}, "unsafe_path"),
        ({"width": 400}, "size_mismatch"),
        ({"file_name": "o365/2.jpg"}, "missing_image"),
        ({}, "duplicate"),
    ],
)
def test_bad_rows_are_counted_by_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    _, options = ref_l4(tmp_path)
    path = write_json(tmp_path / "rows.json", [ref_l4_row(), ref_l4_row(**changes)])
    assert reasons_of(collect(scan_ref_l4(path, **options))[1]) == {reason: 1}
