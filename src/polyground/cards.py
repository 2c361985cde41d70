"""Cards for the Hugging Face hub: a README.md with metadata, made of what an evaluation measured and what made the model.

They hold no sentence that no file of the run bears out. License and base model are the user's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from polyground import __version__

TASK = "image-text-to-text"
TAGS = ("visual-grounding", "multi-image", "polyground")

WORLD = "simulated world"
"""How the source of a simulated split begins in `results.json`."""

HUB_NAMES = {
    "mig_bench": "Michael4933/MIG-Bench",
    "blink": "BLINK-Benchmark/BLINK",
    "mmiu": "FanqingM/MMIU-Benchmark",
    "ref_l4": "JierunChen/Ref-L4",
}
"""Public benchmarks that are data sets of the hub, by their name here; others are called by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What the user says of a card."""

    name: str
    license: str | None = None
    """As the hub spells it: apache-2.0, mit, other, …"""
    base_model: str | None = None
    """Name on the hub of the model that training started from."""
    language: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What made a model, from the manifests of its run."""

    role: str
    """sft or rl."""
    model_type: str
    facts: Sequence[tuple[str, str]] = field(default=())
    """(what, value) in the order of the figure."""
    instruction: str = ""
    grid: str = ""


# ---------------------------------------------------------------- the model


def model_card(results: Mapping[str, Any], origin: Origin, identity: Identity, *, beside: bool = True) -> str:
    """The README.md of a model folder; `beside` says that `results.json` lies there, too."""
    metadata = {
        **_metadata(identity),
        **({} if identity.base_model is None else {"base_model": identity.base_model}),
        "library_name": "transformers",
        "pipeline_tag": TASK,
        "tags": [*TAGS, *(["grpo"] if origin.role == "rl" else ["sft"])],
        "model-index": [{"name": identity.name, "results": model_index(results, origin.role)}],
    }
    return "\n".join(
        [
            _front(metadata),
            f"# {_cell(identity.name)}\n",
            _made(origin),
            "## Answers\n",
            _answers(origin),
            "## Use\n",
            _use(),
            *_result_sections(results, origin.role, beside=beside),
            "## How it was made\n",
            _table(("what", "value"), origin.facts),
            "",
            "## Not known\n",
            _unknown(results, identity),
        ]
    )


def model_index(results: Mapping[str, Any], role: str) -> list[dict[str, Any]]:
    """The hub's `model-index` of one model: the headline of every split, and what stands beside it; pools are left out."""
    found = []
    for split, table in results["splits"].items():
        if role not in table["models"] or "pooled" in table:
            continue
        summary = table["models"][role]
        measure, headline = _headline(results, table, role)
        metrics = [_metric("accuracy", measure, headline["value"])]
        macro = summary["macro"]
        if not _in_letters(table, summary):
            metrics.append(_metric("mean_iou", "mean IoU, mean over tasks", macro["mean_iou"]["value"]))
        if macro["image_accuracy"] is not None:
            metrics.append(_metric("accuracy", "right image, mean over tasks", macro["image_accuracy"]["value"]))
        metrics.append(_metric("unreadable", "share of replies without a usable answer", macro["unreadable_rate"]))
        found.append(
            {
                "task": {"type": TASK, "name": "multi-image visual grounding"},
                "dataset": _dataset(results, split, table),
                "metrics": metrics,
            }
        )
    return found


def _metric(kind: str, name: str, value: float) -> dict[str, Any]:
    return {"type": kind, "name": name, "value": round(value, 4)}


def _dataset(results: Mapping[str, Any], split: str, table: Mapping[str, Any]) -> dict[str, Any]:
    told = results["tags"].get("benchmarks", {}).get(split)
    if "benchmark" in table:
        benchmark = table["benchmark"]
        name = str(benchmark["benchmark"])
        version = benchmark.get("version")
        here = {"type": HUB_NAMES.get(name, name), "name": name if version is None else f"{name} ({version})", "split": split}
        return here if version is None else {**here, "config": str(version)}
    if isinstance(told, Mapping) and str(told.get("source", "")).startswith(WORLD):
        args = {name: told[name] for name in ("seed", "version") if name in told}
        return {"type": "polyground-world", "name": f"{WORLD} of polyground, {split}", "split": split, "args": args}
    return {"type": "own", "name": split, "split": split}


def _made(origin: Origin) -> str:
    what = f"A `{origin.model_type}` model for finding things in several images at once"
    how = {
        "sft": "after its cold start: supervised fine-tuning on reasoning that a teacher wrote and a scorer confirmed",
        "rl": "after reinforcement learning (GRPO) with rewards by rule, which started from a cold start on reasoning",
    }
    return f"{what}, {how[origin.role]}. Made with polyground {__version__}, an implementation of arXiv 2507.00748.\n"


def _answers(origin: Origin) -> str:
    boxes = f" Boxes are written on {origin.grid}, x before y, from the top left." if origin.grid else ""
    asked = f"\n\nTrained with this text after every question:\n\n{_quoted(origin.instruction)}" if origin.instruction else ""
    return (
        '```\n<think>…</think>\n<answer>[{"image": 2, "bbox_2d": [412, 96, 655, 341]}]</answer>\n```\n\n'
        f"Images are counted from 1; an empty list says that nothing fits; a multiple choice is answered by its letter.{boxes}"
        f"{asked}\n"
    )


def _use() -> str:
    return (
        '```sh\npolyground ground --model FOLDER a.png b.png -q "Find the object in both images." --out answer.png\n```\n\n'
        "FOLDER is this one, downloaded. It is a plain transformers folder: other programs load it as any of its family.\n"
    )


def _unknown(results: Mapping[str, Any], identity: Identity) -> str:
    told = results["tags"].get("benchmarks", {}).values()
    lines = ["- How much another seed would change the numbers: intervals are over questions, the run is one."]
    if any(isinstance(one, Mapping) and str(one.get("source", "")).startswith(WORLD) for one in told):
        lines.append("- How it does on photographs: splits of the simulated world hold drawn shapes.")
    if identity.license is None:
        lines.append("- The license: it depends on the base model and the data; say it with `--license`.")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the data set


def dataset_card(
    results: Mapping[str, Any],
    identity: Identity,
    *,
    models: Sequence[str],
    splits: Mapping[str, int],
    files: Mapping[str, str],
) -> str:
    """The README.md of a folder with predictions: `splits` are questions by split, `files` their parquet files.

    Split and file names are those of the hub.
    """
    configurations: list[dict[str, Any]] = [
        {
            "config_name": "predictions",
            "default": True,
            "data_files": [{"split": split, "path": path} for split, path in files.items()],
        },
        {"config_name": "results", "data_files": [{"split": "all", "path": "results/results.jsonl"}]},
    ]
    metadata = {
        **_metadata(identity),
        "pretty_name": identity.name,
        "task_categories": [TASK],
        "tags": [*TAGS, "predictions"],
        "size_categories": [_size(sum(splits.values()))],
        "configs": configurations,
    }
    named = ", ".join(f"`{model}`" for model in models)
    return "\n".join(
        [
            _front(metadata),
            f"# {_cell(identity.name)}\n",
            f"Questions about several images, the annotated answer, and what the models {named} replied. "
            f"Made with polyground {__version__}.\n",
            "## Columns\n",
            "Of a question: `key`, `task`, `question` (`<image>` where an image belongs, `<box>` where a box is asked about: "
            "`question_images`, `question_boxes`), `choices`, `images`. Of the truth: `truth_images` (counted from 1) beside "
            "`truth_boxes` (x0, y0, x1, y1 as fractions of the image), or `truth_choice`. Of each model the same under its own "
            "name, with `MODEL_reply`, `MODEL_confidence`, `MODEL_unreadable` (why a reply has no usable answer), `MODEL_right` "
            "(by the rule of the headline), `MODEL_iou` and `MODEL_image_correct`.\n",
            "The configuration `results` is the tables as rows: split, model, task, measure, value with its 95 % interval.\n",
            _table(("split", "questions"), [(split, f"{count:,}") for split, count in splits.items()]),
            "",
            *_result_sections(results, None, beside=True),
        ]
    )


def _size(rows: int) -> str:
    """The hub's size category.

    >>> _size(200), _size(1000), _size(1_000_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    if rows < 1000:
        return "n<1K"
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M"]
    place = min(len(str(rows)) - 4, len(bounds) - 2)
    return f"{bounds[place]}<n<{bounds[place + 1]}"


# ---------------------------------------------------------------- results


def _result_sections(results: Mapping[str, Any], role: str | None, *, beside: bool) -> list[str]:
    """What was measured; of all models, so that one sees what a stage bought."""
    if not results["splits"]:
        return ["## Results\n", "Not evaluated.\n"]
    models = list(results["models"])
    pairs = [
        pair for pair in ("sft-base", "rl-sft", "rl-base") if any(pair in t["differences"] for t in results["splits"].values())
    ]
    pairs = [pair for pair in pairs if role is None or pair.startswith(f"{role}-")]
    rows = []
    for split, table in results["splits"].items():
        cells = [_percent(_headline(results, table, model)[1]) if model in table["models"] else "" for model in models]
        gains = [_points(table["differences"][pair]["macro"]) if pair in table["differences"] else "" for pair in pairs]
        some = next(iter(table["models"].values()))
        rows.append((split, f"{some['micro']['examples']:,}", _measure(results, table), *cells, *gains))
    names = [f"{pair.replace('-', ' − ')} (paired)" for pair in pairs]
    tags = results["tags"]
    sections = [
        "## Results\n",
        _table(("split", "questions", "measure", *models, *names), rows),
        "",
        f"In percent, with 95 % bootstrap intervals over questions ({tags['bootstrap']:,} resamples); differences in points of "
        f"accuracy at IoU {tags['headline_iou']:g} on the same questions. Greedy answers of at most "
        f"{tags['decoding']['max_completion_length']:,} tokens."
        + (" `results.json` beside this file holds everything.\n" if beside else "\n"),
    ]
    first, table = next(iter(results["splits"].items()))
    threshold = f"{tags['headline_iou']:g}"
    tasks = [
        (
            task,
            f"{found['examples']:,}",
            *(_percent(table["models"][m]["tasks"][task]["accuracy"][threshold]) for m in table["models"]),
        )
        for task, found in next(iter(table["models"].values()))["tasks"].items()
    ]
    if len(tasks) > 1:
        sections += [f"### `{_cell(first)}` by task\n", _table(("task", "questions", *table["models"]), tasks), ""]
    return sections


def _headline(results: Mapping[str, Any], table: Mapping[str, Any], model: str) -> tuple[str, Mapping[str, float]]:
    """The measure and its value: a benchmark's own headline, or accuracy over tasks."""
    summary = table["models"][model]
    value = summary.get("headline") or summary["macro"]["accuracy"][f"{results['tags']['headline_iou']:g}"]
    return _measure(results, table), value


def _measure(results: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    if "benchmark" in table:
        return str(table["benchmark"]["headline"])
    over = "splits" if "pooled" in table else "tasks"
    some = next(iter(table["models"].values()))
    what = "accuracy" if _in_letters(table, some) else f"accuracy at IoU {results['tags']['headline_iou']:g}"
    return f"{what}, mean over {over}"


def _in_letters(table: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    """Whether a split is answered by letters: then every threshold says the same, and so does the mean."""
    if "benchmark" in table:
        return table["benchmark"]["rule"] == "exact_letter"
    if summary["macro"]["image_accuracy"] is not None:
        return False
    macro = summary["macro"]
    return all(value["value"] == macro["mean_iou"]["value"] for value in macro["accuracy"].values())


# ---------------------------------------------------------------- markdown


def _metadata(identity: Identity) -> dict[str, Any]:
    said = {"license": identity.license, "language": identity.language}
    return {name: value for name, value in said.items() if value is not None}


def _front(metadata: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell: names of tasks and data come from files of anybody."""
    plain = " ".join(str(text).split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _quoted(text: str) -> str:
    return "\n".join(f"> {_cell(line)}" for line in text.splitlines())


def _percent(value: Mapping[str, float]) -> str:
    text = f"{100 * value['value']:.1f}"
    return f"{text} ({100 * value['low']:.1f}–{100 * value['high']:.1f})" if value["low"] < value["high"] else text


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['value']:+.1f} ({100 * value['low']:+.1f} … {100 * value['high']:+.1f})"
