"""The public benchmarks: what each one counts as right, over which rows, and how its headline is made of that.

A headline follows the rule its publishers score by. Beside it stand what those rules leave out: one-to-one matching of all boxes
with the image required, image numbers, "not there", and what could not be read. Quirks of other people's scripts are
reproduced under their own names (`COMPATS`) and never make a headline. Nothing here samples or loads a model.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np

from polyground.answer import NATIVE_TAIL, NUMBER, POINT_PAIR, Answer, Located, Unreadable, answer_tags, read_answer, spoken
from polyground.detection import Found, Panel, Truth, average_precision, regroup
from polyground.errors import ConfigError, DataError
from polyground.geometry import Box, Grid, iou, reaches
from polyground.metrics import Estimate, Measure, Summary, estimate, summarize
from polyground.records import Completion, Example, Rollout, Score
from polyground.rewards import read
from polyground.sources import SOURCES, BadRow, options_of, scan_source
from polyground.sources.reading import require_none_bad, screen_images

RuleName = Literal["first_box", "one_to_one", "exact_letter"]
HeadlineName = Literal["accuracy", "average_precision"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One public benchmark and the rule it is scored by."""

    name: str
    """Also the name of its reader in `sources`."""
    title: str
    rule: RuleName
    """What is made of one answer (`RULES`)."""
    headline: HeadlineName
    """What is made of all of them."""
    average: Literal["tasks", "rows"]
    """What weighs the same in the headline: every task, or every row."""
    ious: tuple[float, ...] = (0.5, 0.7, 0.3)
    """Overlaps at which accuracy is told; the first makes the headline."""
    precision_ious: tuple[float, ...] = (0.5,)
    """Overlaps over which average precision is averaged."""
    weights: Literal["instances", "equal"] = "equal"
    """What a category counts in average precision."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Published number of rows by version or split; empty where it could not be read."""
    tasks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Published number of rows of each task, by version."""
    source: str
    """Where the rule was read, and what could not be."""

    @property
    def in_letters(self) -> bool:
        """Whether answers are letters of a multiple choice, which have no boxes."""
        return self.rule == "exact_letter"

    def measure(self) -> str:
        """The headline in words."""
        if self.headline == "average_precision":
            span = (
                "AP50"
                if self.precision_ious == (0.5,)
                else f"AP at IoU {self.precision_ious[0]:g} to {self.precision_ious[-1]:g}"
            )
            return f"weighted {span}" if self.weights == "instances" else f"{span}, mean over data sets"
        what = "accuracy" if self.in_letters else f"accuracy at IoU {self.ious[0]:g}"
        return f"{what}, mean over {self.average}"


_UNIVG = "eval/zero_shot of github.com/AMAP-ML/UniVG-R1: first box, IoU >= 0.5, an answer that cannot be read counts as 0"
_COCO_IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="mig_bench",
            title="MIG-Bench",
            rule="first_box",
            headline="accuracy",
            average="tasks",
            rows={"original": 4295, "revised": 4276},
            tasks={
                "original": {
                    "region": 1203,
                    "common_object": 816,
                    "object_tracking": 550,
                    "diff": 528,
                    "group_grounding": 499,
                    "multi_view": 288,
                    "correspondence": 117,
                    "reasoning": 101,
                    "refer_grounding": 99,
                    "view_diff": 94,
                },
                "revised": {
                    "region": 1203,
                    "common_object": 815,
                    "object_tracking": 550,
                    "diff": 528,
                    "group_grounding": 485,
                    "multi_view": 288,
                    "correspondence": 117,
                    "reasoning": 97,
                    "refer_grounding": 99,
                    "view_diff": 94,
                },
            },
            source="eval/MIG_bench of github.com/AMAP-ML/UniVG-R1 (after Migician's): first box, image number not asked for",
        ),
        Benchmark(
            name="mc_bench",
            title="MC-Bench",
            rule="one_to_one",
            headline="average_precision",
            average="rows",
            weights="instances",
            rows={"0.2": 2000},
            source="eval_mc_bench.py of github.com/XuYunqiu/MC-Bench: AP50 of each group, weighted by its annotated instances; "
            "image-level accuracy beside it",
        ),
        Benchmark(name="lisa", title="LISA-Grounding", rule="first_box", headline="accuracy", average="rows", source=_UNIVG),
        Benchmark(name="llmseg", title="LLMSeg-Grounding", rule="first_box", headline="accuracy", average="rows", source=_UNIVG),
        Benchmark(name="revos", title="ReVOS-Grounding", rule="first_box", headline="accuracy", average="rows", source=_UNIVG),
        Benchmark(
            name="reasonvos", title="ReasonVOS-Grounding", rule="first_box", headline="accuracy", average="rows", source=_UNIVG
        ),
        Benchmark(
            name="ref_l4",
            title="Ref-L4",
            rule="first_box",
            headline="accuracy",
            average="rows",
            ious=(0.5, 0.75, 0.9),
            rows={"val": 7231, "test": 38110, "both": 45341},
            source="README of github.com/JierunChen/Ref-L4: accuracy at 0.5, 0.75, 0.9 and their mean from 0.5 to 0.95",
        ),
        Benchmark(
            name="odinw",
            title="OdinW",
            rule="one_to_one",
            headline="average_precision",
            average="tasks",
            precision_ious=_COCO_IOUS,
            source="COCO's average precision, mean over data sets, as ELEVATER reports it; what arXiv 2507.00748 counts "
            "is not public",
        ),
        Benchmark(
            name="blink",
            title="BLINK",
            rule="exact_letter",
            headline="accuracy",
            average="tasks",
            rows={"val": 1901},
            source="eval/evaluate.py of github.com/zeyofu/BLINK_Benchmark: mean over sub-tasks; which ones arXiv 2507.00748 took "
            "is not public. There, a language model reads letters out of free replies; here one stands alone or does not count",
        ),
        Benchmark(
            name="mmiu",
            title="MMIU",
            rule="exact_letter",
            headline="accuracy",
            average="tasks",
            rows={"all": 11698},
            source="evaluate_correct.py of github.com/OpenGVLab/MMIU: mean over tasks. There, a language model reads letters out "
            "of free replies, and a letter counts that occurs anywhere in the gold text; here it has to be the letter",
        ),
    )
}
"""By name, which is also the name of the reader."""


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of this name; raises ConfigError that lists the names."""
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


# ---------------------------------------------------------------- rows


COUNTED_WRONG = ("inverted", "out_of_range", "bad_image", "bad_choice")
"""Bad rows that the published denominators hold: their annotation cannot be met, so every answer to them is wrong."""

_REMEDY = "correct the file, or where its images are"
_NOT_ROWS = ("orphan", "too_many")
"""Bad entries of a file that no question is asked about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """The rows of one benchmark file, as its publishers count them."""

    benchmark: Benchmark
    path: Path
    version: str | None
    """Or the split, where the rows name one; `both` when they name two."""
    examples: tuple[Example, ...]
    wrong: tuple[BadRow, ...] = ()
    """Rows whose annotation is bad: they count, and no answer to them is right."""
    left_out: tuple[BadRow, ...] = ()
    """Entries that are no rows."""
    keys: tuple[str, ...] = ()
    """Of all rows, bad ones included, in the order of the file."""
    template: str | None = None
    """The words that the reader puts around an annotated description; None where questions are the annotation's own."""

    @property
    def rows(self) -> int:
        """Rows of the file, bad ones included; entries that are no rows are not among them."""
        return len(self.keys)

    @property
    def published_rows(self) -> int | None:
        """What the publishers count in this version; None where that is unknown."""
        known = self.benchmark.rows
        if self.version is not None:
            return known.get(self.version)
        return next(iter(known.values())) if len(known) == 1 else None

    def tags(self) -> dict[str, Any]:
        """What decides a score, besides the answers."""
        return {
            "benchmark": self.benchmark.name,
            "version": self.version,
            "rule": self.benchmark.rule,
            "headline": self.benchmark.measure(),
            "rows": self.rows,
            "published_rows": self.published_rows,
            "wrong_by_annotation": dict(Counter(row.reason for row in self.wrong)),
            "left_out": dict(Counter(row.reason for row in self.left_out)),
            "template": self.template,
            "source": self.benchmark.source,
        }


def read_annotation(
    name: str, path: Path, /, *, limit: int | None = None, check_images: Literal["exists", "decode", "no"] = "no", **options: Any
) -> Annotation:
    """The rows of a benchmark's file, duplicates and bad ones included; at most the first `limit`.

    `options` go to the reader; None leaves its default. Raises DataError for rows that are bad by their files or layout:
    these are for the user to mend.
    """
    benchmark = benchmark_of(name)
    given = {key: value for key, value in options.items() if value is not None}
    if "duplicates" in options_of(name):
        given.setdefault("duplicates", "keep")
    examples: list[Example] = []
    bad: list[BadRow] = []
    keys: list[str] = []
    items = scan_source(name, path, **given)
    for item in items if check_images == "no" else screen_images(items, decode=check_images == "decode"):
        if limit is not None and len(examples) + len(bad) == limit:
            break
        if isinstance(item, BadRow):
            bad.append(item)
        else:
            examples.append(item)
        if not (isinstance(item, BadRow) and item.reason in _NOT_ROWS):
            keys.append(item.key)
    require_none_bad([row for row in bad if row.reason not in (*COUNTED_WRONG, *_NOT_ROWS)], path, remedy=_REMEDY)
    if not examples:
        raise DataError(f"{path}: holds no row of {benchmark.title} that can be asked; is it the right file?")
    versions = {str(found) for e in examples if (found := e.meta.get("version") or e.meta.get("split")) is not None}
    return Annotation(
        benchmark=benchmark,
        path=path,
        version=next(iter(versions), None) if len(versions) < 2 else "both",
        examples=tuple(examples),
        wrong=tuple(row for row in bad if row.reason in COUNTED_WRONG),
        left_out=tuple(row for row in bad if row.reason in _NOT_ROWS),
        keys=tuple(keys),
        template=given.get("template") or _template(name),
    )


def _template(name: str) -> str | None:
    """A reader's own words around a description."""
    option = inspect.signature(SOURCES[name]).parameters.get("template")
    return None if option is None else str(option.default)


def place_of(key: str) -> str:
    """A row's place in its annotation: its key without the name that the reader was given.

    >>> place_of("mig_bench/diff/12")
    'diff/12'
    """
    return key.partition("/")[2]


# ---------------------------------------------------------------- rules


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule makes of one response."""

    overlap: float
    """In [0, 1]: what thresholds are applied to. 1 or 0 for a letter, and for "not there"."""
    answer: Answer | None = None
    unreadable: Unreadable | None = None


Rule = Callable[[str, Example, Sequence[Grid], str | None], Verdict]
"""`rule(text, example, grids, native)`: `native` is the form an untrained family answers in, None for the contract alone."""

Corners = tuple[float, float, float, float]
"""x0, y0, x1, y1 in fractions of the image, which a model's box may leave."""

_BRACKETS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
_FIRST = {
    "qwen_tokens": POINT_PAIR,
    "qwen_json": _BRACKETS,
    "internvl": _BRACKETS,
    "any": re.compile(f"{POINT_PAIR.pattern}|{_BRACKETS.pattern}"),
}
_CONTRACT_BOX = re.compile(rf'"bbox_2d"\s*:\s*{_BRACKETS.pattern}')
_LETTER = re.compile(r"\s*\(?([A-Z])\)?\.?\s*")


def said(text: str) -> str:
    """What a response says: the last answer tag, or without one everything that is not a thought."""
    tagged = answer_tags(text)
    return tagged[-1] if tagged else spoken(text).partition("<think>")[0]


def first_box(text: str, example: Example, grids: Sequence[Grid], native: str | None) -> Verdict:
    """The first box of the answer against the annotated one, whichever image it names: the rule of MIG-Bench.

    Later boxes cost nothing. A box is not clipped to its image. A native box that names no image is read on the grid of the image
    asked for.
    """
    reading = read_answer(text, grids)
    if isinstance(reading, Answer):
        if reading.boxes and example.target.boxes:
            return Verdict(_iou_beyond(_as_written(text, reading.boxes[0], grids), example.target.boxes[0].box), reading)
        return Verdict(float(reading.choice is None and not reading.boxes and not example.target.boxes), reading)
    pattern = _FIRST.get(native) if native is not None and reading in (Unreadable.MISSING, Unreadable.MALFORMED) else None
    found = pattern.search(said(text)[:NATIVE_TAIL]) if pattern is not None else None
    if found is None:
        return Verdict(0.0, unreadable=reading)
    overlap = _open_overlap(
        [float(number) for number in found.groups() if number is not None], _asked_grid(example, grids), example
    )
    return Verdict(overlap, Answer()) if overlap is not None else Verdict(0.0, unreadable=Unreadable.INVERTED)


def one_to_one(text: str, example: Example, grids: Sequence[Grid], native: str | None) -> Verdict:
    """All boxes: mean IoU of one-to-one matches over max(predicted, gold). A box that names a wrong image overlaps nothing, one
    that names none (a native form) may match on any."""
    reading = read(Completion(text=_bare(text, grids, native)), example, grids, native)
    if isinstance(reading.answer, Unreadable):
        return Verdict(0.0, unreadable=reading.answer)
    return Verdict(reading.outcome if reading.is_choice else reading.lenient_iou, reading.answer)


def exact_letter(text: str, example: Example, grids: Sequence[Grid], native: str | None) -> Verdict:
    """The letter that the answer tag holds, or that the whole reply is: nothing is searched for in a sentence."""
    found = _LETTER.fullmatch(said(text))
    if found is None:
        reading = read_answer(text, grids)
        return Verdict(0.0, unreadable=reading if isinstance(reading, Unreadable) else Unreadable.MALFORMED)
    return Verdict(float(found[1] == example.target.choice), Answer(choice=found[1]))


RULES: dict[RuleName, Rule] = {"first_box": first_box, "one_to_one": one_to_one, "exact_letter": exact_letter}


def _bare(text: str, grids: Sequence[Grid], native: str | None) -> str:
    """The text as the reader of answers takes it: a native form inside an answer tag is taken out of the tag."""
    if native is not None and read_answer(text, grids) is Unreadable.MALFORMED:
        return said(text)
    return text


def _asked_grid(example: Example, grids: Sequence[Grid]) -> Grid:
    image = example.target.boxes[0].image if example.target.boxes else None
    return grids[-1 if image is None else image - 1]


def _corners(numbers: Sequence[float], grid: Grid) -> Corners:
    """Four numbers on this grid as x0, y0, x1, y1 in fractions of the image, wherever they lie."""
    a, b, c, d = numbers
    x0, y0, x1, y1 = (a, b, c, d) if grid.order == "xyxy" else (b, a, d, c)
    return x0 / grid.width, y0 / grid.height, x1 / grid.width, y1 / grid.height


def _as_written(text: str, first: Located, grids: Sequence[Grid]) -> Corners:
    """The corners of the first box of an answer in the contract, with what leaves the image: reading it has cut that off."""
    box, grid = first.box, grids[-1 if first.image is None else first.image - 1]
    for content in reversed(answer_tags(text)):
        if found := _CONTRACT_BOX.search(content):
            x0, y0, x1, y1 = _corners([float(number) for number in found.groups()], grid)
            if (max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1)) == (box.x0, box.y0, box.x1, box.y1):
                return x0, y0, x1, y1
    return box.x0, box.y0, box.x1, box.y1


def _open_overlap(numbers: Sequence[float], grid: Grid, example: Example) -> float | None:
    """IoU of a box that may leave its image; None for swapped corners. 0 where nothing is annotated."""
    x0, y0, x1, y1 = _corners(numbers, grid)
    if not (x0 < x1 and y0 < y1):
        return None
    if not example.target.boxes:
        return 0.0
    return _iou_beyond((x0, y0, x1, y1), example.target.boxes[0].box)


def _iou_beyond(corners: Corners, gold: Box) -> float:
    """The IoU does not change when both boxes shrink alike, so they are shrunk until the larger one fits."""
    low = min(0.0, *corners)
    span = max(1.0, *corners) - low
    x0, y0, x1, y1 = ((corner - low) / span for corner in corners)
    shrunk = Box(*((corner - low) / span for corner in (gold.x0, gold.y0, gold.x1, gold.y1)))
    return iou(Box(x0, y0, x1, y1), shrunk) if x0 < x1 and y0 < y1 else 0.0


# ---------------------------------------------------------------- other people's quirks


Compat = Callable[[str, Example, Sequence[Grid], str | None], float]
"""The overlap that a peer's script would count."""


def _migician_stretch(text: str, example: Example, grids: Sequence[Grid], native: str | None) -> float:
    """Migician's script moves every predicted box down before it is scored: y1 by 5 %, y2 by 10 %, neither beyond 0.999."""
    found = POINT_PAIR.search(said(text)[:NATIVE_TAIL])
    reading = read_answer(text, grids)
    if isinstance(reading, Answer) and reading.boxes:
        x0, y0, x1, y1 = _as_written(text, reading.boxes[0], grids)
    elif found is not None:
        x0, y0, x1, y1 = _corners([float(number) for number in found.groups()], _asked_grid(example, grids))
    else:
        return 0.0
    y0, y1 = _stretched(y0, 1.05), _stretched(y1, 1.10)
    if not (x0 < x1 and y0 < y1 and example.target.boxes):
        return 0.0
    return _iou_beyond((x0, y0, x1, y1), example.target.boxes[0].box)


def _stretched(y: float, factor: float) -> float:
    """Rounded, then cut, to whole per-mille: as that script has it."""
    return int(round(min(y * factor, 0.999), 3) * 1000) / 1000


_WHOLE, _DECIMAL = r"(\d+)", r"\d+\.\d+"
_POINTS = re.compile(rf"\({_WHOLE},\s*{_WHOLE}\),\s*\({_WHOLE},\s*{_WHOLE}\)")
_DECIMALS = re.compile(rf"[\[(]{_DECIMAL},\s*{_DECIMAL}(?:,\s*|\),\(){_DECIMAL},\s*{_DECIMAL}[\])]")
_LIST = re.compile(rf"\[{_WHOLE},\s*{_WHOLE},\s*{_WHOLE},\s*{_WHOLE}\]")
_SPACED = re.compile(rf"<box>{_WHOLE}\s+{_WHOLE}\s+{_WHOLE}\s+{_WHOLE}</box>")


def _univg_first_box(text: str, example: Example, grids: Sequence[Grid], native: str | None) -> float:
    """UniVG-R1's script takes the first box of the whole reply, thoughts included, as per-mille whatever the family writes.

    Forms are tried in an order: two points in whole numbers anywhere win over a list anywhere. Decimals are found but not
    understood: a reply that has them, and no two points, scores nothing.
    """
    found = _POINTS.search(text)
    if found is None and _DECIMALS.search(text) is None:
        found = _LIST.search(text) or _SPACED.search(text)
    if found is None or not example.target.boxes:
        return 0.0
    x0, y0, x1, y1 = (int(number) / 1000 for number in found.groups())
    return _iou_beyond((x0, y0, x1, y1), example.target.boxes[0].box) if x0 < x1 and y0 < y1 else 0.0


COMPATS: dict[str, Compat] = {"migician-stretch": _migician_stretch, "univg-first-box": _univg_first_box}
"""Quirks by name; told beside the headline of a benchmark that is scored by its first box."""

LAST_PAIR = "mc-bench-last-pair"
"""MC-Bench's script reads the predictions anew for every description with several groups, so that only the last one's groups are
renamed. A quirk of average precision, not of single answers."""


def compats_of(benchmark: Benchmark) -> list[str]:
    """The quirks that this benchmark knows."""
    return list(COMPATS) if benchmark.rule == "first_box" else [LAST_PAIR] if benchmark.name == "mc_bench" else []


def require_compat(benchmark: Benchmark, name: str) -> None:
    """Raises ConfigError for a quirk that does not exist, or not of this benchmark."""
    known = compats_of(benchmark)
    if name not in known:
        raise ConfigError(f"compat {name!r} is none of {benchmark.title}'s; known there: {', '.join(known) or 'none'}")


# ---------------------------------------------------------------- scores


def judge(
    benchmark: Benchmark,
    text: str,
    example: Example,
    grids: Sequence[Grid],
    *,
    native: str | None = None,
    compat: str | None = None,
) -> Score:
    """One response by the benchmark's rule (`iou`), by the strict one (`parts["one_to_one"]`) and by a quirk (`parts["compat"]`).

    `answer` is everything that could be read, `unreadable` why the benchmark's rule found nothing.
    """
    verdict = RULES[benchmark.rule](text, example, grids, native)
    parts: dict[str, float] = {}
    answer, image = verdict.answer, None
    if not benchmark.in_letters:
        bare = _bare(text, grids, native)
        reading = read(Completion(text=bare), example, grids, native)
        parts["one_to_one"] = reading.lenient_iou
        image = reading.image_agreement if len(example.images) > 1 else None
        answer = reading.answer if isinstance(reading.answer, Answer) else None
    if compat in COMPATS:
        parts["compat"] = COMPATS[compat](text, example, grids, native)
    return Score(
        total=verdict.overlap,
        parts=parts,
        iou=verdict.overlap,
        image_correct=image,
        unreadable=None if verdict.unreadable is None else verdict.unreadable.value,
        answer=answer,
    )


def unanswered(key: str, task: str, *, reason: str | None) -> Rollout:
    """A row that no response makes right: its annotation is bad (no reason), or nobody answered it (the reason)."""
    return Rollout(
        example=key,
        task=task,
        completion=Completion(text=""),
        score=Score(total=0.0, parts={"one_to_one": 0.0, "compat": 0.0}, iou=0.0, unreadable=reason),
    )


def rows_wrong_by_annotation(annotation: Annotation) -> list[Rollout]:
    """What the published denominators hold beyond the examples."""
    alone = annotation.examples[0].task
    return [unanswered(row.key, place_of(row.key).rpartition("/")[0] or alone, reason=None) for row in annotation.wrong]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The scores of one set of responses."""

    headline: Estimate
    summary: Summary
    precision: Mapping[str, Estimate] = field(default_factory=dict)
    """Average precision by task, and of `all`; empty where the benchmark has none."""
    compat: Estimate | None = None
    """What the headline would be with a peer's quirk."""

    def to_json(self) -> dict[str, Any]:
        return {
            **self.summary.to_json(),
            "headline": self.headline.to_json(),
            "average_precision": {task: value.to_json() for task, value in self.precision.items()},
            "compat": None if self.compat is None else self.compat.to_json(),
        }


def tabulate(
    benchmark: Benchmark,
    rollouts: Iterable[Rollout],
    examples: Sequence[Example],
    *,
    ious: Sequence[float] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    compat: str | None = None,
) -> Table:
    """The benchmark's headline and everything beside it, of responses that `judge` has scored, one or more per example.

    `ious` adds overlaps, in front of the benchmark's own; the headline stays at the benchmark's.
    """
    rows = _without_silent_images(list(rollouts))
    measures = _measures(benchmark, examples, benchmark.ious[0], compat)
    every = tuple(dict.fromkeys((*(ious or ()), *benchmark.ious)))
    summary = summarize(rows, ious=every, bootstrap=bootstrap, seed=seed, measures=measures)
    if benchmark.headline == "accuracy":
        whole = summary.macro if benchmark.average == "tasks" else summary.micro
        return Table(headline=whole.accuracy[benchmark.ious[0]], summary=summary, compat=whole.measures.get("compat"))
    answers = {row.example: row.score.answer for row in rows}
    precision = _precision(benchmark, answers, examples, bootstrap=bootstrap, seed=seed)
    quirk = None
    if compat == LAST_PAIR:
        quirk = _precision(benchmark, answers, examples, bootstrap=bootstrap, seed=seed, last_pair_only=True)["all"]
    return Table(headline=precision["all"], summary=summary, precision=precision, compat=quirk)


def _without_silent_images(rows: list[Rollout]) -> list[Rollout]:
    """Image numbers are not scored where no answer of the run names any: that form of answer has none."""
    if any(located.image is not None for row in rows if row.score.answer for located in row.score.answer.boxes):
        return rows
    return [replace(row, score=replace(row.score, image_correct=None)) for row in rows]


def _measures(benchmark: Benchmark, examples: Sequence[Example], threshold: float, compat: str | None) -> dict[str, Measure]:
    by_key = {example.key: example for example in examples}

    def part(name: str) -> Measure:
        return lambda row: float(reaches(row.score.parts.get(name, 0.0), threshold))

    def abstains(row: Rollout) -> float:
        return float(row.score.answer is not None and not row.score.answer.boxes and row.score.answer.choice is None)

    def abstains_where_nothing_is(row: Rollout) -> float | None:
        example = by_key.get(row.example)
        return abstains(row) if example is not None and not example.target.boxes else None

    measures: dict[str, Measure] = {}
    if not benchmark.in_letters:
        measures["one_to_one"] = part("one_to_one")
        measures["abstained"] = abstains
        measures["abstained_where_nothing_is"] = abstains_where_nothing_is
    if benchmark.name == "mc_bench":
        measures["image_level"] = lambda row: _image_level(row, by_key.get(row.example))
    if benchmark.name == "ref_l4":
        measures["mean_accuracy"] = lambda row: fmean(float(reaches(row.score.iou, level)) for level in _COCO_IOUS)
    if compat in COMPATS:
        measures["compat"] = part("compat")
    return measures


def _image_level(row: Rollout, example: Example | None) -> float:
    """1 when boxes are answered in exactly those images that hold one, wherever on them; an unreadable answer is wrong."""
    if example is None or row.score.answer is None or row.score.answer.choice is not None:
        return 0.0
    return float({box.image for box in row.score.answer.boxes} == {box.image for box in example.target.boxes})


# ---------------------------------------------------------------- average precision


def _precision(
    benchmark: Benchmark,
    answers: Mapping[str, Answer | None],
    examples: Sequence[Example],
    *,
    bootstrap: int,
    seed: int,
    last_pair_only: bool = False,
) -> dict[str, Estimate]:
    """Average precision by task, and of `all`; `answers` by key, None for an unreadable one.

    A task without an annotated instance has none. Raises DataError when no task has one.
    """
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        if example.key in answers:
            by_task.setdefault(example.task, []).append(example)

    def of(some: Sequence[Example]) -> tuple[float, Any]:
        return average_precision(
            _panels(some, answers, last_pair_only=last_pair_only),
            ious=benchmark.precision_ious,
            weights=benchmark.weights,
            bootstrap=bootstrap,
            seed=seed,
        )

    parts = {task: of(some) for task, some in by_task.items()}
    parts = {task: part for task, part in parts.items() if not np.isnan(part[0])}
    if not parts:
        raise DataError(f"{benchmark.title}: no row has an annotated instance; average precision needs one")
    if benchmark.average == "tasks":
        draws_TB = np.stack([draws for _, draws in parts.values()])
        whole = (fmean(value for value, _ in parts.values()), np.mean(draws_TB, axis=0))
    else:
        whole = of([example for example in examples if example.key in answers])
    return {task: estimate(value, draws) for task, (value, draws) in {**parts, "all": whole}.items()}


def ceiling(annotation: Annotation) -> float:
    """What the annotation itself would score as an answer: below 1 where the contract cannot say all of it.

    MC-Bench groups the instances of some descriptions, and an answer has no groups.
    """
    if annotation.benchmark.headline != "average_precision":
        return 1.0
    gold: dict[str, Answer | None] = {example.key: example.target for example in annotation.examples}
    return _precision(annotation.benchmark, gold, annotation.examples, bootstrap=0, seed=0)["all"].value


def _panels(examples: Sequence[Example], answers: Mapping[str, Answer | None], *, last_pair_only: bool) -> list[Panel]:
    """Every image of every question, in the order of the questions; the groups of an MC-Bench description renamed."""
    grouped = [_panels_of(number, example, answers[example.key]) for number, example in enumerate(examples)]
    several = [number for number, panels in enumerate(grouped) if any(t.category == 2 for panel in panels for t in panel.truths)]
    renamed = set(several[-1:] if last_pair_only else several)
    in_groups = bool(examples) and "image_ids" in examples[0].meta
    return [
        panel
        for number, panels in enumerate(grouped)
        for panel in (regroup(panels) if in_groups and number in renamed else panels)
    ]


def _panels_of(number: int, example: Example, answer: Answer | None) -> list[Panel]:
    meta = example.meta
    sizes = meta["sizes"] if "sizes" in meta else [meta["size"]]
    # In MC-Bench an instance says its image and its group; in OdinW all are of the one image and the category asked for.
    image_ids = meta["image_ids"] if "image_ids" in meta else [meta["image_id"]]
    asked = None if "image_ids" in meta else int(meta["category_ids"][0])
    boxes = answer.boxes if answer is not None else ()
    panels = []
    for position, (image_id, (width, height)) in enumerate(zip(image_ids, sizes, strict=True), start=1):
        truths = tuple(
            Truth(
                category=asked if asked is not None else int(instance["category_id"]),
                box=tuple(instance["bbox"]),
                area=float(instance.get("area") or instance["bbox"][2] * instance["bbox"][3]),
                crowd=bool(instance.get("iscrowd")),
            )
            for instance in meta["instances"]
            if instance["image_id"] == image_id
        )
        found = []
        for located in boxes:
            if located.image == position or (located.image is None and len(sizes) == 1):
                x0, y0, x1, y1 = located.box.to_pixels(width=width, height=height)
                category = 1 if asked is None else asked
                found.append(Found(category=category, box=(x0, y0, x1 - x0, y1 - y0), confidence=located.confidence))
        panels.append(Panel(question=number, truths=truths, found=tuple(found)))
    return panels


# ---------------------------------------------------------------- circular multiple choice


_TURN = "~"
"""Between the key of a question and how far its choices are turned."""
_TURNED = re.compile(rf"{_TURN}\d+$")


def is_turned(key: str | None) -> bool:
    """Whether a key is that of a question with its choices turned."""
    return key is not None and _TURNED.search(key) is not None


def turns(example: Example) -> list[Example]:
    """The question as it stands, and once for every other rotation of its choices; the letters stay where they are.

    A question that lists its choices itself cannot be turned, nor can one that has none.
    """
    letters = ascii_uppercase[: len(example.choices)]
    gold = example.target.choice
    listed = bool(letters) and all(f"({letter})" in example.question for letter in letters)
    if gold is None or len(letters) < 2 or len(letters) < len(example.choices) or listed:
        return [example]
    choices = [re.sub(rf"^\({letter}\)\s*", "", choice) for letter, choice in zip(letters, example.choices, strict=True)]
    turned = [example]
    for turn in range(1, len(choices)):
        place = (letters.index(gold) - turn) % len(choices)
        turned.append(
            replace(
                example,
                key=f"{example.key}{_TURN}{turn}",
                choices=(*choices[turn:], *choices[:turn]),
                target=Answer(choice=letters[place]),
            )
        )
    return turned


def fold_turns(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """One rollout per question: right only when it is right however its choices are turned; unreadable when any turn is."""
    by_key: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_key.setdefault(_TURNED.sub("", rollout.example), []).append(rollout)
    folded = []
    for key, some in by_key.items():
        first = next((rollout for rollout in some if rollout.example == key), some[0])
        worst = min(rollout.score.iou for rollout in some)
        unreadable = next((rollout.score.unreadable for rollout in some if rollout.score.unreadable is not None), None)
        folded.append(replace(first, example=key, score=replace(first.score, total=worst, iou=worst, unreadable=unreadable)))
    return folded
