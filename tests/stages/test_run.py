"""The whole figure on a toy model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polyground.cli import main
from polyground.stages.run import completed, same_letters
from polyground.storage import read_json

FOLDERS = {
    "world",
    "synthesize",
    "sft",
    "sft-merged",
    "reject",
    "grpo",
    "grpo-merged",
    "evaluate/base",
    "evaluate/sft",
    "evaluate/rl",
}


def test_every_stage_leaves_a_complete_folder_and_a_report(finished: Path) -> None:
    assert completed(finished) == FOLDERS
    assert (finished / "report.html").stat().st_size > 10_000


def test_the_summary_tells_of_a_model_that_says_one_letter_whatever_is_asked() -> None:
    models = {"base": {"macro": {"examples": 20, "letters": {"C": 0.95, "A": 0.05}}}}
    models["rl"] = {"macro": {"examples": 20, "letters": {"A": 0.6, "B": 0.4}}}
    results = {"splits": {"perception_blink": {"models": models}, "perception (all)": {"models": models}, "test": {"models": {}}}}
    [line] = same_letters(results)
    assert line.startswith("perception_blink: base answers C to nearly every question")


@pytest.mark.parametrize("model_type", ["qwen3_5", "internvl", "smolvlm"])
def test_a_model_of_another_family_goes_through_every_stage(toy_run: Callable[[str], Path], model_type: str) -> None:
    assert completed(toy_run(model_type)) == FOLDERS


def test_time_and_memory_of_every_stage_are_kept(finished: Path) -> None:
    rows = read_json(finished / "times.json")
    assert [name.split()[1] for name in rows] == [
        "world", "synthesize", "sft", "merge", "reject", "grpo", "merge", "evaluate", "report",
    ]  # fmt: skip
    assert all(row["peak_bytes"] > 2**20 for row in rows.values())


def test_a_complete_run_is_not_done_again(toy: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("**/*.safetensors")}
    assert main(["run", str(toy / "recipe.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("**/*.safetensors")} == before
    shown = capsys.readouterr()
    assert shown.err.count("nothing left to do") == 8  # the report is written anew
    assert "accuracy at IoU 0.5" in shown.out
    assert "report:" in shown.out


def test_a_changed_recipe_is_refused_by_the_key_that_changed(
    toy: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(toy / "recipe.yaml"), "--sft.learning_rate", "5e-4"]) == 2
    assert "sft.learning_rate" in capsys.readouterr().err
