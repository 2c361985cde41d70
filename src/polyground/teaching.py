"""What makes a teacher's reasoning fit to be taught, apart from its answer being right: text rules, agreement, a judge's marks.

Pure: nothing is sampled, no recipe is known, and whether the answer is right is `rewards`' business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

from polyground.answer import Answer, Located, answer_tags
from polyground.geometry import iou, match_boxes, reaches

MARKS = ("seen", "follows", "own")
"""What a judge marks: that it is seen in the images, that the answer follows, that it is nobody's who knew the answer."""

BEST, WORST = 5, 1
"""The ends of a mark."""


class Unmarked(StrEnum):
    """Why a judge's reply gives no marks."""

    MISSING = "missing"
    """No answer tag."""
    MALFORMED = "malformed"
    """An answer tag without one whole number for each mark."""
    OFF_SCALE = "off_scale"
    """A mark below 1 or above 5."""


_COORDINATES = re.compile(r"\d+\.\d+|\b\d{3,}\b|\d+\s*(?:px|pixels?)\b|[\[(]\s*\d+\s*,\s*\d+|(?:\d+\s*,\s*){3}\d+|<box>|bbox")

_GIVEN = r"(?:given|provided|supplied|known|expected|reference|stated|specified|gold|labell?ed|true)"
_TOLD = r"(?:given|provided|supplied|known|told|stated|specified|revealed|shared|already)"
_SHOWN = r"(?:images?|pictures?|photos?|views?|frames?|crops?|regions?|parts?|scenes?|choices|options)"
_TELLS = re.compile(
    "|".join(
        (
            r"ground[\s-]*truth|annotat(?:ed|ions?|ors?)\b|\bhint(?:s|ed)?\b|\b(?:answer|solution)[\s-]*key",
            rf"\b{_GIVEN} (?:\w+ )?(?:answers?|solutions?|labels?|responses?)\b",
            r"\b(?:correct|right|true) (?:box(?:es)?|bounding|solution|target|label)\b",
            # "The correct answer is B" is how a multiple choice ends.
            r"\b(?:the|this) (?:correct|right) (?:answer|choice)\b"
            r"(?! (?:is|must|would|should|has to|can only|seems|therefore|among)\b)",
            rf"\banswers? (?:is|was|are|were|has|had|being) (?:already )?(?:been )?(?:\w+ )?{_TOLD}\b",
            r"\banswer,? (?:as )?(?:given|provided)\b",
            r"\b(?:since|because|given that|know(?:ing|n)?|knew) (?:that )?(?:the |its )?"
            r"(?:correct |right |final )?(?:answer|solution)\b",
            r"\bas (?:given|stated|told|provided|instructed|indicated|specified)\b"
            rf"(?! (?:in|by|on|from) (?:the )?(?:\w+ )?(?:question|{_SHOWN}))",
            r"\b(?:I|we) (?:was|were|am|are|have been|had been) (?:already )?"
            rf"(?:(?:told|informed)\b(?! to\b)|(?:given|provided)\b(?! (?:with )?(?:\w+ ){{0,4}}{_SHOWN}))",
            r"\b(?:according to|per|based on|following|from) the (?:\w+ )?(?:answer|solution|label|prompt|instructions?)\b",
            r"\bthe (?:prompt|instructions?|task description|user) "
            r"(?:says?|states?|tells?|gives?|provides?|asks?|wants?|requires?)\b",
            r"\bto (?:justify|support|arrive at|reach|explain|match|fit) the (?:\w+ )?answer\b",
            r"\b(?:justif\w+|explain) why the answer\b|\bback(?:wards?)? from the (?:\w+ )?answer\b|\breverse[\s-]*engineer",
            r"\bas if (?:I|we)\b|\bpretend|\beyes only\b|\bwithout (?:mentioning|revealing|referring|admitting|saying)\b",
            r"\b(?:I|we) (?:should|must|may|can|need to|shall|do|will) ?(?:not|n't)? (?:mention|reveal|disclose|admit)\b",
        )
    ),
    re.IGNORECASE,
)
_TELLS_OF_A_BOX = re.compile(
    rf"\b{_GIVEN} (?:\w+ )?(?:box(?:es)?|coordinates|location|target)\b"
    rf"|\b(?:box(?:es)?|coordinates) (?:is|was|are|were|has been|that (?:is|was|are|were) )?\s*{_TOLD}\b",
    re.IGNORECASE,
)


def mentions_coordinates(reasoning: str) -> bool:
    """True for numbers of the size or the shape of a box; counts and image numbers ("image 2", "12 stars") pass.

    >>> mentions_coordinates("Image 2 has 3 stars."), mentions_coordinates("It is at (12, 40).")
    (False, True)
    """
    return _COORDINATES.search(reasoning) is not None


def tells(reasoning: str, question: str = "") -> bool:
    """True for reasoning that gives away that the answer was known beforehand, or that speaks of how it was asked for.

    What the question says itself gives nothing away; nor does talk of a box that was given, where the question gives one.

    >>> tells("The ground truth is given."), tells("The red star moved."), tells("As told, it is left.", "Find it, as told.")
    (True, False, False)
    """
    asked = " ".join(question.lower().split())
    rules = (_TELLS,) if "<box>" in question else (_TELLS, _TELLS_OF_A_BOX)
    said = " ".join(reasoning.replace("’", "'").split())
    return any(found[0].lower() not in asked for rule in rules for found in rule.finditer(said))


def agree(one: Answer, other: Answer, *, threshold: float) -> bool:
    """Whether two answers say the same: the same letter, or as many boxes, which match one to one at this IoU, image by image."""
    if one.choice is not None or other.choice is not None:
        return one.choice == other.choice
    if len(one.boxes) != len(other.boxes):
        return False
    hits = [[_same_box(a, b, threshold) for b in other.boxes] for a in one.boxes]
    return len(match_boxes(hits)) == len(one.boxes)


def _same_box(one: Located, other: Located, threshold: float) -> float:
    return float(one.image == other.image and reaches(iou(one.box, other.box), threshold))


def agreement(answer: Answer, answers: Sequence[Answer | None], *, threshold: float) -> float:
    """Share of the answers, in [0, 1], that say the same; None, for one that could not be read, says something else.

    >>> agreement(Answer(choice="A"), [Answer(choice="A"), Answer(choice="B"), None, Answer(choice="A")], threshold=0.5)
    0.5
    """
    same = sum(other is not None and agree(answer, other, threshold=threshold) for other in answers)
    return same / len(answers) if answers else 0.0


def read_marks(text: str) -> Mapping[str, int] | Unmarked:
    """The marks in the last answer tag of a judge's reply that holds all of them.

    >>> read_marks('Well. <answer>{"seen": 4, "follows": 5, "own": 5}</answer>')
    {'seen': 4, 'follows': 5, 'own': 5}
    >>> read_marks("<answer>good</answer>")
    <Unmarked.MALFORMED: 'malformed'>
    """
    problem: Unmarked | None = None
    for content in reversed(answer_tags(text)):
        found = _marks_in(content)
        if not isinstance(found, Unmarked):
            return found
        problem = problem or found
    return problem or Unmarked.MISSING


def _marks_in(content: str) -> Mapping[str, int] | Unmarked:
    # As for answers: deep brackets exhaust the parser's stack, long digits its integer limit.
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return Unmarked.MALFORMED
    if not isinstance(row, dict):
        return Unmarked.MALFORMED
    marks = {name: mark for name in MARKS if isinstance(mark := row.get(name), int) and not isinstance(mark, bool)}
    if len(marks) < len(MARKS):
        return Unmarked.MALFORMED
    return marks if all(WORST <= mark <= BEST for mark in marks.values()) else Unmarked.OFF_SCALE
