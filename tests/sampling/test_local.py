"""Sampling in process: equal to transformers where that can be compared, and independent of what shares the batch."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hasty import Hasty, generated, ragged_prompts
from peft import LoraConfig, get_peft_model

from polyground.models import Loaded, load_model
from polyground.records import Completion, Message
from polyground.sampling.drawing import Settings, draw, nucleus
from polyground.sampling.local import LocalSampler
from toys import FAMILIES, write_toy

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(write_toy(tmp_path_factory.mktemp("models") / "toy", request.param))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[Message]]:
    return ragged_prompts(tmp_path_factory.mktemp("images"))


def test_greedy_is_transformers_generate_for_ragged_image_counts(loaded: Loaded, prompts: list[list[Message]]) -> None:
    expected = [generated(loaded, messages, max_tokens=20)[0] for messages in prompts]
    for batch_size, share in ((1, False), (8, False), (8, True)):
        sampler = LocalSampler(loaded, batch_size=batch_size, share_prompts=share)
        sampled = sampler.sample(prompts, n=2, temperature=0, max_tokens=20, seed=0)
        assert [list(c.token_ids) for group in sampled for c in group] == [ids for ids in expected for _ in range(2)]


def test_a_completion_does_not_depend_on_its_neighbours(loaded: Loaded, prompts: list[list[Message]]) -> None:
    sampler = LocalSampler(loaded, batch_size=64)
    together = sampler.sample(prompts, n=6, temperature=1.0, max_tokens=30, seed=3)
    alone = [sampler.sample([p], n=6, temperature=1.0, max_tokens=30, seed=3)[0] for p in prompts]
    fewer = [
        group[:2] for group in LocalSampler(loaded, batch_size=1).sample(prompts, n=2, temperature=1.0, max_tokens=30, seed=3)
    ]
    assert [[c.token_ids for c in g] for g in together] == [[c.token_ids for c in g] for g in alone]
    assert [[c.token_ids for c in g[:2]] for g in together] == [[c.token_ids for c in g] for g in fewer]
    # Some rows must have ended early, or dropping finished rows was not put to the test.
    assert len({len(c.token_ids) for g in together for c in g}) > 2


def test_rows_that_end_leave_the_others_as_they_were(loaded: Loaded, prompts: list[list[Message]]) -> None:
    hasty = Hasty(loaded.family)
    options = {"n": 6, "temperature": 1.0, "max_tokens": 12, "seed": 3}
    patient = LocalSampler(loaded).sample(prompts, **options)
    sampled = LocalSampler(replace(loaded, family=hasty)).sample(prompts, **options)
    pairs = [pair for groups in zip(patient, sampled, strict=True) for pair in zip(*groups, strict=True)]
    for long, short in pairs:
        ends = (i + 1 for i, token in enumerate(long.token_ids) if token in hasty.stop_token_ids)
        assert short.token_ids == long.token_ids[: next(ends, 12)]
        assert short.logprobs == pytest.approx(long.logprobs[: len(short.token_ids)], abs=1e-4)
    assert len({len(short.token_ids) for _, short in pairs}) > 3


@pytest.mark.parametrize("few", [slice(0, 1), slice(0, 4)], ids=["one prompt", "ragged prompts"])
def test_reading_shared_keys_draws_what_reading_copies_draws(loaded: Loaded, prompts: list[list[Message]], few: slice) -> None:
    hasty = replace(loaded, family=Hasty(loaded.family))

    def drawn(share: bool) -> list[list[Completion]]:
        sampler = LocalSampler(hasty, share_prompts=share)
        return sampler.sample(prompts[few], n=9, temperature=1.0, max_tokens=12, seed=4)

    shared, copied = drawn(True), drawn(False)
    assert [[c.token_ids for c in g] for g in shared] == [[c.token_ids for c in g] for g in copied]
    for ours, theirs in zip(chain(*shared), chain(*copied), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    # Rows of one prompt leave at different steps, down to prompts without rows.
    assert len({len(c.token_ids) for g in shared for c in g}) > 3


def test_the_seed_the_key_and_the_number_in_the_group_each_change_thedraw(loaded: Loaded, prompts: list[list[Message]]) -> None:
    def draw(seed: int, key: str) -> list[tuple[int, ...]]:
        [group] = LocalSampler(loaded).sample(prompts[:1], n=2, temperature=1.0, max_tokens=12, seed=seed, keys=[key])
        return [c.token_ids for c in group]

    assert draw(0, "a") == draw(0, "a")
    assert len({*draw(0, "a"), *draw(1, "a"), *draw(0, "b")}) == 6


def test_logprobs_are_the_models_own_at_the_temperature(loaded: Loaded, prompts: list[list[Message]]) -> None:
    sampled = LocalSampler(loaded).sample(prompts, n=2, temperature=0.7, max_tokens=10, seed=1)
    family = loaded.family
    for messages, group in zip(prompts, sampled, strict=True):
        prompt = family.encode(messages)
        for completion in group:
            ids = torch.tensor(completion.token_ids)
            after = (torch.arange(len(ids)) + prompt.next_position).expand(3, -1)
            with torch.no_grad():
                output = family.forward(
                    loaded.model,
                    input_ids=torch.cat([prompt.input_ids, ids])[None],
                    position_ids=torch.cat([prompt.position_ids, after], dim=1)[:, None],
                    features=[family.encode_images(loaded.model, prompt)],
                )
            logits = output.logits[0, len(prompt) - 1 : -1] / 0.7
            logits[:, list(family.banned_token_ids)] = -torch.inf
            expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def test_a_completion_is_truncated_exactly_when_it_has_no_end_token(loaded: Loaded, prompts: list[list[Message]]) -> None:
    sampled = LocalSampler(loaded).sample(prompts, n=6, temperature=1.2, max_tokens=30, seed=3)
    for completion in (c for group in sampled for c in group):
        ended = completion.token_ids[-1] in loaded.family.stop_token_ids
        assert completion.truncated == (not ended)
        assert len(completion.token_ids) == len(completion.logprobs) == 30 or ended
        assert not set(completion.token_ids) & set(loaded.family.banned_token_ids)


def test_training_switches_and_gradients_are_left_as_they_were(loaded: Loaded, prompts: list[list[Message]]) -> None:
    loaded.model.train()
    tower = getattr(loaded.model.model, loaded.family.vision_parts[0])
    tower.eval()
    LocalSampler(loaded).sample(prompts[:1], n=1, temperature=0, max_tokens=2, seed=0)
    assert loaded.model.training
    assert not tower.training
    assert torch.is_grad_enabled()
    loaded.model.eval()


def test_a_peft_wrapped_model_samples_with_its_adapter(loaded: Loaded, prompts: list[list[Message]], tmp_path: Path) -> None:
    fresh = load_model(loaded.path)
    torch.manual_seed(0)
    model = get_peft_model(fresh.model, LoraConfig(r=4, target_modules=fresh.family.lora_targets, init_lora_weights=False))
    wrapped = LocalSampler(Loaded(model, fresh.family, fresh.path, fresh.config))
    adapted = wrapped.sample(prompts[:2], n=1, temperature=0, max_tokens=12, seed=0)
    with model.disable_adapter():
        plain = wrapped.sample(prompts[:2], n=1, temperature=0, max_tokens=12, seed=0)
    assert adapted != plain
    assert plain == LocalSampler(loaded).sample(prompts[:2], n=1, temperature=0, max_tokens=12, seed=0)


@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
def test_bfloat16_autocast_runs(loaded: Loaded, prompts: list[list[Message]], share: bool) -> None:
    sampler = LocalSampler(loaded, autocast=torch.bfloat16, share_prompts=share)
    assert len(sampler.sample(prompts, n=2, temperature=1.0, max_tokens=4, seed=0)) == 4


def test_images_are_encoded_once_and_prompts_prefilled_once(loaded: Loaded, prompts: list[list[Message]]) -> None:
    pixels, tokens = [], []
    tower, decoder = getattr(loaded.model.model, loaded.family.vision_parts[0]), loaded.family.language_model(loaded.model)
    hooks = [
        tower.register_forward_pre_hook(lambda _, args, kw: pixels.append([*args, *kw.values()][0]), with_kwargs=True),
        decoder.register_forward_pre_hook(lambda _, __, kw: tokens.append(kw["inputs_embeds"].shape[:2]), with_kwargs=True),
    ]
    LocalSampler(loaded).sample(prompts[1:2], n=4, temperature=1.0, max_tokens=2, seed=0)
    for hook in hooks:
        hook.remove()
    prompt = loaded.family.encode(prompts[1])
    assert [len(given) for given in pixels] == [len(prompt.vision["pixel_values"])]
    assert [tuple(shape) for shape in tokens] == [(1, len(prompt)), (4, 1)]


def test_no_prompts_give_no_completions(loaded: Loaded) -> None:
    assert LocalSampler(loaded).sample([], n=2, temperature=1.0, max_tokens=2, seed=0) == []


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=lambda w: next(iter(w))
)
def test_settings_out_of_range_are_refused(loaded: Loaded, wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        LocalSampler(loaded).sample([], **{"n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1, "seed": 0} | wrong)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(1000, -1)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    token, logprob = draw(logits, uniform, Settings(1, 1.0, 1.0, 1, 0))
    assert torch.bincount(token, minlength=4).tolist() == [100, 0, 600, 300]
    assert torch.allclose(logprob.exp(), torch.tensor([0.1, 0.0, 0.6, 0.3])[token])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    token, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), Settings(1, 1.0, 1.0, 1, 0))
    assert int(token) in (1, 2)


def test_the_nucleus_keeps_the_likeliest_tokens_that_reach_top_p() -> None:
    assert torch.allclose(nucleus(torch.tensor([[0.1, 0.5, 0.4]]), 0.5), torch.tensor([[0.0, 0.5, 0.0]]))
    assert torch.allclose(nucleus(torch.tensor([[0.1, 0.5, 0.4]]), 0.6), torch.tensor([[0.0, 0.5, 0.4]]))
