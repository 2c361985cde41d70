"""Stand-ins for the trainers' tests: a sampler without a model, a reward of the text."""

import random
from collections.abc import Sequence

import pytest

from polyground.geometry import PER_MILLE, Grid
from polyground.records import Completion, Example, Message, Score
from polyground.sampling import sample_seed
from toys import FAMILIES

families = pytest.mark.parametrize("toy_folder", ["qwen3_vl", "qwen3_5"], indirect=True)
"""Runs a test with a model of attention alone and with one that carries recurrent states."""

every_family = pytest.mark.parametrize("toy_folder", FAMILIES, indirect=True)


def ask(example: Example) -> tuple[list[Message], list[Grid]]:
    return [Message("user", (*example.images, example.question))], [PER_MILLE] * len(example.images)


def judge(completion: Completion, example: Example, grids: Sequence[Grid]) -> Score:
    """The share of letters in the first half of the alphabet: any sampler's groups differ in it."""
    value = sum(letter < "n" for letter in completion.text) / max(1, len(completion.text))
    return Score(total=value, parts={"early": value}, iou=value, image_correct=value)


class Babbler:
    """Ragged completions that depend on the seed and the key only, whatever the model."""

    def sample(self, prompts, *, n, temperature, top_p=1.0, max_tokens, seed, keys=None):
        return [
            [self._one(random.Random(sample_seed(seed, key, sample)), max_tokens) for sample in range(n)] for key in keys or ()
        ]

    def _one(self, rng: random.Random, max_tokens: int) -> Completion:
        ids = tuple(rng.randrange(64, 90) for _ in range(rng.randint(1, max_tokens)))
        return Completion(text="".join(chr(i + 33) for i in ids), token_ids=ids)
