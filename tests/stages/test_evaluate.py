"""What evaluation leaves: raw responses, tables made of them alone, and tags that say what was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from polyground.config import load_recipe
from polyground.errors import StorageError
from polyground.metrics import paired_difference, summarize
from polyground.stages import evaluate
from polyground.stages.evaluate import read_rollouts, tabulate
from polyground.storage import read_json

OOD = ["ood_pairs", "ood_more", "ood_phrasing", "ood_clutter"]


def test_three_models_answer_every_split_and_each_pair_is_compared(finished: Path) -> None:
    results = read_json(finished / "evaluate" / "results.json")
    assert results["models"] == ["base", "sft", "rl"]
    assert list(results["splits"]) == ["test", *OOD, "ood (all)"]
    for table in results["splits"].values():
        assert set(table["models"]) == {"base", "sft", "rl"}
        assert set(table["differences"]) == {"sft-base", "rl-sft", "rl-base"}


def test_the_tables_are_those_of_the_raw_responses(finished: Path) -> None:
    found = read_json(finished / "evaluate" / "results.json")["splits"]["test"]
    answers = {role: read_rollouts(finished / "evaluate" / role / "test.jsonl") for role in ("base", "sft", "rl")}
    assert found["models"]["sft"] == summarize(answers["sft"], bootstrap=20).to_json()
    assert found["differences"]["rl-sft"] == paired_difference(answers["sft"], answers["rl"], bootstrap=20).to_json()


def test_a_pool_counts_each_of_its_splits_as_one_task(finished: Path) -> None:
    pooled = read_json(finished / "evaluate" / "results.json")["splits"]["ood (all)"]
    assert pooled["pooled"] == OOD
    assert sorted(pooled["models"]["base"]["tasks"]) == sorted(OOD)


def test_the_tags_say_what_decides_the_numbers(finished: Path) -> None:
    tags = read_json(finished / "evaluate" / "results.json")["tags"]
    assert tags["decoding"] == {"temperature": 0.0, "max_completion_length": 8}
    assert tags["benchmarks"]["test"]["questions"] == {"test": 4}
    assert {"convention", "prompt_version", "seed", "headline_iou"} <= tags.keys()


def test_more_resamples_need_no_new_answers(toy: Path, finished: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["--evaluate.bootstrap", "5"])
    before = (finished / "evaluate" / "sft" / "test.jsonl").stat().st_mtime_ns
    results = tabulate(recipe, ["base", "sft", "rl"], ["test"])
    assert results["splits"]["test"]["models"]["sft"]["bootstrap"] == 5
    assert (finished / "evaluate" / "sft" / "test.jsonl").stat().st_mtime_ns == before


def test_models_that_are_not_made_yet_are_left_out(toy: Path, tmp_path: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml", ["--out", str(tmp_path)])
    assert evaluate.present_roles(recipe) == ["base"]


def test_a_damaged_model_is_not_taken_for_one_that_is_not_made_yet(toy: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "sft-merged", tmp_path / "sft-merged")
    with (tmp_path / "sft-merged" / "model.safetensors").open("ab") as file:
        file.truncate(100)
    with pytest.raises(StorageError, match="has 100 bytes"):
        evaluate.present_roles(load_recipe(toy / "recipe.yaml", ["--out", str(tmp_path)]))


@pytest.mark.parametrize("role", ["base", "sft", "rl"])
def test_an_answer_is_one_line_with_text_and_score(finished: Path, role: str) -> None:
    for rollout in read_rollouts(finished / "evaluate" / role / "test.jsonl"):
        assert rollout.completion.text
        assert rollout.sample == 0
        assert set(rollout.score.parts) == {"iou", f"{finished.parent / 'variety.py'}:variety"}
