"""Average precision against values counted by hand, MC-Bench's weights and groups, and the bootstrap against pycocotools."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from polyground.detection import Corner, Found, Panel, Truth, average_precision, regroup
from polyground.errors import ConfigError

pytest.importorskip("pycocotools")

LEFT: Corner = (0, 0, 10, 10)
RIGHT: Corner = (50, 0, 10, 10)
NOWHERE: Corner = (80, 80, 10, 10)


def truth(box: Corner, group: int = 1, *, crowd: bool = False) -> Truth:
    return Truth(category=group, box=box, area=box[2] * box[3], crowd=crowd)


def found(box: Corner, confidence: float = 1.0, group: int = 1) -> Found:
    return Found(category=group, box=box, confidence=confidence)


# Precision is read at the 101 recalls 0, 0.01, … 1.
CASES = {
    "everything": ([LEFT, RIGHT], [(LEFT, 0.9), (RIGHT, 0.8)], 1.0),
    "nothing": ([LEFT], [], 0.0),
    "one of two": ([LEFT, RIGHT], [(LEFT, 0.9)], 51 / 101),
    "one of two, then a wrong box": ([LEFT, RIGHT], [(LEFT, 0.9), (NOWHERE, 0.8)], 51 / 101),
    "a wrong box between two right ones": ([LEFT, RIGHT], [(LEFT, 0.9), (NOWHERE, 0.8), (RIGHT, 0.7)], (51 + 50 * 2 / 3) / 101),
    "a wrong box that is surer": ([LEFT], [(NOWHERE, 0.9), (LEFT, 0.8)], 0.5),
    "the same box twice": ([LEFT, RIGHT], [(LEFT, 0.9), (LEFT, 0.8), (RIGHT, 0.7)], (51 + 50 * 2 / 3) / 101),
    "half of the box": ([LEFT], [((0, 0, 10, 5), 1.0)], 1.0),
    "less than half": ([LEFT], [((0, 0, 10, 4), 1.0)], 0.0),
}


@pytest.mark.parametrize(("truths", "answers", "expected"), CASES.values(), ids=CASES)
def test_average_precision_counted_by_hand(truths: list[Corner], answers: list[tuple[Corner, float]], expected: float) -> None:
    panel = Panel(question=0, truths=tuple(map(truth, truths)), found=tuple(found(box, score) for box, score in answers))
    value, draws = average_precision([panel])
    assert value == pytest.approx(expected)
    assert len(draws) == 0


def test_a_category_weighs_by_its_instances_or_like_every_other() -> None:
    first = Panel(
        question=0, truths=(truth(LEFT), truth(RIGHT), truth(NOWHERE)), found=(found(LEFT), found(RIGHT), found(NOWHERE))
    )
    missed = Panel(question=1, truths=(truth(LEFT, 2),))
    assert average_precision([first, missed], weights="instances")[0] == pytest.approx(0.75)
    assert average_precision([first, missed], weights="equal")[0] == pytest.approx(0.5)


def test_a_crowd_neither_earns_nor_costs() -> None:
    panel = Panel(question=0, truths=(truth(LEFT), truth(RIGHT, crowd=True)), found=(found(RIGHT, 0.9), found(LEFT, 0.8)))
    assert average_precision([panel])[0] == pytest.approx(1.0)


def test_nothing_annotated_has_no_average_precision() -> None:
    assert np.isnan(average_precision([Panel(question=0, found=(found(LEFT),))])[0])


def test_a_box_where_nothing_is_costs_precision() -> None:
    there = Panel(question=0, truths=(truth(LEFT),), found=(found(LEFT, 0.5),))
    assert average_precision([there, Panel(question=1, found=(found(LEFT, 0.9),))])[0] == pytest.approx(0.5)
    assert average_precision([there, Panel(question=1)])[0] == pytest.approx(1.0)


def noisy(questions: int) -> list[Panel]:
    rng = np.random.default_rng(0)
    panels = []
    for question in range(questions):
        for _ in range(2):
            corners = [(float(x), float(y), 20.0, 20.0) for x, y in rng.uniform(0, 60, size=(rng.integers(0, 3), 2))]
            shifted = [(x + float(rng.uniform(-8, 8)), y, 20.0, 20.0) for x, y, _, _ in corners]
            panels.append(
                Panel(
                    question=question,
                    truths=tuple(truth(corner, int(rng.integers(1, 3))) for corner in corners),
                    found=tuple(found(corner, float(rng.uniform())) for corner in [*shifted, NOWHERE]),
                )
            )
    return panels


@pytest.mark.parametrize("weights", ["instances", "equal"])
def test_a_question_drawn_as_often_as_all_others_changes_nothing(weights: str) -> None:
    # With one question alone every draw is that question, so the bootstrap must repeat what pycocotools said.
    one = [Panel(question=0, truths=panel.truths, found=panel.found) for panel in noisy(60)]
    value, draws = average_precision(one, weights=weights, bootstrap=3)  # type: ignore[arg-type]
    assert draws.tolist() == pytest.approx([value] * 3)
    assert 0 < value < 1


def test_bootstrap_draws_lie_around_the_value() -> None:
    value, draws = average_precision(noisy(200), ious=(0.5, 0.75), bootstrap=200, seed=1)
    assert len(draws) == 200
    low, high = np.quantile(draws, [0.025, 0.975])
    assert low < value < high
    assert np.array_equal(draws, average_precision(noisy(200), ious=(0.5, 0.75), bootstrap=200, seed=1)[1])


def test_the_answered_boxes_take_the_group_they_fit_best() -> None:
    panels = [
        Panel(question=0, truths=(truth(LEFT, 1), truth(RIGHT, 2)), found=(found(RIGHT),)),
        Panel(question=0, truths=(truth(LEFT, 2),), found=(found(LEFT),)),
    ]
    assert {box.category for panel in regroup(panels) for box in panel.found} == {2}
    assert average_precision(regroup(panels), weights="instances")[0] == pytest.approx(2 / 3)


def test_a_description_without_a_second_group_is_left_alone() -> None:
    panels = [Panel(question=0, truths=(truth(LEFT, 3),), found=(found(LEFT),))]
    assert regroup(panels) == panels


def test_without_pycocotools_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[eval\]'"):
        average_precision([Panel(question=0, truths=(truth(LEFT),))])


def test_pycocotools_does_not_print(capsys: pytest.CaptureFixture[str]) -> None:
    average_precision(noisy(2))
    assert capsys.readouterr().out == ""
