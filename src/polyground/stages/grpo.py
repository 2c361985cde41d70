"""Reinforcement learning with rule rewards, from the merged SFT model (or the base), on the questions it sometimes gets right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polyground.config import Recipe
from polyground.geometry import Grid
from polyground.prompts import PROMPT_VERSION, student_messages
from polyground.records import Example, Message
from polyground.shards import launched_processes
from polyground.stages import best_device, model_identity, model_path, require_images, stage_folder, start_folders, upstream
from polyground.storage import read_rows


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Read the kept questions, train a fresh adapter on the model it starts from, save it."""
    rewards = recipe.rewards if recipe.grpo.rewards is None else recipe.grpo.rewards
    identity = {
        "seed": recipe.seed,
        "grpo": recipe.grpo.deciding(processes=launched_processes()),
        "rewards": [reward.to_json() for reward in rewards],
        "prompts": recipe.prompts.to_json(),
        "prompt_version": PROMPT_VERSION,
        "model": model_identity(recipe),
        "inputs": upstream(recipe, "reject", *start_folders(recipe)),
    }
    with stage_folder(recipe, "grpo", "grpo", identity) as folder:
        if folder.complete:
            return folder.summary
        kept = recipe.out / "reject" / "kept.jsonl"
        rows = list(read_rows(kept))
        require_images(rows, kept)
        from polyground.models import load_model
        from polyground.rewards import Scorer
        from polyground.sampling.local import LocalSampler
        from polyground.training.grpo import train_grpo

        loaded = load_model(
            model_path(recipe, recipe.grpo.start),
            dtype=recipe.model.dtype,
            max_pixels_total=recipe.model.max_pixels_total,
            device=best_device(),
        )

        def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
            grids = loaded.family.grids(example.images)
            return student_messages(example, grids, instruction=recipe.prompts.instruction), grids

        summary = train_grpo(
            loaded,
            [Example.from_json(row) for row in rows],
            recipe.grpo,
            sampler=LocalSampler,
            ask=ask,
            # The contract only: an answer in the base's native form is what RL is to unlearn.
            judge=Scorer(rewards, reasoning=recipe.prompts.reasoning).score,
            out=folder.path,
            seed=recipe.seed,
        )
        return folder.finish({**summary, "seconds": folder.seconds}).summary
