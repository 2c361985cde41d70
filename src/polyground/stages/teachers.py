"""The teacher of synthesis as a sampler: scripted from the facts of the simulated world, or a model behind a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from polyground.config import Recipe
from polyground.errors import ConfigError
from polyground.geometry import PER_MILLE, Grid
from polyground.prompts import teacher_messages
from polyground.records import Example, Message
from polyground.rewards import Scorer
from polyground.rollout import Ask
from polyground.sampling import Sampler, sample_seed
from polyground.sampling.scripted import ScriptedSampler
from polyground.stages.inputs import own_splits, scenes_path
from polyground.worlds.teacher import read_scene_rows, row_of, scripted_completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """Who reasons, and how it is asked and scored."""

    name: str
    """Provenance, written to every row."""
    sampler: Sampler
    ask: Ask
    scorer: Scorer
    batch: int
    """Questions asked at once."""


def open_teacher(recipe: Recipe, split: str, examples: Sequence[Example]) -> Teacher:
    """The recipe's teacher for the examples of a split."""
    sampler, name, batch = _scripted(recipe, split, examples) if recipe.synthesize.teacher == "scripted" else _endpoint(recipe)
    return Teacher(name=name, sampler=sampler, ask=ask_teacher, scorer=Scorer(recipe.rewards), batch=batch)


def ask_teacher(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
    """The annotation is hidden. Boxes are asked for per-mille, whatever the teacher's own convention: the prompt says so."""
    grids = [PER_MILLE] * len(example.images)
    return teacher_messages(example, grids), grids


def _scripted(recipe: Recipe, split: str, examples: Sequence[Example]) -> tuple[Sampler, str, int]:
    if split in own_splits(recipe):
        raise ConfigError(
            "synthesize.teacher is scripted, which knows the simulated world only; for data of your own set "
            "synthesize.teacher to endpoint, with synthesize.teacher_base_url and synthesize.teacher_model"
        )
    rows = read_scene_rows(scenes_path(recipe, split))
    by_key: Mapping[str, Example] = {example.key: example for example in examples}
    rate = recipe.synthesize.error_rate

    def script(key: str, sample: int, seed: int) -> str:
        example = by_key[key]
        rng = Random(sample_seed(seed, key, sample))
        return scripted_completion(row_of(example, rows), example, [PER_MILLE] * len(example.images), rng, error_rate=rate)

    return ScriptedSampler(script), "scripted", 32


def _endpoint(recipe: Recipe) -> tuple[Sampler, str, int]:
    from polyground.sampling.endpoint import EndpointSampler

    config = recipe.synthesize
    if config.teacher_base_url is None or config.teacher_model is None:
        raise ConfigError("synthesize.teacher: endpoint needs teacher_base_url and teacher_model")
    sampler = EndpointSampler(config.teacher_base_url, model=config.teacher_model, api_key_env=config.api_key_env)
    return sampler, config.teacher_model, 16
