"""What becomes of every kind of bad image file: the right pixels, or an error that names the file and the remedy; never a hang.

Odd but good files (rotated, CMYK, 16-bit, animated) are here as well: whoever measures them and whoever decodes them agree.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from polyground.config import Recipe
from polyground.errors import DataError
from polyground.imagefile import MAX_PIXELS, ImageError, check_image, image_size
from polyground.sources import read_source
from polyground.sources.pixels import require_size
from polyground.sources.reading import RowError
from polyground.stages import evaluate, reject, sft
from polyground.storage import RunFolder, read_rows
from polyground.vision import check_images, load_image
from toys import write_toy

# Pillow warns of metadata that it leaves out, and of large headers before we refuse them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*", "ignore::PIL.Image.DecompressionBombWarning")

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
"""128 x 96; too random for any compression to leave out bytes that matter."""

READERS = (load_image, image_size, lambda path: check_image(path, decode=True))


def saved(path: Path, image: Image.Image = NOISE, **options: object) -> bytes:
    image.save(path, **options)  # type: ignore[arg-type]
    return path.read_bytes()


def png(width: int, height: int, pixels: bytes, *, bits: int = 8, kind: int = 2, extra: bytes = b"") -> bytes:
    """A PNG written by hand; `pixels` are the rows, each behind its filter byte; kind 0 is grey, 2 RGB, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ---------------------------------------------------------------- files that are no images


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        pytest.param(b"", "the file is empty", "again", id="empty"),
        pytest.param(b"\0" * 4096, "begins with zeros", "again", id="zeros"),
        pytest.param(b"<!DOCTYPE html><html>429</html>", "a web page", "download was refused", id="html"),
        pytest.param(b"\xef\xbb\xbf\r\n<HTML>", "a web page", "download was refused", id="html-with-a-mark"),
        pytest.param(b'{"error": "rate limit"}', "a JSON text", "fetch the image again", id="json"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer", "git lfs pull", id="lfs"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing", "export it as PNG", id="svg"),
        pytest.param(b"PK\x03\x04....", "a ZIP archive", "unpack it", id="zip"),
        pytest.param(b"%PDF-1.7", "a PDF document", "export its page", id="pdf"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript drawing", "export it", id="eps"),
        pytest.param(b"not an image", "not a readable image", "fetch or export it again", id="text"),
        pytest.param(b"\xff\xd8\xff\xe0", "not a readable image", "fetch or export it again", id="four-bytes-of-jpeg"),
        pytest.param(b"RIFF\x10\0\0\0WEBPVP8 ", "not a readable image", "fetch or export it again", id="webp-without-data"),
    ],
)
def test_a_file_that_is_no_image_says_what_it_is(tmp_path: Path, content: bytes, kind: str, remedy: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for read in READERS:
        with pytest.raises(ImageError, match=rf"photo\.jpg: .*{kind}.*{remedy}") as caught:
            read(path)
        assert caught.value.reason == "unreadable_image"
        assert caught.value.path == path


# ---------------------------------------------------------------- half of a file

COMPRESSED = ["a.png", "a.jpg", "progressive.jpg", "a.webp", "lossless.webp", "a.gif", "lzw.tiff", "a.avif"]
PLAIN = ["a.bmp", "a.ppm", "a.tiff"]


def written(path: Path) -> bytes:
    if path.suffix == ".avif" and "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow knows no AVIF")
    options = {"progressive": {"progressive": True}, "lossless": {"lossless": True}, "lzw": {"compression": "tiff_lzw"}}
    return saved(path, **options.get(path.stem, {}))


@pytest.mark.parametrize("name", [*COMPRESSED, *PLAIN])
def test_a_download_cut_anywhere_is_an_error_or_the_whole_picture(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = written(path)
    pixels = load_image(path).tobytes()
    ends = [int(len(whole) * part) for part in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)] + [len(whole) - n for n in (1, 2, 4, 12)]
    for end in ends:
        path.write_bytes(whole[:end])
        if end < len(whole) - 12 or cannot(path):
            with pytest.raises(ImageError, match=rf"{re.escape(name)}: .*again"):
                load_image(path)
        else:
            # Only what comes after the last pixel is missing.
            assert load_image(path).tobytes() == pixels


def cannot(path: Path) -> bool:
    try:
        load_image(path)
    except ImageError:
        return True
    return False


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("part", [0.25, 0.5, 0.9])
def test_half_a_download_in_a_file_of_full_length_is_an_error(tmp_path: Path, name: str, part: float) -> None:
    path = tmp_path / name
    whole = written(path)
    end = min(int(len(whole) * part), len(whole) - 600)
    path.write_bytes(whole[:end] + bytes(len(whole) - end))
    with pytest.raises(ImageError, match=r"damaged|zeros|not a readable image"):
        load_image(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_zeros_after_the_end_of_a_picture_do_no_harm(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = written(path)
    pixels = load_image(path).tobytes()
    path.write_bytes(whole + bytes(4096))
    assert load_image(path).tobytes() == pixels


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_raises_anything_but_an_image_error_and_sizes_agree(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff", "a.ppm"]))
    path = tmp_path / name
    exif = Image.Exif()
    exif[274] = 6
    content = bytearray(saved(path, NOISE.resize((16, 12)), **({"exif": exif} if name in ("a.png", "a.jpg", "a.webp") else {})))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ImageError):
        assert load_image(path).size == image_size(path)


# ---------------------------------------------------------------- sizes that are not true


def taller(path: Path) -> Path:
    """The file with the height in its header doubled, its data untouched."""
    content = bytearray(path.read_bytes())
    width, height = image_size(path)
    if path.suffix == ".png":
        content[20:24] = struct.pack(">I", 2 * height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        at = {".jpg": content.find(b"\xff\xc0") + 5, ".bmp": 22, ".gif": 8}[path.suffix]
        content[at : at + 2] = struct.pack(">H" if path.suffix == ".jpg" else "<H", 2 * height)
        if path.suffix == ".gif":
            at = content.index(b",\0\0\0\0") + 7
            content[at : at + 2] = struct.pack("<H", 2 * height)
    path.write_bytes(content)
    assert image_size(path) == (width, 2 * height)
    return path


@pytest.mark.parametrize("suffix", ["bmp", "gif"])
def test_a_header_that_promises_more_rows_than_there_are_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tall.{suffix}"
    saved(path)
    with pytest.raises(ImageError, match=rf"tall\.{suffix}: the image is cut short"):
        load_image(taller(path))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_jpeg_and_png_fill_promised_rows_in_so_the_annotation_has_to_tell(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tall.{suffix}"
    saved(path)
    assert load_image(taller(path)).size == (128, 192)
    with pytest.raises(RowError, match="is 128 x 192 pixels, the annotation says 128 x 96"):
        require_size(path, (128, 96))


def test_a_png_whose_header_was_edited_without_its_checksum_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "edited.png"
    content = bytearray(saved(path))
    content[20:24] = struct.pack(">I", 5)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"edited\.png: not a readable image"):
        image_size(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png(40_000, 40_000, bytes(1 << 20)), id="png-of-a-gigapixel"),
        pytest.param(png(2**31 - 1, 2**31 - 1, b""), id="png-of-four-exapixels"),
        pytest.param(png(9_460, 9_460, bytes(1 << 20)), id="png-just-above-the-limit"),
        pytest.param(b"P6 60000 60000 255\n", id="ppm"),
        pytest.param(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;", id="gif"),
        pytest.param(b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0), id="bmp"),
    ],
)
def test_a_bomb_is_refused_before_any_of_it_is_decoded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(content)
    before = peak_memory()
    for read in READERS:
        with pytest.raises(ImageError, match=r"bomb\.png: more than 89,478,485 pixels; scale the image down") as caught:
            read(path)
        assert caught.value.reason == "huge_image"
    assert peak_memory() - before < 32 << 20


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_in_a_text_chunk_is_not_unpacked(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "text.png"
    zeros = zlib.compressobj(9)
    packed = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(128)) + zeros.flush()
    path.write_bytes(png(2, 1, b"\0" + bytes(RED) * 2, extra=chunk(kind, b"a\0\0" + packed)))
    before = peak_memory()
    with contextlib.suppress(ImageError):
        assert load_image(path).getpixel((0, 0)) == RED
    assert peak_memory() - before < 64 << 20


def peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def test_the_limit_is_ours_even_when_a_library_lifts_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(MAX_PIXELS + 1, 1, b""))
    with pytest.raises(ImageError, match="more than"):
        image_size(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_very_small_and_very_long_pictures_are_read(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    saved(path, Image.new("RGB", size, WHITE))
    assert load_image(path).size == image_size(path) == size
    assert load_image(path).getextrema() == ((255, 255),) * 3


# ---------------------------------------------------------------- odd but good files


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(11))
def test_rotation_is_applied_once_and_unknown_ones_not_at_all(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.new("RGB", (64, 32), BLUE)
    image.paste(RED, (0, 0, 32, 16))
    saved(path, image, exif=exif)
    lying = orientation in (5, 6, 7, 8)
    size = (32, 64) if lying else (64, 32)
    assert load_image(path).size == image_size(path) == size
    # The quarter that is red, by hand: 2 mirrors, 3 turns round, 4 flips, 5 to 8 do so to the transposed picture.
    right, low = {2: (1, 0), 3: (1, 1), 4: (0, 1), 6: (1, 0), 7: (1, 1), 8: (0, 1)}.get(orientation, (0, 0))
    corner = (size[0] // 4 + right * size[0] // 2, size[1] // 4 + low * size[1] // 2)
    assert near(load_image(path).getpixel(corner), RED)


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        pytest.param(2, 4, b"six\0", id="text"),
        pytest.param(4, 1, struct.pack("<I", 2**31), id="far-too-large"),
        pytest.param(3, 2, struct.pack("<HH", 6, 6), id="two-numbers"),
        pytest.param(5, 1, struct.pack("<I", 26), id="six-divided-by-zero"),
        pytest.param(3, 0, bytes(4), id="nothing"),
        pytest.param(3, 2**31, bytes(4), id="beyond-the-end"),
    ],
)
def test_an_orientation_that_is_no_number_turns_nothing(tmp_path: Path, kind: int, count: int, value: bytes) -> None:
    entry = struct.pack("<HHHI4s", 1, 274, kind, count, value)
    path = tmp_path / "a.jpg"
    saved(path, exif=b"Exif\0\0II*\0\x08\0\0\0" + entry + bytes(4) + struct.pack("<II", 6, 0))
    assert load_image(path).size == image_size(path)
    if kind != 3:
        assert image_size(path) == NOISE.size


@pytest.mark.parametrize(
    "junk", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 40]
)
def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "a.jpg"
    saved(path, exif=junk) if junk else saved(path)
    assert load_image(path).size == image_size(path) == NOISE.size


def near(pixel: object, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.subtract(pixel, colour)).max() <= 12)  # type: ignore[call-overload]


def two(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (32, 16), left)  # type: ignore[arg-type]
    image.paste(right, (16, 0, 32, 16))  # type: ignore[arg-type]
    return image


def deep(left: int, right: int) -> Image.Image:
    return Image.fromarray(np.repeat(np.array([[left, right]], dtype=np.uint16), 16, axis=1).repeat(16, axis=0))


def palette(transparent: int | None) -> Image.Image:
    image = two("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize(
    ("name", "image", "left", "right"),
    [
        pytest.param("a.jpg", two("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), RED, BLACK, id="cmyk-jpeg-stored-inverted"),
        pytest.param("a.tiff", two("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), RED, BLACK, id="cmyk-tiff"),
        pytest.param("a.png", two("1", 0, 1), BLACK, WHITE, id="one-bit"),
        pytest.param("a.tiff", two("1", 0, 1), BLACK, WHITE, id="one-bit-tiff"),
        pytest.param("a.png", palette(None), RED, BLUE, id="palette"),
        pytest.param("a.png", palette(0), WHITE, BLUE, id="palette-with-a-transparent-colour"),
        pytest.param("a.gif", palette(1), RED, WHITE, id="gif-with-a-transparent-colour"),
        pytest.param("a.png", two("LA", (0, 255), (0, 0)), BLACK, WHITE, id="grey-and-transparency"),
        pytest.param("a.png", two("RGBA", (*RED, 255), (*RED, 0)), RED, WHITE, id="rgba"),
        pytest.param("a.webp", two("RGBA", (*RED, 255), (*RED, 0)), RED, WHITE, id="rgba-webp"),
        pytest.param("a.png", two("RGBA", (*BLACK, 128), (*BLACK, 255)), (127, 127, 127), BLACK, id="half-transparent"),
        pytest.param("a.png", deep(0, 65535), BLACK, WHITE, id="16-bit-grey"),
        pytest.param("a.png", deep(0, 255), BLACK, (1, 1, 1), id="16-bit-grey-that-is-dark"),
        pytest.param("a.tiff", deep(0, 32896), BLACK, (128, 128, 128), id="16-bit-tiff"),
    ],
)
@pytest.mark.parametrize("orientation", [1, 3])
def test_every_mode_becomes_rgb(
    tmp_path: Path, name: str, image: Image.Image, left: tuple[int, ...], right: tuple[int, ...], orientation: int
) -> None:
    path = tmp_path / name
    exif = Image.Exif()
    exif[274] = orientation
    saved(path, image, **({} if name.endswith("gif") else {"exif": exif}))
    loaded = load_image(path)
    if orientation == 3 and not name.endswith("gif"):
        left, right = right, left
    assert (loaded.mode, loaded.size) == ("RGB", (32, 16))
    assert near(loaded.getpixel((4, 8)), left)  # type: ignore[arg-type]
    assert near(loaded.getpixel((28, 8)), right)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "pixel", "extra", "expected"),
    [
        pytest.param(2, struct.pack(">3H", 65535, 32896, 0), b"", (255, 128, 0), id="rgb"),
        pytest.param(6, struct.pack(">4H", 65535, 0, 0, 65535), b"", RED, id="rgba"),
        pytest.param(6, struct.pack(">4H", 65535, 0, 0, 0), b"", WHITE, id="transparent"),
        pytest.param(4, struct.pack(">2H", 32896, 65535), b"", (128, 128, 128), id="grey-and-transparency"),
        pytest.param(0, struct.pack(">H", 32896), b"", (128, 128, 128), id="grey"),
        pytest.param(
            2, struct.pack(">3H", 65535, 0, 0), chunk(b"tRNS", struct.pack(">3H", 0, 0, 65535)), RED, id="a-transparent-colour"
        ),
    ],
)
def test_16_bit_png_keeps_its_high_bytes(
    tmp_path: Path, kind: int, pixel: bytes, extra: bytes, expected: tuple[int, ...]
) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png(4, 2, (b"\0" + pixel * 4) * 2, bits=16, kind=kind, extra=extra))
    assert load_image(path).size == image_size(path) == (4, 2)
    assert load_image(path).getpixel((1, 1)) == expected


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_its_first_frame_and_the_others_are_not_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, BLUE)]
    saved(path, Image.new("RGB", (16, 16), RED), save_all=True, append_images=frames, duration=40)
    assert load_image(path).size == image_size(path) == (16, 16)
    assert near(load_image(path).getpixel((8, 8)), RED)


# ---------------------------------------------------------------- paths that are no files


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user without rights to the files; root may read everything otherwise."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def forbidden(path: Path) -> Path:
    saved(path)
    path.chmod(0)
    return path


def looped(path: Path) -> Path:
    path.symlink_to(path.with_suffix(".other"))
    path.with_suffix(".other").symlink_to(path)
    return path


def dangling(path: Path) -> Path:
    path.symlink_to("gone.png")
    return path


def piped(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def inside_a_file(path: Path) -> Path:
    saved(path)
    return path / "b.png"


@pytest.fixture
def at_once() -> Iterator[None]:
    """Breaks a test off that waits for what never comes."""

    def give_up(number: int, frame: object) -> None:
        pytest.fail("still waiting after five seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("make", "message", "reason"),
    [
        pytest.param(lambda path: path, "no such image; check the image root", "missing_image", id="missing"),
        pytest.param(dangling, "no such image; check the image root", "missing_image", id="link-to-nothing"),
        pytest.param(inside_a_file, "no such image", "missing_image", id="below-a-file"),
        pytest.param(folder, "not a readable image but a folder", "unreadable_image", id="folder"),
        pytest.param(piped, "a pipe, socket or device; name an image file", "unreadable_image", id="pipe"),
        pytest.param(lambda path: Path("/dev/zero"), "a pipe, socket or device", "unreadable_image", id="device"),
        pytest.param(looped, "cannot be opened .*links", "unreadable_image", id="circle-of-links"),
        pytest.param(lambda path: path.with_name("x" * 300), "cannot be opened .*its name", "unreadable_image", id="long"),
        pytest.param(lambda path: path.with_name("a\0b"), "cannot be opened .*its name", "unreadable_image", id="zero"),
        pytest.param(forbidden, "may not be read; ask for the right to", "unreadable_image", id="forbidden"),
    ],
)
def test_a_path_that_is_no_image_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Path], message: str, reason: str
) -> None:
    path = make(tmp_path / "odd.png")
    with unprivileged() if make is forbidden else contextlib.nullcontext():
        for read in READERS:
            with pytest.raises(ImageError, match=message) as caught:
                read(path)
            assert caught.value.reason == reason


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("odd.png")
        with pytest.raises(ImageError, match="a pipe, socket or device"):
            load_image(Path("odd.png"))


@pytest.mark.parametrize("name", ["two words.png", "каша 猫 🐈.png", "line\nbreak.png", "'quoted\".png", "-rf.png", "a;b&c.png"])
def test_any_name_a_disk_allows_is_read_and_named_on_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    saved(path)
    assert load_image(path).size == image_size(path) == NOISE.size
    path.write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert name.replace("\n", "\\n") in str(caught.value)


def test_a_name_that_is_not_text_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    saved(path)
    assert load_image(path).size == NOISE.size
    path.unlink()
    with pytest.raises(ImageError, match=r"caf\\udce9\.png") as caught:
        load_image(path)
    assert str(caught.value).encode()


def test_the_demo_check_takes_whatever_cannot_be_looked_up_for_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 image files do not exist"):
        check_images([looped(tmp_path / "a.png"), piped(tmp_path / "p.png")])


# ---------------------------------------------------------------- among the rows of a data set


def dataset(folder: Path, *contents: bytes | None, name: str = "rows.json") -> Path:
    """A MIG-Bench file with one question about the left half of each image; None leaves the image out."""
    rows = []
    for number, content in enumerate(contents):
        file = f"{number}.png"
        if content is not None:
            (folder / file).write_bytes(content)
        question = f"Where is object {number}?"
        rows.append(
            {"task": "region", "images": [file], "question": question, "answer": [0.0, 0.0, 0.5, 1.0], "need_format": True}
        )
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def good(tmp_path: Path) -> bytes:
    return saved(tmp_path / "good.png", NOISE.resize((56, 56)))


@pytest.mark.parametrize(
    ("check_images", "named"),
    [
        pytest.param(True, ["1 bad rows (1 missing_image)", "row 3 "], id="true"),
        pytest.param("exists", ["1 bad rows (1 missing_image)", "row 3 "], id="exists"),
        pytest.param(
            "decode", ["1 damaged_image", "1 missing_image", "1 unreadable_image", "row 2 ", "row 3 ", "row 4 "], id="decode"
        ),
    ],
)
def test_bad_images_are_named_with_their_rows(tmp_path: Path, check_images: bool | str, named: list[str]) -> None:
    whole = good(tmp_path)
    path = dataset(tmp_path, whole, whole[: len(whole) // 2], None, b"<html>")
    with pytest.raises(DataError) as caught:
        read_source("mig_bench", path, check_images=check_images, version="original")
    for part in named:
        assert part in str(caught.value)
    assert "on_bad: quarantine" in str(caught.value)


@pytest.mark.parametrize(
    ("check_images", "kept"),
    [(False, [0, 1, 2, 3]), ("no", [0, 1, 2, 3]), (True, [0, 1, 3]), ("exists", [0, 1, 3]), ("decode", [0])],
)
def test_rows_with_bad_images_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, check_images: bool | str, kept: list[int]
) -> None:
    whole = good(tmp_path)
    path = dataset(tmp_path, whole, whole[: len(whole) // 2], None, b"<html>")
    with caplog.at_level(logging.WARNING):
        examples = read_source("mig_bench", path, on_bad="quarantine", check_images=check_images, version="original")
    assert [int(example.images[0].stem) for example in examples] == kept
    assert bool(caplog.messages) == (len(kept) < 4)
    assert all(f"left out {4 - len(kept)} of 4 rows" in message for message in caplog.messages)


def test_an_unknown_way_to_check_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check_images must be exists, decode or no"):
        read_source("mig_bench", dataset(tmp_path, good(tmp_path)), check_images="header")


def test_an_image_that_many_rows_share_is_looked_at_once(tmp_path: Path) -> None:
    path = dataset(tmp_path, *[good(tmp_path)] * 300)
    rows = json.loads(path.read_text())
    for row in rows:
        row["images"] = ["0.png"]
    path.write_text(json.dumps(rows))
    assert len(read_source("mig_bench", path, check_images="decode", version="original")) == 300
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"300 bad rows \(300 unreadable_image"):
        read_source("mig_bench", path, check_images="decode", version="original")


def test_nothing_left_is_an_error_even_in_quarantine(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 bad rows \(2 missing_image\); no row is left; .*images_root"):
        read_source("mig_bench", dataset(tmp_path, None, None), on_bad="quarantine", version="original")


# ---------------------------------------------------------------- among the rows of a stage


def recipe_of(folder: Path, split: str, data: Path, *, model: Path, **options: object) -> Recipe:
    source = {"source": "mig_bench", "path": data, "options": {"version": "original", **options}}
    sampled = {"max_completion_length": 4, "limit": None}
    return Recipe.model_validate(
        {
            "out": folder / "run",
            "model": {"path": str(model)},
            "data": {split: [source]},
            "world": dict.fromkeys(("train", "rl", "validation", "test", "ood", "perception"), 0),
            "prompts": {"instruction": ""},
            "reject": {**sampled, "num_generations": 2, "batch": 2, "min_pass_rate": None, "max_pass_rate": None},
            "evaluate": {"max_completion_length": 4, "batch_size": 2, "bootstrap": 0},
        }
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toys") / "model")


def ready_to_reject(recipe: Recipe, toy: Path) -> None:
    """What rejection sampling builds on, without the stages that make it."""
    with RunFolder(recipe.out / "sft-merged", "merge", {}) as folder:
        shutil.copytree(toy, folder.path, dirs_exist_ok=True)
        folder.finish({})


STAGES = [pytest.param("test", evaluate.run, id="evaluate"), pytest.param("rl", reject.run, id="reject")]


@pytest.mark.parametrize(("split", "run"), STAGES)
def test_a_stage_that_meets_a_bad_image_names_file_row_and_remedy_and_goes_on_once_it_is_mended(
    tmp_path: Path, toy: Path, split: str, run: Callable[[Recipe], Mapping[str, Any]]
) -> None:
    whole = good(tmp_path)
    data = dataset(tmp_path, whole, whole, whole[: len(whole) // 2], whole)
    recipe = recipe_of(tmp_path, split, data, model=toy)
    ready_to_reject(recipe, toy)
    with pytest.raises(DataError) as caught:
        run(recipe)
    message = str(caught.value)
    assert message.startswith("mig_bench/region/2: ")
    assert "2.png: the image is cut short" in message
    assert "`options: {check_images: decode}`" in message
    assert "`on_bad: quarantine`" in message
    (tmp_path / "2.png").write_bytes(whole)
    run(recipe)
    assert answered(recipe, split) == [0, 1, 2, 3]


@pytest.mark.parametrize(("split", "run"), STAGES)
def test_checked_images_stop_a_stage_before_the_model_is_loaded(
    tmp_path: Path, toy: Path, split: str, run: Callable[[Recipe], Mapping[str, Any]]
) -> None:
    whole = good(tmp_path)
    data = dataset(tmp_path, whole, b"", whole)
    recipe = recipe_of(tmp_path, split, data, model=tmp_path / "no-such-model", check_images="decode")
    with pytest.raises(
        DataError, match=r"rows\.json: 1 bad rows \(1 unreadable_image\)(.|\n)*row 2 \(mig_bench/region/1\): .*1\.png"
    ):
        run(recipe)


def test_quarantined_rows_are_left_out_of_a_stage_and_counted(
    tmp_path: Path, toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = good(tmp_path)
    data = dataset(tmp_path, whole, b"<html>", None, whole)
    recipe = recipe_of(tmp_path, "rl", data, model=toy, check_images="decode", on_bad="quarantine")
    ready_to_reject(recipe, toy)
    with caplog.at_level(logging.WARNING):
        reject.run(recipe)
    assert answered(recipe, "rl") == [0, 3]
    assert any("left out 2 of 4 rows (1 unreadable_image, 1 missing_image)" in message for message in caplog.messages)


def test_a_benchmark_is_never_made_smaller(tmp_path: Path, toy: Path) -> None:
    whole = good(tmp_path)
    data = dataset(tmp_path, whole, None)
    recipe = recipe_of(tmp_path, "test", data, model=toy, on_bad="quarantine")
    with pytest.raises(DataError, match=r"1 bad rows \(1 missing_image\); correct the file, or where its images are"):
        evaluate.run(recipe)


def taught(tmp_path: Path, recipe: Recipe) -> None:
    """What the cold start builds on: three rows that synthesis kept, when all images were whole."""
    whole = good(tmp_path)
    examples = read_source("mig_bench", dataset(tmp_path, whole, whole, whole), version="original")
    with RunFolder(recipe.out / "synthesize", "synthesize", {}) as folder:
        for example in examples:
            answer = example.to_json()["target"]
            folder.append("kept.jsonl", {**example.to_json(), "reasoning": "It is on the left.", "answer": answer})
        folder.finish({})


def test_the_cold_start_names_rows_whose_images_are_gone_before_the_model_is_loaded(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"out": tmp_path / "run", "model": {"path": str(tmp_path / "no-such-model")}})
    taught(tmp_path, recipe)
    (tmp_path / "1.png").unlink()
    message = r"kept\.jsonl: 1 bad rows \(1 missing_image\); put the images back(.|\n)*row 2 \(mig_bench/region/1\): .*1\.png"
    with pytest.raises(DataError, match=message):
        sft.run(recipe)


def test_the_cold_start_names_the_row_of_a_damaged_image(tmp_path: Path, toy: Path) -> None:
    small = {"max_steps": 2, "per_device_train_batch_size": 3, "lora_r": 2, "report_to": []}
    recipe = Recipe.model_validate({"out": tmp_path / "run", "model": {"path": str(toy)}, "sft": small})
    taught(tmp_path, recipe)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])
    with pytest.raises(DataError, match=r"^mig_bench/region/1: .*1\.png: .*; then run the same command again"):
        sft.run(recipe)


def answered(recipe: Recipe, split: str) -> list[int]:
    """Positions of the questions that a stage has asked."""
    file, field = ("evaluate/base/test.jsonl", "example") if split == "test" else ("reject/rollouts.jsonl", "key")
    return sorted(int(row[field].rpartition("/")[2]) for row in read_rows(recipe.out / file))
