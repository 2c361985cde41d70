"""Stage `pretrain`: make the tiny base model that ships with the package, from random weights, on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from polyground.errors import ConfigError


class PretrainConfig(BaseModel):
    """The recipe of a tiny base."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    out: Path = Path("runs/tiny-base")
    """Where checkpoints and the finished model folder (`model/`) go."""
    seed: int = 0
    threads: int = 2
    """Sub-batches learned side by side, one core each; one worker process draws the scenes."""
    vision_steps: int = 400
    """Steps of the first phase: the vision tower alone, on the dense loss."""
    vision_scenes: int = 64
    """Scenes of a step of the first phase."""
    steps: int = 2000
    """Steps of the second phase: next tokens, and the dense loss at a small weight."""
    scenes: int = 28
    """Scenes drawn for a step of the second phase, shared by its samples."""
    samples: int = 32
    """Samples of a step of the second phase."""
    parts: int = 4
    """Sub-batches of a step, by length."""
    mix_listing: float = 0.45
    mix_finding: float = 0.20
    mix_several: float = 0.26
    mix_text: float = 0.07
    optimiser: Literal["muon", "adamw"] = "muon"
    """Muon learns the weight matrices inside the blocks; AdamW everything else, or everything."""
    vision_learning_rate: float = 2e-3
    """Peak of the first phase."""
    learning_rate: float = 3e-3
    """Peak of the second phase."""
    tower_share: float = 0.1
    """Share of it for the vision tower, which would otherwise forget the first phase."""
    warmup_steps: int = 30
    dense_weight: float = 0.3
    """Weight of the dense loss in the second phase."""
    max_grad_norm: float = 1.0
    held_out: int = 64
    """Held-out questions watched while training."""
    logging_steps: int = 50
    save_seconds: int = 180


def load_config(path: Path) -> PretrainConfig:
    """Read a recipe such as recipes/tiny-base.yaml; unknown keys are refused by name."""
    try:
        return PretrainConfig(**(yaml.safe_load(path.read_text()) or {}))
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a pretraining recipe ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def run(config: PretrainConfig, report: Any = None) -> dict[str, Any]:
    """Train from scratch, or go on from the last checkpoint under `out`; returns the last point of the curve."""
    import torch

    from polyground.training.pretrain import Trainer
    from polyground.training.tiny_base import write_folder

    torch.set_num_threads(config.threads)
    folder = config.out / "model"
    if not (config.out / "last.pt").exists():
        write_folder(folder, seed=config.seed)
    trainer = Trainer(config, model_folder=folder, work=config.out)
    trainer.resume()
    trainer.run(report)
    record = {"recipe": config.model_dump(mode="json", exclude={"out"}), "curve": trainer.curve}
    (config.out / "tiny-base.json").write_text(json.dumps(record, indent=1) + "\n")
    return trainer.curve[-1] if trainer.curve else {}
