"""Opening model folders: which family, are its files there and safe, weights and adapter into memory.

Only safetensors weights and only classes that transformers ships: no code of the folder is ever run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from polyground.errors import ModelError
from polyground.models.family import Family, Loaded
from polyground.models.linear_attention import let_states_branch
from polyground.models.qwen import QwenFamily, patchify_as_product

TINY = Path(__file__).parent / "tiny"
"""The model shipped with the package; `load_model("tiny")` opens it."""

_CLASSES: dict[str, type[PreTrainedModel]] = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
}

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


def model_folder(path: str | Path) -> Path:
    """The folder meant by a recipe's model path: `tiny` is the packaged one."""
    return TINY if str(path) == "tiny" else Path(path)


def load_family(path: str | Path, *, max_pixels: int | None = None, max_pixels_total: int | None = None) -> Family:
    """What a folder says about prompts and grids, without its weights."""
    folder = model_folder(path)
    config = _read_config(folder)
    return _FAMILIES[config["model_type"]](folder, config, max_pixels, max_pixels_total)


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
    """
    folder = model_folder(path)
    family = load_family(folder, max_pixels=max_pixels, max_pixels_total=max_pixels_total)
    config = _read_config(folder)
    _require_safetensors(folder)
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    try:
        model, info = _CLASSES[config["model_type"]].from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # `eager` takes a boolean mask for numbers to add, which is silently wrong in packed training.
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the weights cannot be loaded ({error}); copy the folder again") from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        count = len(info["missing_keys"])
        raise ModelError(f"{folder}: {count} weights that config.json asks for are missing ({some}, …); copy the folder again")
    patchify_as_product(model)
    let_states_branch(model)
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


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give a local folder, or `tiny` for the packaged model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no config.json; is this a transformers model folder?") from error
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not valid JSON ({error}); copy the file again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _FAMILIES:
        raise ModelError(f"{folder}: model_type {kind!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}")
    return config


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
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{adapter}: the adapter does not fit its base model ({error}); train it again on this base") from error


def _qwen(folder: Path, config: dict[str, Any], max_pixels: int | None, max_pixels_total: int | None) -> QwenFamily:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: tokenizer or image processor cannot be loaded ({error}); copy their files here") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _chat_template(folder)
    return QwenFamily(
        tokenizer=tokenizer,
        image_processor=image_processor,
        config=config,
        path=folder,
        max_pixels=max_pixels,
        max_pixels_total=max_pixels_total,
        per_mille=config["model_type"] != "qwen2_5_vl",
    )


def _chat_template(folder: Path) -> str:
    # Older folders keep the processor's template beside the tokenizer's, as JSON.
    file = folder / "chat_template.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no chat template; copy chat_template.jinja or chat_template.json of the base model here")
    return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])


_FAMILIES: dict[str, Callable[[Path, dict[str, Any], int | None, int | None], Family]] = {
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_5": _qwen,
}
