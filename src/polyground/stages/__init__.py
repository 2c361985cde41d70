"""The stages: each `run(recipe)` reads like its box in the figure. Stages never import one another; folders join them.

What they share stands here: where things lie, how a split is read, how a model is opened, and a progress bar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from polyground.config import Recipe
from polyground.errors import StorageError
from polyground.geometry import Grid
from polyground.records import Example, Message
from polyground.storage import MANIFEST, read_manifest

if TYPE_CHECKING:
    from polyground.rewards import Scorer
    from polyground.rollout import Ask
    from polyground.sampling import Sampler

ROLES = {"base": None, "sft": "sft-merged", "rl": "grpo-merged"}
"""The three models of the figure, and the folder (under `recipe.out`) each is read from; the base comes with the recipe."""

VERBS = {"sft-merged": "merge", "grpo-merged": "merge"}
"""The verb that makes a folder, where it is not called like it."""

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Student:
    """A model opened for sampling: how it samples, how it is asked, and how its answers are scored."""

    sampler: Sampler
    ask: Ask
    scorer: Scorer


def model_path(recipe: Recipe, role: str) -> Path | str:
    """Where the model of this role lies; raises StorageError while its stage is not complete."""
    folder = ROLES[role]
    if folder is None:
        return recipe.model.path
    return require(recipe, folder)


def open_student(recipe: Recipe, role: str) -> Student:
    """Load the model of this role and the recipe's scorer; answers in the family's native form are read as well."""
    from polyground.models import load_model
    from polyground.prompts import student_messages
    from polyground.rewards import Scorer
    from polyground.sampling.local import LocalSampler

    loaded = load_model(
        model_path(recipe, role), dtype=recipe.model.dtype, max_pixels_total=recipe.model.max_pixels_total, device=best_device()
    )

    def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        grids = loaded.family.grids(example.images)
        return student_messages(example, grids, instruction=recipe.prompts.instruction), grids

    return Student(sampler=LocalSampler(loaded), ask=ask, scorer=Scorer(recipe.rewards, native=loaded.family.native))


def best_device() -> str:
    """An accelerator where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def upstream(recipe: Recipe, *folders: str) -> dict[str, str]:
    """Fingerprints of the stages a stage builds on: part of its own configuration, so that nothing stale is continued."""
    return {folder: read_manifest(require(recipe, folder)).fingerprint for folder in folders}


def require(recipe: Recipe, folder: str) -> Path:
    """The folder of a complete stage; raises StorageError, naming the verb that makes it."""
    path = recipe.out / folder
    if not (path / MANIFEST).is_file():
        raise StorageError(f"{path}: is not complete; run `polyground {VERBS.get(folder, folder)}` with this recipe first")
    return path


def track(rows: Iterable[Row], description: str, *, total: int, done: int = 0) -> Iterator[Row]:
    """Pass the rows on under a progress bar on standard error; where that is no terminal, say only start and end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        console.print(f"{description}: {total - done} to do" + (f" ({done} done before)" if done else ""), highlight=False)
        yield from rows
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for row in rows:
            yield row
            progress.advance(task)
