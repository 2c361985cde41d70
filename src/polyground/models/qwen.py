"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images as patches of any shape, and rotary positions in three axes.

The processor is put together from its parts (PIL image processor, tokenizer, chat template), because transformers'
own needs torchvision for videos, which have no place here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from polyground.models.chat import ChatFamily, core_of
from polyground.models.family import ImageFeatures


@dataclass(frozen=True, kw_only=True)
class QwenFamily(ChatFamily):
    """The family of one model folder. Its vision tower includes the merger that projects to the decoder: frozen together."""

    lora_targets = (
        r".*language_model\.layers\.\d+\."
        r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_(qkv|z|a|b)|out_proj)|mlp\.(gate|up|down)_proj)"
    )
    vision_parts = ("visual",)

    def decoder_positions(self, position_ids: Tensor) -> Tensor:
        return position_ids

    def _vision(self, pictures: Sequence[Image.Image], options: Mapping[str, Any]) -> dict[str, Tensor]:
        output = self.image_processor(images=pictures, **options, return_tensors="pt")
        return {name: output[name] for name in ("pixel_values", "image_grid_thw")}

    def _positions(self, ids: Sequence[int], vision: Mapping[str, Tensor]) -> Tensor:
        grids = vision["image_grid_thw"].tolist() if vision else []
        image = self._required(self.convention.marks.image)
        return rotary_positions(ids, grids, image_token_id=image, merge=self.image_processor.merge_size)

    def _features(self, core: Any, vision: Mapping[str, Tensor]) -> ImageFeatures:
        output = core.get_image_features(vision["pixel_values"], vision["image_grid_thw"], return_dict=True)
        deepstack = getattr(output, "deepstack_features", None) or ()
        return ImageFeatures(torch.cat(output.pooler_output), tuple(torch.cat(tuple(layer)) for layer in deepstack))

    def _encoded(self, features: Sequence[ImageFeatures]) -> Any:
        embeds = tuple(f.embeds for f in features)
        if self.config["model_type"] != "qwen3_vl":
            return BaseModelOutputWithPooling(pooler_output=embeds)
        deepstack = [tuple(layer) for layer in zip(*(f.deepstack for f in features), strict=True)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=embeds, deepstack_features=deepstack)


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
    embed = core_of(model).visual.patch_embed
    # A bound method, not a closure: a deep copy of the model must use its own weights.
    embed.forward = MethodType(_project, embed)


def _project(embed: Any, patches: Tensor) -> Tensor:
    weight = embed.proj.weight.flatten(1)
    return nn.functional.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, embed.proj.bias)
