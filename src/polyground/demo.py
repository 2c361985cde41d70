"""Ask a model about several image files and see the box: the answer in pixels of the original files, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyground.answer import Answer, Located, Unreadable, read_answer, reasoning_of
from polyground.errors import DataError
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.vision import check_images, contact_sheet, draw_boxes, image_size, load_image

CAPTION_SIDE = 448
COLOUR = "#e4572e"


def ground(
    model: Path | str,
    images: Sequence[Path],
    *,
    question: str,
    instruction: str = "",
    out: Path | None = None,
    max_tokens: int = 256,
    dtype: str = "float32",
    temperature: float = 0.0,
    seed: int = 0,
) -> Mapping[str, Any]:
    """Load the model, ask once, and give the first box as `image` and `box`, all of them as `boxes`, beside the raw text.

    Boxes are `[x0, y0, x1, y1]` in pixels of the file; `image` is 1-based, null where the answer does not name one.
    `out` receives the images side by side with the boxes drawn.
    """
    from polyground.models import load_model
    from polyground.sampling.local import LocalSampler

    check_images(images)
    loaded = load_model(model, dtype=dtype)
    grids = loaded.family.grids(images)
    example = Example(key="ask", task="ask", images=tuple(images), question=question, target=Answer())
    messages = student_messages(example, grids, instruction=instruction)
    sampler = LocalSampler(loaded)
    [[completion]] = sampler.sample([messages], n=1, temperature=temperature, max_tokens=max_tokens, seed=seed)
    answer = read_answer(completion.text, grids, native=loaded.family.native)
    if out is not None:
        annotate(images, answer, out)
    return describe(answer, images, text=completion.text)


def describe(answer: Answer | Unreadable, images: Sequence[Path], *, text: str) -> dict[str, Any]:
    """The reply as plain JSON values."""
    reply: dict[str, Any] = {"image": None, "box": None, "reasoning": reasoning_of(text), "raw": text}
    if isinstance(answer, Unreadable):
        return {**reply, "unreadable": answer.value}
    if answer.choice is not None:
        return {**reply, "choice": answer.choice}
    boxes = [{"image": located.image, "box": _pixels(located, images)} for located in answer.boxes]
    return {**reply, **(boxes[0] if boxes else {}), "boxes": boxes}


def _pixels(located: Located, images: Sequence[Path]) -> list[float] | None:
    """None for a box whose image is not named among images of different sizes: its pixels would be a guess."""
    sizes = {image_size(path) for path in images}
    if located.image is None and len(sizes) > 1:
        return None
    width, height = image_size(images[(located.image or 1) - 1])
    return [round(side, 1) for side in located.box.to_pixels(width=width, height=height)]


def annotate(images: Sequence[Path], answer: Answer | Unreadable, out: Path) -> None:
    """Draw the images in rows, each box on its image; a box that names no image is drawn on all of them."""
    boxes = answer.boxes if isinstance(answer, Answer) else ()
    drawn = []
    for number, path in enumerate(images, start=1):
        mine = [(located.box, "", COLOUR) for located in boxes if located.image in (number, None)]
        drawn.append(draw_boxes(load_image(path), mine))
    captions = [f"Image {number}: {path.name}" for number, path in enumerate(images, start=1)]
    sheet = contact_sheet(drawn, captions, columns=min(4, len(images)), side=CAPTION_SIDE)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{out}: the drawing cannot be written ({error}); name a .png file in a folder you may write to"
        ) from error
