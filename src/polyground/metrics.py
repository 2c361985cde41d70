"""Scored rollouts to tables: accuracy per task and macro average, with bootstrap intervals, and paired comparisons.

It reads records only; whether an answer is right was decided by the scorer. Several samples of one example are first
averaged, so intervals speak of examples (the population a benchmark samples), not of rollouts.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyground.errors import DataError
from polyground.geometry import reaches
from polyground.records import Rollout

# Shapes: B bootstrap draws, N examples of one task, K measures.

Array = np.ndarray[Any, np.dtype[np.float64]]

_DRAWN = 1 << 20
"""Examples drawn at once: bounds the memory of a bootstrap."""

Measure = Callable[[Rollout], float | None]
"""A number of one rollout in [0, 1], or None where it does not apply."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSummary:
    """The measures of one task, or of all of them averaged."""

    examples: int
    rollouts: int
    accuracy: dict[float, Estimate]
    """By IoU threshold; for a multiple choice the share of right letters, at every threshold."""
    mean_iou: Estimate
    image_accuracy: Estimate | None
    """Share of right image numbers; None when no example of the task is annotated with its image."""
    unreadable: dict[str, float]
    """Share of rollouts without a usable answer, by reason; reasons that did not occur are left out."""
    truncated: float
    """Share of rollouts cut off by the token budget."""
    measures: dict[str, Estimate | None] = field(default_factory=dict)
    """Means of further measures, by name; None where one applies to no example."""

    @property
    def unreadable_rate(self) -> float:
        return sum(self.unreadable.values())

    def to_json(self) -> dict[str, Any]:
        row = {
            "examples": self.examples,
            "rollouts": self.rollouts,
            "accuracy": {f"{threshold:g}": estimate.to_json() for threshold, estimate in self.accuracy.items()},
            "mean_iou": self.mean_iou.to_json(),
            "image_accuracy": None if self.image_accuracy is None else self.image_accuracy.to_json(),
            "unreadable": dict(self.unreadable),
            "unreadable_rate": self.unreadable_rate,
            "truncated": self.truncated,
        }
        further = {name: None if estimate is None else estimate.to_json() for name, estimate in self.measures.items()}
        return {**row, "measures": further} if further else row


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One model on one dataset."""

    tasks: dict[str, TaskSummary]
    """In alphabetical order."""
    macro: TaskSummary
    """Every task weighs the same, however many examples it has: the headline of MIG-Bench."""
    micro: TaskSummary
    """Every example weighs the same."""
    ious: tuple[float, ...]
    bootstrap: int
    """Draws behind the intervals; 0 leaves them at their means."""
    seed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": {task: summary.to_json() for task, summary in self.tasks.items()},
            "macro": self.macro.to_json(),
            "micro": self.micro.to_json(),
            "ious": list(self.ious),
            "bootstrap": self.bootstrap,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Second model minus first on the same examples, so above 0 the second is better."""

    tasks: dict[str, Estimate]
    macro: Estimate
    examples: int
    better: int
    """Examples on which the second model scores higher."""
    worse: int
    p_value: float
    """Two-sided bootstrap p of the macro difference, never below 2 / (draws + 1)."""

    @property
    def significant(self) -> bool:
        """True when the 95% interval of the macro difference leaves out 0."""
        return self.macro.low > 0 or self.macro.high < 0

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": {task: estimate.to_json() for task, estimate in self.tasks.items()},
            "macro": self.macro.to_json(),
            "examples": self.examples,
            "better": self.better,
            "worse": self.worse,
            "p_value": self.p_value,
            "significant": self.significant,
        }


def summarize(
    rollouts: Iterable[Rollout],
    *,
    ious: Sequence[float] = (0.5, 0.7, 0.3),
    bootstrap: int = 1000,
    seed: int = 0,
    measures: Mapping[str, Measure] | None = None,
) -> Summary:
    """The table of one model: each task, their macro average, and the average over examples.

    `measures` adds columns of one's own; they move no other interval.
    """
    rows, further = list(rollouts), dict(measures or {})
    if not rows:
        raise DataError("no rollouts to summarise; run `evaluate` first")
    by_task: dict[str, list[Rollout]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    names = sorted(by_task)
    values = {task: _per_example(by_task[task], ious, list(further.values())) for task in names}
    draws = {task: _bootstrap_means(values[task], draws=bootstrap, seed=seed, name=task) for task in names}
    sizes = np.array([len(values[task]) for task in names], dtype=float)
    columns = (tuple(ious), tuple(further))
    tasks = {
        task: _task_summary(by_task[task], _nan_mean(values[task]), draws[task], columns, len(values[task])) for task in names
    }
    means_TK = np.stack([_nan_mean(values[task]) for task in names])
    draws_TBK = np.stack([draws[task] for task in names])
    known_TK = np.stack([np.sum(~np.isnan(values[task]), axis=0) for task in names])
    macro = _average(tasks, _nan_mean(means_TK), _nan_mean(draws_TBK), columns, np.ones(len(names)))
    micro = _average(tasks, _nan_mean(means_TK, known_TK), _nan_mean(draws_TBK, known_TK[:, None, :]), columns, sizes)
    return Summary(tasks=tasks, macro=macro, micro=micro, ious=tuple(ious), bootstrap=bootstrap, seed=seed)


def paired_difference(
    first: Iterable[Rollout],
    second: Iterable[Rollout],
    *,
    measure: Callable[[Rollout], float] | None = None,
    threshold: float = 0.5,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Difference:
    """How much better the second model is on the same examples: per task, and macro-averaged, with intervals.

    Both models are resampled together, example by example within each task. The default measure is accuracy at
    `threshold`; `measure` takes any number of a rollout instead (`lambda r: r.score.iou`).
    """
    measure = measure or (lambda rollout: float(reaches(rollout.score.iou, threshold)))
    a, b = _example_means(first, measure), _example_means(second, measure)
    if not a or a.keys() != b.keys():
        odd = sorted(f"{task}/{key}" for task, key in a.keys() ^ b.keys())
        raise DataError(
            f"the two models were not scored on the same examples: {len(a)} and {len(b)}, {len(odd)} only in one "
            f"(such as {', '.join(odd[:3]) or 'none'}); evaluate both on the same split"
        )
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, key in sorted(a):
        by_task[task].append(b[task, key] - a[task, key])
    columns = {task: np.array(deltas)[:, None] for task, deltas in by_task.items()}
    draws = {task: _bootstrap_means(column, draws=bootstrap, seed=seed, name=task)[:, 0] for task, column in columns.items()}
    macro_B = np.mean(np.stack(list(draws.values())), axis=0)
    macro = float(np.mean([column.mean() for column in columns.values()]))
    every = np.concatenate(list(columns.values()))
    tail = min(int(np.sum(macro_B <= 0)), int(np.sum(macro_B >= 0)))
    return Difference(
        tasks={task: estimate(float(columns[task].mean()), draws[task]) for task in columns},
        macro=estimate(macro, macro_B),
        examples=len(a),
        better=int(np.sum(every > 0)),
        worse=int(np.sum(every < 0)),
        p_value=min(1.0, 2 * (tail + 1) / (len(macro_B) + 1)),
    )


def pass_rates(groups: Iterable[Sequence[Rollout]], *, threshold: float = 0.5) -> dict[str, float]:
    """The share of each group's rollouts that reach this IoU (or the right letter), by example key."""
    rates = {}
    for group in groups:
        if not group or len({rollout.example for rollout in group}) != 1:
            raise ValueError(f"a group holds the rollouts of one example; got {sorted({r.example for r in group})}")
        rates[group[0].example] = sum(reaches(r.score.iou, threshold) for r in group) / len(group)
    return rates


Columns = tuple[tuple[float, ...], tuple[str, ...]]
"""What K counts: accuracy at each of these IoUs, mean IoU, image accuracy, then each of these further measures."""


def _per_example(rows: Sequence[Rollout], ious: Sequence[float], measures: Sequence[Measure]) -> Array:
    """[N, K] means over the samples of each example, NaN where unknown."""
    by_example: dict[str, list[Rollout]] = defaultdict(list)
    for row in rows:
        by_example[row.example].append(row)
    table = []
    for group in by_example.values():
        overlaps = [row.score.iou for row in group]
        accuracies = [_mean_known([float(reaches(overlap, threshold)) for overlap in overlaps]) for threshold in ious]
        images = _mean_known([row.score.image_correct for row in group])
        further = [_mean_known([measure(row) for row in group]) for measure in measures]
        table.append([*accuracies, _mean_known(overlaps), images, *further])
    return np.array(table)


def _mean_known(numbers: Sequence[float | None]) -> float:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else float("nan")


def _example_means(rows: Iterable[Rollout], measure: Callable[[Rollout], float]) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        values[row.task, row.example].append(measure(row))
    return {key: float(np.mean(numbers)) for key, numbers in values.items()}


def _nan_mean(values: Array, weights: Array | None = None) -> Array:
    """Mean over the first axis that leaves NaN out; NaN where nothing is known."""
    known = ~np.isnan(values)
    weight = known * (1.0 if weights is None else weights)
    return _ratio((np.nan_to_num(values) * weight).sum(axis=0), weight.sum(axis=0))


def _ratio(sums: Array, weights: Array) -> Array:
    ratio: Array = np.divide(sums, weights, out=np.full(np.shape(sums), np.nan), where=weights > 0)
    return ratio


def _bootstrap_means(values_NK: Array, *, draws: int, seed: int, name: str) -> Array:
    """[B, K] means over resampled examples. Each task has its own stream, so adding a task moves no other interval."""
    if draws < 1:
        return _nan_mean(values_NK)[None, :]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    examples = len(values_NK)
    known_NK, filled_NK = (~np.isnan(values_NK)).astype(float), np.nan_to_num(values_NK)
    means, step = [], max(1, _DRAWN // examples)
    for start in range(0, draws, step):
        few = min(step, draws - start)
        drawn_BN = rng.integers(examples, size=(few, examples)) + examples * np.arange(few)[:, None]
        counts_BN = np.bincount(drawn_BN.ravel(), minlength=few * examples).reshape(few, examples).astype(float)
        means.append(_ratio(counts_BN @ filled_NK, counts_BN @ known_NK))
    return np.concatenate(means)


def estimate(value: float, draws_B: Array) -> Estimate:
    """A mean with the interval that its bootstrap draws span; without draws the interval is the mean itself."""
    known = draws_B[~np.isnan(draws_B)]
    if not len(known):
        return Estimate(value, value, value)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _task_summary(rows: Sequence[Rollout], means_K: Array, draws_BK: Array, columns: Columns, examples: int) -> TaskSummary:
    reasons = Counter(row.score.unreadable for row in rows if row.score.unreadable is not None)
    return TaskSummary(
        examples=examples,
        rollouts=len(rows),
        unreadable={reason: times / len(rows) for reason, times in sorted(reasons.items())},
        truncated=sum(row.completion.truncated for row in rows) / len(rows),
        **_estimates(means_K, draws_BK, columns),
    )


def _estimates(means_K: Array, draws_BK: Array, columns: Columns) -> dict[str, Any]:
    ious, further = columns
    known = [None if np.isnan(mean) else estimate(float(mean), draws_BK[:, k]) for k, mean in enumerate(means_K)]
    return {
        "accuracy": dict(zip(ious, known, strict=False)),
        "mean_iou": known[len(ious)],
        "image_accuracy": known[len(ious) + 1],
        "measures": dict(zip(further, known[len(ious) + 2 :], strict=True)),
    }


def _average(tasks: dict[str, TaskSummary], means_K: Array, draws_BK: Array, columns: Columns, weights_T: Array) -> TaskSummary:
    reasons = sorted({reason for task in tasks.values() for reason in task.unreadable})

    def average(shares: list[float]) -> float:
        return float(np.average(shares, weights=weights_T))

    return TaskSummary(
        examples=sum(task.examples for task in tasks.values()),
        rollouts=sum(task.rollouts for task in tasks.values()),
        unreadable={reason: average([task.unreadable.get(reason, 0.0) for task in tasks.values()]) for reason in reasons},
        truncated=average([task.truncated for task in tasks.values()]),
        **_estimates(means_K, draws_BK, columns),
    )
