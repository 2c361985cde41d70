"""Facts about supervised fine-tuning."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import ask, every_family, families

from polyground.batches import collate_completions
from polyground.config import SftConfig
from polyground.losses import completion_loss
from polyground.models import load_model
from polyground.records import Example
from polyground.storage import read_rows
from polyground.training.sft import Lesson, sft_steps, train_sft
from toys import plain_inputs


def config(**changes) -> SftConfig:
    quiet = {"logging_steps": 1, "report_to": [], "lora_r": 4, "lora_alpha": 8, "learning_rate": 2e-2, "warmup_ratio": 0.0}
    return SftConfig(**{"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 3, **quiet, **changes})


def lessons(examples: list[Example]) -> list[Lesson]:
    return [Lesson(tuple(ask(example)[0]), f"<think>{example.key}</think><answer>[]</answer>") for example in examples]


def learn(folder: Path, examples: list[Example], out: Path, **changes) -> dict:
    return train_sft(load_model(folder), lessons(examples), config(**changes), out=out, seed=1)


@families
def test_the_loss_falls_and_the_adapter_is_saved(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    summary = learn(toy_folder, examples, tmp_path, max_steps=12)
    losses = [row["loss"] for row in read_rows(tmp_path / "log.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert summary["rows"] == 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not any("visual" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_a_resumed_run_ends_with_the_same_weights(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    learn(toy_folder, examples, tmp_path / "whole", lora_dropout=0.1, lr_scheduler_type="constant")
    learn(toy_folder, examples, tmp_path / "halves", lora_dropout=0.1, lr_scheduler_type="constant", max_steps=3)
    learn(toy_folder, examples, tmp_path / "halves", lora_dropout=0.1, lr_scheduler_type="constant")
    whole, halves = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@every_family
def test_the_first_loss_is_that_of_the_base_model_row_by_row(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    learn(toy_folder, examples, tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    loaded = load_model(toy_folder)
    total, tokens = 0.0, 0
    for lesson in lessons(examples):
        ids = loaded.family.completion_ids(lesson.completion)
        batch = collate_completions([(loaded.family.encode(lesson.messages), ids)], pad_token_id=0)
        labels, [prompt] = batch["labels"], batch["prompts"]
        with torch.no_grad():
            logits = loaded.model(**plain_inputs(loaded, prompt, ids)).logits
        total += float(completion_loss(logits[:, :-1], labels[:, 1:], tokens=1))
        tokens += len(ids)
    row = next(read_rows(tmp_path / "log.jsonl"))
    assert row["loss"] == pytest.approx(total / tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        pytest.param(10, {"max_steps": 7}, 7, id="given"),
        pytest.param(10, {"max_steps": -1, "num_train_epochs": 2}, 10, id="two-epochs"),
        pytest.param(9, {"max_steps": -1, "gradient_accumulation_steps": 2}, 3, id="ragged"),
    ],
)
def test_steps(rows: int, changes: dict, expected: int) -> None:
    assert sft_steps(rows, config(**changes)) == expected
