"""One process of a GRPO run over toy groups: `one_of_two.py <model folder> <images> <out> <accumulation>`; see test_processes.py.

Under `python -m torch.distributed.run` it is one of several; with FSDP set up in the environment it holds its share of the
weights.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from stand_ins import ask, judge

from polyground.answer import Answer, Located
from polyground.config import GrpoConfig
from polyground.geometry import Box
from polyground.models import load_model
from polyground.records import Example
from polyground.sampling.local import LocalSampler
from polyground.training.grpo import train_grpo


def stand_for_devices() -> None:
    """Let accelerate take CPU processes for devices: it offers FSDP on those alone, torch on both."""
    prepare = PartialState.__init__

    def as_devices(self: PartialState, *args: object, **kwargs: object) -> None:
        prepare(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_devices


def main(model: Path, images: Path, out: Path, accumulation: int) -> None:
    torch.set_num_threads(1)
    found = sorted(images.glob("*.png"))
    examples = [
        Example(
            key=f"e{count}",
            task="region",
            images=tuple(found[:count]),
            question=f"where? {count}",
            target=Answer((Located(1, Box(0, 0, 0.5, 0.5)),)),
        )
        for count in (1, 2, 3, 4)
    ]
    config = GrpoConfig(
        num_generations=3,
        max_completion_length=6,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        prefix_attention="shared",
        loss_type="dapo",
        beta=0.04,
        learning_rate=1e-2,
        warmup_ratio=0.0,
        lora_r=4,
        logging_steps=1,
        save_steps=2,
        report_to=[],
    )
    train_grpo(load_model(model), examples, config, sampler=LocalSampler, ask=ask, judge=judge, out=out, seed=3)


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        stand_for_devices()
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
