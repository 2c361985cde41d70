"""The demo verb, with what the recipe says of prompts and decoding; the core is `polyground.demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyground.config import Recipe
from polyground.demo import ground
from polyground.stages import model_path


def run(recipe: Recipe, images: Sequence[Path], *, question: str, role: str = "rl", out: Path | None = None) -> Mapping[str, Any]:
    """Ask the recipe's model of this role about image files."""
    return ground(
        model_path(recipe, role),
        images,
        question=question,
        instruction=recipe.prompts.instruction,
        out=out,
        max_tokens=recipe.ground.max_completion_length,
        temperature=recipe.ground.temperature,
        dtype=recipe.model.dtype,
        seed=recipe.seed,
    )
