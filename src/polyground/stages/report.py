"""One self-contained HTML page about a run: results with intervals, training curves, data funnels, answers drawn on images.

It only reads what other stages left under the recipe's folder, and says so where a part is not there yet. It measures
nothing itself: numbers come from the evaluation's `results.json`, scores of single answers from its rows.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from polyground import __version__, charts
from polyground.answer import Located, reasoning_of
from polyground.config import Recipe, dump_recipe
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.metrics import Estimate
from polyground.records import Example, Rollout
from polyground.rollout import is_right
from polyground.stages import ROLES, benchmark_rows, read_split
from polyground.storage import MANIFEST, atomic_write_text, read_json, read_rows
from polyground.vision import load_image, to_data_uri

HEADINGS = {"test": "Multi-image grounding, in domain", "ood": "Grounding, out of domain", "perception": "Multi-image perception"}
"""Of the evaluation splits; the first word of a split's name decides (`ood_lisa` is out of domain)."""

LABELS = {"base": "base", "sft": "SFT", "rl": "RL", "truth": "truth", "asked": "asked about"}
PAINT = {"truth": "#0b7a3e", "base": "#4a5160", "sft": "#1864ab", "rl": "#d9480f", "asked": "#862e9c"}
"""On pictures, which do not follow the theme of the page."""

STAGES = ("world", "synthesize", "sft", "sft-merged", "reject", "grpo", "grpo-merged", *(f"evaluate/{role}" for role in ROLES))
"""Folders of a run, in the order they are made."""

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
    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    task: str
    questions: int
    cells: Sequence[Sequence[Cell]]
    """[column][model]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The results of one split: a row per task and the macro average last."""

    title: str
    models: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Row]
    chart: Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    title: str
    caption: str
    drawing: Markup
    names: Sequence[str] = ()
    """Of the curves, in the order of their colours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The curves of one training stage."""

    title: str
    remark: str
    figures: Sequence[Figure]
    absent: str
    """What is said instead while there are no curves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One bar of the synthesis funnel."""

    name: str
    count: int
    share: float
    kind: str
    """`all`, `kept` or `dropped`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A box on a picture, in the picture's pixels."""

    model: str
    x: float
    y: float
    width: float
    height: float
    stroke: float
    dash: str
    label_x: float
    label_y: float
    label_width: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    uri: str
    width: int
    height: int
    boxes: Sequence[Drawn]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What one model said to one question."""

    model: str
    right: bool
    verdict: str
    measure: str
    reasoning: str
    reply: str
    """The completion without its reasoning, as the model wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question of the gallery."""

    key: str
    split: str
    task: str
    outcome: str
    tone: str
    """`good`, `bad` or nothing: the colour of the outcome's tag."""
    question: str
    choices: Sequence[str]
    target: str
    pictures: Sequence[Picture]
    answers: Sequence[Reply]


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
    training: Sequence[Part]
    funnel: Sequence[Step]
    pass_rates: Figure | None
    gallery: Sequence[Sample]
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
    gallery = _gallery(recipe, [split for split, table in tables.items() if "pooled" not in table], models, threshold=threshold)
    return Page(
        title=recipe.report.title or recipe.name,
        facts=_facts(recipe, tables),
        notes=_notes(models),
        models=models,
        threshold=threshold,
        has_intervals=results["tags"]["bootstrap"] > 0,
        headline=[_headline(split, table, threshold=threshold) for split, table in tables.items() if split not in pooled],
        tables=[_table(split, table, threshold=threshold) for split, table in tables.items()],
        training=[_sft_part(recipe), _grpo_part(recipe)],
        funnel=_funnel(_summary_of(recipe, "synthesize")),
        pass_rates=_pass_rates(recipe),
        gallery=gallery,
        gallery_tasks=sorted({sample.task for sample in gallery}),
        gallery_outcomes=list(dict.fromkeys(sample.outcome for sample in gallery)),
        timing=_timing(recipe),
        versions=_versions(recipe),
        recipe=dump_recipe(recipe),
        version=__version__,
    )


def render(page: Page) -> str:
    """The page as HTML. Only the stylesheet, the script and the charts are taken as markup; every other value is escaped."""
    environment = Environment(
        loader=PackageLoader("polyground", "report_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("polyground") / "report_template"
    script = (folder / "report.js").read_text(encoding="utf-8")
    # The policy names the one script that may run, so that markup slipped into the page by any text stays dead.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        page=page,
        label=LABELS,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        script_hash=f"sha256-{digest}",
    )


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
    _compose(best, {model: answers[model][best.key] for model in models}).save(out)
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


def _log(recipe: Recipe, folder: str) -> list[dict[str, Any]]:
    path = recipe.out / folder / "log.jsonl"
    if not path.is_file():
        return []
    # A resumed run repeats the steps after its last checkpoint: the later line counts.
    by_step = {row["step"]: row for row in read_rows(path) if "step" in row}
    return [by_step[step] for step in sorted(by_step)]


def _examples(recipe: Recipe, split: str) -> dict[str, Example]:
    rows = benchmark_rows(recipe, split)
    return {example.key: example for example in (read_split(recipe, split) if rows is None else rows.examples)}


def _shared(answers: Mapping[str, Mapping[str, Rollout]]) -> list[str]:
    """Keys of the questions that every model has answered, sorted."""
    keys = [set(rollouts) for rollouts in answers.values()]
    return sorted(set.intersection(*keys)) if keys else []


# ---- numbers


def heading(split: str) -> str:
    """
    >>> heading("test"), heading("ood_lisa"), heading("ood (all)")
    ('Multi-image grounding, in domain', 'Grounding, out of domain: lisa', 'Grounding, out of domain: all')
    """
    kind, _, rest = split.replace(" (all)", "_all").partition("_")
    return HEADINGS.get(kind, kind) + (f": {rest}" if rest else "")


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
        models=models,
        columns=[f"acc@{threshold:g}", "mean IoU", "image", "unread"] if grounding else ["accuracy", "unread"],
        rows=rows,
        chart=charts.grouped_bars(tasks, bars),
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


# ---- training


def _sft_part(recipe: Recipe) -> Part:
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


def _grpo_part(recipe: Recipe) -> Part:
    log = _log(recipe, "grpo")
    keys = list(dict.fromkeys(key for row in log for key in row))
    parts = {name: key for key in keys if (name := _reward_part(key))}
    unread = {"unreadable": "unreadable", "cut off": "completions/clipped_ratio"}
    figures = _figures(
        log,
        [
            ("Reward", "Weighted sum of the parts, mean over the rollouts of a step.", {"reward": "reward"}),
            ("Reward parts", "Each in [0, 1], before its weight.", parts),
            ("Grounding of the rollouts", "Sampled, on training questions.", {"IoU": "iou", "right image": "image_accuracy"}),
            ("KL", "Divergence from the starting policy, nats per token.", {"KL": "kl"}),
            ("Entropy", "Of the policy over its own tokens, nats.", {"entropy": "entropy"}),
            ("Completion length", "Tokens, mean over the rollouts of a step.", {"tokens": "completions/mean_length"}),
            ("Groups without variance", "Share whose rewards all agree: they teach nothing.", {"share": "frac_reward_zero_std"}),
            ("Unreadable and cut off", "Share without a usable answer; share that met the token budget.", unread),
            ("Clipped tokens", "Share whose importance ratio left the trust region.", {"share": "clip_ratio/region_mean"}),
            ("Gradient norm", "Before clipping.", {"gradient norm": "grad_norm"}),
            ("Loss", "What is minimised; its level says little in GRPO.", {"loss": "loss"}),
        ],
    )
    absent = "No training log yet: run `polyground grpo` with this recipe."
    return Part(title="Reinforcement learning (GRPO)", remark=_steps(log), figures=figures, absent=absent)


def _reward_part(key: str) -> str:
    """The reward's name in a log key, or nothing.

    >>> _reward_part("rewards/iou/mean"), _reward_part("rewards/iou/std"), _reward_part("reward")
    ('iou', '', '')
    """
    found = re.fullmatch(r"rewards/(.+)/mean", key)
    return "" if found is None else found[1]


def _figures(log: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[Figure]:
    """A figure for each (title, caption, curve name -> log key) of which the log holds at least one number."""
    figures = []
    for title, caption, curves in wanted:
        series = {name: points for name, key in curves.items() if (points := _points(log, key))}
        if series:
            figures.append(Figure(title=title, caption=caption, drawing=charts.curves(series), names=list(series)))
    return figures


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in log if isinstance(row.get(key), int | float)]


def _steps(log: Sequence[Mapping[str, Any]]) -> str:
    return f"{log[-1]['step']} steps" if log else ""


# ---- data made on the way


def _funnel(summary: Mapping[str, Any]) -> list[Step]:
    if not summary:
        return []
    asked, kept = int(summary["asked"]), int(summary["kept"])
    steps = [("questions asked", asked, "all"), ("kept", kept, "kept")]
    reasons = sorted(summary.get("dropped", {}).items(), key=lambda item: -item[1])
    steps += [(f"dropped: {str(reason).replace('_', ' ')}", count, "dropped") for reason, count in reasons]
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


def _gallery(recipe: Recipe, splits: Sequence[str], models: Sequence[str], *, threshold: float) -> list[Sample]:
    """Six in ten samples from the first split, the rest from the others in equal parts."""
    size = recipe.report.gallery_size
    answers = {split: found for split in splits if _shared(found := _answers(recipe, split))}
    samples: list[Sample] = []
    for place, (split, by_model) in enumerate(answers.items()):
        others = len(answers) - 1
        share = 1.0 if not others else 0.6 if place == 0 else 0.4 / others
        examples = _examples(recipe, split)
        keys = [key for key in _shared(by_model) if key in examples]
        asked = {key: {model: by_model[model][key] for model in models if model in by_model} for key in keys}
        outcomes = {key: (outcome(rollouts, threshold=threshold), examples[key].task) for key, rollouts in asked.items()}
        chosen = choose(outcomes, size=round(size * share))
        samples += [_sample(recipe, examples[key], split, asked[key], threshold=threshold) for key in chosen]
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


def _sample(recipe: Recipe, example: Example, split: str, rollouts: Mapping[str, Rollout], *, threshold: float) -> Sample:
    located = _boxes(example, rollouts)
    kind = outcome(rollouts, threshold=threshold)
    tone = "good" if kind == "all right" or kind.startswith("fixed") else "bad"
    return Sample(
        key=example.key,
        split=split,
        task=example.task,
        outcome=kind,
        tone=tone,
        question=shown_question(example),
        choices=[f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(example.choices)],
        target=example.target.choice or "",
        pictures=[
            _picture(path, [(model, box) for model, image, box in located if image == number], side=recipe.report.image_side)
            for number, path in enumerate(example.images, start=1)
        ],
        answers=[_reply(model, rollout, threshold=threshold) for model, rollout in rollouts.items()],
    )


def shown_question(example: Example) -> str:
    """The question as a person reads it: its placeholders named."""
    numbers = iter(range(1, len(example.images) + 1))
    text = re.sub("<image>", lambda _: f"[image {next(numbers, '?')}]", example.question)
    asked = iter(example.question_boxes)

    def name(_: re.Match[str]) -> str:
        located = next(asked, None)
        return "[the box]" if located is None or located.image is None else f"[the box in image {located.image}]"

    return re.sub("<box>", name, text).strip()


def _boxes(example: Example, rollouts: Mapping[str, Rollout]) -> list[tuple[str, int, Box]]:
    """(model, image, box) of the annotation, the boxes asked about, and every answer.

    A box of an answer that names no image was scored against the annotated one: it is drawn there.
    """
    gold = next((located.image for located in example.target.boxes if located.image is not None), None) or 1
    everything: list[tuple[str, Sequence[Located]]] = [("asked", example.question_boxes), ("truth", example.target.boxes)]
    everything += [(model, rollout.score.answer.boxes if rollout.score.answer else ()) for model, rollout in rollouts.items()]
    return [(model, located.image or gold, located.box) for model, boxes in everything for located in boxes]


# Each model's label has a corner of its own, so that boxes which agree keep their labels apart: (right side?, below the box?).
_CORNERS = {"truth": (False, False), "rl": (True, False), "base": (False, True), "sft": (True, True), "asked": (False, False)}
_STROKES = {"truth": (3.0, ""), "rl": (2.2, ""), "sft": (2.2, "6 3"), "base": (2.2, "2 3"), "asked": (2.0, "8 2 2 2")}


def _picture(path: Path, boxes: Sequence[tuple[str, Box]], *, side: int) -> Picture:
    image = load_image(path)
    scale = side / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    # Drawn at the size asked for; a smaller file is only stretched by the browser, not stored larger.
    width, height = max(1, round(image.width * max(scale, 1))), max(1, round(image.height * max(scale, 1)))
    drawn = [_drawn(model, box, width, height) for model, box in boxes]
    return Picture(uri=to_data_uri(image), width=width, height=height, boxes=drawn)


def _drawn(model: str, box: Box, width: int, height: int) -> Drawn:
    x0, y0, x1, y1 = box.to_pixels(width=width, height=height)
    right, below = _CORNERS[model]
    stroke, dash = _STROKES[model]
    plate = 6.9 * len(LABELS[model]) + 8
    middle = (x0 + x1) / 2
    x = max(x1 - plate, middle) if right else min(x0, middle - plate)
    y = y1 + 1 if below else y0 - 15
    return Drawn(
        model=model,
        x=round(x0, 1),
        y=round(y0, 1),
        width=round(x1 - x0, 1),
        height=round(y1 - y0, 1),
        stroke=stroke,
        dash=dash,
        label_x=round(min(max(0.0, x), max(0.0, width - plate)), 1),
        label_y=round(min(max(0.0, y), max(0.0, height - 14.0)), 1),
        label_width=round(plate, 1),
    )


def _reply(model: str, rollout: Rollout, *, threshold: float) -> Reply:
    score, text = rollout.score, rollout.completion.text
    reasoning = reasoning_of(text)
    return Reply(
        model=model,
        right=is_right(score, threshold=threshold),
        verdict=verdict(rollout, threshold=threshold),
        measure=_measure(rollout),
        reasoning=reasoning or "",
        reply=(text.split("</think>", 1)[1] if reasoning else text).strip() or "(empty)",
    )


def verdict(rollout: Rollout, *, threshold: float) -> str:
    """One or two words for how an answer went."""
    score = rollout.score
    if score.unreadable is not None:
        return f"unreadable: {score.unreadable.replace('_', ' ')}"
    if is_right(score, threshold=threshold):
        return "right"
    return "wrong image" if score.image_correct is not None and score.image_correct < 1 else "wrong"


def _measure(rollout: Rollout) -> str:
    answer = rollout.score.answer
    if answer is None:
        return ""
    if answer.choice is not None:
        return f"answered {answer.choice}"
    unnamed = any(located.image is None for located in answer.boxes)
    return f"IoU {rollout.score.iou:.2f}" + (" · no image named" if unnamed else "")


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


def _compose(example: Example, rollouts: Mapping[str, Rollout], *, side: int = 448, gap: int = 20) -> Image.Image:
    """Question above, images in a row with all boxes, one line per model below."""
    located = _boxes(example, rollouts)
    panels = []
    for number, path in enumerate(example.images, start=1):
        panels.append(_panel(path, [(model, box) for model, image, box in located if image == number], side=side))
    width = max(900, sum(panel.width for panel in panels) + gap * (len(panels) + 1))
    large, small = ImageFont.load_default(size=26), ImageFont.load_default(size=19)
    question = _lines(shown_question(example), large, width - 2 * gap)
    texts = [("truth", "the annotated box")] + [(model, _line(rollout)) for model, rollout in rollouts.items()]
    wrapped = [(model, _lines(text, small, width - 2 * gap - 90)) for model, text in texts]
    rows = sum(len(lines) for _, lines in wrapped)
    top = gap + 34 * len(question) + 10
    sheet = Image.new("RGB", (width, top + side + 40 + 27 * rows + 8 * len(wrapped) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, gap), "\n".join(question), fill="#1b1f27", font=large, spacing=8)
    x = (width - sum(panel.width for panel in panels) - gap * (len(panels) - 1)) // 2
    for number, panel in enumerate(panels, start=1):
        sheet.paste(panel, (x, top))
        draw.rectangle((x - 1, top - 1, x + panel.width, top + side), outline="#c8ced8")
        draw.text((x, top + side + 6), f"Image {number}", fill="#5c6573", font=small)
        x += panel.width + gap
    y = top + side + 40
    for model, lines in wrapped:
        draw.rounded_rectangle((gap, y + 1, gap + 72, y + 25), radius=5, fill=PAINT[model])
        draw.text((gap + 36, y + 13), LABELS[model], fill="white", font=small, anchor="mm")
        for line in lines:
            draw.text((gap + 90, y + 2), line, fill="#1b1f27", font=small)
            y += 27
        y += 8
    return sheet


def _panel(path: Path, boxes: Sequence[tuple[str, Box]], *, side: int) -> Image.Image:
    """One image at this height with its boxes, laid out as on the page and twice as large."""
    image = load_image(path)
    panel = image.resize((round(image.width * side / image.height), side), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=20)
    for model, box in boxes:
        drawn = _drawn(model, box, panel.width // 2, side // 2)
        x, y, plate_x, plate_y = (2 * n for n in (drawn.x, drawn.y, drawn.label_x, drawn.label_y))
        corners = (x, y, x + 2 * drawn.width, y + 2 * drawn.height)
        # The annotation lies under the answers, so it is drawn wider: a box that agrees with it leaves a green rim.
        rim = 6 if model == "truth" else 0
        outer = (corners[0] - rim, corners[1] - rim, corners[2] + rim, corners[3] + rim)
        draw.rectangle((outer[0] - 2, outer[1] - 2, outer[2] + 2, outer[3] + 2), outline="white", width=8 + rim)
        draw.rectangle(outer, outline=PAINT[model], width=4 + rim)
        plate = (plate_x, plate_y, plate_x + 2 * drawn.label_width, plate_y + 28)
        draw.rounded_rectangle(plate, radius=5, fill=PAINT[model])
        draw.text(((plate[0] + plate[2]) / 2, plate_y + 14), LABELS[model], fill="white", font=font, anchor="mm")
    return panel


def _line(rollout: Rollout) -> str:
    """IoU and reasoning in one line for the picture."""
    if rollout.score.unreadable is not None:
        return f"unreadable answer: {rollout.score.unreadable.replace('_', ' ')}"
    text = reasoning_of(rollout.completion.text) or "answers without reasoning"
    return f"IoU {rollout.score.iou:.2f}.  {text}"


def _lines(text: str, font: Any, width: int) -> list[str]:
    """The text broken at spaces so that no line is wider than this."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
