"""MIG-Bench: both versions, and every trap of its annotation."""

import json
from pathlib import Path
from typing import Any

import pytest

from polyground.answer import Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import read_source
from polyground.sources.mig_bench import named_image, scan_mig_bench
from polyground.sources.reading import collect, reasons_of

IMAGES = ["./a.jpg", "./b.jpg", "./c.jpg"]


def row(task: str = "common_object", question: str = "Locate this object in the 2th image. ", **fields: Any) -> dict[str, Any]:
    known = {"images": IMAGES, "answer": [0.1, 0.2, 0.5, 0.75], "additional_info": "", "need_format": True}
    return {"task": task, "question": question, **known, **fields}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "MIG_data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("locate this object in the 2th image. ", 2),
        ("the 11th image", 11),
        ("Find it and locate it in the second image. ", 2),
        ("where does the object in image-1 locate in the image-2.", 2),
        ("which item of Image-2 does he need", 2),
        ("in image 3", 3),
        ("It is in the fourth image. <|box_start|>(530,282),(608,605)<|box_end|>. ", 4),
        ("give me the coordinates of their difference. ", None),
        ("These images share one object", None),
    ],
)
def test_named_image(text: str, expected: int | None) -> None:
    assert named_image(text) == expected


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        pytest.param({}, 2, id="in the question"),
        pytest.param(
            {"task": "region", "question": "Please locate the 2th region picture in the source image. "}, 1, id="region"
        ),
        pytest.param({"task": "diff", "question": "Give me the coordinates of their difference. "}, None, id="diff names none"),
        pytest.param({"task": "diff", "question": "their difference in the 1th image."}, 1, id="revised diff"),
        pytest.param(
            {
                "task": "group_grounding",
                "question": "Find the first image of a cat.",
                "additional_info": "It is in the third image. ",
            },
            3,
            id="group grounding: additional_info only",
        ),
    ],
)
def test_the_image_to_look_in(tmp_path: Path, fields: dict[str, Any], image: int | None) -> None:
    [example] = read_source("mig_bench", written(tmp_path, row(**fields)), check_images=False)
    assert example.target.boxes == (Located(image, Box(0.1, 0.2, 0.5, 0.75)),)


def test_additional_info_is_never_part_of_the_example(tmp_path: Path) -> None:
    secret = row("group_grounding", "Find the cat.", additional_info="It is in the third image. secret")
    [example] = read_source("mig_bench", written(tmp_path, secret), check_images=False)
    assert "secret" not in json.dumps(example.to_json())


@pytest.mark.parametrize(("answer", "version"), [([0.1, 0.2, 0.5, 0.75], "original"), ([100, 200, 500, 750], "revised")])
def test_the_version_is_told_by_the_kind_of_number(tmp_path: Path, answer: list[float], version: str) -> None:
    [example] = read_source("mig_bench", written(tmp_path, row(answer=answer)), check_images=False)
    assert example.target.boxes[0].box == Box(0.1, 0.2, 0.5, 0.75)
    assert example.meta["version"] == version


def test_a_version_given_is_not_guessed(tmp_path: Path) -> None:
    [example] = read_source("mig_bench", written(tmp_path, row(answer=[0, 0, 1, 1])), version="original", check_images=False)
    assert example.target.boxes[0].box == Box(0, 0, 1, 1)


def test_boxes_in_the_question_are_per_mille_of_the_first_image(tmp_path: Path) -> None:
    question = (
        "For the object in the first image(<|box_start|>(139,305),(495,743)<|box_end|>), please locate it in the 3th image. "
    )
    [example] = read_source("mig_bench", written(tmp_path, row("object_tracking", question)), check_images=False)
    assert example.question == "For the object in the first image(<box>), please locate it in the 3th image."
    assert example.question_boxes == (Located(1, Box(0.139, 0.305, 0.495, 0.743)),)


def test_reference_marks_are_left_out(tmp_path: Path) -> None:
    question = "Find: <|object_ref_start|>a white truck<|object_ref_end|>."
    [example] = read_source("mig_bench", written(tmp_path, row("group_grounding", question)), check_images=False)
    assert example.question == "Find: a white truck."


BAD = {
    "inverted": row(answer=[0.5, 0.2, 0.1, 0.75], question="a in the 2th image"),
    "out_of_range": row(answer=[0.1, 0.2, 0.5, 1.035], question="b in the 2th image"),
    "bad_image": row(question="in the 4th image"),
    "malformed": row(answer=[0.1, 0.2, 0.5], question="c in the 2th image"),
    "duplicate": row(),
}


def test_bad_rows_are_counted_and_named_and_keep_their_place_in_the_keys(tmp_path: Path) -> None:
    path = written(tmp_path, row(), *BAD.values(), row(question="d in the first image"))
    _, bad = collect(scan_mig_bench(path))
    assert reasons_of(bad) == dict.fromkeys(BAD, 1)
    assert [row.row for row in bad] == [2, 3, 4, 5, 6]
    examples = read_source("mig_bench", path, on_bad="quarantine", check_images=False)
    assert [example.key for example in examples] == ["mig_bench/common_object/0", "mig_bench/common_object/6"]


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_an_error_unless_asked_otherwise(tmp_path: Path, reason: str) -> None:
    path = written(tmp_path, row(), BAD[reason])
    with pytest.raises(DataError, match=rf"MIG_data.json: 1 bad rows \(1 {reason}\)(.|\n)*row 2 "):
        read_source("mig_bench", path, check_images=False)


@pytest.mark.parametrize(
    ("junk", "reason"),
    [
        (17, "malformed"),
        ({"task": "diff"}, "malformed"),
        ({**row(), "images": []}, "no_images"),
        ({**row(), "images": ["../../etc/passwd"]}, "unsafe_path"),
        ({**row(), "question": None}, "malformed"),
    ],
)
def test_junk_rows_are_named(tmp_path: Path, junk: Any, reason: str) -> None:
    assert reasons_of(collect(scan_mig_bench(written(tmp_path, row(), junk)))[1]) == {reason: 1}


def test_missing_images_are_named_ten_at_most(tmp_path: Path) -> None:
    path = written(tmp_path, row(images=[f"{n}.jpg" for n in range(12)]))
    with pytest.raises(DataError, match=r"1 bad rows \(1 missing_image\)") as caught:
        read_source("mig_bench", path)
    assert str(caught.value).count(".jpg") == 10


def test_images_lie_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for name in IMAGES:
        (tmp_path / "root" / name).touch()
    [example] = read_source("mig_bench", written(tmp_path, row()), images_root=tmp_path / "root")
    assert example.images[0] == tmp_path / "root" / "a.jpg"


def test_examples_survive_json(tmp_path: Path) -> None:
    for example in read_source("mig_bench", written(tmp_path, row()), check_images=False):
        assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


@pytest.mark.parametrize("text", ["[{", '{"task": }', "[" * 100_000, "[]"])
def test_a_file_that_is_no_annotation_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"broken\.json"):
        read_source("mig_bench", path)
