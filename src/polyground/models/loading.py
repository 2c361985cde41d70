"""Opening model folders: which family, are its files there and safe, weights and adapter into memory.

Only safetensors weights and only classes that transformers ships: no code of the folder is ever run.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from polyground.conventions import load_convention, model_folder, read_config, read_json
from polyground.errors import ModelError
from polyground.models.chat import ChatFamily
from polyground.models.family import Family, Loaded
from polyground.models.internvl import InternVLFamily
from polyground.models.linear_attention import let_states_branch
from polyground.models.lora import compute_in_one_piece
from polyground.models.qwen import QwenFamily, patchify_as_product
from polyground.models.shared_prefix import SHARED_PREFIX, prune_last_layer
from polyground.models.smolvlm import SmolVLMFamily


@dataclass(frozen=True, slots=True)
class _Kind:
    """What opens a folder of one model type."""

    weights: type[PreTrainedModel]
    family: type[ChatFamily]
    image_processor: Any


_KINDS = {
    "qwen2_vl": _Kind(Qwen2VLForConditionalGeneration, QwenFamily, Qwen2VLImageProcessorPil),
    "qwen2_5_vl": _Kind(Qwen2_5_VLForConditionalGeneration, QwenFamily, Qwen2VLImageProcessorPil),
    "qwen3_vl": _Kind(Qwen3VLForConditionalGeneration, QwenFamily, Qwen2VLImageProcessorPil),
    "qwen3_5": _Kind(Qwen3_5ForConditionalGeneration, QwenFamily, Qwen2VLImageProcessorPil),
    "internvl": _Kind(InternVLForConditionalGeneration, InternVLFamily, GotOcr2ImageProcessorPil),
    "smolvlm": _Kind(SmolVLMForConditionalGeneration, SmolVLMFamily, SmolVLMImageProcessorPil),
}
"""By `model_type` in config.json; the keys of `conventions.CONVENTIONS`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def load_family(path: str | Path, *, max_pixels: int | None = None, max_pixels_total: int | None = None) -> Family:
    """What a folder says about prompts and grids, without its weights."""
    convention = load_convention(path, max_pixels=max_pixels, max_pixels_total=max_pixels_total)
    folder, kind = convention.path, _KINDS[convention.model_type]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        image_processor = kind.image_processor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: tokenizer or image processor cannot be loaded ({error}); copy their files here") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _chat_template(folder)
    return kind.family(tokenizer=tokenizer, image_processor=image_processor, config=read_config(folder), convention=convention)


def best_device() -> str:
    """An accelerator where there is one; under a launcher, the one of this process."""
    if not torch.cuda.is_available():
        return "cpu"
    own = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(own) % torch.cuda.device_count()}" if own.isdigit() else "cuda"


def _require_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    # A build without CUDA says so by an assertion.
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ModelError(f"device {str(device)!r} cannot be used ({why}); `polyground doctor` tells what there is") from error


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    max_pixels: int | None = None,
    max_pixels_total: int | None = None,
    adapter: str | Path | None = None,
    trainable: bool = False,
    device: str | torch.device | None = None,
) -> Loaded:
    """Open a model folder, in evaluation mode with frozen weights.

    `dtype` is `float32`, `bfloat16`, `float16` or `auto` (as stored). `adapter` is a peft folder laid over the base.
    `trainable` leaves the weights (with an adapter: the adapter's) trainable, except the vision tower's.

    Raises ModelError for what cannot be opened, and for a `device` that is not there.
    """
    folder = model_folder(path)
    family = load_family(folder, max_pixels=max_pixels, max_pixels_total=max_pixels_total)
    config = read_config(folder)
    _require_safetensors(folder)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    if device is not None:
        _require_device(device)
    try:
        model, info = _KINDS[config["model_type"]].weights.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # `eager` takes a boolean mask for numbers to add, which is silently wrong in packed training.
            attn_implementation={"": "sdpa", "text_config": SHARED_PREFIX},
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the weights cannot be loaded ({error}); copy the folder again") from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        count = len(info["missing_keys"])
        raise ModelError(f"{folder}: {count} weights that config.json asks for are missing ({some}, …); copy the folder again")
    if isinstance(family, QwenFamily):
        patchify_as_product(model)
    let_states_branch(model)
    prune_last_layer(family.language_model(model))
    model.requires_grad_(trainable and adapter is None)
    if adapter is not None:
        model = _with_adapter(model, Path(adapter), trainable=trainable)
    family.freeze_vision(model)
    model.eval()
    if device is not None:
        model.to(device)
    return Loaded(model, family, folder, config)


def save_processor_files(source: str | Path, target: str | Path) -> None:
    """Copy what turns messages into tensors (tokenizer, chat template, image processor) and the generation defaults."""
    source, target = model_folder(source), Path(target)
    for name in _PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise ModelError(f"{folder}: only pickled weights ({pickled[0]}), which may run code; convert them to safetensors")
    raise ModelError(f"{folder}: no *.safetensors weights; download or copy the whole folder")


def _with_adapter(model: PreTrainedModel, adapter: Path, *, trainable: bool) -> Any:
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(f"{adapter}: no adapter_config.json; give the folder of a peft adapter")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(f"{adapter}: no adapter_model.safetensors; save the adapter with safetensors")
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{adapter}: the adapter does not fit its base model ({error}); train it again on this base") from error
    compute_in_one_piece(adapted)
    return adapted


def _chat_template(folder: Path) -> str:
    # Older folders keep the processor's template beside the tokenizer's, as JSON.
    template = (read_json(folder / "chat_template.json") or {}).get("chat_template")
    if not isinstance(template, str):
        raise ModelError(f"{folder}: no chat template; copy chat_template.jinja or chat_template.json of the base model here")
    return template
