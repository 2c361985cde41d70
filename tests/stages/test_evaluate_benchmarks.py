"""Splits that are files of a public benchmark: its rule, its rows, its tags, asked in the way the recipe names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from polyground.config import Recipe, load_recipe
from polyground.errors import ConfigError, DataError
from polyground.records import Completion, Rollout, Score
from polyground.stages import evaluate, report
from polyground.stages.evaluate import read_rollouts, tabulate
from polyground.storage import atomic_write_json, read_json

RIGHT, HALF, INVERTED = [100, 100, 300, 300], [100, 100, 300, 200], [300, 300, 100, 100]


@pytest.fixture
def recipe_file(toy: Path, tmp_path: Path) -> Path:
    """A recipe whose test split is a MIG-Bench file of four rows (one inverted, one twice), and whose perception is MMIU."""
    for name in "abc":
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    known = {"images": ["a.png", "b.png"], "additional_info": "", "need_format": True}
    question = "Where does the 2th image differ?"
    rows = [{"task": "diff", "question": question, "answer": answer, **known} for answer in (RIGHT, RIGHT, INVERTED)]
    rows.append({"task": "reasoning", "question": question, "answer": RIGHT, **known})
    (tmp_path / "mig.json").write_text(json.dumps(rows), encoding="utf-8")
    choice = {"task": "count", "question": "How many?", "options": "A: one\nB: two", "context": "", "output": "B"}
    (tmp_path / "mmiu.json").write_text(json.dumps([{**choice, "input_image_path": ["c.png"]}]), encoding="utf-8")
    tree = {
        "out": str(tmp_path / "run"),
        "model": {"path": str(toy / "model")},
        "prompts": {"instruction": ""},
        "world": {"train": 0, "rl": 0, "validation": 0, "test": 0, "ood": 0, "perception": 0},
        "data": {
            "test": [{"source": "mig_bench", "path": str(tmp_path / "mig.json")}],
            "perception": [{"source": "mmiu", "path": str(tmp_path / "mmiu.json")}],
        },
        "evaluate": {"max_completion_length": 4, "batch_size": 2, "bootstrap": 0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def answer_by_hand(recipe: Recipe, split: str, texts: dict[str, str]) -> None:
    file = recipe.out / "evaluate" / "base" / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    unscored = Score(total=0, parts={}, iou=0)
    rows = [
        Rollout(example=key, task=key.split("/")[1], completion=Completion(text=text), score=unscored).to_json()
        for key, text in texts.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def boxed(*rows: tuple[int, list[int]]) -> str:
    return f"<answer>{json.dumps([{'image': image, 'bbox_2d': box} for image, box in rows])}</answer>"


ANSWERS = {
    "mig_bench/diff/0": boxed((2, RIGHT), (1, RIGHT), (1, HALF)),
    "mig_bench/diff/1": boxed((1, HALF)),
    "mig_bench/reasoning/0": '[{"bbox_2d": [100, 100, 300, 300]}]',
}


def test_a_benchmark_is_scored_by_its_rule_over_its_rows(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    answer_by_hand(recipe, "test", ANSWERS)
    table = tabulate(recipe, ["base"], ["test"])["splits"]["test"]
    base = table["models"]["base"]
    # The first box, image not asked: both diff answers are right, but a third row of diff is inverted.
    assert base["tasks"]["diff"]["accuracy"]["0.5"]["value"] == pytest.approx(2 / 3)
    assert base["headline"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert base["tasks"]["diff"]["measures"]["one_to_one"]["value"] == 0
    assert base["tasks"]["diff"]["image_accuracy"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    tags = table["benchmark"]
    assert (tags["benchmark"], tags["version"], tags["rows"], tags["published_rows"]) == ("mig_bench", "revised", 4, 4276)
    assert tags["wrong_by_annotation"] == {"inverted": 1}


def test_results_say_how_each_model_writes_boxes_and_was_asked(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["--evaluate.instruction", "direct"])
    answer_by_hand(recipe, "test", ANSWERS)
    tags = tabulate(recipe, ["base"], ["test"])["tags"]
    assert tags["models"]["base"] == {
        "model_type": "qwen3_vl",
        "grid": "0-1000",
        "native": "qwen_json",
        "max_pixels_total": None,
    }
    assert tags["instruction_set"] == {"name": "direct", "version": "1"}
    assert tags["decoding"] == {"temperature": 0.0, "max_completion_length": 4}


def test_a_quirk_needs_no_new_answers(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["--evaluate.compat", "univg-first-box"])
    answer_by_hand(recipe, "test", ANSWERS)
    base = tabulate(recipe, ["base"], ["test"])["splits"]["test"]["models"]["base"]
    assert base["headline"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert base["compat"]["value"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_quirk_that_no_split_knows_is_refused(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match="known there"):
        evaluate.run(load_recipe(recipe_file, ["--evaluate.compat", "guess"]))


def test_images_that_are_not_there_are_named_before_a_model_is_loaded(recipe_file: Path) -> None:
    (recipe_file.parent / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png"):
        evaluate.run(load_recipe(recipe_file))


def test_what_average_precision_needs_is_asked_for_before_a_model_is_loaded(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    images = [{"id": n, "file_name": f"{name}.png", "width": 64, "height": 64} for n, name in enumerate("ab")]
    tables = {"descriptions": [{"id": 0, "images_id": [0, 1], "text": "the cat"}], "images": images, "annotations": []}
    (recipe_file.parent / "mc.json").write_text(json.dumps(tables), encoding="utf-8")
    pairs = [{"source": "mc_bench", "path": str(recipe_file.parent / "mc.json")}]
    with pytest.raises(ConfigError, match="pycocotools"):
        evaluate.run(load_recipe(recipe_file, ["--data.ood", json.dumps(pairs)]))


@pytest.mark.parametrize(("letters", "right"), [({"": "B", "~1": "A"}, 1), ({"": "B", "~1": "B"}, 0)])
def test_a_circular_choice_is_right_when_every_turn_is(recipe_file: Path, letters: dict[str, str], right: int) -> None:
    recipe = load_recipe(recipe_file, ["--evaluate.circular", "true"])
    answers: dict[str, Any] = {f"mmiu/count/0{turn}": f"<answer>{letter}</answer>" for turn, letter in letters.items()}
    answer_by_hand(recipe, "perception_mmiu", answers)
    base = tabulate(recipe, ["base"], ["perception_mmiu"])["splits"]["perception_mmiu"]["models"]["base"]
    assert (base["headline"]["value"], base["micro"]["examples"]) == (right, 1)


def test_a_model_is_asked_every_row_that_can_be_asked(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["--evaluate.circular", "true", "--evaluate.instruction", "reasoned"])
    results = evaluate.run(recipe)
    base = recipe.out / "evaluate" / "base"
    assert [rollout.example for rollout in read_rollouts(base / "test.jsonl")] == list(ANSWERS)
    assert [rollout.example for rollout in read_rollouts(base / "perception_mmiu.jsonl")] == ["mmiu/count/0", "mmiu/count/0~1"]
    assert results["splits"]["test"]["models"]["base"]["micro"]["examples"] == 4
    assert read_json(base / "manifest.json")["config"]["evaluate"]["instruction"] == {"name": "reasoned", "version": "1"}


def test_the_report_reads_results_of_benchmarks(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    answer_by_hand(recipe, "test", ANSWERS)
    answer_by_hand(recipe, "perception_mmiu", {"mmiu/count/0": "<answer>B</answer>"})
    atomic_write_json(recipe.out / "evaluate" / "results.json", tabulate(recipe, ["base"], ["test", "perception_mmiu"]))
    page = report.run(recipe).read_text(encoding="utf-8")
    assert "reasoning" in page
    assert "83.3" in page or "0.833" in page
