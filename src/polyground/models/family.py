"""What the rest of the project may ask of a model family: messages to tensors, its box grid, its LoRA targets.

Nothing here knows a concrete architecture; how a family does it lives in its own module (`qwen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyground.geometry import Grid
from polyground.records import Message

# Shapes: P prompt tokens, n images of the prompt, patches before and tokens after the vision tower's merging.


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One conversation as tensors, ready for the model; made once, shared by all completions of it."""

    input_ids: Tensor
    """[P] long, image placeholders expanded to one per image token."""
    pixel_values: Tensor | None
    """[patches, dim] float; None without images."""
    image_grid_thw: Tensor | None
    """[n, 3] long, in patches; None without images."""
    position_ids: Tensor
    """[3, P] long: the rotary positions in time, height and width."""
    next_position: int
    """Position of the first completion token on all three axes: the largest position + 1, which is not P."""

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """What the vision tower makes of one prompt's images; it carries no gradient."""

    embeds: Tensor
    """[tokens, hidden], all images in order; [0, 0] without images."""
    deepstack: tuple[Tensor, ...] = ()
    """One [tokens, hidden] per language-model layer that is fed image features besides the first; often none."""

    def __len__(self) -> int:
        return int(self.embeds.shape[0])


NO_IMAGES = ImageFeatures(torch.zeros(0, 0))
"""The features of a prompt without images."""


class Family(Protocol):
    """One model family's way of doing things; the weights are passed in, so that a wrapped model works as well."""

    @property
    def native(self) -> str:
        """Key of `answer.NATIVE_READERS`: how the untrained family writes boxes."""
        ...

    @property
    def lora_targets(self) -> str:
        """Regular expression, matched in full, of the language model's linear layers; never the vision tower."""
        ...

    @property
    def end_token_id(self) -> int:
        """Ends a turn; the last token of `completion_ids`."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a completion."""
        ...

    @property
    def pad_token_id(self) -> int: ...

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Never sampled: image, video and vision placeholders, and embedding rows that have no token."""
        ...

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """The conversation up to where the completion starts."""
        ...

    def grids(self, images: Sequence[Path]) -> list[Grid]:
        """How boxes of each image are written when these images make one prompt."""
        ...

    def completion_ids(self, text: str) -> list[int]:
        """The tokens of a whole completion, the end token included."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without what ended it."""
        ...

    def freeze_vision(self, model: nn.Module) -> None: ...

    def encode_images(self, model: nn.Module, prompt: Prompt) -> ImageFeatures:
        """The vision tower's output for one prompt, without gradient."""
        ...

    def encode_images_of(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[ImageFeatures]:
        """The same for several prompts in one pass of the tower."""
        ...

    def image_inputs(self, features: Sequence[ImageFeatures]) -> dict[str, Any]:
        """Keyword arguments of one forward pass that stand in for pixels; fresh ones are needed for every pass.

        `features` has one entry per row, in row order; empty when no row has images.
        """
        ...

    def forward(
        self, model: nn.Module, *, input_ids: Tensor, position_ids: Tensor, features: Sequence[ImageFeatures], **options: Any
    ) -> Any:
        """One pass over [B, T] tokens at [3, B, T] positions with image features computed before."""
        ...

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder behind any wrapper: takes `inputs_embeds`, returns hidden states."""
        ...

    def embedding(self, model: nn.Module) -> nn.Module: ...

    def lm_head(self, model: nn.Module) -> nn.Module: ...


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model folder in memory."""

    model: Any
    """A transformers model, or the peft model around it when an adapter was loaded."""
    family: Family
    path: Path
    config: Mapping[str, Any]
    """config.json as read."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
