"""BLINK and MMIU: choices in letter order, gold letters exact, bad rows named."""

import json
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import blink_row, write_parquet

from polyground.answer import Answer
from polyground.errors import DataError
from polyground.records import Example
from polyground.sources import SOURCES, read_source
from polyground.sources.blink import scan_blink
from polyground.sources.mmiu import read_options, scan_mmiu
from polyground.sources.reading import collect, reasons_of

BLINK = {
    "idx": "val_Jigsaw_1",
    "question": "Which image fits?",
    "sub_task": "Jigsaw",
    "image_1": "1.png",
    "image_2": {"path": "2.png", "bytes": None},
    "image_3": None,
    "image_4": None,
    "choices": ["the first image", "the second image"],
    "answer": "(B)",
    "prompt": "Which image fits?\n(A) the first image\n(B) the second image",
}
MMIU = {
    "task": "image_retrieval",
    "options": "A: the first image\nB: the second image",
    "question": "Which image has the cat?",
    "context": "Select from the following choices.\nA: the first image\nB: the second image",
    "input_image_path": ["./1.png", "./2.png"],
    "output": "B",
}


def written(folder: Path, *rows: Any, lines: bool = False) -> Path:
    path = folder / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
@pytest.mark.parametrize(("source", "row", "task"), [("blink", BLINK, "Jigsaw"), ("mmiu", MMIU, "image_retrieval")])
def test_rows_become_examples_that_survive_json(tmp_path: Path, source: str, row: dict[str, Any], task: str, lines: bool) -> None:
    [example] = read_source(source, written(tmp_path, row, lines=lines), check_images=False)
    assert (example.key, example.task) == (f"{source}/{task}/0", task)
    assert example.images == (tmp_path / "1.png", tmp_path / "2.png")
    assert example.choices == ("the first image", "the second image")
    assert example.target == Answer(choice="B")
    assert example.question == row["question"]
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "hidden"}, "no_answer"),
        ({"answer": "(C)"}, "bad_choice"),
        ({"image_1": None, "image_2": None}, "no_images"),
        ({"choices": None}, "malformed"),
        ({}, "duplicate"),
    ],
)
def test_bad_blink_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = written(tmp_path, BLINK, {**BLINK, **change})
    assert reasons_of(collect(scan_blink(path))[1]) == {reason: 1}
    with pytest.raises(DataError, match=f"1 {reason}"):
        read_source("blink", path, check_images=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": "E"}, "bad_choice"),
        ({"options": "none"}, "malformed"),
        ({"input_image_path": []}, "no_images"),
        ({}, "duplicate"),
    ],
)
def test_bad_mmiu_rows(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    assert reasons_of(collect(scan_mmiu(written(tmp_path, MMIU, {**MMIU, **change})))[1]) == {reason: 1}


def test_what_the_context_adds_is_kept(tmp_path: Path) -> None:
    row = {**MMIU, "context": "The images show a zoo. " + MMIU["context"]}
    [example] = read_source("mmiu", written(tmp_path, row), check_images=False)
    assert example.question == "The images show a zoo.\nWhich image has the cat?"


@pytest.mark.parametrize(
    ("question", "context", "expected"),
    [
        pytest.param("Which?", "Which?\nSelect from the following choices.\nA: x\nB: y\n", "Which?", id="only repeated"),
        pytest.param("Which?", "Look twice. Which?\nA: x\nB: y", "Look twice. Which?", id="question within the context"),
        pytest.param(
            "Steps: a\nb\nWhich?", "Steps: a\nb\nFind it.", "Steps: a\nb\nFind it.\nSteps: a\nb\nWhich?", id="lines kept"
        ),
        pytest.param("Steps: a\nb", "Steps: a b\n", "Steps: a\nb", id="other line breaks"),
        pytest.param("Which?", "A. Tsitsipas plays.", "A. Tsitsipas plays.\nWhich?", id="a line that only looks like an option"),
        pytest.param("Which?", "", "Which?", id="no context"),
    ],
)
def test_mmiu_asks_question_and_context_once(tmp_path: Path, question: str, context: str, expected: str) -> None:
    row = {**MMIU, "question": question, "context": context, "options": "A: x\nB: y\n"}
    [example] = read_source("mmiu", written(tmp_path, row), check_images=False)
    assert example.question == expected


def test_mmiu_keeps_the_relation_and_up_to_32_images(tmp_path: Path) -> None:
    row = {**MMIU, "input_image_path": [f"./Continuous-temporal/video/video_0_{n}.jpg" for n in range(32)]}
    [example] = read_source("mmiu", written(tmp_path, row), check_images=False)
    assert len(example.images) == 32
    assert example.meta["relation"] == "Continuous-temporal"


PROMPT = "The second image is cut from the first.\nWhich image fits?\nSelect from the following choices.\n(A) one\n(B) two\n"


@pytest.mark.parametrize(
    ("prompt", "wording", "expected"),
    [
        pytest.param(PROMPT, "prompt", "The second image is cut from the first.\nWhich image fits?", id="choices left out"),
        pytest.param(PROMPT, "question", "Which image fits?", id="the short question"),
        pytest.param("Fits (A) or (B)?", "prompt", "Fits (A) or (B)?", id="letters within a line"),
        pytest.param("(A) one\n(B) two", "prompt", "Which image fits?", id="nothing but choices"),
        pytest.param(None, "prompt", "Which image fits?", id="no prompt"),
    ],
)
def test_blink_asks_the_published_prompt(tmp_path: Path, prompt: str | None, wording: Any, expected: str) -> None:
    [example] = read_source("blink", written(tmp_path, {**BLINK, "prompt": prompt}), wording=wording, check_images=False)
    assert example.question == expected


@pytest.mark.parametrize(("source", "row"), [("blink", BLINK), ("mmiu", MMIU)])
def test_rows_repeated_are_kept_when_asked(tmp_path: Path, source: str, row: dict[str, Any]) -> None:
    examples = read_source(source, written(tmp_path, row, row), duplicates="keep", check_images=False)
    assert [example.key[-1] for example in examples] == ["0", "1"]


def test_blink_knows_no_other_wording(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wording must be one of 'prompt', 'question'"):
        read_source("blink", written(tmp_path, BLINK), wording="short")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A: x\nB: y\n", ("x", "y")),
        ("A. x\nB) y", ("x", "y")),
        ("A: x\n  more\nB: y", ("x more", "y")),
        ("A: I: one\nB: two", ("I: one", "two")),
    ],
)
def test_read_options(text: str, expected: tuple[str, ...]) -> None:
    assert read_options(text) == expected


@pytest.mark.parametrize(
    ("sub_tasks", "expected"),
    [
        (["Counting"], ["Counting"]),
        ("Counting", ["Counting"]),
        ("Count", []),
        ("multi_image", ["Jigsaw", "Multi-view_Reasoning", "Art Style"]),
        (["multi_image", "Counting"], ["Jigsaw", "Counting", "Multi-view_Reasoning", "Art Style"]),
        (["art_style"], ["Art Style"]),
    ],
)
def test_sub_tasks_are_chosen(tmp_path: Path, sub_tasks: Any, expected: list[str]) -> None:
    path = written(
        tmp_path, *({**BLINK, "sub_task": name} for name in ("Jigsaw", "Counting", "Multi-view_Reasoning", "Art Style"))
    )
    assert [e.task for e in collect(scan_blink(path, sub_tasks=sub_tasks))[0]] == expected


def test_embedded_images_become_files_named_by_their_content(tmp_path: Path) -> None:
    rows = [blink_row(), blink_row(sub_task="Jigsaw")]
    path = write_parquet(tmp_path / "val.parquet", rows)
    first, second = read_source("blink", path, check_images="decode")
    assert first.images == second.images
    assert len(set(first.images)) == 3
    assert {image.parent for image in first.images} == {tmp_path / "val_images"}


def test_an_unknown_source_or_option_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'blink'\? Known sources: blink, .*mig_bench.*mmiu"):
        read_source("blnk", tmp_path)
    with pytest.raises(DataError, match="no option 'image_rot'; its options: images_root"):
        read_source("mig_bench", tmp_path, image_rot="x")


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_file_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=r"nothing\.json"):
        read_source(source, tmp_path / "nothing.json")
