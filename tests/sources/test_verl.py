"""EasyR1 and verl: both field layouts, parquet with embedded images, shards, answers of every kind."""

import io
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_rows
from PIL import Image

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import read_source, scan_source
from polyground.sources.reading import collect, reasons_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

GOLD = Answer((Located(1, Box(0.1, 0.2, 0.5, 0.75)),))


def picture(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), colour).save(buffer, kind)
    return buffer.getvalue()


EASYR1 = {
    "problem": "<image>Find the cup.",
    "answer": "[100, 200, 500, 750]",
    "images": [{"bytes": picture("red"), "path": None}],
}
VERL = {
    "data_source": "cups",
    "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "<image>Find the cup."}],
    "images": [{"bytes": picture("red"), "path": "cup.png"}],
    "reward_model": {"style": "rule", "ground_truth": "<answer>[100, 200, 500, 750]</answer>"},
    "extra_info": {"index": 0},
}


def write_parquet(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file


def only(file: Path, **options: Any) -> Example:
    [example] = read_source("verl", file, grid="per_mille", check_images="decode", **options)
    return example


@pytest.mark.parametrize("row", [EASYR1, VERL], ids=["easyr1", "verl"])
def test_a_parquet_row_is_read_and_its_image_written_out(tmp_path: Path, row: dict[str, Any]) -> None:
    example = only(write_parquet(tmp_path / "train.parquet", row))
    assert (example.key, example.question, example.target) == ("verl/0", "<image>Find the cup.", GOLD)
    [image] = example.images
    assert image.parent == tmp_path / "train_images"
    assert image.read_bytes() == picture("red")
    assert_gold_scores_one([example])


def test_an_image_that_several_rows_embed_is_written_once(tmp_path: Path) -> None:
    blue = {**EASYR1, "problem": "<image>Find the hat.", "images": [{"bytes": picture("blue", "JPEG"), "path": None}]}
    rows = [EASYR1, {**EASYR1, "problem": "<image>Find the bag."}, blue]
    examples = read_source("verl", write_parquet(tmp_path / "x.parquet", *rows), grid="per_mille", images_out=tmp_path / "out")
    assert examples[0].images == examples[1].images != examples[2].images
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".jpg", ".png"]


def test_a_folder_of_shards_is_one_data_set(tmp_path: Path) -> None:
    for shard, thing in enumerate(("cup", "hat")):
        write_parquet(tmp_path / "data" / f"train-0000{shard}.parquet", {**EASYR1, "problem": f"<image>Find the {thing}."})
    examples = read_source("verl", tmp_path / "data", grid="per_mille")
    assert [(example.key, example.question) for example in examples] == [
        ("verl/0", "<image>Find the cup."),
        ("verl/1", "<image>Find the hat."),
    ]


@pytest.mark.parametrize(
    "truth",
    [
        pytest.param({"answer": [100, 200, 500, 750]}, id="a-list"),
        pytest.param({"answer": {"bbox_2d": [100, 200, 500, 750]}}, id="an-object"),
        pytest.param({"solution": '[{"bbox_2d": [100, 200, 500, 750], "label": "cup"}]'}, id="solution"),
        pytest.param({"reward_model": {"ground_truth": '{"image": 1, "bbox_2d": [100, 200, 500, 750]}'}}, id="ground-truth"),
        pytest.param({"ground_truth": "(100,200),(500,750)"}, id="ground-truth-beside"),
    ],
)
def test_every_place_and_kind_of_an_answer(tmp_path: Path, truth: dict[str, Any]) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    assert only(write_rows(tmp_path / "x.jsonl", [{"problem": "Find the cup.", "images": ["a.png"], **truth}])).target == GOLD


def test_fields_of_other_names_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    row = {"problem": "No.", "q": "Find the cup.", "extra_info": {"gold": [100, 200, 500, 750]}, "photo": "a.png"}
    example = only(write_rows(tmp_path / "x.jsonl", [row]), question="q", answer="extra_info.gold", images="photo")
    assert (example.question, example.target) == ("Find the cup.", GOLD)


def test_a_multiple_choice_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    row = {"problem": "<image>Which?\n(A) a cup\n(B) a hat", "answer": "B", "images": ["a.png"]}
    example = only(write_rows(tmp_path / "x.jsonl", [row]))
    assert (example.choices, example.target) == (("a cup", "a hat"), Answer(choice="B"))
    assert_gold_scores_one([example])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": None}, "no_answer"),
        ({"answer": "42"}, "no_box"),
        ({"images": None}, "no_images"),
        ({"images": []}, "no_images"),
        ({"problem": None}, "malformed"),
        ({"problem": "<image><image>Find it."}, "placeholder_mismatch"),
        ({"images": ["../a.png"]}, "unsafe_path"),
        ({"images": [{"bytes": None, "path": "/root/a.png"}]}, "unsafe_path"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    row = {"problem": "<image>Find it.", "answer": "[1, 2, 3, 4]", "images": ["a.png"], **change}
    file = write_rows(tmp_path / "x.jsonl", [row])
    assert reasons_of(collect(scan_source("verl", file, grid="per_mille"))[1]) == {reason: 1}


def test_half_a_parquet_file_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", EASYR1)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.parquet: cannot be read as parquet .*; download it again"):
        read_source("verl", file, grid="per_mille")
