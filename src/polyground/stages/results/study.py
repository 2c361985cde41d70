"""A study: one base recipe, its arms (what each changes, and why), the seeds, and the margins it is held to.

A study is a YAML file beside the recipes. Every (arm, seed) becomes an ordinary recipe with a run folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from polyground.config import Recipe, Section, explain, load_recipe, read_yaml
from polyground.errors import ConfigError

PAIRS = ("rl-sft", "rl-base", "sft-base")
"""Differences told, second minus first as in `rl-sft`: RL minus SFT."""


class Target(Section):
    """A margin that a difference is held to: the mean reaches it, and its interval lies above zero."""

    headline: str = Field(min_length=1)
    """A split (`test`, `perception_blink`) or a group of splits (`ood (all)`)."""
    difference: Literal["rl-sft", "rl-base", "sft-base"]
    """Of which two models."""
    points: float
    """In percentage points."""


class Arm(Section):
    """One way to run the recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Names its folder."""
    shows: str = Field(min_length=1)
    """One sentence: which question it answers."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe, dotted or nested, in addition to the study's own."""
    model: Literal["base", "sft", "rl"] = "rl"
    """Which of its models is compared with the baseline's."""
    seeds: list[int] | None = Field(default=None, min_length=1)
    """Instead of the study's."""


class Study(Section):
    """Arms over seeds, and where their runs and their tables go."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Names the files that are written: NAME.json, NAME.md, NAME.png."""
    title: str = ""
    """Heading of the page."""
    recipe: Path
    """The base recipe; a relative path starts at the study file."""
    out: Path
    """Runs are in OUT/ARM/seed-N; a relative path starts at the working directory."""
    docs: Path = Path("docs/results")
    """Folder of the tables; a relative path starts at the working directory."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """They vary synthesis, training and sampling; the simulated world, and with it every test, stays the same."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe for all arms."""
    baseline: str = "full"
    """The arm the others are compared with; what they have in common with it they take over from its runs."""
    bootstrap: int = Field(default=2000, ge=0)
    """Resamples behind each interval."""
    targets: list[Target] = Field(default_factory=list)
    """What the baseline is held to."""
    arms: list[Arm] = Field(min_length=1)
    """The first is run first."""

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("needs different seeds, none below 0")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each arm needs a name of its own; repeated: {', '.join(repeated)}")
        if self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is none of the arms ({', '.join(names)})")
        return self

    def arm(self, name: str) -> Arm:
        """The arm of this name, which has to be there."""
        return next(arm for arm in self.arms if arm.name == name)

    def seeds_of(self, arm: Arm) -> list[int]:
        """Its own seeds, or else those of the study."""
        return self.seeds if arm.seeds is None else arm.seeds

    def folder(self, arm: Arm, seed: int) -> Path:
        """The run folder of one arm and seed."""
        return self.out / arm.name / f"seed-{seed}"

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every arm of the first seed, then of the next, the baseline ahead of what shares with it."""
        arms = sorted(self.arms, key=lambda arm: arm.name != self.baseline)
        seeds = list(dict.fromkeys([*self.seeds, *(seed for arm in arms for seed in self.seeds_of(arm))]))
        return ((arm, seed) for seed in seeds for arm in arms if seed in self.seeds_of(arm))


def load_study(path: Path | str) -> Study:
    """The study of a file, every arm's recipe checked. Raises ConfigError naming file, arm and key.

    With `extends: other.yaml` it has all that the other file says, its own keys instead of the other's, and the arms of both.
    """
    path = Path(path)
    tree = _read(path)
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, path, Study)) from error
    for arm in study.arms:
        recipe_of(study, arm, study.seeds_of(arm)[0], where=path)
    return study


def recipe_of(study: Study, arm: Arm, seed: int, *, where: Path | str = "study") -> Recipe:
    """The recipe of one run. Of an arm other than the baseline only the model compared answers, unless it says otherwise."""
    changes = {**flattened(study.overrides), **flattened(arm.overrides)}
    if arm.name != study.baseline:
        changes.setdefault("evaluate.models", [arm.model])
    baseline = study.arm(study.baseline)
    others = [study.folder(baseline, seed), study.folder(baseline, study.seeds_of(baseline)[0])]
    own = {
        "name": f"{study.name} {arm.name} seed {seed}",
        "out": str(study.folder(arm, seed)),
        "seed": seed,
        "reuse": [str(folder) for folder in dict.fromkeys(others) if folder != study.folder(arm, seed)],
    }
    if kept := sorted(own.keys() & changes.keys()):
        raise ConfigError(f"{where}: arm {arm.name!r}: {kept[0]} is set by the study itself; leave it out of the overrides")
    try:
        return load_recipe(study.recipe, [f"--{key}={json.dumps(value)}" for key, value in {**changes, **own}.items()])
    except ConfigError as error:
        raise ConfigError(f"{where}: arm {arm.name!r}: {error}") from error


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are values.

    >>> flattened({"grpo": {"beta": 0.04}, "world.test": 1000})
    {'grpo.beta': 0.04, 'world.test': 1000}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    tree = read_yaml(path, "study")
    if isinstance(tree.get("recipe"), str):
        tree["recipe"] = str(path.parent / tree["recipe"])
    extended = tree.pop("extends", None)
    if extended is None:
        return tree
    other = path.parent / str(extended)
    if other in seen or other == path:
        raise ConfigError(f"{path}: extends {extended}, which extends it in turn; take one of the two out")
    ground = _read(other, (*seen, path))
    arms = [*(ground.get("arms") or []), *(tree.get("arms") or [])]
    return {**ground, **tree, "arms": arms}
