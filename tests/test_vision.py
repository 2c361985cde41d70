import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyground.errors import DataError
from polyground.geometry import Box
from polyground.vision import check_images, contact_sheet, draw_boxes, image_hash, image_size, load_image, to_data_uri

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def two_tone(width: int = 8, height: int = 4) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def near(pixel: object, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.subtract(pixel, colour)).max() <= 8)  # type: ignore[call-overload]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "gif", "tiff"])
def test_formats_load_as_rgb(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    two_tone(64, 32).save(file)
    image = load_image(file)
    assert (image.mode, image.size, image_size(file)) == ("RGB", (64, 32), (64, 32))
    assert near(image.getpixel((4, 4)), RED)
    assert near(image.getpixel((60, 4)), BLUE)


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (64, 32), (4, 16)),
        (2, (64, 32), (60, 16)),
        (3, (64, 32), (60, 16)),
        (4, (64, 32), (4, 16)),
        (5, (32, 64), (16, 4)),
        (6, (32, 64), (16, 4)),
        (7, (32, 64), (16, 60)),
        (8, (32, 64), (16, 60)),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_turns_the_picture_and_its_size(
    tmp_path: Path, suffix: str, orientation: int, size: tuple[int, int], red_at: tuple[int, int]
) -> None:
    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    two_tone(64, 32).save(file, exif=exif)
    image = load_image(file)
    assert (image.size, image_size(file)) == (size, size)
    assert near(image.getpixel(red_at), RED)


@pytest.mark.parametrize(
    ("mode", "colour", "expected", "suffix"),
    [
        pytest.param("L", 128, (128, 128, 128), "png", id="grey"),
        pytest.param("1", 1, WHITE, "png", id="bits"),
        pytest.param("CMYK", (0, 255, 255, 0), RED, "tiff", id="cmyk"),
        pytest.param("RGBA", (255, 0, 0, 255), RED, "png", id="opaque"),
        pytest.param("RGBA", (255, 0, 0, 0), WHITE, "png", id="transparent-is-white"),
        pytest.param("LA", (0, 0), WHITE, "png", id="transparent-grey"),
        pytest.param("I;16", 128 * 257, (128, 128, 128), "png", id="16-bit"),
        pytest.param("I;16", 65535, WHITE, "tiff", id="16-bit-tiff"),
        pytest.param("F", 1.0, WHITE, "tiff", id="float"),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int], suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.new(mode, (16, 16), colour).save(file)  # type: ignore[arg-type]
    assert load_image(file).getpixel((8, 8)) == expected


def test_palette_images_keep_their_colours(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    two_tone().convert("P", palette=Image.Palette.ADAPTIVE).save(file)
    assert load_image(file).tobytes() == two_tone().tobytes()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_its_first_frame(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 16), RED).save(file, save_all=True, append_images=[Image.new("RGB", (16, 16), BLUE)])
    assert near(load_image(file).getpixel((8, 8)), RED)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"cut\.{suffix}.*(cut short|not a readable image).*again"):
        load_image(file)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "odd.png"
    file.write_bytes(content)
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"odd\.png: not a readable image"):
            read(file)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such image; check the image root"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="not a readable image"):
        load_image(tmp_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 40_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(side, side))
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"bomb\.png: more than 89,478,485 pixels"):
            read(file)


def test_size_is_read_from_the_header_alone(tmp_path: Path) -> None:
    file = tmp_path / "head.png"
    file.write_bytes(png_header(300, 200))
    assert image_size(file) == (300, 200)


def test_the_first_ten_missing_images_are_named(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    two_tone().save(there)
    check_images([there, there])
    missing = [tmp_path / f"m{number:02}.png" for number in range(12)]
    with pytest.raises(DataError) as caught:
        check_images([there, *missing, *missing])
    message = str(caught.value)
    assert message.startswith("12 image files do not exist")
    assert "m09.png" in message
    assert "m10.png" not in message
    assert message.endswith("and 2 more")


def test_a_hash_follows_the_picture_and_not_the_file(tmp_path: Path) -> None:
    two_tone().save(tmp_path / "a.png")
    two_tone().save(tmp_path / "b.bmp")
    two_tone().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    two_tone(4, 8).save(tmp_path / "d.png")
    a, b, c, d = (image_hash(tmp_path / name) for name in ("a.png", "b.bmp", "c.png", "d.png"))
    assert a == b
    assert len({a, c, d}) == 3


def test_boxes_are_drawn_at_their_corners_on_an_enlarged_copy() -> None:
    image = Image.new("RGB", (112, 112), "white")
    drawn = draw_boxes(image, [(Box(0.25, 0.5, 0.75, 1.0), "", "red")])
    assert drawn.size == (448, 448)
    assert drawn.getpixel((112, 300)) == RED
    assert drawn.getpixel((335, 300)) == RED
    assert drawn.getpixel((224, 447)) == RED
    assert drawn.getpixel((224, 300)) == WHITE
    assert drawn.getpixel((108, 300)) == WHITE
    assert image.getextrema() == ((255, 255),) * 3


def test_a_large_image_keeps_its_size() -> None:
    assert draw_boxes(Image.new("L", (640, 480)), [(Box(0, 0, 1, 1), "all", "#00ff00")]).size == (640, 480)


@pytest.mark.parametrize("box", [Box(0, 0, 1, 1), Box(0.98, 0.98, 1.0, 1.0), Box(0, 0.99, 0.001, 1.0)])
def test_a_label_stays_inside_the_picture(box: Box) -> None:
    drawn = np.asarray(draw_boxes(Image.new("RGB", (448, 448), "white"), [(box, "gold", "blue")]))
    plate = (drawn == BLUE).all(axis=-1).sum()
    assert plate > 300


def test_a_contact_sheet_holds_every_image_and_caption() -> None:
    sheet = contact_sheet([two_tone(), two_tone(4, 8), two_tone()], ["one", "two " * 40, "three\nlines"], columns=2, side=100)
    pixels = np.asarray(sheet)
    assert sheet.width == 2 * 108 + 8
    assert near(pixels[58, 20], RED)
    assert (pixels.max(axis=-1) < 100).sum() > 200
    with pytest.raises(ValueError, match="one caption for each; got 1 and 0"):
        contact_sheet([two_tone()], [])


def test_a_data_uri_gives_the_same_picture_back() -> None:
    uri = to_data_uri(two_tone())
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).tobytes() == two_tone().tobytes()
