"""What holds for every family: prompts as transformers' own processor makes them, features that stand in for pixels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import RAGGED, gradients, packed_logprobs, relative, row_logprobs, with_adapter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ProcessorMixin
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.smolvlm import processing_smolvlm

from polyground.answer import Answer, Located, read_answer, write_native
from polyground.conventions import CONVENTIONS
from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.models import Loaded, chat, load_family, load_model
from polyground.models.loading import _KINDS
from polyground.records import Message
from polyground.tokens import PromptCounter
from polyground.vision import load_image
from toys import FAMILIES, plain_inputs, write_image, write_toy

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[*FAMILIES, "internvl-qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("models") / "toy", request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load_model(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    square, wide = write_image(folder / "square.png"), write_image(folder / "wide.png", "blue", width=150, height=40)
    return square, wide, write_image(folder / "tall.png", "white", height=84)


def _ask(*images: Path) -> list[Message]:
    return [Message("system", ("Be brief.",)), Message("user", (*images, "where is it?"))]


def _processor(family: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own processor over the same parts, without the video part, which needs torchvision."""
    # Only written into the prompts of videos.
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    kind = {"internvl": InternVLProcessor, "smolvlm": processing_smolvlm.SmolVLMProcessor}.get(
        family.convention.model_type, Qwen2VLProcessor
    )
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    file = family.path / "processor_config.json"
    lengths = {k: v for k, v in json.loads(file.read_text()).items() if "seq_len" in k} if file.exists() else {}
    return kind(image_processor=family.image_processor, tokenizer=family.tokenizer, video_processor=None, **lengths)


def test_every_convention_has_its_model_and_the_other_way_round() -> None:
    assert set(_KINDS) == set(CONVENTIONS) == set(FAMILIES)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_prompt_is_what_transformers_processor_makes_of_it(
    loaded: Loaded, images: tuple[Path, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = loaded.family.encode(_ask(*images[:count]))
    processor = _processor(loaded.family, monkeypatch)
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": "where is it?"}]
    chat = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": content}]
    text = loaded.family.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    pictures = [load_image(path) for path in images[:count]]
    expected = processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert prompt.image_tokens == int((prompt.input_ids == loaded.config["image_token_id"]).sum())
    ours = {name: value for name, value in plain_inputs(loaded, prompt).items() if name in ("pixel_values", "image_grid_thw")}
    assert set(ours) == set(expected) & {"pixel_values", "image_grid_thw"}
    for name, value in ours.items():
        assert torch.equal(value, expected[name])
    assert torch.all(torch.as_tensor(expected.get("pixel_attention_mask", 1)) == 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_features_computed_before_give_the_logits_of_pixels(loaded: Loaded, images: tuple[Path, ...], count: int) -> None:
    prompt = loaded.family.encode(_ask(*images[:count]))
    with torch.no_grad():
        expected = loaded.model(**plain_inputs(loaded, prompt)).logits
        features = [loaded.family.encode_images(loaded.model, prompt)]
        ids, positions = prompt.input_ids[None], prompt.position_ids[:, None]
        for _ in range(2):
            output = loaded.family.forward(loaded.model, input_ids=ids, position_ids=positions, features=features)
            assert torch.allclose(output.logits, expected, atol=1e-5)


def test_an_image_changes_what_is_said_after_it(loaded: Loaded, images: tuple[Path, ...]) -> None:
    prompt = loaded.family.encode(_ask(images[0]))
    ids, positions = prompt.input_ids[None], prompt.position_ids[:, None]
    features = loaded.family.encode_images(loaded.model, prompt)
    other = type(features)(features.embeds + 1, features.deepstack)
    with torch.no_grad():
        logits = [
            loaded.family.forward(loaded.model, input_ids=ids, position_ids=positions, features=[f]).logits[0, -1]
            for f in (features, other)
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_encoding_several_prompts_at_once_changes_nothing(loaded: Loaded, images: tuple[Path, ...]) -> None:
    prompts = [loaded.family.encode(_ask(*images[:count])) for count in (2, 0, 3, 1)]
    together = loaded.family.encode_images_of(loaded.model, prompts)
    assert [len(f) for f in together] == [p.image_tokens for p in prompts]
    assert not together[0].embeds.requires_grad
    for prompt, features in zip(prompts, together, strict=True):
        alone = loaded.family.encode_images(loaded.model, prompt)
        assert torch.allclose(features.embeds, alone.embeds, atol=1e-5)
        assert len(features.deepstack) == len(alone.deepstack)


def test_many_images_go_through_the_tower_a_few_prompts_at_a_time(
    loaded: Loaded, images: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [loaded.family.encode(_ask(*images[:count])) for count in (1, 0, 3, 1, 2)]
    expected = loaded.family.encode_images_of(loaded.model, prompts)
    monkeypatch.setattr(chat, "TOKENS_AT_ONCE", prompts[2].image_tokens - 1)
    sizes = []
    tower = getattr(loaded.model.model, loaded.family.vision_parts[0])
    hook = tower.register_forward_pre_hook(lambda _, args, kw: sizes.append(len([*args, *kw.values()][0])), with_kwargs=True)
    found = loaded.family.encode_images_of(loaded.model, prompts)
    hook.remove()
    assert len(sizes) > 2
    assert sum(sizes) == sum(len(p.vision["pixel_values"]) for p in prompts if p.vision)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.embeds, theirs.embeds, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_packed_group_is_its_rows(folder: Path, images: tuple[Path, ...], count: int) -> None:
    adapted = with_adapter(folder)
    prompt = adapted.family.encode(_ask(*images[:count]))
    ours, theirs = (score(adapted, prompt, RAGGED) for score in (packed_logprobs, row_logprobs))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert relative(gradients(adapted, ours), gradients(adapted, theirs)) < 1e-4


def test_an_adapter_reaches_every_linear_layer_of_the_decoder_and_nothing_of_the_vision_part(folder: Path) -> None:
    adapted = with_adapter(folder)
    reached = {name.split(".lora_A")[0] for name, _ in adapted.model.named_modules() if name.endswith("lora_A")}
    decoder = adapted.family.language_model(adapted.model)
    linear = [n for n, module in decoder.named_modules() if isinstance(module, torch.nn.Linear) and "lora" not in n]
    assert len(reached) == len(linear)
    assert all(any(name.endswith(layer.removesuffix(".base_layer")) for layer in linear) for name in reached)


def test_a_trainable_model_keeps_its_vision_tower_and_projector_frozen(folder: Path) -> None:
    loaded = load_model(folder, trainable=True)
    decoder = {id(p) for p in loaded.family.language_model(loaded.model).parameters()}
    learning = {id(p): name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert decoder <= set(learning)
    assert {name for i, name in learning.items() if i not in decoder} <= {"lm_head.weight"}


def test_a_completion_is_decoded_without_its_end(loaded: Loaded) -> None:
    text = '<think>Image 2.</think><answer>[{"image": 2, "bbox_2d": [1, 2, 3, 4]}]</answer>'
    ids = loaded.family.completion_ids(text)
    assert ids[-1] == loaded.family.end_token_id
    assert ids[-1] in loaded.family.stop_token_ids
    assert loaded.family.decode(ids) == loaded.family.decode(ids[:-1]) == text


def test_what_stands_around_images_and_rows_without_a_token_are_banned(loaded: Loaded, images: tuple[Path, ...]) -> None:
    family = loaded.family
    banned = set(family.banned_token_ids)
    text = set(family.encode(_ask()).input_ids.tolist()) | set(family.completion_ids("\n"))
    # Whatever special token an image brings into a prompt must not be sampled.
    brought = {i for i in family.encode(_ask(*images)).input_ids.tolist() if i not in text and i >= 256}
    assert loaded.config["image_token_id"] in brought
    assert brought <= banned
    assert set(range(len(family.tokenizer), len(family.tokenizer) + 5)) <= banned
    assert not banned & set(family.stop_token_ids)
    assert len(banned) < 40


def test_text_that_holds_a_token_of_the_chat_is_refused(loaded: Loaded) -> None:
    family = loaded.family
    for token in (*family.convention.marks.control, family.convention.marks.end):
        with pytest.raises(DataError, match="the prompt text holds"):
            family.encode([Message("user", (f"look: {token}",))])


@pytest.mark.parametrize("total", [1, 10**9], ids=["least", "most"])
def test_a_pixel_budget_changes_the_prompt_and_nothing_falls_apart(
    folder: Path, loaded: Loaded, images: tuple[Path, ...], total: int
) -> None:
    total = max(total, 3 * 28 * 28)
    family = load_family(folder, max_pixels_total=total)
    prompt = family.encode(_ask(*images))
    canvases = family.convention.canvases([load_image(path).size for path in images])
    assert prompt.image_tokens == sum(canvas.tokens for canvas in canvases)
    with torch.no_grad():
        assert len(family.encode_images(loaded.model, prompt)) == prompt.image_tokens
    if total == 3 * 28 * 28:
        assert prompt.image_tokens < loaded.family.encode(_ask(*images)).image_tokens


def test_an_image_token_unlike_the_tokenizers_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 7}))
    with pytest.raises(ModelError, match="calls token 7 the image"):
        load_family(tmp_path)


def test_the_native_form_survives_the_tokenizer_with_and_without_its_special_tokens(loaded: Loaded) -> None:
    family = loaded.family
    if family.native is None:
        assert family.convention.model_type == "smolvlm"
        return
    answer = Answer((Located(1, Box(0.1, 0.2, 0.5, 0.75)), Located(1, Box(0.0, 0.0, 1.0, 0.5))))
    grids = [PER_MILLE]
    ids = family.completion_ids(write_native(answer, grids, native=family.native, label="the red star"))
    assert not set(ids) & set(family.banned_token_ids)
    for text in (family.decode(ids), family.tokenizer.decode(ids, skip_special_tokens=True)):
        assert read_answer(text, grids, native=family.native) == answer


def test_boxes_are_written_on_the_canvas_that_the_tower_sees(loaded: Loaded, images: tuple[Path, ...]) -> None:
    family, sizes = loaded.family, [load_image(path).size for path in images]
    assert family.grids(images) == family.convention.grids(sizes)
    if family.convention.per_mille:
        assert family.grids([Path("never-opened.png")]) == [PER_MILLE]
        return
    grid_thw = family.encode(_ask(*images)).vision["image_grid_thw"].tolist()
    assert family.grids(images) == [Grid(width=w * 14, height=h * 14) for _, h, w in grid_thw]


def test_layers_computed_again_in_the_backward_pass_give_the_same_gradients(folder: Path, images: tuple[Path, ...]) -> None:
    adapted = with_adapter(folder)
    prompt = adapted.family.encode(_ask(*images[:2]))
    expected = gradients(adapted, packed_logprobs(adapted, prompt, RAGGED))
    adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.model.train()
    assert relative(gradients(adapted, packed_logprobs(adapted, prompt, RAGGED)), expected) < 1e-5


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_images_are_encoded_by_a_model_whose_weights_fsdp_has_shared_out(folder: Path, images: tuple[Path, ...]) -> None:
    sharded = load_model(folder)
    prompt = sharded.family.encode(_ask(*images))
    expected = sharded.family.encode_images(sharded.model, prompt)
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.family.language_model(sharded.model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded.model, mesh=mesh)
    for _ in range(2):
        found = sharded.family.encode_images(sharded.model, prompt)
        assert torch.allclose(found.embeds, expected.embeds, atol=1e-5)
        ids, positions = prompt.input_ids[None], prompt.position_ids[:, None]
        sharded.family.forward(sharded.model, input_ids=ids, position_ids=positions, features=[found])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_prompt_is_counted_without_the_model_as_long_as_it_is(loaded: Loaded, images: tuple[Path, ...], count: int) -> None:
    family, messages = loaded.family, _ask(*images[:count])
    canvases = family.convention.canvases([load_image(path).size for path in images[:count]])
    prompt, length = family.encode(messages), PromptCounter(family.convention).count(messages, canvases)
    assert (length.total, length.images) == (len(prompt), prompt.image_tokens)
