"""Supervised fine-tuning: a LoRA adapter learns whole completions, the prompt is only read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset

from polyground.batches import collate_completions
from polyground.config import SftConfig
from polyground.errors import ConfigError, DataError
from polyground.imagefile import ImageError
from polyground.losses import IGNORED, completion_loss
from polyground.models import Family, Loaded, Prompt
from polyground.records import Message
from polyground.training.processes import IDLE, EvenRows, PortableTrainer, PromptLengths, trains_on_cpu, wrap_decoder_layers
from polyground.training.runs import prepare_model, raising, train, training_arguments

# Shapes: B rows, T tokens of the longest row.


@dataclass(frozen=True, slots=True)
class Lesson:
    """One prompt and the completion to learn."""

    messages: tuple[Message, ...]
    completion: str
    key: str = ""
    """Of its example, for errors."""


class Lessons(Dataset[tuple[Prompt, list[int]] | DataError]):
    """Lessons as tensors, made when asked for: images are read from disk row by row. An error is a value; its batch raises it."""

    def __init__(self, lessons: Sequence[Lesson], loaded: Loaded) -> None:
        self._lessons = lessons
        self._family = loaded.family

    def __len__(self) -> int:
        return len(self._lessons)

    def __getitem__(self, index: int) -> tuple[Prompt, list[int]] | DataError:
        lesson = self._lessons[0 if index == IDLE else index]
        try:
            prompt = self._family.encode(lesson.messages)
            # A process that idles reads a prompt and learns nothing.
            return prompt, [] if index == IDLE else list(self._family.completion_ids(lesson.completion))
        except ImageError as error:
            return DataError(f"{lesson.key}: {error}; then run the same command again, which goes on from its checkpoint")
        except DataError as error:
            return error

    def cost(self) -> Callable[[int], float]:
        """Tokens of a lesson by its number, found when asked for."""
        lengths = PromptLengths(self._family)

        @cache
        def tokens(index: int) -> float:
            lesson = self._lessons[index]
            return lengths(lesson.messages) + len(self._family.completion_ids(lesson.completion))

        return tokens


class SftTrainer(PortableTrainer):
    """transformers' Trainer with the loss on completion tokens, averaged over the whole optimiser batch."""

    def __init__(
        self, model: Any, *, args: Any, family: Family, lessons: Lessons, collate: Callable[..., dict[str, Any] | DataError]
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=lessons, data_collator=collate)
        self._lessons = lessons
        self._family = family
        if self.zero_stage == 3:
            if not isinstance(model, PeftModel):
                raise ConfigError("sft: ZeRO-3 is for an adapter (use_peft: true); to train all weights use FSDP or ZeRO-2")
            # ZeRO-3 puts weights together where a module begins, which processes would do as often as they have images.
            family.set_vision_aside(model)
        # Makes Trainer count the completion tokens of the optimiser batch, which our loss then divides by.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.world_size == 1:
            return super()._get_train_sampler(train_dataset)
        return EvenRows(
            len(self._lessons),
            processes=self.args.world_size,
            batch=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed,
            cost=self._lessons.cost(),
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        return super().get_batch_samples(raising(epoch_iterator), num_batches, device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels_BT = inputs.pop("labels")
        # Logits are needed from the place before the first completion token on; before it stand mostly image tokens.
        labelled = (labels_BT != IGNORED).any(0).nonzero()
        first = int(labelled[0]) - 1 if len(labelled) else labels_BT.shape[1] - 2
        keep = torch.arange(first, labels_BT.shape[1] - 1, device=labels_BT.device)
        # The vision tower is frozen: images are encoded without gradient, by the same call as in sampling and GRPO.
        features = self._family.encode_images_of(model, inputs.pop("prompts"))
        outputs = self._family.forward(model, **inputs, features=features, logits_to_keep=keep, use_cache=False)
        loss = completion_loss(outputs.logits, labels_BT[:, first + 1 :], tokens=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is over all processes, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def train_sft(loaded: Loaded, lessons: Sequence[Lesson], config: SftConfig, *, out: Path, seed: int) -> dict[str, Any]:
    """Train on the lessons and save to `out/adapter`, or the whole model to `out/model`; goes on from the last checkpoint."""
    if not lessons:
        raise DataError(f"{out}: there is nothing to learn from; run synthesize and look at its rejected rows")
    wrap_decoder_layers(loaded.model, loaded.family)
    model = prepare_model(loaded.model, loaded.family, config, seed=seed)
    args = training_arguments(config, out, seed=seed, max_steps=1, use_cpu=trains_on_cpu(loaded))
    args.max_steps = sft_steps(len(lessons), config, processes=args.world_size)
    args.warmup_steps = math.ceil(config.warmup_ratio * args.max_steps)

    def collate(rows: Sequence[tuple[Prompt, Sequence[int]] | DataError]) -> dict[str, Any] | DataError:
        whole = [row for row in rows if not isinstance(row, DataError)]
        if len(whole) < len(rows):
            return next(row for row in rows if isinstance(row, DataError))
        return collate_completions(whole, pad_token_id=loaded.family.pad_token_id)

    trainer = SftTrainer(model, args=args, family=loaded.family, lessons=Lessons(lessons, loaded), collate=collate)
    return {"rows": len(lessons), **train(trainer, out, save_total_limit=config.save_total_limit)}


def sft_steps(rows: int, config: SftConfig, *, processes: int = 1) -> int:
    """Optimiser steps: as the recipe says, or from its epochs."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(math.ceil(rows / config.per_device_train_batch_size) / processes)
    return max(1, math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs))
