"""A toy folder of each family with random weights, small enough to build in a test."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from polyground.models import Loaded, Prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "smolvlm")

_TURN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_TOKENS = (*_TURN_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_BOX_TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
_INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<ref>", "</ref>", "<box>", "</box>")
_SMOLVLM_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
    "IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEMPLATES = {
    "internvl": _CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    "smolvlm": (
        "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
        "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
_QWEN_TEMPLATE = _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")

_QWEN_FILES = {
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 784, "longest_edge": 56 * 84},
    }
}
_FILES = {
    # Older folders write the two bounds so.
    "qwen2_vl": {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": 784,
            "max_pixels": 56 * 84,
        }
    },
    "internvl": {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 56, "width": 56},
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 4,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    },
    "smolvlm": {
        "preprocessor_config.json": {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
            "do_image_splitting": True,
            "do_pad": True,
        },
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
    },
}


def write_toy(folder: Path, model_type: str = "qwen3_vl", *, seed: int = 0) -> Path:
    """Write a model folder: byte-level tokenizer, two layers of width 32, patches of 14 pixels merged 2 x 2.

    `internvl-qwen3` is an `internvl` with the decoder of InternVL3.5.
    """
    folder.mkdir(parents=True)
    build, model_type = _BUILDERS[model_type], model_type.partition("-")[0]
    tokenizer = _tokenizer(model_type)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATES.get(model_type, _QWEN_TEMPLATE), encoding="utf-8")
    for name, settings in _FILES.get(model_type, _QWEN_FILES).items():
        (folder / name).write_text(json.dumps(settings))
    torch.manual_seed(seed)
    model = build(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual start, so that images, positions and padding would show in the output.
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def plain_inputs(loaded: Loaded, prompt: Prompt, completion: Sequence[int] = ()) -> dict[str, Any]:
    """One row as transformers' own forward and `generate` take it: pixels instead of features, no positions."""
    ids = torch.cat([prompt.input_ids, torch.tensor(completion, dtype=torch.long)])[None]
    images = dict(prompt.vision)
    if images and loaded.config["model_type"] == "smolvlm":
        images["pixel_values"] = images["pixel_values"][None]
    if "image_grid_thw" in images:
        images["mm_token_type_ids"] = (ids == loaded.config["image_token_id"]).int()
    return {"input_ids": ids, **images}


def write_image(path: Path, colour: str = "red", *, width: int = 56, height: int = 56) -> Path:
    """A picture of two colours, so that its position embedding matters."""
    image = Image.new("RGB", (width, height), colour)
    image.paste((10, 200, 30), (0, 0, width // 3, height // 2))
    image.save(path)
    return path


def _tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, names, end = _QWEN_TOKENS, {}, "<|im_end|>"
    if model_type == "qwen2_vl":
        special += _QWEN_BOX_TOKENS
    if model_type == "internvl":
        special = (*_TURN_TOKENS, *_INTERNVL_TOKENS)
        names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    if model_type == "smolvlm":
        tiles = (f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
        special, end = (*_TURN_TOKENS, *_SMOLVLM_TOKENS, *tiles), "<end_of_utterance>"
        names = {"image": "<image>", "fake_image": "<fake_token_around_image>", "global_image": "<global-img>"}
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    named = {f"{name}_token": token for name, token in names.items()}
    # SmolVLM's own name for what is unknown is a token with a meaning.
    unknown = {"unk_token": "<|endoftext|>"} if model_type == "smolvlm" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token="<|endoftext|>", extra_special_tokens=named, **unknown
    )


def _common(tokenizer: PreTrainedTokenizerFast) -> tuple[dict, dict, dict]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    text = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
    }
    return ids, text, vision


def _qwen3(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    ids, text, vision = _common(tokenizer)
    vision |= {"hidden_size": 16, "intermediate_size": 24, "num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))


def _qwen2_5(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    ids, text, vision = _common(tokenizer)
    vision |= {"hidden_size": 16, "intermediate_size": 24, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )


def _qwen3_5(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5ForConditionalGeneration:
    ids, text, vision = _common(tokenizer)
    vision |= {"hidden_size": 16, "intermediate_size": 24, "num_position_embeddings": 36}
    # As in the real ones: more value heads than key heads, and rotary positions on a part of each attention head.
    linear = {"key_head_dim": 8, "value_head_dim": 8, "num_key_heads": 2, "num_value_heads": 4, "conv_kernel_dim": 4}
    text |= {f"linear_{name}": value for name, value in linear.items()}
    text |= {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16}
    text["rope_parameters"] = text["rope_parameters"] | {"partial_rotary_factor": 0.5}
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )
    for layer in model.model.language_model.layers:
        if hasattr(layer, "linear_attn"):
            # Forgets more slowly than the usual start, so that a prompt's beginning would show in the output.
            torch.nn.init.uniform_(layer.linear_attn.A_log, -4, -2)
    return model


def _qwen2(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    ids, text, vision = _common(tokenizer)
    # Named in its own way: `embed_dim` inside the tower, `hidden_size` what it gives to the decoder.
    vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    del vision["out_hidden_size"]
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))


def _plain_text(tokenizer: PreTrainedTokenizerFast, **changes: object) -> dict:
    """The text configuration of a family with plain rotary positions."""
    _, text, _ = _common(tokenizer)
    return text | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}} | changes


_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _internvl(tokenizer: PreTrainedTokenizerFast, decoder: str = "qwen2") -> InternVLForConditionalGeneration:
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=_plain_text(tokenizer, model_type=decoder),
            vision_config=_TOWER | {"image_size": [56, 56], "patch_size": [14, 14]},
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
            tie_word_embeddings=True,
        )
    )
    for layer in model.model.vision_tower.encoder.layer:
        # The usual start all but leaves each layer out.
        torch.nn.init.ones_(layer.lambda_1)
        torch.nn.init.ones_(layer.lambda_2)
    return model


def _smolvlm(tokenizer: PreTrainedTokenizerFast) -> SmolVLMForConditionalGeneration:
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config=_plain_text(tokenizer, model_type="llama", tie_word_embeddings=False),
            vision_config=_TOWER | {"image_size": 56, "patch_size": 14},
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            tie_word_embeddings=False,
        )
    )


_BUILDERS = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_5": _qwen3_5,
    "internvl": _internvl,
    "internvl-qwen3": partial(_internvl, decoder="qwen3"),
    "smolvlm": _smolvlm,
}
