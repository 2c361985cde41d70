"""What in a teacher's reasoning gives it away, when answers agree, and how a judge's marks are read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.teaching import MARKS, Unmarked, agree, agreement, mentions_coordinates, read_marks, tells

LEFT, RIGHT, NEARLY = Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.0, 1.0, 1.0), Box(0.0, 0.0, 0.4, 1.0)
"""NEARLY overlaps LEFT by 0.8."""


@pytest.mark.parametrize("text", ["at (12, 40)", "x = 0.25", "250 wide", "12, 40, 60, 80", "10 px", "bbox"])
def test_coordinates_are_found_in_any_shape(text: str) -> None:
    assert mentions_coordinates(text)


@pytest.mark.parametrize("text", ["Image 2: red star, blue ring.", "There are 12 objects in 3 images.", "Images 1, 2 and 3."])
def test_counts_and_image_numbers_are_no_coordinates(text: str) -> None:
    assert not mentions_coordinates(text)


@pytest.mark.parametrize(
    "text",
    [
        "As the hint says",
        "the given answer",
        "The answer is known.",
        "the annotated box",
        "Ground-truth",
        "According to the annotation, the cup is in image 2.",
        "The annotation says that the cup moved.",
        "The provided answer points to image 2.",
        "This is consistent with the given bounding box.",
        "The correct box is on the left.",
        "I was told that it is in image 2.",
        "We are given the answer, so it is image 2.",
        "Since the answer is image 2, the cup must be there.",
        "Since the correct answer is B, the others are wrong.",
        "Knowing the answer, I look at image 2.",
        "As stated, it is in image 2.",
        "As instructed, I look at image 2.",
        "The prompt says that it is in image 2.",
        "The user wants me to reason about image 2.",
        "To justify the answer, look at image 2.",
        "Working backwards from the answer, it is the cup.",
        "I reason as if I had found it myself.",
        "I should not mention the annotation.",
        "I must not reveal that I know.",
        "Without mentioning where it came from: it is the cup.",
        "The reference solution is image 2.",
        "The answer has already been provided.",
        "Based on the given answer, it is the cup.",
        "The expected answer is image 2.",
        "The provided coordinates point to the cup.",
        "The box is given.",
        "The answer key names image 2.",
        "I pretend to look at image 1.",
        "The target box\nis in image 2, as told.",
        "The true label is a cup.",
    ],
)
def test_an_admission_is_found(text: str) -> None:
    assert tells(text)


@pytest.mark.parametrize(
    "text",
    [
        "Image 1 shows a red star. Image 2 shows it on the left.",
        "So the answer is image 2.",
        "The correct answer is (B), because only there the cup is missing.",
        "The right choice must be C.",
        "We are given two images of one street.",
        "I am given four pictures; the cup is in the third.",
        "Given the colour of the roof, it is the same house.",
        "As given in the first image, the cup is blue.",
        "The man is told apart by his hat.",
        "The target object is the cup.",
        "A known landmark is on the right.",
        "The box on the table is red.",
        "The label on the bottle is the same in both images.",
        "As if it were raining, the ground is wet.",
        "The person explains something to a child.",
        "The true size is hard to see.",
        "It looks the same from the right side, so the answer follows.",
        "The instructions on the sign are in red.",
    ],
)
def test_looking_and_concluding_is_no_admission(text: str) -> None:
    assert not tells(text)


def test_what_the_question_says_gives_nothing_away() -> None:
    said = "The annotated part of image 1 is a wheel."
    assert tells(said)
    assert not tells(said, "Find the annotated part of image 1 again in image 2.")
    assert tells(said + " The ground truth is image 2.", "Find the annotated part of image 1 again in image 2.")


def test_a_box_of_the_question_may_be_spoken_of() -> None:
    said = "The given box in image 1 holds a wheel."
    assert tells(said, "Where is the wheel?")
    assert not tells(said, "Find the object at <box> in image 2.")


def located(*boxes: tuple[int | None, Box]) -> Answer:
    return Answer(tuple(Located(image, box) for image, box in boxes))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param(Answer(choice="A"), Answer(choice="A"), True, id="letter"),
        pytest.param(Answer(choice="A"), Answer(choice="B"), False, id="other-letter"),
        pytest.param(Answer(choice="A"), located((1, LEFT)), False, id="letter-and-box"),
        pytest.param(Answer(), Answer(), True, id="both-not-there"),
        pytest.param(Answer(), located((1, LEFT)), False, id="one-not-there"),
        pytest.param(located((1, LEFT)), located((1, NEARLY)), True, id="near"),
        pytest.param(located((1, LEFT)), located((1, RIGHT)), False, id="apart"),
        pytest.param(located((1, LEFT)), located((2, LEFT)), False, id="other-image"),
        pytest.param(located((1, LEFT), (2, RIGHT)), located((2, RIGHT), (1, LEFT)), True, id="order-does-not-matter"),
        pytest.param(located((1, LEFT), (1, LEFT)), located((1, LEFT), (1, RIGHT)), False, id="one-to-one"),
    ],
)
def test_two_answers_agree(one: Answer, other: Answer, same: bool) -> None:
    assert agree(one, other, threshold=0.5) is same
    assert agree(other, one, threshold=0.5) is same


def test_how_near_is_near_enough_is_said() -> None:
    assert agree(located((1, LEFT)), located((1, NEARLY)), threshold=0.8)
    assert not agree(located((1, LEFT)), located((1, NEARLY)), threshold=0.81)


def test_an_answer_that_cannot_be_read_agrees_with_nothing() -> None:
    left = located((1, LEFT))
    assert agreement(left, [left, None, located((1, RIGHT)), located((1, NEARLY))], threshold=0.5) == 0.5
    assert agreement(left, [], threshold=0.5) == 0.0


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        pytest.param('<answer>{"seen": 1, "follows": 3, "own": 5}</answer>', (1, 3, 5), id="plain"),
        pytest.param('<think>Hm.</think> <answer> {"own": 5, "seen": 1, "follows": 3}\n</answer>', (1, 3, 5), id="thought-first"),
        pytest.param('<answer>{"seen": 1, "follows": 3, "own": 5, "note": "x"}</answer>', (1, 3, 5), id="more-than-asked"),
        pytest.param(
            '<answer>{"seen": 1, "follows": 3, "own": 5}</answer> <answer>good</answer>', (1, 3, 5), id="last-readable-counts"
        ),
        pytest.param("Very good reasoning.", Unmarked.MISSING, id="no-tag"),
        pytest.param('{"seen": 4, "follows": 4, "own": 4}', Unmarked.MISSING, id="untagged"),
        pytest.param("<answer>5</answer>", Unmarked.MALFORMED, id="one-number"),
        pytest.param('<answer>{"seen": mark, "follows": mark, "own": mark}</answer>', Unmarked.MALFORMED, id="form-copied"),
        pytest.param('<answer>{"seen": 4, "follows": 4}</answer>', Unmarked.MALFORMED, id="one-missing"),
        pytest.param('<answer>{"seen": "4", "follows": 4, "own": 4}</answer>', Unmarked.MALFORMED, id="text"),
        pytest.param('<answer>{"seen": true, "follows": 4, "own": 4}</answer>', Unmarked.MALFORMED, id="boolean"),
        pytest.param('<answer>{"seen": 4.5, "follows": 4, "own": 4}</answer>', Unmarked.MALFORMED, id="fraction"),
        pytest.param('<answer>{"seen": 0, "follows": 4, "own": 4}</answer>', Unmarked.OFF_SCALE, id="below"),
        pytest.param('<answer>{"seen": 4, "follows": 10, "own": 4}</answer>', Unmarked.OFF_SCALE, id="above"),
        pytest.param("<answer>" + "[" * 100_000 + "</answer>", Unmarked.MALFORMED, id="deep"),
        pytest.param('<answer>{"seen": ' + "9" * 10_000 + ', "follows": 4, "own": 4}</answer>', Unmarked.MALFORMED, id="endless"),
    ],
)
def test_marks_are_read_or_named(text: str, marks: tuple[int, ...] | Unmarked) -> None:
    assert read_marks(text) == (marks if isinstance(marks, Unmarked) else dict(zip(MARKS, marks, strict=True)))


@given(st.text(max_size=200), st.text(max_size=40))
def test_no_text_stops_a_rule(text: str, question: str) -> None:
    assert tells(text, question) in (True, False)
    assert isinstance(read_marks(f"<answer>{text}</answer>"), dict | Unmarked)
