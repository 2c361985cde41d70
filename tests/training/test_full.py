"""Facts about training the language model's own weights instead of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_ins import Babbler, ask, judge

from polyground.config import GrpoConfig, SftConfig
from polyground.models import Loaded, load_model
from polyground.models.chat import core_of
from polyground.records import Example
from polyground.stages.merge import copy_model
from polyground.storage import read_rows
from polyground.training.grpo import train_grpo
from polyground.training.sft import Lesson, train_sft

QUIET = {"use_peft": False, "logging_steps": 1, "report_to": [], "learning_rate": 1e-3, "warmup_ratio": 0.0, "save_steps": 2}
SMALL = {"num_generations": 3, "max_completion_length": 6, "max_steps": 3, "per_device_train_batch_size": 2}


def learn(folder: Path, examples: list[Example], out: Path, **changes) -> Loaded:
    loaded, config = load_model(folder), GrpoConfig(**{**SMALL, **QUIET, **changes})
    train_grpo(loaded, examples, config, sampler=lambda _: Babbler(), ask=ask, judge=judge, out=out, seed=3)
    return loaded


def moved(loaded: Loaded, folder: Path) -> dict[str, bool]:
    """Whether each weight differs from the folder's."""
    before = load_model(folder).model.state_dict()
    return {name: not torch.equal(weight, before[name]) for name, weight in loaded.model.state_dict().items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_all_of_the_language_model_moves_and_nothing_of_the_vision_tower(
    toy_folder: Path, examples: list[Example], tmp_path: Path, recompute: bool
) -> None:
    changed = moved(learn(toy_folder, examples, tmp_path, gradient_checkpointing=recompute, beta=0.0), toy_folder)
    assert all(is_moved != name.startswith("model.visual") for name, is_moved in changed.items())


def test_the_reference_is_the_policy_as_it_was(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    learn(toy_folder, examples, tmp_path, beta=0.04)
    kl = [row["kl"] for row in read_rows(tmp_path / "log.jsonl") if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert min(kl[1:]) > 1e-3


def test_a_resumed_run_ends_with_the_same_weights_and_reference(
    toy_folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    options = {"lr_scheduler_type": "constant", "beta": 0.04}
    whole = learn(toy_folder, examples, tmp_path / "whole", **options)
    learn(toy_folder, examples, tmp_path / "halves", max_steps=2, **options)
    halves = learn(toy_folder, examples, tmp_path / "halves", **options)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(halves.model.state_dict()[name], weight), name


def test_what_was_learnt_becomes_a_model_folder(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    loaded = load_model(toy_folder)
    lessons = [Lesson(tuple(ask(example)[0]), f"<think>{example.key}</think>") for example in examples]
    train_sft(loaded, lessons, SftConfig(**{**QUIET, "max_steps": 2}), out=tmp_path / "sft", seed=0)
    copy_model(toy_folder, tmp_path / "sft" / "model", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert all(torch.equal(weight, loaded.model.state_dict()[name]) for name, weight in merged.model.state_dict().items())
    assert core_of(merged.model) is not core_of(loaded.model)
    copy_model(toy_folder, tmp_path / "sft" / "model", tmp_path / "merged")
