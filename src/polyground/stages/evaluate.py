"""Answer every benchmark split with the base, the SFT and the RL model, greedily, and tabulate.

Each model has a folder of its own (`evaluate/base`, `evaluate/sft`, `evaluate/rl`) with the raw responses of every split,
one `Rollout` a line; `evaluate/results.json` is made from them and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyground import __version__
from polyground.config import Recipe
from polyground.errors import StorageError
from polyground.metrics import paired_difference, summarize
from polyground.prompts import PROMPT_VERSION
from polyground.records import Example, Rollout
from polyground.rollout import rollout_groups
from polyground.stages import ROLES, evaluation_splits, model_path, open_student, read_split, split_identity, track, upstream
from polyground.storage import RunFolder, atomic_write_json, read_rows

PAIRS = (("base", "sft"), ("sft", "rl"), ("base", "rl"))
"""Which models are compared: first and second of each difference (second minus first)."""


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Let every model there is answer every split, then write `results.json`."""
    roles = present_roles(recipe)
    splits = {name: read_split(recipe, name)[: recipe.evaluate.limit_per_split] for name in evaluation_splits(recipe)}
    for role in roles:
        _answer_all(recipe, role, splits)
    results = tabulate(recipe, roles, list(splits))
    atomic_write_json(recipe.out / "evaluate" / "results.json", results)
    return results


def present_roles(recipe: Recipe) -> list[str]:
    """The models that exist by now; the base always does."""
    return [role for role in ROLES if _exists(recipe, role)]


def _exists(recipe: Recipe, role: str) -> bool:
    try:
        model_path(recipe, role)
    except StorageError:
        return False
    return True


def _answer_all(recipe: Recipe, role: str, splits: Mapping[str, Sequence[Example]]) -> None:
    folder_of_model = ROLES[role]
    config = recipe.evaluate
    identity = {
        "seed": recipe.seed,
        # Intervals and thresholds are not among what decides the answers: changing them only makes the tables anew.
        "evaluate": config.model_dump(include={"max_completion_length", "batch_size", "limit_per_split"}),
        "rewards": [reward.to_json() for reward in recipe.rewards],
        "prompts": recipe.prompts.to_json(),
        "prompt_version": PROMPT_VERSION,
        "model": recipe.model.to_json(),
        "data": {name: split_identity(recipe, name) for name in splits},
        "inputs": upstream(recipe, folder_of_model) if folder_of_model else {},
    }
    with RunFolder(recipe.out / "evaluate" / role, "evaluate", identity) as folder:
        if folder.complete:
            return
        student = open_student(recipe, role)
        for name, examples in splits.items():
            file = f"{name}.jsonl"
            done = folder.done_keys(file, field="example")
            groups = rollout_groups(
                examples,
                sampler=student.sampler,
                ask=student.ask,
                judge=student.scorer.score,
                n=1,
                temperature=0.0,
                max_tokens=config.max_completion_length,
                seed=recipe.seed,
                batch=config.batch_size,
                done=done,
            )
            for group in track(groups, f"evaluate {role} {name}", total=len(examples), done=len(done)):
                for rollout in group.rollouts:
                    folder.append(file, replace(rollout, completion=replace(rollout.completion, logprobs=())).to_json())
        folder.finish({"answers": {name: len(examples) for name, examples in splits.items()}})


def tabulate(recipe: Recipe, roles: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    """What `results.json` holds: per split each model's summary and the paired differences, tagged with what decides them."""
    folder = recipe.out / "evaluate"
    answers = {(role, split): read_rollouts(folder / role / f"{split}.jsonl") for role in roles for split in splits}
    tables = {split: _table(recipe, {role: answers[role, split] for role in roles}) for split in splits}
    for group in ("ood", "perception"):
        members = [split for split in splits if split.startswith(f"{group}_")]
        if len(members) > 1:
            pooled = {role: [_renamed(r, split) for split in members for r in answers[role, split]] for role in roles}
            tables[f"{group} (all)"] = {**_table(recipe, pooled), "pooled": members}
    return {"tags": _tags(recipe, splits), "models": list(roles), "splits": tables}


def read_rollouts(path: Path) -> list[Rollout]:
    """The raw responses of one model on one split."""
    return [Rollout.from_json(row) for row in read_rows(path)]


def _renamed(rollout: Rollout, split: str) -> Rollout:
    """In a pool each split counts as one task, so the macro average is the mean over benchmarks."""
    return replace(rollout, task=split, example=f"{split}:{rollout.example}")


def _table(recipe: Recipe, answers: Mapping[str, Sequence[Rollout]]) -> dict[str, Any]:
    config = recipe.evaluate
    models = {
        role: summarize(rows, ious=config.ious, bootstrap=config.bootstrap, seed=recipe.seed).to_json()
        for role, rows in answers.items()
    }
    differences = {
        f"{second}-{first}": paired_difference(
            answers[first], answers[second], threshold=config.ious[0], bootstrap=config.bootstrap, seed=recipe.seed
        ).to_json()
        for first, second in PAIRS
        if first in answers and second in answers
    }
    return {"models": models, "differences": differences}


def _tags(recipe: Recipe, splits: Sequence[str]) -> dict[str, Any]:
    return {
        "polyground": __version__,
        "benchmarks": {name: split_identity(recipe, name) for name in splits},
        "convention": "one-to-one matches over max(predicted, gold) boxes; a box that names a wrong image overlaps nothing, one "
        "that names no image (native form of an untrained family) may match on any",
        "prompt_version": PROMPT_VERSION,
        "instruction": recipe.prompts.instruction,
        "decoding": {"temperature": 0.0, "max_completion_length": recipe.evaluate.max_completion_length},
        "headline_iou": recipe.evaluate.ious[0],
        "bootstrap": recipe.evaluate.bootstrap,
        "seed": recipe.seed,
    }
