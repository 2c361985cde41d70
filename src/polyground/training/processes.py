"""What several processes of a training share: like amounts of work in every step, and checkpoints that any number can take up.

How gradients and weights are exchanged is accelerate's business (DDP, FSDP, DeepSpeed), and chosen where processes are launched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler
from transformers import Trainer

from polyground.errors import PolygroundError, StorageError
from polyground.imagefile import image_size
from polyground.models import Family, Loaded
from polyground.models.saving import trained_weights, whole
from polyground.records import Message
from polyground.shards import launched_with, weights_in_pieces
from polyground.tokens import PromptCounter

IDLE = -1
"""Stands where rows run out before each process has as many as the others: nothing is learnt there."""


def balanced(costs: Sequence[float], *, processes: int, batch: int) -> list[int]:
    """The items of one optimiser step in an order that gives each process about the same work.

    Items are dealt out as accelerate deals them: `batch` to each process in turn, again and again. The heaviest is given first,
    to the process with the least so far that still has room; of those of one process the heaviest come first, so that processes
    which wait for each other at every forward (FSDP) meet items of like size. Equal costs keep their order.

    >>> balanced([9, 8, 1, 2], processes=2, batch=2)
    [0, 2, 1, 3]
    """
    each, rest = divmod(len(costs), processes)
    if rest or each % batch:
        raise ValueError(f"{len(costs)} items cannot be dealt out to {processes} processes, {batch} at a time")
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        process = min((p for p in range(processes) if len(shares[p]) < each), key=lambda p: (loads[p], len(shares[p]), p))
        shares[process].append(item)
        loads[process] += costs[item]
    return [item for start in range(0, each, batch) for share in shares for item in share[start : start + batch]]


class PromptLengths:
    """Tokens of prompts, from their text and the headers of their images; what is wrong with one is said where it is read."""

    def __init__(self, family: Family) -> None:
        self._convention = family.convention
        self._counter = PromptCounter(family.convention)

    def __call__(self, messages: Sequence[Message]) -> int:
        try:
            sizes = [image_size(image) for message in messages for image in message.images]
            return self._counter.count(messages, self._convention.canvases(sizes)).total
        except PolygroundError:
            return 0


class EvenRows(Sampler[int]):
    """Rows in the order in which one process takes them, rearranged within each optimiser step so that processes get like work.

    Each pass is filled up with `IDLE` to the same number of whole batches for every process: none waits in vain for another at
    the end of a pass, and no row is learnt twice.
    """

    def __init__(
        self, rows: int, *, processes: int, batch: int, accumulation: int, seed: int, cost: Callable[[int], float]
    ) -> None:
        self._rows, self._processes, self._batch = rows, processes, batch
        self._step, self._seed, self._cost = processes * batch * accumulation, seed, cost
        self._pass = 0

    def __len__(self) -> int:
        whole = self._processes * self._batch
        return -(-self._rows // whole) * whole

    def __iter__(self) -> Iterator[int]:
        # The order accelerate gives one process (`SeedableRandomSampler`).
        generator = torch.Generator().manual_seed(self._seed + self._pass)
        order = [*torch.randperm(self._rows, generator=generator).tolist(), *[IDLE] * (len(self) - self._rows)]
        for start in range(0, len(order), self._step):
            few = order[start : start + self._step]
            costs = [0.0 if row == IDLE else self._cost(row) for row in few]
            yield from (few[i] for i in balanced(costs, processes=self._processes, batch=self._batch))
        self._pass += 1

    def set_epoch(self, epoch: int) -> None:
        self._pass = epoch


class PortableTrainer(Trainer):
    """transformers' Trainer whose checkpoints of an adapter are the same files under FSDP as without it.

    An adapter as safetensors and AdamW's state by position, put together from all processes: what two processes have written, one
    goes on from, and the other way round. With `fsdp_state_dict_type: SHARDED_STATE_DICT`, and where all weights are trained,
    checkpoints are accelerate's own, which FSDP alone reads.
    """

    @property
    def zero_stage(self) -> int:
        """Of DeepSpeed; 0 without it."""
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.is_deepspeed_enabled else 0

    @property
    def _is_portable(self) -> bool:
        if not self.is_fsdp_enabled or not isinstance(self.model, PeftModel):
            return False
        return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._is_portable:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        self._save(output_dir or self.args.output_dir, state_dict=trained_weights(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_portable:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / "adapter_model.safetensors"
        if not file.is_file():
            raise StorageError(
                f"{resume_from_checkpoint}: has no {file.name}; go on with the fsdp_state_dict_type it has, or delete it"
            )
        saved = load_file(file)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                # peft leaves the adapter's own name out of its files.
                found = saved.get(name.replace(".default.", "."))
                if found is None or found.shape != parameter.shape:
                    raise StorageError(f"{file}: does not fit the adapter that is trained ({name}); delete {file.parent}")
                parameter.data.copy_(_like(found, parameter.data))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_portable:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.state_dict()
        values = {i: {name: _whole(value) for name, value in found.items()} for i, found in state["state"].items()}
        if self.args.should_save:
            torch.save({**state, "state": values}, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_portable:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for i, values in saved["state"].items():
            saved["state"][i] = {name: _like(value, parameters[i]) for name, value in values.items()}
        self.optimizer.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def _whole(value: Any) -> Any:
    """A tensor of all processes; a number of steps is left as it is."""
    return whole(value) if isinstance(value, Tensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor laid out as the parameter is; a number of steps is left as it is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def trains_on_cpu(loaded: Loaded) -> bool:
    """Weights that will be shared out wait in host memory, whatever device is to train them."""
    return loaded.device.type == "cpu" and not (weights_in_pieces() and torch.cuda.is_available())


def wrap_decoder_layers(model: Any, family: Family) -> None:
    """Let FSDP share out the weights by decoder layers, unless the launcher names others; the frozen vision tower stays in one.

    transformers would name the tower's blocks as well, which processes would then have to run equally often.
    """
    if launched_with("FSDP"):
        layers = family.language_model(model).layers
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted({type(layer).__name__ for layer in layers})))
