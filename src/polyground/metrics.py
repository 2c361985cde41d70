"""Scored rollouts to tables: accuracy per task and macro average, with bootstrap intervals, and paired comparisons.

It reads records only; whether an answer is right was decided by the scorer. Several samples of one example are first
averaged, so intervals speak of examples (the population a benchmark samples), not of rollouts.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from polyground.errors import DataError
from polyground.geometry import reaches
from polyground.records import Rollout

# Shapes: B bootstrap draws, N examples of one task, K measures, S seeds, T tasks.

Array = np.ndarray[Any, np.dtype[np.float64]]

Counts = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

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
    letters: dict[str, float] = field(default_factory=dict)
    """Share of rollouts that answer each letter of a multiple choice; empty where none does."""
    measures: dict[str, Estimate | None] = field(default_factory=dict)
    """Means of further measures, by name; None where one applies to no example."""

    @property
    def unreadable_rate(self) -> float:
        """Share of answers that could not be read, in [0, 1], for whatever reason."""
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
        if self.letters:
            row["letters"] = dict(self.letters)
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


SAME_LETTER, FEWEST_LETTERS = 0.9, 20
"""Share of the questions answered by one letter from which a model is said to give it whatever it is asked, and of how many
questions at least: the right letters of a few may well be the same."""


def same_letter(measured: Mapping[str, Any]) -> str | None:
    """The letter that nearly all questions are answered by, from a task's or a macro's JSON values; None where there is none.

    >>> same_letter({"examples": 50, "letters": {"A": 0.96, "B": 0.04}})
    'A'
    >>> same_letter({"examples": 50, "letters": {"A": 0.5, "B": 0.5}})
    """
    if measured["examples"] < FEWEST_LETTERS:
        return None
    letters: Mapping[str, float] = measured.get("letters", {})
    return next((letter for letter, share in letters.items() if share >= SAME_LETTER), None)


def fixed_letters(splits: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(split, model, letter) wherever a model answers nearly every question of a split by one letter; pools are not told again.

    `splits` as in an evaluation's `results.json`.
    """
    return [
        (split, model, letter)
        for split, found in splits.items()
        if not split.endswith("(all)")
        for model, table in found["models"].items()
        if (letter := same_letter(table["macro"]))
    ]


Outcomes = Mapping[str, Mapping[str, float]]
"""How right one model was, question by question: by task, then by example key, in [0, 1]; or the difference of two models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AcrossSeeds:
    """A mean over the runs of several seeds, with the interval over questions and seeds, and each run's own value."""

    mean: Estimate
    seeds: tuple[float, ...]
    """In the order the runs were given."""

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the runs (over n - 1); None for a single one."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None

    def to_json(self) -> dict[str, Any]:
        spread = {"min": min(self.seeds), "max": max(self.seeds), "deviation": self.deviation}
        return {**self.mean.to_json(), **spread, "seeds": list(self.seeds)}


@dataclass(frozen=True, kw_only=True, slots=True)
class AcrossTable:
    """One split over several seeds: each task, and their macro average."""

    macro: AcrossSeeds
    tasks: dict[str, AcrossSeeds]
    """In alphabetical order."""
    examples: int

    def to_json(self) -> dict[str, Any]:
        tasks = {task: found.to_json() for task, found in self.tasks.items()}
        return {"examples": self.examples, "macro": self.macro.to_json(), "tasks": tasks}


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


def outcomes(rollouts: Iterable[Rollout], *, threshold: float = 0.5) -> dict[str, dict[str, float]]:
    """What `across_seeds` reads: by task and key, the share of an example's samples that reach this IoU (or the right letter)."""
    means = _example_means(rollouts, lambda rollout: float(reaches(rollout.score.iou, threshold)))
    told: dict[str, dict[str, float]] = {}
    for task, key in sorted(means):
        told.setdefault(task, {})[key] = means[task, key]
    return told


def across_seeds(runs: Sequence[Outcomes], *, bootstrap: int = 1000, seed: int = 0) -> AcrossTable:
    """Runs of the same recipe under several seeds, each on the same questions: the mean over seeds, tasks and questions.

    With y[s,t,i] the outcome of question i of task t in run s, the value is mean_s mean_t mean_i y. A draw of the bootstrap
    takes S runs and, within each task, N questions, both with replacement; the questions drawn are the same for every run, as
    the runs share them: mean_k mean_t mean_j y[s(k),t,i(t,j)]. So an interval covers both what other questions and what other
    seeds would have given. With few runs it is somewhat too narrow in the latter: a bootstrap of S runs sees (S - 1) / S of
    their variance; with one run it is the interval over questions alone.
    """
    if not runs or not runs[0]:
        raise DataError("no outcomes to average; run `evaluate` first")
    names = sorted(runs[0])
    values: dict[str, Array] = {}
    for task in names:
        keys = sorted(runs[0][task])
        for run in runs[1:]:
            if run.keys() != runs[0].keys() or run[task].keys() != runs[0][task].keys():
                raise DataError(
                    f"the runs did not answer the same questions (task {task!r}); every seed needs the same test splits: "
                    "evaluate all runs with one and the same `world` and `data`"
                )
        values[task] = np.array([[run[task][key] for run in runs] for key in keys], dtype=float)
    picks_BS = _seed_picks(len(runs), draws=bootstrap, seed=seed)
    # Every run is a column of the same table, so that a draw of questions is a draw for all of them.
    draws = {task: _bootstrap_means(values[task], draws=bootstrap, seed=seed, name=task) for task in names}
    means = {task: values[task].mean(axis=0) for task in names}
    macro_S = np.mean(np.stack([means[task] for task in names]), axis=0)
    macro_BS = np.mean(np.stack([draws[task] for task in names]), axis=0)
    return AcrossTable(
        macro=_across(macro_S, macro_BS, picks_BS),
        tasks={task: _across(means[task], draws[task], picks_BS) for task in names},
        examples=sum(len(values[task]) for task in names),
    )


def difference_across_seeds(
    first: Sequence[Outcomes], second: Sequence[Outcomes], *, bootstrap: int = 1000, seed: int = 0
) -> AcrossTable:
    """How much better the second model is, run by run and question by question: `across_seeds` of second minus first.

    Run k of both is of the same seed. Pairing takes out what questions and seeds have in common.
    """
    if len(first) != len(second):
        raise ValueError(f"needs as many runs of the first model as of the second; got {len(first)} and {len(second)}")
    deltas = []
    for a, b in zip(first, second, strict=True):
        if a.keys() != b.keys() or any(a[task].keys() != b[task].keys() for task in a):
            raise DataError("the two models were not scored on the same questions; evaluate both on the same splits")
        deltas.append({task: {key: b[task][key] - a[task][key] for key in a[task]} for task in a})
    return across_seeds(deltas, bootstrap=bootstrap, seed=seed)


def pooled(splits: Mapping[str, Outcomes]) -> dict[str, dict[str, float]]:
    """Several splits as one, each counting as one task: the macro average is then the mean over splits.

    >>> pooled({"ood_a": {"find": {"1": 1.0}, "track": {"2": 0.0}}})
    {'ood_a': {'find/1': 1.0, 'track/2': 0.0}}
    """
    return {
        split: {f"{task}/{key}": value for task, found in told.items() for key, value in found.items()}
        for split, told in splits.items()
    }


def _seed_picks(seeds: int, *, draws: int, seed: int) -> Counts:
    """[B, S] which runs a draw takes; the same for every split, so that seeds are drawn alike wherever they are compared."""
    if draws < 1:
        return np.arange(seeds)[None, :]
    return np.random.default_rng([seed, zlib.crc32(b"seeds")]).integers(seeds, size=(draws, seeds))


def _across(means_S: Array, draws_BS: Array, picks_BS: Counts) -> AcrossSeeds:
    draws_B = np.take_along_axis(draws_BS, picks_BS, axis=1).mean(axis=1)
    return AcrossSeeds(mean=estimate(float(means_S.mean()), draws_B), seeds=tuple(map(float, means_S)))


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
    unknown_NK, filled_NK = np.isnan(values_NK), np.nan_to_num(values_NK)
    counts: Iterable[Counts] = _drawn_counts(len(values_NK), draws, seed, name)
    if draws * len(values_NK) <= _DRAWN:
        counts = [_counts(len(values_NK), draws, seed, name)]
    means = []
    for counts_BN in counts:
        times_BN = counts_BN.astype(float)
        sums_BK = times_BN @ filled_NK
        known = times_BN @ (~unknown_NK).astype(float) if unknown_NK.any() else np.full_like(sums_BK, len(values_NK))
        means.append(_ratio(sums_BK, known))
    return np.concatenate(means)


@lru_cache(maxsize=256)
def _counts(examples: int, draws: int, seed: int, name: str) -> Counts:
    """The same draws serve every model and every arm of a study."""
    return next(_drawn_counts(examples, draws, seed, name)).astype(np.int16)


def _drawn_counts(examples: int, draws: int, seed: int, name: str) -> Iterator[Counts]:
    """[B, N] how often each draw has each example, so many draws at once as fit."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, _DRAWN // examples)
    for start in range(0, draws, step):
        few = min(step, draws - start)
        drawn_BN = rng.integers(examples, size=(few, examples)) + examples * np.arange(few)[:, None]
        yield np.bincount(drawn_BN.ravel(), minlength=few * examples).reshape(few, examples)


def estimate(value: float, draws_B: Array) -> Estimate:
    """A mean with the interval that its bootstrap draws span; without draws the interval is the mean itself."""
    known = draws_B[~np.isnan(draws_B)]
    if not len(known):
        return Estimate(value, value, value)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _task_summary(rows: Sequence[Rollout], means_K: Array, draws_BK: Array, columns: Columns, examples: int) -> TaskSummary:
    reasons = Counter(row.score.unreadable for row in rows if row.score.unreadable is not None)
    letters = Counter(row.score.answer.choice for row in rows if row.score.answer is not None and row.score.answer.choice)
    return TaskSummary(
        examples=examples,
        rollouts=len(rows),
        unreadable={reason: times / len(rows) for reason, times in sorted(reasons.items())},
        truncated=sum(row.completion.truncated for row in rows) / len(rows),
        letters={letter: times / len(rows) for letter, times in sorted(letters.items())},
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
    letters = sorted({letter for task in tasks.values() for letter in task.letters})

    def average(shares: list[float]) -> float:
        return float(np.average(shares, weights=weights_T))

    return TaskSummary(
        examples=sum(task.examples for task in tasks.values()),
        rollouts=sum(task.rollouts for task in tasks.values()),
        unreadable={reason: average([task.unreadable.get(reason, 0.0) for task in tasks.values()]) for reason in reasons},
        truncated=average([task.truncated for task in tasks.values()]),
        letters={letter: average([task.letters.get(letter, 0.0) for task in tasks.values()]) for letter in letters},
        **_estimates(means_K, draws_BK, columns),
    )
