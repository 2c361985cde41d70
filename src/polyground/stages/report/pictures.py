"""Answers drawn on their images: what the gallery and the samples of training show, and the one picture of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from polyground.answer import Located, reasoning_of
from polyground.geometry import Box
from polyground.outcomes import outcome_of
from polyground.records import Example, Rollout
from polyground.rollout import is_right
from polyground.vision import load_image, to_data_uri

LABELS = {
    **{"base": "base", "sft": "SFT", "rl": "RL", "truth": "truth", "asked": "asked about"},
    **{"best": "best", "worst": "worst", "alike": "all alike"},
}
"""Of models; then of completions within a group of the training."""

PAINT = {"truth": "#0b7a3e", "base": "#4a5160", "sft": "#1864ab", "rl": "#d9480f", "asked": "#862e9c"}
"""On pictures, which do not follow the theme of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A box on a picture, in the picture's pixels."""

    model: str
    x: float
    y: float
    width: float
    height: float
    stroke: float
    dash: str
    label_x: float
    label_y: float
    label_width: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image inlined into the page, and the boxes drawn over it; sizes in CSS pixels."""

    uri: str
    width: int
    height: int
    boxes: Sequence[Drawn]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What one model said to one question."""

    model: str
    right: bool
    verdict: str
    measure: str
    reasoning: str
    reply: str
    """The completion without its reasoning, as the model wrote it."""
    note: str = ""
    """What the completion was worth, in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question of the gallery."""

    key: str
    split: str
    task: str
    outcome: str
    tone: str
    """`good`, `bad` or nothing: the colour of the outcome's tag."""
    question: str
    choices: Sequence[str]
    target: str
    pictures: Sequence[Picture]
    answers: Sequence[Reply]


def shown_question(example: Example) -> str:
    """The question as a person reads it: its placeholders named."""
    numbers = iter(range(1, len(example.images) + 1))
    text = re.sub("<image>", lambda _: f"[image {next(numbers, '?')}]", example.question)
    asked = iter(example.question_boxes)

    def name(_: re.Match[str]) -> str:
        located = next(asked, None)
        return "[the box]" if located is None or located.image is None else f"[the box in image {located.image}]"

    return re.sub("<box>", name, text).strip()


def boxes_of(example: Example, rollouts: Mapping[str, Rollout]) -> list[tuple[str, int, Box]]:
    """(model, image, box) of the annotation, the boxes asked about, and every answer.

    A box of an answer that names no image was scored against the annotated one: it is drawn there.
    """
    gold = next((located.image for located in example.target.boxes if located.image is not None), None) or 1
    everything: list[tuple[str, Sequence[Located]]] = [("asked", example.question_boxes), ("truth", example.target.boxes)]
    everything += [(model, rollout.score.answer.boxes if rollout.score.answer else ()) for model, rollout in rollouts.items()]
    return [(model, located.image or gold, located.box) for model, boxes in everything for located in boxes]


# Each model's label has a corner of its own, so that boxes which agree keep their labels apart: (right side?, below the box?).
_CORNERS = {
    **{"truth": (False, False), "rl": (True, False), "base": (False, True), "sft": (True, True), "asked": (False, False)},
    **{"best": (True, False), "worst": (False, True), "alike": (True, False)},
}
_STROKES = {
    **{"truth": (3.0, ""), "rl": (2.2, ""), "sft": (2.2, "6 3"), "base": (2.2, "2 3"), "asked": (2.0, "8 2 2 2")},
    **{"best": (2.2, ""), "worst": (2.2, "2 3"), "alike": (2.2, "")},
}


def shown_choices(example: Example) -> list[str]:
    """The choices of a multiple choice under their letters."""
    return [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(example.choices)]


def draw_pictures(example: Example, located: Sequence[tuple[str, int, Box]], *, side: int) -> list[Picture]:
    """The images of a question, each with the boxes (as `boxes_of` gives them) that lie on it."""
    return [
        draw_picture(path, [(model, box) for model, image, box in located if image == number], side=side)
        for number, path in enumerate(example.images, start=1)
    ]


def draw_picture(path: Path, boxes: Sequence[tuple[str, Box]], *, side: int) -> Picture:
    """The image, its longer side `side` pixels long, and (model, box) pairs laid over it; raises DataError for a bad image."""
    image = load_image(path)
    scale = side / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    # Drawn at the size asked for; a smaller file is only stretched by the browser, not stored larger.
    width, height = max(1, round(image.width * max(scale, 1))), max(1, round(image.height * max(scale, 1)))
    drawn = [place_box(model, box, width, height) for model, box in boxes]
    return Picture(uri=small_uri(image), width=width, height=height, boxes=drawn)


def small_uri(image: Image.Image) -> str:
    """The image for the page: without loss, unless it is a photograph, which JPEG keeps in far fewer bytes."""
    lossless = to_data_uri(image)
    lossy = to_data_uri(image, kind="JPEG")
    return lossy if 2 * len(lossy) < len(lossless) else lossless


def place_box(model: str, box: Box, width: int, height: int) -> Drawn:
    """The box in pixels, and where its label stands: every model has a corner of its own, so that no label hides another."""
    x0, y0, x1, y1 = box.to_pixels(width=width, height=height)
    right, below = _CORNERS[model]
    stroke, dash = _STROKES[model]
    plate = 6.9 * len(LABELS[model]) + 8
    middle = (x0 + x1) / 2
    x = max(x1 - plate, middle) if right else min(x0, middle - plate)
    y = y1 + 1 if below else y0 - 15
    return Drawn(
        model=model,
        x=round(x0, 1),
        y=round(y0, 1),
        width=round(x1 - x0, 1),
        height=round(y1 - y0, 1),
        stroke=stroke,
        dash=dash,
        label_x=round(min(max(0.0, x), max(0.0, width - plate)), 1),
        label_y=round(min(max(0.0, y), max(0.0, height - 14.0)), 1),
        label_width=round(plate, 1),
    )


def reply_of(model: str, rollout: Rollout, *, threshold: float) -> Reply:
    """What one model said, split into reasoning and answer; `threshold` is the IoU from which a box is right."""
    score, text = rollout.score, rollout.completion.text
    reasoning = reasoning_of(text)
    return Reply(
        model=model,
        right=is_right(score, threshold=threshold),
        verdict=verdict(rollout, threshold=threshold),
        measure=_measure(rollout),
        reasoning=reasoning or "",
        reply=(text.split("</think>", 1)[1] if reasoning else text).strip() or "(empty)",
    )


def verdict(rollout: Rollout, *, threshold: float) -> str:
    """A few words for how an answer went; of an unreadable one, why."""
    why = rollout.score.unreadable
    return outcome_of(rollout.score, threshold=threshold).spoken + (f": {why.replace('_', ' ')}" if why else "")


def _measure(rollout: Rollout) -> str:
    answer = rollout.score.answer
    if answer is None:
        return ""
    if answer.choice is not None:
        return f"answered {answer.choice}"
    unnamed = any(located.image is None for located in answer.boxes)
    return f"IoU {rollout.score.iou:.2f}" + (" · no image named" if unnamed else "")


def compose(example: Example, rollouts: Mapping[str, Rollout], *, side: int = 448, gap: int = 20) -> Image.Image:
    """Question above, images in a row with all boxes, one line per model below."""
    located = boxes_of(example, rollouts)
    panels = []
    for number, path in enumerate(example.images, start=1):
        panels.append(_panel(path, [(model, box) for model, image, box in located if image == number], side=side))
    width = max(900, sum(panel.width for panel in panels) + gap * (len(panels) + 1))
    large, small = ImageFont.load_default(size=26), ImageFont.load_default(size=19)
    question = _lines(shown_question(example), large, width - 2 * gap)
    texts = [("truth", "the annotated box")] + [(model, _line(rollout)) for model, rollout in rollouts.items()]
    wrapped = [(model, _lines(text, small, width - 2 * gap - 90)) for model, text in texts]
    rows = sum(len(lines) for _, lines in wrapped)
    top = gap + 34 * len(question) + 10
    sheet = Image.new("RGB", (width, top + side + 40 + 27 * rows + 8 * len(wrapped) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, gap), "\n".join(question), fill="#1b1f27", font=large, spacing=8)
    x = (width - sum(panel.width for panel in panels) - gap * (len(panels) - 1)) // 2
    for number, panel in enumerate(panels, start=1):
        sheet.paste(panel, (x, top))
        draw.rectangle((x - 1, top - 1, x + panel.width, top + side), outline="#c8ced8")
        draw.text((x, top + side + 6), f"Image {number}", fill="#5c6573", font=small)
        x += panel.width + gap
    y = top + side + 40
    for model, lines in wrapped:
        draw.rounded_rectangle((gap, y + 1, gap + 72, y + 25), radius=5, fill=PAINT[model])
        draw.text((gap + 36, y + 13), LABELS[model], fill="white", font=small, anchor="mm")
        for line in lines:
            draw.text((gap + 90, y + 2), line, fill="#1b1f27", font=small)
            y += 27
        y += 8
    return sheet


def _panel(path: Path, boxes: Sequence[tuple[str, Box]], *, side: int) -> Image.Image:
    """One image at this height with its boxes, laid out as on the page and twice as large."""
    image = load_image(path)
    panel = image.resize((round(image.width * side / image.height), side), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=20)
    placed = [place_box(model, box, panel.width // 2, side // 2) for model, box in boxes]
    for drawn in placed:
        x, y = 2 * drawn.x, 2 * drawn.y
        corners = (x, y, x + 2 * drawn.width, y + 2 * drawn.height)
        # The annotation lies under the answers, so it is drawn wider: a box that agrees with it leaves a green rim.
        rim = 6 if drawn.model == "truth" else 0
        outer = (corners[0] - rim, corners[1] - rim, corners[2] + rim, corners[3] + rim)
        draw.rectangle((outer[0] - 2, outer[1] - 2, outer[2] + 2, outer[3] + 2), outline="white", width=8 + rim)
        draw.rectangle(outer, outline=PAINT[drawn.model], width=4 + rim)
    # No box runs over a label.
    for drawn in placed:
        x, y, width = 2 * drawn.label_x, 2 * drawn.label_y, 2 * drawn.label_width
        draw.rounded_rectangle((x, y, x + width, y + 28), radius=5, fill=PAINT[drawn.model])
        draw.text((x + width / 2, y + 14), LABELS[drawn.model], fill="white", font=font, anchor="mm")
    return panel


def _line(rollout: Rollout) -> str:
    """IoU and reasoning in one line for the picture."""
    if rollout.score.unreadable is not None:
        return f"unreadable answer: {rollout.score.unreadable.replace('_', ' ')}"
    text = reasoning_of(rollout.completion.text) or "answers without reasoning"
    return f"IoU {rollout.score.iou:.2f}.  {text}"


def _lines(text: str, font: Any, width: int) -> list[str]:
    """The text broken at spaces so that no line is wider than this."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
