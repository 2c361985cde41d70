"""The ten tasks: every question has one right answer, and is what its split says it is."""

import random
import re

import pytest

from polyground.worlds.perception import BLINK_TASKS, MMIU_TASKS, ask_choice
from polyground.worlds.scenes import HELD_OUT_PAIRS, Item
from polyground.worlds.tasks import _GENERATORS, SEVERAL_IMAGES, TASKS, Draw, Question, ask

REPEATS = 25


def questions(task: str, draw: Draw) -> list[Question]:
    rng = random.Random(task)
    return [ask(rng, task, draw) for _ in range(REPEATS)]


def everything(question: Question) -> list[Item]:
    return [item for picture in question.pictures for item in picture.scene.items]


def other_images(question: Question) -> list[Item]:
    return [item for n, p in enumerate(question.pictures, start=1) if n != question.image for item in p.scene.items]


def beside(question: Question) -> list[Item]:
    return [item for item in question.pictures[question.image - 1].scene.items if item != question.item]


def pair(item: Item) -> tuple[str, str]:
    return item.colour, item.shape


def test_every_task_has_a_generator() -> None:
    assert tuple(_GENERATORS) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_an_object_of_the_image_asked_for(task: str) -> None:
    for question in questions(task, Draw()):
        assert question.item in question.pictures[question.image - 1].scene.items
        assert 2 <= len(question.pictures) <= 4
        assert all(1 <= len(picture.scene.items) <= 4 for picture in question.pictures)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_the_only_one_of_its_colour_and_shape_there(task: str) -> None:
    for question in questions(task, Draw()):
        assert pair(question.item) not in {pair(item) for item in beside(question)}


@pytest.mark.parametrize("task", TASKS)
def test_training_shows_no_held_out_pair(task: str) -> None:
    for question in questions(task, Draw()):
        assert not {pair(item) for item in everything(question)} & HELD_OUT_PAIRS


@pytest.mark.parametrize("task", TASKS)
def test_unseen_pairs_are_asked_for(task: str) -> None:
    for question in questions(task, Draw(target="held_out", others="any")):
        assert pair(question.item) in HELD_OUT_PAIRS


@pytest.mark.parametrize("task", SEVERAL_IMAGES)
def test_more_images_than_in_training(task: str) -> None:
    assert {len(question.pictures) for question in questions(task, Draw(images=(5, 6)))} == {5, 6}


@pytest.mark.parametrize("task", ["diff", "view_diff"])
def test_differences_are_of_two_images(task: str) -> None:
    assert {len(question.pictures) for question in questions(task, Draw(images=(5, 6)))} == {2}


def test_diff_changes_one_object_and_nothing_else() -> None:
    for question in questions("diff", Draw()):
        assert len(set(beside(question)) ^ set(other_images(question))) <= 1
        assert question.item not in other_images(question)


def test_only_the_common_object_is_in_all_images() -> None:
    for question in questions("common_object", Draw()):
        shared = set.intersection(*({pair(item) for item in picture.scene.items} for picture in question.pictures))
        assert shared == {pair(question.item)}


@pytest.mark.parametrize("task", ["group_grounding", "refer_grounding"])
def test_the_object_is_in_no_distracting_image(task: str) -> None:
    for question in questions(task, Draw()):
        distracting = other_images(question) if task == "group_grounding" else other_images(question)[1:]
        assert pair(question.item) not in {pair(item) for item in distracting}


@pytest.mark.parametrize("task", ["object_tracking", "multi_view", "correspondence"])
def test_the_box_in_the_question_marks_an_object_of_the_first_image(task: str) -> None:
    for question in questions(task, Draw()):
        [numbers] = re.findall(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>", question.text)
        corners = [int(n) / 1000 for n in numbers]
        marked = [
            item
            for item in question.pictures[0].scene.items
            if [item.box.x0, item.box.y0, item.box.x1, item.box.y1] == pytest.approx(corners, abs=0.001)
        ]
        assert len(marked) == 1
        if task == "correspondence":
            assert marked[0].shape == question.item.shape
            assert question.item.shape not in {item.shape for item in beside(question)}
        else:
            assert marked[0].look == question.item.look


def test_relations_hold_for_the_answer_alone() -> None:
    rng = random.Random(0)
    for unseen in (False, True):
        for _ in range(80):
            question = ask(rng, "reasoning", Draw(unseen_language=unseen))
            relation, others = question.facts["conclusion"], beside(question)
            x = question.item.box.center[0]
            match relation:
                case "largest" | "smallest":
                    ranks = [other.box.area for other in others]
                    assert all((question.item.box.area > r) == (relation == "largest") for r in ranks)
                case "leftmost":
                    assert all(x < other.box.center[0] for other in others)
                case "rightmost":
                    assert all(x > other.box.center[0] for other in others)
                case "same_colour":
                    assert question.facts["colour"] == question.item.colour not in {other.colour for other in others}
                case "same_shape":
                    assert question.facts["shape"] == question.item.shape not in {other.shape for other in others}
                case "other_colour":
                    assert {other.colour for other in others} == {question.facts["colour"]} != {question.item.colour}
                case _:
                    assert question.facts["other"] in question.text


@pytest.mark.parametrize("task", [*BLINK_TASKS, *MMIU_TASKS])
def test_choices_differ_and_hold_the_right_one(task: str) -> None:
    rng = random.Random(0)
    asked = [ask_choice(rng, task, Draw()) for _ in range(REPEATS)]
    assert all(2 <= len(question.pictures) <= 4 for question in asked)
    assert all(len(set(question.choices)) == len(question.choices) > question.right for question in asked)
    assert len({question.letter for question in asked}) > 1


def test_counts_are_right() -> None:
    rng = random.Random(0)
    for _ in range(REPEATS):
        question = ask_choice(rng, "Counting", Draw())
        assert question.choices[question.right] == str(sum(len(picture.scene.items) for picture in question.pictures))


def test_a_question_has_at_least_two_images() -> None:
    with pytest.raises(ValueError, match="2 to 6 images"):
        Draw(images=(1, 3))
