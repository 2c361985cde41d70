"""Image files as they lie on disk: opened without risk, measured by their header, decoded upright.

Whatever an annotation may name is met here: a web page saved as a photograph, half a download, a pipe, a picture of a
gigapixel. What a good picture becomes afterwards (RGB, boxes drawn on it) belongs to vision.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from polyground.errors import DataError

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (Pillow's own limit against decompression bombs)."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is read. Others that Pillow knows are not photographs, or run a program to be drawn (EPS)."""

# What EXIF tag 274 says must be done to show the picture upright.
_ORIENTATION = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)
"""Orientations that swap width and height."""

# What Pillow's decoders raise for damaged files; UnidentifiedImageError is an OSError, bad EXIF numbers are ArithmeticErrors.
# RuntimeErrors come from the AVIF decoder.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
)

_BLOCK = 512
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";", "WEBP": None, "AVIF": None}
"""Compressed formats, and the bytes that end each, before any padding."""

_AGAIN = "fetch or export it again"

_OPENINGS = (
    (b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` where it came from"),
    (b"<?xml", "an XML document, perhaps an SVG drawing", "export it as PNG"),
    (b"<svg", "an SVG drawing", "export it as PNG"),
    (b"<", "a web page", "the download was refused or led elsewhere: open its address and fetch it again"),
    (b"{", "a JSON text", "the download was refused: read it and fetch the image again"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"%!PS", "a PostScript drawing", "export it as PNG"),
    (b"%PDF", "a PDF document", "export its page as PNG"),
)
"""What files that are no images begin with, what they are, and what to do."""


FILE_REASONS = ("missing_image", "unreadable_image", "damaged_image", "huge_image")
"""What can be wrong with a file whatever is done with it."""


class ImageError(DataError):
    """An image file that cannot be used; the message names it and the remedy."""

    page = "data.md#images"

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{shown(path)}: {detail}")
        self.path = path
        self.detail = detail
        self.reason = reason
        """A word that can be counted: missing_image, unreadable_image, damaged_image, huge_image or thin_image."""

    def __reduce__(self) -> tuple[type[ImageError], tuple[Path, str, str]]:
        # By default an exception is rebuilt from its message alone; worker processes hand this one on.
        return type(self), (self.path, self.reason, self.detail)


def shown(path: Path) -> str:
    """A path as a message names it: on one line, whatever its name holds."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def open_image(path: Path) -> Image.Image:
    """The picture with its header read and nothing decoded; the caller closes it.

    Raises ImageError for a file that is missing, no regular file (a pipe would be waited for), no image of FORMATS, or
    larger than MAX_PIXELS.
    """
    _require_file(path)
    try:
        image = Image.open(path, formats=_readable_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path) from error
    except _DAMAGED as error:
        raise ImageError(path, "unreadable_image", _what_it_is(path) or f"not a readable image; {_AGAIN}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(path)
    return image


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header alone."""
    with open_image(path) as image:
        if image.format == "TIFF":
            # Pillow's later versions turn a TIFF themselves, its size at once and its pixels when decoded.
            width, height = (int(image.tag_v2[tag]) for tag in (256, 257))  # type: ignore[attr-defined]
        else:
            width, height = image.size
        return (height, width) if _orientation(image) in _LYING else (width, height)


@contextmanager
def decoded(path: Path) -> Iterator[Image.Image]:
    """The first frame, decoded, in the mode of the file and upright. Raises ImageError also for one that is cut short."""
    with open_image(path) as image:
        orientation = _orientation(image)
        try:
            image.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large(path) from error
        except _DAMAGED as error:
            raise ImageError(path, "damaged_image", f"the image is cut short or damaged ({error}); {_AGAIN}") from error
        if _breaks_off(path, image.format):
            raise ImageError(path, "damaged_image", f"the image ends in zeros, as half a download does; {_AGAIN}")
        if image.format == "TIFF":
            orientation = _orientation(image)
        turn = _UPRIGHT.get(orientation)
        yield image if turn is None else image.transpose(turn)


def check_image(path: Path, *, decode: bool) -> None:
    """Raises ImageError for a file that does not exist, or with `decode` for one that cannot be decoded to its end."""
    if not decode:
        _require_file(path)
        return
    with decoded(path):
        pass


def problem_of(path: Path, *, decode: bool = False) -> ImageError | None:
    """What `check_image` finds wrong with a file."""
    try:
        check_image(path, decode=decode)
    except ImageError as error:
        return error
    return None


def _require_file(path: Path) -> None:
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(path, "missing_image", "no such image; check the image root of the data") from error
    except PermissionError as error:
        raise ImageError(path, "unreadable_image", "may not be read; ask for the right to, or copy it") from error
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ImageError(path, "unreadable_image", f"cannot be opened ({problem}); check its name and links") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ImageError(path, "unreadable_image", f"not a readable image but {kind}; name an image file")


def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _what_it_is(path: Path) -> str | None:
    """What a file that is no image seems to be, with a remedy."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except PermissionError:
        return "may not be read; ask for the right to, or copy it"
    except OSError as error:
        return f"cannot be read ({error.strerror}); {_AGAIN}"
    if not start:
        return f"not a readable image: the file is empty; {_AGAIN}"
    if not start.strip(b"\0"):
        return f"not a readable image: the file begins with zeros, as half a download does; {_AGAIN}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for opening, kind, remedy in _OPENINGS:
        if text.startswith(opening):
            return f"not a readable image but {kind}; {remedy}"
    return None


def _breaks_off(path: Path, kind: str | None) -> bool:
    """Whether compressed data end in a disk block of zeros before their end mark: some decoders fill the rest in, silently."""
    if kind not in _ENDS:
        return False
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if kind == "WEBP":
            # What follows the container is no part of the picture.
            file.seek(4)
            size = min(size, 8 + int.from_bytes(file.read(4), "little"))
        file.seek(max(0, size - _BLOCK))
        if file.read(size - file.tell()).strip(b"\0"):
            return False
        file.seek(0)
        mark = _ENDS[kind]
        return mark is None or not file.read().rstrip(b"\0").endswith(mark)


def _too_large(path: Path) -> ImageError:
    detail = f"more than {MAX_PIXELS:,} pixels; scale the image down (its boxes are relative, they stay right)"
    return ImageError(path, "huge_image", detail)


def _orientation(image: Image.Image) -> int:
    # PngImageFile.getexif decodes the whole picture in search of a late chunk; the base class reads what the header gave.
    # Whoever measures and whoever decodes asks here, so they always agree.
    try:
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except _DAMAGED:
        return 1
