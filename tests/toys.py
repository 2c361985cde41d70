"""A toy folder of each family with random weights, small enough to build in a test."""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_toy(folder: Path, model_type: str = "qwen3_vl", *, seed: int = 0) -> Path:
    """Write a model folder: byte-level tokenizer, two layers of width 32, patches of 14 pixels merged 2 x 2."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    processor = {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 784, "longest_edge": 56 * 84},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **processor}))
    torch.manual_seed(seed)
    model = _BUILDERS[model_type](tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual start, so that images, positions and padding would show in the output.
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def write_image(path: Path, colour: str = "red", *, width: int = 56, height: int = 56) -> Path:
    """A picture of two colours, so that its position embedding matters."""
    image = Image.new("RGB", (width, height), colour)
    image.paste((10, 200, 30), (0, 0, width // 3, height // 2))
    image.save(path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


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
            torch.nn.init.uniform_(layer.linear_attn.A_log, -6, -2)
    return model


_BUILDERS = {"qwen3_vl": _qwen3, "qwen2_5_vl": _qwen2_5, "qwen3_5": _qwen3_5}
