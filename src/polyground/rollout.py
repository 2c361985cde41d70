"""Sample a group of completions for each example and score it: the one generation loop of the project.

Synthesis, rejection, evaluation and the demo differ only in what they do with a `Group`; none of them samples or
scores by itself. What a group is worth to the policy (advantages) is `losses`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest

from polyground.errors import DataError
from polyground.geometry import Grid
from polyground.imagefile import FILE_REASONS, ImageError
from polyground.records import Completion, Example, Message, Rollout, Score
from polyground.rewards import passed, reaches
from polyground.sampling import Foresighted, Sampler

Ask = Callable[[Example], tuple[Sequence[Message], Sequence[Grid]]]
"""How an example is put to a model: the conversation, and the grid on which that model writes boxes of each image."""

Judge = Callable[[Completion, Example, Sequence[Grid]], Score]
"""What scores a completion: `rewards.Scorer.score`."""


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one example, in sampling order."""

    example: Example
    rollouts: tuple[Rollout, ...]
    """Not empty."""

    @property
    def totals(self) -> tuple[float, ...]:
        """[G] weighted rewards, in the order of the completions."""
        return tuple(rollout.score.total for rollout in self.rollouts)

    def pass_rate(self, *, threshold: float) -> float:
        """Share of completions that are confirmed at this IoU, in [0, 1]."""
        return sum(is_confirmed(rollout.score, threshold=threshold) for rollout in self.rollouts) / len(self.rollouts)


def is_right(score: Score, *, threshold: float) -> bool:
    """The outcome by the rule of the benchmarks: IoU reaches the threshold; a box that names a wrong image overlaps nothing."""
    return score.unreadable is None and reaches(score.iou, threshold)


def is_confirmed(score: Score, *, threshold: float) -> bool:
    """Fit to learn from: right, and every image is named where the annotation knows it."""
    return score.unreadable is None and passed(score, threshold)


def rollout_groups(
    examples: Sequence[Example],
    *,
    sampler: Sampler,
    ask: Ask,
    judge: Judge,
    n: int,
    temperature: float,
    top_p: float = 1.0,
    max_tokens: int,
    seed: int,
    batch: int = 8,
    done: Container[str] = frozenset(),
) -> Iterator[Group]:
    """Sample `n` completions of each example and score them, in the order of the examples, `batch` prompts at a time.

    Groups whose key is in `done` are not yielded. A batch that an interruption cut in two is sampled again as a whole: the
    last bits of a logit depend on what else is in the batch, and a resumed stage must give the rows of an undisturbed one.
    """
    batches = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    batches = [few for few in batches if not all(example.key in done for example in few)]
    for few, after in zip_longest(batches, batches[1:], fillvalue=()):
        try:
            asked = [ask(example) for example in few]
            if after and isinstance(sampler, Foresighted):
                sampler.prepare([messages for messages, _ in asked] + _askable(after, ask))
            sampled = sampler.sample(
                [messages for messages, _ in asked],
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                seed=seed,
                keys=[example.key for example in few],
            )
        except ImageError as error:
            raise _in_its_row(error, few) from error
        for example, (_, grids), completions in zip(few, asked, sampled, strict=True):
            if example.key not in done:
                yield Group(example, tuple(_rollouts(example, completions, judge=judge, grids=grids)))


def _askable(examples: Sequence[Example], ask: Ask) -> list[Sequence[Message]]:
    """The conversations up to one that cannot be put to a model; its turn will say why."""
    found: list[Sequence[Message]] = []
    with suppress(DataError):
        for example in examples:
            found.append(ask(example)[0])
    return found


def _in_its_row(error: ImageError, examples: Sequence[Example]) -> DataError:
    """The error with the keys of the examples whose image it is, and how to go on without them."""
    keys = ", ".join(example.key for example in examples if error.path in example.images)
    if error.reason not in FILE_REASONS:
        return DataError(f"{keys}: {error}")
    return DataError(
        f"{keys}: {error}. What is done so far is kept; `options: {{check_images: decode}}` at a data file finds all such rows "
        "before a model is loaded, and `on_bad: quarantine` leaves them out of training data"
    )


def _rollouts(example: Example, completions: Sequence[Completion], *, judge: Judge, grids: Sequence[Grid]) -> Iterator[Rollout]:
    for sample, completion in enumerate(completions):
        score = judge(completion, example, grids)
        yield Rollout(example=example.key, task=example.task, completion=completion, score=score, sample=sample)


def interleave(examples: Sequence[Example]) -> list[Example]:
    """The same examples with their tasks taking turns, so that a run stopped early has seen every task."""
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    longest = max((len(group) for group in by_task.values()), default=0)
    turns = ([group[i] for group in by_task.values() if i < len(group)] for i in range(longest))
    return list(chain.from_iterable(turns))
