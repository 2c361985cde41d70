"""Rows and a whole run of two questions, small enough to see by eye."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.records import Completion, Example, Rollout, Score

BOX = Box(0.25, 0.25, 0.75, 0.75)


def example(number: int, *, task: str = "diff", images: int = 2) -> Example:
    paths = tuple(Path(f"images/{number}_{i}.png") for i in range(images))
    return Example(key=f"q{number}", task=task, images=paths, question="where?", target=Answer((Located(2, BOX),)))


def rollout(key: str, *, iou: float = 0.0, image: float | None = 1.0, unreadable: str | None = None, sample: int = 0) -> Rollout:
    score = Score(
        total=0.9 * iou + 0.1,
        parts={"iou": iou, "format": 1.0},
        iou=iou,
        image_correct=image,
        unreadable=unreadable,
        answer=None if unreadable else Answer((Located(2, BOX),)),
    )
    text = "<think>The star.</think><answer>[]</answer>"
    return Rollout(example=key, task="diff", completion=Completion(text=text), score=score, sample=sample)


def write(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_run(run: Path) -> Path:
    """A run of two questions in the layout of the simulated world, with evaluation, rejection, synthesis and one GRPO step."""
    world = run / "world" / "rl"
    (world / "images").mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (40, 30), "white").save(world / "images" / f"{name}.png")
    question = {"task": "diff", "question": "Which object of image 2 is new?", "additional_info": "", "need_format": True}
    rows = [
        {**question, "images": [f"images/{x}.png", f"images/{y}.png"], "answer": [0.2, 0.2, 0.6, 0.6]} for x, y in ("ab", "cd")
    ]
    text = json.dumps(rows)
    for split in ("rl", "test"):
        folder = run / "world" / split
        folder.mkdir(exist_ok=True)
        (folder / "MIG_data.json").write_text(text, encoding="utf-8")
    (run / "world" / "test" / "images").symlink_to(world / "images")
    for role, iou in (("base", 0.0), ("sft", 0.4), ("rl", 0.8)):
        write(run / "evaluate" / role / "test.jsonl", [rollout(f"test/diff/{n}", iou=iou).to_json() for n in (0, 1)])
    group = [rollout("rl/diff/0", iou=n / 3, sample=n) for n in range(4)]
    write(
        run / "grpo" / "rollouts.jsonl",
        [{"step": step, "advantage": n - 1.5, **one.to_json()} for step in (0, 1) for n, one in enumerate(group)],
    )
    write(
        run / "reject" / "rollouts.jsonl",
        [
            {
                "key": "rl/diff/0",
                "task": "diff",
                "pass_rate": 0.5,
                "mean_reward": 0.6,
                "rollouts": [one.to_json() for one in group],
            }
        ],
    )
    dropped = {"key": "rl/diff/1", "task": "diff", "reason": "wrong_box", "text": "<think>No.</think>", "attempts": 3}
    write(run / "synthesize" / "rejected.jsonl", [dropped])
    return run
