"""Facts about prompts encoded ahead: next to the decoding of others, each once, in bounded number, with errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.imagefile import ImageError
from polyground.models import Family, Loaded, Prompt, load_model
from polyground.records import Completion, Example, Message, Score
from polyground.rollout import rollout_groups
from polyground.sampling.local import LocalSampler
from toys import write_image, write_toy

WINDOW = 4
"""Prompts that are put together when one completion is decoded at a time."""


class Noting:
    """A family that notes the question of each prompt it encodes, and the thread."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.encoded: list[str] = []
        self.threads: set[str] = set()
        self.fifth = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(self, messages: Sequence[Message]) -> Prompt:
        self.encoded.append(str(messages[0].parts[-1]))
        self.threads.add(threading.current_thread().name)
        if len(self.encoded) > WINDOW:
            self.fifth.set()
        return self._family.encode(messages)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(write_toy(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture
def noting(loaded: Loaded) -> tuple[Loaded, Noting]:
    family = Noting(loaded.family)
    return replace(loaded, family=family), family


def prompts_of(image: Path, count: int) -> list[list[Message]]:
    return [[Message("user", (image, f"{i}?"))] for i in range(count)]


def test_the_next_window_is_encoded_while_this_one_decodes(noting: tuple[Loaded, Noting], tmp_path: Path) -> None:
    loaded, family = noting
    begun, most = [], []

    def decoding(*_: object) -> None:
        begun.append(family.fifth.wait(timeout=10))
        most.append(len(family.encoded))

    hook = loaded.family.language_model(loaded.model).register_forward_hook(decoding)
    prompts = prompts_of(write_image(tmp_path / "a.png"), 13)
    sampled = LocalSampler(loaded, batch_size=1).sample(prompts, n=1, temperature=1.0, max_tokens=1, seed=0)
    hook.remove()
    assert len(sampled) == len(begun) == 13
    assert all(begun)
    assert family.encoded == [f"{i}?" for i in range(13)]
    assert all(name.startswith("encode") for name in family.threads)
    # While the first window decodes, no more than the second is begun.
    assert max(most[:WINDOW]) < 2 * WINDOW
    assert max(most[WINDOW : 2 * WINDOW]) < 3 * WINDOW


def test_what_was_prepared_is_not_encoded_again_and_what_is_no_longer_wanted_is_let_go(
    noting: tuple[Loaded, Noting], tmp_path: Path
) -> None:
    loaded, family = noting
    prompts = prompts_of(write_image(tmp_path / "a.png"), 4)
    sampler, options = LocalSampler(loaded), {"n": 2, "temperature": 1.0, "max_tokens": 3, "seed": 0}
    plain = [LocalSampler(replace(loaded, family=family._family)).sample([p], **options) for p in prompts]
    sampler.prepare(prompts[:3])
    sampler.prepare(prompts[1:])
    assert [sampler.sample([p], **options) for p in prompts[1:]] == plain[1:]
    assert [q for q in family.encoded if q != "0?"] == ["1?", "2?", "3?"]
    assert not sampler._ahead._started


def ask(example: Example) -> tuple[list[Message], list[Grid]]:
    return [Message("user", (*example.images, example.question))], [PER_MILLE] * len(example.images)


def judge(completion: Completion, example: Example, grids: Sequence[Grid]) -> Score:
    return Score(total=0.0, parts={})


def examples_of(images: Sequence[Path]) -> list[Example]:
    target = Answer((Located(1, Box(0, 0, 1, 1)),))
    return [Example(key=f"k{i}", task="find", images=(image,), question=f"{i}?", target=target) for i, image in enumerate(images)]


@pytest.mark.parametrize("asked_early", [False, True], ids=["encoding fails", "asking fails"])
def test_a_bad_image_is_named_in_its_turn(noting: tuple[Loaded, Noting], tmp_path: Path, asked_early: bool) -> None:
    loaded, _ = noting
    good = write_image(tmp_path / "good.png")
    examples = examples_of([good, good, tmp_path / "none.png", good])

    def asking(example: Example) -> tuple[list[Message], list[Grid]]:
        if asked_early and example.key == "k2":
            raise ImageError(example.images[0], "missing_image", "no such image")
        return ask(example)

    options = {"n": 2, "temperature": 1.0, "max_tokens": 2, "seed": 0, "batch": 1}
    groups = rollout_groups(examples, sampler=LocalSampler(loaded), ask=asking, judge=judge, **options)
    assert [next(groups).example.key for _ in range(2)] == ["k0", "k1"]
    with pytest.raises(DataError, match=r"^k2: .*none\.png: no such image"):
        next(groups)


def test_the_next_batch_of_a_stage_is_begun_before_this_one_is_sampled(noting: tuple[Loaded, Noting], tmp_path: Path) -> None:
    loaded, family = noting
    good, seen = write_image(tmp_path / "good.png"), []

    def decoding(*_: object) -> None:
        family.fifth.wait(timeout=10)
        seen.append(len(family.encoded))

    hook = loaded.family.language_model(loaded.model).register_forward_hook(decoding)
    options = {"n": 1, "temperature": 1.0, "max_tokens": 1, "seed": 0, "batch": 3}
    groups = list(rollout_groups(examples_of([good] * 7), sampler=LocalSampler(loaded), ask=ask, judge=judge, **options))
    hook.remove()
    assert [group.example.key for group in groups] == [f"k{i}" for i in range(7)]
    assert family.encoded == [f"{i}?" for i in range(7)]
    assert seen[0] > WINDOW  # of the second batch, before the first was decoded
