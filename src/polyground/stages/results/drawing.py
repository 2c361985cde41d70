"""The picture beside a study's table: models by headline, or arms against their baseline; intervals drawn, seeds as dots."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyground.stages.results.tables import LABELS, heading, headlines, main_splits

PAINT = {"base": "#4a5160", "sft": "#1864ab", "rl": "#d9480f"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the PNG of a study; an empty frame says that nothing is finished yet."""
    from matplotlib.figure import Figure

    arms = results["arms"]
    ground = arms[results["baseline"]]
    others = [name for name in arms if name != results["baseline"] and arms[name]["splits"]]
    figure = Figure(figsize=(10, 4.2 if not others else 1.6 + 0.42 * len(others)), dpi=120, layout="constrained")
    if others:
        _arms(figure, results, others)
    elif ground["splits"]:
        _models(figure, ground)
    else:
        figure.text(0.5, 0.5, "no run is finished yet", ha="center", va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(buffer.getvalue())
    draft.replace(path)


def _models(figure: Any, arm: Mapping[str, Any]) -> None:
    """A cluster of bars per headline: base, SFT, RL."""
    axes = figure.subplots()
    splits = [split for split in headlines(arm["splits"]) if arm["splits"][split]["models"]]
    width = 0.26
    for offset, role in enumerate(LABELS):
        places = [place for place, split in enumerate(splits) if role in arm["splits"][split]["models"]]
        found = [arm["splits"][splits[place]]["models"][role]["macro"] for place in places]
        if not found:
            continue
        x = [place + (offset - 1) * width for place in places]
        axes.bar(x, [100 * row["value"] for row in found], width * 0.92, color=PAINT[role], label=LABELS[role], alpha=0.85)
        _whiskers(axes, x, found, color="#111111")
        dots = [(place, 100 * value) for place, row in zip(x, found, strict=True) for value in row["seeds"]]
        axes.plot(*zip(*dots, strict=True), "o", markersize=3, color="white", markeredgecolor="#111111", markeredgewidth=0.6)
    axes.set_xticks(
        range(len(splits)), [_wrapped(f"{heading(split)}\n(n {arm['splits'][split]['questions']:,})") for split in splits]
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("accuracy, percent")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    _plain(axes)
    axes.set_title("Mean over seeds, 95 % interval over questions and seeds; a dot is a seed", fontsize=9, loc="left")


def _arms(figure: Any, results: Mapping[str, Any], names: Sequence[str]) -> None:
    """A dot with its interval per arm and headline: the arm minus the baseline."""
    compared = {split for name in names for split, found in results["arms"][name]["splits"].items() if found["versus_baseline"]}
    splits = [split for split in main_splits(sorted(compared)) if not split.startswith("perception")]
    panels = figure.subplots(1, max(1, len(splits)), sharey=True, squeeze=False)[0]
    for axes, split in zip(panels, splits, strict=False):
        for place, name in enumerate(reversed(names)):
            versus = results["arms"][name]["splits"].get(split, {}).get("versus_baseline")
            if not versus:
                continue
            row = versus["macro"]
            colour = "#0b7a3e" if row["low"] > 0 else "#c92a2a" if row["high"] < 0 else "#4a5160"
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour, linewidth=2)
            axes.plot([100 * row["value"]], [place], "o", color=colour)
            axes.plot([100 * value for value in row["seeds"]], [place] * len(row["seeds"]), "|", color=colour, markersize=8)
        axes.axvline(0, color="#111111", linewidth=0.8)
        axes.set_title(f"{heading(split)}: points against {results['baseline']}", fontsize=9, loc="left")
        axes.set_yticks(range(len(names)), list(reversed(names)))
        _plain(axes)


def _whiskers(axes: Any, x: Sequence[float], found: Sequence[Mapping[str, Any]], *, color: str) -> None:
    values = [100 * row["value"] for row in found]
    below = [value - 100 * row["low"] for value, row in zip(values, found, strict=True)]
    above = [100 * row["high"] - value for value, row in zip(values, found, strict=True)]
    axes.errorbar(x, values, yerr=[below, above], fmt="none", ecolor=color, elinewidth=1, capsize=2)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _wrapped(text: str) -> str:
    return text.replace(": ", ":\n")
