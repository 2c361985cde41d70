"""Images as files and pictures: safe loading, cheap sizes, boxes drawn on them, contact sheets.

What a model does with pixels (resizing, patches) belongs to models.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from polyground.conventions import Canvas, Convention
from polyground.errors import DataError
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.imagefile import ImageError, decoded, problem_of
from polyground.imagefile import image_size as image_size


def load_image(path: Path) -> Image.Image:
    """The picture as RGB, upright: EXIF orientation applied, transparency laid on white, first frame of an animation.

    Raises DataError, naming the file, for one that is missing, damaged, cut short or larger than MAX_PIXELS.
    """
    with decoded(path) as image:
        return _to_rgb(image)


def check_images(paths: Iterable[Path]) -> None:
    """Raise one DataError that names the first ten image files which do not exist."""
    missing = [path for path in dict.fromkeys(map(Path, paths)) if problem_of(path) is not None]
    if missing:
        names = "\n".join(f"  {path}" for path in missing[:10])
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise DataError(f"{len(missing)} image files do not exist; check the image root of the data:\n{names}{more}")


def image_hash(path: Path) -> str:
    """SHA-256 of the picture's size and RGB pixels: equal for copies saved with other metadata or another lossless format."""
    image = load_image(path)
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def draw_boxes(
    image: Image.Image, boxes: Sequence[tuple[Box, str, str]], *, min_side: int = 448, halo: bool = False
) -> Image.Image:
    """A copy with each (box, label, colour) outlined; a small image is first enlarged so that lines and labels stay crisp.

    The label may be empty. Boxes are drawn in order, later ones on top. `halo` puts a white rim around every line, for boxes on
    objects of any colour.
    """
    factor = max(1, math.ceil(min_side / max(image.size)))
    canvas = image.convert("RGB")
    if factor > 1:
        canvas = canvas.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    scale = max(canvas.size)
    line, font = max(2, scale // 200) + halo, _font(max(12, scale // 32))
    for box, label, colour in boxes:
        left, top, right, bottom = (round(n) for n in box.to_pixels(width=canvas.width, height=canvas.height))
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        if halo:
            rim = max(1, line // 3)
            wider = (corners[0] - rim, corners[1] - rim, corners[2] + rim, corners[3] + rim)
            draw.rectangle(wider, outline="white", width=line + 2 * rim)
        draw.rectangle(corners, outline=colour, width=line)
        if label:
            _draw_label(draw, canvas.size, (left, top), label, colour, font)
    return canvas


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4, side: int = 448, gap: int = 8
) -> Image.Image:
    """The images in rows on white, each fitted into a square of this side, with its caption below."""
    if not images or len(images) != len(captions):
        raise ValueError(f"a contact sheet needs images and one caption for each; got {len(images)} and {len(captions)}")
    font = _font(max(12, side // 28))
    columns = min(columns, len(images))
    wrapped = [_wrap(caption, font, side) for caption in captions]
    line_height = math.ceil(font.getbbox("Ag")[3]) + 2
    text_height = line_height * max(text.count("\n") + 1 for text in wrapped) + 4
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        left = gap + (number % columns) * (side + gap)
        top = gap + (number // columns) * (side + text_height + gap)
        fitted = _fit(image.convert("RGB"), side)
        sheet.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
        for row, line in enumerate(text.split("\n")):
            draw.text((left, top + side + 2 + row * line_height), line, fill="black", font=font)
    return sheet


def grids_by(convention: Convention) -> Callable[[Sequence[Path]], list[Grid]]:
    """What tells the grids of one prompt's images under a convention; files are only measured where boxes are in pixels."""

    def grids(images: Sequence[Path]) -> list[Grid]:
        if convention.per_mille:
            return [PER_MILLE] * len(images)
        return [canvas_of(image, image_size(image), convention, images=len(images)).grid for image in images]

    return grids


def canvas_of(path: Path, size: tuple[int, int], convention: Convention, *, images: int) -> Canvas:
    """What a family makes of this (width, height) among so many images of a prompt; ImageError names what it cannot take."""
    width, height = size
    try:
        return convention.canvas(width, height, images=images)
    except DataError as error:
        raise ImageError(path, "thin_image", str(error)) from error


def text_strip(
    text: str, *, width: int, size: int = 15, ink: str = "black", paper: str = "white", margin: int = 6
) -> Image.Image:
    """The text, wrapped, on a strip of this width and as high as it needs."""
    font = _font(size)
    lines = _wrap(text, font, width - 2 * margin).split("\n")
    line_height = math.ceil(font.getbbox("Ag")[3]) + max(2, size // 5)
    strip = Image.new("RGB", (width, line_height * len(lines) + 2 * margin), paper)
    draw = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        draw.text((margin, margin + row * line_height), line, fill=ink, font=font)
    return strip


def stacked(images: Sequence[Image.Image], *, gap: int = 0, paper: str = "white") -> Image.Image:
    """The images one below another, flush left."""
    width, height = max(image.width for image in images), sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, height), paper)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height + gap
    return sheet


def beside(images: Sequence[Image.Image], *, gap: int = 0, paper: str = "white") -> Image.Image:
    """The images in one row, their upper edges level."""
    width, height = sum(image.width for image in images) + gap * (len(images) - 1), max(image.height for image in images)
    sheet = Image.new("RGB", (width, height), paper)
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image, its longer side scaled to `side`."""
    return _fit(image.convert("RGB"), side)


def to_data_uri(image: Image.Image, *, kind: str = "PNG") -> str:
    """The image as a `data:` URI, for one HTML file or an OpenAI-style request; PNG is lossless."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(np.asarray(image), mode=image.mode)
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(values: np.ndarray[Any, Any], *, mode: str) -> Image.Image:
    """16-bit whole numbers lose their low byte (Pillow's own conversion saturates them); floats in [0, 1] are stretched.

    32-bit whole numbers have no range of their own: those above 255 are taken for 16-bit ones.
    """
    numbers = np.nan_to_num(values.astype(np.float64))
    if mode.startswith("I;16") or (mode == "I" and numbers.max(initial=0) > 255):
        numbers = numbers / 257
    elif mode == "F" and numbers.max(initial=0) <= 1:
        numbers = numbers * 255
    return Image.fromarray(np.clip(np.rint(numbers), 0, 255).astype(np.uint8)).convert("RGB")


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _draw_label(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[int, int], label: str, colour: str, font: Any
) -> None:
    """The label on a plate of the box's colour, above the box where there is room, always inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = math.ceil(right - left) + 6, math.ceil(bottom - top) + 6
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    y = max(0, min(y, size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    red, green, blue = ImageColor.getrgb(colour)[:3]
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    draw.text((x + 3 - left, y + 3 - top), label, fill=ink, font=font)


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: int) -> str:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)
