"""The stages: each `run(recipe)` reads like its box in the figure. Stages never import one another; folders join them.

What they share stands here: where things lie, how a split is read, how a model is opened, and a progress bar.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from polyground.config import DataSource, Recipe
from polyground.errors import DataError, StorageError
from polyground.geometry import Grid
from polyground.records import Example, Message
from polyground.sources import read_source
from polyground.storage import MANIFEST, read_manifest
from polyground.worlds.build import SCENES, SPLITS, annotation_path

if TYPE_CHECKING:
    from polyground.rewards import Scorer
    from polyground.rollout import Ask
    from polyground.sampling import Sampler

ROLES = {"base": None, "sft": "sft-merged", "rl": "grpo-merged"}
"""The three models of the figure, and the folder (under `recipe.out`) each is read from; the base comes with the recipe."""

VERBS = {"sft-merged": "merge", "grpo-merged": "merge"}
"""The verb that makes a folder, where it is not called like it."""

EVALUATED = ("test", "ood", "perception")
"""Fields of `data` and `world` whose splits are benchmarks; `ood` and `perception` stand for several splits each."""

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


def world_splits(recipe: Recipe) -> list[str]:
    """Splits the simulated world has to provide: those with a size and without data of the user's own."""
    return [split for split, plan in SPLITS.items() if getattr(recipe.world, plan.size) and not getattr(recipe.data, plan.size)]


def own_splits(recipe: Recipe) -> dict[str, list[DataSource]]:
    """Splits with data of the user's own, by name; each file of `ood` and `perception` is a benchmark of its own."""
    data = recipe.data
    splits = {name: list(sources) for name in ("train", "rl", "validation", "test") if (sources := getattr(data, name))}
    for group in ("ood", "perception"):
        for position, source in enumerate(getattr(data, group)):
            name = f"{group}_{source.path.stem}"
            splits[name if name not in splits else f"{name}_{position}"] = [source]
    return splits


def evaluation_splits(recipe: Recipe) -> list[str]:
    """Names of the benchmark splits, `test` first, then `ood_…`, then `perception_…`."""
    names = [*own_splits(recipe), *world_splits(recipe)]
    return [name for group in EVALUATED for name in names if name == group or name.startswith(f"{group}_")]


def read_split(recipe: Recipe, split: str) -> list[Example]:
    """The examples of a split, in file order. Raises DataError for bad rows, StorageError while the world is not built."""
    sources = own_splits(recipe).get(split)
    if sources is not None:
        examples = [example for source in sources for example in read_source(source.source, source.path, **source.options)]
        return _with_unique_keys(examples, split)
    if split not in world_splits(recipe):
        raise DataError(f"the recipe has no split {split!r}: give data.{split} a file or world.{split} a size above 0")
    world = recipe.out / "world"
    if not (world / MANIFEST).is_file():
        raise StorageError(f"{world}: the simulated world is not built; run `polyground world` with this recipe first")
    return read_source(SPLITS[split].source, annotation_path(world, split), name=split)


def split_identity(recipe: Recipe, split: str) -> Any:
    """What decides the examples of a split, for fingerprints and result tags: no path of this machine."""
    sources = own_splits(recipe).get(split)
    if sources is not None:
        return [{"source": s.source, "file": s.path.name, "sha256": _digest(s.path), "options": s.options} for s in sources]
    return {
        "source": f"simulated world, in the layout of {SPLITS[split].source}",
        "split": split,
        "seed": recipe.world.seed,
        "questions": getattr(recipe.world, SPLITS[split].size),
    }


def scenes_path(recipe: Recipe, split: str) -> Path:
    """The facts behind a split of the simulated world, for the scripted teacher."""
    return recipe.out / "world" / split / SCENES


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _with_unique_keys(examples: Sequence[Example], split: str) -> list[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.key in seen:
            raise DataError(
                f"split {split!r}: the key {example.key!r} stands twice; give each file its own `options: {{name: …}}`"
            )
        seen.add(example.key)
    return list(examples)


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
