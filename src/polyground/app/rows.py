"""Rows of a run or a data set found again by where they lie: a file is read through once, then only what is looked at.

In memory are a few numbers per row (place, task, images, outcomes, reward), never its text. What a page looks like, and where
the files of a run are, is not known here.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import IO, Any

from polyground.errors import DataError
from polyground.outcomes import Outcome, outcome_of
from polyground.records import Example, Rollout


class Lines:
    """A JSON Lines file whose rows are read one at a time, each from where it lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("Q")
        self.parsed = 0
        """Rows parsed so far."""

    def __len__(self) -> int:
        return len(self._starts)

    def scan(self) -> Iterator[dict[str, Any]]:
        """Every row in order, once, noting where it lies; a last line that is still being written is left out."""
        self._starts = array("Q")
        place = 0
        with self._opened() as file:
            for line in file:
                if line.endswith(b"\n") and line.strip():
                    self._starts.append(place)
                    yield self._parse(line, len(self._starts))
                place += len(line)

    def row(self, number: int) -> dict[str, Any]:
        """The row of this number, counted from 0."""
        with self._opened() as file:
            file.seek(self._starts[number])
            return self._parse(file.readline(), number + 1)

    def _opened(self) -> IO[bytes]:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); check the path and its permissions") from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        self.parsed += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: row {number} is not JSON ({error}); mend it, or make the file again") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.path}: row {number} is a {type(row).__name__}; a row is a JSON object")
        return row


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One answer as it is shown."""

    name: str
    """Who said it."""
    rollout: Rollout
    advantage: float | None = None
    """What it was worth to the policy in GRPO."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One row, read: a question and what was said to it."""

    key: str
    task: str
    example: Example | None
    """None where the question itself is not among the files."""
    said: Sequence[Said]
    is_group: bool = False
    """All answers are one model's, sampled together."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it is exported: a row that `convert polyground` reads, with the answers beside it."""
        row: dict[str, Any] = {"key": self.key, "task": self.task}
        if self.example is not None:
            images = [str(path.absolute()) for path in self.example.images]
            row = {**self.example.to_json(), "key": self.key, "images": images}
        said = [
            {
                "name": said.name,
                **({} if said.advantage is None else {"advantage": said.advantage}),
                **({"note": said.note} if said.note else {}),
                **said.rollout.without_logprobs().to_json(),
            }
            for said in self.said
        ]
        return {**row, **({"answers": said} if said else {}), **self.facts}


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which rows are wanted; empty sets want all."""

    tasks: frozenset[str] = frozenset()
    images: frozenset[int] = frozenset()
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """By who answered: every one named must have one of these."""
    pass_rate: tuple[float, float] = (0.0, 1.0)
    reward: tuple[float, float] = (-math.inf, math.inf)
    """Of the answers' mean reward."""
    text: str = ""
    """Part of the key."""


class Shelf(ABC):
    """One list of rows to look through: how each is found again, and what is asked of it when rows are chosen."""

    def __init__(self, name: str, *, names: Sequence[str] = (), threshold: float) -> None:
        self.name = name
        self.names = tuple(names)
        """Who answered."""
        self.threshold = threshold
        self.tasks: list[str] = []
        """All there are, sorted."""
        self.counts: list[int] = []
        """Of images, all there are, sorted."""
        self.bad = 0
        """Rows of the source that could not be examples."""
        self._keys: list[str] = []
        self._task_codes = array("L")
        self._task_names: dict[str, int] = {}
        self._images = array("l")
        self._pass_rate = array("d")
        self._reward = array("d")
        self._outcomes = {name: array("B") for name in self.names}

    def __len__(self) -> int:
        return len(self._keys)

    @property
    @abstractmethod
    def parsed(self) -> int:
        """Rows parsed so far, in all files behind this shelf."""

    @abstractmethod
    def read(self, number: int) -> Found:
        """The row of this number, from its files."""

    def select(self, wanted: Filter) -> array[int]:
        """Numbers of the rows that are wanted, in order; nothing is read from disk."""
        tasks = {self._task_names[task] for task in wanted.tasks if task in self._task_names}
        outcomes = [(self._outcomes[name], mask) for name, mask in wanted.outcomes.items() if name in self._outcomes]
        (low, high), (least, most) = wanted.pass_rate, wanted.reward
        any_rate, any_reward = (low, high) == (0.0, 1.0), (least, most) == (-math.inf, math.inf)

        def fits(i: int) -> bool:
            # A rate that a row does not have compares as false, so that asking for one leaves such rows out.
            return (
                (not wanted.tasks or self._task_codes[i] in tasks)
                and (not wanted.images or self._images[i] in wanted.images)
                and (any_rate or low <= self._pass_rate[i] <= high)
                and (any_reward or least <= self._reward[i] <= most)
                and all(masks[i] & mask for masks, mask in outcomes)
                and wanted.text in self._keys[i]
            )

        return array("L", filter(fits, range(len(self))))

    def _add(
        self, key: str, task: str, *, images: int, pass_rate: float | None, scores: Mapping[str, Sequence[tuple[float, Outcome]]]
    ) -> None:
        """`scores` holds (reward, outcome) of the answers, by who answered."""
        self._keys.append(key)
        self._task_codes.append(self._task_names.setdefault(task, len(self._task_names)))
        self._images.append(images)
        answers = [answer for few in scores.values() for answer in few]
        if pass_rate is None and answers:
            pass_rate = fmean([float(outcome == Outcome.RIGHT) for _, outcome in answers])
        self._pass_rate.append(math.nan if pass_rate is None else pass_rate)
        self._reward.append(fmean([reward for reward, _ in answers]) if answers else math.nan)
        for name, masks in self._outcomes.items():
            mask = Outcome(0)
            for _, outcome in scores.get(name, ()):
                mask |= outcome
            masks.append(int(mask))

    def _settle(self) -> None:
        self.tasks = sorted(self._task_names)
        self.counts = sorted({count for count in self._images if count})


class Examples:
    """Examples of a file of ours by key, each read when it is asked for."""

    def __init__(self, path: Path, *, found: Callable[[Path], Path] = lambda path: path) -> None:
        """`found` says where an image lies that a row calls so."""
        self.lines = Lines(path)
        self._found = found
        self._number: dict[str, int] = {}
        self._images = array("H")

    def scan(self) -> Iterator[tuple[Example, dict[str, Any]]]:
        """Every example with its row, once; fills the index. Of rows with one key the first counts."""
        for row in self.lines.scan():
            example = self._example(row, len(self.lines))
            self._images.append(len(example.images))
            self._number.setdefault(example.key, len(self.lines) - 1)
            yield example, row

    def load(self) -> Examples:
        """As `scan`, for those who want the index alone."""
        for _ in self.scan():
            pass
        return self

    def get(self, key: str) -> Example | None:
        """The example of this key; None where the file has none."""
        number = self._number.get(key)
        return None if number is None else self._example(self.lines.row(number), number + 1)

    def images(self, key: str) -> int | None:
        """How many images the question has; None when it is not here."""
        number = self._number.get(key)
        return None if number is None else self._images[number]

    def row(self, number: int) -> tuple[Example, dict[str, Any]]:
        """The example of a line, counted from 0, and the row it was read from."""
        row = self.lines.row(number)
        return self._example(row, number + 1), row

    def _example(self, row: Mapping[str, Any], number: int) -> Example:
        try:
            example = Example.from_json(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.lines.path}: row {number} is no example of ours ({type(error).__name__}: {error}); convert the file first"
            ) from error
        return replace(example, images=tuple(map(self._found, example.images)))


class Answers:
    """A file of one model's answers by key: `evaluate/MODEL/SPLIT.jsonl`."""

    def __init__(self, path: Path, *, threshold: float) -> None:
        self.lines = Lines(path)
        self._number: dict[str, int] = {}
        self._rewards = array("d")
        self._outcomes = array("B")
        for row in self.lines.scan():
            rollout = rollout_of(row, path, len(self.lines))
            self._number[rollout.example] = len(self.lines) - 1
            self._rewards.append(rollout.score.total)
            self._outcomes.append(outcome_of(rollout.score, threshold=threshold))

    def __iter__(self) -> Iterator[str]:
        return iter(self._number)

    def told(self, key: str) -> list[tuple[float, Outcome]]:
        """Reward and outcome of the answer to this question, if there is one."""
        number = self._number.get(key)
        return [] if number is None else [(self._rewards[number], Outcome(self._outcomes[number]))]

    def get(self, key: str) -> Rollout | None:
        """The answer to the question of this key; None where there is none."""
        number = self._number.get(key)
        return None if number is None else rollout_of(self.lines.row(number), self.lines.path, number + 1)


def rollout_of(row: Mapping[str, Any], path: Path, number: int) -> Rollout:
    """The answer in a row. Raises DataError for a row that is none."""
    try:
        return Rollout.from_json(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: row {number} is no answer of ours ({type(error).__name__}: {error}); give a file that `evaluate` wrote"
        ) from error


class QuestionShelf(Shelf):
    """Questions, each with the answers of any number of models."""

    def __init__(
        self, name: str, examples: Examples, answers: Mapping[str, Path], *, threshold: float, limit_to_answered: bool = False
    ) -> None:
        super().__init__(name, names=list(answers), threshold=threshold)
        self._examples = examples
        self._answers = {who: Answers(path, threshold=threshold) for who, path in answers.items()}
        asked = {key for one in self._answers.values() for key in one} if limit_to_answered else None
        self._rows = array("L")
        for number, (example, row) in enumerate(examples.scan()):
            if asked is not None and example.key not in asked:
                continue
            self._rows.append(number)
            scores = {who: one.told(example.key) for who, one in self._answers.items()}
            rate = row.get("pass_rate")
            self._add(
                example.key,
                example.task,
                images=len(example.images),
                pass_rate=rate if isinstance(rate, int | float) else None,
                scores=scores,
            )
        self._settle()

    @property
    def parsed(self) -> int:
        return self._examples.lines.parsed + sum(one.lines.parsed for one in self._answers.values())

    def read(self, number: int) -> Found:
        example, row = self._examples.row(self._rows[number])
        found = [(who, one.get(example.key)) for who, one in self._answers.items()]
        said = [Said(name=who, rollout=rollout) for who, rollout in found if rollout is not None]
        facts = {name: row[name] for name in ("pass_rate",) if name in row}
        return Found(key=example.key, task=example.task, example=example, said=said, facts=facts)


class AnswerShelf(Shelf):
    """Answers whose questions may lie in other files, or nowhere: groups, or what a teacher said, one row of the file or several.

    `read_rows` makes answers of the rows of one question; rows that follow one another and have the same `identity` are one.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        questions: Callable[[str], Example | None],
        images: Callable[[str], int | None],
        *,
        identity: Callable[[Mapping[str, Any]], tuple[str, str]],
        answers: Callable[[Sequence[Mapping[str, Any]]], list[Said]],
        facts: Sequence[str] = (),
        threshold: float,
        who: str,
        is_group: bool,
    ) -> None:
        super().__init__(name, names=[who], threshold=threshold)
        self._lines, self._questions, self._answers, self._facts = Lines(path), questions, answers, tuple(facts)
        self._is_group = is_group
        self._first = array("L")
        few: list[Mapping[str, Any]] = []
        before: tuple[str, str] | None = None
        for number, row in enumerate(self._lines.scan()):
            try:
                here = identity(row)
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}: row {number + 1} has no {error}; was it written by this program?") from error
            if here != before:
                if few:
                    self._add_few(few, images)
                self._first.append(number)
                few, before = [], here
            few.append(row)
        if few:
            self._add_few(few, images)
        self._first.append(len(self._lines))
        self._settle()

    @property
    def parsed(self) -> int:
        return self._lines.parsed

    def _add_few(self, rows: Sequence[Mapping[str, Any]], images: Callable[[str], int | None]) -> None:
        said = self._read_answers(rows)
        rollout = said[0].rollout
        scores = [(one.rollout.score.total, outcome_of(one.rollout.score, threshold=self.threshold)) for one in said]
        own = rows[0].get("images")
        count = len(own) if isinstance(own, list) else images(rollout.example) or 0
        self._add(rollout.example, rollout.task, images=count, pass_rate=rows[0].get("pass_rate"), scores={self.names[0]: scores})

    def _read_answers(self, rows: Sequence[Mapping[str, Any]]) -> list[Said]:
        try:
            said = self._answers(rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self._lines.path}: a row holds no answer of ours ({type(error).__name__}: {error}); make the file again"
            ) from error
        if not said:
            raise DataError(f"{self._lines.path}: a row holds no answer; make the file again")
        return said

    def read(self, number: int) -> Found:
        rows = [self._lines.row(line) for line in range(self._first[number], self._first[number + 1])]
        said = self._read_answers(rows)
        rollout = said[0].rollout
        facts = {name: rows[0][name] for name in self._facts if rows[0].get(name) is not None}
        example = self._questions(rollout.example)
        return Found(key=rollout.example, task=rollout.task, example=example, said=said, is_group=self._is_group, facts=facts)


def pages_of(rows: Sequence[int], size: int) -> int:
    """How many pages so many rows fill; at least one.

    >>> pages_of(range(0), 5), pages_of(range(10), 5), pages_of(range(11), 5)
    (1, 2, 3)
    """
    return max(1, -(-len(rows) // size))


def write_export(found: Iterable[Found], out: Path) -> int:
    """The rows as JSON Lines; says how many there were."""
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for one in found:
            file.write(json.dumps(one.to_json(), ensure_ascii=False) + "\n")
            count += 1
    return count
