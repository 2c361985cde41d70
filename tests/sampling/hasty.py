"""A family whose completions end early, and prompts of several lengths, for the tests of decoding."""

from pathlib import Path
from typing import Any

import torch

from polyground.models import Family, Loaded
from polyground.records import Message
from toys import plain_inputs, write_image


class Hasty:
    """A family one in `every` of whose tokens ends a completion, so that rows leave the batch at different steps."""

    def __init__(self, family: Family, *, every: int = 4) -> None:
        self._family = family
        self.stop_token_ids = (*family.stop_token_ids, *range(0, 256, every))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


def ragged_prompts(folder: Path) -> list[list[Message]]:
    """Four prompts, of no image to three."""
    square, wide = write_image(folder / "square.png"), write_image(folder / "wide.png", "blue", width=84)
    tall = write_image(folder / "tall.png", "white", height=84)
    return [
        [Message("user", (square, "where?"))],
        [Message("user", ("Image 1: ", square, "Image 2: ", wide, "which of the two?"))],
        [Message("user", (square, wide, tall, "and here"))],
        [Message("user", ("no image",))],
    ]


def generated(loaded: Loaded, messages: list[Message], *, max_tokens: int, **options: Any) -> list[list[int]]:
    """What transformers' own `generate` says of one prompt, from its pixels; greedy unless told otherwise."""
    prompt = loaded.family.encode(messages)
    output = loaded.model.generate(
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        suppress_tokens=list(loaded.family.banned_token_ids),
        eos_token_id=list(loaded.family.stop_token_ids),
        pad_token_id=loaded.family.pad_token_id,
        **{"do_sample": False} | options,
        **plain_inputs(loaded, prompt),
    )
    return [row[len(prompt) :].tolist() for row in output]
