"""What a person at a terminal meets: help, one clear line for every mistake, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import polyground.stages.world
from polyground.cli import main
from polyground.config import GrpoConfig, Recipe

SMOKE = Path(__file__).parents[1] / "recipes" / "smoke.yaml"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    verbs = ("world", "synthesize", "sft", "merge", "reject", "grpo", "evaluate", "report", "run", "pretrain", "ground")
    assert all(f"  {verb}" in shown for verb in verbs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["syntesize", "x.yaml"], "did you mean 'synthesize'", id="misspelt-verb"),
        pytest.param(["grpo"], "needs a recipe", id="no-recipe"),
        pytest.param(["grpo", "nowhere.yaml"], "nowhere.yaml", id="no-such-recipe"),
        pytest.param(["grpo", str(SMOKE), "--learning_rat", "1e-4"], "learning_rate", id="misspelt-key"),
        pytest.param(["grpo", str(SMOKE), "--learning_rate"], "no value", id="no-value"),
        pytest.param(["grpo", str(SMOKE.with_name("smok.yml"))], "did you mean", id="misspelt-recipe"),
        pytest.param(["init", "--grid", "per_mile"], "did you mean 'per_mille'?); see `polyground init --help`", id="no-choice"),
        pytest.param(["doctor", "--lihgt"], "did you mean '--light'?", id="misspelt-flag"),
        pytest.param(["export", "runs/x", "--to"], "expected one argument", id="flag-without-a-value"),
        pytest.param(["completion", "fsh"], "did you mean 'fish'?", id="misspelt-shell"),
        pytest.param(["ground", "--model", "nowhere", "nowhere.png", "-q", "where?"], "nowhere.png", id="no-such-image"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("polyground: ")
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("  more: ")


def test_the_help_of_a_verb_has_a_line_per_key_and_explains_one_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    keys = [line for line in shown if line.startswith("  --")]
    assert len(keys) == len(GrpoConfig.model_fields)
    assert len(shown) <= len(keys) + 8
    assert max(map(len, shown)) <= 132
    assert main(["grpo", "--help", "beta"]) == 0
    one = capsys.readouterr().out
    assert "0 needs no reference forward" in one
    assert "--epsilon" not in one


def test_a_stage_without_its_input_names_the_verb_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reject", str(SMOKE), "--out", str(tmp_path)]) == 2
    assert "run `polyground" in capsys.readouterr().err


def test_an_interruption_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(polyground.stages.world, "run", interrupted)
    assert main(["world", str(SMOKE)]) == 130
    assert "run the same command again to continue" in capsys.readouterr().err


def test_a_dry_run_shows_values_inputs_and_work_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trial"
    assert main(["grpo", str(SMOKE), "--out", str(out), "--learning_rate", "2e-4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 0.0002" in shown
    assert f"missing  {out / 'reject'}" in shown
    assert "3 steps of 2 groups x 2 completions" in shown
    assert not out.exists()


def test_the_help_of_a_verb_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reject", "--help"]) == 0
    assert "--num_generations  (default 8)" in capsys.readouterr().out


def test_the_command_line_imports_no_torch() -> None:
    code = (
        "import sys; from polyground.cli import main; main(['grpo', sys.argv[1], '--dry-run']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(SMOKE)], check=True, capture_output=True)
