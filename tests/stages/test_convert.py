"""`polyground convert`: whole files or none, every row accounted for, and the same examples on the way back."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polyground.answer import Answer, Located
from polyground.cli import main
from polyground.conventions import load_convention
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import SOURCES, scan_source
from test_light_import import run_without_torch

SIZES = {"a.png": (200, 100), "b.png": (40, 80), "c.png": (64, 64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and an annotation of two good rows and two bad ones in MIG-Bench's layout."""
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / name)
    write_json(tmp_path / "mig.json", [mig(1), mig(2), mig(1, answer=[0.5, 0.5, 0.2, 0.9]), mig(1)])
    return tmp_path


def mig(image: int, answer: list[float] | None = None) -> dict[str, Any]:
    question = f"Find the cup in the {image}th image."
    known = {"task": "common_object", "images": ["./a.png", "./b.png"], "additional_info": "", "need_format": True}
    return {**known, "question": question, "answer": answer or [0.0, 0.25, 0.5, 0.75]}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def convert(source: str, path: Path, *words: str | Path) -> int:
    return main(["convert", source, str(path), *map(str, words)])


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- what becomes of good and bad rows


def test_the_first_bad_rows_stop_it_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(folder)
    assert convert("mig_bench", folder / "mig.json", "--to", "polyground", "--out", folder / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "2 bad of 4 rows (1 inverted, 1 duplicate)" in error
    assert "row 3 (mig_bench/common_object/2): the answer has swapped corners" in error
    assert "row 4 " in error
    assert names(folder) == before


def test_bad_rows_set_aside_are_counted_and_kept_with_their_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.json"
    words = ("--to", "sharegpt", "--grid", "per_mille", "--out", out, "--on-bad", "quarantine")
    assert convert("mig_bench", folder / "mig.json", *words) == 0
    shown = capsys.readouterr().out
    assert "written   2 rows" in shown
    assert "left out  2 (1 inverted, 1 duplicate)" in shown
    assert "tasks     2 common_object" in shown
    assert "2 rows with 2" in shown
    assert [row["id"] for row in json.loads(out.read_text())] == ["mig_bench/common_object/0", "mig_bench/common_object/1"]
    assert [(row["row"], row["reason"]) for row in lines(folder / "out.json.quarantine.jsonl")] == [
        (3, "inverted"),
        (4, "duplicate"),
    ]
    assert names(folder) == {*SIZES, "mig.json", "out.json", "out.json.quarantine.jsonl", "dataset_info.json"}


def test_what_the_format_cannot_hold_is_set_aside_whole(folder: Path) -> None:
    row = {**mig(1), "task": "diff", "question": "Find the difference."}
    path, aside = write_json(folder / "diff.json", [mig(1), row]), folder / "aside.jsonl"
    words = ("--to", "trl", "--grid", "per_mille", "--out", folder / "out.jsonl", "--on-bad", "quarantine", "--quarantine", aside)
    assert convert("mig_bench", path, *words) == 0
    [left] = lines(aside)
    assert (left["row"], left["reason"]) == (2, "unnamed_image")
    assert Example.from_json(left["example"]).question == "Find the difference."


def test_reading_stops_at_the_tenth_bad_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json(folder / "bad.json", [mig(1, answer=[0.9, 0.5, 0.2, 0.9])] * 50)
    assert convert("mig_bench", path, "--to", "polyground", "--out", folder / "out.jsonl") == 2
    assert "10 bad of 10 rows (10 inverted), and reading stopped there" in capsys.readouterr().err


def test_a_file_that_ends_too_soon_leaves_nothing_behind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cut.jsonl").write_text(json.dumps(CONVERSATION) + '\n{"images": ["a.p', encoding="utf-8")
    before = names(folder)
    words = ("--option", "grid=per_mille", "--to", "polyground", "--out", folder / "out.jsonl", "--on-bad", "quarantine")
    assert convert("sharegpt", folder / "cut.jsonl", *words) == 2
    assert "cut.jsonl:2" in capsys.readouterr().err
    assert names(folder) == before


def test_an_interrupted_conversion_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> Iterator[Example]:
        yield from EXAMPLES
        raise KeyboardInterrupt

    monkeypatch.setitem(SOURCES, "interrupted", interrupted)
    before = names(folder)
    assert convert("interrupted", folder, "--to", "polyground", "--out", folder / "sub" / "out.jsonl") == 130
    assert names(folder / "sub") == set()
    assert names(folder) == before | {"sub"}


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"


def test_a_full_disk_leaves_nothing_behind_and_the_old_file_whole(folder: Path) -> None:
    path, out = (
        write_json(folder / "many.json", [{**mig(1), "question": f"{n}, in the 1th image"} for n in range(40)]),
        folder / "o.jsonl",
    )
    out.write_text("old")
    before = names(folder)
    words = ["convert", "mig_bench", str(path), "--to", "polyground", "--out", str(out), "--force"]
    found = run_without_torch(f"{FULL}\nfrom polyground.cli import main; sys.exit(main({words!r}))")
    assert (found.returncode, "cannot be written" in found.stderr) == (2, True), found.stderr
    assert names(folder) == before
    assert out.read_text() == "old"


def test_a_file_of_bad_rows_alone_becomes_no_empty_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json(folder / "bad.json", [mig(1, answer=[0.9, 0.5, 0.2, 0.9])])
    assert convert("mig_bench", path, "--to", "polyground", "--out", folder / "out.jsonl", "--on-bad", "quarantine") == 2
    assert "all 1 rows are bad (1 inverted)" in capsys.readouterr().err
    assert not (folder / "out.jsonl").exists()


def test_a_limit_reads_no_further(folder: Path) -> None:
    assert convert("mig_bench", folder / "mig.json", "--to", "polyground", "--out", folder / "out.jsonl", "--limit", "2") == 0
    assert len(lines(folder / "out.jsonl")) == 2


def test_missing_images_are_bad_rows_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json(folder / "one.json", [mig(1)])
    (folder / "b.png").unlink()
    words = ("--to", "polyground", "--out", folder / "out.jsonl")
    assert convert("mig_bench", path, *words, "--check-images") == 2
    assert "1 missing_image" in capsys.readouterr().err
    assert convert("mig_bench", path, *words) == 0


# ---------------------------------------------------------------- rows without a benchmark's images


def test_rows_that_show_an_image_of_a_benchmark_are_dropped_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The benchmark's picture has another name, and one of its own rows is bad.
    (folder / "bench").mkdir()
    Image.new("RGB", (50, 60), "red").save(folder / "c.png")
    (folder / "bench" / "copy.png").write_bytes((folder / "c.png").read_bytes())
    shown = {**mig(1), "images": ["./copy.png", "./copy.png"]}
    write_json(folder / "bench" / "bench.json", [shown, mig(1, answer=[0.5, 0.5, 0.2, 0.9])])
    path = write_json(folder / "mine.json", [mig(1), {**mig(2), "images": ["./a.png", "./c.png"]}])
    words = ("--to", "polyground", "--out", folder / "out.jsonl", "--without", f"mig_bench:{folder / 'bench' / 'bench.json'}")
    assert convert("mig_bench", path, *words) == 0
    assert [row["images"][1] for row in lines(folder / "out.jsonl")] == ["b.png"]
    said = capsys.readouterr().out
    assert "read      2 rows" in said
    assert "dropped   1 rows that show an image of mig_bench:" in said

    write_json(path, [{**mig(1), "images": ["./a.png", "./c.png"]}])
    assert convert("mig_bench", path, *words, "--force") == 2
    assert "every good row shows an image of 1 mig_bench:" in capsys.readouterr().err


def test_an_image_that_is_not_there_cannot_be_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = write_json(folder / "bench.json", [{**mig(1), "images": ["./c.png", "./c.png"]}])
    path = write_json(folder / "mine.json", [mig(1), {**mig(1), "images": ["./a.png", "./gone.png"]}])
    words = ("--to", "polyground", "--out", folder / "out.jsonl", "--without", f"mig_bench:{bench}")
    assert convert("mig_bench", path, *words) == 2
    assert "1 missing_image" in capsys.readouterr().err
    write_json(bench, [{**mig(1), "images": ["./gone.png", "./c.png"]}])
    assert convert("mig_bench", path, *words, "--force") == 2
    assert "gone.png: image cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------- grids


def answer_of(path: Path) -> str:
    row = lines(path)[0]
    return str(row["completion"][0]["content"][0]["text"])


def test_the_grid_is_never_guessed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("mig_bench", folder / "mig.json", "--to", "trl", "--out", folder / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "--grid per_mille | unit | pixels" in error
    assert "--model FOLDER" in error


@pytest.mark.parametrize(
    ("grid", "numbers"),
    [
        ("per_mille", "[0, 250, 500, 750]"),
        ("unit", "[0.0, 0.25, 0.5, 0.75]"),
        ("pixels", "[0, 20, 20, 60]"),
        ("per_mille_yxyx", "[250, 0, 750, 500]"),
    ],
)
def test_boxes_are_written_on_the_declared_grid(folder: Path, grid: str, numbers: str) -> None:
    path, out = write_json(folder / "one.json", [mig(2)]), folder / "out.jsonl"
    assert convert("mig_bench", path, "--to", "trl", "--grid", grid, "--out", out) == 0
    assert answer_of(out) == f'<answer>[{{"image": 2, "bbox_2d": {numbers}}}]</answer>'


def test_a_model_folder_writes_the_pixels_of_its_resized_image(folder: Path) -> None:
    model, path, out = folder / "model", write_json(folder / "one.json", [mig(2)]), folder / "out.jsonl"
    model.mkdir()
    write_json(model / "config.json", {"model_type": "qwen2_5_vl"})
    write_json(model / "preprocessor_config.json", {"patch_size": 14, "merge_size": 2, "min_pixels": 784, "max_pixels": 50176})
    words = ("--to", "trl", "--model", model, "--max-pixels-total", "50176", "--out", out)
    assert convert("mig_bench", path, *words) == 0
    grid = load_convention(model, max_pixels_total=50176).grids([SIZES["a.png"], SIZES["b.png"]])[1]
    assert (grid.width, grid.height) == (28, 84)
    assert "[0, 21, 14, 63]" in answer_of(out)


def test_images_are_only_opened_for_pixels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json(folder / "one.json", [mig(2)])
    (folder / "b.png").write_bytes(b"not an image")
    assert convert("mig_bench", path, "--to", "trl", "--grid", "per_mille", "--out", folder / "out.jsonl") == 0
    assert convert("mig_bench", path, "--to", "trl", "--grid", "pixels", "--out", folder / "px.jsonl") == 2
    assert "1 unreadable_image" in capsys.readouterr().err


def test_rows_without_boxes_need_no_grid(folder: Path) -> None:
    row = {"idx": "v1", "sub_task": "Jigsaw", "question": "Which?", "image_1": "a.png", "choices": ["x", "y"], "answer": "(B)"}
    path = write_json(folder / "blink.json", [row])
    assert convert("blink", path, "--to", "trl", "--out", folder / "out.jsonl") == 0
    assert answer_of(folder / "out.jsonl") == "<answer>B</answer>"


# ---------------------------------------------------------------- options and files


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["--to", "trl", "--out", "out.json", "--grid", "permille"], "takes one of per_mille", id="unknown grid"),
        pytest.param(["--to", "trl", "--out", "out.csv"], ".jsonl or .json", id="ending"),
        pytest.param(["--to", "polyground", "--out", "out.jsonl", "--grid", "unit"], "boxes are kept as they are", id="no grid"),
        pytest.param(["--to", "swift", "--out", "out.jsonl", "--grid", "per_mille"], "takes one of unit, pixels", id="swift"),
        pytest.param(["--to", "swift", "--out", "out.jsonl", "--model", "tiny"], "leave it out", id="swift and a model"),
        pytest.param(["--to", "trl", "--out", "out.jsonl", "--model", "nowhere"], "no such model folder", id="no model"),
        pytest.param(["--to", "polyground", "--out", "out.jsonl", "--limit", "0"], "1 or more", id="limit"),
        pytest.param(["--to", "polyground", "--out", "out.jsonl", "--option", "grid"], "key=value", id="no value"),
        pytest.param(["--to", "polyground", "--out", "out.jsonl", "--option", "a=[1"], "not YAML", id="not YAML"),
        pytest.param(["--to", "polyground", "--out", "out.jsonl", "--option", "colour=1"], "no option 'colour'", id="no option"),
        pytest.param(["--to", "polyground", "--out", "out.jsonl", "--quarantine", "q.jsonl"], "add --on-bad", id="quarantine"),
        pytest.param(
            ["--to", "polyground", "--out", "out.jsonl", "--on-bad", "quarantine", "--quarantine", "q.csv"],
            "to .jsonl",
            id="q.csv",
        ),
        pytest.param(["--to", "verl", "--out", "out.parquet", "--form", "qwen_json"], "leave it out", id="form"),
        pytest.param(["--to", "polyground", "--out", "a.png/out.jsonl"], "cannot be written", id="a file for a folder"),
        pytest.param(
            ["--to", "polyground", "--out", "x.jsonl", "--on-bad", "quarantine", "--quarantine", "x.jsonl"], "each", id="one name"
        ),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    folder: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = names(folder)
    assert convert("mig_bench", Path("mig.json"), *words) == 2
    assert said in capsys.readouterr().err
    assert names(folder) == before


def test_an_existing_file_is_replaced_only_by_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_json(folder / "one.json", [mig(1)]), folder / "out.jsonl"
    out.write_text("precious")
    words = ("--to", "polyground", "--out", out)
    assert convert("mig_bench", path, *words) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert convert("mig_bench", path, *words, "--force") == 0
    assert len(lines(out)) == 1


def test_what_is_read_is_never_written_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "mig.json").read_text()
    assert convert("sharegpt", folder / "mig.json", "--to", "sharegpt", "--out", folder / "mig.json", "--force") == 2
    assert "is what is read" in capsys.readouterr().err
    assert (folder / "mig.json").read_text() == before


def test_an_old_quarantine_goes_when_nothing_is_bad_any_more(folder: Path) -> None:
    aside = folder / "out.jsonl.quarantine.jsonl"
    words = ("--to", "polyground", "--out", folder / "out.jsonl", "--on-bad", "quarantine")
    assert convert("mig_bench", folder / "mig.json", *words) == 0
    assert len(lines(aside)) == 2
    assert convert("mig_bench", write_json(folder / "one.json", [mig(1)]), *words, "--force") == 0
    assert not aside.exists()


def test_dataset_info_gains_an_entry_and_keeps_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, path = folder / "dataset_info.json", write_json(folder / "one.json", [mig(1)])
    write_json(info, {"other": {"file_name": "other.json"}, "taken": {"file_name": "elsewhere.json"}})
    words = ("--to", "sharegpt", "--grid", "per_mille", "--out")
    assert convert("mig_bench", path, *words, folder / "new.json") == 0
    entries = json.loads(info.read_text())
    assert set(entries) == {"other", "taken", "new"}
    assert entries["new"]["file_name"] == "new.json"
    assert convert("mig_bench", path, *words, folder / "taken.json") == 2
    assert "another entry 'taken'" in capsys.readouterr().err
    assert not (folder / "taken.json").exists()


def test_a_number_stays_the_name_of_a_folder(folder: Path) -> None:
    (folder / "2017").mkdir()
    path = write_json(folder / "one.json", [mig(1)])
    root = (folder / "2017").relative_to(folder)
    words = ("--to", "polyground", "--out", folder / "out.jsonl", "--option", f"images_root={root}", "--option", "name=7")
    assert convert("mig_bench", path, *words) == 0
    [row] = lines(folder / "out.jsonl")
    assert row["key"] == "7/common_object/0"
    assert row["images"][0].endswith("2017/a.png")


def test_image_names_can_be_relative_to_another_folder(folder: Path) -> None:
    path, out = write_json(folder / "one.json", [mig(1)]), folder / "sub" / "out.jsonl"
    assert convert("mig_bench", path, "--to", "polyground", "--out", out) == 0
    assert lines(out)[0]["images"] == [str(folder / "a.png"), str(folder / "b.png")]
    assert convert("mig_bench", path, "--to", "polyground", "--out", out, "--relative-to", folder, "--force") == 0
    assert lines(out)[0]["images"] == ["a.png", "b.png"]


def test_it_runs_without_torch(folder: Path) -> None:
    words = ["convert", "mig_bench", str(folder / "mig.json"), "--to", "polyground", "--out", str(folder / "out.jsonl")]
    found = run_without_torch(f"from polyground.cli import main; sys.exit(main({[*words, '--on-bad', 'quarantine']!r}))")
    assert (found.returncode, len(lines(folder / "out.jsonl"))) == (0, 2), found.stderr
    shown = run_without_torch("from polyground.cli import main; main(['convert', '--help'])")
    assert (shown.returncode, "formats (--to)" in shown.stdout) == (0, True), shown.stderr


# ---------------------------------------------------------------- there and back


def example(key: str, **fields: Any) -> Example:
    known: dict[str, Any] = {"task": "find", "images": ("a.png", "b.png"), "question": "Find the cup.", "target": Answer()}
    found = Example(key=key, **{**known, **fields})
    return replace(found, images=tuple(map(Path, found.images)))


BOX, OTHER = Box(0.1, 0.25, 0.5, 0.75), Box(0.3, 0.2, 1.0, 0.45)
EXAMPLES = [
    example("box", target=Answer((Located(2, BOX),))),
    example("boxes", question="Find all cups.", target=Answer((Located(1, BOX), Located(2, OTHER), Located(2, BOX)))),
    example("none", question="Find the unicorn."),
    example("single", images=("c.png",), target=Answer((Located(1, OTHER),))),
    example("three", images=("a.png", "b.png", "c.png"), target=Answer((Located(3, OTHER),))),
    example("placed", question="Here is <image> and there <image>. Find the cup.", target=Answer((Located(2, OTHER),))),
    example(
        "marked",
        question="In the first image, <box> is a cup. Find it.",
        question_boxes=(Located(1, OTHER),),
        target=Answer((Located(2, BOX),)),
    ),
    example("choice", task="choose", question="Which is red?", choices=("the cup", "the hat"), target=Answer(choice="B")),
    example("thought", question="Find the hat.", target=Answer((Located(2, BOX),)), meta={"reasoning": "It is red."}),
]

FORMATS = {
    "polyground": ("x.jsonl", None),
    "sharegpt": ("x.json", "per_mille"),
    "swift": ("x.jsonl", "pixels"),
    "trl": ("x.jsonl", "unit"),
    "vlm_r1": ("x.jsonl", "per_mille_yxyx"),
    "verl": ("x.parquet", "per_mille"),
}
"""File and grid each format is tried with."""

CONVERSATION = {
    "images": ["a.png"],
    "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "[100, 200, 300, 400]"}],
}


def read_back(name: str, path: Path, grid: str | None, root: Path) -> list[Example]:
    options = {"grid": grid} if grid and name not in ("polyground", "swift") else {}
    items = list(scan_source(name, path, images_root=root, **options))
    assert [item for item in items if not isinstance(item, Example)] == []
    return [item for item in items if isinstance(item, Example)]


def content(found: Example, *, embedded: bool) -> tuple[Any, ...]:
    """What must survive; boxes apart, which are compared within half a unit, and embedded images, which get other names."""
    images = tuple(path.read_bytes() if embedded else path for path in found.images)
    numbers = [(located.image, located.confidence) for located in (*found.target.boxes, *found.question_boxes)]
    return (found.task, images, found.question, found.target.choice, found.choices, numbers, found.meta.get("reasoning"))


def corners(found: Example) -> Iterator[float]:
    for located in (*found.target.boxes, *found.question_boxes):
        yield from (located.box.x0, located.box.y0, located.box.x1, located.box.y1)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_examples_come_back_equal_from_every_pair_of_formats(folder: Path, first: str, second: str) -> None:
    if "verl" in (first, second):
        pytest.importorskip("pyarrow")
    path = folder / "examples.jsonl"
    rooted = [replace(e, images=tuple(folder / image for image in e.images)) for e in EXAMPLES]
    path.write_text("".join(json.dumps(e.to_json()) + "\n" for e in rooted), encoding="utf-8")
    source, grid = "polyground", None
    for step, name in (("first", first), ("second", second)):
        out = folder / step / FORMATS[name][0]
        to = FORMATS[name][1]
        options = [] if grid is None or source in ("polyground", "swift") else ["--option", f"grid={grid}"]
        words = ["--to", name, "--out", out, *(["--grid", to] if to else []), "--option", "images_root=/", *options]
        assert convert(source, path, *words) == 0
        source, path, grid = name, out, to
    found = read_back(source, path, grid, Path("/"))
    embedded = "verl" in (first, second)
    lost = {"reasoning"} if embedded else set()
    for before, after in zip(rooted, found, strict=True):
        kept = replace(before, meta={k: v for k, v in before.meta.items() if k not in lost})
        assert content(after, embedded=embedded) == content(kept, embedded=embedded), before.key
        # Half a pixel of the narrowest image, 40 pixels wide, and half a thousandth.
        assert list(corners(after)) == pytest.approx(list(corners(before)), abs=0.5 / 40 + 0.001)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "polyground"])
def test_other_trainers_load_the_file_as_one_table(folder: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    path, out = folder / "examples.jsonl", folder / "out" / FORMATS[name][0]
    path.write_text("".join(json.dumps(e.to_json()) + "\n" for e in EXAMPLES), encoding="utf-8")
    assert convert("polyground", path, "--to", name, "--grid", FORMATS[name][1] or "", "--out", out) == 0
    kind = "parquet" if out.suffix == ".parquet" else "json"
    table = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(folder / "cache"))
    assert table["id"] == [e.key for e in EXAMPLES]
    assert [len(row.get("images") or row["image"]) for row in table] == [len(e.images) for e in EXAMPLES]


@pytest.mark.parametrize("grid", ["per_mille", "unit", "pixels", "per_mille_yxyx"])
def test_boxes_come_back_within_half_a_unit_of_their_grid(folder: Path, grid: str) -> None:
    exact = Box(0.12345, 0.26543, 0.51234, 0.76321)
    asked = replace(EXAMPLES[6], target=Answer((Located(2, exact),)), question_boxes=(Located(1, exact),))
    path, out = write_json(folder / "one.json", [asked.to_json()]), folder / "out.jsonl"
    assert convert("polyground", path, "--to", "sharegpt", "--grid", grid, "--out", out) == 0
    [found] = read_back("sharegpt", out, grid, folder)
    for located, size in ((found.question_boxes[0], SIZES["a.png"]), (found.target.boxes[0], SIZES["b.png"])):
        width, height = size if grid == "pixels" else (1000, 1000)
        box = located.box
        assert [box.x0, box.x1] == pytest.approx([exact.x0, exact.x1], abs=0.5 / width + 1e-9)
        assert [box.y0, box.y1] == pytest.approx([exact.y0, exact.y1], abs=0.5 / height + 1e-9)


@pytest.mark.parametrize("layout", ["sharegpt", "swift", "trl"])
def test_export_is_conversion_from_our_own_rows(folder: Path, layout: str) -> None:
    ours = folder / "ours.jsonl"
    assert convert("mig_bench", folder / "mig.json", "--to", "polyground", "--out", ours, "--on-bad", "quarantine") == 0
    suffix = "json" if layout == "sharegpt" else "jsonl"
    words = ["--to", layout, "--grid", "unit" if layout == "swift" else "per_mille", "--out"]
    exported, converted = folder / f"exported.{suffix}", folder / f"converted.{suffix}"
    assert main(["export", str(ours), *words, str(exported)]) == convert("polyground", ours, *words, converted)
    assert exported.read_bytes() == converted.read_bytes()


def test_what_synthesize_keeps_becomes_reasoning_and_the_taught_answer(folder: Path) -> None:
    unknown = replace(EXAMPLES[0], target=Answer((Located(None, BOX),)))
    taught = {"boxes": EXAMPLES[0].to_json()["target"]["boxes"]}
    kept = {**unknown.to_json(), "reasoning": "The second holds it.", "answer": taught, "score": {"total": 1.0}}
    path, out = write_json(folder / "kept.json", [kept]), folder / "out.jsonl"
    assert convert("polyground", path, "--to", "trl", "--grid", "per_mille", "--out", out) == 0
    assert answer_of(out) == (
        '<think>The second holds it.</think><answer>[{"image": 2, "bbox_2d": [100, 250, 500, 750]}]</answer>'
    )


# ---------------------------------------------------------------- size


MEASURED = """
from pathlib import Path
from polyground.cli import main

def peak():
    # Not ru_maxrss, which a child process inherits.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

words = ["--option", "grid=per_mille", "--to", "trl", "--grid", "per_mille", "--force", "--out", OUT]
main(["convert", "sharegpt", MANY, *words, "--limit", "100"])
before = peak()
main(["convert", "sharegpt", MANY, *words])
print("grown", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_a_large_file_passes_through_little_memory(tmp_path: Path) -> None:
    path, out, count = tmp_path / "many.jsonl", tmp_path / "out.jsonl", 10_000
    answered = CONVERSATION["conversations"][1]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = {"from": "human", "value": f"<image>\nWhere is {number}?"}
            file.write(json.dumps({**CONVERSATION, "conversations": [asked, answered], "unread": "x" * 4000}) + "\n")
    found = run_without_torch(f"MANY, OUT = {str(path)!r}, {str(out)!r}\n{MEASURED}")
    assert found.returncode == 0, found.stderr
    with out.open(encoding="utf-8") as file:
        assert sum(1 for _ in file) == count
    # The file is 42 MB, its examples 11 MB; what grows with it is a few bytes per row, by which duplicates are known.
    assert int(found.stdout.split()[-1]) < 5e6
