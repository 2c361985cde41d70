"""Qwen2.5-VL, Qwen3-VL and Qwen3.5: prompts, rotary positions, grids and image features. No weights are loaded here.

The processor is put together from its parts (PIL image processor, tokenizer, chat template), because transformers'
own needs torchvision for videos, which have no place here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, Grid
from polyground.models.family import NO_IMAGES, ImageFeatures, Prompt
from polyground.records import Message
from polyground.vision import image_size, load_image

IMAGE, VIDEO, VISION_START, VISION_END, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"

_CONTROL = (IMAGE, VIDEO, VISION_START, VISION_END, "<|im_start|>", END)

# Templates of thinking models (Qwen3.5) begin the completion with a thought, opened or empty. In the trained contract
# that is the completion's own part: left in the prompt, a thought would be opened twice and none be rewarded for its form.
_OPENED_THOUGHT = re.compile(r"(?<=<\|im_start\|>assistant\n)<think>\s*(</think>\s*)?\Z")


@dataclass(frozen=True, kw_only=True)
class QwenFamily:
    """The family of one model folder; see `models.family.Family` for what each member means."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    config: Mapping[str, Any]
    """config.json."""
    path: Path
    max_pixels: int | None = None
    """Pixels one image may have after resizing; None leaves the folder's own limit."""
    max_pixels_total: int | None = None
    """Pixels that the images of one prompt share equally."""
    per_mille: bool
    """Boxes are written 0-1000 (Qwen3-VL, Qwen3.5); otherwise in pixels of the resized image (Qwen2.5-VL)."""

    native = "qwen_json"
    lora_targets = (
        r".*language_model\.layers\.\d+\."
        r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_(qkv|z|a|b)|out_proj)|mlp\.(gate|up|down)_proj)"
    )

    def __post_init__(self) -> None:
        for name, value in (("max_pixels", self.max_pixels), ("max_pixels_total", self.max_pixels_total)):
            if value is not None and value < self.factor**2:
                side = self.factor
                raise ModelError(f"{self.path}: {name} {value} is less than one image token ({side} x {side} pixels); raise it")
        for token in (IMAGE, VISION_START, VISION_END, END):
            self._required(token)

    @property
    def factor(self) -> int:
        """Side of one image token in pixels: resized images are multiples of it."""
        return self.image_processor.patch_size * self.image_processor.merge_size

    @property
    def end_token_id(self) -> int:
        return self._required(END)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        others = (self._id("<|endoftext|>"), self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(i for i in (self.end_token_id, *others) if i is not None))

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end_token_id if pad is None else int(pad)

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        named = [self._id(token) for token in (IMAGE, VIDEO, VISION_START, VISION_END, "<|vision_pad|>", "<|im_start|>")]
        # Embedding tables are padded to a round size: the surplus rows have no token and cannot be decoded.
        text = self.config.get("text_config", self.config)
        surplus = range(len(self.tokenizer), int(text.get("vocab_size", len(self.tokenizer))))
        return tuple(sorted({i for i in named if i is not None} | set(surplus)))

    def encode(self, messages: Sequence[Message]) -> Prompt:
        text = self._render(messages)
        images = [path for message in messages for path in message.images]
        if not images:
            return self._prompt(text, None, None)
        return self._prompt(text, *self._pixels(images))

    def grids(self, images: Sequence[Path]) -> list[Grid]:
        if self.per_mille:
            return [PER_MILLE] * len(images)
        least, most = self._pixel_limits(len(images))
        grids = []
        for path in images:
            width, height = image_size(path)
            height, width = self._resized(path, width=width, height=height, least=least, most=most)
            grids.append(Grid(width=width, height=height))
        return grids

    def completion_ids(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def freeze_vision(self, model: nn.Module) -> None:
        _core(model).visual.requires_grad_(False)

    def encode_images(self, model: nn.Module, prompt: Prompt) -> ImageFeatures:
        return self.encode_images_of(model, [prompt])[0]

    @torch.no_grad()
    def encode_images_of(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[ImageFeatures]:
        seen = [p for p in prompts if p.image_grid_thw is not None]
        if not seen:
            return [NO_IMAGES for _ in prompts]
        core = _core(model)
        device = next(core.parameters()).device
        pixels = torch.cat([torch.as_tensor(p.pixel_values) for p in seen]).to(device)
        grid = torch.cat([torch.as_tensor(p.image_grid_thw) for p in seen]).to(device)
        output = core.get_image_features(pixels, grid, return_dict=True)
        embeds = torch.cat(output.pooler_output)
        deepstack = [torch.cat(layer) for layer in getattr(output, "deepstack_features", None) or ()]
        sizes = [self._image_tokens(p.image_grid_thw) for p in prompts]
        layers = [layer.split(sizes) for layer in deepstack]
        return [
            ImageFeatures(rows, tuple(layer[i] for layer in layers)) if sizes[i] else NO_IMAGES
            for i, rows in enumerate(embeds.split(sizes))
        ]

    def image_inputs(self, features: Sequence[ImageFeatures]) -> dict[str, Any]:
        seen = [f for f in features if len(f)]
        if not seen:
            return {}
        embeds = tuple(f.embeds for f in seen)
        deepstack = [tuple(layer) for layer in zip(*(f.deepstack for f in seen), strict=True)]
        if self.config["model_type"] == "qwen3_vl":
            output = BaseModelOutputWithDeepstackFeatures(pooler_output=embeds, deepstack_features=deepstack)
        else:
            output = BaseModelOutputWithPooling(pooler_output=embeds)
        return {"mm_encoder_outputs": {"image": output}}

    def forward(
        self, model: nn.Module, *, input_ids: Tensor, position_ids: Tensor, features: Sequence[ImageFeatures], **options: Any
    ) -> Any:
        return model(input_ids=input_ids, position_ids=position_ids, **self.image_inputs(features), **options)

    def language_model(self, model: nn.Module) -> nn.Module:
        return _core(model).language_model

    def embedding(self, model: nn.Module) -> nn.Module:
        return _core(model).get_input_embeddings()

    def lm_head(self, model: nn.Module) -> nn.Module:
        return _unwrapped(model).lm_head

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found is None or found == self.tokenizer.unk_token_id else int(found)

    def _required(self, token: str) -> int:
        found = self._id(token)
        if found is None:
            raise ModelError(f"{self.path}: the tokenizer has no {token}; copy the tokenizer files of the base model here")
        return found

    def _render(self, messages: Sequence[Message]) -> str:
        rows = []
        for message in messages:
            for part in message.parts:
                if isinstance(part, str) and (found := next((token for token in _CONTROL if token in part), None)):
                    raise DataError(f"the prompt text holds {found}, which would break the prompt; remove it: {part[:80]!r}")
            parts = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part} for part in message.parts]
            rows.append({"role": message.role, "content": parts})
        text = str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True))
        return _OPENED_THOUGHT.sub("", text)

    def _pixel_limits(self, count: int) -> tuple[int, int]:
        size = self.image_processor.size
        least, most = int(size["shortest_edge"]), int(size["longest_edge"])
        if self.max_pixels is not None:
            most = self.max_pixels
        if self.max_pixels_total is not None and count:
            most = min(most, self.max_pixels_total // count)
        most = max(most, self.factor**2)
        return min(least, most), most

    def _resized(self, path: Path, *, width: int, height: int, least: int, most: int) -> tuple[int, int]:
        try:
            return smart_resize(height, width, self.factor, min_pixels=least, max_pixels=most)
        except ValueError as error:
            raise DataError(f"{path}: {width} x {height} pixels is too thin for this model ({error}); crop it") from error

    def _pixels(self, images: Sequence[Path]) -> tuple[Tensor, Tensor]:
        least, most = self._pixel_limits(len(images))
        pictures = []
        for path in images:
            picture = load_image(path)
            self._resized(path, width=picture.width, height=picture.height, least=least, most=most)
            pictures.append(picture)
        size = {"shortest_edge": least, "longest_edge": most}
        output = self.image_processor(images=pictures, size=size, return_tensors="pt")
        return output["pixel_values"], output["image_grid_thw"]

    def _image_tokens(self, image_grid_thw: Tensor | None) -> int:
        if image_grid_thw is None:
            return 0
        return int(image_grid_thw.prod(-1).sum()) // self.image_processor.merge_size**2

    def _prompt(self, text: str, pixel_values: Tensor | None, image_grid_thw: Tensor | None) -> Prompt:
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        pieces = text.split(IMAGE)
        if len(pieces) != len(grids) + 1:
            raise ModelError(f"{self.path}: the chat template wrote {len(pieces) - 1} images, the prompt has {len(grids)}")
        merge = self.image_processor.merge_size
        text = pieces[0]
        for (t, h, w), piece in zip(grids, pieces[1:], strict=True):
            text += IMAGE * (t * h * w // merge**2) + piece
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        positions = rotary_positions(ids, grids, image_token_id=self._required(IMAGE), merge=merge)
        return Prompt(torch.tensor(ids), pixel_values, image_grid_thw, positions, int(positions.max()) + 1)


def rotary_positions(ids: Sequence[int], grids: Sequence[Sequence[int]], *, image_token_id: int, merge: int) -> Tensor:
    """[3, P] M-RoPE positions of text and still images, as transformers' `get_rope_index` computes them.

    An image's tokens share one time; their height and width count from it, and text goes on after the longer side.
    Adjacent images are told apart by their grids, not by the tokens between them.
    """
    remaining = iter(grids)
    parts, start = [], 0
    for is_image, run in groupby(ids, key=lambda i: i == image_token_id):
        length = len(list(run))
        if not is_image:
            parts.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        while length > 0:
            t, h, w = next(remaining)
            h, w = h // merge, w // merge
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + start)
            start += max(h, w)
            length -= t * h * w
    return torch.cat(parts, dim=1)


def patchify_as_product(model: nn.Module) -> None:
    """Make the vision tower's patch embedding a matrix product: the same numbers as its convolution, several times faster."""
    embed = _core(model).visual.patch_embed
    # A bound method, not a closure: a deep copy of the model must use its own weights.
    embed.forward = MethodType(_project, embed)


def _project(embed: Any, patches: Tensor) -> Tensor:
    weight = embed.proj.weight.flatten(1)
    return nn.functional.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, embed.proj.bias)


def _unwrapped(model: nn.Module) -> Any:
    """The `…ForConditionalGeneration` behind DDP and peft wrappers."""
    inner: Any = model
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _core(model: nn.Module) -> Any:
    """The `…Model` that holds the vision tower (`visual`) and the `language_model`."""
    return _unwrapped(model).model
