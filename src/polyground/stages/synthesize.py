"""Let a teacher reason about training questions, and keep only what the scorer confirms.

Rows of `kept.jsonl` are the example itself plus `reasoning`, `answer` (on unit coordinates: written on the student's grid
by the training stage), `score` and where they come from. What was dropped, and why, is in `rejected.jsonl`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

from polyground.answer import Answer, Located, follows_contract, reasoning_of
from polyground.config import Recipe, SynthesizeConfig
from polyground.conventions import GRIDS, Convention, load_convention, named_grid
from polyground.errors import BudgetError, ConfigError, DataError
from polyground.geometry import PER_MILLE, Grid
from polyground.imagefile import image_size
from polyground.prompts import PROMPT_VERSION, teacher_messages
from polyground.records import Example, Message, Rollout, answer_to_json
from polyground.rewards import Scorer
from polyground.rollout import Ask, Group, is_confirmed, rollout_groups
from polyground.sampling import Sampler, sample_seed
from polyground.sampling.scripted import ScriptedSampler
from polyground.stages import own_splits, read_split, scene_paths, split_identity, stage_folder, track
from polyground.storage import RunFolder
from polyground.vision import canvas_of
from polyground.worlds.teacher import read_scene_rows, row_of, scripted_completion

GridsOf = Callable[[Sequence[Path]], Sequence[Grid]]
"""The grid of each image of one prompt."""


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
        "synthesize": _deciding(config),
        "rewards": [reward.to_json() for reward in recipe.rewards],
        "prompt_version": PROMPT_VERSION,
        "data": split_identity(recipe, "train"),
    }
    with stage_folder(recipe, "synthesize", "synthesize", identity) as folder:
        if folder.complete:
            return folder.summary
        done = folder.done_keys("kept.jsonl") | folder.done_keys("rejected.jsonl")
        teacher = open_teacher(recipe, "train", examples)
        origin = {"teacher": teacher.name, "seed": recipe.seed}

        def groups_of(few: Sequence[Example]) -> Iterator[Group]:
            return rollout_groups(
                few,
                sampler=teacher.sampler,
                ask=teacher.ask,
                judge=Scorer(recipe.rewards).score,
                n=config.samples_per_example,
                temperature=config.temperature,
                max_tokens=config.max_completion_length,
                seed=recipe.seed,
                batch=teacher.batch,
                done=done,
            )

        stopped: dict[str, Any] = {}
        try:
            for group in track(groups_of(examples), "synthesize", total=len(examples), done=len(done)):
                _keep_or_drop(folder, group, config=config, origin=origin)
                done.add(group.example.key)
        except BudgetError as error:
            if config.endpoint.on_budget == "stop":
                raise
            stopped = {"stopped": str(error)}
            # Of the batch that was cut, what has been answered.
            for example in [example for example in examples if example.key not in done][: teacher.batch]:
                with suppress(BudgetError):
                    for group in groups_of([example]):
                        _keep_or_drop(folder, group, config=config, origin=origin)
                        done.add(example.key)
        summary = _summarize(folder, asked=len(done)) | stopped | ({"endpoint": teacher.usage()} if teacher.usage else {})
        if not summary["kept"]:
            raise DataError(f"{folder.path}: the teacher's answers were all dropped ({summary['dropped']}); see rejected.jsonl")
        return folder.finish(summary).summary


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """Who reasons: scripted from the facts of the simulated world, or a model behind a server."""

    name: str
    """Provenance, written to every row."""
    sampler: Sampler
    ask: Ask
    batch: int
    """Questions asked at once."""
    usage: Callable[[], Mapping[str, Any]] | None = None
    """What was asked of servers and spent there so far; None without one."""


def open_teacher(recipe: Recipe, split: str, examples: Sequence[Example]) -> Teacher:
    """The recipe's teacher for the examples of a split."""
    grids_of, convention = teacher_grids(recipe.synthesize)
    if recipe.synthesize.teacher == "scripted":
        sampler, name, batch = _scripted(recipe, split, examples)
    else:
        return _endpoint(recipe, convention, ask_of(grids_of))
    return Teacher(name=name, sampler=sampler, ask=ask_of(grids_of), batch=batch)


def ask_of(grids_of: GridsOf) -> Ask:
    """How the teacher is asked: the annotation hidden, and the grid of its boxes told."""

    def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        grids = grids_of(example.images)
        return teacher_messages(example, grids), grids

    return ask


def teacher_grids(config: SynthesizeConfig) -> tuple[GridsOf, Convention | None]:
    """The grids a teacher writes boxes of a prompt's images on, and its convention where `teacher_grid` is a model folder.

    Raises ConfigError for neither a known name nor a folder.
    """
    name = config.teacher_grid
    if name in GRIDS:
        if config.teacher_max_pixels_total is not None:
            raise ConfigError(
                f"synthesize.teacher_max_pixels_total needs the folder of the model served as synthesize.teacher_grid; "
                f"with {name!r} images are sent as they are"
            )
        if named_grid(name, 1, 1) == named_grid(name, 2, 2):
            return lambda images: [named_grid(name, 1, 1)] * len(images), None
        return lambda images: [named_grid(name, *image_size(image)) for image in images], None
    if not Path(name).is_dir():
        raise ConfigError(
            f"synthesize.teacher_grid {name!r} is neither one of {', '.join(GRIDS)} nor a model folder; name how the teacher "
            "writes boxes"
        )
    convention = load_convention(name, max_pixels_total=config.teacher_max_pixels_total)
    if convention.per_mille:
        return lambda images: [PER_MILLE] * len(images), convention

    def pixels(images: Sequence[Path]) -> list[Grid]:
        return [canvas_of(image, image_size(image), convention, images=len(images)).grid for image in images]

    return pixels, convention


def _scripted(recipe: Recipe, split: str, examples: Sequence[Example]) -> tuple[Sampler, str, int]:
    if split in own_splits(recipe):
        raise ConfigError(
            "synthesize.teacher is scripted, which knows the simulated world only; for data of your own set "
            "synthesize.teacher to endpoint, with synthesize.teacher_base_url and synthesize.teacher_model"
        )
    rows = {key: row for path in scene_paths(recipe, split) for key, row in read_scene_rows(path).items()}
    by_key: Mapping[str, Example] = {example.key: example for example in examples}
    rate = recipe.synthesize.error_rate

    def script(key: str, sample: int, seed: int) -> str:
        example = by_key[key]
        rng = Random(sample_seed(seed, key, sample))
        return scripted_completion(row_of(example, rows), example, [PER_MILLE] * len(example.images), rng, error_rate=rate)

    return ScriptedSampler(script), "scripted", 32


def _endpoint(recipe: Recipe, convention: Convention | None, ask: Ask) -> Teacher:
    from polyground.sampling.endpoint import EndpointSampler

    config = recipe.synthesize
    if not config.teacher_base_url or config.teacher_model is None:
        raise ConfigError("synthesize.teacher: endpoint needs teacher_base_url and teacher_model")
    sampler = EndpointSampler.from_config(
        config.teacher_base_url,
        config.teacher_model,
        config.endpoint,
        cache=recipe.out / "answers" / "synthesize",
        api_key_env=config.api_key_env,
        convention=convention,
    )
    # Enough that the servers are not idle while the last answers of a batch come in.
    batch = max(16, 4 * config.endpoint.concurrency)
    return Teacher(name=config.teacher_model, sampler=sampler, ask=ask, batch=batch, usage=lambda: sampler.usage)


def _deciding(config: SynthesizeConfig) -> dict[str, Any]:
    """What decides the rows: not where the teacher is served, nor how patiently it is asked."""
    decides = {name: value for name, value in config.to_json().items() if name != "endpoint"}
    return decides | {"teacher_base_url": None, "api_key_env": None}


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
