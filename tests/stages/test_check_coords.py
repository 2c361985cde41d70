"""Facts about `polyground check-coords`: boxes that come back say so, boxes read on another grid are exposed, with the cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyground.cli import main
from polyground.stages.check_coords import GOOD, OFF, TRUTH

PIXEL_FAMILY = {
    "model_type": "qwen2_5_vl",
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
}
PER_MILLE_FAMILY = {"model_type": "qwen3_vl", "vision_config": {"patch_size": 16, "spatial_merge_size": 2}}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({**PIXEL_FAMILY, "model_type": "qwen2_vl"}, {"patch_size": 14, "merge_size": 2}),
    "qwen2_5_vl": (PIXEL_FAMILY, {"patch_size": 14, "merge_size": 2}),
    "qwen3_vl": (PER_MILLE_FAMILY, {"patch_size": 16, "merge_size": 2}),
    "internvl": ({"model_type": "internvl", "vision_config": {"image_size": 448, "patch_size": 14}}, {}),
    "smolvlm": ({"model_type": "smolvlm", "vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3}, {}),
}


def folder_of(path: Path, model_type: str) -> Path:
    """The two small files of a model folder: no weights are needed."""
    config, processor = FAMILIES[model_type]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def row(question: str = "Find the cup in image-2.", answer: Any = (0.25, 0.5, 0.5, 0.75), **changes: Any) -> dict[str, Any]:
    return {"task": "diff", "images": ["a.png", "b.png"], "question": question, "answer": list(answer), **changes}


def write_annotation(folder: Path, *rows: dict[str, Any]) -> Path:
    """MIG-Bench's layout, on a wide and a high image."""
    Image.new("RGB", (640, 427), "grey").save(folder / "a.png")
    Image.new("RGB", (300, 500), "black").save(folder / "b.png")
    path = folder / "MIG_data.json"
    path.write_text(json.dumps(list(rows)))
    return path


def check(path: Path, model: Path | str, out: Path, *options: str) -> int:
    command = ["check-coords", "--source", "mig_bench", "--path", str(path), "--model", str(model), "--out", str(out)]
    return main([*command, *options])


def shows(picture: Path, colour: str) -> bool:
    """Whether so much as a line of this colour is in the picture."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    return int((np.abs(pixels - (red, green, blue)).sum(-1) < 12).sum()) > 200


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_boxes_of_every_family_come_back_within_the_rounding_of_its_grid(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(tmp_path / "model", model_type)
    asked = "Find <|box_start|>(100,200),(300,400)<|box_end|> of image-1 in image-2."
    path = write_annotation(tmp_path, row(), row(asked, task="object_tracking"))
    assert check(path, model, tmp_path / "out.png") == 0
    shown = capsys.readouterr().out
    assert "every box comes back within the rounding of its grid" in shown
    assert "mig_bench/object_tracking/0 (asked)  1 of 2" in shown
    assert "WARNING" not in shown
    assert shows(tmp_path / "out.png", TRUTH)
    assert shows(tmp_path / "out.png", GOOD)


def test_the_numbers_are_those_of_the_grid_of_the_image_as_processed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(tmp_path / "model", "qwen2_5_vl")
    path = write_annotation(tmp_path, row())
    assert check(path, model, tmp_path / "out.png") == 0
    # 300 x 500 becomes 308 x 504: whole tokens of 28 pixels.
    line = next(line for line in capsys.readouterr().out.splitlines() if "mig_bench/diff/0" in line and "2 of 2" in line)
    assert " ".join(line.split()) == ("mig_bench/diff/0 2 of 2 300 x 500 308 x 504 75 250 150 375 77 252 154 378 1.000 0.0 px")


def test_a_pixel_budget_is_shared_by_the_images_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(tmp_path / "model", "qwen2_5_vl")
    path = write_annotation(tmp_path, row())
    assert check(path, model, tmp_path / "out.png", "--max-pixels-total", "100000") == 0
    # 50,000 pixels for each: 168 x 280 is the largest of whole tokens.
    assert "168 x 280" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "grid", "cause"),
    [
        pytest.param("qwen2_5_vl", "per_mille", "written on 308 x 504, read on 1000 x 1000", id="pixels-read-per-mille"),
        pytest.param("qwen2_5_vl", "pixels", "written on 308 x 504, read on 300 x 500", id="resized-pixels-read-as-original"),
        pytest.param("qwen3_vl", "pixels", "written on 1000 x 1000, read on 300 x 500", id="per-mille-read-as-pixels"),
        pytest.param("qwen3_vl", "per_mille_yxyx", "axis order: boxes are written x0 y0 x1 y1 and read y0 x0 y1 x1", id="axes"),
    ],
)
def test_another_grid_is_exposed_with_its_cause_in_words_and_in_red(
    model_type: str, grid: str, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(tmp_path / "model", model_type)
    path = write_annotation(tmp_path, row())
    assert check(path, model, tmp_path / "out.png", "--grid", grid) == 2
    shown = capsys.readouterr().err
    assert "1 of 1 examples do not come back: boxes are read on the wrong grid" in shown
    assert cause in shown
    assert shows(tmp_path / "out.png", OFF)


def test_an_error_of_a_few_pixels_is_found_although_its_iou_is_high(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(tmp_path / "model", "qwen2_5_vl")
    path = write_annotation(tmp_path, row(answer=(0.2, 0.2, 0.9, 0.9)))
    assert check(path, model, tmp_path / "out.png", "--grid", "pixels") == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if "mig_bench/diff/0" in line)
    assert float(line.split()[-7]) > 0.9


def test_a_box_smaller_than_the_grid_can_say_is_called_coarse_and_not_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(tmp_path / "model", "qwen2_5_vl")
    path = write_annotation(tmp_path, row(answer=(0.5, 0.5, 0.517, 0.511)))
    assert check(path, model, tmp_path / "out.png", "--max-pixels-total", "40000") == 0
    shown = capsys.readouterr().out
    assert "WARNING coarse: rounding alone brings 1 of 1 examples below IoU 0.9" in shown
    assert "a larger pixel budget makes it finer" in shown


def test_an_annotation_in_one_corner_of_every_image_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"Find object {n} in image-2.", (n / 1000, 0.1, 0.3 + n / 1000, 0.4)) for n in range(20)]
    path = write_annotation(tmp_path, *rows)
    assert check(path, "tiny", tmp_path / "out.png", "--n", "1") == 0
    assert "all 20 boxes of the file lie in the upper left 32% x 40% of their images" in capsys.readouterr().out


def test_rows_without_a_drawable_box_are_counted_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotation(tmp_path, row("Find the cup."), row(answer=(0.5, 0.5, 0.25, 0.75)), row("Find a dish in image-1."))
    assert check(path, "tiny", tmp_path / "out.png") == 0
    shown = capsys.readouterr().out
    assert "1 of 3 rows" in shown
    assert "left out: 1 that do not say which image, 1 inverted" in shown


def test_the_seed_decides_which_examples_are_drawn_and_tasks_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(f"Find object {n} in image-2.", task="diff" if n < 90 else "region") for n in range(100)]
    path = write_annotation(tmp_path, *rows)
    drawn = []
    for seed in ("0", "0", "1"):
        assert check(path, "tiny", tmp_path / "out.png", "--n", "4", "--seed", seed) == 0
        drawn.append([line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  mig_bench/")])
    assert drawn[0] == drawn[1] != drawn[2]
    assert [key.split("/")[1] for key in drawn[0]] == ["diff", "diff", "region", "region"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--out", "x.gif"], "a picture ends in .png or .jpg", id="ending"),
        pytest.param(["--out", "x.png"], "give a recipe and a split, or --source", id="nothing-to-draw"),
        pytest.param(["--out", "x.png", "--n", "0"], "--n 0", id="none"),
        pytest.param(["--out", "x.png", "--source", "mig_bench", "--path", "m.json"], "--model FOLDER", id="no-model"),
        pytest.param(["recipe.yaml", "--out", "x.png"], "which split of recipe.yaml", id="no-split"),
        pytest.param(
            ["--out", "x.png", "--source", "mig_bnech", "--path", "m.json", "--model", "tiny"],
            "did you mean 'mig_bench'",
            id="source",
        ),
    ],
)
def test_a_command_that_lacks_something_says_what(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-coords", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_image_is_named_with_its_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotation(tmp_path, row())
    (tmp_path / "b.png").unlink()
    assert check(path, "tiny", tmp_path / "out.png") == 2
    assert "mig_bench/diff/0" in (shown := capsys.readouterr().err)
    assert "b.png: no such image" in shown


def test_a_split_of_a_recipe_is_drawn_with_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    world = "world: {train: 0, rl: 0, validation: 0, test: 3, ood: 0, perception: 0}"
    recipe.write_text(f"out: {tmp_path / 'run'}\n{world}\n")
    out = tmp_path / "out.png"
    assert main(["check-coords", str(recipe), "test", "--out", str(out)]) == 2
    assert "run `polyground world`" in capsys.readouterr().err
    assert main(["world", str(recipe)]) == 0
    assert main(["check-coords", str(recipe), "test", "--out", str(out)]) == 0
    assert "3 of 3 rows" in capsys.readouterr().out
    assert out.stat().st_size > 10_000
    assert main(["check-coords", str(recipe), "tset", "--out", str(out)]) == 2
    assert "no split 'tset'" in (shown := capsys.readouterr().err)
    assert "its splits: test" in shown
