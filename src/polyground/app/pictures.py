"""Images with boxes over them as SVG, and rows and answers as HTML: what the page shows of them, every text escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from polyground.app.rows import Found, Said
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.imagefile import image_size
from polyground.stages.report.pictures import LABELS, PAINT, boxes_of, reply_of, shown_choices, shown_question
from polyground.vision import fitted, load_image, to_data_uri

OTHERS = ("#c2255c", "#5f3dc4", "#0c8599", "#a15c00", "#2b8a3e", "#364fc7")
"""Of models that have no colour of their own, in turn."""

_DASHES = ("", "7 4", "2 4", "10 3 2 3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A box over an image, in pixels of the file."""

    name: str
    label: str
    colour: str
    dash: str
    x: float
    y: float
    width: float
    height: float
    label_x: float
    label_y: float
    label_width: float


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One image and what is drawn over it; units are pixels of the file, whatever size it is shown at."""

    number: int
    name: str
    uri: str
    """Empty where the file cannot be shown."""
    width: int
    height: int
    text: float
    """Height of the labels."""
    marks: Sequence[Mark]
    problem: str = ""

    @property
    def alt(self) -> str:
        """What a screen reader says in its place."""
        told = [f"{m.label} from {m.x:.0f}, {m.y:.0f} to {m.x + m.width:.0f}, {m.y + m.height:.0f}" for m in self.marks]
        return f"Image {self.number}, {self.name}, {self.width} by {self.height} pixels; " + ("; ".join(told) or "no boxes")


def paint(names: Sequence[str]) -> dict[str, str]:
    """A colour for every name; those of the figure keep theirs.

    >>> paint(["base", "mine"])
    {'base': '#4a5160', 'mine': '#c2255c'}
    """
    others = iter(OTHERS * len(names))
    return {name: PAINT[name] if name in PAINT else next(others) for name in names}


def view(path: Path, number: int, boxes: Sequence[tuple[str, Box]], colours: Mapping[str, str], *, side: int) -> View:
    """The image with the (name, box) that lie on it; one that cannot be read is shown as what is wrong with it."""
    try:
        width, height = image_size(path)
        image = load_image(path)
    except DataError as error:
        return View(number=number, name=path.name, uri="", width=4, height=3, text=0, marks=[], problem=str(error))
    if max(image.size) > side:
        image = fitted(image, side)
    # What has few pixels has sharp ones, which JPEG would smear.
    uri = to_data_uri(image, kind="PNG" if width * height <= 256 * 256 else "JPEG")
    text = max(width, height) / 26
    order = list(colours)
    marks = [_mark(name, box, colours, order.index(name), width, height, text) for name, box in boxes if name in colours]
    return View(number=number, name=path.name, uri=uri, width=width, height=height, text=text, marks=marks)


def _mark(name: str, box: Box, colours: Mapping[str, str], turn: int, width: int, height: int, text: float) -> Mark:
    x0, y0, x1, y1 = box.to_pixels(width=width, height=height)
    label = LABELS.get(name, name)
    plate = text * (0.62 * len(label) + 0.6)
    # Labels of boxes that agree have a corner each, above or below, and leave from the middle to the left or to the right.
    middle = (x0 + x1) / 2
    x = min(x0, middle - plate) if turn % 2 == 0 else max(x1 - plate, middle)
    y = y0 - 1.25 * text if turn // 2 % 2 == 0 else y1 + 0.05 * text
    return Mark(
        name=name,
        label=label,
        colour=colours[name],
        dash=_DASHES[turn % len(_DASHES)],
        x=round(x0, 1),
        y=round(y0, 1),
        width=round(x1 - x0, 1),
        height=round(y1 - y0, 1),
        label_x=round(min(max(0.0, x), max(0.0, width - plate)), 1),
        label_y=round(min(max(0.0, y), max(0.0, height - 1.2 * text)), 1),
        label_width=round(plate, 1),
    )


def pictures(
    images: Sequence[Path], boxes: Sequence[tuple[str, int | None, Box]], colours: Mapping[str, str], *, side: int = 640
) -> str:
    """The images in a row, each with its (name, image, box); a box that names no image is drawn on all of them."""
    views = [
        view(path, number, [(name, box) for name, on, box in boxes if on in (number, None)], colours, side=side)
        for number, path in enumerate(images, start=1)
    ]
    return _render("pictures", views=views)


def message(text: str, *, kind: str = "error") -> str:
    """Something the reader must know, announced to screen readers too."""
    return _render("message", text=text, kind=kind) if text else ""


def thought(name: str, colour: str, *, reasoning: str, reply: str, status: str, tone: str = "") -> str:
    """What one model says, whole or so far."""
    return _render(
        "thought", label=LABELS.get(name, name), colour=colour, reasoning=reasoning, reply=reply, status=status, tone=tone
    )


def card(found: Found, *, threshold: float, side: int = 260) -> str:
    """One row of a shelf: the question, its images with truth and answers drawn, and every answer with what it was worth."""
    rollouts = {said.name: said.rollout for said in found.said}
    colours = paint(["truth", "asked", *rollouts])
    example = found.example
    boxes = boxes_of(example, rollouts) if example is not None else []
    views = []
    for number, path in enumerate(example.images if example is not None else (), start=1):
        views.append(view(path, number, [(name, box) for name, on, box in boxes if on == number], colours, side=side))
    return _render(
        "card",
        found=found,
        question="" if example is None else shown_question(example),
        choices=[] if example is None else shown_choices(example),
        target="" if example is None else _target(found),
        views=views,
        answers=[_answer(said, colours, threshold=threshold) for said in found.said],
        parts=sorted({part for said in found.said for part in said.rollout.score.parts}),
        facts=[(name.replace("_", " "), _shown(value)) for name, value in found.facts.items()],
    )


def _target(found: Found) -> str:
    target = found.example.target if found.example is not None else None
    if target is None:
        return ""
    if target.choice is not None:
        return f"annotated: {target.choice}"
    return "" if target.boxes else "annotated: not there"


def _answer(said: Said, colours: Mapping[str, str], *, threshold: float) -> dict[str, Any]:
    score = said.rollout.score
    reply = reply_of(said.name, said.rollout, threshold=threshold)
    return {
        "label": LABELS.get(said.name, said.name),
        "colour": colours[said.name],
        "right": reply.right,
        "outcome": said.note.replace("_", " ") or reply.verdict,
        "measure": reply.measure,
        "reasoning": reply.reasoning,
        "reply": reply.reply,
        "reward": f"{score.total:.3f}",
        "parts": {name: f"{value:.2f}" for name, value in score.parts.items()},
        "advantage": "" if said.advantage is None else f"{said.advantage:+.2f}",
        "sign": "" if said.advantage is None else "up" if said.advantage > 0 else "down" if said.advantage < 0 else "",
    }


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value


def css() -> str:
    """The stylesheet of the page."""
    return (resources.files("polyground") / "app_template" / "app.css").read_text(encoding="utf-8")


def _render(name: str, **values: Any) -> str:
    return str(Markup(_environment().get_template(f"{name}.html.j2").render(**values)))  # noqa: S704 - escaped by the template


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("polyground", "app_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
