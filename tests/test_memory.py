"""Facts about the memory estimate: parameters counted exactly, every part by a formula that can be done by hand."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyground.config import GrpoConfig, SftConfig
from polyground.errors import ModelError
from polyground.memory import (
    Decoder,
    ModelSize,
    Prompts,
    Vision,
    count_parameters,
    describe,
    grpo_memory,
    model_size,
    readable,
    saved_per_token,
    sft_memory,
    stored_parameters,
    trainable_parameters,
)

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "smolvlm"]


def decoder(hidden: int, intermediate: int, layers: int, heads: int, keys: int, vocab: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocab,
        **others,
    }


QWEN2_TOWER = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "in_chans": 3, "patch_size": 14, "hidden_size": 3584}
QWEN2_5_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "in_chans": 3, "patch_size": 14}
QWEN3_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}

# Bytes of the published bfloat16 weights, by the `total_size` of their model.safetensors.index.json.
PUBLISHED = {
    "Qwen2-VL-7B-Instruct": 16_582_751_232,
    "Qwen2.5-VL-7B-Instruct": 16_584_333_312,
    "Qwen3-VL-8B-Instruct": 17_534_247_392,
}

CONFIGS = {
    # The two older folders keep the language model's sizes at the top.
    "Qwen2-VL-7B-Instruct": {
        "model_type": "qwen2_vl",
        **decoder(3584, 18944, 28, 28, 4, 152064),
        "vision_config": QWEN2_TOWER,
    },
    "Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        **decoder(3584, 18944, 28, 28, 4, 152064),
        "vision_config": {**QWEN2_5_TOWER, "out_hidden_size": 3584},
    },
    "Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": decoder(4096, 12288, 36, 32, 8, 151936, head_dim=128, model_type="qwen3_vl_text"),
        "vision_config": QWEN3_TOWER,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_in_a_config_give_the_published_number_of_parameters(name: str) -> None:
    assert 2 * count_parameters(CONFIGS[name])["total"] == PUBLISHED[name]


def test_the_two_numbers_of_a_7b_are_its_language_model_and_its_vision_tower() -> None:
    assert count_parameters(CONFIGS["Qwen2.5-VL-7B-Instruct"]) == {
        "total": 8_292_166_656,
        "text": 7_615_616_512,
        "vision": 676_550_144,
    }


def test_the_packaged_model_has_as_many_parameters_by_its_weights_as_by_its_config() -> None:
    size = model_size("tiny")
    config = json.loads((size.path / "config.json").read_text())
    assert size.counted_from == "weights"
    assert size.parameters == count_parameters(config)["total"] == 7_121_024
    assert size.context == 4096


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_counted_to_the_last_parameter(model_type: str, tmp_path: Path) -> None:
    from polyground.models import load_model
    from polyground.training.runs import add_adapter
    from toys import write_toy

    folder = write_toy(tmp_path / "model", model_type)
    loaded = load_model(folder)
    size = model_size(folder)
    inside = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert size.parameters == inside
    assert count_parameters(json.loads((folder / "config.json").read_text()))["total"] == inside

    config = SftConfig(lora_r=3)
    adapted = add_adapter(loaded.model, loaded.family, config, seed=0)
    assert trainable_parameters(size, config) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def write_weights(file: Path, shapes: dict[str, list[int]]) -> None:
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_shards_are_counted_by_their_headers_and_only_when_all_are_there(tmp_path: Path) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    write_weights(tmp_path / "model-1.safetensors", {"a": [3, 4]})
    assert stored_parameters(tmp_path) is None
    write_weights(tmp_path / "model-2.safetensors", {"b": [5], "c": []})
    assert stored_parameters(tmp_path) == 12 + 5 + 1


def test_a_folder_without_weights_is_counted_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-VL-7B-Instruct"]))
    size = model_size(tmp_path)
    assert (size.parameters, size.counted_from) == (8_292_166_656, "config")
    # Seven linear layers of 28 decoder layers: q and o, k and v, and the three of the MLP.
    one = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert size.lora_width == 28 * one


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"<html>not found</html>", "not a safetensors file", id="web-page"),
        pytest.param(b"", "not a safetensors file", id="empty"),
        pytest.param(struct.pack("<Q", 9) + b'{"a": 1}', "not a safetensors file", id="cut-short"),
        pytest.param(struct.pack("<Q", 2) + b"[]", "not a safetensors file", id="a-list"),
    ],
)
def test_damaged_weights_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        stored_parameters(tmp_path)


def test_a_config_without_its_sizes_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": {}, "vision_config": {}}))
    with pytest.raises(ModelError, match=r"config\.json.*num_attention_heads"):
        model_size(tmp_path)


# ---------------------------------------------------------------- by hand

SMALL = ModelSize(
    path=Path("small"),
    model_type="qwen2_5_vl",
    parameters=1_000,
    counted_from="weights",
    vision_parameters=100,
    lora_width=50,
    decoder=Decoder(
        layers=2,
        full_attention_layers=2,
        hidden=10,
        intermediate=20,
        heads=4,
        kv_heads=2,
        head_dim=3,
        vocab=100,
        normed_heads=False,
    ),
    vision=Vision(hidden=8, intermediate=16, pixels_per_patch=12, patches_per_token=4, feature_layers=1),
    context=1_000,
)
PROMPT = Prompts(tokens=30, image_tokens=5)
GRPO: dict[str, Any] = {
    "lora_r": 2,
    "lora_alpha": 4,
    "num_generations": 4,
    "max_completion_length": 7,
    "per_device_train_batch_size": 1,
}


def grpo(**changes: Any) -> GrpoConfig:
    return GrpoConfig(**{**GRPO, **changes})


def test_what_lasts_is_weights_and_sixteen_bytes_for_every_parameter_of_the_adapter() -> None:
    lasting = grpo_memory(SMALL, grpo(), dtype="bfloat16", prompts=PROMPT).lasting
    assert lasting == {
        "weights": 2 * 1_000,
        "adapter": 4 * 100,
        "gradients": 4 * 100,
        "optimiser": 8 * 100,
        "image features": 5 * 10 * 2,
        "reference": 0,
    }


def test_one_layer_saves_for_a_token_what_its_parts_add_up_to() -> None:
    norms, mlp, log_sums = 2 * 4 * 10, 3 * 20, 4 * 4
    ranks = 7 * 2
    # float32: queries, repeated keys and values, result; the inputs of the two halves of a layer and of the last matrix.
    by_hand = norms + 4 * (4 * 12) + log_sums + 4 * mlp + 4 * (2 * 10 + 20) + 4 * ranks
    assert saved_per_token(SMALL.decoder, grpo(), "float32", repeated=True) == by_hand
    # bfloat16 under autocast: halves, and each of the seven layers casts its own input.
    by_hand = norms + 2 * (4 * 12) + log_sums + 2 * mlp + 2 * (5 * 10 + 12 + 20) + 2 * ranks
    assert saved_per_token(SMALL.decoder, grpo(bf16=True), "bfloat16", repeated=True) == by_hand


def test_a_group_costs_its_prompt_once_and_each_completion_once() -> None:
    estimate = grpo_memory(SMALL, grpo(), dtype="float32", prompts=PROMPT)
    per_token = saved_per_token(SMALL.decoder, grpo(), "float32", repeated=False)
    assert estimate.phases["update"]["activations"] == 2 * (30 + 4 * 7) * per_token
    assert estimate.phases["update"]["logits"] == 16 * 4 * 7 * 100
    assert estimate.batch == "1 group of 30 + 4 x 7 tokens"


def test_masks_are_paid_for_only_where_they_are_laid() -> None:
    with_mask = grpo_memory(SMALL, grpo(prefix_attention="mask"), dtype="float32", prompts=PROMPT).phases["update"]
    assert with_mask["attention masks"] == 2 * (30 + 4 * 7) ** 2 * 4
    assert grpo_memory(SMALL, grpo(), dtype="float32", prompts=PROMPT).phases["update"]["attention masks"] == 0
    rows = {count: SftConfig(lora_r=2, per_device_train_batch_size=count) for count in (1, 3)}
    masks = {
        count: sft_memory(SMALL, config, dtype="float32", prompts=PROMPT, completion=7).phases["update"]["attention masks"]
        for count, config in rows.items()
    }
    assert masks == {1: 0, 3: 2 * 3 * 37**2 * 4}


def test_the_key_cache_holds_every_prompt_and_a_copy_with_room_for_each_completion() -> None:
    config = grpo(per_device_train_batch_size=3)
    sampling = grpo_memory(SMALL, config, dtype="bfloat16", prompts=PROMPT).phases["sampling"]
    # Two layers, keys and values of 2 heads x 3, two bytes each; 3 prompts, and 12 completions on copies of them.
    assert sampling["key cache"] == 2 * 6 * (2 + 2) * (3 * 30 + 12 * (30 + 7))
    assert sampling["decoding"] == 32 * 12 * 100


def test_a_long_prompt_that_is_decoded_alone_is_not_copied() -> None:
    prompts = Prompts(tokens=600, image_tokens=500)
    sampling = grpo_memory(SMALL, grpo(), dtype="bfloat16", prompts=prompts).phases["sampling"]
    assert sampling["key cache"] == 2 * 6 * (2 + 2) * (600 + 4 * 7)


def test_no_more_than_64_completions_are_decoded_together() -> None:
    config = grpo(num_generations=16, per_device_train_batch_size=2, gradient_accumulation_steps=10)
    sampling = grpo_memory(SMALL, config, dtype="bfloat16", prompts=PROMPT).phases["sampling"]
    assert sampling["decoding"] == 32 * 64 * 100


def test_checkpointing_keeps_one_layer_and_the_input_of_each() -> None:
    config = grpo(gradient_checkpointing=True, per_device_train_batch_size=2)
    phases = grpo_memory(SMALL, config, dtype="bfloat16", prompts=PROMPT).phases
    tokens = 2 * (30 + 4 * 7)
    assert phases["loss"] == {"checkpoints": 2 * tokens * 10 * 2, "logits": 16 * 2 * 4 * 7 * 100}
    assert phases["backward"] == {
        "checkpoints": 2 * tokens * 10 * 2,
        "activations": tokens * saved_per_token(SMALL.decoder, config, "bfloat16", repeated=False),
        "attention masks": 0,
        "layer gradients": 8 * tokens * 20,
        "logits": 4 * 2 * 4 * 7 * 100,
    }


def test_autocast_on_float32_weights_keeps_a_cast_of_every_matrix() -> None:
    update = grpo_memory(SMALL, grpo(bf16=True), dtype="float32", prompts=PROMPT).phases["update"]
    assert update["cast weights"] == 2 * 2 * 10 * (2 * 12 + 2 * 6 + 3 * 20)
    assert update["cast adapter"] == 2 * 100


def test_images_are_paid_for_by_their_patches() -> None:
    images = grpo_memory(SMALL, grpo(), dtype="bfloat16", prompts=PROMPT).phases["images"]
    assert images == {"pixels": 8 * 20 * 12, "vision tower": 20 * (2 * 16 + 6 * 8) * 2}


def test_the_peak_is_what_lasts_and_the_largest_phase() -> None:
    estimate = grpo_memory(SMALL, grpo(), dtype="float32", prompts=PROMPT)
    largest = max(sum(parts.values()) for parts in estimate.phases.values())
    assert estimate.total == sum(estimate.lasting.values()) + largest
    assert sum(estimate.phases[estimate.peak_phase].values()) == largest


def test_the_estimate_in_words_marks_the_peak_and_says_that_the_reference_is_free() -> None:
    lines = describe("GRPO", grpo_memory(SMALL, grpo(), dtype="float32", prompts=PROMPT))
    assert lines[0].startswith("GRPO: about ")
    assert [line[2:10] for line in lines if line.startswith("*")] == ["update  "]
    assert any("reference 0 B" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (80 * 2**30, "80.0 GiB")]
)
def test_bytes_are_written_in_the_unit_that_suits_them(size: int, text: str) -> None:
    assert readable(size) == text


# ---------------------------------------------------------------- against the real thing


@contextlib.contextmanager
def counting_what_is_saved(model: Any, found: dict[int, int]) -> Iterator[None]:
    """Bytes of every storage that autograd keeps for the backward, the model's own left out."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Any] = []

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        # Held to the end, so that no address is used twice.
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        pytest.param("float32", "mask", id="float32-mask"),
        pytest.param("float32", "shared", id="float32-shared"),
        pytest.param("bfloat16", "shared", id="bfloat16-shared"),
    ],
)
def test_what_a_packed_forward_of_the_tiny_model_saves_is_within_three_percent_of_the_estimate(
    dtype: str, attention: Any, tmp_path: Path
) -> None:
    from polyground.batches import pack_group
    from polyground.models import load_model
    from polyground.records import Message
    from polyground.training.runs import add_adapter
    from polyground.training.scores import score_group
    from toys import write_image

    config = grpo(lora_r=8, max_completion_length=64, prefix_attention=attention)
    loaded = load_model("tiny", dtype=dtype)
    model = add_adapter(loaded.model, loaded.family, config, seed=0)
    image = write_image(tmp_path / "image.png", width=224, height=224)
    prompt = loaded.family.encode([Message("user", (image, image, "find the red star"))])
    packed = pack_group(prompt, [[5 + i] * 64 for i in range(4)])
    features = loaded.family.encode_images(model, prompt)
    found: dict[int, int] = {}
    with counting_what_is_saved(model, found):
        score_group(model, loaded.family, packed, features, temperature=1.0, attention=attention)

    prompts = Prompts(tokens=len(prompt), image_tokens=prompt.image_tokens)
    update = grpo_memory(model_size("tiny"), config, dtype=dtype, prompts=prompts).phases["update"]
    saved_logits = 4 * 4 * 64 * 1024
    estimated = update["activations"] + update["attention masks"] + saved_logits
    assert estimated / sum(found.values()) == pytest.approx(1, abs=0.03)
