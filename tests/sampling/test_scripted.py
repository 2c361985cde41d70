"""The scripted sampler."""

import pytest

from polyground.records import Message
from polyground.sampling import prompt_key, sample_seed
from polyground.sampling.scripted import ScriptedSampler

PROMPT = [Message("user", ("where?",))]


def _texts(sampler: ScriptedSampler, **options) -> list[list[str]]:
    sampled = sampler.sample([PROMPT, PROMPT], **{"n": 3, "temperature": 1.0, "max_tokens": 8, "seed": 0} | options)
    return [[c.text for c in group] for group in sampled]


def test_a_function_is_asked_with_key_number_and_seed() -> None:
    sampler = ScriptedSampler(lambda key, sample, seed: f"{key}/{sample}/{seed}")
    assert _texts(sampler, keys=["a", "b"], seed=7) == [["a/0/7", "a/1/7", "a/2/7"], ["b/0/7", "b/1/7", "b/2/7"]]


def test_fixed_texts_are_drawn_by_the_seed() -> None:
    sampler = ScriptedSampler(str(i) for i in range(100))
    first = _texts(sampler, keys=["a", "b"])
    assert first == _texts(sampler, keys=["a", "b"])
    assert first != _texts(sampler, keys=["a", "b"], seed=1)
    assert first[0] != first[1]


def test_a_script_without_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ScriptedSampler([])


def test_one_key_per_prompt_is_needed() -> None:
    with pytest.raises(ValueError, match="1 keys for 2 prompts"):
        _texts(ScriptedSampler(["x"]), keys=["a"])


def test_seeds_differ_by_seed_key_and_number() -> None:
    assert len({sample_seed(0, "a"), sample_seed(1, "a"), sample_seed(0, "b"), sample_seed(0, "a", 1)}) == 4
    assert prompt_key(PROMPT) == prompt_key([Message("user", ("where?",))]) != prompt_key([Message("user", ("when?",))])
