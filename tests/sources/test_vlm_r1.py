"""VLM-R1 and Qwen fine-tuning rows: one image or several, answers that are text or numbers."""

from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.sources import read_source, scan_source
from polyground.sources.reading import collect, reasons_of

ASK = "Please provide the bounding box coordinate of the region this sentence describes: the cup."


def row(answer: Any, image: Any = "coco/1.jpg", asked: str = f"<image>{ASK}") -> dict[str, Any]:
    return {"id": 1, "image": image, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize(
    ("answer", "grid"),
    [
        pytest.param([20, 20, 100, 75], "pixels", id="numbers"),
        pytest.param("[20.0, 20.0, 100.0, 75.0]", "pixels", id="numbers-as-text"),
        pytest.param('```json\n[{"bbox_2d": [20, 20, 100, 75], "label": "the cup"}]\n```', "pixels", id="qwen"),
        pytest.param("<answer>[20, 20, 100, 75]</answer>", "pixels", id="answer-tag"),
        pytest.param("<ref>the cup</ref><box>[[100, 200, 500, 750]]</box>", "per_mille", id="internvl"),
    ],
)
def test_every_form_of_an_answer(tmp_path: Path, answer: Any, grid: str) -> None:
    write_images(tmp_path, "images/coco/1.jpg")
    file = write_rows(tmp_path / "refcoco_train.jsonl", [row(answer)])
    [example] = read_source("vlm_r1", file, images_root=tmp_path / "images", grid=grid)
    assert example.target == Answer((Located(1, Box(0.1, 0.2, 0.5, 0.75)),))
    assert (example.key, example.question) == ("vlm_r1/0", f"<image>{ASK}")
    assert_gold_scores_one([example])


def test_several_images_are_a_list(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg", "2.jpg")
    file = write_rows(tmp_path / "x.jsonl", [row("Image 2: [20, 20, 100, 75]", ["1.jpg", "2.jpg"], "<image><image>Where?")])
    [example] = read_source("vlm_r1", file, grid="pixels")
    assert (len(example.images), example.target.boxes[0].image) == (2, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(row("3"), "no_box", id="a-count-as-text"),
        pytest.param(row(3), "no_box", id="a-count"),
        pytest.param(row(None), "malformed", id="no-answer"),
        pytest.param(row("[20, 20, 100, 75]", []), "no_images", id="no-image"),
        pytest.param(row("[20, 20, 100, 75]", "/data/coco/1.jpg"), "unsafe_path", id="another-machine"),
        pytest.param(row("[20, 20, 100, 75]", ["1.jpg", "2.jpg"]), "placeholder_mismatch", id="one-placeholder-for-two"),
        pytest.param(row("[20, 20, 400, 75]"), "out_of_range", id="beyond-the-image"),
        pytest.param({"image": "1.jpg", "messages": []}, "malformed", id="no-conversations"),
    ],
)
def test_bad_rows(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    write_images(tmp_path, "coco/1.jpg", "1.jpg", "2.jpg")
    found = scan_source("vlm_r1", write_rows(tmp_path / "x.jsonl", [bad]), grid="pixels")
    assert reasons_of(collect(found)[1]) == {reason: 1}
