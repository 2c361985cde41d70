"""ms-swift: objects in the order of their placeholders, both kinds of numbers, images counted from zero."""

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import read_source, scan_source
from polyground.sources.reading import collect, reasons_of

LEFT = Box(0.1, 0.2, 0.5, 0.75)
REAL = [64, 96, 320, 360]
"""The left box in pixels of a.png, which is 640 x 480."""
NORM1 = [0.1, 0.2, 0.5, 0.75]


def row(asked: str, answered: str, images: Any = ("a.png",), **fields: Any) -> dict[str, Any]:
    said = [("system", "You are a helpful assistant."), ("user", asked), ("assistant", answered)]
    messages = [{"role": role, "content": text} for role, text in said]
    return {"messages": messages, "images": images if isinstance(images, str) else list(images), **fields}


def objects(*boxes: Any, ref: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"ref": list(ref), "bbox": list(boxes), **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, "a.png", size=(640, 480))
    write_images(tmp_path, "b.png", size=(200, 100))
    return tmp_path


def only(folder: Path, row: Any, **options: Any) -> Example:
    [example] = read_source("swift", write_rows(folder / "rows.jsonl", [row]), **options)
    return example


def test_the_published_example_of_two_objects(folder: Path) -> None:
    said = objects(REAL, [0, 0, 640, 480], ref=("a dog", "a woman"))
    example = only(
        folder, row("<image>Describe the image.", "<ref-object><bbox> and <ref-object><bbox> are playing", objects=said)
    )
    assert example.question == "<image>Describe the image."
    assert example.target == Answer((Located(1, LEFT), Located(1, Box(0, 0, 1, 1))))
    assert_gold_scores_one([example])


@pytest.mark.parametrize(
    ("said", "box"),
    [
        pytest.param(objects(REAL, bbox_type="real", image_id=[0]), Located(1, LEFT), id="real-in-the-first"),
        pytest.param(objects([20, 20, 100, 75], bbox_type="real", image_id=[1]), Located(2, LEFT), id="real-in-the-second"),
        pytest.param(objects(REAL), Located(1, LEFT), id="real-of-the-first-by-default"),
        pytest.param(objects(REAL, bbox_type=None, image_id=None), Located(1, LEFT), id="as-parquet-keeps-what-is-missing"),
        pytest.param(objects(NORM1, bbox_type="norm1", image_id=[1]), Located(2, LEFT), id="norm1-in-the-second"),
        pytest.param(objects(NORM1, bbox_type="norm1"), Located(None, LEFT), id="norm1-that-nothing-places"),
        pytest.param(json.dumps(objects(REAL)), Located(1, LEFT), id="objects-as-text"),
    ],
)
def test_what_the_numbers_of_a_box_mean(folder: Path, said: Any, box: Located) -> None:
    assert only(folder, row("<image><image>Find it.", "<bbox>", ("a.png", "b.png"), objects=said)).target.boxes == (box,)


def test_a_box_that_the_words_place(folder: Path) -> None:
    said = objects(NORM1, bbox_type="norm1")
    example = only(folder, row("<image><image>Find it.", "In the second image: <bbox>", ("a.png", "b.png"), objects=said))
    assert example.target.boxes == (Located(2, LEFT),)


def test_boxes_and_names_are_counted_over_the_whole_conversation(folder: Path) -> None:
    said = objects(REAL, [20, 20, 100, 75], ref=("the cup", "a hat"), image_id=[0, 1])
    example = only(
        folder, row("<image><image>What is <ref-object> <bbox> like?", "<ref-object> at <bbox>", ("a.png", "b.png"), objects=said)
    )
    assert (example.question, example.question_boxes) == ("<image><image>What is the cup <box> like?", (Located(1, LEFT),))
    assert example.target.boxes == (Located(2, LEFT),)


def test_a_box_inside_json_is_read(folder: Path) -> None:
    said = objects(REAL, image_id=[0])
    answer = '<think>There.</think><answer>[{"image": 1, "bbox_2d": <bbox>}]</answer>'
    example = only(folder, row("<image>Find it.", answer, objects=said))
    assert (example.target.boxes, example.meta["reasoning"]) == ((Located(1, LEFT),), "There.")


def test_a_solution_answers_a_prompt_without_answer(folder: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "<image>Find it."}], "images": "a.png", "objects": objects(REAL)}
    assert only(folder, {**asked, "solution": "<answer><bbox></answer>"}).target.boxes == (Located(1, LEFT),)
    assert only(folder, {**asked, "truth": "<bbox>"}, answer="truth").target.boxes == (Located(1, LEFT),)


def test_boxes_in_the_form_of_one_model_need_a_grid(folder: Path) -> None:
    plain = row("<image>Find the <|object_ref_start|>sheep<|object_ref_end|>", "<|box_start|>(100,200),(500,750)<|box_end|>")
    example = only(folder, plain, grid="per_mille")
    assert (example.question, example.target.boxes) == ("<image>Find the sheep", (Located(1, LEFT),))
    with pytest.raises(DataError, match=r"option grid .* to one of"):
        only(folder, plain)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(row("Find it.", "<bbox>", objects=objects()), "placeholder_mismatch", id="a-box-too-few"),
        pytest.param(row("Find it.", "<bbox>", objects=objects(REAL, REAL)), "placeholder_mismatch", id="a-box-too-many"),
        pytest.param(row("Find <ref-object>.", "<bbox>", objects=objects(REAL)), "placeholder_mismatch", id="a-name-too-few"),
        pytest.param(
            row("<image><image>Find it.", "<bbox>", objects=objects(REAL)), "placeholder_mismatch", id="an-image-too-few"
        ),
        pytest.param(row("Find it.", "<bbox>", objects=objects(REAL, image_id=[1])), "bad_image", id="image-counted-from-one"),
        pytest.param(row("Find it.", "<bbox>", objects=objects(REAL, image_id=["0"])), "malformed", id="image-as-text"),
        pytest.param(row("Find it.", "<bbox>", objects=objects([615, 226])), "no_box", id="a-point"),
        pytest.param(row("Find it.", "<bbox>", objects=objects([0, 0, 9])), "malformed", id="three-numbers"),
        pytest.param(row("Find it.", "<bbox>", objects=objects([320, 96, 64, 360])), "inverted", id="inverted"),
        pytest.param(row("Find it.", "<bbox>", objects=objects([64, 96, 700, 360])), "out_of_range", id="real-beyond-the-image"),
        pytest.param(
            row("Find it.", "<bbox>", objects=objects(REAL, bbox_type="norm1")), "out_of_range", id="pixels-called-norm1"
        ),
        pytest.param(row("Find it.", "<bbox>", objects=objects(REAL, bbox_type="norm1000")), "malformed", id="unknown-kind"),
        pytest.param(row("Find it.", "<bbox>", ["no.png"], objects=objects(REAL)), "missing_image", id="no-file-to-measure"),
        pytest.param(row("Find it.", "<bbox>", objects="{'bbox': "), "malformed", id="half-written-objects"),
        pytest.param(row("Find it.", "<bbox>", objects=[{"bbox": REAL}]), "malformed", id="objects-of-an-old-version"),
        pytest.param(row("<video>Find it.", "<bbox>", videos=["a.mp4"]), "malformed", id="video"),
        pytest.param(row("Find it.", "It is not there."), "no_box", id="no-box"),
        pytest.param(7, "malformed", id="no-object"),
    ],
)
def test_bad_rows(folder: Path, bad: Any, reason: str) -> None:
    file = write_rows(folder / "rows.jsonl", [bad])
    assert reasons_of(collect(scan_source("swift", file, grid="per_mille"))[1]) == {reason: 1}
