"""Benchmarks as tasks of lmms-eval: what the `utils.py` of an exported task calls, and the text of its files.

The rows, the prompt, the rule of every reply and the headline are those of `evaluate` and `score`; lmms-eval brings the models.
It is not imported here, and need not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import nan
from pathlib import Path
from typing import Any

import yaml

from polyground.benchmarks import BENCHMARKS, Annotation, Benchmark, Table, judge, place_of, tabulate, unanswered
from polyground.conventions import load_convention, named_grid
from polyground.detection import require_pycocotools
from polyground.geometry import Grid
from polyground.imagefile import image_size
from polyground.prompts import INSTRUCTIONS, PROMPT_VERSION, student_messages
from polyground.records import Completion, Example, Rollout
from polyground.storage import read_json
from polyground.vision import load_image

LAYOUT = {"lmms-eval": "a task of lmms-eval made of a benchmark's annotation: YAML, utils.py, rows"}
"""What a benchmark can be exported as, by the name `polyground export ANNOTATION --to` takes."""

ROWS, SETTINGS = "rows.jsonl", "settings.json"

UTILS = '''"""Written by `polyground export … --to lmms-eval`; what is done lives in polyground.lmms_eval."""

from pathlib import Path

from polyground import lmms_eval

HERE = Path(__file__).parent
lmms_eval.require(HERE)


def doc_to_visual(doc):
    return lmms_eval.pictures(doc)


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return lmms_eval.text(doc, HERE)


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    return lmms_eval.messages(doc, HERE)


def process_results(doc, results):
    return lmms_eval.scored(doc, results[0], HERE)


'''

_AGGREGATE = """def {name}(items):
    return lmms_eval.aggregated(items, "{name}", HERE)
"""


# ---------------------------------------------------------------- the files


FURTHER = {"mc_bench": ["image_level", "abstained_where_nothing_is"], "ref_l4": ["mean_accuracy"]}
"""What single benchmarks publish beside their headline, by the names of `benchmarks.tabulate`."""


def measures(benchmark: Benchmark) -> list[str]:
    """The metrics of a task: the benchmark's headline first."""
    if benchmark.in_letters:
        return ["headline", "unreadable"]
    return ["headline", *FURTHER.get(benchmark.name, []), "mean_iou", "one_to_one", "image_accuracy", "unreadable"]


def task_yaml(benchmark: Benchmark, rows: Path, *, max_tokens: int, about: Mapping[str, Any]) -> str:
    """The task's file; `!function` is lmms-eval's own tag."""
    tree = {
        "task": f"polyground_{benchmark.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        **{name: _Function(f"utils.{name}") for name in ("doc_to_visual", "doc_to_text", "doc_to_messages")},
        "doc_to_target": "target",
        "process_results": _Function("utils.process_results"),
        "generation_kwargs": {"max_new_tokens": max_tokens, "temperature": 0, "do_sample": False},
        "metric_list": [
            {"metric": name, "aggregation": _Function(f"utils.{name}"), "higher_is_better": name != "unreadable"}
            for name in measures(benchmark)
        ],
        "metadata": [{"version": 1.0, **about}],
    }
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Function(str):
    """A name that lmms-eval looks up in the task's utils.py."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def utils_py(benchmark: Benchmark) -> str:
    """The module beside the task's file."""
    return UTILS + "\n\n".join(_AGGREGATE.format(name=name) for name in measures(benchmark))


def rows_of(annotation: Annotation) -> list[dict[str, Any]]:
    """The questions as lmms-eval keeps them: columns of text, the whole example among them."""
    return [
        {
            "key": example.key,
            "number": number,
            "task": example.task,
            "question": example.question,
            "target": json.dumps(example.to_json()["target"]),
            "images": [str(image) for image in example.images],
            "example": json.dumps(example.to_json()),
        }
        for number, example in enumerate(annotation.examples)
    ]


def settings_of(annotation: Annotation, *, answers: Mapping[str, Any], instruction: str) -> dict[str, Any]:
    """What the functions of a task need besides the rows; `answers` says the grid (or the model) and the native form."""
    alone = annotation.examples[0].task
    return {
        "benchmark": annotation.benchmark.name,
        "questions": len(annotation.examples),
        "wrong": [[row.key, place_of(row.key).rpartition("/")[0] or alone] for row in annotation.wrong],
        "instruction": instruction,
        "prompt_version": PROMPT_VERSION,
        **answers,
    }


# ---------------------------------------------------------------- what a task does


def require(here: Path) -> None:
    """Raises ConfigError, before a model is asked anything, where the task's headline needs a library that is not there."""
    if BENCHMARKS[_settings(here)["benchmark"]].headline == "average_precision":
        require_pycocotools()


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """The images of a question, upright and RGB, in the order the question counts them."""
    return [load_image(Path(image)) for image in doc["images"]]


def text(doc: Mapping[str, Any], here: Path) -> str:
    """The question for models that get all images first: what stands in an image's place is its number."""
    example = _example(doc)
    for number in range(1, example.question.count("<image>") + 1):
        example = replace(example, question=example.question.replace("<image>", f"image {number}", 1))
    parts = _parts(example, here)
    return "".join(part for part in parts[_after_images(parts) :] if isinstance(part, str)).strip()


def messages(doc: Mapping[str, Any], here: Path) -> list[dict[str, Any]]:
    """The conversation for chat models, images where the question has them."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": load_image(part)}
        for part in _parts(_example(doc), here)
    ]
    return [{"role": "user", "content": content}]


def scored(doc: Mapping[str, Any], reply: str, here: Path) -> dict[str, Any]:
    """One reply by the benchmark's rule: what every metric of the task is made of."""
    settings, example = _settings(here), _example(doc)
    benchmark = BENCHMARKS[settings["benchmark"]]
    score = judge(benchmark, reply, example, _grids(example, settings), native=settings["native"])
    rollout = Rollout(example=example.key, task=example.task, completion=Completion(text=reply), score=score)
    item = {"number": doc["number"], "rollout": rollout.to_json(), "example": doc["example"]}
    return dict.fromkeys(measures(benchmark), item)


def aggregated(items: Sequence[Mapping[str, Any]], measure: str, here: Path) -> float:
    """One metric over all replies. Rows with a bad annotation count as wrong, as published, where every question was asked.

    NaN for the average precision of questions none of which has an instance (`--limit`), and for a share of no question.
    """
    settings = _settings(here)
    benchmark = BENCHMARKS[settings["benchmark"]]
    # Several processes give their replies in another order, and boxes that are as sure rank in the order of the questions.
    items = sorted(items, key=lambda item: item["number"])
    rollouts = [Rollout.from_json(item["rollout"]) for item in items]
    examples = [Example.from_json(json.loads(item["example"])) for item in items]
    if benchmark.headline == "average_precision":
        if measure != "headline":
            benchmark = replace(benchmark, headline="accuracy")
        elif not any(example.target.boxes for example in examples):
            return nan
    if len(rollouts) == settings["questions"]:
        rollouts += [unanswered(key, task, reason=None) for key, task in settings["wrong"]]
    return _value(benchmark, tabulate(benchmark, rollouts, examples, bootstrap=0), measure)


def _value(benchmark: Benchmark, table: Table, measure: str) -> float:
    whole = table.summary.macro if benchmark.average == "tasks" else table.summary.micro
    match measure:
        case "headline":
            return table.headline.value
        case "mean_iou":
            return whole.mean_iou.value
        case "image_accuracy":
            # No reply named an image: none was right.
            return 0.0 if whole.image_accuracy is None else whole.image_accuracy.value
        case "unreadable":
            return whole.unreadable_rate
        case _:
            found = whole.measures[measure]
            return nan if found is None else found.value


def _example(doc: Mapping[str, Any]) -> Example:
    return Example.from_json(json.loads(doc["example"]))


def _parts(example: Example, here: Path) -> tuple[str | Path, ...]:
    settings = _settings(here)
    instruction = INSTRUCTIONS.get(settings["instruction"])
    words = "" if instruction is None else instruction.boxes if example.target.choice is None else instruction.choice
    [message] = student_messages(example, _grids(example, settings), instruction=words)
    return message.parts


def _after_images(parts: Sequence[str | Path]) -> int:
    return max((place + 1 for place, part in enumerate(parts) if isinstance(part, Path)), default=0)


def _grids(example: Example, settings: Mapping[str, Any]) -> Sequence[Grid]:
    if settings["model"] is None:
        needs_size = settings["grid"] == "pixels"
        sizes = [image_size(image) if needs_size else (1, 1) for image in example.images]
        return [named_grid(settings["grid"], width, height) for width, height in sizes]
    convention = _convention(settings["model"], settings["max_pixels"], settings["max_pixels_total"])
    return convention.grids([(1, 1) if convention.per_mille else image_size(image) for image in example.images])


@cache
def _convention(model: str, max_pixels: int | None, max_pixels_total: int | None) -> Any:
    return load_convention(model, max_pixels=max_pixels, max_pixels_total=max_pixels_total)


@cache
def _settings(here: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(here / SETTINGS)
    return found
