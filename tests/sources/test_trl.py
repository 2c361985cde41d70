"""TRL's conversational rows: prompt, completion, messages, parts and strings, images beside and inside."""

from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import read_source, scan_source
from polyground.sources.reading import collect, reasons_of

IMAGE = {"type": "image"}
GOLD = Answer((Located(2, Box(0.1, 0.2, 0.5, 0.75)),))
ANSWER = '<think>The second has it.</think><answer>[{"image": 2, "bbox_2d": [100, 200, 500, 750]}]</answer>'
SOLUTION = '<answer>[{"image": 2, "bbox_2d": [100, 200, 500, 750]}]</answer>'


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


ASKED = said("user", IMAGE, IMAGE, text("Find the cup."))
PROMPT = {"prompt": [ASKED], "images": ["a.png", "b.png"]}

LAYOUTS = [
    pytest.param({**PROMPT, "completion": [said("assistant", text(ANSWER))]}, id="prompt-completion"),
    pytest.param({"messages": [ASKED, said("assistant", text(ANSWER))], "images": ["a.png", "b.png"]}, id="messages"),
    pytest.param({**PROMPT, "completion": [{"role": "assistant", "content": ANSWER}]}, id="completion-of-text"),
    pytest.param({**PROMPT, "solution": SOLUTION}, id="prompt-only-with-solution"),
    pytest.param({**PROMPT, "answer": SOLUTION, "solution": None}, id="prompt-only-with-answer"),
    pytest.param({**PROMPT, "ground_truth": [{"image": 2, "bbox_2d": [100, 200, 500, 750]}]}, id="answer-that-is-no-text"),
    pytest.param(
        {"prompt": "<image><image>Find the cup.", "completion": ANSWER, "images": ["a.png", "b.png"]}, id="standard-format"
    ),
    pytest.param(
        {
            "messages": [
                said("system", text("Be kind.")),
                said("user", {**IMAGE, "image": "a.png"}, {**IMAGE, "path": "b.png"}, text("Find the cup.")),
                said("assistant", text(ANSWER)),
            ]
        },
        id="images-named-in-the-parts",
    ),
    pytest.param(
        {**PROMPT, "images": [{"path": "a.png", "bytes": None}, {"path": "b.png", "bytes": None}], "solution": SOLUTION},
        id="images-as-datasets-keeps-them",
    ),
]


def only(folder: Path, row: Any, **options: Any) -> Example:
    [example] = read_source("trl", write_rows(folder / "rows.jsonl", [row]), grid="per_mille", **options)
    return example


@pytest.mark.parametrize("row", LAYOUTS)
def test_every_layout_gives_the_same_example(tmp_path: Path, row: dict[str, Any]) -> None:
    write_images(tmp_path, "a.png", "b.png")
    example = only(tmp_path, row)
    assert example.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert (example.question, example.target) == ("<image><image>Find the cup.", GOLD)
    assert_gold_scores_one([example])


def test_a_string_content_has_all_images_first(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    example = only(tmp_path, {**PROMPT, "prompt": [{"role": "user", "content": "Find the cup."}], "solution": SOLUTION})
    assert (len(example.images), example.question) == (2, "Find the cup.")


def test_reasoning_of_the_completion_is_kept(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    example = only(tmp_path, {**PROMPT, "completion": [said("assistant", text(ANSWER))]})
    assert example.meta["reasoning"] == "The second has it."


def test_the_answer_may_have_a_field_of_its_own(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    row = {**PROMPT, "gold": {"boxes": SOLUTION}}
    assert only(tmp_path, row, answer="gold.boxes").target == GOLD
    file = write_rows(tmp_path / "rows.jsonl", [row])
    assert reasons_of(collect(scan_source("trl", file, answer="truth"))[1]) == {"no_answer": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(PROMPT, "no_answer", id="no-answer-anywhere"),
        pytest.param({**PROMPT, "images": ["a.png"], "solution": SOLUTION}, "placeholder_mismatch", id="an-image-too-few"),
        pytest.param({**PROMPT, "images": [], "solution": SOLUTION}, "no_images", id="no-images"),
        pytest.param({**PROMPT, "prompt": [said("user", {"type": "video"})]}, "malformed", id="video-part"),
        pytest.param({**PROMPT, "prompt": 7}, "malformed", id="prompt-no-list"),
        pytest.param({"images": ["a.png"]}, "malformed", id="no-prompt"),
        pytest.param(
            {**PROMPT, "images": [{"bytes": "AAAA", "path": None}], "solution": SOLUTION}, "malformed", id="bytes-in-json"
        ),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [row])
    assert reasons_of(collect(scan_source("trl", file, grid="per_mille"))[1]) == {reason: 1}
