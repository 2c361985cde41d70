"""Reinforcement learning with rule rewards, from the merged SFT model (or the base), on the questions it sometimes gets right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyground.config import Recipe
from polyground.conventions import model_folder
from polyground.errors import ConfigError
from polyground.geometry import Grid
from polyground.prompts import PROMPT_VERSION, student_messages
from polyground.records import Example, Message
from polyground.shards import launched_processes
from polyground.stages import (
    answers_folder,
    model_identity,
    model_path,
    model_version,
    open_model,
    require_images,
    stage_folder,
    start_folders,
    upstream,
)
from polyground.storage import read_rows

if TYPE_CHECKING:
    from polyground.models import Loaded
    from polyground.sampling import Sampler


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Read the kept questions, train a fresh adapter on the model it starts from, save it."""
    rewards = recipe.rewards if recipe.grpo.rewards is None else recipe.grpo.rewards
    identity = {
        "seed": recipe.seed,
        "grpo": recipe.grpo.deciding(processes=launched_processes()),
        "rewards": [reward.to_json() for reward in rewards],
        "prompts": recipe.prompts.to_json(),
        "prompt_version": PROMPT_VERSION,
        "model": model_identity(recipe),
        "inputs": upstream(recipe, "reject", *start_folders(recipe)),
    }
    with stage_folder(recipe, "grpo", "grpo", identity) as folder:
        if folder.complete:
            return folder.summary
        kept = recipe.out / "reject" / "kept.jsonl"
        rows = list(read_rows(kept))
        require_images(rows, kept)
        from polyground.rewards import Scorer
        from polyground.training.grpo import train_grpo

        loaded = open_model(recipe, recipe.grpo.start, training=True)

        def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
            grids = loaded.family.grids(example.images)
            return student_messages(example, grids, instruction=recipe.prompts.instruction), grids

        with rollouts(recipe, folder.path) as (sampler, spent):
            summary = train_grpo(
                loaded,
                [Example.from_json(row) for row in rows],
                recipe.grpo,
                sampler=sampler,
                ask=ask,
                # The contract only: an answer in the base's native form is what RL is to unlearn.
                judge=Scorer(rewards, reasoning=recipe.prompts.reasoning).score,
                out=folder.path,
                seed=recipe.seed,
            )
            summary |= spent()
        return folder.finish({**summary, "seconds": folder.seconds}).summary


@contextmanager
def rollouts(recipe: Recipe, folder: Path) -> Iterator[tuple[Callable[[Loaded], Sampler], Callable[[], dict[str, Any]]]]:
    """What samples a policy, and what was asked of servers for it; these are let go of at the end."""
    config, role = recipe.grpo, recipe.grpo.start
    if config.rollout == "local":
        from polyground.sampling.local import LocalSampler

        yield LocalSampler, dict
        return
    from polyground.sampling.endpoint import EndpointSampler, api_key
    from polyground.sampling.policy import PolicySampler, policy_tokens
    from polyground.sampling.served import serving_of
    from polyground.sampling.vllm import Adapters

    if config.rollout == "vllm" and launched_processes() > 1:
        raise ConfigError(
            "grpo.rollout: vllm starts a server for one process; with several, start it yourself (docs/endpoints.md), and set "
            f"grpo.rollout to endpoint and servers.{role} to where it is"
        )
    with ExitStack() as opened:
        served = opened.enter_context(
            serving_of(
                config.rollout,
                recipe.servers,
                role,
                model=model_folder(model_path(recipe, role)).absolute(),
                dtype=recipe.model.dtype,
                log=recipe.out / "logs" / f"vllm-grpo-{role}.log",
                adapter_rank=config.lora_r,
            )
        )
        samplers: list[PolicySampler] = []

        def sampler_of(loaded: Loaded) -> PolicySampler:
            sampler = EndpointSampler.from_config(
                served.urls,
                served.model,
                recipe.servers.endpoint,
                cache=answers_folder(recipe, "grpo"),
                api_key_env=served.api_key_env,
                convention=loaded.family.convention,
                section="servers.endpoint",
                tokens=policy_tokens(loaded),
                require_running=served.require_running,
            )
            policy = PolicySampler(
                loaded,
                sampler=sampler,
                adapters=Adapters(
                    served.urls,
                    key=api_key(served.api_key_env),
                    timeout=recipe.servers.endpoint.timeout,
                    require_running=served.require_running,
                ),
                folder=folder / "served",
                version=model_version(recipe, role),
                steps_per_adapter=config.steps_per_adapter,
                rank=int(os.environ.get("RANK", "0")),
            )
            opened.callback(policy.close)
            samplers.append(policy)
            return policy

        yield sampler_of, lambda: {"endpoint": dict(samplers[0].usage)} if samplers else {}
