"""GRPO whose completions come from a server: the policy travels as its adapter, and what another engine sampled is weighed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_server import AdapterServer, serving_adapters
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stand_ins import ask, judge

from polyground.config import GrpoConfig, Recipe
from polyground.errors import ConfigError, EndpointError
from polyground.models import Loaded, load_model
from polyground.records import Example, Message
from polyground.sampling.endpoint import EndpointSampler
from polyground.sampling.policy import PolicySampler, policy_tokens
from polyground.sampling.vllm import Adapters
from polyground.stages import grpo, reject, world
from polyground.storage import read_rows
from polyground.training.grpo import train_grpo
from polyground.training.runs import prepare_model


def config(**changes: Any) -> GrpoConfig:
    small = {"num_generations": 3, "max_completion_length": 6, "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2}
    quiet = {"logging_steps": 1, "report_to": [], "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    return GrpoConfig(**{**small, **quiet, "beta": 0.0, "rollout": "endpoint", **changes})


def learn(folder: Path, examples: list[Example], out: Path, server: AdapterServer, **changes: Any) -> list[dict[str, Any]]:
    """The log lines of a run whose sampler is closed at its end."""
    settings, opened = config(**changes), []

    def sampler(loaded: Loaded) -> PolicySampler:
        endpoint = EndpointSampler(
            server.url,
            "base",
            cache=out / "answers",
            convention=loaded.family.convention,
            tokens=policy_tokens(loaded),
            retries=0,
        )
        opened.append(
            PolicySampler(
                loaded,
                sampler=endpoint,
                adapters=Adapters([server.url], key=None),
                folder=out / "served",
                version="v",
                steps_per_adapter=settings.steps_per_adapter,
            )
        )
        return opened[0]

    try:
        train_grpo(load_model(folder), examples, settings, sampler=sampler, ask=ask, judge=judge, out=out, seed=3)
    finally:
        for policy in opened:
            policy.close()
    return [row for row in read_rows(out / "log.jsonl") if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_what_is_sampled_is_the_policy_of_each_step_and_nothing_stays_behind(
    toy_folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    with serving_adapters(toy_folder, tmp_path / "seen") as server:
        rows = learn(toy_folder, examples, tmp_path, server)
    assert len({row["reward"] for row in rows}) > 1
    for row in rows:
        assert row["sampling/staleness"] == 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
        assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)
    # Each was let go of after the next had come, the last one at the end.
    names = server.loaded()
    assert len(set(names)) == 4
    assert server.told == [("load", names[0])] + [
        pair for old, new in zip(names, [*names[1:], None], strict=True) for pair in (("load", new), ("unload", old)) if pair[1]
    ]
    assert not (tmp_path / "served").exists()


def test_an_adapter_may_lag_as_far_as_is_allowed_and_the_lag_is_told(
    toy_folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    with serving_adapters(toy_folder, tmp_path / "seen") as server:
        rows = learn(toy_folder, examples, tmp_path, server, max_staleness=1)
    assert [row["sampling/staleness"] for row in rows] == [0, 1, 0, 1]
    assert len(server.loaded()) == 2
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in rows]
    assert max(gaps[0], gaps[2]) < 1e-4 < 1e-3 < min(gaps[1], gaps[3])


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def kill_in_step_4(self: object, args: object, state: Any, control: object, **_: object) -> None:
    if state.global_step == 3:
        raise KilledError


def test_a_killed_run_goes_on_to_the_same_weights_and_asks_for_nothing_twice(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_adapters(toy_folder, tmp_path / "seen") as server:
        learn(toy_folder, examples, tmp_path / "whole", server)
        undisturbed = len(server.answered)
        with monkeypatch.context() as patch:
            patch.setattr("polyground.training.runs.LogRows.on_pre_optimizer_step", kill_in_step_4)
            with pytest.raises(KilledError):
                learn(toy_folder, examples, tmp_path / "killed", server)
        learn(toy_folder, examples, tmp_path / "killed", server)
    assert len(server.answered) == 2 * undisturbed
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if "lora_B" in name)


def test_a_server_that_was_started_anew_is_sent_the_adapter_again(
    toy_folder: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_adapters(toy_folder, tmp_path / "seen", forgets_after=3) as server:
        learn(toy_folder, examples, tmp_path, server)
    assert len(server.loaded()) == 5
    assert len(server.answered) == 8
    assert "the adapter is sent again" in caplog.text


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        pytest.param({"before_temperature": True}, {"temperature": 0.5}, "processed_logprobs", id="other-log-probabilities"),
        pytest.param({"misreads": True}, {}, "reads a prompt otherwise than the policy", id="other-prompt"),
        pytest.param({"updates": False}, {}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", id="no-loading"),
    ],
)
def test_a_server_a_policy_cannot_learn_from_stops_the_run(
    toy_folder: Path, examples: list[Example], tmp_path: Path, options: dict, changes: dict, message: str
) -> None:
    with serving_adapters(toy_folder, tmp_path / "seen", **options) as server, pytest.raises(EndpointError, match=message):
        learn(toy_folder, examples, tmp_path, server, **changes)


def policy_of(loaded: Loaded, server: AdapterServer, folder: Path, *, rank: int = 0, timeout: float = 60) -> PolicySampler:
    return PolicySampler(
        loaded,
        sampler=EndpointSampler(server.url, "base", tokens=policy_tokens(loaded)),
        adapters=Adapters([server.url], key=None, timeout=timeout),
        folder=folder / "served",
        version="v",
        rank=rank,
    )


def test_of_two_processes_the_first_sends_the_adapter_and_the_other_waits_for_it(toy_folder: Path, tmp_path: Path) -> None:
    policies = []
    for _ in range(2):
        loaded = load_model(toy_folder)
        policies.append(replace(loaded, model=prepare_model(loaded.model, loaded.family, config(), seed=0)))
    prompts = [[Message("user", ("where?",))]]
    with serving_adapters(toy_folder, tmp_path / "seen") as server:
        first, other = (policy_of(policies[rank], server, tmp_path, rank=rank) for rank in (0, 1))
        with ThreadPoolExecutor(1) as waiting:
            follows = waiting.submit(other.follow, 0)
            assert not wait([follows], timeout=0.5).done
            assert first.follow(0) == follows.result() == 0
        asked = {"n": 2, "temperature": 1.0, "max_tokens": 4, "seed": 0}
        assert first.sample(prompts, **asked) == other.sample(prompts, **asked)
        assert len(server.loaded()) == 1
        other.close()
        assert len(server.adapters) == 1
        first.close()
        assert not server.adapters


def test_an_adapter_that_nobody_sends_is_not_waited_for_in_vain(toy_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(toy_folder)
    loaded = replace(loaded, model=prepare_model(loaded.model, loaded.family, config(), seed=0))
    with serving_adapters(toy_folder, tmp_path / "seen") as server:
        other = policy_of(loaded, server, tmp_path, rank=1, timeout=0.2)
        with pytest.raises(EndpointError, match="by the first process"):
            other.follow(0)
        other.close()


def test_what_is_learnt_outside_the_language_model_cannot_travel(toy_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(toy_folder)
    everywhere = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=r".*(visual\.blocks.*\.qkv|q_proj)"))
    with serving_adapters(toy_folder, tmp_path / "seen") as server, pytest.raises(ConfigError, match=r"visual.*is outside it"):
        policy_of(replace(loaded, model=everywhere), server, tmp_path)


def test_the_stage_asks_the_servers_of_its_recipe_and_leaves_nothing_there(toy_folder: Path, tmp_path: Path) -> None:
    with serving_adapters(toy_folder, tmp_path / "seen") as server:
        recipe = Recipe.model_validate(
            {
                "out": tmp_path / "run",
                "model": {"path": str(toy_folder)},
                "world": {"train": 0, "rl": 4, "validation": 0, "test": 0, "ood": 0, "perception": 0},
                "reject": {"num_generations": 2, "max_completion_length": 4, "min_pass_rate": None, "max_pass_rate": None},
                "grpo": {
                    **config(max_steps=2, num_generations=2, skip_zero_variance=False).to_json(),
                    "start": "base",
                    "max_completion_length": 4,
                },
                "servers": {"base": {"base_url": server.url, "model": "base"}},
            }
        )
        world.run(recipe)
        reject.run(recipe)
        summary = grpo.run(recipe)
        assert summary["endpoint"]["requests"] == len(server.answered) == 4
        assert not server.adapters
    assert not (tmp_path / "run" / "grpo" / "served").exists()
    assert (tmp_path / "run" / "grpo" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_policy_without_an_adapter_cannot_travel(toy: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_peft"):
        PolicySampler(
            toy,
            sampler=EndpointSampler("http://127.0.0.1:9/v1", "base"),
            adapters=Adapters(["http://127.0.0.1:9/v1"], key=None),
            folder=tmp_path,
            version="v",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"use_peft": False}, "needs use_peft", id="no-adapter"),
        pytest.param({"max_staleness": 3}, "must be a multiple of 4", id="checkpoints-between-adapters"),
        pytest.param({"vllm_importance_sampling_clip_min": 4.0}, "must be below", id="no-ratio-fits"),
    ],
)
def test_settings_that_cannot_work_with_a_server_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(("staleness", "iterations", "steps"), [(0, 1, 1), (2, 1, 3), (0, 3, 3), (2, 3, 3), (3, 3, 6)])
def test_an_adapter_is_sampled_for_whole_sets_of_rollouts(staleness: int, iterations: int, steps: int) -> None:
    assert config(max_staleness=staleness, num_iterations=iterations, save_steps=18).steps_per_adapter == steps
