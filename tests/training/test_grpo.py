"""Facts about the GRPO trainer: it learns, it can be killed, and it says what it did."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import Babbler, ask, every_family, families, judge
from transformers import TrainerState

from polyground.config import GrpoConfig
from polyground.errors import ConfigError
from polyground.models import Loaded, load_model
from polyground.records import Completion, Example, Score
from polyground.sampling.local import LocalSampler
from polyground.storage import read_rows
from polyground.training.grpo import train_grpo
from polyground.training.runs import last_checkpoint
from polyground.training.schedule import Schedule


def config(**changes) -> GrpoConfig:
    small = {"num_generations": 3, "max_completion_length": 6, "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3}
    quiet = {"logging_steps": 1, "report_to": [], "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1e-2}
    return GrpoConfig(**{**small, **quiet, **changes})


def learn(folder: Path, examples: list[Example], out: Path, *, judge=judge, sampler=LocalSampler, **changes) -> dict:
    loaded = load_model(folder)
    return train_grpo(loaded, examples, config(**changes), sampler=sampler, ask=ask, judge=judge, out=out, seed=3)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def kill_in_step_4(self: object, args: object, state: TrainerState, control: object, **_: object) -> None:
    if state.global_step == 4:
        raise KilledError


@families
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 3, "beta": 0.0}], ids=["one-iteration", "three-iterations"])
def test_a_killed_run_goes_on_to_the_very_same_weights_and_rows(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    learn(toy_folder, examples, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("polyground.training.runs.LogRows.on_pre_optimizer_step", kill_in_step_4)
        with pytest.raises(KilledError):
            learn(toy_folder, examples, tmp_path / "killed", **changes)
    (tmp_path / "killed" / "checkpoint-5").mkdir()  # begun, never finished
    learn(toy_folder, examples, tmp_path / "killed", **changes)

    whole, killed = adapter(tmp_path / "whole"), adapter(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if "lora_B" in name)
    rows = [list(read_rows(tmp_path / run / "rollouts.jsonl")) for run in ("whole", "killed")]
    assert rows[0] == rows[1]
    steps = [row["step"] for row in read_rows(tmp_path / "killed" / "log.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_nothing_left_to_do_is_said_and_the_adapter_saved_again(
    toy_folder: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learn(toy_folder, examples, tmp_path, max_steps=3)
    before = adapter(tmp_path)
    caplog.clear()
    learn(toy_folder, examples, tmp_path, max_steps=3)
    assert "0 steps left" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter(tmp_path).items())
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_the_log_shows_the_parts(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    learn(toy_folder, examples, tmp_path, max_steps=2, beta=0.04)
    row = next(read_rows(tmp_path / "log.jsonl"))
    expected = {
        "step",
        "loss",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/early/mean",
        "entropy",
        "kl",
        "unreadable",
    }
    expected |= {"completions/mean_length", "image_accuracy", "frac_groups_skipped", "clip_ratio/region_mean"}
    assert expected <= row.keys()
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert any(key.startswith("tasks/") for key in row)


def constant(completion: Completion, example: Example, grids: object) -> Score:
    return Score(total=0.5, parts={"constant": 0.5})


@pytest.mark.parametrize(("beta", "share"), [(0.0, 1.0), (0.04, 0.0)])
def test_groups_without_variance_are_skipped_only_where_that_is_exact(
    toy_folder: Path, examples: list[Example], tmp_path: Path, beta: float, share: float
) -> None:
    learn(toy_folder, examples, tmp_path, judge=constant, max_steps=1, beta=beta)
    row = next(read_rows(tmp_path / "log.jsonl"))
    assert row["frac_reward_zero_std"] == 1.0
    assert row["frac_groups_skipped"] == share


@every_family
def test_skipping_changes_the_cost_and_not_the_weights(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    def half(completion: Completion, example: Example, grids: object) -> Score:
        return Score(total=0.5, parts={"early": 0.5}) if example.key == "e2" else judge(completion, example, grids)

    for skip in (True, False):
        learn(
            toy_folder,
            examples,
            tmp_path / str(skip),
            judge=half,
            sampler=lambda loaded: Babbler(),
            max_steps=2,
            beta=0.0,
            lora_dropout=0.0,
            skip_zero_variance=skip,
            per_device_train_batch_size=4,
        )
    ours, theirs = adapter(tmp_path / "True"), adapter(tmp_path / "False")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_images_are_encoded_once_per_step(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def counting(loaded: Loaded) -> LocalSampler:
        tower = loaded.model.get_base_model().model.visual
        tower.register_forward_hook(lambda _m, inputs, _o: passes.append(len(inputs[0])))
        return LocalSampler(loaded)

    learn(toy_folder, examples, tmp_path, sampler=counting, max_steps=1, per_device_train_batch_size=4, beta=0.04)
    patches = sum(loaded_patches(toy_folder, example) for example in examples)
    assert sum(passes) == patches


def loaded_patches(folder: Path, example: Example) -> int:
    return len(load_model(folder).family.encode(ask(example)[0]).vision["pixel_values"])


def test_eager_attention_is_refused(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    loaded = load_model(toy_folder)
    loaded.model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="eager"):
        train_grpo(loaded, examples, config(), sampler=LocalSampler, ask=ask, judge=judge, out=tmp_path, seed=0)


@pytest.mark.parametrize(
    ("attention", "said"),
    [("auto", r"mask \(auto; rows of \d+ tokens on cpu\)"), ("shared", r"shared \(shared\)"), ("mask", r"mask \(mask\)")],
)
def test_the_attention_that_was_chosen_is_said_with_its_reason(
    toy_folder: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture, attention: str, said: str
) -> None:
    with caplog.at_level("INFO", logger="polyground"):
        summary = learn(toy_folder, examples, tmp_path, max_steps=2, prefix_attention=attention)
    assert re.fullmatch(said, summary["prefix_attention"])
    assert caplog.text.count(f"prefix attention: {summary['prefix_attention']}") == 1


def test_a_model_that_cannot_share_a_prefix_says_so(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    loaded = load_model(toy_folder)
    loaded.model.set_attn_implementation("sdpa")
    options = {"sampler": LocalSampler, "ask": ask, "judge": judge, "out": tmp_path, "seed": 0}
    summary = train_grpo(loaded, examples, config(max_steps=1, save_steps=1), **options)
    assert summary["prefix_attention"] == "mask (the model was loaded with sdpa)"


def test_a_checkpoint_inside_a_set_of_rollouts_is_refused(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of num_iterations"):
        learn(toy_folder, examples, tmp_path, num_iterations=2, save_steps=3)


def test_the_schedule_passes_over_all_examples_and_repeats_steps_for_iterations(examples: list[Example]) -> None:
    once = Schedule(examples, steps=4, per_step=2, num_iterations=1, seed=0)
    keys = [once[i].key for i in range(len(once))]
    assert sorted(keys[:4]) == sorted(keys[4:]) == sorted(e.key for e in examples)
    twice = Schedule(examples, steps=4, per_step=2, num_iterations=2, seed=0)
    assert [twice[i].key for i in range(8)] == [*keys[:2], *keys[:2], *keys[2:4], *keys[2:4]]
