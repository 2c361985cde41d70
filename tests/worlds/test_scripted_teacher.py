"""The scripted teacher: short reasoning without coordinates, and mistakes that can be told apart."""

import random
import re
from pathlib import Path

import pytest

from polyground.answer import Answer, Located, follows_contract, read_answer, reasoning_of
from polyground.errors import DataError
from polyground.geometry import PER_MILLE, Box
from polyground.records import Example
from polyground.worlds.build import scene_row
from polyground.worlds.tasks import TASKS, Draw, ask
from polyground.worlds.teacher import Mistake, mistaken_completion, reason, row_of, scripted_completion

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
ROW = {
    "key": "refer_grounding/0",
    "task": "refer_grounding",
    "images": [
        {"items": [{"phrase": "red star", "box": LEFT}]},
        {"items": [{"phrase": "red star", "box": LEFT}, {"phrase": "blue ring", "box": RIGHT}]},
    ],
    "target": {"image": 2, "item": 0},
    "facts": {"conclusion": "refer_grounding", "phrase": "red star"},
    "looked_at": [1, 2],
}
EXAMPLE = Example(
    key="world/refer_grounding/0",
    task="refer_grounding",
    images=(Path("a.png"), Path("b.png")),
    question="Locate the object of image 1 in image 2.",
    target=Answer((Located(2, Box(*LEFT)),)),
)
GRIDS = [PER_MILLE, PER_MILLE]


def test_without_mistakes_the_teacher_is_right() -> None:
    text = scripted_completion(ROW, EXAMPLE, GRIDS, random.Random(0))
    assert read_answer(text, GRIDS) == EXAMPLE.target
    assert reasoning_of(text) == "Image 1: red star. Image 2: red star, blue ring. Image 1 shows the red star. It is in image 2."


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("unseen", [False, True])
def test_reasoning_is_short_has_no_coordinates_and_ends_with_the_image(task: str, unseen: bool) -> None:
    rng = random.Random(task)
    for _ in range(10):
        question = ask(rng, task, Draw(unseen_language=unseen))
        text = reason(scene_row(question, ["x.png"] * len(question.pictures), key=f"{task}/0"))
        assert text.endswith(f"n image {question.image}.")
        assert len(text.split()) <= 60
        assert not re.search(r"\d\d", text)


@pytest.mark.parametrize(
    ("mistake", "answer"),
    [
        pytest.param(Mistake.WRONG_IMAGE, Answer((Located(1, Box(*LEFT)),)), id="wrong image"),
        pytest.param(Mistake.WRONG_OBJECT, Answer((Located(2, Box(*RIGHT)),)), id="wrong object"),
        pytest.param(Mistake.COORDINATES, EXAMPLE.target, id="coordinates"),
        pytest.param(Mistake.GROUND_TRUTH, EXAMPLE.target, id="ground truth"),
    ],
)
def test_mistakes(mistake: Mistake, answer: Answer) -> None:
    text = mistaken_completion(ROW, EXAMPLE, GRIDS, random.Random(0), mistake)
    assert read_answer(text, GRIDS) == answer
    thought = reasoning_of(text) or ""
    assert bool(re.search(r"\[\d+, ", thought)) == (mistake is Mistake.COORDINATES)
    assert bool(re.search("ground truth|hint", thought)) == (mistake is Mistake.GROUND_TRUTH)


def test_a_malformed_completion_does_not_follow_the_contract_or_cannot_be_read() -> None:
    for seed in range(10):
        text = mistaken_completion(ROW, EXAMPLE, GRIDS, random.Random(seed), Mistake.MALFORMED)
        assert not (follows_contract(text) and isinstance(read_answer(text, GRIDS), Answer))


def test_the_error_rate_is_kept() -> None:
    rng = random.Random(0)
    right = scripted_completion(ROW, EXAMPLE, GRIDS, random.Random(0))
    wrong = sum(scripted_completion(ROW, EXAMPLE, GRIDS, rng, 0.3) != right for _ in range(1000))
    assert 250 < wrong < 350


def test_the_share_of_brief_reasoning_is_kept() -> None:
    rng = random.Random(0)
    brief = f"<think>{reason(ROW, brief=True)}</think>"
    texts = [scripted_completion(ROW, EXAMPLE, GRIDS, rng, brief_rate=0.3) for _ in range(1000)]
    assert 250 < sum(text.startswith(brief) for text in texts) < 350
    assert {read_answer(text, GRIDS) for text in texts} == {EXAMPLE.target}
    assert reason(ROW) == f"Image 1: red star. Image 2: red star, blue ring. {reason(ROW, brief=True)}"


def test_a_missing_scene_row_is_named() -> None:
    assert row_of(EXAMPLE, {"refer_grounding/0": ROW}) is ROW
    with pytest.raises(DataError, match="refer_grounding/0"):
        row_of(EXAMPLE, {})
