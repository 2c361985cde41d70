"""The world on disk: public layouts, the same for the same seed, resumed where it stopped, no image in two splits."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyground.errors import StorageError
from polyground.sources import read_source
from polyground.splits import require_no_leaks
from polyground.worlds.build import SPLITS, build_world
from polyground.worlds.scenes import HELD_OUT_PAIRS
from polyground.worlds.teacher import read_scene_rows, row_of


@dataclass(frozen=True)
class Sizes:
    train: int = 20
    rl: int = 10
    train_choice: int = 10
    rl_choice: int = 5
    validation: int = 0
    test: int = 10
    ood: int = 10
    perception: int = 8
    seed: int = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_world(Sizes(), tmp_path_factory.mktemp("world"))


def test_splits_without_a_size_are_left_out(world: dict[str, Path]) -> None:
    assert set(world) == set(SPLITS) - {"validation"}


def test_grounding_rows_have_exactly_mig_benchs_fields(world: dict[str, Path]) -> None:
    rows = json.loads(world["train"].read_text())
    assert len(rows) == 20
    for row in rows:
        assert list(row) == ["task", "images", "question", "answer", "additional_info", "need_format"]
        assert all(isinstance(corner, float) for corner in row["answer"])


def test_every_split_is_read_back_without_a_bad_row_or_a_shared_image(world: dict[str, Path]) -> None:
    splits = {split: read_source(SPLITS[split].source, path, name=split) for split, path in world.items()}
    assert {split: len(examples) for split, examples in splits.items()} == {
        split: getattr(Sizes(), SPLITS[split].size) for split in world
    }
    require_no_leaks(splits)


def test_scene_rows_say_what_the_annotation_says(world: dict[str, Path]) -> None:
    for split, path in world.items():
        if SPLITS[split].source != "mig_bench":
            continue
        rows = read_scene_rows(path.with_name("scenes.jsonl"))
        for example in read_source("mig_bench", path, name=split):
            row = row_of(example, rows)
            [located] = example.target.boxes
            item = row["images"][row["target"]["image"] - 1]["items"][row["target"]["item"]]
            assert (located.image, row["task"]) == (row["target"]["image"], example.task)
            assert item["box"] == [located.box.x0, located.box.y0, located.box.x1, located.box.y1]


def test_only_the_unseen_pairs_split_asks_for_held_out_pairs(world: dict[str, Path]) -> None:
    def pairs(split: str) -> set[tuple[str, str]]:
        rows = read_scene_rows(world[split].with_name("scenes.jsonl")).values()
        return {(item["colour"], item["shape"]) for row in rows for image in row["images"] for item in image["items"]}

    assert pairs("ood_pairs") & HELD_OUT_PAIRS
    assert not any(pairs(split) & HELD_OUT_PAIRS for split in ("train", "rl", "test", "ood_more", "ood_phrasing", "ood_clutter"))


def test_the_annotated_box_holds_what_the_region_shows(world: dict[str, Path]) -> None:
    for example in read_source("mig_bench", world["train"]):
        if example.task != "region":
            continue
        asked = int(example.question.split("region ")[1][0])
        with Image.open(example.images[0]) as source, Image.open(example.images[asked]) as region:
            assert source.mode == region.mode == "RGB"
            assert source.size == region.size == (224, 224)
            x0, y0, x1, y1 = (round(edge) for edge in example.target.boxes[0].box.to_pixels(width=224, height=224))
            wanted = np.asarray(source.crop((x0, y0, x1, y1)), dtype=int)
            found = np.abs(np.asarray(region, dtype=int) - np.asarray(region, dtype=int)[:1, :1]).sum(axis=2) > 60
        # What stands out from the region's background is as large as the box.
        rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == pytest.approx(wanted.shape[:2], abs=1)


def test_the_same_seed_writes_the_same_world(world: dict[str, Path], tmp_path: Path) -> None:
    again = build_world(Sizes(), tmp_path)
    for split, path in world.items():
        assert path.read_bytes() == again[split].read_bytes()
        for image in (path.parent / "images").iterdir():
            assert image.read_bytes() == (again[split].parent / "images" / image.name).read_bytes()


def test_an_unfinished_split_is_written_again_and_a_complete_one_left_alone(tmp_path: Path) -> None:
    sizes = Sizes(train_choice=0, rl_choice=0, ood=0, perception=0)
    first = build_world(sizes, tmp_path)
    before = {split: path.read_bytes() for split, path in first.items()}
    first["rl"].unlink()
    (first["rl"].parent / "images" / "000000_1.png").write_bytes(b"torn")
    (first["rl"].parent / "images" / "000999_1.png").write_bytes(b"left behind")
    written: list[str] = []
    build_world(sizes, tmp_path, lambda split, done, total: written.append(split))
    assert set(written) == {"rl"}
    assert {split: path.read_bytes() for split, path in first.items()} == before
    assert not (first["rl"].parent / "images" / "000999_1.png").exists()


def test_a_world_of_another_seed_is_not_mixed_in(tmp_path: Path) -> None:
    sizes = Sizes(train=2, rl=0, train_choice=0, rl_choice=0, test=0, ood=0, perception=0)
    build_world(sizes, tmp_path)
    with pytest.raises(StorageError, match="2 questions of seed 3 in version 2, but 2 of seed 4"):
        build_world(replace(sizes, seed=4), tmp_path)


def test_perception_sets_have_the_public_layouts(world: dict[str, Path]) -> None:
    blink = json.loads(world["perception_blink"].read_text().splitlines()[0])
    assert set(blink) == {
        "idx",
        "question",
        "sub_task",
        "image_1",
        "image_2",
        "image_3",
        "image_4",
        "choices",
        "answer",
        "prompt",
    }
    assert blink["answer"] in {"(A)", "(B)", "(C)", "(D)"}
    [mmiu, *_] = json.loads(world["perception_mmiu"].read_text())
    assert set(mmiu) == {"task", "options", "question", "context", "input_image_path", "output"}


@pytest.mark.parametrize("name", ["scenes.jsonl", "MIG_data.json"])
def test_a_file_that_lost_its_end_is_made_again(tmp_path: Path, name: str) -> None:
    sizes = Sizes(train=4, rl=0, test=0, ood=0, perception=0)
    path = build_world(sizes, tmp_path)["train"].with_name(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 20])
    build_world(sizes, tmp_path)
    assert path.read_bytes() == whole
