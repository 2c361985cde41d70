"""One process of SFT and GRPO runs over toy data: `one_of_two.py <model folder> <images> <jobs as JSON>`; see test_processes.py.

Under `python -m torch.distributed.run` it is one of several; with FSDP set up in the environment it holds its share of the
weights. A job is `{verb, out, accumulation}`; `start` names the run whose checkpoint of step 2 it goes on from, `url` the server
that samples the policy of GRPO.
"""

import json
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from stand_ins import ask, judge

from polyground.answer import Answer, Located
from polyground.config import GrpoConfig, SftConfig
from polyground.geometry import Box
from polyground.models import Loaded, load_model
from polyground.records import Completion, Example, Message
from polyground.sampling.endpoint import EndpointSampler
from polyground.sampling.local import LocalSampler
from polyground.sampling.policy import PolicySampler, policy_tokens
from polyground.sampling.vllm import Adapters
from polyground.training.grpo import train_grpo
from polyground.training.sft import Lesson, train_sft

COMMON = {
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "lora_r": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": None,
    "report_to": [],
}


def stand_for_devices() -> None:
    """Let accelerate take CPU processes for devices: it offers FSDP on those alone, torch on both."""
    prepare = PartialState.__init__

    def as_devices(self: PartialState, *args: object, **kwargs: object) -> None:
        prepare(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_devices


def begin(out: Path, start: str | None) -> None:
    """Copy what a run had at step 2, by the first process; the others wait."""
    if start is None:
        return
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(start, out, ignore=shutil.ignore_patterns("checkpoint-[!2]*", "adapter", "begun"))
        (out / "begun").touch()
    while not (out / "begun").exists():
        time.sleep(0.01)


class InPieces(PolicySampler):
    """Fails where more of the weights are put together, while the server samples, than what lies outside the decoder's layers."""

    def sample(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        layers = self._loaded.family.language_model(self._loaded.model).layers
        shared_out = [isinstance(parameter, DTensor) for parameter in layers.parameters()]
        assert all(shared_out) == any(shared_out) == ("ACCELERATE_USE_FSDP" in os.environ)
        return super().sample(*args, **kwargs)


def grpo(model: Path, images: list[Path], out: Path, accumulation: int, url: str | None = None) -> None:
    examples = [
        Example(
            key=f"e{count}",
            task="region",
            images=tuple(images[:count]),
            question=f"where? {count}",
            target=Answer((Located(1, Box(0, 0, 0.5, 0.5)),)),
        )
        for count in (1, 2, 3, 4)
    ]
    config = GrpoConfig(
        **COMMON,
        num_generations=3,
        max_completion_length=6,
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        prefix_attention="shared",
        loss_type="dapo",
        beta=0.04,
        **({} if url is None else {"rollout": "endpoint", "num_iterations": 2}),
    )
    with ExitStack() as opened:

        def served(loaded: Loaded) -> PolicySampler:
            policy = InPieces(
                loaded,
                sampler=EndpointSampler(
                    url,
                    "base",
                    cache=out / "answers",
                    convention=loaded.family.convention,
                    tokens=policy_tokens(loaded),
                    retries=0,
                ),
                adapters=Adapters([url], key=None),
                folder=out / "served",
                version="v",
                steps_per_adapter=2,
                rank=int(os.environ.get("RANK", "0")),
            )
            opened.callback(policy.close)
            return policy

        sampler = LocalSampler if url is None else served
        train_grpo(load_model(model), examples, config, sampler=sampler, ask=ask, judge=judge, out=out, seed=3)


def sft(model: Path, images: list[Path], out: Path, accumulation: int) -> None:
    """Two passes over five rows of ragged lengths, one of them without an image: with two processes one idles at their ends."""
    lessons = [
        Lesson((Message("user", (*images[:count], "where?")),), "<answer>" + "[]" * (1 + 3 * count) + "</answer>", f"l{count}")
        for count in (0, 1, 2, 3, 4)
    ]
    config = SftConfig(**COMMON, num_train_epochs=2, gradient_accumulation_steps=accumulation)
    train_sft(load_model(model), lessons, config, out=out, seed=3)


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        stand_for_devices()
    torch.set_num_threads(1)
    found = sorted(Path(sys.argv[2]).glob("*.png"))
    for job in json.loads(sys.argv[3]):
        begin(Path(job["out"]), job.get("start"))
        options = {"url": job["url"]} if "url" in job else {}
        {"sft": sft, "grpo": grpo}[job["verb"]](Path(sys.argv[1]), found, Path(job["out"]), job["accumulation"], **options)
