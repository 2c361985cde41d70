"""The whole figure in one command: every stage in order; what is complete is skipped, what was interrupted goes on."""

from __future__ import annotations

import importlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from polyground.config import Recipe, dump_recipe
from polyground.stages import evaluation_splits, own_splits, world_splits
from polyground.storage import MANIFEST, atomic_write_json, read_json

FIGURE = ("world", "synthesize", "sft", "merge", "reject", "grpo", "merge", "evaluate", "report")
"""`merge` stands twice: it merges whatever adapters there are by then."""

_LABELS = {"base": "base", "sft": "SFT", "rl": "RL"}


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Stage by stage to the report; then the tables on standard output."""
    console = Console(stderr=True)
    times = _Times(recipe.out / "times.json")
    report: Any = None
    for number, verb in enumerate(FIGURE, start=1):
        console.rule(f"[bold]{number}/{len(FIGURE)} {verb}", align="left")
        before = completed(recipe.out)
        since = time.monotonic()
        report = importlib.import_module(f"polyground.stages.{verb}").run(recipe)
        made = sorted(completed(recipe.out) - before)
        times.add(f"{number} {verb}", seconds=time.monotonic() - since, peak=peak_memory())
        console.print(f"{', '.join(made)}: complete" if made else "nothing left to do", highlight=False)
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
    results = read_json(recipe.out / "evaluate" / "results.json")
    console.print(results_table(recipe, results))
    console.print(_stages_table(read_json(recipe.out / "times.json")))
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def results_table(recipe: Recipe, results: Mapping[str, Any]) -> Table:
    """One row per split: accuracy of each model with its interval, then the paired differences."""
    threshold = f"{results['tags']['headline_iou']:g}"
    models = results["models"]
    pairs = [pair for pair in ("sft-base", "rl-sft", "rl-base") if all(role in models for role in pair.split("-"))]
    title = f"{recipe.name}: accuracy at IoU {threshold} in percent, macro over tasks, 95 % intervals"
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
        table.add_row(split, str(count), *map(_percent, cells), *map(_points, gains))
    return table


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


def plan(recipe: Recipe, verb: str) -> str:
    """Everything as text; nothing is opened but manifests."""
    parts = {
        f"{verb}, resolved recipe": [dump_recipe(recipe).rstrip()],
        "inputs": _inputs(recipe, verb),
        "outputs": _outputs(recipe, verb),
        "work": _work(recipe, verb),
    }
    return "\n\n".join(["\n".join([f"# {title}", *lines]) for title, lines in parts.items()] + ["dry run: nothing was done"])


def _inputs(recipe: Recipe, verb: str) -> Iterator[str]:
    if recipe.model.path != "tiny":
        yield _found(Path(recipe.model.path) / "config.json", f"model {recipe.model.path}")
    else:
        yield "found    model tiny (shipped with the package)"
    for split, sources in own_splits(recipe).items():
        for source in sources:
            yield _found(source.path, f"data.{split}: {source.path} ({source.source})")
    for folder in NEEDS[verb]:
        if folder != "world" or world_splits(recipe):
            yield _found(recipe.out / folder / MANIFEST, f"{recipe.out / folder}")


def _found(path: Path, what: str) -> str:
    return f"{'found   ' if path.exists() else 'missing '} {what}"


def _outputs(recipe: Recipe, verb: str) -> Iterator[str]:
    if verb in {"report", "run"}:
        yield f"{'exists  ' if (recipe.out / 'report.html').exists() else 'to make '} {recipe.out / 'report.html'}"
    verbs = [name for name in NEEDS if name not in {"run", "report"}] if verb == "run" else [verb] if verb != "report" else []
    for name in verbs:
        for folder in MAKES.get(name, (name,)):
            path = recipe.out / folder
            state = "complete" if (path / MANIFEST).exists() else "partial " if path.exists() else "to make "
            yield f"{state} {path}"


def _work(recipe: Recipe, verb: str) -> Iterator[str]:
    def wanted(*verbs: str) -> bool:
        return verb == "run" or verb in verbs

    world = recipe.world
    if wanted("world"):
        yield f"world: splits {', '.join(world_splits(recipe)) or 'none'}"
    if wanted("synthesize"):
        attempts = recipe.synthesize.samples_per_example
        yield f"synthesize: {_at_most(recipe.synthesize.limit, world.train)} questions, {attempts} attempts each"
    if wanted("sft"):
        yield f"sft: {_sft_steps(recipe)}"
    if wanted("reject"):
        yield f"reject: {_at_most(recipe.reject.limit, world.rl)} questions x {recipe.reject.num_generations} completions"
    if wanted("grpo"):
        groups = recipe.grpo.per_device_train_batch_size * recipe.grpo.gradient_accumulation_steps
        steps = recipe.grpo.max_steps if recipe.grpo.max_steps > 0 else "one pass of"
        yield f"grpo: {steps} steps of {groups} groups x {recipe.grpo.num_generations} completions on each device"
    if wanted("evaluate"):
        yield f"evaluate: base, sft, rl (those that exist) on {', '.join(evaluation_splits(recipe)) or 'no split'}"


def _at_most(limit: int | None, size: int) -> str:
    return f"up to {limit}" if limit is not None and limit < size else f"{size}"


def _sft_steps(recipe: Recipe) -> str:
    config = recipe.sft
    if config.max_steps > 0:
        return f"{config.max_steps} steps"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = min(recipe.world.train, recipe.synthesize.limit or recipe.world.train)
    return f"at most {math.ceil(rows * config.num_train_epochs / batch)} steps (batch {batch}; fewer where synthesis drops rows)"
