"""What becomes of questions put to a teacher: attempts, unaided or aided by the annotation, each dropped for a reason or taught.

Who is asked, and what is written where, is the stage's business; sampling and scoring are `rollout`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any

from polyground.answer import Answer, Located, answer_tags, follows_contract, reasoning_of
from polyground.config import JudgeConfig, SynthesizeConfig
from polyground.geometry import Grid
from polyground.prompts import can_be_explained, judge_messages
from polyground.records import Completion, Example, Message, Rollout, Score
from polyground.rollout import Ask, Group, is_confirmed, rollout_groups
from polyground.rollout import Judge as Scoring
from polyground.sampling import Sampler
from polyground.teaching import Unmarked, agreement, mentions_coordinates, read_marks, tells

GridsOf = Callable[[Sequence[Path]], Sequence[Grid]]
"""The grid of each image of one prompt."""

Usage = Callable[[], Mapping[str, Any]]
"""What was asked of servers and spent there so far."""

UNSURE = "unsure"
"""The answer of a teacher that was shown the annotation and finds it contradicted."""


class Dropped(StrEnum):
    """Why a teacher's completion is not taught, in the order in which the rules are applied."""

    UNREADABLE = "unreadable"
    DISPUTED = "disputed"
    """The teacher was shown the annotation and says that the images contradict it."""
    FORMAT = "format"
    """Readable, but not one think block and one answer block."""
    WRONG_IMAGE = "wrong_image"
    WRONG_BOX = "wrong_box"
    WRONG_CHOICE = "wrong_choice"
    TELLS = "tells"
    """The reasoning admits that the answer was known, or speaks of how it was asked for."""
    COORDINATES = "coordinates"
    """The reasoning holds numbers that a viewer of the images could not have read off them."""
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    INCONSISTENT = "inconsistent"
    """Too few of the unaided attempts say the same."""
    PASSED_OVER = "passed_over"
    """The judge was shown better ones instead, or the same one."""
    UNMARKED = "unmarked"
    """No reply of the judge could be read."""
    POOR = "poor"
    """One of the judge's marks is too low."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One completion of a teacher and what the rules say of it."""

    rollout: Rollout
    why: Dropped | None
    """None when it is fit to be taught."""
    aided: bool = False
    """Whether the teacher was shown the annotation."""
    agreement: float | None = None
    """Share of the unaided attempts, itself among them, that say the same; None where that is not asked for."""
    marks: Mapping[str, float] | None = None
    """The judge's, each the mean of its readable replies; None where there is no judge or it was not shown this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """Who reasons: scripted from the facts of the simulated world, or a model behind a server."""

    name: str
    """Provenance, written to every row."""
    sampler: Sampler
    ask: Ask
    """Unaided."""
    explain: Ask
    """Shown the annotation."""
    batch: int
    """Questions asked at once."""
    usage: Usage | None = None
    """None without a server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """Who marks reasoning."""

    name: str
    sampler: Sampler
    grids_of: GridsOf
    usage: Usage | None = None
    """None where the judge is the teacher, whose usage it is."""


def attempts_at(
    examples: Sequence[Example],
    *,
    config: SynthesizeConfig,
    teacher: Teacher,
    judge: Judge | None,
    scoring: Scoring,
    seed: int,
) -> list[list[Attempt]]:
    """All attempts at each example: unaided ones, then, as `config.aid` says, those of a teacher shown the annotation."""

    def made(few: Sequence[Example], ask: Ask, *, aided: bool) -> list[list[Attempt]]:
        groups = rollout_groups(
            few,
            sampler=teacher.sampler,
            ask=ask,
            judge=scoring,
            n=config.samples_per_example,
            temperature=config.temperature,
            max_tokens=config.max_completion_length,
            seed=seed,
            batch=max(1, len(few)),
        )
        tried = [_tried(group, config, aided=aided) for group in groups]
        if judge is None or config.judge is None:
            return tried
        return _judged(few, tried, judge=judge, config=config.judge, seed=seed)

    found: dict[str, list[Attempt]] = {example.key: [] for example in examples}
    unaided = [example for example in examples if config.aid != "always" or not can_be_explained(example)]
    for example, attempts in zip(unaided, made(unaided, teacher.ask, aided=False), strict=True):
        found[example.key] += attempts
    if config.aid != "never":
        failed = [example for example in examples if can_be_explained(example) and best_of(found[example.key]) is None]
        for example, attempts in zip(failed, made(failed, teacher.explain, aided=True), strict=True):
            found[example.key] += attempts
    return [found[example.key] for example in examples]


def best_of(attempts: Sequence[Attempt]) -> Attempt | None:
    """The attempt to teach: the best marks, the lowest first, then the best score; None when there is no fit one."""
    return max((attempt for attempt in attempts if attempt.why is None), key=_worth, default=None)


def _worth(attempt: Attempt) -> tuple[float, float, float]:
    marks = attempt.marks.values() if attempt.marks else (0.0,)
    return min(marks), sum(marks), attempt.rollout.score.total


def furthest_of(attempts: Sequence[Attempt]) -> Attempt:
    """Of dropped attempts the one that came furthest, the first of several; there must be one."""
    order = list(Dropped)
    return max(attempts, key=lambda attempt: -1 if attempt.why is None else order.index(attempt.why))


def verdict(rollout: Rollout, example: Example, config: SynthesizeConfig) -> Dropped | None:
    """Why a completion is dropped by what it says itself, the gravest reason first; None when nothing speaks against it."""
    score, text = rollout.score, rollout.completion.text
    if score.unreadable is not None:
        return Dropped.DISPUTED if answer_tags(text)[-1:] == [UNSURE] else Dropped.UNREADABLE
    if not follows_contract(text):
        return Dropped.FORMAT
    if not is_confirmed(score, threshold=config.pass_iou):
        if example.target.choice is not None:
            return Dropped.WRONG_CHOICE
        return Dropped.WRONG_IMAGE if score.image_correct is not None and score.image_correct < 1 else Dropped.WRONG_BOX
    return _fault(reasoning_of(text) or "", example, config)


def _fault(reasoning: str, example: Example, config: SynthesizeConfig) -> Dropped | None:
    if tells(reasoning, example.question):
        return Dropped.TELLS
    if mentions_coordinates(reasoning):
        return Dropped.COORDINATES
    words = len(reasoning.split())
    if words < config.min_words:
        return Dropped.TOO_SHORT
    return Dropped.TOO_LONG if words > config.max_words else None


def taught_answer(target: Answer, answered: Answer) -> Answer:
    """The annotation, which is more exact than any teacher; the image numbers are the teacher's where it has none."""
    if all(located.image is not None for located in target.boxes):
        return target
    images = [located.image for located in answered.boxes]
    return Answer(tuple(_with_image(t, images, i) for i, t in enumerate(target.boxes))) if images else answered


def _with_image(target: Located, images: Sequence[int | None], index: int) -> Located:
    return Located(target.image if target.image is not None else images[min(index, len(images) - 1)], target.box)


def _tried(group: Group, config: SynthesizeConfig, *, aided: bool) -> list[Attempt]:
    attempts = [Attempt(rollout=r, why=verdict(r, group.example, config), aided=aided) for r in group.rollouts]
    if config.self_consistency is None or aided:
        return attempts
    answers = [rollout.score.answer for rollout in group.rollouts]
    return [_compared(attempt, answers, config.self_consistency, config.pass_iou) for attempt in attempts]


def _compared(attempt: Attempt, answers: Sequence[Answer | None], share: float, threshold: float) -> Attempt:
    answer = attempt.rollout.score.answer
    if attempt.why is not None or answer is None:
        return attempt
    same = agreement(answer, answers, threshold=threshold)
    # A third of three attempts is no less than 0.33333.
    return replace(attempt, agreement=same, why=None if same >= share - 1e-4 else Dropped.INCONSISTENT)


def _judged(
    examples: Sequence[Example], tried: Sequence[list[Attempt]], *, judge: Judge, config: JudgeConfig, seed: int
) -> list[list[Attempt]]:
    """The same attempts, the best `candidates` of each example with their marks."""
    places = {
        f"{example.key}#{number}": (i, number)
        for i, (example, attempts) in enumerate(zip(examples, tried, strict=True))
        for number in _candidates(attempts, config.candidates)
    }

    def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        i, number = places[example.key]
        rollout, grids = tried[i][number].rollout, judge.grids_of(example.images)
        reasoning = reasoning_of(rollout.completion.text) or ""
        answer = taught_answer(example.target, rollout.score.answer or example.target)
        return judge_messages(example, grids, reasoning=reasoning, answer=answer), grids

    groups = rollout_groups(
        [replace(examples[i], key=name) for name, (i, _) in places.items()],
        sampler=judge.sampler,
        ask=ask,
        judge=_marks_of,
        n=config.samples,
        temperature=config.temperature,
        max_tokens=config.max_completion_length,
        seed=seed,
        batch=max(1, len(places)),
    )
    judged = [[_unless_fit(attempt) for attempt in attempts] for attempts in tried]
    for group in groups:
        i, number = places[group.example.key]
        judged[i][number] = _marked(tried[i][number], group, config.min_mark)
    return judged


def _unless_fit(attempt: Attempt) -> Attempt:
    return attempt if attempt.why is not None else replace(attempt, why=Dropped.PASSED_OVER)


def _candidates(attempts: Sequence[Attempt], most: int) -> list[int]:
    """Positions of the best attempts that are fit so far, each text once."""
    by_text = {a.rollout.completion.text: n for n, a in reversed(list(enumerate(attempts))) if a.why is None}
    return sorted(sorted(by_text.values()), key=lambda n: -attempts[n].rollout.score.total)[:most]


def _marks_of(completion: Completion, example: Example, grids: Sequence[Grid]) -> Score:
    """A judge's reply as a score: the marks are its parts, the lowest one its total."""
    marks = read_marks(completion.text)
    if isinstance(marks, Unmarked):
        return Score(total=0.0, parts={}, unreadable=marks.value)
    return Score(total=min(marks.values()), parts=dict(marks))


def _marked(attempt: Attempt, group: Group, min_mark: float) -> Attempt:
    read = [rollout.score.parts for rollout in group.rollouts if rollout.score.unreadable is None]
    if not read:
        return replace(attempt, why=Dropped.UNMARKED)
    marks = {name: fmean(parts[name] for parts in read) for name in read[0]}
    return replace(attempt, marks=marks, why=None if min(marks.values()) >= min_mark - 1e-9 else Dropped.POOR)
