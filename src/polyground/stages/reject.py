"""Sample the model that RL starts from several times per question and keep the questions it sometimes gets right.

`rollouts.jsonl` holds every group (a row is a question and all its completions); `kept.jsonl` the examples for RL, each
with its `pass_rate`. Scored by the very reward RL will use, so that what is kept is what RL can move.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from polyground.config import Recipe, RejectConfig
from polyground.errors import NothingKeptError
from polyground.prompts import PROMPT_VERSION
from polyground.records import Example
from polyground.rollout import Group, interleave, rollout_groups
from polyground.stages import (
    gather_parts,
    model_identity,
    own_share,
    read_split,
    spent_before,
    split_identity,
    stage_folder,
    start_folders,
    student,
    track,
    upstream,
)
from polyground.storage import RunFolder, atomic_write_text


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Group after group onto disk, then the band of pass rates, balanced over tasks."""
    config = recipe.reject
    examples = interleave(read_split(recipe, "rl"))[: config.limit]
    shard = own_share(recipe)
    identity = {
        "seed": recipe.seed,
        "reject": config.deciding(),
        "rewards": [reward.to_json() for reward in recipe.rewards],
        "prompts": recipe.prompts.to_json(),
        "prompt_version": PROMPT_VERSION,
        "model": model_identity(recipe),
        "data": split_identity(recipe, "rl"),
        "inputs": upstream(recipe, *start_folders(recipe)),
    }
    with stage_folder(recipe, "reject", "reject", identity, shard=shard) as folder:
        if folder.complete:
            return folder.summary
        keys = [example.key for example in examples]
        if shard is not None:
            own = shard.of(examples, keys)
            spent = _sample(recipe, folder, own)
            return folder.finish({"shard": str(shard), "asked": len(own)} | spent).summary
        gather_parts(recipe, folder, {"rollouts.jsonl": keys})
        spent = _sample(recipe, folder, examples)
        # Without the completions, which are nearly all of the bytes.
        rows = [{name: row[name] for name in ("key", "pass_rate", "mean_reward")} for row in folder.rows("rollouts.jsonl")]
        rates = {row["key"]: float(row["pass_rate"]) for row in rows}
        kept = keep(examples, rates, config)
        if not kept:
            raise NothingKeptError(
                f"{folder.path}: no question has a pass rate between {config.min_pass_rate} and {config.max_pass_rate} "
                f"({histogram(rates.values())}); {way_out(rates.values())}; rollouts.jsonl there has the answers"
            )
        lines = (json.dumps({**example.to_json(), "pass_rate": rates[example.key]}) + "\n" for example in kept)
        atomic_write_text(folder.file("kept.jsonl"), "".join(lines))
        return folder.finish(_summary(examples, kept, rates, rows) | spent).summary


def _sample(recipe: Recipe, folder: RunFolder, examples: Sequence[Example]) -> dict[str, Any]:
    """Group after group onto disk, as far as they are not there yet; returns what was asked of servers."""
    config, done = recipe.reject, folder.done_keys("rollouts.jsonl")
    if all(example.key in done for example in examples):
        return spent_before(recipe, sampler=config.sampler, stage="reject")
    with student(recipe, recipe.grpo.start, sampler=config.sampler, stage="reject") as policy:
        groups = rollout_groups(
            examples,
            sampler=policy.sampler,
            ask=policy.ask,
            judge=policy.scorer.score,
            n=config.num_generations,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_completion_length,
            seed=recipe.seed,
            batch=max(config.batch, policy.batch),
            done=done,
        )
        for group in track(groups, "reject", total=len(examples), done=len(done)):
            folder.append("rollouts.jsonl", group_row(group, threshold=config.pass_iou))
        return policy.spent()


def group_row(group: Group, *, threshold: float) -> dict[str, Any]:
    """One line of `rollouts.jsonl`, without log-probabilities."""
    rollouts = [rollout.without_logprobs().to_json() for rollout in group.rollouts]
    return {
        "key": group.example.key,
        "task": group.example.task,
        "pass_rate": group.pass_rate(threshold=threshold),
        "mean_reward": sum(group.totals) / len(group.totals),
        "rollouts": rollouts,
    }


def keep(examples: Sequence[Example], rates: Mapping[str, float], config: RejectConfig) -> list[Example]:
    """The examples whose rate lies strictly inside the band, tasks taking turns.

    With `balance` no task has more than the median of the tasks' counts (at least 1); of a larger task those nearest to
    a rate of one half stay, for they have the most to teach.
    """
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if config.keeps(rates[example.key]):
            by_task[example.task].append(example)
    if config.balance and by_task:
        counts = sorted(len(group) for group in by_task.values())
        cap = max(1, counts[len(counts) // 2])
        for task, group in by_task.items():
            chosen = {e.key for e in sorted(group, key=lambda e: abs(rates[e.key] - 0.5))[:cap]}
            by_task[task] = [example for example in group if example.key in chosen]
    return interleave([example for group in by_task.values() for example in group])


def histogram(rates: Any) -> dict[str, int]:
    """How many questions have each pass rate.

    >>> histogram([0.0, 0.5, 0.5])
    {'0.000': 1, '0.500': 2}
    """
    return dict(sorted(Counter(f"{rate:.3f}" for rate in rates).items()))


def way_out(rates: Collection[float]) -> str:
    """What to do where no question is kept, by its pass rates."""
    if not any(rates):
        return "nothing was ever answered right: train the SFT model longer or on more rows, or lower reject.pass_iou"
    if all(rate == 1 for rate in rates):
        return "everything was always answered right: RL has nothing to teach here; give `rl` harder questions, or raise pass_iou"
    return "widen the band, raise reject.num_generations, or train the SFT model longer"


def _summary(
    examples: Sequence[Example], kept: Sequence[Example], rates: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    by_task: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(rates[example.key])
    return {
        "asked": len(examples),
        "kept": len(kept),
        "never": sum(rate == 0 for rate in rates.values()),
        "always": sum(rate == 1 for rate in rates.values()),
        "mean_pass_rate": sum(rates.values()) / len(rates),
        "mean_reward": sum(row["mean_reward"] for row in rows) / len(rows),
        "pass_rates": histogram(rates.values()),
        "pass_rate_by_task": {task: sum(found) / len(found) for task, found in sorted(by_task.items())},
        "kept_by_task": dict(sorted(Counter(example.task for example in kept).items())),
    }
