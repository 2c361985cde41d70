"""How model families resize images and write boxes, told from the small files of a model folder: no torch, no weights.

The family is chosen by `model_type` in config.json, never by a path, and its grid is never guessed from the numbers of an
answer. What becomes of the pixels belongs to models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, UNIT, Grid

TINY = Path(__file__).parent / "models" / "tiny"
"""The model shipped with the package; a recipe names it `tiny`."""


def model_folder(path: str | Path) -> Path:
    """The folder meant by a recipe's model path: `tiny` is the packaged one."""
    return TINY if str(path) == "tiny" else Path(path)


@dataclass(frozen=True, slots=True)
class Canvas:
    """What one image becomes on its way into a model."""

    width: int
    """Pixels after resizing; for tiled families the whole of all tiles, the thumbnail left out."""
    height: int
    tokens: int
    """Image tokens in the prompt; the markers around them are not counted."""
    tiles: tuple[int, int] = (1, 1)
    """(columns, rows) it is cut into."""

    @property
    def grid(self) -> Grid:
        """Pixels of the resized image."""
        return Grid(width=self.width, height=self.height)


class Layout(Protocol):
    """How one image is resized."""

    lasting: ClassVar[bool]
    """An image of the size of its canvas is left as it is, so that it can be resized before it is sent to a server."""

    def fit(self, width: int, height: int, *, max_pixels: int | None = None) -> Canvas:
        """`max_pixels` takes the place of the folder's own limit, which tiled families only lower.

        Raises ValueError for an image the family cannot take.
        """
        ...

    def processor_options(self, max_pixels: int | None) -> dict[str, Any]:
        """What transformers' image processor of this family is told, so that it does what `fit` says."""
        ...


@dataclass(frozen=True, slots=True)
class SmartResize:
    """Both sides a multiple of `factor`, the area between two bounds, the shape kept: Qwen2-VL and later.

    The rule is that of Qwen's own `smart_resize` (transformers, `models/qwen2_vl`).
    """

    lasting: ClassVar[bool] = True
    factor: int
    """Side of one image token in pixels: patch size times merge size."""
    min_pixels: int
    max_pixels: int

    def fit(self, width: int, height: int, *, max_pixels: int | None = None) -> Canvas:
        """Both sides to multiples of `factor`, the area within bounds; raises ValueError for a side 200 times the other."""
        if max(width, height) > 200 * min(width, height):
            raise ValueError("one side is more than 200 times the other")
        least, most = self.bounds(max_pixels)
        columns, rows = round(width / self.factor), round(height / self.factor)
        if columns * rows * self.factor**2 > most:
            shrink = math.sqrt(width * height / most)
            columns, rows = (max(1, math.floor(side / shrink / self.factor)) for side in (width, height))
        elif columns * rows * self.factor**2 < least:
            grow = math.sqrt(least / (width * height))
            columns, rows = (math.ceil(side * grow / self.factor) for side in (width, height))
        return Canvas(columns * self.factor, rows * self.factor, tokens=columns * rows)

    def processor_options(self, max_pixels: int | None) -> dict[str, Any]:
        """Qwen's image processor calls its bounds, which are areas in pixels, edges."""
        least, most = self.bounds(max_pixels)
        return {"size": {"shortest_edge": least, "longest_edge": most}}

    def bounds(self, max_pixels: int | None) -> tuple[int, int]:
        """The least and the most pixels of a resized image; at least one token fits."""
        most = max(self.max_pixels if max_pixels is None else max_pixels, self.factor**2)
        return min(self.min_pixels, most), most


@dataclass(frozen=True, slots=True)
class Tiles:
    """Stretched to the tile arrangement of the nearest shape, and a thumbnail beside more than one tile: InternVL.

    The rule is that of transformers' `get_optimal_tiled_canvas` (`models/got_ocr2`).
    """

    lasting: ClassVar[bool] = True
    tile: int
    """Side of a tile in pixels."""
    min_tiles: int
    max_tiles: int
    tokens_per_tile: int

    def fit(self, width: int, height: int, *, max_pixels: int | None = None) -> Canvas:
        """The grid of tiles nearest in shape, and a thumbnail's tokens where there are several tiles."""
        most = self.most_tiles(max_pixels)
        columns, rows = self._arrangement(width, height, most) if most > 1 else (1, 1)
        count = columns * rows
        tokens = (count + (count > 1)) * self.tokens_per_tile
        return Canvas(columns * self.tile, rows * self.tile, tokens, (columns, rows))

    def processor_options(self, max_pixels: int | None) -> dict[str, Any]:
        """The budget as a number of tiles."""
        # Whatever the image processor's file says: transformers' InternVLProcessor always cuts.
        tiles = {"crop_to_patches": True, "min_patches": self.min_tiles, "max_patches": self.most_tiles(max_pixels)}
        return {"size": {"height": self.tile, "width": self.tile}, **tiles}

    def most_tiles(self, max_pixels: int | None) -> int:
        """Tiles one image may have within a pixel budget, at least one; the thumbnail is not counted."""
        return self.max_tiles if max_pixels is None else max(1, min(self.max_tiles, max_pixels // self.tile**2))

    def _arrangement(self, width: int, height: int, most: int) -> tuple[int, int]:
        shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if self.min_tiles <= c * r <= most]
        best, best_distance = (1, 1), math.inf
        for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
            distance = abs(width / height - columns / rows)
            # Among equal shapes more tiles win, as long as they are not stretched to more than twice the area.
            roomy = width * height > 0.5 * self.tile**2 * columns * rows
            if distance < best_distance or (distance == best_distance and roomy):
                best, best_distance = (columns, rows), distance
        return best


@dataclass(frozen=True, slots=True)
class Splits:
    """The longer side scaled to a fixed length, both rounded up to whole tiles, and the whole image once more: SmolVLM.

    The rule is that of transformers' `SmolVLMImageProcessor`.
    """

    lasting: ClassVar[bool] = False
    longest: int
    """What the longer side is scaled to, in pixels."""
    tile: int
    tokens_per_tile: int
    split: bool = True
    """False when the folder says `do_image_splitting: false`: the whole image only."""

    def fit(self, width: int, height: int, *, max_pixels: int | None = None) -> Canvas:
        """The longer side to whole tiles, and the whole image as one more; without splitting one tile."""
        if not self.split:
            return Canvas(self.tile, self.tile, self.tokens_per_tile)
        longest = self.longest_side(max_pixels)
        width, height = _scaled(width, height, longest)
        # As the processor rounds: the longer side first, the shorter from it.
        shape = width / height
        if width >= height:
            width = self._whole(width)
            height = self._whole(int(width / shape))
        else:
            height = self._whole(height)
            width = self._whole(int(height * shape))
        columns, rows = width // self.tile, height // self.tile
        if columns * rows == 1:
            return Canvas(width, height, self.tokens_per_tile)
        return Canvas(width, height, (columns * rows + 1) * self.tokens_per_tile, (columns, rows))

    def processor_options(self, max_pixels: int | None) -> dict[str, Any]:
        """The budget as a length of the longer side, in pixels."""
        size = {"longest_edge": self.longest_side(max_pixels)}
        return {"size": size, "max_image_size": {"longest_edge": self.tile}, "do_image_splitting": self.split}

    def longest_side(self, max_pixels: int | None) -> int:
        """The longer side within a pixel budget: whole tiles of a square, at least one."""
        if max_pixels is None:
            return self.longest
        return min(self.longest, max(1, math.isqrt(max_pixels) // self.tile) * self.tile)

    def _whole(self, side: int) -> int:
        return max(1, math.ceil(side / self.tile)) * self.tile


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    shape = width / height
    if width >= height:
        other = int(longest / shape)
        return longest, max(1, other + other % 2)
    other = int(longest * shape)
    return max(1, other + other % 2), longest


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens of a family's prompts, and how they write an image."""

    image: str
    """Written once per image by the chat template, and in the prompt once per image feature."""
    end: str
    """Ends a turn."""
    control: tuple[str, ...]
    """Neither taken in the text of a prompt nor sampled. The end of a turn is sampled, but not taken in text either."""
    write: Callable[[Canvas, str], str]
    """An image in the prompt, made of runs of image tokens, each as given, and what stands around them."""

    def placeholder(self, canvas: Canvas) -> str:
        """What takes the place of the image token that the chat template wrote."""
        runs = self.shortened(canvas).count(self.image)
        return self.write(canvas, self.image * (canvas.tokens // runs))

    def shortened(self, canvas: Canvas) -> str:
        """The same with one image token for each run of them: sooner tokenized."""
        return self.write(canvas, self.image)

    def in_text(self, text: str) -> str | None:
        """The first token that would break the prompt if this text stood in it."""
        return next((token for token in (*self.control, self.end) if token in text), None)


def _write_smolvlm(canvas: Canvas, run: str) -> str:
    """Row by row the tiles under their names, then the whole image; only the latter when there is one tile."""
    around = "<fake_token_around_image>"
    whole = f"{around}<global-img>{run}{around}"
    columns, rows = canvas.tiles
    if columns * rows == 1:
        return whole
    named = [[f"{around}<row_{row + 1}_col_{column + 1}>{run}" for column in range(columns)] for row in range(rows)]
    return "".join("".join(row) + "\n" for row in named) + "\n" + whole


_QWEN_MARKS = Marks(
    image="<|image_pad|>",
    end="<|im_end|>",
    control=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|im_start|>"),
    # The chat template writes what stands around an image.
    write=lambda canvas, run: run,
)
_INTERNVL_MARKS = Marks(
    image="<IMG_CONTEXT>",
    end="<|im_end|>",
    control=("<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"),
    write=lambda canvas, run: f"<img>{run}</img>",
)
_SMOLVLM_MARKS = Marks(
    image="<image>",
    end="<end_of_utterance>",
    control=(
        *("<image>", "<fake_token_around_image>", "<global-img>", "<video>", "<|im_start|>"),
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ),
    write=_write_smolvlm,
)

# Templates of thinking models (Qwen3.5) begin the completion with a thought, opened or empty.
_OPENED_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?\Z")


def without_opened_thought(prompt: str) -> str:
    """A rendered prompt without the thought that its chat template begins.

    In the trained contract that is the completion's own part: left in the prompt, a thought would be opened twice and none
    be rewarded for its form.
    """
    return _OPENED_THOUGHT.sub("", prompt)


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """One model folder's way with images and boxes."""

    model_type: str
    native: str | None
    """Key of `answer.NATIVE_READERS`: how the untrained family writes boxes; None for a family that has no form."""
    layout: Layout
    per_mille: bool = True
    """Boxes are written 0-1000; otherwise in pixels of the resized image (Qwen2.5-VL)."""
    path: Path = Path()
    max_pixels: int | None = None
    """Pixels one image may have after resizing; None leaves the folder's own limit."""
    max_pixels_total: int | None = None
    """Pixels that the images of one prompt share equally."""

    @property
    def marks(self) -> Marks:
        """The special tokens of its prompts."""
        return MARKS[self.model_type]

    def pixel_budget(self, images: int) -> int | None:
        """Pixels each of so many images of one prompt may have; None leaves the folder's own limit."""
        budgets = [self.max_pixels] if self.max_pixels is not None else []
        if self.max_pixels_total is not None and images:
            budgets.append(self.max_pixels_total // images)
        return min(budgets) if budgets else None

    def canvas(self, width: int, height: int, *, images: int = 1) -> Canvas:
        """What an image becomes as one of so many of a prompt; raises DataError for one the family cannot take."""
        try:
            return self.layout.fit(width, height, max_pixels=self.pixel_budget(images))
        except ValueError as error:
            raise DataError(
                f"an image of {width} x {height} pixels cannot be taken by {self.model_type}: {error}; crop it"
            ) from error

    def canvases(self, sizes: Sequence[tuple[int, int]]) -> list[Canvas]:
        """What images of these (width, height) become when they make one prompt."""
        return [self.canvas(width, height, images=len(sizes)) for width, height in sizes]

    def grids(self, sizes: Sequence[tuple[int, int]]) -> list[Grid]:
        """How boxes of each image are written when images of these (width, height) make one prompt."""
        if self.per_mille:
            return [PER_MILLE] * len(sizes)
        return [canvas.grid for canvas in self.canvases(sizes)]


def load_convention(path: str | Path, *, max_pixels: int | None = None, max_pixels_total: int | None = None) -> Convention:
    """The convention of a model folder (`tiny` for the packaged one). Raises ModelError for an unknown or broken folder."""
    folder = model_folder(path)
    config = read_config(folder)
    return CONVENTIONS[config["model_type"]](folder, config, max_pixels, max_pixels_total)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder of a known family; raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give a local folder, or `tiny` for the packaged model")
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder}: no config.json; is this a transformers model folder?")
    kind = config.get("model_type")
    if kind not in CONVENTIONS:
        raise ModelError(f"{folder}: model_type {kind!r} is not supported; supported are {', '.join(sorted(CONVENTIONS))}")
    return config


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file; raises ModelError for a damaged one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds no JSON object; copy the file again")
    return found


def _image_processor(folder: Path) -> Mapping[str, Any]:
    """The image processor's settings: a part of processor_config.json (transformers 5), else a file of its own."""
    part = (read_json(folder / "processor_config.json") or {}).get("image_processor")
    return part or read_json(folder / "preprocessor_config.json") or {}


def _number(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name)
    return default if value is None else int(value)


def _smart_resize(folder: Path, config: Mapping[str, Any]) -> SmartResize:
    settings = _image_processor(folder)
    size = settings.get("size") or {}
    vision = config.get("vision_config") or {}
    patch = _number(settings, "patch_size", _number(vision, "patch_size", 14))
    merge = _number(settings, "merge_size", _number(vision, "spatial_merge_size", 2))
    # Folders of different ages name the two bounds differently.
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or 56 * 56
    most = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or 28 * 28 * 1280
    return SmartResize(patch * merge, int(least), int(most))


def _qwen(native: str, *, per_mille: bool = True) -> Maker:
    def make(folder: Path, config: Mapping[str, Any], max_pixels: int | None, max_pixels_total: int | None) -> Convention:
        layout = _smart_resize(folder, config)
        for name, value in (("max_pixels", max_pixels), ("max_pixels_total", max_pixels_total)):
            if value is not None and value < layout.factor**2:
                side = layout.factor
                raise ModelError(f"{folder}: {name} {value} is less than one image token ({side} x {side} pixels); raise it")
        return Convention(
            model_type=config["model_type"],
            native=native,
            layout=layout,
            per_mille=per_mille,
            path=folder,
            max_pixels=max_pixels,
            max_pixels_total=max_pixels_total,
        )

    return make


def _internvl(folder: Path, config: Mapping[str, Any], max_pixels: int | None, max_pixels_total: int | None) -> Convention:
    settings = _image_processor(folder)
    size = settings.get("size") or {}
    vision = config.get("vision_config") or {}
    tile = _number(size, "height", _side(vision.get("image_size"), 448))
    patch = _side(vision.get("patch_size"), 14)
    ratio = float(config.get("downsample_ratio") or 0.5)
    per_tile = int(_number(config, "image_seq_length", round((tile // patch * ratio) ** 2)))
    return Convention(
        model_type=config["model_type"],
        native="internvl",
        # The processor crops to tiles unless told otherwise, whatever the image processor's file says.
        layout=Tiles(tile, _number(settings, "min_patches", 1), _number(settings, "max_patches", 12), per_tile),
        path=folder,
        max_pixels=max_pixels,
        max_pixels_total=max_pixels_total,
    )


def _smolvlm(folder: Path, config: Mapping[str, Any], max_pixels: int | None, max_pixels_total: int | None) -> Convention:
    settings = _image_processor(folder)
    vision = config.get("vision_config") or {}
    tile = _number(settings.get("max_image_size") or {}, "longest_edge", _side(vision.get("image_size"), 512))
    patch = _side(vision.get("patch_size"), 16)
    per_tile = (_side(vision.get("image_size"), tile) // patch) ** 2 // _number(config, "scale_factor", 4) ** 2
    split = settings.get("do_image_splitting")
    return Convention(
        model_type=config["model_type"],
        native=None,
        layout=Splits(
            _number(settings.get("size") or {}, "longest_edge", 4 * tile),
            tile,
            per_tile,
            split=True if split is None else bool(split),
        ),
        path=folder,
        max_pixels=max_pixels,
        max_pixels_total=max_pixels_total,
    )


def _side(value: Any, default: int) -> int:
    """A side that some configs write as a number and some as a pair."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return default if value is None else int(value)


Maker = Callable[[Path, Mapping[str, Any], int | None, int | None], Convention]

CONVENTIONS: dict[str, Maker] = {
    "qwen2_vl": _qwen("qwen_tokens"),
    "qwen2_5_vl": _qwen("qwen_json", per_mille=False),
    "qwen3_vl": _qwen("qwen_json"),
    "qwen3_5": _qwen("qwen_json"),
    "internvl": _internvl,
    "smolvlm": _smolvlm,
}
"""By `model_type` in config.json. SmolVLM has no form of its own and is taught 0-1000."""

MARKS: dict[str, Marks] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), _QWEN_MARKS),
    "internvl": _INTERNVL_MARKS,
    "smolvlm": _SMOLVLM_MARKS,
}
"""By `model_type` as well."""


GridRule = Callable[[int, int], Grid]

GRIDS: dict[str, GridRule] = {
    "per_mille": lambda width, height: PER_MILLE,
    "unit": lambda width, height: UNIT,
    "pixels": lambda width, height: Grid(width=width, height=height),
    "per_mille_yxyx": lambda width, height: Grid(width=1000, height=1000, order="yxyx"),
}
"""Grids that need no model folder, by the name a recipe or a command line declares: 0-1000 (Qwen2-VL, Qwen3-VL, InternVL),
0-1, pixels of the image as sent (GPT, Claude), and 0-1000 with y first (Gemini)."""


def named_grid(name: str, width: int, height: int) -> Grid:
    """The grid of this name for an image of this size; raises DataError that lists the names."""
    if name not in GRIDS:
        raise DataError(f"unknown grid {name!r}; known: {', '.join(GRIDS)}")
    return GRIDS[name](width, height)
