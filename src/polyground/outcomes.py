"""What became of an answer, in one word: a few for choosing rows, from the score alone, and finer ones for counting errors.

Nothing is scored anew: it all follows from the scores in the rows.
"""

from __future__ import annotations

from enum import IntFlag, StrEnum

from polyground.records import Example, Rollout, Score
from polyground.rollout import is_right

TOUCHES = 0.1
"""IoU from which a box is loose rather than elsewhere."""


class Outcome(IntFlag):
    """How an answer went; a group of answers has several."""

    RIGHT = 1
    WRONG_IMAGE = 2
    WRONG_BOX = 4
    WRONG_LETTER = 8
    UNREADABLE = 16

    @property
    def spoken(self) -> str:
        return (self.name or "").replace("_", " ").lower()


def outcome_of(score: Score, *, threshold: float) -> Outcome:
    """Right by the rule of the benchmarks, or the first thing that is wrong.

    The image is wrong where images are named and none of them is right; an answer that names none was scored on the annotated
    image, and what is wrong is its box.
    """
    if score.unreadable is not None:
        return Outcome.UNREADABLE
    if is_right(score, threshold=threshold):
        return Outcome.RIGHT
    if score.answer is not None and score.answer.choice is not None:
        return Outcome.WRONG_LETTER
    names_images = score.answer is not None and any(located.image is not None for located in score.answer.boxes)
    return Outcome.WRONG_IMAGE if names_images and score.image_correct == 0 else Outcome.WRONG_BOX


class Kind(StrEnum):
    """What an answer is, seen from the annotation: the first of these that fits."""

    RIGHT = "right"
    CUT_OFF = "cut off"
    UNREADABLE = "unreadable"
    CHOICE = "wrong choice"
    ABSENT = "said not to be there"
    INVENTED = "found what is not there"
    WRONG_IMAGE = "wrong image"
    NUMBER = "wrong number of boxes"
    LOOSE = "loose box"
    ELSEWHERE = "box elsewhere"

    @property
    def style(self) -> str:
        """Of its colour on the page."""
        return f"k-{self.name.lower().replace('_', '-')}"


def explained(threshold: float) -> dict[Kind, str]:
    """Each kind in a sentence."""
    return {
        Kind.RIGHT: f"The box reaches IoU {threshold:g} on the image it names, or the letter is right.",
        Kind.CUT_OFF: "The token budget ran out before there was an answer.",
        Kind.UNREADABLE: "There is no usable answer; the reasons are counted in the tables and under Training.",
        Kind.CHOICE: "Another letter than the annotated one, or boxes where a letter was asked for.",
        Kind.ABSENT: "No box, where something is annotated.",
        Kind.INVENTED: "A box, where nothing is annotated.",
        Kind.WRONG_IMAGE: "A box names an image where nothing is annotated; how well it would lie there is not asked.",
        Kind.NUMBER: "The right images, but more boxes than annotated, or fewer.",
        Kind.LOOSE: f"The right image, and an overlap from {TOUCHES:g} to below {threshold:g}.",
        Kind.ELSEWHERE: f"The right image, or none named, and an overlap below {TOUCHES:g}: another object, or nothing.",
    }


def kind_of(rollout: Rollout, example: Example, *, threshold: float) -> Kind:
    """The kind of an answer."""
    score, target = rollout.score, example.target
    answer = score.answer
    if is_right(score, threshold=threshold):
        return Kind.RIGHT
    if score.unreadable is not None or answer is None:
        return Kind.CUT_OFF if rollout.completion.truncated else Kind.UNREADABLE
    if target.choice is not None or answer.choice is not None:
        return Kind.CHOICE
    if not answer.boxes:
        return Kind.ABSENT
    if not target.boxes:
        return Kind.INVENTED
    known = {located.image for located in target.boxes}
    if None not in known and any(located.image is not None and located.image not in known for located in answer.boxes):
        return Kind.WRONG_IMAGE
    if len(answer.boxes) != len(target.boxes):
        return Kind.NUMBER
    return Kind.LOOSE if score.iou >= TOUCHES else Kind.ELSEWHERE
