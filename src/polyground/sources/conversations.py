"""What readers of conversations share: turns paired, placeholders counted, boxes and letters read out of the answers.

One example per question and answer. Boxes are read on the grid that the user declares, never on one guessed from the numbers,
and never clipped. Fields and roles of a format belong to its reader.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyground.answer import MAX_BOXES, Answer, Located
from polyground.conventions import GRIDS, named_grid
from polyground.errors import DataError, GridError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources.pixels import corner_box, measured
from polyground.sources.prose import Mention, image_mentions, split_options
from polyground.sources.reading import RowError, shortened, unit_box

USERS = ("user", "human")
ASSISTANTS = ("assistant", "gpt")
SYSTEMS = ("system",)

LONGEST = 100_000
"""Characters of one question or answer; what is longer is no annotation of boxes."""

IMAGE = "<image>"
BOX = "<box>"

_QWEN_IMAGE = re.compile(r"(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?")
_REFERENCE_MARKS = re.compile(r"<\|object_ref_(?:start|end)\|>|</?ref>")
_THOUGHT = re.compile(r"<think>((?:(?!<think>).)*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])(?:\)[.:]?|[.:])?(?:\s+(\S.*))?", re.DOTALL)

_NUMBER = r"\s*([-+]?\d{1,9}(?:\.\d{1,20})?)\s*"
_FOUR = ",".join([_NUMBER] * 4)
_TOKENS = rf"(?:<\|box_start\|>\s*)?\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)(?:\s*<\|box_end\|>)?"
_BRACKETS = rf"\[\[{_FOUR}\]\]|\[{_FOUR}\]"
# The look-ahead is only for speed.
_PLAIN = re.compile(rf"(?=[<(\[])(?:{_TOKENS}|(?:<box>\s*)?(?:{_BRACKETS})(?:\s*</box>)?)")
_GIVEN = re.compile("\0(\\d+)\0")
_BOX_KEYS = ("bbox_2d", "box_2d")
_NOTHING = re.compile(r"\s*(?:```(?:json)?)?\s*\[\s*\]\s*(?:```)?\s*")
_OPENING = re.compile(r"[\[{]")
_LITERAL = 10_000
"""Characters of a Python literal that is tried; its parser is not made for hostile text."""
_TRIES = 20
"""Brackets that open no JSON before a text is given up: trying each takes quadratic time."""
# "Image 2: <image>" only says which image follows.
_ANNOUNCED = re.compile(rf"\s*:?\s*{IMAGE}")
# A mention right behind a box that belongs to the box: "… in the third image", "… (image 3)".
_BEHIND = re.compile(r"\s*(?:\(|(?:in|on|of|from|within)\s)\s*(?:the\s+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, as the file writes them."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How one file is to be read: what its user declares, and what its format is known for."""

    file: Path
    source: str
    """Name of the format, for `Example.meta`."""
    grid: str | None
    """A name of `conventions.GRIDS`; None is an error at the first box."""
    unnamed_image: int | None = None
    """The image of an answer's box that nothing names."""
    marked_image: int | None = None
    """The image of a question's box that nothing names."""
    last_named: bool = False
    """A question that names several images is about the last."""
    task: str | None = None
    """Of rows that do not say theirs; None for `grounding` or `multiple_choice`, by the answer."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid not in GRIDS:
            raise DataError(f"{self.file}: unknown grid {self.grid!r}; known: {', '.join(GRIDS)}")
        for option, image in (("unnamed_image", self.unnamed_image), ("marked_image", self.marked_image)):
            if image is not None and (isinstance(image, bool) or not isinstance(image, int) or image < 1):
                raise DataError(f"{self.file}: {option} counts images from 1; got {image!r}")


# ---------------------------------------------------------------- messages to turns


def turns_of(messages: Iterable[tuple[str, str]], answer: str | None = None) -> list[Turn]:
    """Questions paired with answers; `messages` are (role, text) with the roles user, assistant and system.

    `answer` answers a last question left open. What a system message says is not part of a question. RowError of reason
    malformed for other roles or an answer to nothing, no_answer for a question left open.
    """
    turns: list[Turn] = []
    asked: list[str] = []
    for role, text in messages:
        if role == "system":
            continue
        if role == "user":
            asked.append(text)
        elif role != "assistant":
            raise RowError("malformed", f"a message of role {role!r}; only user, assistant and system are read")
        elif not asked:
            raise RowError("malformed", "an answer with no question before it")
        else:
            turns.append(Turn("\n".join(asked), text))
            asked = []
    if asked and answer is not None:
        turns.append(Turn("\n".join(asked), answer))
    elif asked:
        raise RowError("no_answer", "the last question has no answer")
    if not turns:
        raise RowError("malformed", "the row has no question")
    return turns


def messages_of(
    rows: Any,
    role_key: str,
    text_key: str,
    *,
    users: Sequence[str] = USERS,
    assistants: Sequence[str] = ASSISTANTS,
    systems: Sequence[str] = SYSTEMS,
) -> Iterator[tuple[str, str]]:
    """(role, text) of a list of objects, roles in this project's words; RowError of reason malformed."""
    if not isinstance(rows, list | tuple) or not rows:
        raise RowError("malformed", f"the conversation must be a list of messages; got {shortened(rows)}")
    names = {**dict.fromkeys(systems, "system"), **dict.fromkeys(assistants, "assistant"), **dict.fromkeys(users, "user")}
    for row in rows:
        role = row.get(role_key) if isinstance(row, dict) else None
        if not isinstance(role, str):
            raise RowError("malformed", f"a message must be an object with {role_key!r} and {text_key!r}; got {shortened(row)}")
        yield names.get(role, role), text_of(row.get(text_key))


def text_of(content: Any) -> str:
    """The text of a message's content: a string, a list of parts with `<image>` for each image, a number, boxes in JSON."""
    if isinstance(content, str):
        return _clean(content)
    if isinstance(content, int | float):
        return str(content)
    if isinstance(content, list | tuple) and content and all(isinstance(part, dict) and "type" in part for part in content):
        return "".join(_part(part) for part in content)
    if isinstance(content, list | dict):
        return _dumps(content)
    raise RowError("malformed", f"a message without text: {shortened(content)}")


def _clean(text: str) -> str:
    if "\0" in text:
        # It marks given boxes here, and no text of a person holds one.
        raise RowError("malformed", f"a text with a zero character: {shortened(text)}")
    return text


def _dumps(content: Any) -> str:
    try:
        return json.dumps(content)
    except (TypeError, ValueError) as error:
        raise RowError("malformed", f"the content of a message is neither text nor JSON: {shortened(content)}") from error


def _part(part: Mapping[str, Any]) -> str:
    match part["type"]:
        case "image" | "image_url":
            return IMAGE
        case "text" if isinstance(part.get("text"), str):
            return _clean(part["text"])
        case _:
            raise RowError("malformed", f"a message part is neither text nor image: {shortened(part)}")


def images_in(messages: Any) -> list[Any]:
    """Image names inside the parts of messages, for rows that have no column of images."""
    found = []
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                name = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
                name = name.get("url") if isinstance(name, dict) and "url" in name else name
                if name is not None:
                    found.append(name)
    return found


def images_of(row: Mapping[str, Any], *columns: str, among: Sequence[Any] = ()) -> Any:
    """What the first of these columns that the row has calls its images, else those `among` its messages."""
    return next((row[column] for column in columns if row.get(column) not in (None, [])), list(among))


def identity_of(row: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The row's own `task`, None without one, and its `id` for `Example.meta`."""
    task, identity = row.get("task"), row.get("id")
    named = task if isinstance(task, str) and task.strip() else None
    return named, {"id": identity} if isinstance(identity, str | int) else {}


def answer_field(row: Mapping[str, Any], named: str | None, usual: Sequence[str]) -> str | None:
    """The answer that a row keeps beside its messages: in the field named, else in the first usual one that it has."""
    for name in (named,) if named is not None else usual:
        value: Any = row
        for step in name.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            return text_of(value)
    if named is not None:
        raise RowError("no_answer", f"the row has no field {named!r}")
    return None


# ---------------------------------------------------------------- turns to examples


def examples_of(
    turns: Sequence[Turn],
    images: tuple[Path, ...],
    key: str,
    reading: Reading,
    *,
    task: str | None = None,
    given: Sequence[Located] = (),
    meta: Mapping[str, Any] | None = None,
) -> list[Example | RowError]:
    """One example, or the reason against it, per turn; the key of one of several turns ends in its position.

    A turn sees the images whose `<image>` stands in it or before it, all of them in a row without placeholders. Where `given`
    is set, `mark_given` stands in the texts for each of these boxes. Raises RowError of reason placeholder_mismatch.
    """
    questions = [_QWEN_IMAGE.sub(IMAGE, t.question) if "<|image_pad|>" in t.question else t.question for t in turns]
    counts = [question.count(IMAGE) for question in questions]
    if sum(counts) not in (0, len(images)):
        raise RowError("placeholder_mismatch", f"{sum(counts)} {IMAGE} for {len(images)} images")
    found: list[Example | RowError] = []
    sizes: dict[Path, tuple[int, int]] = {}
    seen = 0
    for number, (turn, question, count) in enumerate(zip(turns, questions, counts, strict=True)):
        turn_key = key if len(turns) == 1 else f"{key}/{number}"
        earlier, seen = seen, seen + count
        # Images of earlier turns come first when this turn brings its own.
        question = IMAGE * earlier + question if count else question
        shown = images[:seen] if sum(counts) else images
        question = _unannounced(question, len(shown))
        try:
            found.append(_Row(shown, reading, given, sizes).example(Turn(question, turn.answer), turn_key, task, meta or {}))
        except RowError as error:
            found.append(RowError(error.reason, str(error), turn_key))
    return found


def _unannounced(question: str, images: int) -> str:
    """The question without the opening that prompts put before one that places no image: it would be announced twice."""
    numbered = "".join(f"Image {number}: {IMAGE}\n" for number in range(1, images + 1))
    return question.removeprefix(f"{IMAGE}\n" if images == 1 else numbered)


def mark_given(number: int) -> str:
    """What stands in a text for the box of this position among the given ones."""
    return f"\0{number}\0"


@dataclass(frozen=True, slots=True)
class _Written:
    """A box as a text writes it."""

    start: int
    end: int
    numbers: Any = None
    image: int | None = None
    confidence: float = 1.0
    given: Located | None = None
    """The box itself, for a place where a given box stands; then there are no numbers."""


@dataclass(frozen=True, slots=True)
class _Row:
    images: tuple[Path, ...]
    reading: Reading
    given: Sequence[Located]
    sizes: dict[Path, tuple[int, int]]
    """Of the row's images that had to be measured."""

    def example(self, turn: Turn, key: str, task: str | None, meta: Mapping[str, Any]) -> Example:
        """A question with boxes or a letter as its answer. RowError of reason malformed, no_images or too_many."""
        if max(len(turn.question), len(turn.answer)) > LONGEST:
            raise RowError("malformed", f"a question or answer of more than {LONGEST:,} characters")
        if not self.images:
            raise RowError("no_images", "no image is shown before this question")
        question, question_boxes, free = self._question(turn.question)
        reasoning, spoken = _without_thought(turn.answer)
        boxes = self._boxes(spoken, free)
        choices: tuple[str, ...] = ()
        if boxes is None:
            question, choices = split_options(question)
            target = Answer(choice=_letter(spoken, choices))
        else:
            target = Answer(tuple(dict.fromkeys(boxes)))
            if len(target.boxes) > MAX_BOXES:
                raise RowError("too_many", f"{len(target.boxes)} boxes in one answer; at most {MAX_BOXES}")
        usual = "grounding" if target.choice is None else "multiple_choice"
        return Example(
            key=key,
            task=task or self.reading.task or usual,
            images=self.images,
            question=question,
            target=target,
            question_boxes=question_boxes,
            choices=choices,
            meta={"source": self.reading.source, **meta, **({"reasoning": reasoning} if reasoning else {})},
        )

    def _question(self, text: str) -> tuple[str, tuple[Located, ...], list[int]]:
        """The question with its boxes taken out, those boxes, and the images it names besides theirs."""
        text = _REFERENCE_MARKS.sub("", text)
        _refuse_videos(text)
        mentions = [mention for mention in image_mentions(text) if not _ANNOUNCED.match(text, mention.end)]
        boxes, pieces, used, end = [], [], set(), 0
        for written in _plain_boxes(text, self.given):
            mention = _mention_of(written, mentions, text)
            image = written.image or (mention.image if mention else None) or self._only_image() or self.reading.marked_image
            if mention is not None:
                used.add(mention.start)
            boxes.append(self._locate(written, image, "box in the question"))
            pieces.append(text[end : written.start])
            end = written.end
        pieces.append(text[end:])
        if any(BOX in piece for piece in pieces):
            raise RowError("malformed", f"the question holds {BOX} without a box, which stands for a box here")
        question = BOX.join(pieces).strip()
        if not question.replace(IMAGE, "").strip():
            raise RowError("malformed", "the question is empty")
        return question, tuple(boxes), [mention.image for mention in mentions if mention.start not in used]

    def _boxes(self, text: str, asked: Sequence[int]) -> list[Located] | None:
        """The boxes of an answer; None when it says a letter; `asked` are the images that the question names."""
        tagged = _ANSWER.findall(text)
        text = tagged[-1] if tagged else text
        written = _answer_boxes(text, self.given)
        if not written:
            if _NOTHING.fullmatch(text):
                return []
            if _LETTER.fullmatch(text.strip()):
                return None
            raise RowError("no_box", f"the answer holds no box and is no letter: {shortened(text.strip())}")
        mentions = image_mentions(text)
        told = {mention.image for mention in mentions}
        located = []
        for box in written:
            mention = _mention_of(box, mentions, text)
            if box.image is not None:
                image: int | None = box.image
            elif mention is not None:
                image = mention.image
            elif len(told) == 1:
                image = next(iter(told))
            else:
                image = self._only_image() or self._asked_image(asked) or self.reading.unnamed_image
            located.append(self._locate(box, image, "box"))
        return located

    def _only_image(self) -> int | None:
        return 1 if len(self.images) == 1 else None

    def _asked_image(self, asked: Sequence[int]) -> int | None:
        if asked and (self.reading.last_named or len(set(asked)) == 1):
            return asked[-1]
        return None

    def _locate(self, written: _Written, image: int | None, what: str) -> Located:
        if image is not None and not 1 <= image <= len(self.images):
            raise RowError("bad_image", f"a {what} is in image {image} of {len(self.images)}")
        if written.given is not None:
            return Located(image, written.given.box)
        return Located(image, self._box(written.numbers, image, what), written.confidence)

    def _box(self, numbers: Any, image: int | None, what: str) -> Box:
        grid = self.reading.grid
        if grid is None:
            raise GridError(
                f"{self.reading.file}: boxes are written as numbers, and the file does not say on which grid; set the source "
                "option grid (in a recipe `options: {grid: …}`, else --option grid=…) to one of "
                "per_mille (0-1000: Qwen2-VL, Qwen3-VL, InternVL), pixels (of the image file, upright), "
                "unit (0-1), per_mille_yxyx (0-1000, y first: Gemini)"
            )
        if grid == "pixels":
            return corner_box(numbers, self._size(image), what=what)
        rule = named_grid(grid, 1, 1)
        if rule.order == "yxyx" and isinstance(numbers, list) and len(numbers) == 4:
            numbers = [numbers[1], numbers[0], numbers[3], numbers[2]]
        return unit_box(numbers, width=rule.width, height=rule.height, what=what)

    def _size(self, image: int | None) -> tuple[int, int]:
        """Size of the image a box is in, or the one size that all images share."""
        paths = self.images if image is None else (self.images[image - 1],)
        for path in paths:
            if path not in self.sizes:
                self.sizes[path] = measured(path)
        sizes = {self.sizes[path] for path in paths}
        if len(sizes) > 1:
            raise RowError("unnamed_image", "a box in pixels of images that differ in size, and nothing names its image")
        return sizes.pop()


def _without_thought(text: str) -> tuple[str, str]:
    """The reasoning of an answer, "" for none, and what is left of it."""
    thoughts = [thought.strip() for thought in _THOUGHT.findall(text)]
    spoken = _THOUGHT.sub(" ", text)
    # Where the chat template opens the thought, only its end is written.
    before, closed, after = spoken.rpartition("</think>")
    if closed:
        thoughts.append(before.strip())
        spoken = after
    return "\n".join(thought for thought in thoughts if thought), spoken


def _refuse_videos(text: str) -> None:
    if "<video>" in text or "<|video_pad|>" in text:
        raise RowError("malformed", "the question shows a video; name its frames as images")


def _letter(text: str, choices: Sequence[str]) -> str:
    """The letter of "(B)", "B." or "B. the dog"; RowError of reason bad_choice or no_box."""
    tagged = _ANSWER.findall(text)
    text = (tagged[-1] if tagged else text).strip()
    found = _LETTER.fullmatch(text)
    position = ord(found[1]) - ord("A") if found else len(choices)
    said = found[2] if found else None
    if found is None or (said and (position >= len(choices) or _words(said) != _words(choices[position]))):
        # "A dog sits there." starts like a letter and is a sentence.
        raise RowError("no_box", f"the answer holds no box and is no letter: {shortened(text)}")
    if not choices:
        raise RowError("bad_choice", f"the answer is {found[1]}, and the question lists no lettered options")
    if position >= len(choices):
        raise RowError("bad_choice", f"the answer is {found[1]} of {len(choices)} choices")
    return found[1]


def _words(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


# ---------------------------------------------------------------- boxes in a text


def _plain_boxes(text: str, given: Sequence[Located]) -> list[_Written]:
    """Given boxes where there are marks of them, else `<|box_start|>(x0,y0),(x1,y1)<|box_end|>`, `[[…]]` and `[…]`."""
    if marks := list(_GIVEN.finditer(text)):
        boxes = [given[int(mark[1])] for mark in marks]
        return [_Written(m.start(), m.end(), image=box.image, given=box) for m, box in zip(marks, boxes, strict=True)]
    found = []
    for match in _PLAIN.finditer(text):
        numbers = [float(n) for n in match.groups() if n is not None]
        found.append(_Written(match.start(), match.end(), numbers))
    if text.count("<|box_start|>") > sum("<|box_start|>" in text[box.start : box.end] for box in found):
        raise RowError("malformed", f"a box token without two corners: {shortened(text)}")
    return found


def _answer_boxes(text: str, given: Sequence[Located]) -> list[_Written]:
    """As `_plain_boxes`, and objects with `bbox_2d` in JSON, fenced or not."""
    if "\0" in text or not any(key in text for key in _BOX_KEYS):
        return _plain_boxes(text, given)
    found = [
        _Written(start, end, numbers, _number_of(row), _confidence_of(row))
        for start, end, row in _objects(text)
        for numbers in _lists_of_four(next(row[key] for key in _BOX_KEYS if key in row))
    ]
    if not found:
        raise RowError("malformed", f"the answer names bbox_2d and is no whole JSON: {shortened(text)}")
    return found


def _objects(text: str) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """(start, end of the JSON around it, object) of every object that has a box."""
    decoder, position, tries = json.JSONDecoder(), 0, 0
    while tries < _TRIES and (found := _OPENING.search(text, position)):
        try:
            value, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            tries += 1
            value, end = _literal(text[found.start() :].strip("` \n")), len(text)
            if value is None:
                position = found.end()
                continue
        for row in _with_box(value):
            yield found.start(), end, row
        position = end


def _literal(text: str) -> Any:
    """The value of a text in single quotes, as Python writes it, or None."""
    if "'" not in text or len(text) > _LITERAL:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _with_box(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        if any(key in value for key in _BOX_KEYS):
            yield value
        else:
            for inner in value.values():
                yield from _with_box(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _with_box(inner)


def _lists_of_four(value: Any) -> list[Any]:
    """One box, or a list of them; what is neither is one bad box."""
    return value if isinstance(value, list) and value and all(isinstance(n, list) for n in value) else [value]


def _number_of(row: Mapping[str, Any]) -> int | None:
    image = row.get("image")
    if image is None or (isinstance(image, int) and not isinstance(image, bool)):
        return image
    raise RowError("malformed", f"the image of a box must be its number, counted from 1; got {shortened(image)}")


def _confidence_of(row: Mapping[str, Any]) -> float:
    value = row.get("confidence")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 else 1.0


def _mention_of(written: _Written, mentions: Sequence[Mention], text: str) -> Mention | None:
    """The mention that names the image of a box: "<box> in the third image" right behind it, else the last one before it."""
    behind = next((mention for mention in mentions if mention.start >= written.end), None)
    if behind is not None and _BEHIND.fullmatch(text, written.end, behind.start):
        return behind
    return next((mention for mention in reversed(mentions) if mention.end <= written.start), None)
