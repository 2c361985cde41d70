"""Facts about what is counted in the answers of a step, and about which runs are warned about."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import Babbler, ask, judge

from polyground.answer import Answer, Located
from polyground.config import GrpoConfig
from polyground.geometry import Box
from polyground.models import load_model
from polyground.records import Completion, Example, Rollout, Score
from polyground.rollout import Group
from polyground.storage import read_rows
from polyground.training import watch
from polyground.training.grpo import train_grpo
from polyground.training.watch import RULES, WARNINGS, Alarm, Watch, answer_metrics, window_lines

QUARTER = Box(0.0, 0.0, 0.5, 0.5)
HALF = Box(0.0, 0.0, 0.5, 1.0)
THOUGHT = "<think>Twelve chars</think>"


def example(*boxes: Located, images: int = 3, choice: str | None = None, task: str = "diff") -> Example:
    paths = tuple(Path(f"{i}.png") for i in range(images))
    return Example(key="e", task=task, images=paths, question="?", target=Answer(boxes, choice=choice))


def rollout(answer: Answer | str, *, text: str = THOUGHT, task: str = "diff", reward: float = 0.5) -> Rollout:
    """An answer, or the reason why there is none."""
    read = answer if isinstance(answer, Answer) else None
    score = Score(total=reward, parts={}, iou=reward / 2, answer=read, unreadable=None if read else str(answer))
    return Rollout(example="e", task=task, completion=Completion(text=text), score=score)


def boxes(*located: tuple[int, Box]) -> Answer:
    return Answer(tuple(Located(image, box) for image, box in located))


ONE = example(Located(2, QUARTER))
RIGHT, BLIND, EMPTY = boxes((2, QUARTER)), boxes((1, QUARTER)), Answer()


@pytest.mark.parametrize(
    ("answers", "key", "value"),
    [
        pytest.param([RIGHT, "missing", "missing", "malformed"], "unreadable/missing", 0.5, id="reason"),
        pytest.param([RIGHT, "missing", "missing", "malformed"], "unreadable/malformed", 0.25, id="other-reason"),
        pytest.param([RIGHT, RIGHT], "unreadable/too_many", 0.0, id="reason-that-did-not-occur"),
        pytest.param([RIGHT, BLIND, boxes((2, QUARTER), (3, HALF))], "wrong_image", 2 / 3, id="wrong-image"),
        pytest.param([RIGHT, BLIND, "bad_image", EMPTY], "wrong_image", 0.5, id="of-answers-with-boxes"),
        pytest.param([RIGHT, EMPTY, EMPTY, "missing"], "boxes/empty", 0.5, id="empty"),
        pytest.param([RIGHT, EMPTY, boxes((2, QUARTER), (2, HALF))], "boxes/mean_count", 1.0, id="count"),
        pytest.param([boxes((2, QUARTER), (2, HALF), (2, HALF))], "boxes/count_ratio", 3.0, id="count-ratio"),
        pytest.param([RIGHT, boxes((2, HALF))], "boxes/area_ratio", 1.5, id="area-ratio"),
        pytest.param([RIGHT, boxes((2, HALF)), EMPTY], "boxes/mean_area", 0.375, id="area-of-those-drawn"),
    ],
)
def test_answers_to_a_question_with_one_box_count(answers: Sequence[Answer | str], key: str, value: float) -> None:
    group = Group(ONE, tuple(rollout(answer) for answer in answers))
    assert answer_metrics([group])[key] == pytest.approx(value)


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(example(), id="nothing-is-there"),
        pytest.param(example(choice="B"), id="multiple-choice"),
    ],
)
def test_an_empty_answer_is_no_sign_where_no_box_is_annotated(question: Example) -> None:
    metrics = answer_metrics([Group(question, (rollout(EMPTY), rollout(Answer(choice="B"))))])
    assert [key for key in metrics if key.startswith("boxes/") or key == "wrong_image"] == []


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(example(Located(1, QUARTER), images=1), id="one-image"),
        pytest.param(example(Located(None, QUARTER)), id="image-not-annotated"),
    ],
)
def test_images_are_compared_only_where_one_can_be_wrong(question: Example) -> None:
    assert "wrong_image" not in answer_metrics([Group(question, (rollout(RIGHT),))])


@pytest.mark.parametrize(
    ("text", "length"),
    [
        pytest.param("<think>Twelve chars</think><answer>[]</answer>", 12, id="contract"),
        pytest.param("<think>Twelve chars</think> and then no answer", 12, id="unreadable-answer"),
        pytest.param("<think>Twelve chars", 12, id="cut-short"),
        pytest.param("Twelve chars</think><answer>[]</answer>", 12, id="opened-in-the-prompt"),
        pytest.param("<think> </think><answer>[]</answer>", 0, id="empty"),
        pytest.param("<answer>[]</answer>", 0, id="none"),
    ],
)
def test_reasoning_is_measured_whether_or_not_the_answer_can_be_read(text: str, length: int) -> None:
    metrics = answer_metrics([Group(ONE, (rollout(RIGHT, text=text),))])
    assert metrics["reasoning/mean_length"] == length
    assert metrics["reasoning/missing"] == float(length == 0)


def test_every_task_has_figures_of_its_own() -> None:
    other = example(Located(1, HALF), task="region")
    groups = [Group(ONE, (rollout(RIGHT, reward=1.0), rollout("missing", reward=0.0)))]
    groups.append(Group(other, (rollout(RIGHT, task="region", reward=0.2),)))
    metrics = answer_metrics(groups)
    assert (metrics["tasks/diff/reward"], metrics["tasks/diff/iou"], metrics["tasks/diff/unreadable"]) == (0.5, 0.25, 0.5)
    assert (metrics["tasks/region/reward"], metrics["tasks/region/iou"], metrics["tasks/region/unreadable"]) == (0.2, 0.1, 0.0)


# ---- warnings

HEALTHY = {
    "loss": (0.0, 0.0),
    "grad_norm": (1.0, 1.2),
    "reward": (0.30, 0.70),
    "iou": (0.25, 0.65),
    "rewards/iou/mean": (0.25, 0.65),
    "rewards/format/mean": (0.90, 1.00),
    "entropy": (0.50, 0.25),
    "kl": (0.0, 0.3),
    "frac_reward_zero_std": (0.10, 0.45),
    "completions/clipped_ratio": (0.02, 0.01),
    "unreadable": (0.10, 0.02),
    "unreadable/missing": (0.06, 0.01),
    "unreadable/inverted": (0.04, 0.01),
    "wrong_image": (0.40, 0.15),
    "boxes/empty": (0.02, 0.00),
    "boxes/count_ratio": (1.3, 1.05),
    "boxes/area_ratio": (0.70, 1.05),
    "reasoning/mean_length": (150.0, 110.0),
    "reasoning/missing": (0.0, 0.02),
}
"""Level of each curve at the start and at the end of a run as one wants it."""


def course(levels: Mapping[str, tuple[float, float]], *, steps: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """A log whose curves go straight from one level to the other, each value off by up to a fifth."""
    rng = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        level = {key: begin + (end - begin) * step / steps for key, (begin, end) in levels.items()}
        rows.append({"step": step, **{key: value * rng.uniform(0.8, 1.2) for key, value in level.items()}})
    return rows


def warned(rows: Sequence[Mapping[str, Any]], **options: Any) -> list[Alarm]:
    watching = Watch(**options)
    return [alarm for row in rows for alarm in watching.see(row)]


@given(st.integers())
def test_a_healthy_run_is_not_warned_about(seed: int) -> None:
    assert warned(course(HEALTHY, seed=seed)) == []


SICK: dict[str, dict[str, tuple[float, float]]] = {
    "entropy_collapse": {"entropy": (0.5, 0.0)},
    "no_variance": {"frac_reward_zero_std": (0.3, 1.0)},
    "reward_without_iou": {"iou": (0.3, 0.3), "rewards/iou/mean": (0.3, 0.3), "rewards/format/mean": (0.2, 1.0)},
    "boxes_growing": {"boxes/area_ratio": (1.0, 4.0)},
    "many_boxes": {"boxes/count_ratio": (1.1, 3.0)},
    "empty_answers": {"boxes/empty": (0.02, 0.6)},
    "unreadable": {"unreadable": (0.05, 0.5), "unreadable/inverted": (0.0, 0.4)},
    "reasoning_vanishing": {"reasoning/mean_length": (150.0, 5.0)},
    "cut_off": {"completions/clipped_ratio": (0.02, 0.5)},
    "kl": {"kl": (0.0, 2.0)},
    "engines_apart": {
        "sampling/importance_sampling_ratio/mean": (0.9, 0.3),
        "sampling/sampling_logp_difference/mean": (0.02, 0.2),
    },
    "wrong_image": {"wrong_image": (0.3, 0.8)},
}


def test_every_kind_of_warning_has_a_sick_run() -> None:
    assert SICK.keys() == RULES.keys()


@pytest.mark.parametrize("kind", SICK)
def test_a_sick_run_is_warned_about_once_and_for_what_it_has(kind: str) -> None:
    [alarm] = warned(course({**HEALTHY, **SICK[kind]}))
    assert alarm.kind == kind
    assert 20 <= alarm.step <= 120
    assert "\n" not in alarm.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("reward_without_iou", "most of all format, from 0."),
        ("unreadable", "most often inverted"),
        ("boxes_growing", "times the annotated area"),
        ("kl", "nats per token"),
        ("empty_answers", " % to "),
    ],
)
def test_a_warning_names_its_figures(kind: str, said: str) -> None:
    [alarm] = warned(course({**HEALTHY, **SICK[kind]}))
    assert said in alarm.text


def test_a_run_that_stays_unreadable_is_warned_about_though_nothing_rose() -> None:
    [alarm] = warned(course({**HEALTHY, "unreadable": (0.8, 0.75), "unreadable/missing": (0.7, 0.7)}))
    assert alarm.kind == "unreadable"
    assert "still cannot be read (most often missing)" in alarm.text


def test_reasoning_that_half_of_the_completions_leave_out_is_vanishing() -> None:
    [alarm] = warned(course({**HEALTHY, "reasoning/missing": (0.0, 0.6)}))
    assert alarm.kind == "reasoning_vanishing"
    assert "of the completions have none" in alarm.text


@pytest.mark.parametrize(
    "levels",
    [
        pytest.param({"reasoning/mean_length": (12.0, 0.0), "reasoning/missing": (0.5, 1.0)}, id="no-reasoning-to-lose"),
        pytest.param({"boxes/area_ratio": (0.3, 0.9)}, id="boxes-that-began-too-small"),
        pytest.param({"entropy": (0.005, 0.004)}, id="a-policy-that-was-always-sure"),
        pytest.param({"unreadable": (0.6, 0.0)}, id="unreadable-falls"),
        pytest.param({"reward": (0.3, 0.3), "iou": (0.3, 0.3)}, id="nothing-is-learnt"),
    ],
)
def test_no_warning_where_there_is_nothing_to_lose(levels: Mapping[str, tuple[float, float]]) -> None:
    assert warned(course({**HEALTHY, **levels})) == []


@pytest.mark.parametrize("kind", SICK)
def test_one_bad_batch_is_no_trend(kind: str) -> None:
    rows = course(HEALTHY)
    for place in (30, 60, 61, 62, 119):
        rows[place] |= {key: end for key, (_, end) in SICK[kind].items()}
    assert warned(rows) == []


def test_a_run_shorter_than_the_window_is_left_in_peace() -> None:
    levels = {**HEALTHY, **{key: value for sick in SICK.values() for key, value in sick.items()}}
    assert warned(course(levels, steps=19)) == []


def test_fewer_lines_make_a_window_where_each_speaks_for_more_steps() -> None:
    levels = {**HEALTHY, **SICK["kl"]}
    assert warned(course(levels, steps=12)) == []
    assert [alarm.kind for alarm in warned(course(levels, steps=12), window=window_lines(10))] == ["kl"]


def test_curves_that_are_not_logged_are_not_missed() -> None:
    rows = [{key: row[key] for key in ("step", "loss", "entropy")} for row in course({**HEALTHY, **SICK["entropy_collapse"]})]
    assert [alarm.kind for alarm in warned(rows)] == ["entropy_collapse"]


def test_a_figure_that_is_no_number_is_said_at_once() -> None:
    rows = course(HEALTHY, steps=5)
    rows[1]["grad_norm"] = rows[3]["grad_norm"] = float("nan")
    [alarm] = warned(rows)
    assert (alarm.step, alarm.kind) == (2, "not_finite")
    assert alarm.text.startswith("grad_norm is")


DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [*RULES, "not_finite"])
def test_every_warning_is_explained(kind: str) -> None:
    assert f"\n| `{kind}` |" in DOCS


def test_every_figure_of_the_answers_is_explained() -> None:
    metrics = answer_metrics([Group(ONE, (rollout(RIGHT), rollout("missing")))])
    names = {f"/{key.rpartition('/')[2]}" if key.startswith("tasks/") else key for key in metrics}
    missing = {name for name in names if f"`{name}`" not in DOCS and f"NAME{name}" not in DOCS}
    assert {name for name in missing if f"`{name.removeprefix('unreadable/')}`" not in DOCS} == set()


# ---- while training


class Rambler(Babbler):
    """Never comes to an end."""

    def _one(self, rng: random.Random, max_tokens: int) -> Completion:
        return replace(super()._one(rng, max_tokens), truncated=True)


def learn(folder: Path, examples: list[Example], out: Path, **changes: Any) -> dict[str, Any]:
    """Short completions of a random model; lines of one step, windows of three."""
    quiet = {"logging_steps": 1, "report_to": [], "lora_r": 2, "lora_alpha": 4, "beta": 0.0}
    config = GrpoConfig(**{**quiet, "num_generations": 2, "max_completion_length": 2, "save_steps": 3, "max_steps": 5, **changes})
    loaded = load_model(folder)
    return train_grpo(loaded, examples, config, sampler=lambda _: Rambler(), ask=ask, judge=judge, out=out, seed=3)


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WINDOW_STEPS", 3)


@pytest.mark.usefixtures("short_windows")
def test_a_training_writes_its_warnings_and_counts_them(
    toy_folder: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = learn(toy_folder, examples, tmp_path)
    rows = list(read_rows(tmp_path / WARNINGS))
    assert [(row["step"], row["kind"]) for row in rows] == [(3, "cut_off")]
    assert rows[0]["text"].startswith("100 % of the completions meet the token budget")
    assert rows[0]["text"] in caplog.text
    assert summary["warnings"] == 1


@pytest.mark.usefixtures("short_windows")
def test_a_resumed_training_repeats_no_warning_and_forgets_none(
    toy_folder: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learn(toy_folder, examples, tmp_path / "whole", max_steps=5)
    learn(toy_folder, examples, tmp_path / "halves", max_steps=3, lr_scheduler_type="constant")
    caplog.clear()
    summary = learn(toy_folder, examples, tmp_path / "halves", max_steps=5, lr_scheduler_type="constant")
    assert (tmp_path / "halves" / WARNINGS).read_text() == (tmp_path / "whole" / WARNINGS).read_text()
    assert summary["warnings"] == 1
    assert "token budget" not in caplog.text


def test_a_quiet_training_leaves_an_empty_file(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    summary = learn(toy_folder, examples, tmp_path, max_steps=2)
    assert (tmp_path / WARNINGS).read_text() == ""
    assert summary["warnings"] == 0
