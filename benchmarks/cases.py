"""What every arm is given: the same pictures, question, completions and advantages."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polyground.models import Family, Prompt
from polyground.records import Message

QUESTION = "In which of these images is the object that the others lack, and where is it? Answer with a box."


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of a sweep."""

    images: int
    """Of the prompt; of the first one where there are several."""
    groups: int
    """Completions per prompt: G."""
    completion: int
    """Tokens per completion: C."""
    side: int = 448
    """Pixels of a side of each image."""
    prompts: int = 1
    """Of one step; each further one has one image less, so that image counts are ragged."""
    ragged: bool = False
    """Lengths between C / 2 and C instead of C each."""

    def name(self) -> str:
        more = (f" x {self.prompts} prompts" if self.prompts > 1 else "") + (" ragged" if self.ragged else "")
        return f"{self.images} x {self.side} px, G {self.groups}, C {self.completion}{more}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One optimiser step before anything of it is computed."""

    cell: Cell
    messages: list[list[Message]]
    """One conversation per prompt."""
    images: list[list[Path]]
    prompts: list[Prompt]
    """The same as tensors, to lay out rows by; an arm whose step includes this work does it again."""
    completions: list[list[list[int]]]
    """[prompts][G] token ids, the same for all arms, whatever their rollouts gave."""
    advantages: list[list[float]]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(completion) for group in self.completions for completion in group)


def build_case(cell: Cell, family: Family, folder: Path, *, seed: int = 0) -> Case:
    """Random pictures, text and numbers, the same for a cell and a seed."""
    rng = random.Random(f"{seed}/{cell.name()}")
    counts = [max(1, cell.images - i) for i in range(cell.prompts)]
    images = [write_images(folder, count, side=cell.side, seed=f"{seed}-{i}") for i, count in enumerate(counts)]
    messages = [[Message("user", (*paths, QUESTION))] for paths in images]
    # Ids of single bytes: no special token, whatever the vocabulary.
    completions = [[[rng.randrange(32, 250) for _ in range(_length(cell, rng))] for _ in range(cell.groups)] for _ in counts]
    return Case(
        cell=cell,
        messages=messages,
        images=images,
        prompts=[family.encode(message) for message in messages],
        completions=completions,
        advantages=[[rng.gauss(0, 1) for _ in range(cell.groups)] for _ in counts],
    )


def write_images(folder: Path, count: int, *, side: int, seed: str) -> list[Path]:
    """JPEG files with coarse structure and some noise, so that decoding costs about what a photograph costs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{side}-{seed}-{i}.jpg" for i in range(count)]
    for path in paths:
        if not path.is_file():
            numbers = np.random.default_rng([*path.name.encode()])
            coarse = Image.fromarray(numbers.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((side, side))
            noise = numbers.normal(0, 8, (side, side, 3))
            Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def _length(cell: Cell, rng: random.Random) -> int:
    return rng.randint(max(1, cell.completion // 2), cell.completion) if cell.ragged else cell.completion
