"""What SFT and GRPO need in memory, estimated from a model folder's small files: no torch, no weights read.

Every figure is for one process that holds the whole model; FSDP and ZeRO divide weights, adapter and optimiser among several.

    weights       parameters x bytes of the dtype they are loaded in
    adapter       trainable parameters A = rank x sum of (inputs + outputs) of the targeted linear layers, each 4 bytes
    gradients     4 A;  optimiser 8 A (AdamW's two moments)
    tokens        SFT: rows x (P + C).  GRPO: groups x (P + G x C): the prompt is computed once for its G completions
    activations   tokens x decoder layers x what one layer saves for the backward (`saved_per_token`); with gradient checkpointing
                  tokens x layers x hidden x bytes of the residual stream ("checkpoints"), and one layer in full with 8 bytes x
                  MLP size of gradients per token, at a time when the loss is no longer there
    masks         SFT: rows x layers x (P + C)^2 x bytes, for more than one row.  GRPO: only with prefix_attention "mask":
                  groups x layers x (P + G x C)^2 x bytes; each group is then a forward pass of its own
    logits        only completions have them. SFT: 12 bytes x rows x C x vocabulary.  GRPO: 16 bytes x groups x G x C x
                  vocabulary, 4 of which last until the backward has used them (with a mask, 4 x groups + 12)
    casts         with bf16: 2 A; float32 weights of the decoder layers are cast as well, 2 bytes for each that is held in full
    key cache     full-attention layers x key size x bytes of a key and a value x tokens; of these, decoded together, every
                  completion has C, and P of its own unless one prompt of at least 512 tokens is decoded alone; every prompt P
    decoding      32 bytes x completions decoded together x vocabulary
    reference     0: it is the same model with the adapter switched off
    images        8 bytes x numbers in all patches (each prompt's own, and joined) + bytes x patches x (2 x MLP size + 6 x hidden)
                  of the vision tower, which keeps nothing for a backward

P and C are the longest prompt and completion. Left out: the CUDA context and the allocator's fragmentation (often 1-2 GiB more),
and the loading of the images, which is done on the CPU.
"""

from __future__ import annotations

import json
import math
import struct
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyground.config import GrpoConfig, SftConfig, TrainingConfig
from polyground.conventions import model_folder, read_config, read_json
from polyground.errors import ModelError

DECODED_TOGETHER = 64
"""Completions that the sampler in the trainer's process decodes at once, rounded to whole groups."""
SHARED_FROM = 512
"""Tokens of a prompt from which on its completions read its keys where they lie."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ADAPTER_BYTES = 4
"""peft keeps adapters in float32 whatever the model's dtype."""
_LONGEST_HEADER = 100_000_000


# ---------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Sizes of a language model, as config.json has them."""

    layers: int
    full_attention_layers: int
    """Those that keep keys and values of every token; the others are of linear attention."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    normed_heads: bool
    """Queries and keys are normalised per head (Qwen3)."""

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads together, which is that of the values."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """Sizes of a vision tower; a patch is a square of pixels, seen in as many frames as the family has."""

    hidden: int
    intermediate: int
    pixels_per_patch: int
    """Numbers that one patch is made of."""
    patches_per_token: int
    feature_layers: int
    """Language-model layers fed with image features: the first, and Qwen3-VL's deepstack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """What decides the memory of one model folder."""

    path: Path
    model_type: str
    parameters: int
    counted_from: str
    """`weights` (the headers of the safetensors files) or `config` (its dimensions)."""
    vision_parameters: int
    lora_width: int
    """Inputs plus outputs of all linear layers of the language model: an adapter of rank r has r times as many parameters."""
    decoder: Decoder
    vision: Vision
    context: int
    """Tokens the model was made for."""


def model_size(path: str | Path) -> ModelSize:
    """The sizes of a model folder (`tiny` for the packaged one). Raises ModelError for an unknown or broken folder."""
    folder = model_folder(path)
    config = read_config(folder)
    try:
        own = count_parameters(config)
        stored = stored_parameters(folder)
        text = _text(config)
        return ModelSize(
            path=folder,
            model_type=config["model_type"],
            parameters=own["total"] if stored is None else stored,
            counted_from="config" if stored is None else "weights",
            vision_parameters=own["vision"],
            lora_width=_lora_width(config),
            decoder=_decoder(config),
            vision=_vision(config),
            context=int(text.get("max_position_embeddings") or 32768),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: its sizes cannot be read ({type(error).__name__}: {error}); copy the file again"
        ) from error


def stored_parameters(folder: Path) -> int | None:
    """Parameters in the safetensors files, from their headers alone; None where the folder has none, or not all of them.

    A tied output layer is not stored, and not counted.
    """
    index = read_json(folder / "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) if index else ["model.safetensors"]
    files = [folder / str(name) for name in names]
    if not names or not all(file.is_file() for file in files):
        return None
    return sum(math.prod(entry["shape"]) for file in files for entry in _safetensors_header(file).values())


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Name to dtype and shape; the file begins with the length of this JSON object, 8 bytes, little-endian."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
        header.pop("__metadata__", None)
        if not all(isinstance(entry, dict) and isinstance(entry.get("shape"), list) for entry in header.values()):
            raise ValueError("a header without shapes")
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: not a safetensors file ({error}); download it again") from error
    return header


def count_parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """`total`, `text` and `vision` parameters of a config.json, from its dimensions; the projector counts as vision."""
    text = _text_parameters(config)
    vision = _VISION_PARAMETERS[config["model_type"]](config)
    return {"total": text + vision, "text": text, "vision": vision}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Older folders keep the language model's settings at the top."""
    return config.get("text_config") or config


def _decoder(config: Mapping[str, Any]) -> Decoder:
    text = _text(config)
    heads = int(text["num_attention_heads"])
    layers = int(text["num_hidden_layers"])
    kind = str(text.get("model_type") or config["model_type"])
    return Decoder(
        layers=layers,
        full_attention_layers=layers - _linear_layers(text),
        hidden=int(text["hidden_size"]),
        intermediate=int(text["intermediate_size"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
        vocab=int(text["vocab_size"]),
        normed_heads=kind.startswith("qwen3"),
    )


def _linear_layers(text: Mapping[str, Any]) -> int:
    """Layers of linear attention. Without a list, Qwen3.5 has full attention in every fourth layer."""
    layers = int(text["num_hidden_layers"])
    kinds = text.get("layer_types")
    if kinds is not None:
        return sum(kind == "linear_attention" for kind in kinds)
    if not str(text.get("model_type") or "").startswith("qwen3_5"):
        return 0
    return layers - layers // int(text.get("full_attention_interval") or 4)


def _linear_attention(text: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(width of all queries or keys, width of the values, value heads, width of one value head) of Qwen3.5's linear layers."""
    key = int(text.get("linear_num_key_heads") or 16) * int(text.get("linear_key_head_dim") or 128)
    heads, width = int(text.get("linear_num_value_heads") or 32), int(text.get("linear_value_head_dim") or 128)
    return key, heads * width, heads, width


def _lora_width(config: Mapping[str, Any]) -> int:
    d, text = _decoder(config), _text(config)
    mlp = 3 * (d.hidden + d.intermediate)
    gated = 2 if config["model_type"] == "qwen3_5" else 1
    full = (d.hidden + gated * d.query) + 2 * (d.hidden + d.key) + (d.query + d.hidden)
    width = d.full_attention_layers * (full + mlp)
    if linear := d.layers - d.full_attention_layers:
        key, value, heads, _ = _linear_attention(text)
        joint = (d.hidden + 2 * key + value) + (d.hidden + value) + 2 * (d.hidden + heads) + (value + d.hidden)
        width += linear * (joint + mlp)
    return width


def _text_parameters(config: Mapping[str, Any]) -> int:
    d, text = _decoder(config), _text(config)
    kind = str(text.get("model_type") or config["model_type"])
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    bias = d.query + 2 * d.key if kind.startswith("qwen2") else 0
    if text.get("attention_bias"):
        bias = d.query + 2 * d.key + d.hidden
    gated = 2 if config["model_type"] == "qwen3_5" else 1
    attention = gated * d.hidden * d.query + 2 * d.hidden * d.key + d.query * d.hidden + bias
    attention += 2 * d.head_dim if d.normed_heads else 0
    rest = 3 * d.hidden * d.intermediate + 2 * d.hidden
    total = d.full_attention_layers * (attention + rest) + d.hidden + d.vocab * d.hidden * (1 if tied else 2)
    if linear := d.layers - d.full_attention_layers:
        key, value, heads, head = _linear_attention(text)
        kernel = int(text.get("linear_conv_kernel_dim") or 4)
        joint = d.hidden * (2 * key + 2 * value + 2 * heads) + value * d.hidden
        total += linear * (joint + (2 * key + value) * kernel + 2 * heads + head + rest)
    return total


def _qwen2_vision(config: Mapping[str, Any]) -> int:
    vision = config["vision_config"]
    width = int(vision.get("embed_dim") or 1280)
    inner = int(width * float(vision.get("mlp_ratio") or 4))
    block = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + (2 * width * inner + inner + width)
    out = int(vision.get("hidden_size") or _decoder(config).hidden)
    return _patch(vision, width) + int(vision["depth"]) * block + 2 * width + _merger(vision, width, out)


def _qwen2_5_vision(config: Mapping[str, Any]) -> int:
    vision = config["vision_config"]
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    block = 2 * width + (3 * width * width + 3 * width) + (width * width + width) + (3 * width * inner + 2 * inner + width)
    out = int(vision.get("out_hidden_size") or _decoder(config).hidden)
    return _patch(vision, width) + int(vision["depth"]) * block + width + _merger(vision, width, out)


def _qwen3_vision(config: Mapping[str, Any]) -> int:
    vision = config["vision_config"]
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    block = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + (2 * width * inner + inner + width)
    out = int(vision.get("out_hidden_size") or _decoder(config).hidden)
    merger = _merger(vision, width, out)
    stacked = len(vision.get("deepstack_visual_indexes") or ()) if config["model_type"] == "qwen3_vl" else 0
    joined = width * _merge(vision) ** 2
    places = int(vision["num_position_embeddings"]) * width
    # The deepstack mergers normalise what they have joined, the last merger before it joins.
    return (
        _patch(vision, width)
        + width
        + places
        + int(vision["depth"]) * block
        + 2 * width
        + merger
        + stacked * (2 * joined + merger)
    )


def _patch(vision: Mapping[str, Any], width: int) -> int:
    return _pixels_per_patch(vision) * width


def _pixels_per_patch(vision: Mapping[str, Any]) -> int:
    channels = int(vision.get("in_channels") or vision.get("in_chans") or 3)
    return channels * int(vision.get("temporal_patch_size") or 2) * int(vision.get("patch_size") or 14) ** 2


def _merge(vision: Mapping[str, Any]) -> int:
    return int(vision.get("spatial_merge_size") or 2)


def _merger(vision: Mapping[str, Any], width: int, out: int) -> int:
    joined = width * _merge(vision) ** 2
    return joined * joined + joined + joined * out + out


def _internvl_vision(config: Mapping[str, Any]) -> int:
    vision = config["vision_config"]
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    patch, side = _first(vision["patch_size"]), _first(vision["image_size"])
    bias = 3 * width if vision.get("attention_bias") else 0
    norm = width if vision.get("norm_type") == "rms_norm" else 2 * width
    heads = 2 * width if vision.get("use_qk_norm") else 0
    block = 4 * width * width + width + bias + heads + 2 * norm + (2 * width * inner + inner + width) + 2 * width
    places = ((side // patch) ** 2 + 1) * width if vision.get("use_absolute_position_embeddings", True) else 0
    mask = width if vision.get("use_mask_token") else 0
    last = 0 if vision.get("use_mean_pooling", True) else 2 * width
    tower = width + mask + (3 * patch * patch * width + width) + places + int(vision["num_hidden_layers"]) * block + last
    joined, hidden = round(width / float(config.get("downsample_ratio") or 0.5) ** 2), _decoder(config).hidden
    return tower + 2 * joined + (joined * hidden + hidden) + (hidden * hidden + hidden)


def _smolvlm_vision(config: Mapping[str, Any]) -> int:
    vision = config["vision_config"]
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    patch, side = _first(vision["patch_size"]), _first(vision["image_size"])
    block = 4 * (width * width + width) + 4 * width + (2 * width * inner + inner + width)
    tower = (3 * patch * patch * width + width) + (side // patch) ** 2 * width
    tower += int(vision["num_hidden_layers"]) * block + 2 * width
    return tower + width * int(config.get("scale_factor") or 2) ** 2 * _decoder(config).hidden


def _first(value: Any) -> int:
    """A side that some configs write as a number and some as a pair."""
    return int(value[0] if isinstance(value, list | tuple) else value)


_VISION_PARAMETERS = {
    "qwen2_vl": _qwen2_vision,
    "qwen2_5_vl": _qwen2_5_vision,
    "qwen3_vl": _qwen3_vision,
    "qwen3_5": _qwen3_vision,
    "internvl": _internvl_vision,
    "smolvlm": _smolvlm_vision,
}


def _vision(config: Mapping[str, Any]) -> Vision:
    vision, kind = config["vision_config"], config["model_type"]
    if kind.startswith("qwen"):
        width = int(vision.get("embed_dim") or vision["hidden_size"])
        return Vision(
            hidden=width,
            intermediate=int(vision.get("intermediate_size") or width * float(vision.get("mlp_ratio") or 4)),
            pixels_per_patch=_pixels_per_patch(vision),
            patches_per_token=_merge(vision) ** 2,
            feature_layers=1 + (len(vision.get("deepstack_visual_indexes") or ()) if kind == "qwen3_vl" else 0),
        )
    joined = (
        1 / float(config.get("downsample_ratio") or 0.5) ** 2 if kind == "internvl" else int(config.get("scale_factor") or 2) ** 2
    )
    return Vision(
        hidden=int(vision["hidden_size"]),
        intermediate=int(vision["intermediate_size"]),
        pixels_per_patch=3 * _first(vision["patch_size"]) ** 2,
        patches_per_token=round(joined),
        feature_layers=1,
    )


# ---------------------------------------------------------------- the estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The longest prompt of the data: what decides whether a step fits."""

    tokens: int
    """Image tokens included."""
    image_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Bytes, part by part."""

    lasting: Mapping[str, int]
    """Held through the whole run."""
    phases: Mapping[str, Mapping[str, int]]
    """What comes on top in each phase of a step; phases follow one another, so only the largest counts."""
    batch: str
    """What one forward and backward holds, in words."""

    @property
    def peak_phase(self) -> str:
        """The phase that takes most; its bytes come on top of what lasts."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak: what lasts and the largest phase."""
        return sum(self.lasting.values()) + sum(self.phases[self.peak_phase].values())

    def to_json(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total,
            "peak_phase": self.peak_phase,
            "batch": self.batch,
            "lasting_bytes": dict(self.lasting),
            "phase_bytes": {phase: dict(parts) for phase, parts in self.phases.items()},
        }


def sft_memory(size: ModelSize, config: SftConfig, *, dtype: str, prompts: Prompts, completion: int) -> Estimate:
    """One forward and backward of supervised fine-tuning on rows as long as the longest."""
    rows, length = config.per_device_train_batch_size, prompts.tokens + completion
    # A single row has no padding, and without a mask attention keeps no square.
    squares = rows * length**2 if rows > 1 else 0
    return Estimate(
        lasting=_lasting(size, config, dtype),
        phases={
            "images": _images(size, config, dtype, tokens=rows * prompts.image_tokens),
            **_update(
                size,
                config,
                dtype,
                passes=1,
                tokens=rows * length,
                squares=squares,
                repeated=rows > 1,
                loss=12 * rows * completion * size.decoder.vocab,
                kept=0,
            ),
        },
        batch=f"{rows} row{'s' if rows > 1 else ''} of {prompts.tokens:,} + {completion:,} tokens",
    )


def grpo_memory(size: ModelSize, config: GrpoConfig, *, dtype: str, prompts: Prompts) -> Estimate:
    """One step of GRPO: rollouts of the longest prompt, every completion as long as allowed, then the packed update."""
    d, inner = size.decoder, _inner_bytes(config, dtype)
    groups, completions, room = config.per_device_train_batch_size, config.num_generations, config.max_completion_length
    step_groups = groups * config.gradient_accumulation_steps
    decoded = min(max(1, DECODED_TOGETHER // completions), step_groups)
    # Keys of a long prompt are shared where no other prompt is decoded beside it; else each completion has a copy.
    copies = 0 if decoded == 1 and prompts.tokens >= SHARED_FROM else decoded * completions
    columns = (decoded + copies) * prompts.tokens + decoded * completions * room
    packed, targets = prompts.tokens + completions * room, completions * room * d.vocab
    features = step_groups * prompts.image_tokens * d.hidden * size.vision.feature_layers * inner
    # With a dense mask groups are forwarded one by one; without one, all of a device together.
    masked = config.prefix_attention == "mask"
    passes = groups if masked else 1
    return Estimate(
        lasting={**_lasting(size, config, dtype), "image features": features, "reference": 0},
        phases={
            "images": _images(size, config, dtype, tokens=decoded * prompts.image_tokens),
            "sampling": {
                # Rotary positions leave a key in the precision of the residual stream.
                "key cache": d.full_attention_layers * d.key * (_BYTES[dtype] + inner) * columns,
                "decoding": 32 * decoded * completions * d.vocab,
            },
            **_update(
                size,
                config,
                dtype,
                passes=passes,
                tokens=groups * packed // passes,
                squares=packed**2 if masked else 0,
                repeated=masked,
                loss=(4 * groups + 12 * groups // passes) * targets,
                kept=4 * groups * targets,
            ),
        },
        batch=f"{groups} group{'s' if groups > 1 else ''} of {prompts.tokens:,} + {completions} x {room:,} tokens",
    )


def trainable_parameters(size: ModelSize, config: TrainingConfig) -> int:
    """Parameters of the adapter."""
    return config.lora_r * size.lora_width


def saved_per_token(decoder: Decoder, config: TrainingConfig, dtype: str, *, repeated: bool) -> int:
    """Bytes that one decoder layer saves for the backward of one token, the mask left out.

    The base is frozen, so a linear layer saves its input only for the adapter's first matrix, in the adapter's precision
    (float32, or bfloat16 under autocast). Besides: both norms in float32; queries, keys and values (`repeated` to all heads
    where there is a mask) and the attention's result; the gate, its activation and the other branch of the MLP. A layer of
    linear attention is taken for one of full attention.
    """
    d = decoder
    stream, inner = _BYTES[dtype], _inner_bytes(config, dtype)
    norms = 8 * d.hidden + (4 * (d.query + d.key) if d.normed_heads else 0)
    attention = inner * 2 * (d.query + (d.query if repeated else d.key)) + 4 * d.heads
    mlp = inner * 3 * d.intermediate
    if stream == 4 and not config.bf16:
        # Nothing is cast: layers that share an input share what is saved. Behind a mask the attention's result is saved already.
        inputs = 4 * (2 * d.hidden + d.intermediate + (0 if repeated else d.query))
        ranks = 4 * 7 * config.lora_r
    else:
        width = 2 if config.bf16 else 4
        inputs = width * (5 * d.hidden + d.query + d.intermediate)
        ranks = width * 7 * config.lora_r
    return norms + attention + mlp + inputs + ranks


def _inner_bytes(config: TrainingConfig, dtype: str) -> int:
    """Of what the linear layers give."""
    return 2 if config.bf16 else _BYTES[dtype]


def _lasting(size: ModelSize, config: TrainingConfig, dtype: str) -> dict[str, int]:
    trainable = trainable_parameters(size, config)
    return {
        "weights": size.parameters * _BYTES[dtype],
        "adapter": trainable * _ADAPTER_BYTES,
        "gradients": trainable * _ADAPTER_BYTES,
        "optimiser": trainable * 2 * _ADAPTER_BYTES,
    }


def _update(
    size: ModelSize,
    config: TrainingConfig,
    dtype: str,
    *,
    passes: int,
    tokens: int,
    squares: int,
    repeated: bool,
    loss: int,
    kept: int,
) -> dict[str, dict[str, int]]:
    """The phases of `passes` forward passes and their one backward; `kept` of the logits outlive the loss.

    `tokens` and `squares` (of the masks) are those of one pass.
    """
    d, inner = size.decoder, _inner_bytes(config, dtype)
    layer = {
        "activations": tokens * saved_per_token(d, config, dtype, repeated=repeated),
        "attention masks": squares * inner,
    }
    # Autocast casts the adapter once per step, but a frozen float32 weight at every use; the backward needs both casts.
    casts = {"cast adapter": 2 * trainable_parameters(size, config)} if config.bf16 else {}
    if config.bf16 and _BYTES[dtype] == 4:
        layer["cast weights"] = 2 * d.hidden * (2 * d.query + 2 * d.key + 3 * d.intermediate)
    if not config.gradient_checkpointing:
        return {"update": {**{name: passes * d.layers * part for name, part in layer.items()}, **casts, "logits": loss}}
    held = {"checkpoints": passes * d.layers * tokens * d.hidden * _BYTES[dtype], **casts}
    return {
        "loss": {**held, "logits": loss},
        "backward": {**held, **layer, "layer gradients": 8 * tokens * d.intermediate, "logits": kept},
    }


def _images(size: ModelSize, config: TrainingConfig, dtype: str, *, tokens: int) -> dict[str, int]:
    v, inner = size.vision, _inner_bytes(config, dtype)
    patches = tokens * v.patches_per_token
    return {"pixels": 8 * patches * v.pixels_per_patch, "vision tower": patches * (2 * v.intermediate + 6 * v.hidden) * inner}


def describe(name: str, estimate: Estimate, *, width: int = 118) -> list[str]:
    """An estimate in a few lines: the peak, what lasts, and every phase with its parts; a star marks the peak."""
    lines = [f"{name}: about {readable(estimate.total)} for {estimate.batch}"]
    for phase, parts in {"lasting": estimate.lasting, **estimate.phases}.items():
        mark = "*" if phase == estimate.peak_phase else " "
        shown = [f"{part} {readable(size)}" for part, size in parts.items() if size or part == "reference"]
        head = f"{mark} {phase:<9}{readable(sum(parts.values())):>10}  "
        # A part is not broken over two lines.
        listed = ", ".join(part.replace(" ", "\xa0") for part in shown)
        wrapped = textwrap.wrap(listed, width, initial_indent=head, subsequent_indent=" " * len(head))
        lines += [line.replace("\xa0", " ") for line in wrapped]
    return lines


def readable(size: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def many(count: int) -> str:
    """A count of parameters in words.

    >>> many(8_292_166_656), many(7_124_000), many(41_216)
    ('8.3 billion', '7.1 million', '41,216')
    """
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
