"""Facts about telling formats apart: every fixture of a source is taken for that source, and what fits none is not guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import FIXTURES

from polyground.errors import DataError
from polyground.sources.recognise import fields_of, recognise


@pytest.mark.parametrize("kind", FIXTURES)
def test_a_file_is_taken_for_what_it_is(tmp_path: Path, kind: str) -> None:
    source, write = FIXTURES[kind]
    path, _ = write(tmp_path)
    assert recognise(path) == source


@pytest.mark.parametrize("kind", ["odinw", "mc_bench", "mc_bench-coco"])
def test_tables_on_a_single_line_are_no_json_lines(tmp_path: Path, kind: str) -> None:
    source, write = FIXTURES[kind]
    path, _ = write(tmp_path)
    tables = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tables), encoding="utf-8")
    assert recognise(path) == source
    assert fields_of(path) == list(tables)


SAID = [{"role": "user", "content": "<image>Where is the cup?"}, {"role": "assistant", "content": "[[1, 2, 3, 4]]"}]
TYPED = {"type": "region", "images": ["a.png"]}


@pytest.mark.parametrize(
    ("rows", "source"),
    [
        pytest.param([{"messages": SAID, "images": ["a.png"]}], "sharegpt", id="llama-factory-messages"),
        pytest.param([{"prompt": "Where?", "completion": "There.", "images": []}], "trl", id="trl-standard"),
        pytest.param(
            [{**TYPED, "conversations": [{"from": "human", "value": "Where?"}]}], "sharegpt", id="typed-without-box-tokens"
        ),
        pytest.param([{"text": "a caption", "picture": "a.png"}], None, id="unknown-fields"),
        pytest.param([{"messages": SAID}, {"text": "a caption"}], None, id="two-formats-in-one-file"),
        pytest.param([[1, 2, 3]], None, id="rows-that-are-no-objects"),
        pytest.param([], None, id="empty"),
    ],
)
def test_what_fits_no_format_is_not_guessed(tmp_path: Path, rows: list[Any], source: str | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert recognise(path) == source


def test_the_fields_of_an_unknown_file_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a caption", "picture": "a.png"}\n', encoding="utf-8")
    assert fields_of(path) == ["text", "picture"]


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read: there is no such file"):
        recognise(tmp_path / "nowhere.json")
