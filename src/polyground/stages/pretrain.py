"""Stage `pretrain`: make the tiny base model that ships with the package, from random weights, on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from polyground.answer import Answer, read_answer
from polyground.errors import ConfigError
from polyground.geometry import PER_MILLE, Box, iou
from polyground.records import Message
from polyground.worlds.scenes import describe, render, sample_scene


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
    mix_naming: float = 0.0
    """The objects of one image named in words."""
    mix_choosing: float = 0.0
    """Multiple choices about one image, answered by a letter."""
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
    box_weight: float = 20.0
    """Weight, in the second phase, of the distance of boxes read linearly off tokens that open them or name their object."""
    gaze_weight: float = 1.0
    """Weight, in the second phase, of how little one head looks at the object that a token is about."""
    max_grad_norm: float = 1.0
    held_out: int = 256
    """Held-out questions watched while training."""
    measured: int = 200
    """Held-out questions of each kind answered freely at the end."""
    logging_steps: int = 50
    save_seconds: int = 180
    changes: dict[int, dict[str, int | float]] = {}
    """Other values of keys from a step on, counted over both phases: `{2000: {mix_listing: 0.3}}`."""

    @model_validator(mode="after")
    def _changes_are_of_keys(self) -> PretrainConfig:
        for step in self.changes:
            self.at(step)
        return self

    def at(self, step: int) -> PretrainConfig:
        """The recipe as it stands at a step. Raises ValidationError for a change of an unknown key."""
        keys = {key: value for at, keys in sorted(self.changes.items()) if at <= step for key, value in keys.items()}
        return PretrainConfig(**(self.model_dump(exclude={"changes"}) | keys)) if keys else self


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
    measured = measure(folder, count=config.measured, seed=config.seed)
    record = {"recipe": config.model_dump(mode="json", exclude={"out"}), "measured": measured, "curve": trainer.curve}
    (config.out / "tiny-base.json").write_text(json.dumps(record, indent=1) + "\n")
    return {**trainer.curve[-1], **measured} if trainer.curve else measured


def measure(folder: Path, *, count: int, seed: int) -> dict[str, float]:
    """Share of objects found at IoU of at least 0.5, answering freely and greedily, on scenes never trained on.

    `one_image`: find an object in one image; `unseen_pair`: the same, of a colour-shape pair never trained on; `one_of_three`:
    find an object in the image of three that the question names, as in pretraining.
    """
    from polyground.models import load_model
    from polyground.sampling.local import LocalSampler

    sampler = LocalSampler(load_model(folder))
    rng = Random(f"measure/{seed}")
    shares = {}
    with TemporaryDirectory() as drawn:
        for kind, images in (("one_image", 1), ("unseen_pair", 1), ("one_of_three", 3)):
            asked = [_finding(rng, Path(drawn) / f"{kind}-{k}", images, unseen=kind == "unseen_pair") for k in range(count)]
            answers = sampler.sample([messages for messages, _ in asked], n=1, temperature=0.0, max_tokens=64, seed=seed)
            shares[kind] = round(mean(_found(one.text, truth) for [one], (_, truth) in zip(answers, asked, strict=True)), 4)
    return shares


def _finding(rng: Random, stem: Path, images: int, *, unseen: bool) -> tuple[list[Message], Box]:
    """A conversation that asks for one object, and where it lies."""
    scenes = [sample_scene(rng, pairs="held_out" if unseen else "seen") for _ in range(images)]
    paths = [stem.with_name(f"{stem.name}-{n}.png") for n in range(1, images + 1)]
    for scene, path in zip(scenes, paths, strict=True):
        render(scene).save(path)
    n = rng.randint(1, images)
    scene = scenes[n - 1]
    item = rng.choice([item for item in scene.items if item.look.held_out == unseen])
    phrase = describe(item, scene)
    if images == 1:
        return [Message("user", (paths[0], f"\nFind the {phrase}."))], item.box
    parts: list[str | Path] = []
    for k, path in enumerate(paths, start=1):
        parts += [f"Image {k}: ", path, "\n"]
    return [Message("user", (*parts[:-1], f"\nFind the {phrase} in image {n}."))], item.box


def _found(text: str, truth: Box) -> bool:
    answer = read_answer(text, [PER_MILLE], native="qwen_json")
    return isinstance(answer, Answer) and bool(answer.boxes) and iou(answer.boxes[0].box, truth) >= 0.5
