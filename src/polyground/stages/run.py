"""The whole figure in one command: every stage in order; what is complete is skipped, what was interrupted goes on."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from polyground.config import Recipe
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
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    table.add_column("n", justify="right")
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
    return f"{100 * estimate['value']:.1f} [dim]{100 * estimate['low']:.1f}-{100 * estimate['high']:.1f}[/dim]"


def _points(estimate: Mapping[str, float]) -> str:
    text = f"{100 * estimate['value']:+.1f} [dim]{100 * estimate['low']:+.1f}…{100 * estimate['high']:+.1f}[/dim]"
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
