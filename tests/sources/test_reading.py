"""Rows streamed from every kind of file, image names kept inside their root, bad rows counted beside good ones."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyground.answer import Answer
from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example
from polyground.sources import reading
from polyground.sources.reading import (
    BadRow,
    ImageRoot,
    RowError,
    collect,
    image_root,
    load_json,
    scan_rows,
    stream_rows,
    unit_box,
)

ROWS = [{"a": 1}, {"b": ["x]", '"},{', "\\", "é"]}, 7, "text", None, [], {}, [[1, 2], {"c": -1.5e3}]]


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in stream_rows(path)]


def write(folder: Path, text: str, name: str = "rows.json") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


# ---------------------------------------------------------------- JSON lists


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_the_same_wherever_a_row_is_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    file = write(tmp_path, json.dumps(ROWS, indent=indent, ensure_ascii=False))
    assert list(stream_rows(file)) == list(enumerate(ROWS, start=1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(JSON, max_size=5), chunk=st.integers(1, 40), cut=st.integers(1, 100))
def test_any_list_is_read_and_any_cut_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, cut: int
) -> None:
    text = json.dumps(rows)
    file = write(tmp_path_factory.getbasetemp(), text, "any.json")
    usual, reading._CHUNK = reading._CHUNK, chunk
    try:
        assert rows_of(file) == rows
        write(file.parent, text[: max(1, len(text) - cut)], "any.json")
        found: list[Any] = []
        with pytest.raises(DataError, match=r"any\.json: row \d+ is not valid JSON .*download"):
            found.extend(row for _, row in stream_rows(file))
        assert found == rows[: len(found)]
    finally:
        reading._CHUNK = usual


@pytest.mark.parametrize("text", ["[]", " [ \n ] ", "﻿[]", ""])
def test_a_list_may_be_empty(tmp_path: Path, text: str) -> None:
    assert rows_of(write(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("[{}", "row 1 .*neither a comma nor the end", id="no-end"),
        pytest.param("[{},", "row 2", id="a-comma-and-no-end"),
        pytest.param("[{} {}]", "row 1 .*neither a comma nor the end", id="no-comma"),
        pytest.param("[{}, x]", "row 2", id="no-value"),
        pytest.param("[" * 100_000, "nested too deeply", id="nested"),
        pytest.param('{\n  "rows": []\n}', "holds one JSON object", id="one-object"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.json: .*{problem}"):
        rows_of(write(tmp_path, text))


def test_a_list_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "_CHUNK", 16)
    monkeypatch.setattr(reading, "_MAX_ROW", 256)
    with pytest.raises(DataError, match="row 2"):
        rows_of(write(tmp_path, '[{}, "' + "x" * 5000))


def test_a_large_list_is_read_in_bounded_memory(tmp_path: Path) -> None:
    file = write(tmp_path, "[" + ",".join(json.dumps({"id": n, "text": "x" * 1500}) for n in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in stream_rows(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 12e6 < 30e6 < file.stat().st_size


# ---------------------------------------------------------------- lines, shards, other files


def test_lines_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, '{"a": 1}\n\n{"a": 2}\n', "rows.jsonl")
    assert list(stream_rows(file)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_truncated_line_is_named_after_the_lines_before_it(tmp_path: Path) -> None:
    found = stream_rows(write(tmp_path, '{"a": 1}\n{"a": ', "rows.jsonl"))
    assert next(found) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON .*download"):
        next(found)


@pytest.mark.parametrize("content", [b"\xff\xfe[\x00]", b'[{"a": "\xff"}]', b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.json"):
        rows_of(file)


def test_a_folder_is_its_shards_in_order(tmp_path: Path) -> None:
    write(tmp_path, '{"a": 1}\n{"a": 2}', "train-0.jsonl")
    write(tmp_path, '{"a": 3}', "train-1.jsonl")
    write(tmp_path, "not a shard", "README.md")
    assert list(stream_rows(tmp_path)) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]


def test_parquet_shards_win_over_the_json_beside_them(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write(tmp_path, '{"builder": "parquet"}', "dataset_info.json")
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1, "b": {"bytes": b"x"}}]), tmp_path / "0.parquet")
    assert rows_of(tmp_path) == [{"a": 1, "b": {"bytes": b"x"}}]


def test_a_folder_without_shards_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet, \.jsonl or \.json file"):
        rows_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00"])
def test_load_json_names_a_broken_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"rows\.json: not valid JSON"):
        load_json(write(tmp_path, text))


# ---------------------------------------------------------------- rows to examples


def example(key: str, question: str = "Where?") -> Example:
    return Example(key=key, task="t", images=(Path("a.png"),), question=question, target=Answer())


def test_good_and_bad_turns_of_a_row_keep_their_order(tmp_path: Path) -> None:
    def read_row(row: Any, key: str) -> list[Example | RowError]:
        return [example(f"{key}/0", row), RowError("no_box", "none", f"{key}/1"), example(f"{key}/2", row * 2)]

    found = list(scan_rows(write(tmp_path, '["x", "y"]'), read_row, name="n"))
    assert [(item.key, isinstance(item, BadRow)) for item in found] == [
        ("n/0/0", False),
        ("n/0/1", True),
        ("n/0/2", False),
        ("n/1/0", False),
        ("n/1/1", True),
        ("n/1/2", False),
    ]


def test_a_row_that_is_bad_keeps_its_place_in_the_keys(tmp_path: Path) -> None:
    def read_row(row: Any, key: str) -> Example:
        if row == "bad":
            raise RowError("malformed", "it says so")
        return example(key, row)

    examples, bad = collect(scan_rows(write(tmp_path, '["x", "bad", "y", "x"]'), read_row, name="n"))
    assert [example.key for example in examples] == ["n/0", "n/2"]
    assert bad == [
        BadRow(2, "n/1", "malformed", "it says so"),
        BadRow(4, "n/3", "duplicate", "an earlier row asks the same question about the same images"),
    ]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([0, 0, 1], "malformed"),
        ("0 0 1 1", "malformed"),
        ([0, 0, True, 1], "malformed"),
        ([0, 0, None, 1], "malformed"),
        ([0, 0, float("nan"), 1], "out_of_range"),
        ([0, 0, float("inf"), 1], "out_of_range"),
        ([0, 0, 10**400, 1], "out_of_range"),
        ([-1, 0, 5, 5], "out_of_range"),
        ([0, 0, 10, 21], "out_of_range"),
        ([5, 0, 1, 5], "inverted"),
        ([5, 5, 5, 9], "inverted"),
    ],
)
def test_unit_box_refuses(numbers: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        unit_box(numbers, width=10, height=20, what="box")
    assert caught.value.reason == reason


def test_unit_box_divides_by_the_size() -> None:
    assert unit_box([1, 2, 10, 20], width=10, height=20, what="box") == Box(0.1, 0.1, 1, 1)


# ---------------------------------------------------------------- images

ROOT = Path("/data/set")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.png", "/data/set/a.png"),
        ("./sub//a.png", "/data/set/sub/a.png"),
        ("sub/../a.png", "/data/set/a.png"),
        ("/data/set/a.png", "/data/set/a.png"),
        ("file:///data/set/a.png", "/data/set/a.png"),
        ("/mnt/them/a.png", "/data/set/a.png"),
        ("/mnt/them/./sub/a.png", "/data/set/sub/a.png"),
        ({"path": "a.png", "bytes": None}, "/data/set/a.png"),
        ("..a.png", "/data/set/..a.png"),
    ],
)
def test_a_name_becomes_a_path_under_the_root(name: Any, path: str) -> None:
    assert ImageRoot(ROOT, strip_prefix="/mnt/them").path(name) == Path(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a.png", "unsafe_path"),
        ("..", "unsafe_path"),
        ("sub/../../a.png", "unsafe_path"),
        ("/etc/passwd", "unsafe_path"),
        ("/data/settings/a.png", "unsafe_path"),
        ("/data/set/../other/a.png", "unsafe_path"),
        ("/mnt/them/../a.png", "unsafe_path"),
        ("http://example.org/a.png", "unsafe_path"),
        ("", "malformed"),
        ("  ", "malformed"),
        ("a\0.png", "malformed"),
        (None, "malformed"),
        (7, "malformed"),
        (["a.png"], "malformed"),
        ({"path": None, "bytes": None}, "malformed"),
        (b"bytes", "embedded_image"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        ImageRoot(ROOT, strip_prefix="/mnt/them").path(name)
    assert caught.value.reason == reason


@pytest.mark.parametrize("root", [Path(), Path(".."), Path("sub")])
def test_a_relative_root_is_no_way_out(root: Path) -> None:
    assert ImageRoot(root).path("a.png") == root / "a.png"
    with pytest.raises(RowError, match="leads out of"):
        ImageRoot(root).path("../../secret.png")


def test_an_absolute_name_may_lie_under_a_relative_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ImageRoot(Path("sub")).path(f"{tmp_path}/sub/a.png") == tmp_path / "sub/a.png"
    assert ImageRoot(Path("/")).path("/anywhere/a.png") == Path("/anywhere/a.png")


@pytest.mark.parametrize("names", ["a.png", ["a.png"], ("a.png",), {"path": "a.png"}])
def test_one_name_is_as_good_as_a_list(names: Any) -> None:
    assert ImageRoot(ROOT).paths(names) == (ROOT / "a.png",)


PNG, JPEG = b"\x89PNG...", b"\xff\xd8\xff..."


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (PNG, ".png"),
        (JPEG, ".jpg"),
        ({"bytes": JPEG, "path": None}, ".jpg"),
        ({"bytes": JPEG, "path": "x/photo.JPEG"}, ".jpeg"),
        ({"bytes": PNG, "path": "../../run.sh"}, ".png"),
    ],
)
def test_an_embedded_image_is_written_under_the_hash_of_its_bytes(tmp_path: Path, image: Any, suffix: str) -> None:
    root = ImageRoot(ROOT, store=tmp_path / "out")
    first, second = root.paths([image, image])
    assert first == second
    assert (first.parent, first.suffix) == (tmp_path / "out", suffix)
    assert list((tmp_path / "out").iterdir()) == [first]


def test_a_folder_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written .*set images_out"):
        ImageRoot(ROOT, store=tmp_path / "out").path(PNG)


def test_the_usual_root_is_the_files_folder(tmp_path: Path) -> None:
    file = write(tmp_path, "[]", "train.json")
    assert image_root(file, None) == ImageRoot(tmp_path, None, tmp_path / "train_images")
    assert image_root(tmp_path, None).folder == tmp_path
    assert image_root(file, "elsewhere", "/mnt", "out") == ImageRoot(Path("elsewhere"), "/mnt", Path("out"))
    assert image_root(Path("hub:them/set"), None) == ImageRoot(Path(), None, None)
