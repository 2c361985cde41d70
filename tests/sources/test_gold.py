"""Facts that hold for every source: its gold answers score one, and no prompt shows them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import FIXTURES, SECRET

from polyground.answer import Answer, Located, write_completion
from polyground.geometry import FULL_IMAGE, PER_MILLE, Grid
from polyground.imagefile import image_size
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.rewards import Scorer
from polyground.sources import SOURCES, BadRow, read_source, scan_source


@dataclass(frozen=True)
class Spec:
    name: str
    weight: float = 0.2
    options: dict[str, Any] = field(default_factory=dict)


SCORER = Scorer([Spec("iou"), Spec("image"), Spec("count"), Spec("choice"), Spec("format")])


def per_mille(example: Example) -> Sequence[Grid]:
    return [PER_MILLE] * len(example.images)


def pixels(example: Example) -> Sequence[Grid]:
    return [Grid(width=width, height=height) for width, height in map(image_size, example.images)]


def read(kind: str, folder: Path) -> list[Example]:
    source, write = FIXTURES[kind]
    path, options = write(folder)
    return read_source(source, path, check_images="decode", **options)


def prompt_of(example: Example, grids: Sequence[Grid]) -> str:
    return "".join(str(part) for message in student_messages(example, grids) for part in message.parts)


every_source = pytest.mark.parametrize("kind", FIXTURES)


def test_every_source_has_a_fixture() -> None:
    assert {source for source, _ in FIXTURES.values()} == set(SOURCES), "give the new source a writer in source_fixtures.py"


@every_source
@pytest.mark.parametrize("grids_of", [per_mille, pixels])
def test_gold_answers_score_one(tmp_path: Path, kind: str, grids_of: Any) -> None:
    examples = read(kind, tmp_path)
    assert examples
    for example in examples:
        grids = grids_of(example)
        score = SCORER.score(write_completion("I looked.", example.target, grids), example, grids)
        assert (score.total, score.iou, score.unreadable) == (pytest.approx(1.0), pytest.approx(1.0), None), example.key


@every_source
def test_a_wrong_answer_scores_less_than_one(tmp_path: Path, kind: str) -> None:
    for example in read(kind, tmp_path):
        wrong = Answer(choice="Z") if example.target.choice else Answer((Located(1, FULL_IMAGE), Located(1, FULL_IMAGE)))
        grids = per_mille(example)
        assert SCORER.score(write_completion("I guess.", wrong, grids), example, grids).total < 0.9, example.key


@every_source
def test_prompts_show_neither_the_answer_nor_what_hides_it(tmp_path: Path, kind: str) -> None:
    for example in read(kind, tmp_path):
        grids = per_mille(example)
        prompt = prompt_of(example, grids)
        assert SECRET not in prompt
        assert SECRET not in json.dumps(example.to_json())
        for located in example.target.boxes:
            assert str(list(grids[(located.image or 1) - 1].write(located.box))) not in prompt
        blank = replace(example, meta={}, target=Answer((Located(1, FULL_IMAGE),)))
        assert prompt_of(blank, grids) == prompt


@every_source
def test_examples_survive_json_and_their_keys_differ(tmp_path: Path, kind: str) -> None:
    examples = read(kind, tmp_path)
    assert [Example.from_json(json.loads(json.dumps(example.to_json()))) for example in examples] == examples
    assert len({example.key for example in examples}) == len(examples)
    assert all(example.images for example in examples)


@every_source
def test_reading_twice_gives_the_same(tmp_path: Path, kind: str) -> None:
    source, write = FIXTURES[kind]
    path, options = write(tmp_path)
    first, second = (list(scan_source(source, path, **options)) for _ in range(2))
    assert first == second
    assert not [item for item in first if isinstance(item, BadRow)]
