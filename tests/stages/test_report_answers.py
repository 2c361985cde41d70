"""Facts about what the report says of single answers: their kind, the image they name, what a later model fixed and broke."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.outcomes import Kind
from polyground.records import Completion, Example, Rollout, Score
from polyground.stages.report.answers import (
    Asked,
    errors_of,
    image_confusion,
    in_turns,
    kinds_by_split,
    kinds_by_task,
    kinds_from_to,
    named_image,
    overlaps,
    right_image,
    turned,
    turned_samples,
)

HERE, THERE = Box(0.0, 0.0, 0.5, 0.5), Box(0.5, 0.5, 1.0, 1.0)
TWO = (Path("1.png"), Path("2.png"))
ONE_BOX, NOTHING, LETTER = Answer((Located(2, HERE),)), Answer(()), Answer(choice="B")


def question(target: Answer = ONE_BOX, *, key: str = "e", task: str = "diff", images: tuple[Path, ...] = TWO) -> Example:
    choices = ("one", "two") if target.choice else ()
    return Example(key=key, task=task, images=images, question="where?", target=target, choices=choices)


def said(answer: Answer | None, *, iou: float = 0.0, unreadable: str | None = None, truncated: bool = False) -> Rollout:
    score = Score(total=iou, parts={}, iou=iou, answer=answer, unreadable=unreadable)
    return Rollout(example="e", task="diff", completion=Completion(text="…", truncated=truncated), score=score)


def at(image: int | None, *more: int) -> Answer:
    return Answer(tuple(Located(number, THERE) for number in (image, *more)))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(at(2), "2", id="one"),
        pytest.param(at(2, 2), "2", id="twice-the-same"),
        pytest.param(at(1, 2), "several", id="several"),
        pytest.param(at(None), "none", id="none"),
        pytest.param(NOTHING, "no box", id="empty"),
        pytest.param(None, "no box", id="unreadable"),
    ],
)
def test_the_image_that_is_named(answer: Answer | None, expected: str) -> None:
    assert named_image(said(answer)) == expected


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        pytest.param(question(), 2, id="one"),
        pytest.param(question(images=TWO[:1]), None, id="a-single-image-has-no-other"),
        pytest.param(question(at(1, 2)), None, id="both"),
        pytest.param(question(NOTHING), None, id="nothing-there"),
        pytest.param(question(LETTER), None, id="a-letter"),
    ],
)
def test_the_image_that_is_right(example: Example, expected: int | None) -> None:
    assert right_image(example) == expected


RIGHT, LOOSE, LOST = said(ONE_BOX, iou=0.9), said(at(2), iou=0.2), said(None, unreadable="missing")

ASKED = [
    Asked("test", question(key="a", task="diff"), {"sft": LOOSE, "rl": RIGHT}),
    Asked("test", question(key="b", task="diff"), {"sft": LOST, "rl": RIGHT}),
    Asked("test", question(key="c", task="region"), {"sft": RIGHT, "rl": LOOSE}),
    Asked("ood_x", question(key="d", task="region"), {"sft": RIGHT, "rl": RIGHT}),
    Asked("ood_x", question(key="e", task="region"), {"sft": LOST, "rl": said(at(1))}),
]
TITLES = {"test": "In domain", "ood_x": "Out of domain"}


def test_what_was_fixed_and_broken_is_counted_over_all_and_by_split() -> None:
    found = turned(ASKED, "sft", "rl", TITLES, threshold=0.5)
    counts = {one.title: (one.gained, one.lost, one.kept, one.missed, one.asked) for one in found}
    assert counts == {"everything": (2, 1, 1, 1, 5), "In domain": (2, 1, 0, 0, 3), "Out of domain": (0, 0, 1, 1, 2)}
    assert "diff: gained 2 of 2" in found[0].drawing
    assert "region: lost 1 of 3" in found[0].drawing


def test_the_largest_changes_are_shown_first() -> None:
    gained, lost = turned_samples(ASKED, "sft", "rl", size=5, threshold=0.5)
    assert [one.example.key for one in gained] == ["b", "a"]  # from 0.0 and from 0.2 to 0.9
    assert [one.example.key for one in lost] == ["c"]
    assert turned_samples(ASKED, "sft", "rl", size=0, threshold=0.5) == ([], [])


def test_rows_of_kinds_add_up_and_kinds_that_never_occur_have_no_column() -> None:
    shares = kinds_from_to(ASKED, "sft", "rl", threshold=0.5)
    assert shares.columns == [Kind.RIGHT, Kind.WRONG_IMAGE, Kind.LOOSE]
    assert [(name, total) for name, total, _ in shares.rows] == [("right", 2), ("unreadable", 2), ("loose box", 1)]
    assert [[count for count, _ in cells] for *_, cells in shares.rows] == [[1, 0, 1], [1, 1, 0], [1, 0, 0]]
    by_task = kinds_by_task(ASKED, "rl", threshold=0.5)
    assert [name for name, *_ in by_task.rows] == ["diff", "region"]
    assert all(sum(share for _, share in cells) == pytest.approx(1) for *_, cells in by_task.rows)


def test_bars_say_their_counts() -> None:
    every, *splits = kinds_by_split(ASKED, ["sft", "rl"], TITLES, threshold=0.5)
    assert "RL, right: 3 of 5 (60.0 %)" in every.drawing
    assert "SFT, unreadable: 2 of 5 (40.0 %)" in every.drawing
    assert [facet.title for facet in splits] == ["In domain", "Out of domain"]


def test_examples_of_errors_leave_out_what_is_right() -> None:
    found = errors_of(ASKED, "rl", size=1, threshold=0.5)
    assert {kind: (count, [one.example.key for one in shown]) for kind, (count, shown) in found.items()} == {
        Kind.WRONG_IMAGE: (1, ["e"]),
        Kind.LOOSE: (1, ["c"]),
    }


def test_the_confusion_of_images_counts_pairs() -> None:
    every, *_ = image_confusion(ASKED, ["sft", "rl"], TITLES)
    drawings = dict(every.more)
    assert "2, 2: 4 of 5 (80 %)" in drawings["rl"]
    assert "2, 1: 1 of 5 (20 %)" in drawings["rl"]
    assert "2, no box: 2 of 5 (40 %)" in drawings["sft"]


def test_questions_without_several_images_have_no_confusion() -> None:
    assert image_confusion([Asked("test", question(LETTER), {"rl": said(LETTER, iou=1.0)})], ["rl"], TITLES) == []


def test_overlaps_are_of_questions_with_boxes() -> None:
    letters = Asked("test", question(LETTER, key="f"), {"sft": said(LETTER, iou=1.0), "rl": said(LETTER, iou=1.0)})
    every, *_ = overlaps([*ASKED, letters], ["sft", "rl"], TITLES, threshold=0.5)
    assert every.caption.startswith("5 questions")
    assert re.search(r">60 %<", every.drawing)  # RL reaches 0.5 in three of five
    [(_, columns)] = every.more
    assert "rl, 0.9: 3 of 5 (60.0 %)" in columns
    assert "sft, 0: 2 of 5 (40.0 %)" in columns


def test_one_split_needs_no_page_for_everything() -> None:
    assert [facet.title for facet in kinds_by_split(ASKED[:3], ["rl"], TITLES, threshold=0.5)] == ["In domain"]


def test_tasks_take_turns() -> None:
    assert [one.example.key for one in in_turns(ASKED)] == ["a", "c", "b", "d", "e"]
