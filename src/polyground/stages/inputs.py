"""Which examples a split holds: the recipe's own data where it names some, else the simulated world's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyground.config import DataSource, Recipe
from polyground.errors import DataError, StorageError
from polyground.records import Example
from polyground.sources import read_source
from polyground.storage import MANIFEST
from polyground.worlds.build import SCENES, SPLITS, annotation_path

EVALUATED = ("test", "ood", "perception")
"""Fields of `data` and `world` whose splits are benchmarks; `ood` and `perception` stand for several splits each."""


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
