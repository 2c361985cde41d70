"""Facts about the text contract: what is written can be read, and nothing a model writes raises."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyground.answer import (
    MAX_BOXES,
    NATIVE_READERS,
    NATIVE_WRITERS,
    Answer,
    Located,
    Unreadable,
    answers_directly,
    follows_contract,
    read_answer,
    reasoning_of,
    write_answer,
    write_completion,
    write_native,
)
from polyground.geometry import FULL_IMAGE, PER_MILLE, Box, Grid

TWO = [PER_MILLE, PER_MILLE]
BOX = Box(0.1, 0.2, 0.5, 0.75)
ROW = '{"image": 2, "bbox_2d": [100, 200, 500, 750]}'
GOOD = Answer((Located(2, BOX),))


def rows(*found: dict[str, object]) -> str:
    return f"<think>t</think><answer>{json.dumps(found)}</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"<think>t</think><answer>[{ROW}]</answer>", GOOD, id="the-contract"),
        pytest.param(f"<answer>{ROW}</answer>", GOOD, id="one-object-without-a-list"),
        pytest.param(f"<answer>\n [{ROW}] \n</answer> done", GOOD, id="white-space"),
        pytest.param("<answer>[]</answer>", Answer(), id="not-there"),
        pytest.param("<answer>B</answer>", Answer(choice="B"), id="choice"),
        pytest.param("<answer>(B)</answer>", Answer(choice="B"), id="choice-in-brackets"),
        pytest.param("<answer>B. Because of the red star</answer>", Unreadable.MALFORMED, id="choice-with-prose"),
        pytest.param("", Unreadable.MISSING, id="nothing"),
        pytest.param(f"<think>{ROW}</think>", Unreadable.MISSING, id="box-only-in-think"),
        pytest.param(f"<think><answer>[{ROW}]</answer></think>", Unreadable.MISSING, id="answer-only-in-think"),
        pytest.param(f"<think><answer>B</answer></think><answer>[{ROW}]</answer>", GOOD, id="answer-in-think-and-after"),
        pytest.param(f"B?</think><answer>[{ROW}]</answer>", GOOD, id="thought-opened-in-the-prompt"),
        pytest.param(
            f"<answer>[{ROW}]</answer>?</think>", Unreadable.MISSING, id="answer-only-in-a-thought-opened-in-the-prompt"
        ),
        pytest.param(f"<answer>[{ROW}", Unreadable.MISSING, id="cut-short"),
        pytest.param("<answer></answer>", Unreadable.MALFORMED, id="empty-tag"),
        pytest.param("<answer>the left one</answer>", Unreadable.MALFORMED, id="prose"),
        pytest.param('<answer>[{"image": 2}]</answer>', Unreadable.MALFORMED, id="no-box"),
        pytest.param('<answer>["a"]</answer>', Unreadable.MALFORMED, id="not-an-object"),
        pytest.param("<answer>" + "[" * 100_000 + "</answer>", Unreadable.MALFORMED, id="nested-too-deep"),
        pytest.param("<answer>" + "9" * 10_000 + "</answer>", Unreadable.MALFORMED, id="a-very-long-number"),
        pytest.param(f"<answer>B</answer> no: <answer>[{ROW}]</answer>", GOOD, id="the-last-of-two"),
        pytest.param(f"<answer>[{ROW}]</answer><answer>hm</answer>", GOOD, id="the-last-well-formed-of-two"),
        pytest.param(f"<answer>hm</answer><answer>[{ROW}", Unreadable.MALFORMED, id="the-reason-of-the-last-whole-one"),
        pytest.param(f"<answer><answer>[{ROW}]</answer>", GOOD, id="opened-twice"),
    ],
)
def test_an_answer_is_read_or_has_a_named_reason(text: str, expected: Answer | Unreadable) -> None:
    assert read_answer(text, TWO) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"image": 1, "bbox_2d": [500, 200, 100, 750]}, Unreadable.INVERTED, id="inverted"),
        pytest.param({"image": 1, "bbox_2d": [100, 200, 100, 750]}, Unreadable.INVERTED, id="no-area"),
        pytest.param({"image": 1, "bbox_2d": [1100, 0, 1200, 750]}, Unreadable.OFF_IMAGE, id="off-image"),
        pytest.param({"image": 1, "bbox_2d": [-900, 0, 9000, 9000]}, Answer((Located(1, FULL_IMAGE),)), id="huge-is-clipped"),
        pytest.param({"image": 1, "bbox_2d": [0, 0, 10**12, 10]}, Unreadable.MALFORMED, id="absurd"),
        pytest.param({"image": 1, "bbox_2d": [0, 0, float("nan"), 10]}, Unreadable.MALFORMED, id="nan"),
        pytest.param({"image": 1, "bbox_2d": [0, 0, float("inf"), 10]}, Unreadable.MALFORMED, id="infinite"),
        pytest.param({"image": 1, "bbox_2d": [0, 0, "9", 10]}, Unreadable.MALFORMED, id="a-string"),
        pytest.param({"image": 1, "bbox_2d": [0, 0, True, 10]}, Unreadable.MALFORMED, id="a-boolean"),
        pytest.param({"image": 1, "bbox_2d": [0, 0, 10]}, Unreadable.MALFORMED, id="three-numbers"),
        pytest.param({"image": 0, "bbox_2d": [0, 0, 10, 10]}, Unreadable.BAD_IMAGE, id="image-zero"),
        pytest.param({"image": 3, "bbox_2d": [0, 0, 10, 10]}, Unreadable.BAD_IMAGE, id="image-three-of-two"),
        pytest.param({"image": 10**30, "bbox_2d": [0, 0, 10, 10]}, Unreadable.BAD_IMAGE, id="image-absurd"),
        pytest.param({"image": "2", "bbox_2d": [0, 0, 10, 10]}, Unreadable.MALFORMED, id="image-a-string"),
        pytest.param({"image": True, "bbox_2d": [0, 0, 10, 10]}, Unreadable.MALFORMED, id="image-a-boolean"),
        pytest.param({"bbox_2d": [0, 0, 10, 10]}, Unreadable.MALFORMED, id="image-not-named"),
        pytest.param({"image": 2, "bbox_2d": [100.0, 200.0, 500.0, 750.0]}, GOOD, id="decimals"),
    ],
)
def test_a_bad_box_is_named_for_what_is_wrong(row: dict[str, object], expected: Answer | Unreadable) -> None:
    assert read_answer(rows(row), TWO) == expected


def test_with_one_image_its_number_may_be_left_out() -> None:
    assert read_answer(rows({"bbox_2d": [100, 200, 500, 750]}), [PER_MILLE]) == Answer((Located(1, BOX),))


def test_without_images_no_box_can_be_read() -> None:
    for text in (rows({"bbox_2d": [0, 0, 10, 10]}), rows({"image": 1, "bbox_2d": [0, 0, 10, 10]})):
        assert read_answer(text, []) is Unreadable.BAD_IMAGE
    assert read_answer('[{"bbox_2d": [0, 0, 10, 10]}]', [], native="qwen_json") is Unreadable.BAD_IMAGE


def test_duplicate_boxes_are_kept_for_the_scorer_to_punish() -> None:
    row = {"image": 2, "bbox_2d": [100, 200, 500, 750]}
    assert read_answer(rows(row, row), TWO) == Answer((Located(2, BOX),) * 2)


def test_a_runaway_list_is_not_an_answer() -> None:
    row = {"image": 1, "bbox_2d": [0, 0, 10, 10]}
    assert isinstance(read_answer(rows(*[row] * MAX_BOXES), TWO), Answer)
    assert read_answer(rows(*[row] * (MAX_BOXES + 1)), TWO) is Unreadable.TOO_MANY


def test_each_box_is_read_on_the_grid_of_its_own_image() -> None:
    grids = [Grid(100, 100), Grid(200, 400)]
    text = rows({"image": 1, "bbox_2d": [10, 20, 50, 75]}, {"image": 2, "bbox_2d": [20, 80, 100, 300]})
    assert read_answer(text, grids) == Answer((Located(1, BOX), Located(2, BOX)))


@pytest.mark.parametrize(
    ("native", "text", "expected"),
    [
        pytest.param("qwen_json", '```json\n[{"bbox_2d": [100, 200, 500, 750], "label": "star"}]\n```', BOX, id="qwen-fenced"),
        pytest.param("qwen_json", '{"bbox_2d": [100, 200, 500, 750]}', BOX, id="qwen-single"),
        pytest.param("qwen_json", f"<think>{ROW}</think>", None, id="qwen-only-in-think"),
        pytest.param("qwen_json", '<think>so [{"bbox_2d": [100, 200, 500, 750]}]', None, id="qwen-in-a-thought-cut-short"),
        pytest.param("qwen_json", 'hm</think>[{"bbox_2d": [100, 200, 500, 750]}]', BOX, id="qwen-thought-opened-in-the-prompt"),
        pytest.param("qwen_tokens", "<|box_start|>(100,200),(500,750)<|box_end|>", BOX, id="qwen2"),
        pytest.param("internvl", "<ref>star</ref><box>[[100, 200, 500, 750]]</box>", BOX, id="internvl"),
        pytest.param("internvl", "no box", None, id="internvl-none"),
    ],
)
def test_native_forms_are_read_where_no_tag_is(native: str, text: str, expected: Box | None) -> None:
    answer = read_answer(text, TWO, native=native)
    assert answer == (Unreadable.MISSING if expected is None else Answer((Located(None, expected),)))


def test_a_tag_wins_over_a_native_form() -> None:
    assert read_answer(f'[{{"bbox_2d": [0, 0, 9, 9]}}]<answer>[{ROW}]</answer>', TWO, native="qwen_json") == GOOD


def test_a_native_choice_is_the_whole_reply() -> None:
    assert read_answer("<think>B or C</think> (C)", TWO, native="qwen_json") == Answer(choice="C")
    assert read_answer("C is for cat", TWO, native="qwen_json") is Unreadable.MISSING


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    if draw(st.booleans()):
        return Answer(choice=draw(st.sampled_from("ABCDEFGH")))
    found = []
    for _ in range(draw(st.integers(0, 5))):
        x0, y0 = draw(st.integers(0, 999)), draw(st.integers(0, 999))
        x1, y1 = draw(st.integers(x0 + 1, 1000)), draw(st.integers(y0 + 1, 1000))
        found.append(Located(draw(st.integers(1, 3)), Box(x0 / 1000, y0 / 1000, x1 / 1000, y1 / 1000)))
    return Answer(tuple(found))


@given(answers())
def test_what_is_written_is_read_back(answer: Answer) -> None:
    text = write_completion("a red star", answer, [PER_MILLE] * 3)
    assert follows_contract(text)
    assert reasoning_of(text) == "a red star"
    assert read_answer(text, [PER_MILLE] * 3) == answer
    assert read_answer(f"<answer>[]</answer>{text}", [PER_MILLE] * 3) == answer


WIDE = Grid(width=1400, height=700)
TOKENS = r"<\|?/?[a-z_]+\|?>"


def test_every_native_form_is_read_and_written() -> None:
    assert set(NATIVE_READERS) - {"any"} == set(NATIVE_WRITERS)


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ("qwen_json", '```json\n[{"bbox_2d": [100, 200, 500, 750], "label": "cup"}]\n```'),
        ("qwen_tokens", "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(500,750)<|box_end|>"),
        ("internvl", "<ref>cup</ref><box>[[100, 200, 500, 750]]</box>"),
    ],
)
def test_native_forms_are_written_as_the_families_write_them(native: str, expected: str) -> None:
    answer = Answer((Located(1, BOX),))
    assert write_native(answer, [PER_MILLE], native=native, label="cup") == expected
    assert write_native(Answer(choice="B"), TWO, native=native) == "B"


@pytest.mark.parametrize("native", NATIVE_WRITERS)
@pytest.mark.parametrize("tokens_survive", [True, False], ids=["whole", "special-tokens-lost"])
@given(answer=answers().filter(lambda answer: answer.boxes), label=st.sampled_from(["", "the red star", "Tasse {gross}"]))
def test_what_is_written_natively_is_read_back(native: str, tokens_survive: bool, answer: Answer, label: str) -> None:
    here = Answer(tuple(replace(located, image=1) for located in answer.boxes))
    nowhere = Answer(tuple(replace(located, image=None) for located in answer.boxes))
    cases = [([PER_MILLE], here, here), ([PER_MILLE] * 3, answer, answer if native == "qwen_json" else nowhere)]
    for grids, given_answer, expected in cases:
        text = write_native(given_answer, grids, native=native, label=label)
        text = text if tokens_survive else re.sub(TOKENS, "", text)
        assert read_answer(text, grids, native=native) == expected


@pytest.mark.parametrize("native", NATIVE_WRITERS)
@given(answer=answers().filter(lambda answer: answer.boxes))
def test_native_pixels_of_a_resized_image_are_read_back_within_a_pixel(native: str, answer: Answer) -> None:
    here = Answer(tuple(replace(located, image=1) for located in answer.boxes))
    back = read_answer(write_native(here, [WIDE], native=native), [WIDE], native=native)
    assert isinstance(back, Answer)
    for ours, theirs in zip(here.boxes, back.boxes, strict=True):
        assert abs(ours.box.x0 - theirs.box.x0) <= 1 / 1400 + 1e-9
        assert abs(ours.box.y1 - theirs.box.y1) <= 1 / 700 + 1e-9


@pytest.mark.parametrize("native", NATIVE_WRITERS)
@pytest.mark.parametrize("answer", [Answer(), Answer((Located(3, BOX),))], ids=["no-box", "no-such-image"])
def test_what_a_native_form_cannot_say_is_refused(native: str, answer: Answer) -> None:
    with pytest.raises(ValueError, match=r"image|nothing is there"):
        write_native(answer, TWO, native=native)


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "[",
    "]",
    "{",
    "}",
    '"bbox_2d"',
    '"image"',
    ":",
    ",",
    "(",
    ")",
    "1",
    "-",
    ".",
    "e9",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=40).map("".join), st.integers(0, 3))
def test_reading_never_raises(text: str, images: int) -> None:
    for native in (None, *NATIVE_READERS):
        assert isinstance(read_answer(text, [PER_MILLE] * images, native=native), Answer | Unreadable)
    follows_contract(text)


@pytest.mark.parametrize("piece", ["<answer>", "<think>", "[{", "[{}", "} ", "(1,", "[1,", " ", "</answer>", "<think></think>"])
def test_a_degenerate_loop_is_read_in_no_time(piece: str) -> None:
    started = time.perf_counter()
    for native in (None, *NATIVE_READERS):
        read_answer(piece * 4000, TWO, native=native)
    follows_contract(piece * 4000)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>B</answer>", True),
        (" <think>a</think>\n<answer>B</answer>\n", True),
        ("<think> </think><answer>B</answer>", False),
        ("<think></think><answer>B</answer>", False),
        ("<answer>B</answer>", False),
        ("so <think>a</think><answer>B</answer>", False),
        ("<think>a</think> so <answer>B</answer>", False),
        ("<think>a</think><answer>B</answer> done", False),
        ("<think>a</think><answer>B</answer><answer>B</answer>", False),
        ("<think>a<think>b</think><answer>B</answer>", False),
        ("<think>a</think><answer>B", False),
    ],
)
def test_the_contract_is_one_thought_and_one_answer(text: str, expected: bool) -> None:
    assert follows_contract(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>B</answer>", True),
        (" <answer>[]</answer>\n", True),
        ("<think>a</think><answer>B</answer>", False),
        ("so <answer>B</answer>", False),
        ("<answer>B</answer><answer>B</answer>", False),
        ("<answer>B", False),
    ],
)
def test_a_direct_answer_is_one_answer_block_and_nothing_else(text: str, expected: bool) -> None:
    assert answers_directly(text) is expected


def test_a_completion_without_a_thought_is_a_direct_answer() -> None:
    assert answers_directly(write_completion(None, GOOD, TWO))
    assert read_answer(write_completion(None, GOOD, TWO), TWO) == GOOD


@pytest.mark.parametrize("image", [None, 0, 3])
def test_an_answer_that_names_no_image_of_the_prompt_cannot_be_written(image: int | None) -> None:
    with pytest.raises(ValueError, match="image"):
        write_answer(Answer((Located(image, BOX),)), TWO)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({}, 1.0),
        ({"confidence": 0.25}, 0.25),
        ({"score": 0.5}, 0.5),
        ({"confidence": 7}, 1.0),
        ({"confidence": -1}, 0.0),
        ({"confidence": "high"}, 1.0),
        ({"confidence": True}, 1.0),
        ({"confidence": float("nan")}, 1.0),
    ],
)
def test_a_box_carries_the_confidence_it_was_given(said: dict[str, object], kept: float) -> None:
    rows = [{"image": 1, "bbox_2d": [0, 0, 500, 500], **said}]
    answer = read_answer(f"<answer>{json.dumps(rows)}</answer>", [PER_MILLE])
    assert isinstance(answer, Answer)
    assert answer.boxes[0].confidence == kept
    assert read_answer(f"<answer>{write_answer(answer, [PER_MILLE])}</answer>", [PER_MILLE]) == answer
