"""Facts about what became of an answer: its outcome from the score alone, and its kind, seen from the annotation."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.outcomes import Kind, Outcome, explained, kind_of, outcome_of
from polyground.records import Completion, Example, Rollout, Score

HERE, THERE = Box(0.0, 0.0, 0.5, 0.5), Box(0.5, 0.5, 1.0, 1.0)
ONE_BOX, NOTHING, LETTER = Answer((Located(2, HERE),)), Answer(()), Answer(choice="B")


def question(target: Answer) -> Example:
    choices = ("one", "two") if target.choice else ()
    return Example(key="e", task="diff", images=(Path("1.png"), Path("2.png")), question="where?", target=target, choices=choices)


def score(answer: Answer | None, *, iou: float = 0.0, image: float | None = 1.0, unreadable: str | None = None) -> Score:
    return Score(total=iou, parts={}, iou=iou, image_correct=image, answer=answer, unreadable=unreadable)


def said(answer: Answer | None, *, iou: float = 0.0, unreadable: str | None = None, truncated: bool = False) -> Rollout:
    completion = Completion(text="…", truncated=truncated)
    return Rollout(example="e", task="diff", completion=completion, score=score(answer, iou=iou, unreadable=unreadable))


def at(image: int | None, *more: int) -> Answer:
    return Answer(tuple(Located(number, THERE) for number in (image, *more)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(score(at(2), iou=0.5), "right", id="at-the-threshold"),
        pytest.param(score(at(2), iou=0.49), "wrong box", id="below-it"),
        pytest.param(score(at(1), image=0.0), "wrong image", id="another-image"),
        pytest.param(score(at(1, 2), image=0.5), "wrong box", id="one-of-two-images"),
        pytest.param(score(at(None), image=0.0), "wrong box", id="names-no-image"),
        pytest.param(score(at(1), image=None), "wrong box", id="the-annotation-knows-no-image"),
        pytest.param(score(NOTHING, image=0.0), "wrong box", id="said-to-be-absent"),
        pytest.param(score(LETTER, image=None), "wrong letter", id="letter"),
        pytest.param(score(None, unreadable="missing"), "unreadable", id="no-answer"),
    ],
)
def test_an_answer_has_one_outcome(given: Score, expected: str) -> None:
    assert outcome_of(given, threshold=0.5).spoken == expected


def test_outcomes_are_bits_of_which_a_group_has_several() -> None:
    assert sum(Outcome) == 0b11111 == Outcome.RIGHT | Outcome.WRONG_IMAGE | Outcome.WRONG_BOX | Outcome.WRONG_LETTER | 16


@pytest.mark.parametrize(
    ("target", "rollout", "expected"),
    [
        pytest.param(ONE_BOX, said(ONE_BOX, iou=0.5), Kind.RIGHT, id="at-the-threshold"),
        pytest.param(ONE_BOX, said(at(2), iou=0.49), Kind.LOOSE, id="just-below"),
        pytest.param(ONE_BOX, said(at(2), iou=0.1), Kind.LOOSE, id="it-touches"),
        pytest.param(ONE_BOX, said(at(2), iou=0.09), Kind.ELSEWHERE, id="it-hardly-touches"),
        pytest.param(ONE_BOX, said(at(None), iou=0.3), Kind.LOOSE, id="names-no-image"),
        pytest.param(ONE_BOX, said(at(1)), Kind.WRONG_IMAGE, id="wrong-image"),
        pytest.param(ONE_BOX, said(at(1, 2), iou=0.4), Kind.WRONG_IMAGE, id="one-of-two-on-a-wrong-image"),
        pytest.param(ONE_BOX, said(at(2, 2), iou=0.4), Kind.NUMBER, id="too-many"),
        pytest.param(ONE_BOX, said(NOTHING), Kind.ABSENT, id="said-to-be-absent"),
        pytest.param(NOTHING, said(NOTHING, iou=1.0), Kind.RIGHT, id="rightly-absent"),
        pytest.param(NOTHING, said(at(1)), Kind.INVENTED, id="invented"),
        pytest.param(LETTER, said(LETTER, iou=1.0), Kind.RIGHT, id="right-letter"),
        pytest.param(LETTER, said(Answer(choice="A")), Kind.CHOICE, id="wrong-letter"),
        pytest.param(LETTER, said(at(1)), Kind.CHOICE, id="a-box-for-a-letter"),
        pytest.param(ONE_BOX, said(None, unreadable="missing"), Kind.UNREADABLE, id="unreadable"),
        pytest.param(ONE_BOX, said(None, unreadable="missing", truncated=True), Kind.CUT_OFF, id="cut-off"),
    ],
)
def test_the_kind_of_an_answer(target: Answer, rollout: Rollout, expected: Kind) -> None:
    assert kind_of(rollout, question(target), threshold=0.5) == expected


def test_an_annotation_that_knows_no_image_blames_none() -> None:
    assert kind_of(said(at(1), iou=0.3), question(Answer((Located(None, HERE),))), threshold=0.5) == Kind.LOOSE


def test_every_kind_is_explained() -> None:
    assert explained(0.5).keys() == set(Kind)
