"""Which libraries the verbs need beyond the base install, and how to get them: the extras of pyproject.toml.

Nothing is imported here; `doctor` looks at what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Extra:
    """A group of libraries that is installed together."""

    about: str
    """What cannot be done without it."""
    libraries: Mapping[str, str]
    """Distribution to the oldest version that will do."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Name to import, where it is not the distribution's."""

    def module(self, distribution: str) -> str:
        """What `import` calls it."""
        return self.modules.get(distribution, distribution)


BASE = Extra(
    "everything",
    {"jinja2": "3.1", "numpy": "1.26", "pillow": "10", "pydantic": "2.7", "pyyaml": "6", "rich": "13", "scipy": "1.11"},
    {"pillow": "PIL", "pyyaml": "yaml"},
)
"""What every install has."""

EXTRAS: Mapping[str, Extra] = {
    "train": Extra(
        "training, and sampling a model in this process",
        {
            "accelerate": "1.2",
            "datasets": "3",
            "matplotlib": "3.8",
            "peft": "0.17",
            "safetensors": "0.4",
            "tensorboard": "2.16",
            "torch": "2.6",
            "transformers": "5.18",
        },
    ),
    "serve": Extra("served teachers and models (teacher, judge, rollouts)", {"openai": "1.50"}),
    "eval": Extra("average precision of MC-Bench and OdinW", {"pycocotools": "2.0.7"}),
    "demo": Extra("the pages in the browser: demo and browse", {"gradio": "6"}),
    "loggers": Extra("loggers beside TensorBoard, where a recipe names one", {"trackio": "0.43", "wandb": "0.31"}),
}
"""By the name in brackets. Extras for those who work on polyground itself (dev, docs, fuzz) are not among them."""


def install_command(*names: str) -> str:
    """What installs these extras: from the checkout this runs from, else from the registry.

    >>> install_command("train").partition(" install ")[0] in ("pip", "uv pip")
    True
    """
    wanted = f"[{','.join(names)}]" if names else ""
    root = Path(__file__).parents[2]
    # An environment that uv made has no pip.
    pip = "pip" if find_spec("pip") is not None else "uv pip"
    return f"{pip} install -e '{root}{wanted}'" if (root / "pyproject.toml").is_file() else f"{pip} install 'polyground{wanted}'"


def extra_of(module: str) -> str | None:
    """The extra that brings a module, by the name it is imported under; None for one that no extra brings.

    >>> extra_of("torch"), extra_of("os")
    ('train', None)
    """
    return next((n for n, extra in EXTRAS.items() if module in {extra.module(d) for d in extra.libraries}), None)
