"""Score a benchmark's responses, whoever made them: rows of `index`, `task` and `response`, or the answers of our own evaluation.

Nothing is sampled and no model is opened. What decides a score (version, rule, grid, form of the answers) stands beside it.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyground import __version__
from polyground.answer import NATIVE_READERS, Unreadable
from polyground.benchmarks import (
    BENCHMARKS,
    COMPATS,
    LAST_PAIR,
    Annotation,
    Table,
    ceiling,
    fold_turns,
    is_turned,
    judge,
    place_of,
    read_annotation,
    require_compat,
    rows_wrong_by_annotation,
    tabulate,
    turns,
    unanswered,
)
from polyground.conventions import GRIDS, load_convention, named_grid
from polyground.errors import DataError, UsageError
from polyground.geometry import Grid
from polyground.imagefile import image_size
from polyground.metrics import Estimate, TaskSummary
from polyground.records import Completion, Example, Rollout
from polyground.sources import BadRow, options_of
from polyground.sources.reading import reasons_of
from polyground.stages import source_options
from polyground.storage import MANIFEST, atomic_write_json, read_json, read_rows

NO_RESPONSE = "no_response"
"""Why a row nobody answered is wrong."""

OTHER_QUESTIONS = 0.01
"""Responses whose question is not the annotation's may be so many, as a share; more are taken for another version's."""

NAMED = 10
"""How many rows a message names."""

Grids = Callable[[Example], Sequence[Grid]]


@dataclass(frozen=True, slots=True)
class Response:
    """One line of the predictions."""

    where: str
    """File and line, for messages."""
    text: str
    key: str | None
    """Key of the example, in rows of our own evaluation."""
    task: str | None
    index: int | None
    """Position within the task, or within the annotation where no task is given."""
    question: str | None
    truncated: bool = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `polyground score`."""
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.add_argument("--annotation", type=Path, required=True, help="the benchmark's own file")
    parser.add_argument(
        "--predictions", type=Path, required=True, help="a .jsonl file or a folder of them: rows {index, task, response}, or ours"
    )
    grids = parser.add_mutually_exclusive_group(required=True)
    grids.add_argument("--grid", choices=list(GRIDS), help="how the responses write boxes")
    grids.add_argument("--model", type=Path, help="folder of the model that answered: its family's grid and form")
    parser.add_argument(
        "--native",
        choices=["none", *NATIVE_READERS],
        help="form of boxes without answer tags; default any, or the family's with --model",
    )
    parser.add_argument("--max-pixels", type=int, help="pixels one image had, where --model writes boxes in pixels")
    parser.add_argument("--max-pixels-total", type=int, help="pixels the images of a prompt shared")
    parser.add_argument("--version", help="original or revised, for MIG-Bench; told from the file by default")
    parser.add_argument("--compat", metavar="NAME", help=f"also tell a quirk's number: {', '.join([*COMPATS, LAST_PAIR])}")
    parser.add_argument("--images-root", help="folder the image names start from, where boxes or grids need image sizes")
    parser.add_argument("--strip-prefix", help="leading part of image names to drop")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the benchmark's reader; repeatable"
    )
    parser.add_argument("--allow-missing", action="store_true", help="count rows without a response as wrong instead of refusing")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples behind each 95 %% interval; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything there, too")


def run(options: argparse.Namespace) -> str:
    """The table, after the whole result is written where `--json` says."""
    if options.compat is not None:
        require_compat(BENCHMARKS[options.benchmark], options.compat)
    annotation = _annotation(options)
    responses = list(read_responses(options.predictions))
    rollouts, notes = _scored(annotation, responses, options)
    if _lacks_native(rollouts, options):
        notes.append("hardly any response has an answer tag: name the form of their boxes with --native")
    table = tabulate(
        annotation.benchmark,
        rollouts,
        annotation.examples,
        bootstrap=options.bootstrap,
        seed=options.seed,
        compat=options.compat,
    )
    if (most := ceiling(annotation)) < 1 - 1e-9:
        notes.append(f"the annotation itself would score {100 * most:.2f}: some descriptions have groups, and answers name none")
    tags = {**annotation.tags(), **_tags(options, responses)}
    if options.json is not None:
        atomic_write_json(options.json, {"tags": tags, "notes": notes, **table.to_json()})
    return "\n".join(_lines(annotation, table, tags, notes))


def _lacks_native(rollouts: Sequence[Rollout], options: argparse.Namespace) -> bool:
    """Whether most responses say nothing to a reader that was told of no native form."""
    untagged = sum(rollout.score.unreadable == Unreadable.MISSING for rollout in rollouts)
    return options.native == "none" and untagged > len(rollouts) / 2


def _annotation(options: argparse.Namespace) -> Annotation:
    given = {"images_root": options.images_root, "strip_prefix": options.strip_prefix, "version": options.version}
    for name, value in given.items():
        if value is not None and name not in options_of(options.benchmark):
            raise UsageError(f"{options.benchmark} has no --{name.replace('_', '-')}; leave it out")
    further = source_options(options.benchmark, options.option)
    return read_annotation(options.benchmark, options.annotation, **{**given, **further})


# ---------------------------------------------------------------- predictions


def read_responses(path: Path) -> Iterator[Response]:
    """The rows of a file, or of every .jsonl file of a folder; raises DataError for one that is not understood."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no .jsonl file; name the file or folder of the responses")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; name the file or folder of the responses")
        for number, row in enumerate(read_rows(file), start=1):
            yield _response(row, f"{file}:{number}", file.stem)


def _response(row: Any, where: str, stem: str) -> Response:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object; got {type(row).__name__}")
    completion = row.get("completion")
    if isinstance(row.get("example"), str) and isinstance(completion, dict) and isinstance(completion.get("text"), str):
        truncated = completion.get("truncated") is True
        return Response(where, completion["text"], row["example"], row.get("task"), None, None, truncated)
    index, text, task, question = (row.get(name) for name in ("index", "response", "task", "question"))
    if isinstance(index, bool) or not isinstance(index, int) or not isinstance(text, str):
        raise DataError(f"{where}: needs a whole number `index` and a text `response`, or `example` and `completion`")
    if task is not None and not isinstance(task, str):
        raise DataError(f"{where}: `task` must be a text; got {task!r}")
    return Response(where, text, None, task, index, question if isinstance(question, str) else None)


# ---------------------------------------------------------------- responses to rows


class Places:
    """The rows of an annotation by their place: `task/position in its task`, or `position` where rows have no task."""

    def __init__(self, annotation: Annotation, *, turned: bool = False) -> None:
        """`turned` knows the rotations of a circular evaluation, too."""
        self.path = annotation.path
        self.in_order = [place_of(key) for key in annotation.keys]
        self.sizes = Counter(_task(place) for place in self.in_order)
        asked = [turn for example in annotation.examples for turn in (turns(example) if turned else [example])]
        self.examples = {place_of(example.key): example for example in asked}

    def find(self, response: Response) -> str:
        """The place of the row a response answers. Raises DataError where there is none."""
        if response.key is not None:
            place = place_of(response.key)
            if place not in self.examples:
                raise DataError(
                    f"{response.where}: {self.path} has no row {response.key!r}; is it the annotation that was answered?"
                )
            return place
        index = response.index or 0
        task = self._task_of(response)
        if task is None:
            rows, prefix = len(self.in_order), "the annotation"
        else:
            rows, prefix = self.sizes[task], f"task {task!r}" if task else "the annotation"
        if not 0 <= index < rows:
            raise DataError(f"{response.where}: index {index}, but {prefix} has {rows} rows, counted from 0")
        if task is None:
            return self.in_order[index]
        return f"{task}/{index}" if task else str(index)

    def _task_of(self, response: Response) -> str | None:
        """The task that an index counts in; None where it counts in the whole annotation."""
        if set(self.sizes) == {""}:
            return ""
        if response.task is not None:
            if response.task not in self.sizes:
                raise DataError(f"{response.where}: {self.path} has no task {response.task!r}; it has {', '.join(self.sizes)}")
            return response.task
        stem = Path(response.where.rpartition(":")[0]).stem
        return stem if stem in self.sizes else None


def _task(place: str) -> str:
    return place.rpartition("/")[0]


def _scored(
    annotation: Annotation, responses: Sequence[Response], options: argparse.Namespace
) -> tuple[list[Rollout], list[str]]:
    """Every row of the annotation, scored, and what has to be said about the responses."""
    places = Places(annotation, turned=any(is_turned(response.key) for response in responses))
    answered = _by_place(places, responses)
    notes = _notes(annotation, places, answered, allow_missing=options.allow_missing)
    grids_of, native = _grids(options)
    rollouts = []
    for place, example in places.examples.items():
        response = answered.get(place)
        if response is None:
            rollouts.append(unanswered(example.key, example.task, reason=NO_RESPONSE))
            continue
        score = judge(annotation.benchmark, response.text, example, grids_of(example), native=native, compat=options.compat)
        completion = Completion(text=response.text, truncated=response.truncated)
        rollouts.append(Rollout(example=example.key, task=example.task, completion=completion, score=score))
    return [*fold_turns(rollouts), *rows_wrong_by_annotation(annotation)], notes


def _by_place(places: Places, responses: Sequence[Response]) -> dict[str, Response]:
    answered: dict[str, Response] = {}
    twice = []
    for response in responses:
        place = places.find(response)
        if place in answered:
            twice.append(f"{response.where} and {answered[place].where}")
        answered[place] = response
    if twice:
        raise DataError(f"{len(twice)} rows are answered twice; keep one response of each:{_listed(twice)}")
    return answered


def _notes(annotation: Annotation, places: Places, answered: Mapping[str, Response], *, allow_missing: bool) -> list[str]:
    """What has to be said beside the numbers. Raises DataError where the responses are not to this annotation."""
    notes = []
    others = _other_questions(annotation, places, answered)
    if len(others) > OTHER_QUESTIONS * len(answered):
        raise DataError(
            f"{len(others)} of {len(answered)} responses are to other questions than those of {annotation.path}; "
            f"is it the version that was answered?{_listed(others)}"
        )
    if others:
        notes.append(f"{len(others)} responses carry another question than the annotation: {', '.join(others[:NAMED])}")
    missing = [place for place in places.examples if place not in answered]
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} of {annotation.rows} rows have no response; "
            f"answer them, or count them as wrong with --allow-missing:{_listed(missing)}"
        )
    if missing:
        notes.append(f"{len(missing)} rows have no response and count as wrong")
    if annotation.wrong:
        one = len(annotation.wrong) == 1
        count = "1 row with a bad annotation" if one else f"{len(annotation.wrong)} rows with a bad annotation"
        notes.append(f"{count} ({_reasons(annotation.wrong)}) count{'s' if one else ''} as wrong")
    if annotation.left_out:
        notes.append(f"{len(annotation.left_out)} entries of the annotation are no rows ({_reasons(annotation.left_out)})")
    return [*notes, *_about_published_rows(annotation, places)]


def _reasons(rows: Sequence[BadRow]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons_of(rows).items())


def _about_published_rows(annotation: Annotation, places: Places) -> list[str]:
    published = annotation.published_rows
    if published is None:
        return []
    if published != annotation.rows:
        return [f"{annotation.rows:,} of {published:,} published rows: the numbers do not compare with published ones"]
    counts = annotation.benchmark.tasks.get(annotation.version or "", places.sizes)
    odd = [task for task, count in places.sizes.items() if counts.get(task) != count]
    return [f"task {task!r} has {places.sizes[task]} rows; {counts.get(task, 0)} are published" for task in odd]


def _listed(words: Sequence[str]) -> str:
    more = f"\n  and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return "".join(f"\n  {word}" for word in words[:NAMED]) + more


def _other_questions(annotation: Annotation, places: Places, answered: Mapping[str, Response]) -> list[str]:
    """Places whose response carries a question that is not the annotation's, with more words or fewer."""
    if "template" in options_of(annotation.benchmark.name):
        return []  # the words around a description are the evaluator's own
    others = []
    for place, response in answered.items():
        example = places.examples.get(place)
        if response.question and example is not None:
            ours, theirs = _letters(example.question), _letters(response.question)
            if ours not in theirs and theirs not in ours:
                others.append(place)
    return others


_MARKUP = re.compile(r"<\|[^|>]*\|>|<box>|<image>|\(\d+,\s*\d+\)")


def _letters(question: str) -> str:
    """A question reduced to its letters and figures, without placeholders and boxes."""
    return re.sub(r"\W+", "", _MARKUP.sub("", question)).lower()


def _grids(options: argparse.Namespace) -> tuple[Grids, str | None]:
    """The grid of every image of an example, and the form that untagged boxes have."""
    native = None if options.native == "none" else options.native
    if options.model is None:
        native = "any" if options.native is None else native
        name = options.grid
        if named_grid(name, 1, 1) == named_grid(name, 2, 2):
            return lambda example: [named_grid(name, 1, 1)] * len(example.images), native
        return lambda example: [named_grid(name, width, height) for width, height in _sizes(example)], native
    convention = load_convention(options.model, max_pixels=options.max_pixels, max_pixels_total=options.max_pixels_total)
    native = convention.native if options.native is None else native
    if convention.per_mille:
        return lambda example: convention.grids([(1, 1)] * len(example.images)), native
    return lambda example: convention.grids(_sizes(example)), native


def _sizes(example: Example) -> list[tuple[int, int]]:
    sizes = example.meta.get("sizes") or ([example.meta["size"]] if "size" in example.meta else None)
    if sizes is not None:
        return [(int(width), int(height)) for width, height in sizes]
    try:
        return [image_size(image) for image in example.images]
    except DataError as error:
        raise DataError(f"this grid needs the size of every image; set --images-root ({error})") from error


# ---------------------------------------------------------------- what is told


def _tags(options: argparse.Namespace, responses: Sequence[Response]) -> dict[str, Any]:
    tags: dict[str, Any] = {
        "polyground": __version__,
        "predictions": options.predictions.name,
        "responses": len(responses),
        "grid": options.grid,
        "native": options.native or "any",
        "compat": options.compat,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "prompt_version": None,
        "decoding": None,
    }
    if options.model is not None:
        convention = load_convention(options.model, max_pixels=options.max_pixels, max_pixels_total=options.max_pixels_total)
        tags["grid"] = "0-1000" if convention.per_mille else "pixels of the resized image"
        tags["model_type"] = convention.model_type
        tags["native"] = convention.native if options.native is None else options.native
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    if (folder / MANIFEST).is_file():
        config = read_json(folder / MANIFEST).get("config", {})
        tags["prompt_version"] = config.get("prompt_version")
        tags["instruction"] = (config.get("prompts") or {}).get("instruction")
        tags["decoding"] = {
            "temperature": 0.0,
            "max_completion_length": (config.get("evaluate") or {}).get("max_completion_length"),
        }
    return tags


def _lines(annotation: Annotation, table: Table, tags: Mapping[str, Any], notes: Sequence[str]) -> Iterator[str]:
    benchmark, summary = annotation.benchmark, table.summary
    version = f" {annotation.version}" if annotation.version else ""
    published = f" of {annotation.published_rows:,} published" if annotation.published_rows is not None else ""
    yield f"{benchmark.title}{version}: {annotation.rows:,}{published} rows"
    yield f"headline  {benchmark.measure()}: {_percent(table.headline)}"
    if table.compat is not None:
        yield f"compat    {tags['compat']}: {_percent(table.compat)} (a peer's quirk, not a headline)"
    yield ""
    columns = _columns(table, annotation)
    rows = [("task", "rows", *columns)]
    rows += [_row(task, part, columns, table, task) for task, part in _ordered(annotation, summary.tasks)]
    means = (("mean over tasks", summary.macro, "tasks"), ("mean over rows", summary.micro, "rows"))
    if len(summary.tasks) > 1:
        rows += [
            _row(label, part, columns, table, "all" if average == benchmark.average else "") for label, part, average in means
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        if number in (1, 1 + len(summary.tasks)):
            yield "  ".join("-" * width for width in widths)
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
    yield ""
    if summary.micro.unreadable:
        shares = ", ".join(f"{reason} {100 * share:.2f}" for reason, share in summary.micro.unreadable.items())
        yield f"unreadable, % of rows: {shares}"
    yield from _wrapped("rule", benchmark.source)
    prompt = tags["prompt_version"] or "unknown"
    yield f"read as   grid {tags['grid']}, native form {tags['native'] or 'none'}, prompt version {prompt}"
    for note in notes:
        yield from _wrapped("note", note)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, width=110, initial_indent=f"{head:<10}", subsequent_indent=" " * 10)


def _ordered(annotation: Annotation, tasks: Mapping[str, TaskSummary]) -> list[tuple[str, TaskSummary]]:
    order = list(dict.fromkeys(example.task for example in annotation.examples))
    return [(task, tasks[task]) for task in sorted(tasks, key=lambda task: order.index(task) if task in order else len(order))]


_FURTHER = {
    "one_to_one": "1:1",
    "image_level": "image-level",
    "mean_accuracy": "mAcc",
    "abstained": "abstain",
    "abstained_where_nothing_is": "abstain, none there",
    "compat": "compat",
}


def _columns(table: Table, annotation: Annotation) -> dict[str, Callable[[TaskSummary], str]]:
    """Heads of the columns, and what stands in them for one task."""
    first, *others = table.summary.ious
    if annotation.benchmark.in_letters:
        return {"accuracy": lambda part: _percent(part.accuracy[first]), "unreadable": lambda part: _share(part.unreadable_rate)}
    columns: dict[str, Callable[[TaskSummary], str]] = {}
    if table.precision:
        columns["AP"] = lambda part: ""
    columns[f"IoU {first:g}"] = lambda part: _percent(part.accuracy[first])
    for other in others:
        columns[f"{other:g}"] = lambda part, other=other: _share(part.accuracy[other].value)  # type: ignore[misc]
    columns["mean IoU"] = lambda part: _share(part.mean_iou.value)
    if table.summary.macro.image_accuracy is not None:
        columns["image"] = lambda part: _share(part.image_accuracy)
    for name, value in table.summary.macro.measures.items():
        if value is None:
            continue
        columns[_FURTHER[name]] = lambda part, name=name: _share(part.measures[name])  # type: ignore[misc]
    columns["unreadable"] = lambda part: _share(part.unreadable_rate)
    return columns


def _row(
    label: str, part: TaskSummary, columns: Mapping[str, Callable[[TaskSummary], str]], table: Table, precision: str
) -> tuple[str, ...]:
    cells = [of(part) for of in columns.values()]
    if "AP" in columns:
        found = table.precision.get(precision)
        cells[0] = "" if found is None else _percent(found)
    return (label, f"{part.examples:,}", *cells)


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.2f} [{100 * value.low:.1f}, {100 * value.high:.1f}]" if value.low < value.high else _share(value)


def _share(value: Estimate | float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * (value.value if isinstance(value, Estimate) else value):.2f}"
