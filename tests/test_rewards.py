import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyground.answer import Answer, Located, write_completion
from polyground.errors import ConfigError, DataError
from polyground.geometry import FULL_IMAGE, PER_MILLE, Box, iou
from polyground.records import Completion, Example, Score
from polyground.rewards import REWARDS, Scorer, load_reward, outcome, passed, read

LEFT, RIGHT, TOP = Box(0.0, 0.0, 0.5, 1.0), Box(0.5, 0.0, 1.0, 1.0), Box(0.0, 0.0, 1.0, 0.5)
GRIDS = [PER_MILLE, PER_MILLE]
THINK = "<think>Both have the cup.</think>"


@dataclass(frozen=True)
class Spec:
    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


def example(*boxes: Located, choice: str | None = None, images: int = 2) -> Example:
    paths = tuple(Path(f"{number}.png") for number in range(images))
    return Example(key="e1", task="region", images=paths, question="the cup", target=Answer(boxes, choice))


ONE = example(Located(2, LEFT))
TWO = example(Located(1, LEFT), Located(2, LEFT))
NONE = example()
ANYWHERE = example(Located(None, LEFT))
LETTER = example(choice="B")


def said(*rows: tuple[int, list[float]]) -> str:
    return THINK + "<answer>" + json.dumps([{"image": image, "bbox_2d": box} for image, box in rows]) + "</answer>"


LEFT_MILLE, RIGHT_MILLE, TOP_MILLE = [0, 0, 500, 1000], [500, 0, 1000, 1000], [0, 0, 1000, 500]


def parts(text: str, question: Example, *, native: str | None = None) -> dict[str, float]:
    names = ("iou", "iou_threshold", "image", "format", "count", "choice")
    return dict(Scorer([Spec(name) for name in names], native=native).score(Completion(text=text), question, GRIDS).parts)


def row(iou: float, threshold: float, image: float, form: float, count: float, choice: float) -> dict[str, float]:
    return {"iou": iou, "iou_threshold": threshold, "image": image, "format": form, "count": count, "choice": choice}


NOTHING = row(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "question", "expected"),
    [
        pytest.param(said((2, LEFT_MILLE)), ONE, row(1, 1, 1, 1, 1, 1), id="right"),
        pytest.param(said((2, TOP_MILLE)), ONE, row(1 / 3, 0, 1, 1, 1, 1 / 3), id="half-right"),
        pytest.param(said((2, [0, 0, 500, 500])), ONE, row(0.5, 1, 1, 1, 1, 0.5), id="exactly-at-the-threshold"),
        pytest.param(said((1, LEFT_MILLE)), ONE, row(0, 0, 0, 1, 1, 0), id="right-box-on-the-wrong-image"),
        pytest.param(said((2, RIGHT_MILLE)), ONE, row(0, 0, 1, 1, 1, 0), id="wrong-box-on-the-right-image"),
        pytest.param(said(), ONE, row(0, 0, 0, 1, 0, 0), id="empty-answer-where-there-is-a-box"),
        pytest.param(said(), NONE, row(1, 1, 1, 1, 1, 1), id="empty-answer-where-there-is-none"),
        pytest.param(said((2, LEFT_MILLE)), NONE, row(0, 0, 0, 1, 0, 0), id="a-box-where-there-is-none"),
        pytest.param(said((2, [0, 0, 1000, 1000])), ONE, row(0.5, 1, 1, 1, 1, 0.5), id="huge-box-earns-its-iou"),
        pytest.param(said((2, [-900, -900, 1900, 1900])), ONE, row(0.5, 1, 1, 1, 1, 0.5), id="a-huger-box-is-clipped"),
        pytest.param(said(*[(2, LEFT_MILLE)] * 4), ONE, row(1 / 4, 1 / 4, 1 / 4, 1, 1 / 4, 1 / 4), id="duplicates"),
        pytest.param(said((1, LEFT_MILLE), (2, LEFT_MILLE)), ONE, row(0.5, 0.5, 0.5, 1, 0.5, 0.5), id="one-box-on-every-image"),
        pytest.param(said((2, LEFT_MILLE)), TWO, row(0.5, 0.5, 0.5, 1, 0.5, 0.5), id="one-of-two"),
        pytest.param(said((2, LEFT_MILLE), (1, LEFT_MILLE)), TWO, row(1, 1, 1, 1, 1, 1), id="two-in-any-order"),
        pytest.param(said((2, LEFT_MILLE), (2, LEFT_MILLE)), TWO, row(0.5, 0.5, 0.5, 1, 1, 0.5), id="one-box-cannot-serve-twice"),
        pytest.param(said((2, [500, 0, 0, 1000])), ONE, NOTHING, id="inverted"),
        pytest.param(said((2, [1200, 0, 1500, 1000])), ONE, NOTHING, id="off-image"),
        pytest.param(said((3, LEFT_MILLE)), ONE, NOTHING, id="an-image-the-prompt-lacks"),
        pytest.param(said(*[(2, LEFT_MILLE)] * 101), ONE, NOTHING, id="runaway"),
        pytest.param("<think>[0, 0, 500, 1000] on image 2</think>", ONE, NOTHING, id="box-only-in-think"),
        pytest.param(THINK + "<answer>on the left</answer>", ONE, NOTHING, id="prose"),
        pytest.param("", ONE, NOTHING, id="no-text"),
        pytest.param("", NONE, NOTHING, id="no-text-is-not-the-empty-answer"),
        pytest.param(THINK + "<answer></answer>", NONE, NOTHING, id="an-empty-tag-is-not-the-empty-answer"),
        pytest.param(
            said((2, LEFT_MILLE)) + said((2, RIGHT_MILLE)), ONE, row(0, 0, 1, 0, 1, 0), id="two-answers-the-last-counts"
        ),
        pytest.param(said((2, LEFT_MILLE)).removeprefix(THINK), ONE, row(1, 1, 1, 0, 1, 1), id="no-think"),
        pytest.param(
            "<think> </think>" + said((2, LEFT_MILLE)).removeprefix(THINK), ONE, row(1, 1, 1, 0, 1, 1), id="empty-think"
        ),
        pytest.param(said((2, LEFT_MILLE)) + " Done.", ONE, row(1, 1, 1, 0, 1, 1), id="text-after-the-answer"),
        pytest.param(THINK + "<answer>B</answer>", ONE, row(0, 0, 0, 1, 0, 0), id="a-letter-for-a-box"),
        pytest.param(THINK + "<answer>B</answer>", NONE, row(0, 0, 0, 1, 0, 0), id="a-letter-is-not-the-empty-answer"),
        pytest.param(THINK + "<answer>B</answer>", LETTER, row(1, 1, 1, 1, 1, 1), id="right-letter"),
        pytest.param(THINK + "<answer>(B)</answer>", LETTER, row(1, 1, 1, 1, 1, 1), id="right-letter-in-brackets"),
        pytest.param(THINK + "<answer>A</answer>", LETTER, row(0, 0, 0, 1, 0, 0), id="wrong-letter"),
        pytest.param(THINK + "<answer>A or B</answer>", LETTER, NOTHING, id="two-letters"),
        pytest.param(said(), LETTER, row(0, 0, 0, 1, 0, 0), id="no-box-for-a-letter"),
        pytest.param(said((1, LEFT_MILLE)), ANYWHERE, row(1, 1, 1, 1, 1, 1), id="the-annotation-does-not-know-the-image"),
        pytest.param(said(), ANYWHERE, row(0, 0, 0, 1, 0, 0), id="empty-answer-where-the-image-is-unknown"),
    ],
)
def test_every_reward(text: str, question: Example, expected: dict[str, float]) -> None:
    assert parts(text, question) == pytest.approx(expected)


def test_a_native_answer_without_image_overlaps_in_the_score_but_earns_no_iou_or_image_reward() -> None:
    text = '[{"bbox_2d": [0, 0, 500, 1000], "label": "cup"}]'
    score = Scorer([Spec("iou"), Spec("image")], native="qwen_json").score(Completion(text=text), ONE, GRIDS)
    assert score.parts == {"iou": 0.0, "image": 0.0}
    assert (score.iou, score.image_correct) == (1.0, 0.0)
    assert outcome(score, ONE) == 0.0
    assert not passed(score)


def test_a_native_answer_on_one_image_or_with_an_unknown_image_earns_the_full_reward() -> None:
    text = '[{"bbox_2d": [0, 0, 500, 1000], "label": "cup"}]'
    single = example(Located(1, LEFT), images=1)
    for question, grids in ((single, [PER_MILLE]), (ANYWHERE, GRIDS)):
        score = Scorer([Spec("iou"), Spec("image")], native="qwen_json").score(Completion(text=text), question, grids)
        assert score.parts == {"iou": 1.0, "image": 1.0}
        assert outcome(score, question) == 1.0
        assert passed(score)


def test_the_native_form_is_not_read_unless_asked_for() -> None:
    score = Scorer([Spec("iou")]).score('[{"bbox_2d": [0, 0, 500, 1000]}]', ONE, GRIDS)
    assert (score.iou, score.unreadable, score.answer) == (0.0, "missing", None)


def test_a_named_wrong_image_scores_nothing_even_by_the_lenient_rule() -> None:
    assert Scorer([]).score(said((1, LEFT_MILLE)), ONE, GRIDS).iou == 0.0


def test_without_reasoning_the_form_asked_for_is_the_answer_alone() -> None:
    thought, direct = said((2, TOP_MILLE)), said((2, TOP_MILLE)).removeprefix(THINK)
    for reasoning, rewarded in ((True, thought), (False, direct)):
        scorer = Scorer([Spec("format"), Spec("iou")], reasoning=reasoning)
        forms = {text: scorer.score(text, ONE, GRIDS).parts for text in (thought, direct)}
        assert {text: parts["format"] for text, parts in forms.items()} == {
            thought: float(rewarded == thought),
            direct: float(rewarded == direct),
        }
        assert forms[thought]["iou"] == forms[direct]["iou"] == pytest.approx(1 / 3)


def test_total_is_the_weighted_sum_of_the_parts_and_the_parts_are_unweighted() -> None:
    score = Scorer([Spec("iou", 0.8), Spec("format", 0.2)]).score(said((2, TOP_MILLE)), ONE, GRIDS)
    assert score.parts == pytest.approx({"iou": 1 / 3, "format": 1.0})
    assert score.total == pytest.approx(0.8 / 3 + 0.2)
    assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score


@pytest.mark.parametrize(("threshold", "expected"), [(0.3, 1.0), (1 / 3, 1.0), (0.5, 0.0)])
def test_iou_threshold_option(threshold: float, expected: float) -> None:
    scorer = Scorer([Spec("iou_threshold", options={"threshold": threshold})])
    assert scorer.score(said((2, TOP_MILLE)), ONE, GRIDS).parts == {"iou_threshold": expected}


@pytest.mark.parametrize(
    ("options", "words", "tokens", "expected"),
    [
        pytest.param({"min_tokens": 4, "max_tokens": 8}, 3, 6, 1.0, id="inside"),
        pytest.param({"min_tokens": 4, "max_tokens": 8}, 3, 8, 1.0, id="at-the-bound"),
        pytest.param({"min_tokens": 4, "max_tokens": 8}, 3, 2, 0.5, id="too-short"),
        pytest.param({"max_tokens": 8}, 3, 12, 0.5, id="too-long"),
        pytest.param({"max_tokens": 8}, 3, 99, 0.0, id="far-too-long"),
        pytest.param({"max_words": 10}, 15, 0, 0.5, id="words-need-no-tokens"),
        pytest.param({"min_words": 20, "max_tokens": 8}, 10, 8, 0.5, id="the-worse-of-both"),
        pytest.param({}, 5, 5, 1.0, id="no-bounds"),
    ],
)
def test_length(options: dict[str, int], words: int, tokens: int, expected: float) -> None:
    text = f"<think>{'a ' * (words - 1)}</think> <answer>[]</answer>"
    assert len(text.split()) == words + 1
    text = text.replace("</think> ", "</think>")
    completion = Completion(text=text, token_ids=tuple(range(tokens)))
    assert Scorer([Spec("length", options=options)]).score(completion, ONE, GRIDS).parts["length"] == pytest.approx(expected)


def test_length_alone_is_worth_nothing() -> None:
    completion = Completion(text="I think and think and think", token_ids=(1, 2, 3))
    assert Scorer([Spec("length", options={"min_tokens": 2})]).score(completion, ONE, GRIDS).parts == {"length": 0.0}


def test_token_bounds_are_refused_where_token_ids_are_hidden() -> None:
    with pytest.raises(ConfigError, match=r"length: example e1 .* use min_words"):
        Scorer([Spec("length", options={"max_tokens": 8})]).score(said(), ONE, GRIDS)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        pytest.param([Spec("iuo")], "did you mean 'iou'", id="misspelt"),
        pytest.param([Spec("zzzz")], "known: iou,", id="unknown"),
        pytest.param([Spec("iou", options={"treshold": 0.5})], "'iou' cannot be called .* 'treshold'", id="unknown-option"),
        pytest.param([Spec("iou_threshold", options={"threshold": 2})], r"must lie in \(0, 1\]; got 2", id="option-out-of-range"),
        pytest.param([Spec("iou_threshold", options={"threshold": "x"})], "cannot be called", id="option-of-the-wrong-type"),
        pytest.param([Spec("length", options={"min_words": 9, "max_words": 3})], "min_words <= max_words", id="crossed-bounds"),
        pytest.param([Spec("iou"), Spec("iou")], "'iou' is listed 2 times", id="twice"),
        pytest.param([Spec("iou", math.nan)], "finite", id="weight"),
        pytest.param([Spec("no/such/file.py:mine")], "no file no/such/file.py", id="no-file"),
    ],
)
def test_a_bad_recipe_is_refused_when_the_scorer_is_built(specs: list[Spec], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scorer(specs)


def test_an_unknown_native_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="'qwen' is unknown; known: qwen_json"):
        Scorer([], native="qwen")


def test_one_reward_may_be_listed_with_different_options() -> None:
    scorer = Scorer([Spec("iou_threshold", options={"threshold": 0.3}), Spec("iou_threshold", options={"threshold": 0.5})])
    assert scorer.score(said((2, TOP_MILLE)), ONE, GRIDS).parts == {
        "iou_threshold(threshold=0.3)": 1.0,
        "iou_threshold(threshold=0.5)": 0.0,
    }


def test_a_users_reward_is_loaded_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def brief(reading, example, completion, *, most=10):\n    return float(len(completion.text) <= most)\n")
    scorer = Scorer([Spec(f"{file}:brief", 2.0, {"most": 5})])
    assert scorer.score("four", ONE, GRIDS).total == 2.0
    assert scorer.score("eleven", ONE, GRIDS).total == 0.0


@pytest.mark.parametrize("result", ["None", "'1'", "float('nan')", "1.5", "-0.1"])
def test_a_reward_that_is_no_number_in_the_unit_range_is_named_with_the_example(tmp_path: Path, result: str) -> None:
    file = tmp_path / "odd.py"
    file.write_text(f"def odd(reading, example, completion):\n    return {result}\n")
    with pytest.raises(ConfigError, match=r"odd\.py:odd' returned .* for example e1"):
        Scorer([Spec(f"{file}:odd")]).score("", ONE, GRIDS)


def test_a_numpy_number_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "odd.py"
    file.write_text("import numpy as np\ndef odd(reading, example, completion):\n    return np.float32(0.5)\n")
    assert Scorer([Spec(f"{file}:odd")]).score("", ONE, GRIDS).total == np.float32(0.5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("", "has no function 'mine'", id="no-function"),
        pytest.param("mine = 3", "has no function 'mine'", id="not-callable"),
        pytest.param("def mine(:", "cannot be imported", id="syntax"),
        pytest.param("import no_such_module_at_all", "cannot be imported", id="import"),
        pytest.param("def mine(reading): return 1", "cannot be called", id="signature"),
    ],
)
def test_a_broken_user_file_is_refused_when_the_scorer_is_built(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=message):
        Scorer([Spec(f"{file}:mine")])


def test_every_built_in_reward_can_be_loaded_by_name() -> None:
    assert [load_reward(name) for name in REWARDS] == list(REWARDS.values())


def test_a_wrong_number_of_grids_names_the_example() -> None:
    with pytest.raises(DataError, match="e1: 2 images but 1 grids"):
        read(Completion(text=""), ONE, [PER_MILLE])


@pytest.mark.parametrize(
    ("score", "threshold", "expected"),
    [
        (Score(total=0, parts={}, iou=0.5, image_correct=1.0), 0.5, True),
        (Score(total=0, parts={}, iou=0.5 - 1e-12, image_correct=1.0), 0.5, True),
        (Score(total=9, parts={}, iou=0.4, image_correct=1.0), 0.5, False),
        (Score(total=0, parts={}, iou=0.6, image_correct=0.0), 0.5, False),
        (Score(total=0, parts={}, iou=0.6), 0.5, True),
        (Score(total=0, parts={}, iou=0.6), 0.7, False),
    ],
)
def test_passing_looks_at_the_outcome_and_never_at_the_shaped_total(score: Score, threshold: float, expected: bool) -> None:
    assert passed(score, threshold) is expected


corners = st.integers(0, 999).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 1, 1000)))
boxes = st.builds(lambda x, y: Box(x[0] / 1000, y[0] / 1000, x[1] / 1000, y[1] / 1000), corners, corners)
located = st.builds(Located, st.integers(1, 2), boxes)


@settings(max_examples=60, deadline=None)
@given(st.lists(located, max_size=4), st.lists(located, max_size=4))
def test_rewards_stay_in_the_unit_range_and_the_truth_earns_all_of_it(predicted: list[Located], gold: list[Located]) -> None:
    question = example(*gold)
    values = parts(write_completion("Look.", Answer(tuple(predicted)), GRIDS), question)
    assert all(0 <= value <= 1 for value in values.values())
    truth = parts(write_completion("Look.", question.target, GRIDS), question)
    assert truth == pytest.approx(dict.fromkeys(truth, 1.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(located, min_size=1, max_size=3), st.lists(located, min_size=1, max_size=3))
def test_repeating_the_answer_never_earns_more(predicted: list[Located], gold: list[Located]) -> None:
    # Fewer boxes than gold may be completed by luck; from as many on, every copy only dilutes.
    if len(predicted) < len(gold):
        predicted = (predicted * 3)[: len(gold)]
    question = example(*gold)
    once = parts(write_completion("Look.", Answer(tuple(predicted)), GRIDS), question)["iou"]
    again = parts(write_completion("Look.", Answer(tuple(predicted * 2)), GRIDS), question)["iou"]
    assert again <= once + 1e-9


@settings(max_examples=40, deadline=None)
@given(boxes)
def test_the_full_image_earns_exactly_its_iou(box: Box) -> None:
    values = parts(said((1, [0, 0, 1000, 1000])), example(Located(1, box)))
    assert values["iou"] == pytest.approx(iou(box, FULL_IMAGE))
