"""MGrounding-630k: rows in the layout its authors publish, every task, several turns, bounded memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.sources import read_source, scan_source
from polyground.sources.migician import task_of
from polyground.sources.reading import collect, reasons_of

SHARED = "./MGrounding-630k"


def row(kind: str | None, images: list[str], *texts: str, **fields: Any) -> dict[str, Any]:
    said = [{"from": "human" if n % 2 == 0 else "gpt", "value": text} for n, text in enumerate(texts)]
    typed = {} if kind is None else {"type": kind}
    return {"id": "_".join(images), "images": [f"{SHARED}/{name}" for name in images], "conversations": said, **typed, **fields}


SA = [f"Group_Grounding/SA-1B/sa_{n}.jpg" for n in (5229016, 8929009, 6793119, 3571391)]
GROUP = row(
    "gg_train",
    SA,
    "<image>\n<image>\n<image>\n<image>\nGive the bounding box of the region this sentence refers to: "
    "<|object_ref_start|>a statue of a man<|object_ref_end|>.",
    "It's in the third image. <|box_start|>(316,58),(764,999)<|box_end|>",
    "Recognize the target region that this sentence refers to: <|object_ref_start|>a woman in orange<|object_ref_end|>.",
    "It's in the first image. <|box_start|>(408,656),(578,997)<|box_end|>",
)
TRACKING = row(
    "object_tracking",
    ["Object_Tracking/LaSOT/1.jpg", "Object_Tracking/LaSOT/2.jpg"],
    "<image>\n<image>\nThe object <|box_start|>(100,200),(300,400)<|box_end|> moves. Locate it in the second image.",
    "<|box_start|>(150,200),(350,400)<|box_end|>",
)
DIFFERENCE = row(
    "diff",
    ["Difference/magicbrush/1.png", "Difference/magicbrush/2.png"],
    "<image>\n<image>\nCompare the first image with the second image and mark the difference.",
    "<|box_start|>(150,200),(350,400)<|box_end|>",
)
REGION = row(
    None,
    ["Region_Locating/Object365/1.jpg", "Region_Locating/Object365/2.jpg"],
    "<image>\n<image>\nWhere does the second picture lie in the source image?",
    "<|box_start|>(0,0),(350,400)<|box_end|>",
)
DESCRIBE = row(
    "gg_reg",
    SA,
    "<image>\n<image>\n<image>\n<image>\nDescribe <|box_start|>(316,58),(764,999)<|box_end|> in the third image.",
    "A statue of a man.",
)


def write_set(folder: Path, *rows: dict[str, Any], name: str = "MGrounding-630k.json") -> Path:
    for each in rows:
        write_images(folder, *each["images"])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return write_rows(folder / name, rows)


def test_both_turns_of_the_published_example(tmp_path: Path) -> None:
    examples = read_source("migician", write_set(tmp_path, GROUP))
    assert [(example.key, example.task) for example in examples] == [
        ("migician/0/0", "group_grounding"),
        ("migician/0/1", "group_grounding"),
    ]
    assert [example.target.boxes for example in examples] == [
        (Located(3, Box(0.316, 0.058, 0.764, 0.999)),),
        (Located(1, Box(0.408, 0.656, 0.578, 0.997)),),
    ]
    assert examples[0].question.endswith("\nGive the bounding box of the region this sentence refers to: a statue of a man.")
    assert examples[1].question == "Recognize the target region that this sentence refers to: a woman in orange."
    assert examples[1].images[2] == tmp_path / "MGrounding-630k/Group_Grounding/SA-1B/sa_6793119.jpg"
    assert_gold_scores_one(examples)


def test_a_box_in_a_question_is_in_the_first_image_and_the_last_named_is_asked_about(tmp_path: Path) -> None:
    tracking, difference = read_source("migician", write_set(tmp_path, TRACKING, DIFFERENCE))
    assert tracking.question_boxes == (Located(1, Box(0.1, 0.2, 0.3, 0.4)),)
    assert tracking.question.endswith("\nThe object <box> moves. Locate it in the second image.")
    assert [example.target.boxes[0].image for example in (tracking, difference)] == [2, 2]
    assert_gold_scores_one([tracking, difference])


@pytest.mark.parametrize(("options", "image"), [({}, None), ({"unnamed_image": 1}, 1)])
def test_an_image_that_nothing_names_is_the_users_to_say(tmp_path: Path, options: dict[str, Any], image: int | None) -> None:
    [example] = read_source("migician", write_set(tmp_path, REGION), **options)
    assert example.target.boxes[0].image == image


def test_an_answer_without_a_box_is_a_counted_row(tmp_path: Path) -> None:
    [], [bad] = collect(scan_source("migician", write_set(tmp_path, DESCRIBE)))
    assert (bad.row, bad.reason) == (1, "no_box")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("common_train_70k", "common_object"),
        ("diff_train_70k", "diff"),
        ("free_form_grounding_130k", "free_form"),
        ("gg_train_120k", "group_grounding"),
        ("_gg_reg_40k", "group_grounding_reg"),
        ("ot_train_130k", "object_tracking"),
        ("refer_train_70k", "refer_grounding"),
        ("region_train_70k", "region"),
        ("group_grounding", "group_grounding"),
        ("MGrounding-630k", None),
        ("other", None),
        ("", None),
    ],
)
def test_task_of(name: str, task: str | None) -> None:
    assert task_of(name) == task


@pytest.mark.parametrize(("kind", "task"), [(None, "region"), ("gg_train", "group_grounding"), ("riddles", "riddles")])
def test_the_type_of_a_row_wins_over_the_name_of_its_file(tmp_path: Path, kind: str | None, task: str) -> None:
    typed = {**REGION, **({} if kind is None else {"type": kind})}
    file = write_set(tmp_path, typed, name="MGrounding-630k/Region_Locating/region_train_70k.json")
    [example] = read_source("migician", file, images_root=tmp_path)
    assert example.task == task


def test_tasks_are_chosen(tmp_path: Path) -> None:
    file = write_set(tmp_path, GROUP, DIFFERENCE, DESCRIBE)
    assert [example.key for example in read_source("migician", file, tasks=["diff"])] == ["migician/1"]


BAD = {
    "inverted": row("gg", SA, "Find it.", "It's in the first image. <|box_start|>(578,656),(408,997)<|box_end|>"),
    "out_of_range": row("gg", SA, "Find that.", "It's in the first image. <|box_start|>(408,656),(578,1007)<|box_end|>"),
    "bad_image": row("gg", SA, "Find these.", "It's in the fifth image. <|box_start|>(408,656),(578,997)<|box_end|>"),
    "placeholder_mismatch": row("gg", SA, "<image>\nFind those.", "It's in the first image. <|box_start|>(0,0),(9,9)<|box_end|>"),
    "malformed": row("gg", SA, "Find us.", "It's in the first image. <|box_start|>(408,656),(578"),
    "no_images": {**GROUP, "images": []},
    "unsafe_path": {**GROUP, "images": ["../../etc/passwd"] * 4},
}


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.json", [GROUP, *BAD.values()])
    examples, bad = collect(scan_source("migician", file))
    assert (len(examples), reasons_of(bad)) == (2, dict.fromkeys(BAD, 1))
    assert [row.row for row in bad] == list(range(2, 2 + len(BAD)))
    with pytest.raises(DataError, match=r"7 bad rows \(1 inverted, .*\)(.|\n)*row 2 \(migician/1\)"):
        read_source("migician", file, check_images=False)


def test_images_may_be_one_name_and_lie_under_a_root(tmp_path: Path) -> None:
    write_images(tmp_path, "disk/MGrounding-630k/Common_Object/COCO/1.jpg")
    single = {
        "id": "1",
        "images": "/home/me/MGrounding-630k/Common_Object/COCO/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nFind it."}, {"from": "gpt", "value": "(0,0),(500,500)"}],
        "type": "common",
    }
    file = write_rows(tmp_path / "common_train_70k.json", [single])
    [example] = read_source("migician", file, images_root=tmp_path / "disk", strip_prefix="/home/me/")
    assert example.target.boxes == (Located(1, Box(0, 0, 0.5, 0.5)),)
    assert example.images[0].is_file()


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_half_a_download_is_named_after_the_rows_before_it(tmp_path: Path, cut: float) -> None:
    text = json.dumps([{**GROUP, "id": n} for n in range(10)])
    file = tmp_path / "rows.json"
    file.write_text(text[: int(len(text) * cut)])
    found = scan_source("migician", file, duplicates="keep")
    with pytest.raises(DataError, match=r"rows\.json: row \d+ is not valid JSON .*download"):
        for _ in found:
            pass


def test_a_file_is_read_in_less_memory_than_it_takes_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    with file.open("w") as out:
        for n in range(3000):
            turn = ("Find it.", "First image: <|box_start|>(1,2),(3,4)<|box_end|>")
            out.write("[" if n == 0 else ",\n")
            json.dump(row("gg_train", [f"{n}.jpg", "x.jpg"], *turn, notes="x" * 10_000), out)
        out.write("]")
    tracemalloc.start()
    count = sum(1 for _ in scan_source("migician", file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000
    assert peak < 12e6 < 30e6 < file.stat().st_size
