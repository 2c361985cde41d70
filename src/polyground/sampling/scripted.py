"""Plays back prepared completions, so that a whole stage runs without a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from polyground.records import Completion, Message
from polyground.sampling import prompt_keys, sample_seed

Script = Callable[[str, int, int], str]
"""(prompt key, number in the group, seed) -> text."""


class ScriptedSampler:
    """Draws from fixed texts by the seed, or asks a function of (key, sample, seed); the same seed gives the same texts."""

    def __init__(self, completions: Iterable[str] | Script) -> None:
        self._script = completions if callable(completions) else _drawn_from(list(completions))

    def sample(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        n: int,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int,
        keys: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        return [[Completion(text=self._script(key, i, seed)) for i in range(n)] for key in prompt_keys(prompts, keys)]


def _drawn_from(texts: Sequence[str]) -> Script:
    if not texts:
        raise ValueError("a scripted sampler needs at least one completion")
    return lambda key, sample, seed: random.Random(sample_seed(seed, key, sample)).choice(texts)
