"""Which questions rejection sampling hands on to RL."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyground.answer import Answer, Located
from polyground.config import RejectConfig
from polyground.geometry import FULL_IMAGE
from polyground.records import Example, Rollout
from polyground.stages.reject import histogram, keep, way_out
from polyground.storage import read_manifest, read_rows


def example(key: str, task: str = "find") -> Example:
    return Example(key=key, task=task, images=(Path("a.png"),), question="?", target=Answer((Located(1, FULL_IMAGE),)))


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        pytest.param(0.0, 1.0, "bc", id="never-and-always-are-dropped"),
        pytest.param(0.0, 0.75, "b", id="the-upper-bound-is-exclusive"),
        pytest.param(0.25, None, "cd", id="no-upper-bound"),
        pytest.param(None, None, "abcd", id="no-band"),
    ],
)
def test_the_band_of_pass_rates(low: float | None, high: float | None, kept: str) -> None:
    rates = {"a": 0.0, "b": 0.25, "c": 0.75, "d": 1.0}
    config = RejectConfig(min_pass_rate=low, max_pass_rate=high)
    assert "".join(e.key for e in keep([example(key) for key in rates], rates, config)) == kept


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        pytest.param([0.0, 0.0], "train the SFT model longer", id="never"),
        pytest.param([1.0, 1.0], "harder questions", id="always"),
        pytest.param([0.0, 1.0], "widen the band", id="never-or-always"),
    ],
)
def test_what_to_do_depends_on_why_nothing_is_kept(rates: list[float], said: str) -> None:
    assert said in way_out(rates)


def test_balance_caps_a_task_at_the_median_and_keeps_its_most_teachable_questions() -> None:
    examples = [*(example(f"a{i}", "a") for i in range(4)), example("b0", "b"), example("b1", "b"), example("c0", "c")]
    rates = {"a0": 0.1, "a1": 0.5, "a2": 0.9, "a3": 0.4, "b0": 0.5, "b1": 0.5, "c0": 0.5}
    assert [e.key for e in keep(examples, rates, RejectConfig(balance=True))] == ["a1", "b0", "c0", "a3", "b1"]
    assert len(keep(examples, rates, RejectConfig(balance=False))) == 7


def test_the_histogram_counts_questions_by_rate() -> None:
    assert histogram([0.0, 0.5, 0.5]) == {"0.000": 1, "0.500": 2}


def test_every_group_stays_on_disk_and_kept_rows_carry_their_rate(finished: Path) -> None:
    groups = list(read_rows(finished / "reject" / "rollouts.jsonl"))
    kept = list(read_rows(finished / "reject" / "kept.jsonl"))
    assert len(groups) == 4
    for group in groups:
        rollouts = [Rollout.from_json(row) for row in group["rollouts"]]
        assert [rollout.sample for rollout in rollouts] == [0, 1]
        assert {rollout.example for rollout in rollouts} == {group["key"]}
    rates = {group["key"]: group["pass_rate"] for group in groups}
    assert {row["key"]: row["pass_rate"] for row in kept} == rates
    summary = read_manifest(finished / "reject").summary
    assert sum(summary["pass_rates"].values()) == summary["asked"] == 4
