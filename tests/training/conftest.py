"""A toy model and examples with ragged image counts, for the trainers."""

from pathlib import Path

import pytest
import torch

from polyground.answer import Answer, Located
from polyground.geometry import Box
from polyground.models import Loaded, load_model
from polyground.records import Example
from toys import write_image, write_toy

IMAGE_COUNTS = (1, 2, 3, 6)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Qwen3-VL, unless a test names the model type (`families`)."""
    return write_toy(tmp_path_factory.mktemp("toy") / "model", getattr(request, "param", "qwen3_vl"))


@pytest.fixture
def toy(toy_folder: Path) -> Loaded:
    return load_model(toy_folder)


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("images")
    images = [
        write_image(folder / f"{i}.png", colour, width=56 + 28 * (i % 2))
        for i, colour in enumerate(("red", "blue", "pink", "cyan", "gray", "gold"))
    ]
    return [
        Example(
            key=f"e{count}",
            task="region" if count < 3 else "diff",
            images=tuple(images[:count]),
            question=f"where? {count}",
            target=Answer((Located(1, Box(0, 0, 0.5, 0.5)),)),
        )
        for count in IMAGE_COUNTS
    ]
