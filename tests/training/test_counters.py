"""Facts about what a GRPO step costs, counted by hooks: a prompt and its images once, whatever the number of completions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import ask, every_family
from torch import Tensor

from polyground.config import GrpoConfig
from polyground.models import Family, Loaded, load_model
from polyground.models.chat import core_of
from polyground.records import Completion, Example, Score
from polyground.sampling.local import LocalSampler
from polyground.training.grpo import train_grpo

C = 5
"""Tokens of every completion."""


class Endless:
    """A family whose completions never end before their budget."""

    stop_token_ids = (-1,)

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


@dataclass
class Count:
    """What a run did."""

    decodes: Counter[Path] = field(default_factory=Counter)
    processor_runs: int = 0
    tower: list[tuple[int, bool]] = field(default_factory=list)
    """Rows of each pass of the vision tower, and whether it is to be gone back through."""
    language: list[tuple[int, int, bool]] = field(default_factory=list)
    """Rows and tokens of each pass of the language model, and whether it is to be gone back through."""
    judged: int = 0

    @property
    def prefill(self) -> list[tuple[int, int, bool]]:
        """Passes up to the first one-token step, which ends the prefill."""
        steps = [tokens for _, tokens, _ in self.language]
        return self.language[: steps.index(1)]

    @property
    def decoded(self) -> int:
        return sum(rows for rows, tokens, _ in self.language if tokens == 1)

    @property
    def packed(self) -> list[tuple[int, bool]]:
        """Tokens of each pass after decoding, and whether it is to be gone back through."""
        steps = [tokens for _, tokens, _ in self.language]
        last = len(steps) - steps[::-1].index(1)
        return [(rows * tokens, grad) for rows, tokens, grad in self.language[last:]]


def counted(
    folder: Path, examples: list[Example], out: Path, monkeypatch: pytest.MonkeyPatch, *, even: bool = False, **changes
) -> Count:
    """One run over the examples; rewards take turns, or with `even` all agree."""
    count, loaded = Count(), load_model(folder)
    tower = getattr(core_of(loaded.model), loaded.family.vision_parts[0])
    first: Any = loaded.family.language_model(loaded.model).layers[0]
    from polyground.models import chat

    load_image, processor = chat.load_image, type(loaded.family.image_processor)
    run = processor.__call__

    def decoding(path: Path) -> Any:
        count.decodes[path] += 1
        return load_image(path)

    def processing(*args: Any, **kwargs: Any) -> Any:
        count.processor_runs += 1
        return run(*args, **kwargs)

    def looking(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        [rows, *_] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        [*tensors] = [value for value in output.values() if isinstance(value, Tensor)]
        count.tower.append((len(rows), any(tensor.requires_grad for tensor in tensors)))

    def reading(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        count.language.append((*states.shape[:2], torch.is_grad_enabled()))

    def judge(completion: Completion, example: Example, grids: object) -> Score:
        assert len(completion.token_ids) == C
        count.judged += 1
        return Score(total=0.5 if even else float(count.judged % 2), parts={})

    monkeypatch.setattr(chat, "load_image", decoding)
    monkeypatch.setattr(processor, "__call__", processing)
    tower.register_forward_hook(looking, with_kwargs=True)
    first.register_forward_pre_hook(reading, with_kwargs=True)
    small = {"max_completion_length": C, "max_steps": 1, "per_device_train_batch_size": len(examples), "save_steps": 100}
    quiet = {"report_to": [], "lora_r": 4, "beta": 0.0}
    train_grpo(
        Loaded(loaded.model, Endless(loaded.family), loaded.path, loaded.config),
        examples,
        GrpoConfig(**{**small, **quiet, **changes}),
        sampler=LocalSampler,
        ask=ask,
        judge=judge,
        out=out,
        seed=0,
    )
    return count


def lengths(folder: Path, examples: list[Example]) -> tuple[list[int], int]:
    """Tokens of each prompt, and rows that the vision tower is given for all of them."""
    prompts = [load_model(folder).family.encode(ask(example)[0]) for example in examples]
    return [len(prompt) for prompt in prompts], sum(len(prompt.vision["pixel_values"]) for prompt in prompts)


@every_family
@pytest.mark.parametrize("attention", ["shared", "mask"])
def test_a_prompt_and_its_images_are_computed_once(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    few = examples[1:2]
    [[P], rows] = lengths(toy_folder, few)
    count = counted(toy_folder, few, tmp_path, monkeypatch, num_generations=4, prefix_attention=attention)
    assert count.decodes == dict.fromkeys(few[0].images, 1)
    assert count.processor_runs == 1
    assert count.tower == [(rows, False)]
    assert count.prefill == [(1, P, False)]
    # The first token comes with the prefill, and nothing is asked of the last.
    assert count.decoded == 4 * (C - 1)
    assert count.packed == [(P - 1 + 4 * C, True)]


@pytest.mark.parametrize("G", [2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1])
def test_only_tokens_of_completions_grow_with_the_group(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, G: int, workers: int
) -> None:
    """Four prompts of 1, 2, 3 and 6 images in one step of one forward; workers decode in processes of their own."""
    P, rows = lengths(toy_folder, examples)
    options = {"prefix_attention": "shared", "dataloader_num_workers": workers}
    count = counted(toy_folder, examples, tmp_path, monkeypatch, num_generations=G, **options)
    images = [image for example in examples for image in example.images]
    assert count.decodes == (Counter() if workers else Counter(images))
    assert count.processor_runs == (0 if workers else 4)
    assert sum(rows for rows, _ in count.tower) == rows
    assert not any(grad for _, grad in count.tower)
    # Prompts of different lengths are padded to the longest.
    assert count.prefill == [(4, max(P), False)]
    assert count.decoded == 4 * G * (C - 1)
    assert count.packed == [(sum(P) - 4 + 4 * G * C, True)]


def test_the_reference_costs_one_packed_pass_more(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = examples[1:2]
    [[P], _] = lengths(toy_folder, few)
    count = counted(toy_folder, few, tmp_path, monkeypatch, num_generations=4, beta=0.04)
    assert count.packed == [(P - 1 + 4 * C, False), (P - 1 + 4 * C, True)]
    assert len(count.tower) == 1


def test_log_probabilities_of_the_sampling_policy_cost_a_pass_only_where_rollouts_are_reused(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = examples[1:2]
    [[P], _] = lengths(toy_folder, few)
    count = counted(toy_folder, few, tmp_path, monkeypatch, num_generations=4, num_iterations=2, max_steps=2)
    assert count.packed == [(P - 1 + 4 * C, False), (P - 1 + 4 * C, True), (P - 1 + 4 * C, True)]
    assert count.decodes == dict.fromkeys(few[0].images, 1)
    assert len(count.tower) == 1


def test_a_group_without_variance_costs_no_update(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counted(toy_folder, examples, tmp_path / "0", monkeypatch, num_generations=2, even=True).packed == []
    monkeypatch.undo()
    penalised = counted(toy_folder, examples, tmp_path / "1", monkeypatch, num_generations=2, even=True, beta=0.04)
    assert sum(grad for _, grad in penalised.packed) == 4  # short rows under a mask: one pass each
    assert len(penalised.packed) == 8


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_second_pass_over_kept_images_looks_at_none(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    _, rows = lengths(toy_folder, examples)
    count = counted(toy_folder, examples, tmp_path, monkeypatch, num_generations=2, max_steps=3, beta=beta, image_cache_mib=1)
    assert count.decodes == Counter(image for example in examples for image in example.images)
    assert count.processor_runs == 4
    assert sum(rows for rows, _ in count.tower) == rows
