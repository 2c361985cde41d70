"""Facts about scoring several groups at once: neither the attention used nor the company of a group changes its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from polyground.batches import join_groups, pack_group
from polyground.models import Loaded, load_model
from polyground.records import Message
from polyground.training.scores import score_groups, shares_prefix
from toys import FAMILIES, write_image, write_toy

RAGGED = [[[70, 71, 72, 73], [80], [65, 66, 67]], [[90, 91], [92, 93, 94]], [[75], [76, 77]]]


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    loaded = load_model(write_toy(tmp_path_factory.mktemp("toy") / request.param, request.param))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=loaded.family.lora_targets, init_lora_weights=False)
    return Loaded(get_peft_model(loaded.model, lora), loaded.family, loaded.path, loaded.config)


def scored(policy: Loaded, folder: Path, attention: str, *, together: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of three groups of 2, 0 and 1 images, and the gradients of their weighted sum."""
    family, images = policy.family, [write_image(folder / f"{k}.png", colour) for k, colour in enumerate(("red", "blue"))]
    prompts = [family.encode([Message("user", (*images[:count], f"what? {count}"))]) for count in (2, 0, 1)]
    features = [family.encode_images(policy.model, prompt) for prompt in prompts]
    groups = [pack_group(prompt, completions) for prompt, completions in zip(prompts, RAGGED, strict=True)]
    policy.model.zero_grad()

    def run(some: slice) -> list[Tensor]:
        found = score_groups(policy.model, family, groups[some], features[some], temperature=0.9, attention=attention)
        return [scores.logprobs_N for scores in found]

    logprobs = torch.cat(run(slice(0, 3)) if together else [part for k in range(3) for part in run(slice(k, k + 1))])
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return logprobs.detach(), gradients


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "joined"])
def test_shared_prefix_attention_equals_the_mask_in_every_family(policy: Loaded, tmp_path: Path, together: bool) -> None:
    logprobs, gradients = scored(policy, tmp_path, "shared", together=together)
    expected, expected_gradients = scored(policy, tmp_path, "mask", together=together)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    gap = sum(float((gradients[n] - expected_gradients[n]).double().square().sum()) for n in gradients) ** 0.5
    assert gap < 1e-5 * sum(float(g.double().square().sum()) for g in expected_gradients.values()) ** 0.5


@pytest.mark.parametrize("attention", ["shared", "mask"])
def test_under_autocast_it_stays_near_the_full_precision(policy: Loaded, tmp_path: Path, attention: str) -> None:
    expected, _ = scored(policy, tmp_path, "mask", together=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = scored(policy, tmp_path, attention, together=True)
    assert float((rough - expected).norm() / expected.norm()) < 0.1


def test_the_last_layer_computes_completions_only(policy: Loaded) -> None:
    decoder, family, seen = policy.family.language_model(policy.model), policy.family, []
    hooks = [layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1])) for layer in decoder.layers]
    prompt = family.encode([Message("user", ("what?",))])
    score_groups(
        policy.model,
        family,
        [pack_group(prompt, RAGGED[0])],
        [family.encode_images(policy.model, prompt)],
        temperature=1.0,
        attention="shared",
    )
    for hook in hooks:
        hook.remove()
    everything = len(prompt) - 1 + 8
    # A recurrent layer has to read the prompt to know what its completions go on from.
    assert seen == [everything] * (len(decoder.layers) - 1) + [8 if hasattr(decoder.layers[-1], "self_attn") else everything]


def test_short_rows_on_a_cpu_take_the_mask_and_long_ones_do_not(policy: Loaded) -> None:
    decoder, family = policy.family.language_model(policy.model), policy.family
    short = pack_group(family.encode([Message("user", ("hi",))]), [[70], [71, 72]])
    long = join_groups([short] * 100)
    assert not shares_prefix(decoder, [short], "auto")
    assert shares_prefix(decoder, [long], "auto")
    assert shares_prefix(decoder, [short], "shared")
    assert not shares_prefix(decoder, [long], "mask")
