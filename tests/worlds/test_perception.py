"""Multiple choices of the world: one right letter, and training kinds apart from those of the test sets."""

import random
from collections import Counter
from pathlib import Path

import pytest

from polyground.answer import Answer, follows_contract, read_answer
from polyground.geometry import PER_MILLE
from polyground.records import Example
from polyground.worlds.build import choice_row
from polyground.worlds.language import PERCEPTION, PRACTICE
from polyground.worlds.perception import BLINK_TASKS, MMIU_TASKS, PRACTICE_TASKS, ChoiceQuestion, about_scene, ask_choice
from polyground.worlds.pretraining import Mix, sample_step
from polyground.worlds.scenes import Scene, sample_scene
from polyground.worlds.tasks import Draw, UnluckyError
from polyground.worlds.teacher import Mistake, mistaken_completion, reason


def test_training_asks_nothing_that_the_test_sets_ask() -> None:
    assert not set(PRACTICE_TASKS) & {*BLINK_TASKS, *MMIU_TASKS}
    assert not {text for texts in PRACTICE.values() for text in texts} & set(PERCEPTION.values())


def answers(task: str, question: str, scene: Scene, choices: tuple[str, ...]) -> list[str]:
    """The choices that fit a scene, found without the generator's own facts."""
    words = question.replace("?", " ").split()

    def named(word: str) -> bool:
        return word in words

    match task:
        case "colour":
            return [c for c in choices if any(i.colour == c and named(i.shape) for i in scene.items)]
        case "shape":
            return [c for c in choices if any(i.shape == c and named(i.colour) for i in scene.items)]
        case "size":
            return [c for c in choices if any(i.size == c and named(i.shape) and named(i.colour) for i in scene.items)]
        case "count":
            numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
            return [c for c in choices if c == numbers[len(scene.items)]]
        case _:
            return [c for c in choices if any(f"{i.colour} {i.shape}" == c for i in scene.items)]


@pytest.mark.parametrize("task", PRACTICE_TASKS)
def test_exactly_one_choice_fits_the_scene(task: str) -> None:
    rng = random.Random(task)
    rights: Counter[int] = Counter()
    for _ in range(60):
        scene = sample_scene(rng)
        try:
            text, choices, right, _ = about_scene(rng, task, scene)
        except UnluckyError:
            continue
        assert len(set(choices)) == len(choices) >= 3
        assert answers(task, text, scene, choices) == [choices[right]]
        rights[right] += 1
    assert len(rights) >= 3  # the right one stands anywhere


@pytest.mark.parametrize("task", PRACTICE_TASKS)
def test_among_several_images_the_question_says_which_to_look_at(task: str) -> None:
    rng = random.Random(task)
    for _ in range(20):
        question = ask_choice(rng, task, Draw())
        assert question.image is not None
        assert f"in image {question.image}" in question.text
        scene = question.pictures[question.image - 1].scene
        assert answers(task, question.text, scene, question.choices) == [question.choices[question.right]]


def example_of(question: ChoiceQuestion) -> Example:
    images = tuple(Path(f"{n}.png") for n in range(len(question.pictures)))
    return Example(
        key=f"w/{question.task}/0",
        task=question.task,
        images=images,
        question=question.text,
        choices=question.choices,
        target=Answer(choice=question.letter),
    )


def test_the_teacher_looks_at_the_image_and_concludes() -> None:
    question = ask_choice(random.Random(1), "count", Draw())
    row = choice_row(question, ["a.png"] * len(question.pictures), key="count/0")
    text = reason(row)
    assert text.startswith(f"Image {question.image}: ")
    assert text.endswith(f"There are {question.choices[question.right]} objects.")


@pytest.mark.parametrize("mistake", list(Mistake))
def test_a_mistaken_teacher_gives_another_letter_or_breaks_the_form(mistake: Mistake) -> None:
    rng = random.Random(mistake)
    for task in PRACTICE_TASKS:
        question = ask_choice(rng, task, Draw())
        example = example_of(question)
        grids = [PER_MILLE] * len(example.images)
        row = choice_row(question, [str(path) for path in example.images], key=f"{task}/0")
        text = mistaken_completion(row, example, grids, rng, mistake)
        found = read_answer(text, grids)
        if mistake is Mistake.MALFORMED:
            assert not follows_contract(text) or not isinstance(found, Answer)
        elif mistake is Mistake.GROUND_TRUTH:
            assert found == example.target
            assert len(text) > len(reason(row)) + 40
        else:
            assert isinstance(found, Answer)
            assert found.choice not in (None, example.target.choice)


def test_pretraining_practises_letters_on_one_image() -> None:
    mix = Mix(listing=0, finding=0, several=0, choosing=1, text=0)
    scenes, samples = sample_step(random.Random(5), scenes=6, samples=30, mix=mix)
    assert {sample.completion for sample in samples} == {"A", "B", "C", "D"}
    assert all(len(sample.images) == 1 and "\n(C) " in sample.prompt for sample in samples)
    assert len(scenes) == 6
