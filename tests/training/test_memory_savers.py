"""Facts about recomputing activations: the numbers are those of keeping them, in every family and for joined groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import Babbler, ask, every_family, judge

from polyground.config import GrpoConfig
from polyground.models import load_model
from polyground.records import Example
from polyground.storage import read_rows
from polyground.training.grpo import train_grpo


def learn(folder: Path, examples: list[Example], out: Path, *, recompute: bool, attention: str) -> int:
    """Passes through the first layer's first norm, recomputed ones among them."""
    loaded, passes = load_model(folder), []
    first = loaded.family.language_model(loaded.model).layers[0].input_layernorm
    first.register_forward_hook(lambda *_: passes.append(1))
    config = GrpoConfig(
        gradient_checkpointing=recompute,
        prefix_attention=attention,
        num_generations=3,
        max_completion_length=6,
        max_steps=2,
        per_device_train_batch_size=4,
        beta=0.04,
        learning_rate=1e-2,
        lora_r=4,
        logging_steps=1,
        report_to=[],
    )
    train_grpo(loaded, examples, config, sampler=lambda _: Babbler(), ask=ask, judge=judge, out=out, seed=3)
    return len(passes)


@every_family
@pytest.mark.parametrize("attention", ["shared", "mask"])
def test_recomputing_activations_changes_no_number(
    toy_folder: Path, examples: list[Example], tmp_path: Path, attention: str
) -> None:
    passes = {
        recompute: learn(toy_folder, examples, tmp_path / str(recompute), recompute=recompute, attention=attention)
        for recompute in (False, True)
    }
    assert passes[True] > passes[False]
    kept, again = ([row for row in read_rows(tmp_path / str(run) / "log.jsonl") if "grad_norm" in row] for run in (False, True))
    assert len(kept) == 2
    for one, other in zip(kept, again, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-7)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    adapters = [load_file(tmp_path / str(run) / "adapter" / "adapter_model.safetensors") for run in (False, True)]
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-5) for name in adapters[0])
