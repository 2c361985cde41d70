"""What the tests of readers share: files written in a layout, real small images, and gold answers scored."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyground.answer import write_answer
from polyground.config import RewardConfig
from polyground.geometry import PER_MILLE, Grid
from polyground.records import Example
from polyground.rewards import Scorer

SCORER = Scorer([RewardConfig(name="iou"), RewardConfig(name="image")])


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    """A JSON list, or JSON lines where the name ends so."""
    lines = file.suffix == ".jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return file


def write_images(folder: Path, *names: str, size: tuple[int, int] = (200, 100)) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "white").save(folder / name)


def assert_gold_scores_one(examples: Iterable[Example]) -> None:
    """Writing the annotation as a model would, on a grid of per mille and on one of pixels, earns the full reward."""
    for example in examples:
        for grid in (PER_MILLE, Grid(width=2000, height=1000)):
            grids = [grid] * len(example.images)
            text = f"<think>I see it.</think><answer>{write_answer(example.target, grids)}</answer>"
            score = SCORER.score(text, example, grids)
            assert (score.parts["iou"], score.parts["image"]) == (pytest.approx(1), 1), example
