"""Ask a model about several image files and see the box: the answer in pixels of the original files, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyground.grounder import open_grounder
from polyground.vision import check_images


def ground(
    model: Path | str,
    images: Sequence[Path],
    *,
    question: str,
    role: str | None = None,
    instruction: str | None = None,
    out: Path | None = None,
    max_tokens: int = 256,
    dtype: str = "auto",
    temperature: float = 0.0,
    seed: int = 0,
) -> Mapping[str, Any]:
    """Load the model, ask once, and give the first box as `image` and `box`, all of them as `boxes`, beside the raw text.

    Boxes are `[x0, y0, x1, y1]` in pixels of the file; `image` is 1-based, null where the answer does not name one.
    `out` receives the images side by side with the boxes drawn.
    """
    check_images(images)  # before a large model is loaded
    grounder = open_grounder(model, role=role, instruction=instruction, dtype=dtype)
    reply = grounder.ground(list(images), question, max_tokens=max_tokens, temperature=temperature, seed=seed)
    if out is not None:
        reply.save(out)
    return reply.to_json()
