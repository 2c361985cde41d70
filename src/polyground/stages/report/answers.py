"""What became of the single answers: their kinds of error, the images they name, how far their boxes overlap, and what a later
model got right or lost against the one before. Nothing is scored anew: it all follows from the scores in the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from polyground import charts
from polyground.outcomes import Kind, kind_of
from polyground.records import Example, Rollout
from polyground.rollout import is_right
from polyground.stages.report.pictures import LABELS

BINS = 10
"""Columns of a distribution of IoU."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, and what every model said to it."""

    split: str
    example: Example
    rollouts: Mapping[str, Rollout]
    """By model, in the order of the figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facet:
    """One page of a set of which a reader sees one at a time."""

    title: str
    drawing: Markup
    caption: str = ""
    more: Sequence[tuple[str, Markup]] = ()
    """(model, drawing) of further drawings, one for each model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """A table of shares that is shaded as a map: each row adds up to 1."""

    corner: str
    columns: Sequence[Kind]
    rows: Sequence[tuple[str, int, Sequence[tuple[int, float]]]]
    """(name, how many, (count, share) for each column)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turned:
    """How the right and wrong answers of two models go together in one split."""

    title: str
    gained: int
    """Wrong before, right after."""
    lost: int
    kept: int
    missed: int
    """Wrong before and after."""
    drawing: Markup

    @property
    def asked(self) -> int:
        """Questions that both models have answered."""
        return self.gained + self.lost + self.kept + self.missed


# ---- kinds of error


def kinds_by_split(asked: Sequence[Asked], models: Sequence[str], titles: Mapping[str, str], *, threshold: float) -> list[Facet]:
    """Bars of kinds, one for each model: of everything that was asked, then split by split."""
    return [_kind_bars(title, rows, models, threshold=threshold) for title, rows in by_split(asked, titles)]


def _kind_bars(title: str, asked: Sequence[Asked], models: Sequence[str], *, threshold: float) -> Facet:
    bars = {}
    for model in models:
        counts = Counter(kind_of(one.rollouts[model], one.example, threshold=threshold) for one in asked)
        bars[LABELS[model]] = [(str(kind), kind.style, counts[kind]) for kind in Kind]
    return Facet(title=title, drawing=charts.stacked_bars(bars), caption=f"{len(asked)} questions.")


def kinds_by_task(asked: Sequence[Asked], model: str, *, threshold: float) -> Shares:
    """What one model's answers are, task by task; kinds that never occur are left out."""
    counts: dict[str, Counter[Kind]] = {}
    for one in asked:
        counts.setdefault(one.example.task, Counter())[kind_of(one.rollouts[model], one.example, threshold=threshold)] += 1
    return _shares("task", counts)


def kinds_from_to(asked: Sequence[Asked], first: str, second: str, *, threshold: float) -> Shares:
    """What became of each kind of the first model's answers with the second."""
    counts: dict[str, Counter[Kind]] = {}
    for one in asked:
        before, after = (kind_of(one.rollouts[model], one.example, threshold=threshold) for model in (first, second))
        counts.setdefault(before, Counter())[after] += 1
    ordered = {str(kind): counts[kind] for kind in Kind if kind in counts}
    return _shares(f"{LABELS[first]} ↓   {LABELS[second]} →", ordered, sort=False)


def _shares(corner: str, counts: Mapping[str, Counter[Kind]], *, sort: bool = True) -> Shares:
    present = [kind for kind in Kind if any(row[kind] for row in counts.values())]
    rows = []
    for name in sorted(counts) if sort else counts:
        total = counts[name].total()
        rows.append((name, total, [(counts[name][kind], counts[name][kind] / total) for kind in present]))
    return Shares(corner=corner, columns=present, rows=rows)


def errors_of(asked: Sequence[Asked], model: str, *, size: int, threshold: float) -> dict[Kind, tuple[int, list[Asked]]]:
    """Of each kind of error: how many answers of this model, and up to `size` of them, tasks taking turns."""
    found: dict[Kind, list[Asked]] = {}
    for one in asked:
        found.setdefault(kind_of(one.rollouts[model], one.example, threshold=threshold), []).append(one)
    return {kind: (len(found[kind]), in_turns(found[kind])[:size]) for kind in Kind if kind in found and kind != Kind.RIGHT}


# ---- the images that are named


def image_confusion(asked: Sequence[Asked], models: Sequence[str], titles: Mapping[str, str]) -> list[Facet]:
    """Which image holds the box, and which image was named: of everything, then split by split, a matrix for each model.

    Of questions with several images and one that is right.
    """
    facets = []
    for title, rows in by_split([one for one in asked if right_image(one.example) is not None], titles):
        counts = f"{len(rows)} questions with several images, of which one is right."
        drawings = _confusions(rows, models)
        facets.append(Facet(title=title, drawing=Markup(""), caption=counts, more=drawings))
    return facets


def right_image(example: Example) -> int | None:
    """The one image that holds what is asked for; None where there is no such image, or no other."""
    images = {located.image for located in example.target.boxes}
    return images.pop() if len(images) == 1 and len(example.images) > 1 else None


def named_image(rollout: Rollout) -> str:
    """The number of the image an answer names, or a word where it names several, none, or has no box.

    A word is short: it stands over a column.
    """
    answer = rollout.score.answer
    if answer is None or not answer.boxes:
        return "no box"
    images = {located.image for located in answer.boxes}
    [image] = images if len(images) == 1 else [0]
    return "none" if image is None else str(image) if image else "several"


def _confusions(asked: Sequence[Asked], models: Sequence[str]) -> list[tuple[str, Markup]]:
    """A matrix for each model, all with the same rows and columns."""
    counts = {
        model: Counter((str(right_image(one.example)), named_image(one.rollouts[model])) for one in asked) for model in models
    }
    pairs = {pair for found in counts.values() for pair in found}
    numbers = sorted({int(name) for pair in pairs for name in pair if name.isdigit()})
    rows = [str(number) for number in numbers if any(right == str(number) for right, _ in pairs)]
    words = [word for word in ("several", "none", "no box") if any(named == word for _, named in pairs)]
    columns = [*map(str, numbers), *words]
    return [
        (
            model,
            charts.matrix(
                rows, columns, [[found[row, column] for column in columns] for row in rows], style=f"c-{model}", corner="image"
            ),
        )
        for model, found in counts.items()
    ]


# ---- how far boxes overlap


def overlaps(asked: Sequence[Asked], models: Sequence[str], titles: Mapping[str, str], *, threshold: float) -> list[Facet]:
    """The IoU of the answers to questions with annotated boxes: how many reach a value, and how they are spread."""
    facets = []
    for title, rows in by_split([one for one in asked if one.example.target.boxes], titles):
        values = {model: [one.rollouts[model].score.iou for one in rows] for model in models}
        binned = {model: [counts[place] for place in range(BINS)] for model, counts in _binned(values).items()}
        labels = [f"{place / BINS:g}" for place in range(BINS)]
        facets.append(
            Facet(
                title=title,
                drawing=charts.shares_above(values, mark=threshold),
                caption=f"{len(rows)} questions with annotated boxes.",
                more=[("", charts.columns(labels, binned))],
            )
        )
    return facets


def _binned(values: Mapping[str, Iterable[float]]) -> dict[str, Counter[int]]:
    return {name: Counter(min(BINS - 1, int(value * BINS)) for value in numbers) for name, numbers in values.items()}


# ---- one model against the one before


def turned(asked: Sequence[Asked], first: str, second: str, titles: Mapping[str, str], *, threshold: float) -> list[Turned]:
    """What the second model got right that the first did not, and the reverse: of everything, then split by split."""
    found = []
    for title, rows in by_split(asked, titles):
        turns = Counter(_turn(one, first, second, threshold=threshold) for one in rows)
        by_task: dict[str, Counter[tuple[bool, bool]]] = {}
        for one in rows:
            by_task.setdefault(one.example.task, Counter())[_turn(one, first, second, threshold=threshold)] += 1
        bars = {task: (own[True, False], own[False, True], own.total()) for task, own in sorted(by_task.items())}
        found.append(
            Turned(
                title=title,
                gained=turns[False, True],
                lost=turns[True, False],
                kept=turns[True, True],
                missed=turns[False, False],
                drawing=charts.diverging_bars(bars),
            )
        )
    return found


def turned_samples(
    asked: Sequence[Asked], first: str, second: str, *, size: int, threshold: float
) -> tuple[list[Asked], list[Asked]]:
    """(gained, lost): up to `size` questions of each, tasks in turn, boxes before letters, the largest change of IoU first."""

    def change(one: Asked) -> float:
        return abs(one.rollouts[second].score.iou - one.rollouts[first].score.iou)

    ordered = sorted(asked, key=lambda one: (not one.example.target.boxes, -change(one), one.split, one.example.key))
    sides: dict[tuple[bool, bool], list[Asked]] = {}
    for one in ordered:
        sides.setdefault(_turn(one, first, second, threshold=threshold), []).append(one)
    gained, lost = (in_turns(sides.get(turn, []))[:size] for turn in ((False, True), (True, False)))
    return gained, lost


def _turn(one: Asked, first: str, second: str, *, threshold: float) -> tuple[bool, bool]:
    """(right before, right after)."""
    before, after = (is_right(one.rollouts[model].score, threshold=threshold) for model in (first, second))
    return before, after


# ---- shared


def by_split(asked: Sequence[Asked], titles: Mapping[str, str]) -> Iterator[tuple[str, Sequence[Asked]]]:
    """(title, questions): all of them, then those of each split, where there are several."""
    splits = list(dict.fromkeys(one.split for one in asked))
    if len(splits) > 1:
        yield "everything", asked
    for split in splits:
        yield titles[split], [one for one in asked if one.split == split]


def in_turns(asked: Sequence[Asked]) -> list[Asked]:
    """Tasks take turns, each in the order given."""
    queues: dict[str, list[Asked]] = {}
    for one in asked:
        queues.setdefault(one.example.task, []).append(one)
    longest = max(map(len, queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]
