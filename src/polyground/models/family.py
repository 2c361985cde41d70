"""What the rest of the project may ask of a model family: messages to tensors, its box grid, its LoRA targets.

Nothing here knows a concrete architecture; what the families share lives in `chat`, how one does it in its own module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyground.conventions import Convention
from polyground.geometry import Grid
from polyground.records import Message

# Shapes: P prompt tokens, n images of the prompt, patches or tiles before and tokens after the vision tower.


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One conversation as tensors, ready for the model; made once, shared by all completions of it."""

    input_ids: Tensor
    """[P] long, image placeholders expanded to one per image token."""
    position_ids: Tensor
    """[3, P] long: the rotary positions in time, height and width; equal rows where a family has plain positions."""
    next_position: int
    """Position of the first completion token on all three axes: the largest position + 1, which need not be P."""
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    """What the vision tower is given, by argument: Qwen's `pixel_values` [patches, dim] and `image_grid_thw` [n, 3], tiles
    [tiles, 3, height, width] elsewhere. Several prompts are joined along the first axis. Empty without images."""
    image_tokens: int = 0
    """How many of the input ids stand for image features."""

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
    def convention(self) -> Convention:
        """How it resizes images and writes boxes; prompts, grids and pixel budgets all follow it."""
        ...

    @property
    def native(self) -> str | None:
        """Key of `answer.NATIVE_READERS`: how the untrained family writes boxes; None where it has no form."""
        ...

    @property
    def lora_targets(self) -> str:
        """Regular expression, matched in full, of the decoder's linear layers; never the vision tower or its projector."""
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
        """Never sampled: image, video and vision placeholders, turn starts, and embedding rows that have no token."""
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

    def freeze_vision(self, model: nn.Module) -> None:
        """Freeze the vision tower and the projector behind it, so that image features are computed once and kept."""
        ...

    def set_vision_aside(self, model: nn.Module) -> None:
        """Keep the vision tower out of what is shared out and saved: it stays whole, and where it is."""
        ...

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

    def decoder_positions(self, position_ids: Tensor) -> Tensor:
        """Positions on three axes, [3, B, T], as the decoder takes them: all three, or the one of plain positions."""
        ...

    def forward(
        self, model: nn.Module, *, input_ids: Tensor, position_ids: Tensor, features: Sequence[ImageFeatures], **options: Any
    ) -> Any:
        """One pass over [B, T] tokens at [3, B, T] positions with image features computed before."""
        ...

    def gathered(self, model: nn.Module, *, decoder: bool = True) -> AbstractContextManager[None]:
        """Inside, weights that FSDP shares out are whole in every process: its parts may be called in any order and number.

        Without `decoder`, only what lies outside the decoder's layers: enough to encode images, and little to hold.
        """
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
        """Where the weights are; of several devices that of the first parameter."""
        return next(self.model.parameters()).device
