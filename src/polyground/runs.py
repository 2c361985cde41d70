"""What the folder of a run says of itself: its models, the base it started from, and how they were asked while trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyground.storage import MANIFEST, STATE, read_json

ROLES = {"base": None, "sft": "sft-merged", "rl": "grpo-merged"}
"""The models of a run in the order they are made, and the folder of each; the base lies where the recipe said."""

STAGES = ("world", "synthesize", "sft", "sft-merged", "reject", "grpo", "grpo-merged", *(f"evaluate/{role}" for role in ROLES))
"""Folders of a run, in the order they are made."""


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run, rather than of a model or of data."""
    if (path / "config.json").exists():
        return False
    return any((path / name).is_dir() for name in (*STAGES, "evaluate"))


def noted(run: Path, section: str) -> Mapping[str, Any]:
    """A section of the recipe (`prompts`, `model`) as the first stage has it that noted it; empty where none did yet.

    Raises DataError for a note that cannot be read.
    """
    for stage in STAGES:
        for name in (MANIFEST, STATE):
            if (run / stage / name).is_file():
                found = read_json(run / stage / name).get("config", {}).get(section)
                if isinstance(found, Mapping) and found:
                    return found
    return {}


def base_of(run: Path) -> str | None:
    """The model that the run started from, as its stages noted it; None where none did yet."""
    path = noted(run, "model").get("path")
    return None if path is None else str(path)
