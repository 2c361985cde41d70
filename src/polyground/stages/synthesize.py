"""Let a teacher reason about training questions, and keep only what the scorer confirms.

Rows of `kept.jsonl` are the example itself plus `reasoning`, `answer` (on unit coordinates: written on the student's grid
by the training stage), `score` and where they come from. What was dropped, and why, is in `rejected.jsonl`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from polyground.answer import Answer, Located, follows_contract, reasoning_of
from polyground.config import Recipe, SynthesizeConfig
from polyground.errors import DataError
from polyground.prompts import PROMPT_VERSION
from polyground.records import Example, Rollout, answer_to_json
from polyground.rollout import Group, is_confirmed, rollout_groups
from polyground.stages import track
from polyground.stages.inputs import read_split, split_identity
from polyground.stages.teachers import open_teacher
from polyground.storage import RunFolder


class Dropped(StrEnum):
    """Why a teacher's completion is not taught."""

    UNREADABLE = "unreadable"
    FORMAT = "format"
    """Readable, but not one think block and one answer block."""
    WRONG_IMAGE = "wrong_image"
    WRONG_BOX = "wrong_box"
    WRONG_CHOICE = "wrong_choice"
    COORDINATES = "coordinates"
    """The reasoning holds numbers that a viewer of the images could not have read off them."""
    TELLS = "tells"
    """The reasoning speaks of a hint, of a given answer, or of the ground truth."""
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Ask the teacher every training question; keep the best attempt that the scorer and the reasoning rules confirm."""
    config = recipe.synthesize
    examples = read_split(recipe, "train")[: config.limit]
    identity = {
        "seed": recipe.seed,
        "synthesize": config.to_json(),
        "rewards": [reward.to_json() for reward in recipe.rewards],
        "prompt_version": PROMPT_VERSION,
        "data": split_identity(recipe, "train"),
    }
    with RunFolder(recipe.out / "synthesize", "synthesize", identity) as folder:
        if folder.complete:
            return folder.summary
        done = folder.done_keys("kept.jsonl") | folder.done_keys("rejected.jsonl")
        teacher = open_teacher(recipe, "train", examples)
        groups = rollout_groups(
            examples,
            sampler=teacher.sampler,
            ask=teacher.ask,
            judge=teacher.scorer.score,
            n=config.samples_per_example,
            temperature=config.temperature,
            max_tokens=config.max_completion_length,
            seed=recipe.seed,
            batch=teacher.batch,
            done=done,
        )
        for group in track(groups, "synthesize", total=len(examples), done=len(done)):
            _keep_or_drop(folder, group, config=config, origin={"teacher": teacher.name, "seed": recipe.seed})
        summary = _summarize(folder, asked=len(examples))
        if not summary["kept"]:
            raise DataError(f"{folder.path}: the teacher's answers were all dropped ({summary['dropped']}); see rejected.jsonl")
        return folder.finish(summary).summary


def _keep_or_drop(folder: RunFolder, group: Group, *, config: SynthesizeConfig, origin: Mapping[str, Any]) -> None:
    verdicts = [verdict(rollout, group.example, config) for rollout in group.rollouts]
    confirmed = [rollout for rollout, why in zip(group.rollouts, verdicts, strict=True) if why is None]
    origin = {**origin, "prompt_version": PROMPT_VERSION, "attempts": len(verdicts)}
    if confirmed:
        folder.append("kept.jsonl", _row(group.example, max(confirmed, key=lambda rollout: rollout.score.total), origin))
    else:
        row = {"key": group.example.key, "task": group.example.task, "reason": verdicts[0], "reasons": verdicts}
        folder.append("rejected.jsonl", {**row, "text": group.rollouts[0].completion.text, **origin})


def verdict(rollout: Rollout, example: Example, config: SynthesizeConfig) -> Dropped | None:
    """Why a completion is dropped, the gravest reason first; None when it is taught."""
    score, text = rollout.score, rollout.completion.text
    if score.unreadable is not None:
        return Dropped.UNREADABLE
    if not follows_contract(text):
        return Dropped.FORMAT
    if not is_confirmed(score, threshold=config.pass_iou):
        if example.target.choice is not None:
            return Dropped.WRONG_CHOICE
        return Dropped.WRONG_IMAGE if score.image_correct is not None and score.image_correct < 1 else Dropped.WRONG_BOX
    return _fault(reasoning_of(text) or "", config)


def _fault(reasoning: str, config: SynthesizeConfig) -> Dropped | None:
    if tells(reasoning):
        return Dropped.TELLS
    if mentions_coordinates(reasoning):
        return Dropped.COORDINATES
    words = len(reasoning.split())
    if words < config.min_words:
        return Dropped.TOO_SHORT
    return Dropped.TOO_LONG if words > config.max_words else None


_COORDINATES = re.compile(r"\d+\.\d+|\b\d{3,}\b|\d+\s*(?:px|pixels?)\b|[\[(]\s*\d+\s*,\s*\d+|(?:\d+\s*,\s*){3}\d+|<box>|bbox")
_TELLS = re.compile(
    r"ground[\s-]*truth|annotat(?:ed|ion)"
    r"|\b(?:given|provided|supplied|known|correct|expected|reference) (?:answer|box|solution|target)\b"
    r"|answer (?:is|was) (?:given|provided|known|supplied)|\bhint\b|as (?:given|stated|told|provided)\b",
    re.IGNORECASE,
)


def mentions_coordinates(reasoning: str) -> bool:
    """True for numbers of the size or the shape of a box; counts and image numbers ("image 2", "12 stars") pass.

    >>> mentions_coordinates("Image 2 has 3 stars."), mentions_coordinates("It is at (12, 40).")
    (False, True)
    """
    return _COORDINATES.search(reasoning) is not None


def tells(reasoning: str) -> bool:
    """True for reasoning that gives away that the answer was known beforehand.

    >>> tells("The ground truth is given."), tells("The red star moved.")
    (True, False)
    """
    return _TELLS.search(reasoning) is not None


def _row(example: Example, rollout: Rollout, origin: Mapping[str, Any]) -> dict[str, Any]:
    answered = rollout.score.answer or example.target
    return {
        **example.to_json(),
        "reasoning": reasoning_of(rollout.completion.text),
        "answer": answer_to_json(taught_answer(example.target, answered)),
        "score": rollout.score.to_json(),
        **origin,
    }


def taught_answer(target: Answer, answered: Answer) -> Answer:
    """The annotation, which is more exact than any teacher; the image numbers are the teacher's where it has none."""
    if all(located.image is not None for located in target.boxes):
        return target
    images = [located.image for located in answered.boxes]
    return Answer(tuple(_with_image(t, images, i) for i, t in enumerate(target.boxes))) if images else answered


def _with_image(target: Located, images: Sequence[int | None], index: int) -> Located:
    return Located(target.image if target.image is not None else images[min(index, len(images) - 1)], target.box)


def _summarize(folder: RunFolder, *, asked: int) -> dict[str, Any]:
    kept = list(folder.rows("kept.jsonl"))
    dropped = Counter(row["reason"] for row in folder.rows("rejected.jsonl"))
    return {
        "asked": asked,
        "kept": len(kept),
        "dropped": dict(sorted(dropped.items())),
        "kept_by_task": dict(sorted(Counter(row["task"] for row in kept).items())),
        "mean_words": sum(len(row["reasoning"].split()) for row in kept) / max(1, len(kept)),
    }
