"""InternVL3 and 3.5 in transformers' format: images cut into square tiles with a thumbnail beside them, plain positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from polyground.models.chat import ChatFamily
from polyground.models.family import ImageFeatures


@dataclass(frozen=True, kw_only=True)
class InternVLFamily(ChatFamily):
    """The family of one model folder; a pixel budget becomes a number of tiles."""

    lora_targets = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    vision_parts = ("vision_tower", "multi_modal_projector")

    def _vision(self, pictures: Sequence[Image.Image], options: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"pixel_values": self.image_processor(images=pictures, **options, return_tensors="pt")["pixel_values"]}

    def _features(self, core: Any, vision: Mapping[str, Tensor]) -> ImageFeatures:
        output = core.get_image_features(vision["pixel_values"], return_dict=True)
        return ImageFeatures(output.pooler_output.flatten(0, 1))
