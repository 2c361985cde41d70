"""Reinforcement-learning post-training for multi-image grounding (after arXiv 2507.00748).

`polyground.load("tiny").ground(["a.png", "b.png"], "Find the red star.")` asks a model; all else is in the modules. Importing
this package costs nothing: a model's libraries are imported when one is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from polyground.grounder import Grounder

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    path: Path | str,
    *,
    role: str | None = None,
    instruction: str | None = None,
    max_pixels_total: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Grounder:
    """A model, opened for asking: `tiny`, a model folder, or the folder of a run.

    Args:
        path: `tiny` for the packaged base, a folder in the Hugging Face layout, or a run's `out`.
        role: Of a run: `base`, `sft` or `rl`. By default the last one that is there.
        instruction: What follows every question. By default what the run was trained with, and nothing for other folders.
        max_pixels_total: Pixels that the images of one question share. By default as in training, else the folder's limit.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the precision the weights are stored in.
        device: Such as `cuda:1`. By default a GPU where there is one, else the CPU.

    Raises:
        ModelError: The folder holds no model that can be used; the message says why and what to do.
        StorageError: The run has no such model yet, or a damaged one.
    """
    from polyground.grounder import open_grounder

    return open_grounder(path, role=role, instruction=instruction, max_pixels_total=max_pixels_total, dtype=dtype, device=device)
