"""SmolVLM2: images cut into rows and columns of tiles, each named in the prompt, then the whole image; plain positions.

The family has no form of its own for boxes: it is taught 0-1000.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyground.models.chat import ChatFamily
from polyground.models.family import ImageFeatures


@dataclass(frozen=True, kw_only=True)
class SmolVLMFamily(ChatFamily):
    """The family of one model folder; a pixel budget becomes the length of the longer side."""

    lora_targets = r".*text_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    vision_parts = ("vision_model", "connector")
    decoder = "text_model"

    def _vision(self, pictures: Sequence[Image.Image], options: Mapping[str, Any]) -> dict[str, Tensor]:
        # All tiles are whole: the mask of padded pixels is one everywhere.
        return {"pixel_values": self.image_processor(images=[pictures], **options, return_tensors="pt")["pixel_values"][0]}

    def _features(self, core: Any, vision: Mapping[str, Tensor]) -> ImageFeatures:
        # The architecture takes [prompts, tiles of the longest, …]; its padding is avoided by calling it one prompt.
        output = core.get_image_features(vision["pixel_values"][None], return_dict=True)
        return ImageFeatures(torch.cat(tuple(output.pooler_output)))
