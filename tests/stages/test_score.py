"""`polyground score` on a small committed annotation with hand-made responses, whose scores were counted by hand.

`mig_bench_small/` has 21 rows in the layout of the revised MIG-Bench: 11 of region (the last with an inverted annotation), 6 of
diff, 4 of group_grounding (the second a duplicate of the first).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyground.cli import main
from polyground.storage import read_json

SMALL = Path(__file__).parent / "mig_bench_small"
MEANT = {"region": 5 / 11, "diff": 4 / 6, "group_grounding": 3 / 4}
"""Accuracy of the first box at IoU 0.5."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def score(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the verb on the small annotation; gives the exit code, what was printed, and what went to standard error."""

    def run(*words: object, annotation: Path = SMALL / "annotation.json", predictions: Path = SMALL / "responses") -> Any:
        files = ["--annotation", annotation, "--predictions", predictions]
        grid = [] if {"--grid", "--model"} & set(words) else ["--grid", "per_mille"]
        native = [] if {"--native", "--model"} & set(words) else ["--native", "qwen_tokens"]
        code = main(["score", "mig_bench", *map(str, [*files, *grid, *native, *words])])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def whole(score: Run, tmp_path: Path, *words: object, **files: Path) -> Any:
    code, _, errors = score("--json", tmp_path / "out.json", *words, **files)
    assert code == 0, errors
    return read_json(tmp_path / "out.json")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def all_rows() -> list[dict[str, Any]]:
    return [row for file in sorted((SMALL / "responses").glob("*.jsonl")) for row in rows_of(file)]


def test_the_scores_are_those_counted_by_hand(score: Run, tmp_path: Path) -> None:
    found = whole(score, tmp_path)
    at = {task: summary["accuracy"]["0.5"]["value"] for task, summary in found["tasks"].items()}
    assert at == pytest.approx(MEANT)
    assert found["headline"]["value"] == pytest.approx(sum(MEANT.values()) / 3)
    assert found["micro"]["accuracy"]["0.5"]["value"] == pytest.approx(12 / 21)
    region, diff, group = (found["tasks"][task] for task in ("region", "diff", "group_grounding"))
    assert region["accuracy"]["0.7"]["value"] == pytest.approx(4 / 11)
    assert region["accuracy"]["0.3"]["value"] == pytest.approx(6 / 11)
    assert region["mean_iou"]["value"] == pytest.approx((4 * 1 + 0.5 + 0.7 - 1 + 1 / 3) / 11)
    assert region["unreadable"] == pytest.approx({"missing": 1 / 11, "inverted": 1 / 11})
    assert diff["unreadable"] == pytest.approx({"bad_image": 1 / 6})
    assert group["accuracy"]["0.3"]["value"] == 1
    assert [part["measures"]["one_to_one"]["value"] for part in (region, diff, group)] == pytest.approx([6 / 11, 3 / 6, 3 / 4])
    assert diff["measures"]["abstained"]["value"] == pytest.approx(1 / 6)
    assert diff["image_accuracy"]["value"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("univg-first-box", (4 / 11 + 4 / 6 + 3 / 4) / 3), ("migician-stretch", (5 / 11 + 4 / 6 + 3 / 4) / 3)],
)
def test_a_quirk_is_told_under_its_name_beside_the_headline(score: Run, tmp_path: Path, name: str, expected: float) -> None:
    found = whole(score, tmp_path, "--compat", name)
    assert found["headline"]["value"] == pytest.approx(sum(MEANT.values()) / 3)
    assert found["compat"]["value"] == pytest.approx(expected)
    assert found["tags"]["compat"] == name
    _, text, _ = score("--compat", name, "--bootstrap", "0")
    assert f"compat    {name}: {100 * expected:.2f} (a peer's quirk, not a headline)" in text


def test_everything_that_decides_a_score_stands_beside_it(score: Run, tmp_path: Path) -> None:
    tags = whole(score, tmp_path, "--bootstrap", 50, "--seed", 3)["tags"]
    expected = {"benchmark": "mig_bench", "version": "revised", "rule": "first_box", "rows": 21, "published_rows": 4276}
    expected |= {"wrong_by_annotation": {"inverted": 1}, "grid": "per_mille", "native": "qwen_tokens", "compat": None}
    expected |= {"bootstrap": 50, "seed": 3, "prompt_version": None, "responses": 21}
    assert {name: tags[name] for name in expected} == expected


def test_the_table_names_tasks_in_the_order_of_the_annotation(score: Run) -> None:
    code, text, _ = score("--bootstrap", "0")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "MIG-Bench revised: 21 of 4,276 published rows"
    assert lines[1] == "headline  accuracy at IoU 0.5, mean over tasks: 62.37"
    assert [line.split()[0] for line in lines[5:8]] == ["region", "diff", "group_grounding"]
    assert lines[5].split()[1:4] == ["11", "45.45", "36.36"]
    assert "1 row with a bad annotation (1 inverted) counts as wrong" in text
    assert "the numbers do not compare with published ones" in text


def test_one_file_for_all_tasks_scores_the_same(score: Run, tmp_path: Path) -> None:
    mixed = write(tmp_path / "everything.jsonl", list(reversed(all_rows())))
    assert whole(score, tmp_path, predictions=mixed)["tasks"] == whole(score, tmp_path)["tasks"]


def test_an_index_without_a_task_counts_in_the_file_of_its_task_or_in_the_annotation(score: Run, tmp_path: Path) -> None:
    folder = tmp_path / "by_task"
    folder.mkdir()
    for file in (SMALL / "responses").glob("*.jsonl"):
        write(folder / file.name, [{"index": row["index"], "response": row["response"]} for row in rows_of(file)])
    assert whole(score, tmp_path, predictions=folder)["tasks"] == whole(score, tmp_path)["tasks"]
    in_order = [row for task in ("region", "diff", "group_grounding") for row in rows_of(SMALL / "responses" / f"{task}.jsonl")]
    flat = write(tmp_path / "flat.jsonl", [{"index": n, "response": row["response"]} for n, row in enumerate(in_order)])
    assert whole(score, tmp_path, predictions=flat)["tasks"] == whole(score, tmp_path)["tasks"]


def test_rows_of_our_own_evaluation_are_read_with_what_decided_them(score: Run, tmp_path: Path) -> None:
    rows = [
        {"example": f"another_name/{row['task']}/{row['index']}", "task": row["task"], "completion": {"text": row["response"]}}
        for row in all_rows()
        if (row["task"], row["index"]) != ("region", 10)  # never asked: its annotation is bad
    ]
    config = {"prompt_version": "7", "prompts": {"instruction": "Think."}, "evaluate": {"max_completion_length": 64}}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    found = whole(score, tmp_path, predictions=write(tmp_path / "test.jsonl", rows))
    assert found["tasks"] == whole(score, tmp_path)["tasks"]
    assert found["tags"]["prompt_version"] == "7"
    assert found["tags"]["decoding"]["max_completion_length"] == 64


def test_a_model_folder_tells_grid_and_form(score: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}), encoding="utf-8")
    found = whole(score, tmp_path, "--model", model)
    assert (found["tags"]["model_type"], found["tags"]["native"]) == ("qwen2_vl", "qwen_tokens")
    assert found["tasks"] == whole(score, tmp_path)["tasks"]


def test_pixels_of_the_resized_image_are_read_on_the_grid_of_that_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}), encoding="utf-8")
    for name, size in (("a.jpg", (560, 560)), ("b.jpg", (300, 150))):  # the second is resized to 308 x 140
        Image.new("RGB", size).save(tmp_path / name)
    row = {
        "task": "diff",
        "images": ["a.jpg", "b.jpg"],
        "question": "Where does the 2th image differ?",
        "answer": [500, 0, 1000, 500],
    }
    (tmp_path / "mig.json").write_text(json.dumps([row]), encoding="utf-8")
    predictions = write(tmp_path / "p.jsonl", [{"index": 0, "task": "diff", "response": '[{"bbox_2d": [154, 0, 308, 70]}]'}])
    words = [
        "--annotation",
        tmp_path / "mig.json",
        "--predictions",
        predictions,
        "--model",
        model,
        "--json",
        tmp_path / "out.json",
    ]
    assert main(["score", "mig_bench", *map(str, words)]) == 0
    found = read_json(tmp_path / "out.json")
    assert found["micro"]["mean_iou"]["value"] == pytest.approx(1)
    assert found["tags"]["grid"] == "pixels of the resized image"


def test_responses_without_tags_need_their_form_named(score: Run) -> None:
    code, text, _ = score("--native", "none", "--bootstrap", "0")
    assert code == 0
    assert "hardly any response has an answer tag: name the form of their boxes with --native" in text


REFUSED: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "missing": (lambda rows: rows.pop(0), "1 of 21 rows have no response"),
    "twice": (lambda rows: rows.append(dict(rows[0])), "1 rows are answered twice"),
    "index beyond": (lambda rows: rows[0].update(index=6), "index 6, but task 'diff' has 6 rows, counted from 0"),
    "index below": (lambda rows: rows[0].update(index=-1), "index -1, but task 'diff' has 6 rows"),
    "index as text": (lambda rows: rows[0].update(index="0"), "needs a whole number `index`"),
    "no response": (lambda rows: rows[0].pop("response"), "a text `response`"),
    "unknown task": (lambda rows: rows[0].update(task="dif"), "has no task 'dif'; it has region, diff, group_grounding"),
    "another question": (lambda rows: rows[0].update(question="Count the cats."), "are to other questions"),
    "unknown key": (lambda rows: rows.append({"example": "x/diff/99", "completion": {"text": ""}}), "has no row 'x/diff/99'"),
    "no object": (lambda rows: rows.append([]), r"all.jsonl"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_predictions_that_do_not_fit_are_refused(
    score: Run, tmp_path: Path, spoil: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    rows = all_rows()
    spoil(rows)
    code, text, errors = score(predictions=write(tmp_path / "all.jsonl", rows))
    assert (code, text) == (2, "")
    assert message in errors


def test_missing_responses_can_be_counted_as_wrong(score: Run, tmp_path: Path) -> None:
    found = whole(score, tmp_path, "--allow-missing", predictions=SMALL / "responses" / "diff.jsonl")
    assert found["tasks"]["diff"]["accuracy"]["0.5"]["value"] == pytest.approx(4 / 6)
    assert found["tasks"]["group_grounding"]["unreadable"] == {"no_response": 1}
    assert "14 rows have no response and count as wrong" in found["notes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compat", "guess"], "known there: migician-stretch, univg-first-box"),
        (["--grid", "pixels"], "set --images-root"),
        (["--version", "newest"], "version must be 'original' or 'revised'"),
        (["--model", "no/such/folder"], "no such model folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(score: Run, words: list[str], message: str) -> None:
    code, _, errors = score(*words)
    assert code == 2
    assert message in errors


def test_an_option_that_the_benchmark_has_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--annotation", str(tmp_path), "--predictions", str(tmp_path), "--grid", "unit"]
    assert main(["score", "blink", *files, "--version", "val"]) == 2
    assert "blink has no --version" in capsys.readouterr().err


def test_an_empty_folder_of_predictions_is_refused(score: Run, tmp_path: Path) -> None:
    code, _, errors = score(predictions=tmp_path)
    assert code == 2
    assert "holds no .jsonl file" in errors


def test_circular_answers_are_scored_by_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"task": "count", "question": "How many?", "options": "A: one\nB: two", "context": "", "output": "B"}
    annotation = tmp_path / "mmiu.json"
    annotation.write_text(json.dumps([{**row, "input_image_path": [f"{n}.jpg"]} for n in range(2)]), encoding="utf-8")
    letters = {"mmiu/count/0": "B", "mmiu/count/0~1": "A", "mmiu/count/1": "B", "mmiu/count/1~1": "B"}
    rows = [{"example": key, "completion": {"text": f"<answer>{letter}</answer>"}} for key, letter in letters.items()]
    predictions = write(tmp_path / "answers.jsonl", rows)
    words = ["--annotation", annotation, "--predictions", predictions, "--grid", "per_mille", "--json", tmp_path / "out.json"]
    assert main(["score", "mmiu", *map(str, words)]) == 0
    assert "accuracy, mean over tasks: 50.00" in capsys.readouterr().out
    assert read_json(tmp_path / "out.json")["micro"]["examples"] == 2


def test_options_of_the_reader_are_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "How many?", "options": "A: one\nB: two", "context": "", "output": "B", "input_image_path": ["a.jpg"]}
    annotation = tmp_path / "mmiu.json"
    annotation.write_text(json.dumps([{**row, "task": "count"}, {**row, "task": "order"}]), encoding="utf-8")
    predictions = write(tmp_path / "answers.jsonl", [{"index": 0, "task": "order", "response": "B"}])
    words = ["--annotation", annotation, "--predictions", predictions, "--grid", "per_mille"]
    assert main(["score", "mmiu", *map(str, words), "--option", "tasks=[order]"]) == 0
    assert "headline  accuracy, mean over tasks: 100.00" in capsys.readouterr().out


LIGHT = """
import sys
from polyground.cli import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "datasets", "pycocotools"} & set(sys.modules))
sys.exit(f"imported {heavy}" if heavy else code)
"""


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    shutil.copytree(SMALL, tmp_path / "small")
    words = ["--annotation", "small/annotation.json", "--predictions", "small/responses", "--grid", "per_mille"]
    found = subprocess.run(
        [sys.executable, "-c", LIGHT, "score", "mig_bench", *words, "--native", "qwen_tokens"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "62.37" in found.stdout
