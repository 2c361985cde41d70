"""What a verb would do, for `--dry-run`: the resolved recipe, the inputs that are there or missing, and the step counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from polyground.config import Recipe, dump_recipe
from polyground.stages.inputs import evaluation_splits, own_splits, world_splits
from polyground.storage import MANIFEST

NEEDS = {
    "world": (),
    "synthesize": ("world",),
    "sft": ("synthesize",),
    "merge": ("sft",),
    "reject": ("world", "sft-merged"),
    "grpo": ("reject", "sft-merged"),
    "evaluate": ("world",),
    "report": (),
    "run": (),
}
"""Folders under `out` that a verb reads."""

MAKES = {"merge": ("sft-merged", "grpo-merged"), "evaluate": ("evaluate/base", "evaluate/sft", "evaluate/rl")}
"""Folders under `out` that a verb writes, where they are not called like the verb."""


def plan(recipe: Recipe, verb: str) -> str:
    """Everything as text; nothing is opened but manifests."""
    parts = {
        f"{verb}, resolved recipe": [dump_recipe(recipe).rstrip()],
        "inputs": _inputs(recipe, verb),
        "outputs": _outputs(recipe, verb),
        "work": _work(recipe, verb),
    }
    return "\n\n".join(["\n".join([f"# {title}", *lines]) for title, lines in parts.items()] + ["dry run: nothing was done"])


def _inputs(recipe: Recipe, verb: str) -> Iterator[str]:
    if recipe.model.path != "tiny":
        yield _found(Path(recipe.model.path) / "config.json", f"model {recipe.model.path}")
    else:
        yield "found    model tiny (shipped with the package)"
    for split, sources in own_splits(recipe).items():
        for source in sources:
            yield _found(source.path, f"data.{split}: {source.path} ({source.source})")
    for folder in NEEDS[verb]:
        if folder != "world" or world_splits(recipe):
            yield _found(recipe.out / folder / MANIFEST, f"{recipe.out / folder}")


def _found(path: Path, what: str) -> str:
    return f"{'found   ' if path.exists() else 'missing '} {what}"


def _outputs(recipe: Recipe, verb: str) -> Iterator[str]:
    if verb in {"report", "run"}:
        yield f"{'exists  ' if (recipe.out / 'report.html').exists() else 'to make '} {recipe.out / 'report.html'}"
    verbs = [name for name in NEEDS if name not in {"run", "report"}] if verb == "run" else [verb] if verb != "report" else []
    for name in verbs:
        for folder in MAKES.get(name, (name,)):
            path = recipe.out / folder
            state = "complete" if (path / MANIFEST).exists() else "partial " if path.exists() else "to make "
            yield f"{state} {path}"


def _work(recipe: Recipe, verb: str) -> Iterator[str]:
    def wanted(*verbs: str) -> bool:
        return verb == "run" or verb in verbs

    world = recipe.world
    if wanted("world"):
        yield f"world: splits {', '.join(world_splits(recipe)) or 'none'}"
    if wanted("synthesize"):
        attempts = recipe.synthesize.samples_per_example
        yield f"synthesize: {_at_most(recipe.synthesize.limit, world.train)} questions, {attempts} attempts each"
    if wanted("sft"):
        yield f"sft: {_sft_steps(recipe)}"
    if wanted("reject"):
        yield f"reject: {_at_most(recipe.reject.limit, world.rl)} questions x {recipe.reject.num_generations} completions"
    if wanted("grpo"):
        groups = recipe.grpo.per_device_train_batch_size * recipe.grpo.gradient_accumulation_steps
        steps = recipe.grpo.max_steps if recipe.grpo.max_steps > 0 else "one pass of"
        yield f"grpo: {steps} steps of {groups} groups x {recipe.grpo.num_generations} completions on each device"
    if wanted("evaluate"):
        yield f"evaluate: base, sft, rl (those that exist) on {', '.join(evaluation_splits(recipe)) or 'no split'}"


def _at_most(limit: int | None, size: int) -> str:
    return f"up to {limit}" if limit is not None and limit < size else f"{size}"


def _sft_steps(recipe: Recipe) -> str:
    config = recipe.sft
    if config.max_steps > 0:
        return f"{config.max_steps} steps"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = min(recipe.world.train, recipe.synthesize.limit or recipe.world.train)
    return f"at most {math.ceil(rows * config.num_train_epochs / batch)} steps (batch {batch}; fewer where synthesis drops rows)"
