"""A study: what its runs are, that it goes on where it stopped, and figures that can be checked by eye."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyground.cli import main
from polyground.config import load_recipe
from polyground.errors import ConfigError, DataError, StorageError
from polyground.stages import results
from polyground.stages.results.running import INTERRUPTED, agree, commit, last_words, launch_run, machine, runs_of
from polyground.stages.results.study import Study, load_study, recipe_of
from polyground.stages.results.tables import gather, headlines, written
from polyground.storage import atomic_write_json, read_json

RECIPES = Path(__file__).parents[2] / "recipes"

FULL = {"name": "full", "shows": "All of it."}
CHARGED = {"name": "charged", "shows": "Does the charge help?", "overrides": {"grpo.beta": 0.04}}


def write_study(folder: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text("name: base\ngrpo: {beta: 0.0}\n", encoding="utf-8")
    tree = {
        "name": "mine",
        "recipe": "base.yaml",
        "out": str(folder / "runs"),
        "docs": str(folder / "docs"),
        "seeds": [0, 1],
        "bootstrap": 100,
        "arms": [FULL, CHARGED],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(write_study(tmp_path))


# ---- the file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"sedes": [0]}, ["study.yaml", "sedes", "did you mean seeds"], id="unknown-key"),
        pytest.param({"seeds": [0, 0]}, ["study.yaml", "seeds", "different seeds"], id="seed-twice"),
        pytest.param({"arms": [FULL, FULL]}, ["study.yaml", "repeated: full"], id="arm-twice"),
        pytest.param({"baseline": "none"}, ["study.yaml", "none of the arms"], id="no-baseline"),
        pytest.param({"recipe": "other.yaml"}, ["other.yaml", "no such recipe"], id="no-recipe"),
        pytest.param(
            {"arms": [FULL, {**CHARGED, "overrides": {"grpo.betta": 1}}]},
            ["study.yaml", "'charged'", "grpo.betta", "did you mean grpo.beta"],
            id="override-of-an-unknown-key",
        ),
        pytest.param(
            {"arms": [FULL, {**CHARGED, "overrides": {"grpo": {"beta": -1}}}]},
            ["study.yaml", "'charged'", "grpo.beta = -1"],
            id="override-out-of-range",
        ),
        pytest.param({"overrides": {"worlds.test": 3}}, ["study.yaml", "'full'", "worlds"], id="override-for-all"),
        pytest.param({"overrides": {"seed": 3}}, ["study.yaml", "seed is set by the study itself"], id="the-study-s-own-key"),
        pytest.param({"extends": "study.yaml"}, ["study.yaml", "extends"], id="extends-itself"),
        pytest.param({"arms": [{**FULL, "name": "../up"}]}, ["study.yaml", "arms.0.name"], id="a-name-that-is-a-path"),
    ],
)
def test_a_bad_study_is_refused_by_file_arm_and_key(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_study(write_study(tmp_path, **changes))
    assert [word for word in words if word not in str(refused.value)] == []


def test_an_arm_is_the_recipe_with_the_study_s_changes_and_then_its_own(tmp_path: Path) -> None:
    changed = {"grpo": {"beta": 0.5, "max_steps": 7}, "world.test": 9}
    study = load_study(write_study(tmp_path, overrides=changed))
    full, charged = (recipe_of(study, arm, 1) for arm in study.arms)
    assert (full.grpo.beta, full.grpo.max_steps, full.world.test, full.seed) == (0.5, 7, 9, 1)
    assert (charged.grpo.beta, charged.grpo.max_steps, charged.world.test, charged.seed) == (0.04, 7, 9, 1)
    assert full.world.seed == charged.world.seed == recipe_of(study, study.arms[0], 0).world.seed


def test_an_arm_takes_over_from_the_baseline_and_answers_with_the_model_that_is_compared(study: Study) -> None:
    full, charged = study.arms
    runs = study.out / "full"
    assert recipe_of(study, full, 0).reuse == []
    assert recipe_of(study, full, 1).reuse == [runs / "seed-0"]
    assert recipe_of(study, charged, 1).reuse == [runs / "seed-1", runs / "seed-0"]
    assert recipe_of(study, full, 0).evaluate.models is None
    assert recipe_of(study, charged, 0).evaluate.models == ["rl"]


def test_a_study_that_extends_another_has_the_arms_of_both_and_shares_its_runs(tmp_path: Path) -> None:
    write_study(tmp_path, arms=[FULL], targets=[{"headline": "test", "difference": "rl-sft", "points": 1}])
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"extends": "study.yaml", "name": "more", "targets": [], "arms": [CHARGED]}), encoding="utf-8")
    study, ground = load_study(more), load_study(tmp_path / "study.yaml")
    assert ([arm.name for arm in study.arms], study.targets) == (["full", "charged"], [])
    assert [run.settings for run in runs_of(study, only=["full"])] == [run.settings for run in runs_of(ground)]
    assert [run.folder for run in runs_of(study, only=["full"])] == [run.folder for run in runs_of(ground)]


def test_the_baseline_goes_first_under_every_seed(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, arms=[{**CHARGED, "seeds": [1]}, FULL]))
    assert [(arm.name, seed) for arm, seed in study.runs()] == [("full", 0), ("full", 1), ("charged", 1)]


@pytest.mark.parametrize("name", ["results", "ablations", "rollouts"])
def test_the_studies_that_come_with_the_project_hold_good_recipes(name: str) -> None:
    study = load_study(RECIPES / f"{name}.yaml")
    assert study.name == name
    recipes = {arm.name: recipe_of(study, arm, 0) for arm in study.arms}
    tests = recipes["full"].world
    assert tests.test >= 1000
    assert 4 * tests.ood >= 1000
    # The same questions to be answered by every arm; and the same completions a step, whatever the size of a group.
    asked = {"seed", "validation", "test", "ood", "perception"}
    assert all(recipe.world.model_dump(include=asked) == tests.model_dump(include=asked) for recipe in recipes.values())
    assert len({recipe.grpo.num_generations * recipe.grpo.per_device_train_batch_size for recipe in recipes.values()}) == 1


# ---- the runs

Told = Mapping[str, list[int]]
"""By model, which of the questions were right."""


def outcome_file(folder: Path, splits: Mapping[str, Told]) -> None:
    """What an evaluation leaves: half of the questions are of the task `find`, half of `track`."""

    def by_task(right: list[int]) -> dict[str, dict[str, float]]:
        half = len(right) // 2
        return {
            "find": {f"q{n}": float(value) for n, value in enumerate(right[:half])},
            "track": {f"q{n}": float(value) for n, value in enumerate(right[half:])},
        }

    told = {split: {role: by_task(right) for role, right in models.items()} for split, models in splits.items()}
    atomic_write_json(folder / "evaluate" / "outcomes.json", {"iou": 0.5, "splits": told})


TEST: Mapping[str, Mapping[int, Told]] = {
    "full": {
        0: {"base": [0, 0, 0, 0], "sft": [1, 0, 0, 0], "rl": [1, 1, 1, 0]},
        1: {"base": [0, 0, 0, 0], "sft": [1, 0, 0, 0], "rl": [1, 1, 1, 1]},
    },
    "charged": {0: {"rl": [1, 1, 0, 0]}, 1: {"rl": [1, 1, 0, 0]}},
}
"""By arm and seed, on the test split."""


class Launched:
    """Stands in for the process of a run: leaves its outcomes and its hours, or ends with the code it is told to."""

    def __init__(self, codes: Mapping[str, int] | None = None) -> None:
        self.codes = dict(codes or {})
        self.names: list[str] = []

    def __call__(self, recipe: Path, log: Path) -> int:
        folder = recipe.parent
        arm, seed = folder.parent.name, int(folder.name.removeprefix("seed-"))
        self.names.append(f"{arm} {seed}")
        log.write_text("working\npolyground: the disk is full\n\n", encoding="utf-8")
        code = self.codes.get(f"{arm} {seed}", 0)
        if code == 0:
            outcome_file(folder, {"test": TEST[arm][seed]})
            atomic_write_json(folder / "times.json", {"1 world": {"seconds": 3600 * (seed + 1), "peak_bytes": 1}})
        return code


def options(path: Path, *words: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    results.arguments(parser)
    return parser.parse_args([str(path), *words])


def test_what_is_finished_is_passed_over_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    first = Launched({"charged 0": 2})
    with pytest.raises(StorageError) as refused:
        results.run(options(path), launch=first)
    assert first.names == ["full 0", "charged 0", "full 1", "charged 1"]
    for word in ("1 of 4 runs failed", "charged seed 0", "code 2", "the disk is full", "run.log"):
        assert word in str(refused.value)
    second = Launched()
    results.run(options(path), launch=second)
    assert second.names == ["charged 0"]
    results.run(options(path), launch=second)
    assert second.names == ["charged 0"]


def test_an_interrupted_study_goes_on_where_it_stopped_and_its_tables_hold_what_is_finished(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        results.run(options(path), launch=Launched({"full 1": INTERRUPTED}))
    told = read_json(tmp_path / "docs" / "mine.json")
    assert (told["arms"]["full"]["seeds"], told["arms"]["full"]["seeds_missing"]) == ([0], [1])
    after = Launched()
    results.run(options(path), launch=after)
    assert after.names == ["full 1", "charged 1"]


def test_a_changed_recipe_is_not_finished_but_another_heading_is_the_same_run(tmp_path: Path) -> None:
    path = write_study(tmp_path, arms=[FULL])
    results.run(options(path), launch=Launched())
    renamed, changed = Launched(), Launched()
    results.run(options(write_study(tmp_path, arms=[FULL], overrides={"report.title": "new"}, name="other")), launch=renamed)
    results.run(options(write_study(tmp_path, arms=[FULL], overrides={"grpo.max_steps": 1})), launch=changed)
    assert (renamed.names, changed.names) == ([], ["full 0", "full 1"])


@pytest.mark.parametrize(
    ("before", "same"),
    [
        pytest.param({"grpo": {"beta": 0.0, "max_steps": 200}, "seed": 0}, True, id="alike"),
        pytest.param({"grpo": {"beta": 0.0}, "seed": 0}, True, id="a-knob-that-came-since-at-its-default"),
        pytest.param({"grpo": {"max_steps": 200}, "seed": 0}, False, id="a-knob-that-came-since-and-is-set"),
        pytest.param({"grpo": {"beta": 0.0, "max_steps": 80}, "seed": 0}, False, id="another-value"),
        pytest.param({"grpo": {"beta": 0.0, "max_steps": 200}, "seed": 0, "gone": 1}, True, id="a-knob-that-is-gone"),
    ],
)
def test_a_finished_run_stays_finished_when_the_program_learns_a_knob(before: dict[str, Any], same: bool) -> None:
    default = {"grpo": {"beta": 0.04, "max_steps": 200}, "seed": 0}
    assert agree(before, {"grpo": {"beta": 0.0, "max_steps": 200}, "seed": 0}, default) is same


def test_only_some_arms_and_seeds_are_run_on_demand(tmp_path: Path) -> None:
    launched = Launched()
    results.run(options(write_study(tmp_path), "--only", "full", "--seeds", "1"), launch=launched)
    assert launched.names == ["full 1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["--only", "fool"], "its arms: full, charged", id="arm"),
        pytest.param(["--seeds", "7"], "has the seeds 0, 1", id="seed"),
    ],
)
def test_what_the_study_does_not_have_cannot_be_run(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        results.run(options(write_study(tmp_path), *words), launch=Launched())


def test_a_dry_run_says_how_long_it_takes_by_what_is_finished(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    before = results.run(options(path, "--dry-run"))
    assert "0 of 4 runs are finished; 4 to do\n" in before
    assert not (tmp_path / "runs").exists()
    results.run(options(path, "--only", "full", "--seeds", "0"), launch=Launched())
    # One hour by the same arm, and as the baseline's for what has not run yet.
    assert "1 of 4 runs are finished; 3 to do, about 3.0 hours" in results.run(options(path, "--dry-run"))


def test_tables_alone_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    assert main(["results", str(path), "--tables-only"]) == 0
    assert not (tmp_path / "runs").exists()
    assert "Nothing is finished yet." in (tmp_path / "docs" / "mine.md").read_text(encoding="utf-8")
    assert "mine.json" in capsys.readouterr().out


def test_a_run_is_a_process_of_its_own_whose_words_are_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("grpo: {betta: 1}\n", encoding="utf-8")
    assert launch_run(recipe, tmp_path / "run.log") == 2
    assert "did you mean grpo.beta" in last_words(tmp_path / "run.log")


def test_the_machine_is_told_in_words_and_not_by_name() -> None:
    import platform

    assert "GiB" in machine()
    assert platform.node() not in machine() or not platform.node()
    assert commit() is None or len(commit() or "") in (12, 13)


# ---- the figures


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The figures of the finished study, with changes to its file."""

    def tell(**changes: Any) -> dict[str, Any]:
        path = write_study(tmp_path, **changes)
        results.run(options(path), launch=Launched())
        return gather(load_study(path), command="the command")

    return tell


def test_means_are_over_tasks_and_then_seeds_and_differences_are_paired(told: Callable[..., dict[str, Any]]) -> None:
    split = told()["arms"]["full"]["splits"]["test"]
    rl = split["models"]["rl"]
    assert split["questions"] == 4
    assert rl["macro"]["seeds"] == [0.75, 1.0]
    assert (rl["macro"]["value"], rl["macro"]["min"], rl["macro"]["max"]) == (0.875, 0.75, 1.0)
    assert rl["macro"]["deviation"] == pytest.approx(0.125 * 2**0.5)
    assert rl["tasks"]["track"]["seeds"] == [0.5, 1.0]
    gains = {pair: found["macro"]["value"] for pair, found in split["differences"].items()}
    assert gains == {"rl-sft": 0.625, "rl-base": 0.875, "sft-base": 0.25}


def test_an_arm_is_compared_with_the_baseline_seed_by_seed(told: Callable[..., dict[str, Any]]) -> None:
    versus = told()["arms"]["charged"]["splits"]["test"]["versus_baseline"]
    assert versus["seeds"] == [0, 1]
    assert versus["macro"]["seeds"] == [-0.25, -0.5]
    assert versus["macro"]["value"] == -0.375
    assert (versus["tasks"]["find"]["value"], versus["tasks"]["track"]["value"]) == (0.0, -0.75)


@pytest.mark.parametrize(
    ("target", "met", "words"),
    [
        pytest.param({"headline": "test", "difference": "rl-base", "points": 80}, True, "+87.5 [", id="reached"),
        pytest.param({"headline": "test", "difference": "rl-base", "points": 90}, False, "aim ≥ +90", id="too-small"),
        pytest.param({"headline": "test", "difference": "sft-base", "points": 20}, False, "+25.0 [+0.0", id="interval-at-zero"),
        pytest.param({"headline": "ood (all)", "difference": "rl-sft", "points": 1}, None, "not measured yet", id="not-measured"),
    ],
)
def test_an_aim_is_met_by_its_margin_and_an_interval_above_zero(
    told: Callable[..., dict[str, Any]], target: dict[str, Any], met: bool | None, words: str
) -> None:
    [verdict] = told(targets=[target])["targets"]
    assert verdict["met"] is met
    assert words in verdict["text"]


def test_the_page_and_the_picture_say_where_the_figures_come_from(told: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    page = written(told(targets=[{"headline": "test", "difference": "rl-sft", "points": 9.04}]))
    for words in (
        "| command | `the command` |",
        "over 2 seeds and 4 questions (aim ≥ +9.04 points and the interval above zero): met",
        "| **in domain** | 4 | 0.0 ± 0.0 [0.0, 0.0] | 25.0 ± 0.0",
        "**charged**: Does the charge help? Against `full`: in domain, ",
        "| arm | training | spent |",
        "| `full` | 0.00 | 1.50 |",
        machine(),
    ):
        assert words in page
    assert "Of one seed" not in page
    picture = (tmp_path / "docs" / "mine.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert json.loads((tmp_path / "docs" / "mine.json").read_text())["hours"] == 6.0


def test_the_page_of_a_baseline_alone_goes_into_tasks_and_seeds(told: Callable[..., dict[str, Any]]) -> None:
    page = written(told(arms=[FULL]))
    assert "### In domain, task by task" in page
    assert "| in domain | RL | 75.0 | 100.0 |" in page


def test_a_pool_weighs_its_sets_alike(study: Study) -> None:
    [run] = runs_of(study, only=["full"], seeds=[0])
    right = {"base": [1, 1, 1, 1]}
    outcome_file(run.folder, {"ood_a": right, "ood_b": {"base": [0, 0]}, "test": right, "perception_blink": right})
    atomic_write_json(run.folder / "made.json", {"attempts": [], "finished": run.settings})
    splits = gather(study, command="")["arms"]["full"]["splits"]
    assert list(splits) == ["test", "ood (all)", "ood_a", "ood_b", "perception_blink"]
    assert splits["ood (all)"]["models"]["base"]["macro"]["value"] == 0.5
    assert splits["ood (all)"]["questions"] == 6


def test_an_arm_is_told_in_and_out_of_domain(study: Study) -> None:
    for run, right in zip(runs_of(study, seeds=[0]), ([1, 1], [1, 0]), strict=True):
        splits = {"test": {"rl": right}, "ood_a": {"rl": right}, "ood_b": {"rl": right}}
        outcome_file(run.folder, splits)
        atomic_write_json(run.folder / "made.json", {"attempts": [], "finished": run.settings})
    page = written(gather(study, command=""))
    assert "| arm | seeds | in domain | out of domain | training hours |" in page
    assert "| `charged` | 1 | **-50.0 [" in page
    assert "Of one seed the interval is over its questions alone" in page
    assert "in domain, it ends lower (-50.0 [-50.0, -50.0])" in page
    # A set of two questions can be drawn without the wrong one, so that zero lies within the interval.
    assert re.search(r"out of domain, no difference is seen \(-50\.0 \[-\d+\.\d, \+0\.0\]\)", page)


def test_what_was_warned_of_while_rl_trained_is_on_the_page(study: Study) -> None:
    for run, step in zip(runs_of(study, only=["full"]), (30, 50), strict=True):
        outcome_file(run.folder, {"test": {"rl": [1, 1]}})
        atomic_write_json(run.folder / "made.json", {"attempts": [], "finished": run.settings})
        (run.folder / "grpo").mkdir()
        row = {"step": step, "kind": "entropy", "text": f"It fell to 0.0{step}."}
        (run.folder / "grpo" / "warnings.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    page = written(gather(study, command=""))
    assert "- **full**, entropy (seed 0 at step 30, seed 1 at step 50): It fell to 0.030." in page


def test_a_model_that_says_one_letter_whatever_is_asked_is_on_the_page(study: Study) -> None:
    for run, letters in zip(runs_of(study, only=["full"]), ({"A": 1.0}, {"A": 0.5, "B": 0.5}), strict=True):
        outcome_file(run.folder, {"perception_blink": {"rl": [1, 1]}})
        atomic_write_json(run.folder / "made.json", {"attempts": [], "finished": run.settings})
        found = {"perception_blink": {"models": {"rl": {"macro": {"examples": 250, "letters": letters}}}}}
        atomic_write_json(run.folder / "evaluate" / "results.json", {"splits": found})
    assert "- **full**, perception: blink, RL: A (seed 0)\n" in written(gather(study, command=""))


def test_headlines_come_before_their_parts() -> None:
    assert headlines(["perception_blink", "ood_a", "ood (all)", "validation", "test"]) == [
        "test", "ood (all)", "validation", "perception_blink", "ood_a",
    ]  # fmt: skip


def test_seeds_that_answered_other_questions_are_refused(study: Study) -> None:
    for run, right in zip(runs_of(study, only=["full"]), ([1, 1], [1, 1, 1, 1]), strict=True):
        outcome_file(run.folder, {"test": {"base": right}})
        atomic_write_json(run.folder / "made.json", {"attempts": [], "finished": run.settings})
    with pytest.raises(DataError, match="the same questions"):
        gather(study, command="")


# ---- a real study


@pytest.mark.slow
def test_an_arm_does_again_only_what_it_changes(toy: Path, tmp_path: Path) -> None:
    """The toy model, two arms, in this process."""
    path = write_study(tmp_path, seeds=[0], recipe=str(toy / "recipe.yaml"))

    def launch(recipe: Path, log: Path) -> int:
        log.touch()
        return main(["run", str(recipe)])

    results.run(options(path), launch=launch)
    full, charged = tmp_path / "runs" / "full" / "seed-0", tmp_path / "runs" / "charged" / "seed-0"
    for same in ("world", "synthesize", "sft", "sft-merged", "reject"):
        assert (charged / same / "manifest.json").samefile(full / same / "manifest.json")
    for own in ("grpo", "grpo-merged", "evaluate/rl"):
        assert not (charged / own / "manifest.json").samefile(full / own / "manifest.json")
    assert not (charged / "evaluate" / "base").exists()
    assert load_recipe(charged / "recipe.yaml").grpo.beta == 0.04
    page = (tmp_path / "docs" / "mine.md").read_text(encoding="utf-8")
    assert "| `charged` | 1 |" in page
