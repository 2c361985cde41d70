"""Model folders with random weights, as `polyground.models.load_model` reads them: tiny ones for a CPU, public sizes for a GPU.

Speed and memory depend on shapes only. The tokenizer is byte-level, so that a prompt's length can be chosen by its text.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
PATCH, MERGE = 14, 2
TOKEN_SIDE = PATCH * MERGE
"""Pixels of one image token's side."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The dimensions of a model."""

    text: dict[str, Any]
    vision: dict[str, Any]
    families: tuple[str, ...]


_TINY_TEXT = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
    "tie_word_embeddings": True,
}
_TOY_TEXT = _TINY_TEXT | {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
# As in the config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
_QWEN2_5_TEXT = {
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    "rms_norm_eps": 1e-6,
}
_3B_TEXT = _QWEN2_5_TEXT | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_7B_TEXT = _QWEN2_5_TEXT | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_QWEN2_5_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_QWEN2_5_WINDOWS = {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}

PRESETS = {
    "toy": Size(
        text=_TOY_TEXT,
        vision={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2},
        families=FAMILIES,
    ),
    "tiny": Size(
        text=_TINY_TEXT,
        vision={"depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4},
        families=FAMILIES,
    ),
    "3b": Size(text=_3B_TEXT, vision=_QWEN2_5_VISION | _QWEN2_5_WINDOWS, families=("qwen2_5_vl",)),
    "7b": Size(text=_7B_TEXT, vision=_QWEN2_5_VISION | _QWEN2_5_WINDOWS, families=("qwen2_5_vl",)),
}
"""`toy` is for tests, `tiny` has about 7 million parameters, the others are Qwen2.5-VL's."""


def model_folder(root: Path, preset: str, family: str, *, dtype: str = "float32", device: str = "cpu") -> Path:
    """The folder of a preset, written on first use; weights lie there in `dtype`, so that loading rounds nothing."""
    # The public sizes are stored in bfloat16, as published: in float32 they would fill a disk.
    dtype = "bfloat16" if preset in ("3b", "7b") else dtype
    folder = root / f"{family}-{preset}-{dtype}"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, preset, family, dtype=dtype, device=device)
        (folder / "complete").touch()
    return folder


def write_model(folder: Path, preset: str, family: str, *, dtype: str, device: str = "cpu", seed: int = 0) -> None:
    """Write a whole model folder with random weights."""
    size = PRESETS[preset]
    if family not in size.families:
        raise SystemExit(f"the preset {preset} is of {', '.join(size.families)}, not {family}")
    folder.mkdir(parents=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(family), indent=2) + "\n")
    torch.manual_seed(seed)
    # Seven billion weights are drawn in seconds on a GPU and in minutes elsewhere.
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = _BUILDERS[family](size, tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
    if preset in ("toy", "tiny"):
        _spread(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def _spread(model: torch.nn.Module) -> None:
    """Weights of gain one: with the usual start images and positions would hardly show in what a small model says."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _preprocessor(family: str) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": {"qwen3_vl": "Qwen3VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family],
        # Wide bounds: images enter at the size they have.
        "size": {"shortest_edge": 4 * TOKEN_SIDE**2, "longest_edge": 16384 * TOKEN_SIDE**2},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def _parts(size: Size, tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    own = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": size.text["hidden_size"],
    }
    return ids, size.text | own, size.vision | vision


def _qwen3(size: Size, tokenizer: PreTrainedTokenizerFast) -> Any:
    ids, text, vision = _parts(size, tokenizer)
    rope = text["rope_parameters"] | {"mrope_interleaved": True}
    depth = vision["depth"]
    vision |= {"num_position_embeddings": 1024, "deepstack_visual_indexes": list(range(depth // 3, depth - 1)) or [0]}
    config = Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **ids,
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen2_5(size: Size, tokenizer: PreTrainedTokenizerFast) -> Any:
    ids, text, vision = _parts(size, tokenizer)
    windows = {"window_size": 112, "fullatt_block_indexes": [vision["depth"] // 2 - 1, vision["depth"] - 1]}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=windows | vision, tie_word_embeddings=text["tie_word_embeddings"], **ids
    )
    return Qwen2_5_VLForConditionalGeneration(config)


_BUILDERS = {"qwen3_vl": _qwen3, "qwen2_5_vl": _qwen2_5}
