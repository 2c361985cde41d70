"""The one generation loop: order, batches, resuming, scoring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from polyground.answer import Answer, Located, write_completion
from polyground.config import RewardConfig
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.records import Completion, Example, Message, Score
from polyground.rewards import Scorer
from polyground.rollout import Group, interleave, is_confirmed, is_right, rollout_groups

LEFT, RIGHT = Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.0, 1.0, 1.0)
SCORER = Scorer([RewardConfig(name="iou", weight=1.0)])


def example(key: str, task: str = "find") -> Example:
    return Example(
        key=key, task=task, images=(Path("a.png"), Path("b.png")), question=f"{key}?", target=Answer((Located(2, LEFT),))
    )


def completion(image: int, box: Box) -> str:
    return write_completion("It is there.", Answer((Located(image, box),)), [PER_MILLE, PER_MILLE])


def ask(asked: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
    return [Message("user", (*asked.images, asked.question))], [PER_MILLE] * len(asked.images)


class Recorder:
    """Answers right in the first sample and wrong in the others, and remembers the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def sample(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        n: int,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int,
        keys: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        self.batches.append(list(keys or ()))
        return [[Completion(text=completion(2, LEFT if i == 0 else RIGHT)) for i in range(n)] for _ in prompts]


def groups(keys: str, *, sampler: Recorder, n: int = 2, batch: int = 2, done: frozenset[str] = frozenset()) -> list[Group]:
    examples = [example(key) for key in keys]
    return list(
        rollout_groups(
            examples,
            sampler=sampler,
            ask=ask,
            judge=SCORER.score,
            n=n,
            temperature=1.0,
            max_tokens=8,
            seed=0,
            batch=batch,
            done=done,
        )
    )


def test_every_example_gives_one_group_of_n_in_order() -> None:
    found = groups("abc", sampler=Recorder(), n=3)
    assert [group.example.key for group in found] == ["a", "b", "c"]
    assert [[rollout.sample for rollout in group.rollouts] for group in found] == [[0, 1, 2]] * 3
    assert found[0].totals == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("done", "batches", "yielded"),
    [
        pytest.param("", [["a", "b"], ["c", "d"], ["e"]], "abcde", id="fresh"),
        pytest.param("ab", [["c", "d"], ["e"]], "cde", id="whole-batch-done"),
        pytest.param("abc", [["c", "d"], ["e"]], "de", id="batch-cut-in-two-is-sampled-whole"),
        pytest.param("abcde", [], "", id="all-done"),
    ],
)
def test_a_resumed_loop_samples_the_batches_of_an_undisturbed_one(done: str, batches: list[list[str]], yielded: str) -> None:
    sampler = Recorder()
    assert "".join(group.example.key for group in groups("abcde", sampler=sampler, done=frozenset(done))) == yielded
    assert sampler.batches == batches


def test_the_pass_rate_is_the_share_of_confirmed_completions() -> None:
    [group] = groups("a", sampler=Recorder(), n=4)
    assert group.pass_rate(threshold=0.5) == 0.25


@pytest.mark.parametrize(
    ("score", "right", "confirmed"),
    [
        pytest.param(Score(total=1, parts={}, iou=0.5, image_correct=1.0), True, True, id="at-the-threshold"),
        pytest.param(Score(total=1, parts={}, iou=0.49, image_correct=1.0), False, False, id="below"),
        pytest.param(Score(total=1, parts={}, iou=0.9, image_correct=0.0), True, False, id="native-form-names-no-image"),
        pytest.param(Score(total=1, parts={}, iou=0.9), True, True, id="annotation-knows-no-image"),
        pytest.param(Score(total=0, parts={}, unreadable="missing"), False, False, id="unreadable"),
    ],
)
def test_right_and_confirmed(score: Score, right: bool, confirmed: bool) -> None:
    assert is_right(score, threshold=0.5) is right
    assert is_confirmed(score, threshold=0.5) is confirmed


def test_interleaving_lets_tasks_take_turns() -> None:
    mixed = interleave([example("a1", "a"), example("a2", "a"), example("a3", "a"), example("b1", "b")])
    assert [e.key for e in mixed] == ["a1", "b1", "a2", "a3"]
