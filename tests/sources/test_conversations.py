"""What every conversation reader does: turns, placeholders, the image of a box, grids, letters, reasoning."""

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_gold_scores_one, write_images, write_rows

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import scan_source
from polyground.sources.prose import image_mentions, split_options
from polyground.sources.reading import BadRow, collect, reasons_of

TWO = ["a.png", "b.png"]
LEFT = Box(0.1, 0.2, 0.5, 0.75)
RIGHT = Box(0.5, 0.2, 0.9, 0.75)


def row(answer: Any, question: str = "<image><image>Find the cup.", images: Any = TWO) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, "images": images}


def read(folder: Path, *rows: Any, **options: Any) -> tuple[list[Example], list[BadRow]]:
    file = write_rows(folder / "rows.json", rows)
    return collect(scan_source("sharegpt", file, **{"grid": "per_mille", **options}))


def only(folder: Path, row: Any, **options: Any) -> Example:
    [example], [] = read(folder, row, **options)
    return example


def reason(folder: Path, row: Any, **options: Any) -> str:
    [], [bad] = read(folder, row, **options)
    return bad.reason


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param('<think>x</think><answer>[{"image": 2, "bbox_2d": [100, 200, 500, 750]}]</answer>', id="contract"),
        pytest.param('<answer>{"image": 2, "bbox_2d": [100, 200, 500, 750]}</answer>', id="contract-one-object"),
        pytest.param('```json\n[{"bbox_2d": [100, 200, 500, 750], "label": "cup", "image": 2}]\n```', id="qwen-json-fenced"),
        pytest.param('{"cups": [{"image": 2, "bbox_2d": [[100, 200, 500, 750]]}]}', id="nested-json"),
        pytest.param("[{'bbox_2d': [100, 200, 500, 750], 'image': 2}]", id="single-quotes"),
        pytest.param("It's in the second image. <|box_start|>(100,200),(500,750)<|box_end|>", id="box-tokens"),
        pytest.param("(100, 200), (500, 750) in image 2", id="bare-corners"),
        pytest.param("Image-2: [[100, 200, 500, 750]]", id="double-brackets"),
        pytest.param("The 2nd image shows <ref>the cup</ref><box>[[100, 200, 500, 750]]</box>", id="internvl"),
        pytest.param("At [100.0, 200.0, 500.0, 750.0] of the 2nd image.", id="brackets"),
        pytest.param("Not the first image's cup: it is in the second image, at [100, 200, 500, 750]", id="last-named-before-it"),
        pytest.param("I compared all. [100, 200, 500, 750] (image 2), unlike image 1.", id="named-right-behind-it"),
    ],
)
def test_every_form_of_an_answer_is_read(tmp_path: Path, answer: str) -> None:
    example = only(tmp_path, row(answer))
    assert example.target == Answer((Located(2, LEFT),))
    assert_gold_scores_one([example])


def test_boxes_of_several_images_are_each_in_the_one_named_before_them(tmp_path: Path) -> None:
    answer = "Image 1: [100, 200, 500, 750], image 2: [500, 200, 900, 750], [100, 200, 500, 750] and [100, 200, 500, 750]"
    example = only(tmp_path, row(answer))
    assert example.target.boxes == (Located(1, LEFT), Located(2, RIGHT), Located(2, LEFT))


@pytest.mark.parametrize(
    ("question", "options", "image"),
    [
        pytest.param("Find the cup.", {}, None, id="nothing-names-it"),
        pytest.param("Find the cup.", {"unnamed_image": 1}, 1, id="the-user-says"),
        pytest.param("Find the cup in the second image.", {}, 2, id="the-question-names-one"),
        pytest.param("Find the cup of image 1 in image 2.", {}, None, id="the-question-names-two"),
        pytest.param("Image-1: <image> Image-2: <image> Find the cup.", {}, None, id="announced-is-not-asked-about"),
        pytest.param("Image-1: <image> Image-2: <image> Find the cup in Image-1.", {}, 1, id="announced-and-asked-about"),
        pytest.param("Find the object of image 1 ([0, 0, 500, 500]) in image 2.", {}, 2, id="one-belongs-to-the-questions-box"),
    ],
)
def test_the_image_of_a_box_that_the_answer_leaves_open(
    tmp_path: Path, question: str, options: dict[str, Any], image: int | None
) -> None:
    assert only(tmp_path, row("[100, 200, 500, 750]", question), **options).target.boxes == (Located(image, LEFT),)


def test_a_box_on_a_single_image_is_in_the_first(tmp_path: Path) -> None:
    assert only(tmp_path, row("[100, 200, 500, 750]", "Find it.", "a.png")).target.boxes == (Located(1, LEFT),)


@pytest.mark.parametrize(
    ("grid", "numbers"),
    [
        pytest.param("per_mille", "[100, 200, 500, 750]", id="per_mille"),
        pytest.param("per_mille_yxyx", "[200, 100, 750, 500]", id="per_mille_yxyx"),
        pytest.param("unit", "[0.1, 0.2, 0.5, 0.75]", id="unit"),
        pytest.param("pixels", "[20, 20, 100, 75]", id="pixels"),
    ],
)
def test_boxes_are_read_on_the_declared_grid(tmp_path: Path, grid: str, numbers: str) -> None:
    write_images(tmp_path, "a.png", size=(640, 480))
    write_images(tmp_path, "b.png", size=(200, 100))
    assert only(tmp_path, row(f"In the second image: {numbers}"), grid=grid).target.boxes == (Located(2, LEFT),)


def test_a_grid_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json: .* option grid .* to one of per_mille .* pixels .* unit .* per_mille_yxyx"):
        read(tmp_path, row('<answer>[{"image": 1, "bbox_2d": [0.1, 0.2, 0.5, 0.75]}]</answer>'), grid=None)


def test_letters_need_no_grid(tmp_path: Path) -> None:
    assert only(tmp_path, row("B", "Which?\nA. cat\nB. dog"), grid=None).target == Answer(choice="B")


def test_an_unknown_grid_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown grid 'pixel'; known: per_mille, unit, pixels, per_mille_yxyx"):
        read(tmp_path, row("[1, 2, 3, 4]"), grid="pixel")


def test_pixels_without_a_named_image_need_images_of_one_size(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    assert only(tmp_path, row("[20, 20, 100, 75]"), grid="pixels").target.boxes == (Located(None, LEFT),)
    write_images(tmp_path, "b.png", size=(640, 480))
    assert reason(tmp_path, row("[20, 20, 100, 75]"), grid="pixels") == "unnamed_image"


BAD_ANSWERS = [
    pytest.param("[500, 200, 100, 750] in image 1", "inverted", id="swapped"),
    pytest.param("[100, 200, 100, 750] in image 1", "inverted", id="no-area"),
    pytest.param("[100, 200, 500, 1001] in image 1", "out_of_range", id="beyond-the-grid"),
    pytest.param("[-1, 200, 500, 750] in image 1", "out_of_range", id="negative"),
    pytest.param('[{"bbox_2d": [0, 0, 1%s, 5], "image": 1}]' % ("0" * 400), "out_of_range", id="digits-without-end"),
    pytest.param('[{"bbox_2d": [0, 0, NaN, 5], "image": 1}]', "out_of_range", id="nan"),
    pytest.param("[100, 200, 500, 750] in the third image", "bad_image", id="no-third-image"),
    pytest.param('[{"bbox_2d": [1, 2, 3, 4], "image": 0}]', "bad_image", id="counted-from-zero"),
    pytest.param('[{"bbox_2d": [1, 2, 3, 4], "image": "b"}]', "malformed", id="image-no-number"),
    pytest.param('[{"bbox_2d": [1, 2, 3], "image": 1}]', "malformed", id="three-numbers"),
    pytest.param('[{"bbox_2d": "1, 2, 3, 4", "image": 1}]', "malformed", id="numbers-as-text"),
    pytest.param('[{"bbox_2d": [1, 2, 3', "malformed", id="half-written-json"),
    pytest.param("<|box_start|>(100,200),(500<|box_end|>", "malformed", id="half-written-token"),
    pytest.param("<|box_start|>(100,200)<|box_end|>", "malformed", id="a-point"),
    pytest.param("[100, 200, 500]", "no_box", id="three-numbers-in-brackets"),
    pytest.param("A woman in an orange shirt.", "no_box", id="caption"),
    pytest.param("", "no_box", id="empty"),
    pytest.param("42", "no_box", id="number"),
    pytest.param(" ".join(f"[0, 0, {n}, 9]" for n in range(1, 102)), "too_many", id="a-hundred-and-one-boxes"),
    pytest.param("x" * 100_001, "malformed", id="a-novel"),
]


@pytest.mark.parametrize(("answer", "expected"), BAD_ANSWERS)
def test_a_bad_answer_is_a_counted_row(tmp_path: Path, answer: str, expected: str) -> None:
    assert reason(tmp_path, row(answer)) == expected


def test_a_box_said_again_and_again_is_one_box(tmp_path: Path) -> None:
    assert only(tmp_path, row("Image 1: " + "[100, 200, 500, 750] " * 101)).target.boxes == (Located(1, LEFT),)


@pytest.mark.parametrize("answer", ["[]", "<answer>[]</answer>", "```json\n[]\n```"])
def test_an_empty_list_says_that_it_is_not_there(tmp_path: Path, answer: str) -> None:
    example = only(tmp_path, row(answer))
    assert example.target == Answer()
    assert_gold_scores_one([example])


@pytest.mark.parametrize("answer", ["[" * 50_000 + "bbox_2d", "{'bbox_2d': " * 5000, "<think>" * 14_000, "<answer>" * 12_000])
def test_a_hostile_answer_is_refused_soon(tmp_path: Path, answer: str) -> None:
    [], [bad] = read(tmp_path, row(answer))
    assert bad.reason in ("malformed", "no_box")


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("question", "expected", "boxes"),
    [
        pytest.param(
            "Find <|object_ref_start|>the cup<|object_ref_end|> of image-1 (<|box_start|>(100,200),(500,750)<|box_end|>).",
            "Find the cup of image-1 (<box>).",
            (Located(1, LEFT),),
            id="tokens",
        ),
        pytest.param(
            "What of image 2 is at [[100, 200, 500, 750]]?", "What of image 2 is at <box>?", (Located(2, LEFT),), id="list"
        ),
        pytest.param(
            "Compare <box>[[100, 200, 500, 750]]</box> in the first image with [500, 200, 900, 750] in the second image.",
            "Compare <box> in the first image with <box> in the second image.",
            (Located(1, LEFT), Located(2, RIGHT)),
            id="named-behind",
        ),
        pytest.param("Where is [100, 200, 500, 750]?", "Where is <box>?", (Located(None, LEFT),), id="unnamed"),
        pytest.param(
            "Image 1: <image>\n, image 2: <image>\nWhere is [100, 200, 500, 750]?",
            "Image 1: <image>\n, image 2: <image>\nWhere is <box>?",
            (Located(None, LEFT),),
            id="announced",
        ),
        pytest.param("Answer as [x1, y1, x2, y2].", "Answer as [x1, y1, x2, y2].", (), id="no-box-at-all"),
    ],
)
def test_boxes_in_a_question_are_taken_out(tmp_path: Path, question: str, expected: str, boxes: tuple[Located, ...]) -> None:
    example = only(tmp_path, row("Image 1: [100, 200, 500, 750]", question))
    assert (example.question, example.question_boxes) == (expected, boxes)


def test_the_user_may_say_where_boxes_of_questions_lie(tmp_path: Path) -> None:
    example = only(tmp_path, row("[]", "Where is [100, 200, 500, 750]?"), marked_image=2)
    assert example.question_boxes == (Located(2, LEFT),)


@pytest.mark.parametrize("option", ["unnamed_image", "marked_image"])
@pytest.mark.parametrize("image", [0, True, "1"])
def test_images_are_counted_from_one(tmp_path: Path, option: str, image: Any) -> None:
    with pytest.raises(DataError, match=f"{option} counts images from 1"):
        read(tmp_path, row("[]"), **{option: image})


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        pytest.param("Where is [100, 200, 500, 1750] of image 1?", "out_of_range", id="box-beyond-the-grid"),
        pytest.param("Say it as <box>.", "malformed", id="a-mark-without-box"),
        pytest.param("<image><image>", "malformed", id="nothing-asked"),
        pytest.param("<image>Find it.", "placeholder_mismatch", id="one-placeholder-for-two-images"),
        pytest.param("<image><image><image>Find it.", "placeholder_mismatch", id="three-placeholders-for-two-images"),
        pytest.param("<video>Find it.", "malformed", id="video"),
        pytest.param("Where is \0000\0?", "malformed", id="zero-characters"),
    ],
)
def test_a_bad_question_is_a_counted_row(tmp_path: Path, question: str, expected: str) -> None:
    assert reason(tmp_path, row("Image 1: [100, 200, 500, 750]", question)) == expected


def test_qwens_image_tokens_are_placeholders(tmp_path: Path) -> None:
    token = "<|vision_start|><|image_pad|><|vision_end|>"
    assert only(tmp_path, row("[]", f"{token}Find it in{token}.")).question == "<image>Find it in<image>."


# ---------------------------------------------------------------- turns


def conversation(*texts: str, images: Any = TWO) -> dict[str, Any]:
    said = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]
    return {"messages": said, "images": images}


def test_every_turn_is_an_example_and_sees_the_images(tmp_path: Path) -> None:
    file = conversation(
        "<image>\n<image>\nFind the cup.", "Image 1: [100, 200, 500, 750]", "And the hat?", "Image 2: [500, 200, 900, 750]"
    )
    [first, second], [] = read(tmp_path, file)
    assert (first.key, second.key) == ("sharegpt/0/0", "sharegpt/0/1")
    assert (first.question, second.question) == ("<image>\n<image>\nFind the cup.", "And the hat?")
    assert first.images == second.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert_gold_scores_one([first, second])


def test_a_turn_does_not_see_the_images_of_later_turns(tmp_path: Path) -> None:
    file = conversation(
        "<image>Find the cup.", "[100, 200, 500, 750]", "And in this one? <image>", "[500, 200, 900, 750] (image 2)"
    )
    [first, second], [] = read(tmp_path, file)
    assert (first.images, first.question) == ((tmp_path / "a.png",), "<image>Find the cup.")
    assert (len(second.images), second.question) == (2, "<image>And in this one? <image>")


def test_a_turn_without_a_box_is_a_bad_row_of_its_own(tmp_path: Path) -> None:
    file = conversation("<image><image>What is it?", "A cup.", "Where?", "Image 1: [100, 200, 500, 750]", "Sure?", "Yes, quite.")
    [example], bad = read(tmp_path, file)
    assert example.key == "sharegpt/0/1"
    assert [(row.row, row.key, row.reason) for row in bad] == [(1, "sharegpt/0/0", "no_box"), (1, "sharegpt/0/2", "no_box")]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([("assistant", "Hello.")], "malformed", id="an-answer-to-nothing"),
        pytest.param([("user", "Find it.")], "no_answer", id="no-answer"),
        pytest.param([("user", "Find it."), ("tool", "[]")], "malformed", id="a-tool"),
        pytest.param([("system", "Be kind.")], "malformed", id="no-question"),
        pytest.param([], "malformed", id="nothing"),
    ],
)
def test_conversations_that_cannot_be_paired(tmp_path: Path, messages: list[tuple[str, str]], expected: str) -> None:
    said = [{"role": role, "content": content} for role, content in messages]
    assert reason(tmp_path, {"messages": said, "images": TWO}) == expected


def test_a_system_message_is_no_question(tmp_path: Path) -> None:
    said = [("system", "Be kind."), ("human", "Find it."), ("gpt", "[] ")]
    example = only(tmp_path, {"conversations": [{"from": who, "value": text} for who, text in said], "images": TWO})
    assert example.question == "Find it."


@pytest.mark.parametrize(
    ("answer", "reasoning"),
    [
        pytest.param("<think>\nIt is red. </think><answer>[]</answer>", "It is red.", id="contract"),
        pytest.param("It is red.</think>[]", "It is red.", id="opened-by-the-template"),
        pytest.param("<think></think>[]", None, id="empty"),
        pytest.param("[]", None, id="none"),
    ],
)
def test_reasoning_is_kept_aside(tmp_path: Path, answer: str, reasoning: str | None) -> None:
    example = only(tmp_path, row(answer))
    assert example.meta.get("reasoning") == reasoning
    assert "red" not in example.question


def test_a_box_in_the_reasoning_is_no_answer(tmp_path: Path) -> None:
    answer = "<think>Perhaps [500, 200, 900, 750] in image 1?</think>Image 2: [100, 200, 500, 750]"
    assert only(tmp_path, row(answer)).target.boxes == (Located(2, LEFT),)


# ---------------------------------------------------------------- letters

WHICH = "Which?\nA. the cat\nB. the dog"


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", "b".upper() + ")", "B. the dog", "(B) The dog.", "<answer>B</answer>"])
def test_a_letter_answers_lettered_options(tmp_path: Path, answer: str) -> None:
    example = only(tmp_path, row(answer, WHICH))
    assert (example.task, example.question, example.choices) == ("multiple_choice", "Which?", ("the cat", "the dog"))
    assert example.target == Answer(choice="B")
    assert_gold_scores_one([example])


@pytest.mark.parametrize(
    ("answer", "question", "expected"),
    [
        pytest.param("C", WHICH, "bad_choice", id="no-such-option"),
        pytest.param("A", "Which one?", "bad_choice", id="no-options"),
        pytest.param("A dog sits there.", WHICH, "no_box", id="a-sentence"),
        pytest.param("B. the cat", WHICH, "no_box", id="letter-and-words-disagree"),
    ],
)
def test_a_letter_that_answers_nothing(tmp_path: Path, answer: str, question: str, expected: str) -> None:
    assert reason(tmp_path, row(answer, question)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which?\n(A) one\n(B) two\nAnswer by letter.", ("Which?\nAnswer by letter.", ("one", "two"))),
        ("Which?\nA: one\nB: two", ("Which?", ("one", "two"))),
        ("Which? (A) one (B) two", ("Which? (A) one (B) two", ("one", "two"))),
        ("Which?\nA. one", ("Which?\nA. one", ())),
        ("Which?\nB. one\nA. two", ("Which?\nB. one\nA. two", ())),
    ],
)
def test_split_options(text: str, expected: tuple[str, tuple[str, ...]]) -> None:
    assert split_options(text) == expected


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("the tenth image, 2th image, Image-3, image 4, image5", [10, 2, 3, 4, 5]),
        ("imagine 3 images of image quality", []),
        ("the first images of each row", []),
    ],
)
def test_image_mentions(text: str, images: list[int]) -> None:
    assert [mention.image for mention in image_mentions(text)] == images


# ---------------------------------------------------------------- images and rows


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([], "no_images"),
        (None, "no_images"),
        (["../../etc/passwd"], "unsafe_path"),
        (["/elsewhere/a.png"], "unsafe_path"),
        (["https://example.org/a.png"], "unsafe_path"),
        ([7], "malformed"),
        ([""], "malformed"),
    ],
)
def test_images_that_cannot_be_named(tmp_path: Path, images: Any, expected: str) -> None:
    assert reason(tmp_path, row("[]", "Find it.", images)) == expected


def test_images_may_be_one_name(tmp_path: Path) -> None:
    assert only(tmp_path, row("[]", "<image>Find it.", "a.png")).images == (tmp_path / "a.png",)


def test_a_hundred_images_are_read(tmp_path: Path) -> None:
    images = [f"{n}.png" for n in range(100)]
    example = only(tmp_path, row("In image 100: [100, 200, 500, 750]", "<image>" * 100 + "Find it.", images))
    assert (len(example.images), example.target.boxes) == (100, (Located(100, LEFT),))
    assert_gold_scores_one([example])


def test_paths_of_another_machine_lose_their_root(tmp_path: Path) -> None:
    example = only(
        tmp_path, row("[]", "Find it.", ["/mnt/data/coco/a.png"]), strip_prefix="/mnt/data", images_root=tmp_path / "here"
    )
    assert example.images == (tmp_path / "here/coco/a.png",)


def test_rows_name_their_task_and_id(tmp_path: Path) -> None:
    example = only(tmp_path, {**row("[]"), "task": "diff", "id": 7}, task="other")
    assert (example.task, example.meta) == ("diff", {"source": "sharegpt", "id": 7})
    assert only(tmp_path, row("[]"), task="other").task == "other"


def test_a_question_asked_twice_is_reported_unless_kept(tmp_path: Path) -> None:
    _, bad = read(tmp_path, row("[]"), row("[]"))
    assert reasons_of(bad) == {"duplicate": 1}
    examples, _ = read(tmp_path, row("[]"), row("[]"), duplicates="keep")
    assert [example.key for example in examples] == ["sharegpt/0", "sharegpt/1"]


@pytest.mark.parametrize(
    "junk", [7, None, "x", [], {}, {"conversations": 7}, {"conversations": [7]}, {"conversations": [{"from": 1}]}]
)
def test_junk_rows_are_counted(tmp_path: Path, junk: Any) -> None:
    assert reason(tmp_path, junk) == "malformed"


def test_examples_survive_json(tmp_path: Path) -> None:
    example = only(tmp_path, row("<think>y</think>Image 1: [100, 200, 500, 750]", "Where is [100, 200, 500, 750] of image 1?"))
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
