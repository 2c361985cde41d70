"""What synthesis teaches and what it drops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from polyground.answer import Answer, Located
from polyground.config import Recipe, RewardConfig, SynthesizeConfig, WorldConfig
from polyground.conventions import GRIDS
from polyground.errors import ConfigError
from polyground.geometry import Box
from polyground.records import Completion, Example, answer_from_json
from polyground.rewards import Scorer
from polyground.stages import synthesize, world
from polyground.stages.synthesize import ask_of, teacher_grids
from polyground.storage import read_rows
from polyground.teaching import mentions_coordinates
from toys import write_image

LEFT = Box(0.0, 0.0, 0.5, 1.0)
EXAMPLE = Example(key="e", task="find", images=(Path("a.png"), Path("b.png")), question="?", target=Answer((Located(2, LEFT),)))
SCORER = Scorer([RewardConfig(name="iou")])


def small(out: Path, **options: object) -> Recipe:
    sizes = WorldConfig(train=20, rl=0, validation=0, test=0, ood=0, perception=0)
    return Recipe(out=out, world=sizes, synthesize=SynthesizeConfig(error_rate=0.5, **options))


def test_an_erring_teacher_is_filtered_and_every_drop_has_its_reason(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    world.run(recipe)
    summary = synthesize.run(recipe)
    kept, rejected = (list(read_rows(tmp_path / "synthesize" / f"{name}.jsonl")) for name in ("kept", "rejected"))
    assert summary["kept"] == len(kept)
    assert sum(summary["dropped"].values()) == len(rejected) > 0
    assert len(kept) + len(rejected) == summary["asked"] == 20
    for row in kept:
        assert answer_from_json(row["answer"]) == Example.from_json(row).target
        assert not mentions_coordinates(row["reasoning"])
        assert row["teacher"] == "scripted"
        assert row["score"]["iou"] >= 0.5


def test_a_cut_synthesis_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    whole, cut = small(tmp_path / "whole"), small(tmp_path / "cut")
    for recipe in (whole, cut):
        world.run(recipe)
        synthesize.run(recipe)
    folder = tmp_path / "cut" / "synthesize"
    (folder / "manifest.json").unlink()
    lines = (folder / "kept.jsonl").read_text().splitlines(keepends=True)
    (folder / "kept.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    synthesize.run(cut)
    rows = [
        [{**row, "images": None} for row in read_rows(tmp_path / name / "synthesize" / "kept.jsonl")] for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_a_scripted_teacher_refuses_data_it_does_not_know(tmp_path: Path) -> None:
    annotation = tmp_path / "mine.jsonl"
    recipe = Recipe.model_validate(
        {"out": tmp_path, "data": {"train": [{"source": "mig_bench", "path": annotation}]}, "synthesize": {"teacher": "scripted"}}
    )
    with pytest.raises(ConfigError, match="scripted"), synthesize.open_teacher(recipe, "train", []):
        pass


def test_a_placeholder_is_told_before_anybody_is_asked(tmp_path: Path) -> None:
    options = {"teacher": "endpoint", "teacher_base_url": "https://teacher.example/v1", "teacher_model": "the-teacher"}
    recipe = Recipe.model_validate({"out": tmp_path, "synthesize": options})
    with pytest.raises(ConfigError, match="still the placeholder"), synthesize.open_teacher(recipe, "train", []):
        pass


SEEN = {"a.png": (140, 280), "b.png": (560, 280)}
"""Width and height of two pictures, all multiples of 28."""


def pictures(folder: Path) -> tuple[Path, ...]:
    return tuple(write_image(folder / name, width=width, height=height) for name, (width, height) in SEEN.items())


def model_served(folder: Path, model_type: str) -> Path:
    """The small files of a model folder; no weights are needed to know how it writes boxes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14, "merge_size": 2, "size": size}))
    return folder


@pytest.mark.parametrize(
    ("grid", "budget", "written", "told"),
    [
        pytest.param("per_mille", None, [0, 0, 500, 1000], "x runs from 0 to 1000 and y from 0 to 1000", id="per-mille"),
        pytest.param("per_mille_yxyx", None, [0, 0, 1000, 500], "[y0, x0, y1, x1]", id="y-first"),
        pytest.param("pixels", None, [0, 0, 280, 280], "on image 2, x runs from 0 to 560 and y from 0 to 280", id="pixels"),
        pytest.param("qwen2_5_vl", None, [0, 0, 280, 280], "on image 2, x runs from 0 to 560 and y from 0 to 280", id="own-grid"),
        pytest.param("qwen2_5_vl", 2 * 280 * 140, [0, 0, 140, 140], "2, x runs from 0 to 280 and y from 0 to 140", id="budget"),
        pytest.param("qwen3_vl", 2 * 280 * 140, [0, 0, 500, 1000], "x runs from 0 to 1000", id="own-grid-is-per-mille"),
    ],
)
def test_the_teacher_is_asked_and_read_on_its_own_grid(
    tmp_path: Path, grid: str, budget: int | None, written: list[int], told: str
) -> None:
    if "qwen" in grid:
        grid = str(model_served(tmp_path / grid, grid))
    config = SynthesizeConfig(
        teacher="endpoint", teacher_base_url="u", teacher_model="m", teacher_grid=grid, teacher_max_pixels_total=budget
    )
    grids_of, convention = teacher_grids(config)
    example = replace(EXAMPLE, images=pictures(tmp_path))
    [message], grids = ask_of(grids_of)(example)
    assert told in str(message.parts[-1])
    text = f'<think>Image 2 has it on the left.</think><answer>[{{"image": 2, "bbox_2d": {written}}}]</answer>'
    score = SCORER.score(Completion(text=text), example, grids)
    assert score.iou == pytest.approx(1.0)
    # Images go out resized only where the server's own resizing would change what the numbers mean.
    assert (convention is None) == (grid in GRIDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"teacher_grid": "permille"}, "'permille' is neither one of per_mille, .* nor a model folder", id="unknown"),
        pytest.param(
            {"teacher_grid": "pixels", "teacher_max_pixels_total": 9}, "teacher_max_pixels_total needs the folder", id="budget"
        ),
    ],
)
def test_a_teacher_grid_that_is_not_known_is_refused(options: dict[str, object], message: str) -> None:
    config = SynthesizeConfig(teacher="endpoint", teacher_base_url="u", teacher_model="m", **options)
    with pytest.raises(ConfigError, match=message):
        teacher_grids(config)


def test_the_scripted_teacher_has_no_other_grid() -> None:
    with pytest.raises(ValidationError, match="teacher_grid pixels is for teacher: endpoint"):
        SynthesizeConfig(teacher_grid="pixels")
