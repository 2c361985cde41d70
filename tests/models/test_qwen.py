"""The Qwen family: prompts as the reference implementation sees them, grids, and features that stand in for pixels."""

import copy
from pathlib import Path

import pytest
import torch

from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, Grid
from polyground.models import Loaded, Prompt, load_family, load_model
from polyground.records import Message
from toys import write_image, write_toy

KINDS = ("qwen3_vl", "qwen2_5_vl", "qwen3_5")


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


def _pixels(loaded: Loaded, prompt: Prompt) -> dict:
    is_image = (prompt.input_ids == loaded.config["image_token_id"]).int()[None]
    return {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw, "mm_token_type_ids": is_image}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_positions_are_those_of_transformers(loaded: Loaded, images: tuple[Path, ...], count: int) -> None:
    prompt = loaded.family.encode(_ask(*images[:count]))
    assert prompt.next_position == prompt.position_ids.max() + 1
    if count == 0:
        assert prompt.position_ids.tolist() == [list(range(len(prompt)))] * 3
        return
    inputs = _pixels(loaded, prompt)
    expected, delta = loaded.model.model.get_rope_index(
        prompt.input_ids[None], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=prompt.image_grid_thw
    )
    assert torch.equal(prompt.position_ids, expected[:, 0])
    assert prompt.next_position == len(prompt) + int(delta)


def test_each_image_has_one_placeholder_per_token_in_the_place_where_it_was_put(loaded: Loaded, images: tuple[Path, ...]) -> None:
    prompt = loaded.family.encode([Message("user", ("A", images[0], "B", images[1]))])
    text = loaded.family.decode(prompt.input_ids.tolist())
    assert text.replace("<|image_pad|>", "#") == (
        "<|im_start|>user\nA<|vision_start|>####<|vision_end|>B<|vision_start|>######<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("count", [1, 3])
def test_features_computed_before_give_the_logits_of_pixels(loaded: Loaded, images: tuple[Path, ...], count: int) -> None:
    prompt = loaded.family.encode(_ask(*images[:count]))
    with torch.no_grad():
        expected = loaded.model(input_ids=prompt.input_ids[None], **_pixels(loaded, prompt)).logits
        features = [loaded.family.encode_images(loaded.model, prompt)]
        ids, positions = prompt.input_ids[None], prompt.position_ids[:, None]
        for _ in range(2):
            output = loaded.family.forward(loaded.model, input_ids=ids, position_ids=positions, features=features)
            assert torch.allclose(output.logits, expected, atol=1e-5)


def test_encoding_several_prompts_at_once_changes_nothing(loaded: Loaded, images: tuple[Path, ...]) -> None:
    prompts = [loaded.family.encode(_ask(*images[:count])) for count in (2, 0, 3, 1)]
    together = loaded.family.encode_images_of(loaded.model, prompts)
    assert [len(f) for f in together] == [10, 0, 16, 4]
    for prompt, features in zip(prompts, together, strict=True):
        alone = loaded.family.encode_images(loaded.model, prompt)
        assert torch.allclose(features.embeds, alone.embeds, atol=1e-5)
        assert len(features.deepstack) == len(alone.deepstack)


def test_features_carry_no_gradient(loaded: Loaded, images: tuple[Path, ...]) -> None:
    assert not loaded.family.encode_images(loaded.model, loaded.family.encode(_ask(images[0]))).embeds.requires_grad


def test_patches_embedded_by_a_product_are_those_of_the_convolution(loaded: Loaded) -> None:
    embed = loaded.model.model.visual.patch_embed
    patches = torch.randn(5, 3 * 2 * 14 * 14)
    assert torch.allclose(embed(patches), type(embed).forward(embed, patches), atol=1e-3)


def test_a_deep_copy_embeds_patches_with_its_own_weights(loaded: Loaded) -> None:
    twin = copy.deepcopy(loaded.model).model.visual.patch_embed
    torch.nn.init.zeros_(twin.proj.weight)
    patches = torch.ones(1, 3 * 2 * 14 * 14)
    assert not torch.equal(twin(patches), loaded.model.model.visual.patch_embed(patches))


def test_a_completion_is_decoded_without_its_end(loaded: Loaded) -> None:
    text = '<think>Image 2.</think><answer>[{"image": 2, "bbox_2d": [1, 2, 3, 4]}]</answer>'
    ids = loaded.family.completion_ids(text)
    assert ids[-1] == loaded.family.end_token_id
    assert loaded.family.decode(ids) == loaded.family.decode(ids[:-1]) == text


def test_image_tokens_and_rows_without_a_token_are_banned(loaded: Loaded) -> None:
    banned = loaded.family.banned_token_ids
    assert {loaded.config["image_token_id"], loaded.config["video_token_id"]} <= set(banned)
    assert set(range(len(loaded.family.tokenizer), len(loaded.family.tokenizer) + 5)) <= set(banned)
    assert loaded.family.end_token_id not in banned


def test_text_that_holds_a_placeholder_is_refused(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="image_pad"):
        loaded.family.encode([Message("user", ("look: <|image_pad|>",))])


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
    grid = family.encode(_ask(big)).image_grid_thw[0]
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
