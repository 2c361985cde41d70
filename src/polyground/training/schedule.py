"""Which question GRPO asks when: fixed by the seed for a whole run, dealt out to its processes, and read ahead of its step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from polyground.config import GrpoConfig
from polyground.errors import ConfigError, PolygroundError
from polyground.models import Family
from polyground.records import Example
from polyground.rollout import Ask
from polyground.training.processes import PromptLengths, balanced
from polyground.training.remembering import Ready, Remembering


class Schedule(Dataset[Example]):
    """Which example stands at which place of the whole run; depends on the seed alone, so that a resumed run goes on in it.

    Examples are shuffled anew for each pass. With several iterations a step's examples come again in the steps after it. `deal`
    rearranges those of one step, told by their numbers, for several processes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        steps: int,
        per_step: int,
        num_iterations: int,
        seed: int,
        deal: Callable[[Sequence[int]], list[int]] | None = None,
    ) -> None:
        self._examples = examples
        self._steps, self._per_step, self._num_iterations, self._seed = steps, per_step, num_iterations, seed
        self._deal = deal
        self._orders: dict[int, list[int]] = {}
        self._dealt: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._steps * self._per_step

    def __getitem__(self, index: int) -> Example:
        return self._examples[self.number(index)]

    @property
    def examples(self) -> int:
        """Questions of one pass."""
        return len(self._examples)

    def number(self, index: int) -> int:
        """The example's place among the examples."""
        return self._number(index // self._per_step // self._num_iterations, self.place(index))

    def place(self, index: int) -> int:
        """Its place in the step before the step was rearranged."""
        step, place = divmod(index, self._per_step)
        if self._deal is None:
            return place
        turn = step // self._num_iterations
        if self._dealt[0] != turn:
            self._dealt = turn, self._deal([self._number(turn, i) for i in range(self._per_step)])
        return self._dealt[1][place]

    def _number(self, turn: int, place: int) -> int:
        lap, position = divmod(turn * self._per_step + place, len(self._examples))
        return self._order(lap)[position]

    def is_repeated(self, index: int) -> bool:
        """Whether the step goes on with the rollouts of the one before."""
        return index // self._per_step % self._num_iterations > 0

    def _order(self, lap: int) -> list[int]:
        if lap not in self._orders:
            order = list(range(len(self._examples)))
            random.Random(f"{self._seed}/{lap}").shuffle(order)
            self._orders[lap] = order
        return self._orders[lap]


class Prepared(Dataset[Ready]):
    """The schedule, each example with its prompt encoded where worker processes run ahead of the step."""

    def __init__(self, schedule: Schedule, family: Remembering, ask: Ask, *, ahead: bool, cached: bool) -> None:
        self._schedule, self._family, self._ask, self._ahead = schedule, family, ask, ahead
        self._cached: Tensor | None = None
        if cached and ahead:
            # Shared with the workers: 1 for each example whose features the training process has.
            self._cached = torch.zeros(schedule.examples, dtype=torch.uint8).share_memory_()
        self._identities: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, index: int) -> Ready:
        example, number, place = self._schedule[index], self._schedule.number(index), self._schedule.place(index)
        if not self._ahead or self._schedule.is_repeated(index):
            return Ready(example=example, number=number, place=place)
        held = self._cached is not None and bool(self._cached[number])
        return self._family.prepare(example, self._ask, number=number, held=held, place=place)

    def tell(self, seen: Sequence[Ready]) -> None:
        """Let the workers know what the cache holds after a step."""
        if self._cached is None:
            return
        self._identities |= {ready.number: ready.identity for ready in seen if ready.identity is not None}
        for number, identity in self._identities.items():
            self._cached[number] = self._family.holds(identity)


def dealing(examples: Sequence[Example], family: Family, ask: Ask, args: Any) -> Callable[[Sequence[int]], list[int]] | None:
    """Deals the groups of a step out to the processes so that each has about as many prompt tokens; None for one process.

    How long completions become is not known before they are sampled, and each process samples its own.
    """
    if args.world_size == 1:
        return None
    lengths = PromptLengths(family)

    @cache
    def tokens(number: int) -> int:
        try:
            messages, _ = ask(examples[number])
        except PolygroundError:
            return 0  # said where it is put to the policy
        return lengths(messages)

    def deal(numbers: Sequence[int]) -> list[int]:
        costs = [tokens(number) for number in numbers]
        return balanced(costs, processes=args.world_size, batch=args.per_device_train_batch_size)

    return deal


def schedule_of(
    examples: Sequence[Example], config: GrpoConfig, args: Any, *, seed: int, deal: Callable[[Sequence[int]], list[int]] | None
) -> Schedule:
    """The schedule of a whole run. Raises ConfigError for one whose checkpoints could not be resumed exactly."""
    if args.save_steps % config.num_iterations:
        raise ConfigError(
            f"grpo.save_steps {args.save_steps} must be a multiple of num_iterations {config.num_iterations}: "
            "a checkpoint inside a set of rollouts could not be resumed exactly"
        )
    return Schedule(
        examples,
        steps=args.max_steps,
        per_step=groups_per_step(args),
        num_iterations=config.num_iterations,
        seed=seed,
        deal=deal,
    )


def groups_per_step(args: Any) -> int:
    """Groups of an optimiser step, over all processes."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def grpo_steps(examples: int, config: GrpoConfig, *, per_step: int) -> int:
    """Optimiser steps: as the recipe says, or one pass over the examples."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(examples / per_step) * config.num_iterations)
