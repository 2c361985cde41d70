"""A whole run of the figure, small enough for a test: a random toy model, a dozen questions, one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from toys import write_toy

VARIETY = '''
def variety(reading, example, completion):
    """Share of different characters: a random model is never right, and RL needs rewards that differ."""
    return len(set(completion.text)) / max(1, len(completion.text))
'''

LORA = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lora_r": 2,
    "lora_alpha": 4,
    "logging_steps": 1,
    "save_steps": 1,
}


def write_recipe(folder: Path, *, out: Path, model: Path) -> Path:
    """A recipe file; the reward function lies beside it."""
    (folder / "variety.py").write_text(VARIETY, encoding="utf-8")
    tree = {
        "name": "toy",
        "out": str(out),
        "model": {"path": str(model)},
        "prompts": {"instruction": ""},
        "world": {"train": 10, "rl": 4, "validation": 0, "test": 4, "ood": 1, "perception": 0},
        "rewards": [{"name": "iou", "weight": 0.5}, {"name": f"{folder / 'variety.py'}:variety", "weight": 0.5}],
        "sft": {**LORA, "max_steps": 3, "report_to": []},
        "reject": {"num_generations": 2, "max_completion_length": 8, "min_pass_rate": None, "max_pass_rate": None, "batch": 2},
        "grpo": {**LORA, "max_steps": 3, "num_generations": 2, "max_completion_length": 8, "beta": 0.0, "report_to": []},
        "evaluate": {"max_completion_length": 8, "batch_size": 2, "bootstrap": 20},
        "report": {"gallery_size": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def toy_run(tmp_path: Path) -> Callable[[str], Path]:
    """Runs the whole figure with a toy model of the given type and returns the run's folder."""

    def run(model_type: str) -> Path:
        from polyground.cli import main

        write_toy(tmp_path / "model", model_type)
        recipe = write_recipe(tmp_path, out=tmp_path / "run", model=tmp_path / "model")
        assert main(["run", str(recipe)]) == 0
        return tmp_path / "run"

    return run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy model (`model`) and a recipe (`recipe.yaml`) whose run has not begun (`run`)."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder / "model")
    write_recipe(folder, out=folder / "run", model=folder / "model")
    return folder


@pytest.fixture(scope="session")
def finished(toy: Path) -> Path:
    """The folder of the same run, undisturbed, from world to report."""
    from polyground.cli import main

    assert main(["run", str(toy / "recipe.yaml")]) == 0
    return toy / "run"
