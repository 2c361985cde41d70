import json
from collections.abc import Sequence

import numpy as np
import pytest

from polyground.answer import Answer
from polyground.errors import DataError
from polyground.metrics import (
    across_seeds,
    difference_across_seeds,
    outcomes,
    paired_difference,
    pass_rates,
    pooled,
    same_letter,
    summarize,
)
from polyground.records import Completion, Rollout, Score


def rollout(
    example: str, iou: float, *, task: str = "region", image: float | None = 1.0, unreadable: str | None = None, sample: int = 0
) -> Rollout:
    score = Score(total=iou, parts={}, iou=iou, image_correct=image, unreadable=unreadable)
    return Rollout(example=example, task=task, completion=Completion(text="", truncated=iou == 0), score=score, sample=sample)


def many(task: str, ious: Sequence[float]) -> list[Rollout]:
    return [rollout(f"{task}{number}", iou, task=task) for number, iou in enumerate(ious)]


FOUR = many("region", [0.2, 0.5, 0.6, 0.9])


def test_accuracy_counts_an_iou_at_the_threshold() -> None:
    task = summarize(FOUR, bootstrap=0).tasks["region"]
    assert {threshold: estimate.value for threshold, estimate in task.accuracy.items()} == {0.5: 0.75, 0.7: 0.25, 0.3: 0.75}
    assert task.mean_iou.value == pytest.approx(0.55)
    assert (task.examples, task.rollouts) == (4, 4)


def test_macro_weighs_tasks_and_micro_weighs_examples() -> None:
    summary = summarize(many("region", [1, 1, 1, 1]) + many("diff", [0]), bootstrap=0)
    assert list(summary.tasks) == ["diff", "region"]
    assert summary.macro.accuracy[0.5].value == 0.5
    assert summary.micro.accuracy[0.5].value == 0.8
    assert (summary.macro.truncated, summary.micro.truncated) == (0.5, 0.2)
    assert summary.macro.examples == summary.micro.examples == 5


def test_samples_of_one_example_are_averaged_before_examples_are() -> None:
    rows = [rollout("a", 1.0), rollout("b", 0.0), *(rollout("c", 0.0, sample=n) for n in range(8))]
    task = summarize(rows, bootstrap=0).tasks["region"]
    assert task.accuracy[0.5].value == pytest.approx(1 / 3)
    assert (task.examples, task.rollouts) == (3, 10)


def test_image_accuracy_leaves_out_what_is_not_annotated() -> None:
    rows = [rollout("a", 1.0, image=1.0), rollout("b", 1.0, image=0.0), rollout("c", 1.0, image=None)]
    rows += [rollout("d", 1.0, image=None, task="diff")]
    summary = summarize(rows, bootstrap=50)
    assert summary.tasks["diff"].image_accuracy is None
    for part in (summary.tasks["region"], summary.macro, summary.micro):
        assert part.image_accuracy is not None
        assert part.image_accuracy.value == 0.5


def test_unreadable_rates_are_given_by_reason() -> None:
    rows = [rollout("a", 0, unreadable="missing"), rollout("b", 0, unreadable="inverted"), rollout("c", 1), rollout("d", 1)]
    summary = summarize([*rows, rollout("e", 1, task="diff")], bootstrap=0)
    assert summary.tasks["region"].unreadable == {"inverted": 0.25, "missing": 0.25}
    assert summary.tasks["region"].unreadable_rate == 0.5
    assert summary.macro.unreadable == {"inverted": 0.125, "missing": 0.125}
    assert summary.micro.unreadable == pytest.approx({"inverted": 0.2, "missing": 0.2})


def test_letters_are_counted_and_one_that_is_always_said_is_found() -> None:
    def said(number: int, letter: str, task: str) -> Rollout:
        score = Score(total=0.0, parts={}, iou=0.0, answer=Answer(choice=letter))
        return Rollout(example=f"{task}{number}", task=task, completion=Completion(text=""), score=score)

    rows = [said(n, "C" if n < 5 else "A", "Counting") for n in range(20)] + [said(n, "A", "Odd_One_Out") for n in range(10)]
    summary = summarize([*rows, *(rollout(f"a{n}", 1, task="Odd_One_Out") for n in range(10))], bootstrap=0)
    assert summary.tasks["Counting"].letters == {"A": 0.75, "C": 0.25}
    assert summary.macro.letters == {"A": 0.625, "C": 0.125}
    assert same_letter(summary.macro.to_json()) is None
    assert same_letter(summarize(rows[5:], bootstrap=0).macro.to_json()) == "A"
    assert same_letter(summarize(rows[5:20], bootstrap=0).macro.to_json()) is None  # too few questions to tell
    assert "letters" not in summarize(FOUR, bootstrap=0).macro.to_json()


def test_a_right_letter_is_right_at_every_threshold() -> None:
    summary = summarize([rollout("a", 1.0, image=None), rollout("b", 0.0, image=None)], bootstrap=0)
    assert [estimate.value for estimate in summary.macro.accuracy.values()] == [0.5, 0.5, 0.5]


def test_bootstrap_intervals_agree_with_the_binomial() -> None:
    share = summarize(many("region", [1.0] * 60 + [0.0] * 40), bootstrap=4000).macro.accuracy[0.5]
    half_width = 1.96 * (0.6 * 0.4 / 100) ** 0.5
    assert share.low == pytest.approx(0.6 - half_width, abs=0.02)
    assert share.high == pytest.approx(0.6 + half_width, abs=0.02)


def test_intervals_are_reproducible_and_do_not_move_when_a_task_is_added() -> None:
    alone, beside = summarize(FOUR), summarize([*many("diff", [0.1, 0.9]), *FOUR])
    assert summarize(FOUR) == alone
    assert beside.tasks["region"] == alone.tasks["region"]
    assert summarize(FOUR, seed=4).tasks["region"].mean_iou.low != alone.tasks["region"].mean_iou.low


def test_no_bootstrap_leaves_the_interval_at_the_mean() -> None:
    estimate = summarize(FOUR, bootstrap=0).macro.mean_iou
    assert estimate.low == estimate.high == pytest.approx(estimate.value)


def test_an_empty_run_is_refused() -> None:
    with pytest.raises(DataError, match="no rollouts"):
        summarize([])


def test_summaries_and_differences_are_json() -> None:
    summary = summarize([*FOUR, rollout("x", 0, task="diff", image=None, unreadable="missing")], bootstrap=20)
    row = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert row["tasks"]["region"]["accuracy"]["0.5"]["value"] == 0.75
    assert row["tasks"]["diff"]["image_accuracy"] is None
    difference = json.loads(json.dumps(paired_difference(FOUR, FOUR, bootstrap=20).to_json(), allow_nan=False))
    assert difference["macro"]["value"] == 0.0


def test_a_model_does_not_differ_from_itself() -> None:
    difference = paired_difference(FOUR, FOUR)
    assert (difference.macro.low, difference.macro.high) == (0.0, 0.0)
    assert (difference.better, difference.worse, difference.p_value, difference.significant) == (0, 0, 1.0, False)


def test_the_second_model_better_is_a_positive_difference_macro_averaged() -> None:
    before = many("region", [0.0] * 30) + many("diff", [0.0] * 10)
    after = many("region", [1.0] * 15 + [0.0] * 15) + many("diff", [0.0] * 10)
    difference = paired_difference(before, list(reversed(after)))
    assert difference.tasks["region"].value == 0.5
    assert difference.tasks["diff"].value == 0.0
    assert difference.macro.value == 0.25
    assert (difference.better, difference.worse, difference.examples) == (15, 0, 40)
    assert difference.significant
    assert difference.p_value < 0.01
    assert paired_difference(after, before).macro.value == -0.25


def test_pairing_makes_the_interval_narrower_than_two_separate_ones() -> None:
    rng = np.random.default_rng(0)
    ious = rng.random(100)
    before, after = many("region", ious), many("region", np.minimum(1, ious + 0.05))
    difference = paired_difference(before, after, measure=lambda row: row.score.iou)
    separate = summarize(before).macro.mean_iou
    assert difference.significant
    assert difference.macro.high - difference.macro.low < (separate.high - separate.low) / 4


def test_different_examples_are_refused_and_named() -> None:
    with pytest.raises(DataError, match=r"4 and 3, 1 only in one \(such as region/region3\)"):
        paired_difference(FOUR, FOUR[:3])
    with pytest.raises(DataError, match="0 and 0"):
        paired_difference([], [])


def test_pass_rates_by_example() -> None:
    groups = [[rollout("a", 0.5), rollout("a", 0.4)], [rollout("b", 0.0)]]
    assert pass_rates(groups) == {"a": 0.5, "b": 0.0}
    assert pass_rates(groups, threshold=0.3) == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="one example"):
        pass_rates([[rollout("a", 1), rollout("b", 1)]])


def test_further_measures_are_averaged_where_they_apply_and_move_nothing_else() -> None:
    rows = [*FOUR, rollout("x", 1.0, task="diff", image=None)]
    plain = summarize(rows)
    measured = summarize(rows, measures={"thin": lambda row: None if row.task == "diff" else float(row.score.iou < 0.5)})
    assert measured.tasks["region"].measures["thin"].value == 0.25  # type: ignore[union-attr]
    assert measured.tasks["diff"].measures["thin"] is None
    assert measured.macro.measures["thin"].value == 0.25  # type: ignore[union-attr]
    assert measured.macro.mean_iou == plain.macro.mean_iou
    assert "measures" not in plain.to_json()["macro"]
    assert measured.to_json()["tasks"]["diff"]["measures"] == {"thin": None}


def test_a_bootstrap_in_pieces_is_as_wide_as_one_at_once() -> None:
    # 20,000 examples are drawn 52 draws at a time.
    share = summarize(many("region", [1.0] * 12_000 + [0.0] * 8_000), bootstrap=120).macro.accuracy[0.5]
    half_width = 1.96 * (0.6 * 0.4 / 20_000) ** 0.5
    assert share.high - share.low == pytest.approx(2 * half_width, rel=0.3)


# ---- over seeds

A, B = {"find": {"1": 1.0, "2": 0.0}, "track": {"3": 1.0}}, {"find": {"1": 0.0, "2": 0.0}, "track": {"3": 1.0}}
"""Two runs on the same three questions: macro averages 0.75 and 0.5."""


def test_outcomes_are_told_by_task_and_question() -> None:
    rows = [*many("find", [0.5, 0.4]), rollout("find1", 0.9, task="find", sample=1), *many("diff", [0.7])]
    assert outcomes(rows) == {"diff": {"diff0": 1.0}, "find": {"find0": 1.0, "find1": 0.5}}
    assert outcomes(rows, threshold=0.6)["find"] == {"find0": 0.0, "find1": 0.5}


def test_every_seed_weighs_the_same_and_keeps_its_own_value() -> None:
    table = across_seeds([A, B], bootstrap=50)
    assert table.macro.seeds == (0.75, 0.5)
    assert table.macro.mean.value == 0.625
    assert table.macro.deviation == pytest.approx(0.25 / 2**0.5)
    assert (table.tasks["find"].mean.value, table.tasks["track"].mean.value, table.examples) == (0.25, 1.0, 3)
    told = json.loads(json.dumps(table.to_json()))
    assert (told["macro"]["min"], told["macro"]["max"], told["macro"]["seeds"]) == (0.5, 0.75, [0.75, 0.5])


def test_a_single_seed_has_no_deviation_and_the_interval_of_its_questions() -> None:
    values = [1.0] * 60 + [0.0] * 40
    alone = across_seeds([{"region": {f"region{n}": value for n, value in enumerate(values)}}], bootstrap=500).macro
    share = summarize(many("region", values), bootstrap=500).macro.accuracy[0.5]
    assert alone.deviation is None
    assert alone.mean.value == share.value
    # The same stream draws questions, which stand in another order here.
    assert (alone.mean.low, alone.mean.high) == pytest.approx((share.low, share.high), abs=0.03)


def test_an_interval_covers_other_questions_as_well_as_other_seeds() -> None:
    def run(values: Sequence[float]) -> dict[str, dict[str, float]]:
        return {"find": {str(n): value for n, value in enumerate(values)}}

    only_seeds = across_seeds([run([0.0] * 50), run([1.0] * 50)], bootstrap=400).macro.mean
    assert (only_seeds.low, only_seeds.value, only_seeds.high) == (0.0, 0.5, 1.0)
    halves = [1.0, 0.0] * 50
    only_questions = across_seeds([run(halves), run(halves)], bootstrap=4000).macro.mean
    half_width = 1.96 * (0.25 / 100) ** 0.5
    # Seeds that agree on every question add no information about the questions: the interval is that of one run.
    assert only_questions.low == pytest.approx(0.5 - half_width, abs=0.015)
    assert only_questions.high == pytest.approx(0.5 + half_width, abs=0.015)


def test_a_difference_is_paired_by_seed_and_question() -> None:
    table = difference_across_seeds([B, A], [A, A], bootstrap=50)
    assert table.macro.seeds == (0.25, 0.0)
    assert table.tasks["find"].mean.value == 0.25
    # A model that gains the same on every question under every seed has no interval, however hard the questions are.
    first = [{"find": {str(n): (n % 2) / 2 for n in range(40)}}] * 2
    second = [{"find": {key: value + 0.5 for key, value in run["find"].items()}} for run in first]
    gain = difference_across_seeds(first, second, bootstrap=100).macro.mean
    assert (gain.low, gain.value, gain.high) == (0.5, 0.5, 0.5)


def test_without_draws_the_interval_over_seeds_is_the_mean() -> None:
    mean = across_seeds([A, B], bootstrap=0).macro.mean
    assert mean.low == mean.value == mean.high == 0.625


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"find": A["find"]}, id="a-task-is-missing"),
        pytest.param({**A, "track": {"4": 1.0}}, id="another-question"),
        pytest.param({**A, "find": {"1": 1.0}}, id="a-question-is-missing"),
    ],
)
def test_seeds_and_models_on_other_questions_are_refused(other: dict[str, dict[str, float]]) -> None:
    with pytest.raises(DataError, match="the same questions"):
        across_seeds([A, other])
    with pytest.raises(DataError, match="the same questions"):
        difference_across_seeds([A], [other])


def test_no_runs_have_no_mean() -> None:
    with pytest.raises(DataError, match="no outcomes"):
        across_seeds([])


def test_a_pool_makes_a_task_of_each_split() -> None:
    together = across_seeds([pooled({"ood_a": A, "ood_b": {"find": {"1": 0.0}}})], bootstrap=0)
    assert list(together.tasks) == ["ood_a", "ood_b"]
    assert together.macro.mean.value == pytest.approx((2 / 3 + 0) / 2)
