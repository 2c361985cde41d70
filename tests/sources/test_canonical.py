"""This project's own rows: nothing lost on the way there and back, and every contradiction named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Answer, Located
from polyground.exports import Style, names_under, write_row
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import read_source, scan_source
from polyground.sources.reading import collect, reasons_of

LEFT = Box(0.1, 0.2, 0.5, 0.75)


def row_of(example: Example, folder: Path) -> dict[str, Any]:
    """The example as `convert` writes it into a file of this folder."""
    return write_row("polyground", example, [], Style(name=names_under(folder)))


def grounding(folder: Path) -> Example:
    return Example(
        key="mine/1",
        task="diff",
        images=(folder / "images/a.png", folder / "images/b.png"),
        question="<image>Where is <box><image>?",
        target=Answer((Located(2, LEFT), Located(1, Box(0, 0, 1, 1), 0.25))),
        question_boxes=(Located(1, LEFT),),
        meta={"source": "mine", "reasoning": "It is left.", "size": [1, 2]},
    )


def choice(folder: Path) -> Example:
    return Example(
        key="mine/2",
        task="jigsaw",
        images=(folder / "images/a.png",),
        question="Which?",
        target=Answer(choice="B"),
        choices=("one", "two"),
    )


def nothing(folder: Path) -> Example:
    return replace(choice(folder), key="mine/3", question="Find it.", target=Answer(), choices=())


def unnamed(folder: Path) -> Example:
    return replace(grounding(folder), key="mine/4", target=Answer((Located(None, LEFT),)))


@pytest.mark.parametrize("make", [grounding, choice, nothing, unnamed])
def test_an_example_survives_its_row(tmp_path: Path, make: Any) -> None:
    write_images(tmp_path, "images/a.png", "images/b.png")
    example = make(tmp_path)
    row = row_of(example, tmp_path)
    assert row["images"][0] == "images/a.png"
    assert read_source("polyground", write_rows(tmp_path / "rows.jsonl", [row])) == [example]


def test_gold_answers_score_one(tmp_path: Path) -> None:
    write_images(tmp_path, "images/a.png", "images/b.png")
    rows = [row_of(make(tmp_path), tmp_path) for make in (grounding, choice, nothing)]
    assert_gold_scores_one(read_source("polyground", write_rows(tmp_path / "rows.jsonl", rows)))


def test_images_elsewhere_are_named_absolutely_and_read_back_under_a_root(tmp_path: Path) -> None:
    write_images(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / "out").mkdir()
    row = row_of(grounding(tmp_path), tmp_path / "out")
    assert row["images"] == [str(tmp_path / "images/a.png"), str(tmp_path / "images/b.png")]
    file = write_rows(tmp_path / "out" / "rows.jsonl", [row])
    assert reasons_of(collect(scan_source("polyground", file))[1]) == {"unsafe_path": 1}
    [example] = read_source("polyground", file, images_root=tmp_path)
    assert example == grounding(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"images": []}, "no_images", id="no-images"),
        pytest.param({"images": ["../../etc/passwd"]}, "unsafe_path", id="escape"),
        pytest.param({"images": "images/a.png"}, "malformed", id="images-as-text"),
        pytest.param({"key": None}, "malformed", id="no-key"),
        pytest.param({"target": None}, "malformed", id="no-target"),
        pytest.param({"target": {"boxes": [{"image": 3, "box": [0, 0, 1, 1]}]}}, "bad_image", id="no-third-image"),
        pytest.param({"target": {"boxes": [{"image": 1, "box": [0, 0, 1, 1.5]}]}}, "out_of_range", id="beyond"),
        pytest.param({"target": {"boxes": [{"image": 1, "box": [1, 0, 0, 1]}]}}, "inverted", id="inverted"),
        pytest.param({"target": {"boxes": [{"image": 1, "box": [0, 0, 1]}]}}, "malformed", id="three-numbers"),
        pytest.param({"target": {"boxes": [{"image": 1, "box": [0, 0, 1, 1], "confidence": 2}]}}, "malformed", id="confidence"),
        pytest.param({"target": {"boxes": [7]}}, "malformed", id="box-no-object"),
        pytest.param({"target": {"choice": "C"}, "choices": ["x", "y"]}, "bad_choice", id="no-such-choice"),
        pytest.param({"target": {"choice": "AB"}}, "bad_choice", id="two-letters"),
        pytest.param({"question": "<image>Where is <box>?"}, "placeholder_mismatch", id="an-image-too-few"),
        pytest.param({"question": "Where is it?"}, "placeholder_mismatch", id="a-box-too-many"),
        pytest.param({"meta": []}, "malformed", id="meta-no-object"),
        pytest.param({"key": "mine/1"}, "duplicate_key", id="a-key-twice"),
        pytest.param({"key": "mine/9"}, "duplicate", id="a-question-twice"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    row = row_of(grounding(tmp_path), tmp_path)
    file = write_rows(tmp_path / "rows.jsonl", [row, {**row, "key": "mine/5", **change}])
    assert reasons_of(collect(scan_source("polyground", file))[1]) == {reason: 1}


@pytest.mark.parametrize("junk", [7, None, "x", {}])
def test_junk_rows_are_counted(tmp_path: Path, junk: Any) -> None:
    assert reasons_of(collect(scan_source("polyground", write_rows(tmp_path / "x.jsonl", [junk])))[1]) == {"malformed": 1}
