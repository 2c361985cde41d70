"""The Qwen family: its rotary positions, grids and patches."""

import copy
from pathlib import Path

import pytest
import torch

from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, Grid
from polyground.models import Loaded, load_family, load_model
from polyground.records import Message
from toys import plain_inputs, write_image, write_toy

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(write_toy(tmp_path_factory.mktemp("models") / "toy", request.param))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    square, wide = write_image(folder / "square.png"), write_image(folder / "wide.png", "blue", width=84)
    return square, wide, write_image(folder / "tall.png", "white", height=84)


def _ask(*images: Path) -> list[Message]:
    return [Message("user", (*images, "where is it?"))]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_positions_are_those_of_transformers(loaded: Loaded, images: tuple[Path, ...], count: int) -> None:
    prompt = loaded.family.encode(_ask(*images[:count]))
    assert prompt.next_position == prompt.position_ids.max() + 1
    if count == 0:
        assert prompt.position_ids.tolist() == [list(range(len(prompt)))] * 3
        return
    inputs = plain_inputs(loaded, prompt)
    del inputs["pixel_values"]
    expected, delta = loaded.model.model.get_rope_index(**inputs)
    assert torch.equal(prompt.position_ids, expected[:, 0])
    assert prompt.next_position == len(prompt) + int(delta)


def test_each_image_has_one_placeholder_per_token_in_the_place_where_it_was_put(loaded: Loaded, images: tuple[Path, ...]) -> None:
    prompt = loaded.family.encode([Message("user", ("A", images[0], "B", images[1]))])
    text = loaded.family.decode(prompt.input_ids.tolist())
    assert text.replace("<|image_pad|>", "#") == (
        "<|im_start|>user\nA<|vision_start|>####<|vision_end|>B<|vision_start|>######<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_patches_embedded_by_a_product_are_those_of_the_convolution(loaded: Loaded) -> None:
    embed = loaded.model.model.visual.patch_embed
    patches = torch.randn(5, 3 * 2 * 14 * 14)
    assert torch.allclose(embed(patches), type(embed).forward(embed, patches), atol=1e-3)


def test_a_deep_copy_embeds_patches_with_its_own_weights(loaded: Loaded) -> None:
    twin = copy.deepcopy(loaded.model).model.visual.patch_embed
    torch.nn.init.zeros_(twin.proj.weight)
    patches = torch.ones(1, 3 * 2 * 14 * 14)
    assert not torch.equal(twin(patches), loaded.model.model.visual.patch_embed(patches))


@pytest.mark.parametrize("opening", ["<think>\n", "<think>\n\n</think>\n\n"], ids=["opened", "empty"])
def test_a_thought_that_the_template_begins_is_left_to_the_completion(tmp_path: Path, opening: str) -> None:
    folder = write_toy(tmp_path / "toy", "qwen3_5")
    messages = [Message("user", ("<think>\n",))]
    plain = load_family(folder).encode(messages).input_ids
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n" + opening))
    family = load_family(folder)
    asked = family.tokenizer.apply_chat_template([{"role": "user", "content": []}], tokenize=False, add_generation_prompt=True)
    assert asked.endswith(opening)
    assert torch.equal(family.encode(messages).input_ids, plain)


def test_an_image_too_thin_is_named(loaded: Loaded, tmp_path: Path) -> None:
    thin = write_image(tmp_path / "thin.png", width=300, height=1)
    with pytest.raises(DataError, match=r"thin\.png"):
        loaded.family.encode(_ask(thin))


def test_qwen3_and_3_5_write_boxes_per_mille_and_qwen2_5_in_pixels_as_processed(tmp_path: Path) -> None:
    big = write_image(tmp_path / "big.png", width=300, height=200)
    assert load_family(write_toy(tmp_path / "three", "qwen3_vl")).grids([big]) == [PER_MILLE]
    assert load_family(write_toy(tmp_path / "three-five", "qwen3_5")).grids([big]) == [PER_MILLE]
    family = load_family(write_toy(tmp_path / "two", "qwen2_5_vl"))
    grid = family.encode(_ask(big)).vision["image_grid_thw"][0]
    assert family.grids([big]) == [Grid(width=int(grid[2]) * 14, height=int(grid[1]) * 14)]


def test_the_pixel_budget_is_shared_by_the_images_of_a_prompt(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", "qwen2_5_vl")
    images = [write_image(tmp_path / f"{i}.png", width=112, height=112) for i in range(4)]
    family = load_family(folder, max_pixels_total=4 * 28 * 28)
    assert family.grids(images[:1]) == [Grid(width=56, height=56)]
    assert family.grids(images) == [Grid(width=28, height=28)] * 4
    assert int((family.encode(_ask(*images)).input_ids == family.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum()) == 4


def test_a_limit_below_one_image_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="max_pixels 100"):
        load_family(write_toy(tmp_path / "toy"), max_pixels=100)
