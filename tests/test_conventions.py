"""Conventions: the sizes that transformers' own processors give, the budgets, and what the files of a folder say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil, get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from polyground.conventions import Canvas, Convention, SmartResize, Splits, Tiles, load_convention, named_grid
from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, Box, Grid

SIDES = st.integers(1, 5000)
FEW = st.integers(1, 160)
BUDGETS = st.none() | st.integers(1, 5_000_000)


@given(SIDES, SIDES, st.sampled_from([28, 32]), st.integers(1, 400_000), st.integers(1, 4_000_000), BUDGETS)
def test_a_smart_resize_is_that_of_transformers(
    width: int, height: int, factor: int, least: int, most: int, budget: int | None
) -> None:
    layout = SmartResize(factor, least, most)
    bounds = layout.processor_options(budget)["size"]
    options = {"factor": factor, "min_pixels": bounds["shortest_edge"], "max_pixels": bounds["longest_edge"]}
    try:
        rows, columns = smart_resize(height, width, **options)
    except ValueError:
        with pytest.raises(ValueError, match="200 times"):
            layout.fit(width, height, max_pixels=budget)
        return
    canvas = layout.fit(width, height, max_pixels=budget)
    assert (canvas.width, canvas.height) == (columns, rows)
    assert canvas.tokens == columns * rows // factor**2


@given(SIDES, SIDES, st.sampled_from([(448, 1, 12), (56, 1, 4), (448, 2, 6), (384, 1, 1)]), BUDGETS)
@example(640, 630, (448, 1, 12), None)  # just over half of four tiles
@example(640, 620, (448, 1, 12), None)  # just under
def test_tiles_are_those_of_transformers(width: int, height: int, settings: tuple[int, int, int], budget: int | None) -> None:
    tile, least, most = settings
    layout = Tiles(tile, least, most, tokens_per_tile=4)
    canvas = layout.fit(width, height, max_pixels=budget)
    told = layout.processor_options(budget)
    # At one tile the processor does not cut, and so does not ask for an arrangement.
    expected = (
        get_optimal_tiled_canvas((height, width), (tile, tile), told["min_patches"], told["max_patches"])
        if told["max_patches"] > 1
        else (1, 1)
    )
    assert canvas.tiles == expected
    assert (canvas.width, canvas.height) == (tile * expected[0], tile * expected[1])
    assert canvas.tokens // 4 == GotOcr2ImageProcessorPil().get_number_of_image_patches(
        height, width, told | {"patch_size": told["size"]}
    )


@given(FEW, FEW, st.booleans(), st.none() | st.integers(1, 40 * 40))
def test_splits_are_those_of_transformers(width: int, height: int, split: bool, budget: int | None) -> None:
    layout = Splits(longest=32, tile=8, tokens_per_tile=4, split=split)
    options = layout.processor_options(budget)
    picture = Image.new("RGB", (width, height), "red")
    made = SmolVLMImageProcessorPil()(images=[[picture]], return_row_col_info=True, return_tensors="np", **options)
    canvas = layout.fit(width, height, max_pixels=budget)
    [[rows]], [[columns]] = made["rows"], made["cols"]
    assert canvas.tiles == ((columns, rows) if rows else (1, 1))
    assert canvas.tokens == 4 * len(made["pixel_values"][0])
    assert made["pixel_values"].shape[-2:] == (8, 8)
    assert (made["pixel_attention_mask"] == 1).all()


@given(st.sampled_from([SmartResize(28, 784, 10**6), Tiles(56, 1, 12, 4)]), SIDES, SIDES, st.none() | st.integers(1, 10**6))
def test_an_image_of_the_size_of_its_canvas_stays_as_it_is(
    layout: SmartResize | Tiles, width: int, height: int, budget: int | None
) -> None:
    if max(width, height) > 20 * min(width, height):
        return
    canvas = layout.fit(width, height, max_pixels=budget)
    assert layout.lasting
    assert layout.fit(canvas.width, canvas.height) == canvas


@pytest.mark.parametrize(
    ("each", "together", "images", "expected"),
    [
        pytest.param(None, None, 3, None, id="the-folders-own"),
        pytest.param(1000, None, 3, 1000, id="each"),
        pytest.param(None, 1000, 3, 333, id="shared"),
        pytest.param(200, 1000, 3, 200, id="each-is-less"),
        pytest.param(500, 1000, 4, 250, id="shared-is-less"),
        pytest.param(None, 1000, 0, None, id="no-image"),
    ],
)
def test_the_budget_of_an_image(each: int | None, together: int | None, images: int, expected: int | None) -> None:
    layout = SmartResize(28, 784, 10**6)
    convention = Convention(model_type="m", native=None, layout=layout, max_pixels=each, max_pixels_total=together)
    assert convention.pixel_budget(images) == expected


LAYOUTS = (SmartResize(28, 4 * 784, 10**7), Tiles(448, 1, 12, 256), Splits(2048, 512, 64))


@given(st.sampled_from(LAYOUTS), st.lists(st.tuples(st.integers(100, 3000), st.integers(100, 3000)), min_size=1, max_size=8))
def test_images_of_one_prompt_stay_within_the_pixels_they_share(
    layout: SmartResize | Tiles | Splits, sizes: list[tuple[int, int]]
) -> None:
    total = 8 * 512 * 512
    convention = Convention(model_type="m", native=None, layout=layout, max_pixels_total=total)
    assert sum(canvas.width * canvas.height for canvas in convention.canvases(sizes)) <= total


def test_boxes_are_written_per_mille_or_in_pixels_of_the_resized_image() -> None:
    layout = SmartResize(28, 784, 56 * 84)
    sizes = [(300, 200), (56, 56)]
    assert Convention(model_type="m", native=None, layout=layout).grids(sizes) == [PER_MILLE, PER_MILLE]
    pixels = Convention(model_type="m", native=None, layout=layout, per_mille=False)
    assert pixels.grids(sizes) == [Grid(width=84, height=56), Grid(width=56, height=56)]


def test_an_image_the_family_cannot_take_is_described() -> None:
    convention = Convention(model_type="qwen3_vl", native=None, layout=SmartResize(28, 784, 10**6))
    with pytest.raises(DataError, match="300 x 1 pixels cannot be taken by qwen3_vl"):
        convention.canvases([(300, 1)])


QWEN2_5 = {"model_type": "qwen2_5_vl", "vision_config": {"patch_size": 14, "spatial_merge_size": 2}}
QWEN3 = {"model_type": "qwen3_vl", "vision_config": {"patch_size": 16, "spatial_merge_size": 2}}
INTERNVL = {
    "model_type": "internvl",
    "image_seq_length": 256,
    "downsample_ratio": 0.5,
    "vision_config": {"image_size": [448, 448], "patch_size": [14, 14]},
}


def _smolvlm(side: int, patch: int, scale: int) -> dict[str, Any]:
    return {"model_type": "smolvlm", "scale_factor": scale, "vision_config": {"image_size": side, "patch_size": patch}}


PUBLISHED = [
    pytest.param(
        {"model_type": "qwen2_vl", "vision_config": {"patch_size": 14, "spatial_merge_size": 2}},
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
        ("qwen_tokens", SmartResize(28, 3136, 12845056)),
        Canvas(1008, 756, tokens=36 * 27),
        id="Qwen2-VL",
    ),
    pytest.param(
        QWEN2_5,
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
        ("qwen_json", SmartResize(28, 3136, 12845056)),
        Canvas(1008, 756, tokens=36 * 27),
        id="Qwen2.5-VL",
    ),
    pytest.param(
        QWEN3,
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "merge_size": 2},
        ("qwen_json", SmartResize(32, 65536, 16777216)),
        Canvas(992, 736, tokens=31 * 23),
        id="Qwen3-VL",
    ),
    pytest.param(
        INTERNVL,
        {"size": {"height": 448, "width": 448}, "crop_to_patches": False, "min_patches": 1, "max_patches": 12},
        ("internvl", Tiles(448, 1, 12, 256)),
        Canvas(1792, 1344, tokens=13 * 256, tiles=(4, 3)),
        id="InternVL3",
    ),
    pytest.param(
        _smolvlm(384, 14, 3),
        {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}, "do_image_splitting": True},
        (None, Splits(1536, 384, 81)),
        Canvas(1536, 1152, tokens=13 * 81, tiles=(4, 3)),
        id="SmolVLM2-2.2B",
    ),
    pytest.param(
        _smolvlm(512, 16, 4),
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "do_image_splitting": True},
        (None, Splits(2048, 512, 64)),
        Canvas(2048, 1536, tokens=13 * 64, tiles=(4, 3)),
        id="SmolVLM2-500M",
    ),
]


@pytest.mark.parametrize("nested", [False, True], ids=["own-file", "in-processor-config"])
@pytest.mark.parametrize(("config", "processor", "expected", "canvas"), PUBLISHED)
def test_published_folders_are_understood_from_their_small_files(
    tmp_path: Path, config: dict[str, Any], processor: dict[str, Any], expected: tuple[Any, Any], canvas: Canvas, nested: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, content = (
        ("processor_config.json", {"image_processor": processor}) if nested else ("preprocessor_config.json", processor)
    )
    (tmp_path / name).write_text(json.dumps(content))
    convention = load_convention(tmp_path)
    assert (convention.native, convention.layout) == expected
    assert convention.per_mille == (config["model_type"] != "qwen2_5_vl")
    assert convention.canvases([(1000, 750)]) == [canvas]


@pytest.mark.parametrize(("name", "most"), [("own", 100 * 784), ("both", 200 * 784)])
def test_settings_are_taken_from_the_file_that_transformers_takes_them_from(tmp_path: Path, name: str, most: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5))
    size = {"shortest_edge": 784, "longest_edge": 100 * 784}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    newer = {"image_processor": {"size": size | {"longest_edge": 200 * 784}}} if name == "both" else {}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    layout = load_convention(tmp_path).layout
    assert isinstance(layout, SmartResize)
    assert layout.max_pixels == Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size["longest_edge"] == most


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({}, "no config.json", id="no-config"),
        pytest.param({"config.json": "{"}, "not valid JSON", id="cut-short"),
        pytest.param({"config.json": "[]"}, "no JSON object", id="no-object"),
        pytest.param({"config.json": '{"model_type": "llama"}'}, "'llama' is not supported", id="unknown"),
        pytest.param({"config.json": json.dumps(QWEN3), "preprocessor_config.json": "x"}, "preprocessor_config", id="processor"),
    ],
)
def test_a_folder_that_cannot_be_understood_is_named_with_the_reason(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message) as raised:
        load_convention(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("per_mille", (100, 200, 500, 750)),
        ("unit", (0.1, 0.2, 0.5, 0.75)),
        ("pixels", (20, 20, 100, 75)),
        ("per_mille_yxyx", (200, 100, 750, 500)),
    ],
)
def test_grids_that_need_no_folder(name: str, expected: tuple[float, ...]) -> None:
    assert named_grid(name, 200, 100).write(Box(0.1, 0.2, 0.5, 0.75)) == expected


def test_an_unknown_grid_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="known: per_mille, unit, pixels"):
        named_grid("permille", 2, 2)
