"""Facts about `--dry-run`: steps, rollouts and answers are counted as the trainers count them, and memory is estimated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from polyground.cli import main
from polyground.config import GrpoConfig, SftConfig
from polyground.stages.run import grpo_steps, sft_steps

WORLD = {"train": 30, "rl": 20, "validation": 0, "test": 6, "ood": 2, "perception": 1}


def write_recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "run"), "world": WORLD, **sections}))
    return path


def plan_of(recipe: Path, capsys: pytest.CaptureFixture[str], verb: str = "run", *options: str) -> dict[str, str]:
    """The blocks of a plan by their titles."""
    assert main([verb, str(recipe), "--dry-run", *options]) == 0
    shown = capsys.readouterr().out
    blocks = [block.partition("\n") for block in shown.split("\n\n") if block.startswith("# ")]
    return {title.split()[1]: text for title, _, text in blocks}


def line_of(block: str, stage: str) -> str:
    return next(line for line in block.splitlines() if line.startswith(stage)).removeprefix(stage).strip()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1500])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"num_train_epochs": 2.5, "gradient_accumulation_steps": 3}, id="accumulated"),
        pytest.param({"max_steps": 11}, id="set"),
    ],
)
def test_sft_steps_are_those_of_the_trainer(rows: int, config: dict[str, Any]) -> None:
    from polyground.training import sft

    assert sft_steps(rows, SftConfig(**config)) == sft.sft_steps(rows, SftConfig(**config))


@pytest.mark.parametrize("questions", [1, 7, 8, 9, 400])
@pytest.mark.parametrize(
    "config", [{}, {"max_steps": -1}, {"max_steps": -1, "num_iterations": 2, "gradient_accumulation_steps": 2}]
)
def test_grpo_steps_are_those_of_the_trainer(questions: int, config: dict[str, Any]) -> None:
    from polyground.training import schedule

    found = GrpoConfig(**config)
    per_step = found.per_device_train_batch_size * found.gradient_accumulation_steps
    assert grpo_steps(questions, found) == schedule.grpo_steps(questions, found, per_step=per_step)


def test_every_stage_says_how_much_it_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(
        tmp_path,
        sft={"num_train_epochs": 2, "per_device_train_batch_size": 8},
        reject={"limit": 10, "num_generations": 4, "max_completion_length": 64},
        grpo={"max_steps": 5, "per_device_train_batch_size": 2, "num_generations": 4, "max_completion_length": 64},
        evaluate={"limit_per_split": 3, "max_completion_length": 32},
    )
    work = plan_of(recipe, capsys)["work"]
    assert line_of(work, "synthesize") == "30 questions x 1 = 30 completions of the scripted teacher"
    assert line_of(work, "sft") == "at most 8 steps of 8 rows: 30 rows x 2 passes, fewer as synthesis drops rows"
    assert line_of(work, "reject") == "10 questions x 4 = 40 completions of up to 64 tokens"
    assert line_of(work, "grpo") == (
        "5 steps of 2 groups x 4 completions: 40 of up to 64 tokens, 1 passes over at most 10 kept questions"
    )
    # test 3 of 6, four out-of-domain splits of 2, two perception sets of 1.
    assert line_of(work, "evaluate").startswith(
        "base, SFT and RL model, as far as they exist: 13 answers each, 39 together, of up to 32"
    )


def test_own_data_are_counted_where_they_lie_and_not_guessed_where_they_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"task": "diff", "images": ["a.png"], "answer": [0.1, 0.2, 0.3, 0.4]}
    rows = [{**row, "question": f"Find object {n} in image-1."} for n in range(12)]
    (tmp_path / "MIG_data.json").write_text(json.dumps(rows))
    there = {"source": "mig_bench", "path": str(tmp_path / "MIG_data.json")}
    later = {"source": "mig_bench", "path": str(tmp_path / "later.json")}
    none = dict.fromkeys(WORLD, 0)

    recipe = write_recipe(tmp_path, world=none, data={"train": [there], "rl": [there], "test": [there]})
    plan = plan_of(recipe, capsys)
    assert line_of(plan["work"], "synthesize").startswith("12 questions x 1 = 12 completions")
    assert "prompt: the longest of the first 12 rows of train" in plan["memory"]

    recipe = write_recipe(
        tmp_path, world=none, data={"train": [later], "rl": [later], "test": [there, later]}, grpo={"max_steps": -1}
    )
    plan = plan_of(recipe, capsys)
    assert line_of(plan["work"], "sft") == "(kept rows x 1 / 4) steps; the rows are known after synthesis"
    assert line_of(plan["work"], "grpo") == "(kept questions / 4) steps of 4 groups x 8 completions"
    assert line_of(plan["work"], "evaluate").endswith("as many as there are questions, not counted yet for test")
    assert "prompt: ASSUMED, as train is not there yet: 4 images of 1024 x 768 pixels" in plan["memory"]
    plan = plan_of(recipe, capsys, "evaluate", "--limit_per_split", "5")
    assert "up to 5 answers each, 15 together, of up to 128 tokens (test 5)" in line_of(plan["work"], "evaluate")


def test_a_stage_that_is_complete_gives_its_own_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, sft={"per_device_train_batch_size": 4})
    assert main(["world", str(recipe)]) == 0
    assert main(["synthesize", str(recipe)]) == 0
    kept = sum(1 for _ in (tmp_path / "run" / "synthesize" / "kept.jsonl").open())
    plan = plan_of(recipe, capsys, "sft")
    assert line_of(plan["work"], "sft") == f"{-(-kept // 4)} steps of 4 rows: {kept} rows x 1 passes"
    assert "prompt: the longest of the first 30 rows of train" in plan["memory"]


def test_a_model_that_is_not_downloaded_is_told_how_its_memory_would_be_estimated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model={"path": str(tmp_path / "later")})
    plan = plan_of(recipe, capsys, "grpo")
    assert plan["memory"].startswith(f"not estimated: {tmp_path / 'later'} is not there yet.")
    assert "headers of its safetensors files" in plan["memory"]


def test_memory_is_shown_for_the_stages_that_train_and_for_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert "memory" not in plan_of(recipe, capsys, "evaluate")
    assert "grpo: about" not in plan_of(recipe, capsys, "sft")["memory"]
    both = plan_of(recipe, capsys, "run")["memory"]
    assert both.startswith("tiny: 7,121,024 parameters, by the headers of its weights")
    assert "sft: about" in both
    assert "grpo: about" in both
