"""Facts about what is drawn: boxes in pixels of the file, on the right image, and every text escaped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from polyground.answer import Answer, Located
from polyground.app.pictures import card, message, paint, pictures, view
from polyground.app.rows import Found, Said
from polyground.geometry import Box
from polyground.records import Completion, Example, Rollout, Score

HALF = Box(0.5, 0.0, 1.0, 0.5)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    for name, size in (("a.png", (640, 480)), ("b.png", (100, 200))):
        Image.new("RGB", size, "grey").save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


def edges(html: str) -> list[tuple[str, tuple[float, ...]]]:
    """(name, x, y, width, height) of the boxes of every image, in order."""
    marks = re.findall(
        r'data-name="([^"]+)".*?class="pg-edge" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', html, re.S
    )
    return [(name, tuple(map(float, corners))) for name, *corners in marks]


def test_a_box_is_drawn_in_pixels_of_the_file_on_its_image_alone(images: list[Path]) -> None:
    html = pictures(images, [("rl", 2, HALF)], paint(["truth", "rl"]))
    first, second = html.split("<figure")[1:]
    assert edges(first) == []
    assert edges(second) == [("rl", (50.0, 0.0, 50.0, 100.0))]
    assert 'aria-label="Image 2, b.png, 100 by 200 pixels; RL from 50, 0 to 100, 100"' in second


def test_a_box_that_names_no_image_is_drawn_on_all(images: list[Path]) -> None:
    assert [box[0] for box in edges(pictures(images, [("base", None, HALF)], paint(["base"])))] == ["base", "base"]


def test_labels_lie_above_all_boxes_of_their_image(images: list[Path]) -> None:
    html = pictures(images[:1], [("truth", 1, HALF), ("rl", 1, HALF)], paint(["truth", "rl"]))
    assert [place[1] for place in re.finditer(r'<g class="pg-(mark|label)"', html)] == ["mark", "mark", "label", "label"]


def test_every_model_has_a_colour_of_its_own() -> None:
    colours = paint(["truth", "base", "sft", "rl", "mine", "yours", "step 60"])
    assert len(set(colours.values())) == len(colours)


def test_an_image_that_cannot_be_read_is_shown_as_its_problem(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>", encoding="utf-8")
    shown = view(tmp_path / "page.png", 1, [], {}, side=100)
    assert "not a readable image but a web page" in shown.problem


def test_what_models_and_annotations_say_is_escaped(images: list[Path]) -> None:
    evil = "<script>alert(1)</script>"
    example = Example(key=evil, task=evil, images=tuple(images), question=evil, target=Answer((Located(1, HALF),)))
    score = Score(total=0.5, parts={evil: 1.0}, iou=1.0, image_correct=1.0, answer=Answer((Located(1, HALF),)))
    said = Said(name=evil, rollout=Rollout(example="q", task="t", completion=Completion(text=evil), score=score), advantage=0.5)
    for is_group in (False, True):
        html = card(Found(key=evil, task=evil, example=example, said=[said], is_group=is_group), threshold=0.5)
        assert "<script>" not in html
        assert "&lt;script&gt;" in html
    assert "<script>" not in message(evil)


def test_a_group_shows_reward_parts_and_advantages(images: list[Path]) -> None:
    example = Example(key="q", task="t", images=tuple(images), question="where?", target=Answer((Located(1, HALF),)))
    said = []
    for number, advantage in enumerate((1.25, -1.25), start=1):
        score = Score(total=0.9, parts={"iou": 0.875, "format": 1.0}, iou=0.875, answer=Answer((Located(1, HALF),)))
        rollout = Rollout(example="q", task="t", completion=Completion(text="<answer>[]</answer>"), score=score)
        said.append(Said(name=f"answer {number}", rollout=rollout, advantage=advantage))
    html = card(Found(key="q", task="t", example=example, said=said, is_group=True, facts={"step": 7}), threshold=0.5)
    assert all(text in html for text in ("+1.25", "-1.25", "0.900", "0.88", "step 7", ">format<", ">advantage<"))
    assert [name for name, _ in edges(html)] == ["truth", "answer 1", "answer 2"]
