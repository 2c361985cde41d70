"""What the splits of a recipe's own data are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyground.config import Recipe
from polyground.stages import evaluation_splits, own_splits, split_identity


def source(path: str, **options: Any) -> dict[str, Any]:
    return {"source": "odinw", "path": path, "options": options}


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        pytest.param([source("a/lisa_val.json")], ["ood_lisa_val"], id="after-the-file"),
        pytest.param([source("a/coco.json", name="aquarium")], ["ood_aquarium"], id="after-the-option"),
        pytest.param([source("a/coco.json"), source("b/coco.json")], ["ood_coco", "ood_coco_1"], id="twice-the-same-file-name"),
        pytest.param([source("hub:BLINK-Benchmark/BLINK:val")], ["ood_BLINK_val"], id="a-name-that-can-be-a-file"),
    ],
)
def test_every_file_of_a_group_is_a_benchmark_of_its_own(sources: list[dict[str, Any]], names: list[str]) -> None:
    recipe = Recipe.model_validate({"data": {"ood": sources}, "world": {"test": 0, "ood": 0, "perception": 0}})
    assert list(own_splits(recipe)) == evaluation_splits(recipe) == names


def test_another_place_for_the_images_is_the_same_data(tmp_path: Path) -> None:
    def identity(**options: Any) -> Any:
        recipe = Recipe.model_validate({"data": {"rl": [source(str(tmp_path / "coco.json"), **options)]}})
        return split_identity(recipe, "rl")

    here = identity(images_root="/here", every=2)
    assert identity(images_root="/there", strip_prefix="/x", check_images="decode", every=2) == here
    assert identity(images_root="/here", every=3) != here
