"""What each public benchmark counts as right, checked by eye: its rule, peers' quirks, its rows, and its headline."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyground.answer import Answer, Located, Unreadable
from polyground.benchmarks import (
    BENCHMARKS,
    COMPATS,
    LAST_PAIR,
    Annotation,
    Table,
    benchmark_of,
    ceiling,
    compats_of,
    exact_letter,
    first_box,
    fold_turns,
    judge,
    one_to_one,
    place_of,
    read_annotation,
    require_compat,
    rows_wrong_by_annotation,
    said,
    tabulate,
    turns,
    unanswered,
)
from polyground.errors import ConfigError, DataError
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.records import Completion, Example, Rollout, Score

RIGHT, TOP_HALF, FAR, INVERTED = [100, 100, 300, 300], [100, 100, 300, 200], [700, 700, 900, 900], [300, 300, 100, 100]
OUTSIDE, TWICE_AS_WIDE = [1200, 1200, 1400, 1400], [500, 500, 1500, 1000]
TWO = [PER_MILLE, PER_MILLE]
GOLD, CORNER = Box(0.1, 0.1, 0.3, 0.3), Box(0.5, 0.5, 1.0, 1.0)


def asked(*gold: Located, images: int = 2, key: str = "name/task/0", task: str = "task") -> Example:
    return Example(key=key, task=task, images=(Path("a.png"),) * images, question="Where?", target=Answer(gold))


def lettered(letter: str, *, key: str = "name/task/0", task: str = "task", choices: Sequence[str] = ("one", "two")) -> Example:
    target = Answer(choice=letter)
    return Example(key=key, task=task, images=(Path("a.png"),), question="Which?", target=target, choices=tuple(choices))


ONE = asked(Located(2, GOLD))
IN_CORNER = asked(Located(2, CORNER))
NONE = asked()
BOTH = asked(Located(1, CORNER), Located(2, GOLD))


def boxed(*rows: tuple[int, Sequence[float]]) -> str:
    """An answer in the contract."""
    return f"<answer>{json.dumps([{'image': image, 'bbox_2d': box} for image, box in rows])}</answer>"


# ---------------------------------------------------------------- first box


CONTRACT = {
    "the annotated box": (ONE, boxed((2, RIGHT)), 1, None),
    "half of it": (ONE, boxed((2, TOP_HALF)), 0.5, None),
    "elsewhere": (ONE, boxed((2, FAR)), 0, None),
    "another image is named": (ONE, boxed((1, RIGHT)), 1, None),
    "later boxes cost nothing": (ONE, boxed((2, RIGHT), (2, FAR), (1, FAR)), 1, None),
    "a later box earns nothing": (ONE, boxed((2, FAR), (2, RIGHT)), 0, None),
    "only the first annotated box is asked for": (BOTH, boxed((2, RIGHT), (1, [500, 500, 1000, 1000])), 0, None),
    "beyond the right edge": (IN_CORNER, boxed((2, TWICE_AS_WIDE)), 0.5, None),
    "beyond the upper left corner": (ONE, boxed((2, [-100, -100, 300, 300])), 4 / 16, None),
    "beyond all edges": (IN_CORNER, boxed((2, [-500, -500, 1500, 1500])), 1 / 16, None),
    "wholly outside": (ONE, boxed((2, OUTSIDE)), 0, "off_image"),
    "swapped corners": (ONE, boxed((2, INVERTED)), 0, "inverted"),
    "a bad box behind a right one": (ONE, boxed((2, RIGHT), (2, INVERTED)), 0, "inverted"),
    "an image that is not there": (ONE, boxed((3, RIGHT)), 0, "bad_image"),
    "a wrong answer, then a right one": (ONE, boxed((2, FAR)) + boxed((2, RIGHT)), 1, None),
    "a box in a thought": (ONE, f"<think>{boxed((2, RIGHT))}</think> It is on the left.", 0, "missing"),
    "a box in a thought that the prompt has opened": (ONE, f"{boxed((2, RIGHT))}</think> I do not know.", 0, "missing"),
    "another box in the thought": (ONE, f"<think>{boxed((2, FAR))}</think>{boxed((2, RIGHT))}", 1, None),
    "a wide box in the thought": (
        IN_CORNER,
        f"<think>{boxed((2, TWICE_AS_WIDE))}</think>{boxed((2, [500, 500, 1000, 1000]))}",
        1,
        None,
    ),
    "no answer": (ONE, "on the left", 0, "missing"),
    "words in the answer": (ONE, "<answer>on the left</answer>", 0, "malformed"),
    "a letter": (ONE, "<answer>B</answer>", 0, None),
    "not there, but it is": (ONE, "<answer>[]</answer>", 0, None),
    "not there, and it is not": (NONE, "<answer>[]</answer>", 1, None),
    "a box where nothing is": (NONE, boxed((2, RIGHT)), 0, None),
    "a letter where nothing is": (NONE, "<answer>B</answer>", 0, None),
    "silence where nothing is": (NONE, "", 0, "missing"),
}


@pytest.mark.parametrize(("example", "text", "overlap", "unreadable"), CONTRACT.values(), ids=CONTRACT)
def test_the_first_box_of_an_answer_in_the_contract(example: Example, text: str, overlap: float, unreadable: str | None) -> None:
    verdict = first_box(text, example, TWO, None)
    assert (verdict.overlap, verdict.unreadable) == (pytest.approx(overlap), unreadable)


FORMS = {
    "qwen_tokens": "<|box_start|>({},{}),({},{})<|box_end|>",
    "qwen_json": '```json\n[{{"bbox_2d": [{}, {}, {}, {}], "label": "a cup"}}]\n```',
    "internvl": "<ref>a cup</ref><box>[[{}, {}, {}, {}]]</box>",
}
NATIVE: dict[str, tuple[Example, list[list[int]], float, str | None]] = {
    "the annotated box": (ONE, [RIGHT], 1, None),
    "half of it": (ONE, [TOP_HALF], 0.5, None),
    "later boxes cost nothing": (ONE, [RIGHT, FAR, INVERTED], 1, None),
    "a later box earns nothing": (ONE, [FAR, RIGHT], 0, None),
    "beyond the right edge": (IN_CORNER, [TWICE_AS_WIDE], 0.5, None),
    "beyond the upper left corner": (ONE, [[-100, -100, 300, 300]], 4 / 16, None),
    "wholly outside": (ONE, [OUTSIDE], 0, None),
    "swapped corners": (ONE, [INVERTED], 0, "inverted"),
    "a box where nothing is": (NONE, [RIGHT], 0, None),
    "no box": (ONE, [], 0, "missing"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("native", ["its own", "any"])
@pytest.mark.parametrize(("example", "boxes", "overlap", "unreadable"), NATIVE.values(), ids=NATIVE)
def test_the_first_box_of_a_native_form(
    form: str, native: str, example: Example, boxes: list[list[int]], overlap: float, unreadable: str | None
) -> None:
    text = "It is here: " + " and ".join(FORMS[form].format(*box) for box in boxes)
    verdict = first_box(text, example, TWO, form if native == "its own" else native)
    assert (verdict.overlap, verdict.unreadable) == (pytest.approx(overlap), unreadable)


@pytest.mark.parametrize(
    ("form", "native"), [("qwen_tokens", None), ("qwen_tokens", "internvl"), ("qwen_json", "qwen_tokens"), ("internvl", None)]
)
def test_a_form_that_was_not_declared_is_not_read(form: str, native: str | None) -> None:
    assert first_box(FORMS[form].format(*RIGHT), ONE, TWO, native).unreadable == "missing"


@pytest.mark.parametrize("form", FORMS)
def test_a_native_box_in_an_answer_tag_is_read_where_its_form_is_declared(form: str) -> None:
    right, far = FORMS[form].format(*RIGHT), FORMS[form].format(*FAR)
    text = f"{far}<answer>{far}</answer><answer>{right}</answer>{far}"
    assert first_box(text, ONE, TWO, form).overlap == pytest.approx(1)
    assert first_box(text, ONE, TWO, None).unreadable == "malformed"


@pytest.mark.parametrize("text", ["<think>{}</think> there", "{}</think> there", "there <think>{}", "<think>{}"])
@pytest.mark.parametrize("form", FORMS)
def test_a_native_box_in_a_thought_is_no_answer(form: str, text: str) -> None:
    assert first_box(text.format(FORMS[form].format(*RIGHT)), ONE, TWO, form).unreadable == "missing"


def test_of_two_forms_any_takes_the_box_that_comes_first() -> None:
    pairs, brackets = FORMS["qwen_tokens"].format(*RIGHT), FORMS["internvl"].format(*FAR)
    assert [first_box(text, ONE, TWO, "any").overlap for text in (pairs + brackets, brackets + pairs)] == [pytest.approx(1), 0]


def test_a_native_box_is_read_on_the_grid_of_the_image_asked_for() -> None:
    grids = [Grid(width=100, height=100), Grid(width=200, height=400), Grid(width=1, height=1)]
    example = asked(Located(2, CORNER), images=3)
    assert first_box("(100,200),(200,400)", example, grids, "qwen_tokens").overlap == pytest.approx(1)


@pytest.mark.parametrize("text", ["[200, 100, 400, 500]", boxed((1, [200, 100, 400, 500]))])
def test_a_grid_that_writes_y_first_is_read_so(text: str) -> None:
    grid, wide = Grid(width=1000, height=1000, order="yxyx"), asked(Located(1, Box(0.1, 0.2, 0.5, 0.4)), images=1)
    assert first_box(text, wide, [grid], "internvl").overlap == pytest.approx(1)
    assert first_box(text, wide, [PER_MILLE], "internvl").overlap < 0.5


# ---------------------------------------------------------------- one to one


ONE_TO_ONE = {
    "all boxes in any order": (BOTH, boxed((2, RIGHT), (1, [500, 500, 1000, 1000])), None, 1, None),
    "one of two": (BOTH, boxed((2, RIGHT)), None, 0.5, None),
    "a box too many": (ONE, boxed((2, RIGHT), (2, FAR)), None, 0.5, None),
    "the same box thrice": (ONE, boxed(*[(2, RIGHT)] * 3), None, 1 / 3, None),
    "the wrong image": (ONE, boxed((1, RIGHT)), None, 0, None),
    "beyond its image is clipped": (IN_CORNER, boxed((2, TWICE_AS_WIDE)), None, 1, None),
    "no image named": (ONE, FORMS["qwen_tokens"].format(*RIGHT), "qwen_tokens", 1, None),
    "no image named, a box too many": (ONE, "({},{}),({},{}) (700,700),(900,900)".format(*RIGHT), "qwen_tokens", 0.5, None),
    "a native box in an answer tag": (ONE, "<answer>({},{}),({},{})</answer>".format(*RIGHT), "qwen_tokens", 1, None),
    "the same, undeclared": (ONE, "<answer>({},{}),({},{})</answer>".format(*RIGHT), None, 0, "malformed"),
    "not there, and it is not": (NONE, "<answer>[]</answer>", None, 1, None),
    "not there, but it is": (ONE, "<answer>[]</answer>", None, 0, None),
    "a letter where nothing is": (NONE, "<answer>B</answer>", None, 0, None),
    "swapped corners": (ONE, boxed((2, INVERTED)), None, 0, "inverted"),
    "the right letter": (lettered("B"), "<answer>B</answer>", None, 1, None),
}


@pytest.mark.parametrize(("example", "text", "native", "overlap", "unreadable"), ONE_TO_ONE.values(), ids=ONE_TO_ONE)
def test_boxes_matched_one_to_one(
    example: Example, text: str, native: str | None, overlap: float, unreadable: str | None
) -> None:
    verdict = one_to_one(text, example, [PER_MILLE] * len(example.images), native)
    assert (verdict.overlap, verdict.unreadable) == (pytest.approx(overlap), unreadable)


# ---------------------------------------------------------------- letters


LETTERS = {
    "alone": ("B", 1, None),
    "in brackets": ("(B)", 1, None),
    "with a full stop": ("B.", 1, None),
    "on its own line": ("\n (B). \n", 1, None),
    "tagged": ("It must be <answer>B</answer>", 1, None),
    "tagged, in brackets": ("<answer> (B) </answer>", 1, None),
    "behind a thought": ("<think>A or B? A!</think>\nB", 1, None),
    "another": ("A", 0, None),
    "the last tag counts": ("<answer>B</answer> no, <answer>A</answer>", 0, None),
    "a word that starts with it": ("Both", 0, "missing"),
    "a sentence that starts with it": ("B is the answer", 0, "missing"),
    "a sentence that ends with it": ("The answer is B", 0, "missing"),
    "with its text": ("B: two", 0, "missing"),
    "two letters": ("A B", 0, "missing"),
    "in lower case": ("b", 0, "missing"),
    "nothing": ("", 0, "missing"),
    "in a thought": ("<think>B</think> I cannot tell.", 0, "missing"),
    "tagged in a thought": ("<think><answer>B</answer></think> I cannot tell.", 0, "missing"),
    "tagged in a thought that the prompt has opened": ("<answer>B</answer></think> I cannot tell.", 0, "missing"),
    "in a thought cut short": ("<think>B", 0, "missing"),
    "a tagged word": ("<answer>Both</answer>", 0, "malformed"),
    "a tagged sentence": ("<answer>B is the answer</answer>", 0, "malformed"),
    "a letter, then words in the last tag": ("<answer>B</answer><answer>Both</answer>", 0, "malformed"),
    "a box": (boxed((1, RIGHT)), 0, "malformed"),
}


@pytest.mark.parametrize(("text", "right", "unreadable"), LETTERS.values(), ids=LETTERS)
def test_a_letter_stands_alone_or_does_not_count(text: str, right: int, unreadable: str | None) -> None:
    verdict = exact_letter(text, lettered("B"), [PER_MILLE], "any")
    assert (verdict.overlap, verdict.unreadable) == (right, unreadable)


SAID = {
    "everything": ("a cup", "a cup"),
    "the answer tag": ("it is <answer>a cup</answer>, I think", "a cup"),
    "the last answer tag": ("<answer>a cup</answer><answer>a mug</answer>", "a mug"),
    "no thought": ("<think>a mug</think>a cup", " a cup"),
    "no thought between": ("a <think>red</think>cup", "a  cup"),
    "no tag in a thought": ("<think><answer>a mug</answer></think>a cup", " a cup"),
    "no thought that the prompt has opened": ("a mug</think>a cup", "a cup"),
    "no tag in a thought that the prompt has opened": ("<answer>a mug</answer></think>a cup", "a cup"),
    "no thought cut short": ("a cup<think>or a mug", "a cup"),
    "an answer tag cut short": ("<answer>a cup", "<answer>a cup"),
}


@pytest.mark.parametrize(("text", "meant"), SAID.values(), ids=SAID)
def test_what_a_response_says_is_its_last_tag_or_all_but_its_thoughts(text: str, meant: str) -> None:
    assert said(text) == meant


# ---------------------------------------------------------------- quirks


STRETCHED = asked(Located(2, Box(0.1, 0.21, 0.3, 0.55)))
STRETCH = {
    "y 200 to 500 becomes 210 to 550": (STRETCHED, boxed((1, [100, 200, 300, 500])), 1),
    "the annotated box is moved down": (
        asked(Located(2, Box(0.1, 0.2, 0.3, 0.6))),
        boxed((2, [100, 200, 300, 600])),
        (600 - 210) / (660 - 200),
    ),
    "the same in tokens": (STRETCHED, FORMS["qwen_tokens"].format(100, 200, 300, 500), 1),
    "the first box alone": (STRETCHED, boxed((2, [100, 200, 300, 500]), (2, FAR)), 1),
    "y2 stops at 999": (asked(Located(2, Box(0.1, 0.525, 0.3, 0.999))), boxed((2, [100, 500, 300, 980])), 1),
    "y2 far below stops at 999": (asked(Located(2, Box(0.1, 0.525, 0.3, 0.999))), boxed((2, [100, 500, 300, 2000])), 1),
    "both stop at 999": (STRETCHED, boxed((2, [100, 960, 300, 990])), 0),
    "x stays, beyond the image too": (asked(Located(2, Box(0.5, 0.525, 1, 0.77))), boxed((2, [500, 500, 1500, 700])), 0.5),
    "swapped corners": (STRETCHED, FORMS["qwen_tokens"].format(300, 200, 100, 500), 0),
    "a box in a thought": (STRETCHED, "<think>(100,200),(300,500)</think>there", 0),
    "no box": (STRETCHED, "there", 0),
    "not there": (STRETCHED, "<answer>[]</answer>", 0),
    "nothing is there": (NONE, boxed((2, RIGHT)), 0),
}


@pytest.mark.parametrize(("example", "text", "overlap"), STRETCH.values(), ids=STRETCH)
def test_migician_stretch_moves_a_box_down(example: Example, text: str, overlap: float) -> None:
    assert COMPATS["migician-stretch"](text, example, TWO, "qwen_tokens") == pytest.approx(overlap)


def test_migician_stretch_moves_y_where_a_grid_writes_it_first() -> None:
    grid = Grid(width=1000, height=1000, order="yxyx")
    assert COMPATS["migician-stretch"]("(200,100),(500,300)", STRETCHED, [grid] * 2, "qwen_tokens") == pytest.approx(1)


UNIVG = {
    "the box of the answer": (ONE, boxed((1, RIGHT)), 1),
    "the box in the thought wins": (ONE, f"<think>{RIGHT}</think>{boxed((2, FAR))}", 1),
    "and loses what the answer had right": (ONE, f"<think>{FAR}</think>{boxed((2, RIGHT))}", 0),
    "two points in the thought win over two in the answer": (
        ONE,
        "<think>(100,100),(300,300)</think><answer>(700,700),(900,900)</answer>",
        1,
    ),
    "two points win over an earlier list": (ONE, f"<think>{FAR}</think>(100,100),(300,300)", 1),
    "the first two points": (ONE, "(700,700),(900,900) (100,100),(300,300)", 0),
    "a box of four numbers": (ONE, "<box>100 100 300 300</box>", 1),
    "a list wins over an earlier box": (ONE, f"<box>700 700 900 900</box>{RIGHT}", 1),
    "decimals are not understood": (ONE, "[0.1, 0.1, 0.3, 0.3]", 0),
    "decimals hide a list": (ONE, f"{RIGHT} [0.1, 0.1, 0.3, 0.3]", 0),
    "decimals do not hide two points": (ONE, "[0.1, 0.1, 0.3, 0.3] (100,100),(300,300)", 1),
    "beyond the image": (IN_CORNER, str(TWICE_AS_WIDE), 0.5),
    "swapped corners": (ONE, str(INVERTED), 0),
    "no box": (ONE, "there", 0),
    "nothing is there": (NONE, str(RIGHT), 0),
}


@pytest.mark.parametrize(("example", "text", "overlap"), UNIVG.values(), ids=UNIVG)
def test_univg_first_box_takes_the_first_box_of_the_whole_reply(example: Example, text: str, overlap: float) -> None:
    pixels = [Grid(width=640, height=480)] * 2  # per-mille is taken for granted
    assert COMPATS["univg-first-box"](text, example, pixels, None) == pytest.approx(overlap)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_a_benchmark_knows_the_quirks_of_its_own_scripts(benchmark: Any) -> None:
    known = {"first_box": ["migician-stretch", "univg-first-box"], "exact_letter": []}
    expected = known.get(benchmark.rule, ["mc-bench-last-pair"] if benchmark.name == "mc_bench" else [])
    assert compats_of(benchmark) == expected
    for name in expected:
        require_compat(benchmark, name)


@pytest.mark.parametrize(
    ("benchmark", "name", "message"),
    [
        ("mig_bench", "guess", "'guess' is none of MIG-Bench's; known there: migician-stretch, univg-first-box"),
        ("mig_bench", LAST_PAIR, "known there: migician-stretch, univg-first-box"),
        ("mc_bench", "univg-first-box", "known there: mc-bench-last-pair"),
        ("blink", "migician-stretch", "'migician-stretch' is none of BLINK's; known there: none"),
    ],
)
def test_a_quirk_of_another_benchmark_is_refused(benchmark: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_compat(benchmark_of(benchmark), name)


# ---------------------------------------------------------------- rows


FILES: dict[str, list[list[float]]] = {
    "original": [[0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.3], [0.3, 0.3, 0.1, 0.1], [0.5, 0.5, 1.2, 1.0], [0.1, 0.1, 0.3, 0.3]],
    "revised": [RIGHT, RIGHT, INVERTED, [500, 500, 1200, 1000], RIGHT],
}


def mig_rows(version: str) -> list[dict[str, Any]]:
    """Three rows of diff that can be asked (two of them the same), one inverted, one out of range; one row of region."""
    words = {"images": ["a.png", "b.png"], "question": "Where does the 2th image differ?"}
    rows: list[dict[str, Any]] = [{"task": "diff", "answer": answer, **words} for answer in FILES[version]]
    return [*rows, {"task": "region", "answer": FILES[version][0], **words}]


def written(folder: Path, rows: Any) -> Path:
    (folder / "annotation.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "annotation.json"


@pytest.mark.parametrize(("version", "published"), [("original", 4295), ("revised", 4276)])
def test_bad_and_repeated_rows_stay_in_the_denominator(tmp_path: Path, version: str, published: int) -> None:
    annotation = read_annotation("mig_bench", written(tmp_path, mig_rows(version)))
    assert (annotation.version, annotation.published_rows, annotation.rows) == (version, published, 6)
    assert [place_of(e.key) for e in annotation.examples] == ["diff/0", "diff/1", "diff/4", "region/0"]
    tags = annotation.tags()
    assert tags["wrong_by_annotation"] == {"inverted": 1, "out_of_range": 1}
    assert (tags["rows"], tags["published_rows"], tags["version"], tags["left_out"]) == (6, published, version, {})
    perfect = [rollout(annotation.benchmark.name, example, boxed((2, RIGHT))) for example in annotation.examples]
    table = tabulate(annotation.benchmark, [*perfect, *rows_wrong_by_annotation(annotation)], annotation.examples, bootstrap=0)
    right = {task: summary.accuracy[0.5].value for task, summary in table.summary.tasks.items()}
    assert right == {"diff": pytest.approx(3 / 5), "region": 1}
    assert table.headline.value == pytest.approx((3 / 5 + 1) / 2)
    assert table.summary.micro.unreadable == {}


def test_a_question_about_an_image_that_is_not_there_counts_as_wrong(tmp_path: Path) -> None:
    rows = mig_rows("revised")[:1]
    rows.append({**rows[0], "question": "Where does the 3th image differ?"})
    annotation = read_annotation("mig_bench", written(tmp_path, rows))
    [wrong] = rows_wrong_by_annotation(annotation)
    assert (annotation.wrong[0].reason, wrong.example, wrong.task) == ("bad_image", "mig_bench/diff/1", "diff")
    assert (wrong.score.iou, wrong.score.unreadable) == (0, None)


def test_a_letter_that_no_choice_has_counts_as_wrong(tmp_path: Path) -> None:
    row = {"question": "How many?", "options": "A: one\nB: two", "context": "", "input_image_path": ["a.jpg"], "task": "count"}
    annotation = read_annotation("mmiu", written(tmp_path, [{**row, "output": "B"}, {**row, "output": "D"}]))
    assert (annotation.rows, annotation.published_rows, annotation.version) == (2, 11698, None)
    assert [row.reason for row in annotation.wrong] == ["bad_choice"]


def test_the_version_may_be_told(tmp_path: Path) -> None:
    rows = [{**row, "answer": [0, 0, 1, 1]} for row in mig_rows("original")]  # whole numbers, but fractions
    annotation = read_annotation("mig_bench", written(tmp_path, rows), version="original")
    assert (annotation.version, annotation.published_rows) == ("original", 4295)
    assert annotation.examples[0].target.boxes[0].box == Box(0, 0, 1, 1)
    assert read_annotation("mig_bench", written(tmp_path, rows), version=None).version == "revised"


def test_two_versions_in_one_annotation_are_both_told() -> None:
    known = benchmark_of("ref_l4")
    assert Annotation(benchmark=known, path=Path("x"), version="both", examples=()).published_rows == 7231 + 38110
    assert Annotation(benchmark=known, path=Path("x"), version="train", examples=()).published_rows is None


def test_the_first_rows_are_taken_as_they_come(tmp_path: Path) -> None:
    annotation = read_annotation("mig_bench", written(tmp_path, mig_rows("revised")), limit=3)
    assert annotation.keys == ("mig_bench/diff/0", "mig_bench/diff/1", "mig_bench/diff/2")
    assert (len(annotation.examples), len(annotation.wrong)) == (2, 1)


def test_an_annotation_of_no_description_is_no_row(tmp_path: Path) -> None:
    tables = {
        "info": {"version": "0.2"},
        "descriptions": [{"id": 0, "images_id": [0, 1], "text": "the cat"}],
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 100} for n in (0, 1, 2)],
        "annotations": [{"id": 7, "image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0}],
    }
    annotation = read_annotation("mc_bench", written(tmp_path, tables))
    assert (annotation.rows, annotation.wrong, annotation.published_rows) == (1, (), 2000)
    assert annotation.tags()["left_out"] == {"orphan": 1}


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "a row without images": ([{"images": "a.png"}], {}, "1 bad rows (1 malformed); correct the file"),
    "a path that leaves the folder": ([{"images": ["../a.png", "b.png"]}], {}, "1 unsafe_path"),
    "images that are not there": ([{}], {"check_images": "exists"}, "a.png"),
    "duplicates, where they are asked after": ([{}, {}], {"duplicates": "report"}, "1 duplicate"),
    "nothing but bad rows": ([{"answer": INVERTED}], {}, "holds no row of MIG-Bench that can be asked"),
    "nothing within the limit": ([{}], {"limit": 0}, "holds no row of MIG-Bench that can be asked"),
}


@pytest.mark.parametrize(("changes", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_the_user_has_to_mend_are_refused(
    tmp_path: Path, changes: list[Any], options: dict[str, Any], message: str
) -> None:
    row = mig_rows("revised")[0]
    with pytest.raises(DataError, match=re.escape(message)):
        read_annotation("mig_bench", written(tmp_path, [{**row, **change} for change in changes]), **options)


def test_an_unknown_benchmark_is_refused_with_the_names_of_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no benchmark 'mig'; known: mig_bench, mc_bench, lisa, .*, mmiu"):
        read_annotation("mig", Path("annotation.json"))


def test_published_rows_by_task_add_up_to_the_published_rows() -> None:
    sums = {v: sum(tasks.values()) for b in BENCHMARKS.values() for v, tasks in b.tasks.items()}
    assert sums == BENCHMARKS["mig_bench"].rows == {"original": 4295, "revised": 4276}
    assert {len(tasks) for tasks in BENCHMARKS["mig_bench"].tasks.values()} == {10}


def test_headlines_in_words() -> None:
    words = {
        "mig_bench": "accuracy at IoU 0.5, mean over tasks",
        "lisa": "accuracy at IoU 0.5, mean over rows",
        "mc_bench": "weighted AP50",
        "odinw": "AP at IoU 0.5 to 0.95, mean over data sets",
        "blink": "accuracy, mean over tasks",
    }
    assert {name: BENCHMARKS[name].measure() for name in words} == words


# ---------------------------------------------------------------- scores


def rollout(benchmark: str, example: Example, text: str, *, native: str | None = None, compat: str | None = None) -> Rollout:
    grids = [PER_MILLE] * len(example.images)
    score = judge(BENCHMARKS[benchmark], text, example, grids, native=native, compat=compat)
    return Rollout(example=example.key, task=example.task, completion=Completion(text=text), score=score)


def table_of(
    benchmark: str, rows: Sequence[tuple[Example, str]], *, native: str | None = None, compat: str | None = None, **options: Any
) -> Table:
    """Every example gets a key of its own."""
    pairs = [(replace(example, key=f"{benchmark}/{example.task}/{n}"), text) for n, (example, text) in enumerate(rows)]
    rollouts = [rollout(benchmark, example, text, native=native, compat=compat) for example, text in pairs]
    examples = [example for example, _ in pairs]
    return tabulate(BENCHMARKS[benchmark], rollouts, examples, bootstrap=0, compat=compat, **options)


def test_a_score_holds_the_rule_the_strict_matching_and_the_quirk() -> None:
    score = judge(BENCHMARKS["mig_bench"], boxed((2, RIGHT), (1, FAR)), ONE, TWO, compat="univg-first-box")
    assert (score.iou, score.total, score.parts) == (1, 1, {"one_to_one": 0.5, "compat": 1})
    assert (score.image_correct, score.unreadable) == (0.5, None)
    assert score.answer is not None
    assert [located.image for located in score.answer.boxes] == [2, 1]


def test_a_score_without_a_quirk_or_with_one_of_average_precision_tells_none() -> None:
    assert judge(BENCHMARKS["mig_bench"], boxed((2, RIGHT)), ONE, TWO).parts == {"one_to_one": 1}
    assert judge(BENCHMARKS["mc_bench"], boxed((2, RIGHT)), ONE, TWO, compat=LAST_PAIR).parts == {"one_to_one": 1}


def test_a_letter_has_no_boxes_to_match() -> None:
    score = judge(BENCHMARKS["blink"], "B", lettered("B"), [PER_MILLE])
    assert score == Score(total=1, parts={}, iou=1, answer=Answer(choice="B"))


def test_a_box_beyond_its_image_is_scored_open_by_the_first_box_and_clipped_one_to_one() -> None:
    score = judge(BENCHMARKS["mig_bench"], boxed((2, TWICE_AS_WIDE)), IN_CORNER, TWO)
    assert (score.iou, score.parts["one_to_one"]) == (pytest.approx(0.5), pytest.approx(1))


def test_a_row_that_nobody_answered_is_wrong_everywhere() -> None:
    row = unanswered("name/task/0", "task", reason="no_response")
    assert (row.score.iou, row.score.parts, row.score.unreadable) == (0, {"one_to_one": 0, "compat": 0}, "no_response")
    answered = rollout("mig_bench", replace(ONE, key="name/task/1"), boxed((2, RIGHT)), compat="univg-first-box")
    table = tabulate(BENCHMARKS["mig_bench"], [row, answered], [ONE], bootstrap=0, compat="univg-first-box")
    assert table.headline.value == 0.5
    assert table.compat is not None
    assert table.compat.value == 0.5
    assert table.summary.micro.unreadable == {"no_response": 0.5}


FEW, MANY = replace(ONE, task="few"), replace(ONE, task="many")
UNEVEN = [(FEW, boxed((2, RIGHT))), *[(MANY, boxed((2, FAR)))] * 3]


@pytest.mark.parametrize(("benchmark", "headline"), [("mig_bench", 1 / 2), ("lisa", 1 / 4), ("revos", 1 / 4), ("ref_l4", 1 / 4)])
def test_tasks_weigh_alike_in_some_benchmarks_and_rows_in_others(benchmark: str, headline: float) -> None:
    assert table_of(benchmark, UNEVEN).headline.value == headline


@pytest.mark.parametrize("benchmark", ["blink", "mmiu"])
def test_letters_are_averaged_over_tasks(benchmark: str) -> None:
    few, many = lettered("B", task="few"), lettered("B", task="many")
    table = table_of(benchmark, [(few, "B"), (few, "A"), (many, "B"), (many, "(A)"), (many, "Both"), (many, "")])
    assert table.headline.value == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert table.summary.micro.accuracy[0.5].value == pytest.approx(2 / 6)
    assert table.summary.tasks["many"].unreadable == {"missing": 2 / 4}
    assert (table.precision, table.compat, table.summary.micro.measures) == ({}, None, {})


def test_what_cannot_be_read_is_told_by_reason() -> None:
    texts = [boxed((2, INVERTED)), boxed((2, OUTSIDE)), boxed((3, RIGHT)), "<answer>left</answer>", "left", "right"]
    texts += [boxed(*[(2, RIGHT)] * 101), boxed((2, RIGHT))]
    told = table_of("mig_bench", [(ONE, text) for text in texts]).summary.micro.unreadable
    reasons = ("inverted", "off_image", "bad_image", "malformed", "too_many")
    assert told == {**dict.fromkeys(reasons, 1 / 8), "missing": 2 / 8}
    assert set(told) == {reason.value for reason in Unreadable}


def test_overlaps_of_ones_own_stand_in_front_and_leave_the_headline() -> None:
    table = table_of("mig_bench", [(ONE, boxed((2, TOP_HALF)))], ious=(0.4, 0.7))
    assert list(table.summary.ious) == [0.4, 0.7, 0.5, 0.3]
    assert table.headline == table.summary.macro.accuracy[0.5]
    assert (table.headline.value, table.summary.macro.accuracy[0.7].value) == (1, 0)


def test_ref_l4_also_averages_accuracy_from_a_half_to_95() -> None:
    whole = asked(Located(1, Box(0, 0, 1, 1)), images=1)
    table = table_of("ref_l4", [(whole, boxed((1, [0, 0, 1000, 760])))])  # 0.5, 0.55, … 0.75 are reached
    measures = table.summary.micro.measures["mean_accuracy"]
    assert measures is not None
    assert measures.value == pytest.approx(6 / 10)
    assert {level: found.value for level, found in table.summary.micro.accuracy.items()} == {0.5: 1, 0.75: 1, 0.9: 0}


IMAGES: dict[str, tuple[list[tuple[Example, str]], float | None]] = {
    "right": ([(ONE, boxed((2, FAR)))], 1),
    "wrong": ([(ONE, boxed((1, RIGHT)))], 0),
    "one of each": ([(ONE, boxed((2, RIGHT))), (ONE, boxed((1, RIGHT)))], 1 / 2),
    "a box too many": ([(ONE, boxed((2, RIGHT), (1, RIGHT)))], 1 / 2),
    "an answer that names none among some that do": ([(ONE, boxed((2, RIGHT))), (ONE, "(100,100),(300,300)")], 1 / 2),
    "none named at all": ([(ONE, "(100,100),(300,300)"), (ONE, "(700,700),(900,900)")], None),
    "unreadable among named": ([(ONE, boxed((2, RIGHT))), (ONE, "left")], 1 / 2),
    "the question does not say": ([(asked(Located(None, GOLD)), boxed((2, RIGHT)))], None),
    "not asked where it does not say": ([(asked(Located(None, GOLD)), boxed((1, RIGHT))), (ONE, boxed((2, RIGHT)))], 1),
    "a single image": ([(asked(Located(1, GOLD), images=1), boxed((1, RIGHT)))], None),
}


@pytest.mark.parametrize(("rows", "expected"), IMAGES.values(), ids=IMAGES)
def test_image_numbers_are_scored_where_any_answer_names_them(rows: list[tuple[Example, str]], expected: float | None) -> None:
    found = table_of("mig_bench", rows, native="qwen_tokens").summary.micro.image_accuracy
    assert (None if found is None else found.value) == expected


def test_abstention_is_told_of_all_rows_and_of_those_where_nothing_is() -> None:
    rows = [(NONE, "<answer>[]</answer>"), (NONE, boxed((2, RIGHT))), (NONE, "nowhere"), (ONE, "<answer>[]</answer>")]
    rows += [(NONE, "<answer>A</answer>"), (ONE, boxed((2, RIGHT)))]
    measures = table_of("lisa", rows).summary.micro.measures
    told = {name: found.value for name, found in measures.items() if found is not None}
    assert told == {"one_to_one": 2 / 6, "abstained": 2 / 6, "abstained_where_nothing_is": 1 / 4}


def test_abstention_where_nothing_is_needs_such_a_row() -> None:
    measures = table_of("lisa", [(ONE, "<answer>[]</answer>")]).summary.micro.measures
    assert measures["abstained_where_nothing_is"] is None
    assert measures["abstained"] is not None


def test_a_quirk_is_averaged_like_the_headline_and_stands_beside_it() -> None:
    thought = f"<think>{FAR}</think>"
    rows = [(FEW, boxed((2, RIGHT))), (MANY, thought + boxed((2, RIGHT))), (MANY, boxed((2, RIGHT)))]
    table = table_of("mig_bench", rows, compat="univg-first-box")
    assert table.compat is not None
    assert (table.headline.value, table.compat.value) == (1, (1 + 1 / 2) / 2)
    assert table.to_json()["compat"]["value"] == 3 / 4
    assert table_of("mig_bench", rows).to_json()["compat"] is None


# ---------------------------------------------------------------- average precision


def pair(number: int, *instances: tuple[int, int, Sequence[float]], task: str = "comparison") -> Example:
    """An MC-Bench description of two images of 1000 x 1000; `instances` are (image, group, x0 y0 x1 y1 in pixels)."""
    names = [2 * number, 2 * number + 1]
    boxes = [Located(image, Box(*(n / 1000 for n in corners))) for image, _, corners in instances]
    found = [
        {"image_id": names[image - 1], "category_id": group, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": None, "iscrowd": 0}
        for image, group, (x0, y0, x1, y1) in instances
    ]
    example = asked(*boxes, task=task, key=f"mc_bench/{task}/{number}")
    return replace(example, meta={"image_ids": names, "sizes": [[1000, 1000]] * 2, "instances": found})


def mc_table(rows: Sequence[tuple[Example, str]], *, compat: str | None = None) -> Table:
    pytest.importorskip("pycocotools")
    rollouts = [rollout("mc_bench", example, text, compat=compat) for example, text in rows]
    return tabulate(BENCHMARKS["mc_bench"], rollouts, [example for example, _ in rows], bootstrap=0, compat=compat)


IMAGE_LEVEL: dict[str, tuple[list[int], str, float]] = {
    "the image that holds it, wherever on it": ([2], boxed((2, FAR)), 1),
    "the other image": ([2], boxed((1, RIGHT)), 0),
    "both, but it is in one": ([2], boxed((1, RIGHT), (2, RIGHT)), 0),
    "both": ([1, 2], boxed((2, FAR), (1, FAR), (1, RIGHT)), 1),
    "one of two": ([1, 2], boxed((1, RIGHT)), 0),
    "not there, but it is": ([2], "<answer>[]</answer>", 0),
    "not there, and it is not": ([], "<answer>[]</answer>", 1),
    "unreadable where nothing is": ([], "nowhere", 0),
    "a letter where nothing is": ([], "<answer>A</answer>", 0),
    "a box where nothing is": ([], boxed((1, RIGHT)), 0),
}


@pytest.mark.parametrize(("images", "text", "expected"), IMAGE_LEVEL.values(), ids=IMAGE_LEVEL)
def test_image_level_accuracy_asks_for_exactly_the_images_that_hold_one(images: list[int], text: str, expected: float) -> None:
    annotated = (pair(0, (1, 1, RIGHT), task="other"), boxed((1, RIGHT)))
    table = mc_table([annotated, (pair(1, *[(image, 1, RIGHT) for image in images]), text)])
    found = table.summary.tasks["comparison"].measures["image_level"]
    assert found is not None
    assert found.value == expected


def test_a_description_that_fits_nothing_is_answered_by_saying_so() -> None:
    rows = [(pair(0, (1, 1, RIGHT)), boxed((1, RIGHT)))]
    rows += [(pair(n, task="none"), text) for n, text in enumerate(["<answer>[]</answer>", boxed((1, FAR)), "nowhere"], start=1)]
    table = mc_table(rows)
    nothing = table.summary.tasks["none"].measures
    told = {name: found.value for name, found in nothing.items() if found is not None}
    assert told == pytest.approx(
        {"one_to_one": 1 / 3, "abstained": 1 / 3, "abstained_where_nothing_is": 1 / 3, "image_level": 1 / 3}
    )
    assert list(table.precision) == ["comparison", "all"]


GROUPED = [pair(n, (1, 1, RIGHT), (2, 2, RIGHT)) for n in (0, 1)]
"""Two descriptions, each with two groups of one instance."""


def test_groups_are_renamed_in_every_pair_and_in_the_script_only_in_the_last() -> None:
    table = mc_table([(example, boxed((2, RIGHT))) for example in GROUPED], compat=LAST_PAIR)
    # Both instances of group 2, none of group 1; the script finds one of group 2 and takes the other for a wrong group 1.
    assert table.headline.value == pytest.approx((2 * 1 + 2 * 0) / 4)
    assert table.compat is not None
    assert table.compat.value == pytest.approx((2 * 51 / 101 + 2 * 0) / 4)
    assert mc_table([(example, boxed((2, RIGHT))) for example in GROUPED]).compat is None


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        pytest.param([pair(0, (1, 1, RIGHT), (2, 1, FAR)), pair(1)], 1, id="one group"),
        pytest.param([pair(0, (1, 1, RIGHT), (1, 1, FAR), (2, 2, RIGHT))], 2 / 3, id="a group of two and a group of one"),
        # All four boxes are of group 1: of its two instances the first ranks first, the second behind a wrong box.
        pytest.param(GROUPED, (2 * (51 + 50 * 2 / 3) / 101 + 2 * 0) / 4, id="two groups"),
    ],
)
def test_an_answer_cannot_say_the_groups_of_a_description(examples: list[Example], expected: float) -> None:
    pytest.importorskip("pycocotools")
    known = Annotation(benchmark=BENCHMARKS["mc_bench"], path=Path("x"), version=None, examples=tuple(examples))
    assert ceiling(known) == pytest.approx(expected)


def test_without_average_precision_the_annotation_is_a_perfect_answer() -> None:
    assert ceiling(Annotation(benchmark=BENCHMARKS["mig_bench"], path=Path("x"), version=None, examples=(ONE,))) == 1


def test_average_precision_needs_an_annotated_instance() -> None:
    with pytest.raises(DataError, match="MC-Bench: no row has an annotated instance"):
        mc_table([(pair(0), "<answer>[]</answer>")])


def test_data_sets_of_odinw_weigh_alike_however_many_instances_they_have() -> None:
    pytest.importorskip("pycocotools")

    def picture(number: int, task: str, *corners: Sequence[float]) -> Example:
        boxes = [Located(1, Box(*(n / 1000 for n in box))) for box in corners]
        found = [{"image_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0]} for x0, y0, x1, y1 in corners]
        meta = {"image_id": number, "size": [1000, 1000], "category_ids": [3], "instances": found}
        return replace(asked(*boxes, images=1, task=task), meta=meta)

    whole, part = picture(0, "few", RIGHT), picture(1, "many", RIGHT, FAR, [0, 0, 50, 50])
    table = table_of("odinw", [(whole, boxed((1, RIGHT))), (part, boxed((1, [400, 400, 500, 500])))])
    assert {task: found.value for task, found in table.precision.items()} == pytest.approx({"few": 1, "many": 0, "all": 0.5})
    assert table.headline == table.precision["all"]


# ---------------------------------------------------------------- circular choice


def test_a_question_is_turned_once_for_every_other_rotation_of_its_choices() -> None:
    asked_turns = turns(lettered("B", choices=("red", "green", "blue")))
    assert [(turn.key, turn.choices, turn.target.choice) for turn in asked_turns] == [
        ("name/task/0", ("red", "green", "blue"), "B"),
        ("name/task/0~1", ("green", "blue", "red"), "A"),
        ("name/task/0~2", ("blue", "red", "green"), "C"),
    ]
    assert {turn.question for turn in asked_turns} == {"Which?"}


def test_letters_stay_where_they_are_when_their_choices_are_turned() -> None:
    example = lettered("A", choices=("(A) red", "(B) green"))
    assert [(turn.choices, turn.target.choice) for turn in turns(example)] == [
        (("(A) red", "(B) green"), "A"),
        (("green", "red"), "B"),
    ]


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(ONE, id="no choices"),
        pytest.param(lettered("A", choices=("only",)), id="one choice"),
        pytest.param(replace(lettered("A"), question="Which? (A) one (B) two"), id="lists its choices itself"),
        pytest.param(lettered("A", choices=[str(n) for n in range(27)]), id="more choices than letters"),
    ],
)
def test_a_question_that_cannot_be_turned_is_asked_once(example: Example) -> None:
    assert turns(example) == [example]


TURNED = turns(lettered("B", key="name/a~b/0", task="a~b", choices=("red", "green", "blue")))
FOLDED: dict[str, tuple[list[str], int, str | None]] = {
    "right in every turn": (["B", "A", "C"], 1, None),
    "wrong in one": (["B", "A", "A"], 0, None),
    "right by chance": (["B", "B", "B"], 0, None),
    "unreadable in one": (["B", "the first", "C"], 0, "missing"),
}


@pytest.mark.parametrize(("texts", "right", "unreadable"), FOLDED.values(), ids=FOLDED)
def test_a_turned_question_is_right_when_every_turn_is(texts: list[str], right: int, unreadable: str | None) -> None:
    rollouts = [rollout("blink", turn, text) for turn, text in zip(TURNED, texts, strict=True)]
    for given in (rollouts, rollouts[::-1]):
        [folded] = fold_turns(given)
        assert (folded.example, folded.score.iou, folded.score.total) == ("name/a~b/0", right, right)
        assert (folded.score.unreadable, folded.completion.text) == (unreadable, texts[0])


def test_questions_of_one_task_are_folded_apart_whatever_its_name() -> None:
    rows = [rollout("blink", lettered("B", key=f"name/a~1/{n}", task="a~1"), text) for n, text in enumerate("BA")]
    assert [(row.example, row.score.iou) for row in fold_turns(rows)] == [("name/a~1/0", 1), ("name/a~1/1", 0)]
