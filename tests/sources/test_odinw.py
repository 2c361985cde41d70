"""OdinW: one question per image and category, crowds left out, absent categories when asked for, tables that do not join."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import odinw, odinw_tables, write_json

from polyground.answer import MAX_BOXES, Answer
from polyground.errors import DataError
from polyground.records import Example
from polyground.sources import read_source
from polyground.sources.odinw import scan_odinw
from polyground.sources.reading import collect, reasons_of


def written(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda tables: None) -> Path:
    tables = odinw_tables()
    change(tables)
    return write_json(folder / "annotations_without_background.json", tables)


def asked(examples: list[Example]) -> list[tuple[str, str, int]]:
    """(image, category, boxes) of each."""
    return [(example.images[0].name, example.meta["category"], len(example.target.boxes)) for example in examples]


def test_one_example_per_image_and_category_in_it(tmp_path: Path) -> None:
    examples, bad = collect(scan_odinw(written(tmp_path)))
    assert not bad
    assert asked(examples) == [
        ("IMG_0.jpg", "fish", 2),
        ("IMG_0.jpg", "crab", 1),
        ("IMG_1.jpg", "fish", 1),
        ("IMG_1.jpg", "jellyfish", 1),
    ]
    assert examples[0].question == "Locate every fish in the image, if there is any."
    assert [example.key for example in examples] == [f"odinw/odinw/{n}" for n in range(4)]


def test_absent_categories_have_an_empty_answer_and_crowds_are_not_absent(tmp_path: Path) -> None:
    examples, _ = collect(scan_odinw(written(tmp_path), absent=9))
    assert asked(examples) == [
        ("IMG_0.jpg", "fish", 2),
        ("IMG_0.jpg", "crab", 1),
        ("IMG_1.jpg", "fish", 1),
        ("IMG_1.jpg", "crab", 0),
        ("IMG_1.jpg", "jellyfish", 1),
    ]
    assert examples[3].target == Answer()


def test_absent_counts_the_categories_of_one_image(tmp_path: Path) -> None:
    def empty(tables: dict[str, Any]) -> None:
        tables["images"].append({"id": 2, "file_name": "empty.jpg", "height": 10, "width": 10})

    for absent in (0, 1, 2, 3):
        examples, _ = collect(scan_odinw(written(tmp_path, empty), absent=absent))
        assert len([example for example in examples if example.images[0].name == "empty.jpg"]) == absent


def test_a_category_that_labels_nothing_is_never_asked_for(tmp_path: Path) -> None:
    examples, _ = collect(scan_odinw(written(tmp_path), absent=9))
    assert "creatures" not in {example.meta["category"] for example in examples}


def test_a_crowd_beside_single_ones_is_left_out_and_counted(tmp_path: Path) -> None:
    examples, _ = collect(scan_odinw(written(tmp_path, lambda tables: tables["annotations"][1].update(iscrowd=1))))
    assert asked(examples)[0] == ("IMG_0.jpg", "fish", 1)
    assert (examples[0].meta["crowds"], len(examples[0].meta["instances"])) == (1, 2)


def test_categories_of_the_same_name_are_one(tmp_path: Path) -> None:
    examples, bad = collect(scan_odinw(written(tmp_path, lambda tables: tables["categories"][2].update(name=" fish"))))
    assert not bad
    assert asked(examples)[0] == ("IMG_0.jpg", "fish", 3)
    assert examples[0].meta["category_ids"] == [1, 2]


def test_the_data_set_is_the_task(tmp_path: Path) -> None:
    path, options = odinw(tmp_path)
    assert {example.task for example in read_source("odinw", path, **options)} == {"Aquarium"}
    assert read_source("odinw", path, **options)[0].key == "odinw/Aquarium/0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda t: t["annotations"][0].update(bbox=[20, 10, -100, 50]), "inverted", id="negative width"),
        pytest.param(lambda t: t["annotations"][0].update(bbox=[150, 10, 100, 50]), "out_of_range", id="beyond the image"),
        pytest.param(lambda t: t["annotations"][0].update(bbox=None), "malformed", id="no box"),
        pytest.param(lambda t: t["annotations"][0].update(image_id=9), "orphan", id="a box of no image"),
        pytest.param(lambda t: t["annotations"][0].update(category_id=9), "orphan", id="a box of no category"),
        pytest.param(lambda t: t["annotations"][0].update(image_id=[0]), "orphan", id="an image id that is a list"),
        pytest.param(lambda t: t["annotations"].append(None), "orphan", id="a box that is nothing"),
        pytest.param(
            lambda t: t["annotations"].extend([t["annotations"][0]] * MAX_BOXES), "too_many", id="more than an answer holds"
        ),
        pytest.param(lambda t: t["images"].append("junk"), "malformed", id="an image that is a text"),
        pytest.param(lambda t: t["images"][1].pop("height"), "malformed", id="no height"),
        pytest.param(lambda t: t["images"][1].update(file_name="../x.jpg"), "unsafe_path", id="out of the folder"),
        pytest.param(lambda t: t["images"].append(t["images"][0]), "duplicate", id="an image listed twice"),
    ],
)
def test_bad_tables_are_counted_by_reason(tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    examples, bad = collect(scan_odinw(written(tmp_path, change)))
    assert set(reasons_of(bad)) == {reason}
    assert examples


@pytest.mark.parametrize("content", [[], {"images": []}, {"images": [], "annotations": [], "categories": None}])
def test_another_file_is_an_error_that_says_so(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match=r"holds no list of \w+; name a COCO detection file"):
        list(scan_odinw(write_json(tmp_path / "other.json", content)))
