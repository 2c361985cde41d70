"""The text contract: write and read `<think>…</think><answer>…</answer>`, and the native forms of untrained families.

Reading never raises: a completion is an `Answer` or a named reason why it is not one. Scoring lives elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from polyground.geometry import Box, Grid, InvertedBoxError, OffImageError

MAX_BOXES = 100
"""More boxes than this in one answer is a runaway completion, not an answer."""

NATIVE_TAIL = 10_000
"""Native forms have no tags and are searched for in the last so many characters: searching takes quadratic time."""


@dataclass(frozen=True, slots=True)
class Located:
    """A box and the image it lies in."""

    image: int | None
    """1-based position among the prompt's images; None when a native form did not say."""
    box: Box
    confidence: float = 1.0
    """How sure the model says it is, in [0, 1]: ranks boxes where average precision is asked for; 1 when it does not say."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a completion (or the annotation) says: boxes, none of them for "not there", or the letter of a choice."""

    boxes: tuple[Located, ...] = ()
    choice: str | None = None


class Unreadable(StrEnum):
    """Why a completion has no usable answer."""

    MISSING = "missing"
    """No answer tag (and, where native forms are read, no box either)."""
    MALFORMED = "malformed"
    """An answer tag whose content is neither boxes nor a choice."""
    INVERTED = "inverted"
    """A box with swapped corners or no area."""
    OFF_IMAGE = "off_image"
    """A box wholly outside its image."""
    BAD_IMAGE = "bad_image"
    """An image number that the prompt does not have."""
    TOO_MANY = "too_many"
    """More than MAX_BOXES boxes."""


_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_CHOICE = re.compile(r"\(?([A-Z])\)?\.?")
_THOUGHT = re.compile(r"<think>(?:(?!<think>).)*?</think>", re.DOTALL)
_UNTAGGED = r"(?:(?!</?think>|</?answer>).)"
_CONTRACT = re.compile(rf"\s*<think>({_UNTAGGED}+)</think>\s*<answer>({_UNTAGGED}*)</answer>\s*", re.DOTALL)
_DIRECT = re.compile(rf"\s*<answer>{_UNTAGGED}*</answer>\s*", re.DOTALL)


def spoken(text: str) -> str:
    """A completion without its thoughts. Templates may open one in the prompt, so what a stray closing tag ends is one too."""
    return _THOUGHT.sub(" ", text).rpartition("</think>")[2]


def answer_tags(text: str) -> list[str]:
    """What stands in each answer tag outside the thoughts, well-formed or not, in order."""
    return _ANSWER.findall(spoken(text))


def write_answer(answer: Answer, grids: Sequence[Grid]) -> str:
    """The content of the answer tag; each box on the grid of its image. Raises ValueError for a box with no such image.

    >>> from polyground.geometry import PER_MILLE
    >>> write_answer(Answer((Located(2, Box(0.1, 0.2, 0.5, 0.75)),)), [PER_MILLE, PER_MILLE])
    '[{"image": 2, "bbox_2d": [100, 200, 500, 750]}]'
    """
    if answer.choice is not None:
        return answer.choice
    return json.dumps([_row(located, grids) for located in answer.boxes])


def _row(located: Located, grids: Sequence[Grid]) -> dict[str, Any]:
    if located.image is None:
        raise ValueError("the answer contract names the image of every box; this box has none")
    if not 1 <= located.image <= len(grids):
        raise ValueError(f"images are counted from 1 to {len(grids)}; this box is in image {located.image}")
    row = {"image": located.image, "bbox_2d": list(grids[located.image - 1].write(located.box))}
    return row if located.confidence == 1 else {**row, "confidence": located.confidence}


def write_completion(think: str | None, answer: Answer, grids: Sequence[Grid]) -> str:
    """A whole completion in the trained contract; None leaves the think block out."""
    thought = "" if think is None else f"<think>{think}</think>"
    return f"{thought}<answer>{write_answer(answer, grids)}</answer>"


def reasoning_of(text: str) -> str | None:
    """What stands between the think tags of a completion in the contract, or None."""
    found = _CONTRACT.fullmatch(text)
    return found[1].strip() if found else None


def follows_contract(text: str) -> bool:
    """True when the whole text is one non-empty think block and one answer block, nothing before, between or after."""
    return bool(reasoning_of(text))


def answers_directly(text: str) -> bool:
    """True when the whole text is one answer block: the contract of a model that is taught not to reason."""
    return _DIRECT.fullmatch(text) is not None


def read_answer(text: str, grids: Sequence[Grid], *, native: str | None = None) -> Answer | Unreadable:
    """Read the last well-formed `<answer>` of a completion; `grids` has one entry per image of the prompt.

    What stands inside a think block is a thought, tagged or not, and never the answer. `native` names the form an
    untrained family answers in (a key of `NATIVE_READERS`); it is tried only when the text holds no answer tag, and
    leaves `image` unset when the form does not say it.

    >>> from polyground.geometry import PER_MILLE
    >>> read_answer("<answer>B</answer>", [PER_MILLE])
    Answer(boxes=(), choice='B')
    >>> read_answer("it is on the left", [PER_MILLE])
    <Unreadable.MISSING: 'missing'>
    """
    first_problem: Unreadable | None = None
    for content in reversed(answer_tags(text)):
        answer = _read_content(content, grids)
        if isinstance(answer, Answer):
            return answer
        first_problem = first_problem or answer
    if first_problem is not None:
        return first_problem
    if native is None:
        return Unreadable.MISSING
    # A thought cut short never closes.
    return NATIVE_READERS[native](spoken(text).partition("<think>")[0][-NATIVE_TAIL:], grids)


def _read_content(content: str, grids: Sequence[Grid]) -> Answer | Unreadable:
    content = content.strip()
    if found := _CHOICE.fullmatch(content):
        return Answer(choice=found[1])
    rows = _loads(content)
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        return Unreadable.MALFORMED
    return _read_rows(rows, grids, image_required=True)


def _loads(text: str) -> object:
    # Deeply nested brackets exhaust the parser's stack, and absurdly long digits its integer limit (a ValueError).
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_rows(rows: Sequence[object], grids: Sequence[Grid], *, image_required: bool) -> Answer | Unreadable:
    if len(rows) > MAX_BOXES:
        return Unreadable.TOO_MANY
    boxes = []
    for row in rows:
        if not isinstance(row, Mapping) or not _four_numbers(row.get("bbox_2d")):
            return Unreadable.MALFORMED
        image = row.get("image")
        if image is None and image_required and len(grids) > 1:
            return Unreadable.MALFORMED
        if image is None:
            image = 1 if len(grids) == 1 else None
        elif isinstance(image, bool) or not isinstance(image, int):
            return Unreadable.MALFORMED
        located = _locate(image, row["bbox_2d"], grids)
        if isinstance(located, Unreadable):
            return located
        boxes.append(replace(located, confidence=_confidence(row)))
    return Answer(tuple(boxes))


def _confidence(row: Mapping[str, object]) -> float:
    """The number a row calls its confidence or score, kept within [0, 1]; 1 where there is none to be read."""
    value = row.get("confidence", row.get("score"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 1.0
    return min(1.0, max(0.0, float(value)))


def _four_numbers(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in value)
    )


def _locate(image: int | None, numbers: Sequence[float], grids: Sequence[Grid]) -> Located | Unreadable:
    if not grids or (image is not None and not 1 <= image <= len(grids)):
        return Unreadable.BAD_IMAGE
    # Without an image number only a grid shared by all images can be read; per-pixel families then use the last image.
    grid = grids[image - 1] if image is not None else grids[-1]
    try:
        return Located(image, grid.read(numbers))
    except OffImageError:
        return Unreadable.OFF_IMAGE
    except InvertedBoxError:
        return Unreadable.INVERTED


_JSON_LIST = re.compile(r"\[\s*\{.*?\}\s*\]|\{[^{}]*\}", re.DOTALL)

NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"
"""Pattern of one coordinate in a native form."""

POINT_PAIR = re.compile(rf"\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)")
"""A box as two points, inside box tokens or bare."""

_BOX_BRACKETS = re.compile(rf"\[\[?{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]\]?")


def _read_qwen_json(text: str, grids: Sequence[Grid]) -> Answer | Unreadable:
    """`[{"bbox_2d": [x0, y0, x1, y1], "label": …}]`, fenced or not: Qwen2.5-VL, Qwen3-VL."""
    problem = Unreadable.MISSING
    for found in reversed(_JSON_LIST.findall(text)):
        rows = _loads(found)
        rows = [rows] if isinstance(rows, dict) else rows
        if isinstance(rows, list) and rows:
            answer = _read_rows(rows, grids, image_required=False)
            if isinstance(answer, Answer):
                return answer
            problem = answer
    return _read_choice(text) if problem is Unreadable.MISSING else problem


def _read_numbers(pattern: re.Pattern[str], text: str, grids: Sequence[Grid]) -> Answer | Unreadable:
    boxes = []
    for numbers in pattern.findall(text)[: MAX_BOXES + 1]:
        located = _locate(1 if len(grids) == 1 else None, [float(n) for n in numbers], grids)
        if isinstance(located, Unreadable):
            return located
        boxes.append(located)
    if len(boxes) > MAX_BOXES:
        return Unreadable.TOO_MANY
    return Answer(tuple(boxes)) if boxes else _read_choice(text)


def _read_any(text: str, grids: Sequence[Grid]) -> Answer | Unreadable:
    """The first form that finds anything in the text."""
    for form in ("qwen_json", "qwen_tokens", "internvl"):
        answer = NATIVE_READERS[form](text, grids)
        if answer is not Unreadable.MISSING:
            return answer
    return Unreadable.MISSING


def _read_choice(text: str) -> Answer | Unreadable:
    found = _CHOICE.fullmatch(text.strip())
    return Answer(choice=found[1]) if found else Unreadable.MISSING


NATIVE_READERS: dict[str, Callable[[str, Sequence[Grid]], Answer | Unreadable]] = {
    "qwen_json": _read_qwen_json,
    "qwen_tokens": lambda text, grids: _read_numbers(POINT_PAIR, text, grids),
    "internvl": lambda text, grids: _read_numbers(_BOX_BRACKETS, text, grids),
    "any": _read_any,
}
"""How families that were not trained here write their boxes (Qwen2-VL: `qwen_tokens`); `any` is for responses of unknown origin:
the forms differ in their punctuation alone, and the grid is given, not guessed."""


def write_native(answer: Answer, grids: Sequence[Grid], *, native: str, label: str = "") -> str:
    """The answer as an untrained family writes it, a key of `NATIVE_WRITERS`; `label` is what was looked for.

    Of several images only the JSON form says which one a box is in. Raises ValueError for an answer without boxes, which
    these forms cannot give, and for a box in no image of the prompt.

    >>> from polyground.geometry import PER_MILLE
    >>> write_native(Answer((Located(1, Box(0.1, 0.2, 0.5, 0.75)),)), [PER_MILLE], native="internvl", label="a cup")
    '<ref>a cup</ref><box>[[100, 200, 500, 750]]</box>'
    """
    if answer.choice is not None:
        return answer.choice
    if not answer.boxes:
        raise ValueError(f"the native form {native!r} cannot say that nothing is there; use the answer contract")
    rows = [_row(located, grids) for located in answer.boxes]
    if len(grids) == 1:
        for row in rows:
            del row["image"]
    return NATIVE_WRITERS[native](rows, label)


def _write_qwen_json(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    labelled = [{**row, "label": label} if label else row for row in rows]
    return f"```json\n{json.dumps(labelled, ensure_ascii=False)}\n```"


def _write_qwen_tokens(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    named = f"<|object_ref_start|>{label}<|object_ref_end|>" if label else ""
    return named + "".join("<|box_start|>({},{}),({},{})<|box_end|>".format(*row["bbox_2d"]) for row in rows)


def _write_internvl(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    named = f"<ref>{label}</ref>" if label else ""
    return f"{named}<box>{json.dumps([row['bbox_2d'] for row in rows])}</box>"


NATIVE_WRITERS: dict[str, Callable[[Sequence[Mapping[str, Any]], str], str]] = {
    "qwen_json": _write_qwen_json,
    "qwen_tokens": _write_qwen_tokens,
    "internvl": _write_internvl,
}
"""The other way round: rows of the contract and a label to a family's own form. Its keys are `NATIVE_READERS`' but for `any`."""
