"""What the training logs and rollouts of a run say: curves, curves by task, warnings, and what the policy answered on its way."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from polyground import charts
from polyground.config import Recipe
from polyground.records import Example, Rollout
from polyground.rollout import is_right
from polyground.stages.report.pictures import Reply, Sample, boxes_of, draw_pictures, reply_of, shown_choices, shown_question
from polyground.storage import read_rows

MOMENTS, SAMPLES = 3, 4
"""How many moments of a training are shown, and how many questions of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One chart of the training section."""

    title: str
    caption: str
    drawing: Markup
    names: Sequence[str] = ()
    """Of the curves, in the order of their colours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Answers sampled in one step of the training."""

    title: str
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The curves of one training stage."""

    title: str
    remark: str
    figures: Sequence[Figure]
    absent: str
    """What is said instead while there are no curves."""
    tasks: Sequence[Figure] = ()
    """One small figure for each task."""
    watched: bool = False
    """Whether signs of collapse and of gaming the reward were looked for."""
    warnings: Sequence[tuple[int, str]] = ()
    """(step, what was seen)."""
    moments: Sequence[Moment] = ()


def sft_part(recipe: Recipe) -> Part:
    """The curves of the cold start, from its log; empty where it was not run."""
    log = _log(recipe, "sft")
    validation = {"train": "loss", "validation": "eval_loss"}
    figures = _figures(
        log,
        [
            ("Loss", "Cross-entropy on the reasoning and the answer, nats per token.", validation),
            ("Learning rate", "Of the adapter.", {"learning rate": "learning_rate"}),
            ("Gradient norm", "Before clipping.", {"gradient norm": "grad_norm"}),
        ],
    )
    absent = "No training log yet: run `polyground sft` with this recipe."
    return Part(title="Cold start (SFT)", remark=_steps(log), figures=figures, absent=absent)


def grpo_part(recipe: Recipe, *, threshold: float) -> Part:
    """`threshold` is the IoU from which an answer is shown as right."""
    log = _log(recipe, "grpo")
    keys = list(dict.fromkeys(key for row in log for key in row))
    parts = {name: key for key in keys if (name := _inside(key, "rewards/", "/mean"))}
    reasons = {name.replace("_", " "): key for key in keys if (name := _inside(key, "unreadable/")) and _ever(log, key)}
    lost = {"unreadable": "unreadable", "cut off": "completions/clipped_ratio", "empty": "boxes/empty"}
    figures = _figures(
        log,
        [
            ("Reward", "Weighted sum of the parts, mean over the rollouts of a step.", {"reward": "reward"}),
            ("Reward parts", "Each in [0, 1], before its weight.", parts),
            ("Grounding of the rollouts", "Sampled, on training questions.", {"IoU": "iou", "right image": "image_accuracy"}),
            ("Groups without variance", "Share whose rewards all agree: they teach nothing.", {"share": "frac_reward_zero_std"}),
            ("Entropy", "Of the policy over its own tokens, nats.", {"entropy": "entropy"}),
            ("KL", "Divergence from the starting policy, nats per token.", {"KL": "kl"}),
            (
                "Unreadable, cut off, empty",
                "Shares: no usable answer; the token budget was met; no box where there is one.",
                lost,
            ),
            ("Unreadable, by reason", "Shares of all completions; reasons that never occurred are left out.", reasons),
            (
                "Image errors",
                "Wrong: an answer names an image where nothing is annotated. Unknown: an image that the prompt does not have.",
                {"wrong": "wrong_image", "unknown": "unreadable/bad_image"},
            ),
            (
                "Boxes",
                "Answered over annotated: 1 is right. Many boxes or large ones are guesses.",
                {"number": "boxes/count_ratio", "area": "boxes/area_ratio"},
            ),
            (
                "Reasoning",
                "Characters of the thought, mean over the rollouts.",
                {"characters": "reasoning/mean_length"},
            ),
            ("Completion length", "Tokens, mean over the rollouts of a step.", {"tokens": "completions/mean_length"}),
            ("Clipped tokens", "Share whose importance ratio left the trust region.", {"share": "clip_ratio/region_mean"}),
            ("Gradient norm", "Before clipping.", {"gradient norm": "grad_norm"}),
            ("Loss", "What is minimised; its level says little in GRPO.", {"loss": "loss"}),
        ],
    )
    folder = recipe.out / "grpo"
    warnings = folder / "warnings.jsonl"
    return Part(
        title="Reinforcement learning (GRPO)",
        remark=_steps(log),
        figures=figures,
        absent="No training log yet: run `polyground grpo` with this recipe.",
        tasks=_by_task(log, keys),
        watched=warnings.is_file(),
        warnings=[(row["step"], row["text"]) for row in _rows(warnings)],
        moments=_moments(recipe, log, threshold=threshold),
    )


# ---- curves


def _log(recipe: Recipe, folder: str) -> list[dict[str, Any]]:
    # A resumed run repeats the steps after its last checkpoint: the later line counts.
    by_step = {row["step"]: row for row in _rows(recipe.out / folder / "log.jsonl") if "step" in row}
    return [by_step[step] for step in sorted(by_step)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from read_rows(path)


def _inside(key: str, prefix: str, suffix: str = "") -> str:
    """What a log key says between the two, or nothing.

    >>> _inside("rewards/iou/mean", "rewards/", "/mean"), _inside("rewards/iou/std", "rewards/", "/mean")
    ('iou', '')
    """
    found = re.fullmatch(f"{re.escape(prefix)}(.+){re.escape(suffix)}", key)
    return "" if found is None else found[1]


def _figures(log: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[Figure]:
    """A figure for each (title, caption, curve name -> log key) of which the log holds at least one number."""
    figures = []
    for title, caption, curves in wanted:
        series = {name: points for name, key in curves.items() if (points := _points(log, key))}
        if series:
            # One curve that the title names needs no legend.
            names = [name for name in series if len(series) > 1 or name.lower() not in title.lower()]
            figures.append(Figure(title=title, caption=caption, drawing=charts.curves(series), names=names))
    return figures


def _by_task(log: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Figure]:
    """Reward, IoU and unreadable answers of each task. A step holds few of its rollouts: the curves are running means."""
    figures = []
    for task in sorted(filter(None, (_inside(key, "tasks/", "/reward") for key in keys))):
        wanted = {"reward": f"tasks/{task}/reward", "IoU": f"tasks/{task}/iou", "unreadable": f"tasks/{task}/unreadable"}
        lines = {name: points for name, key in wanted.items() if (points := _points(log, key))}
        series = {name: charts.running_mean(points, window=max(1, len(points) // 6)) for name, points in lines.items()}
        drawing = charts.curves(series, width=250, height=150)
        figures.append(Figure(title=task, caption="", drawing=drawing, names=list(series)))
    return figures


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in log if isinstance(row.get(key), int | float)]


def _ever(log: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(value > 0 for _, value in _points(log, key))


def _steps(log: Sequence[Mapping[str, Any]]) -> str:
    return f"{log[-1]['step']} steps" if log else ""


# ---- what the policy said


def sample_steps(total: int, *, save_steps: int, num_iterations: int, size: int) -> dict[int, str]:
    """Steps (0-based) whose rollouts are shown, each with its title: the start, checkpoints evenly spread, the end.

    >>> sample_steps(80, save_steps=20, num_iterations=1, size=3)
    {0: 'In the first step', 39: 'At step 40', 79: 'At step 80'}
    """
    if total < 1:
        return {}
    checkpoints = [*range(save_steps, total, save_steps), total]
    # With several iterations a step may go on with the rollouts of one before.
    last = {(step - 1) // num_iterations * num_iterations: f"At step {step}" for step in checkpoints}
    titles = {**last, 0: "In the first step"}
    steps = sorted(titles)
    if len(steps) > size:
        gap = (len(steps) - 1) / max(1, size - 1)
        steps = [steps[round(place * gap)] for place in range(size)]
    return {step: titles[step] for step in steps}


def _moments(recipe: Recipe, log: Sequence[Mapping[str, Any]], *, threshold: float) -> list[Moment]:
    """The best and the worst answer to some questions of some steps; nothing where the page is to have no gallery."""
    size = min(MOMENTS, recipe.report.gallery_size)
    total = int(log[-1]["step"]) if log else 0
    config = recipe.grpo
    titles = sample_steps(total, save_steps=config.save_steps, num_iterations=config.num_iterations, size=size) if size else {}
    rows: dict[int, list[dict[str, Any]]] = {step: [] for step in titles}
    for row in _rows(recipe.out / "grpo" / "rollouts.jsonl"):
        if row["step"] in rows:
            rows[row["step"]].append(row)
    examples = {row["key"]: Example.from_json(row) for row in _rows(recipe.out / "reject" / "kept.jsonl")} if titles else {}
    count = max(1, min(SAMPLES, recipe.report.gallery_size // max(1, len(titles))))
    moments = []
    for step, title in titles.items():
        groups = _groups(rows[step], examples)
        chosen = choose_groups(groups, size=count, seed=recipe.seed)
        samples = [_sample(recipe, examples[key], groups[key], threshold=threshold) for key in chosen]
        moments.append(Moment(title=title, samples=samples))
    return [moment for moment in moments if moment.samples]


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion and what it was worth within its group."""

    rollout: Rollout
    advantage: float


def _groups(rows: Sequence[Mapping[str, Any]], examples: Mapping[str, Example]) -> dict[str, list[Answered]]:
    """By question, those whose images are still there."""
    groups: dict[str, list[Answered]] = {}
    for row in rows:
        example = examples.get(row["example"])
        if example is not None and all(path.is_file() for path in example.images):
            groups.setdefault(example.key, []).append(Answered(Rollout.from_json(row), float(row["advantage"])))
    return groups


def choose_groups(groups: Mapping[str, Sequence[Answered]], *, size: int, seed: int) -> list[str]:
    """Keys of `size` questions: one of each task before a second of any, those whose rewards differ first.

    The order of tasks is drawn once for all steps, so that moments of a training can be compared.
    """

    def agree(key: str) -> bool:
        return len({answered.rollout.score.total for answered in groups[key]}) == 1

    by_task: dict[str, list[str]] = {}
    for key, group in groups.items():
        by_task.setdefault(group[0].rollout.task, []).append(key)
    tasks = sorted(by_task, key=lambda task: random.Random(f"{seed}/{task}").random())
    turns = [(turn, place, key) for place, task in enumerate(tasks) for turn, key in enumerate(sorted(by_task[task], key=agree))]
    return [key for _, _, key in sorted(turns)[:size]]


def _sample(recipe: Recipe, example: Example, group: Sequence[Answered], *, threshold: float) -> Sample:
    """One group of the training: its best answer and its worst, or one of them where all rewards agree."""
    ordered = sorted(group, key=lambda answered: -answered.rollout.score.total)
    best, worst = ordered[0], ordered[-1]
    alike = best.rollout.score.total == worst.rollout.score.total
    shown = {"alike": best} if alike else {"best": best, "worst": worst}
    located = boxes_of(example, {name: answered.rollout for name, answered in shown.items()})
    right = sum(is_right(answered.rollout.score, threshold=threshold) for answered in group)
    return Sample(
        key=example.key,
        split="training",
        task=example.task,
        outcome=f"{right} of {len(group)} right",
        tone="good" if right else "bad",
        question=shown_question(example),
        choices=shown_choices(example),
        target=example.target.choice or "",
        pictures=draw_pictures(example, located, side=recipe.report.image_side),
        answers=[_reply(name, answered, threshold=threshold) for name, answered in shown.items()],
    )


def _reply(name: str, answered: Answered, *, threshold: float) -> Reply:
    score = answered.rollout.score
    parts = " · ".join(f"{part} {value:.2f}" for part, value in score.parts.items())
    reply = reply_of(name, answered.rollout, threshold=threshold)
    return replace(reply, note=f"reward {score.total:.2f} ({parts}) · advantage {answered.advantage:+.2f}")
