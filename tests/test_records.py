"""Facts about the rows between stages: every record survives JSON unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.records import Completion, Example, Message, Rollout, Score, answer_from_json, answer_to_json

BOX = Box(0.1, 0.2, 0.5, 0.75)
EXAMPLE = Example(
    key="mig/7",
    task="diff",
    images=(Path("a.png"), Path("b/c.png")),
    question="Where is <box> in <image>?",
    target=Answer((Located(2, BOX), Located(None, BOX))),
    question_boxes=(Located(1, BOX),),
    meta={"split": "test", "version": 1},
)
COMPLETION = Completion(text="<answer>B</answer>", token_ids=(5, 6), logprobs=(-0.1, -2.0), truncated=True)
SCORE = Score(total=0.7, parts={"iou": 0.5, "format": 1.0}, iou=0.5, image_correct=1.0, answer=Answer(choice="B"))


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(EXAMPLE, id="example"),
        pytest.param(dataclasses.replace(EXAMPLE, target=Answer(choice="A"), choices=("a cat", "a dog")), id="choice"),
        pytest.param(dataclasses.replace(EXAMPLE, target=Answer(), images=()), id="nothing-to-find"),
        pytest.param(Message("user", ("Image 1: ", Path("a.png"), "\nwhere?")), id="message"),
        pytest.param(COMPLETION, id="completion"),
        pytest.param(Completion(text="hm"), id="completion-without-tokens"),
        pytest.param(SCORE, id="score"),
        pytest.param(Score(total=0.0, parts={}, unreadable="missing"), id="unreadable"),
        pytest.param(Rollout(example="mig/7", task="diff", completion=COMPLETION, score=SCORE, sample=3), id="rollout"),
    ],
)
def test_a_record_survives_json(record: Any) -> None:
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("answer", [Answer(), Answer(choice="C"), Answer((Located(None, BOX),)), Answer((Located(1, BOX),) * 2)])
def test_an_answer_survives_json(answer: Answer) -> None:
    assert answer_from_json(json.loads(json.dumps(answer_to_json(answer)))) == answer


def test_a_record_cannot_be_edited() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXAMPLE.task = "region"  # type: ignore[misc]


def test_the_images_of_a_message_are_its_paths_in_order() -> None:
    assert Message("user", (Path("b.png"), "and", Path("a.png"))).images == (Path("b.png"), Path("a.png"))
