"""What the families share: a chat template, tokens that no text may hold, and image features in the place of pixels.

A family adds how it looks at images, what stands for them in the prompt, and at which positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from polyground.conventions import Convention, without_opened_thought
from polyground.errors import DataError, ModelError
from polyground.geometry import PER_MILLE, Grid
from polyground.models.family import NO_IMAGES, ImageFeatures, Prompt
from polyground.records import Message
from polyground.vision import canvas_of, image_size, load_image

TOKENS_AT_ONCE = 16_384
"""Image tokens that go through the vision tower together; one prompt with more goes alone."""


@dataclass(frozen=True, kw_only=True)
class ChatFamily(ABC):
    """A family of one model folder; see `models.family.Family` for what each member means."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    config: Mapping[str, Any]
    """config.json."""
    convention: Convention

    lora_targets: ClassVar[str]
    vision_parts: ClassVar[tuple[str, ...]]
    """Modules of the model that stay frozen: the vision tower and what projects its output to the decoder."""
    decoder: ClassVar[str] = "language_model"

    def __post_init__(self) -> None:
        image = self._required(self.convention.marks.image)
        told = self.config.get("image_token_id")
        if told not in (None, image):
            raise ModelError(
                f"{self.path}: config.json calls token {told} the image, the tokenizer's {self.convention.marks.image} is "
                f"{image}; copy both from the base model"
            )
        self._required(self.convention.marks.end)

    @abstractmethod
    def _vision(self, pictures: Sequence[Image.Image], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the vision tower is given for the images of one prompt, at least one; `options` of the image processor."""

    @abstractmethod
    def _features(self, core: Any, vision: Mapping[str, Tensor]) -> ImageFeatures:
        """The vision tower's output for the images of any number of prompts; `core` is the `…Model`."""

    # What a folder says -----------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        return self.convention.path

    @property
    def native(self) -> str | None:
        return self.convention.native

    @property
    def end_token_id(self) -> int:
        return self._required(self.convention.marks.end)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The family's end first, then whatever else ends a turn in this folder; each once."""
        others = (self._id("<|endoftext|>"), self._id("<|im_end|>"), self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(i for i in (self.end_token_id, *others) if i is not None))

    @property
    def pad_token_id(self) -> int:
        """The end token, where the tokenizer has none of its own."""
        pad = self.tokenizer.pad_token_id
        return self.end_token_id if pad is None else int(pad)

    @cached_property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Never sampled: image placeholders, turn starts, and rows of the embedding table that have no token; ascending."""
        named = {self._id(token) for token in self.convention.marks.control} - {None, *self.stop_token_ids}
        # Embedding tables are padded to a round size: the surplus rows have no token and cannot be decoded.
        text = self.config.get("text_config", self.config)
        surplus = range(len(self.tokenizer), int(text.get("vocab_size", len(self.tokenizer))))
        return tuple(sorted(i for i in named | set(surplus) if i is not None))

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        unknown = found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token)
        return None if unknown else int(found)

    def _required(self, token: str) -> int:
        found = self._id(token)
        if found is None:
            raise ModelError(f"{self.path}: the tokenizer has no {token}; copy the tokenizer files of the base model here")
        return found

    # Text -------------------------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """Raises ModelError where the chat template writes another number of images than the prompt has."""
        images = [path for message in messages for path in message.images]
        vision, placeholders = self._look(images) if images else ({}, [])
        pieces = self._render(messages).split(self.convention.marks.image)
        if len(pieces) != len(images) + 1:
            raise ModelError(f"{self.path}: the chat template wrote {len(pieces) - 1} images, the prompt has {len(images)}")
        text = pieces[0] + "".join(held + piece for held, piece in zip(placeholders, pieces[1:], strict=True))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        positions = self._positions(ids, vision)
        return Prompt(
            input_ids=torch.tensor(ids),
            position_ids=positions,
            next_position=int(positions.max()) + 1,
            vision=vision,
            image_tokens=ids.count(self._required(self.convention.marks.image)),
        )

    def completion_ids(self, text: str) -> list[int]:
        """What the model is to write, with the end token behind it."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text with its special tokens, but for the one that ended it."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Message]) -> str:
        rows = []
        for message in messages:
            for part in message.parts:
                if isinstance(part, str) and (found := self.convention.marks.in_text(part)):
                    raise DataError(f"the prompt text holds {found}, which would break the prompt; remove it: {part[:80]!r}")
            parts = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part} for part in message.parts]
            rows.append({"role": message.role, "content": parts})
        return without_opened_thought(str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)))

    # Images -----------------------------------------------------------------------------------------------------------

    def grids(self, images: Sequence[Path]) -> list[Grid]:
        """One per image, as it is resized in a prompt of so many; image files are opened only where pixels count."""
        if self.convention.per_mille:
            return [PER_MILLE] * len(images)
        count = len(images)
        return [canvas_of(path, image_size(path), self.convention, images=count).grid for path in images]

    def _look(self, images: Sequence[Path]) -> tuple[dict[str, Tensor], list[str]]:
        """The images of one prompt as tensors, and what stands for each in its text."""
        count = len(images)
        pictures = [load_image(path) for path in images]
        canvases = [
            canvas_of(path, picture.size, self.convention, images=count) for path, picture in zip(images, pictures, strict=True)
        ]
        options = self.convention.layout.processor_options(self.convention.pixel_budget(count))
        return self._vision(pictures, options), [self.convention.marks.placeholder(canvas) for canvas in canvases]

    def _positions(self, ids: Sequence[int], vision: Mapping[str, Tensor]) -> Tensor:
        """[3, P]: plain ones, the same on all axes."""
        return torch.arange(len(ids)).expand(3, -1)

    # Weights ----------------------------------------------------------------------------------------------------------

    def freeze_vision(self, model: nn.Module) -> None:
        for name in self.vision_parts:
            getattr(core_of(model), name).requires_grad_(False)

    def set_vision_aside(self, model: nn.Module) -> None:
        core = core_of(model)
        for name in self.vision_parts:
            # An attribute like any other, which nobody who goes through the modules finds.
            core.__dict__[name] = core._modules.pop(name)

    def encode_images(self, model: nn.Module, prompt: Prompt) -> ImageFeatures:
        return self.encode_images_of(model, [prompt])[0]

    def encode_images_of(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[ImageFeatures]:
        """As many prompts at a time as fit together; the features of each stand in the order of its images."""
        with self.gathered(model, decoder=False):
            return [features for few in _few(prompts) for features in self._encode_together(core_of(model), few)]

    @torch.no_grad()
    def _encode_together(self, core: Any, prompts: Sequence[Prompt]) -> list[ImageFeatures]:
        seen = [prompt.vision for prompt in prompts if prompt.vision]
        if not seen:
            return [NO_IMAGES for _ in prompts]
        device = next(core.parameters()).device
        together = self._features(core, {name: torch.cat([vision[name] for vision in seen]).to(device) for name in seen[0]})
        sizes = [prompt.image_tokens for prompt in prompts]
        layers = [layer.split(sizes) for layer in together.deepstack]
        return [
            ImageFeatures(rows, tuple(layer[i] for layer in layers)) if sizes[i] else NO_IMAGES
            for i, rows in enumerate(together.embeds.split(sizes))
        ]

    def image_inputs(self, features: Sequence[ImageFeatures]) -> dict[str, Any]:
        """What the model's forward takes in place of pixels; nothing where no prompt has an image."""
        seen = [f for f in features if len(f)]
        return {"mm_encoder_outputs": {"image": self._encoded(seen)}} if seen else {}

    def _encoded(self, features: Sequence[ImageFeatures]) -> Any:
        """What `get_image_features` of the architecture would have returned for these rows."""
        return BaseModelOutputWithPooling(pooler_output=torch.cat([f.embeds for f in features]))

    def decoder_positions(self, position_ids: Tensor) -> Tensor:
        return position_ids[0]

    def forward(
        self, model: nn.Module, *, input_ids: Tensor, position_ids: Tensor, features: Sequence[ImageFeatures], **options: Any
    ) -> Any:
        """The model's own forward, with features computed ahead; `options` are the model's."""
        positions = self.decoder_positions(position_ids)
        return model(input_ids=input_ids, position_ids=positions, **self.image_inputs(features), **options)

    @contextmanager
    def gathered(self, model: nn.Module, *, decoder: bool = True) -> Iterator[None]:
        if not isinstance(model, FSDPModule) or model in _GATHERED:
            yield
            return
        parts = self._shared_out(model) if decoder else [model]
        for part in parts:
            part.unshard()
        if decoder:
            model.set_reshard_after_forward(False)
        _GATHERED.add(model)
        try:
            yield
        finally:
            _GATHERED.discard(model)
            if decoder:
                # As FSDP itself begins: what lies outside the layers is kept until the backward.
                model.set_reshard_after_forward(True)
                model.set_reshard_after_forward(False, recurse=False)
            for part in parts:
                part.reshard()

    def _shared_out(self, model: nn.Module) -> list[FSDPModule]:
        """The parts FSDP puts together one by one; what it takes for the whole model is decided by the first forward."""
        device = next(model.parameters()).device
        ids, positions = (torch.zeros(size, dtype=torch.long, device=device) for size in ((1, 1), (3, 1, 1)))
        with torch.no_grad():
            self.forward(model, input_ids=ids, position_ids=positions, features=[], use_cache=False)
        return [part for part in model.modules() if isinstance(part, FSDPModule)]

    def language_model(self, model: nn.Module) -> nn.Module:
        return getattr(core_of(model), self.decoder)

    def embedding(self, model: nn.Module) -> nn.Module:
        return core_of(model).get_input_embeddings()

    def lm_head(self, model: nn.Module) -> nn.Module:
        return unwrapped(model).lm_head


_GATHERED: WeakSet[nn.Module] = WeakSet()
"""Models whose weights, shared out by FSDP, are put together at the moment; see `ChatFamily.gathered`."""


def _few(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """The prompts in order, as many together as keep the vision tower's memory within bounds."""
    few: list[Prompt] = []
    for prompt in prompts:
        if few and sum(p.image_tokens for p in few) + prompt.image_tokens > TOKENS_AT_ONCE:
            yield few
            few = []
        few.append(prompt)
    if few:
        yield few


def unwrapped(model: nn.Module) -> Any:
    """The `…ForConditionalGeneration` behind DDP and peft wrappers."""
    inner: Any = model
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def core_of(model: nn.Module) -> Any:
    """The `…Model` that holds the vision tower and the decoder."""
    return unwrapped(model).model
