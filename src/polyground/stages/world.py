"""Build the simulated world: the splits that the recipe's own data does not provide, as image files and annotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polyground.config import Recipe
from polyground.stages import stage_folder, world_splits
from polyground.worlds.build import SPLITS, WORLD_VERSION, build_world


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Write every split that is wanted; complete splits are left alone."""
    wanted = world_splits(recipe)
    groups = {SPLITS[split].size for split in wanted}
    sizes = recipe.world.model_copy(update={plan.size: 0 for plan in SPLITS.values() if plan.size not in groups})
    with stage_folder(recipe, "world", "world", {"world": sizes.to_json(), "version": WORLD_VERSION}) as folder:
        if folder.complete:
            return folder.summary
        columns = (TextColumn("world {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            tasks = {split: progress.add_task(split, total=getattr(sizes, SPLITS[split].size)) for split in wanted}
            build_world(sizes, folder.path, lambda split, done, _: progress.update(tasks[split], completed=done))
        return folder.finish({"questions": {split: getattr(sizes, SPLITS[split].size) for split in wanted}}).summary
