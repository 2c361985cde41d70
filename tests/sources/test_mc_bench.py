"""MC-Bench: both published files, many boxes or none over two images, and every way its tables can fail to join."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import TALL, WIDE, mc_bench, mc_bench_coco, mc_bench_tables, picture, write_json

from polyground.answer import Answer, Located
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import BadRow, read_source
from polyground.sources.mc_bench import scan_mc_bench
from polyground.sources.reading import collect, reasons_of

BOTH = Answer((Located(1, Box(0.1, 0.1, 0.6, 0.6)), Located(2, Box(0.1, 0.1, 0.6, 0.6))))
SECOND = Answer((Located(2, Box(0, 0, 1, 1)),))
NOT_THERE = Answer()


def written(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda tables: None) -> Path:
    tables = mc_bench_tables()
    change(tables)
    return write_json(folder / "mc-bench_v0.2_val.json", tables)


def scanned(path: Path, **options: Any) -> tuple[list[Example], list[BadRow]]:
    return collect(scan_mc_bench(path, **options))


def test_every_instance_is_a_box_with_its_image_and_none_is_an_empty_answer(tmp_path: Path) -> None:
    path, options = mc_bench(tmp_path)
    examples = read_source("mc_bench", path, **options)
    assert [example.target for example in examples] == [BOTH, SECOND, NOT_THERE]
    assert [example.task for example in examples] == ["comparison", "reasoning", "referring"]
    assert [example.key for example in examples] == ["mc_bench/comparison/0", "mc_bench/reasoning/0", "mc_bench/referring/0"]
    assert examples[0].images == tuple(tmp_path / "mc-bench_images" / "D3" / f"{n}.jpg" for n in (0, 1))
    assert examples[1].question.endswith(": The man who has swung")


def test_meta_holds_what_average_precision_needs(tmp_path: Path) -> None:
    path, options = mc_bench(tmp_path)
    assert read_source("mc_bench", path, **options)[0].meta == {
        "source": "mc_bench",
        "version": "0.2",
        "description_id": 0,
        "image_ids": [0, 1],
        "sizes": [list(WIDE), list(TALL)],
        "text_style": "Comparison",
        "positive_sample": True,
        "instances": [
            {"id": 0, "image_id": 0, "category_id": 1, "bbox": [20, 10, 100, 50], "area": 5000, "iscrowd": 0},
            {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 20, 50, 100], "area": 5000, "iscrowd": 0},
        ],
    }


def test_the_coco_file_gives_the_same_answers_without_styles(tmp_path: Path) -> None:
    path, options = mc_bench_coco(tmp_path)
    examples = read_source("mc_bench", path, **options)
    assert [example.target for example in examples] == [BOTH, SECOND, NOT_THERE]
    assert {example.task for example in examples} == {"description"}
    assert [example.meta["description_id"] for example in examples] == [0, 1, 2]
    assert (examples[0].meta["version"], examples[0].meta["positive_sample"]) == (None, None)


def test_images_are_numbered_in_the_order_of_the_description(tmp_path: Path) -> None:
    path = written(tmp_path, lambda tables: tables["descriptions"][1].update(images_id=[3, 2]))
    examples, _ = scanned(path)
    assert examples[1].target == Answer((Located(1, Box(0, 0, 1, 1)),))
    assert [image.name for image in examples[1].images] == ["3.jpg", "2.jpg"]


def test_a_crowd_is_no_target_but_stays_in_meta(tmp_path: Path) -> None:
    examples, bad = scanned(written(tmp_path, lambda tables: tables["annotations"][1].update(iscrowd=1)))
    assert not bad
    assert examples[0].target == Answer(BOTH.boxes[:1])
    assert [instance["iscrowd"] for instance in examples[0].meta["instances"]] == [0, 1]


def test_tasks_keep_only_those(tmp_path: Path) -> None:
    for wanted in (["reasoning"], "reasoning"):
        assert [example.task for example in scanned(written(tmp_path), tasks=wanted)[0]] == ["reasoning"]


def test_a_template_puts_the_description_where_it_says(tmp_path: Path) -> None:
    examples, _ = scanned(written(tmp_path), template="Find {text}!")
    assert examples[1].question == "Find The man who has swung!"
    with pytest.raises(DataError, match=r"has no \{text\}"):
        scanned(written(tmp_path), template="Find it!")


def annotation(n: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tables: tables["annotations"][n].update(fields)


def description(n: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tables: tables["descriptions"][n].update(fields)


def image(n: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tables: tables["images"][n].update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(annotation(0, bbox=[20, 10, 0, 50]), "inverted", id="no width"),
        pytest.param(annotation(0, bbox=[20, 10, -5, 50]), "inverted", id="negative width"),
        pytest.param(annotation(0, bbox=[150, 10, 60, 50]), "out_of_range", id="right of the image"),
        pytest.param(annotation(0, bbox=[10**400, 10, 60, 50]), "out_of_range", id="absurd number"),
        pytest.param(annotation(0, bbox=[float("nan"), 10, 60, 50]), "out_of_range", id="not a number"),
        pytest.param(annotation(0, bbox=[20, 10, 60]), "malformed", id="three numbers"),
        pytest.param(annotation(0, bbox=["20", 10, 60, 5]), "malformed", id="a number as text"),
        pytest.param(annotation(0, bbox=None), "malformed", id="no box"),
        pytest.param(annotation(0, image_id=99), "orphan", id="box of no image"),
        pytest.param(annotation(0, text_id=1), "orphan", id="box of another description"),
        pytest.param(lambda tables: tables["annotations"].append("junk"), "orphan", id="a box that is no object"),
        pytest.param(description(0, images_id=[0, 99]), "malformed", id="unknown image"),
        pytest.param(description(2, images_id=[]), "no_images", id="no image"),
        pytest.param(description(2, images_id=[[4], 5]), "malformed", id="an image id that is a list"),
        pytest.param(description(2, text=""), "malformed", id="no text"),
        pytest.param(description(2, text="a <box>"), "malformed", id="a placeholder in the text"),
        pytest.param(description(2, id=None), "malformed", id="no id"),
        pytest.param(lambda tables: tables["descriptions"].append(17), "malformed", id="a description that is no object"),
        pytest.param(image(5, width=0), "malformed", id="no width of the image"),
        pytest.param(image(5, file_name="../../etc/passwd"), "unsafe_path", id="a path out of the folder"),
        pytest.param(image(5, file_name="/home/her/5.jpg"), "unsafe_path", id="an absolute path"),
    ],
)
def test_bad_tables_are_counted_by_reason(tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    examples, bad = scanned(written(tmp_path, change))
    assert reason in reasons_of(bad)
    assert len(examples) >= 2


def test_a_pair_asked_twice_is_a_duplicate_unless_kept(tmp_path: Path) -> None:
    def repeat(tables: dict[str, Any]) -> None:
        tables["descriptions"].append({**tables["descriptions"][2], "id": 3})

    assert reasons_of(scanned(written(tmp_path, repeat))[1]) == {"duplicate": 1}
    assert len(scanned(written(tmp_path, repeat), duplicates="keep")[0]) == 4


@pytest.mark.parametrize(
    ("bbox", "beyond", "expected"),
    [
        pytest.param([100, 0, 101, 100], "report", Box(0.5, 0, 1, 1), id="a pixel too far is rounding"),
        pytest.param([-1, 0, 101, 100], "report", Box(0, 0, 0.5, 1), id="a pixel before the edge too"),
        pytest.param([100, 0, 140, 130], "clip", Box(0.5, 0, 1, 1), id="clipped when asked"),
    ],
)
def test_boxes_that_pass_the_edge(tmp_path: Path, bbox: list[int], beyond: Any, expected: Box) -> None:
    examples, bad = scanned(written(tmp_path, annotation(0, bbox=bbox)), beyond=beyond)
    assert not bad
    assert examples[0].target.boxes[0].box == expected
    assert examples[0].meta["instances"][0]["bbox"] == bbox


def test_a_box_wholly_beyond_the_edge_is_bad_even_when_clipped(tmp_path: Path) -> None:
    assert reasons_of(scanned(written(tmp_path, annotation(0, bbox=[300, 0, 50, 50])), beyond="clip")[1]) == {"inverted": 1}
    with pytest.raises(DataError, match="beyond must be one of 'report', 'clip'"):
        scanned(written(tmp_path), beyond="cut")


@pytest.mark.parametrize(("size", "exif", "bad"), [(WIDE, None, 0), (TALL, None, 1), ((150, 75), None, 1), (WIDE, 6, 1)])
def test_an_image_that_lies_about_its_size_is_found_when_asked(
    tmp_path: Path, size: tuple[int, int], exif: int | None, bad: int
) -> None:
    path, options = mc_bench(tmp_path)
    file = picture(tmp_path / "mc-bench_images" / "D3" / "0.jpg", size)
    if exif is not None:
        from PIL import Image

        with Image.open(file) as picture_:
            turned = picture_.copy()
        tags = Image.Exif()
        tags[274] = exif
        turned.save(file, exif=tags)
    found = scanned(path, **options)[1]
    assert reasons_of(found) == ({"size_mismatch": 1} if bad else {})
    assert scanned(path)[1] == []
    if bad:
        assert "the annotation says 200 x 100" in found[0].detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no table of images"),
        ({"images": []}, "no list of annotations"),
        ({"images": [{"id": 0, "file_name": "a.jpg"}], "annotations": []}, "neither descriptions nor images with a pair_id"),
        ({"images": [], "annotations": [], "descriptions": {}}, "no list of annotations or descriptions"),
    ],
)
def test_another_file_is_an_error_that_says_so(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scanned(write_json(tmp_path / "other.json", content))


def test_half_a_download_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(DataError, match=r"mc-bench_v0.2_val.json: not valid JSON"):
        scanned(path)
