"""Answer every benchmark split with the base, the SFT and the RL model, greedily, and tabulate.

Each model has a folder of its own (`evaluate/base`, `evaluate/sft`, `evaluate/rl`) with the raw responses of every split,
one `Rollout` a line; `evaluate/results.json` is made from them and from the annotation, and `evaluate/outcomes.json` says
question by question what was right. A split that is one file of a public benchmark is scored by that benchmark's rule and
over its rows (`benchmarks`); every other split by the recipe's scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyground import __version__
from polyground.benchmarks import (
    BENCHMARKS,
    Annotation,
    compats_of,
    fold_turns,
    judge,
    require_compat,
    rows_wrong_by_annotation,
    turns,
)
from polyground.benchmarks import tabulate as tabulate_benchmark
from polyground.config import Recipe
from polyground.conventions import Convention, load_convention
from polyground.detection import require_pycocotools
from polyground.errors import ConfigError
from polyground.geometry import Grid
from polyground.imagefile import image_size
from polyground.metrics import outcomes, paired_difference, summarize
from polyground.prompts import INSTRUCTIONS, PROMPT_VERSION, student_messages
from polyground.records import Example, Rollout
from polyground.rollout import Ask, rollout_groups
from polyground.runs import ROLES
from polyground.stages import (
    Student,
    benchmark_rows,
    evaluation_splits,
    gather_parts,
    model_identity,
    model_path,
    own_share,
    own_splits,
    read_split,
    spent_before,
    split_identity,
    stage_folder,
    student,
    track,
    upstream,
)
from polyground.storage import MANIFEST, atomic_write_json, read_rows

PAIRS = (("base", "sft"), ("sft", "rl"), ("base", "rl"))
"""Which models are compared: first and second of each difference (second minus first)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One split as it is put to the models."""

    examples: Sequence[Example]
    """In order; a circular evaluation holds every rotation of a multiple choice."""
    annotation: Annotation | None
    """Of a public benchmark; None for the simulated world and for data of one's own."""


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Let every model there is answer every split, then write `outcomes.json` and `results.json`."""
    _require_compat(recipe)
    roles = present_roles(recipe)
    _require_servers(recipe, roles)
    splits = {name: _asked(recipe, name).examples for name in evaluation_splits(recipe)}
    for role in roles:
        _answer_all(recipe, role, splits)
    if recipe.shard is not None:
        return {"shard": recipe.shard, "models": roles}
    atomic_write_json(recipe.out / "evaluate" / "outcomes.json", tell_outcomes(recipe, roles, list(splits)))
    results = tabulate(recipe, roles, list(splits))
    atomic_write_json(recipe.out / "evaluate" / "results.json", results)
    return results


def _asked(recipe: Recipe, split: str) -> Asked:
    annotation = benchmark_rows(recipe, split)
    if annotation is not None and annotation.benchmark.headline == "average_precision":
        require_pycocotools()  # now, and not after hours of answering
    limit = recipe.evaluate.limit_per_split
    examples = annotation.examples if annotation is not None else read_split(recipe, split)[:limit]
    if recipe.evaluate.circular:
        examples = [turn for example in examples for turn in turns(example)]
    return Asked(examples, annotation)


def _require_servers(recipe: Recipe, roles: Sequence[str]) -> None:
    """Raises ConfigError, before the first model is asked, for one that is nowhere served."""
    missing = [role for role in roles if recipe.evaluate.sampler == "endpoint" and getattr(recipe.servers, role) is None]
    if missing:
        raise ConfigError(
            f"evaluate.sampler: endpoint asks the {', '.join(missing)} model; say in servers.{missing[0]} where it is served, or "
            "leave it out of evaluate.models"
        )


def _require_compat(recipe: Recipe) -> None:
    """Raises ConfigError for a quirk that none of the recipe's benchmarks knows."""
    name = recipe.evaluate.compat
    if name is None:
        return
    files = [files[0] for files in own_splits(recipe).values() if len(files) == 1]
    benchmarks = [BENCHMARKS[file.source] for file in files if file.source in BENCHMARKS]
    if not benchmarks:
        raise ConfigError(f"evaluate.compat = {name!r}: no split of the recipe is a public benchmark; leave it out")
    if not any(name in compats_of(benchmark) for benchmark in benchmarks):
        require_compat(benchmarks[0], name)


def present_roles(recipe: Recipe) -> list[str]:
    """The models that exist by now, of those the recipe wants; the base always does.

    Raises StorageError when none exists, and for one that is damaged.
    """
    wanted = [role for role in ROLES if recipe.evaluate.models is None or role in recipe.evaluate.models]
    found = [role for role in wanted if _exists(recipe, role)]
    if not found:
        model_path(recipe, wanted[0])
    return found


def _exists(recipe: Recipe, role: str) -> bool:
    folder = ROLES[role]
    if folder is not None and not (recipe.out / folder / MANIFEST).is_file():
        return False
    model_path(recipe, role)
    return True


def _answer_all(recipe: Recipe, role: str, splits: Mapping[str, Sequence[Example]]) -> None:
    folder_of_model = ROLES[role]
    config = recipe.evaluate
    # No seed is among it: greedy answers need none.
    identity = {
        # Intervals, thresholds and quirks are not among what decides the answers: changing them only makes the tables anew.
        "evaluate": {
            **config.model_dump(include={"max_completion_length", "batch_size", "limit_per_split"}),
            **({"circular": True} if config.circular else {}),
            **({} if config.instruction == "recipe" else {"instruction": _instruction(recipe)}),
            **({} if config.sampler == "local" else {"sampler": "served"}),
        },
        "rewards": [reward.to_json() for reward in recipe.rewards],
        "prompts": recipe.prompts.to_json(),
        "prompt_version": PROMPT_VERSION,
        "model": model_identity(recipe),
        "data": {name: split_identity(recipe, name) for name in splits},
        "inputs": upstream(recipe, folder_of_model) if folder_of_model else {},
    }
    shard = own_share(recipe)
    with stage_folder(recipe, f"evaluate/{role}", "evaluate", identity, shard=shard) as folder:
        if folder.complete:
            return
        keys = {name: [example.key for example in examples] for name, examples in splits.items()}
        if shard is not None:
            splits = {name: shard.of(examples, keys[name]) for name, examples in splits.items()}
        else:
            gather_parts(recipe, folder, {f"{name}.jsonl": found for name, found in keys.items()}, field="example")
        with ExitStack() as opened:
            asked: Student | None = None
            for name, examples in splits.items():
                file = f"{name}.jsonl"
                done = folder.done_keys(file, field="example")
                if all(example.key in done for example in examples):
                    folder.file(file).touch()
                    continue
                asked = asked or opened.enter_context(student(recipe, role, sampler=config.sampler, stage="evaluate"))
                groups = rollout_groups(
                    examples,
                    sampler=asked.sampler,
                    ask=_asking(recipe, asked.ask),
                    judge=asked.scorer.score,
                    n=1,
                    temperature=0.0,
                    max_tokens=config.max_completion_length,
                    seed=recipe.seed,
                    batch=max(config.batch_size, asked.batch),
                    done=done,
                )
                for group in track(groups, f"evaluate {role} {name}", total=len(examples), done=len(done)):
                    for rollout in group.rollouts:
                        folder.append(file, rollout.without_logprobs().to_json())
            spent = spent_before(recipe, sampler=config.sampler, stage="evaluate") if asked is None else asked.spent()
        told = {} if shard is None else {"shard": str(shard)}
        folder.finish({**told, "answers": {name: len(examples) for name, examples in splits.items()}, **spent})


def _asking(recipe: Recipe, ask: Ask) -> Ask:
    """The model's own way to be asked, with another instruction where the recipe names one."""
    if recipe.evaluate.instruction == "recipe":
        return ask
    instruction = INSTRUCTIONS[recipe.evaluate.instruction]

    def asking(example: Example) -> tuple[Any, Sequence[Grid]]:
        _, grids = ask(example)
        text = instruction.boxes if example.target.choice is None else instruction.choice
        return student_messages(example, grids, instruction=text), grids

    return asking


def _instruction(recipe: Recipe) -> dict[str, str]:
    """Name and version of what follows a question."""
    name = recipe.evaluate.instruction
    if name == "recipe":
        return {"name": name, "text": recipe.prompts.instruction}
    return {"name": name, "version": INSTRUCTIONS[name].version}


def tabulate(recipe: Recipe, roles: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    """What `results.json` holds: per split each model's summary and the paired differences, tagged with what decides them."""
    conventions = {role: _convention(recipe, role) for role in roles}
    annotations = {split: benchmark_rows(recipe, split) for split in splits}
    answers = {
        (role, split): _answers(recipe, role, split, annotations[split], conventions[role]) for role in roles for split in splits
    }
    tables = {split: _table(recipe, {role: answers[role, split] for role in roles}, annotations[split]) for split in splits}
    for group in ("ood", "perception"):
        members = [split for split in splits if split.startswith(f"{group}_")]
        if len(members) > 1:
            pooled = {role: [_renamed(r, split) for split in members for r in answers[role, split]] for role in roles}
            tables[f"{group} (all)"] = {**_table(recipe, pooled), "pooled": members, **_mean_headline(tables, members, roles)}
    return {"tags": {**_tags(recipe, splits), "models": _told(conventions)}, "models": list(roles), "splits": tables}


def tell_outcomes(recipe: Recipe, roles: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    """What `outcomes.json` holds: by split, model, task and question, whether the headline's IoU (or the letter) was reached."""
    threshold = recipe.evaluate.ious[0]
    conventions = {role: _convention(recipe, role) for role in roles}
    told: dict[str, Any] = {}
    for split in splits:
        annotation = benchmark_rows(recipe, split)
        answers = {role: _answers(recipe, role, split, annotation, conventions[role]) for role in roles}
        told[split] = {role: outcomes(rows, threshold=threshold) for role, rows in answers.items()}
    return {"iou": threshold, "splits": told}


def _mean_headline(tables: Mapping[str, Any], members: Sequence[str], roles: Sequence[str]) -> dict[str, Any]:
    """The mean of the members' headlines, whatever each counts; only where all are public benchmarks."""
    if not all("benchmark" in tables[split] for split in members):
        return {}
    values = {role: [tables[split]["models"][role]["headline"]["value"] for split in members] for role in roles}
    return {"mean_headline": {role: sum(found) / len(found) for role, found in values.items()}}


def _told(conventions: Mapping[str, Convention]) -> dict[str, dict[str, Any]]:
    """How each model writes boxes."""
    return {
        role: {
            "model_type": convention.model_type,
            "grid": "0-1000" if convention.per_mille else "pixels of the resized image",
            "native": convention.native,
            "max_pixels_total": convention.max_pixels_total,
        }
        for role, convention in conventions.items()
    }


def _convention(recipe: Recipe, role: str) -> Convention:
    return load_convention(model_path(recipe, role), max_pixels_total=recipe.model.max_pixels_total)


def _answers(recipe: Recipe, role: str, split: str, annotation: Annotation | None, convention: Convention) -> list[Rollout]:
    """One model's answers to one split: those of a benchmark scored by its rule, rotations folded into their question."""
    rollouts = read_rollouts(recipe.out / "evaluate" / role / f"{split}.jsonl")
    if annotation is None:
        return fold_turns(rollouts) if recipe.evaluate.circular else rollouts
    asked = {turn.key: turn for example in annotation.examples for turn in turns(example)}
    compat = _compat(recipe, annotation)
    grids_of = _grids_of(convention)
    scored = []
    for rollout in rollouts:
        example = asked[rollout.example]
        score = judge(
            annotation.benchmark,
            rollout.completion.text,
            example,
            grids_of(example),
            native=convention.native,
            compat=compat,
        )
        scored.append(replace(rollout, score=score))
    return [*fold_turns(scored), *rows_wrong_by_annotation(annotation)]


def _compat(recipe: Recipe, annotation: Annotation) -> str | None:
    name = recipe.evaluate.compat
    return name if name in compats_of(annotation.benchmark) else None


def _grids_of(convention: Convention) -> Callable[[Example], Sequence[Grid]]:
    if convention.per_mille:
        return lambda example: convention.grids([(1, 1)] * len(example.images))
    return lambda example: convention.grids([image_size(image) for image in example.images])


def read_rollouts(path: Path) -> list[Rollout]:
    """The raw responses of one model on one split."""
    return [Rollout.from_json(row) for row in read_rows(path)]


def _renamed(rollout: Rollout, split: str) -> Rollout:
    """In a pool each split counts as one task, so the macro average is the mean over benchmarks."""
    return replace(rollout, task=split, example=f"{split}:{rollout.example}")


def _table(recipe: Recipe, answers: Mapping[str, Sequence[Rollout]], annotation: Annotation | None = None) -> dict[str, Any]:
    config = recipe.evaluate
    if annotation is None:
        models = {
            role: summarize(rows, ious=config.ious, bootstrap=config.bootstrap, seed=recipe.seed).to_json()
            for role, rows in answers.items()
        }
        benchmark = {}
    else:
        compat = _compat(recipe, annotation)
        models = {
            role: tabulate_benchmark(
                annotation.benchmark,
                rows,
                annotation.examples,
                ious=config.ious,
                bootstrap=config.bootstrap,
                seed=recipe.seed,
                compat=compat,
            ).to_json()
            for role, rows in answers.items()
        }
        benchmark = {"benchmark": {**annotation.tags(), "compat": compat}}
    differences = {
        f"{second}-{first}": paired_difference(
            answers[first], answers[second], threshold=config.ious[0], bootstrap=config.bootstrap, seed=recipe.seed
        ).to_json()
        for first, second in PAIRS
        if first in answers and second in answers
    }
    return {"models": models, "differences": differences, **benchmark}


def _tags(recipe: Recipe, splits: Sequence[str]) -> dict[str, Any]:
    return {
        "polyground": __version__,
        "benchmarks": {name: split_identity(recipe, name) for name in splits},
        "convention": "one-to-one matches over max(predicted, gold) boxes; a box that names a wrong image overlaps nothing, one "
        "that names no image (native form of an untrained family) may match on any",
        "prompt_version": PROMPT_VERSION,
        "instruction": recipe.prompts.instruction,
        "instruction_set": _instruction(recipe),
        "circular": recipe.evaluate.circular,
        "compat": recipe.evaluate.compat,
        "decoding": {
            "temperature": 0.0,
            "max_completion_length": recipe.evaluate.max_completion_length,
            **({} if recipe.evaluate.sampler == "local" else {"sampler": "served"}),
        },
        "headline_iou": recipe.evaluate.ious[0],
        "bootstrap": recipe.evaluate.bootstrap,
        "seed": recipe.seed,
    }
