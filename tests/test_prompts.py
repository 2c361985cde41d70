import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from polyground.answer import Answer, Located, read_answer
from polyground.config import EvaluateConfig
from polyground.errors import ConfigError, DataError
from polyground.geometry import PER_MILLE, UNIT, Box, Grid
from polyground.prompts import (
    INSTRUCTIONS,
    TASK_ADVICE,
    advice_for,
    judge_messages,
    question_text,
    student_messages,
    teacher_messages,
)
from polyground.records import Example, Message
from polyground.teaching import Unmarked, read_marks
from polyground.worlds.language import TASKS

A, B, C = Path("a.png"), Path("b.png"), Path("c.png")
BOX = Box(0.139, 0.305, 0.495, 0.743)
PIXELS, FLIPPED = Grid(width=112, height=56), Grid(width=1000, height=1000, order="yxyx")


def example(*images: Path, question: str = "Where is the cup?", **changes: object) -> Example:
    plain = Example(key="e1", task="region", images=images, question=question, target=Answer((Located(1, BOX),)))
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "question", "parts"),
    [
        pytest.param((), "Hello?", ("Hello?",), id="none"),
        pytest.param((A,), "Where?", (A, "\nWhere?"), id="one"),
        pytest.param((A, B), "Where?", ("Image 1: ", A, "\nImage 2: ", B, "\nWhere?"), id="two"),
        pytest.param((A, B, C), "Where?", ("Image 1: ", A, "\nImage 2: ", B, "\nImage 3: ", C, "\nWhere?"), id="three"),
        pytest.param((A, A), "Where?", ("Image 1: ", A, "\nImage 2: ", A, "\nWhere?"), id="the-same-image-twice"),
        pytest.param((A, B), "In <image> or <image>?", ("In ", A, " or ", B, "?"), id="placeholders"),
        pytest.param((A, B), "<image><image>Where?", (A, B, "Where?"), id="placeholders-first"),
    ],
)
def test_student_layout(images: tuple[Path, ...], question: str, parts: tuple[str | Path, ...]) -> None:
    grids = [PER_MILLE] * len(images)
    assert student_messages(example(*images, question=question), grids) == [Message("user", parts)]


@pytest.mark.parametrize(
    ("grid", "written"),
    [
        pytest.param(PER_MILLE, "[139, 305, 495, 743]", id="per-mille"),
        pytest.param(UNIT, "[0.139, 0.305, 0.495, 0.743]", id="unit"),
        pytest.param(PIXELS, "[16, 17, 55, 42]", id="pixels"),
        pytest.param(FLIPPED, "[305, 139, 743, 495]", id="y-first"),
    ],
)
def test_question_boxes_are_written_on_the_grid_of_their_own_image(grid: Grid, written: str) -> None:
    asked = example(A, B, question="Track <box>.", question_boxes=(Located(2, BOX),))
    assert question_text(asked, [Grid(width=7, height=7), grid]) == f"Track {written}."


def test_several_boxes_keep_their_order() -> None:
    boxes = (Located(2, Box(0.5, 0.5, 1.0, 1.0)), Located(1, Box(0.0, 0.0, 0.5, 0.5)))
    asked = example(A, B, question="<box> or <box>?", question_boxes=boxes)
    assert question_text(asked, [PER_MILLE] * 2) == "[500, 500, 1000, 1000] or [0, 0, 500, 500]?"


def test_a_question_box_without_image_needs_one_grid_for_all_images() -> None:
    asked = example(A, B, question="Track <box>.", question_boxes=(Located(None, BOX),))
    assert question_text(asked, [PER_MILLE] * 2) == "Track [139, 305, 495, 743]."
    with pytest.raises(DataError, match="e1: a question box is on image None"):
        question_text(asked, [PER_MILLE, PIXELS])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param(
            example(A, B, question="<image> only"), "e1: the question has 1 <image> but there are 2 images", id="images"
        ),
        pytest.param(example(A, B, question="<image>" * 3), "e1: the question has 3 <image> but there are 2", id="too-many"),
        pytest.param(example(A, B, question="<box>?"), "e1: the question has 1 <box> but question_boxes has 0", id="no-box"),
        pytest.param(example(A, B, question_boxes=(Located(1, BOX),)), "e1: the question has 0 <box>", id="no-place"),
        pytest.param(
            example(A, B, question="<box>", question_boxes=(Located(3, BOX),)), "e1: a question box is on image 3", id="off-list"
        ),
        pytest.param(example(A, B, choices=("x",) * 27), "e1: 27 choices", id="alphabet"),
        pytest.param(example(A), "e1: 1 images but 2 grids", id="grids"),
    ],
)
def test_a_bad_question_names_its_example(asked: Example, message: str) -> None:
    with pytest.raises(DataError, match=message):
        student_messages(asked, [PER_MILLE] * 2)


@pytest.mark.parametrize(
    ("question", "choices", "text"),
    [
        pytest.param("Which?", ("red", "blue"), "Which?\n(A) red\n(B) blue", id="appended"),
        pytest.param("Which?", ("(A) red", "(B) blue"), "Which?\n(A) red\n(B) blue", id="lettered-already"),
        pytest.param("Which?\n(A) red\n(B) blue", ("red", "blue"), "Which?\n(A) red\n(B) blue", id="in-the-question"),
        pytest.param(
            "Which, as in (A)?", ("red", "blue"), "Which, as in (A)?\n(A) red\n(B) blue", id="one-letter-is-not-the-list"
        ),
        pytest.param("Which?", (), "Which?", id="no-choices"),
    ],
)
def test_choices_are_listed_once(question: str, choices: tuple[str, ...], text: str) -> None:
    asked = example(A, question=question, choices=choices, target=Answer(choice="A"))
    assert question_text(asked, [PER_MILLE]) == text


def test_the_instruction_stands_last() -> None:
    asked = example(A, question="Which?", choices=("red",), target=Answer(choice="A"))
    [message] = student_messages(asked, [PER_MILLE], instruction="Think first.")
    assert message.parts == (A, "\nWhich?\n(A) red\nThink first.")


def test_neither_student_nor_asked_teacher_sees_the_annotation() -> None:
    asked = example(A, B, meta={"additional_info": "in the 2nd image"})
    for build in (student_messages, teacher_messages):
        [message] = build(asked, [PER_MILLE] * 2)
        shown = "".join(part for part in message.parts if isinstance(part, str))
        assert "139" not in shown
        assert "2nd" not in shown


def test_the_teacher_is_told_its_own_grid_and_the_contract() -> None:
    [message] = teacher_messages(example(A, B), [PIXELS, PER_MILLE])
    text = str(message.parts[-1])
    assert message.images == (A, B)
    assert text.startswith("\nWhere is the cup?")
    assert "on image 1, x runs from 0 to 112 and y from 0 to 56; on image 2, x runs from 0 to 1000" in text
    assert text.endswith('<think>your reasoning</think><answer>[{"image": 1, "bbox_2d": [x0, y0, x1, y1]}]</answer>')


def test_a_teacher_that_writes_y_first_is_told_so() -> None:
    assert "[y0, x0, y1, x1]" in str(teacher_messages(example(A), [FLIPPED])[0].parts[-1])


def test_a_multiple_choice_asks_the_teacher_for_a_letter_and_no_box() -> None:
    text = str(teacher_messages(example(A, choices=("x", "y"), target=Answer(choice="B")), [PER_MILLE])[0].parts[-1])
    assert "letter" in text
    assert "bbox_2d" not in text


def test_the_explaining_teacher_is_shown_an_answer_that_reads_back_as_the_target() -> None:
    asked = example(A, B)
    text = str(teacher_messages(asked, [PER_MILLE] * 2, template="explain")[0].parts[-1])
    assert read_answer(text, [PER_MILLE] * 2) == asked.target


def test_a_target_without_image_cannot_be_explained() -> None:
    with pytest.raises(DataError, match=r"e1: .* use the template 'ask'"):
        teacher_messages(example(A, B, target=Answer((Located(None, BOX),))), [PER_MILLE] * 2, template="explain")


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tell' is unknown; known: ask, explain"):
        teacher_messages(example(A), [PER_MILLE], template="tell")


def test_dollars_in_a_question_are_left_alone() -> None:
    for template in ("ask", "explain"):
        assert "costs $answer?" in str(
            teacher_messages(example(A, question="What costs $answer?"), [PER_MILLE], template=template)
        )


@pytest.mark.parametrize("name", ["reasoned", "direct", "native"])
def test_instructions_are_data_with_a_version(name: str) -> None:
    instruction = INSTRUCTIONS[name]
    assert instruction.name == name
    assert instruction.version == "1"
    assert instruction.boxes
    assert instruction.choice
    assert "\n" not in instruction.boxes + instruction.choice


@pytest.mark.parametrize("name", ["reasoned", "direct"])
def test_instructions_show_the_contract_as_it_is_read(name: str) -> None:
    shown = re.search(r"\[\{.*?\}\]", INSTRUCTIONS[name].boxes)
    assert shown is not None
    filled = shown[0].replace("x0, y0, x1, y1", "100, 200, 300, 400")
    answer = read_answer(f"<answer>{filled}</answer>", [PER_MILLE] * 2)
    assert answer == Answer((Located(1, Box(0.1, 0.2, 0.3, 0.4)),))


def test_every_instruction_that_a_recipe_may_name_exists() -> None:
    named = get_args(EvaluateConfig.model_fields["instruction"].annotation)
    assert set(named) - {"recipe"} == set(INSTRUCTIONS)


@pytest.mark.parametrize("template", ["ask", "explain"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_the_benchmark_has_its_own_advice_and_the_teacher_gets_it(task: str, template: str) -> None:
    assert TASK_ADVICE[task] in str(teacher_messages(example(A, task=task), [PER_MILLE], template=template)[0].parts[-1])
    assert len(set(TASK_ADVICE.values())) == len(TASK_ADVICE)


@pytest.mark.parametrize(
    ("task", "changes", "own", "advice"),
    [
        pytest.param("region", {}, {}, TASK_ADVICE["region"], id="built-in"),
        pytest.param("group_grounding_reg", {}, {}, TASK_ADVICE["group_grounding"], id="its-region-form"),
        pytest.param("ref_l4", {}, {}, TASK_ADVICE["grounding"], id="unknown-grounding"),
        pytest.param("Jigsaw", {"target": Answer(choice="B"), "choices": ("x", "y")}, {}, TASK_ADVICE["choice"], id="choice"),
        pytest.param("region", {}, {"region": "Look.", "*": "See."}, "Look.", id="own"),
        pytest.param("ref_l4", {}, {"region": "Look.", "*": "See."}, "See.", id="own-for-the-others"),
        pytest.param("diff", {}, {"*": "See."}, TASK_ADVICE["diff"], id="built-in-before-the-others"),
    ],
)
def test_advice_is_the_users_own_then_the_tasks_then_the_kinds(
    task: str, changes: dict[str, object], own: dict[str, str], advice: str
) -> None:
    assert advice_for(example(A, task=task, **changes), own) == advice


def test_a_task_named_like_one_of_the_kinds_is_no_mistake() -> None:
    # Migician's sources call a question without a type so.
    assert advice_for(example(A, task="grounding")) == TASK_ADVICE["grounding"]


def test_only_the_explaining_teacher_sees_the_annotation_and_is_told_to_keep_it_to_itself() -> None:
    asked, explained = (
        str(teacher_messages(example(A, B), [PER_MILLE] * 2, template=t)[0].parts[-1]) for t in ("ask", "explain")
    )
    assert "139" not in asked
    assert "annotation" not in asked
    assert "[139, 305, 495, 743]" in explained
    assert "do not mention or lean on an annotation" in explained


def test_the_judge_sees_question_reasoning_and_answer_on_its_own_grid() -> None:
    asked = example(A, B, question="Where is <image> in <image>?")
    [message] = judge_messages(asked, [PIXELS, PIXELS], reasoning="It is in <image> 2.", answer=asked.target)
    text = "".join(part for part in message.parts if isinstance(part, str))
    assert message.images == (A, B)
    assert "It is in image 2." in text
    assert "[16, 17, 55, 42]" in text
    assert "x runs from 0 to 112 and y from 0 to 56" in text
    assert isinstance(read_marks(text), Unmarked)


def test_the_judge_of_a_multiple_choice_is_told_of_no_box() -> None:
    asked = example(A, choices=("x", "y"), target=Answer(choice="B"))
    [message] = judge_messages(asked, [PER_MILLE], reasoning="There are two.", answer=asked.target)
    assert "The answer given: B" in str(message.parts[-1])
    assert "box" not in str(message.parts[-1])
