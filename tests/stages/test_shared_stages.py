"""Runs that share stages, do only some of them, start RL elsewhere, or answer less: on the toy model."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyground.answer import reasoning_of
from polyground.cli import main
from polyground.config import Recipe, load_recipe
from polyground.errors import ConfigError, StorageError
from polyground.stages import evaluation_splits, model_identity, stage_folder
from polyground.stages.evaluate import present_roles
from polyground.stages.run import completed, plan
from polyground.storage import made_alike, read_json, read_manifest, take_over


def test_a_run_takes_over_what_another_has_made_alike(toy: Path, finished: Path, tmp_path: Path) -> None:
    again = ["run", str(toy / "recipe.yaml"), f"--reuse=[{finished}]", f"--out={tmp_path / 'again'}"]
    assert main([*again, "--stages=[world, synthesize, sft, merge]"]) == 0
    assert completed(tmp_path / "again") == {"world", "synthesize", "sft", "sft-merged"}
    for folder in completed(tmp_path / "again"):
        assert (tmp_path / "again" / folder / "manifest.json").samefile(finished / folder / "manifest.json")
    assert not (tmp_path / "again" / "report.html").exists()


def test_what_was_made_otherwise_is_not_taken_over(toy: Path, finished: Path, tmp_path: Path) -> None:
    words = [f"--reuse=[{finished}]", f"--out={tmp_path}"]
    recipe = load_recipe(toy / "recipe.yaml", words)
    config = dict(read_manifest(finished / "synthesize").config)
    assert made_alike(finished / "synthesize", stage="synthesize", config=config)
    assert not made_alike(finished / "synthesize", stage="sft", config=config)
    assert not made_alike(finished / "nothing", stage="synthesize", config=config)
    with stage_folder(recipe, "synthesize", "synthesize", {**config, "seed": 7}) as folder:
        assert not folder.complete
    (tmp_path / "synthesize" / "state.json").unlink()
    # What is there already, whole or not, is never replaced.
    with stage_folder(recipe, "synthesize", "synthesize", config) as folder:
        assert not folder.complete


def test_a_folder_is_taken_over_whole_and_by_links(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "a" / ".lock").touch()
    take_over(tmp_path / "a", tmp_path / "runs" / "b")
    assert (tmp_path / "runs" / "b" / "deep" / "rows.jsonl").samefile(tmp_path / "a" / "deep" / "rows.jsonl")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "runs" / "b").iterdir()] == ["deep"]
    with pytest.raises(StorageError):
        take_over(tmp_path / "a", tmp_path / "runs" / "b")


def test_rl_can_start_from_the_base_and_merges_into_it(toy: Path, finished: Path, tmp_path: Path) -> None:
    stages = "--stages=[world, reject, grpo, merge, evaluate]"
    words = ["--grpo.start=base", f"--reuse=[{finished}]", f"--out={tmp_path}", stages, "--evaluate.models=[rl]"]
    words += ["--evaluate.splits=[test]", "--grpo.max_steps=1"]
    recipe = load_recipe(toy / "recipe.yaml", words)
    planned = plan(recipe, "run")
    assert "grpo        1 steps" in planned
    assert "sft         " not in planned
    assert "RL model" in planned
    assert main(["run", str(toy / "recipe.yaml"), *words]) == 0
    assert completed(tmp_path) == {"world", "reject", "grpo", "grpo-merged", "evaluate/rl"}
    assert read_json(tmp_path / "grpo-merged" / "merged_from.json")["base"] == str(toy / "model")
    assert set(read_manifest(tmp_path / "grpo").config["inputs"]) == {"reject"}
    outcomes = read_json(tmp_path / "evaluate" / "outcomes.json")
    assert {split: list(found) for split, found in outcomes["splits"].items()} == {"test": ["rl"]}


def test_without_reasoning_the_answer_alone_is_taught(toy: Path, tmp_path: Path) -> None:
    from polyground.answer import answers_directly
    from polyground.models import load_model
    from polyground.stages.sft import _lesson
    from polyground.storage import read_rows

    recipe = load_recipe(toy / "recipe.yaml", [f"--out={tmp_path}"])
    assert main(["world", str(toy / "recipe.yaml"), f"--out={tmp_path}"]) == 0
    assert main(["synthesize", str(toy / "recipe.yaml"), f"--out={tmp_path}"]) == 0
    row = next(read_rows(tmp_path / "synthesize" / "kept.jsonl"))
    family = load_model(toy / "model").family
    taught = [
        _lesson(row, family, recipe.prompts.model_copy(update={"reasoning": wanted})).completion for wanted in (True, False)
    ]
    assert reasoning_of(taught[0]) == row["reasoning"]
    assert answers_directly(taught[1])
    assert taught[0].endswith(taught[1])


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        pytest.param("null", ["test", "ood_pairs", "ood_more", "ood_phrasing", "ood_clutter"], id="all-tests"),
        pytest.param("[validation]", ["validation"], id="no-test-at-all"),
        pytest.param("[ood_more, test]", ["ood_more", "test"], id="single-ones"),
        pytest.param("[ood, ood_more]", ["ood_pairs", "ood_more", "ood_phrasing", "ood_clutter"], id="each-once"),
    ],
)
def test_an_evaluation_can_leave_tests_out(toy: Path, chosen: str, names: list[str]) -> None:
    recipe = load_recipe(toy / "recipe.yaml", [f"--evaluate.splits={chosen}", "--world.validation=3"])
    assert evaluation_splits(recipe) == names


def test_a_split_that_is_not_there_cannot_be_chosen(toy: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'perception'"):
        evaluation_splits(load_recipe(toy / "recipe.yaml", ["--evaluate.splits=[test, perception]"]))


def test_a_model_that_is_wanted_and_not_there_is_asked_for_by_its_stage(toy: Path, tmp_path: Path) -> None:
    wanted = load_recipe(toy / "recipe.yaml", [f"--out={tmp_path}", "--evaluate.models=[rl]"])
    with pytest.raises(StorageError, match="polyground merge"):
        present_roles(wanted)


def test_every_question_of_every_model_is_told_right_or_wrong(finished: Path) -> None:
    told = read_json(finished / "evaluate" / "outcomes.json")
    results = read_json(finished / "evaluate" / "results.json")
    assert told["iou"] == 0.5
    for split in ("test", "ood_more"):
        for role in ("base", "sft", "rl"):
            tasks = told["splits"][split][role]
            table = results["splits"][split]["models"][role]
            assert {task: len(found) for task, found in tasks.items()} == {
                task: row["examples"] for task, row in table["tasks"].items()
            }
            means = [sum(found.values()) / len(found) for found in tasks.values()]
            assert sum(means) / len(means) == pytest.approx(table["macro"]["accuracy"]["0.5"]["value"])


def test_the_shipped_model_is_told_by_its_weights_and_any_other_by_its_folder(toy: Path) -> None:
    import hashlib

    from polyground.conventions import model_folder

    shipped = model_identity(Recipe())
    [weights] = model_folder("tiny").glob("*.safetensors")
    assert shipped == {**Recipe().model.to_json(), "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    recipe = load_recipe(toy / "recipe.yaml")
    assert model_identity(recipe) == recipe.model.to_json()


def test_rl_may_be_rewarded_for_something_else_than_the_rest_is_scored_by(toy: Path) -> None:
    words = ["--grpo.rewards=[{name: iou}]", "--stages=[grpo]"]
    recipe = load_recipe(toy / "recipe.yaml", words)
    assert [reward.name for reward in recipe.grpo.rewards or ()] == ["iou"]
    assert len(recipe.rewards) == 2
    with pytest.raises(ConfigError, match="weight above 0"):
        load_recipe(toy / "recipe.yaml", ["--grpo.rewards=[{name: iou, weight: 0}]"])
