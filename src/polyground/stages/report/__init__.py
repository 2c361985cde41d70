"""One self-contained HTML page about a run: results with intervals, errors and changes, training curves, answers on images.

It only reads what other stages left under the recipe's folder, and says so where a part is not there yet. It measures
nothing itself: numbers come from the evaluation's `results.json`, scores of single answers from its rows.
"""

from __future__ import annotations

import base64
import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from polyground import __version__, charts
from polyground.config import Recipe, show_recipe
from polyground.errors import DataError
from polyground.metrics import Estimate, same_letter
from polyground.outcomes import Kind, explained
from polyground.records import Example, Rollout
from polyground.rollout import is_right
from polyground.runs import ROLES, STAGES
from polyground.stages import benchmark_rows, read_split
from polyground.stages.report.answers import (
    Asked,
    Facet,
    Shares,
    Turned,
    errors_of,
    image_confusion,
    kinds_by_split,
    kinds_by_task,
    kinds_from_to,
    overlaps,
    turned,
    turned_samples,
)
from polyground.stages.report.pictures import (
    LABELS,
    Sample,
    boxes_of,
    compose,
    draw_pictures,
    reply_of,
    shown_choices,
    shown_question,
)
from polyground.stages.report.training import Figure, Part, grpo_part, sft_part
from polyground.storage import MANIFEST, atomic_write_text, read_json, read_rows

HEADINGS = {"test": "Multi-image grounding, in domain", "ood": "Grounding, out of domain", "perception": "Multi-image perception"}
"""Of the evaluation splits; the first word of a split's name decides (`ood_lisa` is out of domain)."""

SHORT_HEADINGS = {"test": "in domain", "ood": "out of domain", "perception": "perception"}
"""The same on a tab."""

DROPPED = {"tells": "says that it knew the answer", "coordinates": "spells out coordinates"}
"""Why a teacher's attempt was left out, where the name of the reason does not say it."""

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """One split in three numbers."""

    title: str
    questions: int
    measures: Mapping[str, Estimate]
    strip: Markup
    gains: Sequence[tuple[str, str, Estimate]]
    """(first model, second model, second minus first)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table, as it is written."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One task of a table."""

    task: str
    questions: int
    cells: Sequence[Sequence[Cell]]
    """[column][model]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The results of one split: a row per task and the macro average last."""

    title: str
    short: str
    models: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Row]
    chart: Markup
    differences: Sequence[Compared]
    same: Sequence[tuple[str, str]]
    """Models that answer nearly every question by one letter, and the letter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Second model minus first, task by task."""

    first: str
    second: str
    drawing: Markup
    examples: int
    better: int
    worse: int
    p_value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """What the answers are that are not right."""

    model: str
    """The last of the models: whose tasks and examples are shown."""
    kinds: Sequence[tuple[Kind, str]]
    """Those that occur, explained."""
    bars: Sequence[Facet]
    tasks: Shares
    examples: Sequence[tuple[Kind, int, Sequence[Sample]]]
    images: Sequence[Facet]
    overlaps: Sequence[Facet]


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the last model got right that the one before did not, and the reverse."""

    first: str
    second: str
    splits: Sequence[Turned]
    kinds: Shares
    gained: Sequence[Sample]
    lost: Sequence[Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One bar of the synthesis funnel."""

    name: str
    count: int
    share: float
    kind: str
    """`all`, `kept` or `dropped`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Everything the template shows."""

    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    models: Sequence[str]
    threshold: float
    has_intervals: bool
    headline: Sequence[Headline]
    tables: Sequence[Table]
    changes: Changes | None
    errors: Errors | None
    training: Sequence[Part]
    funnel: Sequence[Step]
    pass_rates: Figure | None
    gallery: Sequence[Sample]
    gallery_splits: Sequence[str]
    gallery_tasks: Sequence[str]
    gallery_outcomes: Sequence[str]
    timing: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    recipe: str
    version: str


def run(recipe: Recipe) -> Path:
    """Write `report.html` into the recipe's folder and say where it is; parts that are not there yet are named on the page."""
    path = recipe.out / "report.html"
    atomic_write_text(path, render(gather(recipe)))
    return path


def gather(recipe: Recipe) -> Page:
    """Read the folders of a run into what the page shows."""
    results = _results(recipe)
    models = list(results["models"])
    tables: Mapping[str, Any] = results["splits"]
    threshold = float(results["tags"]["headline_iou"])
    pooled = {member for table in tables.values() for member in table.get("pooled", ())}
    asked = _asked(recipe, [split for split, table in tables.items() if "pooled" not in table], models)
    titles = {split: heading(split, SHORT_HEADINGS) for split in asked}
    every = [one for split in asked.values() for one in split]
    gallery = _gallery(recipe, asked, threshold=threshold)
    training = [sft_part(recipe), grpo_part(recipe, threshold=threshold)]
    return Page(
        title=recipe.report.title or recipe.name,
        facts=_facts(recipe, tables),
        notes=[*_notes(models), *_warning_notes(training)],
        models=models,
        threshold=threshold,
        has_intervals=results["tags"]["bootstrap"] > 0,
        headline=[_headline(split, table, threshold=threshold) for split, table in tables.items() if split not in pooled],
        tables=[_table(split, table, threshold=threshold) for split, table in tables.items()],
        changes=_changes(recipe, every, titles, threshold=threshold),
        errors=_errors(recipe, every, titles, threshold=threshold),
        training=training,
        funnel=_funnel(_summary_of(recipe, "synthesize")),
        pass_rates=_pass_rates(recipe),
        gallery=gallery,
        gallery_splits=list(dict.fromkeys(sample.split for sample in gallery)),
        gallery_tasks=sorted({sample.task for sample in gallery}),
        gallery_outcomes=list(dict.fromkeys(sample.outcome for sample in gallery)),
        timing=_timing(recipe),
        versions=_versions(recipe),
        recipe=show_recipe(recipe),
        version=__version__,
    )


def render(page: Page) -> str:
    """The page as HTML. Only the stylesheet, the script and the charts are taken as markup; every other value is escaped."""
    folder = resources.files("polyground") / "report_template"
    script = (folder / "report.js").read_text(encoding="utf-8")
    # The policy names the one script that may run, so that markup slipped into the page by any text stays dead.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        page=page,
        label=LABELS,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        script_hash=f"sha256-{digest}",
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("polyground", "report_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def write_picture(recipe: Recipe, out: Path) -> Path:
    """Draw one test question, its images, the annotation and every model's box into one PNG; a telling question is preferred.

    Raises DataError while nothing has been evaluated.
    """
    answers = _answers(recipe, "test")
    models = list(answers)
    examples = _examples(recipe, "test") if answers else {}
    candidates = [examples[key] for key in _shared(answers) if key in examples and examples[key].target.boxes]
    if not candidates:
        raise DataError(f"{recipe.out / 'evaluate'}: no answers to draw; run `polyground evaluate` with this recipe first")
    best = max(candidates, key=lambda example: _telling(example, [answers[model][example.key] for model in models], recipe))
    out.parent.mkdir(parents=True, exist_ok=True)
    compose(best, {model: answers[model][best.key] for model in models}).save(out)
    return out


# ---- reading the run


def _results(recipe: Recipe) -> Mapping[str, Any]:
    """The evaluation's tables; empty ones before there are any."""
    path = recipe.out / "evaluate" / "results.json"
    if not path.is_file():
        tags = {"headline_iou": recipe.evaluate.ious[0], "bootstrap": recipe.evaluate.bootstrap}
        return {"models": [], "splits": {}, "tags": tags}
    results: Mapping[str, Any] = read_json(path)
    return results


def _answers(recipe: Recipe, split: str) -> dict[str, dict[str, Rollout]]:
    """The answers of every model that has any, by example key."""
    found = {}
    for role in ROLES:
        path = recipe.out / "evaluate" / role / f"{split}.jsonl"
        rows = [Rollout.from_json(row) for row in read_rows(path)] if path.is_file() else []
        if rows:
            found[role] = {rollout.example: rollout for rollout in rows}
    return found


def _manifest(recipe: Recipe, folder: str) -> Mapping[str, Any]:
    path = recipe.out / folder / MANIFEST
    return read_json(path) if path.is_file() else {}


def _summary_of(recipe: Recipe, folder: str) -> Mapping[str, Any]:
    return _manifest(recipe, folder).get("summary", {})


def _examples(recipe: Recipe, split: str) -> dict[str, Example]:
    rows = benchmark_rows(recipe, split)
    return {example.key: example for example in (read_split(recipe, split) if rows is None else rows.examples)}


def _asked(recipe: Recipe, splits: Sequence[str], models: Sequence[str]) -> dict[str, list[Asked]]:
    """By split, the questions that every model has answered; splits without one are left out."""
    found = {}
    for split in splits:
        answers = _answers(recipe, split)
        keys = _shared(answers)
        examples = _examples(recipe, split) if keys else {}
        shown = [model for model in models if model in answers]
        rows = [Asked(split, examples[key], {model: answers[model][key] for model in shown}) for key in keys if key in examples]
        if rows:
            found[split] = rows
    return found


def _shared(answers: Mapping[str, Mapping[str, Rollout]]) -> list[str]:
    """Keys of the questions that every model has answered, sorted."""
    keys = [set(rollouts) for rollouts in answers.values()]
    return sorted(set.intersection(*keys)) if keys else []


# ---- numbers


def heading(split: str, names: Mapping[str, str] = HEADINGS) -> str:
    """
    >>> heading("test"), heading("ood_lisa"), heading("ood (all)")
    ('Multi-image grounding, in domain', 'Grounding, out of domain: lisa', 'Grounding, out of domain: all')
    """
    kind, _, rest = split.replace(" (all)", "_all").partition("_")
    return names.get(kind, kind) + (f": {rest}" if rest else "")


def _headline(split: str, table: Mapping[str, Any], *, threshold: float) -> Headline:
    macros = {model: summary["macro"] for model, summary in table["models"].items()}
    measures = {model: _accuracy(macro, threshold) for model, macro in macros.items()}
    pairs = {pair: tuple(pair.split("-")) for pair in table["differences"]}  # named second-first
    return Headline(
        title=heading(split),
        questions=max(macro["examples"] for macro in macros.values()),
        measures=measures,
        strip=charts.interval_strip(measures),
        gains=[(first, second, Estimate(**table["differences"][pair]["macro"])) for pair, (second, first) in pairs.items()],
    )


def _table(split: str, table: Mapping[str, Any], *, threshold: float) -> Table:
    models = list(table["models"])
    tasks = sorted({task for summary in table["models"].values() for task in summary["tasks"]})
    grounding = not split.startswith("perception")

    def of_models(task: str) -> list[Mapping[str, Any]]:
        return [table["models"][model]["tasks"].get(task, {}) for model in models]

    rows = [_row(task, of_models(task), threshold=threshold, grounding=grounding) for task in tasks]
    macros = [table["models"][model]["macro"] for model in models]
    rows.append(_row("macro average", macros, threshold=threshold, grounding=grounding))
    bars = {model: [_accuracy(of_models(task)[i], threshold) for task in tasks] for i, model in enumerate(models)}
    return Table(
        title=heading(split),
        short=heading(split, SHORT_HEADINGS),
        models=models,
        columns=[f"acc@{threshold:g}", "mean IoU", "image", "unread"] if grounding else ["accuracy", "unread"],
        rows=rows,
        chart=charts.grouped_bars(tasks, bars),
        differences=[_compared(pair, found) for pair, found in table["differences"].items()],
        same=[(model, letter) for model, macro in zip(models, macros, strict=True) if (letter := same_letter(macro))],
    )


def _compared(pair: str, found: Mapping[str, Any]) -> Compared:
    second, first = pair.split("-")
    rows = {task: Estimate(**row) for task, row in sorted(found["tasks"].items())}
    return Compared(
        first=first,
        second=second,
        drawing=charts.difference_strip({**rows, "macro average": Estimate(**found["macro"])}),
        examples=found["examples"],
        better=found["better"],
        worse=found["worse"],
        p_value=found["p_value"],
    )


def _row(name: str, measured: Sequence[Mapping[str, Any]], *, threshold: float, grounding: bool) -> Row:
    """One line of a table; `measured` holds a task's measures by model, empty where the model was not asked."""
    unread = [Cell(_percent(found["unreadable_rate"])) if found else Cell("–") for found in measured]
    cells = [_cells([_accuracy(found, threshold) if found else None for found in measured])]
    if grounding:
        cells += [_cells([_estimate(found.get(column)) for found in measured]) for column in ("mean_iou", "image_accuracy")]
    return Row(task=name, questions=max(found.get("examples", 0) for found in measured), cells=[*cells, unread])


def _accuracy(measured: Mapping[str, Any], threshold: float) -> Estimate:
    return Estimate(**measured["accuracy"][f"{threshold:g}"])


def _estimate(row: Mapping[str, float] | None) -> Estimate | None:
    return None if row is None else Estimate(**row)


def _cells(estimates: Sequence[Estimate | None]) -> list[Cell]:
    """Values in percent; the one best of several models is marked."""
    values = [estimate.value for estimate in estimates if estimate is not None]
    best = max(values, default=0.0)
    unique = sum(value > best - 5e-4 for value in values) == 1 < len(values)
    return [
        Cell("–")
        if e is None
        else Cell(_percent(e.value), interval=f"{_percent(e.low)} to {_percent(e.high)}", best=unique and e.value == best)
        for e in estimates
    ]


def _percent(share: float) -> str:
    return f"{share * 100:.1f}"


# ---- what became of the answers


def _changes(recipe: Recipe, asked: Sequence[Asked], titles: Mapping[str, str], *, threshold: float) -> Changes | None:
    """Of the last two models that have answered everything; None where there is one model only."""
    models = _common(asked)
    if len(models) < 2:
        return None
    first, second = models[-2:]
    size = recipe.report.gallery_size // 4
    gained, lost = turned_samples(asked, first, second, size=size, threshold=threshold)
    return Changes(
        first=first,
        second=second,
        splits=turned(asked, first, second, titles, threshold=threshold),
        kinds=kinds_from_to(asked, first, second, threshold=threshold),
        gained=[_sample(recipe, one, threshold=threshold) for one in gained],
        lost=[_sample(recipe, one, threshold=threshold) for one in lost],
    )


def _errors(recipe: Recipe, asked: Sequence[Asked], titles: Mapping[str, str], *, threshold: float) -> Errors | None:
    models = _common(asked)
    if not models:
        return None
    model, sentences = models[-1], explained(threshold)
    examples = errors_of(asked, model, size=recipe.report.gallery_size // 12, threshold=threshold)
    tasks = kinds_by_task(asked, model, threshold=threshold)
    met = {kind for name in models for kind in kinds_by_task(asked, name, threshold=threshold).columns}
    return Errors(
        model=model,
        kinds=[(kind, sentences[kind]) for kind in Kind if kind in met],
        bars=kinds_by_split(asked, models, titles, threshold=threshold),
        tasks=tasks,
        examples=[
            (kind, count, [_sample(recipe, one, threshold=threshold) for one in shown])
            for kind, (count, shown) in examples.items()
        ],
        images=image_confusion(asked, models, titles),
        overlaps=overlaps(asked, models, titles, threshold=threshold),
    )


def _common(asked: Sequence[Asked]) -> list[str]:
    """The models that have answered every one of these questions."""
    return [model for model in (asked[0].rollouts if asked else ()) if all(model in one.rollouts for one in asked)]


# ---- data made on the way


def _funnel(summary: Mapping[str, Any]) -> list[Step]:
    if not summary:
        return []
    asked, kept = int(summary["asked"]), int(summary["kept"])
    steps = [("questions asked", asked, "all"), ("kept", kept, "kept")]
    reasons = sorted(summary.get("dropped", {}).items(), key=lambda item: -item[1])
    steps += [(f"dropped: {DROPPED.get(reason, str(reason).replace('_', ' '))}", count, "dropped") for reason, count in reasons]
    return [Step(name=name, count=count, share=count / max(1, asked), kind=kind) for name, count, kind in steps]


def _pass_rates(recipe: Recipe) -> Figure | None:
    summary = _summary_of(recipe, "reject")
    if not summary:
        return None
    config = recipe.reject
    samples = config.num_generations
    counts: Counter[int] = Counter()
    for rate, count in summary["pass_rates"].items():
        counts[round(float(rate) * samples)] += count
    columns = [(f"{passed}/{samples}", counts[passed]) for passed in range(samples + 1)]
    inside = [label for passed, (label, _) in enumerate(columns) if config.keeps(passed / samples)]
    caption = (
        f"Right answers among {samples} samples of each of {summary['asked']} questions. {summary['kept']} go on to "
        "reinforcement learning, from inside the band; the pale columns are outside it."
    )
    return Figure(title="Pass rate", caption=caption, drawing=charts.histogram(columns, highlight=inside))


# ---- gallery


def _gallery(recipe: Recipe, asked: Mapping[str, Sequence[Asked]], *, threshold: float) -> list[Sample]:
    """Six in ten samples from the first split, the rest from the others in equal parts."""
    size = recipe.report.gallery_size
    samples: list[Sample] = []
    for place, rows in enumerate(asked.values()):
        others = len(asked) - 1
        share = 1.0 if not others else 0.6 if place == 0 else 0.4 / others
        by_key = {one.example.key: one for one in rows}
        outcomes = {key: (outcome(one.rollouts, threshold=threshold), one.example.task) for key, one in by_key.items()}
        chosen = choose(outcomes, size=round(size * share))
        samples += [_sample(recipe, by_key[key], threshold=threshold) for key in chosen]
    return samples


def outcome(rollouts: Mapping[str, Rollout], *, threshold: float) -> str:
    """What became of one question over the models, in their order: `fixed by RL`, `lost by RL`, `still wrong`, `all right`, …"""
    right = {model: is_right(rollout.score, threshold=threshold) for model, rollout in rollouts.items()}
    models = list(right)
    if all(right.values()):
        return "all right"
    if not any(right.values()):
        return "still wrong"
    turn = next(model for before, model in reversed(list(pairwise(models))) if right[before] != right[model])
    return f"{'fixed' if right[turn] else 'lost'} by {LABELS[turn]}"


def choose(outcomes: Mapping[str, tuple[str, str]], *, size: int) -> list[str]:
    """Keys of `size` questions; outcomes take turns, and within an outcome the tasks do. `outcomes` holds (outcome, task).

    >>> choose({"a": ("fixed by RL", "diff"), "b": ("fixed by RL", "diff"), "c": ("all right", "diff")}, size=2)
    ['a', 'c']
    """
    order = ["fixed by RL", "still wrong", "all right", "fixed by SFT", "lost by RL", "lost by SFT"]
    queues: dict[str, dict[str, list[str]]] = {}
    for key, (kind, task) in outcomes.items():
        queues.setdefault(kind, {}).setdefault(task, []).append(key)
    turns = {kind: _take_turns(queues[kind].values()) for kind in sorted(queues, key=lambda kind: order.index(kind))}
    chosen = _take_turns(turns.values())[:size]
    return sorted(chosen, key=lambda key: (order.index(outcomes[key][0]), chosen.index(key)))


def _take_turns(queues: Iterable[Sequence[str]]) -> list[str]:
    lists = list(queues)
    longest = max(map(len, lists), default=0)
    return [queue[i] for i in range(longest) for queue in lists if i < len(queue)]


def _sample(recipe: Recipe, asked: Asked, *, threshold: float) -> Sample:
    example, rollouts = asked.example, asked.rollouts
    located = boxes_of(example, rollouts)
    kind = outcome(rollouts, threshold=threshold)
    tone = "good" if kind == "all right" or kind.startswith("fixed") else "bad"
    return Sample(
        key=example.key,
        split=asked.split,
        task=example.task,
        outcome=kind,
        tone=tone,
        question=shown_question(example),
        choices=shown_choices(example),
        target=example.target.choice or "",
        pictures=draw_pictures(example, located, side=recipe.report.image_side),
        answers=[reply_of(model, rollout, threshold=threshold) for model, rollout in rollouts.items()],
    )


# ---- about the run


def _facts(recipe: Recipe, tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = [_headline_examples(table) for table in tables.values() if "pooled" not in table]
    finished = max((str(_manifest(recipe, f"evaluate/{role}").get("finished", "")) for role in ROLES), default="")[:10]
    rewards = " + ".join(f"{reward.weight:g} {reward.name}" for reward in recipe.rewards)
    facts = [("model", recipe.model.path), ("seed", str(recipe.seed)), ("reward", rewards)]
    facts += [("evaluation questions", str(sum(counts)))] if counts else []
    return facts + ([("evaluated", finished)] if finished else [])


def _headline_examples(table: Mapping[str, Any]) -> int:
    return max((int(summary["macro"]["examples"]) for summary in table["models"].values()), default=0)


def _notes(models: Sequence[str]) -> list[str]:
    ways = {"sft": "sft", "rl": "grpo"}
    return [
        f"The {LABELS[model]} model has not been evaluated yet: run `polyground {stage}`, `merge` and `evaluate`."
        for model, stage in ways.items()
        if models and model not in models
    ]


def _warning_notes(training: Sequence[Part]) -> list[str]:
    return [
        f"{part.title} raised {'a warning' if len(part.warnings) == 1 else f'{len(part.warnings)} warnings'}: see Training."
        for part in training
        if part.warnings
    ]


def _timing(recipe: Recipe) -> list[tuple[str, str]]:
    seconds = {stage: float(manifest["seconds"]) for stage in STAGES if "seconds" in (manifest := _manifest(recipe, stage))}
    rows = [(stage, spoken_time(value)) for stage, value in seconds.items()]
    return [*rows, ("together", spoken_time(sum(seconds.values())))] if rows else []


def spoken_time(seconds: float) -> str:
    """
    >>> spoken_time(8.26), spoken_time(251), spoken_time(3900)
    ('8.3 s', '4 min 11 s', '1 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _versions(recipe: Recipe) -> list[tuple[str, str]]:
    rows = [("polyground", __version__), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return [*rows, ("platform", f"{platform.system()} {platform.machine()}"), ("seed", str(recipe.seed))]


# ---- the picture


def _telling(example: Example, rollouts: Sequence[Rollout], recipe: Recipe) -> tuple[float, ...]:
    """Larger for a question that shows the figure at a glance: RL right, the others wrong but readable, three images, short."""
    threshold = recipe.evaluate.ious[0]
    right = [is_right(rollout.score, threshold=threshold) for rollout in rollouts]
    drawn = [bool(rollout.score.answer and rollout.score.answer.boxes) for rollout in rollouts]
    one_box = len(example.target.boxes) == 1 and not example.question_boxes
    return (right[-1], not any(right[:-1]), one_box, sum(drawn), -abs(len(example.images) - 3), rollouts[-1].score.iou)
