"""The world's language: every word of it is in the corpus, and its templates name the image to look in last."""

import random
import re
from itertools import islice
from types import SimpleNamespace

import pytest

from polyground.sources.mig_bench import named_image
from polyground.worlds import language
from polyground.worlds.perception import BLINK_TASKS, MMIU_TASKS, ask_choice
from polyground.worlds.tasks import TASKS, Draw, ask


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+|[^\sA-Za-z0-9]", text))


def test_every_word_the_world_says_is_in_the_corpus() -> None:
    corpus = set().union(*(words(line) for line in islice(language.corpus(random.Random(0)), 4000)))
    rng = random.Random(1)
    said = [ask(rng, task, draw).text for task in TASKS for draw in (Draw(), Draw(unseen_language=True)) for _ in range(20)]
    choice_questions = [ask_choice(rng, task, Draw()) for task in (*BLINK_TASKS, *MMIU_TASKS) for _ in range(10)]
    said += [text for question in choice_questions for text in (question.text, *question.choices)]
    said += [*language.CONCLUSIONS.values(), *language.LEAKS, language.THINK_FIRST, language.CHOOSE, language.NOTHING]
    said = [re.sub(r"\{\w+\}|<\|box_(start|end)\|>", "", text) for text in said]
    assert set().union(*(words(text) for text in said)) <= corpus


def test_the_corpus_repeats_itself_for_the_same_seed_only() -> None:
    first, again, other = (list(islice(language.corpus(random.Random(seed)), 20)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


FILLERS = {"n": 2, "nth": "second", "k": 1, "i": 1, "box": "[1, 2, 3, 4]", "phrase": "red star"}


@pytest.mark.parametrize("bank", [language.QUESTIONS, language.UNSEEN_QUESTIONS, language.RELATIONS, language.UNSEEN_RELATIONS])
def test_the_image_to_look_in_is_the_last_one_named(bank: dict[str, tuple[str, ...]]) -> None:
    for task, templates in bank.items():
        expected = SimpleNamespace(region=1, group_grounding=None).__dict__.get(task, 2)
        assert [named_image(template.format(**FILLERS)) for template in templates] == [expected] * len(templates)


def test_unseen_phrasings_are_not_those_of_training() -> None:
    seen = {t for bank in (language.QUESTIONS, language.RELATIONS) for templates in bank.values() for t in templates}
    unseen = {
        t for bank in (language.UNSEEN_QUESTIONS, language.UNSEEN_RELATIONS) for templates in bank.values() for t in templates
    }
    assert not seen & unseen
    assert set(language.QUESTIONS) | {"reasoning"} == set(language.TASKS) == set(language.UNSEEN_QUESTIONS) | {"reasoning"}


def test_questions_are_short() -> None:
    assert max(len(template.split()) for template in language.every_template()) <= 30


@pytest.mark.parametrize(("number", "expected"), [(1, "first"), (6, "sixth"), (7, "7th")])
def test_ordinal(number: int, expected: str) -> None:
    assert language.ordinal(number) == expected
