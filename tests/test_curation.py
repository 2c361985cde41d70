"""What becomes of a teacher's attempts: the verdict on each, aid where they fail, agreement between them, and a judge's marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polyground.answer import Answer, Located, write_completion
from polyground.config import RewardConfig, SynthesizeConfig
from polyground.curation import Attempt, Dropped, Judge, Teacher, attempts_at, best_of, furthest_of, taught_answer, verdict
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.prompts import teacher_messages
from polyground.records import Completion, Example, Message, Rollout, Score
from polyground.rewards import Scorer
from polyground.sampling import prompt_keys

LEFT, RIGHT = Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.0, 1.0, 1.0)
EXAMPLE = Example(key="e", task="find", images=(Path("a.png"), Path("b.png")), question="?", target=Answer((Located(2, LEFT),)))
CONFIG = SynthesizeConfig(min_words=3, max_words=12)
SCORER = Scorer([RewardConfig(name="iou")])


def says(think: str, image: int = 2, box: Box = LEFT) -> str:
    return write_completion(think, Answer((Located(image, box),)), [PER_MILLE, PER_MILLE])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param(says("Image 1 has 3 stars. Image 2 has it."), None, id="kept"),
        pytest.param("it is on the left", Dropped.UNREADABLE, id="unreadable"),
        pytest.param("Well. " + says("Image 2 has it."), Dropped.FORMAT, id="text-before-the-reasoning"),
        pytest.param(says("Image 1 has it.", image=1), Dropped.WRONG_IMAGE, id="wrong-image"),
        pytest.param(says("Image 2 has it.", box=RIGHT), Dropped.WRONG_BOX, id="wrong-box"),
        pytest.param(says("It is at [0, 0, 500, 1000]."), Dropped.COORDINATES, id="coordinates"),
        pytest.param(says("The ground truth is image 2."), Dropped.TELLS, id="tells"),
        pytest.param(says("It is."), Dropped.TOO_SHORT, id="too-short"),
        pytest.param(says("Image 2 has it. " * 9), Dropped.TOO_LONG, id="too-long"),
    ],
)
def test_the_verdict_on_a_completion(text: str, why: Dropped | None) -> None:
    completion = Completion(text=text)
    score = SCORER.score(completion, EXAMPLE, [PER_MILLE, PER_MILLE])
    assert verdict(Rollout(example="e", task="find", completion=completion, score=score), EXAMPLE, CONFIG) is why


def test_a_wrong_letter_is_a_wrong_choice() -> None:
    example = Example(key="c", task="count", images=(Path("a.png"),), question="?", target=Answer(choice="B"), choices=("1", "2"))
    completion = Completion(text="<think>There are two of them.</think><answer>A</answer>")
    score = SCORER.score(completion, example, [PER_MILLE])
    assert (
        verdict(Rollout(example="c", task="count", completion=completion, score=score), example, CONFIG) is Dropped.WRONG_CHOICE
    )


def test_the_annotation_is_taught_and_the_teacher_supplies_a_missing_image() -> None:
    answered = Answer((Located(2, RIGHT),))
    assert taught_answer(Answer((Located(1, LEFT),)), answered) == Answer((Located(1, LEFT),))
    assert taught_answer(Answer((Located(None, LEFT),)), answered) == Answer((Located(2, LEFT),))


SERVED: dict[str, Any] = {"teacher": "endpoint", "teacher_base_url": "u", "teacher_model": "m"}
RIGHT_ONE, WRONG_ONE = says("Image 2 has it."), says("Image 1 has it.", image=1)


class Script:
    """Gives the texts of a list per prompt, whose kind is told by its words, and remembers what it was asked."""

    def __init__(self, **texts: Sequence[str]) -> None:
        self.texts = texts
        self.asked: list[tuple[str, str, int]] = []
        """Kind, key and number of completions of each prompt."""

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
        return [self._answers(prompt, key, n) for prompt, key in zip(prompts, prompt_keys(prompts, keys), strict=True)]

    def _answers(self, prompt: Sequence[Message], key: str, n: int) -> list[Completion]:
        text = str(prompt[0].parts[-1])
        kind = "judge" if "Judge the reasoning" in text else "explain" if "The annotation of this question" in text else "ask"
        self.asked.append((kind, key, n))
        return [Completion(text=text) for text in self.texts[kind][:n]]


def grids_of(images: Sequence[Path]) -> list[Grid]:
    return [PER_MILLE] * len(images)


def attempts(script: Script, example: Example = EXAMPLE, **options: Any) -> list[Attempt]:
    config = SynthesizeConfig(**SERVED, min_words=3, **options)
    teacher = Teacher(
        name="t",
        sampler=script,
        ask=lambda e: (teacher_messages(e, grids_of(e.images)), grids_of(e.images)),
        explain=lambda e: (teacher_messages(e, grids_of(e.images), template="explain"), grids_of(e.images)),
        batch=16,
    )
    judge = None if config.judge is None else Judge(name="j", sampler=script, grids_of=grids_of)
    [found] = attempts_at([example], config=config, teacher=teacher, judge=judge, scoring=SCORER.score, seed=0)
    return found


def reasons(found: Sequence[Attempt]) -> list[str | None]:
    return [attempt.why and attempt.why.value for attempt in found]


@pytest.mark.parametrize(
    ("aid", "unaided", "asked", "aided"),
    [
        pytest.param("never", WRONG_ONE, ["ask"], [False], id="never"),
        pytest.param("failed", RIGHT_ONE, ["ask"], [False], id="not-needed"),
        pytest.param("failed", WRONG_ONE, ["ask", "explain"], [False, True], id="failed"),
        pytest.param("always", WRONG_ONE, ["explain"], [True], id="always"),
    ],
)
def test_a_teacher_is_shown_the_annotation_as_the_recipe_says(
    aid: str, unaided: str, asked: list[str], aided: list[bool]
) -> None:
    script = Script(ask=[unaided], explain=[RIGHT_ONE])
    found = attempts(script, aid=aid)
    assert [kind for kind, _, _ in script.asked] == asked
    assert [attempt.aided for attempt in found] == aided
    assert (best_of(found) is None) == (aid == "never")


def test_an_annotation_without_image_is_never_shown() -> None:
    unnamed = Example(key="e", task="diff", images=EXAMPLE.images, question="?", target=Answer((Located(None, LEFT),)))
    for aid in ("failed", "always"):
        script = Script(ask=[says("Image 2 has it.", box=RIGHT)])
        [attempt] = attempts(script, unnamed, aid=aid)
        assert (attempt.aided, attempt.why) == (False, Dropped.WRONG_BOX)


def test_a_teacher_that_disputes_the_annotation_is_heard_and_one_that_admits_it_is_dropped() -> None:
    disputes = "<think>No image has it.</think><answer>unsure</answer>"
    admits = says("The annotation says image 2.")
    found = attempts(Script(explain=[disputes, admits]), aid="always", samples_per_example=2)
    assert reasons(found) == ["disputed", "tells"]
    assert furthest_of(found).why is Dropped.TELLS


@pytest.mark.parametrize(
    ("texts", "share", "kept"),
    [
        pytest.param([RIGHT_ONE, RIGHT_ONE, WRONG_ONE], 0.66, True, id="two-of-three"),
        pytest.param([RIGHT_ONE, WRONG_ONE, WRONG_ONE], 0.66, False, id="one-of-three"),
        pytest.param([RIGHT_ONE, WRONG_ONE, WRONG_ONE], 0.3333, True, id="a-third"),
        pytest.param([RIGHT_ONE, RIGHT_ONE, "?"], 1.0, False, id="the-unreadable-disagrees"),
        pytest.param([RIGHT_ONE] * 3, 1.0, True, id="all"),
        pytest.param([says("Image 2 has it, as the hint says.")] * 2 + [RIGHT_ONE], 1.0, True, id="answers-count-not-words"),
    ],
)
def test_what_attempts_agree_on_is_kept(texts: list[str], share: float, kept: bool) -> None:
    found = attempts(Script(ask=texts), samples_per_example=3, self_consistency=share)
    assert (best_of(found) is not None) == kept
    assert all(attempt.agreement is not None for attempt in found if attempt.why in (None, Dropped.INCONSISTENT))
    assert any(attempt.why is Dropped.INCONSISTENT for attempt in found) != kept


def test_a_question_without_agreement_is_explained_and_the_explanation_is_not_compared() -> None:
    script = Script(ask=[RIGHT_ONE, WRONG_ONE], explain=[RIGHT_ONE, "?"])
    found = attempts(script, samples_per_example=2, self_consistency=1.0, aid="failed")
    assert reasons(found) == ["inconsistent", "wrong_image", None, "unreadable"]
    taught = best_of(found)
    assert taught is not None
    assert (taught.aided, taught.agreement) == (True, None)


def marks(seen: int, follows: int, own: int) -> str:
    return f'<answer>{{"seen": {seen}, "follows": {follows}, "own": {own}}}</answer>'


@pytest.mark.parametrize(
    ("replies", "options", "why", "mean"),
    [
        pytest.param([marks(5, 4, 5)], {}, None, (5, 4, 5), id="good"),
        pytest.param([marks(5, 5, 3)], {}, "poor", (5, 5, 3), id="the-lowest-counts"),
        pytest.param([marks(5, 5, 3)], {"min_mark": 3}, None, (5, 5, 3), id="low-threshold"),
        pytest.param(["Good."], {}, "unmarked", None, id="unreadable"),
        pytest.param([marks(5, 5, 5), marks(3, 4, 5)], {"samples": 2, "temperature": 1.0}, None, (4, 4.5, 5), id="mean-of-two"),
        pytest.param(["?", marks(3, 5, 5)], {"samples": 2, "temperature": 1.0}, "poor", (3, 5, 5), id="readable-ones-count"),
        pytest.param(["?", "?"], {"samples": 2, "temperature": 1.0}, "unmarked", None, id="none-readable"),
    ],
)
def test_a_judge_has_the_last_word(
    replies: list[str], options: dict[str, Any], why: str | None, mean: tuple[float, ...] | None
) -> None:
    [attempt] = attempts(Script(ask=[RIGHT_ONE], judge=replies), judge=options)
    assert attempt.why == why
    assert attempt.marks == (None if mean is None else dict(zip(("seen", "follows", "own"), mean, strict=True)))


def test_a_judge_is_shown_only_what_passed_everything_else() -> None:
    script = Script(ask=[WRONG_ONE], judge=[])
    assert reasons(attempts(script, judge={})) == ["wrong_image"]
    assert [kind for kind, _, _ in script.asked] == ["ask"]


def test_a_poorly_marked_attempt_is_explained_and_the_explanation_is_judged() -> None:
    script = Script(ask=[RIGHT_ONE], explain=[says("Image 2 has it there.")], judge=[marks(1, 1, 1)])
    assert reasons(attempts(script, judge={}, aid="failed")) == ["poor", "poor"]
    assert [kind for kind, _, _ in script.asked] == ["ask", "judge", "explain", "judge"]


def test_of_several_candidates_the_best_marked_is_taught() -> None:
    tight, loose = says("Image 2 has it tight."), says("Image 2 has it loosely.", box=Box(0.0, 0.0, 0.6, 1.0))

    class Fair(Script):
        def _answers(self, prompt: Sequence[Message], key: str, n: int) -> list[Completion]:
            given = super()._answers(prompt, key, n)
            loosely = "loosely" in str(prompt[0].parts[-1])
            return [Completion(text=marks(5, 5, 5) if loosely else marks(5, 4, 4))] if self.asked[-1][0] == "judge" else given

    for candidates, best in ((1, "Image 2 has it tight."), (2, "Image 2 has it loosely.")):
        script = Fair(ask=[loose, tight, tight], judge=[""])
        found = attempts(script, samples_per_example=3, judge={"candidates": candidates})
        taught = best_of(found)
        assert taught is not None
        assert best in taught.rollout.completion.text
        # The same text is judged once.
        assert [(kind, key) for kind, key, _ in script.asked] == [("ask", "e"), ("judge", "e#1"), ("judge", "e#0")][
            : 1 + candidates
        ]
        assert reasons(found).count("passed_over") == 3 - candidates


def test_every_example_gets_its_own_attempts_in_order() -> None:
    examples = [Example(key=key, task="t", images=EXAMPLE.images, question="?", target=EXAMPLE.target) for key in "abc"]
    config = SynthesizeConfig(**SERVED, aid="failed")

    class Some(Script):
        def _answers(self, prompt: Sequence[Message], key: str, n: int) -> list[Completion]:
            given = super()._answers(prompt, key, n)
            return [Completion(text=WRONG_ONE)] if key == "b" and self.asked[-1][0] == "ask" else given

    def ask(template: str) -> Any:
        return lambda e: (teacher_messages(e, grids_of(e.images), template=template), grids_of(e.images))

    teacher = Teacher(
        name="t", sampler=Some(ask=[RIGHT_ONE], explain=[RIGHT_ONE]), ask=ask("ask"), explain=ask("explain"), batch=2
    )
    found = attempts_at(examples, config=config, teacher=teacher, judge=None, scoring=SCORER.score, seed=0)
    assert [[attempt.rollout.example for attempt in each] for each in found] == [["a"], ["b", "b"], ["c"]]
    assert [[attempt.aided for attempt in each] for each in found] == [[False], [False, True], [False]]


def test_the_furthest_of_dropped_attempts_is_told() -> None:
    def dropped(why: Dropped | None) -> Attempt:
        return Attempt(
            rollout=Rollout(example="e", task="t", completion=Completion(text=""), score=Score(total=0, parts={})), why=why
        )

    found = [dropped(Dropped.WRONG_BOX), dropped(Dropped.POOR), dropped(Dropped.UNREADABLE)]
    assert furthest_of(found).why is Dropped.POOR
    assert best_of(found) is None
