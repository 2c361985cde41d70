"""Cold start: a LoRA adapter learns to answer in the contract, from the reasoning that synthesis kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyground.answer import write_completion
from polyground.config import PromptConfig, Recipe
from polyground.prompts import PROMPT_VERSION, student_messages
from polyground.records import Example, answer_from_json
from polyground.shards import launched_processes
from polyground.stages import model_identity, open_model, require_images, stage_folder, upstream
from polyground.storage import read_rows

if TYPE_CHECKING:
    from polyground.models import Family
    from polyground.training.sft import Lesson


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Read the kept rows, write each in the student's own words and grid, train, save the adapter."""
    identity = {
        "seed": recipe.seed,
        "sft": recipe.sft.deciding(processes=launched_processes()),
        "prompts": recipe.prompts.to_json(),
        "prompt_version": PROMPT_VERSION,
        "model": model_identity(recipe),
        "inputs": upstream(recipe, "synthesize"),
    }
    with stage_folder(recipe, "sft", "sft", identity) as folder:
        if folder.complete:
            return folder.summary
        kept = recipe.out / "synthesize" / "kept.jsonl"
        rows = list(read_rows(kept))
        require_images(rows, kept)
        from polyground.training.sft import train_sft

        loaded = open_model(recipe, "base", training=True)
        lessons = [_lesson(row, loaded.family, recipe.prompts) for row in rows]
        summary = train_sft(loaded, lessons, recipe.sft, out=folder.path, seed=recipe.seed)
        return folder.finish({**summary, "seconds": folder.seconds}).summary


def _lesson(row: Mapping[str, Any], family: Family, prompts: PromptConfig) -> Lesson:
    from polyground.training.sft import Lesson

    example = Example.from_json(row)
    grids = family.grids(example.images)
    messages = student_messages(example, grids, instruction=prompts.instruction)
    reasoning = row["reasoning"] if prompts.reasoning else None
    return Lesson(tuple(messages), write_completion(reasoning, answer_from_json(row["answer"]), grids), example.key)
