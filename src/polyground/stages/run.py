"""The whole figure in one command: every stage in order; what is complete is skipped, what was interrupted goes on."""

from __future__ import annotations

import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyground.config import GrpoConfig, Recipe, SftConfig, show_recipe
from polyground.conventions import Convention, load_convention, model_folder
from polyground.errors import DataError, StorageError, visible
from polyground.imagefile import image_size
from polyground.memory import Prompts, describe, grpo_memory, model_size, sft_memory
from polyground.metrics import fixed_letters
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.stages import evaluation_splits, own_splits, scan_file, split_files, start_folders, world_splits
from polyground.storage import MANIFEST, atomic_write_json, read_json, read_manifest
from polyground.tokens import PromptCounter
from polyground.worlds.build import CHOICE, SPLITS

FIGURE = ("world", "synthesize", "sft", "merge", "reject", "grpo", "merge", "evaluate", "report")
"""`merge` stands twice: it merges whatever adapters there are by then."""

_LABELS = {"base": "base", "sft": "SFT", "rl": "RL"}


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Stage by stage to the report; then the tables on standard output."""
    console = Console(stderr=True)
    times = _Times(recipe.out / "times.json")
    report: Any = None
    verbs = recipe.stages or FIGURE
    for number, verb in enumerate(verbs, start=1):
        console.rule(f"[bold]{number}/{len(verbs)} {verb}", align="left")
        before = completed(recipe.out)
        since = time.monotonic()
        done = importlib.import_module(f"polyground.stages.{verb}").run(recipe)
        report = done if verb == "report" else report
        made = sorted(completed(recipe.out) - before)
        times.add(f"{number} {verb}", seconds=time.monotonic() - since, peak=peak_memory())
        told = "written" if verb == "report" else f"{', '.join(made)}: complete" if made else "nothing left to do"
        console.print(told, highlight=False, markup=False)
    show(recipe, report=report)
    return {"out": str(recipe.out), "report": str(report), "stages": times.rows}


def completed(out: Path) -> set[str]:
    """Names of the stage folders under `out` that have their manifest."""
    return {str(path.parent.relative_to(out)) for path in out.glob(f"**/{MANIFEST}")}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Times:
    """Wall time per stage, added up over interrupted runs, in a file beside the stages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, float]] = read_json(path) if path.is_file() else {}

    def add(self, stage: str, *, seconds: float, peak: int) -> None:
        row = self.rows.setdefault(stage, {"seconds": 0.0, "peak_bytes": 0})
        row["seconds"] = round(row["seconds"] + seconds, 1)
        row["peak_bytes"] = max(row["peak_bytes"], peak)
        atomic_write_json(self.path, self.rows)


def show(recipe: Recipe, *, report: Any = None) -> None:
    """The results, the time and the memory, as tables on standard output."""
    console = Console()
    results = recipe.out / "evaluate" / "results.json"
    if results.is_file():
        found = read_json(results)
        console.print(results_table(recipe, found))
        for line in same_letters(found):
            console.print(line, highlight=False, markup=False)
    console.print(_stages_table(read_json(recipe.out / "times.json")))
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True, markup=False)


def results_table(recipe: Recipe, results: Mapping[str, Any]) -> Table:
    """One row per split: accuracy of each model with its interval, then the paired differences."""
    threshold = f"{results['tags']['headline_iou']:g}"
    models = results["models"]
    pairs = [pair for pair in ("sft-base", "rl-sft", "rl-base") if all(role in models for role in pair.split("-"))]
    title = f"{escape(visible(recipe.name))}: accuracy at IoU {threshold} in percent, macro over tasks, 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("split", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for role in models:
        table.add_column(_LABELS[role], justify="right")
    for pair in pairs:
        table.add_column(" - ".join(_LABELS[role] for role in pair.split("-")), justify="right")
    for split, found in results["splits"].items():
        cells = [found["models"][role]["macro"]["accuracy"][threshold] for role in models]
        gains = [found["differences"][pair]["macro"] for pair in pairs]
        count = found["models"][models[0]]["macro"]["examples"]
        table.add_row(escape(split), str(count), *map(_percent, cells), *map(_points, gains))
    return table


def same_letters(results: Mapping[str, Any]) -> list[str]:
    """A line for each split and model that answers nearly every question by one letter."""
    return [
        f"{visible(split)}: {_LABELS[role]} answers {letter} to nearly every question; what is right there is right by chance"
        for split, role, letter in fixed_letters(results["splits"])
    ]


def _percent(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['value']:.1f}\n[dim]{100 * estimate['low']:.0f}-{100 * estimate['high']:.0f}[/dim]"


def _points(estimate: Mapping[str, float]) -> str:
    text = f"{100 * estimate['value']:+.1f}\n[dim]{100 * estimate['low']:+.0f}…{100 * estimate['high']:+.0f}[/dim]"
    if estimate["low"] > 0:
        return f"[green]{text}[/green]"
    return f"[red]{text}[/red]" if estimate["high"] < 0 else text


def _stages_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="wall time and peak memory", title_justify="left")
    for name in ("stage", "time", "peak memory"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, row in rows.items():
        minutes, seconds = divmod(row["seconds"], 60)
        table.add_row(stage, f"{minutes:.0f}:{seconds:04.1f}", f"{row['peak_bytes'] / 2**30:.2f} GiB")
    total = sum(row["seconds"] for row in rows.values())
    table.add_row("total", f"{total // 60:.0f}:{total % 60:04.1f}", "")
    return table


NEEDS = {
    "world": (),
    "synthesize": ("world",),
    "sft": ("synthesize",),
    "merge": ("sft",),
    "reject": ("world", "sft-merged"),
    "grpo": ("reject", "sft-merged"),
    "evaluate": ("world",),
    "report": (),
    "run": (),
}
"""Folders under `out` that a verb reads."""

MAKES = {"merge": ("sft-merged", "grpo-merged"), "evaluate": ("evaluate/base", "evaluate/sft", "evaluate/rl")}
"""Folders under `out` that a verb writes, where they are not called like the verb."""


COUNTED_BYTES = 32 * 2**20
"""A plan counts the rows of annotation files up to this size; larger ones would keep the user waiting."""

ASSUMED_IMAGES, ASSUMED_TEXT = 4, 150
"""Images and tokens of text of a prompt, where there is no data yet to measure."""

LOOKED_AT = 100
"""Rows of an annotation whose images a plan measures, by their headers, to estimate the memory."""


def plan(recipe: Recipe, verb: str) -> str:
    """What a verb would do and need, as text. Only manifests, annotation, and the headers of images and weights are read."""
    parts: dict[str, Iterable[str]] = {
        f"{verb}, resolved recipe": [show_recipe(recipe).rstrip()],
        "inputs": _inputs(recipe, verb),
        "outputs": _outputs(recipe, verb),
        "work on one device (steps and rollouts are shared out where there are more)": _work(recipe, verb),
        "cost of synthesis": _cost(recipe, verb),
        "memory of one device": _memory(recipe, verb),
    }
    blocks = [[f"# {title}", *lines] for title, lines in parts.items()]
    return "\n\n".join(["\n".join(block) for block in blocks if len(block) > 1] + ["dry run: nothing was done"])


def _inputs(recipe: Recipe, verb: str) -> Iterator[str]:
    if recipe.model.path != "tiny":
        yield _found(Path(recipe.model.path) / "config.json", f"model {recipe.model.path}")
    else:
        yield "found    model tiny (shipped with the package)"
    for split, sources in own_splits(recipe).items():
        for source in sources:
            yield _found(source.path, f"data.{split}: {source.path} ({source.source})")
    for folder in _needs(recipe, verb):
        if folder != "world" or world_splits(recipe):
            yield _found(recipe.out / folder / MANIFEST, f"{recipe.out / folder}")


def _needs(recipe: Recipe, verb: str) -> list[str]:
    """Folders that a verb reads; RL from the base needs no SFT model."""
    return [folder for folder in NEEDS[verb] if folder != "sft-merged" or folder in start_folders(recipe)]


def _found(path: Path, what: str) -> str:
    return f"{'found   ' if path.exists() else 'missing '} {what}"


def _outputs(recipe: Recipe, verb: str) -> Iterator[str]:
    if verb == "report" or (verb == "run" and _is_done_by(recipe, "report")):
        yield f"{'exists  ' if (recipe.out / 'report.html').exists() else 'to make '} {recipe.out / 'report.html'}"
    verbs = [name for name in NEEDS if _is_done_by(recipe, name)] if verb == "run" else [verb]
    for name in verbs:
        if name == "report":
            continue
        for folder in MAKES.get(name, (name,)):
            path = recipe.out / folder
            state = "complete" if (path / MANIFEST).exists() else "partial " if path.exists() else "to make "
            yield f"{state} {path}"


def _work(recipe: Recipe, verb: str) -> Iterator[str]:
    """A line per stage: how many questions, completions and steps."""
    counts = {split: _rows_of(recipe, split) for split in [*own_splits(recipe), *world_splits(recipe)]}

    def wanted(name: str) -> bool:
        return _is_done_by(recipe, name) if verb == "run" else verb == name

    if wanted("world"):
        splits = ", ".join(f"{split} {counts[split]:,}" for split in world_splits(recipe) if not split.endswith(CHOICE))
        yield f"world       {splits or 'no split: all data are your own'}"
    if wanted("synthesize"):
        synthesize = recipe.synthesize
        completions = _completions(counts.get("train"), synthesize.limit, synthesize.samples_per_example)
        yield f"synthesize  {completions} of the {synthesize.teacher} teacher"
    if wanted("sft"):
        yield f"sft         {_sft_work(recipe, counts.get('train'))}"
    if wanted("reject"):
        reject = recipe.reject
        yield (
            f"reject      {_completions(counts.get('rl'), reject.limit, reject.num_generations)} of up to "
            f"{reject.max_completion_length} tokens"
        )
    if wanted("grpo"):
        yield f"grpo        {_grpo_work(recipe, counts.get('rl'))}"
    if wanted("evaluate"):
        yield f"evaluate    {_evaluate_work(recipe, counts)}"


def _is_done_by(recipe: Recipe, verb: str) -> bool:
    """Whether `run` does this verb."""
    return verb in (recipe.stages or FIGURE)


def _rows_of(recipe: Recipe, split: str) -> int | None:
    """Questions of a split; None where a file is missing, damaged or too large to be counted in passing."""
    splits = world_splits(recipe)
    if split in splits:
        return sum(int(getattr(recipe.world, SPLITS[part].size)) for part in (split, f"{split}{CHOICE}") if part in splits)
    total = 0
    for file in own_splits(recipe)[split]:
        if not file.path.is_file() or file.path.stat().st_size > COUNTED_BYTES:
            return None
        try:
            total += sum(isinstance(item, Example) for item in scan_file(file))
        except DataError:
            return None
    return total


def _completions(questions: int | None, limit: int | None, each: int) -> str:
    """`400 questions x 8 = 3,200 completions`."""
    if questions is None:
        return f"{f'at most {limit:,}' if limit else 'as many'} questions as there are x {each} completions"
    asked = questions if limit is None else min(limit, questions)
    return f"{asked:,} questions x {each} = {asked * each:,} completions"


def _kept(recipe: Recipe, folder: str) -> int | None:
    """Rows that a complete stage has kept."""
    path = recipe.out / folder
    return int(read_manifest(path).summary["kept"]) if (path / MANIFEST).is_file() else None


def _at_most(questions: int | None, limit: int | None) -> int | None:
    return questions if limit is None else limit if questions is None else min(limit, questions)


def _sft_work(recipe: Recipe, questions: int | None) -> str:
    config, kept = recipe.sft, _kept(recipe, "synthesize")
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if config.max_steps > 0:
        return f"{config.max_steps:,} steps of {batch} rows"
    rows = _at_most(questions, recipe.synthesize.limit) if kept is None else kept
    if rows is None:
        return f"(kept rows x {config.num_train_epochs:g} / {batch}) steps; the rows are known after synthesis"
    most, less = ("at most ", ", fewer as synthesis drops rows") if kept is None else ("", "")
    return f"{most}{sft_steps(rows, config):,} steps of {batch} rows: {rows:,} rows x {config.num_train_epochs:g} passes{less}"


def _grpo_work(recipe: Recipe, questions: int | None) -> str:
    config, kept = recipe.grpo, _kept(recipe, "reject")
    groups = config.per_device_train_batch_size * config.gradient_accumulation_steps
    asked = _at_most(questions, recipe.reject.limit) if kept is None else kept
    if config.max_steps < 0 and asked is None:
        return f"(kept questions / {groups}) steps of {groups} groups x {config.num_generations} completions"
    steps = grpo_steps(asked or 0, config)
    rollouts = math.ceil(steps / config.num_iterations) * groups * config.num_generations
    most = "at most " if config.max_steps < 0 and kept is None else ""
    text = (
        f"{most}{steps:,} steps of {groups} groups x {config.num_generations} completions: {rollouts:,} of up to "
        f"{config.max_completion_length} tokens"
    )
    if asked:
        passes = rollouts / config.num_generations / asked
        text += f", {passes:.2g} passes over {'' if kept is not None else 'at most '}{asked:,} kept questions"
    return text


def sft_steps(rows: int, config: SftConfig) -> int:
    """Optimiser steps on one device, as the trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(rows / config.per_device_train_batch_size)
    return max(1, math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs))


def grpo_steps(questions: int, config: GrpoConfig) -> int:
    """Optimiser steps on one device, as the trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    groups = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(1, math.ceil(questions / groups) * config.num_iterations)


def _evaluate_work(recipe: Recipe, counts: Mapping[str, int | None]) -> str:
    config = recipe.evaluate
    asked = {split: _at_most(counts[split], config.limit_per_split) for split in evaluation_splits(recipe)}
    if not asked:
        return "no split to evaluate on"
    tokens = f"of up to {config.max_completion_length} tokens"
    roles = list(_LABELS) if config.models is None else config.models
    named = "base, SFT and RL" if len(roles) == len(_LABELS) else " and ".join(_LABELS[role] for role in roles)
    models = f"{named} model, as far as they exist"
    if None in asked.values():
        later = ", ".join(split for split, count in asked.items() if count is None)
        return f"{models}: answers {tokens}; as many as there are questions, not counted yet for {later}"
    # A limit is all that is known of a split whose file is not there yet.
    most = "up to " if any(counts[split] is None for split in asked) else ""
    total = sum(count or 0 for count in asked.values())
    splits = ", ".join(f"{split} {count:,}" for split, count in asked.items())
    return f"{models}: {most}{total:,} answers each, {len(roles) * total:,} together, {tokens} ({splits})"


def _cost(recipe: Recipe, verb: str) -> Iterator[str]:
    """What the servers of `synthesize` will be asked for and paid; nothing where it asks none or is complete."""
    config = recipe.synthesize
    wanted = verb == "synthesize" or (verb == "run" and _is_done_by(recipe, "synthesize"))
    if not wanted or (config.teacher == "scripted" and config.judge is None) or _kept(recipe, "synthesize") is not None:
        return
    from polyground.stages.synthesize import cost_lines

    try:
        files = split_files(recipe, "train")
        if missing := [file.path for file in files if not file.path.exists()]:
            yield f"not estimated: {missing[0]} is not there yet"
            return
        if verb == "run" and any(file.path.is_file() and file.path.stat().st_size > COUNTED_BYTES for file in files):
            yield "not estimated in passing, for the size of train: `polyground synthesize RECIPE --dry-run` does"
            return
        items = (item for file in files for item in scan_file(file))
        examples = list(islice((item for item in items if isinstance(item, Example)), config.limit))
    except (DataError, StorageError) as error:
        yield f"not estimated: {error}"
        return
    done = _done_keys(recipe.out / "synthesize")
    yield from cost_lines(recipe, [example for example in examples if example.key not in done])


def _done_keys(folder: Path) -> set[str]:
    """What an interrupted stage has written; the last line may be torn."""
    done = set()
    for path in (folder / "kept.jsonl", folder / "rejected.jsonl"):
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):
                done.add(str(json.loads(line)["key"]))
    return done


def _memory(recipe: Recipe, verb: str) -> Iterator[str]:
    """The estimate for SFT and GRPO, or what is missing for one."""
    verbs = [name for name in ("sft", "grpo") if verb == name or (verb == "run" and _is_done_by(recipe, name))]
    if not verbs:
        return
    folder = model_folder(recipe.model.path)
    if not (folder / "config.json").is_file():
        yield (
            f"not estimated: {folder} is not there yet. Its config.json and the headers of its safetensors files are enough: "
            "run this again when they are"
        )
        return
    size = model_size(folder)
    convention = load_convention(folder, max_pixels_total=recipe.model.max_pixels_total)
    counted = (
        "by the headers of its weights" if size.counted_from == "weights" else "by its config.json: the weights are not there"
    )
    yield f"{recipe.model.path}: {size.parameters:,} parameters, {counted}"
    for name in verbs:
        prompts, origin = _longest_prompt(recipe, "train" if name == "sft" else "rl", convention)
        if name == "sft":
            completion = recipe.grpo.max_completion_length
            estimate = sft_memory(size, recipe.sft, dtype=recipe.model.dtype, prompts=prompts, completion=completion)
        else:
            estimate = grpo_memory(size, recipe.grpo, dtype=recipe.model.dtype, prompts=prompts)
        yield from describe(name, estimate)
        yield f"  prompt: {origin}"
    yield "an estimate: formulas in polyground.memory; `polyground validate` measures every prompt of the data"


def _longest_prompt(recipe: Recipe, split: str, convention: Convention) -> tuple[Prompts, str]:
    """The longest prompt among the first rows of a split, or of an assumed one where its images are not there."""
    counter, found = PromptCounter(convention), []
    for example in _first_examples(recipe, split):
        try:
            sizes = [image_size(image) for image in example.images]
            messages = student_messages(example, convention.grids(sizes), instruction=recipe.prompts.instruction)
            found.append(counter.count(messages, convention.canvases(sizes)))
        except DataError:
            continue
    if found:
        longest = max(found, key=lambda length: length.total)
        return Prompts(
            tokens=longest.total, image_tokens=longest.images
        ), f"the longest of the first {len(found)} rows of {split}"
    side = (224, 224) if split in world_splits(recipe) else (1024, 768)
    tokens = sum(canvas.tokens for canvas in convention.canvases([side] * ASSUMED_IMAGES))
    origin = (
        f"ASSUMED, as {split} is not there yet: {ASSUMED_IMAGES} images of {side[0]} x {side[1]} pixels ({tokens:,} tokens) and "
        f"{ASSUMED_TEXT} tokens of text"
    )
    return Prompts(tokens=tokens + ASSUMED_TEXT, image_tokens=tokens), origin


def _first_examples(recipe: Recipe, split: str) -> list[Example]:
    """The first good rows; none where the split is not there or cannot be read."""
    try:
        files = split_files(recipe, split)
        items = (item for file in files for item in scan_file(file))
        return [item for item in islice(items, LOOKED_AT) if isinstance(item, Example)]
    except (DataError, StorageError):
        return []
