"""What the page's tabs answer to their events, asked without a browser. Skipped where there is no gradio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import make_run

from polyground.answer import Answer, Located, Unreadable
from polyground.app.asking import Panel, Reply, Settings, entrants
from polyground.app.library import library_of
from polyground.geometry import Box
from polyground.records import Score

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'polyground[demo]'")

from polyground.app.ask_tab import Asked, AskTab, status_of  # noqa: E402 - these need gradio
from polyground.app.browse_tab import BrowseTab, marking  # noqa: E402

ANY = ([], [], [], "", 0, 1, "", "", False)
"""Every filter as it stands at the start."""


def at(image: int) -> Answer:
    return Answer((Located(image, Box(0.0, 0.0, 1.0, 1.0)),))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowseTab]:
    """Two questions with the answers of three models: RL is right on both, SFT and the base on none."""
    folder = tmp_path_factory.mktemp("tabs")
    run = make_run(folder / "run")
    library = library_of(run, options={}, answers={}, scratch=folder)
    with gradio.Blocks() as page:
        yield BrowseTab(page, library, folder)


def test_rows_are_counted_and_their_page_is_kept_in_range(tab: BrowseTab) -> None:
    status, at, rows, *_ = tab._show({}, 7, "evaluation · test", *ANY)
    assert "2 of 2 rows match · page 1 of 1 · 0 marked" in status
    assert (at, list(rows)) == (1, [0, 1])


def test_several_models_must_all_have_one_of_their_outcomes(tab: BrowseTab) -> None:
    ways = ["sft\tWRONG_BOX", "rl\tRIGHT"]
    _, rows = tab._rows({}, "evaluation · test", [], [], ways, *ANY[3:])
    assert list(rows) == [0, 1]
    _, rows = tab._rows({}, "evaluation · test", [], [], [*ways, "base\tRIGHT"], *ANY[3:])
    assert list(rows) == []


def test_a_reward_that_is_no_number_is_named(tab: BrowseTab) -> None:
    status, *_ = tab._show({}, 1, "evaluation · test", [], [], [], "", 0, 1, "high", "", False)
    assert "&#39;high&#39; is not a number" in status
    assert 'role="alert"' in status


def test_marks_are_of_one_shelf_and_are_exported(tab: BrowseTab) -> None:
    name = "evaluation · test"
    marked = marking(1)({}, [0, 1], name, True)
    assert marked == {name: {1}}
    assert marking(1)(marked, [0, 1], name, False) == {name: frozenset()}
    assert tab._mark_all(marked, name, *ANY) == {name: {0, 1}}
    status, file = tab._write(marked, name)
    path = Path(file["value"])
    assert "1 row is ready below." in status
    assert path.name == "evaluation-test.jsonl"
    assert [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()] == ["test/diff/1"]
    status, file = tab._write({}, name)
    assert "No row is marked here" in status


def test_asking_for_nothing_says_what_is_missing() -> None:
    panel = Panel(entrants("tiny", []))
    with gradio.Blocks():
        tab = AskTab(panel, [], Settings())
    [(note, *rest)] = tab._ask([], "where?", None, ["truth"], "", 64, 0.0, 0)
    assert "there is no image yet" in note
    assert len(rest) == 4  # pictures, what was asked, a text and a value
    note, sheet, *_ = tab._look([], None, Asked())
    assert ("Drop one or several images" in note, sheet) == (True, "")


@pytest.mark.parametrize(
    ("answer", "score", "has_truth", "expected"),
    [
        pytest.param(at(2), (0.9, 1.0), True, ("right (IoU 0.90): image 2", "good"), id="right"),
        pytest.param(at(1), (0.0, 0.0), True, ("wrong image (IoU 0.00): image 1", "bad"), id="image"),
        pytest.param(at(1), (0.0, 0.0), False, ("image 1", ""), id="nobody-knows"),
        pytest.param(Unreadable.MISSING, (0.0, 0.0), False, ("unreadable: missing", "bad"), id="unreadable"),
    ],
)
def test_right_and_wrong_are_told_where_the_truth_is_known(
    answer: Answer | Unreadable, score: tuple[float, float], has_truth: bool, expected: tuple[str, str]
) -> None:
    iou, image = score
    known = answer if isinstance(answer, Answer) else None
    scored = Score(total=iou, parts={}, iou=iou, image_correct=image, answer=known)
    reply = Reply(text="", answer=answer, told={}, score=scored, tokens=9, seconds=1.0)
    said, tone = status_of(reply, has_truth=has_truth)
    assert (said, tone) == (f"{expected[0]} · 9 tokens in 1.0 s", expected[1])
