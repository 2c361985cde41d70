"""Rows as other trainers read them: the exact layout of each, and what it refuses to hold."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyground.answer import Answer, Located, read_answer
from polyground.exports import FORMATS, NORM1, Style, dataset_info, has_boxes, names_under, verl_schema, write_row
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.imagefile import ImageError
from polyground.records import Example
from polyground.sources.reading import RowError

LEFT, RIGHT = Box(0.0, 0.25, 0.5, 0.75), Box(0.5, 0.1, 1.0, 0.2)
EXAMPLE = Example(
    key="d/7",
    task="find",
    images=(Path("/data/a.png"), Path("/data/b.png")),
    question="Find what <box> shows.",
    target=Answer((Located(2, LEFT),)),
    question_boxes=(Located(1, RIGHT),),
)
CHOICE = Example(
    key="d/8",
    task="choose",
    images=(Path("/data/a.png"),),
    question="Which is red?",
    target=Answer(choice="B"),
    choices=("the cup", "the hat"),
)
STYLE = Style(name=names_under(Path("/data")))
TWO = [PER_MILLE, PER_MILLE]

GROUNDED = '<answer>[{"image": 2, "bbox_2d": [0, 250, 500, 750]}]</answer>'
ASKED = "Image 1: <image>\nImage 2: <image>\nFind what [500, 100, 1000, 200] shows."


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def row(name: str, example: Example = EXAMPLE, grids: Sequence[Grid] = TWO, **style: Any) -> dict[str, Any]:
    return write_row(name, example, grids[: len(example.images)], replace(STYLE, **style))


def test_sharegpt_is_conversations_with_image_placeholders() -> None:
    assert row("sharegpt") == {
        "id": "d/7",
        "task": "find",
        "images": ["a.png", "b.png"],
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GROUNDED}],
    }


def test_vlm_r1_is_sharegpt_with_its_images_under_image() -> None:
    found = row("vlm_r1")
    assert found.pop("image") == row("sharegpt")["images"]
    assert found == {key: value for key, value in row("sharegpt").items() if key != "images"}


def test_swift_keeps_boxes_beside_the_text() -> None:
    assert row("swift", grids=[NORM1, NORM1]) == {
        "id": "d/7",
        "task": "find",
        "messages": [
            {"role": "user", "content": "Image 1: <image>\nImage 2: <image>\nFind what <bbox> shows."},
            {"role": "assistant", "content": '<answer>[{"image": 2, "bbox_2d": <bbox>}]</answer>'},
        ],
        "images": ["a.png", "b.png"],
        "objects": {
            "ref": [],
            "bbox": [[0.5, 0.1, 1.0, 0.2], [0.0, 0.25, 0.5, 0.75]],
            "bbox_type": "norm1",
            "image_id": [0, 1],
        },
    }


def test_swift_writes_real_pixels_of_each_image() -> None:
    found = row("swift", grids=[Grid(width=200, height=100), Grid(width=40, height=80)])["objects"]
    assert (found["bbox_type"], found["bbox"]) == ("real", [[100, 10, 200, 20], [0, 20, 20, 60]])


def test_swift_without_boxes_has_no_objects() -> None:
    assert "objects" not in row("swift", CHOICE, [NORM1])


def test_trl_is_a_prompt_of_parts_and_a_completion() -> None:
    assert row("trl") == {
        "id": "d/7",
        "task": "find",
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Image 1: "},
                    {"type": "image"},
                    {"type": "text", "text": "\nImage 2: "},
                    {"type": "image"},
                    {"type": "text", "text": "\nFind what [500, 100, 1000, 200] shows."},
                ],
            }
        ],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": GROUNDED}]}],
        "solution": GROUNDED,
        "images": ["a.png", "b.png"],
    }


def test_trl_rows_are_what_trl_fills_with_images() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    found = row("trl")
    asked, answered = data_utils.prepare_multimodal_messages(found["prompt"] + found["completion"], images=["A", "B"])
    assert [part.get("image") for part in asked["content"]] == [None, "A", None, "B", None]
    assert answered["content"] == [{"type": "text", "text": GROUNDED}]


def test_verl_holds_the_columns_of_verl_and_of_easyr1_and_the_image_files(picture: Path) -> None:
    found = row("verl", replace(EXAMPLE, images=(picture, picture), meta={"source": "mig_bench"}))
    assert found["prompt"] == [{"role": "user", "content": ASKED}]
    assert found["problem"] == ASKED
    assert found["answer"] == found["reward_model"]["ground_truth"] == '[{"image": 2, "bbox_2d": [0, 250, 500, 750]}]'
    assert (found["data_source"], found["ability"]) == ("mig_bench", "find")
    assert found["images"] == [{"bytes": picture.read_bytes(), "path": "a.png"}] * 2


def test_the_parquet_schema_knows_every_column_of_verl(picture: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    found = row("verl", replace(EXAMPLE, images=(picture, picture)))
    schema = verl_schema()
    assert schema.names == list(found)
    assert pa.Table.from_pylist([found], schema=schema).to_pylist() == [found]


def test_an_image_that_cannot_be_embedded_is_refused_by_name(picture: Path) -> None:
    picture.write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match="a web page"):
        row("verl", replace(CHOICE, images=(picture,)))


@pytest.mark.parametrize(
    ("form", "answered"),
    [
        ("contract", '<answer>[{"image": 1, "bbox_2d": [0, 250, 500, 750]}]</answer>'),
        ("qwen_json", '```json\n[{"bbox_2d": [0, 250, 500, 750]}]\n```'),
        ("qwen_tokens", "<|box_start|>(0,250),(500,750)<|box_end|>"),
        ("internvl", "<box>[[0, 250, 500, 750]]</box>"),
    ],
)
def test_answers_can_keep_the_native_form_of_a_family(form: str, answered: str) -> None:
    one = replace(CHOICE, choices=(), target=Answer((Located(1, LEFT),)))
    assert row("sharegpt", one, form=form)["conversations"][1]["value"] == answered
    found = row("trl", replace(one, meta={"reasoning": "Left."}), form=form)
    assert found["completion"][0]["content"][0]["text"] == f"<think>Left.</think>{answered}"
    assert found["solution"].startswith("<answer>")


@pytest.mark.parametrize("form", ["contract", "qwen_json", "qwen_tokens", "internvl"])
def test_the_scorer_reads_the_answer_that_is_taught(form: str) -> None:
    one = replace(CHOICE, choices=(), target=Answer((Located(1, LEFT), Located(1, RIGHT))))
    for example in (one, CHOICE):
        text = row("sharegpt", example, form=form)["conversations"][1]["value"]
        assert read_answer(text, [PER_MILLE], native=None if form == "contract" else form) == example.target


@pytest.mark.parametrize(
    ("example", "form", "reason"),
    [
        (EXAMPLE, "qwen_tokens", "unsaid_image"),
        (EXAMPLE, "internvl", "unsaid_image"),
        (replace(EXAMPLE, target=Answer()), "qwen_json", "nothing_there"),
    ],
)
def test_what_a_native_form_cannot_say_is_refused_by_name(example: Example, form: str, reason: str) -> None:
    with pytest.raises(RowError) as refused:
        row("sharegpt", example, form=form)
    assert refused.value.reason == reason
    assert '"image": 2' in row("sharegpt", form="qwen_json")["conversations"][1]["value"]


def test_polyground_keeps_the_example_whole() -> None:
    found = row("polyground", replace(EXAMPLE, meta={"scene": 3}))
    assert found["images"] == ["a.png", "b.png"]
    again = Example.from_json({**found, "images": ["/data/a.png", "/data/b.png"]})
    assert again == replace(EXAMPLE, meta={"scene": 3})


@pytest.mark.parametrize("name", ["sharegpt", "swift", "trl"])
def test_choices_are_listed_and_answered_by_letter(name: str) -> None:
    text = json.dumps(row(name, CHOICE, [PER_MILLE]))
    assert r"Which is red?\n(A) the cup\n(B) the hat" in text
    assert "<answer>B</answer>" in text


@pytest.mark.parametrize("name", ["sharegpt", "trl"])
def test_nothing_to_find_is_an_empty_list(name: str) -> None:
    nothing = replace(EXAMPLE, target=Answer())
    assert "<answer>[]</answer>" in json.dumps(row(name, nothing))
    assert "<answer>[]</answer>" in json.dumps(row("swift", nothing, [NORM1, NORM1]))


@pytest.mark.parametrize("name", ["sharegpt", "swift", "trl"])
def test_reasoning_goes_into_the_think_block(name: str) -> None:
    grids = [NORM1, NORM1] if name == "swift" else TWO
    reasoned = replace(EXAMPLE, meta={"reasoning": "It is blue. "})
    assert "<think>It is blue.</think><answer>" in json.dumps(row(name, reasoned, grids))
    assert "<think>" not in json.dumps(row(name, EXAMPLE, grids))
    assert "<think>…</think>" in json.dumps(row(name, EXAMPLE, grids, think="…"), ensure_ascii=False)


def test_the_solution_a_reward_is_given_holds_no_reasoning() -> None:
    assert row("trl", replace(EXAMPLE, meta={"reasoning": "It is blue."}))["solution"] == GROUNDED


def test_the_instruction_ends_the_question() -> None:
    assert row("sharegpt", instruction="Think first.")["conversations"][0]["value"] == f"{ASKED}\nThink first."


def test_a_box_of_a_single_image_needs_no_number_to_be_written() -> None:
    one = replace(CHOICE, choices=(), target=Answer((Located(None, LEFT),)))
    assert row("sharegpt", one)["conversations"][1]["value"] == GROUNDED.replace("2,", "1,", 1)


def test_images_stay_where_the_question_has_them() -> None:
    placed = replace(EXAMPLE, question="<image> and <image>: find what <box> shows.")
    assert row("sharegpt", placed)["conversations"][0]["value"].startswith("<image> and <image>: find")


UNNAMED = replace(EXAMPLE, target=Answer((Located(None, LEFT),)))
ALL = list(FORMATS)
TEXTS = ["sharegpt", "vlm_r1", "swift", "trl", "verl"]
THINKING = ["sharegpt", "vlm_r1", "swift", "trl"]


@pytest.mark.parametrize(
    ("example", "reason", "names"),
    [
        pytest.param(UNNAMED, "unnamed_image", TEXTS, id="answer box of no image"),
        pytest.param(replace(EXAMPLE, target=Answer((Located(3, LEFT),))), "bad_image", ALL, id="third of two images"),
        pytest.param(replace(EXAMPLE, question_boxes=(Located(None, LEFT),)), "unnamed_image", ["swift"], id="question box"),
        pytest.param(
            replace(EXAMPLE, question="<image> <box>"), "placeholder_mismatch", ALL, id="one placeholder for two images"
        ),
        pytest.param(replace(EXAMPLE, question="Find it."), "placeholder_mismatch", ALL, id="a box with no place"),
        pytest.param(replace(CHOICE, choices=("x",) * 27), "too_many_choices", TEXTS, id="27 choices"),
        pytest.param(replace(EXAMPLE, meta={"reasoning": "a</think>b"}), "tagged_reasoning", THINKING, id="tags in reasoning"),
        pytest.param(replace(EXAMPLE, meta={"reasoning": "see <image>"}), "placeholder", THINKING, id="image in reasoning"),
        pytest.param(
            replace(EXAMPLE, question="<video> <box>"), "placeholder", ["sharegpt", "vlm_r1", "swift", "verl"], id="a video"
        ),
        pytest.param(replace(EXAMPLE, question="\ud800 <box>"), "malformed", ["verl"], id="half a character"),
        pytest.param(replace(EXAMPLE, question="<bbox> <box>"), "placeholder", ["swift"], id="bbox in the question"),
        pytest.param(replace(CHOICE, choices=("<image>", "b", "c")), "placeholder", TEXTS, id="placeholder in a choice"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(example: Example, reason: str, names: list[str], picture: Path) -> None:
    example = replace(example, images=(picture,) * len(example.images))
    refused: dict[str, str] = {}
    for name in FORMATS:
        grids = [NORM1, NORM1] if name == "swift" else TWO
        try:
            row(name, example, grids)
        except RowError as error:
            refused[name] = error.reason
    assert refused == dict.fromkeys(names, reason)


@pytest.mark.parametrize(
    ("image", "name"),
    [("/data/a.png", "a.png"), ("/data/x/../a.png", "a.png"), ("/database/a.png", "/database/a.png"), ("/a.png", "/a.png")],
)
def test_an_image_under_the_folder_is_named_relative_to_it(image: str, name: str) -> None:
    assert names_under(Path("/data"))(Path(image)) == name


def test_relative_paths_meet_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_under(Path("out"))(Path("out/img/a.png")) == "img/a.png"
    assert names_under(Path("out"))(Path("img/a.png")) == str(tmp_path / "img" / "a.png")
    assert names_under(Path())(Path("img/a.png")) == "img/a.png"


def test_only_boxes_take_a_grid() -> None:
    assert (has_boxes(EXAMPLE), has_boxes(replace(EXAMPLE, target=Answer())), has_boxes(CHOICE)) == (True, True, False)


def test_the_dataset_info_entry_names_the_columns_that_are_written() -> None:
    entry, written = dataset_info("x.json"), row("sharegpt")
    assert entry["file_name"] == "x.json"
    assert set(entry["columns"].values()) <= set(written)
    turn = written[entry["columns"]["messages"]][0]
    assert turn[entry["tags"]["role_tag"]] == entry["tags"]["user_tag"]
    assert turn[entry["tags"]["content_tag"]] == ASKED
