"""LISA-, LLMSeg-, ReVOS- and ReasonVOS-Grounding: the box that counts, the frame that is asked for, sizes from the files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import TALL, lisa, llmseg, picture, reasonvos, revos, write_json

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import BadRow, read_source, scan_source
from polyground.sources.prose import named_image
from polyground.sources.reading import collect, reasons_of

WRITERS: dict[str, Callable[[Path], tuple[Path, dict[str, Any]]]] = {
    "lisa": lisa,
    "llmseg": llmseg,
    "revos": revos,
    "reasonvos": reasonvos,
}


def scanned(source: str, folder: Path, **changes: Any) -> tuple[list[Example], list[BadRow]]:
    """The fixture's row with some fields changed, read."""
    path, options = WRITERS[source](folder)
    [row] = json.loads(path.read_text())
    return collect(scan_source(source, write_json(path, [{**row, **changes}]), **options))


@pytest.mark.parametrize(("source", "image", "images"), [("lisa", 1, 1), ("llmseg", 1, 1), ("revos", 3, 3), ("reasonvos", 3, 3)])
def test_one_box_in_the_image_that_is_asked_for(tmp_path: Path, source: str, image: int, images: int) -> None:
    [example], _ = scanned(source, tmp_path)
    assert example.target == Answer((Located(image, Box(0.1, 0.1, 0.6, 0.6)),))
    assert (example.key, example.task, len(example.images)) == (f"{source}/0", source, images)


@pytest.mark.parametrize("source", ["revos", "reasonvos"])
def test_the_question_says_which_frame(tmp_path: Path, source: str) -> None:
    [example], _ = scanned(source, tmp_path)
    assert named_image(example.question) == example.target.boxes[0].image == 3


def test_frames_are_positions_among_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10.jpg", "9.jpg", "100.jpg", "11.png", "notes.txt", "cover.jpg"):
        picture(tmp_path / "v" / name) if not name.endswith("txt") else (tmp_path / "v" / name).write_text("1")
    row = {"video_id": "v", "frames": [0, 2, 3], "question": "Which?", "bbox_list": [[0, 0, 1, 1]] * 3}
    [example] = read_source("revos", write_json(tmp_path / "ReVOS_eval.json", [row]))
    assert [image.name for image in example.images] == ["9.jpg", "11.png", "100.jpg"]


def test_the_size_is_that_of_the_third_frame_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    path, options = revos(tmp_path)
    tags = Image.Exif()
    tags[274] = 6
    Image.new("RGB", TALL).save(tmp_path / "videos" / "cats" / "00100.jpg", exif=tags)
    [example] = read_source("revos", path, **options)
    assert example.target.boxes[0].box == Box(0.1, 0.1, 0.6, 0.6)


@pytest.mark.parametrize(
    ("source", "changes", "expected"),
    [
        pytest.param("lisa", {"boxes": [[20, 10, 120, 60]]}, Box(0.1, 0.1, 0.6, 0.6), id="one box"),
        pytest.param("lisa", {"boxes": [[20.5, 10, 120, 60]]}, Box(0.1025, 0.1, 0.6, 0.6), id="decimals"),
        pytest.param("lisa", {"boxes": [20, 10, 120, 60]}, Box(0.1, 0.1, 0.6, 0.6), id="not nested"),
        pytest.param("llmseg", {"bbox": [10, 20, 60, 120]}, Box(0.1, 0.1, 0.6, 0.6), id="llmseg not nested"),
        pytest.param("llmseg", {"bbox": [[10, 20], [60, 120]]}, Box(0.1, 0.1, 0.6, 0.6), id="two corners"),
        pytest.param("revos", {"bbox_list": [[], [], ["20", "10", "120", "60"]]}, Box(0.1, 0.1, 0.6, 0.6), id="numbers as text"),
        pytest.param("reasonvos", {"bbox_list": ["", "", "(10,20),(60,120)"]}, Box(0.1, 0.1, 0.6, 0.6), id="corners as text"),
        pytest.param("reasonvos", {"bbox_list": ["", "", "[10.5, 20, 60, 120]"]}, Box(0.105, 0.1, 0.6, 0.6), id="decimal text"),
        pytest.param("reasonvos", {"bbox_list": [[], [], [10, 20, 60, 120]]}, Box(0.1, 0.1, 0.6, 0.6), id="a list after all"),
    ],
)
def test_the_ways_a_box_is_written(tmp_path: Path, source: str, changes: dict[str, Any], expected: Box) -> None:
    [example], _ = scanned(source, tmp_path, **changes)
    assert example.target.boxes[0].box == expected


def test_the_first_of_several_boxes_is_the_answer(tmp_path: Path) -> None:
    [example], _ = scanned("lisa", tmp_path, boxes=[[20, 10, 120, 60], [0, 0, 10, 10]])
    assert len(example.target.boxes) == 1
    assert example.meta["boxes"] == 2


@pytest.mark.parametrize(
    ("source", "changes", "reason"),
    [
        pytest.param("lisa", {"boxes": []}, "malformed", id="no box"),
        pytest.param("lisa", {"boxes": [[120, 10, 20, 60]]}, "inverted", id="swapped corners"),
        pytest.param("lisa", {"boxes": [[20, 10, 220, 60]]}, "out_of_range", id="beyond the image"),
        pytest.param("lisa", {"image_path": "images/none.jpg"}, "missing_image", id="no such image"),
        pytest.param("lisa", {"image_path": "../1.jpg"}, "unsafe_path", id="out of the folder"),
        pytest.param("lisa", {"image_path": None}, "malformed", id="no image"),
        pytest.param("lisa", {"instruction": "  "}, "malformed", id="no instruction"),
        pytest.param("llmseg", {"bbox": None}, "malformed", id="llmseg without box"),
        pytest.param("revos", {"frames": [0, 1, 9]}, "missing_image", id="a frame that is not there"),
        pytest.param("revos", {"frames": [0, 1, -1]}, "missing_image", id="a frame before the first"),
        pytest.param("revos", {"frames": [0, 1, True]}, "malformed", id="a frame that is no number"),
        pytest.param("revos", {"frames": [0, 1]}, "bad_image", id="two frames"),
        pytest.param("revos", {"frames": []}, "no_images", id="no frame"),
        pytest.param("revos", {"bbox_list": [[0, 0, 1, 1]]}, "bad_image", id="one box"),
        pytest.param("revos", {"bbox_list": [[], [], None]}, "malformed", id="not seen in the third frame"),
        pytest.param("revos", {"bbox_list": [[], [], [0, 0, 0, 0]]}, "inverted", id="nothing in the third frame"),
        pytest.param("revos", {"video_id": "dogs"}, "missing_image", id="no such video"),
        pytest.param("revos", {"video_id": "../../tmp"}, "unsafe_path", id="a video out of the folder"),
        pytest.param("reasonvos", {"bbox_list": ["", "", "nothing"]}, "malformed", id="a text without numbers"),
        pytest.param("reasonvos", {"bbox_list": ["", "", "[1, 2, 3, 4, 5]"]}, "malformed", id="five numbers"),
        pytest.param("reasonvos", {"image_list": []}, "no_images", id="no images"),
        pytest.param("reasonvos", {"image_list": "a.jpg"}, "malformed", id="images that are one text"),
    ],
)
def test_bad_rows_are_counted_by_reason(tmp_path: Path, source: str, changes: dict[str, Any], reason: str) -> None:
    examples, bad = scanned(source, tmp_path, **changes)
    assert (examples, reasons_of(bad)) == ([], {reason: 1})


@pytest.mark.parametrize("source", WRITERS)
def test_a_row_twice_is_a_duplicate_and_junk_is_malformed(tmp_path: Path, source: str) -> None:
    path, options = WRITERS[source](tmp_path)
    [row] = json.loads(path.read_text())
    bad = collect(scan_source(source, write_json(path, [row, row, 17, {}]), **options))[1]
    assert reasons_of(bad) == {"duplicate": 1, "malformed": 2}
    assert len(collect(scan_source(source, write_json(path, [row, row]), duplicates="keep", **options))[0]) == 2
