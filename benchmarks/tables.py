"""Results as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measure import COUNTED, PHASES, SUMS

MIB = 2**20
PHASE_COLOURS = dict(zip(PHASES, ("#999999", "#cc79a7", "#56b4e9", "#f0e442", "#009e73", "#d55e00"), strict=True))


def markdown(result: dict[str, Any]) -> str:
    """The whole result; seconds are medians."""
    parts = [
        "## Environment",
        "\n".join(f"- {name}: {value}" for name, value in result["environment"].items()),
        "## Correctness gate",
        _gate(result["gate"]),
        *([f"Adapters after several AdamW steps, relative to the way they went: {result['drift']}"] if "drift" in result else []),
        "## How much faster",
        _ratios(result["cells"]),
        "## Twice the completions",
        _growth(result["cells"]),
        "## Seconds by phase",
        _phases(result["cells"]),
        "## What was computed",
        _counts(result["cells"]),
        "## Tuning of the tuned arm",
        _tuning(result["cells"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _gate(records: Sequence[dict[str, Any]]) -> str:
    worst: dict[tuple[str, float, str], tuple[float, float]] = {}
    for record in records:
        for name, loss in record["loss"].items():
            key = (record["dtype"], record["beta"], name)
            before = worst.get(key, (0.0, 0.0))
            worst[key] = (max(before[0], loss), max(before[1], record["gradients"][name]))
    rows = [(dtype, f"{beta:g}", name, f"{loss:.1e}", f"{found:.1e}") for (dtype, beta, name), (loss, found) in worst.items()]
    cases = ", ".join(dict.fromkeys(record["case"] for record in records))
    note = "Relative to the first arm in float32; in bfloat16, each arm relative to itself in float32. The worst of these cases: "
    return note + cases + "\n\n" + table(("dtype", "beta", "arm", "loss", "LoRA gradients"), rows)


def _ratios(cells: Sequence[dict[str, Any]]) -> str:
    header = (
        "cell",
        "P",
        "tokens row by row / shared",
        *(f"{name} vs tuned" for name in ("update", "update+vision", "rollout", "step")),
    )
    rows = []
    for cell in cells:
        ratios = cell["ratios"]
        rows.append(
            (
                cell["name"],
                str(cell["prompt_tokens"]),
                f"{cell['flops']['row_by_row_tokens'] / cell['flops']['shared_tokens']:.1f}x",
                *(_times(ratios.get("tuned", {}).get(name)) for name in ("update", "update+vision", "rollout", "step")),
                _times(ratios.get("stock", {}).get("step")),
                _times(ratios.get("tuned", {}).get("memory")),
                _percent(cell["flops"].get("ours_of_square")),
                _percent(cell["flops"].get("ours_of_own_shape")),
            )
        )
    more = ("step vs stock", "memory of the update vs tuned", "of the product rate", "of that at the model's shapes")
    return table((*header, *more), rows)


def _growth(cells: Sequence[dict[str, Any]]) -> str:
    """By how much a step grows when G doubles and nothing else changes."""
    rows = []
    for cell in cells:
        double = {**cell["cell"], "groups": 2 * cell["cell"]["groups"]}
        larger = next((other for other in cells if other["cell"] == double), None)
        for name, arm in cell["arms"].items():
            after = larger["arms"].get(name, {}).get("seconds") if larger else None
            if after and "seconds" in arm:
                grown = [f"{after[what] / arm['seconds'][what]:.2f}x" for what in ("update", "rollout", "step")]
                rows.append((cell["name"], f"G {double['groups']}", name, *grown))
    return table(("from", "to", "arm", "update", "rollout", "step"), rows)


def _phases(cells: Sequence[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        for name, arm in cell["arms"].items():
            if "seconds" not in arm:
                rows.append((cell["name"], name, arm["failed"], *[""] * (len(PHASES) + len(SUMS))))
                continue
            memory = arm.get("memory", {})
            above = f"{memory['above'] / MIB:.0f}" if "above" in memory else ""
            rows.append((cell["name"], name, above, *(f"{arm['seconds'][phase]:.3f}" for phase in (*PHASES, *SUMS))))
    return table(("cell", "arm", "peak above the loaded model, MiB", *PHASES, *SUMS), rows)


def _counts(cells: Sequence[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        for name, arm in cell["arms"].items():
            for phase, counts in arm.get("counts", {}).items():
                rows.append((cell["name"], name, phase, *(str(counts.get(what, 0)) for what in COUNTED)))
    return table(("cell", "arm", "phase", *(what.replace("_", " ") for what in COUNTED)), rows)


def _tuning(cells: Sequence[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        tuned = cell["arms"].get("tuned", {})
        tried = ", ".join(f"{setting}: {seconds:.2f} s" for setting, seconds in tuned.get("tuning", {}).items())
        if tried:
            chosen = tuned["setting"]
            rows.append((cell["name"], f"rows {chosen['rows']}, checkpointing {chosen['gradient_checkpointing']}", tried))
    return table(("cell", "chosen", "reference, forward and backward of each setting"), rows)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: the phases of a step, arm by arm. Right: how many times faster than the tuned arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = result["cells"]
    bars = [(cell, name) for cell in cells for name in cell["arms"] if "seconds" in cell["arms"][name]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 2 + 0.28 * len(bars)), layout="constrained")
    reached = [0.0] * len(bars)
    for phase in PHASES:
        seconds = [cell["arms"][name]["seconds"][phase] for cell, name in bars]
        left.barh(range(len(bars)), seconds, left=reached, color=PHASE_COLOURS[phase], label=phase)
        reached = [a + b for a, b in zip(reached, seconds, strict=True)]
    left.set_yticks(range(len(bars)), [f"{cell['name']} · {name}" for cell, name in bars], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("seconds of one step, median")
    left.legend(fontsize=7)
    compared = [cell for cell in cells if "tuned" in cell["ratios"]]
    for offset, (what, colour) in enumerate((("update", "#009e73"), ("rollout", "#56b4e9"), ("step", "#0072b2"))):
        places = [i + 0.26 * (offset - 1) for i in range(len(compared))]
        right.barh(places, [cell["ratios"]["tuned"][what] for cell in compared], height=0.24, color=colour, label=what)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(range(len(compared)), [f"{cell['name']} (P {cell['prompt_tokens']})" for cell in compared], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("times faster than tuned TRL")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
